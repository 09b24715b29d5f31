import itertools
import os
import threading
from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.kernels import (
    BFLOAT16,
    NETWORK_UP_TO,
    accumulate,
    divide,
    gram,
    narrow,
    network,
    order_statistics,
    weighted_sum,
    widen,
)

MAX = np.finfo(np.float32).max
SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
COUNTS = st.one_of(
    st.integers(1, 130), st.sampled_from([1, 2, 3, NETWORK_UP_TO, NETWORK_UP_TO + 1, 130])
)
# Many tiny entries among large ones: those that share a block, fill one, or are cut.
SIZES = [0, 1, 3, 1024, 1, 1, 0, 8191, 2, 40_000, 1, 70_000, 5]


def cut(matrix, sizes):
    """Return the rows of a matrix, cut into entries."""
    bounds = np.cumsum([0, *sizes])
    return [[row[a:b] for a, b in itertools.pairwise(bounds)] for row in matrix]


def filled(kernel, rows, *args):
    """Return what a kernel writes, as one array, and what it returns."""
    outs = [np.full(part.shape, 7).astype(part.dtype) for part in rows[0]]
    returned = kernel(rows, *args, outs) if kernel is weighted_sum else kernel(rows, outs, *args)
    return np.concatenate(outs), returned


def medians(rows, **kwargs):
    outs = [np.empty_like(part) for part in rows[0]]
    count = len(rows)
    assert order_statistics(rows, outs, (count - 1) // 2, count // 2 + 1, **kwargs).all()
    return np.concatenate(outs)


def same_but_for_the_sign_of_zero(got, want):
    assert got.dtype == want.dtype
    assert (got + 0.0).tobytes() == (want + 0.0).tobytes()


def bfloat16(values):
    tensor = torch.tensor(np.asarray(values, np.float32)).to(torch.bfloat16)
    return tensor.view(torch.int16).numpy().view(BFLOAT16)


@st.composite
def matrices(draw, counts=COUNTS, dtypes=(np.float32, np.float64)):
    """K rows of a few numbers each, of any size and sign, or many equal ones, and their cuts."""
    dtype = draw(st.sampled_from(dtypes))
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    shape = draw(counts), sum(sizes)
    width = np.dtype(dtype).itemsize * 8
    numbers = st.floats(width=width, allow_nan=False, allow_infinity=False)
    pool = np.array(draw(st.lists(numbers, min_size=1, max_size=12)), dtype)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.choice(pool, shape), sizes


# --- Sums ---------------------------------------------------------------------------------------


def numpys_sum(matrix, weights):
    total = matrix[0] * weights[0]
    for row, weight in zip(matrix[1:], weights[1:], strict=True):
        total += row * weight
    return total


@settings(max_examples=100, deadline=None)
@given(matrices(), st.integers(0, 1000))
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_sum_has_the_bits_of_numpys(case, seed):
    matrix, sizes = case
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(matrix))).tolist()
    got, _ = filled(weighted_sum, cut(matrix, sizes), weights)
    assert got.tobytes() == numpys_sum(matrix, weights).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_and_tiny_entries_are_summed_to_the_bits_of_numpys(dtype):
    matrix = np.random.default_rng(0).normal(size=(5, sum(SIZES))).astype(dtype)
    weights = [0.1, 0.2, 0.3, -0.4, 0.8]
    got, _ = filled(weighted_sum, cut(matrix, SIZES), weights)
    assert got.tobytes() == numpys_sum(matrix, weights).tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, bool, "V2", "c8"])
def test_the_sum_of_no_rows_is_zero(dtype):
    out = np.frombuffer(b"\x01" * 160, dtype).copy()
    weighted_sum([], [], [out])
    assert out.tobytes() == bytes(160)


