"""Codes that make the change of a model small: 8 bits, 4 bits, or the largest entries alone.

A code turns the change of one array into parts of fixed sizes and back. It loses something, and
whoever codes keeps what is lost and adds it to the next change (error feedback). So over many
rounds nothing is lost but the last remainder: Seide, Fu, Droppo, Li, Yu: 1-Bit Stochastic Gradient
Descent and its Application to Data-Parallel Distributed Training of Speech DNNs, Interspeech 2014.
Karimireddy, Rebjock, Stich, Jaggi: Error Feedback Fixes SignSGD and other Gradient Compression
Schemes, ICML 2019, https://arxiv.org/abs/1901.09847, show that this converges as fast as without a
code if the code always keeps a part of the change: its error is shorter than the change, as that of
each code here is.

`Rounded`: each entry as a whole number of 8 or 4 bits and a scale for each block, as in QSGD
(Alistarh, Grubic, Li, Tomioka, Vojnovic: QSGD: Communication-Efficient SGD via Gradient
Quantization and Encoding, NeurIPS 2017, https://arxiv.org/abs/1610.02132), but rounded to the
nearest. QSGD rounds at random, so that its errors cancel out over hospitals; with error feedback
they cancel out over rounds; random rounding only makes them longer, by 4 tenths as measured, and
the nearest needs no seed.

`Largest`: the largest entries alone, in 8 bits with their indices, as in Lin, Han, Mao, Wang,
Dally: Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed Training,
ICLR 2018, https://arxiv.org/abs/1712.01887, without the momentum correction of that paper: here the
change of a whole round of local training is coded, and no momentum outlives it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.errors import InputError

NONE = "none"
INT8 = "int8"
INT4 = "int4"
TOP_K = "top-k"
COMPRESSIONS = (NONE, INT8, INT4, TOP_K)

# Of each part: its number of entries and their dtype.
Sizes = dict[str, tuple[int, np.dtype[Any]]]
Parts = Mapping[str, NDArray[Any]]

# Entries with one scale. On changes of a small DenseNet, one scale for an array makes errors 13% to
# 20% longer, one for 64 entries makes them 12% shorter and messages 5% to 9% larger, and one for
# each output channel lies between.
_BLOCK = 256
# Indices of short arrays, and of others.
_INDICES: dict[str, np.dtype[Any]] = {
    "indices16": np.dtype(np.uint16),
    "indices32": np.dtype(np.uint32),
}
_MOST_SHORT_INDEX = 2**16
_MOST_INDEX = 2**32


class Code(ABC):
    """A code of the change of one array; all of its methods are pure functions."""

    @abstractmethod
    def sizes(self, size: int) -> Sizes:
        """Return length and dtype of each part for a change of `size` entries."""

    @abstractmethod
    def encode(self, change: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return the parts of a change.

        Parameters
        ----------
        change : ndarray
            (n,) floating. If it holds NaN or infinite values, so do the parts.
        """

    @abstractmethod
    def decode(self, parts: Parts, size: int) -> NDArray[np.float64]:
        """Return the change that the parts stand for, exactly; of `size` entries."""

    @abstractmethod
    def check(self, parts: Parts, size: int) -> None:
        """Raise `ValueError` if parts of the right sizes stand for no finite change."""


