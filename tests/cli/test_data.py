import json
import os
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import write_image, write_seg, write_series
from PIL import Image
from pydicom.dataset import Dataset
from typer.testing import CliRunner

from fedmed_flower.cli.main import app
from fedmed_flower.genomics.plink import bed_reader

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
        array = np.arange(number, number + 24, dtype=np.int16).reshape(4, 3, 2)
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
        ["Ana", "[red]", "x0.nii.gz", "train", "1x4x3x2", "1x1x1", "RAS", "0", "to", "23", "1"],
        ["Ana", "[red]", "x1.nii.gz", "train", "1x4x3x2", "1x1x1", "RAS", "1", "to", "24", "1"],
        [LONG, "x2.nii.gz", "test", "1x4x3x2", "2x1x1", "LAS", "2", "to", "25", "1"],
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
    for number, patient in enumerate(("p1", "p2")):
        array = np.arange(number, number + 24).reshape(4, 3, 2)
        write_series(tmp_path / patient, array, patient=patient)
    (tmp_path / "labels.csv").write_text("patient,label\np1,0\np2,1\n")
    write_image(
        tmp_path / "p1/screen", np.ones((4, 3), np.uint8), "p1", ImageType=["DERIVED", "DOSE_INFO"]
    )
    code, lines = check(tmp_path)
    assert code == 0
    assert "left out: 1 dose screen" in lines
    row = "p2 p2/IM0001.dcm and 1 more 1x4x3x2 1x1x1 LPS 1 to 24 1"
    assert row.split() in map(str.split, lines)


def test_a_folder_of_pictures_has_no_axes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a", "b")):
        Image.fromarray(np.arange(number, number + 20, dtype=np.uint8).reshape(4, 5)).save(
            f"{name}.png"
        )
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


GWAS = Path(__file__).parents[2] / "examples" / "gwas"


def genomes(folder, **change):
    """Write a hospital of the example with genotypes: 40 people, of whom 20 are cases."""
    folder.mkdir()
    about = {
        "iid": [f"p{number}" for number in range(40)],
        "sid": [f"rs{number}" for number in range(6)],
        "chromosome": ["1", "1", "1", "2", "X", "01"],
        "bp_position": [10, 20, 30, 10, 20, 30],
        "allele_1": ["A"] * 6,
        "allele_2": ["G"] * 6,
    }
    copies = np.random.default_rng(0).binomial(2, 0.4, (40, 6)).astype(np.int8)
    bed_reader().to_bed(folder / "genotypes.bed", copies, properties=about | change, num_threads=1)
    lines = [f"p{number},{number % 2},{40 + number}" for number in range(40)]
    (folder / "people.csv").write_text("\n".join(["patient,phenotype,age", *lines]) + "\n")
    return folder


def test_genotypes_are_described_without_an_app(tmp_path):
    north = genomes(tmp_path / "north")
    code, lines = check(north)
    assert (code, lines) == (
        1,
        [
            "genotypes: 40 people, 6 variants",
            "sex in the fam file: 0 men, 0 women, 40 unknown",
            "phenotype in the fam file: none",
            "4 variants on the chromosomes 1 to 22; not analysed: X (1)",
            "positions of either build: none of them tells which",
            "the bim file has the chromosomes 01 (1), which are not analysed: write 1 to 22, as "
            "plink --make-bed does",
            "1 problem",
        ],
    )
    (north / "genotypes.bed").write_bytes(b"PK")
    code, lines = check(north)
    assert (code, len(lines)) == (2, 1)
    assert "genotypes.bed is no bed file" in lines[0]


