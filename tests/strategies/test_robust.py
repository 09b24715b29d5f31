import inspect
import re

import numpy as np
import pytest
import reference
from builders import FakeGrid, arrays, dump, error_reply, reply, run, site_app
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import strategy as flower
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as ndarrays

from fedmed_flower.errors import InputError
from fedmed_flower.server.history import Failure
from fedmed_flower.strategies import (
    Bulyan,
    CenteredClipping,
    FedMedian,
    FedTrimmedAvg,
    GeometricMedian,
    Krum,
    MultiKrum,
)

ALL = [Bulyan, CenteredClipping, FedMedian, FedTrimmedAvg, GeometricMedian, Krum, MultiKrum]
FLOWER_COMPUTES = " (Flower's Krum and MultiKrum compute a model nevertheless)"


def exactly(text):
    return f"^{re.escape(text)}$"


def from_rows(rows, dtype=np.float32, **more):
    """Return a reply for each row, of sites in the order of the rows."""
    return [
        reply(100 - k, {"w": np.asarray(row, dtype)} | more, site=f"site {k:03}")
        for k, row in enumerate(rows)
    ]


def aggregate(strategy, replies, layout=None, known=True):
    """Aggregate one round of a strategy; the global model is zero where `layout` is not given."""
    if known and layout is None:
        zero = {key: np.zeros_like(a.numpy()) for key, a in replies[0].content["arrays"].items()}
        layout = arrays(**zero)
    strategy.run.sent_arrays = layout
    return strategy.aggregate_train(1, replies)[0]


def values(record):
    return record["w"].numpy()


# --- As Flower ----------------------------------------------------------------------------------


@st.composite
def rounds(draw, most=12):
    """Replies of any values that can be added up in their dtype, ties among them."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    shapes = draw(st.lists(st.sampled_from([(), (1,), (3,), (2, 3), (0, 2)]), max_size=6))
    bound = 2.0**120 if dtype == np.float32 else 2.0**1000
    numbers = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, 1.5]),
        st.floats(-bound, bound, width=np.dtype(dtype).itemsize * 8),
    )
    shapes = [*shapes, (2,)]
    count = draw(st.integers(1, most))
    whole = [draw(ndarrays(dtype, (count, *shape), elements=numbers)) for shape in shapes]
    return [
        reply(
            100 - k,
            {str(entry): np.asarray(stack[k]) for entry, stack in enumerate(whole)},
            site=f"site {k:03}",
            weight=draw(st.integers(1, 1000)),
            loss=draw(st.floats(0, 10)),
        )
        for k in range(count)
    ]


def bits(record):
    """Return all there is to compare, the sign of zero aside."""
    return dump(ArrayRecord({key: Array(np.asarray(a.numpy() + 0.0)) for key, a in record.items()}))


def theirs(strategy, replies):
    """Return Flower's outcome; it takes the arrays out of the replies."""
    copies = [
        reply(m.metadata.src_node_id, ArrayRecord(dict(m.content["arrays"])))
        for m in replies
    ]  # fmt: skip
    for copy, message in zip(copies, replies, strict=True):
        copy.content["metrics"] = MetricRecord(dict(message.content["metrics"]))
    return strategy.aggregate_train(1, copies)


@settings(max_examples=100, deadline=None)
@given(rounds(), st.randoms())
def test_the_median_is_flowers_to_the_bit(replies, random):
    before = [repr(m) for m in replies]
    wanted, wanted_metrics = theirs(flower.FedMedian(), replies)
    got, metrics = FedMedian().aggregate_train(1, random.sample(replies, len(replies)))
    assert bits(got) == bits(wanted)
    assert metrics == wanted_metrics
    assert [repr(m) for m in replies] == before


@pytest.mark.parametrize("count", [1, 2, 17, 64, 65])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_median_is_flowers_with_many_sites_and_layers(count, dtype):
    rng = np.random.default_rng(count)
    shapes = {str(k): (k % 7, 3) if k % 5 else () for k in range(60)}
    # More than one block of the kernels.
    shapes["large"] = (40_000,) if count < 10 else (9_000,)
    replies = [
        reply(k, {key: np.asarray(rng.normal(size=s)).astype(dtype) for key, s in shapes.items()})
        for k in range(count)
    ]
    wanted, _ = theirs(flower.FedMedian(), replies)
    assert dump(FedMedian().aggregate_train(1, replies)[0]) == dump(wanted)


