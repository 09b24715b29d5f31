import nibabel
import numpy as np
import pydicom
import pytest
import torch
from dicom_files import AXIAL, SAGITTAL, write_image, write_series
from monai.data import MetaTensor, get_track_meta, set_track_meta
from monai.transforms import Compose, Invertd, LoadImage, Orientationd, Spacingd
from PIL import Image
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.images.geometry import mismatch, orientation_of, spacing_of
from fedmed_flower.images.reading import files_of, read_image, read_label

OBLIQUE = (0.8, 0.6, 0, 0, 0, -1)
LPS_TO_RAS = np.array([-1, -1, 1])


def voxels(shape=(5, 4, 6), seed=0):
    return np.random.default_rng(seed).integers(-500, 1000, shape).astype(np.int16)


def save_nifti(path, array, affine=None):
    volume = nibabel.Nifti1Image(array, None)
    volume.set_sform(np.eye(4) if affine is None else affine, code=1)
    nibabel.save(volume, path)
    return path


def change(file, **tags):
    part = pydicom.dcmread(file)
    for name, value in tags.items():
        if value is None:
            delattr(part, name)
        else:
            setattr(part, name, value)
    part.save_as(file)


def cut(file, count):
    file.write_bytes(file.read_bytes()[:count])


# DICOM


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, OBLIQUE])
def test_each_pixel_of_each_slice_lies_where_its_own_file_says(tmp_path, orientation):
    stored = voxels()
    files = write_series(
        tmp_path, stored, (0.5, 0.7, 2.5), slope=2.0, intercept=-1000.0,
        orientation=orientation, origin=(-20, 35, 110), seed=1,
    )  # fmt: skip
    assert [file.name for file in files] != sorted(file.name for file in files)
    image = read_image(tmp_path, 3)
    assert image.shape == (1, 5, 4, 6)
    assert image.dtype == torch.float32
    to_voxels = np.linalg.inv(image.affine.numpy())
    for file in files:
        part = pydicom.dcmread(file)
        pixels = part.pixel_array * part.RescaleSlope + part.RescaleIntercept
        along_row, along_column = np.reshape(part.ImageOrientationPatient, (2, 3))
        for (row, column), value in np.ndenumerate(pixels):
            place = (
                np.array(part.ImagePositionPatient)
                + column * part.PixelSpacing[1] * along_row
                + row * part.PixelSpacing[0] * along_column
            )
            where = to_voxels @ np.append(place * LPS_TO_RAS, 1)
            assert np.allclose(where, np.round(where), atol=1e-6)
            assert image[(0, *map(int, np.round(where[:3])))] == value


def test_a_plain_series_is_what_monai_reads(tmp_path):
    write_series(tmp_path, voxels(), (0.5, 0.7, 2.5), slope=2.0, intercept=-3.0, origin=(1, 2, 3))
    image = read_image(tmp_path, 3)
    reference = LoadImage("PydicomReader", ensure_channel_first=True)(tmp_path)
    assert torch.equal(image.as_tensor(), reference.as_tensor())
    assert torch.allclose(image.affine, reference.affine)
    assert spacing_of(image) == (0.5, 0.7, 2.5)
    assert orientation_of(image) == "LPS"


def test_a_tilted_gantry_shears_the_volume(tmp_path):
    files = write_series(tmp_path, voxels(), (1, 1, 2))
    for number, file in enumerate(files):
        change(file, ImagePositionPatient=[0, 0.5 * number, 2 * number])
    assert read_image(tmp_path, 3).affine[:3, 2].tolist() == [0, -0.5, 2]


def test_slopes_differ_from_slice_to_slice(tmp_path):
    stored = voxels()
    for number, file in enumerate(write_series(tmp_path, stored)):
        change(file, RescaleSlope=number + 1, RescaleIntercept=-number)
    expected = stored * np.arange(1, 7) - np.arange(6)
    assert np.array_equal(read_image(tmp_path, 3)[0].numpy(), expected)


