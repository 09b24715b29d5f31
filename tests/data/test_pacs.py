"""Exports of PACS, as hospitals have them, become the right rows: image, mask, label."""

import csv

import numpy as np
import pacs
import pytest
from dicom_files import STUDY, write_highdicom, write_image, write_series
from pacs import item, write_object
from pydicom.uid import RTStructureSetStorage, SegmentationStorage, generate_uid
from tiny import says

from fedmed_flower.data.datalist import read_folder
from fedmed_flower.errors import InputError
from fedmed_flower.images.reading import read_image, read_label
from fedmed_flower.images.series import Series

VOLUME = np.zeros((4, 3, 5), np.int16)
DRAWN = {
    "compressed": pacs.compressed_ct,
    "enhanced-ct": lambda folder, patient: pacs.enhanced(folder, patient, "CT"),
    "enhanced-mr": lambda folder, patient: pacs.enhanced(folder, patient, "MR"),
    "two-series": pacs.thick_and_thin,
}


@pytest.fixture(scope="module", params=["nested", "flat"])
def drawn(request, tmp_path_factory):
    """A hospital whose patients have a mask each: its listing, and what must become of it."""
    folder = tmp_path_factory.mktemp(request.param)
    expected = {name: write(folder / name, name) for name, write in DRAWN.items()}
    if request.param == "flat":
        pacs.flatten(folder)
    return read_folder(folder), expected


def row_of(listing, patient):
    (row,) = [row for row in listing.rows if row["patient"] == patient]
    return row


def test_each_patient_has_the_series_on_which_the_mask_was_drawn(drawn):
    listing, expected = drawn
    assert listing.problems == ()
    assert {row["patient"]: row["image"].uid for row in listing.rows} == {
        name: one.series for name, one in expected.items()
    }
    assert all(isinstance(row["label"], str) for row in listing.rows)
    assert set(listing.notes[0].removeprefix("left out: ").split(", ")) == {
        "1 report",
        "1 dose screen",
        "1 localizer",
    }
    assert listing.notes[2:] == ("left out: 1 image without a SEG or RTSTRUCT",)


@pytest.mark.parametrize("patient", DRAWN)
def test_their_voxels_are_those_that_were_written(drawn, patient):
    listing, expected = drawn
    image = read_image(row_of(listing, patient)["image"], 3)
    np.testing.assert_array_equal(image[0].numpy(), expected[patient].voxels)


@pytest.mark.parametrize("patient", DRAWN)
def test_their_masks_are_those_that_were_drawn(drawn, patient):
    listing, expected = drawn
    row = row_of(listing, patient)
    mask = read_label(row["label"], 3, 2, image=read_image(row["image"], 3), names=("tumour",))
    np.testing.assert_array_equal(mask[0].numpy(), expected[patient].mask)


def write_labels(folder, labels):
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("patient", "label"), *labels.items()])


def test_the_stacks_of_a_series_are_chosen_by_a_rule(tmp_path):
    expected = pacs.cine(tmp_path / "heart", "p1")
    write_labels(tmp_path, {"p1": 1})
    listing = read_folder(tmp_path)
    assert [row["image"].part for row in listing.rows] == ["phase 1", "phase 2", "phase 3"]
    assert listing.notes == (
        "1 patient has several images, and each is a row of its own. To choose among them, or to "
        "make them channels, give rules by series in the run config or in series.csv. One patient "
        'has MR "cine SA" (number=2 part=phase 1 orientation=axial slices=8), MR "cine SA" '
        '(number=2 part=phase 2 orientation=axial slices=8), MR "cine SA" (number=2 part=phase 3 '
        "orientation=axial slices=8)",
    )
    chosen = read_folder(tmp_path, 'part="phase 2"')
    (row,) = chosen.rows
    assert (row["image"].uid, row["image"].part) == (expected.series, expected.part)
    assert (row["label"], chosen.notes) == (1, ())
    np.testing.assert_array_equal(read_image(row["image"], 3)[0].numpy(), expected.voxels)


def test_rules_make_channels_on_one_grid(tmp_path):
    expected = pacs.diffusion(tmp_path / "prostate", "p1")
    rules = "description=*t2*; description=*diff* part=b=1000"
    listing = read_folder(tmp_path, rules)
    (row,) = listing.rows
    assert [source.part for source in row["image"]] == ["", "b=1000"]
    assert row["image"][1].uid == expected.series
    assert listing.problems == listing.notes == ()
    image = read_image(row["image"], 3)
    assert image.shape == (2, 8, 6, 5)
    assert image[1].min() >= expected.voxels.min()
    # The hospital's own table comes before the rules of the run.
    (tmp_path / "series.csv").write_text("description,part\n*DIFF*,b=1000\n")
    (row,) = read_folder(tmp_path, rules).rows
    np.testing.assert_array_equal(read_image(row["image"], 3)[0].numpy(), expected.voxels)


