"""Four hospitals, each with a mistake of its own: all are named before anything is trained."""

import csv
import json

import numpy as np
import pytest
from tiny import see
from typer.testing import CliRunner

from fedmed_flower import InputError, run_local
from fedmed_flower.cli.main import app as fedmed
from fedmed_flower.engines.project import load_project

PROJECT = """
[project]
name = "stroke"
version = "1.0.0"
[tool.flwr.app]
publisher = "us"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
settings = ""
num-server-rounds = 1
"""
CLIENT = """
from fedmed_flower import Schema, SiteData, TabularClient
from fedmed_flower.data import read_table, split_patients


class Hospital(TabularClient):
    schema = Schema(
        "readmitted",
        "binary",
        numeric=("age", "creatinine", "onset"),
        categorical=("sex",),
    )

    def load_data(self, site):
        table = read_table(site.folder / "patients.csv", self.schema)
        return SiteData(
            **split_patients(table.rows, self.settings.seed),
            source="patients.csv",
            rejected=table.rejected,
            lacking=table.lacking,
        )


app = Hospital.client_app()
"""
SERVER = """
from client_app import Hospital
from flwr.serverapp import ServerApp

from fedmed_flower import federate
from fedmed_flower.strategies import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    federate(FedAvg(), grid, context, Hospital(context))
"""
TYPED = "age is far from its other values ("
OTHER_UNIT = "creatinine has the mean "
NO_DATES = "onset is not a number in 200 rows, counted as missing; the first is line 2 with '"
NO_VALUE = "onset has no value in any row"


@pytest.fixture
def app(tmp_path):
    folder = tmp_path / "stroke"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "client_app.py").write_text(CLIENT)
    (folder / "server_app.py").write_text(SERVER)
    return folder


def patients(index):
    """200 patients, with the day of the year on which they fell ill."""
    rng = np.random.default_rng(index)
    for number in range(200):
        age = rng.normal(65, 12)
        yield {
            "patient": f"{index}-{number}",
            "age": round(age, 1),
            "creatinine": round(rng.lognormal(0, 0.4), 2),
            "onset": int(rng.integers(1, 366)),
            "sex": "fm"[rng.integers(2)],
            "readmitted": int(rng.random() < 1 / (1 + np.exp((65 - age) / 8))),
        }


def coded(row, number):
    return row | {"readmitted": row["readmitted"] + 1}


def typed(row, number):
    return row | ({"age": 1e9} if number in (17, 90) else {})


def micromoles(row, number):
    return row | {"creatinine": round(88.4 * row["creatinine"], 1)}


def dotted(row, number):
    return row | {"onset": f"{1 + row['onset'] % 28:02}.01.2020"}


MISTAKES = {"east": coded, "north": typed, "south": micromoles, "west": dotted}


def write(folder, mistakes):
    for index, (name, change) in enumerate(mistakes.items()):
        rows = [change(row, number) for number, row in enumerate(patients(index))]
        (folder / name).mkdir(parents=True)
        with (folder / name / "patients.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


@pytest.fixture
def cohort(tmp_path):
    return write(tmp_path / "data", MISTAKES)


def check(*folders, app):
    result = CliRunner().invoke(
        fedmed, ["data", "check", *map(str, folders), "--app", str(app)], env={"COLUMNS": "500"}
    )
    return result.exit_code, result.output


def run(app, cohort, folder, **config):
    """Run the app; return the kinds of messages that were sent, and the error if there was one."""
    project = load_project(app)
    kinds = []
    config = {"run-dir": str(folder), "data": str(cohort), "pictures": 0} | config
    try:
        run_local(
            project.server_app(),
            project.client_app(),
            len(list(cohort.iterdir())),
            run_config=project.declared | config,
            on_message=lambda message, done, sent: kinds.append(message.metadata.message_type),
        )
    except InputError as error:
        return kinds, str(error)
    return kinds, ""


def test_the_check_of_a_hospital_alone_says_what_can_be_known_there(app, cohort):
    found = {name: check(cohort / name, app=app) for name in MISTAKES}
    assert {name: code for name, (code, _) in found.items()} == {
        "east": 2,
        "north": 1,
        "south": 0,
        "west": 1,
    }
    ones = sum(row["readmitted"] == 0 for row in patients(0))
    counts = sorted((ones, 200 - ones), reverse=True)
    assert "not started: " in found["east"][1]
    assert "target readmitted is '" in found["east"][1]
    assert f"({counts[0]} rows)" in found["east"][1]
    assert TYPED in found["north"][1]
    assert "in 2 rows, kept; the first is line 19 with '1000000000.0'" in found["north"][1]
    assert NO_DATES in found["west"][1]
    assert found["west"][1].count(NO_VALUE) == 1


def test_the_check_of_the_cohort_names_all_four_and_writes_nothing(app, cohort):
    code, output = check(*sorted(cohort.iterdir()), app=app)
    assert code == 2
    lines = output.splitlines()
    assert sum(line.startswith(f"south: {OTHER_UNIT}") for line in lines) == 1
    for name, text in (
        ("east", "cannot be used: "),
        ("north", TYPED),
        ("south", OTHER_UNIT),
        ("west", "onset has no value in any row: perhaps it is written in another way; 2 of 2"),
    ):
        assert any(line.startswith(f"{name}: ") and text in line for line in lines), output
    assert {path.name for path in cohort.rglob("*") if path.is_file()} == {"patients.csv"}


def test_a_run_names_all_four_and_can_be_told_to_train_nothing(app, cohort, tmp_path, caplog):
    kinds, error = run(app, cohort, tmp_path / "run", outlying="stop")
    assert {*kinds} == {"query.describe", "query.contribution"}
    assert error == (
        "north (age), south (creatinine), west (onset) stand out, as the log says: correct these "
        f'columns, or set outlying="note" to train all the same{see("outlying")}'
    )
    log = caplog.text
    assert "1 of 4 sites cannot take part (east): " in log
    assert "target readmitted is '" in log
    assert "north: age has the mean 1" in log
    assert f"south: {OTHER_UNIT}" in log
    assert "west: onset has no value in any row: perhaps it is written in another way" in log
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_has_named_all_four_before_it_trains(app, cohort, tmp_path):
    run(app, cohort, tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    before, _, _ = log.partition("round 1:")
    for text in (
        "sites cannot take part (east): ",
        "north: age has the mean 1",
        f"south: {OTHER_UNIT}",
        "west: onset has no value in any row",
    ):
        assert text in before
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {note["site"] for note in summary["notes"]} == {"north", "south", "west"}
    (names,) = summary["refused"].values()
    assert names == ["east"]


def test_sound_hospitals_are_not_named(app, tmp_path):
    sound = write(tmp_path / "data", dict.fromkeys(MISTAKES, lambda row, number: row))
    code, output = check(*sorted(sound.iterdir()), app=app)
    assert (code, output.splitlines()[-1]) == (0, "no problems")
    kinds, error = run(app, sound, tmp_path / "run", outlying="stop")
    assert (error, "train" in kinds) == ("", True)