def test_the_same_number_in_other_words_is_no_difference(tmp_path):
    for number, file in enumerate(write_series(tmp_path, voxels())):
        if number % 2:
            change(file, PixelSpacing=["1.00", "1.0"])
    assert read_image(tmp_path, 3).shape == (1, 5, 4, 6)


def test_what_else_lies_beside_a_series_is_left_out(tmp_path):
    folder = tmp_path / "p1 [CT]"
    write_series(folder, voxels())
    (folder / "below").mkdir()
    (folder / "notes.txt").write_text("seen on Monday")
    (folder / "._IM0001.dcm").write_bytes(b"")
    write_image(folder / "DICOMDIR", np.zeros((3, 3), np.uint8))
    assert read_image(folder, 3).shape == (1, 5, 4, 6)


BROKEN = {
    "missing slice": (
        lambda files: files[2].unlink(),
        "{}: a slice is missing or out of place between IM0002.dcm and IM0004.dcm: they are 4 mm "
        "apart, the others 2",
    ),
    "slice twice": (
        lambda files: (files[0].parent / "again.dcm").write_bytes(files[3].read_bytes()),
        "{}: two slices at one position, IM0004.dcm and again.dcm",
    ),
    "slice aside": (
        lambda files: change(files[5], ImagePositionPatient=[3, 0, 10]),
        "{}: a slice is missing or out of place between IM0005.dcm and IM0006.dcm: they are 3.606 "
        "mm apart, the others 2",
    ),
    "two series": (
        lambda files: change(files[1], SeriesInstanceUID="9.9"),
        "{} holds 2 series (1.2.3, 9.9): give each a folder of its own",
    ),
    "two patients": (
        lambda files: change(files[1], PatientID="p2"),
        "{} holds 2 patients (p1, p2): give each a folder of its own",
    ),
    "no place": (
        lambda files: change(files[1], ImagePositionPatient=None),
        "{}: 1 of 6 slices, such as IM0002.dcm, have no ImagePositionPatient or "
        "ImageOrientationPatient",
    ),
    "a scout": (
        lambda files: change(files[0], ImageOrientationPatient=list(SAGITTAL)),
        "{} holds 2 stacks of slices: axial (5 slices), sagittal (1 slice). Choose one by a rule "
        'such as part="axial", or give each a folder of its own',
    ),
    "two spacings": (
        lambda files: change(files[0], PixelSpacing=[0.5, 1.0]),
        "{}: its slices have different pixel spacings, such as 0.5x1 and 1x1",
    ),
    "no spacing": (
        lambda files: [change(file, PixelSpacing=None) for file in files],
        "{}: its slices have no PixelSpacing",
    ),
    "a slice cut off": (
        lambda files: cut(files[2], files[2].stat().st_size - 10),
        "{}/IM0003.dcm is cut off: it has 30 of the 40 bytes of its pixels. Copy it again",
    ),
    "the last slice cut off at its beginning": (
        lambda files: cut(files[-1], 100),
        "{}/IM0006.dcm cannot be read: File is missing DICOM File Meta Information header or the "
        "'DICM' prefix is missing from the header. Use force=True to force reading.",
    ),
}


@pytest.mark.parametrize(("spoil", "text"), BROKEN.values(), ids=BROKEN)
def test_a_broken_series_is_named(tmp_path, spoil, text):
    spoil(write_series(tmp_path, voxels(), (1, 1, 2), series_uid="1.2.3"))
    with pytest.raises(InputError, match=says(text.format(tmp_path))):
        read_image(tmp_path, 3)


def test_a_slice_cut_off_in_its_header_is_named(tmp_path):
    files = write_series(tmp_path, voxels())
    cut(files[2], 400)
    text = f"{files[2]} holds no image: it is cut off, or a document"
    with pytest.raises(InputError, match=says(text)):
        read_image(tmp_path, 3)


def test_an_x_ray_comes_as_rows_and_columns_like_its_picture(tmp_path):
    pixels = voxels((7, 9)).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = read_image(write_image(tmp_path / "x.dcm", pixels, PixelSpacing=[0.2, 0.3]), 2)
    assert np.array_equal(image[0].numpy(), pixels)
    assert spacing_of(image) == (0.2, 0.3)
    assert orientation_of(image) == ""
    picture = read_image(tmp_path / "x.png", 2)
    assert torch.equal(picture.as_tensor(), image.as_tensor())
    assert spacing_of(picture) == (1, 1)


