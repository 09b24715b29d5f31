"""The cells of a table as texts and numbers, and what is wrong with them."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.data.plain import PlainColumn
from fedmed_flower.errors import InputError, shown

if TYPE_CHECKING:
    from pandas import DataFrame

MISSING = ("", "?", "NA", "N/A", "#N/A", "NaN", "NaT", "None", "NULL", "<NA>", ".", "-")
# No measurement or count is larger, and sums of squares of numbers up to it fit a float.
LARGEST = 1e30

# Data frames write classes as 1.0 if a column has gaps; "1.00" and "01" may be codes.
_WHOLE = re.compile(r"(0|-?[1-9][0-9]*)\.0")
_FLAGS = {"true": "1", "false": "0"}
# Such as 1.250 or 12.345.678,9: groups of three digits.
_GROUPED = re.compile(r"[+-]?[1-9][0-9]{0,2}(\.[0-9]{3})+(,[0-9]*)?")
# If a number at the end of a column stands so often, alone and apart, it may mean "missing".
_FEWEST_LONE = 3
_LONE_SHARE = 0.01
_CODES_BELOW_ZERO = (-1.0, -9.0, -99.0, -999.0, -9999.0)
# Fewer are far from the others, such as typing errors, if they are so many times as far from these
# as these are apart, and if there are so many different values.
_STRAY_RATIO = 10.0
_FEWEST_DISTINCT = 20
# From so many values on, one in so many is looked at first.
_LARGE = 100_000
_PART = 20
_NUMBER_CODE = re.compile(r"-?[0-9]+")
# If a larger share of the outcomes is not valid, and as many rows, they are coded otherwise.
_MOST_UNDECLARED = 0.05
_FEWEST_UNDECLARED = 3
_MOST_LISTED = 6
# If more than half of a column's numbers are outside its declared range.
_OTHER_UNIT = ": perhaps they are of another unit: convert them, or correct the range of {!r}"


def category_text(value: Any) -> str | None:
    """Return a value as the text of a category: 1.0, 1, "1.0", " 1", True and "true" give "1".

    None, NaN and an empty text give None.
    """
    if isinstance(value, str):
        text = value.strip()
    elif value is None or (isinstance(value, Real) and value != value):
        return None
    else:
        if isinstance(value, float | np.floating) and float(value).is_integer():
            value = int(value)
        text = str(value).strip()
    text = _FLAGS.get(text.lower(), text)
    if text.endswith(".0") and (whole_number := _WHOLE.fullmatch(text)):
        return whole_number[1]
    return text or None


Column = Sequence[Any] | NDArray[Any]


@dataclass
class Cells:
    """The columns of a table before they are interpreted; which rows are rejected, and why.

    Attributes
    ----------
    where : str
        The table's name in errors.
    word, lines : str, sequence of int
        How errors refer to a row: "line" and its number in a text, or "row" and its number.
    names : list of str
        Names of the columns, in order.
    column : callable
        Takes an index of `names` and returns the cells of that column: a sequence of texts or any
        other objects, None if missing; or an array of numbers or truth values, NaN if missing.
    decimal : str
        The decimal mark of numbers in texts. If it is empty, commas are decimal marks, and points
        are too unless they stand between groups of three digits.
    ragged : int
        How many rows have more or fewer cells than the heading; they are left out.
    problems : list of str
        Problems found so far.
    missing : frozenset of str
        Texts that stand for a missing value, in lower case.
    codes : dict of str to dict of str to str
        By column: what a text stands for.
    rejected : array of bool
        Which rows are rejected so far.
    """

    where: str
    word: str
    lines: Sequence[int]
    names: list[str]
    column: Callable[[int], Column]
    decimal: str = "."
    ragged: int = 0
    problems: list[str] = field(default_factory=list)
    missing: frozenset[str] = frozenset()
    codes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rejected = np.zeros(len(self.lines), dtype=bool)

    def raw(self, name: str) -> Column:
        """Return a column's cells as they were read; all None if there is no such column."""
        if name in self.names:
            return self.column(self.names.index(name))
        return [None] * len(self.lines)

    def texts(self, name: str, declared: Sequence[str] = ()) -> list[str | None]:
        """Return a column as texts, decoded by `codes`; None if missing.

        A text that is declared or decoded never counts as missing, nor does "-" beside "+".
        """
        codes = self.codes.get(name, {})

        def meanings(cells: Sequence[Any]) -> list[str | None]:
            texts = list(map(category_text, cells))
            kept = {*declared, *codes} | ({"-"} if "+" in texts else set())
            return [
                None
                if text is None or (text not in kept and text.lower() in self.missing)
                else codes.get(text, text)
                for text in texts
            ]

        return _mapped(meanings, self.raw(name))

    def numbers(
        self,
        name: str,
        limits: tuple[float, float] | None = None,
        needed: str = "",
        whole: bool = False,
    ) -> NDArray[np.float64]:
        """Return a column as numbers, NaN if a cell is missing, not a number or not allowed.

        Allowed are numbers within the limits and, if `whole`, whole numbers only. `needed` is the
        column's name in problems if a row cannot do without it: rows with such a cell are then
        rejected. Rows with a missing cell are not.
        """
        cells = self.raw(name)
        values, wrong = self._values(name, cells)
        codes = [float(text) for text in self.missing if _is_number(text)]
        values[np.isin(values, codes)] = np.nan
        too_large = np.abs(values) > LARGEST
        faults = {
            "is not a number": wrong,
            f"is beyond {LARGEST:g}": too_large,
        }
        outside = ""
        if limits:
            low, high = limits
            outside = f"is outside {plain(low)} to {plain(high)}"
            faults[outside] = ((values < low) | (values > high)) & ~too_large
        if whole:
            other = np.logical_or.reduce([np.isnan(values), *faults.values()])
            faults["is not a whole number"] = (values != np.floor(values)) & ~other
        known = np.count_nonzero(~np.isnan(values))
        for what, mask in faults.items():
            values[mask] = np.nan
            mostly = what == outside and 2 * np.count_nonzero(mask) > known
            advice = _OTHER_UNIT.format(name) if mostly else ""
            self.note(needed or name, what, mask, cells, bool(needed), advice=advice)
        self._note_lone(name, values)
        if limits is None:
            self._note_stray(name, values, cells)
        return values

    def _values(self, name: str, cells: Column) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return a column as numbers, NaN if missing or wrong, and which cells are no numbers."""
        if isinstance(cells, np.ndarray):
            return cells.astype(np.float64), np.zeros(len(cells), bool)
        if isinstance(cells, PlainColumn) and self.decimal == ".":
            values, unread = cells.numbers()
            wrong = np.zeros(len(cells), bool)
            left = np.flatnonzero(unread)
            if left.size:
                others = [cells[index] for index in left.tolist()]
                values[left], wrong[left] = self._values(name, others)
            return values, wrong
        grouped = self._has_groups(name, cells)
        numbers = _mapped(lambda some: [self._number(cell, grouped) for cell in some], cells)
        # NumPy makes NaN of None.
        return np.array(numbers, np.float64), np.array([number is None for number in numbers], bool)

    def _note_lone(self, name: str, values: NDArray[np.float64]) -> None:
        """Add a problem if the least or greatest value may be a code of missing values."""
        known = values[~np.isnan(values)]
        if not known.size:
            return
        least = known.min()
        greatest = known.max()
        above = known[known > least].min(initial=greatest)
        below = known[known < greatest].max(initial=least)
        if above == greatest:  # There are fewer than three values.
            return
        fewest = max(_FEWEST_LONE, _LONE_SHARE * len(known))
        for value, gap, rest in (
            (least, above - least, (above, greatest)),
            (greatest, greatest - below, (least, below)),
        ):
            count = int((known == value).sum())
            apart = gap > rest[1] - rest[0] or (value in _CODES_BELOW_ZERO and rest[0] >= 0)
            if count >= fewest and apart:
                code = plain(value)
                self.problems.append(
                    f"{name} is {code} in {count} of {len(known)} rows, apart from its other "
                    f"values ({plain(rest[0])} to {plain(rest[1])}): if {code} stands for a "
                    f'missing value, add "{code}" to missing, or declare the range of {name!r}'
                )

    def _note_stray(self, name: str, values: NDArray[np.float64], cells: Column) -> None:
        """Add a problem if a few values, too few for a code, are far from all others."""
        known = values[~np.isnan(values)]
        fewest = max(_FEWEST_LONE, _LONE_SHARE * len(known))
        if _is_even(known, int(fewest)):
            return
        distinct, counts = np.unique(known, return_counts=True)
        if len(distinct) < _FEWEST_DISTINCT:
            return
        most = min(int(fewest), len(distinct) // 4)
        for sign in (-1, 1):
            ends = distinct[::sign] * sign
            # Without the values at the other end, which may be as wrong.
            spreads = ends[-most - 1 : -1] - ends[most]
            rows_from = np.cumsum(counts[::-sign][:most])[::-1]
            apart = np.diff(ends[-most - 1 :]) > _STRAY_RATIO * spreads
            found = np.flatnonzero(apart & (rows_from < fewest))
            if not found.size:
                continue
            rows = int(rows_from[found[0]])
            rest = np.sort(ends[: found[0] - most] * sign)
            stray = np.isin(values, ends[found[0] - most :] * sign)
            first = int(stray.argmax())
            self.problems.append(
                shown(
                    f"{name} is far from its other values ({plain(rest[0])} to {plain(rest[-1])}) "
                    f"in {rows} row{'s' * (rows > 1)}, kept; the first is {self.word} "
                    f"{self.lines[first]} with {_example(_cell(cells, first))}: if it is a typing "
                    f"error or of another unit, correct it, or declare the range of {name!r}"
                )
            )

    def _has_groups(self, name: str, cells: Sequence[Any]) -> bool:
        """Return whether points in a column's numbers stand between groups of three digits.

        Raises
        ------
        InputError
            If 1.250 may be 1250 or 1.25: neither this column nor another one says which.
        """
        if self.decimal:
            return self.decimal == ","
        texts = [cell.strip() for cell in dict.fromkeys(cells) if isinstance(cell, str)]
        unclear = next((text for text in texts if _meaning_of_point(text) == "unclear"), None)
        if unclear is None:
            return True
        meanings = {_meaning_of_point(text) for text in texts} & {"group", "decimal"}
        if not meanings:
            columns = (self.column(index) for index in range(len(self.names)))
            every = (_meaning_of_point(cell.strip()) for column in columns for cell in {*column})
            meanings = {*every} & {"group", "decimal"}
        if len(meanings) != 1:
            as_group = unclear.replace(".", "")
            raise InputError(
                f"{self.where}: {unclear} in the column {name!r} may be {as_group} or "
                f'{float(unclear):g}: say which by decimal="," or decimal="." of read_table'
            )
        return meanings == {"group"}

    def _number(self, cell: Any, grouped: bool) -> float | None:
        """Return a cell's number, NaN if the cell is missing, None if it is not a number."""
        if isinstance(cell, str):
            text = cell.strip()
            if not text or text.lower() in self.missing:
                return math.nan
            text = _FLAGS.get(text.lower(), text)
            if grouped and _GROUPED.fullmatch(text):
                text = text.replace(".", "")
            if self.decimal != ".":
                text = text.replace(",", ".")
            return float(text) if _is_number(text) else None
        if cell is None:
            return math.nan
        try:
            return float(cell)
        except (TypeError, ValueError, OverflowError):  # Such as a date.
            return None

    def note(
        self,
        name: str,
        what: str,
        mask: ArrayLike,
        cells: Any = None,
        reject: bool = True,
        counted: str = "missing",
        advice: str = "",
    ) -> None:
        """Add a problem of the rows in `mask`, and reject these rows if `reject`.

        Rows that are rejected already are not counted again. `counted` says as what the cell of a
        row that is not rejected counts; `advice` is the end of the problem's text.
        """
        wrong = np.asarray(mask, bool) & ~self.rejected
        if not wrong.any():
            return
        count = int(wrong.sum())
        first = int(wrong.argmax())
        example = "" if cells is None else f" with {_example(_cell(cells, first))}"
        outcome = "rejected" if reject else f"counted as {counted}"
        self.problems.append(
            shown(
                f"{name} {what} in {count} row{'s' * (count > 1)}, {outcome}; the first is "
                f"{self.word} {self.lines[first]}{example}{advice}"
            )
        )
        if reject:
            self.rejected |= wrong

    def need(self, name: str, texts: Sequence[str | None], allowed: Sequence[str] = ()) -> None:
        """Reject rows whose text is missing, or is not among `allowed` if that is given."""
        self.note(name, "is missing", [text is None for text in texts])
        if allowed:
            what = f"is not one of {', '.join(allowed)}"
            self.note(name, what, [text not in allowed for text in texts], texts)

    def note_undeclared(
        self, name: str, texts: Sequence[str | None], declared: Sequence[str]
    ) -> None:
        """Add a problem of the rows whose category is none of those that are declared."""
        listed = ", ".join(declared[:_MOST_LISTED]) + ", ..." * (len(declared) > _MOST_LISTED)
        known = {None, *declared}
        other = [text not in known for text in texts]
        self.note(
            name,
            f"is not one of {listed}",
            other,
            texts,
            reject=False,
            counted="none of them",
            advice=f": write it as one of them, or declare it in categories or codes of {name!r}",
        )

    def require_codes(
        self,
        name: str,
        texts: Sequence[str | None],
        allowed: Sequence[str],
        nameable: bool = False,
    ) -> None:
        """Raise `InputError` if an outcome is coded otherwise than declared.

        That is so if three rows or more, and more than one in twenty, have another text than those
        allowed; or if all rows with an allowed text have the same, and another row has a number. To
        reject such rows would select patients.

        `nameable` says whether the outcome has two classes that the schema has not named yet. The
        error then offers to name them, unless there are numbers among the texts.
        """
        counts = Counter(
            text
            for text, rejected in zip(texts, self.rejected, strict=True)
            if text is not None and not rejected
        )
        others = {text: count for text, count in counts.items() if text not in allowed}
        wrong = sum(others.values())
        many = wrong >= _FEWEST_UNDECLARED and wrong > _MOST_UNDECLARED * counts.total()
        alone = len(counts.keys() & {*allowed}) < 2 and any(map(_NUMBER_CODE.fullmatch, others))
        if not (many or alone):
            return
        column = name.partition(" ")[2]
        listed = ", ".join(
            f"{text!r} ({count} row{'s' * (count > 1)})"
            for text, count in counts.most_common(_MOST_LISTED)
        )
        codes = ", ".join(f"{text!r}: ..." for text in sorted(counts)[:_MOST_LISTED])
        remedy = f"what each text stands for, by codes={{{column!r}: {{{codes}}}}}"
        if nameable and not any(map(_NUMBER_CODE.fullmatch, counts)):
            pair = sorted(counts) if len(counts) == 2 else ("...", "...")
            classes = ", ".join(map(repr, pair))
            remedy = f"the two classes by classes=({classes}), class 0 first; or {remedy}"
        raise InputError(
            shown(
                f"{self.where}: {name} is {listed} and must be one of {', '.join(allowed)}: if "
                f"other hospitals write it so, change this table; else say in the schema {remedy}; "
                "add those that mean missing to missing of read_table",
                1000,
            )
        )


