import json

import nibabel
import numpy as np
import pytest
from PIL import Image
from tiny import says

from fedmed_flower.data.datalist import load_folder, read_folder
from fedmed_flower.data.folders import check_folder
from fedmed_flower.errors import InputError

CHANNELS = {"0": "T1", "1": "T2"}
LABELS = {"background": 0, "liver": 1, "tumour": 2}


def save(path, values):
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


@pytest.fixture
def folder(tmp_path):
    """Three cases of two channels, as nnU-Net has them."""
    rng = np.random.default_rng(0)
    for case in ("liver_002", "liver_010", "Ana_0001"):
        for channel in CHANNELS:
            values = rng.normal(size=(4, 3, 2)).astype(np.float32)
            save(tmp_path / f"imagesTr/{case}_000{channel}.nii.gz", values)
        save(
            tmp_path / f"labelsTr/{case}.nii.gz", np.arange(24, dtype=np.uint8).reshape(4, 3, 2) % 3
        )
    describe(tmp_path)
    return tmp_path


def describe(folder, **change):
    content = {
        "channel_names": CHANNELS,
        "labels": LABELS,
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    content |= change
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(content))


def test_a_case_is_a_row_with_its_channels_and_its_mask(folder, caplog):
    listing = read_folder(folder)
    assert listing.rows[1] == {
        "image": [str(folder / f"imagesTr/liver_002_000{k}.nii.gz") for k in CHANNELS],
        "label": str(folder / "labelsTr/liver_002.nii.gz"),
        "patient": "liver_002",
    }
    assert [row["patient"] for row in listing.rows] == ["Ana_0001", "liver_002", "liver_010"]
    assert (listing.class_names, listing.problems) == (("liver", "tumour"), ())
    assert "3 entries name no patient and count as one patient each" in caplog.text
    findings = check_folder(folder)
    assert [(one.shape, one.label, one.problem) for one in findings] == [
        ((2, 4, 3, 2), (0, 1, 2), None)
    ] * 3


def test_one_channel_is_one_file(folder):
    describe(folder, channel_names={"0": "CT"})
    for file in (folder / "imagesTr").glob("*_0001.nii.gz"):
        file.unlink()
    listing = read_folder(folder)
    assert listing.rows[2]["image"] == str(folder / "imagesTr/liver_010_0000.nii.gz")
    assert listing.problems == ()


def test_what_a_case_lacks_is_named(folder):
    (folder / "imagesTr/liver_002_0001.nii.gz").unlink()
    (folder / "labelsTr/liver_010.nii.gz").unlink()
    save(folder / "labelsTr/more.nii.gz", np.zeros((4, 3, 2), np.uint8))
    listing = read_folder(folder)
    assert [row["patient"] for row in listing.rows] == ["Ana_0001"]
    assert listing.problems == (
        "dataset.json, case liver_002: imagesTr/liver_002_0001.nii.gz is not there",
        "dataset.json, case liver_010: labelsTr/liver_010.nii.gz is not there",
        "dataset.json, case more: imagesTr/more_0000.nii.gz, imagesTr/more_0001.nii.gz is not "
        "there",
        'dataset.json: "numTraining" says 3, and there are 4 cases',
    )


def test_a_file_that_is_no_channel_is_named(folder):
    for name in ("liver_002_0002.nii.gz", "scan.nii.gz"):
        save(folder / "imagesTr" / name, np.zeros((4, 3, 2), np.uint8))
    (folder / "imagesTr/.hidden_0000.nii.gz").touch()
    (folder / "imagesTr/notes.txt").touch()
    listing = read_folder(folder)
    assert len(listing.rows) == 3
    assert listing.problems == tuple(
        f"dataset.json: imagesTr/{name} is no channel of a case: those are called "
        "CASE_0000.nii.gz, up to 0001"
        for name in ("liver_002_0002.nii.gz", "scan.nii.gz")
    )


def test_the_channels_of_a_colour_picture_are_one_file(tmp_path):
    for place in ("imagesTr", "labelsTr"):
        (tmp_path / place).mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "imagesTr/a_0000.png")
    Image.fromarray((colours[..., 0] > 99).astype(np.uint8)).save(tmp_path / "labelsTr/a.png")
    names = {"0": "R", "1": "G", "2": "B"}
    labels = {"background": 0, "road": 1}
    describe(tmp_path, channel_names=names, labels=labels, file_ending=".png", numTraining=1)
    (finding,) = check_folder(tmp_path)
    assert (finding.shape, finding.label, finding.problem) == ((3, 4, 5), (0, 1), None)


BRATS = {"background": 0, "whole tumour": [1, 2], "core": 2}


def test_regions_are_read_with_their_values(folder):
    describe(folder, labels=BRATS, regions_class_order=[1, 2])
    listing = read_folder(folder)
    assert (len(listing.rows), listing.class_names, listing.problems) == (3, (), ())
    assert listing.regions == {"whole tumour": (1, 2), "core": (2,)}
    assert load_folder(folder, 0).regions == listing.regions
    findings = check_folder(folder)
    assert [(one.label, one.problem) for one in findings] == [((0, 1, 2), None)] * 3
    # nnU-Net takes them without the background, too.
    describe(folder, labels={"core": [2], "whole tumour": [1, 2]})
    assert [*read_folder(folder).regions] == ["core", "whole tumour"]


