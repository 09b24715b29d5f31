"""The only loops over parameters: weighted sums, order statistics and inner products of replies.

A reply is a row: a sequence of flat arrays, one for each entry of the model. The rows of one call
have the same entries. All kernels process the rows block by block, so that a block stays in the
processor's cache while every row is read, and copy no row as a whole.

Sums are made in float32 for 16-bit and 32-bit floating-point entries and in float64 for float64 and
integers. An entry of dtype ``V2`` holds bfloat16 numbers, which NumPy does not know.

The sorting network is Batcher's odd-even merge sort: Batcher, Sorting Networks and their
Applications, AFIPS 1968, https://doi.org/10.1145/1468075.1468121
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Row = Sequence[NDArray[Any]]
Reduce = Callable[[list[NDArray[Any]]], NDArray[Any]]
# A part of an entry: index of the entry, start and stop within it, start within the block.
Piece = tuple[int, int, int, int]

BFLOAT16 = np.dtype("V2")
# With more rows, sorting columns is faster, as benchmarks/aggregation.py --crossover measures.
NETWORK_UP_TO = 64
# Elements a block: as many as the cache holds, because larger blocks need fewer calls of NumPy.
_SUM_BLOCK = 65536
_GRAM_BLOCK = 8192
_SORT_BLOCK = 32768
# Elements of a block over all rows.
_SORT_CACHE = 1 << 20
# Elements a thread: with fewer, starting a thread costs more time than it saves.
_PER_THREAD = 1 << 20


def threads() -> int:
    """Return how many threads a kernel may use: ``OMP_NUM_THREADS``, else one a core, at most 4."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    # Only Linux reports which cores this process may use.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, 4)


def weighted_sum(rows: Sequence[Row], weights: Sequence[float], outs: Row) -> None:
    """Write ``sum_k weights[k] rows[k]`` to `outs`, added in the order of the rows.

    Parameters
    ----------
    rows : sequence of K rows
        K may be 0.
    weights : sequence of K floats
    outs : row
        Written in place; may have other dtypes than the rows. Integers are rounded.
    """

    def work(blocks: list[list[Piece]]) -> None:
        spare: dict[np.dtype[Any], NDArray[Any]] = {}
        for ((entry, start, stop, _),) in blocks:
            out = outs[entry][start:stop]
            dtype = working(out.dtype)
            if dtype not in spare:
                spare[dtype] = np.empty(_SUM_BLOCK, dtype)
            tmp = spare[dtype][: len(out)]
            total = out if out.dtype == dtype else np.empty(len(out), dtype)
            if not rows:
                total[...] = 0
            for k, (row, weight) in enumerate(zip(rows, weights, strict=True)):
                part = tmp if k else total
                np.multiply(widen(row[entry][start:stop]), weight, out=part, dtype=dtype)
                if k:
                    np.add(total, tmp, out=total)
            if total is not out:
                out[...] = narrow(total, out.dtype)

    _share(_blocks([len(out) for out in outs], _SUM_BLOCK, pack=False), work)


def accumulate(
    row: Row, weight: float, sums: Sequence[NDArray[Any]], centre: Row | None = None
) -> None:
    """Add ``weight row``, or ``weight (row - centre)``, to sums in twice float64's precision.

    The sums are so exact that the order of the rows does not change the mean, unless numbers 1e16
    times larger than it cancel each other out.

    Parameters
    ----------
    row : row
    weight : float
    sums : sequence of float64 arrays of shape (2, n), one for each entry
        Sum and its rounding error (Knuth's two-sum).
    centre : row, optional
    """

    def work(blocks: list[list[Piece]]) -> None:
        for ((entry, start, stop, _),) in blocks:
            high, low = sums[entry][:, start:stop]
            part = widen(row[entry][start:stop])
            if centre is not None:
                part = np.subtract(part, widen(centre[entry][start:stop]), dtype=high.dtype)
            term = np.multiply(part, weight, dtype=high.dtype)
            total = high + term
            added = total - high
            low += (high - (total - added)) + (term - added)
            high[...] = total

    _share(_blocks([len(part) for part in row], _GRAM_BLOCK, pack=False), work)


def divide(sums: Sequence[NDArray[Any]], total: float, outs: Row) -> None:
    """Write the sums of `accumulate`, divided by `total`, to `outs`."""

    def work(blocks: list[list[Piece]]) -> None:
        for ((entry, start, stop, _),) in blocks:
            high, low = sums[entry][:, start:stop]
            out = outs[entry][start:stop]
            out[...] = narrow((high + low) / total, out.dtype)

    _share(_blocks([len(out) for out in outs], _GRAM_BLOCK, pack=False), work)


