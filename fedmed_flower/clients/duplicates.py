"""Digests of patients' names, which only a simulation tells."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from flwr.app import ConfigRecord

from fedmed_flower.data.site import SPLITS, Site, SiteData
from fedmed_flower.wire import DIGEST_BYTES, DIGESTS, PATIENTS_RECORD


def digests_of(site: Site, data: SiteData, run_id: int) -> Mapping[str, ConfigRecord]:
    """Return the records that a reply takes along: digests of the patients' names, 8 bytes each.

    Names are texts; a patient without one, whom only the line of a table tells apart, has none.
    A real hospital tells nothing: a digest lets who guesses a name see whether it is there.
    """
    if not site.simulated:
        return {}
    key = str(run_id).encode()
    patients = (row["patient"] for split in SPLITS for row in getattr(data, split))
    named = {str(name) for name in patients if isinstance(name, str)}
    digests = sorted(
        hashlib.blake2b(
            name.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES, key=key
        ).digest()
        for name in named
    )
    return {PATIENTS_RECORD: ConfigRecord({DIGESTS: b"".join(digests)})}
