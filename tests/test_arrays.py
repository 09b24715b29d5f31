import io
import tracemalloc

import numpy as np
import pytest
from builders import arrays, header, npy
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmed_flower.arrays import keep_dtypes, view

NUMBERS = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(endianness="?"),
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def claimed(data: bytes) -> Array:
    return Array("float32", (2,), "numpy.ndarray", data)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.booleans())
def test_view_equals_flowers_copy_to_the_bit(data, fortran):
    values = data.draw(hnp.arrays(data.draw(NUMBERS), SHAPES))
    array = Array(np.asfortranarray(values) if fortran and values.ndim else values)
    got, want = view(array), array.numpy()
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes()
    assert got.flags.f_contiguous == want.flags.f_contiguous
    assert not got.flags.writeable


@pytest.mark.parametrize("order", ["C", "F"])
def test_view_shares_memory_with_the_bytes(order):
    array = Array(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], order=order))
    got = view(array)
    assert np.shares_memory(got, np.frombuffer(array.data, np.uint8))
    assert got.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def test_view_allocates_nothing_of_the_size_of_the_array():
    array = Array(np.zeros(1_000_000))
    view(array)
    tracemalloc.start()
    view(array)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000  # the head of the bytes, not the 8 MB behind it


def test_view_trusts_the_bytes_and_not_the_claim():
    data = Array(np.array([[1, 2, 3]], np.int16)).data
    got = view(Array("float64", (99,), "numpy.ndarray", data))
    assert got.dtype == np.int16
    assert got.tolist() == [[1, 2, 3]]


def test_view_refuses_another_serialisation():
    data = Array(np.zeros(2)).data
    with pytest.raises(ValueError, match=r"^unknown serialisation 'torch.tensor'$"):
        view(Array("float64", (2,), "torch.tensor", data))


@pytest.mark.parametrize("values", [np.arange(3.0), np.float16(1.5), np.zeros((2, 0))])
def test_every_truncation_is_refused(values):
    data = Array(np.asarray(values)).data
    for length in range(len(data)):
        with pytest.raises(ValueError):
            view(claimed(data[:length]))


@pytest.mark.parametrize("values", [np.arange(3.0), np.float16(1.5), np.zeros((2, 0))])
def test_trailing_bytes_are_refused(values):
    data = Array(np.asarray(values)).data
    with pytest.raises(ValueError, match=f"{len(data) + 1} bytes do not hold an array of shape"):
        view(claimed(data + b"\0"))


def test_pickles_are_refused_and_not_run():
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("the pickle was run",)

    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="dtype object is not a plain number"):
        view(claimed(buffer.getvalue()))


