import io
import math
import tracemalloc

import numpy as np
import pytest
from builders import arrays, header, npy
from dtypes import NUMBERS, SHAPES
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmed_flower.arrays import views as module
from fedmed_flower.arrays.kernels import BFLOAT16
from fedmed_flower.arrays.views import (
    Draft,
    array_of,
    flat,
    is_finite,
    keep_dtypes,
    not_finite,
    own_content,
    view,
)


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


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", ["uint32", "uint64", "float32", "float16"])
def test_an_array_of_one_copy_is_that_of_flower(shape, dtype):
    values = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    assert array_of(values) == Array(values)


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
    "a number made of fields": npy(header(descr="('<f4', [('a', '<f2'), ('b', '<i2')])"), bytes(8)),
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
    layout = arrays(batches=np.array([7, 7, 7], np.int64), small=np.array(3, np.uint8), w=[1.0])
    means = arrays(batches=np.array([2.4, 2.6, -0.6]), small=np.array(3.9), w=[0.25])
    got = keep_dtypes(means, layout)
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


def test_a_single_bfloat16_gets_its_dtype_back():
    layout = ArrayRecord({"w": bfloat16(npy(header("'<V2'", "()"), b"\x80\x3f"))})
    got = keep_dtypes(arrays(w=np.array(2.0)), layout)
    assert got["w"].dtype == "bfloat16"
    assert view(got["w"]).shape == ()
    assert view(got["w"]).tobytes() == b"\x00\x40"


# --- bfloat16 -----------------------------------------------------------------------------------


def bfloat16(data: bytes) -> Array:
    return Array("bfloat16", (2,), "numpy.ndarray", data)


@pytest.mark.parametrize("descr", ["'<V2'", "'|V2'", "'V2'", "'>V2'"])
def test_what_is_said_to_be_bfloat16_is_read_as_two_bytes_each(descr):
    data = npy(header(descr), b"\x80\x3f\x00\xc0")
    got = view(bfloat16(data))
    assert got.dtype == BFLOAT16
    assert got.shape == (2,)
    assert got.tobytes() == b"\x80\x3f\x00\xc0"
    assert not got.flags.writeable
    with pytest.raises(ValueError, match=r"^dtype \|V2 is not a plain number$"):
        view(claimed(data))


@pytest.mark.parametrize(
    "descr",
    ["'|V4'", "'|V1'", "'|V0'", "[('a', '<f2')]", "[('a', '|u1'), ('b', '|u1')]", "'|S2'", "'<M8'",
     "('|u1', (2,))", "('|V1', (2,))", "('<f2', [('a', '<f2')])", "'|O'"],
)  # fmt: skip
def test_nothing_else_passes_as_bfloat16(descr):
    for body in (b"", bytes(4), bytes(8), bytes(16)):
        with pytest.raises(ValueError):
            view(bfloat16(npy(header(descr), body)))


def test_numbers_that_are_said_to_be_bfloat16_are_what_the_bytes_say():
    got = view(bfloat16(Array(np.array([1.5, 2.5], np.float32)).data))
    assert got.dtype == np.float32
    assert got.tolist() == [1.5, 2.5]


# --- Headers read once --------------------------------------------------------------------------


def test_a_header_that_was_read_before_does_not_vouch_for_the_rest():
    data = Array(np.array([1.0, 2.0], np.float32)).data
    assert view(claimed(data)).tolist() == [1, 2]
    assert view(claimed(data[:-4] + np.float32(5).tobytes())).tolist() == [1, 5]
    for wrong in (data[:-1], data + b"\0", data[:-8], data * 2):
        with pytest.raises(ValueError, match="bytes do not hold an array of shape"):
            view(claimed(wrong))
    assert view(claimed(data)).tolist() == [1, 2]


def test_a_malformed_header_is_refused_each_time():
    for _ in range(3):
        with pytest.raises(ValueError, match=r"^no array has the shape \(-1,\)$"):
            view(claimed(MALFORMED["negative side"]))
        with pytest.raises(ValueError, match=r"^no well-formed \.npy header \(\w+\)$"):
            view(claimed(MALFORMED["no bytes"]))


def test_a_header_is_read_once_for_all_replies():
    module._header.cache_clear()
    for value in range(5):
        view(Array(np.full((3, 4), value, np.float64)))
    assert module._header.cache_info()[:2] == (4, 1)


def test_headers_of_the_second_version_are_read_too():
    text = header().ljust(70_000).encode()
    for head in (header().encode(), header().ljust(5000).encode()):
        data = b"\x93NUMPY\x02\x00" + len(head).to_bytes(4, "little") + head + bytes(8)
        assert view(claimed(data)).tolist() == [0, 0]
    data = b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + bytes(8)
    with pytest.raises(ValueError):
        view(claimed(data))


