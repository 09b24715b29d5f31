import logging
import math
import re

import numpy as np
import pytest
from builders import FakeGrid, arrays, dump, reply
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp import strategy as flower
from hypothesis import given
from hypothesis import strategies as st

from fedmed_flower.errors import InputError
from fedmed_flower.server.history import Failure
from fedmed_flower.server.screening import capped
from fedmed_flower.strategies import FedAvg, FedProx, QFedAvg, WeightedFedAvg

W = arrays(w=[0.0, 0.0])


def configured(strategy, layout=W):
    strategy.configure_train(1, layout, ConfigRecord(), FakeGrid([1, 2], lambda m: None))
    return strategy


def two(a=None, b=None):
    """Return replies of 1 and 4 everywhere, with 1 and 3 examples."""
    return [
        reply(1, {"w": [1.0, 1.0]}, site="a", weight=1, **(a or {"loss": 0.5})),
        reply(2, {"w": [4.0, 4.0]}, site="b", weight=3, **(b or {"loss": 1.0})),
    ]


def outcome(replies, **options):
    strategy = WeightedFedAvg(**options)
    got, _ = strategy.aggregate_train(1, replies)
    value = None if got is None else got["w"].numpy().tolist()[0]
    return value, [(f.site, f.reason) for f in strategy.history.failures]


# --- Weights of your choice ---------------------------------------------------------------------


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=5), st.integers(0, 99))
def test_by_examples_it_is_flowers_average_to_the_bit(weights, seed):
    rng = np.random.default_rng(seed)
    replies = [
        reply(n, {"w": rng.normal(size=5).astype(np.float32)}, f"s{n}", w, loss=rng.normal())
        for n, w in enumerate(weights)
    ]
    wanted, wanted_metrics = flower.FedAvg().aggregate_train(1, replies)
    got, metrics = WeightedFedAvg().aggregate_train(1, replies)
    assert dump(got) == dump(wanted)
    assert repr(metrics) == repr(wanted_metrics)


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ("examples", 3.25),
        ("uniform", 2.5),
        ("inverse-loss", 2.0),
        ({"a": 3, "b": 1}, 1.75),
        ({"a": 0.25, "b": 0.75, "not here": 9}, 3.25),
        (lambda message: message.content["metrics"]["loss"] * 2, 3.0),
    ],
)
def test_the_weights_decide_the_mean(weights, wanted):
    assert outcome(two(), weights=weights) == (wanted, [])


def test_metrics_are_averaged_by_examples_whatever_the_weights():
    _, metrics = WeightedFedAvg(weights="uniform").aggregate_train(1, two())
    assert metrics == {"loss": 0.875}


def test_a_site_that_the_mapping_does_not_name_is_left_out():
    assert outcome(two(), weights={"b": 1}) == (4.0, [("a", "weights has no entry for this site")])


def test_a_site_without_a_name_is_named_by_its_node():
    replies = [reply(7, {"w": [1.0]}), reply(8, {"w": [3.0]})]
    got, _ = WeightedFedAvg(weights={"node 7": 3, "node 8": 1}).aggregate_train(1, replies)
    assert got["w"].numpy().tolist() == [1.5]


def bound(value):
    return f"its weight must be above 0 and at most 1e+100, got {value}"


def missing(message):
    return message.content["metrics"]["nothing"]


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (lambda message: math.nan, bound("nan")),
        (lambda message: -1, bound("-1.0")),
        (lambda message: 0, bound("0.0")),
        (lambda message: math.inf, bound("inf")),
        (lambda message: 1e308, bound("1e+308")),
        (missing, "weights failed: KeyError: 'nothing'"),
        (lambda message: 1 / 0, "weights failed: ZeroDivisionError: division by zero"),
        (lambda message: 10**400, "weights failed: OverflowError: int too large to convert to "
         "float"),
        (lambda message: "many", "weights failed: ValueError: could not convert string to float: "
         "'many'"),
    ],
)  # fmt: skip
def test_a_function_that_gives_no_weight_leaves_the_reply_out(weights, reason):
    def only_for_b(message):
        return weights(message) if message.metadata.src_node_id == 2 else 1.0

    assert outcome(two(), weights=only_for_b) == (1.0, [("b", reason)])


