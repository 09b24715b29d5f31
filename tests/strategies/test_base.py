import copy
import csv
import io
import re
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from builders import (
    FakeGrid,
    arrays,
    dump,
    error_reply,
    header,
    message,
    npy,
    reply,
    run,
    site_app,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import strategy_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.classification import classification_metrics
from fedmed_flower.server.history import Failure, Note
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.strategies import FedAdam, FedAvg
from fedmed_flower.wire import Sent

W = arrays(w=[0.0, 0.0])


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def aggregate(replies, layout=W, **kwargs):
    """Aggregate one training round of a strategy whose global model is `layout`."""
    strategy = FedAvg(**kwargs)
    strategy.configure_train(1, layout, ConfigRecord(), FakeGrid([1], lambda m: None))
    return strategy, *strategy.aggregate_train(1, replies)


# --- As Flower ----------------------------------------------------------------------------------


@st.composite
def rounds(draw):
    """Replies of one round with distinct site names, in the order of the names."""
    shapes = draw(st.lists(st.sampled_from([(), (1,), (3,), (2, 3), (0, 2)]), min_size=1,
                           max_size=3))  # fmt: skip
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    count = draw(st.integers(1, 6))
    weights = draw(st.lists(
        st.one_of(st.integers(1, 10_000), st.floats(0.001, 1e6)), min_size=count, max_size=count,
    ))  # fmt: skip
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return [
        reply(
            100 - i,
            {str(k): np.asarray(rng.normal(size=s)).astype(dtype) for k, s in enumerate(shapes)},
            site=f"site {i}",
            weight=weight,
            loss=rng.normal(),
            count=int(rng.integers(9)),
            curve=rng.normal(size=2).tolist(),
        )
        for i, weight in enumerate(weights)
    ]


@settings(max_examples=100, deadline=None)
@given(rounds(), st.randoms())
def test_well_formed_replies_are_averaged_to_the_same_bits_as_in_flower(replies, random):
    wanted_arrays, wanted_metrics = flower.FedAvg().aggregate_train(1, replies)
    for order in (replies, random.sample(replies, len(replies))):
        got_arrays, got_metrics = FedAvg().aggregate_train(1, order)
        assert dump(got_arrays) == dump(wanted_arrays)
        assert repr(got_metrics) == repr(wanted_metrics)
    wanted = flower.FedAvg().aggregate_evaluate(1, replies)
    shuffled = random.sample(replies, len(replies))
    assert repr(FedAvg().aggregate_evaluate(1, shuffled)) == repr(wanted)


def test_sites_without_a_name_are_averaged_in_the_order_of_their_replies_as_in_flower():
    replies = [reply(n, {"w": [0.1 * n, 1e8 / n]}, weight=n) for n in (9, 2, 5, 7)]
    assert dump(FedAvg().aggregate_train(1, replies)[0]) == dump(
        flower.FedAvg().aggregate_train(1, replies)[0]
    )


def test_hand_worked_average():
    replies = [reply(1, {"w": [1.0, 2.0]}, weight=1, loss=1.0),
               reply(2, {"w": [5.0, 0.0]}, weight=3, loss=3.0)]  # fmt: skip
    got, metrics = FedAvg().aggregate_train(1, replies)
    assert got["w"].numpy().tolist() == [4.0, 0.5]
    assert metrics == {"loss": 2.5}


def test_the_callers_own_functions_are_used():
    def largest(contents: list[RecordDict], key: str) -> MetricRecord:
        return MetricRecord({"largest": max(c["metrics"]["loss"] for c in contents)})

    strategy = FedAvg(train_metrics_aggr_fn=largest, evaluate_metrics_aggr_fn=largest)
    replies = [reply(1, {"w": [1.0]}, loss=1.0), reply(2, {"w": [1.0]}, loss=3.0)]
    assert strategy.aggregate_train(1, replies)[1] == {"largest": 3.0}
    assert strategy.aggregate_evaluate(1, replies) == {"largest": 3.0}


def test_the_replies_are_not_changed():
    replies = [
        reply(1, {"w": [1.0], "n": np.array(2)}, site="a", loss=1.0, extra=1),
        reply(2, {"w": [3.0], "n": np.array(3)}, site="b", loss=3.0),
        error_reply(3, "x"),
    ]
    before = [repr(m) for m in replies]
    FedAvg().aggregate_train(1, replies)
    FedAvg().aggregate_evaluate(1, replies)
    assert [repr(m) for m in replies] == before


def test_replies_may_be_a_generator():
    got, _ = FedAvg().aggregate_train(1, (reply(n, {"w": [float(n)]}) for n in (1, 3)))
    assert got["w"].numpy().tolist() == [2.0]


def test_arguments_are_flowers():
    strategy = FedAvg(0.5, 0.25, weighted_by_key="patients", arrayrecord_key="weights")
    assert (strategy.fraction_train, strategy.fraction_evaluate) == (0.5, 0.25)
    assert (strategy.weighted_by_key, strategy.arrayrecord_key) == ("patients", "weights")
    assert isinstance(strategy, flower.FedAvg)
    with pytest.raises(TypeError, match="fraction_trian"):
        FedAvg(fraction_trian=0.5)


# --- Screening ----------------------------------------------------------------------------------


def replies_with(bad: Message) -> list[Message]:
    return [
        reply(1, {"w": [1.0, 2.0]}, site="a", weight=1, loss=0.5),
        bad,
        reply(3, {"w": [4.0, 6.0]}, site="c", weight=2, loss=0.25),
    ]


def raw(data: bytes) -> ArrayRecord:
    return ArrayRecord({"w": Array("float32", (2,), "numpy.ndarray", data)})


def empty() -> Message:
    bad = reply(2)
    bad.__dict__["_content"] = None
    return bad


def two_records() -> Message:
    bad = reply(2, {"w": [9.0, 9.0]}, site="b")
    bad.content["again"] = arrays(w=[9.0, 9.0])
    return bad


GOOD = {"w": [9.0, 9.0]}
MALFORMED = {
    "error": (error_reply(2, "line one\n\n  line two"), "line one line two"),
    "empty": (empty(), "the reply is empty"),
    "no record": (
        Message(RecordDict(), reply_to=message(2)),
        "the reply has 0 metric records instead of one",
    ),
    "two array records": (two_records(), "the reply has 2 array records instead of one"),
    "no array record": (reply(2, site="b"), "the reply has 0 array records instead of one"),
    "missing key": (reply(2, ArrayRecord(), "b"), "1 arrays are missing, such as w"),
    "extra key": (
        reply(2, GOOD | {"v": [1.0]}, "b"),
        "1 arrays are not in the model, such as v",
    ),
    "wrong shape": (reply(2, {"w": [9.0]}, "b"), "w is float32[1] instead of float32[2]"),
    "wrong dtype": (
        reply(2, {"w": np.ones(2)}, "b"),
        "w is float64[2] instead of float32[2]",
    ),
    "NaN": (reply(2, {"w": [np.nan, 0.0]}, "b"), "w holds NaN or infinite values"),
    "infinite": (reply(2, {"w": [0.0, np.inf]}, "b"), "w holds NaN or infinite values"),
    "negative weight": (
        reply(2, GOOD, "b", -1),
        "num-examples must be above 0 and at most 1e+09, got -1",
    ),
    "zero weight": (
        reply(2, GOOD, "b", 0),
        "num-examples must be above 0 and at most 1e+09, got 0",
    ),
    "NaN weight": (
        reply(2, GOOD, "b", float("nan")),
        "num-examples must be above 0 and at most 1e+09, got nan",
    ),
    "list as weight": (reply(2, GOOD, "b", [1]), "num-examples is a list instead of one number"),
    "no weight": (reply(2, GOOD, "b", None), "the metric num-examples is missing"),
    "pickle": (
        reply(2, raw(npy(header(descr="'|O'"), bytes(16))), "b"),
        "w cannot be read: dtype object is not a plain number",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_reply_is_left_out_and_the_others_average_is_untouched(name):
    bad, reason = MALFORMED[name]
    strategy = FedAvg()
    strategy.site_names = {2: "b"}
    replies = replies_with(bad)
    strategy.configure_train(4, W, ConfigRecord(), FakeGrid([1], lambda m: None))
    got, metrics = strategy.aggregate_train(4, replies)
    wanted, wanted_metrics = flower.FedAvg().aggregate_train(4, [replies[0], replies[2]])
    assert dump(got) == dump(wanted)
    assert metrics == wanted_metrics
    assert strategy.history.failures == [Failure(4, "train", "b", reason)]
    assert {row[2] for row in strategy.history.rows} == {"a", "c"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        npy(header(shape="(-1,)"), bytes(8)),
        npy(header(shape=f"({10**30},)"), bytes(8)),
        npy(header(descr="()"), bytes(8)),
        npy("{'descr': ("),
        npy("-" * 9000 + "1"),
    ],
    ids=["empty", "negative side", "vast side", "no dtype", "cut header", "deep header"],
)
def test_bytes_that_cannot_be_read_do_not_end_the_round(data):
    strategy, got, _ = aggregate(replies_with(reply(2, raw(data), "b")))
    assert got["w"].numpy().tolist() == pytest.approx([3.0, 14 / 3])
    assert [f.site for f in strategy.history.failures] == ["b"]


@pytest.mark.parametrize("first", [raw(b"junk"), raw(npy("{'descr': (")), arrays(w=[np.nan, 0.0])])
def test_without_a_global_model_a_bad_first_reply_does_not_end_the_round(first):
    strategy = FedAvg()
    good = [reply(n, {"w": [1.0, 2.0]}, f"site {n}") for n in (2, 3)]
    got, _ = strategy.aggregate_train(1, [reply(1, first, "bad"), *good])
    assert got["w"].numpy().tolist() == [1.0, 2.0]
    assert [f.site for f in strategy.history.failures] == ["bad"]


@pytest.mark.parametrize(
    "weight", [1.7e308, 10**400, 2**64 - 1], ids=["float", "beyond floats", "unsigned"]
)
def test_vast_weights_do_not_make_the_model_zero_or_end_the_round(weight):
    honest = [reply(n, {"w": [1.0, 2.0]}, weight=10) for n in (1, 2, 3)]
    vast = [reply(n, {"w": [1.0, 2.0]}, weight=weight) for n in (4, 5)]
    _, got, _ = aggregate(honest + vast)
    assert got["w"].numpy().tolist() == pytest.approx([1.0, 2.0])


def test_an_extra_metric_does_not_end_the_round():
    replies = [reply(1, GOOD, "a", loss=1.0, auc=0.5), reply(2, GOOD, "b", loss=3.0, dice=0.25)]
    strategy, got, metrics = aggregate(replies)
    assert got["w"].numpy().tolist() == [9.0, 9.0]
    assert metrics == {"loss": 2.0}
    assert strategy.history.failures == []
    assert (1, "train", "a", "auc", 0.5) in strategy.history.rows
    assert (1, "train", "b", "dice", 0.25) in strategy.history.rows


def test_metric_lists_of_different_lengths_are_not_averaged():
    replies = [reply(1, GOOD, curve=[1.0, 2.0], same=[1.0, 3.0]),
               reply(2, GOOD, curve=[1.0], same=[3.0, 5.0])]  # fmt: skip
    assert aggregate(replies)[2] == {"same": [2.0, 4.0]}
    assert FedAvg().aggregate_evaluate(1, replies) == {"same": [2.0, 4.0]}


def test_too_few_usable_replies_leave_the_model(caplog):
    replies = replies_with(reply(2, {"w": [np.nan, 0.0]}, "b"))
    assert aggregate(replies, min_replies=2)[1] is not None
    strategy, got, metrics = aggregate(replies, min_replies=3)
    assert (got, metrics) == (None, None)
    reason = "2 usable replies, 3 needed: the model stays as it was"
    assert [f.site for f in strategy.history.failures] == ["b", "all"]
    assert strategy.history.failures[1] == Failure(1, "train", "all", reason)
    assert f"round 1: no train: {reason}" in caplog.text


def test_no_replies():
    assert FedAvg().aggregate_train(1, []) == (None, None)
    assert FedAvg().aggregate_evaluate(1, []) is None
    assert FedAvg().aggregate_train(1, [error_reply(1, "x")]) == (None, None)


def test_sites_without_rows_count_for_nothing_in_the_evaluation():
    strategy = FedAvg()
    replies = [reply(1, site="a", weight=0, loss=float("nan")),
               reply(2, site="b", weight=2, loss=0.5)]  # fmt: skip
    assert strategy.aggregate_evaluate(1, replies) == {"loss": 0.5}
    assert strategy.history.failures == []
    assert strategy.aggregate_evaluate(1, replies[:1]) is None


def test_batchnorm_counters_and_masks_keep_their_dtype_over_rounds():
    model = {"w": [0.0], "n": np.array(0, np.int64), "mask": np.array([True, False])}
    steps = {"site-0": 1, "site-1": 2, "site-2": 4}

    def train(values, message, context):
        step = steps[f"site-{context.node_config['partition-id']}"]
        return values | {"n": values["n"] + step}, {"num-examples": 1}

    strategy = FedAvg()
    result = run(strategy, site_app(train), arrays(**model), rounds=3)
    assert strategy.history.failures == []
    # The mean step of 7 / 3 is rounded to 2 in each round: 2, 4, 6.
    assert dump(result.arrays) == dump(arrays(**model | {"n": np.array(6, np.int64)}))


def test_one_site_of_small_weight_does_not_switch_a_mask_on_for_all():
    replies = [reply(n, {"mask": np.array([n == 1])}, weight=1 if n == 1 else 9) for n in (1, 2)]
    _, got, _ = aggregate(replies, arrays(mask=np.array([False])))
    assert got["mask"].numpy().tolist() == [False]


def counts_of(labels, logits):
    part = classification_metrics(labels, logits)
    return {name: value for name, value in part.items() if name != "num-examples"}


PART = counts_of([0, 1, 1], [[0.5], [0.25], [2.0]])


def test_counts_are_pooled_and_not_averaged():
    parts = [PART, counts_of([0, 0, 1], [[-1.0], [3.0], [2.0]])]
    replies = [reply(n, weight=3, loss=float(n), **part) for n, part in enumerate(parts, start=1)]
    metrics = FedAvg().aggregate_evaluate(1, replies)
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["num-examples"] == 6.0
    assert metrics["loss"] == 1.5
    assert not {"confusion-counts", "score-grid", "score-counts"} & set(metrics)


@pytest.mark.parametrize(
    "counts",
    [
        {"confusion-counts": [1, 2, 3]},
        {"confusion-counts": []},
        {"confusion-counts": 4},
        {"confusion-counts": [0, 0, 0, 0]},
        {"confusion-counts": [-1, 0, 0, 1]},
        {"confusion-counts": [float("nan")] * 4},
        {"score-counts": [1, 2]},
        {"score-counts": [0] * 2048},
        {"score-counts": [float("nan")] * 2048},
        {"score-grid": [0.0]},
        {"score-grid": []},
        {"score-grid": 1.0},
        {"score-grid": [float("nan")] * 3},
        {"score-grid": [float("inf"), 0.0, 0.5]},
        {"confusion-counts": 1.0, "score-grid": 1.0, "score-counts": 1.0},
    ],
)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_malformed_counts_do_not_end_the_round(counts, number):
    part = PART | counts
    replies = [reply(n, site=f"{n}", weight=3, loss=0.5, **part) for n in range(number)]
    metrics = FedAvg().aggregate_evaluate(1, replies)
    assert metrics is None or metrics["loss"] == 0.5


def test_one_site_with_malformed_counts_leaves_the_others_figures():
    bad = PART | {"confusion-counts": [0, -3, 0, 7]}
    replies = [reply(1, site="a", weight=3, **PART), reply(2, site="b", weight=3, **bad)]
    metrics = FedAvg().aggregate_evaluate(1, replies)
    assert 0 <= metrics["accuracy"] <= 1
    assert 0 <= metrics["sensitivity"] <= 1


# --- Names of sites -----------------------------------------------------------------------------


def named(replies, before=None):
    strategy = FedAvg()
    strategy.site_names = dict(before or {})
    strategy.aggregate_evaluate(1, replies)
    return strategy


def test_two_nodes_with_one_name_stay_apart():
    strategy = named([reply(5, site="Charité", loss=1.0), reply(6, site="Charité", loss=2.0)])
    assert strategy.site_names == {5: "Charité", 6: "Charité (node 6)"}
    losses = [row for row in strategy.history.rows if row[3] == "loss"]
    assert losses == [(1, "val", "Charité", "loss", 1.0), (1, "val", "Charité (node 6)", "loss", 2)]


def test_no_site_can_pass_for_all_sites():
    strategy = named([reply(5, site="all", loss=1.0), reply(6, site=" all ", loss=1.0)])
    assert strategy.site_names == {5: "all (node 5)", 6: "all (node 6)"}
    assert {row[2] for row in strategy.history.rows} == {"all (node 5)", "all (node 6)"}


def test_a_name_is_kept_from_round_to_round():
    strategy = named([reply(5, site="a")])
    strategy.aggregate_evaluate(2, [reply(5, site="b")])
    assert strategy.site_names == {5: "a"}


def test_names_are_trimmed_and_no_name_is_the_node_id():
    strategy = named([reply(5, site="  a  "), reply(6, site="x" * 500), reply(7, site=" "),
                      reply(8)])  # fmt: skip
    assert strategy.site_names == {5: "a", 6: "x" * 80}
    assert [strategy.site_name(n) for n in (5, 7, 8)] == ["a", "node 7", "node 8"]


def test_a_name_that_is_no_text_is_ignored():
    bad = reply(5)
    bad.content["site"] = ConfigRecord({"name": 3})
    assert named([bad]).site_names == {}


@pytest.mark.parametrize(
    "names",
    [
        {5: "A", 6: "A (node 7)", 7: "A"},
        {5: "x" * 80 + "1", 6: "x" * 80 + "2"},
        {5: "node 6", 6: None},
        {5: "node 6", 6: "node 6"},
        {5: "all", 6: "all (node 5)", 7: "all"},
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_two_nodes_never_share_a_name(names, reverse):
    replies = [reply(node_id, site=name) for node_id, name in names.items()]
    strategy = named(reversed(replies) if reverse else replies)
    shown = Counter(strategy.site_name(node_id) for node_id in names)
    assert max(shown.values()) == 1


def test_a_name_that_cannot_be_written_does_not_end_the_run(tmp_path):
    def answer(message):
        return reply(5, {"w": [1.0, 2.0]}, "\ud800", to=message)

    strategy = FedAvg(run_dir=tmp_path)
    strategy.start(FakeGrid([5], answer), W, 1)
    assert RunFolder(tmp_path).load().server_round == 1


# --- Rounds -------------------------------------------------------------------------------------


def plus_one(values, message, context):
    """Add the site's index + 1 to each value."""
    step = context.node_config["partition-id"] + 1
    return {k: v + np.float32(step) for k, v in values.items()}, {"num-examples": step}


def failing(values, message, context):
    raise RuntimeError("no GPU")


def test_a_run_gives_flowers_result(monkeypatch):
    # Flower addresses the nodes in random order, which decides the last bits of its sums.
    monkeypatch.setattr(strategy_utils.random, "sample", lambda nodes, count: nodes[:count])
    ours, theirs = FedAvg(), flower.FedAvg()
    start = {"evaluate_fn": lambda r, a: MetricRecord({"first": float(a["w"].numpy()[0])})}
    got = run(ours, site_app(plus_one), W, rounds=3, **start)

    class Keep:
        def start(self, *args, **kwargs):
            self.result = theirs.start(*args, **kwargs)

    wanted = run(Keep(), site_app(plus_one), W, rounds=3, **start)
    assert dump(got.arrays) == dump(wanted.arrays)
    assert got.train_metrics_clientapp == wanted.train_metrics_clientapp
    assert got.evaluate_metrics_clientapp == wanted.evaluate_metrics_clientapp
    assert got.evaluate_metrics_serverapp == wanted.evaluate_metrics_serverapp
    assert list(got.evaluate_metrics_serverapp) == [0, 1, 2, 3]


def test_the_history_of_a_run():
    strategy = FedAvg()
    run(strategy, site_app(plus_one), arrays(w=[0.0]), rounds=1, sites=2)
    # Weights 1 and 2, steps 1 and 2: the mean is 5 / 3.
    mean = float(np.float32(5 / 3))
    assert strategy.history.rows == [
        (1, "train", "site-0", "num-examples", 1.0),
        (1, "train", "site-1", "num-examples", 2.0),
        (1, "val", "site-0", "num-examples", 1.0),
        (1, "val", "site-0", "sum", pytest.approx(mean)),
        (1, "val", "site-1", "num-examples", 1.0),
        (1, "val", "site-1", "sum", pytest.approx(mean)),
        (1, "val", "all", "sum", pytest.approx(mean)),
    ]


def test_a_run_in_which_all_sites_fail_alike_ends_with_that_round(tmp_path):
    strategy = FedAvg(run_dir=tmp_path)
    result = run(strategy, site_app(failing, failing), W, rounds=2)
    assert dump(result.arrays) == dump(W)
    assert result.train_metrics_clientapp == {}
    assert result.evaluate_metrics_clientapp == {}
    failures = strategy.history.failures
    failed = Counter((f.round, f.phase) for f in failures if f.site != "all")
    assert failed == {(1, "train"): 3}
    assert all("no GPU" in f.reason for f in failures if f.site != "all")
    few, alike = [(f.round, f.phase, f.reason) for f in failures if f.site == "all"]
    assert few == (1, "train", "0 usable replies, 1 needed: the model stays as it was")
    assert alike[:2] == (1, "train")
    assert alike[2].startswith("all 3 sites failed alike, so the run ends: ")
    assert not (tmp_path / "checkpoint.zip").exists()
    assert strategy.history.rows == []
    assert load_file(tmp_path / "model.safetensors")["w"].tolist() == [0.0, 0.0]


def test_a_failing_site_does_not_change_the_others():
    def train(values, message, context):
        if context.node_config["partition-id"] == 1:
            raise RuntimeError("no GPU")
        return plus_one(values, message, context)

    strategy = FedAvg()
    result = run(strategy, site_app(train), arrays(w=[0.0]), rounds=2)
    # Sites 0 and 2 with weights and steps 1 and 3: 10 / 4 a round.
    assert result.arrays["w"].numpy().tolist() == [5.0]
    # Round 1 knows no name of a site that has not replied; the evaluation tells it.
    assert [(f.round, f.phase, f.site) for f in strategy.history.failures] == [
        (1, "train", "node 1002"),
        (2, "train", "site-1"),
    ]


def test_a_silent_site_is_recorded():
    def answer(message):
        node_id = message.metadata.dst_node_id
        return None if node_id == 2 else reply(node_id, {"w": [1.0, 1.0]}, f"{node_id}", to=message)

    strategy = FedAvg()
    result = strategy.start(FakeGrid([1, 2], answer), W, 1)
    assert result.arrays["w"].numpy().tolist() == [1.0, 1.0]
    assert [(f.phase, f.site, f.reason) for f in strategy.history.failures] == [
        ("train", "node 2", "no reply within 3600 s"),
        ("val", "node 2", "no reply within 3600 s"),
    ]


def test_a_site_for_which_the_superlink_answers_is_the_one_that_failed():
    def answer(message):
        node_id = message.metadata.dst_node_id
        if node_id == 1:
            return reply(1, GOOD, "a", to=message)
        failed = error_reply(node_id, "the node is gone", to=message)
        failed.metadata.__dict__["_src_node_id"] = 99  # the SuperLink's own id
        return failed

    strategy = FedAvg(fraction_evaluate=0.0)
    strategy.start(FakeGrid([1, 2], answer), W, 1)
    assert strategy.history.failures == [Failure(1, "train", "node 2", "the node is gone")]


def test_one_site_works_with_default_arguments():
    result = run(FedAvg(), site_app(plus_one), arrays(w=[0.0]), rounds=2, sites=1)
    assert result.arrays["w"].numpy().tolist() == [2.0]


def test_minima_are_one_where_they_are_not_given():
    strategy = FedAvg()
    assert strategy.min_train_nodes == 1
    assert strategy.min_evaluate_nodes == 1
    assert strategy.min_available_nodes == 1


@pytest.mark.parametrize(
    "strategy",
    [
        FedAvg(1.0, 1.0, 2, 3, 4),
        FedAvg(min_available_nodes=4, min_evaluate_nodes=3, min_train_nodes=2),
        FedAvg(1.0, 1.0, 2, min_available_nodes=4, min_evaluate_nodes=3),
    ],
)
def test_minima_hold_where_they_are_given(strategy):
    assert strategy.min_train_nodes == 2
    assert strategy.min_evaluate_nodes == 3
    assert strategy.min_available_nodes == 4


def test_nothing_is_evaluated_or_trained_at_fraction_zero(caplog):
    evaluated = FedAvg(fraction_train=0.0)
    result = run(evaluated, site_app(failing), W, rounds=1)
    assert dump(result.arrays) == dump(W)
    assert {row[1] for row in evaluated.history.rows} == {"val"}
    assert evaluated.history.failures == []
    assert "usable replies" not in caplog.text  # nothing was asked for, so nothing is missing
    trained = FedAvg(fraction_evaluate=0.0)
    run(trained, site_app(plus_one, failing), W, rounds=1)
    assert {row[1] for row in trained.history.rows} == {"train"}
    assert trained.history.failures == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_rounds": 0}, "num_rounds must be at least 1, got 0"),
        ({"num_rounds": -1}, "num_rounds must be at least 1, got -1"),
        ({"timeout": 0}, "timeout must be above 0 seconds, got 0"),
        ({"timeout": -1.5}, "timeout must be above 0 seconds, got -1.5"),
        ({"timeout": float("nan")}, "timeout must be above 0 seconds, got nan"),
    ],
)
def test_start_says_what_is_wrong(arguments, text):
    grid = FakeGrid([1], lambda m: None)
    with pytest.raises(InputError, match=exactly(text)):
        FedAvg().start(grid, W, **arguments)
    assert grid.sent == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"min_replies": 0}, "min_replies must be at least 1, got 0"),
        ({"min_replies": -3}, "min_replies must be at least 1, got -3"),
        ({"resume": True}, "resume needs run_dir, the folder of the run to go on with"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_the_constructor_says_what_is_wrong(arguments, text):
    with pytest.raises(InputError, match=exactly(text)):
        FedAvg(**arguments)


def test_a_strategy_can_be_started_twice():
    strategy = FedAvg()
    first = dump(run(strategy, site_app(plus_one), W).arrays)
    rows = list(strategy.history.rows)
    again = run(strategy, site_app(plus_one), W)
    assert dump(again.arrays) == first
    assert strategy.history.rows == rows
    other = run(strategy, site_app(plus_one), arrays(another=[0.0]))
    assert strategy.history.failures == []
    assert list(other.arrays) == ["another"]


def test_the_result_keeps_the_model_when_evaluate_fn_raises():
    def evaluate(server_round, arrays):
        if server_round == 2:
            raise ValueError("the disk is full")

    strategy = FedAvg()
    with pytest.raises(ValueError, match="the disk is full"):
        run(strategy, site_app(plus_one), W, rounds=3, evaluate_fn=evaluate)
    reference = run(FedAvg(), site_app(plus_one), W, rounds=2)
    assert dump(strategy.result.arrays) == dump(reference.arrays)
    assert strategy.result.train_metrics_clientapp == reference.train_metrics_clientapp


# --- Sampling -----------------------------------------------------------------------------------


def arriving(monkeypatch, counts):
    """Return a grid that has ``counts[i]`` nodes after i sleeps."""
    grid = FakeGrid(range(1, counts[0] + 1), lambda m: None)
    later = iter(counts[1:])

    def sleep(seconds):
        grid.nodes = list(range(1, next(later) + 1))

    def unexpected(seconds):
        raise AssertionError("Flower waited once more")

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(strategy_utils, "sleep", unexpected)
    return grid


def targets(messages):
    return [message.metadata.dst_node_id for message in messages]


@pytest.mark.parametrize(
    ("counts", "addressed"),
    [
        ([1, 4, 9, 10, 10], 10),
        ([10], 10),
        ([12], 12),
        ([0, 7, 11, 13, 13], 13),
        ([3, 11, 9, 9, 10, 10], 10),
    ],
)
def test_sites_are_counted_after_they_have_connected(monkeypatch, counts, addressed):
    strategy = FedAvg(fraction_train=1.0, min_available_nodes=10)
    for configure in (strategy.configure_train, strategy.configure_evaluate):
        grid = arriving(monkeypatch, counts)
        messages = configure(1, W, ConfigRecord(), grid)
        assert targets(messages) == list(range(1, addressed + 1))


def test_the_first_round_trains_all_who_were_waited_for(monkeypatch):
    grid = arriving(monkeypatch, [2, 10, 10])
    FedAvg(min_available_nodes=10, fraction_evaluate=0.0).start(grid, W, 1)
    assert targets(grid.sent) == list(range(1, 11))


@pytest.mark.parametrize(
    ("fraction", "minimum", "addressed"), [(0.5, 1, 5), (0.05, 1, 1), (0.5, 8, 8), (1.0, 1, 10)]
)
def test_the_size_of_a_sample(fraction, minimum, addressed):
    grid = FakeGrid(range(10), lambda m: None)
    strategy = FedAvg(fraction_train=fraction, min_train_nodes=minimum)
    nodes = targets(strategy.configure_train(1, W, ConfigRecord(), grid))
    assert len(nodes) == len(set(nodes)) == addressed
    assert set(nodes) <= set(range(10))


def sampled(ids, seed, server_round):
    """Return the names that a strategy which knows the names samples."""
    strategy = FedAvg(fraction_train=0.5, seed=seed)
    strategy.site_names = {node_id: f"site {place}" for place, node_id in enumerate(ids)}
    grid = FakeGrid(sorted(ids), lambda m: None)
    nodes = targets(strategy.configure_train(server_round, W, ConfigRecord(), grid))
    return tuple(strategy.site_names[node_id] for node_id in nodes)


def test_a_sample_depends_on_seed_round_and_names_and_not_on_node_ids():
    few, many = [3, 1, 2, 9, 8, 7], [10**18, 5, 77, 10**9, 2, 10**12]
    for server_round in range(1, 6):
        assert sampled(few, 7, server_round) == sampled(many, 7, server_round)
    by_round = {sampled(few, 7, server_round) for server_round in range(1, 11)}
    by_seed = {sampled(few, seed, 1) for seed in range(10)}
    assert len(by_round) > 3
    assert len(by_seed) > 3
    assert {name for sample in by_round for name in sample} == {f"site {i}" for i in range(6)}


def test_names_told_in_the_first_round_decide_the_samples_of_the_next():
    def rounds_of(ids):
        names = {node_id: f"site {place}" for place, node_id in enumerate(ids)}

        def answer(message):
            node_id = message.metadata.dst_node_id
            return reply(node_id, {"w": [1.0, 1.0]}, names[node_id], to=message)

        grid = FakeGrid(sorted(ids), answer)
        FedAvg(fraction_train=0.5, seed=3).start(grid, W, 4)
        trained = [m for m in grid.sent if m.metadata.message_type == "train"]
        return [
            {names[node] for node in targets(trained[i : i + 3])} for i in range(3, len(trained), 3)
        ]

    first, second = rounds_of([3, 1, 2, 9, 8, 7]), rounds_of([60, 50, 77, 10, 2, 12])
    assert len(first) == 3
    assert first == second


def test_a_seed_is_drawn_where_none_is_given():
    assert FedAvg().seed != FedAvg().seed
    assert FedAvg(seed=0).seed == 0


def test_only_addresses_these_sites():
    def answer(message):
        return reply(message.metadata.dst_node_id, {"w": [1.0, 1.0]}, to=message)

    grid = FakeGrid(range(1, 7), answer)
    strategy = FedAvg()
    strategy.only = {2, 5, 99}
    strategy.start(grid, W, 1)
    assert targets(grid.sent) == [2, 5, 2, 5]
    strategy.only = {99}
    result = strategy.start(grid, W, 1)
    assert len(grid.sent) == 4
    assert dump(result.arrays) == dump(W)


def test_the_message_holds_model_config_and_round():
    config = ConfigRecord({"lr": 0.5})
    strategy = FedAvg(arrayrecord_key="weights", configrecord_key="settings")
    messages = strategy.configure_train(3, W, config, FakeGrid([1], lambda m: None))
    assert dump(messages[0].content["weights"]) == dump(W)
    assert messages[0].content["settings"] == {"lr": 0.5, "server-round": 3}


# --- Checkpoints --------------------------------------------------------------------------------


def counting(values, message, context):
    """Train with what the site remembers: how often it has trained."""
    state = context.state.config_records.setdefault("memory", ConfigRecord({"times": 0}))
    state["times"] += 1
    new, metrics = plus_one(values, message, context)
    scale = np.float32(0.1 * state["times"])
    metrics |= {"times": state["times"], "loss": 1 / (state["times"] + metrics["num-examples"])}
    return {key: value * scale for key, value in new.items()}, metrics


def served(server_round, record):
    return MetricRecord({"first": float(record["w"].numpy()[0]), "curve": [0.1 * server_round]})


def all_of(strategy):
    """All that a resumed run must have to the bit."""
    result, history = strategy.result, strategy.history
    return (
        dump(result.arrays),
        repr(replace(history, sent=Sent())),
        history.sent.table(),
        repr(result.train_metrics_clientapp),
        repr(result.evaluate_metrics_clientapp),
        repr(result.evaluate_metrics_serverapp),
        strategy.site_names,
        strategy.seed,
    )


def partly_failing(values, message, context):
    if context.node_config["partition-id"] == message.content["config"]["server-round"] % 3:
        raise RuntimeError("no GPU")
    return counting(values, message, context)


def unbroken(path, rounds=4):
    strategy = FedAvg(run_dir=path, seed=5, fraction_train=0.7)
    run(strategy, site_app(partly_failing), W, rounds, evaluate_fn=served)
    return strategy


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
@pytest.mark.parametrize("how", ["exception", "keyboard"])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(tmp_path, stop, how):
    def evaluate(server_round, record):
        if how == "exception" and server_round == stop:
            raise RuntimeError("stopped")
        return served(server_round, record)

    def train(values, message, context):
        if (
            how == "keyboard"
            and message.content["config"]["server-round"] == stop
            and context.node_config["partition-id"] == 2
        ):
            raise KeyboardInterrupt
        return partly_failing(values, message, context)

    whole = FedAvg(run_dir=tmp_path / "whole", seed=5)
    run(whole, site_app(partly_failing), W, 4, evaluate_fn=served)
    with pytest.raises(RuntimeError if how == "exception" else KeyboardInterrupt):
        run(FedAvg(run_dir=tmp_path / "cut", seed=5), site_app(train), W, 4, evaluate_fn=evaluate)
    again = FedAvg(run_dir=tmp_path / "cut", resume=True, seed=5)
    run(again, site_app(partly_failing), W, 4, evaluate_fn=served)
    assert all_of(again) == all_of(whole)
    for name in ("metrics.csv", "model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_resumed_run_draws_the_same_samples(tmp_path):
    wanted = unbroken(tmp_path / "whole")
    run(
        FedAvg(run_dir=tmp_path / "cut", seed=5, fraction_train=0.7),
        site_app(partly_failing), W, 2, evaluate_fn=served,
    )  # fmt: skip
    again = FedAvg(run_dir=tmp_path / "cut", resume=True, seed=99, fraction_train=0.7)
    run(again, site_app(partly_failing), W, 4, evaluate_fn=served)
    assert all_of(again) == all_of(wanted)


def test_clients_get_their_memory_back(tmp_path):
    def times(strategy):
        return [row[4] for row in strategy.history.rows if row[2:4] == ("site-0", "times")]

    run(FedAvg(run_dir=tmp_path), site_app(counting), W, 2)
    again = FedAvg(run_dir=tmp_path, resume=True)
    run(again, site_app(counting), W, 4)
    assert times(again) == [1, 2, 3, 4]


def test_resuming_a_finished_run_sends_nothing_and_gives_its_result(tmp_path):
    before = unbroken(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    again = FedAvg(run_dir=tmp_path, resume=True, fraction_train=0.7)
    result = run(again, site_app(failing, failing), W, 4, evaluate_fn=failing)
    assert dump(result.arrays) == dump(before.result.arrays)
    assert all_of(again) == all_of(before)
    assert (tmp_path / "model.safetensors").exists()


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    strategy = FedAvg(run_dir=tmp_path, resume=True)
    assert dump(run(strategy, site_app(plus_one), W, 1).arrays) == dump(
        run(FedAvg(), site_app(plus_one), W, 1).arrays
    )


@pytest.mark.parametrize(
    "model",
    [
        arrays(v=[0.0, 0.0]),
        arrays(w=[0.0]),
        arrays(w=np.zeros(2)),
        arrays(w=[0.0, 0.0], b=[0.0]),
        ArrayRecord(),
    ],
)
def test_resuming_with_another_model_is_refused(tmp_path, model):
    unbroken(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    text = (
        f"the checkpoint in {tmp_path} belongs to another model, with other keys, shapes or "
        "dtypes: resume it with the app and the settings that it was started with"
    )
    with pytest.raises(InputError, match=exactly(text)):
        run(FedAvg(run_dir=tmp_path, resume=True), site_app(failing), model, 5)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_starting_anew_in_the_folder_of_a_run_is_refused(tmp_path):
    unbroken(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))} holds an earlier run"):
        run(FedAvg(run_dir=tmp_path), site_app(failing), W)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_resuming_from_a_damaged_checkpoint_is_refused(tmp_path):
    unbroken(tmp_path)
    path = tmp_path / "checkpoint.zip"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"checkpoint\.zip cannot be read"):
        run(FedAvg(run_dir=tmp_path, resume=True), site_app(failing), W, 5)


def test_a_run_folder_that_is_a_file_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "run").write_text("notes")
    grid = FakeGrid([1], lambda m: reply(1, GOOD, to=m))
    with pytest.raises(InputError, match="run"):
        FedAvg(run_dir=tmp_path / "run").start(grid, W, 1)
    assert grid.sent == []


