import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import write_series
from PIL import Image
from typer.testing import CliRunner

from fedmed_flower.cli.main import app

LONG = "Bo" * 60


def check(folder, *options):
    """Return exit code and printed lines."""
    result = CliRunner().invoke(app, ["data", "check", str(folder), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, [line.rstrip() for line in result.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path):
    """Two patients: three volumes on two grids, with masks."""
    lines = ["image;label;patient;split"]
    for number, (spacing, split) in enumerate([(1, "train"), (1, "train"), (-2, "test")]):
        array = np.full((4, 3, 2), number, np.int16)
        for name, values in (("x", array), ("m", (array >= 0).astype(np.uint8))):
            volume = nibabel.Nifti1Image(values, None)
            volume.set_sform(np.diag([spacing, 1, 1, 1]), code=1)
            nibabel.save(volume, tmp_path / f"{name}{number}.nii.gz")
        patient = "Ana [red]" if number < 2 else LONG
        lines.append(f"x{number}.nii.gz;m{number}.nii.gz;{patient};{split}")
    (tmp_path / "datalist.csv").write_text("\n".join(lines))
    return tmp_path


def test_a_sound_folder(folder):
    code, lines = check(folder)
    assert code == 0
    table = [line.split() for line in lines if ".nii.gz" in line]
    assert table == [
        ["Ana", "[red]", "x0.nii.gz", "train", "1x4x3x2", "1x1x1", "RAS", "0", "to", "0", "1"],
        ["Ana", "[red]", "x1.nii.gz", "train", "1x4x3x2", "1x1x1", "RAS", "1", "to", "1", "1"],
        [LONG, "x2.nii.gz", "test", "1x4x3x2", "2x1x1", "LAS", "2", "to", "2", "1"],
    ]
    assert lines[-4:] == [
        "3 images of 2 patients: train 2, test 1",
        "spacings: 1x1x1 (2), 2x1x1 (1); spacing in the run config brings them to one",
        "orientations: RAS (2), LAS (1); orientation in the run config brings them to one",
        "no problems",
    ]


def test_problems_are_named_and_exit_with_1(folder):
    (folder / "x1.nii.gz").write_bytes(b"")
    with (folder / "datalist.csv").open("a") as file:
        file.write("\nx9.nii.gz;m0.nii.gz;Cy;train\n")
    code, lines = check(folder, "--classes", "2")
    assert code == 1
    assert lines[-6] == "3 images of 2 patients: train 2, test 1"
    assert lines[-3].startswith(f"patient Ana [red]: {folder}/x1.nii.gz cannot be read: ")
    assert lines[-2:] == [
        "datalist.csv, line 5: x9.nii.gz is not there",
        "2 problems",
    ]


def test_the_number_of_classes_can_be_given(folder):
    code, lines = check(folder, "--classes", "1")
    assert code == 1
    assert lines[-4] == (
        f"patient Ana [red]: its mask {folder}/m0.nii.gz: it holds the values 1, which are "
        "not classes: a mask holds 0"
    )
    code, lines = check(folder, "--classes", "0")
    assert code == 2


def test_wrong_input_exits_with_2(tmp_path):
    assert check(tmp_path / "nowhere") == (
        2,
        [f"not started: {tmp_path / 'nowhere'} is not a folder"],
    )
    assert check(tmp_path) == (
        2,
        [
            f"not started: {tmp_path} holds no data: looked for dataset.json, datalist.csv (or one "
            "other .csv file), or DICOM files"
        ],
    )


def test_a_folder_of_dicom_with_classes(tmp_path):
    write_series(tmp_path / "p1", np.ones((4, 3, 2)), patient="p1")
    write_series(tmp_path / "p2", np.ones((4, 3, 2)), patient="p2")
    (tmp_path / "labels.csv").write_text("patient,label\np1,0\np2,1\n")
    code, lines = check(tmp_path)
    assert code == 0
    assert ["p2", "p2", "1x4x3x2", "1x1x1", "LPS", "1", "to", "1", "1"] in map(str.split, lines)


def test_a_folder_of_pictures_has_no_axes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Image.fromarray(np.zeros((4, 5), np.uint8)).save(f"{name}.png")
    Path("images.csv").write_text("image,label,patient\na.png,0,p1\nb.png,1,p2\n")
    code, lines = check(os.curdir)
    assert code == 0
    assert ["patient", "image", "shape", "spacing", "(mm)", "values", "label"] in map(
        str.split, lines
    )
    assert lines[-3:] == ["2 images of 2 patients", "spacings: 1x1 (2)", "no problems"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("budget_epsilon=1.0", "has an unknown key 'budget_epsilon': did you mean budget-epsilon?"),
        ("budget-epsilon=1.0", "budget-epsilon in the node config needs budget-delta beside it"),
        ("min-cell-count=0", "min-cell-count must be at least 1, got 0"),
        ("personal=yes", "write a text in quotes, as in site-name="),
        ("personal", "the node config must be KEY=VALUE KEY=VALUE ..., got 'personal' in it"),
        ('ledger="/nowhere/ledger.sqlite"', "there is no ledger /nowhere/ledger.sqlite"),
        ('output-dir="/nowhere/out"', "output-dir of site north is not a folder: /nowhere/out"),
    ],
)
def test_a_node_config_that_a_hospital_would_refuse(folder, text, told):
    code, lines = check(folder, "--node-config", f'site-name="north" data-dir="{folder}" {text}')
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("not started: ")
    assert told in lines[0]


def test_a_node_config_that_is_understood(folder):
    text = f'site-name="north" data-dir="{folder}" budget-epsilon=3 budget-delta=1e-5'
    code, lines = check(folder, "--node-config", text)
    assert code == 0
    assert lines[0] == "the node config is valid"
    assert not (folder / "privacy-ledger.sqlite").exists()


def test_a_node_config_is_checked_without_a_folder_too(tmp_path):
    text = f'site-name="north" data-dir="{tmp_path}"'
    done = CliRunner().invoke(app, ["data", "check", "--node-config", text])
    assert (done.exit_code, done.output.strip()) == (0, "the node config is valid")
    done = CliRunner().invoke(app, ["data", "check"])
    assert (done.exit_code, done.output.strip()) == (
        2,
        "not started: give a folder, --node-config, or both",
    )


HEART = Path(__file__).parents[2] / "examples" / "heart"
HEADING = "patient,age,trestbps,chol,thalach,oldpeak,sex,cp,fbs,restecg,exang,disease\n"


def hearts(folder, lines):
    folder.mkdir()
    (folder / "heart.csv").write_text(HEADING + "".join(lines))
    return folder


def test_an_app_reads_its_tables_and_nothing_is_written(tmp_path):
    lines = [f"P{n},{40 + n},130,230,150,1.5,1,2,0,1,0,{n % 2}\n" for n in range(30)]
    north = hearts(tmp_path / "north", lines)
    code, printed = check(north, "--app", str(HEART))
    assert (code, printed[-1]) == (0, "no problems")
    assert printed[-2].startswith("the hospital's own table: ")
    assert [path.name for path in north.iterdir()] == ["heart.csv"]
    odd = [*lines, "P30,400,130,230,150,1.5,1,2,0,1,0,1\n", "P31,50,,,,,1,2,0,1,0,x\n"]
    code, printed = check(hearts(tmp_path / "south", odd), "--app", str(HEART))
    assert code == 1
    assert printed[-1] == "2 problems"
    assert "; 1 rejected" in printed[0]
    assert "age is outside 18 to 100 in 1 row" in " ".join(printed)
    coded = [line.replace(",1\n", ",2\n").replace(",0\n", ",1\n") for line in lines]
    code, printed = check(hearts(tmp_path / "east", coded), "--app", str(HEART))
    assert code == 2
    assert "disease is '1' (15 rows), '2' (15 rows)" in " ".join(printed)
    code, _ = check(north, "--app", str(HEART), "--classes", "2")
    assert code == 2


def test_a_horizon_past_the_follow_up_of_a_hospital_is_a_problem(tmp_path):
    made = tmp_path / "long"
    for words in (
        ["new", str(made), "--for", "survival"],
        ["data", "phantoms", str(tmp_path), "north", "--for", "survival"],
    ):
        assert CliRunner().invoke(app, words).exit_code == 0
    code, printed = check(tmp_path / "north", "--app", str(made))
    assert (code, printed[-1]) == (0, "no problems")
    project = made / "pyproject.toml"
    text = project.read_text()
    assert text.count("survival-horizon = 5.0") == 1
    project.write_text(text.replace("survival-horizon = 5.0", "survival-horizon = 9.8"))
    code, printed = check(tmp_path / "north", "--app", str(made))
    assert (code, printed[-1]) == (1, "1 problem")
    told = "north: fewer than 10 patients are followed up to survival-horizon=9.8"
    assert told in " ".join(printed)
