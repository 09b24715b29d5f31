import nibabel
import numpy as np
import pytest
from PIL import Image
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.images.reading import read_image, read_label
from fedmed_flower.images.volumes import frames_of

VOLUMES = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)


@pytest.fixture
def path(tmp_path):
    """Five volumes in one file."""
    nibabel.save(nibabel.Nifti1Image(VOLUMES, np.eye(4)), tmp_path / "x.nii.gz")
    return tmp_path / "x.nii.gz"


def refused(path, dims, frames):
    with pytest.raises(InputError) as error:
        read_image(path, dims, frames)
    return str(error.value)


def test_several_volumes_are_not_taken_for_channels_unless_the_row_says_so(path):
    text = (
        f"{path} holds 5 volumes (4D), which may be channels, times or b-values: say so by frames "
        'in its row, "channels" or the number, from 0, of the volume that is taken; or declare the '
        "channels in the client's image_shape"
    )
    assert refused(path, 3, None) == text
    for frames in ("channels", "5 channels"):
        assert np.array_equal(read_image(path, 3, frames).numpy(), np.moveaxis(VOLUMES, -1, 0))
    assert (
        refused(path, 3, "4 channels")
        == f"{path} holds 5 volumes (4D), and 4 channels are expected"
    )


@pytest.mark.parametrize("number", [0, 4, np.int64(2)])
def test_one_volume_is_taken_by_its_number(path, number):
    assert np.array_equal(read_image(path, 3, number).numpy()[0], VOLUMES[..., number])


def test_a_number_without_a_volume_is_refused(path, tmp_path):
    says_so = "holds 5 volumes, numbered from 0, and frames says 5"
    assert refused(path, 3, 5) == f"{path} {says_so}"
    Image.fromarray(np.eye(4).astype(np.uint8)).save(tmp_path / "x.png")
    np.save(tmp_path / "x.npy", np.eye(4))
    sources = {tmp_path / "x.png": tmp_path / "x.png", tmp_path / "x.npy": tmp_path / "x.npy"}
    for source in (tmp_path / "x.png", tmp_path / "x.npy", np.eye(4)):
        name = sources[source] if not isinstance(source, np.ndarray) else "array"
        text = f"{name} holds 1 volume, numbered from 0, and frames says 1"
        assert refused(source, 2, 1) == text
        assert (
            read_image(source, 2, 0).shape == read_image(source, 2, "channels").shape == (1, 4, 4)
        )


@pytest.mark.parametrize("frames", ["time", "0 channels", "5channels", -1, True, 1.0, [1], ""])
def test_frames_that_mean_nothing_are_refused(path, frames):
    text = (
        f'frames must be "channels" or a whole number from 0 on, got {frames!r}: it says which '
        "volumes of a 4D file are taken"
    )
    assert refused(path, 3, frames) == text
    with pytest.raises(InputError, match=says(text)):
        frames_of({"frames": frames})


def test_a_file_of_one_volume_needs_no_frames(tmp_path):
    for shape in ((2, 3, 4), (2, 3, 4, 1)):
        nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), tmp_path / "x.nii")
        for frames in (None, "channels", "4 channels", 0):
            assert read_image(tmp_path / "x.nii", 3, frames).shape == (1, 2, 3, 4)


def test_the_values_of_a_voxel_on_the_fifth_axis_are_channels(tmp_path):
    array = VOLUMES[:, :, :, None]
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "x.nii")
    expected = np.moveaxis(VOLUMES, -1, 0)
    assert np.array_equal(read_image(tmp_path / "x.nii", 3).numpy(), expected)
    assert np.array_equal(read_image(tmp_path / "x.nii", 3, 2).numpy(), expected[2:3])


def test_a_mask_of_several_volumes_is_refused_as_a_mask(path):
    with pytest.raises(InputError, match=says("a mask must have one channel, got 5")):
        read_label(path, 3, 2)


def test_the_channels_that_a_client_declares_are_expected_of_one_file():
    assert frames_of({"image": "x.nii"}) is None
    assert frames_of({"image": "x.nii"}, 4) == "4 channels"
    assert frames_of({"image": "x.nii", "frames": 3}, 4) == 3
    # Each of several files is one channel, or says by itself what it is.
    assert frames_of({"image": ["x.nii", "y.nii"]}, 2) is None