MALFORMED = {
    "no bytes": b"",
    "another format": b"PK\x03\x04" + b"\0" * 100,
    "another version": b"\x93NUMPY\x09\x00\x02\x00{}",
    "header longer than the file": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}",
    "less data than claimed": npy(header(shape="(3,)"), bytes(8)),
    "more data than claimed": npy(header(shape="(1,)"), bytes(8)),
    "terabytes": npy(header(shape="(1000000000000,)"), bytes(8)),
    "a size beyond 64 bits": npy(header(shape="(4294967296, 4294967296)")),
    "a size beyond 64 bits, negative": npy(header(shape="(3037000500, 3037000500)"), bytes(8)),
    "a side beyond 64 bits": npy(header(shape=f"({10**30},)"), bytes(8)),
    "a side beyond 64 bits, empty": npy(header(shape=f"(0, {10**30})")),
    "negative side": npy(header(shape="(-1,)"), bytes(8)),
    "another negative side": npy(header(shape="(-2,)"), bytes(8)),
    "two negative sides": npy(header(shape="(-1, -2)"), bytes(8)),
    "shape of booleans": npy(header(shape="(True, True)"), bytes(4)),
    "shape is no tuple": npy(header(shape="2"), bytes(8)),
    "too many dimensions": npy(header(shape="(" + "1," * 65 + ")"), bytes(4)),
    "order is no bool": npy(header(order="0"), bytes(8)),
    "object": npy(header(descr="'|O'"), bytes(16)),
    "object inside": npy(header(descr="[('a', '|O')]"), bytes(16)),
    "text": npy(header(descr="'<U1'"), bytes(8)),
    "raw bytes": npy(header(descr="'|S4'"), bytes(8)),
    "void": npy(header(descr="'|V4'"), bytes(8)),
    "dates": npy(header(descr="'<M8[s]'"), bytes(16)),
    "several fields": npy(header(descr="[('a', '<f4'), ('b', '<f4')]"), bytes(16)),
    "nothing a value": npy(header(descr="'|V0'")),
    "no field": npy(header(descr="[]")),
    "arrays as values": npy(header(descr="('<f4', (2,))"), bytes(16)),
    "descr is a number": npy(header(descr="3"), bytes(8)),
    "descr is an empty tuple": npy(header(descr="()"), bytes(8)),
    "header is no dict": npy("(1, 2)"),
    "header lacks a key": npy("{'descr': '<f4', 'shape': (2,)}", bytes(8)),
    "header with keys that cannot be ordered": npy("{1: 2, 'a': 3}"),
    "header with a key that cannot be hashed": npy("{[]: 1}"),
    "header that ends too early": npy("{'descr': ("),
    "header of open brackets": npy("(" * 9000),
    "header that is badly indented": npy("\n  x\n y"),
    "header of zero bytes": npy("\0\0\0\0"),
    "header that is deep": npy("-" * 9000 + "1"),
    "header that calls": npy("__import__('os').abort()"),
    "shape that is deep": npy(header(shape="(" + "-" * 4000 + "2,)"), bytes(8)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_bytes_are_a_value_error(name):
    with pytest.raises(ValueError):
        view(claimed(MALFORMED[name]))


def test_a_lie_about_the_size_allocates_nothing():
    tracemalloc.start()
    for name in ("terabytes", "header longer than the file", "a size beyond 64 bits"):
        with pytest.raises(ValueError):
            view(claimed(MALFORMED[name]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([np.arange(3.0), np.zeros((2, 2), np.int8), np.float32(1)]),
    st.lists(st.tuples(st.integers(0, 127), st.sampled_from(b"\0\xff-0123456789(),'<fbO[]{:L ")),
             min_size=1, max_size=3),
)  # fmt: skip
def test_damaged_bytes_are_refused_or_read_as_flower_reads_them(values, changes):
    data = bytearray(Array(np.asarray(values)).data)
    for place, byte in changes:
        data[place] = byte
    array = claimed(bytes(data))
    try:
        got = view(array)
    except ValueError:
        return
    # What passes is averaged by Flower's code, which must not fail on it or see something else.
    want = array.numpy()
    assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())


def test_means_of_integers_get_their_dtype_back():
    like = arrays(batches=np.array([7, 7, 7], np.int64), small=np.array(3, np.uint8), w=[1.0])
    means = arrays(batches=np.array([2.4, 2.6, -0.6]), small=np.array(3.9), w=[0.25])
    got = keep_dtypes(means, like)
    assert list(got) == ["batches", "small", "w"]
    assert got["batches"].numpy().dtype == np.int64
    assert got["batches"].numpy().tolist() == [2, 3, -1]
    assert got["small"].numpy().dtype == np.uint8
    assert got["small"].numpy().shape == ()
    assert got["small"].numpy() == 4
    assert got["w"] is means["w"]
    assert means["batches"].numpy().tolist() == [2.4, 2.6, -0.6]


def test_a_float_mean_of_higher_precision_is_rounded_to_the_models():
    got = keep_dtypes(arrays(w=np.array([0.1])), arrays(w=[0.0]))
    assert got["w"].numpy().dtype == np.float32
    assert got["w"].numpy()[0] == np.float32(0.1)


def test_a_mean_of_booleans_is_rounded_too():
    got = keep_dtypes(arrays(mask=np.array([0.1, 0.9, 0.0])), arrays(mask=np.zeros(3, bool)))
    assert got["mask"].numpy().dtype == bool
    assert got["mask"].numpy().tolist() == [False, True, False]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32])
def test_the_largest_integer_does_not_overflow(dtype):
    largest = np.iinfo(dtype).max
    got = keep_dtypes(arrays(n=np.array([float(largest)])), arrays(n=np.array([0], dtype)))
    assert got["n"].numpy().tolist() == [largest]


def test_no_arrays():
    assert keep_dtypes(ArrayRecord(), ArrayRecord()) == ArrayRecord()
