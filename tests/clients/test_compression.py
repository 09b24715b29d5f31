"""A hospital codes its reply and keeps what the code has lost."""

import json
import logging

import numpy as np
import pytest
import torch
from builders import arrays, dump, run
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from tiny import TinyClient, ask, bits, context_of, halves, model_arrays, run_tiny
from torch import nn

from fedmed_flower.arrays.packing import Packing
from fedmed_flower.clients.compression import compressed
from fedmed_flower.strategies import DPFedAvg, FedAdam, FedAvg, FedMedian

CODES = ("int8", "int4", "top-k")
EACH = pytest.mark.parametrize("compression", CODES)
TOP = ConfigRecord({"compression": "top-k", "top-k-share": 0.5})


def wide_linear(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.Linear(width, 2))


class Wide(TinyClient):
    def build_model(self):
        return wide_linear(64)


def record(**records):
    return RecordDict({name: arrays(**values) for name, values in records.items()})


def test_without_a_code_the_reply_leaves_as_it_is():
    content = record(arrays={"w": [1.0]})
    reply = compressed("north", ConfigRecord(), content, record(arrays={"w": [0.0]}), {})
    assert reply.content is content
    assert reply.residual == {}


def test_model_and_companion_are_coded_and_what_is_lost_comes_later():
    sent = record(arrays={"w": [0.0, 0.0]}, control={"c": [1.0, 1.0]})
    # Numbers that a scale of 8 bits holds exactly.
    content = record(arrays={"w": [127.0, 96.0]}, control={"c": [1.0, 128.0]})
    content["metrics"] = MetricRecord({"loss": 1.0})
    reply = compressed("north", TOP, content, sent, {})
    assert reply.content["arrays"][".indices16"].numpy().tolist() == [0]
    assert reply.content["arrays"][".codes"].numpy().tolist() == [127]
    assert reply.content["control"][".indices16"].numpy().tolist() == [1]
    assert reply.content["metrics"] == content["metrics"]
    kept = {key: value.tolist() for key, value in reply.residual.items()}
    assert kept == {"arrays/w": [0, 96], "control/c": [0, 0]}
    # The content that was handed over is not changed.
    assert content["arrays"]["w"].numpy().tolist() == [127, 96]
    content["arrays"] = arrays(w=[10.0, 31.0])
    second = compressed("north", TOP, content, sent, reply.residual)
    assert second.content["arrays"][".indices16"].numpy().tolist() == [1]
    assert second.content["arrays"][".scales"].numpy().tolist() == [1]
    assert second.residual["arrays/w"].tolist() == [10, 0]


def test_layers_that_the_site_keeps_are_not_coded():
    sent = record(arrays={"stem": [0.0, 0.0], "norm": [1.0]})
    reply = compressed("north", TOP, record(arrays={"stem": [1.0, 0.0]}), sent, {})
    assert list(reply.residual) == ["arrays/stem"]
    assert reply.content["arrays"][".codes"].numpy().tolist() == [127]


def test_a_model_that_is_not_finite_leaves_what_was_lost_as_it_is(caplog):
    sent = record(arrays={"w": [0.0, 0.0]})
    before = {"arrays/w": torch.tensor([0.5, 0.0])}
    config = ConfigRecord({"compression": "int8"})
    with caplog.at_level(logging.WARNING, "flwr.fedmed"):
        reply = compressed("north", config, record(arrays={"w": [1.0, np.nan]}), sent, before)
    assert "north: arrays holds NaN or infinite values after training" in caplog.text
    assert reply.residual["arrays/w"].tolist() == [0.5, 0]
    packing = Packing.of(config)
    with pytest.raises(ValueError, match="a scale must be at least 0 and finite, got nan"):
        packing.unpack(sent["arrays"], reply.content["arrays"])


# --- A site ---------------------------------------------------------------------------------------


def test_a_site_sends_the_code_of_what_it_would_send():
    dense = ask(TinyClient, "train", context_of()).content
    coded = ask(TinyClient, "train", context_of(), compression="int8").content
    sent = model_arrays()
    packing = Packing.named("int8", 1.0)
    expected = packing.pack(sent, dense["arrays"], {}).coded
    assert dump(coded["arrays"]) == dump(expected)
    assert dict(coded["metrics"]).keys() == dict(dense["metrics"]).keys()


