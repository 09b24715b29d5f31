"""DICOM files of many frames, stacks, geometry and values, compared with other readers."""

import logging
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_files import AXIAL, SAGITTAL, at, write_enhanced, write_image, write_series
from pydicom import uid
from pydicom.data import get_testdata_file
from tiny import says

from fedmed_flower.data.checks import check_row
from fedmed_flower.data.datalist import read_folder
from fedmed_flower.errors import InputError
from fedmed_flower.images import dicom, pixels
from fedmed_flower.images.dicom import read_dicom
from fedmed_flower.images.headers import HEADER, open_dicom
from fedmed_flower.images.reading import read_image
from fedmed_flower.images.series import Series
from fedmed_flower.images.stacks import missing_of, planes_of, stacks_of

TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def stored(count=4, shape=(3, 5), seed=0):
    return np.random.default_rng(seed).integers(0, 1000, (count, *shape)).astype(np.uint16)


def scaled(slope, intercept):
    values = {"RescaleSlope": slope, "RescaleIntercept": intercept, "RescaleType": "US"}
    return {"PixelValueTransformationSequence": values}


def diffusion(b):
    return {"MRDiffusionSequence": {"DiffusionBValue": float(b)}}


def stacks_in(*files):
    planes = []
    for file in files:
        header = open_dicom(file, stop_before_pixels=True, specific_tags=list(HEADER))
        planes += planes_of(file, header)
    return stacks_of(planes)


def change(file, **tags):
    part = pydicom.dcmread(file)
    for name, value in tags.items():
        setattr(part, name, value)
    part.save_as(file)


# Files of many frames


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_frames_with_positions_are_the_volume_that_highdicom_reads(tmp_path, order):
    positions = [at(-3, 4, 2.5 * place) for place in order]
    path = write_enhanced(tmp_path / "x.dcm", stored(), positions)
    values, affine, placed = read_dicom(path)
    reference = highdicom.imread(path).get_volume()
    # highdicom has (slices, rows, columns), in the other direction of the normal.
    turned = reference.flip_spatial(0) if reference.affine[2, 0] < 0 else reference
    assert placed
    assert np.array_equal(values[0].T, turned.array)
    assert np.allclose(affine, TO_RAS @ turned.affine[:, [2, 1, 0, 3]])
    assert np.array_equal(values[0].T, stored()[np.argsort(order)])


def test_each_frame_has_its_own_slope_and_else_that_of_all(tmp_path):
    groups = [at(0, 0, place, **scaled(place + 1, -10)) for place in range(4)]
    values = read_dicom(write_enhanced(tmp_path / "x.dcm", stored(), groups))[0]
    assert np.array_equal(values[0].T, stored() * np.arange(1, 5)[:, None, None] - 10.0)
    groups = [at(0, 0, place) for place in range(4)]
    shared = {
        "PixelMeasuresSequence": {"PixelSpacing": [1.0, 1.0]},
        "PlaneOrientationSequence": {"ImageOrientationPatient": list(map(float, AXIAL))},
        **scaled(2, -1024),
    }
    path = write_enhanced(tmp_path / "y.dcm", stored(), groups, shared)
    assert np.array_equal(read_dicom(path)[0][0].T, stored() * 2.0 - 1024)
    reference = highdicom.imread(path).get_volume()
    assert np.array_equal(np.sort(reference.array, None), np.sort(read_dicom(path)[0], None))


def test_a_real_enhanced_ct_has_its_units_and_its_spacing():
    path = get_testdata_file("eCT_Supplemental.dcm", download=False)
    image = read_image(path, 3)
    reference = SimpleITK.ReadImage(str(path))
    assert (image.min(), image.max()) == (-1024, 172)
    assert np.allclose(np.abs(np.diag(image.affine)[:3]), reference.GetSpacing())
    # Frame 1 is the upper one, and slices follow the normal, which points down here.
    frames = SimpleITK.GetArrayFromImage(reference)[::-1]
    assert np.array_equal(image[0].numpy().T, frames)
    top = reference.TransformIndexToPhysicalPoint((0, 0, 1))
    assert np.allclose(image.affine[:3, 3], np.array(top) * [-1, -1, 1])


