"""What a server asks of hospitals' tables; it travels as one text."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from fedmed_flower.errors import InputError

KINDS = ("tables", "moments", "histograms", "correlations")
OPERATIONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_FILTER = re.compile(r"\s*(.+?)\s*(==|!=|<=|>=|<|>|=)\s*(.*?)\s*")
_MOST_NAMES = 1000
_MOST_LETTERS = 200
# Numbers in a hospital's columns are below this.
_FARTHEST = 1e100


class Filter(NamedTuple):
    """A condition that a row must meet; a row without a value in the column does not.

    Attributes
    ----------
    column : str
    operation : {"==", "!=", "<", "<=", ">", ">="}
    value : float or str
    """

    column: str
    operation: str
    value: float | str


class Survival(NamedTuple):
    """A Kaplan-Meier curve: times are rounded up to multiples of a width, or to the horizon.

    Attributes
    ----------
    time, event : str
        Columns; the event is 1 if it happened, 0 if the time is that of censoring.
    horizon, width : float
        In the unit of the times; above 0.
    """

    time: str
    event: str
    horizon: float
    width: float

    @property
    def no_times(self) -> str:
        """What to say where the times are texts."""
        return (
            f"{self.time} holds no numbers, which a survival curve needs: if its texts are "
            f"numbers, declare their range: --range {self.time}=0,{self.horizon:g}"
        )


@dataclass(frozen=True)
class Request:
    """One question to all hospitals.

    Attributes
    ----------
    columns : tuple of str
        Empty for all columns of single values that a hospital has.
    where : tuple of Filter
        All of them must hold.
    by : str
        A column whose values make groups, each answered by itself. Empty for all rows together.
    by_width : float
        Above 0: `by` holds numbers or dates, and its windows are that wide, in days for dates.
    kinds : tuple of str
        Of `KINDS`.
    categorical : tuple of str
        Columns of numbers that are codes.
    whole : tuple of str
        Numeric columns that hold whole numbers, such as counts. Another value counts as missing.
        Bounds of quantiles are then whole numbers, or lie between those of two patients.
    resolutions : mapping of str to float
        The width of a numeric column's cells in histograms and quantiles. By default it is about a
        fiftieth of the declared range; for whole numbers it is 1 without a range, and never less.
        Other columns without a range have neither.
    ranges : mapping of str to (float, float)
        With noise every numeric column needs a range, to which values are clipped.
    categories : mapping of str to tuple of str
        With noise every categorical column needs its categories.
    pairs : tuple of (str, str)
        Categorical columns to tabulate against each other.
    survival : Survival or None
    weekly : str
        A column of dates, or of numbers of days: rows are counted week by week.
    epsilon, delta : float
        With `epsilon` above 0 the answer carries noise and is charged to each hospital's ledger.
    minimum : int
        The fewest patients behind a number that leaves, if a hospital does not ask for more.
    """

    columns: tuple[str, ...] = ()
    where: tuple[Filter, ...] = ()
    by: str = ""
    by_width: float = 0.0
    kinds: tuple[str, ...] = ("tables", "moments")
    categorical: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    resolutions: Mapping[str, float] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()
    survival: Survival | None = None
    weekly: str = ""
    epsilon: float = 0.0
    delta: float = 1e-5
    minimum: int = 0

    def __post_init__(self) -> None:
        """Raise `InputError` if a field is out of its range."""
        for name in ("columns", "categorical", "whole", "kinds"):
            _require_names(name, getattr(self, name))
        _require_names("by", (self.by,) if self.by else ())
        _require_names("weekly", (self.weekly,) if self.weekly else ())
        if len(set(self.columns)) < len(self.columns):
            raise InputError("columns must name each column once")
        for kind in self.kinds:
            if kind not in KINDS:
                raise InputError(f"kinds must be among {', '.join(KINDS)}, got {kind!r}")
        if len(self.where) > 20:
            raise InputError(f"where must have at most 20 conditions, got {len(self.where)}")
        for condition in self.where:
            _require_filter(condition)
        if self.by_width:
            _require_length("by_width", self.by_width)
        for column, width in self.resolutions.items():
            _require_length(f"the resolution of {column}", width)
        for column, (low, high) in self.ranges.items():
            # As floats, in which answers are computed: different integers may be equal then.
            if not (max(-low, high) <= _FARTHEST and float(high) - float(low) > 1e-300):
                raise InputError(
                    f"the range of {column} must be two numbers from -{_FARTHEST:g} to "
                    f"{_FARTHEST:g}, the lower first, got {low} and {high}"
                )
        for column, names in self.categories.items():
            _require_names(f"the categories of {column}", names)
            if len(set(names)) < max(len(names), 1):
                raise InputError(f"the categories of {column} must be one or more, each once")
        for column in (*self.categorical, *self.categories):
            if column in self.ranges:
                raise InputError(
                    f"{column} is declared categorical and has a range, as numbers have: leave one "
                    "of them out"
                )
            if column in self.whole:
                raise InputError(
                    f"{column} is declared categorical and to hold whole numbers: leave one of "
                    "them out"
                )
        if len(self.pairs) > _MOST_NAMES:
            raise InputError(f"pairs must be at most {_MOST_NAMES}, got {len(self.pairs)}")
        for pair in self.pairs:
            if len(pair) != 2 or pair[0] == pair[1]:
                raise InputError(f"pairs must be of two different columns, got {pair!r}")
            _require_names("pairs", pair)
        if self.survival is not None:
            _require_survival(self.survival)
        _require_number("epsilon", self.epsilon, self.epsilon >= 0, "at least 0")
        _require_number("delta", self.delta, 0 < self.delta < 1, "above 0 and below 1")
        if self.minimum < 0:
            raise InputError(f"minimum must be at least 0, got {self.minimum}")
        if self.epsilon and (self.weekly or self.by_width):
            raise InputError(
                "weekly counts and windows carry no noise: leave epsilon, weekly or by_width out"
            )

    def to_text(self) -> str:
        """Return the request as JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    def to_options(self) -> list[str]:
        """Return the request as options of `fedmed statistics`; `minimum` has none.

        Examples
        --------
        >>> Request(columns=("age",), where=(Filter("sex", "==", "f"),)).to_options()
        ['--column', 'age', '--where', 'sex==f']
        """
        options = [
            *(("--column", name) for name in self.columns),
            *(("--where", _filter_text(condition)) for condition in self.where),
            *(("--categorical", name) for name in self.categorical),
            *(("--whole", name) for name in self.whole),
            *(("--resolution", f"{name}={_plain(w)}") for name, w in self.resolutions.items()),
            *(("--range", f"{n}={_plain(a)},{_plain(b)}") for n, (a, b) in self.ranges.items()),
            *(("--categories", f"{n}={','.join(names)}") for n, names in self.categories.items()),
            *(("--table", f"{one},{other}") for one, other in self.pairs),
        ]
        if self.by:
            options.append(("--drift-by" if self.by_width else "--by", self.by))
        if self.by_width:
            options.append(("--window", _plain(self.by_width)))
        if self.survival is not None:
            time, event, *lengths = self.survival
            options.append(("--survival", ",".join((time, event, *map(_plain, lengths)))))
        if self.weekly:
            options.append(("--weekly", self.weekly))
        if self.epsilon:
            options += [("--epsilon", _plain(self.epsilon)), ("--delta", _plain(self.delta))]
        flags = {"--quantiles": "histograms", "--correlations": "correlations"}
        chosen = [flag for flag, kind in flags.items() if kind in self.kinds]
        return [*(text for option in options for text in option), *chosen]

    @classmethod
    def from_text(cls, text: str) -> Request:
        """Read what `to_text` wrote.

        Raises
        ------
        InputError
            If the text is not a request.
        """
        try:
            given = json.loads(text)
            known = {entry.name for entry in fields(cls)}
            if unknown := given.keys() - known:
                raise ValueError(f"unknown {', '.join(sorted(unknown))}")
            survival = given.get("survival")
            ranges = _table(given, "ranges")
            return cls(
                **{name: _typed(type(_DEFAULT[name]), value, name) for name, value in given.items()}
                | {
                    "where": tuple(Filter(*entry) for entry in given.get("where", ())),
                    "pairs": tuple(tuple(pair) for pair in given.get("pairs", ())),
                    "survival": None if survival is None else Survival(*survival),
                    "ranges": {c: (low + 0.0, high + 0.0) for c, (low, high) in ranges},
                    "categories": {c: tuple(names) for c, names in _table(given, "categories")},
                    "resolutions": dict(_table(given, "resolutions")),
                }
            )
        except InputError:
            raise
        except Exception as error:  # The text may be anything, and fails in a dozen ways.
            raise InputError(f"the request cannot be read: {error}") from error