def middle(replies, beta):
    """Return each entry's values between the cuts, in ascending order."""
    cut = int(beta * len(replies))
    stacks = {
        key: np.stack([m.content["arrays"][key].numpy() for m in replies])
        for key in replies[0].content["arrays"]
    }
    return {key: np.sort(stack, 0)[cut : len(stack) - cut] for key, stack in stacks.items()}


@settings(max_examples=60, deadline=None)
@given(rounds(most=24), st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.49]))
def test_the_trimmed_mean_adds_in_ascending_order(replies, beta):
    got = FedTrimmedAvg(beta=beta).aggregate_train(1, replies)[0]
    flowers = theirs(flower.FedTrimmedAvg(beta=beta), replies)[0]
    for key, kept in middle(replies, beta).items():
        # NumPy adds up a single column of 8 or more in another order than two.
        columns = np.stack([kept, kept], axis=-1).reshape(len(kept), -1)
        wanted = np.mean(columns, axis=0).reshape(*kept.shape[1:], 2)[..., 0]
        assert (got[key].numpy() + 0.0).tobytes() == (wanted + 0.0).tobytes()
        off = abs(got[key].numpy() - flowers[key].numpy())
        least = np.finfo(kept.dtype).smallest_subnormal
        bound = len(kept) * np.finfo(kept.dtype).eps * abs(kept).mean(axis=0) + least
        assert (off <= bound).all()
        if len(kept) <= 2:
            assert (got[key].numpy() == flowers[key].numpy()).all()


def spread(count, seed, size=50):
    return np.random.default_rng(seed).normal(size=(count, size)) + 0.5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "f", "selected"), [(3, 0, 2), (5, 1, 4), (9, 3, 4), (12, 2, 9)])
def test_krum_and_multi_krum_choose_as_flower(count, f, selected, seed):
    rows = spread(count, seed)
    replies = from_rows(rows)
    got = aggregate(Krum(num_malicious_nodes=f), replies)
    assert dump(got) == dump(theirs(flower.Krum(num_malicious_nodes=f), replies)[0])
    arguments = {"num_malicious_nodes": f, "num_nodes_to_select": selected}
    got = aggregate(MultiKrum(**arguments), replies)
    wanted, _ = theirs(flower.MultiKrum(**arguments), replies)
    assert values(got) == pytest.approx(values(wanted), rel=1e-5, abs=1e-6)
    exact = reference.multi_krum(rows, f, selected, np.ones(count))
    assert values(got) == pytest.approx(exact, rel=1e-5, abs=1e-6)


def test_multi_krum_weighs_the_chosen_by_their_examples_as_flower():
    replies = [
        reply(k, {"w": row}, weight=10**k, site=f"{k}")
        for k, row in enumerate(spread(6, 0).astype(np.float32))
    ]
    arguments = {"num_malicious_nodes": 1, "num_nodes_to_select": 3}
    wanted, _ = theirs(flower.MultiKrum(**arguments), replies)
    got = aggregate(MultiKrum(**arguments), replies)
    assert values(got) == pytest.approx(values(wanted), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "f"), [(3, 0), (6, 0), (7, 1), (10, 1), (11, 2)])
def test_bulyan_is_the_brute_force_version(count, f, seed):
    rows = spread(count, seed)
    got = aggregate(Bulyan(num_malicious_nodes=f), from_rows(rows))
    assert values(got) == pytest.approx(reference.bulyan(rows, f), rel=1e-5, abs=1e-6)


def pick_last(contents, f, count):
    assert (f, count) == (1, 5)
    assert all("loss" in content["metrics"] for content in contents)
    return contents[-count:]


def test_bulyan_takes_a_selection_rule_as_flower():
    replies = from_rows(spread(7, 0))
    for message in replies:
        message.content["metrics"]["loss"] = 1.0
    arguments = {"num_malicious_nodes": 1, "selection_rule": pick_last}
    wanted, _ = theirs(flower.Bulyan(**arguments), replies)
    got = aggregate(Bulyan(**arguments), replies)
    assert values(got) == pytest.approx(values(wanted), rel=1e-5, abs=1e-6)


