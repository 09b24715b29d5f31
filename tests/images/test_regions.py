"""Masks of regions that overlap: DICOM SEG and RTSTRUCT by name, and files of several volumes."""

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from dicom_files import STUDY, write_highdicom, write_rtstruct, write_seg, write_series
from tiny import says

from fedmed_flower.data.checks import check_row
from fedmed_flower.data.datalist import read_folder
from fedmed_flower.errors import InputError
from fedmed_flower.images.reading import read_image
from fedmed_flower.images.regions import read_regions

BRATS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
SIDES = (7, 6, 5)
SPACING = (0.7, 0.8, 3.0)
ORIGIN = (-9.0, -20.0, 31.0)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A folder with one series and its files in order of position."""
    folder = tmp_path_factory.mktemp("study") / "series"
    return folder, write_series(folder, np.zeros(SIDES), SPACING, origin=ORIGIN, **STUDY)


@pytest.fixture(scope="module")
def image(series):
    return read_image(series[0], 3)


def tumour(seed=0):
    """A mask of BraTS, (x, y, z)."""
    return np.random.default_rng(seed).choice([0, 1, 2, 4], SIDES).astype(np.uint8)


def regions_of(mask, regions=BRATS):
    return np.stack([np.isin(mask, values) for values in regions.values()]).astype(np.uint8)


def parts_of(mask, regions=BRATS):
    """The regions as highdicom takes them, (slices, rows, columns, regions)."""
    return regions_of(mask, regions).transpose(3, 2, 1, 0)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_segments_that_overlap_are_regions_as_highdicom_reads_them(series, image, tmp_path, kind):
    mask = tumour()
    parts = parts_of(mask)[..., [2, 0, 1]]
    parts = parts.astype(np.float32) if kind == "FRACTIONAL" else parts
    path = write_highdicom(tmp_path / "m.dcm", series[1], parts, ("et", "W-T", "tc"), kind)
    found = read_regions(path, 3, BRATS, image)
    assert np.array_equal(found.numpy(), regions_of(mask))
    assert np.array_equal(found.affine, image.affine)
    theirs = highdicom.seg.segread(path).get_pixels_by_source_instance(
        [pydicom.dcmread(file).SOPInstanceUID for file in series[1]],
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )
    assert np.array_equal(found.numpy(), theirs.transpose(3, 2, 1, 0)[[1, 2, 0]])
    row = {"image": series[0], "label": path, "patient": "a"}
    finding = check_row(row, 3, regions=BRATS)
    assert (finding.problem, finding.label) == (None, (0, 1, 2, 3))


def test_segments_of_several_files_are_joined_and_others_left_out(series, image, tmp_path):
    mask = tumour()
    parts = parts_of(mask)
    first = write_highdicom(tmp_path / "a.dcm", series[1], parts[..., [0]], ["WT"])
    more = np.concatenate([parts[..., 1:], 1 - parts[..., :1]], axis=-1)
    second = write_highdicom(tmp_path / "b.dcm", series[1], more, ["TC", "ET", "brain"])
    found = read_regions([first, second], 3, BRATS, image)
    assert np.array_equal(found.numpy(), regions_of(mask))


def square(low, high, plane):
    """A contour around the voxels from low to high in both axes, in DICOM's millimetres."""
    corners = [(low, low), (low, high), (high, high), (high, low)]
    points = np.array([(x, y, plane) for x, y in corners], float) + (
        [-0.5, -0.5, 0] * np.array([[1], [1], [1], [1]])
    )
    return points * SPACING + ORIGIN


def test_contours_that_overlap_are_regions(image, tmp_path):
    outlines = {
        "WT": [square(0, 6, 1), square(0, 6, 2)],
        "ET": [square(2, 3, 2)],
        "TC": [square(1, 5, 2)],
        "skull": [square(0, 6, 4)],
    }
    path = write_rtstruct(tmp_path / "m.dcm", outlines)
    found = read_regions(path, 3, BRATS, image).numpy()
    wanted = np.zeros((3, *SIDES), np.uint8)
    wanted[0, :6, :6, 1:3] = 1
    wanted[1, 1:5, 1:5, 2] = 1
    wanted[2, 2:3, 2:3, 2] = 1
    assert np.array_equal(found, wanted)


