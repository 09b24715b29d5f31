import csv
import io
import json
import math
import re
import time
import tomllib
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from typing import ClassVar

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from monai.networks.nets import DenseNet
from safetensors.numpy import load_file
from tables import SCHEMA, TinyTable, changed, holding, patients, run_tables
from tiny import (
    CONFIG,
    TinyClient,
    TinySettings,
    bits,
    connect_late,
    fixed,
    halves,
    linear,
    make_rows,
    model_arrays,
    nodes_of,
    run_tiny,
    says,
    says_of_setting,
)
from torch import nn

from fedmed_flower import InputError, SiteData, federate, run_local
from fedmed_flower.data.site import GENERATED
from fedmed_flower.data.splits import split_patients
from fedmed_flower.engines.local import LocalGrid
from fedmed_flower.errors import DivergedError
from fedmed_flower.models.device import make_optimizer
from fedmed_flower.reports.card import card
from fedmed_flower.runs import experiment as module
from fedmed_flower.runs.verdict import RunFailedError
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.settings.plan import Plan
from fedmed_flower.settings.registry import effective, sections_of
from fedmed_flower.strategies import FedAdam, FedAvg, FedAvgM, FedMedian, FedProx, Krum

FILES = {
    "checkpoint.zip",
    "config.toml",
    "counts.json",
    "live.json",
    "log.txt",
    "metrics.csv",
    "model.safetensors",
    "report.html",
    "splits",
    "summary.json",
}


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def summary_of(folder):
    return strict((folder / "summary.json").read_text())


def table_of(folder):
    return list(csv.DictReader(io.StringIO((folder / "metrics.csv").read_text())))


def files_of(folder):
    """Return all that a folder holds, hidden files too; None where it is not there."""
    if not folder.exists():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def without_times(folder):
    return [row for row in table_of(folder) if row["metric"] != "seconds"]


class Breaking(TinyClient):
    """Raises at the sites `broken` in the rounds `rounds` (all where it is empty)."""

    broken = ()
    rounds = ()
    where = "fit"
    error = ValueError("the scanner is down")

    def _break(self, where):
        if where == self.where and self.site.index in self.broken:
            raise self.error

    def load_data(self, site):
        self._break("load_data")
        return super().load_data(site)

    def fit(self, model, prepared, seed):
        self.fits[self.site.index] += 1
        if not self.rounds or self.fits[self.site.index] in self.rounds:
            self._break("fit")
        return super().fit(model, prepared, seed)


def breaking(**members):
    return type("Client", (Breaking,), members | {"fits": Counter()})