def test_sixteen_bits_are_added_up_in_float32():
    ones = [[np.ones(3, np.float16)]] * 5000
    assert filled(weighted_sum, ones, [1 / 5000] * 5000)[0].tolist() == [1, 1, 1]
    ones = [[bfloat16([1, 1, 1])]] * 5000
    assert filled(weighted_sum, ones, [1 / 5000] * 5000)[0].tobytes() == b"\x80\x3f" * 3


@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.int32, ">f4", ">f8", ">i8", "c8", ">c8"])
def test_sums_of_other_dtypes_and_byte_orders(dtype):
    rows = [[np.array([1, 2, 100], dtype)], [np.array([4, 6, 50], dtype)]]
    out = np.empty(3, dtype)
    weighted_sum(rows, [0.5, 0.5], [out])
    assert out.tolist() == [2 if out.dtype.kind == "i" else 2.5, 4, 75]


def test_complex_numbers_are_summed():
    rows = [[np.array([1 + 2j], np.complex64)], [np.array([3 - 4j], np.complex64)]]
    assert filled(weighted_sum, rows, [0.5, 0.25])[0].tolist() == [1.25 + 0j]


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64])
@pytest.mark.parametrize("extreme", ["min", "max"])
@pytest.mark.filterwarnings("error")
def test_extreme_integers_stay(dtype, extreme):
    value = getattr(np.iinfo(dtype), extreme)
    rows = [[np.array([value], dtype)]] * 3
    assert filled(weighted_sum, rows, [0.5, 0.25, 0.25])[0].tolist() == [value]
    assert filled(weighted_sum, rows, [1.0, 1.0, 1.0])[0].tolist() == [value]
    assert medians(rows).tolist() == [value]


def test_a_mean_of_bools_is_a_vote():
    rows = [[np.array(row)] for row in ([True, True, True], [True, False, False], [False] * 3)]
    assert filled(weighted_sum, rows, [1 / 3] * 3)[0].tolist() == [True, False, False]
    assert medians(rows).tolist() == [True, False, False]


# --- Rounding -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_bfloat16_is_rounded_as_in_torch(bits):
    values = np.array(bits, np.uint32).view(np.float32)
    got, want = widen(narrow(values, BFLOAT16)), torch.tensor(values).bfloat16().float().numpy()
    nan = np.isnan(values)
    assert np.isnan(got[nan]).all()
    assert got[~nan].tobytes() == want[~nan].tobytes()


def test_every_bfloat16_survives():
    every = np.arange(2**16, dtype=np.uint16).view(BFLOAT16)
    values = widen(every)
    number = ~np.isnan(values)
    assert narrow(values, BFLOAT16)[number].tobytes() == every[number].tobytes()
    numbers = values[number].astype(float)
    assert narrow(numbers, BFLOAT16).tobytes() == every[number].tobytes()
    assert np.isnan(widen(narrow(values[~number], BFLOAT16))).all()


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        (1 + 2**-8, 1.0),
        (1 + 2**-8 + 2**-40, 1 + 2**-7),
        (1 + 3 * 2**-8, 1 + 2**-6),
        (1 + 3 * 2**-8 - 2**-40, 1 + 2**-7),
        (1e300, np.inf),
        (1e-300, 0.0),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.filterwarnings("ignore:overflow")
def test_float64_is_rounded_to_bfloat16_once(value, nearest, sign):
    assert widen(narrow(np.array([sign * value]), BFLOAT16)).tolist() == [sign * nearest]


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.int8), np.dtype(bool), SINGLE])
def test_a_single_number_is_rounded_to_one(dtype):
    got = narrow(np.array(1.0), dtype)
    assert got.shape == ()
    assert got.dtype == dtype
    assert widen(got) == 1


def test_halves_are_rounded_to_even():
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5])
    assert narrow(values, np.dtype(np.int8)).tolist() == [0, 2, 2, 0, -2]
    assert narrow(values, np.dtype(np.uint8)).tolist() == [0, 2, 2, 0, 0]
    ties = np.array([1 + 2**-11, 1 + 3 * 2**-11])
    assert narrow(ties, np.dtype(np.float16)).tolist() == [1, 1 + 2**-9]