def test_one_frame_of_an_enhanced_file_is_a_slice_with_its_spacing(tmp_path):
    path = write_enhanced(tmp_path / "x.dcm", stored(1), [at(1, 2, 3, **scaled(1, -1024))])
    image = read_image(path, 2)
    assert np.array_equal(image[0].numpy(), stored(1)[0] - 1024.0)
    assert np.allclose(np.diag(image.affine)[:2], [0.5, 0.7])


def test_an_rt_dose_has_its_unit_and_the_places_of_its_frames():
    path = Path(get_testdata_file("rtdose.dcm", download=False))
    values, affine, placed = read_dicom(path)
    reference = SimpleITK.ReadImage(str(path))
    part = pydicom.dcmread(path)
    assert placed
    expected = SimpleITK.GetArrayFromImage(reference) * float(part.DoseGridScaling)
    assert np.allclose(values[0].T, expected, rtol=1e-6)
    direction = np.reshape(reference.GetDirection(), (3, 3)) * reference.GetSpacing()
    assert np.allclose(affine[:3, :3], TO_RAS[:3, :3] @ direction)
    assert np.allclose(affine[:3, 3], TO_RAS[:3, :3] @ reference.GetOrigin())


def test_a_dose_without_scaling_is_refused(tmp_path):
    path = write_image(tmp_path / "x.dcm", stored()[0], kind=uid.RTDoseStorage)
    with pytest.raises(InputError, match="it is an RT dose and has no DoseGridScaling"):
        read_dicom(path)


@pytest.mark.parametrize(
    ("tags", "film"),
    [
        ({}, "4 frames"),
        ({"FrameTime": 40.0}, "a film of 4 frames over 0.16 s"),
        ({"FrameTimeVector": [0.0, 500.0, 500.0, 1000.0]}, "a film of 4 frames over 2 s"),
        ({"CineRate": 2}, "a film of 4 frames over 2 s"),
    ],
)
def test_a_film_is_no_volume_and_one_of_its_frames_can_be_taken(tmp_path, tags, film):
    path = write_enhanced(tmp_path / "x.dcm", stored(), [], {}, **tags)
    text = (
        f"{path} holds {film} with no position in the patient: they are no slices, so take one by "
        "`frames` of its row, from 0 to 3"
    )
    with pytest.raises(InputError, match=says(text)):
        read_image(path, None)
    values, _, placed = read_dicom(path, 2)
    assert not placed
    assert np.array_equal(values[0, ..., 0].T, stored()[2])
    text = f"{path}: the number of the frame must be from 0 to 3, got 4"
    with pytest.raises(InputError, match=says(text)):
        read_dicom(path, 4)


def test_a_table_names_the_frame_of_a_film(tmp_path):
    write_enhanced(tmp_path / "x.dcm", stored(), [], {}, FrameTime=40.0)
    (tmp_path / "datalist.csv").write_text("image,label,patient,frames\nx.dcm,1,p,2\nx.dcm,0,p,9\n")
    first, second = read_folder(tmp_path).rows
    image = read_image(first["image"], 2, first["frames"])
    assert np.array_equal(image[0].numpy(), stored()[2])
    finding = check_row(first, 2, 2)
    assert (finding.problem, finding.shape) == (None, (1, *stored()[2].shape))
    assert "must be from 0 to 3, got 9" in check_row(second, 2, 2).problem


def test_frames_at_one_position_are_a_film(tmp_path):
    path = write_enhanced(tmp_path / "x.dcm", stored(), [at(0, 0, 7)] * 4)
    with pytest.raises(InputError, match=r"holds 4 frames with one position in the patient: they"):
        read_dicom(path)


def test_nuclear_medicine_of_many_frames_is_named(tmp_path):
    path = write_enhanced(tmp_path / "x.dcm", stored(), [], {}, Modality="NM")
    with pytest.raises(InputError, match="4 frames of nuclear medicine, whose positions are not"):
        read_dicom(path)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (uid.SegmentationStorage, "holds a segmentation, which is a mask and no image"),
        (uid.VLWholeSlideMicroscopyImageStorage, "holds tiles of a slide of tissue"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, kind, text):
    path = write_image(tmp_path / "x.dcm", stored()[0], kind=kind)
    with pytest.raises(InputError, match=text):
        read_dicom(path)