def test_bulyan_blames_the_right_site_where_its_selection_rule_picks_a_broken_reply():
    rows = spread(8, 0)
    rows[6] = np.nan
    strategy = Bulyan(num_malicious_nodes=1, selection_rule=lambda c, f, n: c[-n:])
    got = aggregate(strategy, from_rows(rows))
    assert [f.site for f in strategy.history.failures] == ["site 006"]
    sound = np.delete(rows, 6, axis=0)[-5:]
    assert values(got) == pytest.approx(reference.nearest_to_median(sound, 3), rel=1e-5)


@pytest.mark.parametrize(
    "ours", [FedMedian, FedTrimmedAvg, Krum, MultiKrum, Bulyan], ids=lambda c: c.__name__
)
def test_arguments_are_flowers_by_position_and_by_name(ours):
    given = {
        "fraction_train": 0.5, "fraction_evaluate": 0.25, "min_train_nodes": 3,
        "min_evaluate_nodes": 4, "min_available_nodes": 5, "num_malicious_nodes": 2,
        "num_nodes_to_select": 6, "weighted_by_key": "patients", "arrayrecord_key": "weights",
        "configrecord_key": "settings", "train_metrics_aggr_fn": lambda c, k: MetricRecord(),
        "evaluate_metrics_aggr_fn": lambda c, k: MetricRecord(), "beta": 0.125,
        "selection_rule": pick_last,
    }  # fmt: skip
    names = list(inspect.signature(getattr(flower, ours.__name__)).parameters)
    for strategy in (ours(*(given[n] for n in names)), ours(**{n: given[n] for n in names})):
        assert {n: getattr(strategy, n) for n in names} == {n: given[n] for n in names}
        assert isinstance(strategy, getattr(flower, ours.__name__))
    theirs = getattr(flower, ours.__name__)()
    for name in names:
        if not name.startswith("min_") and not name.endswith("_fn"):
            assert getattr(ours(), name) == getattr(theirs, name)


@pytest.mark.parametrize("strategy", ALL, ids=lambda c: c.__name__)
def test_the_summary_can_be_written(strategy, caplog):
    strategy().summary()
    assert "Sampling" in caplog.text or "Fraction" in caplog.text
    if strategy in (Krum, MultiKrum, Bulyan):
        assert "Number of malicious nodes: 0" in caplog.text


# --- The rules behind the rounds ----------------------------------------------------------------


def test_the_geometric_median_and_clipping_are_the_slow_versions():
    rows = spread(7, 1)
    rows[0] *= 100
    layout = arrays(w=np.full(50, 0.25, np.float32))
    got = aggregate(GeometricMedian(), from_rows(rows), layout)
    assert values(got) == pytest.approx(reference.geometric_median(rows), abs=1e-4)
    for tau in (None, 1.0, 1e6):
        got = aggregate(CenteredClipping(tau=tau, num_iterations=2), from_rows(rows), layout)
        wanted = reference.centered_clipping(rows, values(layout), tau, 2)
        assert values(got) == pytest.approx(wanted, abs=1e-4)


def test_mixing_comes_before_the_rule():
    rows = spread(7, 2)
    replies = from_rows(rows)
    got = aggregate(FedMedian(mixing="nearest", num_malicious_nodes=2), replies)
    wanted = np.median(reference.nearest_neighbour_mixing(rows, 2), axis=0)
    assert values(got) == pytest.approx(wanted, abs=1e-5)
    got = aggregate(FedMedian(mixing="bucketing", bucket_size=3, seed=4), replies)
    order = np.random.default_rng((4, 1, 2)).permutation(7).tolist()
    wanted = np.median(reference.bucketing(rows, 3, order), axis=0)
    assert values(got) == pytest.approx(wanted, abs=1e-5)