@pytest.mark.parametrize(
    ("tags", "spacing"), [({}, (1, 1)), ({"ImagerPixelSpacing": [0.2, 0.3]}, (0.2, 0.3))]
)
def test_spacing_of_an_x_ray_without_pixel_spacing(tmp_path, tags, spacing):
    image = read_image(write_image(tmp_path / "x.dcm", voxels((7, 9)), **tags), 2)
    assert image.shape == (1, 7, 9)
    assert spacing_of(image) == spacing


def test_monochrome1_is_turned_so_that_bright_is_dense(tmp_path):
    pixels = np.array([[5, 10], [200, 250]], np.uint8)
    path = write_image(tmp_path / "x.dcm", pixels, PhotometricInterpretation="MONOCHROME1")
    assert read_image(path, 2).tolist() == [[[250, 245], [55, 5]]]


def test_colours_come_first(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    for path in (write_image(tmp_path / "x.dcm", pixels), tmp_path / "x.png"):
        image = read_image(path, 2)
        assert np.array_equal(np.moveaxis(image.numpy(), 0, -1), pixels)


def test_a_palette_becomes_colours(tmp_path):
    path = write_image(tmp_path / "x.dcm", np.array([[0, 1], [1, 0]], np.uint8))
    part = pydicom.dcmread(path)
    part.PhotometricInterpretation = "PALETTE COLOR"
    for place, value in enumerate((10, 20, 30)):
        part.add_new(0x00281101 + place, "US", [2, 0, 8])
        part.add_new(0x00281201 + place, "OW", bytes([value, value + 1]))
    part.save_as(path)
    expected = np.array([[[10, 11], [11, 10]]]) + np.array([0, 10, 20])[:, None, None]
    assert np.array_equal(read_image(path, 2).numpy(), expected)


def test_an_x_ray_is_no_volume(tmp_path):
    path = write_image(tmp_path / "x.dcm", voxels((7, 9)))
    text = (
        f"{path}: it has no position in the patient (ImagePositionPatient), like an X-ray: read it "
        "with spatial_dims = 2"
    )
    with pytest.raises(InputError, match=says(text)):
        read_image(path, 3)


def test_spacing_of_a_sagittal_slice_as_a_2d_image(tmp_path):
    stored = voxels()
    files = write_series(tmp_path, stored, (0.5, 0.7, 2.5), orientation=SAGITTAL)
    image = read_image(files[2], 2)
    assert np.array_equal(image[0].numpy(), stored[:, :, 2].T)
    assert spacing_of(image) == (0.7, 0.5)


# NIfTI


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR"])
def test_nifti_is_what_nibabel_reads(tmp_path, codes):
    array = voxels().astype(np.float32)
    ways = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1)}
    ways["I"] = (0, 0, -1)
    affine = np.eye(4)
    affine[:3, :3] = np.transpose([ways[code] for code in codes]) * (0.5, 0.7, 2.5)
    affine[:3, 3] = [-3, 7, 11]
    volume = nibabel.Nifti1Image(array, affine)
    volume.header.set_slope_inter(2, -3)
    nibabel.save(volume, tmp_path / "x.nii.gz")
    image = read_image(str(tmp_path / "x.nii.gz"), 3)
    reference = nibabel.load(tmp_path / "x.nii.gz")
    assert np.array_equal(image.numpy()[0], reference.get_fdata(dtype=np.float32))
    assert np.array_equal(image.affine.numpy(), reference.affine)
    assert orientation_of(image) == codes
    assert spacing_of(image) == pytest.approx(reference.header.get_zooms())


@pytest.mark.parametrize("shape", [(5, 4, 6, 2), (5, 4, 6, 1, 2)])
def test_channels_of_a_nifti_file_come_first(tmp_path, shape):
    array = voxels(shape)
    image = read_image(save_nifti(tmp_path / "x.nii", array), 3, "channels")
    expected = np.moveaxis(array.reshape(5, 4, 6, 2), -1, 0)
    assert np.array_equal(image.numpy(), expected)