def test_a_mask_of_another_tool_is_named_by_a_table(tmp_path):
    expected = pacs.drawn_elsewhere(tmp_path / "x", "p1")
    write_labels(tmp_path, {"p1": "x/mask.nii.gz"})
    (row,) = read_folder(tmp_path).rows
    assert row["image"].uid == expected.series
    assert row["label"] == str(tmp_path / "x/mask.nii.gz")


def test_a_mask_of_another_tool_is_brought_to_its_image(tmp_path):
    expected = pacs.drawn_elsewhere(tmp_path / "x", "p1")
    image = read_image(tmp_path / "x/ct", 3)
    mask = read_label(tmp_path / "x/mask.nii.gz", 3, 2, image=image)
    np.testing.assert_array_equal(mask[0].numpy(), expected.mask)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_files_of_other_tools_are_listed_in_a_table(tmp_path, ending):
    expected = pacs.by_another_tool(tmp_path / "x", "p1", ending)
    table = f"image,label,patient\nx/image{ending},x/mask{ending},p1\n"
    (tmp_path / "datalist.csv").write_text(table)
    (row,) = read_folder(tmp_path).rows
    image = read_image(row["image"], 3)
    np.testing.assert_array_equal(image[0].numpy(), expected.voxels)
    mask = read_label(row["label"], 3, 2, image=image)
    np.testing.assert_array_equal(mask[0].numpy(), expected.mask)


# Rules


def write_two(folder, patient, **tags):
    """Write two series of a patient's study, thin and thick."""
    for number, (name, slices) in enumerate({"thin": 5, "thick": 4}.items(), start=1):
        write_series(
            folder / f"{patient}-{tags.get('StudyInstanceUID', '')}-{name}",
            VOLUME[..., :slices],
            patient=patient,
            series_uid=f"1.{generate_uid()[-20:].lstrip('0')}",
            Modality="CT",
            SeriesDescription=name,
            SeriesNumber=number,
            **tags,
        )


def test_a_patient_for_whom_a_rule_fails_is_a_problem(tmp_path):
    write_two(tmp_path, "p1")
    write_two(tmp_path, "p2")
    write_series(tmp_path / "more", VOLUME, patient="p2", SeriesDescription="thin", SeriesNumber=3)
    write_series(tmp_path / "other", VOLUME, patient="p3", Modality="MR", SeriesDescription="t1")
    listing = read_folder(tmp_path, "description=thin")
    assert [row["patient"] for row in listing.rows] == ["p1"]
    assert set(listing.problems) == {
        'patient p2: 2 series match description=thin: ? "thin" (number=3 orientation=axial '
        'slices=5), CT "thin" (number=1 orientation=axial slices=5); add a condition that only one '
        "of them satisfies, such as number, slices, part or description",
        'patient p3: no series matches description=thin; there is MR "t1" (orientation=axial '
        "slices=5)",
    }
    assert listing.notes == ("left out: 5 series that the rules do not take",)


def test_rules_hold_in_each_study_of_a_patient(tmp_path):
    write_two(tmp_path, "p1", StudyInstanceUID="2.1")
    write_two(tmp_path, "p1", StudyInstanceUID="2.2")
    write_image(tmp_path / "x", np.zeros((3, 4), np.uint8), "p1", StudyInstanceUID="2.3")
    (tmp_path / "labels.csv").write_text("study,label\n2.1,0\n2.2,1\n2.9,1\n")
    listing = read_folder(tmp_path, "description=thin")
    assert [row["label"] for row in listing.rows] == [0, 1]
    assert listing.problems == ("labels.csv, line 4: there is no image of study 2.9",)
    assert listing.notes == (
        "left out: 1 further study in which no series matches",
        "left out: 3 series that the rules do not take",
    )


