"""Turn a table's columns into the features of a network: imputation, scaling, categories.

The moments of several hospitals are merged after T. F. Chan, G. H. Golub and R. J. LeVeque,
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

from fedmed_flower.arrays.sums import exact_sum
from fedmed_flower.data.cells import LARGEST, category_text, require
from fedmed_flower.data.rows import Rows, column_of
from fedmed_flower.data.schema import Schema
from fedmed_flower.data.site import Row, patients_of
from fedmed_flower.errors import InputError

log = logging.getLogger("flwr.fedmed")

# The keys of a contribution, each followed by a column.
MOMENTS = "moments "
CATEGORIES = "categories "
COUNTS = "counts "
# The largest count of a contribution.
_MOST = 1e12
# The ends of a declared range after scaling.
_CLIP = 2.0
# The largest feature otherwise; float32 holds it with ease.
_FINITE = 1e30
# Scales are above it.
_LEAST = 1 / LARGEST


def contribution(
    rows: Sequence[Row], schema: Schema, minimum: int, only: str | None = None
) -> dict[str, list[float] | list[str] | list[int]]:
    """Return the statistics of a hospital's rows that `Preparation.agreed` needs.

    Parameters
    ----------
    rows : sequence of dict
        Each has ``patient`` and the features.
    schema : Schema
    minimum : int
        1 or greater. A statistic of fewer patients is withheld.
    only : str, optional
        The only column to report; if left out, all of the schema's features.

    Returns
    -------
    dict
        ``moments COLUMN``, for each numeric column: number of values, their mean and the sum of
        their squared distances to it. ``categories COLUMN`` and ``counts COLUMN``, for each
        categorical column whose categories are not declared: the values, sorted, and the number of
        patients with each.
    """
    require(minimum >= 1, f"minimum must be at least 1, got {minimum}")
    rows = Rows.of(rows)
    patients = np.asarray(patients_of(rows), dtype=object)
    reported: dict[str, list[float] | list[str] | list[int]] = {}
    for column in schema.numeric:
        if only not in (None, column):
            continue
        values = _numbers(rows, column)
        known = ~np.isnan(values)
        if known.any() and len({*patients[known]}) >= minimum:
            reported[MOMENTS + column] = _moments(values[known])
    for column in schema.categorical:
        if column in schema.categories or only not in (None, column):
            continue
        patients_with: dict[str, set[str]] = defaultdict(set)
        for text, patient in zip(_texts(rows, column), patients, strict=True):
            if text is not None:
                patients_with[text].add(patient)
        sizes = {text: len(members) for text, members in patients_with.items()}
        counts = {text: size for text, size in sizes.items() if size >= minimum}
        if counts:
            reported[CATEGORIES + column] = sorted(counts)
            reported[COUNTS + column] = [counts[text] for text in sorted(counts)]
    return reported


def check_contribution(reported: Mapping[str, Any], schema: Schema) -> str | None:
    """Return what is wrong with a hospital's contribution; None if it can be used."""
    known = {MOMENTS + column for column in schema.numeric}
    learnt = [column for column in schema.categorical if column not in schema.categories]
    known |= {kind + column for column in learnt for kind in (CATEGORIES, COUNTS)}
    if unknown := [key for key in reported if key not in known]:
        return f"{unknown[0]!r} is not asked for by the schema"
    for key, values in reported.items():
        if not isinstance(values, list):
            return f"{key!r} must be a list"
        if key.startswith(MOMENTS) and not _are_moments(values):
            return (
                f"{key!r} must be the number of values, their mean and the sum of their squared "
                "distances to it"
            )
    for column in learnt:
        texts = reported.get(CATEGORIES + column, [])
        counts = reported.get(COUNTS + column, [])
        whole = all(type(count) is int and 0 < count <= _MOST for count in counts)
        named = all(isinstance(text, str) and text for text in texts)
        if not (whole and named and len({*texts}) == len(texts) == len(counts)):
            return f"categories and counts of {column!r} must be different texts and their numbers"
    return None


