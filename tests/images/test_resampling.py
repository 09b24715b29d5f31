import re

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from dicom_files import SAGITTAL, STUDY, write_image, write_series
from pydicom.uid import generate_uid
from scipy.ndimage import map_coordinates
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.images.geometry import FILE_AFFINE
from fedmed_flower.images.reading import read_image, read_label
from fedmed_flower.images.series import Series


def series(folder, voxels, **how):
    files = write_series(folder, voxels, **how)
    return Series("", tuple(map(str, files)))


@pytest.fixture
def voxels():
    return np.random.default_rng(0).integers(0, 1000, (12, 10, 9))


@pytest.mark.parametrize(
    "how",
    [
        {"spacing": (1.1, 0.8, 1.5), "origin": (0.4, 1.2, -0.6)},
        {"spacing": (1.0, 1.2, 0.9), "orientation": SAGITTAL, "origin": (8.6, 0.3, 9.0)},
    ],
    ids=["axial", "sagittal"],
)
def test_another_grid_is_interpolated_as_scipy_does(tmp_path, voxels, how):
    first = series(tmp_path / "first", np.zeros((7, 6, 5)), origin=(1.3, 1.7, 0.4))
    other = series(tmp_path / "other", voxels, **how)
    both = read_image([first, other], 3)
    alone = read_image(other, 3)
    grid = read_image(first, 3)
    assert both.shape == (2, 7, 6, 5)
    assert np.array_equal(both.meta[FILE_AFFINE], grid.meta[FILE_AFFINE])
    affines = [np.asarray(one.meta[FILE_AFFINE]) for one in (alone, grid)]
    to_image = np.linalg.inv(affines[0]) @ affines[1]
    places = np.einsum("ij,jabc->iabc", to_image[:3, :3], np.indices((7, 6, 5)))
    places += to_image[:3, 3, None, None, None]
    expected = map_coordinates(alone[0].numpy(), places, order=1, mode="nearest")
    np.testing.assert_allclose(both[1].numpy(), expected, atol=0.01)


def test_the_same_grid_with_its_axes_turned_is_exact(tmp_path, voxels):
    first = series(tmp_path / "first", voxels)
    # The same patient, cut from left to right, with rows from the head down.
    turned = voxels.transpose(1, 2, 0)[:, ::-1, ::-1]
    other = series(tmp_path / "other", turned, orientation=SAGITTAL, origin=(11, 0, 8))
    both = read_image([first, other], 3)
    np.testing.assert_allclose(both[1].numpy(), both[0].numpy(), atol=0.01)


def test_many_slabs_are_as_one(tmp_path, voxels, monkeypatch):
    first = series(tmp_path / "first", np.zeros((7, 6, 5)), origin=(1.3, 1.7, 0.4))
    other = series(tmp_path / "other", voxels, spacing=(1.1, 0.8, 1.5))
    whole = read_image([first, other], 3).as_tensor()
    monkeypatch.setattr("fedmed_flower.images.resampling._AT_ONCE", 70)
    assert torch.equal(read_image([first, other], 3).as_tensor(), whole)


def test_what_lies_outside_is_said_and_bounded(tmp_path, caplog):
    first = series(tmp_path / "first", np.zeros((4, 3, 40)))
    near = series(tmp_path / "near", np.full((4, 3, 39), 7))
    far = series(tmp_path / "far", np.full((4, 3, 36), 7))
    with caplog.at_level("INFO", "flwr.fedmed"):
        assert bool((read_image([first, near], 3)[1] == 7).all())
    assert caplog.messages == [
        "a channel does not reach over the whole image: 2.5% of it",
        f"{near} is brought to the grid of {first} by linear interpolation",
    ]
    text = (
        f"{far} cannot be brought to the grid of {first}: 10.0% of the voxels of the grid lie "
        "outside of it, and at most 5% may"
    )
    with pytest.raises(InputError, match=says(text)):
        read_image([first, far], 3)


def test_images_without_a_position_are_not_resampled(tmp_path):
    pair = [
        Series("", (str(write_image(tmp_path / f"{side}.dcm", np.zeros((side, 3), np.uint8))),))
        for side in (4, 5)
    ]
    text = f"{pair[1]} cannot be brought to the grid of {pair[0]}: they are not both volumes"
    with pytest.raises(InputError, match=text):
        read_image(pair, 2)


# --- Files of volumes -----------------------------------------------------------------------------

# A grid of half the sides within that of the other, turned.
COARSE = np.array([[0, -2.0, 0, 8], [2.0, 0, 0, -7], [0, 0, 2.0, 21], [0, 0, 0, 1]])
FINE = np.diag([-1.0, 1.0, 1.0, 1.0])
FINE[:3, 3] = (10, -9, 20)


def write_nifti(path, array, affine, code=1):
    volume = nibabel.Nifti1Image(np.asarray(array, np.float32), affine)
    volume.header.set_sform(affine, code)
    volume.header.set_qform(affine, code)
    nibabel.save(volume, path)
    return str(path)


def write_itk(path, array, affine):
    """Write a volume by SimpleITK, whose axes lead to the left and to the back."""
    turned = np.diag([-1, -1, 1]) @ affine[:3]
    sides = np.linalg.norm(turned[:, :3], axis=0)
    image = sitk.GetImageFromArray(np.asarray(array, np.float32).transpose(2, 1, 0))
    image.SetSpacing(sides.tolist())
    image.SetOrigin(turned[:, 3].tolist())
    image.SetDirection((turned[:, :3] / sides).ravel().tolist())
    sitk.WriteImage(image, str(path))
    return str(path)


