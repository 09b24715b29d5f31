import gzip
import math

import pandas as pd
import pytest
from tiny import says

from fedmed_flower import InputError
from fedmed_flower.data.cohorts import (
    ICU_FLAGS,
    ICU_RANGES,
    REGIONS,
    TCGA_FLAGS,
    breast_cancer,
    heart_disease,
    intensive_care,
)
from fedmed_flower.data.download import SourceUnavailable
from fedmed_flower.data.sources import HEART

STAYS = {
    "patientunitstayid": [1, 2, 3, 4, 5],
    "uniquepid": ["a", "a", "b", "c", "d"],
    "hospitalid": [7, 7, 7, 9, 9],
    "gender": ["Female", "Female", "Male", None, "Male"],
    "age": ["61", "> 89", "40", None, "33"],
    "unittype": ["MICU"] * 5,
    # Of the fourth it is not known how the stay ended; the fifth has no APACHE variables.
    "hospitaldischargestatus": ["Alive", "Expired", "Expired", None, "Alive"],
}
MEASURED = [name for name in ICU_RANGES if name != "age"]
IN_APS = ("intubated", "vent", "dialysis")


def write(folder, patient=None, aps=None, predicted=None):
    """Write three small tables as the eICU demo has them, with columns replaced."""
    numbers = [1, 2, 3, 4]
    tables = {
        "patient": STAYS | (patient or {}),
        "apacheapsvar": {"patientunitstayid": numbers}
        | {name: [36.5, -1, 0, 1] for name in MEASURED}
        | {name: [1, 0, -1, 0] for name in IN_APS}
        | (aps or {}),
        "apachepredvar": {"patientunitstayid": numbers}
        | {name: [0, 1, None, 0] for name in ICU_FLAGS if name not in IN_APS}
        | (predicted or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in tables.items():
        pd.DataFrame(columns).to_csv(folder / f"{name}.csv.gz", index=False)
    return folder


def test_stays_of_intensive_care_are_read_from_three_tables(tmp_path):
    frame = intensive_care(write(tmp_path))
    assert list(frame["stay"]) == [1, 2, 3]
    assert list(frame["patient"]) == ["a", "a", "b"]
    assert list(frame["hospital"]) == [7, 7, 7]
    assert list(frame["died"]) == [0, 1, 1]
    assert list(frame["age"]) == [61, 90, 40]
    assert list(frame["gender"]) == ["Female", "Female", "Male"]
    for name in MEASURED:
        first, second, third = frame[name]
        assert (first, third) == (36.5, 0)
        assert math.isnan(second)
    # Neither -1 nor a blank is a flag that was set.
    assert list(frame["vent"]) == [1, 0, 0]
    assert list(frame["diabetes"]) == [0, 1, 0]
    assert set(frame.columns) == {
        *("stay", "patient", "hospital", "gender", "unit", "died"), *ICU_RANGES, *ICU_FLAGS
    }  # fmt: skip


def test_the_tables_are_looked_for_in_the_folder_that_fedmed_data_names(tmp_path, monkeypatch):
    write(tmp_path / "eicu-demo")
    monkeypatch.setenv("FEDMED_DATA", str(tmp_path))
    assert len(intensive_care()) == 3
    (tmp_path / "eicu-demo" / "apacheapsvar.csv.gz").unlink()
    remedy = (
        "get them from https://physionet.org/content/eicu-crd-demo/2.0.1/ into a folder eicu-demo, "
        "and set FEDMED_DATA to the folder above it"
    )
    names = "patient.csv.gz, apacheapsvar.csv.gz, apachepredvar.csv.gz"
    text = f"eICU demo: there is no {names} in {tmp_path / 'eicu-demo'}: {remedy}"
    with pytest.raises(SourceUnavailable, match=says(text)):
        intensive_care()
    monkeypatch.delenv("FEDMED_DATA")
    text = f"eICU demo: there is no {names} in a folder that FEDMED_DATA names: {remedy}"
    with pytest.raises(SourceUnavailable, match=says(text)):
        intensive_care()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda f: (f / "patient.csv.gz").write_bytes(b"no gzip"), "BadGzipFile: Not a gzipped"),
        (lambda f: (f / "patient.csv.gz").write_bytes(gzip.compress(b"x" * 10**5)[:-20]), ""),
        (lambda f: (f / "patient.csv.gz").write_bytes(_flipped(f)), ""),
        (lambda f: (f / "patient.csv.gz").write_bytes(gzip.compress(b"")), "EmptyDataError"),
        (lambda f: (f / "patient.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n")), "KeyError"),
        (lambda f: (f / "patient.csv.gz").write_bytes(gzip.compress(b"\xff\xfe\n")), "Unicode"),
        (lambda f: write(f, aps={"patientunitstayid": [1, 1, 2, 3]}), "MergeError: Merge keys are"),
    ],
)
def test_a_broken_table_of_intensive_care_is_named(change, error, tmp_path):
    change(write(tmp_path))
    with pytest.raises(InputError) as raised:
        intensive_care(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: {error}")


def _flipped(folder):
    """Return a file in the middle of which bytes are wrong."""
    content = bytearray((folder / "patient.csv.gz").read_bytes())
    for place in range(30, 60):
        content[place] ^= 0xFF
    return bytes(content)


def tcga(folder, **columns):
    """Write two small tables as FLamby has them, with columns replaced."""
    (folder / "tcga-brca").mkdir(parents=True, exist_ok=True)
    patients = [f"TCGA-{letter}" for letter in "abcd"]
    table = {"pid": patients, "age_at_index": [50, 60, 70, 80]}
    table |= {name: [0, 1, 0, 1] for name in TCGA_FLAGS}
    table |= {"E": [0.0, 1.0, 0.0, 1.0], "T": [538.0, 677.0, 0.0, -7.0]}
    split = {"pid": patients[::-1], "fold": ["train", "test", "train", "test"]}
    split |= {"fold2": ["train_5", "test_0", "train_0", "test_3"]}
    both = {"brca": table, "train_test_split": split}
    for name, own in both.items():
        frame = pd.DataFrame(own | {key: columns[key] for key in own if key in columns})
        frame.to_csv(folder / "tcga-brca" / f"{name}.csv", index=False)


def test_patients_with_breast_cancer_have_a_region_and_a_split(tmp_path, monkeypatch):
    tcga(tmp_path)
    monkeypatch.setenv("FEDMED_DATA", str(tmp_path))
    frame = breast_cancer()
    assert list(frame["patient"]) == ["TCGA-a", "TCGA-b", "TCGA-c", "TCGA-d"]
    assert list(frame["region"]) == ["Midwest", "Northeast", "Northeast", "Canada"]
    assert list(frame["split"]) == ["test", "train", "test", "train"]
    # Who has no time is there, for the schema to reject.
    assert list(frame["T"]) == [538, 677, 0, -7]
    assert list(frame["E"]) == [0, 1, 0, 1]
    assert len(TCGA_FLAGS) == 38
    assert frame.shape == (4, 44)


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"fold2": ["train_9"] * 4}, "IndexError: tuple index out of range"),
        ({"fold2": [None] * 4}, "TypeError: "),
        ({"pid": ["TCGA-a"] * 4}, "MergeError: Merge keys are not unique"),
    ],
)
def test_a_broken_table_of_breast_cancer_is_named(columns, error, tmp_path, monkeypatch):
    tcga(tmp_path, **columns)
    monkeypatch.setenv("FEDMED_DATA", str(tmp_path))
    folder = tmp_path / "tcga-brca"
    where = f"{folder / 'brca.csv'} or {folder / 'train_test_split.csv'}: "
    with pytest.raises(InputError) as raised:
        breast_cancer()
    assert str(raised.value).startswith(where + error)
    (folder / "brca.csv").write_text("pid,age_at_index\n")
    with pytest.raises(InputError, match=r"brca\.csv"):
        breast_cancer()