class Stateful(TinyClient):
    """Trains with a number that it keeps in its state, so that a lost state shows in the bits."""

    stop_in = 0
    calls = 0

    def fit(self, model, prepared, seed):
        kept = self.context.state.setdefault("kept", MetricRecord({"rounds": 0}))
        kept["rounds"] += 1
        if self.site.index == 1:
            type(self).calls += 1
            if type(self).calls == self.stop_in:
                raise KeyboardInterrupt
        metrics = super().fit(model, prepared, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * kept["rounds"]
        return metrics


def stopping(call):
    """Return a client that is interrupted when the second site trains for this time."""
    return type("Stopping", (Stateful,), {"stop_in": call, "calls": 0})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with two sites, two rounds and baselines."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = run_tiny(folder, baselines=True, alpha=0.5)
    return folder, result


def test_the_run_folder_is_complete(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == FILES | {"baselines", "cross-sites.csv"}
    assert not [name for name in files_of(folder) if name.endswith(".tmp")]


def test_the_summary(finished):
    folder, _ = finished
    summary = summary_of(folder)
    assert summary["status"] == "finished"
    assert summary["message"] == ""
    assert summary["data"] == "tiny images"
    assert summary["generated"] is False
    assert (summary["rounds"], summary["rounds-planned"]) == (2, 2)
    assert summary["engine"] == "local"
    assert summary["strategy"] == "FedAvg"
    assert summary["seed"] == 0
    assert summary["failures"] == []
    count = {"train": 10, "val": 6, "test": 8}
    assert summary["sites"] == {"hospital-1": count, "hospital-2": count}
    assert summary["config"]["alpha"] == 0.5
    assert summary["versions"]["flwr"] == version("flwr")


def test_the_summary_holds_the_test_of_each_model(finished):
    folder, _ = finished
    test = summary_of(folder)["test"]
    assert set(test) == {"federated", "sites", "local", "pooled"}
    assert test["federated"]["num-examples"] == 16
    assert set(test["sites"]) == set(test["local"]) == {"hospital-1", "hospital-2"}
    assert test["local"]["hospital-1"]["num-examples"] == 8
    assert test["local"]["hospital-1"]["all"]["num-examples"] == 16
    assert test["pooled"]["num-examples"] == 16
    assert set(test["pooled"]["sites"]) == {"hospital-1", "hospital-2"}
    for figures in (
        test["federated"],
        *test["sites"].values(),
        *test["local"].values(),
        test["pooled"],
    ):
        assert 0 <= figures["auc"] <= 1


def test_the_test_is_of_the_last_model_on_each_sites_own_rows(finished):
    folder, _ = finished
    state = load_file(folder / "model.safetensors")
    for index, name in enumerate(("hospital-1", "hospital-2")):
        rows = make_rows(8, (index, 2))
        images = np.array([row["image"].ravel() for row in rows], dtype=float)
        images = (images - images.mean(1, keepdims=True)) / images.std(1, keepdims=True)
        logits = images @ state["1.weight"].T + state["1.bias"]
        right = np.mean(logits.argmax(1) == [row["label"] for row in rows])
        assert summary_of(folder)["test"]["sites"][name]["accuracy"] == pytest.approx(right)


def test_the_models_agree(finished):
    folder, result = finished
    state = load_file(folder / "model.safetensors")
    assert {key: value.tobytes() for key, value in state.items()} == bits(result.arrays)


def test_the_table_is_tidy(finished):
    folder, _ = finished
    table = table_of(folder)
    assert list(table[0]) == ["round", "phase", "site", "metric", "value"]
    keys = [(r["round"], r["phase"], r["site"], r["metric"]) for r in table]
    assert len(set(keys)) == len(keys)
    by_key = {key: float(row["value"]) for key, row in zip(keys, table, strict=True)}
    for site in ("hospital-1", "hospital-2", "all"):
        for turn in "12":
            assert by_key[turn, "train", site, "loss"] > 0
            assert 0 <= by_key[turn, "val", site, "auc"] <= 1
    assert by_key["2", "train", "hospital-1", "num-examples"] == 10
    assert by_key["2", "val", "all", "num-examples"] == 12
    test = summary_of(folder)["test"]
    assert by_key["2", "test", "all", "auc"] == test["federated"]["auc"]
    assert by_key["2", "test", "hospital-2", "auc"] == test["sites"]["hospital-2"]["auc"]
    assert by_key["2", "local-test", "hospital-1", "auc"] == test["local"]["hospital-1"]["auc"]
    assert (
        by_key["2", "local-test-all", "hospital-1", "auc"]
        == test["local"]["hospital-1"]["all"]["auc"]
    )
    assert by_key["2", "pooled-test", "all", "auc"] == test["pooled"]["auc"]


def test_the_summary_says_what_was_trained_and_what_travelled(finished):
    summary = summary_of(finished[0])
    # Four pixels to two classes.
    about = summary["model"]
    assert (about["network"], about["weights"], about["weights-trained"]) == ("Sequential", 10, 10)
    assert summary["lacking"] == {}
    for traffic in summary["traffic"].values():
        # Two rounds of training and validation, and the test.
        assert traffic["replies"] == 5
        assert traffic["bytes-to-site"] > 5 * about["bytes"]
        assert traffic["bytes-from-site"] > 2 * about["bytes"]
        assert traffic["seconds"] > 0
    page = (finished[0] / "report.html").read_text()
    assert "Messages of the rounds" in page
    assert '<th scope="row">weights trained</th><td>10</td>' in page
    assert "local-epochs</th><td>1<" in page


def test_the_traffic_of_a_run_is_that_of_all_its_parts(tmp_path):
    run_tiny(tmp_path, num_server_rounds=1)
    before = summary_of(tmp_path)["traffic"]["hospital-1"]
    run_tiny(tmp_path, num_server_rounds=2, resume=True)
    after = summary_of(tmp_path)["traffic"]["hospital-1"]
    # The test after the first round is not in the checkpoint.
    assert (before["replies"], after["replies"]) == (3, 5)
    assert after["seconds"] > 0


def test_columns_that_a_table_lacks_are_in_log_summary_and_report(tmp_path):
    rows = SiteData(make_rows(6, 0), test=make_rows(4, 1, "q"), lacking=("systolic", "<b>"))
    run_tiny(tmp_path, fixed(rows), num_server_rounds=1)
    names = ["systolic", "<b>"]
    assert summary_of(tmp_path)["lacking"] == {"hospital-1": names, "hospital-2": names}
    assert "; its table has no column systolic, <b>" in (tmp_path / "log.txt").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "hospital-1 has no column systolic, &lt;b&gt;." in page


def test_columns_without_a_value_are_in_log_summary_report_and_card(tmp_path):
    class Unreadable(TinyTable):
        def load_data(self, site):
            data = super().load_data(site)
            gaps = {"hospital-1": {"age": math.nan}, "hospital-2": {"sex": None}}
            return changed(**gaps.get(site.name, {}))(data)

    run_tables(tmp_path, Unreadable, 3)
    summary = summary_of(tmp_path)
    assert summary["empty"] == {"hospital-1": ["age"], "hospital-2": ["sex"]}
    assert {(note["site"], note["phase"], note["text"]) for note in summary["notes"]} == {
        (
            f"hospital-{number}",
            "before training",
            f"{column} has no value in any row: perhaps it is written in another way; 2 of 2 other "
            "hospitals have values",
        )
        for number, column in ((1, "age"), (2, "sex"))
    }
    assert "; it has no value of age" in (tmp_path / "log.txt").read_text()
    assert "hospital-2 has no value of sex." in (tmp_path / "report.html").read_text()
    assert "- hospital-2 has no value of sex." in card(tmp_path)


def test_a_hospital_of_few_patients_does_not_say_which_columns_have_no_value(tmp_path):
    few = changed(age=math.nan)(SiteData(patients(9, 0), test=patients(4, 1, "q")))
    categories = {"sex": ("f", "m"), "ward": ("a", "b", "c")}
    client = holding({0: few}, schema=replace(SCHEMA, categories=categories))
    _, summary = run_tables(tmp_path / "a", client, 3, preparation="declared", min_cell_count=13)
    assert summary["empty"] == {"hospital-1": ["age"]}
    _, summary = run_tables(tmp_path / "b", client, 3, preparation="declared", min_cell_count=14)
    assert (summary["empty"], summary["notes"]) == ({}, [])


def test_the_config_file(finished):
    folder, _ = finished
    text = (folder / "config.toml").read_text()
    content = RunFolder(folder).read_config()
    assert content == tomllib.loads(text)
    assert len(content["run"].pop("key")) == 16
    about = {"format": 1, "app": "federated run", "strategy": "FedAvg", "sites": 2}
    assert content["run"] == about
    given = CONFIG | {"num-server-rounds": 2, "run-dir": str(folder), "baselines": True}
    read = (Plan, *sections_of(TinyClient))
    assert content["config"] == effective(given | {"alpha": 0.5}, read)
    assert (content["config"]["local-epochs"], content["config"]["dataset"]) == (1, "mine")
    assert content["versions"]["torch"] == version("torch")


def test_the_log(finished):
    folder, _ = finished
    text = (folder / "log.txt").read_text()
    assert "hospital-2: 10 train, 6 val, 8 test; training rows by label: [5, 5]" in text
    assert "round 2/2" in text
    assert "report: " in text


@pytest.mark.parametrize("client", [TinyClient, Stateful])
def test_a_site_alone_trains_as_if_it_had_never_met_the_others(client, tmp_path):
    run_tiny(tmp_path / "all", client, baselines=True)
    alone = run_tiny(tmp_path / "one", client, num_sites=1).arrays
    state = load_file(tmp_path / "all" / "baselines" / "local-1-hospital-1" / "model.safetensors")
    assert {key: value.tobytes() for key, value in state.items()} == bits(alone)


def test_the_pooled_model_is_trained_on_all_rows(finished):
    folder, _ = finished
    path = folder / "baselines" / "pooled" / "metrics.csv"
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    counts = [r["value"] for r in rows if (r["phase"], r["metric"]) == ("train", "num-examples")]
    assert counts == ["20.0", "20.0"]


def test_a_run_stopped_in_its_comparison_goes_on_with_it(tmp_path):
    run_tiny(tmp_path / "whole", Stateful, baselines=True)
    # Rounds 1 and 2 at hospital-2 are the federation's, 3 and 4 those of its own model.
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "parts", stopping(4), baselines=True)
    assert set(summary_of(tmp_path / "parts")["test"]) == {"federated", "sites", "local"}
    run_tiny(tmp_path / "parts", Stateful, baselines=True, resume=True)
    assert summary_of(tmp_path / "parts")["test"] == summary_of(tmp_path / "whole")["test"]
    assert without_times(tmp_path / "parts") == without_times(tmp_path / "whole")


def test_without_baselines_there_is_no_comparison(tmp_path):
    folder = tmp_path / "run"
    run_tiny(folder)
    assert set(summary_of(folder)["test"]) == {"federated", "sites"}
    assert {path.name for path in folder.iterdir()} == FILES


def test_generated_rows_are_marked(tmp_path):
    data = SiteData(make_rows(4, 0), test=make_rows(4, 1, "q"), source="drawn", generated=True)
    run_tiny(tmp_path, fixed(data))
    summary = summary_of(tmp_path)
    assert summary["generated"] is True
    assert summary["data"] == GENERATED
    assert GENERATED in (tmp_path / "log.txt").read_text()
    assert GENERATED in (tmp_path / "report.html").read_text()


def test_the_seed_decides_everything(tmp_path):
    outcomes = [
        bits(run_tiny(tmp_path / str(number), seed=seed, num_server_rounds=1).arrays)
        for number, seed in enumerate((5, 5, 6))
    ]
    assert outcomes[0] == outcomes[1] != outcomes[2]


def test_the_global_generator_is_left_as_it_was(tmp_path):
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    run_tiny(tmp_path, num_server_rounds=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_the_first_model_is_drawn_with_the_seed(tmp_path):
    started = []

    class Strategy(FedAvg):
        def start(self, grid, initial_arrays, *args, **kwargs):
            started.append(initial_arrays)
            return super().start(grid, initial_arrays, *args, **kwargs)

    run_tiny(tmp_path, strategy=Strategy(), seed=4, num_server_rounds=1)
    assert bits(started[0]) == bits(model_arrays(seed=4))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"num-server-rounds": 0}, "num-server-rounds must be from 1 to 100,000, got 0"),
        ({"min-sites": 0}, "min-sites must be at least 1, got 0"),
        ({"seed": -1}, "seed must be from 0 to 9,223,372,036,854,775,807, got -1"),
        ({"round-timeout": 0}, "round-timeout must be above 0 and finite, got 0.0"),
        ({"round-timeout": float("inf")}, "round-timeout must be above 0 and finite, got inf"),
        ({"resume": True}, "resume needs run-dir, the folder of the run to go on with"),
        ({"resume": "yes"}, "resume must be of type bool, got 'yes'"),
        ({"baselines": 1}, "baselines must be of type bool, got 1"),
        ({"pictures": -1}, "pictures must be at least 0, got -1"),
        ({"pictures": True}, "pictures must be of type int, got True"),
        ({"personal-epochs": -1}, "personal-epochs must be from 0 to 10,000, got -1"),
        ({"personal-epochs": 1.0}, "personal-epochs must be of type int, got 1.0"),
    ],
)
def test_the_plan_names_key_bound_and_value(config, text):
    with pytest.raises(InputError, match=says_of_setting(text)):
        Plan.from_run_config(config)


