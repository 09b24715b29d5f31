import numpy as np
import pytest
import torch
from dicom_files import SAGITTAL, write_image, write_series
from scipy.ndimage import map_coordinates
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.images.geometry import FILE_AFFINE
from fedmed_flower.images.reading import read_image
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
    assert caplog.messages == ["a channel does not reach over the whole image: 2.5% of it"]
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