@pytest.mark.parametrize(("axis", "spacing"), [(0, (2.5, 0.7)), (1, (2.5, 0.5)), (2, (0.7, 0.5))])
def test_one_slice_as_a_2d_image_has_rows_and_columns(tmp_path, axis, spacing):
    array = np.expand_dims(voxels((7, 9)), axis)
    path = save_nifti(tmp_path / "x.nii.gz", array, np.diag([0.5, 0.7, 2.5, 1]))
    for dims in (2, None):
        image = read_image(path, dims)
        assert np.array_equal(image.numpy(), array.squeeze(axis).T[None])
        assert spacing_of(image) == pytest.approx(spacing)
    assert read_image(path, 3).shape == (1, *array.shape)


def test_two_dimensions_without_a_thickness(tmp_path):
    image = read_image(
        save_nifti(tmp_path / "x.nii", voxels((7, 9)), np.diag([0.5, 0.7, 0.0, 1])), 2
    )
    assert image.shape == (1, 9, 7)
    assert spacing_of(image) == pytest.approx((0.7, 0.5))


def test_a_nifti_file_that_is_cut_off(tmp_path):
    for name in ("x.nii.gz", "x.nii"):
        path = save_nifti(tmp_path / name, voxels((20, 20, 20)))
        cut(path, path.stat().st_size - 4)
        with pytest.raises(InputError, match=f"^{path} cannot be read: "):
            read_image(path, 3)


def test_a_changed_checksum_is_noticed(tmp_path):
    path = save_nifti(tmp_path / "x.nii.gz", voxels((40, 40, 40)))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path} cannot be read: CRC check failed"):
        read_image(path, 3)


def spoilt(value):
    array = np.zeros((5, 4, 6), np.float32)
    array[1, 2, 3] = value
    return array


FLAT = np.diag([0.5, 0.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("array", "affine", "text"),
    [
        (spoilt(np.nan), None, "it holds NaN or infinite values"),
        (spoilt(np.inf), None, "it holds NaN or infinite values"),
        (spoilt(1e30).astype(np.float64) * 1e30, None, "it holds NaN or infinite values"),
        (spoilt(0).astype(np.complex64), None, "it holds complex64, not numbers"),
        (spoilt(0), FLAT, f"its affine must be finite and invertible, got {FLAT[:3].tolist()}"),
        (
            spoilt(0)[..., 0],
            None,
            "its shape is (1, 5, 4); spatial_dims = 3 asks for 3 dimensions, or one more with the "
            "channel first",
        ),
    ],
)  # fmt: skip
def test_a_nifti_file_that_cannot_be_used(tmp_path, array, affine, text):
    path = save_nifti(tmp_path / "x.nii.gz", array, affine)
    with pytest.raises(InputError, match=says(f"{path}: {text}")):
        read_image(path, 3)


# Pictures, arrays, channels


def test_a_picture_as_a_volume_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "x.png")
    text = (
        f"{tmp_path / 'x.png'}: its shape is (1, 4, 5); spatial_dims = 3 asks for 3 dimensions, or "
        "one more with the channel first"
    )
    with pytest.raises(InputError, match=says(text)):
        read_image(tmp_path / "x.png", 3)


def test_a_picture_that_is_cut_off(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(voxels((40, 40)).astype(np.uint8)).save(path)
    cut(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=f"^{path} cannot be read: "):
        read_image(path, 2)


def test_several_pages_are_refused(tmp_path):
    pages = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (1, 2)]
    path = tmp_path / "x.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    text = f"{path} holds 2 pictures: give each a file of its own"
    with pytest.raises(InputError, match=says(text)):
        read_image(path, 2)