def test_an_app_says_who_takes_part_in_a_study(tmp_path):
    north = genomes(tmp_path / "north", chromosome=["1"] * 3 + ["2"] * 3)
    code, lines = check(north, "--app", str(GWAS))
    assert (code, lines[-3:]) == (
        0,
        [
            "the hospital's own: 40 train, 0 val, 0 test; 0 rejected",
            "in the study: 40 people, 20 cases, 20 controls",
            "no problems",
        ],
    )
    assert {path.name for path in north.iterdir()} == {
        "people.csv",
        *(f"genotypes.{end}" for end in ("bed", "bim", "fam")),
    }
    people = north / "people.csv"
    rows = people.read_text().splitlines()
    # Of 16 people the phenotype is missing, among them 11 cases; all have one age.
    few = [
        ",".join([name, "-9" if int(name[1:]) < 16 or name == "p39" else phenotype, "50"])
        for name, phenotype, _ in (row.split(",") for row in rows[1:])
    ]
    people.write_text("\n".join([rows[0], *few[:30], "q1,1,50"]) + "\n")
    code, lines = check(north, "--app", str(GWAS))
    assert code == 1
    assert lines[-8:] == [
        "in the study: 14 people, 7 cases, 7 controls",
        "10 people of the fam file have no row: they take no part",
        "1 rows have no person in the fam file: they take no part",
        "16 people lack the phenotype or a covariate: they take no part",
        "there are 7 cases, fewer than min-cell-count = 10: this hospital takes no part",
        "there are 7 controls, fewer than min-cell-count = 10: this hospital takes no part",
        "the covariate age is the same for everybody here: a study fails if it is so at each "
        "hospital",
        "6 problems",
    ]
    people.write_text("\n".join([rows[0], *(row.replace(",0,", ",2,") for row in rows[1:])]))
    code, lines = check(north, "--app", str(GWAS))
    assert code == 2
    assert 'declare coding="1/2"' in lines[-1]


def test_genotypes_of_several_hospitals_are_compared(tmp_path):
    same = {"chromosome": ["1"] * 6, "bp_position": [10, 20, 30, 40, 50, 60]}
    north = genomes(tmp_path / "north", **same)
    south = genomes(tmp_path / "south", **same | {"bp_position": [521, 531, 541, 551, 561, 571]})
    code, lines = check(north, str(south), "--app", str(GWAS))
    assert code == 1
    assert lines[-2] == (
        "of 6 variants that south and north have, 6 lie at different positions, such as rs0 at "
        "1:10 and 1:521: write all files from one reference genome"
    )
    code, lines = check(north, str(north / ".." / "north"), "--app", str(GWAS))
    assert (code, lines) == (2, [f"not started: {north} is given twice"])
    assert check(north, str(south)) == (
        2,
        [
            "not started: 2 folders are compared as an app reads them: give --app, or one folder",
        ],
    )


OWN = """
import csv

from fedmed_flower import Schema, SiteData, TabularClient


class Hospital(TabularClient):
    schema = Schema("ill", "binary", numeric=("age", "overweight", "weight"))

    def load_data(self, site):
        with (site.folder / "rows.csv").open() as file:
            rows = [
                {"patient": row["patient"], "ill": int(row["ill"]), "age": float(row["age"])}
                | dict.fromkeys(("overweight", "weight"), float(row["weight"] or "nan"))
                for row in csv.DictReader(file)
            ]
        return SiteData(rows, source="rows.csv")


app = Hospital.client_app()
"""


def test_a_column_without_a_value_is_a_problem_whoever_reads_the_table(tmp_path):
    app = tmp_path / "app"
    shutil.copytree(HEART, app)
    (app / "client_app.py").write_text(OWN)
    project = app / "pyproject.toml"
    project.write_text(re.sub(r"report-by = .*\n", "", project.read_text()))
    (tmp_path / "north").mkdir()
    rows = [f"p{number},{40 + number},,{number % 2}" for number in range(20)]
    (tmp_path / "north" / "rows.csv").write_text("\n".join(["patient,age,weight,ill", *rows]))
    assert check(tmp_path / "north", "--app", str(app)) == (
        1,
        [
            "rows.csv: 20 train, 0 val, 0 test; 0 rejected",
            "overweight has no value in any row",
            "weight has no value in any row",
            "2 problems",
        ],
    )


def test_a_hospital_of_one_class_among_others_may_be_coded_otherwise(tmp_path):
    lines = [f"P{n},{40 + n},130,230,150,1.5,1,2,0,1,0,{n % 2}\n" for n in range(30)]
    alone = [line.replace(",0\n", ",1\n") for line in lines]
    few = [line.replace(",1\n", ",0\n") for line in lines[:19]]
    places = [
        str(hearts(tmp_path / name, own))
        for name, own in {"north": lines, "south": lines, "east": alone, "west": few}.items()
    ]
    code, printed = check(*places, "--app", str(HEART))
    text = (
        "east: disease is 1 in all 30 rows; 2 of 3 other hospitals have several classes: perhaps "
        "it is coded otherwise here"
    )
    assert code == 1
    assert [line for line in printed if "several classes" in line] == [text]
    # Nobody has several classes.
    code, printed = check(*places[2:], "--app", str(HEART))
    assert "several classes" not in " ".join(printed)


