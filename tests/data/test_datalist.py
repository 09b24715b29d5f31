import json
import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import write_image, write_series
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from tiny import says

from fedmed_flower.data.datalist import Listing, load_folder, read_folder, split_patients
from fedmed_flower.errors import InputError
from fedmed_flower.images.reading import read_image
from fedmed_flower.images.series import Series

VOLUME = np.zeros((4, 3, 2), np.int16)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_json(folder, training, **more):
    (folder / "dataset.json").write_text(json.dumps({"training": training, **more}))


def write_table(folder, text, name="datalist.csv", **how):
    (folder / name).write_text(text, **how)


def in_folder(folder, row):
    """Return a row with its paths relative to the folder; a series is the folder of its files."""
    texts = {name: place(value) for name, value in row.items()}
    return {
        name: text.replace(f"{folder}/", "") if isinstance(text, str) else text
        for name, text in texts.items()
    }


def place(value):
    """Return the folders of a series as one text; any other value as it is."""
    if not isinstance(value, Series):
        return value
    return "; ".join(sorted({str(Path(file).parent) for file in value.files}))


def image_folders(listing):
    return [Path(place(row["image"])).name for row in listing.rows]


# dataset.json


def test_the_decathlons_dataset(tmp_path):
    touch(tmp_path, "imagesTr/la_003.nii.gz", "imagesTr/a.1.nii", "labelsTr/la_003.nii.gz")
    training = [
        {"image": "./imagesTr/la_003.nii.gz", "label": "./labelsTr/la_003.nii.gz"},
        {"image": "imagesTr/a.1.nii", "label": 1, "patient": 7, "split": "test"},
    ]
    labels = {"0": "background", "2": "tumour", "1": "liver"}
    write_json(tmp_path, training, labels=labels, test=["./imagesTs/la_001.nii.gz"], name="Liver")
    touch(tmp_path, "other.csv")
    assert read_folder(tmp_path) == Listing(
        (
            {
                "image": str(tmp_path / "imagesTr/la_003.nii.gz"),
                "patient": "la_003",
                "label": str(tmp_path / "labelsTr/la_003.nii.gz"),
            },
            {
                "image": str(tmp_path / "imagesTr/a.1.nii"),
                "patient": "7",
                "label": 1,
                "split": "test",
            },
        ),
        "dataset.json",
        ("liver", "tumour"),
        (),
    )


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"background": 0, "liver": 1, "tumour": 2}, ("liver", "tumour")),
        ({"0": "normal", "1": "pneumonia"}, ("pneumonia",)),
        ({"1": "liver"}, ("liver",)),
        ({}, ()),
    ],
)
def test_names_of_classes(tmp_path, labels, names):
    touch(tmp_path, "a.nii")
    write_json(tmp_path, [{"image": "a.nii", "label": 0}], labels=labels)
    listing = read_folder(tmp_path)
    assert listing.class_names == names
    assert listing.problems == ()


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "background", "2": "liver"},
        {"background": 0, "liver": 1, "spleen": 1},
        {"background": 0, "whole": [1, 2]},
        {"liver": -1},
        {"liver": True},
        {"0": "background", "9" * 5000: "liver"},
        ["background", "liver"],
        True,
    ],
)
def test_classes_that_are_not_numbered_are_a_problem(tmp_path, labels):
    touch(tmp_path, "a.nii")
    write_json(tmp_path, [{"image": "a.nii", "label": 0}], labels=labels)
    listing = read_folder(tmp_path)
    text = 'dataset.json: "labels" must number the classes 0, 1, 2, ... once each'
    assert (listing.class_names, listing.problems) == ((), (text,))


def test_several_files_of_an_entry_are_channels(tmp_path):
    touch(tmp_path, "p1_t1.nii.gz", "p1_t2.nii.gz")
    write_json(tmp_path, [{"image": ["p1_t1.nii.gz", "p1_t2.nii.gz"], "label": 0}])
    (row,) = read_folder(tmp_path).rows
    assert row["image"] == [str(tmp_path / "p1_t1.nii.gz"), str(tmp_path / "p1_t2.nii.gz")]
    assert row["patient"] == "p1_t1"


