"""Ten ways in which Flower's strategies go wrong, beside what the same replies give here."""

import time

import numpy as np
import pytest
from builders import FakeGrid, arrays, dump, reply, run, site_app
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp import strategy as flower
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import strategy_utils

from fedmed_flower.strategies import (
    CenteredClipping,
    DPFedAvg,
    FedAvg,
    FedMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
)

W = arrays(w=[0.0, 0.0])


def configured(strategy, layout=W):
    strategy.configure_train(1, layout, ConfigRecord(), FakeGrid(range(1, 13), lambda m: None))
    return strategy


def aggregated(strategy, replies):
    got, _ = strategy.aggregate_train(1, replies)
    return {key: array.numpy() for key, array in got.items()}


def left_out(strategy):
    return {failure.site: failure.reason for failure in strategy.history.failures}


def both_private(layout, updates, rounds=1, **options):
    """Return our and Flower's private strategy, without noise, and the last model of each."""
    adaptive = "target_quantile" in options
    theirs = (
        flower.DifferentialPrivacyServerSideAdaptiveClipping
        if adaptive
        else flower.DifferentialPrivacyServerSideFixedClipping
    )
    norm = {"initial_clipping_norm" if adaptive else "clipping_norm": options["clipping_norm"]}
    count = len(updates)
    strategies = (
        DPFedAvg(noise_multiplier=0.0, population_size=count, **options),
        theirs(flower.FedAvg(), 0.0, num_sampled_clients=count, **norm),
    )
    models = []
    for strategy in strategies:
        for number in range(1, rounds + 1):
            replies = [reply(n, u, f"s{n}", weight) for n, (u, weight) in enumerate(updates)]
            grid = FakeGrid(range(1, 13), lambda m: None)
            list(strategy.configure_train(number, layout, ConfigRecord(), grid))
            got, _ = strategy.aggregate_train(number, replies)
        models.append({key: array.numpy() for key, array in got.items()})
    return *strategies, *models


def adding(values, message, context):
    return {key: value + np.float32(1) for key, value in values.items()}, {"loss": 0.5}


# --- 1. A bound that follows the lengths of the updates -----------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 0.1, 1.0, 1e6])
def test_1_the_radius_of_clipping_is_the_median_distance_whatever_the_scale(scale):
    ahead = [reply(n, {"w": [scale, 0.0]}, f"s{n}") for n in range(4)]
    attacker = reply(9, {"w": [0.0, 1000 * scale]}, "x")
    strategy = configured(CenteredClipping(num_iterations=1))
    got = aggregated(strategy, [*ahead, attacker])["w"]
    # All five are as long as the median after clipping.
    np.testing.assert_allclose(got, [0.8 * scale, 0.2 * scale], rtol=1e-6)


@pytest.mark.parametrize("start", [0.1, 100.0])
def test_1_the_private_clipping_norm_follows_the_median_and_flowers_flees_from_it(start):
    updates = [({"w": [0.0, 10.0]}, 1)] * 3
    ours, theirs, _, _ = both_private(
        W, updates, rounds=60, clipping_norm=start, target_quantile=0.5
    )
    assert 9 < ours.clipping_norm < 11
    assert theirs.clipping_norm < 0.0005 if start < 10 else theirs.clipping_norm > 1000


# --- 2. Sites are sampled after they have connected ---------------------------------------------


def test_2_hospitals_that_connect_late_all_train(monkeypatch):
    def arriving(module):
        grid = FakeGrid([1, 2], lambda m: None)

        def sleep(seconds):
            grid.nodes = list(range(1, 11))

        monkeypatch.setattr(module, "sleep", sleep)
        return grid

    ours = FedAvg(fraction_train=1.0, min_available_nodes=10)
    assert len(ours.configure_train(1, W, ConfigRecord(), arriving(time))) == 10
    theirs = flower.FedAvg(fraction_train=1.0, min_available_nodes=10)
    sent = theirs.configure_train(1, W, ConfigRecord(), arriving(strategy_utils))
    assert len(list(sent)) == 2