def answering(names):
    def answer(message):
        node_id = message.metadata.dst_node_id
        return reply(node_id, {"w": [1.0, 1.0]}, names[node_id], to=message, loss=0.5)

    return answer


def test_sites_that_come_back_with_another_node_id_keep_their_names(tmp_path):
    before, after = {11: "a", 12: "b"}, {21: "b", 22: "a"}
    FedAvg(run_dir=tmp_path).start(FakeGrid([11, 12], answering(before)), W, 1)
    again = FedAvg(run_dir=tmp_path, resume=True)
    again.start(FakeGrid([21, 22], answering(after)), W, 2)
    names = {row[2] for row in again.history.rows if row[0] == 2}
    assert names == {"a", "b", "all"}


def test_a_local_run_is_not_resumed_where_the_clients_memory_cannot_be_restored(tmp_path):
    run(FedAvg(run_dir=tmp_path), site_app(counting), W, 1)
    grid = FakeGrid([1], answering({1: "a"}))
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        FedAvg(run_dir=tmp_path, resume=True).start(grid, W, 2)
    assert grid.sent == []


def test_the_model_and_the_table_of_a_run(tmp_path):
    strategy = unbroken(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.zip", "live.json", "metrics.csv", "model.safetensors",
    }  # fmt: skip
    assert load_file(tmp_path / "model.safetensors")["w"].tobytes() == (
        strategy.result.arrays["w"].numpy().tobytes()
    )
    text = (tmp_path / "metrics.csv").read_text(encoding="utf-8")
    _, *rows = csv.reader(io.StringIO(text, newline=""))
    assert [(int(r), p, s, m, float(v)) for r, p, s, m, v in rows] == strategy.history.rows