def frame_cells(frame: DataFrame, where: str) -> Cells:
    """Return the cells of a data frame; its index is ignored."""

    def column(index: int) -> Column:
        values = frame.iloc[:, index]
        if isinstance(values.dtype, np.dtype) and values.dtype.kind in "bfiu":
            numbers: NDArray[Any] = values.to_numpy()
            return numbers
        return [cell if known else None for cell, known in zip(values, values.notna(), strict=True)]

    names = [str(name).strip() for name in frame.columns]
    return Cells(where, "row", range(1, len(frame) + 1), names, column)


def plain(number: float) -> str:
    """Return a number as a person writes it: 50 and 2.5."""
    return f"{number:.12g}"


def near_names(name: str, names: Iterable[str]) -> str:
    """Return the names that resemble a name, as " (near: 'age')"; an empty text if none does."""
    folded = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), folded)
    return f" (near: {', '.join(repr(folded[text]) for text in near)})" if near else ""


def require(fulfilled: bool, text: str) -> None:
    """Raise `InputError` with a text unless a condition is fulfilled."""
    if not fulfilled:
        raise InputError(text)


def _mapped(function: Callable[[Sequence[Any]], list[Any]], cells: Column) -> list[Any]:
    """Return what a function makes of each of some cells; of equal cells it is given one alone."""
    if isinstance(cells, np.ndarray):
        distinct, indices = np.unique(cells, return_inverse=True)
        made = function(distinct.tolist())
        return [made[index] for index in indices.tolist()]
    if isinstance(cells, PlainColumn):
        encoded = cells.encoded()
        different = [*{*encoded}]
        made = function([cell.decode() for cell in different])
        return list(map(dict(zip(different, made, strict=True)).__getitem__, encoded))
    # Other objects may be equal and yet be written differently, as 1.5 and Decimal("1.50").
    if not {*map(type, cells)} <= {str, type(None)}:
        return function(cells)
    texts = [*{*cells}]
    return list(map(dict(zip(texts, function(texts), strict=True)).__getitem__, cells))