# --- Drafts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [np.arange(6, dtype=np.int16).reshape(2, 3), np.array(1.5), np.zeros((0, 3)), np.array([True]),
     np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array([1, 2], ">f4"), np.array([1j])],
)  # fmt: skip
def test_what_is_written_to_a_draft_is_what_numpy_saves(values):
    layout = arrays(a=values, b=[7.0])
    draft = Draft(layout)
    assert [part.shape for part in draft.row] == [(values.size,), (1,)]
    assert [part.dtype for part in draft.row] == [values.dtype, np.float32]
    assert not any(part.any() for part in draft.row)
    draft.row[0][...] = values.reshape(-1)
    draft.row[1][...] = 8
    got = draft.finish()
    assert list(got) == ["a", "b"]
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(values).reshape(values.shape))
    assert got["a"].data == file.getvalue()
    assert (got["a"].dtype, got["a"].shape) == (str(values.dtype), values.shape)
    assert got["b"] == Array(np.array([8], np.float32))
    assert layout["b"].numpy() == 7


def test_a_draft_is_finished_without_a_copy():
    layout = arrays(w=np.zeros(1_000_000))
    tracemalloc.start()
    draft = Draft(layout)
    draft.row[0][...] = 1
    got = draft.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000 * 1.05
    assert view(got["w"]).sum() == 1_000_000


def test_a_finished_draft_can_no_longer_be_written_to():
    draft = Draft(arrays(w=[0.0, 0.0]))
    kept = draft.row[0]
    kept[...] = 1
    got = draft.finish()
    assert draft.row == []
    # The array holds a copy of its own where someone kept a view of the draft.
    kept[...] = 2
    assert got["w"].numpy().tolist() == [1, 1]


def test_an_empty_draft():
    assert Draft(ArrayRecord()).finish() == ArrayRecord()


# --- Flat views and finite values ---------------------------------------------------------------


def test_flat_views_come_in_the_order_of_another_record_and_in_c_order():
    record = arrays(a=[1.0], b=np.asfortranarray([[1.0, 2.0], [3.0, 4.0]]), c=np.array(5))
    got = flat(record, arrays(c=[0.0], b=[0.0], a=[0.0]))
    assert [part.tolist() for part in got] == [[5], [1, 2, 3, 4], [1]]
    assert np.shares_memory(got[2], np.frombuffer(record["a"].data, np.uint8))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8", "c8", "c16"])
@pytest.mark.parametrize("place", [0, 3, 65535, 65536, 99_999])
def test_a_value_that_is_not_finite_is_found(bad, dtype, place):
    values = np.zeros(100_000, dtype)
    assert is_finite(values)
    values[place] = bad
    assert not is_finite(values)
    assert not is_finite(np.asfortranarray(values.reshape(100, 1000)))
    assert not_finite(arrays(a=[1.0], b=values)) == "b holds NaN or infinite values"


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81])
def test_a_bfloat16_that_is_not_finite_is_found(bits):
    values = np.array([0x3F80, bits], np.uint16)
    assert not is_finite(values.view(BFLOAT16))
    assert not is_finite(values[1:].view(BFLOAT16).reshape(()))
    assert is_finite(values[:1].view(BFLOAT16))


def test_the_largest_numbers_and_no_numbers_are_finite():
    largest = [np.finfo(dtype).max for dtype in (np.float16, np.float32, np.float64)]
    assert all(is_finite(np.array([value, -value])) for value in largest)
    assert is_finite(np.array([0x7F7F, 0xFF7F], np.uint16).view(BFLOAT16))
    assert is_finite(np.array([2**63 - 1, -(2**63)]))
    assert is_finite(np.zeros((0, 3)))
    assert is_finite(np.array(1.0))
    assert not_finite(ArrayRecord()) is None


@pytest.mark.parametrize("order", ["C", "F"])
def test_looking_for_values_that_are_not_finite_copies_nothing(order):
    values = view(Array(np.zeros((1000, 1000), order=order)))
    tracemalloc.start()
    assert is_finite(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def test_a_content_of_its_own_shares_the_arrays_and_no_record():
    arrays = ArrayRecord({"w": Array(np.zeros(3)), "b": Array(np.ones(2))})
    content = RecordDict(
        {
            "arrays": arrays,
            "config": ConfigRecord({"lr": 1.0, "steps": [1, 2]}),
            "m": MetricRecord(),
        }
    )
    own = own_content(content)
    assert list(own) == list(content)
    assert all(own["arrays"][key] is arrays[key] for key in ("w", "b"))
    own["config"]["lr"] = 2.0
    own["config"]["steps"].append(3)
    own["arrays"]["w"] = own["arrays"].pop("b")
    own["m"]["x"] = 1
    assert dict(content["config"]) == {"lr": 1.0, "steps": [1, 2]}
    assert list(arrays) == ["w", "b"]
    assert not content["m"]