def coded_in(context, server_round, taken):
    config = {"compression": "top-k", "top_k_share": 0.2, "server_round": server_round}
    reply = ask(TinyClient, "train", context, replies_taken=taken, **config)
    assert not reply.has_error(), reply.error.reason
    return bits(reply.content["arrays"])


def test_a_round_that_is_repeated_begins_with_what_was_lost_before_it(tmp_path, caplog):
    context = context_of(run_dir=str(tmp_path))
    first = coded_in(context, 1, taken=0)
    second = coded_in(context, 2, taken=1)
    assert coded_in(context, 2, taken=1) == second
    assert not caplog.records
    # Without what was lost it is another one.
    with caplog.at_level(logging.WARNING, "flwr.fedmed"):
        fresh = coded_in(context_of(run_dir=str(tmp_path / "other")), 2, taken=1)
    assert "hospital-1: the state after 1 rounds is not here: it starts anew" in caplog.text
    assert fresh != second
    assert first != second


def test_a_code_that_is_not_known_is_refused():
    reply = ask(TinyClient, "train", context_of(), compression="zip")
    assert "compression must be one of none, int8, int4, top-k, got 'zip'" in reply.error.reason


# --- A run ----------------------------------------------------------------------------------------


@EACH
def test_a_killed_and_resumed_run_has_the_same_bits(tmp_path, compression):
    config = {"compression": compression, "top_k_share": 0.1}
    whole = run_tiny(tmp_path / "whole", num_server_rounds=4, **config)
    run_tiny(tmp_path / "parts", num_server_rounds=2, **config)
    resumed = run_tiny(tmp_path / "parts", num_server_rounds=4, resume=True, **config)
    assert bits(resumed.arrays) == bits(whole.arrays)
    plain = run_tiny(tmp_path / "plain", num_server_rounds=4)
    assert bits(plain.arrays) != bits(whole.arrays)


@pytest.mark.parametrize("method", ["scaffold", "ditto"])
def test_a_method_and_its_further_arrays_are_coded_and_resumed(tmp_path, method):
    config = {"compression": "int8", "method": method}
    strategy = FedAvg()
    whole = run_tiny(tmp_path / "whole", strategy=strategy, num_server_rounds=3, **config)
    assert not strategy.history.failures
    run_tiny(tmp_path / "parts", num_server_rounds=2, **config)
    resumed = run_tiny(tmp_path / "parts", num_server_rounds=3, resume=True, **config)
    assert bits(resumed.arrays) == bits(whole.arrays)
    plain = run_tiny(tmp_path / "plain", num_server_rounds=3, method=method)
    for key, array in plain.arrays.items():
        assert np.allclose(whole.arrays[key].numpy(), array.numpy(), rtol=0, atol=5e-3)


def test_layers_that_are_kept_and_not_sent_go_with_a_code(tmp_path):
    strategy = FedAvg()
    config = {"compression": "int8", "keep": "1.bias", "keep_sent": False}
    result = run_tiny(tmp_path, strategy=strategy, **config)
    assert not strategy.history.failures
    assert result.arrays["1.bias"].numpy().tolist() == model_arrays()["1.bias"].numpy().tolist()


