import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import context_of

from fedmed_flower import InputError, SegmentationClient
from fedmed_flower.images import reading, regions
from fedmed_flower.images.reading import (
    as_classes,
    classes_in,
    read_image,
    read_label,
    reading_once,
)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    paths = {name: str(tmp_path / f"{name}.nii.gz") for name in ("image", "mask")}
    volumes = {"image": rng.normal(size=(4, 5, 6)), "mask": rng.integers(0, 3, (4, 5, 6))}
    for name, path in paths.items():
        nibabel.save(nibabel.Nifti1Image(volumes[name].astype(np.int16), np.eye(4)), path)
    return paths


@pytest.fixture
def read(monkeypatch):
    """Return the list of sources that are read."""
    found = []
    before = reading._read

    def noted(source, *args):
        found.append(source)
        return before(source, *args)

    monkeypatch.setattr(reading, "_read", noted)
    return found


def test_the_same_is_read_once_within_the_context(files, read):
    with reading_once():
        image = read_image(files["image"], 3)
        assert read_image(files["image"], spatial_dims=3) is image
        mask = read_label(files["mask"], 3, 3, (), image)
        assert read_label(files["mask"], 3, 3, (), read_image(files["image"], 3)) is mask
    assert read == [files["image"], files["mask"]]
    assert read_image(files["image"], 3) is not image
    assert len(read) == 3


def test_other_arguments_are_read_by_themselves(files, read):
    with reading_once():
        read_image(files["image"], 3)
        read_image(files["image"], None)
        assert read_label(files["mask"], 3, 3).dtype is torch.uint8
        assert read_label(files["mask"], 3, None).dtype is torch.int64
    assert read == [files["image"], files["image"], files["mask"]]


def test_an_error_is_raised_each_time(tmp_path, read):
    with reading_once():
        for _ in range(2):
            with pytest.raises(InputError, match="is not there"):
                read_image(str(tmp_path / "none.nii"), 3)
    assert len(read) == 2


class Organs(SegmentationClient):
    classes = ("liver", "spleen")
    spatial_dims = 3
    empty_masks = True

    def load_data(self, site):
        raise NotImplementedError


class Nested(Organs):
    regions = {"organ": (1, 2), "lesion": (2,)}  # noqa: RUF012
    classes = ("organ", "lesion")


@pytest.mark.parametrize("kind", [Organs, Nested])
def test_a_mask_is_looked_at_once_where_a_row_is_checked_and_loaded(files, read, monkeypatch, kind):
    looked = []

    def noted(*args):
        looked.append(args)
        return as_classes(*args)

    monkeypatch.setattr(reading, "as_classes", noted)
    monkeypatch.setattr(regions, "as_classes", noted)
    client = kind(context_of())
    row = {"image": files["image"], "label": files["mask"], "patient": "a"}
    with reading_once():
        assert client._checked(row).problem is None
        client._load(train=True)(row)
    assert read == [files["image"], files["mask"]]
    assert len(looked) == 1


def test_equal_arrays_are_not_taken_for_one_another(read):
    with reading_once():
        first = read_image(np.zeros((2, 2)), 2)
        assert read_image(np.zeros((2, 2)), 2) is not first
    assert len(read) == 2


@given(st.lists(st.sampled_from([0, 1, 7, 200, 255]), min_size=1, max_size=40), st.data())
def test_values_become_the_classes_of_their_places(voxels, data):
    values = data.draw(st.permutations([0, 1, 7, 200, 255]))
    mask = read_label(np.array([[voxels]], np.int16), 2, 5, values)
    expected = [values.index(value) for value in voxels]
    assert mask.dtype is torch.uint8
    assert mask.flatten().tolist() == expected
    assert classes_in(mask) == tuple(sorted(set(expected)))


@pytest.mark.parametrize("odd", [-3, 300, 2.5])
def test_values_that_fit_no_byte_become_classes_too(odd):
    voxels = np.array([[odd, 0, odd, 1]], np.float32)
    mask = read_label(voxels, 2, 3, (0, odd, 1))
    assert mask.flatten().tolist() == [1, 0, 1, 2]
    with pytest.raises(InputError, match="which are not classes: a mask holds 0, 1"):
        read_label(voxels, 2, 2)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_values_are_copied_as_numpy_copies_them(order, dtype):
    array = np.random.default_rng(0).normal(100, 50, (2, 5, 4, 37)).astype(dtype, order=order)
    found = reading._copied(array, np.float32)
    np.testing.assert_array_equal(found, np.array(array, np.float32, order="C"), strict=True)
    assert found.flags.c_contiguous
