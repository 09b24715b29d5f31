"""All sites' rows together, for the comparison that only a simulation can make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedmed_flower.data.site import SPLITS, Row, SiteData


def together(parts: Mapping[int, SiteData]) -> SiteData:
    """Return the rows of all sites; a row's patient is (index of the site, patient).

    Parameters
    ----------
    parts : mapping of int to SiteData
        By the index of the site; at least one.
    """
    # Two hospitals may give two patients one number.
    splits: dict[str, Any] = {
        split: [
            {**row, "patient": (index, row["patient"])}
            for index, part in parts.items()
            for row in getattr(part, split)
        ]
        for split in SPLITS
    }
    return replace(next(iter(parts.values())), **splits)


def places_by_site(rows: Sequence[Row]) -> dict[int, list[int]]:
    """Return the places of each site's rows among those that `together` returned."""
    indices: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        indices.setdefault(row["patient"][0], []).append(index)
    return indices
