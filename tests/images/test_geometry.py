"""Masks and channels that another program stored in another order or direction of axes."""

import itertools
import re

import nibabel
import numpy as np
import pytest
import torch
from dicom_files import SAGITTAL, write_series
from monai.data import MetaTensor
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from fedmed_flower.errors import InputError
from fedmed_flower.images.geometry import brought_to, file_affine_of, mismatch
from fedmed_flower.images.reading import read_image, read_label

TILTED = np.array([[1.2, 0.3, 0, -40], [-0.4, 0.9, 0.1, 12], [0, -0.1, 2.5, 7], [0, 0, 0, 1.0]])
CODES = ["".join(c) for axes in itertools.permutations(["RL", "AP", "SI"])
         for c in itertools.product(*axes)]  # fmt: skip


def save(path, array, affine=None):
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def stored_as(source, codes, path):
    """Let nibabel store a file in other axes."""
    volume = nibabel.load(source)
    turn = ornt_transform(io_orientation(volume.affine), axcodes2ornt(codes))
    nibabel.save(volume.as_reoriented(turn), path)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An image and its mask, no side of which is like another, tilted in the patient."""
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    image = save(folder / "x.nii", rng.normal(size=(5, 4, 6)).astype(np.float32), TILTED)
    mask = rng.integers(0, 3, (5, 4, 6)).astype(np.uint8)
    return image, save(folder / "m.nii", mask, TILTED), mask


def test_there_are_48_orders_and_directions():
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("codes", CODES)
def test_a_mask_in_any_axes_is_brought_to_its_image(pair, codes, tmp_path):
    image, mask, values = pair
    turned = stored_as(mask, codes, tmp_path / "t.nii")
    read = read_image(image, 3)
    label = read_label(turned, 3, 3, image=read)
    assert np.array_equal(label[0].numpy(), values)
    assert torch.equal(label.affine, read.affine)
    assert torch.equal(*(file_affine_of(part)["original_affine"] for part in (label, read)))
    assert label.is_contiguous()


def test_equal_sides_are_told_apart_by_the_place(tmp_path):
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    image = read_image(save(tmp_path / "x.nii", cube), 3)
    for number, codes in enumerate(CODES):
        turned = stored_as(tmp_path / "x.nii", codes, tmp_path / f"{number}.nii")
        assert np.array_equal(read_label(turned, 3, 27, image=image)[0].numpy(), cube)


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PIR"])
def test_a_mask_of_another_program_fits_a_dicom_series(tmp_path, codes):
    rng = np.random.default_rng(1)
    folder = tmp_path / "series"
    write_series(folder, rng.integers(0, 9, (6, 5, 4)), (0.7, 0.8, 3), origin=(-9, -20, 31), seed=3)
    image = read_image(folder, 3)
    assert nibabel.aff2axcodes(image.affine.numpy()) == ("L", "P", "S")
    mask = rng.integers(0, 2, (6, 5, 4)).astype(np.uint8)
    path = save(tmp_path / "m.nii.gz", mask, image.affine.numpy())
    turned = stored_as(path, codes, tmp_path / "t.nii.gz")
    assert np.array_equal(read_label(turned, 3, 2, image=image)[0].numpy(), mask)


def test_channels_are_brought_to_the_first(pair, tmp_path):
    image, _, _ = pair
    turned = stored_as(image, "PIL", tmp_path / "t.nii")
    both = read_image([image, turned], 3)
    assert torch.equal(both[0], both[1])
    back = read_image([turned, image], 3)
    assert torch.equal(back[0], back[1])
    assert torch.equal(back.affine, read_image(turned, 3).affine)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "ARS", "PLI"])
def test_a_mask_of_one_slice_is_turned_as_well(tmp_path, codes):
    rng = np.random.default_rng(2)
    (path,) = write_series(
        tmp_path / "s", rng.integers(0, 9, (6, 5, 1)), (0.7, 0.8, 3), origin=(3, 4, 5)
    )
    image = read_image(path, 2)
    mask = rng.integers(0, 2, (6, 5, 1)).astype(np.uint8)
    affine = np.diag([-0.7, -0.8, 3, 1.0])
    affine[:3, 3] = (-3, -4, 5)
    turned = stored_as(save(tmp_path / "m.nii", mask, affine), codes, tmp_path / "t.nii")
    label = read_label(turned, 2, 2, image=image)
    assert np.array_equal(label[0].numpy(), mask[..., 0].T)


def test_what_lies_elsewhere_keeps_its_text(tmp_path):
    write_series(tmp_path / "series", np.zeros((6, 6, 6)), orientation=SAGITTAL)
    image = read_image(tmp_path / "series", 3)
    affine = image.affine.numpy()
    elsewhere = affine.copy()
    elsewhere[0, 3] += 1.5
    oblique = affine.copy()
    oblique[:3, :2] = affine[:3, :2] @ [[0.96, -0.28], [0.28, 0.96]]
    coarse = affine @ np.diag([2, 1, 1, 1.0])
    mirrored = affine @ np.diag([-1, 1, 1, 1.0])
    for changed in (elsewhere, oblique, coarse, mirrored):
        mask = save(tmp_path / "m.nii", np.zeros((6, 6, 6), np.uint8), changed)
        label = read_image(mask, 3)
        text = mismatch(label, image)
        assert "mm away from the image: spacing" in text
        with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
            brought_to(label, image)
    narrow = read_image(save(tmp_path / "n.nii", np.zeros((6, 5, 6), np.uint8), affine), 3)
    with pytest.raises(
        InputError, match=re.escape("its shape is (6, 5, 6), the image's (6, 6, 6)")
    ):
        brought_to(narrow, image)


def test_arrays_have_no_axes_to_bring_in_order(tmp_path):
    image = read_image(save(tmp_path / "x.nii", np.zeros((3, 4, 5), np.float32), TILTED), 3)
    label = MetaTensor(torch.ones(1, 5, 4, 3))
    with pytest.raises(
        InputError, match=re.escape("its shape is (5, 4, 3), the image's (3, 4, 5)")
    ):
        brought_to(label, image)


# Values that resampling left beside a class


@pytest.mark.parametrize(("classes", "values"), [(3, ()), (None, ()), (3, (0, 1, 2))])
def test_values_beside_a_class_are_taken_for_it(classes, values):
    mask = np.array([[0, 1.0000001, 1.9991], [-0.0009, 0.9995, 2]], np.float32)
    assert read_label(mask, 2, classes, values).tolist() == [[[0, 1, 2], [0, 1, 2]]]


@pytest.mark.parametrize(("classes", "values"), [(3, ()), (None, ()), (3, (0, 1, 2))])
@pytest.mark.parametrize("value", [1.002, 0.5, -0.0011])
def test_values_between_classes_are_refused(classes, values, value):
    mask = np.array([[0, value, 1]], np.float32)
    text = f"it holds the values {round(value, 3):g}, which are not classes"
    with pytest.raises(InputError, match=re.escape(text)):
        read_label(mask, 2, classes, values)


def test_the_nearest_of_odd_values_counts():
    mask = np.array([[254.9999, 0.0001, 7]], np.float32)
    assert read_label(mask, 2, 3, (255, 7, 0)).tolist() == [[[0, 2, 1]]]
