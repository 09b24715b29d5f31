"""`fedmed run --data`: each folder is a hospital; those of --node-config are treated as real."""

import json
import sys

import numpy as np
import pytest
from deployment_helper import write_app
from typer.testing import CliRunner

from fedmed_flower.cli.main import app
from fedmed_flower.privacy.ledger import Ledger

CONFIG = {"settings": "", "num-server-rounds": 2, "local-steps": 2, "pictures": 0}
CONFIG |= {"min-cell-count": 1}
CLIENT = """
from fedmed_flower import Schema, SiteData, TabularClient
from fedmed_flower.data import read_table, split_patients


class Ward(TabularClient):
    schema = Schema(target="ill", task="binary", numeric=("age",), ranges={"age": (0, 100)})

    def load_data(self, site):
        table = read_table(site.folder / "ward.csv", self.schema)
        splits = split_patients(table.rows, self.settings.seed)
        return SiteData(**splits, source=f"ward {site.name}")


app = Ward.client_app()
"""
SERVER = """
from flwr.serverapp import ServerApp
from client_app import Ward

from fedmed_flower import federate
from fedmed_flower.strategies import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    federate(FedAvg(), grid, context, Ward(context))
"""
NAMES = ("east", "north", "south")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with an app, and the data of three hospitals."""
    write_app(tmp_path / "app", SERVER, CLIENT, **CONFIG)
    for seed, name in enumerate(NAMES):
        ages = np.random.default_rng(seed).integers(20, 90, 60)
        lines = [f"{name}{k},{age},{int(age > 55)}" for k, age in enumerate(ages)]
        (tmp_path / "data" / name).mkdir(parents=True)
        text = "\n".join(["patient,age,ill", *lines])
        (tmp_path / "data" / name / "ward.csv").write_text(text)
    (tmp_path / "data" / ".hidden").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("not a hospital")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(app, ["run", "app", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_each_folder_is_a_simulated_hospital_with_its_name_and_its_ledger(world):
    private = ["privacy=patient", "preparation=declared", "target-epsilon=50", "delta=0.001"]
    settings = [part for setting in private for part in ("-c", setting)]
    code, output = run("--data", "data", "--out", "run", *settings)
    assert code == 0, output
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert list(summary["sites"]) == list(NAMES)
    assert summary["data"] == "ward east; ward north; ward south"
    assert summary["config"]["data"] == str(world / "data")
    ledgers = sorted(path.stem for path in (world / "run" / "ledgers").glob("*.sqlite"))
    assert ledgers == list(NAMES)
    assert not list((world / "data").glob("*/*.sqlite"))


def test_a_hospital_of_the_node_config_is_treated_as_a_real_one(world):
    # Of its 60 patients a key of its own, drawn anew in each run, decides who trains.
    (world / "nodes.toml").write_text("[north]\nmin-cell-count = 30\nmin-train-patients = 61\n")
    code, output = run("--data", "data", "--node-config", "nodes.toml", "--out", "run")
    assert code == 0, output
    summary = json.loads((world / "run" / "summary.json").read_text())
    # Its ledger, and the key by which it splits its patients, lie in its own folder.
    assert Ledger(world / "data" / "north" / "privacy-ledger.sqlite", read_only=True).split_key()
    assert not (world / "data" / "south" / "privacy-ledger.sqlite").exists()
    reasons = {entry["site"]: entry["reason"] for entry in summary["failures"]}
    assert reasons.keys() == {"north"}
    assert summary["test"]["sites"].keys() >= {"east", "south"}


def test_a_budget_can_be_tried_before_a_real_run(world):
    """The hospital with a budget below the run's target declines, and the others train."""
    budget = "[north]\nbudget-epsilon = 0.5\nbudget-delta = 0.001\nmin-cell-count = 1\n"
    (world / "nodes.toml").write_text(budget)
    private = ["privacy=patient", "preparation=declared", "target-epsilon=50", "delta=0.001"]
    settings = [part for setting in private for part in ("-c", setting)]
    code, output = run(
        *("--data", "data", "--node-config", "nodes.toml", "--out", "run", *settings)
    )
    assert code == 0, output
    summary = json.loads((world / "run" / "summary.json").read_text())
    reasons = {(entry["site"], entry["reason"]) for entry in summary["failures"]}
    # The reason does not disclose the budget.
    assert reasons == {("north", "declined: the hospital's privacy budget would be passed")}
    sites = summary["privacy"]["patient"]["sites"]
    assert sites["east"]["rounds"] == 2
    assert sites["north"]["declined"] == 2
    assert "epsilon" not in sites["north"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "east has no folder"),
        (["--data", "data", "--sites", "2"], "--sites must be 3, the number of folders in data"),
        (["--data", "nowhere"], "data must be a folder that holds one for each hospital"),
        (["--data", "data/east"], "data must be a folder that holds one for each hospital"),
        (["-c", "data=data"], "fedmed run sets data itself: give --data instead of -c data"),
        (["--node-config", "nodes.toml"], "--node-config needs --data and the engine local"),
        (["--data", "data", "--node-config", "none.toml"], "none.toml cannot be read as TOML"),
        (
            ["--data", "data", "--node-config", "nodes.toml"],
            "nodes.toml, north: the node config has",
        ),
        (
            ["--data", "data", "--node-config", "west.toml"],
            "west.toml: 'west' must be a table with",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(world, arguments, text):
    (world / "nodes.toml").write_text("[north]\nbudget_epsilon = 1.0\n")
    (world / "west.toml").write_text("[west]\nmin-cell-count = 5\n")
    code, output = run(*arguments, "--out", "run")
    assert code == 2
    assert text.replace("east", "hospital-1") in output if not arguments else text in output
    assert not (world / "run").exists()


def test_a_run_on_folders_is_resumed_with_the_data_of_the_start(world):
    code, output = run("--data", "data", "--out", "run", "--rounds", "1")
    assert code == 0, output
    code, output = run("--resume", "run", "--rounds", "2")
    assert code == 2
    assert f"data was '{world / 'data'}' when" in output
    assert output.endswith(f"give them: --data {world / 'data'}")
    code, output = run("--resume", "run", "--rounds", "2", "--data", "data")
    assert code == 0, output
    assert json.loads((world / "run" / "summary.json").read_text())["rounds"] == 2


def test_statistics_describe_the_hospitals_of_a_folder(world, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(app, ["statistics", "app", "--data", "data", "--out", "survey"])
    assert result.exit_code == 0, result.output
    summary = json.loads((world / "survey" / "summary.json").read_text())
    assert summary["sites"] == dict.fromkeys(NAMES, 60)
    rows = {row[0]: row[1:] for row in summary["tables"][0]["rows"]}
    assert rows["Patients"] == ["60", "60", "60", "180"]
    every = [np.random.default_rng(seed).integers(20, 90, 60) for seed in range(len(NAMES))]
    assert rows["age, mean (SD)"][0].startswith(f"{every[0].mean():.3g} ")
    assert "finished: 3 of 3 hospitals" in result.output


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--data", "data", "--sites", "2"], "--sites must be 3, the number of folders in data"),
        (["--data", "nowhere"], "data must be a folder that holds one for each hospital, got"),
        (["--data", "data", "-c", "data=other"], "data is given twice: by --data and by -c data="),
    ],
)
def test_statistics_of_wrong_folders_write_nothing(world, monkeypatch, options, text):
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(app, ["statistics", "app", *options, "--out", "survey"])
    assert result.exit_code == 2
    assert text in result.output
    assert not (world / "survey").exists()