def test_a_mosaic_of_slices_is_named(tmp_path):
    kind = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    path = write_image(tmp_path / "x.dcm", stored()[0], ImageType=kind)
    with pytest.raises(InputError, match="is a mosaic, whose slices are tiles of one picture"):
        read_dicom(path)


def test_real_world_values_are_not_applied(tmp_path):
    real = {"RealWorldValueSlope": 3.0, "RealWorldValueIntercept": 5.0}
    groups = [at(0, 0, place, RealWorldValueMappingSequence=real) for place in range(4)]
    path = write_enhanced(tmp_path / "x.dcm", stored(), groups)
    assert np.array_equal(read_dicom(path)[0][0].T, stored())


def test_frames_that_are_not_described_are_counted(tmp_path):
    path = write_enhanced(tmp_path / "x.dcm", stored(), [at(0, 0, place) for place in range(3)])
    text = f"{path} states 4 frames and describes 3: it is cut off"
    with pytest.raises(InputError, match=says(text)):
        read_dicom(path)
    change(path, NumberOfFrames=0)
    text = f"{path}: its NumberOfFrames must be from 1 to 120,000, got 0"
    with pytest.raises(InputError, match=says(text)):
        read_dicom(path)


# Several stacks


def test_b_values_in_one_file_are_stacks_of_their_own(tmp_path):
    groups = [
        at(0, 0, 2 * place, **diffusion(b), **scaled(1 + b, 0))
        for b in (0, 1000) for place in range(2)
    ]  # fmt: skip
    path = write_enhanced(tmp_path / "x.dcm", stored(), groups)
    text = (
        f"{path} holds 2 stacks of slices: b=0 (2 slices), b=1000 (2 slices). Choose one by a rule "
        'such as part="b=0", or give each a folder of its own'
    )
    with pytest.raises(InputError, match=says(text)):
        read_image(path, 3)
    image = read_image(Series("1", (str(path),), "b=1000"), 3)
    assert np.array_equal(image[0].numpy().T, stored()[2:] * np.float32(1001))
    assert np.allclose(image.affine[:3, 2], [0, 0, 2])


def series(folder, count, **tags):
    """Write slices 2 mm apart in a folder of their own; return their files and values."""
    array = np.random.default_rng(len(str(tags))).integers(0, 99, (4, 3, count))
    tags = {"series_uid": "1.2.3", **tags}
    return write_series(folder, array, (1, 1, 2), **tags), array


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("b={}", {"DiffusionBValue": 0.0}, {"DiffusionBValue": 800.0}),
        ("echo {}", {"EchoNumbers": 0}, {"EchoNumbers": 800}),
        ("time {}", {"TemporalPositionIdentifier": 0}, {"TemporalPositionIdentifier": 800}),
        ("TE={} ms", {"EchoTime": 0.0}, {"EchoTime": 800.0}),
        ("TI={} ms", {"InversionTime": 0.0}, {"InversionTime": 800.0}),
        ("flip angle {}", {"FlipAngle": 0.0}, {"FlipAngle": 800.0}),
        ("{} kV", {"KVP": 0.0}, {"KVP": 800.0}),
        ("kernel {}", {"ConvolutionKernel": "0"}, {"ConvolutionKernel": "800"}),
        ("acquisition {}", {"AcquisitionNumber": 0}, {"AcquisitionNumber": 800}),
    ],
)
def test_what_tells_the_stacks_of_a_series_apart_names_them(tmp_path, name, one, other):
    files, array = series(tmp_path / "one", 3, **one)
    others, other_array = series(tmp_path / "other", 3, **other)
    names = [name.format(0), name.format(800)]
    assert list(stacks_in(*others, *files)) == names
    both = tuple(map(str, [*others, *files]))
    for part, expected in zip(names, (array, other_array), strict=True):
        assert np.array_equal(read_dicom(Series("1.2.3", both, part))[0][0], expected)
    # The rows of a listing name the files of the stack alone.
    alone = Series("1.2.3", tuple(map(str, others)), names[1])
    assert np.array_equal(read_dicom(alone)[0][0], other_array)