def test_a_function_that_returns_nothing_leaves_the_reply_out():
    _, ((_, reason), *_) = outcome(two(), weights=lambda message: None)
    assert reason.startswith("weights failed: TypeError: float() argument must be")


def test_a_mistake_in_a_function_of_weights_is_not_hidden():
    with pytest.raises(NameError):
        outcome(two(), weights=lambda message: nothing_of_that_name)  # noqa: F821


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"loss": 0.0}, "its training loss loss must be above 0, got 0.0"),
        ({"loss": -2}, "its training loss loss must be above 0, got -2"),
        ({"loss": math.nan}, "its training loss loss must be above 0, got nan"),
        ({"loss": [1.0]}, "it has no training loss loss"),
        ({"accuracy": 1.0}, "it has no training loss loss"),
        ({"loss": math.inf}, bound("0.0")),
        ({"loss": 5e-324}, bound("inf")),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_loss_without_an_inverse_leaves_the_reply_out(metrics, reason):
    assert outcome(two(b=metrics), weights="inverse-loss") == (1.0, [("b", reason)])


def test_the_loss_may_have_another_name():
    replies = two({"nll": 0.5}, {"nll": 1.0})
    assert outcome(replies, weights="inverse-loss", loss_key="nll") == (2.0, [])


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ("patients", "weights must be 'examples', 'uniform', 'inverse-loss', a mapping by site "
         "name or a function of the reply, got 'patients'"),
        (3, "weights must be 'examples', 'uniform', 'inverse-loss', a mapping by site name or a "
         "function of the reply, got 3"),
        ({"a": 1, "b": 0}, "weights must be above 0 and finite, got 0 for b"),
        ({"a": -1.5}, "weights must be above 0 and finite, got -1.5 for a"),
        ({"a": math.nan}, "weights must be above 0 and finite, got nan for a"),
        ({"a": None}, "weights must be above 0 and finite, got None for a"),
    ],
)  # fmt: skip
def test_the_constructor_says_what_is_wrong_with_weights(weights, text):
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        WeightedFedAvg(weights=weights)


def test_flowers_arguments_come_first():
    strategy = WeightedFedAvg(0.5, 0.25, weights="uniform", min_replies=2)
    assert (strategy.fraction_train, strategy.fraction_evaluate) == (0.5, 0.25)
    assert strategy.aggregate_train(1, two()[:1]) == (None, None)


# --- The cap on a share -------------------------------------------------------------------------

WEIGHTS = st.lists(
    st.one_of(st.integers(1, 10**9), st.floats(1e-6, 1e9)), min_size=1, max_size=60
)  # fmt: skip


@given(WEIGHTS, st.one_of(st.floats(0.001, 1), st.integers(1, 60).map(lambda n: 1 / n)))
def test_no_capped_weight_is_above_its_share(weights, share):
    got = capped(weights, share)
    reach = max(share, 1 / len(weights)) * (1 + 1e-9)
    assert max(got) <= reach * sum(got)
    order = np.argsort(weights, kind="stable")
    assert (np.diff(np.asarray(got)[order]) >= 0).all()
    if share <= (1 - 1e-9) / len(weights):
        assert len(set(got)) == 1
    elif len(set(got)) > 1:
        limit = max(got)
        assert all(new == old for new, old in zip(got, weights, strict=True) if new < limit)


def test_nothing_is_cut_where_nothing_is_above():
    assert capped([1, 2, 1], 0.5) == [1, 2, 1]
    assert capped([10, 1, 1], None) == [10, 1, 1]


@pytest.mark.parametrize(
    ("weights", "share", "wanted"),
    [
        ([8, 1, 1], 0.5, [2, 1, 1]),
        ([100, 50, 1, 1], 0.25, [1, 1, 1, 1]),
        ([100, 50, 2, 2], 0.4, [8, 8, 2, 2]),
        ([5, 1], 0.2, [1, 1]),
        ([7], 0.5, [1]),
    ],
)
def test_hand_worked_caps(weights, share, wanted):
    assert capped(weights, share) == pytest.approx(wanted)