def test_nothing_is_written_where_the_plan_is_wrong(tmp_path):
    with pytest.raises(InputError, match="num-server-rounds"):
        run_tiny(tmp_path / "run", num_server_rounds=0)
    assert files_of(tmp_path / "run") is None


def test_nothing_is_written_where_the_dataset_is_unknown(tmp_path):
    class Client(TinyClient):
        def load_data(self, site):
            raise InputError(
                f"unknown dataset {TinySettings.from_run_config(self.context.run_config).dataset!r}"
            )

    with pytest.raises(InputError, match=says("unknown dataset 'chests'")):
        run_tiny(tmp_path / "run", Client, dataset="chests")
    assert files_of(tmp_path / "run") is None


def test_nothing_is_written_where_all_sites_data_are_broken(tmp_path):
    rows = [row | {"label": 9} for row in make_rows(3, 0)]
    text = "3 of 3 rows of the train split have labels that are no class, such as that of patient "
    with pytest.raises(InputError, match=f"^{text}"):
        run_tiny(tmp_path / "run", fixed(SiteData(rows)))
    assert files_of(tmp_path / "run") is None


def test_rows_that_cannot_be_used_are_named_and_the_run_goes_on_without_them(tmp_path):
    rows = make_rows(6, 0)
    rows[1]["label"] = 9
    rows[3]["image"] = np.full((2, 2), np.nan)
    run_tiny(tmp_path, fixed(SiteData(rows, test=make_rows(4, 1, "q"))), num_server_rounds=1)
    summary = summary_of(tmp_path)
    assert summary["status"] == "finished"
    counts = {"train": 4, "val": 0, "test": 4, "rejected": 2}
    assert summary["sites"] == {"hospital-1": counts, "hospital-2": counts}
    log = (tmp_path / "log.txt").read_text()
    text = "4 train, 0 val, 4 test; training rows by label: [3, 1]; 2 rows rejected at the site"
    assert f"hospital-2: {text}" in log
    # Logged at the roll call, when the run had no folder yet.
    assert "hospital-1: rejected, train split, patient p-1: label 9 " in log
    counts = [row for row in table_of(tmp_path) if row["metric"] == "num-examples"]
    trained = {row["value"] for row in counts if row["phase"] == "train"}
    assert trained == {"4.0"}


def test_nothing_is_written_where_no_site_answers(tmp_path):
    server = ServerApp()

    @server.main()
    def main(grid, context):
        federate(FedAvg(), grid, context, linear)

    client = ClientApp()
    client.query("describe")(lambda message, context: None)
    with pytest.raises(InputError, match=says("no site answered the roll call")):
        run_local(server, client, 2, run_config={"run-dir": str(tmp_path / "run")})
    assert files_of(tmp_path / "run") is None


def test_a_wrong_setting_of_the_sites_is_told_before_the_run(tmp_path):
    with pytest.raises(
        InputError, match=says_of_setting("batch-size must be from 1 to 1,000,000, got 0")
    ):
        run_tiny(tmp_path / "run", batch_size=0)
    assert files_of(tmp_path / "run") is None