# --- Test ---------------------------------------------------------------------------------------


def test_the_table_of_the_test_split():
    splits = []

    def answer(message):
        node_id = message.metadata.dst_node_id
        splits.append(dict(message.content["config"]))
        if node_id == 3:
            return error_reply(3, "no test data", to=message)
        return reply(node_id, site=f"site {node_id}", weight=node_id, auc=node_id / 10, to=message)

    strategy = FedAvg(fraction_evaluate=0.0)
    config = ConfigRecord({"batch-size": 4, "split": "val"})
    before = copy.deepcopy(dict(config))
    table = strategy.test(FakeGrid([1, 2, 3], answer), W, config)
    assert table == {
        "site 1": {"num-examples": 1.0, "auc": 0.1},
        "site 2": {"num-examples": 2.0, "auc": 0.2},
        "all": {"auc": pytest.approx(0.5 / 3)},
    }
    assert splits == [{"batch-size": 4, "split": "test"}] * 3
    assert dict(config) == before
    assert strategy.history.failures == [Failure(0, "test", "node 3", "no test data")]


def test_the_test_is_recorded_after_the_last_round_and_apart_from_validation():
    strategy = FedAvg()
    result = run(strategy, site_app(plus_one), W, 2)
    rows = len(strategy.history.rows)
    grid = FakeGrid([1001], answering({1001: "another name"}))
    table = strategy.test(grid, result.arrays)
    assert {row[:3] for row in strategy.history.rows[rows:]} == {
        (2, "test", "site-0"), (2, "test", "all"),
    }  # fmt: skip
    rows = strategy.history.rows
    kept = {(site, name): value for _, phase, site, name, value in rows if phase == "test"}
    assert kept == {(site, name): v for site in table for name, v in table[site].items()}
    last = {site for number, phase, site, *_ in rows if phase == "val" and number == rows[-1][0]}
    assert last == {"site-0", "site-1", "site-2", "all"}
    assert grid.sent[0].metadata.message_type == "evaluate"
    assert dump(grid.sent[0].content["arrays"]) == dump(result.arrays)
    # What comes after a test is validation again.
    strategy.aggregate_evaluate(3, [reply(1001, loss=1.0)])
    assert strategy.history.rows[-1][:3] == (3, "val", "site-0")