# --- What an app would say ------------------------------------------------------------------------


def words(lines):
    return " ".join(" ".join(lines).split())


def test_rules_choose_series_and_go_to_the_written_file(tmp_path):
    for patient in "ab":
        study = {"StudyInstanceUID": f"1.2.{ord(patient)}", "FrameOfReferenceUID": "1.3"}
        for number, (name, count) in enumerate([("t1", 4), ("t2", 6), ("flair", 6)]):
            voxels = np.random.default_rng(number).integers(0, 99, (5, 4, count))
            folder = tmp_path / "pacs" / patient / name
            tags = {"SeriesDescription": name, "SeriesNumber": number, "Modality": "MR"} | study
            write_series(folder, voxels + ord(patient), patient=patient, **tags)
    (tmp_path / "pacs" / "labels.csv").write_text("patient,label\na,0\nb,1\n")
    rules = "description=t2; description=t1"
    # The first slices of t2 lie beyond t1.
    code, lines = check(tmp_path / "pacs", "--series", rules)
    assert code == 1
    assert "voxels of the grid lie outside of it" in words(lines)
    out = tmp_path / "found.json"
    code, lines = check(tmp_path / "pacs", "--series", "description=t2", "--out", str(out))
    assert (code, lines[-1]) == (0, "no problems")
    assert "left out: 4 series that the rules do not take" in words(lines)
    entries = [entry for entry in json.loads(out.read_text()) if entry["image"]]
    assert [entry["shape"] for entry in entries] == [[1, 5, 4, 6]] * 2
    (tmp_path / "pacs" / "series.csv").write_text("description\nt1\n")
    code, lines = check(tmp_path / "pacs", "--series", "description=t2")
    assert "series.csv of the folder is used, and the rules that were given are not" in lines
    assert "1x5x4x4" in words(lines)


def test_rules_are_for_dicom_files(folder):
    code, lines = check(folder, "--series", "modality=CT")
    assert (code, "series chooses among DICOM files, and" in words(lines)) == (2, True)
    assert "is read by its datalist.csv, which lists what is taken" in words(lines)


@pytest.fixture
def xrays(tmp_path):
    lines = ["image,edema,effusion,patient"]
    pixels = np.random.default_rng(0).integers(0, 99, (3, 8, 9)).astype(np.uint8)
    for number, cells in enumerate(("1,0", "0,", "1,1")):
        Image.fromarray(pixels[number]).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{cells},p{number}")
    (tmp_path / "datalist.csv").write_text("\n".join(lines))
    return tmp_path


def test_findings_are_columns(xrays):
    code, lines = check(xrays)
    assert (code, "if findings are columns, name them: fedmed data" in words(lines)) == (2, True)
    code, lines = check(xrays, "--findings", "edema, Effusion")
    assert (code, lines[-1]) == (0, "no problems")
    assert "edema: there in 2 images, not in 1, not read in 0" in lines
    assert "Effusion: there in 1 images, not in 1, not read in 1" in lines
    with (xrays / "datalist.csv").open("a") as file:
        file.write("\n0.png,2,0,p9\n")
    (xrays / "3.png").write_bytes((xrays / "2.png").read_bytes())
    with (xrays / "datalist.csv").open("a") as file:
        file.write("3.png,2,0,p2\n")
    code, lines = check(xrays, "--findings", "edema,effusion")
    assert code == 1
    assert "label of edema is 2: it must be 1, 0 or None" in words(lines)