def test_a_share_is_capped_in_the_model_and_in_the_metrics():
    replies = [
        reply(1, {"w": [1.0]}, "a", 998, loss=1.0),
        reply(2, {"w": [5.0]}, "b", 1, loss=5.0),
        reply(3, {"w": [9.0]}, "c", 1, loss=9.0),
    ]
    strategy = FedAvg(max_weight_share=0.5)
    got, metrics = strategy.aggregate_train(1, replies)
    assert got["w"].numpy().tolist() == [4.0]
    assert metrics["loss"] == 4.0
    assert strategy.aggregate_evaluate(1, replies)["loss"] == 4.0


# --- FedProx ------------------------------------------------------------------------------------


def test_proximal_mu_is_sent_and_the_mean_is_flowers():
    config, grid = ConfigRecord(), FakeGrid([1], lambda m: None)
    strategy = FedProx(proximal_mu=0.25)
    (sent,) = strategy.configure_train(1, W, config, grid)
    assert sent.content["config"]["proximal-mu"] == 0.25
    wanted, _ = flower.FedProx(proximal_mu=0.25).aggregate_train(1, two())
    assert dump(strategy.aggregate_train(1, two())[0]) == dump(wanted)


# --- q-FedAvg -----------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.0, 2.5])
def test_several_rounds_of_q_fedavg_are_flowers(q):
    rng = np.random.default_rng(3)
    model = arrays(w=rng.normal(size=(3, 4)).astype(np.float32), b=np.float32(0.5))
    ours, theirs = (kind(0.05, q) for kind in (QFedAvg, flower.QFedAvg))
    mine, other = model, model
    for number in range(1, 3):
        moves = [{k: rng.normal(size=model[k].shape) for k in model} for _ in range(4)]
        losses = rng.uniform(0.1, 3, 4)

        def replies(current, moves=moves, losses=losses):
            return [
                reply(
                    n,
                    {k: (current[k].numpy() + move[k]).astype(np.float32) for k in current},
                    f"s{n}",
                    n + 1,
                    train_loss=float(loss),
                )
                for n, (move, loss) in enumerate(zip(moves, losses, strict=True))
            ]

        for strategy, current in ((ours, mine), (theirs, other)):
            strategy.configure_train(number, current, ConfigRecord(), FakeGrid([1, 2], None))
        sent = replies(mine)
        mine, metrics = ours.aggregate_train(number, sent)
        other, wanted = theirs.aggregate_train(number, replies(other))
        assert metrics == wanted
        for key in model:
            assert mine[key].numpy().dtype == np.float32
            np.testing.assert_allclose(mine[key].numpy(), other[key].numpy(), rtol=3e-6, atol=1e-6)


def test_a_hand_worked_q_fedavg():
    # L = 2, w = 0, F = (1, 1), q = 1: delta = -(1, 4) 2, h = 4 |w_k|^2 + 2 = 10 and 130.
    strategy = configured(QFedAvg(0.5, 1.0))
    replies = two({"train_loss": 1.0}, {"train_loss": 1.0})
    got, _ = strategy.aggregate_train(1, replies)
    np.testing.assert_allclose(got["w"].numpy(), [10 / 140] * 2, rtol=1e-6)


def far(values, **metrics):
    return [*two({"train_loss": 0.5}, {"train_loss": 1.0}), reply(3, {"w": values}, "c", **metrics)]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (far([1.0, 1.0]), "it has no training loss train_loss"),
        (far([1.0, 1.0], train_loss=-1.0),
         "its training loss train_loss must be at least 0, got -1.0"),
        (far([1.0, 1.0], train_loss=math.inf), bound("inf")),
        (far([1.0, math.nan], train_loss=1.0), "w holds NaN or infinite values"),
        (far([3e38, 0.0], train_loss=1.0),
         "its loss or its change of the model is so large that the mean overflows"),
        (far([1.0, 1.0], train_loss=1e99), bound("inf")),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_a_reply_that_q_fedavg_cannot_use_is_left_out(bad, reason):
    strategy = configured(QFedAvg(0.1, 4.0))
    got, _ = strategy.aggregate_train(1, bad)
    wanted, _ = configured(QFedAvg(0.1, 4.0)).aggregate_train(1, bad[:2])
    assert dump(got) == dump(wanted)
    assert strategy.history.failures == [Failure(1, "train", "c", reason)]