# --- 3. Counters take no part in norms ----------------------------------------------------------


@pytest.mark.parametrize("counter", [np.array(0), np.array([0, 0])], ids=["0-D", "1-D"])
def test_3_counters_take_no_part_in_the_length_of_an_update(counter):
    model = arrays(w=[0.0], n=counter)
    same = [reply(n, {"w": [0.5], "n": counter + 1}, f"s{n}") for n in range(3)]
    busy = reply(7, {"w": [0.5], "n": counter + 10_000}, "busy")
    strategy = configured(FedAvg(max_update_norm=1.0), model)
    got = aggregated(strategy, [*same, busy])
    assert left_out(strategy) == {}
    assert got["n"].dtype == np.int64
    assert got["n"].tolist() == (counter + 2501).tolist()
    for rule in (Krum, GeometricMedian, CenteredClipping):
        moved = aggregated(configured(rule(), model), [*same, busy])
        assert moved["w"].tolist() == [0.5]


def test_3_counters_take_no_part_in_private_clipping():
    _, _, ours, theirs = both_private(arrays(w=[0.0]), [({"w": [0.5]}, 1)] * 2, clipping_norm=1.0)
    assert ours["w"].tolist() == theirs["w"].tolist() == [0.5]
    model = arrays(w=[0.0], n=np.array(0))
    counted = [({"w": [0.5], "n": np.array(100)}, 1)] * 2
    _, _, ours, theirs = both_private(model, counted, clipping_norm=1.0)
    assert ours["w"].tolist() == [0.5]
    assert theirs["w"][0] < 0.5 / 50
    assert ours["n"].dtype == np.int64
    assert ours["n"] == 0


def test_3_counters_of_one_dimension_do_not_end_a_private_run():
    strategy = configured(
        DPFedAvg(noise_multiplier=0.0, clipping_norm=1.0, population_size=2),
        arrays(w=[0.0], n=np.array([0])),
    )
    update = {"w": [0.5], "n": np.array([100])}
    replies = [reply(n, update, f"s{n}") for n in range(2)]
    assert aggregated(strategy, replies)["w"].tolist() == [0.5]
    counted = [(update, 1)] * 2
    with pytest.raises(TypeError, match="Cannot cast ufunc 'multiply' output"):
        both_private(arrays(w=[0.0], n=np.array([0])), counted, clipping_norm=1.0)


# --- 4. Updates of length zero, and NaN ---------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [lambda: FedAvg(max_update_norm=2.0), CenteredClipping, GeometricMedian,
     lambda: CenteredClipping(tau=1.0)],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_4_an_update_of_length_zero_is_no_division_by_zero_and_nan_is_left_out(strategy):
    unmoved = [reply(n, {"w": [0.0, 0.0]}, f"s{n}") for n in range(3)]
    broken = reply(9, {"w": [np.nan, 0.0]}, "x")
    tried = configured(strategy())
    assert aggregated(tried, [*unmoved, broken])["w"].tolist() == [0.0, 0.0]
    assert left_out(tried) == {"x": "w holds NaN or infinite values"}


@pytest.mark.filterwarnings("error")
def test_4_a_private_update_of_length_zero_is_no_division_by_zero():
    options = {"noise_multiplier": 0.0, "clipping_norm": 1.0, "population_size": 2}
    strategy = configured(DPFedAvg(**options))
    replies = [reply(1, {"w": [0.0, 0.0]}, "a"), reply(2, {"w": [0.0, 0.5]}, "b")]
    assert aggregated(strategy, replies)["w"].tolist() == [0.0, 0.25]
    with pytest.raises(ZeroDivisionError):
        both_private(W, [({"w": [0.0, 0.0]}, 1)] * 2, clipping_norm=1.0)


def test_4_nan_does_not_pass_private_clipping():
    updates = [({"w": [0.0, 0.5]}, 1), ({"w": [np.nan, 0.5]}, 1)]
    strategy, _, ours, theirs = both_private(W, updates, clipping_norm=1.0)
    assert ours["w"].tolist() == [0.0, 0.25]
    assert left_out(strategy) == {"s1": "w holds NaN or infinite values"}
    assert np.isnan(theirs["w"]).any()