def _cell(cells: Column, index: int) -> Any:
    """Return a cell; of an array, as a number of Python."""
    return cells.item(index) if isinstance(cells, np.ndarray) else cells[index]


def _example(cell: Any) -> str:
    try:
        return repr(str(cell)[:40])
    except Exception:  # Such as a whole number of 5,000 digits.
        return f"a {type(cell).__name__}"


def _is_even(values: NDArray[np.float64], most: int) -> bool:
    """Return whether none of so few values is far from the others; if not sure, False.

    Of a large column this is told without all its distinct values, which take long to find. The
    others are at least as far apart as the values at the ranks `most` from both ends, less those
    that a part of the column has at its ends.
    """
    if values.size < _LARGE:
        return False
    ends = [0, most, values.size - 1 - most, values.size - 1]
    least, low, high, greatest = np.partition(values, ends)[ends]
    some = np.unique(values[::_PART])
    if some.size <= most:
        return False
    below = (greatest - high) <= _STRAY_RATIO * (high - some[most])
    above = (low - least) <= _STRAY_RATIO * (some[-1 - most] - low)
    return bool(below and above)


def _meaning_of_point(text: str) -> str:
    """Return what points mean in a number: "group", "decimal", "unclear"; empty if it has none.

    A decimal comma says that a point would be one of groups.
    """
    if _GROUPED.fullmatch(text):
        return "group" if "," in text or text.count(".") > 1 else "unclear"
    if "," in text and _is_number(text.replace(",", ".")):
        return "group"
    return "decimal" if "." in text and _is_number(text) else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