@pytest.mark.parametrize("kind", [".nii.gz", ".nrrd", ".mha"])
def test_channels_in_files_are_interpolated_as_scipy_does(tmp_path, kind, caplog):
    write = write_nifti if kind == ".nii.gz" else write_itk
    fine = np.random.default_rng(0).normal(size=(21, 20, 19))
    first = write(tmp_path / f"first{kind}", np.zeros((8, 7, 6)), COARSE)
    other = write(tmp_path / f"other{kind}", fine, FINE)
    with caplog.at_level("INFO", "flwr.fedmed"):
        both = read_image([first, other], 3)
    said = f"{other} is brought to the grid of {first} by linear interpolation"
    assert caplog.messages == [said]
    assert both.meta[FILE_AFFINE].numpy() == pytest.approx(COARSE)
    to_image = np.linalg.inv(FINE) @ COARSE
    places = np.einsum("ij,jabc->iabc", to_image[:3, :3], np.indices((8, 7, 6)))
    places += to_image[:3, 3, None, None, None]
    expected = map_coordinates(fine, places, order=1, mode="nearest")
    np.testing.assert_allclose(both[1].numpy(), expected, atol=1e-4)


def test_folders_of_dicom_files_in_a_list_are_channels_of_one_frame_of_reference(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 99, (12, 10, 9))
    grid = {"origin": (1.3, 1.7, 0.4)}
    write_series(tmp_path / "first", np.zeros((7, 6, 5)), **grid, **STUDY)
    write_series(tmp_path / "other", voxels, **STUDY)
    both = read_image([str(tmp_path / "first"), str(tmp_path / "other")], 3)
    as_series = [
        series(tmp_path / "s0", np.zeros((7, 6, 5)), **grid, **STUDY),
        series(tmp_path / "s1", voxels, **STUDY),
    ]
    assert torch.equal(both.as_tensor(), read_image(as_series, 3).as_tensor())
    write_series(tmp_path / "away", voxels, **STUDY | {"FrameOfReferenceUID": generate_uid()})
    text = "grid: their frames of reference (FrameOfReferenceUID) differ. Save it on the grid of"
    with pytest.raises(InputError, match=re.escape(text)):
        read_image([str(tmp_path / "first"), str(tmp_path / "away")], 3)


def refused(first, other):
    with pytest.raises(InputError) as caught:
        read_image([first, other], 3)
    start, _, reason = str(caught.value).partition("; and it cannot be brought to that grid: ")
    assert start.startswith(f"{other} does not fit {first}: its shape is (21, 20, 19), ")
    assert reason.endswith(". Save it on the grid of the first channel")
    return reason.partition(". Save it")[0]


def test_positions_that_cannot_be_compared_are_refused(tmp_path):
    fine = np.zeros((21, 20, 19))
    first = write_nifti(tmp_path / "first.nii", np.zeros((8, 7, 6)), COARSE)
    template = write_nifti(tmp_path / "mni.nii", fine, FINE, code=4)
    assert refused(first, template) == (
        "their headers name different spaces of positions: NIfTI, that of MNI, and NIfTI, that of "
        "the scanner of the first channel"
    )
    volume = nibabel.Nifti1Image(fine.astype(np.float32), None)
    nibabel.save(volume, tmp_path / "unknown.nii")
    # nibabel takes the middle of such a volume for the origin.
    assert refused(first, str(tmp_path / "unknown.nii")) == (
        f"{tmp_path}/unknown.nii states no position (sform_code and qform_code are 0)"
    )
    nowhere = write_nifti(tmp_path / "nowhere.nii", fine, np.diag([0.5, 0.5, 0.5, 1]))
    assert refused(first, nowhere) == (
        f"{nowhere} has its origin at 0, 0, 0, which states no position"
    )
    nrrd = write_itk(tmp_path / "other.nrrd", fine, FINE)
    assert refused(first, nrrd) == (
        "their headers name different spaces of positions: NRRD or MetaImage, and NIfTI, that of "
        "the scanner of the first channel"
    )
    np.save(tmp_path / "array.npy", fine)
    assert refused(first, str(tmp_path / "array.npy")) == (
        "they do not both have a position in the patient"
    )


def test_volumes_that_hardly_overlap_are_refused(tmp_path):
    away = FINE + np.array([[0, 0, 0, 12], [0] * 4, [0] * 4, [0] * 4])
    first = write_nifti(tmp_path / "first.nii", np.zeros((8, 7, 6)), COARSE)
    other = write_nifti(tmp_path / "other.nii", np.zeros((21, 20, 19)), away)
    text = r"other.nii cannot be brought to the grid of .*first.nii: \d+\.\d% of the voxels of"
    with pytest.raises(InputError, match=text):
        read_image([first, other], 3)


def test_a_mask_on_another_grid_stays_refused(tmp_path):
    first = write_nifti(tmp_path / "first.nii", np.zeros((8, 7, 6)), COARSE)
    other = write_nifti(tmp_path / "other.nii", np.ones((21, 20, 19)), FINE)
    mask = write_nifti(tmp_path / "mask.nii", np.ones((21, 20, 19)), FINE)
    image = read_image([first, other], 3)
    with pytest.raises(InputError, match=r"its shape is \(21, 20, 19\), the image's \(8, 7, 6\)"):
        read_label(mask, 3, 2, image=image)
    fits = write_nifti(tmp_path / "fits.nii", np.ones((8, 7, 6)), COARSE)
    assert read_label(fits, 3, 2, image=image).all()