def test_with_mixing_the_numbers_of_examples_do_not_count():
    rows = spread(9, 3).astype(np.float32)
    arguments = {"num_malicious_nodes": 1, "num_nodes_to_select": 2, "mixing": "nearest"}
    equal, unequal = (
        [reply(k, {"w": row}, f"{k}", weight(k)) for k, row in enumerate(rows)]
        for weight in (lambda k: 1, lambda k: k + 1)
    )
    assert dump(aggregate(MultiKrum(**arguments), equal)) == dump(
        aggregate(MultiKrum(**arguments), unequal)
    )


def test_the_seed_decides_the_buckets_of_each_round():
    replies = from_rows(spread(9, 4))

    def outcome(seed, server_round=1):
        strategy = FedMedian(mixing="bucketing", seed=seed)
        return values(strategy.aggregate_train(server_round, replies)[0]).tobytes()

    assert outcome(1) == outcome(1)
    assert len({outcome(seed) for seed in range(5)}) == 5
    assert len({outcome(1, server_round) for server_round in range(1, 6)}) == 5


def wander(values, message, context):
    site = context.node_config["partition-id"]
    step = np.random.default_rng(site).normal(size=3).astype(np.float32)
    return {"w": np.float32(0.5) * values["w"] + step}, {}


@pytest.mark.parametrize("seed", [None, 3])
def test_a_resumed_run_draws_the_same_buckets(tmp_path, seed):
    initial = arrays(w=np.zeros(3, np.float32))
    options = {"mixing": "bucketing", "fraction_evaluate": 0.0}
    whole = FedMedian(**options, run_dir=tmp_path / "whole", seed=seed)
    run(whole, site_app(wander), initial, rounds=4, sites=7)
    first = FedMedian(**options, run_dir=tmp_path / "parts", seed=whole.seed)
    run(first, site_app(wander), initial, rounds=2, sites=7)
    again = FedMedian(**options, run_dir=tmp_path / "parts", resume=True)
    result = run(again, site_app(wander), initial, rounds=4, sites=7)
    assert dump(result.arrays) == dump(whole.result.arrays)
    assert dump(first.result.arrays) != dump(whole.result.arrays)


@pytest.mark.parametrize("strategy", ALL, ids=lambda c: c.__name__)
@pytest.mark.parametrize("mixing", [None, "nearest", "bucketing"])
@pytest.mark.parametrize("known", [True, False])
def test_replies_are_left_as_they_were_and_integers_keep_their_dtype(strategy, mixing, known):
    rows = spread(15, 5).astype(np.float32)
    replies = [
        reply(k, {"w": row, "n": np.array(10**k, np.int64)}, f"{k:02}")
        for k, row in enumerate(rows)
    ]
    before = [repr(m) for m in replies]
    made = aggregate(strategy(num_malicious_nodes=1, mixing=mixing, seed=1), replies, known=known)
    assert [repr(m) for m in replies] == before
    assert made["n"].numpy().dtype == np.int64
    assert made["n"].numpy().shape == ()
    alone = aggregate(
        strategy(num_malicious_nodes=1, mixing=mixing, seed=1), from_rows(rows), known=known
    )
    assert values(made).tobytes() == values(alone).tobytes()


# --- Attackers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ALL, ids=lambda c: c.__name__)
@pytest.mark.parametrize("far", [np.nan, np.inf, 1e9, 1e15, 1e30])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("place", [0, 4])
def test_neither_huge_nor_broken_replies_move_the_model_far(strategy, far, known, place):
    rows = spread(9, 6)
    honest = rows.mean(axis=0)
    rows[place, ::2] = far
    made = strategy(num_malicious_nodes=1)
    got = aggregate(made, from_rows(rows), known=known)
    assert np.linalg.norm(values(got) - honest) < 20
    assert {f.site for f in made.history.failures} <= {f"site {place:03}"}
    if not np.isfinite(far):
        assert [f.reason for f in made.history.failures] == ["w holds NaN or infinite values"]


