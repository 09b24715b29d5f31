import gc
import re
import weakref
from itertools import chain

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import arrays_size_mod, message_size_mod
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity
from tiny import (
    TinyClient,
    ask,
    bits,
    context_of,
    fixed,
    halves,
    linear,
    make_rows,
    model_arrays,
    node_of,
    run_tiny,
    says_of_setting,
    see,
    trained,
)
from torch import nn
from torch.utils.data import DataLoader

from fedmed_flower import InputError, MedicalClient, SiteData
from fedmed_flower.clients.training import Steps
from fedmed_flower.models.trainable import Travelling
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.wire import MESSAGE_VERSION, read_error


class Failing(TinyClient):
    """Fails with a patient's name in the text, where `failing` says."""

    failing = ""
    error = ValueError("Anna Schmidt has no scan")

    def load_data(self, site):
        if self.failing == "load_data":
            raise self.error
        return super().load_data(site)

    def fit(self, model, prepared, seed):
        if self.failing == "fit":
            raise self.error
        return super().fit(model, prepared, seed)


class Counting(TinyClient):
    loads = 0

    def load_data(self, site):
        type(self).loads += 1
        return super().load_data(site)


def error_of(client, kind="train", context=None, **config):
    reply = ask(client, kind, context or context_of(), **config)
    assert reply.has_error()
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    name, text = read_error(reply.error.reason)
    assert name
    return text


def test_a_training_reply_holds_model_metrics_and_site():
    reply = ask(TinyClient, "train", context_of(1))
    assert set(reply.content) == {"arrays", "metrics", "site"}
    metrics = reply.content["metrics"]
    assert set(metrics) == {"loss", "num-examples", "seconds"}
    assert metrics["num-examples"] == 10
    assert 0 < metrics["loss"] < 5
    assert dict(reply.content["site"]) == {
        "name": "hospital-2",
        "data": "tiny images",
        "generated": False,
        "simulated": True,
        "version": MESSAGE_VERSION,
    }
    arrays = reply.content["arrays"]
    assert {key: (a.dtype, tuple(a.shape)) for key, a in arrays.items()} == {
        "1.weight": ("float32", (2, 4)),
        "1.bias": ("float32", (2,)),
    }


def test_one_full_batch_is_one_step_of_gradient_descent():
    data = SiteData(train=make_rows(10, 4))
    reply = ask(fixed(data), "train", context_of(batch_size=10, learning_rate=0.3))
    images = np.array([row["image"].ravel() for row in data.train], dtype=float)
    images = (images - images.mean(1, keepdims=True)) / images.std(1, keepdims=True)
    start = {key: array.numpy().astype(float) for key, array in model_arrays().items()}
    logits = images @ start["1.weight"].T + start["1.bias"]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = np.eye(2)[[row["label"] for row in data.train]]
    slope = (chances - truth) / 10
    arrays = reply.content["arrays"]
    np.testing.assert_allclose(
        arrays["1.weight"].numpy(), start["1.weight"] - 0.3 * slope.T @ images, atol=1e-6
    )
    np.testing.assert_allclose(
        arrays["1.bias"].numpy(), start["1.bias"] - 0.3 * slope.sum(0), atol=1e-6
    )
    loss = -np.log((chances * truth).sum(1)).mean()
    assert reply.content["metrics"]["loss"] == pytest.approx(loss, abs=1e-6)


def test_the_proximal_term_of_fedprox_holds_the_model_near_the_global_one():
    start = model_arrays()["1.weight"].numpy()

    def distance(**config):
        reply = ask(TinyClient, "train", context_of(learning_rate=0.1, local_epochs=5), **config)
        return float(np.linalg.norm(reply.content["arrays"]["1.weight"].numpy() - start))

    assert distance() == distance(proximal_mu=0.0)
    assert distance() > 2 * distance(proximal_mu=5.0) > 0
    reason = error_of(TinyClient, "train", proximal_mu=-1.0)
    assert reason.endswith(
        "proximal-mu must be at least 0 and finite, got -1.0" + see("proximal-mu")
    )


def test_the_arrays_come_back_under_the_name_they_came_under():
    context = context_of()
    reply = ask(TinyClient, "train", context)
    assert list(reply.content.array_records) == ["arrays"]
    assert reply.metadata.message_type == "train"
    assert reply.metadata.src_node_id == context.node_id


@pytest.mark.parametrize(("split", "count"), [("train", 10), ("val", 6), ("test", 8)])
def test_evaluation_measures_the_split_that_is_asked_for(split, count):
    reply = ask(TinyClient, "evaluate", context_of(), split=split)
    metrics = reply.content["metrics"]
    assert metrics["num-examples"] == count
    assert sum(metrics["confusion-counts"]) == count
    assert {"loss", "accuracy", "auc"} <= set(metrics)
    assert not reply.content.array_records


def test_evaluation_is_on_val_where_nothing_is_said():
    assert ask(TinyClient, "evaluate", context_of()).content["metrics"]["num-examples"] == 6


def test_evaluation_on_an_unknown_split():
    reason = error_of(TinyClient, "evaluate", split="all")
    assert reason == "split must be one of train, val, test, got 'all'"


def test_an_empty_split_counts_no_rows():
    client = fixed(SiteData(train=make_rows(4, 0)))
    for split in ("val", "test"):
        reply = ask(client, "evaluate", context_of(), split=split)
        assert dict(reply.content["metrics"]) == {"num-examples": 0}
        assert reply.content["site"]["name"] == "hospital-1"