def test_entries_that_cannot_be_used_are_named(tmp_path):
    touch(tmp_path, "a.nii", "b.nii", "c.nii")
    entries = {
        "it must be an object with image and label": "a.nii",
        "it has no image": {"label": 0},
        "it has no label": {"image": "b.nii", "label": None},
        "missing.nii is not there": {"image": "missing.nii", "label": 0},
        "../a.nii leaves the folder: paths must be relative to it": {
            "image": "../a.nii",
            "label": 0,
        },
        "/a.nii leaves the folder: paths must be relative to it": {"image": "/a.nii", "label": 0},
        r"C:\a.nii leaves the folder: paths must be relative to it": {
            "image": r"C:\a.nii",
            "label": 0,
        },
        f"{'a' * 200} is not there": {"image": "a" * 400, "label": 0},
        "True is not a path": {"image": "b.nii", "label": True},
        "0.5 is not a path": {"image": "b.nii", "label": [0.5]},
        "its split 'training' is not one of train, val, test": {
            "image": "b.nii",
            "label": 0,
            "split": "training",
        },
        "a patient must be a text, got ['p']": {"image": "b.nii", "label": 0, "patient": ["p"]},
        "its image was named before, in dataset.json, training entry 1": {
            "image": "./c.nii",
            "label": 1,
        },
    }
    write_json(tmp_path, [{"image": "c.nii", "label": 0}, *entries.values()])
    listing = read_folder(tmp_path)
    assert [row["patient"] for row in listing.rows] == ["c"]
    assert sorted(listing.problems) == sorted(
        f"dataset.json, training entry {number}: {text}"
        for number, text in enumerate(entries, start=2)
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "{} is not JSON: Expecting property name enclosed in double quotes"),
        ("[]", '{} must hold a list "training" of entries with image and label'),
        ('{"numTraining": 3}', '{} must hold a list "training" of entries with image and label'),
        ("[" * 100_000, "{} is not JSON: "),
    ],
)
def test_a_dataset_that_cannot_be_read(tmp_path, content, text):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(InputError) as caught:
        read_folder(tmp_path)
    assert str(caught.value).startswith(text.replace("{}", f"{tmp_path / 'dataset.json'}", 1))


# CSV


TABLE = "image,label,patient,split\na.png,0,p1,train\nb.png,masks/b.png,p2,val\n"
ROWS = [
    {"image": "a.png", "patient": "p1", "label": 0, "split": "train"},
    {"image": "b.png", "patient": "p2", "label": "masks/b.png", "split": "val"},
]


@pytest.mark.parametrize(
    ("text", "how"),
    [
        (TABLE, {}),
        (TABLE, {"encoding": "utf-8-sig"}),
        (TABLE.replace(",", ";"), {}),
        (TABLE.replace(",", "\t"), {}),
        (TABLE.replace("\n", "\r\n"), {"newline": ""}),
        ("\n,,,\n" + TABLE.replace("\n", "\n\n") + ",,,\n", {}),
        (TABLE.replace("image", '" Image "').replace("b.png,p2", "b.png , p2 "), {}),
        (TABLE.replace("masks/b.png", r"masks\b.png").replace(",0,", ",0.0,"), {}),
    ],
    ids=["plain", "mark", "semicolons", "tabs", "windows", "blank", "spaced", "written elsewhere"],
)
def test_a_table_however_it_was_saved(tmp_path, text, how):
    touch(tmp_path, "a.png", "b.png", "masks/b.png", "labels.txt")
    write_table(tmp_path, text, "images.csv", **how)
    listing = read_folder(str(tmp_path))
    assert [in_folder(tmp_path, row) for row in listing.rows] == ROWS
    assert (listing.layout, listing.class_names, listing.problems) == ("images.csv", (), ())


def test_several_paths_of_a_cell_are_channels(tmp_path):
    touch(tmp_path, "a.nii", "b.nii")
    write_table(tmp_path, 'image;label;patient\n"a.nii; b.nii";1;p1\n')
    (row,) = read_folder(tmp_path).rows
    assert row["image"] == [str(tmp_path / "a.nii"), str(tmp_path / "b.nii")]


