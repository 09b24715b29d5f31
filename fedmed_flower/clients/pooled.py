"""All sites' rows together, for a comparison that only a simulation can make."""

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
        The rows of each site, by its index; at least one site.
    """
    # Two hospitals may give the same number to different patients.
    splits: dict[str, Any] = {
        split: [
            {**row, "patient": (index, row["patient"])}
            for index, part in parts.items()
            for row in getattr(part, split)
        ]
        for split in SPLITS
    }
    return replace(next(iter(parts.values())), **splits)


def indices_by_site(rows: Sequence[Row]) -> dict[int, list[int]]:
    """Return the indices of each site's rows among those that `together` returned."""
    indices: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        indices.setdefault(row["patient"][0], []).append(index)
    return indices