def parse_filter(text: str) -> Filter:
    """Read a condition such as ``age>=50`` or ``sex=male``.

    Raises
    ------
    InputError
        If the text is not a condition.

    Examples
    --------
    >>> parse_filter("age>=50")
    Filter(column='age', operation='>=', value=50.0)
    """
    match = _FILTER.fullmatch(text)
    if match is None or not match[3] or match[3][0] in "<>=!":
        raise InputError(
            f"a condition must be a column, one of {' '.join(OPERATIONS)} and a value, got {text!r}"
        )
    column, operation, raw = match.groups()
    try:
        value: float | str = float(raw)
    except ValueError:
        value = raw.strip("\"'")
    condition = Filter(column, "==" if operation == "=" else operation, value)
    _require_filter(condition)
    return condition


def _filter_text(condition: Filter) -> str:
    """Return the text of a condition, as `parse_filter` reads it."""
    column, operation, value = condition
    text = value if isinstance(value, str) else _plain(value)
    bare = f"{column}{operation}{text}"
    return bare if parse_filter(bare) == condition else f'{column}{operation}"{text}"'


def _plain(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _require_filter(condition: Filter) -> None:
    column, operation, value = condition
    _require_names("where", (column,))
    if operation not in OPERATIONS:
        raise InputError(f"a condition must use one of {' '.join(OPERATIONS)}, got {operation!r}")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not math.isfinite(value):  # type: ignore[arg-type]
        raise InputError(f"{column} must be compared with a finite number, got {value}")
    if not number:
        _require_names(f"what {column} is compared with", (value,))  # type: ignore[arg-type]
        if operation not in ("==", "!="):
            raise InputError(f"{column} {operation} must be followed by a number, got {value!r}")


def require_comparable(condition: Filter, categorical: bool) -> None:
    """Raise `InputError` if a condition does not fit a column of categories, or of numbers."""
    column, operation, value = condition
    if not categorical and isinstance(value, str):
        raise InputError(f"{column} holds numbers and cannot be compared with {value!r}")
    if categorical and operation not in ("==", "!="):
        raise InputError(f"{column} holds categories: compare it by == or !=, not {operation}")


def _require_survival(survival: Survival) -> None:
    time, event, horizon, width = survival
    _require_names("survival", (time, event))
    for name, value in (("horizon", horizon), ("width", width)):
        _require_length(f"the {name} of survival", value)
    if time == event or not horizon / width <= 10_000:
        raise InputError(
            "survival must have two different columns and a horizon of at most 10,000 widths, "
            f"got {time}, {event}, {horizon}, {width}"
        )


def _require_names(what: str, names: Iterable[str]) -> None:
    names = list(names)
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= _MOST_LETTERS:
            raise InputError(
                f"{what} must be of texts of 1 to {_MOST_LETTERS} letters, got {name!r}"
            )
    if len(names) > _MOST_NAMES:
        raise InputError(f"{what} must be at most {_MOST_NAMES}, got {len(names)}")


def _require_length(what: str, value: float) -> None:
    if not 0 < value <= _FARTHEST:
        raise InputError(f"{what} must be above 0 and at most {_FARTHEST:g}, got {value}")


def _require_number(what: str, value: float, fulfilled: bool, bound: str) -> None:
    if not (fulfilled and math.isfinite(value)):
        raise InputError(f"{what} must be {bound} and finite, got {value}")


def _typed(kind: type, value: Any, name: str) -> Any:
    """Return a value read from JSON in the type of its field."""
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is not type(None) and type(value) is not kind:
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return value


def _table(given: Mapping[str, Any], name: str) -> Iterable[tuple[str, Any]]:
    items: Iterable[tuple[str, Any]] = given.get(name, {}).items()
    return items


_DEFAULT = asdict(Request())