def test_lines_that_cannot_be_used_are_named(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    lines = {
        "": "a.png,0,p1,train",
        "it has no image": ",0,p1,train",
        "it has no label": "b.png, ,p1,train",
        "it has no patient": "b.png,0,NaN,train",
        "it has 5 cells, the heading 4": "a.png,b.png,0,p1,train",
        "c.png is not there": "a.png;c.png,0,p1,train",
        "m.png is not there": "b.png,m.png,p1,train",
        "its split 'Valid' is not one of train, val, test": "b.png,0,p1,Valid",
        "a/../b.png leaves the folder: paths must be relative to it": "a/../b.png,0,p1,train",
        "~/b.png is not there": "~/b.png,0,p1,train",
        "its image was named before, in datalist.csv, line 2": "a.png,0,p3,test",
    }
    write_table(tmp_path, "\n".join(["image,label,patient,split", *lines.values()]))
    listing = read_folder(tmp_path)
    assert [row["patient"] for row in listing.rows] == ["p1"]
    expected = {
        f"datalist.csv, line {number}: {text}" for number, text in enumerate(lines, start=2) if text
    }
    assert set(listing.problems) == expected
    assert len(listing.problems) == len(expected)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "{} is empty: it needs the columns image, label, patient"),
        (
            b"image,class,patient\n",
            "{} must have one column 'label', got 0: its columns are image, class, patient; "
            "if findings are columns, name them: fedmed data check --findings NAMES",
        ),
        (
            b"patient,age,stroke\n",
            "{} must have one column 'image', got 0: its columns are patient, age, stroke; if it "
            "lists no images, name the app that reads it: fedmed data check --app APP",
        ),
        (
            b"image,label,Label,patient\n",
            "{} must have one column 'label', got 2: its columns are image, label, label, patient",
        ),
        (
            "image,label,patient\na.png,0,Müller\n".encode("latin-1"),
            "{} is not in UTF-8 (invalid start byte): save it in UTF-8",
        ),
        (b'image,label,patient\n"a.png,0,p1\n', "{}, line 2: unexpected end of data"),
    ],
)
def test_a_table_that_cannot_be_read(tmp_path, content, text):
    (tmp_path / "datalist.csv").write_bytes(content)
    with pytest.raises(InputError, match=says(text.format(tmp_path / "datalist.csv"))):
        read_folder(tmp_path)


def test_one_of_several_tables_must_be_called_datalist(tmp_path):
    touch(tmp_path, "a.png", "b.csv", ".hidden.csv")
    write_table(tmp_path, "image,label,patient\na.png,0,p1\n", "a.csv")
    text = f"{tmp_path} holds several tables (a.csv, b.csv): call one datalist.csv"
    with pytest.raises(InputError, match=says(text)):
        read_folder(tmp_path)
    (tmp_path / "a.csv").rename(tmp_path / "datalist.csv")
    assert read_folder(tmp_path).layout == "datalist.csv"


# DICOM


def test_series_in_folders_of_their_own(tmp_path):
    write_series(tmp_path / "x" / "ct", VOLUME, patient="Ana")
    write_series(tmp_path / "x" / "mr", VOLUME, patient=" Ana ")
    write_series(tmp_path / "y", VOLUME, patient="Bo")
    (tmp_path / "again").symlink_to(tmp_path / "y")
    (tmp_path / "loop").symlink_to(tmp_path)
    write_series(tmp_path / ".trash", VOLUME, patient="Cy")
    touch(tmp_path, "notes.csv", "y/report.pdf")
    listing = read_folder(tmp_path)
    assert listing.layout == "DICOM"
    assert listing.problems == ()
    assert [(in_folder(tmp_path, row)["image"], row["patient"]) for row in listing.rows] == [
        ("again", "Bo"),
        ("x/ct", "Ana"),
        ("x/mr", "Ana"),
    ]
    (several,) = listing.notes
    assert several.startswith("1 patient has several images, and each is a row of its own.")
    assert all(read_image(row["image"], 3).shape == (1, 4, 3, 2) for row in listing.rows)


