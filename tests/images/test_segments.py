"""Masks from DICOM SEG, compared with highdicom's own reading, and placed by hand."""

import re
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from dicom_files import (
    AXIAL,
    SAGITTAL,
    STUDY,
    write_highdicom,
    write_image,
    write_seg,
    write_series,
)
from pydicom.data import get_testdata_file
from pydicom.uid import RLELossless, generate_uid
from scipy.spatial import cKDTree

from fedmed_flower.errors import InputError
from fedmed_flower.images.reading import read_image, read_label

OBLIQUE = (0.8, 0.6, 0, 0, 0, -1)
SIDES = (7, 6, 5)
SPACING = (0.7, 0.8, 3.0)
ORIGIN = (-9.0, -20.0, 31.0)


def says(text):
    return f"^{re.escape(text)}$"


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A folder with one series and its files in order of position."""
    folder = tmp_path_factory.mktemp("study") / "series"
    voxels = np.random.default_rng(0).integers(0, 99, SIDES)
    return folder, write_series(folder, voxels, SPACING, origin=ORIGIN, seed=4, **STUDY)


@pytest.fixture(scope="module")
def image(series):
    return read_image(series[0], 3)


def structures(count=2, seed=1):
    """Random masks that share no voxel, (x, y, z) class numbers."""
    return np.random.default_rng(seed).integers(0, count + 1, SIDES).astype(np.uint8)


def planes(mask, number):
    """The masks as highdicom takes them, (slices, rows, columns)."""
    return (mask == number).transpose(2, 1, 0)


def frame(number, place, pixels, spacing=SPACING):
    return number, np.add(ORIGIN, (0, 0, place * spacing[2])), pixels


def read(path, image, names):
    return read_label(path, 3, 1 + len(names), image=image, names=names)[0].numpy()


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "FRACTIONAL"])
@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, OBLIQUE])
def test_a_mask_is_read_as_highdicom_reads_it(tmp_path, kind, orientation):
    folder = tmp_path / "series"
    voxels = np.zeros(SIDES)
    files = write_series(
        folder, voxels, SPACING, origin=ORIGIN, orientation=orientation, seed=2, **STUDY
    )
    mask = structures()
    mask[:, :, 2] = 0
    parts = np.stack([planes(mask, number) for number in (1, 2)], axis=-1)
    path = write_highdicom(tmp_path / "m.dcm", files, parts, ("Liver", "Spleen"), kind)
    found = read(path, read_image(folder, 3), ("liver", "spleen"))
    assert np.array_equal(found, mask)
    theirs = highdicom.seg.segread(path).get_pixels_by_source_instance(
        [pydicom.dcmread(file).SOPInstanceUID for file in files],
        combine_segments=True,
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )
    assert np.array_equal(found, theirs.transpose(2, 1, 0))


def test_half_of_the_maximum_belongs_to_a_structure(series, image, tmp_path):
    shares = np.random.default_rng(2).random((5, 6, 7, 1)).astype(np.float32)
    shares[0, 0, :3, 0] = (0.49, 0.5, 0.51)
    path = write_highdicom(
        tmp_path / "m.dcm", series[1], shares, ["tumour"], "FRACTIONAL", max_fractional_value=100
    )
    theirs = highdicom.seg.segread(path).get_pixels_by_source_instance(
        [pydicom.dcmread(file).SOPInstanceUID for file in series[1]], ignore_spatial_locations=True
    )
    wanted = (theirs[..., 0] >= 0.5).transpose(2, 1, 0)
    found = read(path, image, ["tumour"])
    assert np.array_equal(found, wanted)
    assert found[:3, 0, 0].tolist() == [0, 1, 1]


def test_frames_are_placed_by_their_position_in_any_order(image, tmp_path):
    mask = structures()
    frames = [frame(n, z, (mask[:, :, z] == n).T) for n in (1, 2) for z in (4, 1, 3)]
    order = np.random.default_rng(3).permutation(len(frames))
    labels = [{"SegmentLabel": "spleen"}, {"SegmentLabel": "LIVER"}]
    path = write_seg(tmp_path / "m.dcm", labels, [frames[i] for i in order], spacing=(0.8, 0.7))
    wanted = np.zeros_like(mask)
    for z in (1, 3, 4):
        wanted[:, :, z] = np.array([0, 2, 1])[mask[:, :, z]]
    assert np.array_equal(read(path, image, ("liver", "spleen")), wanted)


def test_turned_and_mirrored_frames_find_their_voxels(image, tmp_path):
    mask = structures(1)
    # Rows run from back to front, and columns lead down the image.
    pixels = mask[:, ::-1, 2]
    first = np.add(ORIGIN, (0, 5 * 0.8, 6.0))
    path = write_seg(
        tmp_path / "m.dcm", [{"SegmentLabel": "liver"}], [(1, first, pixels)],
        orientation=(0, -1, 0, 1, 0, 0), spacing=(0.7, 0.8),
    )  # fmt: skip
    wanted = np.zeros_like(mask)
    wanted[:, :, 2] = mask[:, :, 2]
    assert np.array_equal(read(path, image, ["liver"]), wanted)


def test_a_nifti_image_in_other_axes_takes_the_mask_of_its_series(series, image, tmp_path):
    volume = nibabel.Nifti1Image(image[0].numpy(), image.affine.numpy())
    nibabel.save(nibabel.as_closest_canonical(volume), tmp_path / "x.nii")
    mask = structures(1)
    path = write_highdicom(tmp_path / "m.dcm", series[1], planes(mask, 1)[..., None], ["liver"])
    found = read(path, read_image(tmp_path / "x.nii", 3), ["liver"])
    turned = nibabel.Nifti1Image(mask, image.affine.numpy())
    assert np.array_equal(found, nibabel.as_closest_canonical(turned).get_fdata())


def test_a_compressed_mask(series, image, tmp_path):
    mask = structures(1)
    path = write_highdicom(
        tmp_path / "m.dcm", series[1], planes(mask, 1)[..., None], ["liver"], "LABELMAP",
        transfer_syntax_uid=RLELossless,
    )  # fmt: skip
    assert np.array_equal(read(path, image, ["liver"]), mask)


# Names


def single(tmp_path, *segments):
    """Write a mask in which segment n marks the pixel n - 1 of the first row of plane 0."""
    frames = []
    for number in range(len(segments)):
        pixels = np.zeros((6, 7))
        pixels[0, number] = 1
        frames.append(frame(number + 1, 0, pixels))
    return write_seg(tmp_path / "m.dcm", segments, frames, spacing=(0.8, 0.7))


def test_a_label_counts_more_than_a_description_and_this_more_than_a_code(image, tmp_path):
    path = single(
        tmp_path,
        {"SegmentLabel": "Segment 1", "SegmentDescription": "Left_Lung", "meaning": "Lung"},
        {"SegmentLabel": "liver", "SegmentDescription": "left lung"},
        {"SegmentLabel": "x", "meaning": "Kidney", "modifier": "Right"},
        {"SegmentLabel": "y", "meaning": "Kidney", "modifier": "Left"},
        {"SegmentLabel": "vessels", "meaning": "Liver"},
        {"SegmentLabel": "left-lung"},
    )
    assert read(path, image, ("LIVER", "left lung"))[:6, 0, 0].tolist() == [0, 1, 0, 0, 0, 2]
    assert read(path, image, ("right kidney", "lung"))[:6, 0, 0].tolist() == [2, 0, 1, 0, 0, 0]
    assert read(path, image, ["kidney"])[:6, 0, 0].tolist() == [0, 0, 1, 1, 0, 0]


def test_segments_of_one_name_are_joined(image, tmp_path):
    path = single(tmp_path, *[{"SegmentLabel": name} for name in ("Lesion", "other", "lesion")])
    assert read(path, image, ["lesion"])[:3, 0, 0].tolist() == [1, 0, 1]


def test_without_any_of_the_names_those_of_the_file_are_listed(image, tmp_path):
    path = single(tmp_path, {"SegmentLabel": "Milz\n"}, {"SegmentDescription": "gut"})
    text = (
        "it has none of the structures liver, spleen, but Milz, gut: name the classes so, or "
        "rename its structures"
    )
    with pytest.raises(InputError, match=says(text)):
        read(path, image, ("liver", "spleen"))


def test_several_files_of_one_image_are_joined(series, image, tmp_path):
    mask = structures()
    folder = tmp_path / "masks"
    folder.mkdir()
    paths = [
        write_highdicom(folder / f"{name}.dcm", series[1], planes(mask, number)[..., None], [name])
        for number, name in enumerate(("liver", "spleen"), start=1)
    ]
    for source in ([str(path) for path in paths], folder):
        assert np.array_equal(read(source, image, ("liver", "spleen")), mask)
    nibabel.save(nibabel.Nifti1Image(mask, image.affine.numpy()), tmp_path / "m.nii")
    text = f"{tmp_path / 'm.nii'} is neither DICOM SEG nor RTSTRUCT, as {paths[0]} is"
    with pytest.raises(InputError, match=says(text)):
        read([paths[0], tmp_path / "m.nii"], image, ("liver", "spleen"))


def test_structures_that_overlap_are_refused_by_name(series, image, tmp_path):
    mask = structures()
    both = np.stack([planes(mask, 1), planes(mask, 1) | planes(mask, 2)], axis=-1)
    path = write_highdicom(tmp_path / "m.dcm", series[1], both, ("liver", "spleen"))
    text = (
        f"its structures overlap: liver and spleen both claim {(mask == 1).sum()} voxels. A mask "
        "has one class a voxel: correct the outlines, or leave a class out"
    )
    with pytest.raises(InputError, match=says(text)):
        read(path, image, ("liver", "spleen"))
    assert np.array_equal(read(path, image, ["liver"]), mask == 1)


def test_names_and_image_are_needed(series, image, tmp_path):
    path = single(tmp_path, {"SegmentLabel": "liver"})
    with pytest.raises(InputError, match="holds structures by name: name the classes"):
        read_label(path, 3, None, image=image)
    with pytest.raises(InputError, match="is read with the image that it belongs to"):
        read_label(path, 3, None, names=["liver"])
    with pytest.raises(InputError, match="names must be one for each of the 3 classes but"):
        read_label(path, 3, 3, image=image, names=["liver"])


# Places


def test_another_frame_of_reference_is_refused(image, tmp_path):
    path = write_seg(
        tmp_path / "m.dcm", [{"SegmentLabel": "liver"}], [frame(1, 0, np.ones((6, 7)))],
        spacing=(0.8, 0.7), frame_of_reference=generate_uid(),
    )  # fmt: skip
    with pytest.raises(InputError, match="it lies in another frame of reference than the image"):
        read(path, image, ["liver"])


def test_planes_beside_or_outside_of_those_of_the_image_are_refused(image, tmp_path):
    def at(place, **options):
        frames = [frame(1, place, np.ones((6, 7)))]
        return write_seg(
            tmp_path / "m.dcm", [{"SegmentLabel": "liver"}], frames, spacing=(0.8, 0.7), **options
        )

    text = (
        "it outlines a plane 1.2 mm beside the nearest of the image, whose planes are 3 mm apart, "
        "and nothing is interpolated: save it as NIfTI on the image's grid"
    )
    with pytest.raises(InputError, match=says(text)):
        read(at(2.4), image, ["liver"])
    with pytest.raises(InputError, match="it outlines a plane 6 mm outside of the image"):
        read(at(-2), image, ["liver"])
    with pytest.raises(InputError, match="its planes are tilted against those of the image"):
        read(at(2, orientation=(0.6, 0, 0.8, 0, 1, 0)), image, ["liver"])
    # An empty plane says nothing.
    frames = [frame(1, 0, np.ones((6, 7))), frame(1, 2.4, np.zeros((6, 7)))]
    path = write_seg(tmp_path / "m.dcm", [{"SegmentLabel": "liver"}], frames, spacing=(0.8, 0.7))
    assert read(path, image, ["liver"]).sum() == 42


def test_planes_of_a_coarser_grid_are_refused(image, tmp_path):
    def of(places, between):
        frames = [frame(1, place, np.ones((6, 7))) for place in places]
        return write_seg(
            tmp_path / "m.dcm", [{"SegmentLabel": "liver"}], frames, spacing=(0.8, 0.7),
            between=between,
        )  # fmt: skip

    text = (
        "its planes are 6 mm apart and those of the image 3: save it as NIfTI on the image's grid"
    )
    with pytest.raises(InputError, match=says(text)):
        read(of((0, 2, 4), 6.0), image, ["liver"])
    assert read(of((0, 2, 4), 3.0), image, ["liver"]).sum() == 3 * 42
    # Thick slices that overlap.
    assert read(of((0, 1), 6.0), image, ["liver"]).sum() == 2 * 42


def test_a_finer_grid_in_the_same_frame_of_reference_counts_by_the_nearest_pixel(image, tmp_path):
    fine = np.random.default_rng(5).integers(0, 2, (12, 14))
    first = np.add(ORIGIN, (-0.175, -0.2, 3.0))
    options = {"spacing": (0.4, 0.35), "between": 3.0}
    labels = [{"SegmentLabel": "liver"}]
    path = write_seg(tmp_path / "m.dcm", labels, [(1, first, fine)], **options)
    found = read(path, image, ["liver"])
    # The middle of a voxel is the corner of four pixels.
    assert np.array_equal(found[:, :, 1], fine[1::2, 1::2].T)
    assert not found[:, :, [0, 2, 3, 4]].any()
    path = write_seg(
        tmp_path / "n.dcm", labels, [(1, first, fine)], frame_of_reference="", **options
    )
    with pytest.raises(InputError, match="the two do not name one frame of reference"):
        read(path, image, ["liver"])


def test_a_turned_grid_in_the_same_planes_counts_by_the_nearest_pixel(image, tmp_path):
    pixels = np.random.default_rng(7).integers(0, 2, (20, 30))
    along_row, along_column = np.array([0.8, 0.6, 0]), np.array([-0.6, 0.8, 0])
    first = np.add(ORIGIN, (1.31, -3.17, 9.0))
    path = write_seg(
        tmp_path / "m.dcm", [{"SegmentLabel": "liver"}], [(1, first, pixels)],
        orientation=(*along_row, *along_column), spacing=(0.43, 0.37),
    )  # fmt: skip
    rows, columns = np.mgrid[:20, :30]
    places = first + rows[..., None] * 0.43 * along_column + columns[..., None] * 0.37 * along_row
    voxels = np.add(
        ORIGIN, np.stack(np.meshgrid(*map(np.arange, SIDES), indexing="ij"), -1) * SPACING
    )
    distance, nearest = cKDTree(places.reshape(-1, 3)).query(voxels[:, :, 3].reshape(-1, 3))
    # Within the grid, whose outermost pixels reach half a pixel further.
    inner = distance < 0.18
    found = read(path, image, ["liver"])[:, :, 3].reshape(-1)
    assert np.array_equal(found[inner], pixels.reshape(-1)[nearest[inner]])
    assert inner.sum() > 10
    assert not found[distance > 0.6].any()


def test_a_cut_out_of_the_grid_is_placed_without_a_frame_of_reference(image, tmp_path):
    pixels = np.arange(6).reshape(2, 3) % 2
    first = np.add(ORIGIN, (2 * 0.7, 3 * 0.8, 6.0))
    path = write_seg(
        tmp_path / "m.dcm", [{"SegmentLabel": "liver"}], [(1, first, pixels)],
        spacing=(0.8, 0.7), frame_of_reference="",
    )  # fmt: skip
    wanted = np.zeros(SIDES)
    wanted[2:5, 3:5, 2] = pixels.T
    assert np.array_equal(read(path, image, ["liver"]), wanted)
    away = np.add(ORIGIN, (200 * 0.7, 0, 6.0))
    path = write_seg(
        tmp_path / "n.dcm", [{"SegmentLabel": "liver"}], [(1, away, pixels)], spacing=(0.8, 0.7)
    )
    with pytest.raises(InputError, match="it outlines nothing within the image"):
        read(path, image, ["liver"])


def test_one_slice_takes_its_plane_of_the_mask(series, image, tmp_path):
    mask = structures(1)
    path = write_highdicom(tmp_path / "m.dcm", series[1], planes(mask, 1)[..., None], ["liver"])
    for place, file in enumerate(series[1]):
        label = read_label(path, 2, 2, image=read_image(file, 2), names=["liver"])
        assert np.array_equal(label[0].numpy(), mask[:, :, place].T)


def test_the_mask_of_an_x_ray_has_no_position_either(tmp_path):
    pixels = np.random.default_rng(6).integers(0, 2, (6, 7))
    image = read_image(write_image(tmp_path / "x.dcm", pixels.astype(np.uint8)), 2)
    labels = [{"SegmentLabel": "lung"}]
    path = write_seg(tmp_path / "m.dcm", labels, [(1, None, pixels)], frame_of_reference="")
    label = read_label(path, 2, 2, image=image, names=["lung"])
    assert np.array_equal(label[0].numpy(), pixels)
    path = write_seg(tmp_path / "n.dcm", labels, [(1, None, pixels.T)], frame_of_reference="")
    with pytest.raises(InputError, match=says("its shape is (7, 6), the image's (6, 7)")):
        read_label(path, 2, 2, image=image, names=["lung"])
    path = write_seg(tmp_path / "o.dcm", labels, [(1, ORIGIN, pixels)])
    with pytest.raises(InputError, match="the image has no position in the patient, which"):
        read_label(path, 2, 2, image=image, names=["lung"])


def test_a_frame_without_a_position_is_refused_where_the_image_has_one(image, tmp_path):
    labels = [{"SegmentLabel": "liver"}]
    path = write_seg(tmp_path / "m.dcm", labels, [(1, None, np.ones((6, 7)))])
    with pytest.raises(InputError, match="its frames have no position in the patient, and the"):
        read(path, image, ["liver"])


def test_a_damaged_mask_is_refused_by_name(image, tmp_path):
    path = single(tmp_path, {"SegmentLabel": "liver"})
    whole = path.read_bytes()
    for length in range(len(whole) - 4, 0, -5):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read(path, image, ["liver"])
    part = pydicom.dcmread(single(tmp_path, *[{"SegmentLabel": "liver"}] * 3))
    part.PerFrameFunctionalGroupsSequence.pop()
    part.save_as(path)
    with pytest.raises(InputError, match="it describes 2 of its 3 frames"):
        read(path, image, ["liver"])
    del part.PerFrameFunctionalGroupsSequence
    part.save_as(path)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} cannot be read: "):
        read(path, image, ["liver"])


@pytest.mark.parametrize("name", ["liver.dcm", "liver_expb.dcm"])
def test_a_file_of_another_program_is_read_as_pydicom_reads_its_frames(tmp_path, name):
    path = Path(get_testdata_file(name))
    part = pydicom.dcmread(path)
    groups = part.PerFrameFunctionalGroupsSequence
    shared = part.SharedFunctionalGroupsSequence[0]
    corners = [group.PlanePositionSequence[0].ImagePositionPatient for group in groups]
    directions = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3))
    rows, columns = shared.PixelMeasuresSequence[0].PixelSpacing
    affine = np.eye(4)
    affine[:3, 0] = directions[0] * columns
    affine[:3, 1] = directions[1] * rows
    # An image of more planes, in which those of the file have every place but two.
    normal = np.cross(*directions)
    order = np.argsort(np.array(corners, float) @ normal)
    step = np.diff(np.array(corners, float)[order], axis=0)[0]
    affine[:3, 2] = step
    affine[:3, 3] = np.array(corners[order[0]], float) - step
    affine[:2] *= -1
    volume = nibabel.Nifti1Image(np.zeros((512, 512, len(corners) + 2), np.float32), affine)
    nibabel.save(volume, tmp_path / "x.nii")
    found = read(path, read_image(tmp_path / "x.nii", 3), ["LIVER"])
    assert np.array_equal(found[:, :, 1:-1], part.pixel_array[order].transpose(2, 1, 0))
    assert not found[:, :, [0, -1]].any()
    assert found.sum() == part.pixel_array.sum() > 10_000
