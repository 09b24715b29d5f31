"""`fedmed evaluate`: the figures of a run again, with the settings of that run."""

import json
import re
import sys

import pytest
from deployment_helper import write_app
from typer.testing import CliRunner

from fedmed_flower.cli.main import app
from fedmed_flower.server.run_folder import RunFolder

SERVER = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from fedmed_flower import federate
from fedmed_flower.strategies import FedAvg
from tables import TinyTable

app = ServerApp()


@app.main()
def main(grid, context):
    client = TinyTable(context)
    START
"""
FEDERATE = "federate(FedAvg(), grid, context, client)"
# A server that looks at no setting of ours.
OWN_WAY = """
    arrays = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
    FedAvg().start(grid, arrays, num_rounds=1)
"""
CLIENT = """
from tables import TinyTable

app = TinyTable.client_app()
"""
PLAIN = """
from flwr.clientapp import ClientApp

app = ClientApp()
"""


def fedmed(*arguments):
    # Each command is a process of its own, in which no other app is loaded.
    for name in ("client_app", "server_app"):
        sys.modules.pop(name, None)
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.output


def figures_in(folder):
    return json.loads((folder / "summary.json").read_text())["test"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An app, and the folder of a run of it."""
    home = tmp_path_factory.mktemp("home")
    write_app(home / "app", SERVER.replace("START", FEDERATE), CLIENT, settings="")
    given = ("-c", "batch-size=16", "-c", "report-by=sex", "-c", "baselines=true")
    path = list(sys.path)
    code, output = fedmed("run", home / "app", "--sites", 3, *given, "--out", home / "run")
    # Else the apps of other tests of this process would find the modules of this one.
    sys.path[:] = path
    for name in ("client_app", "server_app"):
        sys.modules.pop(name, None)
    assert code == 0, output
    return home


def test_a_model_is_tested_as_its_run_tested_it(made, tmp_path):
    code, output = fedmed(
        *("evaluate", made / "run", made / "app", "--out", tmp_path / "test"),
        *("-c", "report-by=sex"),
    )
    assert code == 0, output
    before = {k: v for k, v in figures_in(made / "run").items() if k in ("federated", "sites")}
    assert figures_in(tmp_path / "test") == before
    assert output.startswith("app: 3 sites, engine local\n")
    assert re.search(r"^finished: nothing was trained, in \d+ s ", output, re.MULTILINE)
    table = output[output.index("AUC on each hospital's own test data") :]
    for site, figures in before["sites"].items():
        assert re.search(rf"{site} .* {figures['auc']:.3f} ", table)
    config = RunFolder(tmp_path / "test").read_config()["config"]
    assert (config["batch-size"], config["baselines"]) == (16, False)
    assert config["evaluate"] == str((made / "run").resolve())


def test_texts_of_the_run_are_given_again(made, tmp_path):
    code, output = fedmed("evaluate", made / "run", made / "app", "--out", tmp_path / "test")
    assert code == 2
    assert f"report-by was 'sex' in the run in {(made / 'run').resolve()} and is '' now: test " in (
        output
    )
    assert "if you trust that folder, give them: -c report-by=sex" in output
    assert not (tmp_path / "test").exists()
    # Another one may be chosen.
    code, output = fedmed(
        *("evaluate", made / "run", made / "app", "--out", tmp_path / "test"),
        *("-c", "report-by="),
    )
    assert code == 0, output
    assert not any("@sex" in name for name in figures_in(tmp_path / "test")["federated"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["-c", "baselines=true"], "fedmed evaluate trains nothing: leave out -c baselines"),
        (["-c", "resume=true"], "fedmed run sets resume itself: give --resume instead of -c"),
        (["-c", "evaluate=x"], "fedmed evaluate sets evaluate itself: give RUN"),
        (["--sites", "2"], "the number of sites was 3 in"),
    ],
)
def test_what_does_not_fit_is_refused(given, text, made, tmp_path):
    code, output = fedmed(
        *("evaluate", made / "run", made / "app", "--out", tmp_path / "test"),
        *("-c", "report-by=sex", *given),
    )
    assert (code, text in output) == (2, True), output
    assert not (tmp_path / "test").exists()


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("absent", "absent is not there: give a run folder with model.safetensors"),
        ("app", "app has no model.safetensors: give the folder of a run that has trained"),
    ],
)
def test_what_is_no_run_is_refused(place, text, made, tmp_path):
    code, output = fedmed("evaluate", made / place, made / "app", "--out", tmp_path / "test")
    assert (code, text in output) == (2, True), output
    assert not (tmp_path / "test").exists()


def test_an_app_that_cannot_test_a_model_is_named(made, tmp_path):
    write_app(tmp_path / "own", SERVER.replace("START", OWN_WAY), CLIENT, settings="")
    code, output = fedmed(
        *("evaluate", made / "run", tmp_path / "own", "--out", tmp_path / "test"),
        *("-c", "report-by=sex"),
    )
    assert code == 1
    assert "failed: own cannot test a model: its server does not call federate" in output
    write_app(tmp_path / "theirs", "app = None\n", PLAIN)
    code, output = fedmed("evaluate", made / "run", tmp_path / "theirs")
    assert code == 2
    assert "fedmed evaluate needs a client of this package, and that of theirs is another" in output


def test_a_run_that_starts_from_weights_names_them_when_it_is_resumed(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    given = ("-c", "report-by=sex", "-c", "init-from=run")
    out = tmp_path / "next"
    code, output = fedmed("run", "app", "--sites", 3, "--rounds", 1, *given, "--out", out)
    assert code == 0, output
    absolute = str((made / "run").resolve())
    assert RunFolder(out).read_config()["config"]["init-from"] == absolute
    code, output = fedmed("run", "app", "--rounds", 2, "-c", "report-by=sex", "--resume", out)
    assert code == 2
    assert f"if you trust that folder, give them: -c init-from={absolute}" in output
    code, output = fedmed("run", "app", "--rounds", 2, *given, "--resume", out)
    assert code == 0, output
    assert json.loads((out / "summary.json").read_text())["rounds"] == 2


@pytest.mark.slow
def test_flowers_engine_tests_a_model_to_the_same_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fedmed("new", "app", "--for", "table")[0] == 0
    assert fedmed("run", "app", "--sites", 2, "--rounds", 1, "--out", "run")[0] == 0
    code, output = fedmed("evaluate", "run", "app", "--engine", "flower", "--out", "test")
    assert code == 0, output
    assert figures_in(tmp_path / "test") == figures_in(tmp_path / "run")
