import gc
import logging
import tracemalloc
import weakref

import numpy as np
import pytest
from builders import FakeGrid, arrays, dump, message, reply, run, site_app
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import strategy as flower
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed_flower.arrays.updates import Updates
from fedmed_flower.server.history import Failure
from fedmed_flower.strategies import (
    FedAdam,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    GeometricMedian,
    QFedAvg,
    WeightedFedAvg,
)

W = arrays(w=[0.0, 0.0])


def configured(strategy, layout=W, number=1):
    strategy.configure_train(number, layout, ConfigRecord(), FakeGrid([1, 2], lambda m: None))
    return strategy


def failures(strategy):
    return [(f.site, f.reason) for f in strategy.history.failures]


def three(*values):
    return [reply(n, {"w": [v, v]}, f"s{n}", loss=v) for n, v in enumerate(values)]


# --- Combined again ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("strategy", [FedAvg, FedMedian, FedTrimmedAvg, GeometricMedian])
@pytest.mark.filterwarnings("error")
def test_a_round_is_combined_anew_without_replies_that_are_not_finite(strategy, bad):
    sent = three(1.0, 2.0, 4.0, 7.0)
    sent[2:2] = [reply(8, {"w": [0.0, bad]}, "x"), reply(9, {"w": [bad, bad]}, "y")]
    tried = configured(strategy())
    got, metrics = tried.aggregate_train(1, sent)
    wanted, wanted_metrics = configured(strategy()).aggregate_train(1, three(1.0, 2.0, 4.0, 7.0))
    assert dump(got) == dump(wanted)
    assert metrics == wanted_metrics
    assert failures(tried) == [(s, "w holds NaN or infinite values") for s in ("x", "y")]
    assert {row[2] for row in tried.history.rows} == {"s0", "s1", "s2", "s3"}


def test_a_sum_beyond_float16_leaves_the_model():
    half = {"w": np.full(2, 65000, np.float16)}

    class Doubled(FedAvg):
        def combine(self, updates: Updates, weights):
            return updates.weighted_sum([2.0] * updates.count)

    strategy = configured(Doubled(), arrays(**half))
    assert strategy.aggregate_train(1, [reply(1, half), reply(2, half)]) == (None, None)
    assert failures(strategy) == [("all", "in the new model, w holds NaN or infinite values")]


def test_too_few_after_the_round_was_combined_leave_the_model():
    strategy = configured(FedAvg(min_replies=2))
    assert strategy.aggregate_train(1, three(1.0, np.nan)) == (None, None)
    assert failures(strategy) == [
        ("s1", "w holds NaN or infinite values"),
        ("all", "1 usable replies, 2 needed: the model stays as it was"),
    ]


# --- The longest update -------------------------------------------------------------------------


def left_out(*lengths, times=2.0, **options):
    strategy = configured(FedAvg(max_update_norm=times, **options), arrays(w=[0.0]))
    sent = [reply(n, {"w": [v]}, f"s{n}") for n, v in enumerate(lengths)]
    got, _ = strategy.aggregate_train(1, sent)
    value = None if got is None else got["w"].numpy().tolist()[0]
    return value, failures(strategy)


def test_a_reply_much_longer_than_the_median_is_left_out():
    reason = "its change of the model has the norm 9, the limit is 4"
    assert left_out(1.0, -2.0, 4.0, -9.0, 2.0) == (1.25, [("s3", reason)])
    assert left_out(1.0, -2.0, 4.0, 2.0) == (1.25, [])


def test_the_median_is_that_of_all_replies_and_is_not_taken_anew_of_those_left():
    _, (failed,) = left_out(1.0, 2.0, 4.0, 8.0, 16.0)
    assert failed == ("s4", "its change of the model has the norm 16, the limit is 8")


def test_where_most_sites_send_the_model_back_one_that_moved_is_left_out():
    assert left_out(0.0, 0.0, 3.0) == (
        0.0, [("s2", "its change of the model has the norm 3, the limit is 0")],
    )  # fmt: skip
    assert left_out(0.0, 0.0, 0.0) == (0.0, [])


def test_a_length_that_cannot_be_computed_is_left_out_of_the_median_too():
    value, failed = left_out(1.0, np.nan, 2.0, 3e38, 1.5)
    assert value == 1.5
    assert dict(failed)["s1"] == "w holds NaN or infinite values"
    assert [site for site, _ in failed] == ["s1", "s3"]


# --- Somebody else's rule -----------------------------------------------------------------------