def test_a_folder_in_use(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    text = (
        f"the run folder {tmp_path} is in use: choose another (--out, run-dir), "
        f"or go on with that run (--resume {tmp_path}, resume=true)"
    )
    with pytest.raises(InputError, match=says(text)):
        run_tiny(tmp_path)
    with pytest.raises(InputError, match="is in use"):
        run_tiny(tmp_path / "notes.txt")
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


def test_a_folder_that_is_empty_can_be_used(tmp_path):
    run_tiny(tmp_path, num_server_rounds=1)
    assert summary_of(tmp_path)["status"] == "finished"


def test_more_sites_than_a_run_in_this_process_has(tmp_path, monkeypatch):
    def wait(seconds):
        raise TimeoutError("waits for sites that cannot come")

    monkeypatch.setattr(module.time, "sleep", wait)
    with pytest.raises(InputError, match="min-sites"):
        run_tiny(tmp_path / "run", num_sites=2, min_sites=3)
    assert files_of(tmp_path / "run") is None


@pytest.mark.parametrize("where", ["load_data", "fit"])
def test_a_broken_site_among_good_ones_is_named(where, tmp_path):
    client = breaking(broken=(1,), where=where)
    run_tiny(tmp_path, client, num_sites=3)
    summary = summary_of(tmp_path)
    assert summary["status"] == "finished"
    failures = [each for each in summary["failures"] if each["phase"] == "train"]
    assert [each["round"] for each in failures] == [1, 2]
    for each in failures:
        assert "ValueError: the scanner is down" in each["reason"]
        assert "hospital-2" in each["site"] + each["reason"]
    assert set(summary["test"]["sites"]) >= {"hospital-1", "hospital-3"}
    trained = {row["site"] for row in table_of(tmp_path) if row["phase"] == "train"}
    assert trained == {"hospital-1", "hospital-3", "all"}


def test_a_broken_site_does_not_change_the_model_of_the_others(tmp_path):
    with_it = run_tiny(tmp_path / "a", breaking(broken=(2,)), num_sites=3).arrays
    assert bits(with_it) == bits(run_tiny(tmp_path / "b", TinyClient, num_sites=2).arrays)


def test_a_site_that_fails_in_one_round_is_back_in_the_next(tmp_path):
    run_tiny(tmp_path, breaking(broken=(0,), rounds=(1,)))
    summary = summary_of(tmp_path)
    assert [(each["round"], each["site"]) for each in summary["failures"]] == [(1, "hospital-1")]
    trained = [r["site"] for r in table_of(tmp_path) if r["phase"] == "train" and r["round"] == "2"]
    assert "hospital-1" in trained


def test_every_site_failing_in_every_round(tmp_path):
    with pytest.raises(
        RunFailedError,
        match=r"^round 1, train: all 2 sites failed alike, so the run ends: ValueError: the scan",
    ):
        run_tiny(tmp_path, breaking(broken=(0, 1)), seed=3)
    summary = summary_of(tmp_path)
    assert summary["status"] == "failed"
    assert summary["message"].startswith("RunFailedError: round 1, train: all 2 sites failed alike")
    training = [each for each in summary["failures"] if each["phase"] == "train"]
    assert Counter(each["site"] == "all" for each in training) == {False: 2, True: 2}
    assert summary["test"] == {}
    # No round is done: a resumed run begins with the first.
    assert not (tmp_path / "checkpoint.zip").exists()
    state = load_file(tmp_path / "model.safetensors")
    assert {k: v.tobytes() for k, v in state.items()} == bits(model_arrays(seed=3))
    assert "failed" in (tmp_path / "report.html").read_text()


def test_a_baseline_that_never_trained_is_not_reported_as_one(tmp_path):
    run_tiny(tmp_path, breaking(broken=(1,)), baselines=True)
    local = summary_of(tmp_path)["test"]["local"]
    assert "auc" in local["hospital-1"]
    assert "auc" not in local.get("hospital-2", {})
    rows = [r for r in table_of(tmp_path) if r["phase"].startswith("local-test")]
    assert {row["site"] for row in rows} == {"hospital-1"}


def test_an_error_of_the_strategy_leaves_a_failed_run(tmp_path):
    class Strategy(FedAvg):
        def aggregate_evaluate(self, server_round, replies):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match=says("the disk is full")):
        run_tiny(tmp_path, strategy=Strategy())
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["message"]) == ("failed", "OSError: the disk is full")


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    unbroken = run_tiny(whole, Stateful, num_server_rounds=4)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(parts, stopping(3), num_server_rounds=4)
    summary = summary_of(parts)
    assert summary["status"] == "stopped"
    assert summary["message"] == f"stopped by the user; go on with --resume {parts}"
    assert summary["rounds"] == 2
    assert {"report.html", "metrics.csv", "checkpoint.zip"} <= set(files_of(parts))
    resumed = run_tiny(parts, Stateful, num_server_rounds=4, resume=True)
    assert bits(resumed.arrays) == bits(unbroken.arrays)
    assert without_times(parts) == without_times(whole)
    assert summary_of(parts)["test"] == summary_of(whole)["test"]
    assert summary_of(parts)["status"] == "finished"


class Ending(FedAvg):
    """Ends after `enough` rounds, as at the end of a budget; may be interrupted in its test."""

    enough = 2
    interrupted = False

    def stop_reason(self):
        done = len(self.result.train_metrics_clientapp)
        return f"{done} rounds are\nenough" if done == self.enough else None

    def test(self, *args, **kwargs):
        if self.interrupted:
            raise KeyboardInterrupt
        return super().test(*args, **kwargs)


def test_a_run_that_ends_early_says_why_and_lists_no_failure(tmp_path):
    run_tiny(tmp_path, strategy=Ending(), num_server_rounds=9)
    summary = summary_of(tmp_path)
    assert summary["status"] == "finished"
    assert summary["stopped"] == {"round": 2, "reason": "2 rounds are enough"}
    assert summary["failures"] == []
    assert summary["rounds"] == 2
    page = (tmp_path / "report.html").read_text()
    assert page.count("Stopped after round 2: 2 rounds are enough") == 1
    assert "No site failed." in page
    assert "stopped after round 2: 2 rounds are enough" in (tmp_path / "log.txt").read_text()


def test_a_run_that_was_interrupted_after_its_early_end_goes_on_as_if_it_had_not(tmp_path):
    first = Ending()
    first.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path, strategy=first, num_server_rounds=9)
    stopped = {"round": 2, "reason": "2 rounds are enough"}
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["stopped"], summary["failures"]) == ("stopped", stopped, [])
    assert RunFolder(tmp_path).load().history.stopped.round == 2
    run_tiny(tmp_path, strategy=Ending(), num_server_rounds=9, resume=True)
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["stopped"], summary["failures"]) == ("finished", stopped, [])
    # A larger budget lets the run go on.
    third = Ending()
    third.enough = 9
    run_tiny(tmp_path, strategy=third, num_server_rounds=3, resume=True)
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["stopped"], summary["rounds"]) == ("finished", None, 3)


def test_a_run_that_ends_before_its_first_round_has_failed_for_that_reason(tmp_path):
    class Refusing(FedAvg):
        def stop_reason(self):
            return "there is no budget"

    text = says("no site could train in any of 2 rounds: there is no budget")
    with pytest.raises(RunFailedError, match=text):
        run_tiny(tmp_path, strategy=Refusing())
    assert summary_of(tmp_path)["failures"] == []
    assert not (tmp_path / "checkpoint.zip").exists()


def scored_by(arrays_seen, stop_in=None):
    """Return a function that scores a model at the server, and may stop the run in a round."""

    def evaluate(server_round, arrays):
        if server_round == stop_in:
            raise KeyboardInterrupt
        arrays_seen.append(bits(arrays))
        return MetricRecord({"auc": 0.5 + server_round / 10}) if server_round else None

    return evaluate


def test_what_the_server_measures_stands_in_log_table_and_report(tmp_path):
    seen = []
    result = run_tiny(tmp_path, evaluate_fn=scored_by(seen))
    assert seen[-1] == bits(result.arrays)
    assert [dict(m) for m in result.evaluate_metrics_serverapp.values()] == [
        {"auc": 0.6}, {"auc": 0.7},
    ]  # fmt: skip
    rows = [row for row in table_of(tmp_path) if row["phase"] == "server"]
    assert [(row["round"], row["site"], row["metric"], row["value"]) for row in rows] == [
        ("1", "all", "auc", "0.6"), ("2", "all", "auc", "0.7"),
    ]  # fmt: skip
    assert "server auc 0.7000" in (tmp_path / "log.txt").read_text()
    assert "Server auc" in (tmp_path / "report.html").read_text()


def test_the_server_is_given_the_whole_model_if_only_a_part_travels(tmp_path):
    seen = []
    run_tiny(tmp_path, Halves, evaluate_fn=scored_by(seen), **HEAD)
    assert [set(model) for model in seen] == [set(halves().state_dict())] * 3
    assert seen[-1]["head.bias"] == head_of(tmp_path)["head.bias"] != seen[0]["head.bias"]


