"""Flower apps without our client or `federate` run under `fedmed run`, and show something."""

import os
import sys

import numpy as np
import pytest
from builders import run as run_strategy
from builders import site_app
from deployment_helper import write_app
from flwr.app import ArrayRecord
from typer.testing import CliRunner

from fedmed_flower.cli.main import app
from fedmed_flower.errors import InputError
from fedmed_flower.strategies import FedAvg

CLIENT = """
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    moved = Array(message.content["arrays"]["w"].numpy() + context.run_config["learning_rate"])
    metrics = MetricRecord({"num-examples": 3, "train_loss": 0.25})
    content = RecordDict({"arrays": ArrayRecord({"w": moved}), "metrics": metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message, context):
    metrics = MetricRecord({"num-examples": 3, "eval_acc": 0.75})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
"""
SERVER = """
import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp import ServerApp
from MODULE import STRATEGY

app = ServerApp()


@app.main()
def main(grid, context):
    strategy = STRATEGY(ARGUMENTS)
    arrays = ArrayRecord({"w": Array(np.zeros(4, np.float32))})
    strategy.start(
        grid,
        arrays,
        num_rounds=context.run_config["rounds"],
        evaluate_fn=lambda number, model: MetricRecord({"central_acc": 0.5}),
    )
"""


DECLARED = {"rounds": 2, "learning_rate": 0.1}
CONFIG = {"settings": "", "pictures": 0}
OURS = """
from tiny import TinyClient

app = TinyClient.client_app()
"""
PLAIN = """
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from tiny import linear

from fedmed_flower.strategies import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    FedAvg().start(grid, ArrayRecord(linear().state_dict()), num_rounds=2)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(
        strategy,
        *options,
        module="fedmed_flower.strategies",
        arguments="",
        client=CLIENT,
        server=SERVER,
        declared=None,
    ):
        server = server.replace("MODULE", module).replace("STRATEGY", strategy)
        server = server.replace("ARGUMENTS", arguments)
        write_app(tmp_path / "app", server, client, **(declared or DECLARED))
        result = CliRunner().invoke(app, ["run", "app", "--sites", "3", *options])
        assert "FEDMED_RUN_DIR" not in os.environ
        return result.exit_code, result.output

    return run


def test_an_app_without_federate_in_which_nobody_could_train_is_a_failed_run(run, tmp_path):
    broken = CLIENT.replace("    moved = ", '    raise OSError("no scanner today")\n    moved = ')
    code, output = run("FedAvg", "--out", "run", client=broken)
    assert code == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("failed: no site could train, see the lines above: ")
    assert "round 1: no train: all 3 sites failed alike, so the run ends" in output


def test_who_only_changed_the_import_sees_rounds_metrics_and_a_report(run, tmp_path):
    code, output = run("FedAvg", "--out", "run")
    assert code == 0, output
    assert "round 2/2  train train_loss 0.2500  val eval_acc 0.7500  server central_acc 0.5000" in (
        output
    )
    assert "finished: " in output.splitlines()[-1]
    table = (tmp_path / "run" / "metrics.csv").read_text()
    assert "2,val,all,eval_acc,0.75" in table
    page = (tmp_path / "run" / "report.html").read_text()
    for title in ("Training train_loss", "Validation eval_acc", "Server central_acc"):
        assert f"<b>{title}</b>" in page
    again = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert again.exit_code == 0, again.output


def test_a_strategy_with_noise_names_its_epsilon(run, tmp_path):
    noise = "noise_multiplier=1.0, clipping_norm=1.0, num_sampled_clients=3, sampling_rate=0.5"
    noise = (
        "noise_multiplier=1.0, clipping_norm=1.0, sampling_rate=0.5, population_size=3, delta=0.1"
    )
    code, output = run("DPFedAvg", "--out", "run", arguments=noise)
    assert code == 0, output
    assert "epsilon " in output
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Unit: the hospital." in page


def test_where_nothing_can_be_written_the_command_says_so(run, tmp_path):
    code, output = run("FedAvg", "--out", "run", module="flwr.serverapp.strategy")
    assert code == 0, output
    text = f"finished: nothing was written to {tmp_path / 'run'}: its strategy is not one of this"
    assert text in output
    assert not (tmp_path / "run").exists()


def test_its_settings_are_those_that_it_declares(run, tmp_path):
    code, output = run("FedAvg", "-c", "learning_rate=0.5", "-c", "rounds=1", "--out", "run")
    assert code == 0, output
    result = CliRunner().invoke(app, ["run", "app", "-c", "learning-rate=0.5"])
    assert result.exit_code == 2
    assert "the app has no setting 'learning-rate': did you mean learning_rate?" in result.output
    result = CliRunner().invoke(app, ["run", "app", "--rounds", "3"])
    assert result.exit_code == 2
    assert "--rounds sets num-server-rounds, which app does not declare" in result.output
    result = CliRunner().invoke(app, ["run", "app", "--data", str(tmp_path)])
    assert result.exit_code == 2
    assert "--data needs a client of this package, and that of app is another" in result.output


def test_our_client_under_a_strategy_without_federate_writes_into_out_too(run, tmp_path):
    code, output = run("FedAvg", "--out", "run", client=OURS, server=PLAIN, declared=CONFIG)
    assert code == 0, output
    assert "round 2/2  train loss" in output
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    assert "2,val,all,auc," in rows
    assert "Validation AUC" in (tmp_path / "run" / "report.html").read_text()


def test_a_folder_of_an_earlier_run_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMED_RUN_DIR", str(tmp_path))
    (tmp_path / "metrics.csv").write_text("earlier")
    with pytest.raises(InputError, match="is in use"):
        run_strategy(
            FedAvg(), site_app(lambda values, *_: (values, {})), ArrayRecord([np.zeros(2)])
        )
    assert (tmp_path / "metrics.csv").read_text() == "earlier"
