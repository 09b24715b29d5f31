import sys

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from tiny import says

from fedmed_flower.data import bounded
from fedmed_flower.errors import InputError
from fedmed_flower.images.geometry import mismatch, orientation_of
from fedmed_flower.images.reading import read_image, read_label

# Along the patient, to the left and to the back, as ITK has them; the second is oblique.
DIRECTIONS = {
    "straight": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "turned": (0, 1, 0, 1, 0, 0, 0, 0, -1),
    "oblique": (0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1),
}
NAMES = ("x.nrrd", "x.nhdr", "x.mha", "x.mhd")


def voxels(shape=(6, 4, 5), kind=np.int16):
    """Return voxels as SimpleITK takes them, the last axis first."""
    return np.random.default_rng(0).integers(0, 100, shape).astype(kind)


def image_of(array, direction="straight", vector=False):
    image = sitk.GetImageFromArray(array, isVector=vector)
    if image.GetDimension() == 3:
        image.SetSpacing((0.5, 0.7, 2.5))
        image.SetOrigin((-20, 35, 110))
        image.SetDirection(DIRECTIONS[direction])
    return image


def write(path, image, packed=False):
    sitk.WriteImage(image, str(path), packed)
    return path


def change(path, old, new):
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path


def holder_of(path):
    """Return the file that holds the voxels."""
    others = [file for file in path.parent.iterdir() if file != path]
    return others[0] if others else path


def refused(path, *arguments):
    with pytest.raises(InputError) as error:
        read_image(path, *arguments)
    return str(error.value)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_volume_is_what_simpleitk_writes_as_nifti(tmp_path, name, packed, direction):
    image = image_of(voxels(), direction)
    found = read_image(write(tmp_path / name, image, packed), 3)
    reference = nibabel.load(write(tmp_path / "x.nii.gz", image))
    assert np.array_equal(found.numpy()[0], reference.get_fdata(dtype=np.float32))
    assert np.allclose(found.affine.numpy(), reference.affine, atol=1e-5)
    # As for any two files of one place.
    assert mismatch(found, read_image(tmp_path / "x.nii.gz", 3)) is None
    if direction == "straight":
        assert orientation_of(found) == "LPS"


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
@pytest.mark.parametrize(
    "kind", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "float32", "float64"]
)
def test_each_type_of_numbers(tmp_path, name, kind):
    array = voxels(kind=kind)
    for packed in (False, True):
        path = write(tmp_path / name, image_of(array), packed)
        assert np.array_equal(read_image(path, 3).numpy()[0], array.T)


def test_bytes_in_the_other_order(tmp_path):
    array = voxels()
    path = write(tmp_path / "x.mha", image_of(array))
    change(path, b"ByteOrderMSB = False", b"ByteOrderMSB = True")
    path.write_bytes(path.read_bytes()[: -array.nbytes] + array.astype(">i2").tobytes())
    assert np.array_equal(read_image(path, 3).numpy()[0], array.T)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_the_numbers_of_a_voxel_are_channels(tmp_path, name, packed):
    array = voxels((6, 4, 5, 3), np.float32)
    path = write(tmp_path / name, image_of(array, vector=True), packed)
    expected = np.transpose(array, (3, 2, 1, 0))
    assert np.array_equal(read_image(path, 3).numpy(), expected)
    assert np.array_equal(read_image(path, 3, 1).numpy(), expected[1:2])


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
def test_a_fourth_axis_must_be_explained(tmp_path, name):
    array = voxels((3, 6, 4, 5))
    path = write(tmp_path / name, image_of(array))
    assert refused(path, 3).startswith(f"{path} holds 3 volumes (4D), which may be channels, times")
    assert np.array_equal(
        read_image(path, 3, "channels").numpy(), np.transpose(array, (0, 3, 2, 1))
    )
    assert np.array_equal(read_image(path, 3, 2).numpy()[0], array[2].T)