class Recorder(flower.FedAvg):
    """A strategy of somebody else's: keeps what it is given, and takes the records apart."""

    answer: tuple = ()

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.seen = [
            (m.content["arrays"]["w"].numpy().tolist(), dict(m.content["metrics"])) for m in replies
        ]
        result = super().aggregate_train(server_round, replies)
        for m in replies:
            m.content["arrays"].clear()
            m.content["metrics"].clear()
        return self.answer or result


class Theirs(FedAvg, Recorder):
    pass


def test_somebody_elses_rule_gets_all_screened_replies():
    sent = [*three(1.0, 3.0), reply(3, {"w": [np.nan, 0.0]}, "x"), reply(4, {"w": [1.0]}, "y")]
    strategy = configured(Theirs())
    got, metrics = strategy.aggregate_train(1, sent)
    assert strategy.seen == [
        ([1.0, 1.0], {"num-examples": 1, "loss": 1.0}),
        ([3.0, 3.0], {"num-examples": 1, "loss": 3.0}),
    ]
    assert got["w"].numpy().tolist() == [2.0, 2.0]
    assert metrics == {"loss": 2.0}
    assert {site for site, _ in failures(strategy)} == {"x", "y"}


def test_somebody_elses_rule_cannot_change_the_replies():
    sent = three(1.0, 3.0)
    before = [repr(m.content) for m in sent]
    configured(Theirs()).aggregate_train(1, sent)
    assert [repr(m.content) for m in sent] == before


def test_somebody_elses_rule_that_makes_no_model_leaves_it():
    strategy = configured(Theirs())
    strategy.answer = (None, None)
    assert strategy.aggregate_train(1, three(1.0, 3.0)) == (None, None)
    assert failures(strategy) == [("all", "the rule made no model")]


def test_somebody_elses_rule_gets_the_weights_that_were_asked_for():
    def weights(strategy):
        strategy.aggregate_train(1, [reply(1, {"w": [1.0, 1.0]}, "a", 6),
                                     reply(2, {"w": [2.0, 2.0]}, "b", 2)])  # fmt: skip
        return [metrics["num-examples"] for _, metrics in strategy.seen]

    assert weights(configured(Theirs())) == [6, 2]
    assert weights(configured(Theirs(max_weight_share=0.5))) == [2, 2]
    uniform = type("Uniform", (WeightedFedAvg, Recorder), {})
    assert weights(configured(uniform(weights="uniform"))) == [1, 1]


def test_many_replies_to_somebody_elses_rule_are_not_added_up_as_they_come():
    strategy = configured(Theirs())
    strategy.aggregate_train(1, (m for m in three(*range(120))))
    assert len(strategy.seen) == 120


# --- Metrics ------------------------------------------------------------------------------------


def test_metrics_that_differ_are_merged_over_what_all_hold_with_a_warning(caplog):
    logging.getLogger("flwr").addHandler(caplog.handler)
    sent = [reply(1, {"w": [1.0]}, loss=1.0, dice=0.5), reply(2, {"w": [3.0]}, loss=2.0, auc=1.0)]
    _, metrics = FedAvg().aggregate_train(1, sent)
    logging.getLogger("flwr").removeHandler(caplog.handler)
    assert metrics == {"loss": 1.5}
    assert "not in every reply, so not averaged: auc, dice" in caplog.messages


def test_a_second_reply_to_one_message_is_left_out():
    asked = message(1)
    asked.metadata.__dict__["_message_id"] = "one"
    twice = [reply(1, {"w": [float(v)] * 2}, "a", to=asked) for v in (1, 9)]
    strategy = configured(FedAvg())
    got, _ = strategy.aggregate_train(1, [*twice, reply(2, {"w": [3.0, 3.0]}, "b")])
    assert got["w"].numpy().tolist() == [2.0, 2.0]
    assert strategy.history.failures == [Failure(1, "train", "a", "the site has replied already")]


# --- One by one ---------------------------------------------------------------------------------