@dataclass(frozen=True)
class Preparation:
    """How the features of a network are computed from columns.

    Attributes
    ----------
    means, scales : dict of str to float
        Mean and scale of each numeric column. A scale is the standard deviation (n - 1), or a
        quarter of the declared range; it is above 1e-30.
    categories : dict of str to tuple of str
        The categories of each categorical column.
    indicators : bool
        Whether each numeric column has a second feature: 1 if the value is missing, else 0.
    still : tuple of str
        Numeric columns that never vary or of which no hospital has statistics. Their feature is 0
        in each row.
    clipped : bool
        Whether numbers are clipped to the declared range, 2 scales from the mean.

    Raises
    ------
    InputError
        If a field has another type or is out of its range; if the fields name different columns.
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
            map(_are_distinct_texts, self.categories.values())
        )
        require(fine, f"categories must be different texts by column, got {self.categories!r}")
        fine = isinstance(self.still, tuple) and {*self.still} <= {*self.means}
        require(fine, f"still must name columns of means, got {self.still!r}")
        for name in ("indicators", "clipped"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} must be true or false, got {value!r}")

    @classmethod
    def agreed(cls, schema: Schema, contributions: Mapping[str, Mapping[str, Any]]) -> Self:
        """Merge the contributions of several hospitals into one preparation.

        The log warns of malformed contributions, which are left out, and of columns that are
        constant or that no hospital reports. A column that no hospital reports is scaled by its
        declared range, if it has one.

        Parameters
        ----------
        schema : Schema
            Its declared categories take precedence over reported ones.
        contributions : dict of str to dict
            The return value of `contribution` by hospital, in any order.
        """
        usable = []
        for site in sorted(contributions):
            if reason := check_contribution(contributions[site], schema):
                log.warning("the statistics that %s sent cannot be used: %s", site, reason)
            else:
                usable.append(contributions[site])
        means: dict[str, float] = {}
        scales: dict[str, float] = {}
        still: list[str] = []
        for column in schema.numeric:
            key = MOMENTS + column
            reported = [statistics[key] for statistics in usable if key in statistics]
            count, mean, squares = _merged(reported)
            scale = math.sqrt(squares / (count - 1)) if count > 1 else 0.0
            if contributions and not reported and column in schema.ranges:
                mean, scale = _mean_and_scale(schema.ranges[column])
                log.warning("column %s: no hospital reports it; scaled by its range", column)
            # Equal values can have a spread by rounding.
            if scale <= max(1e-12 * abs(mean), _LEAST):
                still.append(column)
                scale = 1.0
                if contributions:
                    what = "never varies" if reported else "is reported by no hospital"
                    log.warning("column %s %s: its feature is 0 in all rows", column, what)
            means[column] = mean
            scales[column] = scale
        categories = {}
        for column in schema.categorical:
            key = CATEGORIES + column
            texts = {text for statistics in usable for text in statistics.get(key, [])}
            categories[column] = schema.categories.get(column, tuple(sorted(texts)))
            if contributions and not categories[column]:
                log.warning("column %s: no hospital reports a category; it has no feature", column)
        return cls(means, scales, categories, schema.indicators, tuple(still))

    @classmethod
    def of_rows(cls, schema: Schema, rows: Sequence[Row]) -> Self:
        """Return the preparation that follows from one hospital's rows alone, as in `agreed`."""
        return cls.agreed(schema, {"this hospital": contribution(rows, schema, 1)})

    @classmethod
    def declared(cls, schema: Schema) -> Self:
        """Return the preparation that follows from the schema alone; it reveals no patient's data.

        The mean is the middle of a column's range and the scale a quarter of its width, so that
        features lie from -2 to 2. Numbers outside the range are clipped to its ends.

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
        require(
            not lacking,
            f"the schema declares too little: it needs {', '.join(lacking)}; without privacy "
            'preparation="federated" learns them from all hospitals together',
        )
        spans = {name: _mean_and_scale(schema.ranges[name]) for name in schema.numeric}
        return cls(
            {name: mean for name, (mean, _) in spans.items()},
            {name: scale for name, (_, scale) in spans.items()},
            {name: schema.categories[name] for name in schema.categorical},
            schema.indicators,
            clipped=True,
        )

    def to_text(self) -> str:
        """Return JSON from which `from_text` restores this preparation to the bit."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Return the preparation that `to_text` wrote.

        Raises
        ------
        InputError
            If the text is not such JSON.
        """
        try:
            given = json.loads(text)
            given["still"] = tuple(given["still"])
            lists = given["categories"].items()
            given["categories"] = {column: tuple(texts) for column, texts in lists}
            return cls(**given)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"this is not a preparation of columns: {error}") from None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the features, such as "age", "age missing" and "cp=2".

        Each category has a feature; of a column with two categories only the second has one.
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

        A number becomes (number - mean) / scale, and 0 if it is missing. If a category is missing
        or not in the list, all features of its column are 0.

        Raises
        ------
        InputError
            If a row lacks a column, or a number is a text.
        """
        rows = Rows.of(rows)
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
            listed = np.flatnonzero(indices >= 0)
            features[listed, indices[listed]] = 1
            index += len(known)
        return features

    def unseen(self, rows: Sequence[Row]) -> dict[str, int]:
        """Count the rows of each category that is not in the list, by names such as "cp=5"."""
        rows = Rows.of(rows)
        rows_with: Counter[str] = Counter()
        for column, texts in self.categories.items():
            for text, count in Counter(_texts(rows, column)).items():
                if text is not None and text not in texts:
                    rows_with[f"{column}={text}"] += count
        return dict(sorted(rows_with.items()))

    def _features_of(self, column: str) -> tuple[str, ...]:
        texts = self.categories[column]
        return texts[1:] if len(texts) == 2 else texts


