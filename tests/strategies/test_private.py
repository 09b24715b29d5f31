import copy
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from builders import FakeGrid, arrays, dump, error_reply, reply, run, site_app
from flwr.app import ConfigRecord
from flwr.serverapp import strategy as flower
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmed_flower.arrays.updates import Updates
from fedmed_flower.errors import InputError
from fedmed_flower.privacy.accounting import Release, epsilon_of
from fedmed_flower.privacy.grid import divergence_once, step_once
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.strategies import (
    DPFedAvg,
    FedAdam,
    FedAvg,
    FedMedian,
    Krum,
    QFedAvg,
    WeightedFedAvg,
)

W = arrays(w=[0.0, 0.0])
CHANCE = 1e-6


def made(kind=DPFedAvg, **options):
    """Return a strategy without noise, unless it is given."""
    given = {"noise_multiplier": 0.0, "clipping_norm": 1.0, "population_size": 4}
    return kind(**given | options)


def silent(message):
    return None


def released(strategy, replies, layout=W, server_round=1):
    grid = FakeGrid(range(1, 30), silent)
    list(strategy.configure_train(server_round, layout, ConfigRecord(), grid))
    return strategy.aggregate_train(server_round, replies)


def moved(strategy, replies, layout=W, server_round=1):
    got, _ = released(strategy, replies, layout, server_round)
    return {key: array.numpy() for key, array in got.items()}


def left_out(strategy):
    return {failure.site: failure.reason for failure in strategy.history.failures}


def adding(values, message, context):
    return {key: value + np.float32(1) for key, value in values.items()}, {"loss": 0.5}


def spent(folder):
    rows = json.loads((folder / "privacy.json").read_text())["releases"]
    return {Release(rate, noise): count for rate, noise, count in rows}


# --- Sensitivity --------------------------------------------------------------------------------


