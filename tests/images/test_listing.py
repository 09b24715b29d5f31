from pathlib import Path

import numpy as np
import pytest
from dicom_files import SAGITTAL, write_image, write_series
from pacs import item, write_object
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    EncapsulatedPDFStorage,
    GrayscaleSoftcopyPresentationStateStorage,
    KeyObjectSelectionDocumentStorage,
    MRSpectroscopyStorage,
    RTDoseStorage,
    RTPlanStorage,
    RTStructureSetStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    XRayRadiationDoseSRStorage,
)

from fedmed_flower.errors import InputError
from fedmed_flower.images.headers import open_dicom, series_of
from fedmed_flower.images.listing import read_headers
from fedmed_flower.images.series import Series

VOLUME = np.zeros((4, 3, 5), np.int16)
FLAT = np.zeros((3, 4), np.uint8)


def series_uids(found):
    return [image.series for image in found.images]


def test_what_is_no_image_is_counted_and_no_problem(tmp_path):
    write_series(tmp_path, VOLUME, series_uid="1.1", PatientName="x")
    for number, kind in enumerate(
        [
            BasicTextSRStorage,
            BasicTextSRStorage,
            XRayRadiationDoseSRStorage,
            KeyObjectSelectionDocumentStorage,
            GrayscaleSoftcopyPresentationStateStorage,
            EncapsulatedPDFStorage,
            RTPlanStorage,
            MRSpectroscopyStorage,
            "1.2.840.10008.5.1.4.39.1",  # Hanging protocol.
        ]
    ):
        write_object(tmp_path / f"other{number}", kind)
    write_image(tmp_path / "dose", FLAT, kind=RTDoseStorage)
    (tmp_path / "DICOMDIR").write_bytes((tmp_path / "dose").read_bytes())
    found = read_headers(tmp_path)
    assert series_uids(found) == ["1.1"]
    assert found.problems == ()
    assert found.notes == (
        "left out: 2 reports, 1 radiotherapy dose, 1 dose report, 1 key object, 1 presentation "
        "state, 1 encapsulated document, 1 radiotherapy plan, 1 spectrum, 1 object without pixels",
    )


def test_localizers_beside_a_volume_are_left_out(tmp_path):
    write_series(tmp_path / "ct", VOLUME, series_uid="1.1", StudyInstanceUID="2.1")
    study = {"StudyInstanceUID": "2.1"}
    write_series(tmp_path / "a", VOLUME[..., :3], series_uid="1.2", **study)
    # Three directions of three slices each are one series, as MR scanners write it.
    for number, direction in enumerate([(1, 0, 0, 0, 1, 0), SAGITTAL, (1, 0, 0, 0, 0, -1)]):
        folder = tmp_path / f"b{number}"
        write_series(folder, VOLUME[..., :3], series_uid="1.3", orientation=direction, **study)
    names = {"SeriesDescription": "Topogram 0.6", **study}
    write_series(tmp_path / "c", VOLUME, series_uid="1.4", **names)
    others = {"SeriesDescription": "Skeletal survey", "ProtocolName": "Scout", **study}
    write_series(tmp_path / "g", VOLUME, series_uid="1.8", **others)
    types = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "StudyInstanceUID": "2.2"}
    write_series(tmp_path / "d", VOLUME, series_uid="1.5", **types)
    # Nothing is beside these.
    write_series(tmp_path / "e", VOLUME[..., :1], series_uid="1.6", StudyInstanceUID="2.3")
    names |= {"StudyInstanceUID": "2.4"}
    write_series(tmp_path / "f", VOLUME, series_uid="1.7", **names)
    found = read_headers(tmp_path)
    assert series_uids(found) == ["1.1", "1.6", "1.7", "1.8"]
    assert found.notes == ("left out: 4 localizers",)
    assert found.problems == ()


def test_screens_are_left_out_and_digitised_x_rays_are_not(tmp_path):
    capture = {"kind": SecondaryCaptureImageStorage}
    write_series(tmp_path / "ct", VOLUME, series_uid="1.1", StudyInstanceUID="2.1")
    write_image(tmp_path / "a", FLAT, **capture, StudyInstanceUID="2.1")
    write_image(
        tmp_path / "b",
        FLAT,
        **capture,
        StudyInstanceUID="2.1",
        ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"],
        SeriesDescription="Dose Report",
    )
    write_image(tmp_path / "c", FLAT, **capture, StudyInstanceUID="2.2", SeriesInstanceUID="1.2")
    write_image(tmp_path / "d", FLAT, ImageType=["DERIVED", "PRIMARY", "DOSE_INFO"])
    found = read_headers(tmp_path)
    assert series_uids(found) == ["1.2", "1.1"]
    assert found.images[0].source == tmp_path / "c"
    assert found.notes == ("left out: 2 dose screens, 1 screen capture",)