# --- 5. False numbers of examples ---------------------------------------------------------------


@pytest.mark.parametrize("count", [10**12, -5, 0, float("nan"), float("inf")])
def test_5_a_false_number_of_examples_is_left_out(count):
    replies = [reply(1, {"w": [1.0, 1.0]}, "a"), reply(2, {"w": [3.0, 3.0]}, "b")]
    strategy = configured(FedAvg())
    got = aggregated(strategy, [*replies, reply(3, {"w": [99.0, 99.0]}, "x", count)])
    assert got["w"].tolist() == [2.0, 2.0]
    assert left_out(strategy).keys() == {"x"}


def test_5_a_number_that_may_be_true_reaches_no_further_than_its_share():
    replies = [
        reply(n, {"w": [v, v]}, f"s{n}", weight)
        for n, (v, weight) in enumerate([(1.0, 1), (3.0, 1), (100.0, 10**9)])
    ]
    assert aggregated(flower.FedAvg(), replies)["w"][0] > 99.9
    got = aggregated(configured(FedAvg(max_weight_share=0.4)), replies)["w"]
    np.testing.assert_allclose(got, [0.3 * 1 + 0.3 * 3 + 0.4 * 100] * 2, rtol=1e-6)


def test_5_zero_examples_everywhere_leave_the_model():
    replies = [reply(n, {"w": [1.0, 1.0]}, f"s{n}", 0) for n in (1, 2)]
    with pytest.raises(ZeroDivisionError):
        flower.FedAvg().aggregate_train(1, replies)
    assert configured(FedAvg()).aggregate_train(1, replies) == (None, None)


@pytest.mark.parametrize("count", [10**12, 10**9])
def test_5_a_false_number_of_examples_does_not_raise_what_privacy_must_hide(count):
    updates = [({"w": [0.0, 0.0001]}, 1)] * 9 + [({"w": [50.0, 0.0]}, count)]
    _, _, ours, theirs = both_private(W, updates, clipping_norm=1.0)
    # One hospital of ten may move the model by a tenth, and noise is added for no more.
    assert ours["w"][0] <= 0.1 * (1 + 1e-6)
    assert theirs["w"][0] > 0.99


# --- 6. NaN and infinity ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [FedAvg, FedMedian])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_6_one_broken_reply_does_not_break_the_model(kind, bad):
    def sent():
        values = {"a": 1.0, "b": 3.0, "x": bad}
        return [reply(n, {"w": [v, v]}, s) for n, (s, v) in enumerate(values.items())]

    strategy = configured(kind())
    assert aggregated(strategy, sent())["w"].tolist() == [2.0, 2.0]
    assert left_out(strategy) == {"x": "w holds NaN or infinite values"}
    theirs = aggregated(getattr(flower, kind.__name__)(), sent())["w"]
    if kind is FedAvg or np.isnan(bad):
        assert not np.isfinite(theirs).any()


# --- 7. One extra metric, and nobody who answers ------------------------------------------------


def test_7_one_extra_metric_does_not_end_the_run():
    def train(values, message, context):
        new, metrics = adding(values, message, context)
        return new, metrics | ({"extra": 1.0} if context.node_config["partition-id"] else {})

    def finish(strategy):
        return run(strategy, site_app(train), W, rounds=2, sites=2)

    with pytest.raises(InconsistentMessageReplies):
        finish(flower.FedAvg())
    assert finish(FedAvg()).arrays["w"].numpy().tolist() == [2.0, 2.0]


def test_7_a_run_in_which_all_fail_says_so_and_keeps_its_model():
    def train(values, message, context):
        raise RuntimeError("no scanner")

    strategy = FedAvg(fraction_evaluate=0.0)
    result = run(strategy, site_app(train), W, rounds=2, sites=2)
    assert dump(result.arrays) == dump(W)
    few, alike = [f.reason for f in strategy.history.failures if f.site == "all"]
    assert few == "0 usable replies, 1 needed: the model stays as it was"
    assert alike.startswith("all 2 sites failed alike, so the run ends: ")
    assert len(strategy.history.failures) == 4


