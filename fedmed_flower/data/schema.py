"""The schema of a hospital's table, and rows from CSV or Parquet files that follow it."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.cells import (
    LARGEST,
    MISSING,
    Cells,
    category_text,
    frame_cells,
    near_names,
    plain,
    require,
)
from fedmed_flower.data.formats import read_cells
from fedmed_flower.data.rows import Rows
from fedmed_flower.data.site import SPLITS, LineNumber
from fedmed_flower.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger("flwr.fedmed")

TASKS = ("binary", "multi-class", "count", "continuous", "survival")
_CLASSED = ("binary", "multi-class")
_EVENTS = ("0", "1")
_BINARY = ("0", "1")  # The classes of a binary target unless they are named.
# Such as 13.01.2020 or 1/13/2020.
_OTHER_DATE = re.compile(r"[0-9]{1,2}([./-])[0-9]{1,2}\1(19|20)?[0-9]{2}\b")
_ROW_KEYS = ("patient", "split")


@dataclass(frozen=True)
class Schema:
    """The meaning of a table's columns; the same at each hospital of a run.

    Attributes
    ----------
    target : str
        The column to predict; in a survival task the time, 0 or more.
    task : str
        "binary", "multi-class", "count", "continuous" or "survival".
    numeric, categorical : tuple of str
        The features. In a categorical column numbers, True and False become texts as in
        `category_text`.
    categories : dict of str to tuple of str
        By categorical column: all its possible values, in order. Columns may be left out.
    ranges : dict of str to (float, float)
        By numeric column, or target that is a number: least and greatest plausible value. A value
        outside is logged. In a feature it counts as missing; a row with such a target is rejected.
    whole : tuple of str
        Numeric columns that hold whole numbers, such as counts of visits; of a continuous target or
        a time too. Another number is handled as one out of its range. A count needs no mention.
    bands : dict of str to tuple of float
        By numeric column: cut points. ``{"age": (50, 65)}`` adds an "age-band" to each row: "<50",
        "50-65" (65 not included) or ">=65". A band is not a feature.
    classes : tuple of str
        The target's classes, as written in the table; class 0 first. If left out for a binary
        target: "0" and "1".
    event : str
        In a survival task: the column that is 1 if the event happened, 0 if a row is censored.
    codes : dict of str to dict of str to str
        By categorical column, target with classes, or event: what the texts in the table stand for.
        ``{"status": {"1": 0, "2": 1}}`` reads 2 as the event and 1 as censored. Several texts may
        stand for one: of competing events ``{"0": 0, "1": 1, "2": 0}`` censors the second. Of a
        target or event only the texts that are named are valid; in a categorical column others stay
        as they are.
    patient : str
        The column that names the patient of each row.
    indicators : bool
        Whether each numeric column has a second feature: 1 if the value is missing, else 0.

    Raises
    ------
    InputError
        If a field has another type or is out of its range, a column is named twice, or the target,
        the event or the patient is among the features.

    Examples
    --------
    >>> schema = Schema(
    ...     target="died",
    ...     task="binary",
    ...     numeric=("age",),
    ...     categorical=("sex",),
    ...     ranges={"age": (0, 110)},
    ...     categories={"sex": ("f", "m")},
    ...     bands={"age": (50, 65)},
    ... )
    >>> schema.features
    ('age', 'sex')
    """

    target: str
    task: str
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    bands: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    event: str = ""
    codes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    patient: str = "patient"
    indicators: bool = False
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.task in TASKS, f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        for name in ("numeric", "categorical"):
            self._put(name, _names(name, getattr(self, name)))
        for name in ("target", "patient"):
            _names(name, (getattr(self, name),))
        for name in ("categories", "ranges", "bands"):
            given = getattr(self, name)
            require(isinstance(given, Mapping), f"{name} must be a dict by column, got {given!r}")
        self._check_columns()
        numbers = self.numeric if self.task in _CLASSED else (*self.numeric, self.target)
        self._put("categories", self._by_column("categories", self.categorical, _distinct))
        self._put("ranges", self._by_column("ranges", numbers, _range))
        self._put("bands", self._by_column("bands", self.numeric, _ascending))
        self._put("whole", _names("whole", self.whole))
        for name in self.whole:
            near = near_names(name, numbers)
            require(name in numbers, f"whole names {name!r}{near}, which is not a numeric column")
        self._put("classes", _distinct("classes", self.classes) if self.classes else ())
        self._check_task()
        self._check_codes()

    @property
    def features(self) -> tuple[str, ...]:
        """The columns that a prediction is computed from: numeric, then categorical."""
        return (*self.numeric, *self.categorical)

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_columns(self) -> None:
        named: dict[str, str] = {}
        columns = [("numeric", name) for name in self.numeric]
        columns += [("categorical", name) for name in self.categorical]
        columns += [("bands", band_name(name)) for name in self.bands]
        require(bool(self.features), "numeric and categorical name no column: name a feature")
        for kind, name in columns:
            require(name not in named, f"{kind} names {name!r}, named in {named.get(name)} before")
            named[name] = kind
        roles = {"target": self.target, "event": self.event, "patient": self.patient}
        for kind, name in roles.items():
            require(
                named.get(name) in (None, *roles),
                f"{kind} {name!r} is in {named.get(name)} too: the model would be given what it "
                "must not see",
            )
            require(name not in named, f"{kind} names {name!r}, named in {named.get(name)} before")
            named[name] = kind
        for name in _ROW_KEYS:
            require(
                named.get(name) in (None, "patient"),
                f"{named.get(name)} names {name!r}, which is a key of rows with another meaning: "
                "rename the column",
            )

    def _by_column(
        self, name: str, known: Sequence[str], read: Callable[[str, Any], Any]
    ) -> dict[str, Any]:
        given = getattr(self, name)
        kind = "categorical" if name == "categories" else "numeric"
        for column in given:
            near = near_names(str(column), known)
            require(column in known, f"{name} names {column!r}{near}, which is not a {kind} column")
        return {column: read(f"{name} of {column!r}", value) for column, value in given.items()}

    def _check_task(self) -> None:
        count = len(self.classes)
        if self.task == "binary":
            self._put("classes", self.classes or _BINARY)
            require(count in (0, 2), f"classes must be two for a binary task, got {count}")
        elif self.task == "multi-class":
            require(count > 1, f"classes must be two or more for a multi-class task, got {count}")
        else:
            require(not count, f"classes are for {' and '.join(_CLASSED)} tasks, not {self.task}")
        if self.task == "survival":
            _names("event", (self.event,))
        else:
            require(not self.event, f"event is for a survival task, not {self.task}")

    def _check_codes(self) -> None:
        require(isinstance(self.codes, Mapping), f"codes must be a dict by column: {self.codes!r}")
        allowed = {name: self.categories.get(name, ()) for name in self.categorical}
        if self.task in _CLASSED:
            allowed[self.target] = self.classes
        if self.event:
            allowed[self.event] = _EVENTS
        for column in self.codes:
            require(
                column in allowed,
                f"codes names {column!r}{near_names(str(column), allowed)}, which is not a "
                "categorical column, a target with classes or the event",
            )
        codes = {name: _codes(name, texts, allowed[name]) for name, texts in self.codes.items()}
        self._put("codes", codes)


@dataclass(frozen=True)
class Table:
    """The rows of a table.

    Attributes
    ----------
    rows : Rows
        A sequence of mappings, one a row, that also gives whole columns as arrays. Rows cannot be
        changed: ``{**row, "age": 50.0}`` makes a dict with another value. Each row has ``patient``
        (a text, or a `LineNumber` if the table names no patients) and, if a column for it was
        named, ``split``. By the names of their columns it has numeric features (float, NaN if
        missing), categorical features, bands and kept columns (text, None if missing), the target
        (number of the class, count, number or time) and the event (0 or 1).
    rejected : int
        How many rows could not be used and are left out.
    problems : tuple of str
        Each problem of the table, how often it occurs and how it was handled. Only for the
        hospital's own log, because problems quote the table.
    lacking : tuple of str
        The features of the schema that the table has no column for.
    lines : tuple of int
        For each row, its line in a text, or its number in Parquet and data frames.
    """

    rows: Rows
    rejected: int = 0
    problems: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    lines: tuple[int, ...] = ()


def read_table(
    path: str | Path,
    schema: Schema,
    *,
    split: str = "",
    missing: Sequence[str] = MISSING,
    keep: Sequence[str] = (),
    decimal: str = "",
    outcome: bool = True,
) -> Table:
    """Read the rows of a file.

    Parameters
    ----------
    path : str or Path
        ``.parquet`` (needs pyarrow), ``.xlsx`` (needs openpyxl; one sheet), ``.dta`` (Stata; labels
        of values are not used), or a text in UTF-8 with a heading; ``.gz`` is unpacked. The cells
        of a text are separated by commas, semicolons or tabs.
    schema : Schema
    split : str
        The column that holds train, val or test; empty if there is none.
    missing : sequence of str
        Texts that stand for a missing value, besides an empty cell. Case does not matter, and "-9"
        also stands for the number. A declared category or class never counts as missing, nor does
        "-" in a column that has "+" as well.
    keep : sequence of str
        Further columns that rows have, as texts.
    decimal : {"", ".", ","}
        The decimal mark of numbers in a text. Beside a decimal comma, points between groups of
        three digits are left out: 1.250,5 is 1250.5. If it is empty, the file decides: between
        commas or tabs a number has a point; between semicolons a comma or a point.
    outcome : bool
        If False, the rows are to be predicted: target and event are not read, and no row is
        rejected for its patient.

    Returns
    -------
    Table
        A row is rejected if its target, event, patient or split is missing or not allowed. An
        invalid value of a feature counts as missing, as does a column of a feature that the table
        lacks.

    Raises
    ------
    InputError
        If the file cannot be read, has a column twice, lacks the target, the event, the patient
        (unless that is the default, "patient"), the split or all features, or no row can be used.
        If three outcomes or more, and more than one in twenty, are no declared class or event, or
        all valid outcomes are the same and another is a number: then they are coded otherwise. If
        1.250 between semicolons may be 1250 or 1.25.
    """
    require(decimal in ("", ".", ","), f'decimal must be "", "." or ",", got {decimal!r}')
    cells = read_cells(Path(path).expanduser())
    cells.decimal = decimal or cells.decimal
    return _table(cells, schema, split, missing, keep, outcome)


def table_of(
    frame: DataFrame,
    schema: Schema,
    where: str,
    *,
    split: str = "",
    missing: Sequence[str] = MISSING,
    keep: Sequence[str] = (),
) -> Table:
    """Return the rows of a data frame; its index is ignored.

    Parameters
    ----------
    frame : pandas.DataFrame
    where : str
        The table's name in problems and errors.
    schema, split, missing, keep
        As in `read_table`, as are the return value and the errors. Rows are numbered from 1.
    """
    return _table(frame_cells(frame, where), schema, split, missing, keep, outcome=True)


def band_name(column: str) -> str:
    """Return the key under which rows hold the band of a numeric column."""
    return f"{column}-band"


def band_names(cuts: Sequence[float]) -> list[str]:
    """Return what the bands between cut points are called, in ascending order."""
    points = [plain(cut) for cut in cuts]
    return [f"<{points[0]}", *map("-".join, pairwise(points)), f">={points[-1]}"]


def empty_columns(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> tuple[str, ...]:
    """Return the columns without a value in any row: all of them are None, NaN or not there."""
    if isinstance(rows, Rows):
        return tuple(n for n in names if n not in rows.names or _has_no_value(rows.column(n)))
    empty = dict.fromkeys(names)
    for row in rows:
        known = [name for name in empty if not _is_gap(row.get(name))]
        for name in known:
            del empty[name]
        if not empty:
            break
    return tuple(empty)


def _has_no_value(column: NDArray[Any]) -> bool:
    if column.dtype == object:
        return all(map(_is_gap, column.tolist()))
    return bool(np.isnan(column).all())


def without_values(name: str) -> str:
    """Return the problem of a column that `empty_columns` names."""
    return f"{name} has no value in any row"


def _table(
    cells: Cells,
    schema: Schema,
    split: str,
    missing: Sequence[str],
    keep: Sequence[str],
    outcome: bool,
) -> Table:
    count = len(cells.lines) + cells.ragged
    require(count > 0, f"{cells.where} holds no rows")
    cells.missing = frozenset(text.lower() for text in map(category_text, missing) if text)
    cells.codes = {name: schema.codes[name] for name in schema.categorical if name in schema.codes}
    absent = _check_names(cells, schema, split, keep, outcome)
    outcomes = _outcome(cells, schema) if outcome else {}
    columns: dict[str, NDArray[Any]] = {}
    if schema.patient in cells.names:
        patients = cells.texts(schema.patient)
        if outcome:
            cells.need(f"patient {schema.patient}", patients)
        columns["patient"] = _objects(patients)
    if split:
        splits = [text and text.lower() for text in cells.texts(split)]
        cells.need(f"split {split}", splits, SPLITS)
        columns["split"] = _objects(splits)
    if cells.rejected.all():
        reasons = "; ".join(cells.problems)
        raise InputError(f"{cells.where}: none of {count} rows can be used: {reasons}")
    if "patient" not in columns:
        columns["patient"] = _objects([LineNumber(line) for line in cells.lines])
        cells.problems.append(
            f"there is no column 'patient'{near_names('patient', cells.names)}: each row counts as "
            f"a patient, named after its {cells.word}"
        )
    for name in absent:
        near = near_names(name, cells.names)
        cells.problems.append(f"there is no column {name!r}{near}: counted as missing in all rows")
    for name in schema.numeric:
        values = cells.numbers(name, schema.ranges.get(name), whole=name in schema.whole)
        columns[name] = values
        if cuts := schema.bands.get(name):
            columns[band_name(name)] = _bands(values, cuts)
    for name in schema.categorical:
        declared = schema.categories.get(name, ())
        texts = cells.texts(name, declared)
        columns[name] = _objects(texts)
        if declared:
            cells.note_undeclared(name, texts, declared)
    columns |= outcomes
    further = {name: cells.texts(name) for name in keep if name not in columns}
    for name, texts in further.items():
        cells.problems += _dates_unread(name, texts)
    columns |= {name: _objects(texts) for name, texts in further.items()}
    lines = np.asarray(cells.lines, np.int64)
    if cells.rejected.any():
        lines = lines[~cells.rejected]
        columns = {name: column[~cells.rejected] for name, column in columns.items()}
    rows = Rows(columns)
    if outcome:
        present = [name for name in (*schema.features, *keep) if name not in absent]
        cells.problems += [without_values(name) for name in empty_columns(rows, present)]
    problems = tuple(f"{cells.where}: {problem}" for problem in cells.problems)
    for problem in problems:
        log.warning("%s", problem)
    return Table(rows, count - len(rows), problems, tuple(absent), tuple(lines.tolist()))


def _check_names(
    cells: Cells, schema: Schema, split: str, keep: Sequence[str], outcome: bool
) -> tuple[str, ...]:
    """Return the features and kept columns that the table lacks; raise if it lacks another one."""
    names = cells.names
    where = cells.where
    for name, times in Counter(filter(None, names)).most_common(1):
        require(times < 2, f"{where} has {times} columns {name!r}: rename all but one")
    listed = f"its columns are {', '.join(map(repr, names[:30]))}{', ...' * (len(names) > 30)}"
    if len(names) == 1:
        listed = (
            f"its only column is {names[0]!r}: the first line must be the heading, with commas, "
            "semicolons or tabs between names"
        )
    roles = {"split": split}
    if outcome:
        roles = {"target": schema.target, "event": schema.event, "split": split}
    if outcome and schema.patient != "patient":
        roles["patient"] = schema.patient
    for role, name in roles.items():
        require(
            not name or name in names,
            f"{where} has no column {name!r}{near_names(name, names)}, the {role}; {listed}",
        )
    for name in keep:
        require(
            name not in _ROW_KEYS,
            f"keep names {name!r}, which is a key of rows with another meaning: rename the column",
        )
    absent = [name for name in (*schema.features, *keep) if name not in names]
    if {*schema.features} <= {*absent}:
        features = ", ".join(f"{name!r}{near_names(name, names)}" for name in schema.features)
        raise InputError(f"{where} has none of the features {features}; {listed}")
    return tuple(absent)


def _outcome(cells: Cells, schema: Schema) -> dict[str, NDArray[Any]]:
    """Return the columns of target and event, and reject the rows that lack one.

    The value of a row that is rejected is arbitrary.
    """
    name = schema.target
    classes = schema.classes
    label = f"target {name}"
    if classes:
        texts = _outcome_texts(cells, schema, label, name, classes)
        number = {text: index for index, text in enumerate(classes)}
        return {name: np.array([number.get(text or "", 0) for text in texts], np.int64)}
    values = cells.numbers(name, schema.ranges.get(name), label, name in schema.whole)
    cells.note(label, "is missing", np.isnan(values))
    raw = cells.raw(name)
    if schema.task == "count":
        whole = (values >= 0) & (values == np.floor(values)) & (values <= 2**53)
        cells.note(label, "is not a count (0, 1, 2, ...)", ~whole, raw)
        return {name: np.where(whole, values, 0).astype(np.int64)}
    if schema.task == "continuous":
        return {name: values}
    cells.note(label, "is below 0", ~(values >= 0), raw)
    events = _outcome_texts(cells, schema, f"event {schema.event}", schema.event, _EVENTS)
    return {name: values, schema.event: np.array([text == "1" for text in events], np.int64)}


def _outcome_texts(
    cells: Cells, schema: Schema, label: str, name: str, meanings: Sequence[str]
) -> list[str | None]:
    """Return what the texts of a target or event stand for; reject rows whose text has no meaning.

    Raises
    ------
    InputError
        If so many texts have none that they are other codes than those declared.
    """
    codes = schema.codes.get(name) or {text: text for text in meanings}
    texts = cells.texts(name, (*codes,))
    unnamed = (*codes,) == schema.classes == _BINARY
    cells.require_codes(label, texts, (*codes,), nameable=unnamed)
    cells.need(label, texts, (*codes,))
    return [codes.get(text or "") for text in texts]


def _objects(cells: Sequence[Any]) -> NDArray[Any]:
    return np.fromiter(cells, object, len(cells))


def _dates_unread(name: str, texts: Sequence[str | None]) -> Iterator[str]:
    """Yield a problem if most texts of a column are dates in a form that statistics cannot read."""
    counts = Counter(text for text in texts if text is not None)
    dates = {text: count for text, count in counts.items() if _OTHER_DATE.match(text)}
    number = sum(dates.values())
    if 2 * number > counts.total():
        yield (
            f"{name} is a date such as {next(iter(dates))[:20]!r} in {number} rows, of which "
            "statistics by time read none: write it as 2020-01-13"
        )


def _is_gap(value: Any) -> bool:
    # Of single values only NaN, and pandas' missing time, differ from themselves.
    return value is None or (isinstance(value, Real | date) and bool(value != value))


def _bands(values: NDArray[np.float64], cuts: Sequence[float]) -> NDArray[Any]:
    labels: list[str | None] = [*band_names(cuts), None]
    # A missing value has the last label, None.
    indices = np.where(np.isnan(values), len(cuts) + 1, np.searchsorted(cuts, values, "right"))
    return _objects(labels)[indices]


def _names(what: str, names: Any) -> tuple[str, ...]:
    several = isinstance(names, Iterable) and not isinstance(names, str)
    require(several, f"{what} must be a tuple of columns, got {names!r}")
    for name in names:
        require(
            isinstance(name, str) and name == name.strip() != "",
            f"{what} must name columns by texts without blanks around them, got {name!r}",
        )
    return tuple(names)


def _distinct(what: str, values: Any) -> tuple[str, ...]:
    several = isinstance(values, Iterable) and not isinstance(values, str)
    require(several, f"{what} must be a tuple of texts, got {values!r}")
    texts = tuple(map(category_text, values))
    filled = tuple(text for text in texts if text)
    require(
        0 < len(filled) == len(texts) == len({*filled}),
        f"{what} must be one or more different texts, none of them empty, got {tuple(values)!r}",
    )
    return filled


def _codes(column: str, texts: Any, allowed: Sequence[str]) -> dict[str, str]:
    what = f"codes of {column!r}"
    require(isinstance(texts, Mapping) and bool(texts), f"{what} must be a dict, got {texts!r}")
    names = _distinct(what, tuple(texts))
    meanings = tuple(map(category_text, texts.values()))
    for name, meaning in zip(names, meanings, strict=True):
        one_of = f"one of {', '.join(allowed)}" if allowed else "a text"
        require(
            bool(meaning) and (not allowed or meaning in allowed),
            f"{what} gives {name!r} the meaning {meaning!r}: it must be {one_of}",
        )
    return {name: meaning or "" for name, meaning in zip(names, meanings, strict=True)}


def _ascending(what: str, values: Any) -> tuple[float, ...]:
    numbers = tuple(values) if isinstance(values, Iterable) else ()
    real = bool(numbers) and all(isinstance(value, Real) for value in numbers)
    floats = tuple(map(float, numbers)) if real else ()
    finite = all(abs(value) <= LARGEST for value in floats)
    ascending = all(low < high for low, high in pairwise(floats))
    fulfilled = real and finite and ascending
    require(fulfilled, f"{what} must be finite numbers in ascending order, got {values!r}")
    return floats


def _range(what: str, values: Any) -> tuple[float, ...]:
    numbers = _ascending(what, values)
    require(len(numbers) == 2, f"{what} must be two numbers, got {values!r}")
    return numbers