def test_channels_in_different_frames_of_reference_are_a_problem(tmp_path):
    for number in (1, 2):
        write_series(
            tmp_path / str(number),
            VOLUME,
            SeriesNumber=number,
            FrameOfReferenceUID=f"3.{number}",
        )
    text = (
        f"{tmp_path} (DICOM) holds no row that can be used: patient p1: the series "
        '? "" (number=1 orientation=axial slices=5), ? "" (number=2 orientation=axial slices=5) '
        "have different FrameOfReferenceUID: their positions cannot be compared. Register them, "
        "and list the results in a datalist.csv (the first of 1 problems)"
    )
    with pytest.raises(InputError, match=says(text)):
        read_folder(tmp_path, "number=1; number=2")


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("description,part\n", "{}/series.csv holds no rule: it needs a line for each channel"),
        ("description,part\n*t2*\n", "{}/series.csv, line 2: it has 1 cells, the heading 2"),
        (
            "device\nx\n",
            "series.csv, line 2: 'device' is no column of rules; they are modality, description, "
            "protocol, orientation, slices, part, number, kernel",
        ),
    ],
)
def test_a_table_of_rules_that_cannot_be_read(tmp_path, table, text):
    write_series(tmp_path, VOLUME)
    (tmp_path / "series.csv").write_text(table)
    with pytest.raises(InputError, match=says(text.format(tmp_path))):
        read_folder(tmp_path)


# Masks


def write_mask(path, series, kind=SegmentationStorage, structures=("tumour",)):
    reference = item(SeriesInstanceUID=series)
    if kind == SegmentationStorage:
        segments = [item(SegmentLabel=name) for name in structures]
        tags = {"ReferencedSeriesSequence": [reference], "SegmentSequence": segments}
    else:
        study = item(RTReferencedSeriesSequence=[reference])
        tags = {
            "ReferencedFrameOfReferenceSequence": [item(RTReferencedStudySequence=[study])],
            "StructureSetROISequence": [item(ROIName=name) for name in structures],
        }
    return str(write_object(path, kind, **tags))


def test_several_masks_of_a_series(tmp_path):
    for number in range(1, 5):
        write_series(tmp_path / str(number), VOLUME, patient=f"p{number}", series_uid=f"1.{number}")
    parts = [
        write_mask(tmp_path / "a1", "1.1", structures=["liver"]),
        write_mask(tmp_path / "a2", "1.1", structures=["tumour"]),
    ]
    same = [write_mask(tmp_path / name, "1.2") for name in ("b1", "b2")]
    mixed = [
        write_mask(tmp_path / "c1", "1.3", structures=["liver"]),
        write_mask(tmp_path / "c2", "1.3", RTStructureSetStorage),
    ]
    lost = write_mask(tmp_path / "d", "1.9", RTStructureSetStorage)
    listing = read_folder(tmp_path)
    assert [(row["image"].uid, row["label"]) for row in listing.rows] == [("1.1", parts)]
    why = "and only SEGs with different structures are parts of one: leave one of them here, or "
    why += "name it in labels.csv"
    assert set(listing.problems) == {
        f"{tmp_path / '2/IM0001.dcm'} and 4 more: several masks were drawn on it "
        f"({', '.join(same)}), {why}",
        f"{tmp_path / '3/IM0001.dcm'} and 4 more: several masks were drawn on it "
        f"({', '.join(mixed)}), {why}",
        f"{lost}: no series on which this RTSTRUCT was drawn is here",
    }
    assert listing.notes == ("left out: 1 image without a SEG or RTSTRUCT",)


def test_a_mask_on_a_later_channel_is_the_label(tmp_path):
    for number in (1, 2):
        write_series(tmp_path / str(number), VOLUME, series_uid=f"1.{number}", SeriesNumber=number)
    mask = write_mask(tmp_path / "m", "1.2")
    (row,) = read_folder(tmp_path, "number=1; number=2").rows
    assert (row["label"], len(row["image"])) == (mask, 2)
    assert isinstance(row["image"][1], Series)


def test_columns_of_labels_are_the_findings_of_x_rays(tmp_path):
    for number in (1, 2, 3):
        pixels = np.full((4, 5), number, np.uint8)
        write_image(tmp_path / f"chest-{number}", pixels, f"p{number}")
    (tmp_path / "labels.csv").write_text("patient,Edema,mass,split\np1,1,0,train\np2,,1,test\n")
    listing = read_folder(tmp_path, labels=("edema", "mass"))
    rows = {row["patient"]: row for row in listing.rows}
    assert {name: row["label"] for name, row in rows.items()} == {
        "p1": {"edema": 1, "mass": 0},
        "p2": {"edema": None, "mass": 1},
    }
    assert [rows[name]["split"] for name in ("p1", "p2")] == ["train", "test"]
    (problem,) = listing.problems
    assert problem.endswith("chest-3: labels.csv does not name it")


def test_findings_are_not_read_from_masks(tmp_path):
    files = write_series(tmp_path / "scan", np.zeros((4, 3, 2)), **STUDY)
    write_highdicom(tmp_path / "seg", files, np.ones((2, 3, 4, 1), bool), ["liver"])
    (row,) = read_folder(tmp_path, labels=("edema",)).rows
    assert "label" not in row
    (row,) = read_folder(tmp_path).rows
    assert str(row["label"]).endswith("seg")