def many(count, size=3, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [
        reply(
            n,
            {"w": rng.normal(size=size).astype(dtype), "n": np.array(rng.integers(100))},
            f"site {n:04}",
            int(rng.integers(1, 1000)),
            loss=rng.normal(),
        )
        for n in range(count)
    ]


def test_a_generator_of_up_to_100_replies_is_flowers_average_to_the_bit():
    sent = [
        reply(n, {"w": np.float32([n / 7, 1e8 / (n + 1)])}, f"s{n:03}", n + 1, loss=n / 3)
        for n in range(100)
    ]
    got, metrics = FedAvg().aggregate_train(1, iter(sent))
    wanted, wanted_metrics = flower.FedAvg().aggregate_train(1, sent)
    assert dump(got) == dump(wanted)
    assert metrics == wanted_metrics


@settings(max_examples=8, deadline=None)
@given(st.integers(101, 130), st.integers(0, 999), st.randoms())
def test_what_is_added_as_it_comes_does_not_depend_on_the_order(count, seed, random):
    sent = many(count, seed=seed)
    got, metrics = FedAvg().aggregate_train(1, iter(sent))
    shuffled = random.sample(sent, count)
    again, again_metrics = FedAvg().aggregate_train(1, iter(shuffled))
    assert dump(again) == dump(got)
    assert again_metrics == metrics
    at_once, wanted_metrics = FedAvg().aggregate_train(1, sent)
    assert metrics == wanted_metrics
    np.testing.assert_allclose(got["w"].numpy(), at_once["w"].numpy(), rtol=1e-5, atol=1e-6)
    values = np.array([m.content["arrays"]["w"].numpy() for m in sent], np.float64)
    weights = np.array([m.content["metrics"]["num-examples"] for m in sent], np.float64)
    exact = np.average(values, axis=0, weights=weights)
    np.testing.assert_allclose(got["w"].numpy(), exact, rtol=1.2e-7, atol=1e-9)
    assert got["n"].numpy().dtype == np.int64
    assert got["n"].numpy() == at_once["n"].numpy()


def test_replies_that_cannot_be_used_are_left_out_as_they_come():
    sent = many(120)
    model = sent[0].content["arrays"]
    broken = [
        reply(901, {"w": np.float32([np.nan, 0, 0]), "n": np.array(1)}, "x", loss=1.0),
        reply(902, {"w": np.float32([0]), "n": np.array(1)}, "y", loss=1.0),
        reply(903, model, "z", 2 * 10**9, loss=1.0),
    ]
    strategy = configured(FedAvg(), model)
    mixed = [broken[0], *sent[:50], broken[1], *sent[50:], broken[2]]
    got, metrics = strategy.aggregate_train(1, iter(mixed))
    wanted, wanted_metrics = FedAvg().aggregate_train(1, iter(sent))
    assert dump(got) == dump(wanted)
    assert metrics == wanted_metrics
    assert dict(failures(strategy)) == {
        "x": "w holds NaN or infinite values",
        "y": "w is float32[1] instead of float32[3]",
        "z": "num-examples must be above 0 and at most 1e+09, got 2000000000",
    }


def test_replies_that_come_one_by_one_are_not_changed():
    sent = many(103)
    before = [repr(m.content) for m in sent]
    FedAvg().aggregate_train(1, iter(sent))
    assert [repr(m.content) for m in sent] == before


def test_the_history_of_replies_that_come_one_by_one_is_sorted():
    strategy = FedAvg()
    strategy.aggregate_train(1, iter(many(110)[::-1]))
    names = [row[2] for row in strategy.history.rows if row[3] == "loss"]
    assert names == [f"site {n:04}" for n in range(110)]


def test_too_few_of_many_leave_the_model():
    sent = many(99) + [reply(n, ArrayRecord(), f"bad {n}") for n in range(100, 110)]
    strategy = FedAvg(min_replies=100)
    assert strategy.aggregate_train(1, iter(sent)) == (None, None)
    assert failures(strategy)[-1] == (
        "all", "99 usable replies, 100 needed: the model stays as it was",
    )  # fmt: skip


def test_a_sum_beyond_float64_has_a_mean_all_the_same():
    vast = arrays(w=np.array([1.5e308]))
    sent = [reply(n, vast, f"s{n}", 10**9) for n in range(101)]
    strategy = FedAvg()
    got, _ = strategy.aggregate_train(1, iter(sent))
    assert got["w"].numpy() == pytest.approx(1.5e308, rel=1e-12)
    assert failures(strategy) == []


def test_an_optimiser_steps_once_after_replies_that_come_one_by_one():
    sent = many(130)
    model = sent[0].content["arrays"]
    got, _ = configured(FedAdam(), model).aggregate_train(1, iter(sent))
    wanted, _ = configured(FedAdam(), model).aggregate_train(1, sent)
    np.testing.assert_allclose(got["w"].numpy(), wanted["w"].numpy(), rtol=1e-5)
    assert dump(got)["n"] == dump(wanted)["n"]


@pytest.mark.parametrize(
    "strategy", [FedMedian(), FedAvg(max_weight_share=0.5), FedAvg(max_update_norm=9.0)]
)
def test_what_is_no_plain_mean_takes_many_replies_at_once(strategy):
    sent = many(110)
    got, _ = strategy.aggregate_train(1, iter(sent))
    again, _ = strategy.aggregate_train(1, sent)
    assert dump(got) == dump(again)


@pytest.mark.parametrize("rule", [FedAvg, FedMedian, GeometricMedian, FedAdam])
def test_replies_leave_memory_without_the_collector_of_cycles(rule):
    """It runs rarely in a process that has imported torch, and a reply may be gigabytes."""
    sent = three(1.0, 2.0, 4.0, 7.0)
    alive = [weakref.ref(each.content["arrays"]) for each in sent]
    tried = configured(rule())
    gc.collect()
    gc.disable()
    try:
        got, _ = tried.aggregate_train(1, sent)
        sent.clear()
        assert got is not None
        assert [each() for each in alive] == [None] * 4
    finally:
        gc.enable()


def test_memory_does_not_grow_with_the_number_of_replies():
    size = 20_000
    model = arrays(w=np.zeros(size, np.float32))
    one = size * 4
    values = np.random.default_rng(0).normal(size=size).astype(np.float32)

    def peak(count):
        def replies():
            for n in range(count):
                yield reply(n, {"w": values + np.float32(n)}, f"s{n:04}")

        strategy = configured(FedAvg(), model)
        tracemalloc.start()
        got, _ = strategy.aggregate_train(1, replies())
        reached = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_allclose(got["w"].numpy(), values + (count - 1) / 2, rtol=1e-5)
        return reached

    assert peak(1000) < 101 * one + 12 * one + 1000 * 6000


def test_a_run_of_120_sites(tmp_path):
    def train(values, message, context):
        index = context.node_config["partition-id"]
        if index == 7:
            raise RuntimeError("no data")
        new = {"w": values["w"] + np.float32(np.nan if index == 8 else index)}
        return new, {"loss": float(index)}

    strategy = FedAvg(fraction_evaluate=0.0, run_dir=tmp_path, min_replies=118)
    result = run(strategy, site_app(train), W, rounds=1, sites=120)
    wanted = (sum(range(120)) - 15) / 118
    np.testing.assert_allclose(result.arrays["w"].numpy(), [wanted] * 2, rtol=1e-6)
    seven, eight = sorted(strategy.history.failures, key=lambda failure: failure.site)
    assert seven.site == "node 1008"
    assert "no data" in seven.reason
    assert eight == Failure(1, "train", "site-8", "w holds NaN or infinite values")
    names = [row[2] for row in strategy.history.rows if row[3] == "loss" and row[2] != "all"]
    assert len(names) == 118
    assert names == sorted(names)
    again = FedAvg(fraction_evaluate=0.0, min_replies=119)
    assert run(again, site_app(train), W, rounds=1, sites=120).arrays is W


# --- Without a global model ---------------------------------------------------------------------


def test_the_first_sound_reply_says_what_the_model_is_like():
    strategy = FedAvg(max_update_norm=3.0)
    sent = [reply(9, {"w": [np.nan]}, "x"), *three(1.0, 2.0), reply(3, {"v": [1.0]}, "y")]
    sent[0] = Message(sent[0].content, reply_to=message(9))
    got, _ = strategy.aggregate_train(1, sent[1:])
    assert got["w"].numpy().tolist() == [1.5, 1.5]
    assert failures(strategy) == [("y", "1 arrays are missing, such as w")]


@pytest.mark.parametrize("replies", [[], (), iter([])])
def test_nothing_comes_of_nothing(replies):
    strategy = FedAvg()
    assert strategy.aggregate_train(1, replies) == (None, None)


@pytest.mark.parametrize(
    "strategy",
    [FedAvg, FedMedian, lambda: QFedAvg(0.1), lambda: FedAvg(max_update_norm=2.0)],
)
def test_no_strategy_changes_the_replies(strategy):
    sent = [
        reply(n, {"w": [float(n), 2.0], "n": np.array(n)}, f"s{n}", n + 1, train_loss=1.0, k=[n])
        for n in range(4)
    ]
    sent[3].content["metrics"]["extra"] = 1.0
    before = [repr(m.content) for m in sent]
    model = arrays(w=[0.0, 0.0], n=np.array(1))
    assert configured(strategy(), model).aggregate_train(1, sent)[0] is not None
    assert [repr(m.content) for m in sent] == before


def test_the_metrics_record_of_the_sites_may_be_empty_but_for_the_weight():
    _, metrics = FedAvg().aggregate_train(1, [reply(1, {"w": [1.0]})])
    assert metrics == MetricRecord()
