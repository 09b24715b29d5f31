"""What a secure sum costs, and weights to measure it on."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Weights = np.ndarray[Any, np.dtype[np.float32]]


class Cost(NamedTuple):
    """CPU seconds and bytes of a secure sum.

    Attributes
    ----------
    quantise, mask, unmask : float
        At one hospital. `mask` has keys, shares, envelopes and the masks themselves, `unmask` the
        answer to the last request.
    add : float
        At the server, of one reply.
    open, open_one_lost : float
        At the server, from the last answers to the mean.
    upload : float
        Bytes of a hospital over those of its vector in float32.
    error : float
        Largest difference of the mean from that of float64.
    exchanges : int
        A round.
    """

    quantise: float
    mask: float
    unmask: float
    add: float
    open: float
    open_one_lost: float
    upload: float
    error: float
    exchanges: int


def vectors_of(size: int, sites: int) -> list[Weights]:
    """Return weights as a network's are: around one model, with a standard deviation of .05."""
    rng = np.random.default_rng(0)
    model = rng.standard_normal(size, dtype=np.float32) * np.float32(0.05)
    return [
        model + rng.standard_normal(size, dtype=np.float32) * np.float32(0.005)
        for _ in range(sites)
    ]