def test_a_dimension_of_the_file_tells_stacks_apart_if_nothing_else_does(tmp_path):
    groups = [
        at(0, 0, place, FrameContentSequence={"DimensionIndexValues": [place + 1, phase]})
        for phase in (1, 2) for place in range(2)
    ]  # fmt: skip
    dimensions = []
    for name in ("ImagePositionPatient", "NominalRespiratoryTriggerDelayTime"):
        dimensions.append(pydicom.Dataset())
        dimensions[-1].DimensionIndexPointer = pydicom.datadict.tag_for_keyword(name)
    path = write_enhanced(tmp_path / "x.dcm", stored(), groups, DimensionIndexSequence=dimensions)
    names = [f"nominal respiratory trigger delay time {number}" for number in (1, 2)]
    assert list(stacks_in(path)) == names
    image = read_dicom(Series("1", (str(path),), names[1]))[0]
    assert np.array_equal(image[0].T, stored()[2:])


def test_a_number_that_differs_from_image_to_image_divides_no_series(tmp_path):
    one, _ = series(tmp_path / "one", 4)
    other, _ = series(tmp_path / "other", 4)
    for number, file in enumerate(one + other):
        change(file, AcquisitionNumber=number)
    assert list(stacks_in(*one, *other)) == [""]
    with pytest.raises(InputError, match=r"two slices at one position, IM0001.dcm and IM0001.dcm"):
        read_dicom(Series("1.2.3", tuple(map(str, one + other))))


def test_b_values_of_one_slice_are_stacks_and_no_film(tmp_path):
    groups = [at(0, 0, 7, **diffusion(100 * number)) for number in range(4)]
    path = write_enhanced(tmp_path / "x.dcm", stored(), groups)
    values = read_dicom(Series("1", (str(path),), "b=200"))[0]
    assert np.array_equal(values[0, ..., 0].T, stored()[2])


def test_of_many_stacks_an_error_names_twelve(tmp_path):
    groups = [at(0, 0, 7, **diffusion(number)) for number in range(30)]
    path = write_enhanced(tmp_path / "x.dcm", stored(30), groups)
    with pytest.raises(
        InputError, match=r"holds 30 stacks .*, b=11 \(1 slice\) and 18 more\. Choose"
    ):
        read_dicom(path)


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        (["ORIGINAL\\PRIMARY\\M\\ND", "ORIGINAL\\PRIMARY\\P\\ND"], ["M", "P"]),
        (["DERIVED\\PRIMARY\\DIXON\\WATER", "DERIVED\\PRIMARY\\DIXON\\FAT"], ["FAT", "WATER"]),
    ],
)
def test_kinds_of_images_are_named_by_what_differs(tmp_path, kinds, names):
    files = [
        file for number, kind in enumerate(kinds)
        for file in series(tmp_path / str(number), 2, ImageType=kind.split("\\"))[0]
    ]  # fmt: skip
    assert list(stacks_in(*files)) == names


def test_what_differs_from_slice_to_slice_divides_no_stack(tmp_path):
    files, _ = series(tmp_path, 4)
    for number, file in enumerate(files):
        change(file, TemporalPositionIdentifier=number + 1, EchoTime=4.0 + number,
               AcquisitionTime=f"1200{number:02}", AcquisitionNumber=number)  # fmt: skip
    assert list(stacks_in(*files)) == [""]


def test_phases_of_the_heart_are_ordered_at_each_position(tmp_path):
    files = []
    for phase, delay in enumerate((0.0, 50.0, 100.0)):
        written, _ = series(tmp_path / str(phase), 3)
        for number, file in enumerate(written):
            change(file, TriggerTime=delay + number)  # A little later in each slice.
        files.append(written)
    stacks = stacks_in(*files[2], *files[0], *files[1])
    assert {name: [plane.file for plane in stack] for name, stack in stacks.items()} == {
        f"phase {number + 1}": written for number, written in enumerate(files)
    }
    # Where one is missing, the order at a position would mix them.
    assert list(stacks_in(*files[0], *files[1][1:])) == [""]


def test_directions_of_diffusion_are_numbered(tmp_path):
    files = series(tmp_path / "0", 2, DiffusionBValue=0.0)[0]
    for number, direction in enumerate(([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])):
        tags = {"DiffusionBValue": 700.0, "DiffusionGradientOrientation": direction}
        files += series(tmp_path / str(number + 1), 2, **tags)[0]
    assert list(stacks_in(*files)) == ["b=0", "b=700, direction 1", "b=700, direction 2"]


