"""The target of a table: its possible values, and the unit in which a network predicts it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from fedmed_flower.data.bounded import quoted
from fedmed_flower.data.preparation import Preparation
from fedmed_flower.data.rows import Rows
from fedmed_flower.data.schema import Schema
from fedmed_flower.data.site import Row
from fedmed_flower.errors import InputError
from fedmed_flower.settings.text import setting_error

# The tasks that predict a class, and those that predict a number.
CLASSED = ("binary", "multi-class")
SCALED = ("count", "continuous")


class Unit(NamedTuple):
    """Converts a network's output o, which is of the order of 1, to a number: factor * o + shift.

    Attributes
    ----------
    shift, factor : float
        The target's mean and scale. For a count, whose logarithm is predicted, they are the
        logarithm of the mean, and 1.
    weight : float
        The factor of the loss of a count: 1 / the mean.
    """

    shift: float = 0.0
    factor: float = 1.0
    weight: float = 1.0


def with_target(schema: Schema) -> Schema:
    """Return the schema of contributions, in which a number to predict is one more column."""
    if schema.task not in SCALED:
        return schema
    return replace(
        schema,
        target=f"{schema.target} (predicted)",
        task="binary",
        numeric=(*schema.numeric, schema.target),
    )


def agreed_upon(text: str, schema: Schema) -> tuple[Preparation, Unit]:
    """Return the preparation of features, and the unit, that hospitals have agreed upon.

    Parameters
    ----------
    text : str
        The text of a preparation by the schema that `with_target` returns.
    schema : Schema

    Raises
    ------
    InputError
        If the text is not that of a preparation, or has other columns than the schema.
    """
    agreed = Preparation.from_text(text)
    declared = with_target(schema)
    if ([*agreed.means], [*agreed.categories]) != ([*declared.numeric], [*declared.categorical]):
        raise InputError(
            f"hospitals have agreed upon the columns {_listed(agreed.means, agreed.categories)}; "
            f"the schema here has {_listed(declared.numeric, declared.categorical)}: all must run "
            "the same app"
        )
    features = replace(
        agreed,
        means={name: agreed.means[name] for name in schema.numeric},
        scales={name: agreed.scales[name] for name in schema.numeric},
        still=tuple(name for name in agreed.still if name in schema.numeric),
    )
    if schema.task not in SCALED:
        return features, Unit()
    return features, _unit(schema, agreed.means[schema.target], agreed.scales[schema.target])


def declared_unit(schema: Schema) -> Unit:
    """Return the unit by the target's declared range: output 0 is its middle, output 2 its end.

    Without a range, or if the target is not a number, outputs are not converted.
    """
    if schema.task not in SCALED or schema.target not in schema.ranges:
        return Unit()
    middle, scale, _ = unit_of_range(*schema.ranges[schema.target])
    return _unit(schema, middle, scale)


def unit_of_range(low: float, high: float) -> Unit:
    """Return the unit of a number from `low` to `high`: output 0 is the middle, 2 is `high`."""
    return Unit((low + high) / 2, (high - low) / 4)


def require_declared(schema: Schema, preparation: str) -> None:
    """Raise `InputError` if the schema lacks ranges or categories that the preparation needs."""
    lacking = []
    if preparation != "federated" and schema.task in SCALED and schema.target not in schema.ranges:
        lacking.append(f"a range of {schema.target!r}, which is predicted")
    if preparation == "site":
        undeclared = [name for name in schema.categorical if name not in schema.categories]
        lacking += [f"categories of {name!r}" for name in undeclared]
    if lacking:
        raise setting_error(
            f'the schema declares too little for preparation="{preparation}": it needs '
            f"{', '.join(lacking)}",
            "preparation",
        )


def require_rows(rows: Sequence[Row], schema: Schema, groups: Sequence[str], where: str) -> None:
    """Raise `InputError` if a row does not fit the schema or the groups.

    Parameters
    ----------
    rows : sequence of dict
    schema : Schema
    groups : sequence of str
        The columns of ``report-by``.
    where : str
        The name of the rows in the error, such as "the train split".

    Raises
    ------
    InputError
        If a row lacks a column, its target or event is not a possible value, a cell holds several
        values, or a group is not a text.
    """
    needed = {*schema.features, schema.target} | ({schema.event} - {""})
    wanted = _wanted(schema)
    if isinstance(rows, Rows) and _columns_fit(rows, needed, wanted, groups):
        return
    for number, row in enumerate(rows):
        row_name = f"row {number} of {where}"
        _require_columns(row, needed, groups, row_name)
        for name, (fits, description) in wanted.items():
            value = row[name]
            if not (isinstance(value, Real) and is_number(value) and fits(value)):
                raise InputError(f"{row_name} has {name} {quoted(value)}: it must be {description}")
        for name in schema.features:
            # A list would pass in a row that is prepared alone, and fail beside rows with numbers.
            if hasattr(row[name], "__len__") and not isinstance(row[name], str | bytes):
                raise InputError(
                    f"{row_name} has {name} {quoted(row[name])}: a cell holds one number or text"
                )
        for name in groups:
            value = row[name]
            # Only NaN, a missing text in a data frame, differs from itself.
            missing = value is None or value != value
            if not (missing or isinstance(value, str)):
                raise InputError(
                    f"{row_name} has {name} {value!r}: report-by takes columns of texts, such as "
                    "categories, or the bands into which the schema cuts a number"
                )


def _columns_fit(
    rows: Rows,
    needed: Collection[str],
    wanted: Mapping[str, tuple[Callable[[Any], bool], str]],
    groups: Sequence[str],
) -> bool:
    """Return whether no row can be wrong, by whole columns; if not, look at each row."""
    if not {*needed, *groups} <= {*rows.names}:
        return False
    columns = {name: rows.column(name) for name in {*needed, *groups}}
    numbers = {name for name, column in columns.items() if column.dtype != object}
    texts = (column.tolist() for name, column in columns.items() if name not in numbers)
    if not numbers >= wanted.keys() or numbers & {*groups}:
        return False
    if not all({*map(type, cells)} <= {str, type(None)} for cells in texts):
        return False
    return all(
        is_number(value) and fits(value)
        for name, (fits, _) in wanted.items()
        for value in np.unique(columns[name]).tolist()
    )


def _require_columns(
    row: Row, needed: Collection[str], groups: Sequence[str], row_name: str
) -> None:
    lacking = [name for name in groups if name not in row]
    if lacking:
        known = ", ".join(name for name, value in row.items() if isinstance(value, str))
        raise setting_error(
            f"report-by names {lacking[0]}, which {row_name} does not have: it has {known}; "
            "report-by is set in the app's pyproject.toml or by -c report-by=",
            "report-by",
        )
    lacking = sorted(set(needed) - row.keys())
    if lacking:
        raise InputError(
            f"{row_name} has no {', '.join(lacking)}: take rows from read_table, or give each row "
            "every column of the schema"
        )


def is_number(value: Any) -> bool:
    """Return whether a number is finite, and not too large for a float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _wanted(schema: Schema) -> dict[str, tuple[Callable[[Any], bool], str]]:
    """Return the check of the target, and of the event, with a description of valid values."""
    top = max(2, len(schema.classes)) - 1
    classes = (range(top + 1).__contains__, f"the number of a class, 0 to {top}")
    numbers: dict[str, tuple[Callable[[Any], bool], str]] = {
        "count": (lambda value: value >= 0 and value == int(value), "a count: 0, 1, 2, ..."),
        "continuous": (lambda value: True, "a finite number"),
        "survival": (lambda value: value >= 0, "a finite number, 0 or more"),
    }
    wanted = {schema.target: numbers.get(schema.task, classes)}
    if schema.event:
        wanted[schema.event] = ((0, 1).__contains__, "0 or 1")
    return wanted


def _unit(schema: Schema, mean: float, scale: float) -> Unit:
    if schema.task == "continuous":
        return Unit(mean, scale)
    return Unit(math.log(mean), 1.0, 1 / mean) if mean > 0 else Unit()


def _listed(*names: Any) -> str:
    return ", ".join(name for part in names for name in part)
