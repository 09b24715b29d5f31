"""What is declared of columns, by a request and by a hospital's schema."""

from __future__ import annotations

import math
from typing import Any

from fedmed_flower.data.schema import band_name
from fedmed_flower.errors import InputError
from fedmed_flower.statistics.request import Request

# The column of a schema that holds codes, by its task.
_CODED = {"binary": "target", "multi-class": "target", "survival": "event"}


class Declared:
    """What a request and a hospital's schema say of columns, which no row can change.

    Parameters
    ----------
    request : Request
        Its ranges and categories win over those of `schema`.
    schema : object, optional
        What the hospital declares: ``numeric``, ``categorical``, ``ranges``, ``categories`` and
        ``bands``, any of which may be missing.

    Attributes
    ----------
    ranges : dict of str to (float, float)
    categories : dict of str to tuple of str
    bands : dict of str to tuple of float
        The hospital's cut points of a column; its rows have the bands in a column of their own.
    """

    def __init__(self, request: Request, schema: Any = None) -> None:
        self._request, self._schema = request, schema
        self.ranges = {**_of(schema, "ranges"), **request.ranges}
        self.categories = {**_of(schema, "categories"), **request.categories}
        self.bands = _of(schema, "bands")

    def by_schema(self, name: str) -> bool | None:
        """Return whether a column holds categories by the schema; None if it says nothing."""
        schema = self._schema
        if name and name == getattr(schema, _CODED.get(getattr(schema, "task", ""), ""), ""):
            return True
        named = (*getattr(schema, "categorical", ()), *_of(schema, "categories"))
        if name in (*named, *map(band_name, self.bands)):
            return True
        numeric = (*getattr(schema, "numeric", ()), *_of(schema, "ranges"))
        return False if name in numeric else None

    def is_categorical(self, name: str) -> bool | None:
        """Return whether a column is declared categorical; None if it is not declared at all.

        A number may be tabulated as a code, but a category is never taken for a number.
        """
        own = self.by_schema(name)
        if own or name in (*self._request.categorical, *self.categories):
            return True
        if name in (*self.ranges, *self._request.resolutions):
            return False
        return own

    def has_range(self, name: str) -> bool:
        """Return whether a column is numeric, and its range is declared."""
        return name in self.ranges and self.is_categorical(name) is False

    def has_categories(self, name: str) -> bool:
        """Return whether a column is categorical, and its categories are declared."""
        return name in self.categories and self.is_categorical(name) is True

    def require_agreement(self) -> None:
        """Raise `InputError` where the request takes a column for what the schema says it is not.

        Without noise such a request is answered as `is_categorical` says.
        """
        request, way_out = self._request, "leave that out, or change the schema"
        for name in request.ranges:
            if self.by_schema(name) is True:
                raise InputError(
                    f"the request declares a range of {name}, which holds categories by the "
                    f"hospital's schema: {way_out}"
                )
        for name in (*request.categorical, *request.categories):
            if self.by_schema(name) is False:
                raise InputError(
                    f"the request declares {name} categorical, which holds numbers by the "
                    f"hospital's schema: {way_out}"
                )

    def resolution(self, name: str) -> float | None:
        """Return how finely a numeric column may be told; None if nothing says."""
        if name in self._request.resolutions:
            return float(self._request.resolutions[name])
        if name not in self.ranges:
            return None
        low, high = self.ranges[name]
        finest = (high - low) / 50
        step = 10.0 ** math.floor(math.log10(finest))
        # To twelve digits, lest 5 times a thousandth be 0.005000000000000001.
        widths = (float(f"{n * step:.12g}") for n in (1, 2, 5) if n * step <= finest)
        return max(widths, default=step)


def _of(schema: Any, name: str) -> dict[str, Any]:
    return dict(getattr(schema, name, None) or {})
