"""Runs in TensorBoard, MLflow and Weights & Biases, read back by these libraries."""

import json
import logging
import os
import re
import socket
import sys
import threading

import pytest
from tiny import run_tiny, says
from tracked import mlflow_of, tensorboard_of, wandb_of

from fedmed_flower.errors import InputError
from fedmed_flower.runs.tracking import MLflow, TensorBoard, WeightsAndBiases, figure_name
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.settings.plan import TRACKERS, Plan

ALL = ",".join(TRACKERS)
HOSTILE = ["St. Mary", "../../etc", "..", "a/b", "Süd", "x: y@z=1", "\u202eevil", "'; DROP TABLE--"]


class Proxy:
    """Counts who tries to reach the network, from whatever process, by the proxy that it is."""

    def __init__(self):
        self.callers = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self):
        while True:
            try:
                caller, _ = self.server.accept()
            except OSError:
                return
            self.callers += 1
            caller.close()


@pytest.fixture(scope="module", autouse=True)
def proxy(tmp_path_factory):
    """Let nobody reach the network, and keep the libraries' own files out of the home folder."""
    proxy = Proxy()
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            patch.setenv(name, proxy.url)
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(home))
        for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "NO_PROXY", "no_proxy"):
            patch.delenv(name, raising=False)
        connect = socket.socket.connect

        def local(self, address):
            if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
                raise AssertionError(f"a connection to {address}")
            return connect(self, address)

        patch.setattr(socket.socket, "connect", local)
        yield proxy
    proxy.server.close()


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, proxy):
    """A run of two rounds with models for comparison, tracked by all, then resumed for a third."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    run_tiny(folder, track=ALL, baselines=True, personal_epochs=1)
    before = folder_state(folder)
    run_tiny(folder, track=ALL, num_server_rounds=3, resume=True, baselines=True, personal_epochs=1)
    return folder, before


def folder_state(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def expected(folder):
    """Return step and value of each figure, by the table of the run."""
    lines = (folder / "metrics.csv").read_text().splitlines()[1:]
    figures = {}
    for line in lines:
        number, phase, site, metric, value = line.split(",")
        name = f"{phase}/{metric}/{site}"
        figures.setdefault(name, []).append((int(number), float(value)))
    return figures


@pytest.fixture
def file_store(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def test_tensorboard_has_every_figure_once(tracked):
    folder, _ = tracked
    figures, texts = tensorboard_of(folder)
    wanted = expected(folder)
    # The first test and comparison are of the model after two rounds.
    for name, steps in wanted.items():
        steps_of = [step for step, _ in figures[name]]
        assert steps_of == sorted(set(steps_of))
        assert dict(figures[name])[steps[-1][0]] == pytest.approx(steps[-1][1], rel=1e-6)
    assert figures.keys() == wanted.keys()
    assert [step for step, _ in figures["val/auc/all"]] == [1, 2, 3]
    assert [step for step, _ in figures["test/auc/hospital-1"]] == [2, 3]
    assert "    learning-rate = 0.05\n" in texts["settings"][0]
    assert texts["status"] == ["finished", "finished"]


def test_mlflow_has_every_figure_once_in_one_run(tracked, file_store):
    folder, _ = tracked
    run, figures = mlflow_of(folder)
    wanted = expected(folder)
    assert figures.keys() == wanted.keys()
    for name, steps in wanted.items():
        steps_of = [step for step, _ in figures[name]]
        assert steps_of == sorted(set(steps_of))
        assert figures[name][-1] == steps[-1]
    assert figures["train/loss/hospital-2"] == wanted["train/loss/hospital-2"]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["learning-rate"] == "0.05"
    assert run.data.params["strategy"] == "FedAvg"
    assert run.data.params["num-server-rounds"] == "2"


def test_weights_and_biases_has_every_figure_once_in_two_parts_of_one_run(tracked):
    folder, _ = tracked
    first, second = sorted((folder / "wandb").glob("*/*.wandb"))
    assert first.name == second.name
    wanted = expected(folder)
    before, kinds = wandb_of(first)
    after, again = wandb_of(second)
    assert before["val/auc/all"] + after["val/auc/all"] == wanted["val/auc/all"]
    assert before["train/loss/hospital-2"] == wanted["train/loss/hospital-2"][:2]
    assert after.keys() == wanted.keys()
    assert {name: figures[-1] for name, figures in after.items()} == {
        name: figures[-1] for name, figures in wanted.items()
    }
    (run,) = {record.run.run_id for record in (*kinds["run"], *again["run"])}
    assert first.name == f"run-{run}.wandb"
    config = {item.key: item.value_json for item in kinds["run"][0].run.config.update}
    assert config["learning-rate"] == "0.05"
    assert json.loads(config["strategy"]) == "FedAvg"
    summary = {
        (item.key or item.nested_key[0]): item.value_json
        for record in kinds["summary"]
        for item in record.summary.update
    }
    assert summary["status"] == '"finished"'


def test_nothing_of_the_computer_is_tracked(tracked):
    folder, _ = tracked
    for path in sorted((folder / "wandb").glob("*/*.wandb")):
        _, kinds = wandb_of(path)
        run = kinds["run"][0].run
        assert not run.host
        assert not run.HasField("git")
        assert "environment" not in kinds
        assert "stats" not in kinds


def test_nobody_reaches_the_network(tracked, proxy):
    assert proxy.callers == 0
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


def test_the_models_for_comparison_are_tracked_by_their_tests_alone(tracked):
    folder, _ = tracked
    phases = {name.partition("/")[0] for name in tensorboard_of(folder)[0]}
    assert phases == {
        "train", "val", "test", "local-test", "local-test-all", "pooled-test", "personal-test",
    }  # fmt: skip


def test_no_link_remains_in_the_run_folder(tracked):
    folder, _ = tracked
    assert [path for path in folder.rglob("*") if path.is_symlink()] == []


@pytest.mark.parametrize("tracker", [TensorBoard, MLflow, WeightsAndBiases])
def test_names_that_are_no_paths_and_values_that_are_no_numbers(tracker, tmp_path, file_store):
    tracker.require()
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    rows = [(1, "val", site, "auc@sex=F", number / 10) for number, site in enumerate(HOSTILE)]
    rows.append((1, "val", "all", "auc", float("nan")))
    tracking = tracker(folder, "ap/p: ../x", {"note": "a\nb" * 1000, "empty": ""})
    tracking.began("", 1, ())
    tracking.round_ended(1, rows)
    tracking.ended("failed", "OSError: \x1b[31mno space")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    if tracker is TensorBoard:
        figures = tensorboard_of(folder.path)[0]
    elif tracker is MLflow:
        run, figures = mlflow_of(folder.path)
        assert run.info.status == "FAILED"
        assert run.data.tags["message"] == r"OSError: \x1b[31mno space"
    else:
        (path,) = (folder.path / "wandb").glob("*/*.wandb")
        figures, _ = wandb_of(path)
    values = sorted(figures.pop(name)[0][1] for name in list(figures) if name != "val/auc/all")
    assert values == pytest.approx([number / 10 for number in range(len(HOSTILE))])
    assert list(figures) == ["val/auc/all"]


def test_the_names_of_figures():
    assert figure_name("val", "hospital-1", "auc") == "val/auc/hospital-1"
    assert figure_name("val", "hospital-1", "auc@sex=F") == "val/auc:sex:F/hospital-1"
    names = [figure_name("val", site, metric) for site in HOSTILE for metric in HOSTILE]
    assert len({*names}) == len(HOSTILE) ** 2
    for name in names:
        assert re.fullmatch(r"[\w.\- :]+/[\w.\- :]+/[\w.\- :]+", name)
        assert name == os.path.normpath(name)
        assert len(name) <= 250


def test_a_missing_package_is_told_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError) as caught:
        run_tiny(tmp_path / "run", track="mlflow")
    assert str(caught.value) == (
        "track = 'mlflow' needs a package that cannot be imported (import of mlflow halted; None "
        "in sys.modules): pip install 'fedmed-flower[mlflow]'"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["tensorboard,", "MLflow", "mlflow, wandb", "neptune"])
def test_another_tracker_is_refused(value):
    text = f"track must be tensorboard, mlflow or wandb, or several of them .*got {value!r}"
    with pytest.raises(InputError, match=text):
        Plan.from_run_config({"track": value})


def test_several_trackers():
    assert Plan(track="wandb,mlflow,wandb").trackers == ("wandb", "mlflow")
    assert Plan().trackers == ()


def test_a_run_that_is_tracked_from_its_second_round_on_is_tracked_whole(tmp_path):
    run_tiny(tmp_path / "run", num_server_rounds=1)
    run_tiny(tmp_path / "run", num_server_rounds=2, resume=True, track="tensorboard")
    figures, _ = tensorboard_of(tmp_path / "run")
    assert [step for step, _ in figures["val/auc/all"]] == [1, 2]


def test_a_round_that_was_tracked_and_not_noted_is_not_doubled(tmp_path):
    folder = tmp_path / "run"
    run_tiny(folder, track="tensorboard")
    # As if the run had been killed after the events of its second round were written.
    table = json.loads((folder / "tracking.json").read_text())
    last = table["tensorboard"]["last"]
    table["tensorboard"]["last"] = {key: 1 for key in last if not key.startswith("test")}
    (folder / "tracking.json").write_text(json.dumps(table))
    run_tiny(folder, track="tensorboard", num_server_rounds=2, resume=True)
    figures, _ = tensorboard_of(folder)
    assert [step for step, _ in figures["val/auc/all"]] == [1, 2]
    assert [step for step, _ in figures["test/auc/all"]] == [2]


@pytest.mark.parametrize(
    "content", [{"run": "../../x", "last": {}}, {"run": "a", "last": {"train/all": -1}}, []]
)
def test_what_is_no_record_of_a_tracked_run_is_refused(content, tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("tracking.json", {"mlflow": content})
    text = (
        f"{tmp_path / 'tracking.json'} holds no run of mlflow: remove it, and the run is tracked "
        "anew"
    )
    with pytest.raises(InputError, match=says(text)):
        MLflow(folder, "app", {})


def test_figures_that_go_to_a_users_own_server_are_announced_without_its_password(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING):
        run_tiny(tmp_path / "run", num_server_rounds=1, track="mlflow")
    text = caplog.text
    assert (
        "as MLFLOW_TRACKING_URI says, figures of hospitals and the settings go to 127.0.0.1" in text
    )
    # Nobody listens there: the run goes on without.
    assert "the listener MLflow failed in began and hears no more" in text
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def test_a_run_on_a_users_own_server_is_made_there(tmp_path, monkeypatch, file_store, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server" / "mlflow").as_uri())
    run_tiny(tmp_path / "run", num_server_rounds=1, track="mlflow")
    _, figures = mlflow_of(tmp_path / "server")
    assert figures == expected(tmp_path / "run")
    assert not (tmp_path / "run" / "mlflow").exists()
