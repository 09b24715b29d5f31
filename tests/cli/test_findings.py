import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fedmed_flower.cli.findings import summary_of
from fedmed_flower.cli.main import app
from fedmed_flower.data.checks import Finding

DICOM = Path(__file__).parents[2] / "examples" / "dicom"


def check(*words):
    """Return exit code and printed lines."""
    result = CliRunner().invoke(app, ["data", "check", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, [line.rstrip() for line in result.stdout.splitlines()]


def picture(path, number=0, shape=(4, 5)):
    values = np.arange(number, number + np.prod(shape)).reshape(shape)
    Image.fromarray(values.astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Four pictures with masks of 0 and 255; the last mask is empty."""
    own = tmp_path / "north"
    own.mkdir()
    lines = ["image,label,patient,split"]
    for number in range(4):
        picture(own / f"{number}.png", number)
        mask = np.zeros((4, 5), np.uint8)
        mask[: 3 - number] = 255
        Image.fromarray(mask).save(own / f"m{number}.png")
        lines.append(f"{number}.png,m{number}.png,p{number},{'test' if number > 2 else 'train'}")
    (own / "datalist.csv").write_text("\n".join(lines))
    return own


def test_values_and_empty_masks_are_options_without_an_app(folder):
    code, lines = check(folder, "--label-values", "0,255", "--empty-masks")
    assert (code, lines[-4:]) == (
        0,
        [
            "images that hold each class: 0 (4), 1 (3)",
            "4 images of 4 patients: train 3, test 1",
            "spacings: 1x1 (4)",
            "no problems",
        ],
    )
    code, lines = check(folder, "--label-values", "0,255")
    assert (code, lines[-1]) == (1, "1 problem")
    assert lines[-2] == (
        f"patient p3: its mask {folder}/m3.png is empty: it holds only the background"
    )
    code, lines = check(folder, "--classes", "2")
    assert (code, lines[-1]) == (1, "4 problems")


@pytest.mark.parametrize("text", ["0,x", "0", "0,0", "0,1.5", "0,,1"])
def test_label_values_that_are_no_numbers_are_refused(folder, text):
    assert check(folder, "--label-values", text) == (
        2,
        [
            "not started: --label-values must be different whole numbers, one a class, such as "
            f"0,255; got {text!r}"
        ],
    )


def test_options_that_the_app_decides_do_not_go_with_it(folder):
    for words in (["--label-values", "0,255"], ["--empty-masks"], ["--classes", "2"]):
        code, lines = check(folder, "--app", DICOM, *words)
        option = " ".join(words)
        assert (code, lines) == (
            2,
            [f"not started: {option} does not go with --app: the app says it"],
        )


def test_findings_are_written_as_csv(folder, tmp_path):
    (folder / "3.png").write_bytes(b"")
    table = (folder / "datalist.csv").read_text().replace("p1", "=1+1")
    (folder / "datalist.csv").write_text(f"{table}\nlost.png,m0.png,p4,train\n")
    out = tmp_path / "out" / "found.csv"
    code, _ = check(folder, "--label-values", "0,255", "--out", out)
    assert code == 1
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "patient": "p0",
        "image": f"{folder}/0.png",
        "split": "train",
        "shape": "1 4 5",
        "spacing": "1 1",
        "axes": "",
        "low": "0.0",
        "high": "19.0",
        "label": "0 1",
        "problem": "",
    }
    # A spreadsheet must not take a name for a formula.
    assert rows[1]["patient"] == "'=1+1"
    assert (rows[3]["shape"], rows[3]["label"]) == ("", "")
    assert rows[3]["problem"].startswith(f"{folder}/3.png cannot be read: ")
    assert (rows[4]["image"], rows[4]["problem"]) == (
        "",
        "datalist.csv, line 6: lost.png is not there",
    )


def test_findings_are_written_as_json(folder, tmp_path):
    out = tmp_path / "found.json"
    code, _ = check(folder, "--label-values", "0,255", "--empty-masks", "--out", out)
    assert code == 0
    found = json.loads(out.read_text())
    assert len(found) == 4
    assert found[3] == {
        "patient": "p3",
        "image": f"{folder}/3.png",
        "split": "test",
        "shape": [1, 4, 5],
        "spacing": [1.0, 1.0],
        "axes": "",
        "low": 3.0,
        "high": 22.0,
        "label": [0],
        "problem": None,
    }


def test_a_file_that_cannot_be_written_is_refused(folder, tmp_path):
    text = "not started: --out must end in .csv or .json, got found.txt"
    assert check(folder, "--out", "found.txt") == (2, [text])
    (tmp_path / "found.csv").write_text("mine")
    text = f"not started: {tmp_path}/found.csv exists already: give another --out"
    assert check(folder, "--out", tmp_path / "found.csv") == (2, [text])
    code, lines = check(folder, "--out", folder / "0.png" / "found.csv")
    assert code == 2
    assert f"--out {folder}/0.png/found.csv cannot be written: " in lines[-1]


def test_what_stands_in_names_cannot_act_in_a_file(folder, tmp_path):
    table = (folder / "datalist.csv").read_text().replace("p1", "Ana\x1b[2J\u202e")
    (folder / "datalist.csv").write_text(table)
    for name in ("found.csv", "found.json"):
        check(folder, "--label-values", "0,255", "--empty-masks", "--out", tmp_path / name)
        text = (tmp_path / name).read_text()
        assert "Ana" in text
        assert "\x1b" not in text
        assert "\u202e" not in text


def test_pictures_of_several_sizes_are_told_with_the_setting_that_helps(tmp_path):
    for number, shape in enumerate([(4, 5), (4, 5), (6, 5)]):
        picture(tmp_path / f"{number}.png", number, shape)
    rows = [f"{number}.png,{number % 2},p{number}" for number in range(3)]
    (tmp_path / "datalist.csv").write_text("\n".join(["image,label,patient", *rows]))
    code, lines = check(tmp_path, "--classes", "3")
    assert code == 0
    assert lines[-5:] == [
        "rows of each class: 0 (2), 1 (1), 2 (0)",
        "3 images of 3 patients",
        "sizes: 4x5 (2), 6x5 (1); image-size in the run config brings them to one",
        "spacings: 1x1 (3)",
        "no problems",
    ]


def test_many_classes_are_cut_short():
    images = [Finding("p", "x.png", label=number % 40) for number in range(80)]
    (first, _) = summary_of(images)
    listed = ", ".join(f"{number} (2)" for number in range(12))
    assert first == f"rows of each class: {listed} and 28 more"


def test_a_copy_and_a_picture_of_nothing_are_problems(folder):
    shutil.copy(folder / "0.png", folder / "2.png")
    Image.fromarray(np.full((4, 5), 9, np.uint8)).save(folder / "1.png")
    code, lines = check(folder, "--label-values", "0,255", "--empty-masks")
    assert (code, lines[-3:]) == (
        1,
        [
            f"patient p1: {folder}/1.png has the value 9 everywhere: it shows nothing",
            "patients p0 and p2 have the same image, value for value: "
            f"{folder}/0.png and {folder}/2.png",
            "2 problems",
        ],
    )


# With an app


CLIENT = """
from torch import nn

from fedmed_flower import SegmentationClient
from fedmed_flower.data.datalist import load_folder


class Hospital(SegmentationClient):
    classes = ("cell", "nucleus")
    label_values = (0, 255, 7)
    empty_masks = True

    def build_model(self):
        return nn.Conv2d(1, 3, 1)

    def load_data(self, site):
        return load_folder(site.folder, 0)


app = Hospital.client_app()
"""


@pytest.fixture
def client(tmp_path):
    made = tmp_path / "app"
    shutil.copytree(DICOM, made)
    (made / "client_app.py").write_text(CLIENT)
    project = made / "pyproject.toml"
    lines = project.read_text().splitlines()
    three_d = ("spacing", "patch-size", "network")
    project.write_text("\n".join(line for line in lines if not line.startswith(three_d)))
    return made


def test_an_app_says_what_its_masks_hold(folder, client):
    assert check(folder, "--app", client) == (
        0,
        [
            "images that hold each class: 0 (4), 1 (3), 2 (0)",
            "4 images of 4 patients: train 3, test 1",
            "spacings: 1x1 (4)",
            "folder north, datalist.csv: 3 train, 0 val, 1 test; 0 rejected",
            "no problems",
        ],
    )


def test_by_an_app_a_copy_and_a_picture_of_nothing_are_problems_too(folder, client, tmp_path):
    shutil.copy(folder / "0.png", folder / "3.png")
    Image.fromarray(np.full((4, 5), 9, np.uint8)).save(folder / "1.png")
    with (folder / "datalist.csv").open("a") as file:
        file.write("\nlost.png,m0.png,p4,train\n")
    out = tmp_path / "found.json"
    code, lines = check(folder, "--app", client, "--out", out)
    problems = [
        "datalist.csv, line 6: lost.png is not there",
        f"patient p1: {folder}/1.png has the value 9 everywhere: it shows nothing",
        "patients p0 and p3 have the same image, value for value: "
        f"{folder}/0.png and {folder}/3.png",
    ]
    assert (code, lines[-4:]) == (1, [*problems, "3 problems"])
    found = json.loads(out.read_text())
    assert len(found) == 6
    assert [one["problem"] for one in found if one["problem"]] == [
        problems[1].removeprefix("patient p1: "),
        problems[0],
        problems[2],
    ]
    assert [one["split"] for one in found] == ["train", "train", "train", "test", "", ""]


def test_findings_of_several_hospitals_name_them(folder, client, tmp_path):
    south = tmp_path / "south"
    shutil.copytree(folder, south)
    (south / "2.png").write_bytes(b"")
    out = tmp_path / "found.csv"
    code, lines = check(folder, south, "--app", client, "--out", out)
    assert code == 1
    assert lines[0] == "north: images that hold each class: 0 (4), 1 (3), 2 (0)"
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["hospital"] for row in rows] == ["north"] * 4 + ["south"] * 4
    assert sum(bool(row["problem"]) for row in rows) == 1


def test_an_app_of_tables_lists_no_images(tmp_path):
    heart = Path(__file__).parents[2] / "examples" / "heart"
    (tmp_path / "north").mkdir()
    head = "patient,age,trestbps,chol,thalach,oldpeak,sex,cp,fbs,restecg,exang,disease"
    lines = [f"P{n},{40 + n},130,230,150,1.5,1,2,0,1,0,{n % 2}" for n in range(30)]
    (tmp_path / "north" / "heart.csv").write_text("\n".join([head, *lines]))
    out = tmp_path / "found.csv"
    code, printed = check(tmp_path / "north", "--app", heart, "--out", out)
    assert (code, printed[-1]) == (
        2,
        f"not started: --out lists images, and by {heart} none was read",
    )
    assert not os.path.lexists(out)