@pytest.mark.parametrize("told", [b"kinds: list domain", b"modality:=DWMRI\nkinds: vector domain"])
def test_a_list_of_diffusion_images_must_be_explained(tmp_path, told):
    path = write(tmp_path / "x.nrrd", image_of(voxels((6, 4, 5, 3)), vector=True))
    change(path, b"kinds: vector domain", told)
    assert refused(path, 3).startswith(f"{path} holds 3 volumes (4D), which may be channels, times")
    assert read_image(path, 3, "channels").shape == (3, 5, 4, 6)


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
def test_two_dimensions_come_as_rows_and_columns(tmp_path, name):
    array = voxels((4, 5))
    path = write(tmp_path / name, image_of(array))
    for dims in (2, None):
        assert np.array_equal(read_image(path, dims).numpy()[0], array)


def test_a_mask_has_the_place_of_its_image(tmp_path):
    image = read_image(write(tmp_path / "x.mha", image_of(voxels(), "turned")), 3)
    mask = image_of((voxels() > 50).astype(np.uint8), "turned")
    label = read_label(write(tmp_path / "m.nrrd", mask, True), 3, 2, image=image)
    assert np.array_equal(label.numpy()[0], sitk.GetArrayFromImage(mask).T)
    aside = image_of((voxels() > 50).astype(np.uint8))
    with pytest.raises(InputError, match="mm away from the image"):
        read_label(write(tmp_path / "m.nrrd", aside), 3, 2, image=image)


# Files that are broken or not what they seem


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_cut_off_is_refused(tmp_path, name, packed):
    path = write(tmp_path / name, image_of(voxels()), packed)
    holder = holder_of(path)
    content = holder.read_bytes()
    for count in (1, 6, 20):
        holder.write_bytes(content[:-count])
        assert refused(path, 3).startswith(f"{path} ")


@pytest.mark.parametrize("name", NAMES)
def test_packed_voxels_that_have_changed_are_refused(tmp_path, name):
    path = write(tmp_path / name, image_of(voxels()), True)
    holder = holder_of(path)
    content = bytearray(holder.read_bytes())
    for place in (-3, -40):
        changed = content.copy()
        changed[place] ^= 1
        holder.write_bytes(changed)
        assert refused(path, 3).startswith(f"{path} cannot be read: ")


def test_a_header_that_states_other_sides_than_there_are_voxels_is_refused(tmp_path):
    for packed in (False, True):
        path = write(tmp_path / "x.mha", image_of(voxels()), packed)
        change(path, b"DimSize = 5 4 6", b"DimSize = 5 4 7")
        assert refused(path, 3) == f"{path} says that it holds 280 bytes of voxels, and holds 240"
        change(path, b"DimSize = 5 4 7", b"DimSize = 5 4 5")
        assert refused(path, 3) == f"{path} says that it holds 200 bytes of voxels, and holds more"


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
def test_a_header_that_says_petabytes_is_refused(tmp_path, name):
    path = write(tmp_path / name, image_of(voxels()), True)
    change(path, b" 5 4 6\n", b" 500000 400000 60000\n")
    assert refused(path, 3) == (
        f"{path} says that it holds 48,000,000,000,000,000 bytes, and an image may have "
        "4,294,967,296: make it smaller, or divide it"
    )


def test_packed_voxels_are_unpacked_to_the_bound_and_no_further(tmp_path, monkeypatch):
    path = write(tmp_path / "x.mha", image_of(np.zeros((64, 64, 64), np.int16)), True)
    change(path, b"DimSize = 64 64 64", b"DimSize = 64 64 1")
    monkeypatch.setitem(bounded.MOST, "an image", 1 << 17)
    assert refused(path, 3).startswith(
        f"{path} unpacks to at least 524,288 bytes, and an image may"
    )


@pytest.mark.parametrize(
    "field",
    [
        "HeaderSize = 8",
        "BinaryData = False",
        "ElementToIntensityFunctionSlope = 2",
        "ElementToIntensityFunctionOffset = -1024",
    ],
)
def test_fields_that_change_what_the_voxels_mean_are_refused(tmp_path, field):
    path = write(tmp_path / "x.mha", image_of(voxels()))
    change(path, b"BinaryData = True\n", b"")
    change(path, b"NDims = 3\n", f"NDims = 3\n{field}\n".encode())
    name = field.split(" ")[0]
    assert f" has a {name} other than " in refused(path, 3)


BEYOND = {
    "absolute": "{outside}",
    "above": "../outside/x.raw",
    "below": "below/x.raw",
    "a link out": "link.raw",
}