def test_x_rays_share_a_folder(tmp_path):
    pixels = np.zeros((3, 4), np.uint8)
    write_image(tmp_path / "a", pixels, "Ana", SeriesInstanceUID="1.1")
    write_image(tmp_path / "b.dcm", pixels, "Ana", SeriesInstanceUID="1.1", InstanceNumber=2)
    write_image(tmp_path / "c.dcm", pixels, "Bo", SeriesInstanceUID="1.2")
    write_image(tmp_path / "d.dcm", pixels, "", SeriesInstanceUID="1.3")
    touch(tmp_path, "e.dcm")
    write_image(tmp_path / "DICOMDIR", pixels, "nobody")
    listing = read_folder(tmp_path)
    assert [in_folder(tmp_path, row) for row in listing.rows] == [
        {"image": "a", "patient": "Ana"},
        {"image": "b.dcm", "patient": "Ana"},
        {"image": "c.dcm", "patient": "Bo"},
    ]
    assert listing.problems == (
        f"{tmp_path / 'e.dcm'} cannot be read: File is missing DICOM File Meta Information header "
        "or the 'DICM' prefix is missing from the header. Use force=True to force reading.",
        f"{tmp_path / 'd.dcm'}: it has no patient",
    )


def test_series_are_told_apart_wherever_their_files_lie(tmp_path):
    mixed = tmp_path / "mixed"
    slices = write_series(mixed, VOLUME, series_uid="1.1")
    for number, file in enumerate(slices):
        file.rename(mixed / f"a{number}.dcm")
    write_series(mixed, VOLUME, series_uid="1.2", patient="p2")
    write_series(tmp_path / "part1", VOLUME, series_uid="1.3", patient="p3")
    write_series(tmp_path / "part2", VOLUME, series_uid="1.3", patient="p3", origin=(0, 0, 2))
    listing = read_folder(tmp_path)
    assert listing.problems == ()
    assert [(row["image"].uid, row["patient"]) for row in listing.rows] == [
        ("1.2", "p2"),
        ("1.1", "p1"),
        ("1.3", "p3"),
    ]
    shapes = [tuple(read_image(row["image"], 3).shape) for row in listing.rows]
    assert shapes == [(1, 4, 3, 2), (1, 4, 3, 2), (1, 4, 3, 4)]


def test_series_that_cannot_be_used_are_named(tmp_path):
    write_series(tmp_path / "good", VOLUME)
    whose = tmp_path / "whose"
    first = write_series(whose, VOLUME, series_uid="1.3")[0]
    write_series(whose, VOLUME, series_uid="1.3", patient="p2")
    first.rename(whose / "a.dcm")
    write_series(whose, VOLUME, series_uid="1.3", patient="p1")
    broken = write_series(tmp_path / "broken", VOLUME)[1]
    broken.write_bytes(broken.read_bytes()[:300])
    listing = read_folder(tmp_path)
    assert image_folders(listing) == ["good"]
    assert set(listing.problems) == {
        f"{whose / 'IM0001.dcm'} and 2 more: its series has several patients: p1, p2",
        f"{broken} holds no image: it is cut off, or a document",
        f"{tmp_path / 'broken' / 'IM0001.dcm'}: a slice may be missing, as a file cannot be used",
    }


def test_a_header_that_cannot_be_decoded_is_named(tmp_path):
    write_series(tmp_path / "good", VOLUME)
    file = write_series(tmp_path / "bad", VOLUME)[0]
    # An element of ImageOrientationPatient whose type does not exist.
    file.write_bytes(file.read_bytes().replace(b"\x20\x00\x37\x00DS", b"\x20\x00\x37\x00Du"))
    listing = read_folder(tmp_path)
    assert image_folders(listing) == ["good"]
    assert len(listing.problems) == 2
    assert listing.problems[0].startswith(f"{file} cannot be read: ")


