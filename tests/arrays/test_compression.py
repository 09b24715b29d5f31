"""Codes of one array: worked examples, bounds of their errors, error feedback."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from tiny import says

from fedmed_flower.arrays.compression import Largest, Rounded, code_of

CODES = {
    "int8": Rounded(8),
    "int8 of three": Rounded(8, 3),
    "int4": Rounded(4),
    "int4 of three": Rounded(4, 3),
    "one": Largest(1e-9),
    "third": Largest(1 / 3),
    "all": Largest(1.0),
}
EACH = pytest.mark.parametrize("code", CODES.values(), ids=CODES)
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
CHANGES = numpy_st.arrays(
    st.sampled_from([np.float32, np.float64]), st.integers(0, 20), elements=FLOATS
)


def there_and_back(code, change):
    parts = code.encode(change)
    code.check(parts, len(change))
    sizes = code.sizes(len(change))
    assert {key: (len(part), part.dtype) for key, part in parts.items()} == sizes
    return code.decode(parts, len(change))


def test_eight_bits_by_hand():
    code = Rounded(8, block=2)
    change = np.float32([127, -63.4, 0.254, 0.001, 0])
    parts = code.encode(change)
    assert parts["scales"].tolist() == [1.0, np.float32(0.002), 0.0]
    # .001 is half a scale: to the even one of 0 and 1.
    assert parts["codes"].tolist() == [127, -63, 127, 0, 0]
    expected = [127, -63, 127 * float(np.float32(0.002)), 0, 0]
    assert code.decode(parts, 5).tolist() == expected
    assert code.sizes(5) == {"codes": (5, np.dtype("i1")), "scales": (3, np.dtype("f4"))}


def test_four_bits_by_hand():
    code = Rounded(4)
    change = np.float32([7, -7, 1.4, -0.6, 3])
    parts = code.encode(change)
    assert parts["scales"].tolist() == [1.0]
    # 7 and -7 (9 in two's complement), 1 and -1 (15), 3 and nothing: the first in the lower half.
    assert [f"{byte:02x}" for byte in parts["codes"]] == ["97", "f1", "03"]
    assert code.decode(parts, 5).tolist() == [7, -7, 1, -1, 3]


def test_the_largest_by_hand():
    code = Largest(0.5)
    parts = code.encode(np.float32([64, -127, 66, -66.4, 66]))
    # Three of five, and of 66 twice the first one; the others are coded in 8 bits.
    assert parts["indices16"].tolist() == [1, 2, 3]
    assert parts["codes"].tolist() == [-127, 66, -66]
    assert parts["scales"].tolist() == [1.0]
    assert code.decode(parts, 5).tolist() == [0, -127, 66, -66, 0]
    assert len(parts["indices32"]) == 0


def test_indices_are_as_short_as_the_array_allows():
    for size, short, long in ((65_536, 656, 0), (65_537, 0, 656)):
        change = np.zeros(size)
        change[-1] = 127
        parts = Largest(0.01).encode(change)
        sizes = Largest(0.01).sizes(size)
        assert sizes["indices16"] == (short, np.dtype("u2"))
        assert sizes["indices32"] == (long, np.dtype("u4"))
        assert len(parts["indices16"]) == short
        assert Largest(0.01).decode(parts, size).tolist() == change.tolist()


@pytest.mark.parametrize(
    ("share", "size", "kept"),
    [(0.01, 1, 1), (0.01, 100, 1), (0.01, 101, 2), (0.07, 100, 7), (1.0, 9, 9), (0.01, 0, 0)],
)
def test_how_many_are_kept(share, size, kept):
    assert Largest(share).kept(size) == kept
    decoded = there_and_back(Largest(share), np.full(size, 127, np.float32))
    assert decoded.tolist() == [127] * kept + [0] * (size - kept)


@given(change=CHANGES, bits=st.sampled_from([8, 4]), block=st.integers(1, 8))
def test_an_entry_is_wrong_by_half_a_scale_at_most(change, bits, block):
    code = Rounded(bits, block)
    scales = np.repeat(code.encode(change)["scales"].astype(float), block)[: len(change)]
    error = np.abs(there_and_back(code, change) - change)
    # The last term: scales below the smallest float32, and their last digits.
    assert (error <= scales * 0.5001 + np.abs(change) * 1e-6 + 127e-45).all()


@EACH
@given(change=CHANGES)
def test_the_error_is_never_longer_than_the_change(code, change):
    error = there_and_back(code, change) - change
    assert (np.abs(error) <= np.abs(change) * (1 + 1e-6) + 127e-45).all()
    largest = float(np.abs(change).max(initial=0))
    if largest > 1e-30:
        assert np.linalg.norm(error / largest) < np.linalg.norm(change / largest)


@EACH
@given(changes=st.lists(numpy_st.arrays(float, 7, elements=st.floats(-1e6, 1e6)), max_size=9))
def test_with_error_feedback_all_that_is_missing_is_one_remainder(code, changes):
    lost = np.zeros(7)
    decoded = np.zeros(7)
    for change in changes:
        now = there_and_back(code, change + lost)
        lost = change + lost - now
        decoded += now
    missing = sum(changes, np.zeros(7)) - decoded
    assert np.abs(missing - lost).max() <= 1e-6 * (1 + np.abs(changes).sum())


@EACH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_change_that_is_not_finite_is_told_by_its_code(code, bad):
    change = np.float32([1, bad, 2])
    parts = code.encode(change)
    with pytest.raises(ValueError, match="finite"):
        code.check(parts, 3)


def test_what_float32_cannot_hold_is_told_by_its_code():
    for code in (Rounded(8), Largest(1.0)):
        with pytest.raises(ValueError, match="finite"):
            code.check(code.encode(np.float64([1e300])), 1)


@pytest.mark.parametrize("name", ["indices16", "indices32"])
@pytest.mark.parametrize(
    ("indices", "scale", "reason"),
    [
        ([0, 0], 1, "indices must ascend, each once"),
        ([2, 1], 1, "indices must ascend, each once"),
        ([1, "size"], 1, "an index must be below {size:,}, got {size:,}"),
        ([0, 1], np.nan, "a scale must be at least 0 and finite, got nan"),
        ([0, 1], -1.0, "a scale must be at least 0 and finite, got -1.0"),
    ],
)
def test_wrong_largest_entries_are_told(name, indices, scale, reason):
    size = 3 if name == "indices16" else 65_537
    indices = [size if index == "size" else index for index in indices]
    parts = {"codes": np.int8([1, 2]), "scales": np.float32([scale])}
    parts |= {"indices16": np.zeros(0, np.uint16), "indices32": np.zeros(0, np.uint32)}
    parts[name] = np.asarray(indices, parts[name].dtype)
    with pytest.raises(ValueError, match=says(reason.format(size=size))):
        Largest(0.5).check(parts, size)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_wrong_scales_are_told(scale):
    parts = {"codes": np.int8([1]), "scales": np.float32([scale])}
    text = f"a scale must be at least 0 and finite, got {scale}"
    with pytest.raises(ValueError, match=says(text)):
        Rounded(8).check(parts, 1)


@given(codes=numpy_st.arrays(np.uint8, 3), scale=st.floats(0, 2.0**127, width=32))
def test_any_byte_is_two_numbers_of_four_bits(codes, scale):
    parts = {"codes": codes, "scales": np.float32([scale])}
    change = Rounded(4).decode(parts, 5)
    halves = [half for byte in codes.tolist() for half in (byte & 15, byte >> 4)]
    numbers = [half - 16 if half > 7 else half for half in halves][:5]
    assert change.tolist() == [number * float(np.float32(scale)) for number in numbers]


def test_codes_by_name():
    assert code_of("none", 0.01) is None
    assert code_of("int8", 0.01).bits == 8
    assert code_of("int4", 0.01).bits == 4
    assert code_of("top-k", 0.25).share == 0.25
    text = "compression must be one of none, int8, int4, top-k, got 'int2'"
    with pytest.raises(ValueError, match=says(text)):
        code_of("int2", 0.01)
    for share in (0, 1.5, float("nan")):
        text = f"top-k-share must be above 0 and at most 1, got {share}"
        with pytest.raises(ValueError, match=says(text)):
            code_of("none", share)


def test_more_entries_than_an_index_can_name_are_refused():
    with pytest.raises(ValueError, match=r"at most 4,294,967,296 entries .* got 4,294,967,297"):
        Largest(0.01).sizes(2**32 + 1)