def test_a_localizer_is_a_stack_for_each_orientation(tmp_path):
    files = series(tmp_path / "a", 3)[0] + series(tmp_path / "s", 2, orientation=SAGITTAL)[0]
    stacks = stacks_in(*files)
    assert {name: len(stack) for name, stack in stacks.items()} == {"axial": 3, "sagittal": 2}
    tilted = (1.0, 0.0, 0.0, 0.0, 0.9, 0.435889)
    files += series(tmp_path / "t", 2, orientation=tilted)[0]
    assert sorted(stacks_in(*files)) == ["axial (1)", "axial (2)", "sagittal"]


@pytest.mark.parametrize(
    ("creator", "tag", "kind", "value"),
    [
        ("SIEMENS MR HEADER", 0x0019100C, "IS", "750"),
        ("GEMS_PARM_01", 0x00431039, "IS", ["1000000750", "8", "0", "0"]),
        ("Philips Imaging DD 001", 0x20011003, "FL", 750.0),
    ],
)
def test_b_values_at_the_places_of_vendors(tmp_path, creator, tag, kind, value):
    plain, _ = series(tmp_path / "plain", 2, DiffusionBValue=0.0)
    files, _ = series(tmp_path / "files", 2)
    for file in files:
        part = pydicom.dcmread(file)
        part.add_new((tag & 0xFFFF0000) + 0x10, "LO", creator)
        part.add_new(tag, kind, value)
        part.save_as(file)
    assert list(stacks_in(*plain, *files)) == ["b=0", "b=750"]


def test_volumes_of_dynamic_pet_follow_the_index_of_their_images(tmp_path):
    files = []
    for volume in range(2):
        written, _ = series(tmp_path / str(volume), 3, Modality="PT", NumberOfSlices=3)
        for number, file in enumerate(written):
            change(file, NumberOfTimeSlices=2, ImageIndex=3 * volume + number + 1)
        files += written
    stacks = stacks_in(*files)
    assert {name: [p.file for p in stack] for name, stack in stacks.items()} == {
        "time 1": files[:3], "time 2": files[3:],
    }  # fmt: skip


def test_an_element_that_cannot_be_decoded_tells_nothing_apart(tmp_path):
    files, array = series(tmp_path, 3)
    part = pydicom.dcmread(files[0])
    part.add_new("EchoNumbers", "IS", "1")
    part.save_as(files[0])
    content = files[0].read_bytes()
    files[0].write_bytes(
        content.replace(b"\x18\x00\x86\x00IS\x02\x001 ", b"\x18\x00\x86\x00IS\x02\x00x ")
    )
    assert np.array_equal(read_dicom(tmp_path)[0][0], array)


# Where slices lie


@pytest.mark.parametrize(("step", "digits"), [(0.625, 1), (1.25, 1), (0.3333, 2), (0.75, 1)])
def test_positions_rounded_by_the_printer_are_even(tmp_path, step, digits):
    files, _ = series(tmp_path, 21)
    for number, file in enumerate(files):
        change(file, ImagePositionPatient=["0.0", "-12.5", f"{number * step:.{digits}f}"])
    affine = read_dicom(tmp_path)[1]
    assert affine[2, 2] == pytest.approx(step, rel=0.02)


@pytest.mark.parametrize(
    ("heights", "text"),
    [
        (
            [0, 2, 4, 7, 9, 11],
            "between IM0003.dcm and IM0004.dcm: they are 3 mm apart, the others 2",
        ),
        ([0, 2, 4, 6, 8, 10.3], "IM0005.dcm and IM0006.dcm: they are 2.3 mm apart, the others 2"),
        (
            [0, 1, 2, 3, 4, 5.05, 6.1, 7.15, 8.2, 9.25],
            r"its slices are not evenly spaced: IM0005.dcm lies 0.111 mm from its place, with 1.05 "
            "mm from slice to slice",
        ),
    ],
)
def test_uneven_slices_are_named_with_where_and_how_far(tmp_path, heights, text):
    files, _ = series(tmp_path, len(heights))
    for file, height in zip(files, heights, strict=True):
        change(file, ImagePositionPatient=[0.0, 0.0, float(height)])
    with pytest.raises(InputError, match=text):
        read_dicom(tmp_path)