def test_a_region_that_is_not_there_is_empty(image, series, tmp_path):
    mask = np.where(tumour() == 4, 1, tumour())
    path = write_highdicom(tmp_path / "m.dcm", series[1], parts_of(mask)[..., :2], ("WT", "TC"))
    assert np.array_equal(read_regions(path, 3, BRATS, image).numpy(), regions_of(mask))


def test_parts_that_exclude_each_other_are_no_regions(image, tmp_path):
    """Edema, core and rim side by side, of which one has the name of a region."""
    first = np.zeros((6, 7))
    first[1, 1] = 1
    labels = [{"SegmentLabel": "edema"}, {"SegmentLabel": "ET"}]
    frames = [(1, ORIGIN, first), (2, ORIGIN, np.roll(first, 1, axis=(0, 1)))]
    path = write_seg(tmp_path / "m.dcm", labels, frames, spacing=(0.8, 0.7))
    text = (
        "1 voxel lies in ET and not in WT, TC, as no value of the regions does (regions: WT of 1, "
        "2, 4; TC of 1, 4; ET of 4): correct the masks or their order, or declare a value for it"
    )
    with pytest.raises(InputError, match=says(text)):
        read_regions(path, 3, BRATS, image)
    # A label map has one structure a voxel.
    path = write_seg(
        tmp_path / "n.dcm",
        [{"SegmentLabel": "WT"}, {"SegmentLabel": "TC"}],
        [(1, ORIGIN, 2 * first)],
        spacing=(0.8, 0.7),
        kind="LABELMAP",
    )
    with pytest.raises(InputError, match="1 voxel lies in TC and not in WT, ET, as no value"):
        read_regions(path, 3, BRATS, image)


def test_names_that_are_not_there_and_what_a_dicom_mask_needs(series, image, tmp_path):
    path = write_highdicom(tmp_path / "m.dcm", series[1], parts_of(tumour())[..., :1], ["lesion"])
    text = (
        "it has none of the structures WT, TC, ET, but lesion: name the classes so, or rename its "
        "structures"
    )
    with pytest.raises(InputError, match=says(text)):
        read_regions(path, 3, BRATS, image)
    with pytest.raises(InputError, match="is read with the image that it belongs to"):
        read_regions(path, 3, BRATS)
    text = "a DICOM SEG or RTSTRUCT holds structures by name: leave out mask_regions in its row"
    with pytest.raises(InputError, match=says(text)):
        read_regions(path, 3, BRATS, image, ("WT", "TC", "ET"))


# --- One file of several volumes ------------------------------------------------------------------