# --- 8. Shapes and dtypes -----------------------------------------------------------------------


def test_8_a_shape_that_would_broadcast_is_left_out():
    replies = [reply(1, {"w": [1.0, 2.0, 3.0]}, "a"), reply(2, {"w": [9.0]}, "x")]
    assert aggregated(flower.FedAvg(), replies)["w"].tolist() == [5.0, 5.5, 6.0]
    strategy = configured(FedAvg(), arrays(w=[0.0, 0.0, 0.0]))
    assert aggregated(strategy, replies)["w"].tolist() == [1.0, 2.0, 3.0]
    assert left_out(strategy) == {"x": "w is float32[1] instead of float32[3]"}


def test_8_float16_is_added_up_in_float32():
    half = np.float16([1.0])
    replies = [reply(1, {"w": half})] * 5000
    got = aggregated(FedAvg(), replies)["w"]
    assert got.dtype == np.float16
    assert got.tolist() == [1.0]
    assert aggregated(flower.FedAvg(), replies)["w"].tolist() != [1.0]


def test_8_bfloat16_is_averaged():
    def sent(n, value):
        bits = (np.float32([value, -value]).view(np.uint32) >> 16).astype(np.uint16)
        array = Array(bits.view("V2"))
        array.dtype = "bfloat16"
        return reply(n, ArrayRecord({"w": array}), f"s{n}")

    got, _ = FedAvg().aggregate_train(1, [sent(1, 1.0), sent(2, 2.0)])
    assert got["w"].dtype == "bfloat16"
    bits = np.frombuffer(got["w"].data[-4:], np.uint16).astype(np.uint32) << 16
    assert bits.view(np.float32).tolist() == [1.5, -1.5]
    with pytest.raises(TypeError):
        flower.FedAvg().aggregate_train(1, [sent(1, 1.0), sent(2, 2.0)])


def test_8_integers_stay_integers():
    replies = [reply(n, {"n": np.array([v])}, f"s{n}") for n, v in enumerate((3, 4, 4))]
    got = aggregated(FedAvg(), replies)["n"]
    assert got.dtype == np.int64
    assert got.tolist() == [4]
    assert aggregated(flower.FedAvg(), replies)["n"].dtype == np.float64


# --- 9. Distances between updates, not between weights ------------------------------------------


@pytest.mark.parametrize("ratio", [1e-3, 1e-4, 3e-5])
@pytest.mark.parametrize("seed", range(10))
def test_9_an_attacker_is_seen_where_updates_are_small_beside_the_weights(ratio, seed):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=2000).astype(np.float32)
    step = ratio * np.linalg.norm(weights) / np.sqrt(2000)
    direction = rng.normal(size=2000)
    moves = [step * (direction + 0.3 * rng.normal(size=2000)) for _ in range(7)]
    moves += [-step * direction, -step * direction]
    replies = [
        reply(n, {"w": (weights + move).astype(np.float32)}, f"s{n}")
        for n, move in enumerate(moves)
    ]
    options = {"num_malicious_nodes": 2, "num_nodes_to_select": 5}
    got = aggregated(configured(MultiKrum(**options), arrays(w=weights)), replies)["w"]
    moved = (got.astype(float) - weights) / step
    assert moved @ direction / (direction @ direction) == pytest.approx(1, abs=0.1)


# --- 10. One site -------------------------------------------------------------------------------


def test_10_a_run_with_one_site_does_not_wait_for_a_second(monkeypatch):
    result = run(FedAvg(), site_app(adding), W, rounds=1, sites=1)
    assert result.arrays["w"].numpy().tolist() == [1.0, 1.0]

    def waiting(seconds):
        raise TimeoutError("Flower waits for a second site")

    monkeypatch.setattr(strategy_utils, "sleep", waiting)
    with pytest.raises(TimeoutError, match="second site"):
        run(flower.FedAvg(), site_app(adding), W, rounds=1, sites=1)
