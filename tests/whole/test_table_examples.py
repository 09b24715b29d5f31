"""The examples and the documentation for tables, run as a user runs them."""

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from tiny import context_of
from typer.testing import CliRunner

from fedmed_flower.cli.main import app
from fedmed_flower.data.site import Site

ROOT = Path(__file__).parents[2]


def run(name, folder, *arguments):
    """Run an example for two rounds and return its summary."""
    command = ["run", str(ROOT / "examples" / name), "--rounds", "2", "--out", str(folder)]
    result = CliRunner().invoke(app, [*command, *arguments])
    assert result.exit_code == 0, result.output
    return json.loads((folder / "summary.json").read_text())


def test_the_documents_client_predicts_how_diabetes_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/guides/tables.md").read_text()
    code, trees = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "tables.md", "exec"), names := {})
    summary = json.loads((tmp_path / "runs/diabetes/summary.json").read_text())
    # A linear model of all patients reaches about 0.5.
    assert summary["test"]["federated"]["r2"] > 0.35
    assert {"r2@sex=1", "mae@age-band=40-60"} <= summary["test"]["federated"].keys()
    exec(compile(trees, "tables.md", "exec"), names)
    config = {"run-dir": "runs/trees", "num-server-rounds": 30}
    app = names["DiabetesHospital"].client_app()
    names["run_local"](names["server"], app, num_sites=3, run_config=config)
    summary = json.loads((tmp_path / "runs/trees/summary.json").read_text())
    assert summary["test"]["federated"]["r2"] > 0.25
    assert (tmp_path / "runs/trees/model.json").exists()


@pytest.mark.realdata
def test_four_hospitals_predict_heart_disease(tmp_path):
    summary = run("heart", tmp_path / "run", "-c", "personal-epochs=1")
    test = summary["test"]
    assert summary["sites"]["hospital-4"] == {"train": 130, "val": 19, "test": 51}
    assert test["federated"]["auc"] > 0.8
    assert test["personal"].keys() == test["sites"].keys()
    assert "auc@sex=1" in test["federated"]
    private = ("-c", "privacy=patient", "-c", "preparation=declared", "-c", "private-metrics=true")
    summary = run("heart", tmp_path / "private", *private)
    assert {*summary["privacy"]["patient"]["sites"]} == {*summary["sites"]}


@pytest.mark.realdata
def test_six_regions_predict_survival(tmp_path):
    test = run("survival", tmp_path / "run")["test"]
    assert {"c-index", "integrated-brier"} <= test["sites"]["hospital-1"].keys()
    assert test["federated"]["c-index"] > 0.6


@pytest.mark.realdata
def test_some_intensive_care_units_only_test(tmp_path):
    summary = run("icu", tmp_path / "run", "--sites", "30")
    tested = [name for name, counts in summary["sites"].items() if not counts["train"]]
    assert tested
    found = summary["test"]["sites"]
    assert {name for name in found if found[name]["num-examples"]} == {*tested}
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"Tested only: {len(tested)} hospitals" in report


@pytest.mark.realdata
def test_nobody_in_intensive_care_counts_at_two_hospitals():
    spec = spec_from_file_location("icu_client", ROOT / "examples/icu/client_app.py")
    spec.loader.exec_module(module := module_from_spec(spec))
    sides = []
    for index in range(186):
        client = module.IntensiveCareUnit(context_of(index, 186, fold=0, seed=0))
        data = client.load_data(Site(f"hospital-{index + 1}", index, 186, simulated=True))
        for split in (data.train, data.val, data.test):
            sides += {row["patient"] for row in split}
    assert len(sides) == len(set(sides)) == 1765


@pytest.mark.realdata
def test_the_command_tells_who_the_hospitals_patients_are(tmp_path):
    command = ["statistics", str(ROOT / "examples/heart"), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*command, "--where", "age>=50"])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["kind"] == "statistics"
    assert "cp = 4" in result.output