def test_a_value_of_no_region_is_rejected_and_ignored_ones_are_named(folder):
    save(folder / "labelsTr/liver_002.nii.gz", np.full((4, 3, 2), 3, np.uint8))
    describe(folder, labels=BRATS | {"ignore": 3}, regions_class_order=[1, 2])
    findings = check_folder(folder)
    assert [one.problem for one in findings if one.problem] == [
        f"its mask {folder}/labelsTr/liver_002.nii.gz: it holds the values 3, which are not "
        "classes: a mask holds 0, 1, 2 (regions: whole tumour of 1, 2; core of 2)",
        'dataset.json: "labels" has values to "ignore", which cannot be left out of training and '
        "figures: masks that hold them are rejected",
    ]


@pytest.mark.parametrize(
    ("labels", "order", "text"),
    [
        (
            {"whole": [1, "2"]},
            [1],
            'region "whole" of "labels" must hold whole numbers from 1 on, each once, got '
            "[1, '2']",
        ),
        (
            {"whole": []},
            [1],
            'region "whole" of "labels" must hold whole numbers from 1 on, each once, got []',
        ),
        (
            {"whole": [0, 1]},
            [1],
            'region "whole" of "labels" must hold whole numbers from 1 on, each once, got [0, 1]',
        ),
        (
            {"whole": [1, 2], "core": True},
            [1, 2],
            'region "core" of "labels" must hold whole numbers from 1 on, each once, got True',
        ),
        (
            {"background": [1], "whole": [1, 2]},
            [1],
            '"background" must be 0, got [1]',
        ),
        (
            {"whole": [1, 2], "Whole ": 2},
            [1, 2],
            'regions of "labels" must differ by more than case, blanks, "_" and "-", got whole, '
            "Whole ",
        ),
        (
            {"whole": [1, 2], "core": 2},
            [2, 1],
            '"regions_class_order" must name a value of each region in their order, whole of 1, '
            "2; core of 2, got [2, 1]",
        ),
        (
            {"whole": [1, 2], "core": 2},
            [1],
            '"regions_class_order" must name a value of each region in their order, whole of 1, '
            "2; core of 2, got [1]",
        ),
    ],
)
def test_regions_that_nnunet_would_not_take(folder, labels, order, text):
    describe(folder, labels=labels, regions_class_order=order)
    with pytest.raises(InputError, match=says(f"{folder}/dataset.json: {text}")):
        read_folder(folder)


def test_a_class_that_nnunet_ignores_is_told_as_not_ignored(folder):
    describe(folder, labels=LABELS | {"ignore": 3})
    listing = read_folder(folder)
    assert listing.class_names == ("liver", "tumour", "ignore")
    assert listing.problems == (
        'dataset.json: "labels" has a class "ignore", which is not left out of training and '
        "figures: it counts as any other class",
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"file_ending": None},
            '"file_ending" must be one as ".nii.gz", as in nnU-Net, got None',
        ),
        (
            {"file_ending": "/../x"},
            '"file_ending" must be one as ".nii.gz", as in nnU-Net, got \'/../x\'',
        ),
        (
            {"channel_names": {"1": "CT"}},
            '"channel_names" must number the channels "0", "1", ..., as in nnU-Net, got '
            "{'1': 'CT'}",
        ),
        (
            {"channel_names": {}},
            '"channel_names" must number the channels "0", "1", ..., as in nnU-Net, got {}',
        ),
        (
            {"channel_names": ["CT"]},
            '"channel_names" must number the channels "0", "1", ..., as in nnU-Net, got [\'CT\']',
        ),
    ],
)
def test_a_description_that_is_not_nnunets_is_refused(folder, change, text):
    describe(folder, **change)
    with pytest.raises(InputError, match=says(f"{folder}/dataset.json: {text}")):
        read_folder(folder)


def test_a_folder_that_is_not_there_or_leads_out_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (folder / "labelsTr").rename(outside / "labelsTr")
    text = f"{folder}/dataset.json: the folder labelsTr is not there, which nnU-Net has beside it"
    with pytest.raises(InputError, match=says(text)):
        read_folder(folder)
    (folder / "labelsTr").symlink_to(outside / "labelsTr")
    text = f"{folder}/labelsTr is a link out of the folder: copy its target into the folder"
    with pytest.raises(InputError, match=says(text)):
        read_folder(folder)


def test_a_file_that_leads_out_is_no_row(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.nii.gz"
    file = folder / "imagesTr/liver_002_0001.nii.gz"
    file.rename(outside)
    file.symlink_to(outside)
    listing = read_folder(folder)
    assert [row["patient"] for row in listing.rows] == ["Ana_0001", "liver_010"]
    assert listing.problems == (
        "dataset.json, case liver_002: imagesTr/liver_002_0001.nii.gz is a link out of the folder: "
        "copy its target into the folder",
    )