@pytest.mark.parametrize("kind", ["query.describe", "query.statistics"])
def test_a_server_whose_messages_have_another_version_is_refused_before_a_row_is_looked_at(
    kind, tmp_path
):
    class Unread(TinyClient):
        def load_data(self, site):
            raise AssertionError("rows are loaded")

    end = ", and those of the hospital version 2: install the same fedmed-flower at both"
    context = context_of(node_config=node_of(tmp_path))
    assert error_of(Unread, kind, context, version=3) == (
        "declined: north: messages of the server have version 3" + end
    )
    TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, SUPERLINK_NODE_ID
    older = Message(RecordDict(), context.node_id, kind)
    reply = Unread.client_app()(older, context)
    assert read_error(reply.error.reason) == (
        "north",
        "declined: north: messages of the server have no version, as before versions were named"
        + end,
    )


def test_describe_counts_rows_and_in_a_simulation_labels(tmp_path):
    reply = ask(TinyClient, "query.describe", context_of())
    expected = {"num-examples": 10, "train": 10, "val": 6, "test": 8, "rejected": 0}
    assert dict(reply.content["metrics"]) == expected | {"labels": [5, 5]}
    reply = ask(TinyClient, "query.describe", context_of(node_config=node_of(tmp_path)))
    assert dict(reply.content["metrics"]) == expected
    assert dict(reply.content["site"]) == {
        "name": "north",
        "data": "tiny images",
        "generated": False,
        "simulated": False,
        "version": MESSAGE_VERSION,
    }


def test_labels_that_do_not_occur_are_counted_too():
    client = fixed(SiteData(train=make_rows(3, 0, classes=1)), num_classes=4)
    reply = ask(client, "query.describe", context_of())
    assert reply.content["metrics"]["labels"] == [3, 0, 0, 0]


@pytest.mark.parametrize("where", ["load_data", "fit"])
def test_outside_a_simulation_only_the_class_of_an_error_leaves(where, tmp_path):
    client = type("Client", (Failing,), {"failing": where})
    reply = ask(client, "train", context_of(node_config=node_of(tmp_path)))
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert reply.error.reason == "site north: ValueError"
    assert b"Schmidt" not in message_to_proto(reply).SerializeToString()


@pytest.mark.parametrize("where", ["load_data", "fit"])
def test_outside_a_simulation_the_text_of_an_input_error_stays_too(where, tmp_path, caplog):
    error = InputError("Anna Schmidt is in two splits")
    client = type("Client", (Failing,), {"failing": where, "error": error})
    reply = ask(client, "train", context_of(node_config=node_of(tmp_path)))
    assert reply.error.reason == "site north: InputError"
    assert caplog.messages[-1] == "north: Anna Schmidt is in two splits"
    assert b"Schmidt" not in message_to_proto(reply).SerializeToString()


@pytest.mark.parametrize("where", ["load_data", "fit"])
def test_in_a_simulation_the_text_of_an_error_is_told(where):
    client = type("Client", (Failing,), {"failing": where})
    assert error_of(client) == "ValueError: Anna Schmidt has no scan"
    client.error = InputError("give a folder")
    assert error_of(client) == "give a folder"


def test_in_a_simulation_the_text_of_a_wrong_setting_is_told():
    reason = error_of(TinyClient, context=context_of(batch_size=0))
    assert re.search(says_of_setting("batch-size must be from 1 to 1,000,000, got 0"), reason)


def test_a_supernode_without_a_name_is_told_by_class_alone():
    assert error_of(TinyClient, context=context_of(node_config={})) == "InputError"