class Rounded(Code):
    """Whole numbers of 8 or 4 bits, times a scale for each block of consecutive entries.

    The largest entry of a block becomes 127 or 7; the others are rounded to the nearest. An entry
    is wrong by at most half a scale, so by at most 1/254 or 1/14 of the largest in its block. Two
    numbers of 4 bits make a byte, the first one in its lower half.

    Parameters
    ----------
    bits : {8, 4}
    block : int
        Entries with one scale; at least 1.
    """

    def __init__(self, bits: int, block: int = _BLOCK) -> None:
        self.bits = bits
        self.block = block
        self.most = 2 ** (bits - 1) - 1

    def sizes(self, size: int) -> Sizes:
        """Return the sizes of ``codes`` and of ``scales``."""
        packed = np.dtype(np.int8 if self.bits == 8 else np.uint8)
        return {
            "codes": (-(-size * self.bits // 8), packed),
            "scales": (-(-size // self.block), np.dtype(np.float32)),
        }

    def encode(self, change: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return ``codes`` and ``scales``; a block with NaN or infinite values has such a scale."""
        size = len(change)
        count = -(-size // self.block)
        blocks = np.zeros((count, self.block), change.dtype)
        blocks.reshape(-1)[:size] = change
        with np.errstate(over="ignore"):
            scales = (np.abs(blocks).max(axis=1, initial=0) / self.most).astype(np.float32)
        usable = (scales > 0) & np.isfinite(scales)
        numbers = np.divide(
            blocks, scales[:, None], out=np.zeros_like(blocks), where=usable[:, None]
        )
        # A scale that is so small that it has few digits may be rounded down.
        rounded = np.clip(np.rint(numbers), -self.most, self.most).astype(np.int8)
        codes = rounded.reshape(-1)[:size]
        return {"codes": codes if self.bits == 8 else _as_halves(codes), "scales": scales}

    def decode(self, parts: Parts, size: int) -> NDArray[np.float64]:
        """Return codes times scales."""
        codes = parts["codes"] if self.bits == 8 else _from_halves(parts["codes"])[:size]
        scales = np.repeat(parts["scales"].astype(np.float64), self.block)[:size]
        change: NDArray[np.float64] = codes * scales
        return change

    def check(self, parts: Parts, size: int) -> None:
        """Raise `ValueError` if a scale is not finite, or below 0."""
        for scale in parts["scales"]:
            if not 0 <= scale < math.inf:
                raise ValueError(f"a scale must be at least 0 and finite, got {scale}")


class Largest(Code):
    """The largest entries, by their absolute values, with their indices; all others count as 0.

    Of equal entries the first ones are taken. Their values are coded by `Rounded` in 8 bits; an
    index has 16 bits in an array of at most 65,536 entries, else 32.

    Parameters
    ----------
    share : float
        Share of the entries that is kept; above 0, at most 1. At least one entry is.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._values = Rounded(8)

    def kept(self, size: int) -> int:
        """Return how many of `size` entries are kept."""
        # .07 times 100 is 7.000000000000001, of which the eighth is no part.
        return min(size, max(1, math.ceil(self.share * size * (1 - 1e-12))))

    def sizes(self, size: int) -> Sizes:
        """Return the sizes of ``indices16`` and ``indices32``, one of them empty, and of values."""
        if size > _MOST_INDEX:
            raise InputError(
                f'an array must have at most {_MOST_INDEX:,} entries for compression="{TOP_K}", '
                f"got {size:,}"
            )
        kept = self.kept(size)
        used = _indices_of(size)
        indices = {name: (kept if name == used else 0, dtype) for name, dtype in _INDICES.items()}
        return indices | self._values.sizes(kept)

    def encode(self, change: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return indices, in ascending order, and values; NaN counts as the largest."""
        size = len(change)
        kept = self.kept(size)
        lengths = np.abs(change)
        lengths[np.isnan(lengths)] = np.inf
        # The least length that is kept; of none there is none.
        least = float(np.partition(lengths, size - kept)[size - kept]) if kept else 0.0
        chosen = lengths > least
        alike = np.flatnonzero(lengths == least)
        chosen[alike[: kept - np.count_nonzero(chosen)]] = True
        indices = np.flatnonzero(chosen)
        used = _indices_of(size)
        parts = self._values.encode(change[indices])
        for name, dtype in _INDICES.items():
            parts[name] = (indices if name == used else indices[:0]).astype(dtype)
        return parts

    def decode(self, parts: Parts, size: int) -> NDArray[np.float64]:
        """Return zeros with the values at the indices."""
        change = np.zeros(size)
        change[parts[_indices_of(size)]] = self._values.decode(parts, self.kept(size))
        return change

    def check(self, parts: Parts, size: int) -> None:
        """Raise `ValueError` if indices do not ascend or do not exist, or a value is not finite."""
        indices = parts[_indices_of(size)]
        if not (indices[1:] > indices[:-1]).all():
            raise ValueError("indices must ascend, each once")
        if len(indices) and indices[-1] >= size:
            raise ValueError(f"an index must be below {size:,}, got {indices[-1]:,}")
        self._values.check(parts, len(indices))


def _indices_of(size: int) -> str:
    """Return the name of the part that holds the indices of an array of `size` entries."""
    return "indices16" if size <= _MOST_SHORT_INDEX else "indices32"


def code_of(compression: str, top_k_share: float) -> Code | None:
    """Return the code of a name; None for ``"none"``.

    Parameters
    ----------
    compression : {"none", "int8", "int4", "top-k"}
    top_k_share : float
        Share of the entries of each array that ``"top-k"`` keeps; above 0, at most 1.

    Raises
    ------
    InputError
        If there is no such code, or the share is out of its range.
    """
    if compression not in COMPRESSIONS:
        raise InputError(
            f"compression must be one of {', '.join(COMPRESSIONS)}, got {compression!r}"
        )
    if not 0 < top_k_share <= 1:
        raise InputError(f"top-k-share must be above 0 and at most 1, got {top_k_share}")
    if compression == NONE:
        return None
    if compression == TOP_K:
        return Largest(top_k_share)
    return Rounded(8 if compression == INT8 else 4)


def _as_halves(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return numbers from -8 to 7, two a byte."""
    halves = np.zeros(len(codes) + len(codes) % 2, np.uint8)
    halves[: len(codes)] = codes.view(np.uint8) & 15
    packed: NDArray[np.uint8] = halves[::2] | halves[1::2] << np.uint8(4)
    return packed


def _from_halves(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Return the numbers of `_as_halves`; if they were odd in number, one more."""
    halves = np.empty(2 * len(packed), np.uint8)
    halves[::2] = packed & 15
    halves[1::2] = packed >> 4
    # In two's complement, 8 to 15 stand for -8 to -1.
    return (halves ^ 8).view(np.int8) - np.int8(8)