def test_heart_disease_has_no_impossible_zeros(tmp_path, monkeypatch):
    (tmp_path / "heart-disease").mkdir()
    line = "63,1,1,{pressure},{chol},1,2,150,0,2.3,3,0,6,{found}\n"
    lines = [(145, 233, 0), (0, 0, 4), ("?", 204, 1)]
    text = "".join(line.format(pressure=p, chol=c, found=f) for p, c, f in lines)
    for name in HEART:
        (tmp_path / "heart-disease" / f"processed.{name}.data").write_text(text)
    monkeypatch.setenv("FEDMED_DATA", str(tmp_path))
    tables, source = heart_disease()
    assert list(tables) == ["cleveland", "hungarian", "switzerland", "va"]
    assert source == "UCI Heart Disease"
    frame = tables["va"]
    assert list(frame["disease"]) == [0, 1, 1]
    assert list(frame["patient"]) == ["va-1", "va-2", "va-3"]
    assert frame["chol"].isna().tolist() == [False, True, False]
    assert frame["trestbps"].isna().tolist() == [False, True, True]
    # 0 is a value elsewhere.
    assert list(frame["exang"]) == [0, 0, 0]


@pytest.mark.realdata
def test_the_real_tables_have_the_known_numbers_of_patients():
    frame = intensive_care()
    assert (len(frame), frame["hospital"].nunique(), frame["died"].sum()) == (2179, 186, 196)
    assert frame["stay"].is_unique
    for name, (low, high) in ICU_RANGES.items():
        known = frame[name].dropna()
        # Few values only are out of their plausible range.
        assert ((known < low) | (known > high)).mean() < 0.01, name
        assert len(known) > 200, name
    assert frame[list(ICU_FLAGS)].isin([0, 1]).all().all()
    frame = breast_cancer()
    assert len(frame) == 1088
    assert frame["patient"].is_unique
    assert dict(frame["region"].value_counts()) == dict(
        zip(REGIONS, (311, 196, 206, 162, 162, 51), strict=True)
    )
    assert frame.isna().sum().sum() == 0
    tables, _ = heart_disease()
    assert {name: len(table) for name, table in tables.items()} == {
        "cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200,
    }  # fmt: skip
    for table in tables.values():
        assert not (table[["chol", "trestbps"]] == 0).any().any()