def test_what_the_server_measures_goes_on_where_a_run_is_resumed(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_tiny(whole, num_server_rounds=3, evaluate_fn=scored_by([]))
    with pytest.raises(KeyboardInterrupt):
        run_tiny(parts, num_server_rounds=3, evaluate_fn=scored_by([], stop_in=2))
    seen = []
    run_tiny(parts, num_server_rounds=3, evaluate_fn=scored_by(seen), resume=True)
    assert len(seen) == 2
    assert without_times(parts) == without_times(whole)


def test_a_run_stopped_in_its_first_round_starts_afresh(tmp_path):
    unbroken = run_tiny(tmp_path / "whole", Stateful)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "parts", stopping(1))
    summary = summary_of(tmp_path / "parts")
    assert (summary["status"], summary["message"]) == ("stopped", "stopped by the user")
    resumed = run_tiny(tmp_path / "parts", Stateful, resume=True)
    assert bits(resumed.arrays) == bits(unbroken.arrays)


def test_a_finished_run_goes_on_for_more_rounds(tmp_path):
    unbroken = run_tiny(tmp_path / "whole", Stateful, num_server_rounds=3)
    run_tiny(tmp_path / "parts", Stateful, num_server_rounds=2)
    more = run_tiny(tmp_path / "parts", Stateful, num_server_rounds=3, resume=True)
    assert bits(more.arrays) == bits(unbroken.arrays)
    assert without_times(tmp_path / "parts") == without_times(tmp_path / "whole")
    summary = summary_of(tmp_path / "parts")
    assert (summary["rounds"], summary["rounds-planned"]) == (3, 3)
    assert RunFolder(tmp_path / "parts").read_config()["config"]["num-server-rounds"] == 3


def test_resuming_a_finished_run_trains_nothing(tmp_path):
    run_tiny(tmp_path)
    before = summary_of(tmp_path)["test"], without_times(tmp_path)
    run_tiny(tmp_path, breaking(broken=(0, 1)), resume=True)
    assert (summary_of(tmp_path)["test"], without_times(tmp_path)) == before


def test_resuming_with_another_setting_is_refused_and_changes_nothing(tmp_path):
    run_tiny(tmp_path, num_server_rounds=1)
    before = files_of(tmp_path)
    text = (
        f"learning-rate was 0.05 when {tmp_path} was started and is 0.1 now: "
        "resume with the settings of the start; if you trust that folder, give them: "
        "-c learning-rate=0.05"
    )
    with pytest.raises(InputError, match=says(text)):
        run_tiny(tmp_path, num_server_rounds=1, resume=True, learning_rate=0.1)
    with pytest.raises(InputError, match=r"alpha was 2\.0 when .* and is 0\.3 now"):
        run_tiny(tmp_path, num_server_rounds=1, resume=True, alpha=0.3)
    assert files_of(tmp_path) == before


def test_resuming_with_another_model_is_refused_and_changes_nothing(tmp_path):
    run_tiny(tmp_path, num_server_rounds=1)
    before = files_of(tmp_path)
    with pytest.raises(InputError, match="belongs to another model"):
        run_tiny(tmp_path, num_server_rounds=1, resume=True, model=lambda: linear(3))
    assert files_of(tmp_path) == before


def test_resuming_from_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path):
    run_tiny(tmp_path, num_server_rounds=1)
    (tmp_path / "checkpoint.zip").write_bytes(b"no archive")
    before = files_of(tmp_path)
    with pytest.raises(InputError, match=r"the checkpoint .* cannot be read"):
        run_tiny(tmp_path, num_server_rounds=1, resume=True)
    assert files_of(tmp_path) == before


def test_resuming_a_split_dataset_with_another_number_of_sites_is_refused(tmp_path):
    run_tiny(tmp_path, num_sites=2, num_server_rounds=1)
    with pytest.raises(InputError, match="sites"):
        run_tiny(tmp_path, num_sites=3, num_server_rounds=2, resume=True)


def test_a_folder_without_a_run_has_no_config(tmp_path):
    text = f"{tmp_path} is no run folder: it has no config.toml"
    with pytest.raises(InputError, match=says(text)):
        RunFolder(tmp_path).read_config()
    for content in ("run = [", "[run]\nsites = 1\n", "run = 1\nconfig = 2\nversions = 3\n"):
        (tmp_path / "config.toml").write_text(content)
        with pytest.raises(InputError, match=r"config\.toml cannot be read"):
            RunFolder(tmp_path).read_config()


def test_sites_with_one_class_in_the_test_set(tmp_path):
    class Client(TinyClient):
        def load_data(self, site):
            test = make_rows(4, (site.index, 9), f"{site.index}-test")
            test = [row | {"label": site.index} for row in test]
            return SiteData(make_rows(6, site.index, str(site.index)), test=test)

    run_tiny(tmp_path, Client)
    test = summary_of(tmp_path)["test"]
    for site in ("hospital-1", "hospital-2"):
        assert "auc" not in test["sites"][site]
        assert test["sites"][site]["num-examples"] == 4
    assert 0 <= test["federated"]["auc"] <= 1
    assert test["federated"]["num-examples"] == 8


def test_test_rows_of_one_class_at_all_sites_together_are_no_result(tmp_path):
    data = SiteData(make_rows(6, 0), test=make_rows(4, 1, "q", classes=1))
    text = "all 8 test rows are of class 0, so figures say nothing: look at the labels, or give the"
    with pytest.raises(RunFailedError, match=text):
        run_tiny(tmp_path, fixed(data), num_server_rounds=1)
    assert summary_of(tmp_path)["status"] == "failed"


def test_a_class_without_test_rows_is_noted(tmp_path):
    rows = make_rows(9, 0, classes=3)
    data = SiteData(rows, test=make_rows(4, 1, "q", classes=2))
    run_tiny(tmp_path, fixed(data, num_classes=3), model=lambda: linear(3), num_server_rounds=1)
    (note,) = summary_of(tmp_path)["notes"]
    assert note["text"] == "no test row is of class 2: figures are of the other classes"


def test_a_class_without_training_rows_anywhere_is_refused_before_the_first_round(tmp_path):
    client = fixed(SiteData(make_rows(6, 0)), num_classes=3)
    text = "^no site has a training row of class 2: look at the labels, or declare fewer classes$"
    with pytest.raises(InputError, match=text):
        run_tiny(tmp_path / "run", client, model=lambda: linear(3))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"build_model": lambda self: linear(3)}, "the network returns outputs of shape (4, 3): 2"),
        (
            {"build_model": lambda self: nn.Sequential(nn.Flatten(), nn.Linear(5, 2))},
            "the network cannot be trained on a batch of image (4, 1, 2, 2), label (4,): Runtime",
        ),
    ],
)
@pytest.mark.parametrize("private", [False, True])
def test_a_network_that_does_not_fit_is_refused_before_the_first_round(
    tmp_path, members, text, private
):
    client = type("Misfit", (TinyClient,), members)
    options = {"privacy": "patient", "target_epsilon": 8.0} if private else {}
    with pytest.raises(InputError, match=re.escape(text)):
        run_tiny(tmp_path / "run", client, **options)
    assert not (tmp_path / "run").exists()


