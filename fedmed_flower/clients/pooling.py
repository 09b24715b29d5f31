"""All sites' rows together, for the comparison that only a simulation can make."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedmed_flower.data.site import SPLITS, SiteData
from fedmed_flower.errors import InputError

if TYPE_CHECKING:
    from fedmed_flower.clients.base import MedicalClient


def load_pooled(client: MedicalClient) -> SiteData:
    """Return the rows of all sites, as the `load_data` of a client gives them.

    Raises
    ------
    InputError
        Where the site is a real one, or no site has rows.
    """
    site = client.site
    if not site.simulated:
        raise InputError("pool-sites works in a simulation only: no site holds others' data")
    parts = [
        client.load_data(replace(site, index=index, name=f"hospital-{index + 1}"))
        for index in range(site.num_sites)
    ]
    # Two hospitals may give two patients one number.
    train, val, test = (
        [
            {**row, "patient": (index, row["patient"])}
            for index, part in enumerate(parts)
            for row in getattr(part, split)
        ]
        for split in SPLITS
    )
    return replace(parts[0], train=train, val=val, test=test)