# --- The running mean ---------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(
        st.floats(-1e6, 1e6, width=32), st.one_of(st.integers(1, 10**9), st.floats(1e-3, 1e9)),
    ), min_size=1, max_size=30),
    st.randoms(),
)  # fmt: skip
def test_a_running_mean_is_the_exact_one_in_any_order(terms, random):
    sums = [np.zeros((2, 1))]
    for value, weight in random.sample(terms, len(terms)):
        accumulate([np.array([value], np.float32)], weight, sums)
    exact = sum(Fraction(v) * Fraction(w) for v, w in terms)
    got = Fraction(float(sums[0][0, 0])) + Fraction(float(sums[0][1, 0]))
    # Each product is rounded once, in float64; the additions lose next to nothing.
    bound = sum(abs(Fraction(v) * Fraction(w)) for v, w in terms)
    assert abs(got - exact) <= bound / 2**52


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, "V2", "c16"])
def test_the_order_of_a_running_mean_makes_no_difference_to_the_bits(dtype):
    rng = np.random.default_rng(0)
    numbers = rng.normal(scale=100, size=(40, 9000)) * np.exp(5 * rng.normal(size=(40, 1)))
    rows = [[narrow(row, np.dtype(dtype))] for row in numbers.clip(-1e4, 1e4)]
    weights = rng.uniform(0.1, 1000, 40)
    results = set()
    for _ in range(10):
        sums = [np.zeros((2, 9000), complex if dtype == "c16" else float)]
        for k in rng.permutation(40):
            accumulate(rows[k], weights[k], sums)
        out = np.empty(9000, dtype)
        divide(sums, 40_000, [out])
        results.add(out.tobytes())
    assert len(results) == 1


# --- Order statistics ---------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(matrices())
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_median_has_the_bits_of_numpys(case):
    matrix, sizes = case
    got, wanted = medians(cut(matrix, sizes)), np.median(matrix, axis=0).astype(matrix.dtype)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    same_but_for_the_sign_of_zero(got, wanted)


@pytest.mark.parametrize("count", [1, 2, 20, NETWORK_UP_TO, NETWORK_UP_TO + 1, 130])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_and_tiny_entries_have_the_median_of_numpys(count, dtype):
    sizes = [0, 1, 3, 1024, 1, 0, 8191, 2, 5]
    matrix = np.random.default_rng(count).normal(size=(count, sum(sizes))).astype(dtype)
    got = medians(cut(matrix, sizes))
    assert got.tobytes() == np.median(matrix, axis=0).tobytes()


def test_entries_of_several_dtypes_are_sorted_each_for_itself():
    rng = np.random.default_rng(0)
    dtypes = [np.float32, np.int64, np.float16, ">f8", np.uint8, np.float64, ">f4", bool]
    rows = [[(9 * rng.random(6)).astype(dtype) for dtype in dtypes] for _ in range(5)]
    outs = [np.empty_like(part) for part in rows[0]]
    assert order_statistics(rows, outs, 2, 3).all()
    for entry, out in enumerate(outs):
        wanted = np.median([row[entry].astype(float) for row in rows], axis=0)
        assert out.tolist() == wanted.astype(dtypes[entry]).tolist()


def test_bfloat16_has_a_median_in_float32():
    rows = [[bfloat16([1, -1])], [bfloat16([1 + 2**-7, 5])]]
    # Halfway between two neighbours, to even.
    assert widen(medians(rows)).tolist() == [1, 2]


