"""Whole runs with validate="next" leave what runs with exchanges of their own leave."""

import csv
import json
import re
from functools import cache
from pathlib import Path

import pytest
from flwr.app import MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedXgbBagging
from forests import DECLARED, Hospital
from tables import TinyTable, predicting, run_tables
from tiny import TinyClient, bits, halves, run_tiny, says_of_setting
from torch import nn

from fedmed_flower import InputError, run_local
from fedmed_flower.engines.local import LocalGrid
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.strategies import DPFedAvg, FedAdam, FedAvg
from fedmed_flower.trees.server import grow

DOCS = Path(__file__).resolve().parents[2] / "docs" / "guides" / "validate-next.md"


class Halves(TinyClient):
    def build_model(self):
        return halves(0)


def deep():
    """Return a network without running statistics, of which a layer can have an adapter."""
    model = nn.Sequential()
    model.stem = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU())
    model.head = nn.Linear(6, 2)
    return model


class Deep(TinyClient):
    def build_model(self):
        return deep()


def images(folder, client=TinyClient, **config):
    return run_tiny(folder, client, 3, num_server_rounds=4, keep_model="best", **config)


def table(folder, **config):
    config |= {"num_server_rounds": 3, "keep_model": "best"}
    return run_tables(folder, TinyTable, preparation="federated", **config)[0]


def with_own_models(folder, client=Halves, **config):
    model = halves if client is Halves else deep
    return run_tiny(folder, client, 3, num_server_rounds=3, model=model, patience=3, **config)


def measured_by_the_server(server_round, arrays):
    return MetricRecord({"round": float(server_round)})


# What works: the names of the table in the docs, and a run of each.
WORKS = {
    "`keep-model`, `patience`": table,
    "images, masks, tables": images,
    "`compression`": lambda folder, **c: images(folder, compression="int8", **c),
    "`lora`, `trainable`": lambda folder, **c: images(
        folder, Deep, model=deep, lora="stem.1", trainable="head.*", **c
    ),
    "methods, `personal-epochs`": lambda folder, **c: images(
        folder, method="scaffold", personal_epochs=1, **c
    ),
    "`keep`, methods with own models": lambda folder, **c: with_own_models(
        folder, keep="head.*", **c
    ),
    "a server optimiser, a robust rule": lambda folder, **c: images(
        folder, strategy=FedAdam(), **c
    ),
    "`quorum`, a site that fails": lambda folder, **c: images(folder, quorum=3, **c),
    "`evaluate_fn`": lambda folder, **c: images(folder, evaluate_fn=measured_by_the_server, **c),
}