@pytest.mark.parametrize(
    ("strategy", "sites"),
    [(Krum, 5), (MultiKrum, 5), (Bulyan, 7), (FedMedian, 3), (GeometricMedian, 3),
     (CenteredClipping, 3), (FedTrimmedAvg, 5)],
    ids=lambda v: getattr(v, "__name__", None),
)  # fmt: skip
def test_a_broken_reply_is_one_of_the_malicious_and_a_silent_site_is_not(strategy, sites):
    rows = spread(sites, 7)
    assert aggregate(strategy(num_malicious_nodes=1), from_rows(rows)) is not None
    rows[0, 0] = np.nan
    made = strategy(num_malicious_nodes=1)
    got = values(aggregate(made, from_rows(rows)))
    assert (rows[1:].min(axis=0) - 1e-6 <= got).all()
    assert (got <= rows[1:].max(axis=0) + 1e-6).all()
    nan = Failure(1, "train", "site 000", "w holds NaN or infinite values")
    assert made.history.failures == [nan]

    made = strategy(num_malicious_nodes=1)
    assert aggregate(made, from_rows(rows[1:])) is None
    aside = FLOWER_COMPUTES if strategy in (Krum, MultiKrum) else ""
    too_few = f"{sites - 1} usable replies, {sites} needed{aside}: the model stays as it was"
    assert made.history.failures == [Failure(1, "train", "all", too_few)]

    made = strategy(num_malicious_nodes=1)
    assert aggregate(made, [*from_rows(rows[1:]), error_reply(9, "no GPU")]) is None
    # What one round has found out says nothing about the next.
    assert aggregate(made, from_rows(rows)) is not None
    assert aggregate(made, from_rows(rows[1:])) is None


def test_more_broken_replies_than_malicious_sites_are_just_left_out():
    rows = spread(9, 7)
    rows[:4, 0] = np.nan
    made = MultiKrum(num_malicious_nodes=2, num_nodes_to_select=3)
    assert aggregate(made, from_rows(rows)) is not None
    assert len(made.history.failures) == 4


def test_a_median_that_cannot_be_told_in_its_dtype_leaves_the_model():
    strategy = FedMedian()
    assert aggregate(strategy, from_rows([[3e38, 1.0], [3e38, 2.0]])) is None
    reason = "in the new model, w holds NaN or infinite values"
    assert strategy.history.failures == [Failure(1, "train", "all", reason)]


@pytest.mark.parametrize("strategy", ALL, ids=lambda c: c.__name__)
def test_failed_sites_do_not_count(strategy):
    rows = spread(7, 8)
    replies = [error_reply(1, "x"), *from_rows(rows), reply(2)]
    with_failures = aggregate(strategy(), replies, arrays(w=np.zeros(50, np.float32)))
    assert dump(with_failures) == dump(aggregate(strategy(), from_rows(rows)))


@pytest.mark.parametrize("strategy", ALL, ids=lambda c: c.__name__)
def test_no_replies_at_all_leave_the_model(strategy):
    assert strategy().aggregate_train(1, []) == (None, None)


# --- Too few sites ------------------------------------------------------------------------------


NEEDED = [
    (Krum(num_malicious_nodes=1), 5),
    (Krum(num_malicious_nodes=3), 9),
    (MultiKrum(num_malicious_nodes=2), 7),
    (MultiKrum(num_malicious_nodes=2, num_nodes_to_select=6), 8),
    (MultiKrum(num_nodes_to_select=6), 1),
    (Bulyan(), 3),
    (Bulyan(num_malicious_nodes=1), 7),
    (Bulyan(num_malicious_nodes=2), 11),
    (FedMedian(), 1),
    (FedMedian(num_malicious_nodes=2), 5),
    (GeometricMedian(num_malicious_nodes=1), 3),
    (CenteredClipping(num_malicious_nodes=4), 9),
    (FedTrimmedAvg(), 1),
    (FedTrimmedAvg(beta=0.49, num_malicious_nodes=1), 3),
    (FedTrimmedAvg(beta=0.2, num_malicious_nodes=2), 10),
    (FedTrimmedAvg(beta=0.3, num_malicious_nodes=3), 10),
    (FedTrimmedAvg(beta=0.1, num_malicious_nodes=3), 30),
    (FedTrimmedAvg(beta=2.0**-40, num_malicious_nodes=1), 2**40),
    (FedMedian(num_malicious_nodes=1, mixing="nearest"), 3),
    (FedMedian(num_malicious_nodes=1, mixing="bucketing"), 5),
    (FedMedian(num_malicious_nodes=2, mixing="bucketing", bucket_size=3), 13),
    (Krum(num_malicious_nodes=1, mixing="bucketing"), 9),
    (Bulyan(num_malicious_nodes=1, mixing="bucketing"), 13),
]


