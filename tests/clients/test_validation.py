"""A training reply with validation figures: those of an evaluation reply, with the same guards."""

from pathlib import Path

import pytest
from curious_models import OUTPUTS, PRIVATE, model_of
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hospitals import Table as Private
from hospitals import hospital
from tiny import (
    CONFIG,
    TinyClient,
    ask,
    bits,
    context_of,
    fixed,
    make_rows,
    model_arrays,
    node_of,
    trained,
)

from fedmed_flower import InputError, SiteData
from fedmed_flower.clients.app import train
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.wire import WHY


def both(client, node, arrays=None, **config):
    """Return the figures of a training reply and those of an evaluation reply."""
    validated = ask(
        client, "train", context_of(node_config=node, **config), arrays,
        validate=True, server_round=3,
    )  # fmt: skip
    assert not validated.has_error(), validated.error.reason
    evaluated = ask(
        client, "evaluate", context_of(node_config=node, **config), arrays,
        server_round=2,
    )  # fmt: skip
    return validated.content["validation"], evaluated.content["metrics"]


def test_the_figures_are_those_of_an_evaluation_and_training_is_the_same():
    simulated = {"partition-id": 0, "num-partitions": 2}
    validated, evaluated = both(TinyClient, simulated)
    assert validated == evaluated
    assert {"num-examples", "auc", "loss", "score-counts"} <= validated.keys()
    alone = trained(TinyClient, context_of())
    assert trained(TinyClient, context_of(), validate=True) == alone
    reply = ask(TinyClient, "train", context_of(), validate=False)
    assert "validation" not in reply.content


def test_the_model_is_measured_as_it_came_and_not_as_it_was_trained():
    torn = model_arrays(seed=5)
    validated, evaluated = both(TinyClient, {"partition-id": 1, "num-partitions": 2}, torn)
    assert validated == evaluated
    reply = ask(TinyClient, "train", context_of(1), torn, validate=True)
    after = ask(TinyClient, "evaluate", context_of(1), reply.content["arrays"])
    assert bits(reply.content["arrays"]) != bits(torn)
    assert after.content["metrics"] != validated


@pytest.mark.parametrize("coarse", [False, True])
def test_a_real_hospital_sends_what_an_evaluation_would_send(tmp_path, coarse):
    rows = {split: make_rows(60, n, split) for n, split in enumerate(("train", "val", "test"))}
    client = fixed(SiteData(**rows, source="tiny"))
    node = node_of(tmp_path, coarse_figures=coarse)
    validated, evaluated = both(client, node)
    assert validated == evaluated
    assert "auc" in validated


def test_figures_of_too_few_patients_stay_as_in_an_evaluation(tmp_path):
    rows = {"train": make_rows(60, 0, "t"), "val": make_rows(3, 1, "v"), "test": ()}
    client = fixed(SiteData(**rows, source="tiny"))
    validated, evaluated = both(client, node_of(tmp_path))
    assert validated == evaluated == MetricRecord({"num-examples": 3})


def test_a_hospital_that_evaluates_in_sums_alone_says_so_and_trains(tmp_path):
    rows = {split: make_rows(60, n, split) for n, split in enumerate(("train", "val", "test"))}
    client = fixed(SiteData(**rows, source="tiny"))
    context = context_of(node_config=node_of(tmp_path, secure_only="evaluate"))
    reply = ask(client, "train", context, validate=True)
    refused = ask(client, "evaluate", context)
    assert reply.content["validation"] == ConfigRecord({WHY: refused.error.reason})
    assert "declined: evaluate would tell this hospital's own figures" in refused.error.reason
    assert len(reply.content["arrays"]) == 2


class Unmeasured(TinyClient):
    def measure(self, model, prepared):
        self.context.state["half"] = ConfigRecord({"done": True})
        raise ValueError("patient p-17")


def test_an_error_costs_the_figures_alone_and_says_no_more_than_in_an_evaluation(tmp_path):
    context = context_of()
    reply = ask(Unmeasured, "train", context, validate=True)
    refused = ask(Unmeasured, "evaluate", context)
    assert reply.content["validation"] == ConfigRecord({WHY: refused.error.reason})
    assert "ValueError: patient p-17" in refused.error.reason
    assert "half" not in context.state
    assert bits(reply.content["arrays"]) == trained(TinyClient, context_of())
    rows = {split: make_rows(60, n, split) for n, split in enumerate(("train", "val", "test"))}
    real = context_of(node_config=node_of(tmp_path))
    reply = ask(fixed(SiteData(**rows, source="t"), Unmeasured), "train", real, validate=True)
    assert reply.content["validation"] == ConfigRecord({WHY: "site north: ValueError"})


def purposes(node):
    path = Path(node["data-dir"]) / "privacy-ledger.sqlite"
    if not path.exists():
        return []
    ledger = Ledger(path, read_only=True)
    return [(entry.purpose, entry.rounds) for entry in ledger.entries()]


def ask_privately(node, kind, **config):
    context = context_of(node_config=node)
    context.run_config = CONFIG | PRIVATE
    arrays = ArrayRecord(model_of(Private, OUTPUTS[Private]).state_dict())
    return ask(Private, kind, context, arrays, run_key="k", **config)


def test_noised_figures_are_charged_as_in_an_evaluation():
    found = []
    for messages in (
        [("train", {"server_round": 3, "validate": True})],
        [("train", {"server_round": 3}), ("evaluate", {"server_round": 2})],
    ):
        with hospital("as it is") as node:
            replies = [ask_privately(node, kind, **config) for kind, config in messages]
            content = replies[-1].content
            figures = content["validation"] if "validation" in content else content["metrics"]
            found.append((purposes(node), "noised-counts" in figures))
    assert found[0] == found[1]
    charged, noised = found[0]
    assert [purpose for purpose, _ in charged] == ["train", "val counts"]
    assert noised


def test_a_hospital_that_cannot_train_is_charged_for_no_figures():
    with hospital("as it is") as node:
        context = context_of(node_config=node)
        reply = ask(Private, "train", context, ArrayRecord({}), validate=True)
        assert "declined: this hospital has set a privacy budget" in reply.error.reason
        assert purposes(node) == []


def test_a_part_of_a_secure_sum_brings_no_figures():
    records = {"arrays": model_arrays(), "config": ConfigRecord({"validate": True})}
    records["secure"] = ConfigRecord({"record": b"rules"})
    client = TinyClient(context_of())
    with pytest.raises(InputError, match=r"^figures of validation are no part of a secure sum"):
        train(client, Message(RecordDict(records), 1, "train"))
    assert not client.touched