def test_labels_by_series_and_by_patient(tmp_path):
    write_series(tmp_path / "a", VOLUME, patient="p1", series_uid="1.1")
    write_series(tmp_path / "b", VOLUME, patient="p1", series_uid="1.2")
    write_series(tmp_path / "c", VOLUME, patient="p2", series_uid="1.3")
    write_series(tmp_path / "d", VOLUME, patient="p3", series_uid="1.4")
    touch(tmp_path, "a/mask.nii.gz")
    table = (
        "series,patient,label,split\n1.1,,a/mask.nii.gz,train\n,p1,1,train\n1.3,,,test\n"
        "1.9,,1,test\n,,1,test\n1.1,,1,val\n"
    )
    write_table(tmp_path, table, "labels.csv")
    listing = read_folder(tmp_path)
    assert [in_folder(tmp_path, row) for row in listing.rows] == [
        {"image": "a", "patient": "p1", "label": "a/mask.nii.gz", "split": "train"},
        {"image": "b", "patient": "p1", "label": 1, "split": "train"},
    ]
    assert set(listing.problems) == {
        f"{tmp_path / 'c/IM0001.dcm'} and 1 more: it has no label",
        f"{tmp_path / 'd/IM0001.dcm'} and 1 more: labels.csv does not name it",
        "labels.csv, line 5: there is no image of series 1.9",
        "labels.csv, line 6: it has no series, study or patient",
        "labels.csv, line 7: series 1.1 was named before",
    }


# What is no data at all


# Links

LINK_OUT = "is a link out of the folder: copy its target into the folder"


@pytest.fixture
def own(tmp_path):
    """A folder beside one of others, whose images its links must not lead to."""
    (tmp_path / "others").mkdir()
    touch(tmp_path / "others", "secret.png", "deep/secret.png")
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


def test_a_path_of_a_table_that_leads_out_by_a_link_is_a_problem(own):
    touch(own, "a.png", "b.png", "in/c.png")
    (own / "out.png").symlink_to(own.parent / "others/secret.png")
    (own / "relative.png").symlink_to("../others/secret.png")
    (own / "parent").symlink_to(own.parent / "others")
    (own / "first").symlink_to("second")
    (own / "second").symlink_to("../others/deep")
    (own / "inside.png").symlink_to("in/c.png")
    (own / "within").symlink_to(own / "in")
    (own / "around").symlink_to("../own/in")
    (own / "loop").symlink_to("loop")
    names = ("out.png", "relative.png", "parent/secret.png", "first/secret.png", "parent")
    entries = [{"image": name, "label": 0} for name in names]
    entries.append({"image": ["a.png", "out.png"], "label": 0})
    entries.append({"image": "b.png", "label": "out.png"})
    entries.append({"image": "loop", "label": 0})
    fine = ("inside.png", "within/c.png", "around/c.png")
    entries += [{"image": name, "label": 0} for name in fine]
    write_json(own, entries)
    listing = read_folder(own)
    assert [row["image"] for row in listing.rows] == [str(own / name) for name in fine]
    assert listing.problems == tuple(
        f"dataset.json, training entry {number}: {text}"
        for number, text in enumerate(
            [
                *(f"{name} {LINK_OUT}" for name in (*names, "out.png", "out.png")),
                "loop is not there",
            ],
            start=1,
        )
    )


@pytest.mark.parametrize("name", ["dataset.json", "datalist.csv", "other.csv"])
def test_a_table_that_is_a_link_out_of_the_folder_is_refused(own, name):
    write_json(own.parent / "others", [{"image": "a.png", "label": 0}])
    write_table(own.parent / "others", "image,label,patient\na.png,0,p1\n")
    touch(own, "a.png")
    target = "dataset.json" if name == "dataset.json" else "datalist.csv"
    (own / name).symlink_to(own.parent / "others" / target)
    with pytest.raises(InputError, match=says(f"{own / name} {LINK_OUT}")):
        read_folder(own)


def test_a_folder_that_is_reached_through_a_link_is_its_own(own):
    touch(own, "a.png")
    write_table(own, "image,label,patient\na.png,0,p1\n")
    link = own.parent / "link"
    link.symlink_to(own)
    (own / "again").symlink_to(link)
    listing = read_folder(link)
    assert listing.problems == ()
    assert [row["image"] for row in listing.rows] == [str(link / "a.png")]