def test_the_batch_that_is_tried_changes_no_model(tmp_path, monkeypatch):
    tried = run_tiny(tmp_path / "tried")
    monkeypatch.setattr("fedmed_flower.clients.queries.try_batch", lambda client: None)
    assert bits(tried.arrays) == bits(run_tiny(tmp_path / "not").arrays)


@pytest.mark.parametrize("options", [{}, {"privacy": "patient", "target_epsilon": 8.0}])
def test_a_run_that_diverges_is_named_and_does_not_end_as_finished(tmp_path, options):
    with pytest.raises(DivergedError, match="the model has diverged: its weights are"):
        run_tiny(tmp_path, learning_rate=1e6, num_server_rounds=4, **options)
    summary = summary_of(tmp_path)
    assert summary["status"] == "failed"
    assert summary["message"].endswith("lower learning-rate")
    # It ends at once, before the next round.
    assert summary["rounds"] == 1


def test_a_monai_network_with_its_default_norm_stays_finite_under_server_momentum(tmp_path):
    def small_dense_net():
        return DenseNet(2, 1, 2, init_features=4, growth_rate=2, block_config=(1,))

    class Client(TinyClient):
        def build_model(self):
            return small_dense_net()

    result = run_tiny(
        tmp_path,
        Client,
        model=small_dense_net,
        strategy=FedAvgM(server_momentum=0.9),
        num_server_rounds=3,
    )
    variances = [a.numpy() for key, a in result.arrays.items() if key.endswith("running_var")]
    assert variances
    assert all((values > 0).all() for values in variances)
    assert all(np.isfinite(array.numpy()).all() for array in result.arrays.values())
    assert [*result.evaluate_metrics_clientapp] == [1, 2, 3]
    summary = summary_of(tmp_path)
    assert summary["failures"] == []
    for figures in (summary["test"]["federated"], *summary["test"]["sites"].values()):
        assert math.isfinite(figures["loss"])
        assert 0 <= figures["auc"] <= 1


def test_a_model_that_nobody_could_evaluate_is_no_result(tmp_path):
    class Unmeasured(TinyClient):
        def measure(self, model, prepared):
            raise ValueError("no figure today")

    with pytest.raises(RunFailedError, match="round 1, val: all 2 sites failed alike, so the run"):
        run_tiny(tmp_path / "val", Unmeasured)

    class Untested(TinyClient):
        def measure(self, model, prepared):
            if self.split == "test":
                raise ValueError(f"no figure at {self.site.name}")
            return super().measure(model, prepared)

    with pytest.raises(RunFailedError, match="nobody could evaluate the model, so it has no"):
        run_tiny(tmp_path / "test", Untested)
    summary = summary_of(tmp_path / "test")
    assert summary["status"] == "failed"
    assert "hospital-1: ValueError: no figure at hospital-1" in summary["message"]
    assert (tmp_path / "test" / "model.safetensors").exists()


def test_sites_without_val_and_test_rows(tmp_path):
    result = run_tiny(tmp_path, fixed(SiteData(make_rows(6, 0))), baselines=True)
    summary = summary_of(tmp_path)
    assert summary["status"] == "finished"
    assert "auc" not in summary["test"]["federated"]
    assert result.evaluate_metrics_clientapp == {}
    assert bits(result.arrays) != bits(model_arrays())


def test_numbers_that_are_not_finite_do_not_reach_the_summary(tmp_path):
    class Client(TinyClient):
        def measure(self, model, prepared):
            return super().measure(model, prepared) | {"loss": float("nan"), "odd": float("inf")}

    run_tiny(tmp_path, Client, baselines=True, alpha=float("inf"))
    summary = summary_of(tmp_path)
    assert summary["test"]["sites"]["hospital-1"]["loss"] is None
    assert summary["test"]["sites"]["hospital-1"]["odd"] is None
    assert summary["config"]["alpha"] is None
    assert RunFolder(tmp_path).read_config()["config"]["alpha"] == float("inf")


def test_twelve_sites_are_not_mixed_up(tmp_path):
    class Client(TinyClient):
        def load_data(self, site):
            name = f"{site.index}"
            train = make_rows(site.index + 1, site.index, f"{name}-train")
            return SiteData(train, test=make_rows(2 * site.index + 4, 99, f"{name}-test"))

    run_tiny(tmp_path, Client, num_sites=12, num_server_rounds=1)
    summary = summary_of(tmp_path)
    assert summary["sites"] == {
        f"hospital-{n + 1}": {"train": n + 1, "val": 0, "test": 2 * n + 4} for n in range(12)
    }
    counts = {name: figures["num-examples"] for name, figures in summary["test"]["sites"].items()}
    assert counts == {f"hospital-{n + 1}": 2 * n + 4 for n in range(12)}
    trained = {
        row["site"]: float(row["value"])
        for row in table_of(tmp_path)
        if row["phase"] == "train" and row["metric"] == "num-examples"
    }
    assert trained == {f"hospital-{n + 1}": n + 1 for n in range(12)}


def test_sites_named_alike_are_kept_apart(tmp_path):
    nodes = nodes_of(tmp_path / "sites", "north", "north", min_evaluated_patients=1)
    run_tiny(tmp_path / "run", node_configs=nodes)
    summary = summary_of(tmp_path / "run")
    assert set(summary["sites"]) == {"north", "north (node 1002)"}
    assert set(summary["test"]["sites"]) == set(summary["sites"])


def test_a_site_named_all_is_not_taken_for_all_sites(tmp_path):
    run_tiny(
        tmp_path / "run",
        node_configs=nodes_of(tmp_path / "sites", "all", "north", min_evaluated_patients=1),
    )
    summary = summary_of(tmp_path / "run")
    assert summary["test"]["federated"]["num-examples"] == 16
    assert len(summary["test"]["sites"]) == 2
    assert "all" not in summary["test"]["sites"]


def test_real_sites_are_not_pooled(tmp_path):
    loaded = []

    class Client(TinyClient):
        def load_data(self, site):
            loaded.append(site.name)
            return super().load_data(site)

    node_configs = nodes_of(tmp_path / "sites", "north", "south", min_evaluated_patients=1)
    run_tiny(tmp_path / "run", Client, node_configs=node_configs, baselines=True)
    test = summary_of(tmp_path / "run")["test"]
    assert set(test["local"]) == {"north", "south"}
    assert "pooled" not in test
    assert sorted(loaded) == ["north", "south"]
    assert "no model on all data pooled" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"site": ConfigRecord({"name": "odd"}), "metrics": MetricRecord()}),
        RecordDict({"metrics": MetricRecord({"train": 1, "val": 1, "test": 1})}),
    ],
)
def test_a_malformed_answer_to_the_roll_call_does_not_end_the_run(content, tmp_path):
    good = TinyClient.client_app()

    class Client:
        @staticmethod
        def client_app():
            def answer(message, context):
                if context.node_config["partition-id"] == 1:
                    return Message(content, reply_to=message)
                return good(message, context)

            return answer

    run_tiny(tmp_path, Client, num_sites=3)
    summary = summary_of(tmp_path)
    assert summary["status"] == "finished"
    assert {"hospital-1", "hospital-3"} <= set(summary["test"]["sites"])