def test_eight_bits_lead_to_the_model_that_is_found_without(tmp_path):
    plain = run_tiny(tmp_path / "plain", num_server_rounds=5)
    coded = run_tiny(tmp_path / "coded", num_server_rounds=5, compression="int8")
    for key, array in plain.arrays.items():
        assert np.allclose(coded.arrays[key].numpy(), array.numpy(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("rule", [FedMedian, FedAdam])
def test_a_code_goes_with_each_rule(tmp_path, rule):
    strategy = rule()
    result = run_tiny(tmp_path, strategy=strategy, num_sites=3, compression="int4")
    assert strategy.history.rounds_trained() == {f"hospital-{k}": 2 for k in (1, 2, 3)}
    assert not strategy.history.failures
    assert result.train_metrics_clientapp[2]["bytes-saved"] != 0


class Halves(TinyClient):
    build_model = staticmethod(halves)


@EACH
def test_running_statistics_are_not_coded(tmp_path, compression):
    strategy = FedAvg()
    config = {"compression": compression, "local_epochs": 2}
    result = run_tiny(tmp_path, Halves, model=halves, strategy=strategy, **config)
    assert not strategy.history.failures
    assert (result.arrays["stem.2.running_var"].numpy() > 0).all()
    assert result.arrays["stem.2.num_batches_tracked"].numpy() > 0
    named = {"running_mean", "running_var", "num_batches_tracked"}
    uncoded = [f"stem.2.{name}" for name in sorted(named)]
    context = context_of()
    reply = ask(Halves, "train", context, model_arrays(halves), compression="int8", uncoded=uncoded)
    assert sorted(reply.content["arrays"]) == [".codes", ".scales", *sorted(uncoded)]


def test_what_was_saved_is_in_the_summary_and_lives_through_a_resume(tmp_path):
    wide = {"model": lambda: wide_linear(64), "client": Wide, "compression": "int8"}
    run_tiny(tmp_path / "whole", num_server_rounds=2, **wide)
    run_tiny(tmp_path / "parts", num_server_rounds=1, **wide)
    run_tiny(tmp_path / "parts", num_server_rounds=2, resume=True, **wide)
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts")
    ]
    for summary in summaries:
        sent, dense = summary["saved"]["from-sites"]
        traffic = summary["traffic"].values()
        assert sent == sum(part["bytes-from-site"] for part in traffic)
        # Four replies of 450 weights, which take a byte in place of four, without five headers.
        more = 4 * (450 * 3 - 2 * 4 + (4 - 2) * 128)
        assert dense - sent == pytest.approx(more, abs=4 * 50)
        assert summary["saved"]["to-sites"][0] == summary["saved"]["to-sites"][1]
    assert summaries[0]["saved"] == summaries[1]["saved"]
    rows = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    assert len([row for row in rows if ",bytes-saved," in row]) == 2


def test_a_private_run_may_be_coded(tmp_path):
    private = {"privacy": "patient", "target_epsilon": 4.0}
    strategy = FedAvg()
    run_tiny(tmp_path / "patient", strategy=strategy, compression="int8", **private)
    assert strategy.history.rounds_trained() == {"hospital-1": 2, "hospital-2": 2}
    # No more leaves than without: noise is in the change before it is coded.
    assert strategy.history.sent.keys["train"]["hospital-1"] == {
        "arrays.*",
        "metrics.num-examples",
        "metrics.patient-epsilon",
        "site.data",
        "site.generated",
        "site.name",
        "site.simulated",
        "site.version",
    }
    hidden = DPFedAvg(noise_multiplier=1.0, clipping_norm=1.0, population_size=2)
    run_tiny(tmp_path / "hospital", strategy=hidden, compression="top-k")
    assert hidden.history.rounds_trained() == {"hospital-1": 2, "hospital-2": 2}


# --- What error feedback is for -------------------------------------------------------------------

# Each site wants another model; all together want the mean.
WANTED = np.float32([[8, 1, 0, -1], [-6, 1, 2, -1], [-5, 1, 4, 2]])


def descending_app(feedback):
    """Return sites that go a part of the way to what they want, shorter in each round."""
    lost = {}
    app = ClientApp()

    @app.train()
    def _(message, context):
        number = int(context.node_config["partition-id"])
        config = message.content["config"]
        rate = 0.5 / np.sqrt(int(config["server-round"]))
        model = message.content["arrays"]["w"].numpy()
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1})})
        content["arrays"] = arrays(w=model + np.float32(rate) * (WANTED[number] - model))
        reply = compressed("", config, content, message.content, lost.get(number, {}))
        lost[number] = reply.residual if feedback else {}
        return Message(reply.content, reply_to=message)

    return app


def distance(compression, feedback, rounds=150):
    strategy = FedAvg(fraction_evaluate=0.0, compression=compression, top_k_share=0.25)
    run(strategy, descending_app(feedback), arrays(w=np.zeros(4, np.float32)), rounds, 3)
    return np.abs(strategy.result.arrays["w"].numpy() - WANTED.mean(axis=0)).max()


@pytest.mark.parametrize(("compression", "near"), [("int8", 1e-3), ("int4", 0.02), ("top-k", 0.15)])
def test_with_error_feedback_sites_that_differ_find_what_all_of_them_want(compression, near):
    assert distance(compression, feedback=True) < near
    # Rounding to the nearest is biased, and the largest entries hide the others.
    assert distance(compression, feedback=False) > 10 * near


def test_without_a_code_they_find_it_too():
    assert distance("none", feedback=True) < 1e-4