def test_a_tilted_gantry_is_sheared_as_simpleitk_places_each_slice(tmp_path):
    files, _ = series(tmp_path, 4)
    for number, file in enumerate(files):
        change(file, ImagePositionPatient=[3.0, 0.5 * number - 7, 2.0 * number])
    affine = read_dicom(tmp_path)[1]
    for number, file in enumerate(files):
        place = SimpleITK.ReadImage(str(file)).TransformIndexToPhysicalPoint((2, 1, 0))
        assert np.allclose(affine @ [2, 1, number, 1], TO_RAS @ [*place, 1])


def test_slices_missing_at_an_end_are_noticed_by_what_the_header_counts(tmp_path):
    tags = {"ImagesInAcquisition": 6, "ImageType": ["ORIGINAL", "PRIMARY"]}
    files, _ = series(tmp_path, 6, **tags)
    assert read_dicom(tmp_path)[0].shape == (1, 4, 3, 6)
    files[5].unlink()
    text = (
        f"{tmp_path}: its header says that it has 6 images, and 5 are here: slices are missing, "
        "perhaps at an end. Copy it again"
    )
    with pytest.raises(InputError, match=says(text)):
        read_dicom(tmp_path)
    assert read_dicom(files[0])[0].shape == (1, 4, 3, 1)
    # Such a number is that of all series of an acquisition.
    for file in files[2:5]:
        file.unlink()
    assert read_dicom(tmp_path)[0].shape == (1, 4, 3, 2)


def test_slices_of_a_pet_are_counted_by_its_header(tmp_path):
    files, _ = series(tmp_path, 5, Modality="PT", NumberOfSlices=5)
    files[0].unlink()
    with pytest.raises(InputError, match="says that it has 5 slices, and 4 are here"):
        read_dicom(tmp_path)


def test_a_stack_that_is_shorter_than_another_of_its_series_is_noticed(tmp_path):
    files, _ = series(tmp_path / "0", 5, DiffusionBValue=0.0)
    others, _ = series(tmp_path / "1", 5, DiffusionBValue=900.0)
    stacks = stacks_in(*files, *others[1:])
    assert missing_of(stacks, "b=0") is None
    text = "it has 4 slices, and 'b=0' of the same series has 5"
    assert missing_of(stacks, "b=900") == text
    both = Series("1.2.3", tuple(map(str, [*files, *others[1:]])), "b=900")
    whole = f"{both}: {text}: slices are missing, perhaps at an end. Copy it again"
    with pytest.raises(InputError, match=says(whole)):
        read_dicom(both)


def test_directions_that_are_no_directions_are_refused(tmp_path):
    path = write_image(tmp_path / "x.dcm", stored()[0], ImagePositionPatient=[0.0, 0.0, 0.0],
                       ImageOrientationPatient=[1.0, 0.0, 0.0, 0.5, 0.8, 0.0])  # fmt: skip
    text = "its ImageOrientationPatient must be two directions of length 1 at right angles, got"
    with pytest.raises(InputError, match=text):
        read_dicom(path)


@pytest.mark.parametrize(
    ("tags", "spacing"),
    [
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.2, 0.3]}, (0.2, 0.3)),
        ({"PixelSpacing": [0, 0], "NominalScannedPixelSpacing": [0.1, 0.1]}, (0.1, 0.1)),
        ({"PixelSpacing": [0, 0]}, (1, 1)),
        ({}, (1, 1)),
    ],
)
def test_no_spacing_is_taken_as_zero(tmp_path, caplog, monkeypatch, tags, spacing):
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    dicom._say_no_spacing.cache_clear()
    path = write_image(tmp_path / "x.dcm", stored()[0], **tags)
    affine = read_dicom(path)[1]
    assert (affine[1, 1], affine[0, 0]) == spacing
    read_dicom(path)
    said = ["some DICOM images state no spacing between pixels: 1 mm is taken"]
    assert caplog.messages == (said if spacing == (1, 1) else [])


# Values