@st.composite
def neighbours(draw):
    """A model, replies of up to five hospitals, the reply of one more, and the clipping norm."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from([np.float32, np.float32, np.float64, np.float16]))
    counter = draw(st.sampled_from([None, np.array(3), np.array([3, 4])]))
    size = draw(st.integers(1, 40))
    weights = rng.normal(size=size)
    model = {"w": weights.astype(dtype), "b": np.asarray(rng.normal()).astype(dtype)}
    most = {np.float16: 6e4, np.float32: 3e38, np.float64: 1e150}[dtype]

    def hospital(node):
        kind = draw(st.sampled_from(
            ["usual", "usual", "usual", "zero", "nan", "huge", "overflowing", "greedy"]
        ))  # fmt: skip
        ratio = 10 ** draw(st.floats(-5, 0))
        direction = rng.normal(size=size)
        change = direction * ratio * np.linalg.norm(weights) / np.linalg.norm(direction)
        change *= kind not in ("zero", "nan")
        if kind in ("huge", "overflowing"):
            change = np.sign(direction) * (most if kind == "huge" else 1e300)
        with np.errstate(over="ignore"):
            values = {key: (v + change[: v.size].reshape(v.shape)).astype(dtype)
                      for key, v in model.items()}  # fmt: skip
        if kind == "nan":
            values["w"][0] = np.nan
        if counter is not None:
            values["n"] = counter + rng.integers(10**6)
        return reply(node, values, f"s{node}", weight=10**12 if kind == "greedy" else 10)

    layout = model if counter is None else model | {"n": counter}
    others = [hospital(node) for node in range(1, 1 + draw(st.integers(0, 5)))]
    lengths = st.floats(1e-3, 1e3)
    return arrays(**layout), others, hospital(9), draw(lengths) * np.linalg.norm(weights)


@pytest.fixture
def sums(monkeypatch):
    """The sums of clipped changes that were made."""
    kept, true = [], Updates.sum_of_changes

    def sum_of_changes(self, weights):
        made = true(self, weights)
        kept.append(np.concatenate([part.copy() for part in made.values()]))
        return made

    monkeypatch.setattr(Updates, "sum_of_changes", sum_of_changes)
    return kept


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_one_hospital_moves_the_sum_by_no_more_than_the_clipping_norm(sums):
    apart = []

    @settings(max_examples=150, deadline=None)
    @given(neighbours(), st.integers(1, 9))
    def check(case, population_size):
        layout, others, one, norm = case
        sums.clear()
        models = []
        for replies in (others, [*others, one]):
            strategy = made(clipping_norm=norm, population_size=population_size)
            models.append(released(strategy, replies, layout)[0])
            assert strategy.releases.total() == 1
        assert len(sums) == 2
        apart.append(np.linalg.norm(sums[1] - sums[0]) / norm)
        assert apart[-1] <= 1 + 1e-6
        if None in models:
            return
        a, b = ({k: v.numpy() for k, v in model.items()} for model in models)
        steps = []
        for key, before in layout.items():
            if before.numpy().dtype.kind == "i":
                assert a[key].tolist() == b[key].tolist() == before.numpy().tolist()
                continue
            wide = [np.asarray(m[key], float).ravel() for m in (a, b)]
            ulp = np.spacing(np.maximum(abs(a[key]), abs(b[key]))).astype(float).ravel()
            steps.append(np.maximum(0, abs(wide[0] - wide[1]) - ulp))
        assert np.linalg.norm(np.concatenate(steps)) <= norm / population_size * (1 + 1e-6)

    check()
    # Else nothing was clipped, and nothing tried.
    assert max(apart) > 0.999
    assert min(apart) == 0


@pytest.mark.filterwarnings("error")
def test_changes_are_clipped_and_divided_by_the_fixed_denominator():
    replies = [reply(1, {"w": [3.0, 4.0]}, "a", weight=1),
               reply(2, {"w": [0.0, 0.5]}, "b", weight=10**9),
               reply(3, {"w": [0.0, 0.0]}, "c")]  # fmt: skip
    strategy = made(population_size=10, sampling_rate=0.2)
    assert moved(strategy, replies)["w"].tolist() == pytest.approx([0.3, 0.65])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("norm", [1e-100, 1e-3, 1e50, 1e100])
def test_no_length_divides_by_zero_or_overflows(norm):
    replies = [reply(n, {"w": [0.0, value]}, f"s{n}") for n, value in enumerate((0.0, 1e-30, 2.0))]
    got = moved(made(clipping_norm=norm), replies)["w"]
    assert got[1] == pytest.approx((min(norm, 1e-30) + min(norm, 2.0)) / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "huge"), [(np.float16, 6e4), (np.float32, 3e38), (np.float64, 1e150)]
)
def test_a_huge_change_is_clipped_and_not_left_out(dtype, huge):
    strategy = made()
    sent = reply(1, {"w": np.array([huge, -huge], dtype)}, "a")
    got = moved(strategy, [sent], arrays(w=np.zeros(2, dtype)))["w"]
    assert left_out(strategy) == {}
    np.testing.assert_allclose(got, [0.125**0.5 / 2, -(0.125**0.5) / 2], rtol=1e-3)


@pytest.mark.parametrize("counter", [np.array(7), np.array([7, 8]), np.array([True, False])])
def test_integers_have_no_part_in_the_length_and_stay_as_they_are(counter):
    layout = arrays(w=[0.0], n=counter)
    replies = [reply(n, {"w": [0.5], "n": ~counter}, f"s{n}") for n in range(4)]
    got = moved(made(noise_multiplier=0.0), replies, layout)
    assert got["w"].tolist() == [0.5]
    assert got["n"].dtype == counter.dtype
    assert got["n"].tolist() == counter.tolist()


def test_complex_entries_stay_as_they_are():
    layout = arrays(w=[0.0], z=np.array([1 + 1j]))
    got = moved(made(), [reply(1, {"w": [0.5], "z": np.array([9e9j])}, "a")], layout)
    assert (got["w"].tolist(), got["z"].tolist()) == ([0.125], [1 + 1j])


# --- Noise --------------------------------------------------------------------------------------


ZEROS = {"a": np.zeros(30_000), "b": np.zeros((100, 200))}


def noise_of(strategy, replies=(), server_round=1):
    got = moved(strategy, list(replies), arrays(**ZEROS), server_round)
    return np.concatenate([got["a"], got["b"].ravel()])


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_the_model_gets_the_noise_that_is_claimed(quantile):
    strategy = made(
        noise_multiplier=2.0, clipping_norm=0.5, population_size=8, sampling_rate=0.5,
        target_quantile=quantile, count_stddev=2.0,
    )  # fmt: skip
    multiplier = 2.0 if quantile is None else (2.0**-2 - 4.0**-2) ** -0.5
    assert strategy.sum_multiplier == pytest.approx(multiplier, rel=1e-12)
    noise = noise_of(strategy) / (multiplier * 0.5 / (0.5 * 8))
    low, high = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], noise.size)
    assert low < (noise**2).sum() < high
    assert stats.kstest(noise, "norm").pvalue > CHANCE


def test_noise_is_independent_between_rounds_parameters_instances_and_copies():
    strategy = made(noise_multiplier=1.0, seed=7)
    twin, copied = made(noise_multiplier=1.0, seed=7), copy.deepcopy(strategy)
    rows = []
    for one, number in ((strategy, 1), (strategy, 2), (twin, 1), (copied, 1)):
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        torch.manual_seed(0)
        rows.append(noise_of(one, server_round=number)[:20_000])
    rows.append(noise_of(strategy, server_round=3)[30_000:])
    correlation = np.corrcoef([*rows, np.roll(rows[0], 1)]) - np.eye(6)
    assert abs(correlation).max() < 5.5 / np.sqrt(20_000)


def test_noise_is_added_to_what_the_hospitals_sent():
    sent = reply(1, {key: values + 1 for key, values in ZEROS.items()}, "a")
    noise = noise_of(made(noise_multiplier=0.1, clipping_norm=1e6), [sent]) - 0.25
    assert abs(noise.mean()) < 6 * 0.1 * 1e6 / 4 / np.sqrt(noise.size)
    assert noise.std() == pytest.approx(0.1 * 1e6 / 4, rel=0.03)


def one_site(answer=silent, **options):
    strategy = made(noise_multiplier=5.0, **{"fraction_evaluate": 0.0} | options)
    strategy.start(FakeGrid([1], answer), W, num_rounds=1, timeout=2)
    return strategy


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        (silent, {}),
        (lambda m: error_reply(1, "broken", to=m), {}),
        (lambda m: reply(1, {"x": [1.0]}, to=m), {}),
        (lambda m: reply(1, {"w": [np.nan, 0.0]}, to=m), {}),
        (lambda m: reply(1, {"w": [1.0, 2.0]}, to=m, weight=10**12), {}),
        (lambda m: reply(1, {"w": [1.0, 2.0]}, to=m), {"sampling_rate": 1e-15}),
        (lambda m: reply(1, {"w": [1.0, 2.0]}, to=m), {"min_available_nodes": 2}),
        (lambda m: reply(1, {"w": [1.0, 2.0]}, to=m), {"min_train_nodes": 2}),
    ],
    ids=["silence", "error", "other keys", "NaN", "greed", "nobody drawn", "few", "few to train"],
)
def test_a_round_without_anybody_releases_noise_and_is_charged(answer, options, monkeypatch):
    clock = [0.0]
    times = "fedmed_flower.server.sites.time."
    monkeypatch.setattr(times + "monotonic", lambda: clock[0])
    monkeypatch.setattr(times + "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    strategy = one_site(answer, **options)
    rate = options.get("sampling_rate", 1.0)
    assert strategy.releases == {Release(rate, 5.0): 1}
    assert (strategy.result.arrays["w"].numpy() != 0).all()
    told = strategy.result.train_metrics_clientapp[1]
    assert told == {
        "hospital-epsilon": epsilon_of([Release(rate, 5.0)], 1e-5),
        "clipping-norm": 1.0,
    }


# --- Who takes part -----------------------------------------------------------------------------


def test_each_hospital_takes_part_on_its_own_with_the_same_probability():
    strategy = made(sampling_rate=0.3, seed=1)
    rounds = [set(strategy.choose(range(20), 20, 1, True)) for _ in range(2000)]
    taken = np.array([[node in drawn for node in range(20)] for drawn in rounds])
    for one in taken.T:
        assert stats.binomtest(int(one.sum()), 2000, 0.3).pvalue > CHANCE
    assert abs(np.corrcoef(taken.T) - np.eye(20)).max() < 6 / np.sqrt(2000)
    # A sample of fixed size would have no spread.
    sizes = taken.sum(axis=1)
    low, high = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], 2000)
    assert low < ((sizes - 6) ** 2).sum() / (20 * 0.3 * 0.7) < high


def test_the_runs_seed_decides_who_evaluates_but_not_who_trains():
    drawn = {True: set(), False: set()}
    for _ in range(5):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        for training, found in drawn.items():
            strategy = made(sampling_rate=0.5, seed=3)
            found.add(tuple(strategy.choose(range(40), 20, 1, training)))
    assert (len(drawn[True]), len(drawn[False])) == (5, 1)


def test_every_hospital_takes_part_where_the_probability_is_1():
    grid = FakeGrid(range(1, 8), silent)
    sent = made(min_train_nodes=2).configure_train(1, W, ConfigRecord(), grid)
    assert sorted(message.metadata.dst_node_id for message in sent) == list(range(1, 8))


def test_training_is_confined_to_what_the_run_is_confined_to():
    strategy = made()
    strategy.only = {2, 3}
    sent = strategy.configure_train(1, W, ConfigRecord(), FakeGrid(range(1, 8), silent))
    assert sorted(message.metadata.dst_node_id for message in sent) == [2, 3]


def test_a_hospital_that_connects_late_takes_nobodys_place():
    class Growing(FakeGrid):
        def get_node_ids(self):
            self.nodes.append(len(self.nodes) + 1)
            return list(self.nodes)

    grid = Growing([1, 2], silent)
    sent = made().configure_train(1, W, ConfigRecord({"lr": 0.1}), grid)
    addressed = [message.metadata.dst_node_id for message in sent]
    assert sorted(addressed) == grid.nodes
    for message in sent:
        assert dump(message.content["arrays"]) == dump(W)
        assert message.content["config"] == {"lr": 0.1, "server-round": 1}
        assert message.metadata.message_type == "train"


# --- Charging -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "bad", "reason"),
    [
        ({"w": [0.0, 0.0]}, {"w": [np.nan, 0.0]}, "w holds NaN or infinite values"),
        ({"w": np.zeros(2)}, {"w": np.array([1e200, 0])}, "the squares of its values overflow"),
        ({"w": [0.0], "z": np.array([0j])}, {"w": [0.5], "z": np.array([np.nan * 1j])},
         "z holds NaN or infinite values"),
    ],
    ids=["NaN", "overflow", "NaN where no length is measured"],
)  # fmt: skip
def test_a_reply_that_is_not_usable_makes_no_second_release(layout, bad, reason, sums):
    layout = arrays(**layout)
    good = reply(1, layout, "a")
    strategy = made(target_quantile=0.5, clip_norm_lr=0.2)
    got, _ = released(strategy, [good, reply(2, bad, "x")], layout)
    assert got is not None
    assert left_out(strategy) == {"x": reason}
    assert strategy.releases.total() == 1
    assert len(sums) == 1
    # One of the four expected is below, and the two that are missing count as half.
    below = (1 - 0.5) / 4 + 0.5
    assert strategy.clipping_norm == pytest.approx(np.exp(-0.2 * (below - 0.5)))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_model_that_overflows_is_charged_and_left_as_it_was():
    strategy = made(noise_multiplier=1.0, clipping_norm=1e50)
    got, metrics = released(strategy, [])
    assert got is None
    assert strategy.releases.total() == 1
    assert metrics["hospital-epsilon"] == strategy.epsilon > 0
    assert left_out(strategy) == {"all": "in the new model, w holds NaN or infinite values"}


def test_what_was_not_drawn_or_was_released_already_is_not_released():
    strategy = made()
    text = "DPFedAvg has drawn no sites for round 1: call configure_train before each"
    with pytest.raises(InputError, match=f"^{text} aggregate_train$"):
        strategy.aggregate_train(1, [reply(1, {"w": [1.0, 1.0]})])
    assert released(strategy, [])[0] is not None
    with pytest.raises(InputError, match="has drawn no sites for round 1"):
        strategy.aggregate_train(1, [reply(1, {"w": [1.0, 1.0]})])
    with pytest.raises(InputError, match="has drawn no sites for round 2"):
        strategy.aggregate_train(2, [])
    assert strategy.releases.total() == 1


def test_the_metrics_tell_what_was_spent_and_are_in_the_history():
    strategy = made(noise_multiplier=5.0, clipping_norm=0.25, sampling_rate=1)
    run(strategy, site_app(adding), W, rounds=2, sites=2)
    costs = [epsilon_of({Release(1.0, 5.0): n}, 1e-5) for n in (1, 2)]
    rows = {row[0]: {} for row in strategy.history.rows}
    for number, phase, site, metric, value in strategy.history.rows:
        if (phase, site) == ("train", "all"):
            rows[number][metric] = value
    assert rows == {n: {"loss": 0.5, "hospital-epsilon": costs[n - 1], "clipping-norm": 0.25}
                    for n in (1, 2)}  # fmt: skip
    assert strategy.epsilon == costs[1]


def test_the_callers_own_metrics_are_not_changed():
    own = flower.FedAvg().train_metrics_aggr_fn([reply(1, {"w": [1.0]}).content], "num-examples")
    strategy = made(train_metrics_aggr_fn=lambda contents, key: own)
    _, metrics = released(strategy, [reply(1, {"w": [1.0, 1.0]})])
    assert "hospital-epsilon" in metrics
    assert "hospital-epsilon" not in own


def test_noise_as_small_as_none_is_told_as_no_protection():
    strategy = made()
    assert released(strategy, [])[1]["hospital-epsilon"] == np.inf
    with pytest.raises(InputError, match="would cost epsilon inf in all, above target_epsilon=9"):
        made(target_epsilon=9.0)


# --- Budget -------------------------------------------------------------------------------------


def test_the_run_ends_before_the_budget_is_passed_and_keeps_its_model():
    costs = [epsilon_of({Release(1.0, 5.0): n}, 1e-5) for n in range(6)]
    strategy = made(noise_multiplier=5.0, target_epsilon=(costs[3] + costs[4]) / 2)
    result = run(strategy, site_app(adding), W, rounds=9, sites=2)
    assert strategy.epsilon == costs[3]
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]
    assert (result.arrays["w"].numpy() != 0).all()
    assert strategy.history.failures == []
    assert strategy.history.stopped.round == 3
    wanted = f"a further round would cost epsilon {costs[4]:.3f} in all, above target_epsilon="
    assert strategy.history.stopped.reason.startswith(wanted)


def test_a_budget_that_is_met_exactly_is_used():
    cost = epsilon_of({Release(1.0, 5.0): 2}, 1e-5)
    strategy = made(noise_multiplier=5.0, target_epsilon=cost)
    run(strategy, site_app(adding), W, rounds=9, sites=1)
    assert strategy.epsilon == cost


def test_a_budget_for_less_than_one_round_is_refused():
    cost = epsilon_of([Release(1.0, 1.0)], 1e-5)
    text = f"a further round would cost epsilon {cost:.3f} in all, above target_epsilon=1"
    with pytest.raises(InputError, match=f"^{text}$"):
        made(noise_multiplier=1.0, target_epsilon=1)


# --- Resuming -----------------------------------------------------------------------------------

FIVE = Release(1.0, 5.0)


def resumable(folder, resume=False, kind=DPFedAvg, **options):
    options = {"noise_multiplier": 5.0, "fraction_evaluate": 0.0} | options
    return made(kind, run_dir=folder, resume=resume, **options)


def test_a_resumed_run_goes_on_from_what_was_spent(tmp_path):
    run(resumable(tmp_path), site_app(adding), W, rounds=2)
    limit = epsilon_of({FIVE: 3}, 1e-5) * 1.01
    again = resumable(tmp_path, resume=True, target_epsilon=limit)
    run(again, site_app(adding), W, rounds=9)
    assert again.releases == {FIVE: 3}
    assert spent(tmp_path) == {FIVE: 3}
    assert again.history.stopped.round == 3


def divergence_in(folder):
    return json.loads((folder / "privacy.json").read_text())["divergence"]


def test_what_the_arithmetic_costs_adds_up_over_the_rounds_and_a_resume(tmp_path):
    first = resumable(tmp_path)
    run(first, site_app(adding), W, rounds=2)
    assert first.divergence == divergence_in(tmp_path) == pytest.approx(2 * divergence_once())
    again = resumable(tmp_path, resume=True)
    run(again, site_app(adding), W, rounds=3)
    assert again.divergence == divergence_in(tmp_path) == pytest.approx(3 * divergence_once())


def test_the_count_of_unclipped_updates_is_a_release_too(tmp_path):
    run(resumable(tmp_path, target_quantile=0.5), site_app(adding), W, rounds=2)
    assert divergence_in(tmp_path) == pytest.approx(4 * divergence_once())


def test_rounds_of_an_earlier_version_have_no_bound_that_is_known(tmp_path):
    run(resumable(tmp_path), site_app(adding), W, rounds=2)
    path = tmp_path / "privacy.json"
    ledger = json.loads(path.read_text())
    del ledger["divergence"]
    path.write_text(json.dumps(ledger))
    again = resumable(tmp_path, resume=True)
    run(again, site_app(adding), W, rounds=3)
    assert again.releases == {FIVE: 3}
    assert again.divergence is None
    assert divergence_in(tmp_path) is None


def test_what_is_released_lies_on_the_grid_of_its_size(tmp_path):
    strategy = made(noise_multiplier=5.0, clipping_norm=3.0, population_size=1)
    step = step_once(15.0, sum(values.size for values in ZEROS.values()))
    # The model was 0, so what comes back is the change; divided by one hospital.
    noise = noise_of(strategy)
    assert noise.dtype == np.float64
    assert (np.mod(noise, step) == 0).all()
    assert (noise != 0).mean() > 0.9


def test_another_noise_in_the_resumed_run_is_refused(tmp_path):
    run(resumable(tmp_path), site_app(adding), W, rounds=2)
    again = resumable(tmp_path, resume=True, noise_multiplier=8, count_stddev=8)
    with pytest.raises(InputError, match="count_stddev of DPFedAvg was"):
        run(again, site_app(adding), W, rounds=3)


def test_releases_with_another_noise_are_added_and_not_mixed_up(tmp_path):
    run(resumable(tmp_path), site_app(adding), W, rounds=2)
    again = resumable(tmp_path, resume=True, noise_multiplier=8, sampling_rate=np.float32(0.5))
    # As a checkpoint of an earlier version, which did not record the arguments.
    checkpoint = again.folder.load()
    checkpoint.strategy = {}
    again.folder.save(checkpoint)
    run(again, site_app(adding), W, rounds=3)
    assert again.releases == {FIVE: 2, Release(0.5, 8.0): 1} == spent(tmp_path)


def test_the_clipping_norm_is_gone_on_with(tmp_path):
    options = {"target_quantile": 0.5, "clipping_norm": 0.1}
    first = resumable(tmp_path, **options)
    run(first, site_app(adding), W, rounds=3)
    again = resumable(tmp_path, resume=True, **options)
    run(again, site_app(adding), W, rounds=4)
    assert again.result.train_metrics_clientapp[4]["clipping-norm"] == first.clipping_norm != 0.1


def crash_after_release(folder, in_round, resume=False):
    class Crashing(DPFedAvg):
        def aggregate_train(self, server_round, replies):
            made = super().aggregate_train(server_round, replies)
            if server_round == in_round:
                raise KeyboardInterrupt
            return made

    Crashing.__name__ = DPFedAvg.__name__
    with pytest.raises(KeyboardInterrupt):
        run(resumable(folder, resume, kind=Crashing), site_app(adding), W, rounds=5)


def test_a_round_that_was_lost_in_a_crash_stays_charged(tmp_path):
    crash_after_release(tmp_path, 3)
    assert spent(tmp_path) == {FIVE: 3}
    crash_after_release(tmp_path, 3, resume=True)
    assert spent(tmp_path) == {FIVE: 4}
    again = resumable(tmp_path, resume=True)
    run(again, site_app(adding), W, rounds=4)
    assert again.releases == {FIVE: 6} == spent(tmp_path)
    assert again.result.train_metrics_clientapp[4]["hospital-epsilon"] == epsilon_of(
        {FIVE: 6}, 1e-5
    )


def test_a_first_round_that_was_lost_in_a_crash_stays_charged(tmp_path):
    crash_after_release(tmp_path, 1)
    assert not RunFolder(tmp_path).checkpoint_file.exists()
    again = resumable(tmp_path, resume=True)
    run(again, site_app(adding), W, rounds=1)
    assert again.releases == {FIVE: 2} == spent(tmp_path)


def test_an_earlier_checkpoint_does_not_give_back_what_was_spent(tmp_path):
    run(resumable(tmp_path), site_app(adding), W, rounds=1)
    earlier = (tmp_path / "checkpoint.zip").read_bytes()
    run(resumable(tmp_path, resume=True), site_app(adding), W, rounds=4)
    (tmp_path / "checkpoint.zip").write_bytes(earlier)
    again = resumable(tmp_path, resume=True)
    run(again, site_app(adding), W, rounds=2)
    assert again.releases == {FIVE: 5}


def test_a_lost_ledger_does_not_give_back_what_the_checkpoint_knows(tmp_path):
    run(resumable(tmp_path), site_app(adding), W, rounds=2)
    (tmp_path / "privacy.json").unlink()
    again = resumable(tmp_path, resume=True)
    run(again, site_app(adding), W, rounds=3)
    assert again.releases == {FIVE: 3} == spent(tmp_path)


def test_a_fresh_run_does_not_forget_what_was_released_before(tmp_path):
    crash_after_release(tmp_path, 1)
    text = (
        f"{tmp_path / 'privacy.json'} records 1 releases of an earlier run: choose another "
        "folder, or go on with that run, whose releases count (resume)"
    )
    fresh = resumable(tmp_path)
    with pytest.raises(InputError) as error:
        run(fresh, site_app(adding), W, rounds=1)
    assert str(error.value) == text
    assert fresh.releases == {}
    assert spent(tmp_path) == {FIVE: 1}


def test_a_strategy_that_runs_twice_adds_up():
    strategy = made(noise_multiplier=5.0)
    for _ in range(2):
        run(strategy, site_app(adding), W, rounds=2)
    assert strategy.releases == {FIVE: 4}


def test_a_fresh_run_starts_with_the_clipping_norm_that_was_given():
    strategy = made(target_quantile=0.5)
    for _ in range(2):
        run(strategy, site_app(adding), W, rounds=2)
        assert strategy.result.train_metrics_clientapp[1]["clipping-norm"] == 1.0
        assert strategy.clipping_norm != 1.0


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"releases": 3}', '{"releases": [[1.0, 5.0]]}', '{"releases": null}',
     '{"releases": [[1.0, 5.0, -1]]}', '{"releases": [[1.0, 5.0, 0.5]]}', '{"releases": ["abc"]}',
     '{"releases": [[1.0, 5.0, Infinity]]}', '{"releases": [[2.0, 5.0, 1]]}',
     '{"releases": [[1.0, NaN, 1]]}', '{"releases": [["1.0", 5.0, 1]]}', "\udcff",
     '{"releases": [[1.0, 5.0, 1]], "divergence": -1e-9}',
     '{"releases": [[1.0, 5.0, 1]], "divergence": Infinity}',
     '{"releases": [[1.0, 5.0, 1]], "divergence": "much"}'],
)  # fmt: skip
@pytest.mark.parametrize("resume", [True, False])
def test_a_damaged_ledger_is_a_clear_error(tmp_path, text, resume):
    (tmp_path / "privacy.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as error:
        run(resumable(tmp_path, resume=resume), site_app(adding), W, rounds=1)
    assert str(error.value).startswith(
        f"the privacy ledger {tmp_path / 'privacy.json'} cannot be read ("
    )


def test_rounds_without_privacy_are_not_gone_on_from(tmp_path):
    run(FedAvg(run_dir=tmp_path, fraction_evaluate=0.0), site_app(adding), W, rounds=1)
    text = (
        f"{tmp_path} holds a run without differential privacy, whose rounds cannot be accounted "
        "for: resume it with the strategy that it was started with"
    )
    with pytest.raises(InputError) as error:
        run(resumable(tmp_path, resume=True), site_app(adding), W, rounds=2)
    assert str(error.value) == text


def test_what_cannot_be_charged_is_not_released(tmp_path, sums, monkeypatch):
    strategy = resumable(tmp_path)

    def full(self, name, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "write", full)
    with pytest.raises(OSError, match="No space left"):
        released(strategy, [reply(1, {"w": [1.0, 1.0]})])
    assert sums == []


# --- Adaptive clipping --------------------------------------------------------------------------


class Uncounted(DPFedAvg):
    epsilon = 0.0


def following(norms, start, rounds, **options):
    strategy = made(
        Uncounted, clipping_norm=start, population_size=len(norms), target_quantile=0.5, **options
    )
    replies = [reply(n, {"w": [0.0, norm]}, f"s{n}") for n, norm in enumerate(norms)]
    for number in range(1, rounds + 1):
        released(strategy, replies, server_round=number)
    return strategy.clipping_norm


@pytest.mark.parametrize("start", [0.1, 100.0])
@pytest.mark.parametrize("norms", [[10.0] * 9, np.geomspace(1, 100, 9)], ids=["same", "spread"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_clipping_norm_reaches_the_median_length(start, norms, noise):
    got = following(norms, start, 70, noise_multiplier=noise)
    # The neighbours of the middle one are 5.6 and 17.8.
    low, high = (9, 11) if len(set(norms)) == 1 else (5.6, 17.8)
    assert low - 10 * noise < got < high + 30 * noise


def test_the_clipping_norm_moves_by_the_published_rule():
    norms = [0.5, 0.5, 0.5, 2.0]
    assert following(norms, 1.0, 1, clip_norm_lr=0.3) == pytest.approx(np.exp(-0.3 * 0.25))


def test_the_clipping_norm_is_held_within_the_numbers():
    assert following([10.0], 1e-3, 1, clip_norm_lr=1e6) == pytest.approx(1e100)
    assert following([1e-3], 10.0, 1, clip_norm_lr=1e6) == pytest.approx(1e-100)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 50.0), st.floats(0.5001, 100.0))
def test_the_noises_of_sum_and_count_cost_together_what_is_charged(noise, factor):
    strategy = made(noise_multiplier=noise, target_quantile=0.5, count_stddev=factor * noise)
    # Two Gaussian releases of sensitivity 1 compose by their squares; the count has 1/2.
    joint = (strategy.sum_multiplier**-2 + (strategy.count_stddev / 0.5) ** -2) ** -0.5
    assert joint == pytest.approx(noise, rel=1e-9)
    assert strategy._release == Release(1.0, noise)


def test_one_hospital_moves_the_count_by_half_at_most():
    for norm in (0.5, 2.0):
        norms = [following([0.5, 2.0, 2.0], 1.0, 1), following([0.5, 2.0, 2.0, norm], 1.0, 1)]
        counts = [-np.log(c) / 0.2 * n for c, n in zip(norms, (3, 4), strict=True)]
        assert abs(counts[1] - counts[0]) == pytest.approx(0.5)


def test_the_count_has_the_noise_that_is_claimed():
    strategy = made(
        Uncounted, noise_multiplier=1.0, target_quantile=0.5, count_stddev=3.0, clip_norm_lr=1e-6
    )
    logs = [0.0]
    for number in range(1, 401):
        released(strategy, [], server_round=number)
        logs.append(np.log(strategy.clipping_norm))
    counts = np.diff(logs) / -1e-6 * 4
    low, high = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], len(counts))
    assert low < (counts**2).sum() / 9 < high


@pytest.mark.parametrize(("noise", "size"), [(1.0, 4), (0.1, 100), (30.0, 4)])
def test_the_noise_of_the_count_takes_a_tenth_of_the_budget_unless_given(noise, size):
    strategy = made(noise_multiplier=noise, population_size=size, target_quantile=0.5)
    share = (strategy.noise_multiplier / (2 * strategy.count_stddev)) ** 2
    assert share <= 0.1 + 1e-12
    assert strategy.count_stddev >= size / 20


# --- With other strategies ----------------------------------------------------------------------


class DPFedAdam(DPFedAvg, flower.FedAdam):
    pass


def test_a_server_optimiser_moves_the_model_by_the_noisy_mean(tmp_path):
    options = {"eta": 0.1, "beta_1": 0.9, "noise_multiplier": 0.0, "clipping_norm": 1e3,
               "population_size": 2, "fraction_evaluate": 0.0}  # fmt: skip
    theirs = run(FedAdam(eta=0.1, beta_1=0.9, fraction_evaluate=0.0), site_app(adding), W,
                 rounds=4, sites=2)  # fmt: skip
    whole = run(DPFedAdam(**options), site_app(adding), W, rounds=4, sites=2)
    got = whole.arrays["w"].numpy()
    np.testing.assert_allclose(got, theirs.arrays["w"].numpy(), rtol=1e-5)
    run(DPFedAdam(**options, run_dir=tmp_path), site_app(adding), W, rounds=2, sites=2)
    again = DPFedAdam(**options, run_dir=tmp_path, resume=True)
    result = run(again, site_app(adding), W, rounds=4, sites=2)
    assert dump(result.arrays) == dump(whole.arrays)
    assert again.releases == {Release(1.0, 0.0): 4}


def test_a_server_optimiser_moves_by_noise_where_nobody_is(monkeypatch):
    # On a grid the noise of a weight may be 0: here none is.
    generator = np.random.default_rng(1)
    monkeypatch.setattr("fedmed_flower.strategies.private.secure_generator", lambda: generator)
    strategy = one_site(kind=DPFedAdam, eta=0.1)
    assert (strategy.result.arrays["w"].numpy() != 0).all()
    assert strategy.releases == {FIVE: 1}


def test_fedprox_may_be_added():
    class DPFedProx(DPFedAvg, flower.FedProx):
        pass

    grid = FakeGrid([1], silent)
    (sent,) = made(DPFedProx, proximal_mu=0.5).configure_train(1, W, ConfigRecord(), grid)
    assert sent.content["config"]["proximal-mu"] == 0.5


class Foreign(flower.FedAvg):
    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, replies)


class Picky:
    def choose(self, nodes, count, server_round, training):
        return list(nodes)[:1]


class Demanding:
    def needed(self):
        return 3


@pytest.mark.parametrize(
    ("bases", "rule"),
    [
        ((DPFedAvg, FedMedian), "FedMedian (rule)"),
        ((FedMedian, DPFedAvg), "FedMedian (rule)"),
        ((DPFedAvg, Krum), "MultiKrum (rule)"),
        ((DPFedAvg, WeightedFedAvg), "WeightedFedAvg (weigh)"),
        ((DPFedAvg, QFedAvg), "QFedAvg (combine, weigh)"),
        ((DPFedAvg, flower.FedMedian), "FedMedian (aggregate_train)"),
        ((DPFedAvg, flower.Bulyan), "Bulyan (aggregate_train)"),
        ((DPFedAvg, flower.FedXgbBagging), "FedXgbBagging (aggregate_train)"),
        ((DPFedAvg, Foreign), "Foreign (aggregate_train)"),
        ((Foreign, DPFedAvg), "Foreign (aggregate_train)"),
        ((DPFedAvg, Picky), "Picky (choose)"),
        ((Picky, DPFedAvg), "Picky (choose)"),
        ((Demanding, DPFedAvg), "Demanding (needed)"),
    ],
)
def test_what_cannot_be_accounted_for_is_not_mixed_in(bases, rule):
    with pytest.raises(TypeError) as error:
        type("Mixed", bases, {})
    text = str(error.value)
    assert text.startswith("Mixed: the rule of ")
    assert f"{rule} has no bounded sensitivity that is known here" in text
    assert text.endswith("so its privacy cannot be accounted for")


@pytest.mark.parametrize("name", ["combine", "rule", "weigh", "choose", "needed"])
def test_a_subclass_does_not_change_what_the_accounting_rests_on(name):
    text = rf"^Own: the rule of Own \({name}\) has no bounded sensitivity that is known here"
    with pytest.raises(TypeError, match=text):
        type("Own", (DPFedAvg,), {name: lambda self, *args: None})


# --- Arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"noise_multiplier": -1}, "noise_multiplier must be at least 0 and at most 1e+09, got -1"),
        ({"noise_multiplier": np.nan},
         "noise_multiplier must be at least 0 and at most 1e+09, got nan"),
        ({"noise_multiplier": np.inf},
         "noise_multiplier must be at least 0 and at most 1e+09, got inf"),
        ({"clipping_norm": 0}, "clipping_norm must be at least 1e-100 and at most 1e+100, got 0"),
        ({"clipping_norm": np.nan},
         "clipping_norm must be at least 1e-100 and at most 1e+100, got nan"),
        ({"clipping_norm": np.inf},
         "clipping_norm must be at least 1e-100 and at most 1e+100, got inf"),
        ({"population_size": 0}, "population_size must be at least 1 and finite, got 0"),
        ({"population_size": np.inf}, "population_size must be at least 1 and finite, got inf"),
        ({"sampling_rate": 0}, "sampling_rate must be above 0 and at most 1, got 0"),
        ({"sampling_rate": 1.1}, "sampling_rate must be above 0 and at most 1, got 1.1"),
        ({"delta": 0}, "delta must be above 0 and below 1, got 0"),
        ({"delta": 1}, "delta must be above 0 and below 1, got 1"),
        ({"target_epsilon": 0}, "target_epsilon must be above 0, got 0"),
        ({"target_epsilon": np.nan}, "target_epsilon must be above 0, got nan"),
        ({"target_quantile": 0}, "target_quantile must be above 0 and below 1, got 0"),
        ({"target_quantile": 1.0}, "target_quantile must be above 0 and below 1, got 1.0"),
        ({"clip_norm_lr": 0}, "clip_norm_lr must be above 0 and finite, got 0"),
        ({"noise_multiplier": 1, "count_stddev": 0.5},
         "count_stddev must be above half of noise_multiplier and finite, got 0.5"),
        ({"noise_multiplier": 1, "count_stddev": np.inf},
         "count_stddev must be above half of noise_multiplier and finite, got inf"),
        ({"min_replies": 2}, "min_replies must be 1 with differential privacy, got 2"),
        ({"max_weight_share": 0.5},
         "max_weight_share must be None with differential privacy, got 0.5"),
        ({"max_update_norm": 2.0},
         "max_update_norm must be None with differential privacy, got 2.0"),
        ({"fraction_train": 0.5}, "fraction_train must be 1.0 with differential privacy, got 0.5"),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(options, text):
    with pytest.raises(InputError) as error:
        made(**options)
    assert str(error.value) == text


@pytest.mark.parametrize("name", ["noise_multiplier", "clipping_norm", "population_size"])
def test_what_privacy_rests_on_has_no_default(name):
    given = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "population_size": 4}
    del given[name]
    with pytest.raises(TypeError, match=name):
        DPFedAvg(**given)


# --- Whole runs ---------------------------------------------------------------------------------


def test_a_run_in_which_sites_fail_goes_on():
    calls = Counter()

    def answer(message):
        node = message.metadata.dst_node_id
        calls[node] += 1
        if node == 1:
            return None
        if node == 2:
            return error_reply(2, "no disk", to=message)
        if node == 3 and calls[3] == 2:
            return reply(3, {"w": [np.inf, 0.0]}, "c", to=message)
        before = message.content["arrays"]["w"].numpy()
        return reply(node, {"w": before + np.float32([1, 0])}, "abcde"[node - 1], to=message)

    strategy = made(fraction_evaluate=0.0)
    result = strategy.start(FakeGrid([1, 2, 3, 4], answer), W, num_rounds=3)
    # Clipped changes of length 1 over a denominator of 4: two, one and two of them.
    assert result.arrays["w"].numpy().tolist() == [1.25, 0.0]
    assert strategy.releases.total() == 3
    failed = Counter((f.round, f.site) for f in strategy.history.failures)
    assert failed.total() == 7


def test_a_hundred_replies_are_not_added_one_by_one():
    strategy = made(population_size=150)
    replies = [reply(n, {"w": [2.0, 0.0]}, f"s{n:03}") for n in range(150)]
    got, _ = released(strategy, iter(replies))
    assert got["w"].numpy().tolist() == [1.0, 0.0]