def test_a_test_that_nobody_answers_is_an_empty_table():
    strategy = FedAvg()
    assert strategy.test(FakeGrid([1], lambda m: None), W) == {}
    assert [(f.phase, f.site) for f in strategy.history.failures] == [("test", "node 1")]
    assert FedAvg().test(FakeGrid([], lambda m: None), W) == {}


def test_a_site_for_which_the_superlink_answers_is_named():
    def answer(message):
        reply = Message(Error(5, "Error: Node Unavailable"), reply_to=message)
        # The SuperLink sends this itself: its own node id, and the message it answers.
        reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        return reply

    grid = FakeGrid([7], answer)
    strategy = FedAvg(fraction_evaluate=0.0)
    strategy.site_names = {7: "north"}
    strategy.start(grid, W, num_rounds=1)
    assert strategy.history.failures[0] == Failure(1, "train", "north", "Error: Node Unavailable")


class Passing(flower.FedAvg):
    """Somebody else's strategy, which passes its arguments on."""

    def __init__(self, *args, mu=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.mu = mu


class PassingOnOurs(FedAvg, Passing):
    pass


def test_given_minima_reach_a_strategy_that_passes_its_arguments_on():
    def minima(strategy):
        return strategy.min_train_nodes, strategy.min_evaluate_nodes, strategy.min_available_nodes

    assert minima(PassingOnOurs()) == (1, 1, 1)
    assert minima(PassingOnOurs(min_train_nodes=5, mu=2.0)) == (5, 1, 1)
    assert minima(PassingOnOurs(1.0, 1.0, 5)) == (5, 1, 1)


def one_up(values, message, context):
    return {"w": values["w"] + 1}, {}


class Counting(FedAvg):
    """Looks at the replies before it passes them on."""

    counted = 0

    def aggregate_train(self, server_round, replies):
        self.counted = sum(1 for _ in replies)
        return super().aggregate_train(server_round, replies)


def test_a_subclass_may_look_at_the_replies_of_many_sites():
    strategy = Counting(fraction_evaluate=0.0)
    result = run(strategy, site_app(one_up), W, rounds=1, sites=102)
    assert strategy.counted == 102
    assert result.arrays["w"].numpy() == pytest.approx([1.0, 1.0], rel=1e-5)


def test_a_second_start_owes_nothing_to_the_first():
    strategy = FedAdam(fraction_evaluate=0.0)
    first = run(strategy, site_app(one_up), W, rounds=2)
    assert dump(run(strategy, site_app(one_up), W, rounds=2).arrays) == dump(first.arrays)


def test_a_list_with_a_nan_is_not_averaged():
    replies = [reply(1, GOOD, curve=[1.0, 2.0]), reply(2, GOOD, curve=[1.0, float("nan")])]
    assert aggregate(replies)[2] == {}


def test_other_weights_than_examples_may_be_large():
    sent = [reply(n, {"w": [float(n)]}, tokens=2 * 10**9) for n in (1, 3)]
    got, _ = FedAvg(weighted_by_key="tokens").aggregate_train(1, sent)
    assert got["w"].numpy().tolist() == [2.0]


def test_one_sites_nan_does_not_take_a_figure_from_all(caplog):
    replies = [reply(n, site=f"s{n}", weight=2, dice=0.5 + n / 10) for n in (1, 2)]
    odd = reply(3, site="s3", weight=9, dice=float("nan"))
    with caplog.at_level("WARNING", "flwr.fedmed"):
        got = FedAvg().aggregate_evaluate(1, [*replies, odd])
    assert got["dice"] == pytest.approx(0.65)
    assert "round 1, val: s3: its dice is nan: left out of the average" in caplog.messages
    # Where most have none, there is none.
    assert "dice" not in FedAvg().aggregate_evaluate(1, [replies[0], odd, odd])


def test_a_site_with_one_nan_counts_in_its_other_figures():
    sent = [reply(1, site="a", weight=1, dice=0.2, loss=1.0),
            reply(2, site="b", weight=3, dice=0.4, loss=float("nan")),
            reply(3, site="c", weight=2, dice=0.6, loss=4.0)]  # fmt: skip
    strategy = FedAvg()
    got = strategy.aggregate_evaluate(2, sent)
    assert got["dice"] == pytest.approx((0.2 + 3 * 0.4 + 2 * 0.6) / 6)
    assert got["loss"] == pytest.approx((1.0 + 2 * 4.0) / 3)
    text = "its loss is nan: left out of the average"
    assert strategy.history.notes == [Note(2, "val", "b", text)]


def test_a_nan_in_training_does_not_take_a_figure_from_all():
    sent = [reply(1, GOOD, "a", loss=1.0), reply(2, GOOD, "b", loss=3.0),
            reply(3, GOOD, "c", loss=float("inf"))]  # fmt: skip
    strategy = FedAvg()
    _, metrics = strategy.aggregate_train(1, sent)
    assert metrics["loss"] == 2.0
    assert [(note.site, note.text) for note in strategy.history.notes] == [
        ("c", "its loss is inf: left out of the average")
    ]


def test_an_average_of_the_apps_own_gets_only_what_is_finite_everywhere():
    asked = []

    def mine(contents, key):
        asked.append([sorted(content["metrics"]) for content in contents])
        return MetricRecord({"mine": 1.0})

    sent = [reply(n, site=f"s{n}", loss=1.0, dice=0.5) for n in (1, 2)]
    odd = reply(3, site="s3", loss=1.0, dice=float("nan"))
    strategy = FedAvg(evaluate_metrics_aggr_fn=mine)
    assert strategy.aggregate_evaluate(1, [*sent, odd]) == {"mine": 1.0}
    assert asked == [[["loss", "num-examples"]] * 3]


def test_with_a_quorum_a_silent_site_costs_the_grace_and_not_the_timeout(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fedmed_flower.server.ask.time.monotonic", lambda: now[0])
    monkeypatch.setattr(
        "fedmed_flower.server.ask.time.sleep", lambda s: now.__setitem__(0, now[0] + s)
    )

    def answer(message):
        node_id = message.metadata.dst_node_id
        return None if node_id == 3 else reply(node_id, GOOD, f"s{node_id}", to=message)

    grid = FakeGrid([1, 2, 3], answer)
    grid.in_process = False
    strategy = FedAvg(quorum=2, grace=5.0)
    strategy.start(grid, arrays(**GOOD), 1, timeout=3600)
    assert 10 <= now[0] < 15
    assert [(f.phase, f.site, f.reason) for f in strategy.history.failures] == [
        ("train", "node 3", "no reply within 5 s; 2 of 3 had replied"),
        ("val", "node 3", "no reply within 5 s; 2 of 3 had replied"),
    ]


def test_sites_that_fail_each_in_its_own_way_do_not_end_the_run():
    def train(values, message, context):
        raise RuntimeError(f"no {'abc'[context.node_config['partition-id']]}")

    strategy = FedAvg(fraction_evaluate=0.0)
    run(strategy, site_app(train), W, rounds=2)
    assert {f.round for f in strategy.history.failures} == {1, 2}
    assert strategy.run.halted == ""


def test_a_few_drawn_sites_that_fail_do_not_speak_for_the_others():
    strategy = FedAvg(fraction_train=0.4, fraction_evaluate=0.0, seed=0)
    run(strategy, site_app(failing), W, rounds=3)
    failed = {f.round for f in strategy.history.failures if f.site != "all"}
    assert failed == {1, 2, 3}


def test_a_site_that_says_only_how_many_patients_it_has_is_noted_if_they_change():
    strategy = FedAvg()
    for number, weight in enumerate((40, 40, 43, 43), start=1):
        sent = [reply(1, GOOD, "north", weight), reply(2, GOOD, "south", 7)]
        strategy.aggregate_train(number, sent)
    text = "its number of training rows is 43 now and was 40"
    assert strategy.history.notes == [Note(3, "train", "north", text)]


def test_what_a_site_says_of_its_rows_is_noted_once_and_cut():
    strategy = FedAvg()
    for number in (1, 2):
        sent = reply(1, GOOD, "north")
        sent.content["rows"] = ConfigRecord({"changes": "one\nhas gone " + "x" * 1000})
        strategy.aggregate_train(number, [sent])
    (note,) = strategy.history.notes
    assert note.text.startswith("one has gone xx")
    assert len(note.text) <= 200