@pytest.fixture
def volume(tmp_path):
    """The path of a NIfTI image and the regions of its mask."""
    affine = np.diag([-1.0, 2.0, 1.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(np.zeros(SIDES, np.float32), affine), tmp_path / "i.nii.gz")
    return tmp_path / "i.nii.gz", regions_of(tumour(3)), affine


def write_channels(path, channels, affine):
    nibabel.save(nibabel.Nifti1Image(np.moveaxis(channels, 0, -1), affine), path)
    return path


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_a_file_of_one_volume_a_region_is_read_as_its_row_names_them(tmp_path, volume, kind):
    path, wanted, affine = volume
    mask = write_channels(tmp_path / "m.nii.gz", wanted[[2, 0, 1]].astype(kind), affine)
    image = read_image(path, 3)
    found = read_regions(mask, 3, BRATS, image, ("et", "WT", "TC"))
    assert found.dtype.is_floating_point is False
    assert np.array_equal(found.numpy(), wanted)
    # With its axes in another direction, as programs store one mask.
    turned = nibabel.as_closest_canonical(nibabel.load(mask))
    nibabel.save(turned, tmp_path / "t.nii.gz")
    found = read_regions(tmp_path / "t.nii.gz", 3, BRATS, image, ("ET", "WT", "TC"))
    assert np.array_equal(found.numpy(), wanted)
    row = {"image": path, "label": mask, "patient": "a", "mask_regions": "ET;WT;TC"}
    finding = check_row(row, 3, regions=BRATS)
    assert (finding.problem, finding.label) == (None, (0, 1, 2, 3))


def test_the_order_of_volumes_is_never_guessed(tmp_path, volume):
    path, wanted, affine = volume
    mask = write_channels(tmp_path / "m.nii.gz", wanted, affine)
    image = read_image(path, 3)
    text = (
        "it holds 3 volumes (4D): say which region each of them is by mask_regions in its row, "
        'such as "WT;TC;ET", or give one mask of values'
    )
    with pytest.raises(InputError, match=says(text)):
        read_regions(mask, 3, BRATS, image)
    with pytest.raises(InputError, match="as no value of the regions does"):
        read_regions(mask, 3, BRATS, image, ("ET", "TC", "WT"))
    # Files of one region each in the wrong order, too.
    files = []
    for number, channel in enumerate(wanted[::-1]):
        files.append(tmp_path / f"{number}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(channel, affine), files[-1])
    with pytest.raises(InputError, match="as no value of the regions does"):
        read_regions(files, 3, BRATS, image)
    assert np.array_equal(read_regions(files, 3, BRATS, image, [*BRATS][::-1]).numpy(), wanted)


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (
            ("WT", "TC"),
            "mask_regions of its row must name each of the regions WT, TC, ET once, got WT, TC",
        ),
        (
            ("WT", "TC", "wt"),
            "mask_regions of its row must name each of the regions WT, TC, ET once, got WT, TC, wt",
        ),
        (
            ("WT", "TC", "rim"),
            "mask_regions of its row must name each of the regions WT, TC, ET once, got WT, TC, "
            "rim",
        ),
        (
            ("WT", "TC", "ET"),
            "there are 2 masks: one for each of the regions WT, TC, ET is needed, in this order, "
            "or other names in mask_regions of its row",
        ),
    ],
)
def test_names_that_do_not_fit_the_volumes(tmp_path, volume, order, text):
    path, wanted, affine = volume
    mask = write_channels(tmp_path / "m.nii.gz", wanted[:2], affine)
    with pytest.raises(InputError, match=says(text)):
        read_regions(mask, 3, BRATS, read_image(path, 3), order)


def test_volumes_that_are_no_masks(tmp_path, volume):
    path, wanted, affine = volume
    mask = write_channels(tmp_path / "m.nii.gz", wanted * np.uint8(2), affine)
    text = "mask of the region WT: it holds the values 2, which are not classes: a mask holds 0, 1"
    with pytest.raises(InputError, match=says(text)):
        read_regions(mask, 3, BRATS, read_image(path, 3), (*BRATS,))
    row = {"image": path, "label": mask, "patient": "a", "mask_regions": "WT;TC;ET"}
    assert check_row(row, 3).problem == (
        f"its mask {mask}: mask_regions of its row names the regions WT, TC, ET, and the masks are "
        "read as classes: declare regions, or give a mask of classes"
    )
    row["mask_regions"] = 3
    assert check_row(row, 3, regions=BRATS).problem == (
        f'its mask {mask}: mask_regions of its row: names must be texts, as in "WT;TC;ET", got 3'
    )


def test_a_table_says_which_region_each_volume_is(tmp_path, volume):
    _, wanted, affine = volume
    write_channels(tmp_path / "m.nii.gz", wanted, affine)
    text = "image,label,patient,mask_regions\ni.nii.gz,m.nii.gz,7,WT;TC;ET\n"
    (tmp_path / "datalist.csv").write_text(text)
    (row,) = read_folder(tmp_path).rows
    assert row["mask_regions"] == ("WT", "TC", "ET")
    assert check_row(row, 3, regions=BRATS).problem is None


@pytest.mark.parametrize("count", [8, 9, 20])
def test_what_no_value_has_in_common_is_found_among_any_number_of_regions(count):
    regions = {f"r{n}": (n, 50) for n in range(1, count + 1)}
    mask = np.random.default_rng(1).choice([*range(count + 1), 50], (9, 8))
    channels = regions_of(mask, regions)
    assert np.array_equal(read_regions(channels, 2, regions).numpy(), channels)
    channels[:2, 3, 4] = 1
    channels[2:, 3, 4] = 0
    others = ", ".join([*regions][2:])
    with pytest.raises(InputError, match=f"1 voxel lies in r1, r2 and not in {others}, as no"):
        read_regions(channels, 2, regions)