@pytest.mark.parametrize(
    ("strategy", "needed"), NEEDED, ids=lambda v: getattr(type(v), "__name__", "")
)
def test_what_a_rule_needs(strategy, needed):
    assert strategy.needed() == needed


@settings(max_examples=200, deadline=None)
@given(st.floats(0.001, 0.4999), st.integers(1, 20))
def test_trimming_needs_the_fewest_sites_of_which_enough_are_cut_off(beta, f):
    needed = FedTrimmedAvg(beta=beta, num_malicious_nodes=f).needed()
    assert needed >= 2 * f + 1
    assert int(beta * needed) >= f
    assert needed == 2 * f + 1 or int(beta * (needed - 1)) < f


def test_buckets_are_enough_where_each_attacker_spoils_another():
    strategy = Bulyan(num_malicious_nodes=1, mixing="bucketing", bucket_size=4, seed=0)
    rows = spread(strategy.needed(), 9)
    got = aggregate(strategy, from_rows(rows))
    assert np.isfinite(values(got)).all()
    assert aggregate(strategy, from_rows(rows[1:])) is None


TOO_FEW = [pair for pair in NEEDED if 1 < pair[1] < 100]


@pytest.mark.parametrize(
    ("strategy", "needed"), TOO_FEW, ids=lambda v: getattr(type(v), "__name__", "")
)
def test_too_few_sites_are_refused_when_the_round_is_configured(strategy, needed):
    grid = FakeGrid(range(needed - 1), lambda m: None)
    aside = FLOWER_COMPUTES if isinstance(strategy, MultiKrum) else ""
    text = (
        f"{type(strategy).__name__} needs {needed} replies a round to keep its promise, but "
        f"{needed - 1} sites take part{aside}: raise min_train_nodes or lower num_malicious_nodes"
    )
    for _ in range(2):
        with pytest.raises(InputError, match=exactly(text)):
            strategy.configure_train(1, arrays(w=[0.0]), ConfigRecord(), grid)
    grid.nodes.append(1000)
    assert len(list(strategy.configure_train(1, arrays(w=[0.0]), ConfigRecord(), grid))) == needed


@pytest.mark.parametrize("strategy", ALL, ids=lambda c: c.__name__)
def test_a_run_with_too_few_sites_does_not_start(strategy):
    made = strategy(num_malicious_nodes=2)
    text = f"{strategy.__name__} needs {made.needed()} replies a round to keep its promise, but 4 "
    with pytest.raises(InputError, match=f"^{re.escape(text)}"):
        run(made, site_app(wander), arrays(w=np.zeros(3, np.float32)), sites=4)


@pytest.mark.parametrize("kind", [Krum, MultiKrum])
def test_krum_says_that_flowers_computes_with_too_few_replies_as_it_does(kind):
    replies = from_rows(spread(4, 3))
    ours, theirs = (
        kind(num_malicious_nodes=1),
        getattr(flower, kind.__name__)(num_malicious_nodes=1),
    )
    assert aggregate(ours, replies) is None
    text = f"4 usable replies, 5 needed{FLOWER_COMPUTES}: the model stays as it was"
    assert ours.history.failures == [Failure(1, "train", "all", text)]
    assert theirs.aggregate_train(1, replies)[0] is not None


def test_sites_that_drop_out_later_do_not_end_the_run():
    def answer(message):
        if message.metadata.message_type == "evaluate":
            return None
        node_id = message.metadata.dst_node_id
        return reply(node_id, {"w": [float(node_id)]}, f"site {node_id}", to=message)

    class Leaving(FakeGrid):
        def push_messages(self, messages):
            sent = super().push_messages(messages)
            self.nodes = [1, 2, 3, 4, 5] if len(self.sent) > 5 else [1, 2, 3, 4]
            return sent

    strategy = Krum(num_malicious_nodes=1, fraction_evaluate=0.0)
    grid = Leaving([1, 2, 3, 4, 5], answer)
    strategy.start(grid, arrays(w=[0.0]), 2)
    assert len(grid.sent) == 5
    # The squared distances to two neighbours are 2 for each of 2, 3 and 4.
    assert values(strategy.result.arrays).tolist() == [2.0]
    assert strategy.history.failures == [
        Failure(2, "train", "all", "Krum needs 5 replies a round to keep its promise, but 4 sites "
                f"take part{FLOWER_COMPUTES}: raise min_train_nodes or lower num_malicious_nodes"),
    ]  # fmt: skip