def test_a_loss_of_zero_is_used():
    strategy = configured(QFedAvg(0.1, 0.5))
    got, _ = strategy.aggregate_train(1, far([1.0, 1.0], train_loss=0))
    assert np.isfinite(got["w"].numpy()).all()
    assert strategy.history.failures == []


def test_q_fedavg_says_that_it_needs_the_global_model():
    text = (
        "QFedAvg moves the global model, which it does not know: call configure_train before "
        "aggregate_train"
    )
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        QFedAvg(0.1).aggregate_train(1, two({"train_loss": 1.0}, {"train_loss": 1.0}))


def test_counters_take_no_part_in_the_norm_of_q_fedavg():
    def moved(steps):
        model = arrays(w=[0.0], n=np.array([5]))
        strategy = configured(QFedAvg(0.1, 1.0), model)
        sent = {"w": [1.0], "n": np.array([steps])}
        return strategy.aggregate_train(1, [reply(1, sent, train_loss=1.0)])[0]

    assert moved(6)["w"].numpy() == moved(10**6)["w"].numpy()
    assert moved(6)["n"].numpy().dtype == np.int64


def test_summaries_are_flowers(caplog):
    def lines(strategy):
        caplog.clear()
        with caplog.at_level(logging.INFO, "flwr"):
            strategy.summary()
        return [record.getMessage() for record in caplog.records]

    same = {"min_train_nodes": 2, "min_evaluate_nodes": 2, "min_available_nodes": 2}
    logging.getLogger("flwr").addHandler(caplog.handler)
    for ours, theirs in ((FedProx, flower.FedProx), (QFedAvg, flower.QFedAvg),
                         (WeightedFedAvg, flower.FedAvg)):  # fmt: skip
        own = {"client_learning_rate": 0.1} if ours is QFedAvg else {}
        wanted = lines(theirs(**same, **own))
        assert len(wanted) >= 8
        assert lines(ours(**same, **own)) == wanted
    logging.getLogger("flwr").removeHandler(caplog.handler)


def test_the_callers_own_averages_get_the_capped_weights():
    seen = []

    def keep(contents, key):
        seen.append([content["metrics"][key] for content in contents])
        return MetricRecord()

    FedAvg(train_metrics_aggr_fn=keep, max_weight_share=0.5).aggregate_train(1, two())
    assert seen == [[1, 1]]


def test_the_cap_of_q_fedavg_is_one_of_weights_and_not_of_losses():
    losses = [1.0, 1.0, 1.0, 10.0]
    sent = [reply(n, {"w": [0.0, 0.0]}, f"s{n}", train_loss=loss) for n, loss in enumerate(losses)]
    sent[3] = reply(3, {"w": [1.0, 0.0]}, "s3", train_loss=10.0)

    def moved(**options):
        strategy = configured(QFedAvg(1.0, 2.0, **options), arrays(w=[0.0, 0.0]))
        return float(strategy.aggregate_train(1, sent)[0]["w"].numpy()[0])

    # F^q is 1, 1, 1 and 100, cut to 3; h is q F^(q-1) |change|^2 + F^q: 2 * 10 * 1 for the last.
    assert moved() == pytest.approx(100 / (103 + 20))
    assert moved(max_weight_share=0.5) == pytest.approx(3 / (6 + 20))


@pytest.mark.parametrize(
    ("weights", "share", "wanted"),
    [
        ([3.0, 1.0], 1.0, [3.0, 1.0]),
        # Weights whose sum is below 1 are capped as others are.
        ([0.6, 0.1, 0.1], 0.5, [0.2, 0.1, 0.1]),
    ],
)
def test_a_share_is_of_the_sum_however_small_it_is(weights, share, wanted):
    assert capped(weights, share) == pytest.approx(wanted)
