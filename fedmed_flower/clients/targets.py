"""What is predicted from a table: its possible values, and the unit in which a network predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedmed_flower.data.bounded import quoted
from fedmed_flower.data.preparation import Preparation
from fedmed_flower.data.schema import Schema
from fedmed_flower.data.site import Row
from fedmed_flower.errors import InputError

CLASSED, SCALED = ("binary", "multi-class"), ("count", "continuous")


class Unit(NamedTuple):
    """How a network's output o, which is about 1, becomes a number: factor * o + shift.

    Attributes
    ----------
    shift, factor : float
        The target's mean and scale. Of a count, whose logarithm is predicted, the mean's logarithm
        and 1.
    weight : float
        Of a count: by which the loss is multiplied, 1 / the mean.
    """

    shift: float = 0.0
    factor: float = 1.0
    weight: float = 1.0


class InUnit(nn.Module):
    """The last step of a network that predicts numbers."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, outputs: Tensor) -> Tensor:
        """Return the outputs in the unit, for which 16 bits are too few."""
        precise = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return self.unit.factor * precise + self.unit.shift


def with_target(schema: Schema) -> Schema:
    """Return the schema of what hospitals tell: a number to predict counts as one more column."""
    if schema.task not in SCALED:
        return schema
    numeric, target = (*schema.numeric, schema.target), f"{schema.target} (predicted)"
    return replace(schema, target=target, task="binary", numeric=numeric)


def agreed_upon(text: str, schema: Schema) -> tuple[Preparation, Unit]:
    """Return the preparation of features, and the unit, that hospitals have agreed upon.

    Parameters
    ----------
    text : str
        Of a preparation by `with_target` of the schema.
    schema : Schema

    Raises
    ------
    InputError
        If the text is something else, or is of other columns than the schema's.
    """
    found, declared = Preparation.from_text(text), with_target(schema)
    if ([*found.means], [*found.categories]) != ([*declared.numeric], [*declared.categorical]):
        raise InputError(
            f"hospitals have agreed upon the columns {_listed(found.means, found.categories)}; the "
            f"schema here has {_listed(declared.numeric, declared.categorical)}: all must run the "
            "same app"
        )
    own = replace(
        found,
        means={name: found.means[name] for name in schema.numeric},
        scales={name: found.scales[name] for name in schema.numeric},
        still=tuple(name for name in found.still if name in schema.numeric),
    )
    if schema.task not in SCALED:
        return own, Unit()
    return own, _unit(schema, found.means[schema.target], found.scales[schema.target])


def declared_unit(schema: Schema) -> Unit:
    """Return the unit by the target's range: 0 lies in its middle, 2 at its end; else as it is."""
    if schema.task not in SCALED or schema.target not in schema.ranges:
        return Unit()
    low, high = schema.ranges[schema.target]
    return _unit(schema, (low + high) / 2, (high - low) / 4)


def require_declared(schema: Schema, preparation: str) -> None:
    """Raise `InputError` where a network needs what neither hospitals tell nor the schema says."""
    lacking = []
    if preparation != "federated" and schema.task in SCALED and schema.target not in schema.ranges:
        lacking.append(f"a range of {schema.target!r}, which is to be predicted")
    if preparation == "site":
        undeclared = [name for name in schema.categorical if name not in schema.categories]
        lacking += [f"categories of {name!r}" for name in undeclared]
    if lacking:
        raise InputError(
            f'the schema declares too little for preparation="{preparation}": it needs '
            f"{', '.join(lacking)}"
        )


def require_rows(rows: Sequence[Row], schema: Schema, groups: Sequence[str], where: str) -> None:
    """Refuse rows from which nothing can be learnt or told.

    Parameters
    ----------
    rows : sequence of dict
    schema : Schema
    groups : sequence of str
        The columns of ``report-by``.
    where : str
        How the error calls the rows.

    Raises
    ------
    InputError
        If a row lacks a column, a target or an event cannot be, or a group is no text.
    """
    needed = {*schema.features, schema.target} | ({schema.event} - {""})
    wanted = _wanted(schema)
    for number, row in enumerate(rows):
        if lacking := [name for name in groups if name not in row]:
            known = ", ".join(name for name, value in row.items() if isinstance(value, str))
            raise InputError(
                f"report-by names {lacking[0]}, which row {number} of {where} does not have: "
                f"it has {known}"
            )
        if lacking := sorted(needed - row.keys()):
            raise InputError(
                f"row {number} of {where} has no {', '.join(lacking)}: rows come from read_table, "
                "or have every column of the schema"
            )
        for name, (fits, what) in wanted.items():
            value = row[name]
            if not (isinstance(value, Real) and is_number(value) and fits(value)):
                raise InputError(
                    f"row {number} of {where} has {name} {quoted(value)}: it must be {what}"
                )
        for name in schema.features:
            # A list is read where it stands alone, and not beside numbers.
            if hasattr(row[name], "__len__") and not isinstance(row[name], str | bytes):
                raise InputError(
                    f"row {number} of {where} has {name} {quoted(row[name])}: a cell holds one "
                    "number or text"
                )
        for name in groups:
            # What is not equal to itself is NaN, a missing text in a data frame.
            if not (row[name] is None or isinstance(row[name], str) or row[name] != row[name]):
                raise InputError(
                    f"row {number} of {where} has {name} {row[name]!r}: report-by takes columns of "
                    "texts, such as categories, or the bands into which the schema cuts a number"
                )


def is_number(value: Any) -> bool:
    """Return whether a number is finite, also as Python's float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _wanted(schema: Schema) -> dict[str, tuple[Callable[[Any], bool], str]]:
    """Return, of each column that is predicted, how to tell a fitting number, and that in words."""
    top = max(2, len(schema.classes)) - 1
    classes = (range(top + 1).__contains__, f"the number of a class, 0 to {top}")
    found: dict[str, tuple[Callable[[Any], bool], str]] = {
        "count": (lambda value: value >= 0 and value == int(value), "a count: 0, 1, 2, ..."),
        "continuous": (lambda value: True, "a finite number"),
        "survival": (lambda value: value > 0, "a finite number above 0"),
    }
    wanted = {schema.target: found.get(schema.task, classes)}
    return wanted | ({schema.event: ((0, 1).__contains__, "0 or 1")} if schema.event else {})


def _unit(schema: Schema, mean: float, scale: float) -> Unit:
    if schema.task == "continuous":
        return Unit(mean, scale)
    return Unit(math.log(mean), 1.0, 1 / mean) if mean > 0 else Unit()


def _listed(*names: Any) -> str:
    return ", ".join(name for part in names for name in part)