def test_bits_beyond_those_stored_are_an_overlay_and_left_out(tmp_path):
    array = stored() | np.uint16(0x8000)
    path = write_image(tmp_path / "x.dcm", array[0], BitsStored=12, HighBit=11)
    assert np.array_equal(read_dicom(path)[0][0, ..., 0].T, stored()[0])
    assert np.array_equal(
        SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[0], stored()[0]
    )


def test_signed_pixels_of_twelve_bits(tmp_path):
    values = np.array([[-2048, -1], [0, 2047]])
    array = (values & 0x0FFF).astype(np.uint16).view(np.int16)
    path = write_image(tmp_path / "x.dcm", array, BitsStored=12, HighBit=11)
    assert np.array_equal(read_dicom(path)[0][0, ..., 0].T, values)


def test_pixels_that_are_not_in_the_lowest_bits_are_refused(tmp_path):
    path = write_image(tmp_path / "x.dcm", stored()[0], BitsStored=12, HighBit=15)
    text = f"{path}: its HighBit must be 11, one less than its BitsStored, got 15"
    with pytest.raises(InputError, match=says(text)):
        read_dicom(path)


@pytest.mark.parametrize(
    ("name", "kind", "bits"),
    [("FloatPixelData", "OF", 32), ("DoubleFloatPixelData", "OD", 64)],
)
def test_pixels_that_are_floats(tmp_path, name, kind, bits):
    array = np.random.default_rng(0).normal(size=(3, 4)).astype(f"f{bits // 8}")
    path = write_image(tmp_path / "x.dcm", stored()[0][:, :4])
    part = pydicom.dcmread(path)
    del part.PixelData, part.BitsStored, part.HighBit, part.PixelRepresentation
    part.BitsAllocated = bits
    part.add_new(name, kind, array.tobytes())
    part.save_as(path)
    assert np.array_equal(read_dicom(path)[0][0, ..., 0].T, array.astype(np.float32))


def test_pixels_of_one_bit_whose_frames_begin_within_a_byte(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (4, 3, 5)).astype(np.uint8)
    path = write_enhanced(tmp_path / "x.dcm", bits, [at(0, 0, place) for place in range(4)])
    change(path, BitsAllocated=1, BitsStored=1, HighBit=0,
           PixelData=np.packbits(bits.ravel(), bitorder="little").tobytes())  # fmt: skip
    assert np.array_equal(read_dicom(path)[0][0].T, bits)


def test_a_modality_table_of_more_entries_than_the_pixels_have_values(tmp_path):
    path = write_image(tmp_path / "x.dcm", np.array([[0, 3], [200, 255]], np.uint8))
    part = pydicom.dcmread(path)
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [1024, 0, 16])
    table.ModalityLUTType = "US"
    table.add_new("LUTData", "OW", (np.arange(1024) * 3).astype("<u2").tobytes())
    part.ModalityLUTSequence = [table]
    part.save_as(path)
    assert read_dicom(path)[0][0, ..., 0].T.tolist() == [[0, 9], [600, 765]]


def palette(path, array, entries, descriptor, big=False):
    """Write pixels with a palette, the same for each colour plus 0, 1 and 2."""
    write_image(path, array)
    part = pydicom.dcmread(path)
    part.PhotometricInterpretation = "PALETTE COLOR"
    for place in range(3):
        part.add_new(0x00281101 + place, "US", descriptor)
        kind = entries.dtype.newbyteorder(">" if big else "<")
        part.add_new(0x00281201 + place, "OW", (entries + place).astype(kind).tobytes())
    if big:
        part.decode()
        part.PixelData = array.astype(array.dtype.newbyteorder(">")).tobytes()
        part["PixelData"].VR = "OW" if array.itemsize == 2 else "OB"
        part.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
        part.set_original_encoding(False, False)
        part.save_as(path, implicit_vr=False, little_endian=False)
    else:
        part.save_as(path)
    return path


@pytest.mark.parametrize("big", [False, True])
def test_a_palette_of_sixteen_bits_gives_pixels_of_eight_their_upper_half(tmp_path, big):
    array = np.array([[0, 1], [2, 3]], np.uint8)
    entries = np.array([0, 0x1200, 0x3400, 0xFF00], np.uint16)
    path = palette(tmp_path / "x.dcm", array, entries, [4, 0, 16], big)
    values = read_dicom(path)[0]
    reference = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    assert np.array_equal(values[..., 0].transpose(2, 1, 0), reference.reshape(2, 2, 3))
    assert values[0, ..., 0].T.tolist() == [[0, 0x12], [0x34, 0xFF]]