def test_a_file_that_was_exported_twice_counts_once(tmp_path):
    files = write_series(tmp_path / "a", VOLUME, series_uid="1.1")
    (tmp_path / "b").mkdir()
    for file in files[:2]:
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    found = read_headers(tmp_path)
    (image,) = found.images
    assert image.source == Series("1.1", tuple(map(str, files)))
    assert found.notes == ("left out: 2 copies of files",)
    assert found.problems == ()


def test_unlike_files_of_one_identity_are_a_problem(tmp_path):
    files = write_series(tmp_path / "a", VOLUME, series_uid="1.1", SOPInstanceUID=None)
    write_series(tmp_path / "b", VOLUME, series_uid="1.2", SOPInstanceUID="3.1")
    found = read_headers(tmp_path)
    assert series_uids(found) == ["1.1"]
    assert len(files) == 5
    names = [str(tmp_path / "b" / f"IM000{number}.dcm") for number in range(1, 6)]
    assert found.problems[0] == (
        f"{names[1]} and {names[0]} have one SOPInstanceUID, but are different"
    )
    assert found.problems[-1] == f"{names[0]}: a slice may be missing, as a file cannot be used"


def test_a_damaged_file_costs_its_own_series_alone(tmp_path):
    write_series(tmp_path, VOLUME, series_uid="1.1")
    for file in write_series(tmp_path / "b", VOLUME, series_uid="1.2"):
        file.rename(tmp_path / f"b{file.name}")
    damaged = tmp_path / "bIM0003.dcm"
    content = damaged.read_bytes()
    # The position has a type that does not exist.
    damaged.write_bytes(content.replace(b"\x20\x00\x32\x00DS", b"\x20\x00\x32\x00Du"))
    found = read_headers(tmp_path)
    assert series_uids(found) == ["1.1"]
    assert found.problems[0].startswith(f"{damaged} cannot be read: ")
    assert found.problems[1:] == (
        f"{tmp_path / 'bIM0001.dcm'} and 3 more: a slice may be missing, as a file cannot be used",
    )


def test_a_damaged_file_of_another_series_costs_its_neighbours_nothing(tmp_path):
    write_series(tmp_path, VOLUME, series_uid="1.10")
    report = write_object(tmp_path / "sr.dcm", BasicTextSRStorage, SeriesInstanceUID="1.1.5")
    content = report.read_bytes()
    report.write_bytes(content.replace(b"\x10\x00\x20\x00LO", b"\x10\x00\x20\x00L?"))
    found = read_headers(tmp_path)
    assert series_uids(found) == ["1.10"]
    (problem,) = found.problems
    assert problem.startswith(f"{report} cannot be read: ")


def test_a_slice_without_a_position_costs_its_series(tmp_path):
    files = write_series(tmp_path, VOLUME, series_uid="1.1")
    without = write_image(tmp_path / "z.dcm", FLAT, SeriesInstanceUID="1.1")
    found = read_headers(tmp_path)
    assert found.images == ()
    assert found.problems == (
        f"{without}: it has no position, unlike other slices of its series",
        f"{files[0]} and 4 more: a slice may be missing, as a file cannot be used",
    )


def test_of_a_file_that_says_nothing_nobody_knows_the_series(tmp_path):
    write_series(tmp_path / "one", VOLUME, series_uid="1.1")
    write_series(tmp_path / "two", VOLUME, series_uid="1.2", patient="p2")
    for file in write_series(tmp_path / "x", VOLUME, series_uid="1.3", patient="p3"):
        file.rename(tmp_path / "two" / f"x{file.name}")
    for name in ("one/z.dcm", "two/z.dcm", "x/z.dcm"):
        (tmp_path / name).write_bytes(b"nothing")
    found = read_headers(tmp_path)
    assert series_uids(found) == ["1.2", "1.3"]
    assert set(found.problems[3:]) == {
        f"{tmp_path / 'one/IM0001.dcm'} and 4 more: a slice may be missing, as a file cannot be "
        "used",
        f"{tmp_path / 'two'}: of 1 file that cannot be used nobody can tell the series: one of the "
        "2 here may lack its first or last slice",
    }


