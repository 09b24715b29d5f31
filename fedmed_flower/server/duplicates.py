"""Patient ids that several hospitals have in common, which only a simulation can see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedmed_flower.arrays.views import records_of
from fedmed_flower.data.site import some_of
from fedmed_flower.wire import DIGEST_BYTES, DIGESTS, PATIENTS_RECORD


@dataclass
class Namesakes:
    """Collects the digests of patient ids that hospitals of a simulation sent.

    Attributes
    ----------
    digests : dict of int to ndarray of uint64
        Sorted digests by node id.
    """

    digests: dict[int, NDArray[np.uint64]] = field(default_factory=dict)

    def take(self, node_id: int, content: RecordDict) -> None:
        """Take up the digests of a reply; missing or malformed digests are ignored."""
        record = records_of(content, ConfigRecord).get(PATIENTS_RECORD, ConfigRecord())
        data = record.get(DIGESTS)
        if isinstance(data, bytes) and len(data) % DIGEST_BYTES == 0:
            self.digests[node_id] = np.unique(np.frombuffer(data, "<u8"))

    def text(self, names: Mapping[int, str], trained: bool = False) -> str:
        """Return a warning about patient ids that sites of `names` share; empty if there are none.

        Parameters
        ----------
        names : mapping of int to str
            Site name by node id; other sites are ignored.
        trained : bool
            Whether a model is trained on the patients.
        """
        by_node = {node: self.digests[node] for node in names if node in self.digests}
        if not by_node:
            return ""
        distinct, counts = np.unique(np.concatenate([*by_node.values()]), return_counts=True)
        shared = distinct[counts > 1]
        if not len(shared):
            return ""
        sites = sorted(
            names[node] for node, digests in by_node.items() if np.isin(digests, shared).any()
        )
        text = (
            f"patient ids that are at more than one hospital ({some_of(sites)}): {len(shared)}. "
            "If they are the same people, each is counted once per hospital"
        )
        if trained:
            text += (
                ", may be tested on after training elsewhere, and has the privacy cost of all of "
                "them"
            )
        return text