def order_statistics(
    rows: Sequence[Row],
    outs: Row,
    low: int,
    high: int,
    reduce: Reduce | None = None,
    mix: NDArray[np.float64] | None = None,
) -> NDArray[np.bool_]:
    """Sort the values of each parameter over the rows, and write a function of them to `outs`.

    Parameters
    ----------
    rows : sequence of K rows
    outs : row
        Written in place.
    low, high : int
        The ranks that are needed: ``low <= rank < high``.
    reduce : callable, optional
        Takes ``high - low`` arrays of shape (n,), in ascending order at each index, which it may
        change, and returns one of shape (n,). If left out: the mean.
    mix : ndarray of shape (M, K), optional
        Sort the M rows ``mix @ rows`` instead of the K rows.

    Returns
    -------
    ndarray of shape (K,)
        Which rows are finite throughout. Unless all are, `outs` must not be used.

    Raises
    ------
    ValueError
        If the ranks do not exist, or an entry is complex.
    """
    count = len(rows) if mix is None else len(mix)
    if not 0 <= low < high <= count:
        raise ValueError(f"ranks {low} to {high} of {count} rows do not exist")
    finite = np.ones(len(rows), bool)
    reduced = _mean if reduce is None else reduce
    for dtype, entries in _by_working(outs).items():
        if dtype.kind == "c":
            raise ValueError("complex numbers have no order")
        # Sorting columns needs three more copies of a block.
        cache = _SORT_CACHE if count <= NETWORK_UP_TO else _SORT_CACHE // 4
        width = min(_SORT_BLOCK, max(1024, cache // count))

        def work(
            blocks: list[list[Piece]],
            dtype: np.dtype[Any] = dtype,
            entries: list[int] = entries,
            width: int = width,
        ) -> NDArray[np.bool_]:
            buffer = np.empty((len(rows), width), dtype)
            mixed = buffer if mix is None else np.empty((count, width), dtype)
            spare = np.empty(width, dtype)
            weights = None if mix is None else mix.astype(dtype)
            sound = np.ones(len(rows), bool)
            for block in blocks:
                size = block[-1][3] + block[-1][2] - block[-1][1]
                for k, row in enumerate(rows):
                    for entry, start, stop, index in block:
                        part = row[entries[entry]][start:stop]
                        buffer[k, index : index + stop - start] = widen(part)
                # No out= here: NumPy 2.4 writes only every fourth flag into a strided buffer.
                sound &= np.isfinite(buffer[:, :size]).all(axis=1)
                if weights is not None:
                    np.matmul(weights, buffer[:, :size], out=mixed[:, :size])
                ordered = _sort(mixed[:, :size], low, high, spare[:size])
                result = reduced(ordered)
                for entry, start, stop, index in block:
                    out = outs[entries[entry]][start:stop]
                    out[...] = narrow(result[index : index + stop - start], out.dtype)
            return sound

        for sound in _share(_blocks([len(outs[entry]) for entry in entries], width), work):
            finite &= sound
    return finite


def gram(rows: Sequence[Row], centre: Row, double: bool = False) -> NDArray[np.float64]:
    """Return the inner products of the rows' differences to a centre, in floating-point entries.

    Parameters
    ----------
    rows : sequence of K rows
    centre : row
    double : bool
        Multiply in float64 throughout; if False, single-precision entries in float32.

    Returns
    -------
    ndarray of shape (K, K)
        ``G[i, j] = <rows[i] - centre, rows[j] - centre>``, summed in float64. ``G[i, i]`` is not
        finite if row i is not, or is so far from the centre that its square overflows.
    """
    total = np.zeros((len(rows), len(rows)))
    for dtype, entries in _by_working(centre).items():
        entries = [entry for entry in entries if is_floating(centre[entry].dtype)]
        width = max(1024, min(_GRAM_BLOCK, _SORT_CACHE // len(rows)))
        buffer = np.empty((len(rows), width), np.float64 if double else dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            for block in _blocks([len(centre[entry]) for entry in entries], width):
                for entry, start, stop, index in block:
                    origin = widen(centre[entries[entry]][start:stop])
                    for k, row in enumerate(rows):
                        part = widen(row[entries[entry]][start:stop])
                        out = buffer[k, index : index + stop - start]
                        np.subtract(part, origin, out=out, dtype=buffer.dtype)
                size = block[-1][3] + block[-1][2] - block[-1][1]
                total += buffer[:, :size] @ buffer[:, :size].T
    return total


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Return whether entries of a dtype count in norms and distances."""
    return dtype.kind == "f" or dtype == BFLOAT16


def working(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which numbers of a dtype are added up."""
    if dtype.kind == "c":
        return np.dtype(np.complex128)
    single = is_floating(dtype) and dtype.itemsize <= 4
    return np.dtype(np.float32 if single else np.float64)


def widen(values: NDArray[Any]) -> NDArray[Any]:
    """Return bfloat16 numbers as float32; return other arrays unchanged."""
    if values.dtype != BFLOAT16:
        return values
    bits: NDArray[Any] = values.view(np.uint16).astype(np.uint32) << 16
    single: NDArray[Any] = bits.view(np.float32)
    return single


def narrow(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round numbers to the nearest of a dtype, ties to even; clip them to an integer's range."""
    if values.dtype == dtype:
        return values
    if dtype == BFLOAT16:
        return _bfloat16(values.reshape(-1)).reshape(values.shape)
    if dtype.kind in "biu":
        values = np.rint(values)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        # float(max) may round to a value above max, which would overflow in the cast.
        low = float(info.min)
        high = np.nextafter(float(info.max), 0)
        whole: NDArray[Any] = np.asarray(np.clip(values, low, high)).astype(dtype)
        whole[values > high] = info.max
        return whole
    return values.astype(dtype)


def _bfloat16(values: NDArray[Any]) -> NDArray[Any]:
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    # Rounding twice can go wrong at a tie of the second rounding. So the first one cuts off towards
    # zero, and sets the last bit if anything was cut off.
    inexact = single != values
    larger = abs(single) > abs(values)
    bits -= larger
    bits |= inexact
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # A NaN's bits must not be carried over into infinity.
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.view(BFLOAT16)


@functools.lru_cache(maxsize=64)
def network(count: int, low: int, high: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Return the comparators that sort the ranks ``low <= rank < high`` of `count` rows.

    Returns
    -------
    tuple of (i, j, lower, upper)
        Compare rows i and j. The smaller one goes to i if `lower`, the larger one to j if `upper`;
        otherwise that row is not needed later.
    """
    comparators = []
    span = 1 << max(count - 1, 0).bit_length()
    p = 1
    while p < span:
        k = p
        while k >= 1:
            for start in range(k % p, span - k, 2 * k):
                for i in range(start, min(start + k, span - k)):
                    # Rows beyond the last count as infinite and never move.
                    if i // (2 * p) == (i + k) // (2 * p) and i + k < count:
                        comparators.append((i, i + k))
            k //= 2
        p *= 2
    needed = set(range(low, high))
    pruned = []
    for i, j in reversed(comparators):
        if i in needed or j in needed:
            pruned.append((i, j, i in needed, j in needed))
            needed |= {i, j}
    return tuple(reversed(pruned))


def _sort(block: NDArray[Any], low: int, high: int, spare: NDArray[Any]) -> list[NDArray[Any]]:
    """Return the wanted ranks of each column of a block; the block is overwritten."""
    if len(block) > NETWORK_UP_TO:
        columns = np.ascontiguousarray(block.T)
        columns.sort(axis=1)
        return list(np.ascontiguousarray(columns[:, low:high].T))
    rows = list(block)
    for i, j, lower, upper in network(len(rows), low, high):
        if lower and upper:
            np.minimum(rows[i], rows[j], out=spare)
            np.maximum(rows[i], rows[j], out=rows[j])
            rows[i], spare = spare, rows[i]
        elif lower:
            np.minimum(rows[i], rows[j], out=rows[i])
        else:
            np.maximum(rows[i], rows[j], out=rows[j])
    return rows[low:high]


def _mean(ordered: list[NDArray[Any]]) -> NDArray[Any]:
    total = ordered[0]
    for values in ordered[1:]:
        total += values
    total /= total.dtype.type(len(ordered))
    return total


def _by_working(row: Row) -> dict[np.dtype[Any], list[int]]:
    groups: dict[np.dtype[Any], list[int]] = {}
    for entry, values in enumerate(row):
        groups.setdefault(working(values.dtype), []).append(entry)
    return groups


def _blocks(sizes: Sequence[int], width: int, pack: bool = True) -> list[list[Piece]]:
    """Divide entries into blocks of at most `width` elements; small ones share one if `pack`."""
    blocks: list[list[Piece]] = []
    index = width
    for entry, size in enumerate(sizes):
        start = 0
        while start < size:
            if index == width or not pack:
                blocks.append([])
                index = 0
            stop = min(size, start + width - index)
            blocks[-1].append((entry, start, stop, index))
            index += stop - start
            start = stop
    return blocks


def _share(blocks: list[list[Piece]], work: Callable[[list[list[Piece]]], T]) -> list[T]:
    """Divide the blocks among threads, which help as NumPy releases Python's lock in long loops."""

    def quiet(part: list[list[Piece]]) -> T:
        with np.errstate(invalid="ignore", over="ignore"):
            return work(part)

    elements = sum(stop - start for block in blocks for _, start, stop, _ in block)
    count = min(threads(), 1 + elements // _PER_THREAD)
    if count == 1:
        return [quiet(blocks)]
    bounds = [len(blocks) * part // count for part in range(count + 1)]
    parts = [blocks[a:b] for a, b in itertools.pairwise(bounds)]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(quiet, parts))