def left_by(folder, result):
    """Return what a run has left but seconds, in an order that does not hang on when it came."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = sorted(row for row in csv.reader(file) if row[3] != "seconds")
    summary = json.loads((folder / "summary.json").read_text())
    kept = ("test", "kept", "stopped", "sent", "failures", "notes", "trained", "rounds", "status")
    return {
        "model": bits(result.arrays),
        "rows": rows,
        "figures": result.evaluate_metrics_clientapp,
        **{key: summary[key] for key in kept},
    }


def both(folder, run):
    """Return what runs of both ways leave, and how many evaluations each has asked for."""
    left = {way: left_by(folder / way, run(folder / way, validate=way)) for way in ("own", "next")}
    return left["own"], left["next"]


@pytest.mark.parametrize("name", WORKS)
def test_both_ways_leave_the_same(name, tmp_path):
    own, late = both(tmp_path, WORKS[name])
    assert own == late
    assert any(row[1] == "val" for row in own["rows"])
    # The curves of the report are drawn by these rows; only their times differ.
    panels = [
        re.findall(r"<path[^>]*>", (tmp_path / way / "report.html").read_text())
        for way in ("own", "next")
    ]
    assert panels[0] == panels[1]


@pytest.mark.parametrize("method", ["ditto", "apfl", "fedrep"])
def test_own_models_are_validated_as_they_were_before_the_training(method, tmp_path):
    config = {"keep": "head.*"} if method == "fedrep" else {}
    own, late = both(
        tmp_path, lambda f, **c: with_own_models(f, Deep, method=method, **config, **c)
    )
    assert own == late
    alone = left_by(tmp_path / "plain", with_own_models(tmp_path / "plain", Deep))
    assert alone["rows"] != own["rows"]


def test_a_round_is_one_exchange(tmp_path, monkeypatch):
    pushed = []

    class Counting(LocalGrid):
        def push_messages(self, messages):
            messages = list(messages)
            pushed.append(messages[0].metadata.message_type)
            return super().push_messages(messages)

    monkeypatch.setattr("fedmed_flower.engines.local.LocalGrid", Counting)
    images(tmp_path / "run", validate="next")
    assert pushed == ["query.describe", *["train"] * 4, "evaluate", "evaluate"]


PRIVATE = {"privacy": "patient", "target_epsilon": 50.0, "delta": 1e-3, "sampling_rate": 0.5}


def test_patients_of_a_private_run_are_charged_alike(tmp_path):
    charged = []
    for way in ("own", "next"):
        folder = tmp_path / way
        _, summary = run_tables(
            folder,
            predicting("binary"),
            preparation="declared",
            keep_model="best",
            validate=way,
            **PRIVATE,
        )
        ledgers = sorted((folder / "ledgers").rglob("*.sqlite"))
        charged.append(
            [
                sorted((e.purpose, e.rounds, e.patients) for e in Ledger(path, True).entries())
                for path in ledgers
            ]
        )
        assert summary["kept"]["metric"] == "auc"
    assert charged[0] == charged[1]
    assert len(charged[0]) == 3


class Losing(TinyClient):
    """The third hospital fails in the training of round 2."""

    def fit(self, model, prepared, seed):
        if self.site.index == 2 and self.progress == 0.25:
            raise ValueError("a broken disk")
        return super().fit(model, prepared, seed)


def test_a_site_that_fails_is_missed_in_the_validation_of_the_round_before(tmp_path):
    images(tmp_path / "run", Losing, validate="next")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    listed = [(f["round"], f["phase"], f["site"], f["reason"]) for f in summary["failures"]]
    assert listed == [
        (2, "train", "hospital-3", "ValueError: a broken disk"),
        (1, "val", "hospital-3", "no figures: its reply to the training of round 2 did not count"),
    ]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert re.search(r"round 2/4  train .* \(round 1\)  failed: hospital-3  ", log)
    assert "round 4 is validated  val auc " in log


def test_a_run_that_was_killed_is_resumed_to_the_same(tmp_path):
    class Killed(TinyClient):
        def fit(self, model, prepared, seed):
            if self.site.index == 1 and self.progress == 0.5:
                raise KeyboardInterrupt
            return super().fit(model, prepared, seed)

    whole = left_by(tmp_path / "whole", images(tmp_path / "whole", validate="next"))
    with pytest.raises(KeyboardInterrupt):
        images(tmp_path / "cut", Killed, validate="next")
    again = images(tmp_path / "cut", validate="next", resume=True)
    assert left_by(tmp_path / "cut", again) == whole
    with pytest.raises(InputError, match=r"^validate was 'next' when .* and is 'own' now: resume"):
        images(tmp_path / "cut", resume=True)


# What is refused: the names of the table in the docs, and a run of each.
REFUSED = {
    "`fraction_train` below 1": {"strategy": lambda: FedAvg(fraction_train=0.5)},
    "`fraction_evaluate` below 1": {"strategy": lambda: FedAvg(fraction_evaluate=0.5)},
    "`buffer`": {"buffer": 2},
    '`secure="sum"`': {"secure": "sum"},
    "`method=cyclic`": {"method": "cyclic"},
    "`DPFedAvg`, a strategy with a `choose` of its own": {
        "strategy": lambda: DPFedAvg(noise_multiplier=1.0, clipping_norm=1.0, population_size=3)
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_sent(name, tmp_path, monkeypatch):
    def push(self, messages):
        raise AssertionError("a message was sent")

    monkeypatch.setattr(LocalGrid, "push_messages", push)
    config = {key: value for key, value in REFUSED[name].items() if key != "strategy"}
    strategy = REFUSED[name].get("strategy", FedAvg)()
    key = name.strip("`").partition("`")[0].partition("=")[2] or name.strip("`").partition("`")[0]
    with pytest.raises(InputError, match=r'validate="next"') as raised:
        run_tiny(tmp_path / "run", strategy=strategy, validate="next", **config)
    assert key.strip('"') in str(raised.value)
    assert 'set validate="own"' in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_trees_are_validated_in_exchanges_of_their_own(tmp_path):
    server = ServerApp()

    @server.main()
    def main(grid, context):
        grow(FedXgbBagging(), grid, context, Hospital(context))

    settings = DECLARED | {"run-dir": str(tmp_path / "run"), "validate": "next"}
    text = (
        'validate must be "own" for trees, got "next": an ensemble is validated in an exchange of '
        "its own"
    )
    with pytest.raises(InputError, match=says_of_setting(text)):
        run_local(server, Hospital.client_app(), 2, run_config=settings)


def test_a_wrong_value_names_both(tmp_path):
    with pytest.raises(
        InputError, match=says_of_setting("validate must be one of own, next, got 'x'")
    ):
        run_tiny(tmp_path / "run", validate="x")


@cache
def names_in_docs(heading):
    section = DOCS.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [line.strip("|").split("|")[0].strip() for line in lines]


def test_the_docs_list_what_is_tested_here():
    assert names_in_docs("What goes with it") == [*WORKS, '`privacy="patient"`']
    assert names_in_docs("What is refused") == [*REFUSED, "trees", "`evaluate_config` alone"]