def test_sites_that_fall_silent_leave_the_model_for_that_round():
    silent = {2: {4, 5}}
    rounds = []

    def answer(message):
        node_id = message.metadata.dst_node_id
        if node_id in silent.get(len(rounds), ()):
            return None
        return reply(node_id, {"w": [float(node_id * len(rounds))]}, f"{node_id}", to=message)

    class Counting(FakeGrid):
        def push_messages(self, messages):
            rounds.append(1)
            return super().push_messages(messages)

    seen = []
    strategy = FedMedian(num_malicious_nodes=2, fraction_evaluate=0.0)
    strategy.start(
        Counting([1, 2, 3, 4, 5], answer), arrays(w=[0.0]), 3,
        evaluate_fn=lambda r, a: seen.append(values(a).tolist()),
    )  # fmt: skip
    assert seen == [[0.0], [3.0], [3.0], [9.0]]
    assert [(f.round, f.site, f.reason) for f in strategy.history.failures if f.site == "all"] == [
        (2, "all", "3 usable replies, 5 needed: the model stays as it was")
    ]


# --- Arguments ----------------------------------------------------------------------------------


BETA = "beta must be at least 0 and below 0.5, got {}"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FedTrimmedAvg(beta=0.5), BETA.format(0.5)),
        (lambda: FedTrimmedAvg(beta=-0.1), BETA.format(-0.1)),
        (lambda: FedTrimmedAvg(beta=float("nan")), BETA.format("nan")),
        (
            lambda: FedTrimmedAvg(1.0, 1.0, 2, 2, 2, "n", "arrays", "config", None, None, 0.75),
            BETA.format(0.75),
        ),
        (
            lambda: FedTrimmedAvg(beta=0.0, num_malicious_nodes=1),
            "beta must be above 0 to withstand num_malicious_nodes=1",
        ),
        (lambda: CenteredClipping(tau=0), "tau must be above 0, got 0"),
        (lambda: CenteredClipping(tau=-1.5), "tau must be above 0, got -1.5"),
        (lambda: CenteredClipping(tau=float("nan")), "tau must be above 0, got nan"),
        (lambda: CenteredClipping(num_iterations=0), "num_iterations must be at least 1, got 0"),
        (
            lambda: FedMedian(mixing="mean"),
            "mixing must be 'nearest', 'bucketing' or None, got 'mean'",
        ),
        (lambda: Krum(mixing=""), "mixing must be 'nearest', 'bucketing' or None, got ''"),
        (
            lambda: FedMedian(mixing="nearest"),
            "mixing='nearest' needs num_malicious_nodes above 0: with 0 it is a plain mean",
        ),
        (lambda: FedMedian(bucket_size=1), "bucket_size must be at least 2, got 1"),
        (lambda: MultiKrum(num_nodes_to_select=0), "num_nodes_to_select must be at least 1, got 0"),
        (
            lambda: Bulyan(mixing="bucketing", selection_rule=pick_last),
            "mixing must be None with a selection_rule, which takes whole replies, got 'bucketing'",
        ),
        *(
            (
                lambda c=c: c(num_malicious_nodes=-1),
                "num_malicious_nodes must be at least 0, got -1",
            )
            for c in ALL
        ),
    ],
)
def test_the_constructors_say_what_is_wrong(make, text):
    with pytest.raises(InputError, match=exactly(text)):
        make()


def test_other_errors_of_the_constructor_are_not_taken_for_beta():
    with pytest.raises(InputError, match=exactly("seed must be at least 0, got -1")):
        FedTrimmedAvg(seed=-1)
    with pytest.raises(TypeError, match="bate"):
        FedTrimmedAvg(bate=0.1)
    with pytest.raises(TypeError, match="num_nodes_to_select"):
        Krum(num_nodes_to_select=2)