def _cells(rows: Sequence[Row], column: str) -> Sequence[Any] | NDArray[Any]:
    try:
        return column_of(rows, column)
    except KeyError:
        lacking = next(number for number, row in enumerate(rows) if column not in row)
        raise InputError(f"row {lacking} has no {column!r}") from None


def _numbers(rows: Sequence[Row], column: str) -> NDArray[np.float64]:
    """Return a column as (rows,) float64; NaN if a value is missing or beyond `LARGEST`."""
    cells = _cells(rows, column)
    try:
        values = np.asarray(cells, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{column!r} must be numbers or NaN in all rows: {error}") from None
    return np.where(np.abs(values) <= LARGEST, values, np.nan)


def _texts(rows: Sequence[Row], column: str) -> list[str | None]:
    cells = [*_cells(rows, column)]
    try:
        known = {cell: category_text(cell) for cell in {*cells}}
    except TypeError as error:
        raise InputError(f"{column!r} must be a text or None in all rows: {error}") from None
    return [known[cell] for cell in cells]


def _moments(values: NDArray[np.float64]) -> list[float]:
    """Return number, mean and sum of squared distances, the same bits for any order of values."""
    mean = exact_sum(values) / len(values)
    if values.min() == values.max():
        return [float(len(values)), float(values[0]), 0.0]
    far = values - mean
    # The second term corrects for the rounding of the mean.
    squares = exact_sum(far * far) - exact_sum(far) ** 2 / len(values)
    return [float(len(values)), mean, max(0.0, squares)]


def _merged(moments: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return number, mean and sum of squared distances of all hospitals' values together."""
    count = mean = squares = 0.0
    for site_count, site_mean, site_squares in moments:
        total = count + site_count
        apart = site_mean - mean
        squares += site_squares + apart * apart * count * site_count / total
        mean += apart * site_count / total
        count = total
    return count, mean, squares


def _mean_and_scale(limits: tuple[float, float]) -> tuple[float, float]:
    """Return the mean and the scale that bring a declared range to -2 to 2."""
    low, high = limits
    return (low + high) / 2, (high - low) / 4


def _are_distinct_texts(texts: Any) -> bool:
    if not isinstance(texts, tuple) or not all(isinstance(text, str) and text for text in texts):
        return False
    return len({*texts}) == len(texts)


def _are_moments(values: Sequence[Any]) -> bool:
    if len(values) != 3 or not all(map(_is_number, values)):
        return False
    count, mean, squares = values
    # Two numbers are at most 2 * LARGEST apart.
    most = count * (2 * LARGEST) ** 2 if count > 1 else 0
    if not 1 <= count <= _MOST or not float(count).is_integer():
        return False
    return bool(abs(mean) <= LARGEST and 0 <= squares <= most)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e100