def test_a_run_folder_of_its_own_where_none_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_tiny("", num_server_rounds=1)
    (folder,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == FILES


def test_a_strategy_that_was_given_its_own_minimum_keeps_it(tmp_path):
    strategy = FedAvg(min_available_nodes=2)
    run_tiny(tmp_path, strategy=strategy, num_server_rounds=1, seed=9)
    assert strategy.min_available_nodes == 2
    assert strategy.seed == 9


def test_a_rule_that_needs_more_sites_is_refused_before_anything_is_written(tmp_path):
    text = (
        "5 sites are asked for (min-sites, min_available_nodes, min_train_nodes, "
        "min_evaluate_nodes or num_malicious_nodes), but this run has 4"
    )
    with pytest.raises(InputError, match=says(text)):
        run_tiny(tmp_path / "run", num_sites=4, strategy=Krum(num_malicious_nodes=1))
    assert not (tmp_path / "run").exists()
    run_tiny(tmp_path / "run", num_sites=5, strategy=Krum(num_malicious_nodes=1))
    assert summary_of(tmp_path / "run")["strategy"] == "Krum"
    assert summary_of(tmp_path / "run")["status"] == "finished"


class Poisoned(TinyClient):
    def fit(self, model, prepared, seed):
        metrics = super().fit(model, prepared, seed)
        if self.site.index == 0:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))
        return metrics


def test_a_hospital_that_sends_nan_is_in_the_report_and_not_in_the_model(tmp_path):
    run_tiny(tmp_path / "run", Poisoned, num_sites=4, strategy=FedMedian(num_malicious_nodes=1))
    summary = summary_of(tmp_path / "run")
    assert {(f["site"], f["reason"].split(" ", 1)[1]) for f in summary["failures"]} == {
        ("hospital-1", "holds NaN or infinite values")
    }
    assert all(
        np.isfinite(v).all() for v in load_file(tmp_path / "run" / "model.safetensors").values()
    )
    assert "holds NaN or infinite values" in (tmp_path / "run" / "report.html").read_text()


class Rated(TinyClient):
    """Writes down which learning rate it trains with."""

    rates: ClassVar[list[tuple[int, float]]] = []

    def fit(self, model, prepared, seed):
        optimizer = make_optimizer(self.settings, model, self.progress)
        self.rates.append((self.site.index, optimizer.param_groups[0]["lr"]))
        return super().fit(model, prepared, seed)


COSINE = {"schedule": "cosine", "learning_rate": 0.4, "num_server_rounds": 4}


def test_the_learning_rate_follows_the_cosine_over_a_run(tmp_path):
    client = type("Client", (Rated,), {"rates": []})
    run_tiny(tmp_path, client, **COSINE)
    expected = [0.4 * (1 + math.cos(math.pi * done / 4)) / 2 for done in range(4)]
    for index in (0, 1):
        assert [rate for site, rate in client.rates if site == index] == pytest.approx(expected)


def test_a_run_with_a_schedule_resumes_to_the_same_bits(tmp_path):
    whole = run_tiny(tmp_path / "whole", Stateful, **COSINE).arrays
    assert bits(whole) != bits(run_tiny(tmp_path / "other", Stateful, **COSINE, seed=1).arrays)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "parts", stopping(3), **COSINE)
    resumed = run_tiny(tmp_path / "parts", Stateful, resume=True, **COSINE).arrays
    assert bits(resumed) == bits(whole)


class Halves(TinyClient):
    """A stem with batch normalisation that both sides load alike, and a head."""

    others = ()

    def build_model(self):
        return halves(1 if self.site.index in self.others else 0)


class Watched(Halves):
    def fit(self, model, prepared, seed):
        metrics = super().fit(model, prepared, seed)
        for key, value in halves().stem.state_dict().items():
            assert torch.equal(model.stem.state_dict()[key], value), key
        return metrics


HEAD = {"trainable": "head.*", "model": halves}
FROZEN_TEXT = (
    "the frozen part of the model, which neither trainable nor lora names, is not the same "
    "here as at the server: build_model must load the same weights on both, such as those of "
    "one bundle"
)


def head_of(folder):
    """Return the bits of the part that travels; the file of a finished run holds all of it."""
    state = load_file(folder / "model.safetensors")
    assert sorted(RunFolder(folder).load().arrays) == ["head.bias", "head.weight"]
    if (folder / "summary.json").exists():
        start = halves().state_dict()
        assert state.keys() == start.keys()
        frozen = [key for key in start if not key.startswith("head.")]
        assert all(state[key].tobytes() == start[key].numpy().tobytes() for key in frozen)
    return {key: state[key].tobytes() for key in ("head.bias", "head.weight")}


@pytest.mark.parametrize("strategy", [FedAvg, FedMedian, FedAdam, FedProx])
def test_a_part_of_the_model_is_all_that_a_run_trains_and_keeps(strategy, tmp_path):
    baselines = strategy is FedAvg
    result = run_tiny(tmp_path, Watched, 3, strategy=strategy(), baselines=baselines, **HEAD)
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["failures"]) == ("finished", [])
    assert head_of(tmp_path) == bits(result.arrays)
    start = ArrayRecord({k: v for k, v in halves().state_dict().items() if k in result.arrays})
    assert bits(result.arrays) != bits(start)
    for name in ("pooled", "local-1-hospital-1") if baselines else ():
        assert head_of(tmp_path / "baselines" / name) != head_of(tmp_path)


def test_the_part_that_travels_is_trained_as_if_the_rest_were_constant(tmp_path):
    class Frozen(TinyClient):
        def build_model(self):
            model = halves().requires_grad_(False)
            model.head.requires_grad_(True)
            model.stem.eval()
            model.stem.train = lambda mode=True: model.stem
            return model

    part = run_tiny(tmp_path / "part", Halves, **HEAD).arrays
    whole = run_tiny(tmp_path / "whole", Frozen, model=halves).arrays
    assert bits(part) == {key: value for key, value in bits(whole).items() if "head" in key}


def test_a_run_that_trains_a_part_resumes_to_the_same_bits(tmp_path):
    config = HEAD | {"num_server_rounds": 3}
    whole = run_tiny(tmp_path / "whole", Halves, strategy=FedAdam(), **config)
    run_tiny(tmp_path / "parts", Halves, strategy=FedAdam(), **config | {"num_server_rounds": 2})
    resumed = run_tiny(tmp_path / "parts", Halves, strategy=FedAdam(), **config, resume=True)
    assert bits(resumed.arrays) == bits(whole.arrays)
    with pytest.raises(InputError, match=r"trainable was 'head\.\*' when"):
        run_tiny(tmp_path / "parts", Halves, resume=True, **config | {"trainable": "head.w*"})