def test_an_interrupt_is_not_an_error_reply():
    client = type("Client", (Failing,), {"failing": "fit", "error": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        ask(client, "train", context_of())


def test_a_loss_that_is_not_finite_is_an_error_reply():
    class Loss(nn.Module):
        def forward(self, outputs, labels):
            return outputs.sum() * float("nan")

    client = fixed(SiteData(train=make_rows(4, 0)), loss=lambda self: Loss())
    text = "the training loss is nan in epoch 1: a lower learning-rate may help"
    assert error_of(client) == f"DivergedError: {text}"


def test_arrays_of_another_model_are_an_error_reply():
    arrays = model_arrays(lambda: linear(3))
    text = (
        "1.weight should have shape torch.Size([2, 4]), got torch.Size([3, 4]) (None: no such "
        "entry)"
    )
    assert error_of(TinyClient, arrays=arrays) == f"ValueError: {text}"


def test_no_training_rows():
    client = fixed(SiteData(train=[], val=make_rows(2, 0)))
    assert error_of(client) == "there are no training rows"
    for kind in ("query.describe", "evaluate"):
        assert not ask(client, kind, context_of()).has_error()
    nobody = fixed(SiteData(train=[]))
    for kind in ("query.describe", "train", "evaluate"):
        assert error_of(nobody, kind) == "there are no rows"


def test_a_row_without_a_patient():
    rows = make_rows(3, 0, "q")
    del rows[2]["patient"]
    client = fixed(SiteData(train=make_rows(1, 1), val=rows))
    assert error_of(client) == "row 2 of the val split has no patient"


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test"), ("val", "test")])
def test_a_patient_in_two_splits(splits):
    rows = {name: make_rows(3, 0, name) for name in ("train", "val", "test")}
    for split in splits:
        rows[split][1]["patient"] = "p7"
    text = f"patient p7 is in the splits {splits[0]} and {splits[1]}: each patient must be in one"
    assert error_of(fixed(SiteData(**rows))) == text


def test_a_patient_with_several_rows_of_one_split():
    rows = [row | {"patient": "p7"} for row in make_rows(4, 0)]
    reply = ask(fixed(SiteData(train=rows)), "train", context_of())
    assert reply.content["metrics"]["num-examples"] == 4


def test_the_same_seed_gives_the_same_bits():
    first = trained(TinyClient, context_of(seed=3))
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert trained(TinyClient, context_of(seed=3)) == first
    assert trained(TinyClient, context_of(seed=4)) != first
    assert trained(TinyClient, context_of(seed=3), server_round=2) != first


def test_sites_with_the_same_rows_shuffle_them_differently(tmp_path):
    client = fixed(SiteData(train=make_rows(10, 0)))
    assert trained(client, context_of(0)) != trained(client, context_of(1))
    node_config = node_of(tmp_path, "hospital-1")
    other = trained(client, context_of(node_config=node_config, torch_threads=1))
    assert other == trained(client, context_of(0))


def test_the_order_of_the_sites_does_not_matter():
    def both(order):
        contexts = {index: context_of(index, run_id=run_id) for index in order}
        return {index: trained(TinyClient, contexts[index]) for index in order}

    run_id = 10**6
    forwards = both((0, 1))
    run_id += 1
    assert both((1, 0)) == forwards


class Shaking(nn.Module):
    """Linear with dropout and batch norm: everything that has a state or draws numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2)
        )

    def forward(self, images):
        return self.layers(images)


class ShakingClient(TinyClient):
    def build_model(self):
        return Shaking()


def test_evaluation_between_rounds_does_not_change_training():
    arrays = model_arrays(Shaking)
    outcomes = []
    for evaluated in (False, True):
        context = context_of()
        reply = ask(ShakingClient, "train", context, arrays)
        if evaluated:
            for split in ("val", "test", "train"):
                ask(ShakingClient, "evaluate", context, reply.content["arrays"], split=split)
            ask(ShakingClient, "query.describe", context)
        outcomes.append(trained(ShakingClient, context, reply.content["arrays"], server_round=2))
    assert outcomes[0] == outcomes[1]


def test_data_are_loaded_once_a_run():
    Counting.loads = 0
    context = context_of()
    ask(Counting, "query.describe", context)
    for server_round in (1, 2):
        ask(Counting, "train", context, server_round=server_round)
        ask(Counting, "evaluate", context)
    ask(Counting, "evaluate", context, split="test")
    assert Counting.loads == 1
    ask(Counting, "train", context_of(1, run_id=context.run_id))
    assert Counting.loads == 2
    ask(Counting, "train", context_of())
    assert Counting.loads == 3


def test_data_are_prepared_once_a_split():
    prepared = []

    class Client(TinyClient):
        def prepare(self, rows, train):
            prepared.append((len(rows), train))
            return super().prepare(rows, train)

    context = context_of()
    for server_round in (1, 2):
        ask(Client, "train", context, server_round=server_round)
        ask(Client, "evaluate", context)
    assert prepared == [(10, True), (6, False)]


def test_data_of_a_run_are_not_kept_for_the_next():
    references = []

    class Client(TinyClient):
        def load_data(self, site):
            data = super().load_data(site)
            references.append(weakref.ref(data.train[0]["image"]))
            return data

    ask(Client, "train", context_of())
    assert references[0]() is not None
    ask(Client, "train", context_of())
    gc.collect()
    assert references[0]() is None
    assert len(MedicalClient.run_cache.loaded) == 1


def test_pooled_training_sees_every_sites_rows():
    reply = ask(TinyClient, "train", context_of(1, 3), pool_sites=True)
    assert reply.content["metrics"]["num-examples"] == 30
    reply = ask(TinyClient, "evaluate", context_of(1, 3), pool_sites=True, split="test")
    assert reply.content["metrics"]["num-examples"] == 24
    assert reply.content["site"]["name"] == "hospital-2"


def test_pooled_and_own_rows_are_kept_apart():
    context = context_of(0, 3)
    counts = [
        ask(TinyClient, "train", context, pool_sites=pooled).content["metrics"]["num-examples"]
        for pooled in (False, True, False, True)
    ]
    assert counts == [10, 30, 10, 30]


def test_pooling_takes_patients_of_different_sites_for_different_people():
    class Client(TinyClient):
        def load_data(self, site):
            # Each hospital counts its patients from 0: patient 0 is in train here, in test there.
            rows = [row | {"patient": i} for i, row in enumerate(make_rows(6, site.index))]
            return SiteData(*((rows[:4], (), rows[4:]) if site.index else (rows[2:], (), rows[:2])))

    assert not ask(Client, "train", context_of(0)).has_error()
    assert not ask(Client, "train", context_of(1)).has_error()
    reply = ask(Client, "train", context_of(0), pool_sites=True)
    assert not reply.has_error(), reply.error.reason
    assert reply.content["metrics"]["num-examples"] == 8


def test_pooling_is_refused_outside_a_simulation(tmp_path, caplog):
    loaded = []

    class Client(TinyClient):
        def load_data(self, site):
            loaded.append(site.name)
            return super().load_data(site)

    node_config = node_of(tmp_path, partition_id=0, num_partitions=2)
    for kind in ("train", "evaluate"):
        context = context_of(node_config=node_config)
        reply = ask(Client, kind, context, pool_sites=True)
        assert reply.error.reason == "site north: InputError"
        text = "north: pool-sites works in a simulation only: no site holds others' data"
        assert caplog.messages[-1] == text
    assert loaded == []


def test_the_number_of_threads_is_one_in_a_simulation_and_put_back(tmp_path):
    seen = []

    class Client(TinyClient):
        def fit(self, model, prepared, seed):
            seen.append(torch.get_num_threads())
            return super().fit(model, prepared, seed)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for config in ({}, {"torch_threads": 2}):
            for node_config in (None, node_of(tmp_path)):
                ask(Client, "train", context_of(node_config=node_config, **config))
                assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 3, 2, 2]


# What a real hospital keeps to itself -------------------------------------------------------------


class OwnFit(TinyClient):
    def fit(self, model, prepared, seed):
        return {"loss": 1.0}


@pytest.mark.parametrize(
    ("client", "patients", "rows", "config", "leaves"),
    [
        (TinyClient, 10, 10, {}, True),
        (TinyClient, 9, 9, {}, False),
        (TinyClient, 9, 18, {}, False),
        (TinyClient, 20, 20, {"local_steps": 1, "batch_size": 1}, False),
        (TinyClient, 20, 20, {"local_steps": 1, "batch_size": 9}, False),
        (TinyClient, 20, 20, {"local_steps": 2, "batch_size": 5}, True),
        # The last row of a pass would be a batch of its own, and is left out.
        (TinyClient, 10, 10, {"batch_size": 3}, False),
        # What a client's own loop has looked at nobody knows.
        (OwnFit, 9, 18, {}, False),
        (OwnFit, 20, 20, {"local_steps": 3, "batch_size": 3}, False),
        (OwnFit, 10, 10, {"local_steps": 2, "batch_size": 5}, True),
    ],
)
def test_an_update_that_fewer_than_ten_patients_have_made_does_not_leave_a_real_hospital(
    tmp_path, client, patients, rows, config, leaves
):
    train = [
        row | {"patient": f"p{number % patients}"} for number, row in enumerate(make_rows(rows, 1))
    ]
    one = fixed(SiteData(train=train), client)
    reply = ask(one, "train", context_of(node_config=node_of(tmp_path), **config))
    if leaves:
        assert reply.content["metrics"]["num-examples"] == rows
    else:
        text = "declined: an update here needs at least 10 patients"
        assert read_error(reply.error.reason) == ("north", text)
    for node in (None, node_of(tmp_path, min_train_patients=1)):
        assert not ask(one, "train", context_of(node_config=node, **config)).has_error()
    more = node_of(tmp_path, min_train_patients=patients + 1)
    text = f"an update here needs at least {patients + 1} patients"
    reply = ask(one, "train", context_of(node_config=more, **config))
    assert read_error(reply.error.reason)[1] == f"declined: {text}"


@pytest.mark.parametrize(
    ("patients", "fewest", "told"),
    [(9, None, False), (10, None, True), (9, 9, True), (10, 11, False)],
)
def test_figures_of_fewer_than_ten_patients_do_not_leave_a_real_hospital(
    tmp_path, patients, fewest, told
):
    val = [
        row | {"patient": f"p{number % patients}"} for number, row in enumerate(make_rows(12, 1))
    ]
    client = fixed(SiteData(train=make_rows(12, 2, "t"), val=val))
    node = node_of(tmp_path) | ({} if fewest is None else {"min-evaluated-patients": fewest})
    found = ask(client, "evaluate", context_of(node_config=node)).content["metrics"]
    assert found["num-examples"] == 12
    assert ({"loss", "auc", "confusion-counts"} <= found.keys()) == told
    assert (found.keys() == {"num-examples"}) != told
    ledger = Ledger(tmp_path / "privacy-ledger.sqlite", read_only=True)
    assert [(entry.purpose, entry.patients) for entry in ledger.plain()] == [
        ("val", patients)
    ] * told
    simulated = ask(client, "evaluate", context_of()).content["metrics"]
    assert "auc" in simulated


def test_figures_are_coarse_where_the_hospital_says_so(tmp_path):
    data = SiteData(train=make_rows(12, 0, "t"), val=make_rows(40, 1, "v"))
    client, found = fixed(data), {}
    for coarse in (False, True):
        folder = tmp_path / str(coarse)
        folder.mkdir()
        node = node_of(folder, coarse_figures=coarse)
        for kind in ("train", "evaluate"):
            reply = ask(client, kind, context_of(node_config=node, torch_threads=1))
            found[kind, coarse] = dict(reply.content["metrics"])
    exact, rounded = found["train", False], found["train", True]
    assert exact["loss"] != rounded["loss"] == float(f"{exact['loss']:.3g}")
    assert rounded["num-examples"] == 12
    exact, rounded = found["evaluate", False], found["evaluate", True]
    assert exact["loss"] != rounded["loss"] == float(f"{exact['loss']:.3g}")
    assert rounded["num-examples"] == 40
    # One bin for ten patients of a class.
    assert min(count for count in rounded["score-counts"] if count > 0) >= 10
    assert min(count for count in exact["score-counts"] if count > 0) < 10


def test_the_fifty_first_run_within_a_day_is_declined_and_leaves_nothing_behind(tmp_path):
    for name in ("data", "own"):
        (tmp_path / name).mkdir()
    node = node_of(tmp_path / "data", output_dir=str(tmp_path / "own"))
    client = fixed(SiteData(train=make_rows(12, 0), val=make_rows(12, 1, "v")))
    path = tmp_path / "data" / "privacy-ledger.sqlite"
    ledger = Ledger(path)
    for number in range(49):
        ledger.begin_run(f"run {number}", 50)

    def asked(kind, key):
        reply = ask(client, kind, context_of(node_config=node), run_key=key)
        return read_error(reply.error.reason)[1] if reply.has_error() else None

    def left():
        with ledger._open() as connection:
            runs = connection.execute("SELECT count(*) FROM runs").fetchone()[0]
        return runs, len(ledger.plain()), {place.name for place in (tmp_path / "own").iterdir()}

    assert asked("train", "last") is None
    assert left() == (50, 0, {"last"})
    text = "declined: 50 runs have begun here within a day (most-runs-a-day)"
    for kind in ("train", "evaluate", "query.pictures", "query.personal", "query.statistics"):
        assert asked(kind, "one more") == text
        assert asked(kind, "one more/local-1-north") == text
    assert left() == (50, 0, {"last"})
    # Those that have begun go on, with all their parts.
    assert asked("train", "run 7") is None
    assert asked("train", "last/local-1-north") is None
    node["most-runs-a-day"] = 51
    assert asked("train", "one more") is None
    assert asked("train", "and another") == text.replace("50", "51")


def test_what_a_server_calls_a_run_stays_with_a_hospital_and_is_a_name(tmp_path, caplog):
    client = fixed(SiteData(train=make_rows(12, 0), val=make_rows(12, 1, "v")))
    for length, told in ((200, None), (201, "run-key must have at most 200 letters, got 201")):
        reply = ask(
            client, "evaluate", context_of(node_config=node_of(tmp_path)), run_key="x" * length
        )
        assert reply.has_error() == (told is not None)
    assert reply.error.reason == "site north: InputError"
    assert caplog.messages[-1] == f"north: {told}"
    assert len(Ledger(tmp_path / "privacy-ledger.sqlite", read_only=True).plain()) == 1


def test_a_simulation_may_begin_any_number_of_runs(tmp_path):
    node = {"partition-id": 0, "num-partitions": 2, "most-runs-a-day": 1}
    for key in ("a", "b", "c"):
        context = context_of(node_config=node, run_dir=str(tmp_path))
        assert not ask(TinyClient, "evaluate", context, run_key=key).has_error()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind",
    ["train", "evaluate", "query.pictures", "query.contribution", "query.personal",
     "query.statistics"],
)  # fmt: skip
def test_a_real_hospital_without_a_place_for_its_ledger_answers_nothing(kind, caplog):
    loaded = []

    class Client(TinyClient):
        def load_data(self, site):
            loaded.append(site)
            return super().load_data(site)

    context = context_of(node_config={"site-name": "north"})
    assert ask(Client, kind, context).error.reason == "site north: InputError"
    assert caplog.messages == [
        "north: a hospital needs a file for its privacy ledger: give --node-config "
        "'ledger=\"/path/privacy-ledger.sqlite\"', or a data-dir to hold it" + see("ledger")
    ]
    assert loaded == []


@pytest.mark.parametrize("failing", ["", "fit"])
def test_torchs_global_generator_is_left_as_it_was(failing):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    client = type("Client", (Failing,), {"failing": failing})
    context = context_of()
    ask(client, "train", context)
    ask(client, "evaluate", context)
    assert torch.equal(torch.get_rng_state(), state)


def test_state_that_a_client_keeps_reaches_its_next_message():
    class Client(TinyClient):
        def fit(self, model, prepared, seed):
            seen = self.context.state.get("seen", ConfigRecord({"rounds": 0}))
            self.context.state["seen"] = ConfigRecord({"rounds": seen["rounds"] + 1})
            return super().fit(model, prepared, seed)

    context = context_of()
    for _ in range(3):
        ask(Client, "train", context)
    assert context.state["seen"]["rounds"] == 3


def test_what_a_client_was_sent_stays_as_it_was():
    arrays = model_arrays()
    before = bits(arrays)
    assert trained(TinyClient, context_of(), arrays) != before
    assert bits(arrays) == before


def test_a_network_with_batch_norm_over_several_rounds():
    class Client(TinyClient):
        def build_model(self):
            return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2))

    model = Client(context_of()).build_model
    arrays, counts = model_arrays(model), []
    context = context_of(run_id=None)
    for server_round in (1, 2, 3):
        reply = ask(Client, "train", context, arrays, server_round=server_round)
        arrays = reply.content["arrays"]
        counts.append(int(arrays["0.num_batches_tracked"].numpy()))
        assert arrays["0.num_batches_tracked"].dtype == "int64"
        assert arrays["0.num_batches_tracked"].numpy().shape == ()
    assert counts == [3, 6, 9]
    metrics = ask(Client, "evaluate", context, arrays).content["metrics"]
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(("count", "size"), [(12, 4), (11, 4), (9, 4), (1, 4), (4, 1)])
@pytest.mark.parametrize("steps", [{}, {"local_steps": 7}])
def test_rows_are_drawn_as_by_a_loader_of_single_rows(count, size, steps):
    drawn = []

    class Noting(Linear):
        def batch_of(self, prepared, indices):
            drawn.append([*indices])
            return super().batch_of(prepared, indices)

    client = Noting(context_of(batch_size=size, local_epochs=3, **steps))
    rows = numbers(count, 0)
    client.fit(line(), client.prepare(rows, train=True), seed=5)
    loader = DataLoader(
        range(count),
        size,
        shuffle=True,
        drop_last=count > size and count % size == 1,
        collate_fn=list,
        generator=torch.Generator().manual_seed(5),
    )
    wanted = [*Steps(loader, 7)] if steps else [batch for _ in range(3) for batch in loader]
    assert drawn == wanted
    assert client.entered == {index for batch in drawn for index in batch}


@pytest.mark.parametrize(
    ("own", "settings", "steps"),
    [
        (0, {}, 3),
        (2, {}, 3),
        (7, {}, 7),
        (7, {"fewest_steps": 0}, 3),
        (7, {"fewest_steps": 5}, 5),
        (7, {"local_epochs": 3}, 9),
        (7, {"local_steps": 2}, 2),
    ],
)
def test_a_round_has_the_fewest_steps_of_the_client_or_of_the_run_config(own, settings, steps):
    drawn = []

    class Noting(Linear):
        fewest_steps = own

        def batch_of(self, prepared, indices):
            drawn.append([*indices])
            return super().batch_of(prepared, indices)

    client = Noting(context_of(batch_size=4, **settings))
    client.fit(line(), client.prepare(numbers(12, 0), train=True), seed=5)
    assert len(drawn) == steps
    # Each pass has every row once.
    for first in range(0, steps - steps % 3, 3):
        assert sorted(chain(*drawn[first : first + 3])) == [*range(12)]


def test_a_last_batch_of_one_row_trains_with_batch_norm():
    client = fixed(SiteData(train=make_rows(9, 0)), base=ShakingClient)
    reply = ask(client, "train", context_of(batch_size=4), model_arrays(Shaking))
    assert not reply.has_error(), reply.error.reason


def test_batch_norm_is_averaged_over_sites_and_rounds(tmp_path):
    result = run_tiny(tmp_path / "run", ShakingClient, model=Shaking, num_server_rounds=3)
    arrays = {key: array.numpy() for key, array in result.arrays.items()}
    # Ten rows in batches of four are three steps; three rounds of them at both sites.
    assert arrays["layers.2.num_batches_tracked"] == 9
    assert arrays["layers.2.num_batches_tracked"].dtype == np.int64
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert isinstance(result.arrays, ArrayRecord)
    assert result.evaluate_metrics_clientapp[3]["num-examples"] == 12


class Linear(MedicalClient):
    """Four columns of a table and a number to be found from them: no `fit` of its own."""

    def build_model(self):
        return nn.Linear(4, 1)

    def load_data(self, site):
        return SiteData(train=numbers(12, site.index), val=numbers(4, 9, "v"), source="a table")

    def check(self, data):
        pass

    def prepare(self, rows, train):
        return [(torch.tensor(row["columns"]), torch.tensor(row["target"])) for row in rows]

    def batch_of(self, prepared, places):
        columns, targets = zip(*(prepared[place] for place in places), strict=True)
        return {"columns": torch.stack(columns), "target": torch.stack(targets)}

    def loss_of(self, model, batch):
        return ((model(batch["columns"])[:, 0] - batch["target"]) ** 2).mean()

    def made_up(self, count):
        return numbers(count, 8, "made up ")

    def measure(self, model, prepared):
        batch = self.batch_of(prepared, range(len(prepared)))
        with torch.no_grad():
            return {"num-examples": len(prepared), "loss": float(self.loss_of(model, batch))}


SLOPE = np.array([1.0, -2.0, 0.5, 0.0], np.float32)


def numbers(count, seed, name="t"):
    columns = np.random.default_rng(seed).standard_normal((count, 4)).astype(np.float32)
    targets = columns @ SLOPE + 3
    return [
        {"columns": row, "target": target, "patient": f"{name}{number}"}
        for number, (row, target) in enumerate(zip(columns, targets, strict=True))
    ]


def line():
    return nn.Linear(4, 1)


def test_batch_of_and_loss_of_are_enough_to_train():
    context = context_of(batch_size=12, learning_rate=0.25, local_epochs=1)
    arrays = model_arrays(line)
    reply = ask(Linear, "train", context, arrays)
    assert not reply.has_error(), reply.error.reason
    rows = numbers(12, 0)
    columns = np.array([row["columns"] for row in rows], float)
    targets = np.array([row["target"] for row in rows], float)
    weight, bias = (arrays[key].numpy().astype(float) for key in ("weight", "bias"))
    away = columns @ weight[0] + bias - targets
    metrics, sent = reply.content["metrics"], reply.content["arrays"]
    assert metrics["loss"] == pytest.approx((away**2).mean(), rel=1e-5)
    # One step of 0.25 along twice the mean of (away x columns).
    expected = weight[0] - 0.25 * 2 * (away[:, None] * columns).mean(0)
    np.testing.assert_allclose(sent["weight"].numpy()[0], expected, atol=1e-5)
    np.testing.assert_allclose(sent["bias"].numpy(), bias - 0.5 * away.mean(), atol=1e-5)


def test_a_client_of_its_own_finds_the_slope_over_a_run(tmp_path):
    result = run_tiny(
        tmp_path, Linear, model=line, num_server_rounds=8, local_epochs=5, learning_rate=0.1
    )
    np.testing.assert_allclose(result.arrays["weight"].numpy()[0], SLOPE, atol=0.02)
    np.testing.assert_allclose(result.arrays["bias"].numpy(), [3], atol=0.02)
    assert result.evaluate_metrics_clientapp[8]["loss"] < 1e-3


def test_a_client_of_its_own_trains_privately(tmp_path):
    config = {"privacy": "patient", "target_epsilon": 1e4, "learning_rate": 0.2}
    config |= {"private_metrics": False}
    result = run_tiny(
        tmp_path,
        Linear,
        model=line,
        num_server_rounds=4,
        local_epochs=6,
        max_grad_norm=4.0,
        **config,
    )
    # So weak a target hardly adds noise; clipping bends the way, not the aim.
    np.testing.assert_allclose(result.arrays["weight"].numpy()[0], SLOPE, atol=0.3)
    assert set(result.train_metrics_clientapp[4]) == {"patient-epsilon"}
    ledger = Ledger(tmp_path / "ledgers" / "hospital-1.sqlite", read_only=True)
    assert [(e.purpose, e.patients, e.rounds) for e in ledger.entries()] == [("train", 12, 4)]


def test_a_client_of_its_own_must_give_rows_that_no_patient_stands_behind(tmp_path):
    class Client(Linear):
        made_up = MedicalClient.made_up

    loaded = []
    Client.load_data = lambda self, site: loaded.append(site)
    context = context_of(privacy="patient", run_dir=str(tmp_path))
    text = error_of(Client, "train", context, arrays=model_arrays(line))
    assert text == (
        "Client does not define made_up, the rows of no patient on which model and loss are tried "
        "before a patient's row is read: define it"
    )
    assert loaded == []
    assert not (tmp_path / "ledgers").exists()


class Screening(TinyClient):
    """Rejects the rows of patients whose number is marked."""

    marked = ("3", "4")

    def screen(self, rows, split):
        return [row for row in rows if not row["patient"].endswith(self.marked)]


def test_rows_that_are_rejected_are_neither_counted_nor_trained_on():
    context = context_of()
    metrics = ask(Screening, "query.describe", context).content["metrics"]
    # Of 10, 6 and 8 rows in turn two are marked: 3 and 4.
    assert dict(metrics) == {
        "num-examples": 8, "train": 8, "val": 4, "test": 6, "rejected": 6, "labels": [4, 4],
    }  # fmt: skip
    assert ask(Screening, "train", context).content["metrics"]["num-examples"] == 8
    assert ask(Screening, "evaluate", context).content["metrics"]["num-examples"] == 4
    kept = [row for row in make_rows(10, (0, 0), "t") if not row["patient"].endswith(("3", "4"))]
    same = fixed(SiteData(train=kept))
    context, other = context_of(), context_of()
    assert trained(Screening, context) == trained(same, other)


def test_rows_are_screened_once_a_split_and_run():
    asked = []

    class Client(TinyClient):
        def screen(self, rows, split):
            asked.append((split, len(rows)))
            return rows

    context = context_of()
    for server_round in (1, 2):
        ask(Client, "train", context, server_round=server_round)
        ask(Client, "evaluate", context)
    assert asked == [("train", 10), ("val", 6)]
    ask(Client, "query.describe", context)
    assert asked == [("train", 10), ("val", 6), ("test", 8)]


def test_a_site_that_turns_every_training_row_away():
    client = type("Client", (Screening,), {"marked": tuple("0123456789")})
    for kind in ("query.describe", "train"):
        text = "there are no training rows left: all were rejected"
        assert error_of(client, kind) == text
    reply = ask(client, "evaluate", context_of())
    assert dict(reply.content["metrics"]) == {"num-examples": 0}


def test_the_ledger_counts_the_patients_of_rows_that_are_rejected_too(tmp_path):
    context = context_of(privacy="patient", target_epsilon=4.0, run_dir=str(tmp_path))
    reply = ask(Screening, "train", context)
    (entry,) = Ledger(tmp_path / "ledgers" / "hospital-1.sqlite", read_only=True).entries()
    assert (entry.purpose, entry.patients) == ("train", 10)
    # The rate is that of all who were loaded: a batch of 4 of 10.
    assert next(iter(entry.releases)).sampling_rate == 0.4
    assert reply.content["metrics"]["num-examples"] == 10
    metrics = ask(Screening, "query.describe", context).content["metrics"]
    assert dict(metrics) == {
        "num-examples": 10, "train": 10, "val": 6, "test": 8, "labels": [4, 4],
    }  # fmt: skip


def test_the_pooled_rows_are_screened_too():
    class Client(Screening):
        def screen(self, rows, split):
            # Pooled, a patient is a pair of hospital and name.
            return [row for row in rows if not row["patient"][1].endswith(self.marked)]

    reply = ask(Client, "train", context_of(1, 3), pool_sites=True)
    assert reply.content["metrics"]["num-examples"] == 24
    reply = ask(Client, "evaluate", context_of(1, 3), pool_sites=True, split="test")
    assert reply.content["metrics"]["num-examples"] == 18


def test_the_learning_rate_of_each_round_is_that_of_the_schedule():
    rows = make_rows(4, 0)
    arrays, moved = model_arrays(), []
    for server_round in (1, 2, 3):
        context = context_of(schedule="cosine", num_server_rounds=3, learning_rate=0.4)
        reply = ask(
            fixed(SiteData(train=rows)), "train", context, arrays, server_round=server_round
        )
        change = reply.content["arrays"]["1.weight"].numpy() - arrays["1.weight"].numpy()
        moved.append(np.linalg.norm(change))
    # One full batch, the same in each: (1 + cos x) / 2 for x = 0, 60 and 120 degrees.
    assert moved == pytest.approx([moved[0], 0.75 * moved[0], 0.25 * moved[0]], rel=1e-4)


def test_a_schedule_without_a_number_of_rounds_is_refused():
    text = "schedule=cosine needs num-server-rounds in the run config"
    said = error_of(TinyClient, "query.describe", context_of(schedule="cosine"))
    assert re.search(says_of_setting(text), said)


class Encoded(TinyClient):
    """A stem with batch normalisation that both sides load alike, and a head."""

    stem = 0

    def build_model(self):
        return halves(self.stem)


HEAD = {"trainable": "head.*"}


def head_arrays():
    state = {key: value for key, value in halves().state_dict().items() if "head" in key}
    return ArrayRecord(state)


@pytest.mark.parametrize("privacy", ["none", "patient"])
def test_only_the_trainable_part_leaves_and_the_rest_stays_as_it_was(privacy, tmp_path):
    seen = []

    class Client(Encoded):
        def fresh_model(self):
            model, travelling = super().fresh_model()
            seen.append(model)
            return model, travelling

    context = context_of(privacy=privacy, run_dir=str(tmp_path), local_epochs=3, **HEAD)
    arrays = head_arrays()
    reply = ask(Client, "train", context, arrays)
    assert not reply.has_error(), reply.error.reason
    sent = reply.content["arrays"]
    assert list(sent) == ["head.weight", "head.bias"]
    assert bits(sent) != bits(arrays)
    for model in seen:
        for key, value in halves().stem.state_dict().items():
            assert torch.equal(model.stem.state_dict()[key], value), key
    assert not ask(Client, "evaluate", context, sent).has_error()


def test_a_site_with_other_frozen_weights_is_refused():
    travelling = Travelling(model := halves(), "head.*")
    digest = travelling.digest(model)
    assert not ask(
        Encoded, "train", context_of(**HEAD), head_arrays(), frozen_digest=digest
    ).has_error()
    other = type("Other", (Encoded,), {"stem": 1})
    text = (
        "the frozen part of the model, which neither trainable nor lora names, is not the same "
        "here as at the server: build_model must load the same weights on both, such as those of "
        "one bundle"
    )
    for kind in ("train", "evaluate", "query.pictures"):
        reason = error_of(
            other, kind, context_of(**HEAD), arrays=head_arrays(), frozen_digest=digest, count=1
        )
        assert reason == text
    # Where all of the model travels, the server must say so too.
    assert (
        error_of(Encoded, "train", context_of(), arrays=head_arrays(), frozen_digest=digest) == text
    )


def test_arrays_with_the_frozen_part_are_an_error_reply():
    arrays = ArrayRecord(halves().state_dict())
    text = "stem.1.weight should have shape None, got torch.Size([6, 4]) (None: no such entry)"
    assert error_of(Encoded, "train", context_of(**HEAD), arrays=arrays) == f"ValueError: {text}"


def test_a_pattern_that_matches_nothing_is_named():
    text = error_of(Encoded, "train", context_of(trainable="tail.*"), arrays=head_arrays())
    assert text.startswith("trainable: no parameter matches 'tail.*'; the network has 6, such as ")


# --- Mods ---------------------------------------------------------------------------------------


def counting(kinds, name):
    def mod(message, context, call_next):
        kinds.append((name, message.metadata.message_type, context.node_config["partition-id"]))
        return call_next(message, context)

    return mod


def test_mods_run_around_training_evaluation_and_questions_the_first_one_outermost(tmp_path):
    kinds = []
    run_tiny(tmp_path, num_server_rounds=1, mods=[counting(kinds, "a"), counting(kinds, "b")])
    assert kinds == [
        (name, kind, site)
        for kind in ("query.describe", "train", "evaluate", "evaluate")
        for site in (0, 1)
        for name in ("a", "b")
    ]


def test_flowers_own_mods_change_no_bit_of_a_run(tmp_path, caplog):
    plain = run_tiny(tmp_path / "plain")
    with caplog.at_level("INFO", "flwr"):
        sized = run_tiny(tmp_path / "sized", mods=[arrays_size_mod, message_size_mod])
    assert bits(sized.arrays) == bits(plain.arrays)
    # Eight weights and two biases of four bytes, beside the header of each array.
    assert any(re.fullmatch(r"Total array elements sent: \d+ bytes", m) for m in caplog.messages)


def test_an_error_passes_through_flowers_mods_with_its_own_reason(tmp_path):
    context = context_of(node_config=node_of(tmp_path, budget_epsilon=1.0, budget_delta=1e-5))
    reasons = {
        ask(TinyClient, "train", context, mods=mods).error.reason
        for mods in ((), [arrays_size_mod, message_size_mod])
    }
    assert len(reasons) == 1
    assert "declined: " in reasons.pop()


def test_of_an_error_of_a_mod_only_its_class_leaves_a_real_hospital(tmp_path):
    def failing(message, context, call_next):
        call_next(message, context)
        context.state["left"] = MetricRecord({"number": 1})
        raise KeyError("Mrs Smith")

    context = context_of(node_config=node_of(tmp_path))
    reply = ask(TinyClient, "query.describe", context, mods=[failing])
    assert read_error(reply.error.reason) == ("north", "KeyError")
    assert not context.state


def test_a_traceback_is_logged_once_a_run(caplog):
    class Broken(TinyClient):
        def load_data(self, site):
            raise OSError("no such disk")

    for run_id in (71, 72):
        for index in range(3):
            ask(Broken, "train", context_of(index, 3, run_id))
    lines = [record for record in caplog.records if "no such disk" in record.getMessage()]
    assert [bool(record.exc_info) for record in lines] == [True, False, False] * 2
