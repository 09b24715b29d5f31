"""All sites' rows together, for the comparison that only a simulation can make."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedmed_flower.data.site import SPLITS, Row, SiteData
from fedmed_flower.errors import InputError

if TYPE_CHECKING:
    from fedmed_flower.clients.base import MedicalClient

log = logging.getLogger("flwr.fedmed")


def load_pooled(client: MedicalClient) -> SiteData:
    """Return the rows of all sites whose rows can be used; the log names the others.

    A row's patient is (index of the site, patient).

    Raises
    ------
    InputError
        Where the site is a real one, or no site has rows.
    """
    site = client.site
    if not site.simulated:
        raise InputError("pool-sites works in a simulation only: no site holds others' data")
    parts: dict[int, SiteData] = {}
    for index in range(site.num_sites):
        other = copy.copy(client)
        other.site = replace(site, index=index, name=f"hospital-{index + 1}")
        try:
            parts[index] = other.data()
        except Exception as error:  # What keeps one site from a run must not keep the others.
            log.warning("all data pooled are without %s: %s", other.site.name, error)
    if not parts:
        raise InputError("no site has rows to pool")
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
    """Return the places of each site's rows among those that `load_pooled` returned."""
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row["patient"][0], []).append(place)
    return places