def test_bags_are_folders_of_patches(tmp_path):
    rng = np.random.default_rng(0)
    for name, sides in (("a", (8, 8)), ("b", (8, 8)), ("c", (8, 7))):
        (tmp_path / name).mkdir()
        for number in range(3):
            size = sides if number == 2 else (8, 8)
            pixels = rng.integers(0, 99, size).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    lines = ["image,label,patient", "a,0,p1", "b,1,p2", "c,1,p3"]
    (tmp_path / "datalist.csv").write_text("\n".join(lines))
    assert check(tmp_path)[0] == 1
    code, lines = check(tmp_path, "--bags", "--classes", "2")
    assert (code, lines[-1]) == (1, "1 problem")
    assert "the patches of its bag differ in shape" in words(lines)
    assert "rows of each class: 0 (1), 1 (2)" in lines
    code, lines = check(tmp_path, "--bags", "--classes", "1")
    assert "labels must be integers from 0 to 0" in words(lines)


def test_structures_in_dicom_files_by_name(tmp_path):
    frame = "1.2.3.4"
    study = {"StudyInstanceUID": "1.2.5", "FrameOfReferenceUID": frame, "Modality": "CT"}
    voxels = np.random.default_rng(0).integers(0, 99, (5, 4, 3))
    files = write_series(tmp_path / "s", voxels, series_uid="1.2.6", **study)
    outer = np.zeros((4, 5))
    outer[1:3, 1:4] = 1
    inner = np.zeros((4, 5))
    inner[1, 2] = 1
    reference = Dataset()
    reference.SeriesInstanceUID = "1.2.6"
    write_seg(
        tmp_path / "m.dcm",
        [{"SegmentLabel": "liver"}, {"SegmentLabel": "lesion"}],
        [(1, (0, 0, 1), outer), (2, (0, 0, 1), inner)],
        frame_of_reference=frame,
        ReferencedSeriesSequence=[reference],
        StudyInstanceUID="1.2.5",
    )
    assert len(files) == 3
    code, lines = check(tmp_path)
    assert (code, "holds structures by name: name the classes" in words(lines)) == (1, True)
    code, lines = check(tmp_path, "--names", "liver,lesion")
    assert code == 1
    assert "liver and lesion both claim 1 voxel" in words(lines)
    code, lines = check(tmp_path, "--names", "lesion")
    assert (code, lines[-1]) == (0, "no problems")
    code, lines = check(tmp_path, "--regions", "liver=1,2; lesion=2")
    assert (code, lines[-1]) == (0, "no problems")
    assert "images that hold each class: 0 (1), 1 (1), 2 (1)" in lines
    code, lines = check(tmp_path, "--regions", "liver=1; lesion=2")
    assert code == 1
    assert "1 voxel lies in liver, lesion, as no value of the regions does" in words(lines)


def test_names_and_regions_must_be_those_of_dataset_json(folder):
    (folder / "datalist.csv").unlink()
    entries = [{"image": f"x{n}.nii.gz", "label": f"m{n}.nii.gz", "patient": n} for n in range(3)]
    content = {"training": entries, "labels": {"0": "background", "1": "liver"}}
    (folder / "dataset.json").write_text(json.dumps(content))
    assert check(folder, "--names", "Liver")[0] == 0
    code, lines = check(folder, "--names", "spleen")
    assert code == 2
    assert "dataset.json names the classes liver, and not spleen" in words(lines)
    code, lines = check(folder, "--regions", "liver=1")
    assert "dataset.json names the classes liver, and not the regions: liver of 1" in words(lines)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--findings", "a,b", "--bags"), "--bags does not go with --findings a,b: they say what"),
        (("--bags", "--empty-masks"), "--empty-masks does not go with --bags: they say what"),
        (
            ("--regions", "a=1", "--classes", "2"),
            "--classes 2 does not go with --regions a=1: they say what labels are in two ways",
        ),
        (("--findings", "a,,b"), "--findings must be different names with commas between them"),
        (("--names", "a,A"), "--names must be different names with commas between them, got"),
        (("--regions", "a=1; a=2"), "--regions must be different regions, each with values of"),
        (("--regions", "a"), "--regions must be different regions, each with values of masks"),
        (("--regions", "a=0"), "region 'a' must hold values from 1 to 16777215, since 0 is the"),
        (("--app", "x", "--bags"), "--bags does not go with --app: the app says it"),
        (("--app", "x", "--series", "a=b"), "--series a=b does not go with --app: the app says it"),
    ],
)
def test_options_that_contradict_each_other(folder, options, text):
    code, lines = check(folder, *options)
    assert (code, text in words(lines)) == (2, True), lines
