import gc
import weakref

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from tiny import (
    TinyClient,
    ask,
    bits,
    context_of,
    fixed,
    linear,
    make_rows,
    model_arrays,
    run_tiny,
    trained,
)
from torch import nn

from fedmed_flower import InputError, MedicalClient, SiteData
from fedmed_flower.data.site import read_error

SUPERNODE = {"site-name": "north"}


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
    assert reason.endswith("proximal-mu must be at least 0 and finite, got -1.0")


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


def test_describe_counts_rows_and_in_a_simulation_labels():
    reply = ask(TinyClient, "query.describe", context_of())
    expected = {"num-examples": 10, "train": 10, "val": 6, "test": 8}
    assert dict(reply.content["metrics"]) == expected | {"labels": [5, 5]}
    reply = ask(TinyClient, "query.describe", context_of(node_config=SUPERNODE))
    assert dict(reply.content["metrics"]) == expected
    assert dict(reply.content["site"]) == {
        "name": "north",
        "data": "tiny images",
        "generated": False,
        "simulated": False,
    }


def test_labels_that_do_not_occur_are_counted_too():
    client = fixed(SiteData(train=make_rows(3, 0, classes=1)), num_classes=4)
    reply = ask(client, "query.describe", context_of())
    assert reply.content["metrics"]["labels"] == [3, 0, 0, 0]


@pytest.mark.parametrize("where", ["load_data", "fit"])
def test_outside_a_simulation_only_the_class_of_an_error_leaves(where):
    client = type("Client", (Failing,), {"failing": where})
    reply = ask(client, "train", context_of(node_config=SUPERNODE))
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert reply.error.reason == "site north: ValueError"
    assert b"Schmidt" not in message_to_proto(reply).SerializeToString()


@pytest.mark.parametrize("where", ["load_data", "fit"])
def test_outside_a_simulation_the_text_of_an_input_error_stays_too(where):
    error = InputError("Anna Schmidt is in two splits")
    client = type("Client", (Failing,), {"failing": where, "error": error})
    reply = ask(client, "train", context_of(node_config=SUPERNODE))
    assert reply.error.reason == "site north: InputError"
    assert b"Schmidt" not in message_to_proto(reply).SerializeToString()


@pytest.mark.parametrize("where", ["load_data", "fit"])
def test_in_a_simulation_the_text_of_an_error_is_told(where):
    client = type("Client", (Failing,), {"failing": where})
    assert error_of(client) == "ValueError: Anna Schmidt has no scan"
    client.error = InputError("give a folder")
    assert error_of(client) == "give a folder"


def test_in_a_simulation_the_text_of_a_wrong_setting_is_told():
    reason = error_of(TinyClient, context=context_of(batch_size=0))
    assert reason == "batch-size must be at least 1, got 0"


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
    assert error_of(client) == "FloatingPointError: the training loss is nan in epoch 1"


def test_arrays_of_another_model_are_an_error_reply():
    arrays = model_arrays(lambda: linear(3))
    assert "size mismatch" in error_of(TinyClient, arrays=arrays)


def test_no_training_rows():
    client = fixed(SiteData(train=[], val=make_rows(2, 0)))
    for kind in ("query.describe", "train", "evaluate"):
        assert error_of(client, kind) == "there are no training rows"


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


def test_sites_with_the_same_rows_shuffle_them_differently():
    client = fixed(SiteData(train=make_rows(10, 0)))
    assert trained(client, context_of(0)) != trained(client, context_of(1))
    node_config = {"site-name": "hospital-1"}
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
    assert len({key[0] for key in MedicalClient._kept}) == 1


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


def test_pooling_is_refused_outside_a_simulation():
    loaded = []

    class Client(TinyClient):
        def load_data(self, site):
            loaded.append(site.name)
            return super().load_data(site)

    node_config = {"site-name": "north", "partition-id": 0, "num-partitions": 2}
    for kind in ("train", "evaluate"):
        context = context_of(node_config=node_config)
        reply = ask(Client, kind, context, pool_sites=True)
        assert reply.error.reason == "site north: InputError"
    assert loaded == []


def test_the_number_of_threads_is_one_in_a_simulation_and_put_back():
    seen = []

    class Client(TinyClient):
        def fit(self, model, prepared, seed):
            seen.append(torch.get_num_threads())
            return super().fit(model, prepared, seed)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for config in ({}, {"torch_threads": 2}):
            for node_config in (None, SUPERNODE):
                ask(Client, "train", context_of(node_config=node_config, **config))
                assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 3, 2, 2]


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