def test_arrays_in_memory_and_in_files(tmp_path):
    array = voxels((3, 4, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", array)
    for source in (array, torch.from_numpy(array), tmp_path / "x.npy"):
        volume = read_image(source, 3)
        assert np.array_equal(volume.numpy(), array[None])
        assert torch.equal(volume.affine, torch.eye(4, dtype=torch.float64))
        assert np.array_equal(read_image(source, 2).numpy(), array)
    copy = read_image(array, 3)
    copy[:] = 0
    assert array.any()


def test_a_pickle_is_not_opened(tmp_path):
    class Opened:
        def __reduce__(self):
            return (tmp_path.joinpath("opened").touch, ())

    np.save(tmp_path / "x.npy", np.array([Opened()], object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read: Object arrays cannot be loaded"):
        read_image(tmp_path / "x.npy", 2)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (None, "it holds object, not numbers"),
        ({}, "it holds object, not numbers"),
        (np.array([["a"]]), "it holds <U1, not numbers"),
        (np.zeros((0, 3)), "its shape is (1, 0, 3): it is empty"),
        (
            np.zeros(3),
            "its shape is (3,); spatial_dims = 2 asks for 2 dimensions, or one more with the "
            "channel first",
        ),
    ],
)
def test_what_is_no_image(source, text):
    with pytest.raises(InputError, match=says(text)):
        read_image(source, 2)


def test_what_is_not_there_or_no_image_file(tmp_path):
    with pytest.raises(InputError, match=says(f"{tmp_path / 'x.nii'} is not there")):
        read_image(tmp_path / "x.nii", 3)
    with pytest.raises(InputError, match=says(f"{tmp_path} is a folder without DICOM files")):
        read_image(tmp_path, 3)
    (tmp_path / "x.txt").write_text("no image")
    with pytest.raises(InputError, match=f"^{tmp_path / 'x.txt'} cannot be read: "):
        read_image(tmp_path / "x.txt", 3)


def test_several_files_are_channels(tmp_path):
    arrays = voxels((2, 5, 4, 6))
    affine = np.diag([1, 2, 3, 1])
    paths = [save_nifti(tmp_path / f"{k}.nii", arrays[k], affine) for k in range(2)]
    image = read_image(paths, 3)
    assert np.array_equal(image.numpy(), arrays)
    assert np.array_equal(image.affine.numpy(), affine)
    assert list(files_of(paths)) == paths
    assert mismatch(read_image(paths[1], 3), image) is None


def test_channels_of_different_shape_or_place(tmp_path):
    first = save_nifti(tmp_path / "a.nii", voxels())
    other = save_nifti(tmp_path / "b.nii", voxels((5, 4, 7)))
    nowhere = (
        "; and it cannot be brought to that grid: {} has its origin at 0, 0, 0, which states no "
        "position. Save it on the grid of the first channel"
    )
    text = f"{other} does not fit {first}: its shape is (5, 4, 7), the image's (5, 4, 6)"
    text += nowhere.format(other)
    with pytest.raises(InputError, match=says(text)):
        read_image([first, other], 3)
    moved = save_nifti(tmp_path / "c.nii", voxels(), np.diag([-1, 1, 1, 1]))
    text = (
        f"{moved} does not fit {first}: it lies up to 8 mm away from the image: spacing 1x1x1, "
        "orientation LAS, origin 0x0x0; the image: spacing 1x1x1, orientation RAS, origin 0x0x0"
    )
    text += nowhere.format(moved)
    with pytest.raises(InputError, match=says(text)):
        read_image([str(first), str(moved)], 3)


# Masks and their place


def test_masks_are_class_numbers(tmp_path):
    mask = np.array([[0, 255], [255, 0]], np.uint8)
    Image.fromarray(mask).save(tmp_path / "m.png")
    label = read_label(tmp_path / "m.png", 2, 2, (0, 255))
    assert label.dtype == torch.uint8
    assert label.tolist() == [[[0, 1], [1, 0]]]
    assert read_label(mask, 2, 3, (255, 7, 0)).tolist() == [[[2, 0], [0, 2]]]
    anything = read_label(mask, 2, None)
    assert anything.tolist() == [mask.tolist()]
    assert anything.dtype == torch.int64


@pytest.mark.parametrize(
    ("mask", "classes", "values", "text"),
    [
        ([[0, 255]], 2, (), "it holds the values 255, which are not classes: a mask holds 0, 1"),
        ([[0, 2]], 2, (0, 1), "it holds the values 2, which are not classes: a mask holds 0, 1"),
        ([[0, -1]], 2, (), "it holds the values -1, which are not classes: a mask holds 0, 1"),
        ([[0, 0.5]], 2, (), "it holds the values 0.5, which are not classes: a mask holds 0, 1"),
        (
            [[0.25, -1]],
            None,
            (),
            "it holds the values -1, 0.25, which are not classes: a mask holds whole numbers from "
            "0 on",
        ),
        (
            [[0, 1]],
            3,
            (0, 1),
            "label_values must name 3 different values, one a class with the background and at "
            "most 256, got (0, 1)",
        ),
        (
            [[0, 1]],
            2,
            (1, 1),
            "label_values must name 2 different values, one a class with the background and at "
            "most 256, got (1, 1)",
        ),
        (
            [[0, 1]],
            257,
            (),
            "label_values must name 257 different values, one a class with the background and at "
            "most 256, got ()",
        ),
        ([[[0, 1]], [[0, 1]]], 2, (), "a mask must have one channel, got 2"),
    ],
)
def test_masks_that_cannot_be_used(mask, classes, values, text):
    with pytest.raises(InputError, match=says(text)):
        read_label(np.array(mask), 2, classes, values)


def test_a_mask_of_another_shape_or_place(tmp_path):
    image = read_image(save_nifti(tmp_path / "x.nii", voxels()), 3)
    narrow = save_nifti(tmp_path / "a.nii", np.zeros((5, 4, 5), np.uint8))
    with pytest.raises(InputError, match=says("its shape is (5, 4, 5), the image's (5, 4, 6)")):
        read_label(narrow, 3, 2, image=image)
    turned = save_nifti(tmp_path / "b.nii", np.zeros((5, 4, 6), np.uint8), np.diag([1, -1, 1, 1]))
    text = (
        "it lies up to 6 mm away from the image: spacing 1x1x1, orientation RPS, origin 0x0x0; the "
        "image: spacing 1x1x1, orientation RAS, origin 0x0x0"
    )
    with pytest.raises(InputError, match=says(text)):
        read_label(turned, 3, 2, image=image)


def test_a_small_error_counts_by_what_it_does_at_the_corners(tmp_path):
    def grid(name, side, spacing):
        array = np.zeros((4, 4, side), np.uint8)
        return read_image(save_nifti(tmp_path / name, array, np.diag([1, 1, spacing, 1])), 3)

    # 0.001 mm a slice are 0.01 mm over ten slices, and 0.2 mm over 200.
    assert mismatch(grid("a.nii", 10, 1.001), grid("b.nii", 10, 1)) is None
    text = mismatch(grid("a.nii", 200, 1.001), grid("b.nii", 200, 1))
    assert "0.199 mm away from the image" in text
    # Voxels of a micrometre: a hundredth of a millimetre is ten of them.
    small = np.diag([1e-3, 1e-3, 1e-3, 1])
    moved = small.copy()
    moved[0, 3] = 1e-2
    array = np.zeros((4, 4, 4), np.uint8)
    first, second = (
        read_image(save_nifti(tmp_path / "c.nii", array, affine), 3) for affine in (small, moved)
    )
    assert "0.01 mm away from the image" in mismatch(first, second)


def test_a_picture_as_the_mask_of_an_x_ray_takes_its_spacing(tmp_path):
    image = read_image(write_image(tmp_path / "x.dcm", voxels((7, 9)), PixelSpacing=[0.2, 0.3]), 2)
    Image.fromarray(np.eye(7, 9).astype(np.uint8)).save(tmp_path / "m.png")
    label = read_label(tmp_path / "m.png", 2, 2, image=image)
    assert torch.equal(label.affine, image.affine)
    Image.fromarray(np.eye(9, 7).astype(np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=says("its shape is (9, 7), the image's (7, 9)")):
        read_label(tmp_path / "m.png", 2, 2, image=image)


def test_the_mask_of_another_slice_or_a_mirrored_one_is_noticed_in_2d(tmp_path):
    def slice_at(name, affine):
        return save_nifti(tmp_path / name, np.ones((8, 8, 1), np.uint8), affine)

    here = np.diag([1.0, 1, 1, 1])
    above, mirrored = here.copy(), np.diag([-1.0, 1, 1, 1])
    above[2, 3] = 5
    image = read_image(slice_at("x.nii", here), 2)
    assert mismatch(read_image(slice_at("m.nii", here), 2), image) is None
    for affine in (above, mirrored):
        assert "mm away from the image" in mismatch(read_image(slice_at("m.nii", affine), 2), image)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_a_marked_corner_comes_back_through_monais_transforms(tmp_path, codes):
    folder = tmp_path / "series"
    write_series(folder, voxels((8, 6, 5)), (1.5, 2.0, 3.0), orientation=OBLIQUE, seed=2)
    image = read_image(folder, 3)
    mask = np.zeros((8, 6, 5), np.uint8)
    mask[:2, :2, :2] = 1
    path = save_nifti(tmp_path / "mask.nii.gz", mask, image.affine.numpy())
    label = read_label(path, 3, 2, image=image)
    keys = ("image", "label")
    chain = Compose([
        Orientationd(keys, axcodes=codes, labels=None),
        Spacingd(keys, pixdim=(1.0, 1.0, 1.0), mode=("bilinear", "nearest")),
    ])  # fmt: skip
    row = chain({"image": image, "label": label})
    assert orientation_of(row["image"]) == codes
    assert spacing_of(row["label"]) == (1, 1, 1)
    # The mark's middle, in millimetres, is where it was.
    before = label.affine @ torch.tensor([0.5, 0.5, 0.5, 1], dtype=torch.float64)
    marked = torch.nonzero(row["label"][0].as_tensor()).double().mean(dim=0)
    after = row["label"].affine @ torch.cat([marked, torch.ones(1)]).double()
    assert torch.allclose(before, after, atol=0.75)
    back = Invertd("label", chain, orig_keys="label", nearest_interp=True)(row)["label"]
    assert np.array_equal(back[0].numpy(), mask)
    assert torch.allclose(back.affine, image.affine)


def test_the_place_is_kept_where_monai_tracks_none(tmp_path):
    path = save_nifti(tmp_path / "x.nii", np.ones((5, 4, 6), np.uint8), np.diag([1, 2, 3, 1]))
    before = get_track_meta()
    set_track_meta(False)
    try:
        image, label = read_image([path, path], 3), read_label(path, 3, 2)
    finally:
        set_track_meta(before)
    assert isinstance(image, MetaTensor)
    assert spacing_of(image) == spacing_of(label) == (1, 2, 3)
    assert mismatch(label, image) is None


def test_a_small_spacing_keeps_its_digits(tmp_path):
    path = tmp_path / "cell.nii.gz"
    affine = np.diag([0.00023, 0.0000412345, 12.3456, 1.0])
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 3, 3), np.float32), affine), path)
    assert spacing_of(read_image(path, 3)) == (0.00023, 0.0000412345, 12.3456)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_a_mask_has_the_same_classes_in_every_type(tmp_path, dtype):
    stored = np.array([[[0, 7], [200, 0]], [[7, 7], [0, 200]]], dtype)
    nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), tmp_path / "m.nii.gz")
    for values in ((0, 7, 200), (0, 7, 200, 1000), (-5, 0, 7, 200)):
        found = read_label(tmp_path / "m.nii.gz", 3, len(values), values)
        assert found.dtype is torch.uint8
        assert np.array_equal(np.array(values)[found[0].numpy()], stored)
    plain = read_label(tmp_path / "m.nii.gz", 3, None)
    assert plain.dtype is torch.int64
    assert np.array_equal(plain[0].numpy(), stored)
    with pytest.raises(InputError, match=r"holds the values 200, which are not classes"):
        read_label(tmp_path / "m.nii.gz", 3, 8)