def test_a_palette_has_more_entries_than_a_byte_counts(tmp_path):
    array = np.array([[10, 266], [300, 5000]], np.uint16)
    entries = (np.arange(1024) * 7).astype(np.uint16)
    values = read_dicom(palette(tmp_path / "x.dcm", array, entries, [1024, 10, 16]))[0]
    assert values[..., 0].transpose(2, 1, 0)[..., 0].tolist() == [[0, 1792], [2030, 7161]]
    assert np.array_equal(values[2], values[0] + 2)


@pytest.mark.parametrize("colours", ["YBR_PARTIAL_420", "YBR_RCT", "CMYK"])
def test_colours_that_are_not_known_are_refused(tmp_path, colours):
    path = write_image(tmp_path / "x.dcm", np.zeros((2, 2, 3), np.uint8))
    change(path, PhotometricInterpretation=colours)
    text = f"{path}: its PhotometricInterpretation must be one of MONOCHROME1, .*, got '{colours}'"
    with pytest.raises(InputError, match=text):
        read_dicom(path)


def test_slices_of_which_some_are_inverted_are_refused(tmp_path):
    files, _ = series(tmp_path, 3)
    change(files[1], PhotometricInterpretation="MONOCHROME1")
    with pytest.raises(InputError, match="in some of its slices bright is dense, in others dark"):
        read_dicom(tmp_path)


def test_a_file_without_pixels_is_named(tmp_path):
    path = write_image(tmp_path / "x.dcm", stored()[0])
    part = pydicom.dcmread(path)
    del part.PixelData
    part.save_as(path)
    text = f"{path} holds no pixels: it is cut off, or they were left out"
    with pytest.raises(InputError, match=says(text)):
        read_dicom(path)


# Files that lack their beginning


def save_bare(part, path, implicit, little):
    """Write elements alone, without preamble and file meta information."""
    bare = pydicom.Dataset()
    bare.update(part)
    with path.open("wb") as stream:
        pydicom.dcmwrite(stream, bare, implicit_vr=implicit, little_endian=little)
    assert path.read_bytes()[128:132] != b"DICM"


SYNTAXES = [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
def test_a_file_without_preamble_is_read_if_it_says_that_it_holds_an_image(tmp_path, syntax):
    path = write_image(tmp_path / "x", stored(shape=(30, 20))[0])
    part = pydicom.dcmread(path)
    big = syntax == uid.ExplicitVRBigEndian
    part.PixelData = stored(shape=(30, 20))[0].astype(">u2" if big else "<u2").tobytes()
    part["PixelData"].VR = "OW"
    save_bare(part, path, syntax.is_implicit_VR, not big)
    image = read_image(path, 2)
    assert np.array_equal(image[0].numpy(), stored(shape=(30, 20))[0])
    del part.SOPClassUID
    save_bare(part, path, syntax.is_implicit_VR, not big)
    text = f"{path} has no DICOM preamble and does not say that it holds an image"
    with pytest.raises(InputError, match=says(text)):
        read_dicom(path)


def test_compressed_pixels_of_a_file_that_does_not_say_how_are_refused(tmp_path):
    path = write_image(tmp_path / "x.dcm", stored(shape=(30, 20))[0])
    part = pydicom.dcmread(path)
    part.compress(uid.RLELossless)
    save_bare(part, path, False, True)
    text = f"{path} does not say how its pixels are stored (TransferSyntaxUID)"
    with pytest.raises(InputError, match=says(text)):
        read_dicom(path)


def test_pixels_module_says_how_many_bytes_a_palette_takes(tmp_path):
    path = write_image(tmp_path / "x.dcm", stored()[0])
    part = pydicom.dcmread(path)
    assert pixels.frame_bytes(path, part) == 4 * 3 * 5
    part.PhotometricInterpretation = "PALETTE COLOR"
    assert pixels.frame_bytes(path, part) == 3 * 4 * 3 * 5