@settings(max_examples=60, deadline=None)
@given(matrices(st.integers(1, 80), [np.float64]), st.data())
def test_ranks_are_those_of_sorting(case, data):
    matrix, sizes = case
    low = data.draw(st.integers(0, len(matrix) - 1))
    high = data.draw(st.integers(low + 1, len(matrix)))
    pick = data.draw(st.integers(0, high - low - 1))
    seen = []

    def reduce(ordered):
        seen.append(len(ordered))
        for values in ordered[:pick] + ordered[pick + 1 :]:
            values[...] = np.nan
        return ordered[pick]

    got, finite = filled(order_statistics, cut(matrix, sizes), low, high, reduce)
    same_but_for_the_sign_of_zero(got, np.sort(matrix, axis=0)[low + pick])
    assert finite.tolist() == [True] * len(matrix)
    assert set(seen) <= {high - low}


@pytest.mark.parametrize("count", [4, 7, 20, 65])
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.45])
def test_a_mean_of_middle_ranks_is_the_trimmed_mean(count, beta):
    matrix = np.random.default_rng(0).normal(size=(count, 2000))
    drop = int(beta * count)
    got, _ = filled(order_statistics, [[row] for row in matrix], drop, count - drop)
    np.testing.assert_allclose(got, reference.trimmed_mean(matrix, beta), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (2, 1), (-1, 2), (0, 4), (3, 4)])
def test_ranks_that_do_not_exist_are_refused(low, high):
    rows = [[np.zeros(2)]] * 3
    with pytest.raises(ValueError, match=rf"^ranks {low} to {high} of 3 rows do not exist$"):
        order_statistics(rows, [np.zeros(2)], low, high)


def test_complex_numbers_are_not_sorted():
    rows = [[np.zeros(2, complex)]] * 3
    with pytest.raises(ValueError, match=r"^complex numbers have no order$"):
        order_statistics(rows, rows[0], 1, 2)


# --- The sorting network ------------------------------------------------------------------------


def zeros_and_ones(count):
    """Return all columns of zeros and ones: what sorts them sorts everything (Knuth, 5.3.4)."""
    return (np.arange(2**count)[None] >> np.arange(count)[:, None] & 1).astype(np.uint8)


def ranks(block, low, high):
    return np.array(kernels._sort(block.copy(), low, high, np.empty_like(block[0])))


@pytest.mark.parametrize("count", range(1, 11))
def test_the_network_sorts_all_zeros_and_ones_for_all_ranks(count):
    block = zeros_and_ones(count)
    ordered = np.sort(block, axis=0)
    for low, high in itertools.combinations(range(count + 1), 2):
        np.testing.assert_array_equal(ranks(block, low, high), ordered[low:high])


