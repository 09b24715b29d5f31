"""What travelled between the server and each site in the rounds, and how long each site took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from flwr.app import Array

_MOST = 1e18
_NUMBER = 8


@dataclass
class Traffic:
    """The messages to one site and its replies.

    Attributes
    ----------
    replies : int
    bytes_to_site, bytes_from_site : int
        Contents of the messages that the site replied to, and of its replies, without Flower's
        envelopes and without encryption.
    seconds : float
        From sending to the reply. In one process: from the site's turn to its reply.
    bytes_saved : int
        How much larger its replies would have been without a code; below 0 for tiny models, whose
        codes are larger.
    """

    replies: int = 0
    bytes_to_site: int = 0
    bytes_from_site: int = 0
    seconds: float = 0.0
    bytes_saved: int = 0

    def add(self, to_site: int, from_site: int, seconds: float) -> None:
        """Count one message and its reply."""
        self.replies += 1
        self.bytes_to_site += to_site
        self.bytes_from_site += from_site
        self.seconds += seconds

    def table(self) -> dict[str, float]:
        """Return the numbers by name, for JSON."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}

    @classmethod
    def of(cls, table: Any) -> Traffic:
        """Read a result of `table`, which a stranger may have written.

        Raises
        ------
        ValueError
            If a number is not finite or too large, or is negative and is not `bytes_saved`.
        """
        traffic = cls()
        for entry in fields(cls):
            key = entry.name.replace("_", "-")
            signed = entry.name == "bytes_saved"
            # Run folders of earlier versions do not have it.
            value = table.get(key, 0) if signed else table[key]
            least = -_MOST if signed else 0
            if isinstance(value, bool) or not least <= value < _MOST or not math.isfinite(value):
                raise ValueError(f"{entry.name} of the traffic is {value!r}")
            kind = float if entry.name == "seconds" else int
            setattr(traffic, entry.name, kind(value))
        return traffic


def saved(traffic: Mapping[str, Traffic]) -> dict[str, list[int]]:
    """Return the bytes that travelled, and those that would have without codes, each way.

    Returns
    -------
    dict of str to list of int
        ``from-sites`` and ``to-sites``: the bytes of all sites, then those without codes. To the
        sites nothing is coded, so that the two are equal.
    """
    to_sites = sum(part.bytes_to_site for part in traffic.values())
    from_sites = sum(part.bytes_from_site for part in traffic.values())
    more = sum(part.bytes_saved for part in traffic.values())
    return {"from-sites": [from_sites, from_sites + more], "to-sites": [to_sites, to_sites]}


def size_of(content: Mapping[str, Any]) -> int:
    """Return the bytes of a content's records: of arrays, texts and bytes; eight of a number."""
    size = 0
    for record in content.values():
        for key, value in record.items():
            size += len(key) + _size(value)
    return size


def _size(value: Any) -> int:
    if isinstance(value, Array):
        return len(value.data)
    if isinstance(value, list):
        # Flower's lists hold values of one type.
        of_texts = bool(value) and isinstance(value[0], str | bytes)
        return sum(map(len, value)) if of_texts else _NUMBER * len(value)
    return len(value) if isinstance(value, str | bytes) else _NUMBER


def traffic_of(table: Any) -> dict[str, Traffic]:
    """Return the traffic by site that a checkpoint holds; empty if it holds none.

    Raises
    ------
    ValueError
        As `Traffic.of`.
    """
    sites = table if isinstance(table, Mapping) else {}
    return {str(site): Traffic.of(numbers) for site, numbers in sites.items()}