def test_the_series_of_a_damaged_file(tmp_path):
    (file,) = write_series(tmp_path, VOLUME[..., :1], series_uid="1.2.3")
    content = file.read_bytes()
    end = content.index(b"1.2.3") + 6
    file.write_bytes(content[: end + 20])
    with pytest.raises(InputError):
        open_dicom(file)
    assert series_of(file) == "1.2.3"
    file.write_bytes(content[: end - 3])
    assert series_of(file) in ("", "1.2")
    file.write_bytes(content[: end - 20])
    assert series_of(file) == ""
    file.write_bytes(b"")
    assert series_of(file) == ""


def test_a_series_that_lacks_slices_by_its_own_header_is_a_problem(tmp_path):
    acquired = {"ImagesInAcquisition": 6, "ImageType": ["ORIGINAL", "PRIMARY"]}
    write_series(tmp_path, VOLUME, series_uid="1.1", **acquired)
    found = read_headers(tmp_path)
    assert found.images == ()
    assert found.problems == (
        f"{tmp_path / 'IM0001.dcm'} and 4 more: its header says that it has 6 images, and 5 are "
        "here",
    )


def test_the_stacks_of_a_series_are_images(tmp_path):
    for b in (0, 1000):
        write_series(
            tmp_path / str(b),
            VOLUME,
            series_uid="1.1",
            Modality="MR",
            DiffusionBValue=float(b),
            SeriesNumber=7,
        )
    found = read_headers(tmp_path)
    assert [str(image) for image in found.images] == [
        'MR "" (number=7 part=b=0 orientation=axial slices=5)',
        'MR "" (number=7 part=b=1000 orientation=axial slices=5)',
    ]
    assert {str(Path(file).parent) for file in found.images[1].source.files} == {
        str(tmp_path / "1000")
    }
    assert found.images[1].source.part == "b=1000"


def test_what_is_known_of_an_image(tmp_path):
    write_series(
        tmp_path,
        VOLUME,
        series_uid="1.1",
        orientation=SAGITTAL,
        StudyInstanceUID="2.1",
        FrameOfReferenceUID="3.1",
        Modality="CT",
        SeriesDescription=" Thorax ",
        ProtocolName="Routine",
        ConvolutionKernel=["I30f", "2"],
        SeriesNumber="4",
    )
    (image,) = read_headers(tmp_path).images
    known = (image.study, image.frame, image.protocol, image.kernel, image.number, image.slices)
    assert known == ("2.1", "3.1", "Routine", "I30f\\2", 4, 5)
    assert str(image) == 'CT "Thorax" (number=4 orientation=sagittal slices=5)'


def test_masks_name_the_series_on_which_they_were_drawn(tmp_path):
    reference = item(SeriesInstanceUID="1.1")
    segments = [item(SegmentLabel="Liver"), item(SegmentLabel="Tumour")]
    seg = write_object(
        tmp_path / "seg",
        SegmentationStorage,
        ReferencedSeriesSequence=[reference],
        SegmentSequence=segments,
    )
    (tmp_path / "copy").write_bytes(seg.read_bytes())
    study = item(RTReferencedSeriesSequence=[reference, item(SeriesInstanceUID="1.2")])
    frame = item(RTReferencedStudySequence=[study])
    write_object(
        tmp_path / "rt",
        RTStructureSetStorage,
        ReferencedFrameOfReferenceSequence=[frame],
        StructureSetROISequence=[item(ROIName="GTV")],
    )
    lonely = write_object(tmp_path / "z", RTStructureSetStorage)
    found = read_headers(tmp_path)
    assert [(mask.kind, mask.series, mask.structures) for mask in found.masks] == [
        ("SEG", ("1.1",), ("Liver", "Tumour")),
        ("RTSTRUCT", ("1.1", "1.2"), ("GTV",)),
    ]
    assert found.notes == ("left out: 1 copy of a file",)
    assert found.problems == (f"{lonely}: this RTSTRUCT names no series on which it was drawn",)


def test_an_image_that_is_cut_off_is_no_other_object(tmp_path):
    file = write_object(tmp_path / "a", CTImageStorage)
    assert read_headers(tmp_path).problems == (
        f"{file} holds no image: it is cut off, or a document",
    )