@pytest.mark.parametrize("name", BEYOND.values(), ids=BEYOND)
@pytest.mark.parametrize("ending", [".mhd", ".nhdr", ".mha", ".nrrd"])
def test_voxels_in_another_folder_are_not_read(tmp_path, ending, name):
    for place in ("outside", "own", "own/below"):
        (tmp_path / place).mkdir()
    outside = write(tmp_path / "outside/x.mhd", image_of(voxels())).with_suffix(".raw")
    (tmp_path / "own/below/x.raw").write_bytes(outside.read_bytes())
    (tmp_path / "own/link.raw").symlink_to(outside)
    is_nrrd = ending in (".nhdr", ".nrrd")
    path = write(tmp_path / f"own/y{'.nhdr' if is_nrrd else '.mhd'}", image_of(voxels()))
    change(path, b"y.raw", name.format(outside=outside).encode())
    path = path.rename(path.with_suffix(ending))
    last = name.format(outside=outside).split("/")[-1]
    assert refused(path, 3) == (
        f"{path}: {last}, which belongs to it, is in another folder, or a link to one: put both "
        "into one"
    )


@pytest.mark.parametrize(
    ("ending", "name"),
    [(".mhd", "LIST"), (".mhd", "y%d.raw 1 1 1"), (".nhdr", "LIST"), (".nhdr", "y%03d.raw 1 6 1")],
)
def test_voxels_in_several_files_are_not_read(tmp_path, ending, name):
    path = write(tmp_path / f"y{ending}", image_of(voxels()))
    change(path, b"y.raw", name.encode())
    assert refused(path, 3) == (
        f"{path}: its voxels lie in several files: write it as one .nrrd or .mha"
    )


def test_the_other_file_must_be_there(tmp_path):
    for ending in (".mhd", ".nhdr"):
        path = write(tmp_path / f"y{ending}", image_of(voxels()))
        (tmp_path / "y.raw").unlink()
        assert refused(path, 3) == f"{path}: y.raw, which belongs to it, is not there"


@pytest.mark.parametrize(
    ("name", "old", "new", "text"),
    [
        ("x.mha", b"NDims = 3\n", b"NDims = 3\nNDims = 3\n", "has the field twice: NDims"),
        ("x.mha", b"NDims = 3\n", b"\n", "has a line that is no field: \n"),
        ("x.mha", b"ElementDataFile", b"elementdatafile", "has a line that is no field"),
        ("x.nrrd", b"encoding", b"data file: a\nDATAFILE: b\nencoding", "names the file of its"),
    ],
)  # fmt: skip
def test_a_header_that_can_be_read_in_two_ways_is_refused(tmp_path, name, old, new, text):
    path = change(write(tmp_path / name, image_of(voxels())), old, new)
    assert text.strip() in refused(path, 3)


def test_something_else_with_that_name(tmp_path):
    for name in NAMES:
        (tmp_path / name).write_bytes(b"")
        assert refused(tmp_path / name, 3).startswith(f"{tmp_path / name} ")
        (tmp_path / name).write_bytes(bytes(3 << 20))
        assert refused(tmp_path / name, 3).startswith(f"{tmp_path / name} is no ")


def test_what_itk_says_is_shown_without_its_source_and_addresses(tmp_path):
    path = change(write(tmp_path / "x.nrrd", image_of(voxels())), b"NRRD0004", b"NRRD0009")
    text = refused(path, 3)
    assert text.startswith(f"{path} cannot be read: ")
    assert "0x" not in text
    assert "SimpleITK" not in text
    assert ".cxx" not in text


def test_without_simpleitk_the_way_out_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "x.nrrd", image_of(voxels()))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    text = f"{path} needs SimpleITK to be read: pip install 'fedmed-flower[imaging]'"
    with pytest.raises(InputError, match=says(text)):
        read_image(path, 3)


def test_values_that_are_no_numbers_are_refused(tmp_path):
    path = write(tmp_path / "x.nrrd", sitk.Image((3, 4, 5), sitk.sitkComplexFloat32))
    assert refused(path, 3) == (
        f"{path} holds values of the type 'complex of 32-bit float', not numbers"
    )
