"""Digests of patients' names, which only a simulated site sends."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain

from flwr.app import ConfigRecord

from fedmed_flower.data.rows import column_of
from fedmed_flower.data.site import SPLITS, Site, SiteData
from fedmed_flower.wire import DIGEST_BYTES, DIGESTS, PATIENTS_RECORD


def digests_of(site: Site, data: SiteData, run_id: int) -> Mapping[str, ConfigRecord]:
    """Return records to add to a reply: digests of the patients' names, `DIGEST_BYTES` each.

    Only names that are texts have a digest; a patient known by a number or by the line of a table
    has none. A real hospital sends no digests, since whoever guesses a name could check it.
    """
    if not site.simulated:
        return {}
    key = str(run_id).encode()
    patients = chain.from_iterable(column_of(getattr(data, s), "patient") for s in SPLITS)
    named = {str(name) for name in patients if isinstance(name, str)}
    digests = sorted(
        hashlib.blake2b(
            name.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES, key=key
        ).digest()
        for name in named
    )
    return {PATIENTS_RECORD: ConfigRecord({DIGESTS: b"".join(digests)})}