def test_a_part_of_a_model_is_trained_privately(tmp_path):
    # The stem's batch normalisation is frozen: it neither learns nor mixes patients.
    result = run_tiny(tmp_path, Halves, privacy="patient", target_epsilon=8.0, **HEAD)
    assert summary_of(tmp_path)["failures"] == []
    assert head_of(tmp_path) == bits(result.arrays)
    assert set(result.train_metrics_clientapp) == {1, 2}


def test_a_site_with_other_frozen_weights_is_named_and_the_run_goes_on(tmp_path):
    client = type("Client", (Halves,), {"others": (1,)})
    run_tiny(tmp_path, client, 3, pictures=1, **HEAD)
    summary = summary_of(tmp_path)
    assert summary["status"] == "finished"
    assert {(f["site"], f["reason"]) for f in summary["failures"]} == {("hospital-2", FROZEN_TEXT)}
    assert [(f["round"], f["phase"]) for f in summary["failures"]] == [
        (1, "train"), (1, "val"), (2, "train"), (2, "val"), (2, "test"),
    ]  # fmt: skip
    assert set(summary["test"]["sites"]) == {"hospital-1", "hospital-3"}
    assert {entry["site"] for entry in summary["pictures"]} == {"hospital-1", "hospital-3"}


def test_what_a_site_with_other_frozen_weights_would_send_is_not_in_the_model(tmp_path):
    class Broken(Halves):
        def fit(self, model, prepared, seed):
            if self.site.index == 1:
                raise ValueError("the scanner is down")
            return super().fit(model, prepared, seed)

    other = type("Client", (Halves,), {"others": (1,)})
    left_out, absent = (
        run_tiny(tmp_path / client.__name__, client, 3, num_server_rounds=1, **HEAD).arrays
        for client in (other, Broken)
    )
    everyone = run_tiny(tmp_path / "everyone", Halves, 3, num_server_rounds=1, **HEAD).arrays
    assert bits(left_out) == bits(absent) != bits(everyone)


def test_a_real_site_with_other_frozen_weights_tells_the_class_alone(tmp_path):
    client = type("Client", (Halves,), {"others": (1,)})
    node_configs = nodes_of(tmp_path / "sites", "north", "south", min_evaluated_patients=1)
    run_tiny(tmp_path / "run", client, node_configs=node_configs, num_server_rounds=1, **HEAD)
    failures = {(f["site"], f["reason"]) for f in summary_of(tmp_path / "run")["failures"]}
    assert failures == {("south", "InputError")}


@pytest.mark.parametrize(
    ("trainable", "text"),
    [
        ("tail.*", "trainable: no parameter matches 'tail.*'; the network has 6, such as "),
        ("head.*,", "trainable must be patterns separated by commas, such as *.decoder.*, or "),
        (3, "trainable must be of type str, got 3"),
    ],
)
def test_a_wrong_pattern_is_refused_before_anything_is_written(trainable, text, tmp_path):
    with pytest.raises(InputError, match=f"^{re.escape(text)}"):
        run_tiny(tmp_path / "run", Halves, model=halves, trainable=trainable)
    assert files_of(tmp_path / "run") is None


# --- Sites that come later ----------------------------------------------------------------------


def test_a_site_that_joins_late_trains_beside_one_that_is_only_tested(tmp_path, monkeypatch):
    class Varied(TinyClient):
        def load_data(self, site):
            data = super().load_data(site)
            return replace(data, train=()) if site.index == 1 else data

    connect_late(monkeypatch, 1003)
    run_tiny(tmp_path, Varied, num_sites=3, num_server_rounds=3)
    trained = {(int(r["round"]), r["site"]) for r in table_of(tmp_path) if r["phase"] == "train"}
    assert trained >= {(1, "hospital-1"), (2, "hospital-3"), (3, "hospital-3")}
    assert not any(site == "hospital-2" for _, site in trained)
    summary = summary_of(tmp_path)
    assert summary["sites"]["hospital-3"] == {"train": 10, "val": 6, "test": 8}
    (note,) = summary["notes"]
    assert (note["round"], note["site"]) == (2, "hospital-3")
    assert note["text"] == "has connected and trains from here on: 10 train, 6 val, 8 test"
    assert note["text"] in (tmp_path / "report.html").read_text()


# --- Rows that change ---------------------------------------------------------------------------


class Growing(TinyClient):
    """A site whose number of patients is set from outside."""

    patients = 10

    def load_data(self, site):
        rows = make_rows(self.patients, (site.index, 0), site.name)
        return SiteData(**split_patients(rows, 0), source="tiny images")


def test_a_run_that_is_resumed_says_that_rows_have_come(tmp_path):
    run_tiny(tmp_path, type("Hospital", (Growing,), {"patients": 30}), num_server_rounds=1)
    more = type("Hospital", (Growing,), {"patients": 33})
    run_tiny(tmp_path, more, num_server_rounds=3, resume=True)
    notes = summary_of(tmp_path)["notes"]
    assert [(note["round"], note["site"]) for note in notes] == [
        (2, "hospital-1"),
        (2, "hospital-2"),
    ]
    words = "of its patients, 3 come since the run began"
    assert all(note["text"].startswith(words) for note in notes)
    assert "of its patients, 3 come since the run began" in (tmp_path / "report.html").read_text()


class Swapped(Growing):
    """One patient has gone and another has come into the same split."""

    patients = 40

    def load_data(self, site):
        data = super().load_data(site)
        first = data.train[0] | {"patient": "somebody else"}
        return replace(data, train=[first, *data.train[1:]])


def test_a_real_site_says_that_its_patients_are_others(tmp_path):
    nodes = nodes_of(tmp_path, "north", "south")
    folder = tmp_path / "run"
    client = type("Hospital", (Growing,), {"patients": 40})
    run_tiny(folder, client, node_configs=nodes, num_server_rounds=1)
    run_tiny(folder, Swapped, node_configs=nodes, num_server_rounds=3, resume=True)
    notes = [(n["round"], n["site"], n["text"]) for n in summary_of(folder)["notes"]]
    text = "patients have come or gone"
    assert notes == [(2, "north", text), (2, "south", text)]


def test_a_hung_site_costs_the_grace_of_the_run_config(tmp_path, monkeypatch):
    now = [0.0]
    pull = LocalGrid.pull_messages

    def pull_messages(self, message_ids):
        answered = {i for i in message_ids if self._waiting[i][0].metadata.dst_node_id != 1003}
        return pull(self, answered)

    monkeypatch.setattr(LocalGrid, "in_process", False)
    monkeypatch.setattr(LocalGrid, "pull_messages", pull_messages)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    run_tiny(tmp_path, num_sites=3, num_server_rounds=1, quorum=2, grace=5.0)
    # Roll call, training, validation and test.
    assert 20 <= now[0] < 30
    summary = summary_of(tmp_path)
    assert summary["status"] == "finished"
    assert {failure["reason"] for failure in summary["failures"]} == {
        "no reply within 5 s; 2 of 3 had replied"
    }
    assert summary["refused"] == {"no answer within 5 s; 2 of 3 had replied": ["node 1003"]}
