"""What a secure sum costs, and weights to measure it on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Weights = np.ndarray[Any, np.dtype[np.float32]]


class Cost(NamedTuple):
    """CPU seconds and bytes of a secure sum.

    Attributes
    ----------
    digest, quantise, mask, unmask : float
        At one hospital. `digest` is that of the model that it was sent, `mask` has keys, shares,
        envelopes and the masks themselves, `unmask` the answer to the last request.
    add : float
        At the server, of one reply.
    open, open_one_lost : float
        At the server, from the last answers to the mean. NaN if no hospital may be lost.
    upload : float
        Bytes of a hospital over those of its vector in float32.
    error : float
        Largest difference of the mean from that of float64.
    exchanges : int
        A round.
    """

    digest: float
    quantise: float
    mask: float
    unmask: float
    add: float
    open: float
    open_one_lost: float
    upload: float
    error: float
    exchanges: int


def model_of(size: int) -> Weights:
    """Return a model's weights, with a standard deviation of .05."""
    return np.random.default_rng(0).standard_normal(size, dtype=np.float32) * np.float32(0.05)


def vectors_of(size: int, sites: int) -> list[Weights]:
    """Return hospitals' weights: those of `model_of`, with changes of standard deviation .005."""
    model = model_of(size)
    rng = np.random.default_rng(1)
    return [
        model + rng.standard_normal(size, dtype=np.float32) * np.float32(0.005)
        for _ in range(sites)
    ]


def weighted_mean(vectors: Sequence[Weights], rows: Sequence[int]) -> np.ndarray[Any, Any]:
    """Return the mean weighted by rows, in float64."""
    total = np.zeros(vectors[0].shape)
    for vector, count in zip(vectors, rows, strict=True):
        total += vector.astype(float) * count
    return total / sum(rows)