def test_a_beta_that_cuts_off_nothing_is_told(caplog):
    aggregate(FedTrimmedAvg(beta=0.2), from_rows(spread(4, 0)))
    assert "beta=0.2 of 4 updates is less than one: nothing is trimmed" in caplog.text
    caplog.clear()
    aggregate(FedTrimmedAvg(beta=0.2), from_rows(spread(5, 0)))
    aggregate(FedTrimmedAvg(beta=0.0), from_rows(spread(4, 0)))
    assert "trimmed" not in caplog.text


# --- With Flower's optimisers -------------------------------------------------------------------


class MedianAdam(FedMedian, flower.FedAdam):
    pass


class ClippedAdam(CenteredClipping, flower.FedAdam):
    pass


class TrimmedMomentum(FedTrimmedAvg, flower.FedAvgM):
    pass


class KrumYogi(Krum, flower.FedYogi):
    pass


def test_an_optimiser_moves_the_model_towards_the_outcome_of_the_rule():
    model, step, second = np.zeros(50), np.zeros(50), np.zeros(50)
    strategy = MedianAdam(eta=0.5, beta_1=0.8, beta_2=0.9, tau=0.01)
    layout = arrays(w=model.astype(np.float32))
    for server_round in (1, 2, 3):
        rows = spread(5, server_round)
        strategy.run.sent_arrays = layout
        layout, _ = strategy.aggregate_train(server_round, from_rows(rows))
        change = np.median(rows, axis=0) - model
        step = 0.8 * step + 0.2 * change
        second = 0.9 * second + 0.1 * change**2
        rate = 0.5 * (1 - 0.9 ** (server_round + 1)) ** 0.5 / (1 - 0.8 ** (server_round + 1))
        model = model + rate * step / (second**0.5 + 0.01)
        assert values(layout) == pytest.approx(model, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("mixed", "rule", "optimiser"),
    [
        (MedianAdam, FedMedian, flower.FedAdam),
        (ClippedAdam, CenteredClipping, flower.FedAdam),
        (TrimmedMomentum, FedTrimmedAvg, flower.FedAvgM),
        (KrumYogi, Krum, flower.FedYogi),
    ],
)
def test_each_rule_goes_with_each_optimiser(mixed, rule, optimiser):
    layout, replies = arrays(w=np.full(50, 0.5, np.float32)), from_rows(spread(7, 3))
    middle = aggregate(rule(), replies, layout)
    theirs = optimiser()
    grid = FakeGrid([1, 2], lambda m: None)
    theirs.configure_train(1, layout, ConfigRecord(), grid)
    wanted, _ = theirs.aggregate_train(1, [reply(1, middle)])
    assert values(aggregate(mixed(), replies, layout)) == pytest.approx(values(wanted), rel=1e-5)


def test_what_honest_sites_send_does_not_lower_the_number_of_malicious_ones():
    rows = spread(6, 3)
    rows[5] += 1000
    sent = from_rows(rows)
    again = from_rows(rows)[5]
    none = reply(50, {"w": rows[0].astype(np.float32)}, "empty", weight=0)
    made = Bulyan(num_malicious_nodes=1)
    assert aggregate(made, [*sent, none]) is None
    assert made.history.failures[-1].reason.startswith("6 usable replies, 7 needed")
    assert made.needed() == 7
    for each in (sent[5], again):
        each.metadata.__dict__["_reply_to_message_id"] = "the same"
    made = Bulyan(num_malicious_nodes=1)
    assert aggregate(made, [*sent, again]) is None
    assert "the site has replied already" in [f.reason for f in made.history.failures]


@pytest.mark.parametrize("kind", [FedMedian, GeometricMedian, Krum])
def test_a_complex_model_is_refused_by_name(kind):
    sent = [reply(n, {"z": np.array([1j * n])}, f"s{n}") for n in range(5)]
    with pytest.raises(InputError, match="z is complex128: no robust rule can combine it"):
        kind(num_malicious_nodes=1).aggregate_train(1, sent)