def test_the_walk_for_dicom_does_not_follow_links_out_of_the_folder(own):
    others = own.parent / "others"
    slices = write_series(others / "series", VOLUME, patient="Zoe")
    write_series(own / "good", VOLUME, patient="Ana")
    write_series(own / "mixed", VOLUME, patient="Bo", series_uid="1.5")
    (own / "mixed/more.dcm").symlink_to(slices[0])
    (own / "parent").symlink_to(others)
    (own / "good/.hidden.dcm").symlink_to(slices[0])
    (own / "up").symlink_to("..")
    listing = read_folder(own)
    assert [(place(row["image"]), row["patient"]) for row in listing.rows] == [
        (str(own / "good"), "Ana")
    ]
    assert listing.problems == (
        f"{own / 'parent'} {LINK_OUT}",
        f"{own / 'up'} {LINK_OUT}",
        f"{own / 'mixed/more.dcm'} {LINK_OUT}",
        f"{own / 'mixed/IM0001.dcm'} and 1 more: a slice may be missing, as a file cannot be used",
    )


def test_a_folder_of_slices_with_a_link_out_is_no_image_of_a_table(own):
    slices = write_series(own.parent / "others/series", VOLUME)
    write_series(own / "ct", VOLUME)
    (own / "ct/more.dcm").symlink_to(slices[0])
    (own / "ct/same.txt").symlink_to("IM0001.dcm")
    write_series(own / "fine", VOLUME)
    write_json(own, [{"image": name, "label": 0} for name in ("ct", "fine")])
    listing = read_folder(own)
    assert [row["image"] for row in listing.rows] == [str(own / "fine")]
    assert listing.problems == (f"dataset.json, training entry 1: ct/more.dcm {LINK_OUT}",)


def test_the_other_file_of_a_pair_lies_beside_it(own):
    for place in (own, own.parent / "others"):
        pair = nibabel.Nifti1Pair(np.ones((4, 3, 2), np.uint8), np.eye(4))
        nibabel.save(pair, place / "x.img")
    assert read_image(own / "x.hdr", 3).shape == (1, 4, 3, 2)
    (own / "x.img").unlink()
    (own / "x.img").symlink_to(own.parent / "others/x.img")
    text = (
        f"{own / 'x.hdr'}: x.img, which belongs to it, is a link to another folder: put both into "
        "one"
    )
    with pytest.raises(InputError, match=says(text)):
        read_image(own / "x.hdr", 3)


def test_a_thousand_folders_in_each_other_are_walked(tmp_path):
    places = [tmp_path / "d"]
    for _ in range(1100):
        places[-1].mkdir()
        places.append(places[-1] / "d")
    image = write_image(places[-2] / "a.dcm", np.zeros((3, 4), np.uint8))
    assert [row["image"] for row in read_folder(tmp_path).rows] == [str(image)]
    image.unlink()
    for place in places[-2::-1]:  # What pytest uses to clear up cannot go so deep.
        place.rmdir()


# What problems say


def test_names_in_problems_are_cleaned_and_shortened(tmp_path):
    odd = "a\n2026-01-01 all is well\x1b[31m\u202e"
    touch(tmp_path, "c.png")
    longest = "x" * 10_000
    entries = [
        {"image": odd, "label": 0},
        {"image": longest, "label": 0},
        {"image": {odd: longest}, "label": 0, "patient": "p"},
        {"image": "c.png", "label": 0, "patient": [longest]},
        {"image": "c.png", "label": 0, "patient": "p", "split": odd + longest},
        {"image": "c.png", "label": 0},
    ]
    write_json(tmp_path, entries)
    problems = read_folder(tmp_path).problems
    assert len(problems) == 5
    assert all(problem.isprintable() and len(problem) < 300 for problem in problems)
    assert problems[0] == (
        "dataset.json, training entry 1: a 2026-01-01 all is well\\x1b[31m\\u202e is not there"
    )


def test_names_of_dicom_headers_in_problems_are_cleaned(tmp_path):
    write_image(tmp_path / "a.dcm", np.zeros((3, 4), np.uint8), "p1")
    write_table(tmp_path, 'patient,label\n"Z\x1b[2J",1\np1,0\n', "labels.csv")
    assert read_folder(tmp_path).problems == (
        "labels.csv, line 2: there is no image of patient Z\\x1b[2J",
    )


