import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Orientationd, Spacingd
from safetensors import deserialize

from fedmed_flower.clients.fingerprints import Unreadable
from fedmed_flower.clients.stored_rows import packed, packed_row, unpacked, unpacked_row


def again(result, row=(), steps=()):
    row = dict(row)
    content = b"".join(bytes(part) for part in packed_row(result, row, steps))
    return unpacked_row(np.frombuffer(bytearray(content), np.uint8), row, steps)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
NUMBERS = arrays.arrays(
    st.sampled_from(["f4", "f8", "u1", "i2", "i8", "?"]),
    arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
)
PARTS = st.recursive(
    SCALARS | NUMBERS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


def same(one, other):
    """Return whether values are equal to the bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return (
        np.float64(one).tobytes() == np.float64(other).tobytes()
        if isinstance(one, float)
        else one == other
    )


@given(st.dictionaries(st.text(), PARTS, max_size=4))
def test_a_row_comes_back_to_the_bit(row):
    assert same(again(row), row)


def test_tensors_and_their_dtypes_come_back():
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.uint8,
        torch.int64,
        torch.bool,
    ):
        tensor = torch.arange(6).reshape(2, 3).to(dtype)
        found = again({"x": tensor, "dtype": dtype, "numpy": np.dtype("f4")})
        assert found["x"].dtype is dtype
        assert torch.equal(found["x"], tensor)
        assert (found["dtype"], found["numpy"]) == (dtype, np.dtype("f4"))


def test_several_samples_of_one_row_come_back():
    rows = [{"image": torch.ones(2)}, {"image": torch.zeros(3)}]
    found = again(rows)
    assert [row["image"].tolist() for row in found] == [[1, 1], [0, 0, 0]]


def test_what_the_row_had_before_is_taken_from_it():
    class Patient:
        """An object, which could not be written."""

    row = {"patient": Patient(), "image": ["a", "b"], "label": 1}
    found = again({**row, "image": torch.ones(1), "source": row["image"]}, row)
    assert found["patient"] is row["patient"]
    assert found["source"] is row["image"]
    content = b"".join(bytes(part) for part in packed_row({**row}, row, ()))
    assert b'"a"' not in content
    with pytest.raises(Unreadable, match="Patient"):
        packed_row(row, {}, ())


def chain():
    return [Orientationd("image", axcodes="LPI", labels=None), Spacingd("image", pixdim=(1, 2, 1))]


def test_an_image_can_be_inverted_by_another_chain_of_the_same_transforms():
    rng = np.random.default_rng(0)
    affine = np.diag([-2.0, 1.0, 3.0, 1.0])
    image = MetaTensor(torch.from_numpy(rng.normal(size=(1, 4, 6, 5))), torch.from_numpy(affine))
    steps = chain()
    result = Compose(steps)({"image": image})
    row = {"image": "x.nii"}
    content = b"".join(bytes(part) for part in packed_row(result, row, steps))
    others = chain()
    found = unpacked_row(np.frombuffer(bytearray(content), np.uint8), row, others)
    assert vars(found["image"]).keys() == vars(result["image"]).keys()
    inverted = []
    for own, transforms in ((result, steps), (found, others)):
        shares = {"image": own["image"], "shares": MetaTensor(own["image"].as_tensor().clone())}
        compose = Compose(transforms)
        invert = Invertd("shares", compose, orig_keys="image", nearest_interp=False)
        inverted.append(invert(copy.deepcopy(shares))["shares"])
    assert inverted[0].shape == image.shape
    assert torch.equal(inverted[0].as_tensor(), inverted[1].as_tensor())
    assert torch.equal(inverted[0].affine, inverted[1].affine)


def test_a_record_of_a_transform_that_is_not_in_the_chain_is_not_written():
    image = MetaTensor(torch.ones(1, 4, 6, 5), torch.eye(4))
    result = Orientationd("image", axcodes="LPI", labels=None)({"image": image})
    with pytest.raises(Unreadable, match="a transform that is not in the chain"):
        packed_row(result, {}, chain())


def test_the_layout_is_that_of_safetensors():
    rng = np.random.default_rng(0)
    given_arrays = [
        rng.normal(size=(3, 5)),
        rng.integers(0, 9, 7).astype(np.uint8),
        np.ones(2, "i4"),
    ]
    content = b"".join(bytes(part) for part in packed("text", given_arrays))
    found = {name: entry for name, entry in deserialize(content) if not name.startswith("gap")}
    for number, array in enumerate(given_arrays):
        entry = found[str(number)]
        assert tuple(entry["shape"]) == array.shape
        assert bytes(entry["data"]) == array.tobytes()
    text, read = unpacked(np.frombuffer(content, np.uint8))
    assert text == "text"
    for one, other in zip(read, given_arrays, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize("value", [{1}, torch.ones(1, dtype=torch.bfloat16), object(), 1j])
def test_what_cannot_be_written_is_refused(value):
    with pytest.raises(Unreadable):
        packed_row({"x": value}, {}, ())
