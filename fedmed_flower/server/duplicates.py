"""Patients of one name at several hospitals, which only a simulation can see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedmed_flower.data.site import some_of
from fedmed_flower.wire import DIGEST_BYTES, DIGESTS, PATIENTS_RECORD


@dataclass
class Namesakes:
    """Collects the digests that hospitals of a simulation sent.

    Attributes
    ----------
    of_site : dict
        Digests by the number of the site's node.
    """

    of_site: dict[int, NDArray[np.uint64]] = field(default_factory=dict)

    def take(self, node_id: int, content: RecordDict) -> None:
        """Take up a reply; one without digests, or with what cannot be read, is passed over."""
        record = content.config_records.get(PATIENTS_RECORD, ConfigRecord())
        digests = record.get(DIGESTS)
        if isinstance(digests, bytes) and len(digests) % DIGEST_BYTES == 0:
            self.of_site[node_id] = np.unique(np.frombuffer(digests, "<u8"))

    def text(self, names: Mapping[int, str]) -> str:
        """Return at which of the sites in `names` others' names are; empty if at none."""
        of_site = {node: self.of_site[node] for node in names if node in self.of_site}
        if not of_site:
            return ""
        found, counts = np.unique(np.concatenate([*of_site.values()]), return_counts=True)
        shared = found[counts > 1]
        if not len(shared):
            return ""
        where = sorted(names[node] for node, own in of_site.items() if np.isin(own, shared).any())
        return (
            f"patient ids that are at more than one hospital ({some_of(where)}): {len(shared)}. "
            "Each counts as a patient of its own there; if they are the same people, they count "
            "twice"
        )