def test_a_folder_without_data(tmp_path):
    touch(tmp_path, "a.nii.gz")
    text = (
        f"{tmp_path} holds no data: looked for dataset.json, datalist.csv (or one other .csv "
        "file), or DICOM files"
    )
    with pytest.raises(InputError, match=says(text)):
        read_folder(tmp_path)
    with pytest.raises(InputError, match=says(f"{tmp_path / 'a.nii.gz'} is not a folder")):
        read_folder(tmp_path / "a.nii.gz")


def test_a_folder_without_a_row_that_can_be_used(tmp_path):
    write_json(tmp_path, [])
    text = f"{tmp_path} (dataset.json) holds no row that can be used"
    with pytest.raises(InputError, match=says(text)):
        read_folder(tmp_path)
    write_json(tmp_path, [{"image": "a.nii", "label": 0}] * 2)
    text += ": dataset.json, training entry 1: a.nii is not there (the first of 2 problems)"
    with pytest.raises(InputError, match=says(text)):
        read_folder(tmp_path)


# Splits


def rows_of(*patients, **more):
    return [{"image": k, "patient": patient, **more} for k, patient in enumerate(patients)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from("abcdefghijklm"), min_size=1, max_size=40),
    st.integers(0, 2**40),
    st.randoms(use_true_random=False),
)
def test_whole_patients_whatever_the_order(patients, seed, random):
    rows = rows_of(*patients)
    try:
        parts = split_patients(rows, seed, (0.5, 0.2, 0.3))
    except InputError:  # Nobody is in train.
        reject()
    who = {split: {row["patient"] for row in part} for split, part in parts.items()}
    assert sorted(row["image"] for part in parts.values() for row in part) == list(range(len(rows)))
    assert sum(map(len, who.values())) == len(set(patients))
    assert who["train"]
    random.shuffle(rows)
    again = split_patients(rows, seed, (0.5, 0.2, 0.3))
    assert {split: {row["patient"] for row in part} for split, part in again.items()} == who


def test_another_seed_draws_other_patients():
    rows = rows_of(*range(50))
    assert split_patients(rows, 0) == split_patients(rows, 0)
    assert split_patients(rows, 0)["test"] != split_patients(rows, 1)["test"]


def test_splits_that_are_given_are_kept():
    rows = rows_of("a", "b", split="train") + rows_of("c", split="test")
    assert split_patients(rows, 0) == {"train": rows[:2], "val": [], "test": rows[2:]}


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            rows_of("a", split="train") + rows_of("b"),
            "1 of 2 rows have a split: give one to all of them, or to none, and each patient is "
            "put into one",
        ),
        (
            rows_of("Ana", "b", split="train") + rows_of("Ana", split="test"),
            "patient Ana is in two splits, train and test: all rows of a patient belong in one",
        ),
        (rows_of("a", split="training"), "split must be one of train, val, test, got 'training'"),
        (rows_of("a", split="test"), "none of 1 rows is in the train split"),
        ([], "none of 0 rows is in the train split"),
        ([{"image": 1}], "row 0 has no patient"),
    ],
)
def test_rows_that_cannot_be_split(rows, text):
    with pytest.raises(InputError, match=says(text)):
        split_patients(rows, 0)


@pytest.mark.parametrize(
    ("seed", "shares", "text"),
    [
        (-1, (0.7, 0.1, 0.2), "seed must be a whole number, 0 or greater, got -1"),
        (True, (0.7, 0.1, 0.2), "seed must be a whole number, 0 or greater, got True"),
        (0, (0, 0.5, 0.5), "the share of train must be above 0, got (0, 0.5, 0.5)"),
        *(
            (
                0,
                shares,
                "shares must be three numbers, 0 or greater with sum 1, for train, val, test; got "
                f"{shares}",
            )
            for shares in [(0.7, 0.3), (0.7, 0.1, 0.1), (1.2, -0.4, 0.2), (float("nan"), 0, 1)]
        ),
    ],
)
def test_arguments_out_of_range(seed, shares, text):
    with pytest.raises(InputError, match=says(text)):
        split_patients(rows_of("a"), seed, shares)


