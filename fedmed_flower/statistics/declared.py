"""What is declared of columns, by a request and by a hospital's schema."""

from __future__ import annotations

import math
from typing import Any

from fedmed_flower.data.schema import band_name
from fedmed_flower.errors import InputError
from fedmed_flower.statistics.request import Request

# For each task, the schema's attribute that names a column of codes.
_CODED = {"binary": "target", "multi-class": "target", "survival": "event"}


class Declared:
    """What a request and a hospital's schema say of columns, which no row can change.

    Parameters
    ----------
    request : Request
        Its ranges and categories win over those of `schema`.
    schema : object, optional
        What the hospital declares: ``numeric``, ``categorical``, ``whole``, ``ranges``,
        ``categories`` and ``bands``, any of which may be missing.

    Attributes
    ----------
    ranges : dict of str to (float, float)
    categories : dict of str to tuple of str
    bands : dict of str to tuple of float
        The hospital's cut points of a column; its rows have the bands in a column of their own.
    """

    def __init__(self, request: Request, schema: Any = None) -> None:
        self._request = request
        self._schema = schema
        self.ranges = {**_mapping(schema, "ranges"), **request.ranges}
        self.categories = {**_mapping(schema, "categories"), **request.categories}
        self.bands = _mapping(schema, "bands")

    def by_schema(self, name: str) -> bool | None:
        """Return whether the schema says that a column holds categories; None if it names none."""
        schema = self._schema
        coded = _CODED.get(getattr(schema, "task", ""), "")
        if name and name == getattr(schema, coded, ""):
            return True
        categorical = (*getattr(schema, "categorical", ()), *_mapping(schema, "categories"))
        if name in (*categorical, *map(band_name, self.bands)):
            return True
        numeric = (*getattr(schema, "numeric", ()), *_mapping(schema, "ranges"))
        return False if name in numeric or self.whole_by_schema(name) else None

    def whole_by_schema(self, name: str) -> bool:
        """Return whether the schema says that a column holds whole numbers."""
        schema = self._schema
        counted = getattr(schema, "task", "") == "count" and name == schema.target
        return counted or name in getattr(schema, "whole", ())

    def is_whole(self, name: str) -> bool:
        """Return whether a numeric column is declared to hold whole numbers only."""
        declared = name in self._request.whole or self.whole_by_schema(name)
        return declared and self.is_categorical(name) is False

    def is_categorical(self, name: str) -> bool | None:
        """Return whether a column is declared categorical; None if it is not declared at all.

        A number may be tabulated as a code, but a category is never taken for a number.
        """
        by_schema = self.by_schema(name)
        if by_schema or name in (*self._request.categorical, *self.categories):
            return True
        if name in (*self.ranges, *self._request.resolutions, *self._request.whole):
            return False
        return by_schema

    def has_range(self, name: str) -> bool:
        """Return whether a column is numeric, and its range is declared."""
        return name in self.ranges and self.is_categorical(name) is False

    def has_categories(self, name: str) -> bool:
        """Return whether a column is categorical, and its categories are declared."""
        return name in self.categories and self.is_categorical(name) is True

    def require_agreement(self) -> None:
        """Raise `InputError` if the request declares a column otherwise than the schema.

        Only answers with noise need this: without noise `is_categorical` decides.
        """
        request = self._request
        remedy = "leave that out, or change the schema"
        for name in request.ranges:
            if self.by_schema(name) is True:
                raise InputError(
                    f"the request declares a range of {name}, which holds categories by the "
                    f"hospital's schema: {remedy}"
                )
        for name in request.whole:
            if self.by_schema(name) is True:
                raise InputError(
                    f"the request declares that {name} holds whole numbers, which holds categories "
                    f"by the hospital's schema: {remedy}"
                )
        for name in (*request.categorical, *request.categories):
            if self.by_schema(name) is False:
                raise InputError(
                    f"the request declares {name} categorical, which holds numbers by the "
                    f"hospital's schema: {remedy}"
                )

    def resolution(self, name: str) -> float | None:
        """Return the width of a numeric column's cells, as requested or else made from its range.

        Whole numbers are never divided: what is made from a range is then at least 1. Without a
        range it is 1 for whole numbers, and None for others.
        """
        if name in self._request.resolutions:
            return float(self._request.resolutions[name])
        least = 1.0 if self.is_whole(name) else None
        if name not in self.ranges:
            return least
        low, high = self.ranges[name]
        finest = (high - low) / 50
        step = 10.0 ** math.floor(math.log10(finest))
        # Rounded to twelve digits: 5 times a thousandth would be 0.005000000000000001.
        widths = (float(f"{n * step:.12g}") for n in (1, 2, 5) if n * step <= finest)
        width = max(widths, default=step)
        return width if least is None else max(least, width)


def _mapping(schema: Any, name: str) -> dict[str, Any]:
    return dict(getattr(schema, name, None) or {})
