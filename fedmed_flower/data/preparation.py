"""From a table's columns to the features of a network: imputation, scaling, categories.

What several hospitals' moments give together follows T. F. Chan, G. H. Golub and R. J. LeVeque,
"Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", COMPSTAT 1982,
https://doi.org/10.1007/978-3-642-51461-6_3.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.cells import LARGEST, category_text, require
from fedmed_flower.data.schema import Schema
from fedmed_flower.data.site import Row, patient_text
from fedmed_flower.errors import InputError

log = logging.getLogger("flwr.fedmed")

# The keys of what a hospital tells, each followed by a column.
_MOMENTS, _CATEGORIES, _COUNTS = "moments ", "categories ", "counts "
_MOST = 1e12
# Of declared ranges, which lie from -2 to 2 after scaling; and what float32 holds with ease.
_CLIP, _FINITE = 2.0, 1e30
_LEAST = 1 / LARGEST


def contribution(
    rows: Sequence[Row], schema: Schema, minimum: int, only: str | None = None
) -> dict[str, list[float] | list[str] | list[int]]:
    """Return what a hospital tells of its rows, for `Preparation.agreed`.

    Parameters
    ----------
    rows : sequence of dict
        With ``patient`` and the features.
    schema : Schema
    minimum : int
        At least 1: nothing is told that fewer patients stand behind.
    only : str, optional
        The column that is told; else all of the schema's features.

    Returns
    -------
    dict
        ``moments COLUMN``: number of values, their mean and the sum of their squared distances to
        it, for each numeric column. ``categories COLUMN`` and ``counts COLUMN``: the values, and
        how many patients have each, for each categorical column that is not declared.
    """
    require(minimum >= 1, f"minimum must be at least 1, got {minimum}")
    patients = np.asarray([patient_text(row["patient"]) for row in rows], dtype=object)
    reported: dict[str, list[float] | list[str] | list[int]] = {}
    for column in schema.numeric:
        if only not in (None, column):
            continue
        values = _numbers(rows, column)
        there = ~np.isnan(values)
        if there.any() and len({*patients[there]}) >= minimum:
            reported[_MOMENTS + column] = _moments(values[there])
    for column in schema.categorical:
        if column in schema.categories or only not in (None, column):
            continue
        owners: dict[str, set[str]] = defaultdict(set)
        for text, patient in zip(_texts(rows, column), patients, strict=True):
            if text is not None:
                owners[text].add(patient)
        counts = {
            text: len(patient_of_row)
            for text, patient_of_row in owners.items()
            if len(patient_of_row) >= minimum
        }
        if counts:
            reported[_CATEGORIES + column] = sorted(counts)
            reported[_COUNTS + column] = [counts[text] for text in sorted(counts)]
    return reported


def check_contribution(reported: Mapping[str, Any], schema: Schema) -> str | None:
    """Return what is wrong with what a hospital told; None if nothing is."""
    known = {_MOMENTS + column for column in schema.numeric}
    learnt = [column for column in schema.categorical if column not in schema.categories]
    known |= {kind + column for column in learnt for kind in (_CATEGORIES, _COUNTS)}
    if unknown := [key for key in reported if key not in known]:
        return f"{unknown[0]!r} is nothing that the schema asks for"
    for key, values in reported.items():
        if not isinstance(values, list):
            return f"{key!r} must be a list"
        if key.startswith(_MOMENTS) and not _are_moments(values):
            return f"{key!r} must be a number of values, their mean and their squared distances"
    for column in learnt:
        texts, counts = reported.get(_CATEGORIES + column, []), reported.get(_COUNTS + column, [])
        whole = all(type(count) is int and 0 < count <= _MOST for count in counts)
        named = all(isinstance(text, str) and text for text in texts)
        if not (whole and named and len({*texts}) == len(texts) == len(counts)):
            return f"categories and counts of {column!r} must be different texts and their numbers"
    return None


@dataclass(frozen=True)
class Preparation:
    """How features are made of columns.

    Attributes
    ----------
    means, scales : dict of str to float
        Of each numeric column; a scale is the standard deviation (n - 1), above 1e-30.
    categories : dict of str to tuple of str
        Of each categorical column.
    indicators : bool
        Whether each numeric column has a feature more that says whether the value is missing.
    still : tuple of str
        Numeric columns that never vary or that nobody knows: 0 in each row.
    clipped : bool
        Whether numbers end at the declared range, 2 scales from the mean.

    Raises
    ------
    InputError
        If a field is not as said.
    """

    means: Mapping[str, float]
    scales: Mapping[str, float]
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    indicators: bool = False
    still: tuple[str, ...] = ()
    clipped: bool = False

    def __post_init__(self) -> None:
        for name in ("means", "scales"):
            numbers = getattr(self, name)
            fine = isinstance(numbers, Mapping) and all(map(_is_number, numbers.values()))
            require(fine, f"{name} must be finite numbers by column, got {numbers!r}")
        positive = all(scale > _LEAST for scale in self.scales.values())
        require(positive, f"scales must be above {_LEAST:g}, got {dict(self.scales)}")
        require([*self.means] == [*self.scales], "means and scales must name the same columns")
        fine = isinstance(self.categories, Mapping) and all(
            isinstance(texts, tuple)
            and all(isinstance(text, str) and text for text in texts)
            and len({*texts}) == len(texts)
            for texts in self.categories.values()
        )
        require(fine, f"categories must be different texts by column, got {self.categories!r}")
        fine = isinstance(self.still, tuple) and {*self.still} <= {*self.means}
        require(fine, f"still must name columns of means, got {self.still!r}")
        for name in ("indicators", "clipped"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} must be true or false, got {value!r}")

    @classmethod
    def agreed(cls, schema: Schema, contributions: Mapping[str, Mapping[str, Any]]) -> Self:
        """Return what several hospitals' `contribution` give together.

        Parameters
        ----------
        schema : Schema
            Its declared categories win over those that were told.
        contributions : dict of str to dict
            By hospital; their order is of no account. A malformed one is left out and told in the
            log, as are columns that are constant or that nobody tells of: the latter are scaled by
            their declared range where there is one.
        """
        fine = []
        for site in sorted(contributions):
            if reason := check_contribution(contributions[site], schema):
                log.warning("%s tells of its columns what cannot be used: %s", site, reason)
            else:
                fine.append(contributions[site])
        means, scales, still = {}, {}, []
        for column in schema.numeric:
            reported = [one[_MOMENTS + column] for one in fine if _MOMENTS + column in one]
            count, mean, squares = _merged(reported)
            scale = math.sqrt(squares / (count - 1)) if count > 1 else 0.0
            if contributions and not reported and column in schema.ranges:
                low, high = schema.ranges[column]
                mean, scale = (low + high) / 2, (high - low) / 4
                log.warning("column %s: no hospital tells of it; scaled by its range", column)
            # Rounding gives values that are all alike a spread.
            if scale <= max(1e-12 * abs(mean), _LEAST):
                still.append(column)
                scale = 1.0
                if contributions:
                    what = "never varies" if reported else "is known to no hospital"
                    log.warning("column %s %s: its feature is 0 in all rows", column, what)
            means[column], scales[column] = mean, scale
        categories = {}
        for column in schema.categorical:
            texts = {text for one in fine for text in one.get(_CATEGORIES + column, [])}
            categories[column] = schema.categories.get(column, tuple(sorted(texts)))
            if contributions and not categories[column]:
                log.warning("column %s has no category that a hospital tells: no feature", column)
        return cls(means, scales, categories, schema.indicators, tuple(still))

    @classmethod
    def of_rows(cls, schema: Schema, rows: Sequence[Row]) -> Self:
        """Return what one hospital's own rows give, as `agreed` does."""
        return cls.agreed(schema, {"this hospital": contribution(rows, schema, 1)})

    @classmethod
    def declared(cls, schema: Schema) -> Self:
        """Return a preparation of which nothing is learnt from patients.

        The mean is the middle of a column's range and the scale a quarter of its width, so that
        features lie from -2 to 2; numbers outside the range are moved to its ends.

        Raises
        ------
        InputError
            If a numeric column has no range, or a categorical one no categories.
        """
        lacking = [f"a range of {name!r}" for name in schema.numeric if name not in schema.ranges]
        lacking += [
            f"categories of {name!r}"
            for name in schema.categorical
            if name not in schema.categories
        ]
        require(not lacking, f"the schema declares too little: it needs {', '.join(lacking)}")
        ranges = {name: schema.ranges[name] for name in schema.numeric}
        return cls(
            {name: (low + high) / 2 for name, (low, high) in ranges.items()},
            {name: (high - low) / 4 for name, (low, high) in ranges.items()},
            {name: schema.categories[name] for name in schema.categorical},
            schema.indicators,
            clipped=True,
        )

    def to_text(self) -> str:
        """Return JSON from which `from_text` makes the same bits."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Return what `to_text` wrote.

        Raises
        ------
        InputError
            If the text is something else.
        """
        try:
            given = json.loads(text)
            given["still"] = tuple(given["still"])
            lists = given["categories"].items()
            given["categories"] = {column: tuple(texts) for column, texts in lists}
            return cls(**given)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"this is no preparation of columns: {error}") from None

    @property
    def names(self) -> tuple[str, ...]:
        """The features, such as "age", "age missing" and "cp=2".

        Each category is a feature, but of two only the second is one.
        """
        numeric = (
            name
            for column in self.means
            for name in (column, f"{column} missing")[: 1 + self.indicators]
        )
        categories = (
            f"{column}={text}" for column in self.categories for text in self._features_of(column)
        )
        return (*numeric, *categories)

    @property
    def width(self) -> int:
        """The number of features."""
        return len(self.names)

    def transform(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Return the features of rows, (n, width), in the order of `names`.

        A number is less the mean and by the scale; one that is missing is 0. A missing category
        and one that is not in the list are 0 in each of the column's features.

        Raises
        ------
        InputError
            If a row lacks a column, or a number is a text.
        """
        features = np.zeros((len(rows), self.width), dtype=np.float32)
        index = 0
        limit = _CLIP if self.clipped else _FINITE
        for column, mean in self.means.items():
            values = _numbers(rows, column)
            if column not in self.still:
                scaled = np.clip((values - mean) / self.scales[column], -limit, limit)
                features[:, index] = np.nan_to_num(scaled)
            if self.indicators:
                features[:, index + 1] = np.isnan(values)
            index += 1 + self.indicators
        for column in self.categories:
            known: dict[str | None, int] = {
                text: number for number, text in enumerate(self._features_of(column), index)
            }
            indices = np.asarray([known.get(text, -1) for text in _texts(rows, column)], np.intp)
            there = np.flatnonzero(indices >= 0)
            features[there, indices[there]] = 1
            index += len(known)
        return features

    def unseen(self, rows: Sequence[Row]) -> dict[str, int]:
        """Count the rows of each category that is not in the list, by names such as "cp=5"."""
        found: Counter[str] = Counter()
        for column, texts in self.categories.items():
            for text, count in Counter(_texts(rows, column)).items():
                if text is not None and text not in texts:
                    found[f"{column}={text}"] += count
        return dict(sorted(found.items()))

    def _features_of(self, column: str) -> tuple[str, ...]:
        texts = self.categories[column]
        return texts[1:] if len(texts) == 2 else texts


def _cells(rows: Sequence[Row], column: str) -> list[Any]:
    try:
        return [row[column] for row in rows]
    except KeyError:
        lacking = next(number for number, row in enumerate(rows) if column not in row)
        raise InputError(f"row {lacking} has no {column!r}") from None


def _numbers(rows: Sequence[Row], column: str) -> NDArray[np.float64]:
    """Return a column, NaN if a value is missing or beyond all measurement."""
    cells = _cells(rows, column)
    try:
        values = np.asarray(cells, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{column!r} must be numbers or NaN in all rows: {error}") from None
    return np.where(np.abs(values) <= LARGEST, values, np.nan)


def _texts(rows: Sequence[Row], column: str) -> list[str | None]:
    cells = _cells(rows, column)
    try:
        known = {cell: category_text(cell) for cell in {*cells}}
    except TypeError as error:
        raise InputError(f"{column!r} must be a text or None in all rows: {error}") from None
    return [known[cell] for cell in cells]


def _moments(values: NDArray[np.float64]) -> list[float]:
    """Return number, mean and sum of squared distances; in any order the same bits."""
    mean = math.fsum(values) / len(values)
    if values.min() == values.max():
        return [float(len(values)), float(values[0]), 0.0]
    far = values - mean
    # What the rounding of the mean adds goes out again.
    squares = math.fsum(far * far) - math.fsum(far) ** 2 / len(values)
    return [float(len(values)), mean, max(0.0, squares)]


def _merged(moments: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    count, mean, squares = 0.0, 0.0, 0.0
    for more, own, distances in moments:
        total = count + more
        apart = own - mean
        squares += distances + apart * apart * count * more / total
        mean += apart * more / total
        count = total
    return count, mean, squares


def _are_moments(values: Sequence[Any]) -> bool:
    if len(values) != 3 or not all(map(_is_number, values)):
        return False
    count, mean, squares = values
    # As far apart as numbers can be.
    most = count * (2 * LARGEST) ** 2
    return bool(
        1 <= count <= _MOST
        and float(count).is_integer()
        and abs(mean) <= LARGEST
        and 0 <= squares <= (most if count > 1 else 0)
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e100