@pytest.mark.parametrize("count", [11, 13, 16, 17, 20, 31, 32, 33, 47, 63, 64, 65, 100])
def test_larger_networks_sort_random_zeros_and_ones(count):
    rng = np.random.default_rng(count)
    block = (rng.random((count, 20_000)) < rng.random(20_000)).astype(np.uint8)
    ordered = np.sort(block, axis=0)
    middle = (count - 1) // 2, count // 2 + 1
    for low, high in [(0, count), (0, 1), (count - 1, count), middle, (count // 5, count - 3)]:
        np.testing.assert_array_equal(ranks(block, low, high), ordered[low:high])


def test_only_comparators_that_the_ranks_need_are_kept():
    assert len(network(20, 9, 11)) == 84 < len(network(20, 0, 20))
    assert len(network(20, 0, 1)) == 19
    assert network(2, 0, 1) == ((0, 1, True, False),)
    assert network(2, 1, 2) == ((0, 1, False, True),)
    assert network(2, 0, 2) == ((0, 1, True, True),)
    assert network(1, 0, 1) == ()


# --- What is not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", "V2"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_value_that_is_not_finite_is_seen_at_every_place(bad, dtype, mixed):
    sizes = [1, 0, 9, 3, 1]
    for count, low, high in [(1, 0, 1), (3, 1, 2), (4, 0, 1), (70, 34, 36)]:
        mix = np.full((count, count), 1 / count) if mixed else None
        for place in range(sum(sizes)):
            matrix = np.ones((count, sum(sizes)))
            culprit = place % count
            matrix[culprit, place] = bad
            rows = cut([narrow(row, np.dtype(dtype)) for row in matrix], sizes)
            outs = [np.empty_like(part) for part in rows[0]]
            finite = order_statistics(rows, outs, low, high, None, mix)
            assert np.flatnonzero(~finite).tolist() == [culprit]
            products = gram(rows, rows[culprit - 1])
            if count > 1:
                assert np.flatnonzero(~np.isfinite(products.diagonal())).tolist() == [culprit]
            weighted_sum(rows, [1 / count] * count, outs)
            found = [not np.isfinite(widen(part)).all() for part in outs]
            assert found.index(True) == np.searchsorted(np.cumsum(sizes), place, side="right")
            assert sum(found) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_seen_in_large_entries(bad):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(3, sum(SIZES))).astype(np.float32)
    for place in [0, 1, 9222, 9223, 32767, 32768, 65535, 65536, sum(SIZES) - 1]:
        hurt = matrix.copy()
        hurt[1, place] = bad
        rows = cut(hurt, SIZES)
        assert filled(order_statistics, rows, 1, 2)[1].tolist() == [True, False, True]
        assert np.isfinite(gram(rows, rows[0]).diagonal()).tolist() == [True, False, True]
        total = filled(weighted_sum, rows, [1 / 3] * 3)[0]
        assert np.flatnonzero(~np.isfinite(total)).tolist() == [place]


def test_the_largest_numbers_are_finite():
    rows = [[np.full(50, value, np.float32)] for value in (MAX, MAX, -MAX)]
    assert filled(order_statistics, rows, 1, 2)[1].all()
    assert filled(order_statistics, rows, 0, 3)[1].all()
    mix = np.full((2, 3), 1 / 3)
    assert filled(order_statistics, rows, 0, 1, None, mix)[1].all()
    assert filled(weighted_sum, rows, [0.25, 0.25, 0.5])[0].tolist() == [0] * 50


def test_values_whose_squares_overflow_hide_no_other_row():
    rows = [[np.full(50, value, np.float32)] for value in (1, 1e30, 2, -1e25, 4)]
    products = gram(rows, [np.zeros(50, np.float32)])
    near = [0, 2, 4]
    assert np.flatnonzero(np.isfinite(products.diagonal())).tolist() == near
    assert products[np.ix_(near, near)].tolist() == [[50, 100, 200], [100, 200, 400],
                                                     [200, 400, 800]]  # fmt: skip


# --- Inner products -----------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1e-3, 1e-4, 3e-5])
@pytest.mark.parametrize("count", [2, 10, 100])
def test_distances_of_small_updates_are_those_of_float64(ratio, count):
    rng = np.random.default_rng(1)
    sizes = [1, 9000, 3, 20_000, 7]
    centre = rng.normal(size=sum(sizes)).astype(np.float32)
    drift = rng.normal(size=sum(sizes))
    updates = ratio * (drift + rng.normal(size=(count, sum(sizes))))
    matrix = (centre + updates).astype(np.float32)
    (split,) = cut([centre], sizes)
    got = gram(cut(matrix, sizes), split)
    want = reference.gram(matrix.astype(float), centre.astype(float))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * want.max())
    lengths = got.diagonal()
    between = (lengths[:, None] + lengths - 2 * got)[0, 1:]
    np.testing.assert_allclose(
        between, reference.distances(matrix.astype(float)[[0, *range(1, count)]])[0, 1:], rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", ">f8", "V2"])
def test_inner_products_worked_out_by_hand(dtype):
    rows = [[narrow(np.array(v), np.dtype(dtype))] for v in ([4.0, 5.0], [1.0, 1.0], [3.0, 1.0])]
    centre = [narrow(np.array([1.0, 1.0]), np.dtype(dtype))]
    assert gram(rows, centre).tolist() == [[25, 0, 6], [0, 0, 0], [6, 0, 4]]


def test_only_floating_point_entries_have_a_length():
    floats, counts = np.array([3.0], np.float32), np.array([10**15])
    rows = [[floats, counts, np.array([True]), np.array([1j])], [floats * 2, *[np.ones(1)] * 3]]
    centre = [np.zeros(1, np.float32), counts * 0, np.array([False]), np.array([0j])]
    assert gram(rows, centre).tolist() == [[9, 18], [18, 36]]
    assert gram([[counts]], [counts * 0]).tolist() == [[0]]


def test_sums_over_blocks_are_made_in_float64():
    ones = np.ones(2**24 + 8192, np.float32)
    assert gram([[ones]], [np.broadcast_to(np.float32(0), ones.shape)]).tolist() == [[len(ones)]]


# --- Threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 66])
def test_two_threads_make_the_same_bits(monkeypatch, count):
    rng = np.random.default_rng(0)
    rows = [
        [rng.normal(size=size).astype(dtype) for size in (1, 3000, 5) for dtype in "fde"]
        for _ in range(count)
    ]
    mix = rng.dirichlet(np.ones(count), 4)

    def everything():
        sums = [np.zeros((2, len(part))) for part in rows[0]]
        outs = [np.empty_like(part) for part in rows[0]]
        results = [filled(weighted_sum, rows, [1 / count] * count)[0], medians(rows)]
        results += [filled(order_statistics, rows, 1, 3, None, mix)[0], gram(rows, rows[0])]
        for row in rows:
            accumulate(row, 0.1, sums)
        divide(sums, count / 10, outs)
        return [result.tobytes() for result in [*results, *sums, *outs]]

    monkeypatch.setattr(kernels, "threads", lambda: 1)
    alone = everything()
    monkeypatch.setattr(kernels, "_PER_THREAD", 1)
    for number in (2, 3, 50):
        monkeypatch.setattr(kernels, "threads", lambda number=number: number)
        assert everything() == alone


def test_large_entries_are_shared_between_threads(monkeypatch):
    monkeypatch.setattr(kernels, "threads", lambda: 2)
    monkeypatch.setattr(kernels, "_PER_THREAD", 65536)
    both = threading.Barrier(2)

    def reduce(ordered):
        both.wait(timeout=10)
        return ordered[0]

    rows = [[np.full(65536, float(k))] for k in range(3)]
    assert set(filled(order_statistics, rows, 1, 2, reduce)[0]) == {1.0}


def test_a_thread_that_fails_is_heard_of(monkeypatch):
    monkeypatch.setattr(kernels, "threads", lambda: 2)
    monkeypatch.setattr(kernels, "_PER_THREAD", 1)
    with pytest.raises(ZeroDivisionError):
        filled(order_statistics, [[np.ones(65536)]], 0, 1, lambda ordered: 1 // 0)


@pytest.mark.parametrize("given", ["3", "1"])
def test_the_number_of_threads_is_that_of_openmp(monkeypatch, given):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert kernels.threads() == int(given)


@pytest.mark.parametrize("given", ["", "0", "4,2", "all", "-1", "²"])
def test_else_one_for_each_core_and_at_most_four(monkeypatch, given):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert kernels.threads() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert kernels.threads() == 4
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert kernels.threads() == 2


# --- Inputs -------------------------------------------------------------------------------------


def test_rows_are_never_written_to():
    rng = np.random.default_rng(0)
    rows = [[rng.normal(size=50).astype(dtype) for dtype in "fde"] for _ in range(70)]
    for count in (3, 70):
        for part in itertools.chain.from_iterable(rows):
            part.flags.writeable = False
        before = [part.tobytes() for row in rows for part in row]
        used = rows[:count]
        medians(used)
        filled(order_statistics, used, 0, 2, None, np.full((2, count), 1 / count))
        filled(weighted_sum, used, [1.0] * count)
        gram(used, used[0])
        accumulate(used[0], 1.0, [np.zeros((2, 50))] * 3)
        assert [part.tobytes() for row in rows for part in row] == before