def test_load_folder_warns_of_problems_and_names_its_source(tmp_path, caplog):
    folder = tmp_path / "scans"
    touch(folder, *(f"{k}.png" for k in range(10)))
    lines = [f"{k}.png,{k % 2},p{k}" for k in range(11)]
    write_table(folder, "\n".join(["image,label,patient", *lines]))
    with caplog.at_level(logging.WARNING, "flwr.fedmed"):
        data = load_folder(folder, 3)
    assert caplog.messages == ["datalist.csv, line 12: 10.png is not there"]
    assert [len(data.train), len(data.val), len(data.test)] == [8, 0, 2]
    assert data.train == split_patients(read_folder(folder).rows, 3)["train"]
    assert data.source == "folder scans, datalist.csv"
    assert not data.generated


def test_a_dataset_that_names_no_patients_is_told_of(tmp_path, caplog):
    for name in ("a.nii", "b.nii"):
        (tmp_path / name).touch()
    entries = [{"image": "a.nii", "label": 0, "patient": "p"}, {"image": "b.nii", "label": 1}]
    content = {"training": entries, "labels": {"0": "background", "1": "liver"}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with caplog.at_level("WARNING", "flwr.fedmed"):
        data = load_folder(tmp_path, 0)
    assert data.class_names == ("liver",)
    assert sum("1 entries name no patient" in text for text in caplog.messages) == 1


def test_notes_of_a_folder_are_lines_of_the_log(tmp_path, caplog):
    folder = tmp_path / "north"
    write_series(folder / "a", VOLUME)
    write_series(folder / "b", VOLUME, patient="p2")
    write_image(folder / "c", np.zeros((3, 4), np.uint8), ImageType=["DERIVED", "DOSE_INFO"])
    with caplog.at_level("INFO", "flwr.fedmed"):
        data = load_folder(folder, 0, series="slices=2")
    assert caplog.messages == ["north: left out: 1 dose screen"]
    assert data.notes == ("left out: 1 dose screen",)
    assert data.rejected == 0


# --- Several labels -------------------------------------------------------------------------------


def test_columns_are_the_numbers_of_a_label(tmp_path, caplog):
    touch(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "datalist.csv").write_text(
        "image,patient,Edema,pleural effusion,age\n"
        "a.png,1,1,0,61.5\n"
        "b.png,2,,1.0,-3\n"
        "c.png,3,yes,0,40\n"
    )
    listing = read_folder(tmp_path, labels=("edema", "Pleural Effusion", "age", "mass"))
    assert [row["label"] for row in listing.rows] == [
        {"edema": 1, "Pleural Effusion": 0, "age": 61.5, "mass": None},
        {"edema": None, "Pleural Effusion": 1, "age": -3, "mass": None},
    ]
    assert listing.problems == (
        "datalist.csv, line 4: its edema is 'yes': it must be a number or empty",
    )
    path = tmp_path / "datalist.csv"
    assert f"{path} has no column mass: not read in any row" in caplog.messages


@pytest.mark.parametrize("heading", ["image,patient,label", "image,patient,edema,EDEMA"])
def test_a_table_without_one_of_the_columns_is_refused(tmp_path, heading):
    touch(tmp_path, "a.png")
    cells = ",".join("1" for _ in heading.split(",")[1:])
    (tmp_path / "datalist.csv").write_text(f"{heading}\na.png,{cells}\n")
    text = (
        f"{tmp_path / 'datalist.csv'} must have columns of what is asked for, edema, mass, each "
        f"once: its columns are {heading.lower().replace(',', ', ')}"
    )
    with pytest.raises(InputError, match=says(text)):
        read_folder(tmp_path, labels=("edema", "mass"))


def test_an_entry_of_dataset_json_has_an_object_of_labels(tmp_path):
    touch(tmp_path, "a.nii", "b.nii")
    entries = [
        {"image": "a.nii", "label": {"Edema": 1, "mass": None}},
        {"image": "b.nii", "label": {"edema": "0"}},
    ]
    write_json(tmp_path, entries)
    labels = [row["label"] for row in read_folder(tmp_path, labels=("edema", "mass")).rows]
    assert labels == [{"edema": 1, "mass": None}, {"edema": 0, "mass": None}]


def test_a_number_with_digits_after_the_point_is_a_label(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "datalist.csv").write_text("image,label,patient\na.png,61.5,1\nb.png,7.0,2\n")
    assert [row["label"] for row in read_folder(tmp_path).rows] == [61.5, 7]
