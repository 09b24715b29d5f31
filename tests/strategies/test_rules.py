import functools

import numpy as np
import pytest
import reference
from builders import arrays, dump
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from fedmed_flower.arrays.updates import Updates
from fedmed_flower.strategies import rules


def updates_of(rows, centre=None, dtype=np.float64):
    """Return rows as updates of one entry, around zero where no centre is given."""
    records = [arrays(w=np.asarray(row, dtype)) for row in rows]
    middle = np.zeros(len(rows[0])) if centre is None else centre
    return Updates(records, records[0], arrays(w=np.asarray(middle, dtype)))


def values(record):
    return record["w"].numpy()


def gram_of(rows):
    return updates_of(rows).gram()


@st.composite
def rows(draw, least=1, most=12):
    """Updates around a common direction, some of them far, some of them equal."""
    count = draw(st.integers(least, most))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    made = rng.normal(size=(count, draw(st.integers(1, 6)))) + 1
    far = draw(st.lists(st.integers(0, count - 1), max_size=2))
    made[far] *= draw(st.sampled_from([1.0, 10.0, 1000.0]))
    for a, b in draw(st.lists(st.tuples(*[st.integers(0, count - 1)] * 2), max_size=2)):
        made[a] = made[b]
    return made


# --- Medians and trimmed means ------------------------------------------------------------------


def test_hand_worked_medians_and_trimmed_means():
    three, four = [[1.0], [7.0], [2.0]], [[1.0], [7.0], [2.0], [4.0]]
    assert values(rules.median(updates_of(three))).tolist() == [2.0]
    assert values(rules.median(updates_of(four))).tolist() == [3.0]
    assert values(rules.trimmed_mean(updates_of(four), 0.25)).tolist() == [3.0]
    assert values(rules.trimmed_mean(updates_of(four), 0.24)).tolist() == [3.5]
    assert values(rules.trimmed_mean(updates_of(four), 0.0)).tolist() == [3.5]


@settings(max_examples=50, deadline=None)
@given(rows(), st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.49]))
def test_medians_and_trimmed_means_are_the_slow_versions(made, beta):
    assert values(rules.median(updates_of(made))) == pytest.approx(reference.median(made))
    wanted = reference.trimmed_mean(made, beta)
    assert values(rules.trimmed_mean(updates_of(made), beta)) == pytest.approx(wanted)


# --- Krum and Bulyan ----------------------------------------------------------------------------


def test_hand_worked_krum():
    # Of 0, 1, 3, 9 with f = 1, each has one neighbour: squared distances 1, 1, 4, 36.
    distances = reference.distances(np.array([[9.0], [0.0], [3.0], [1.0]]))
    assert rules.krum_order(distances, 1) == [1, 3, 2, 0]
    # With f = 0 two neighbours: 36 + 64, 1 + 9, 4 + 9, 1 + 4.
    assert rules.krum_order(distances, 0) == [3, 1, 2, 0]


@settings(max_examples=100, deadline=None)
@given(rows(), st.integers(0, 4))
def test_krum_orders_by_the_scores_of_the_paper(made, f):
    assume(len(made) > 1)
    scores = reference.krum_scores(made, f)
    order = rules.krum_order(rules.squared_distances(gram_of(made)), f)
    assert sorted(order) == list(range(len(made)))
    assert scores[order] == pytest.approx(np.sort(scores), abs=1e-9 * (made**2).sum())


def test_krum_of_one_and_of_two_updates():
    assert rules.krum_order(np.zeros((1, 1)), 0) == [0]
    assert rules.krum_order(np.array([[0.0, 4.0], [4.0, 0.0]]), 3) == [0, 1]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 2), st.integers(0, 4))
def test_bulyan_is_the_brute_force_version_of_the_paper(seed, f, more):
    made = np.random.default_rng(seed).normal(size=(4 * f + 3 + more, 5))
    chosen = rules.bulyan_selection(rules.squared_distances(gram_of(made)), f)
    assert chosen == reference.bulyan_chosen(made, f)
    near = len(chosen) - 2 * f
    got = updates_of(made).subset(chosen)
    got = got.order_statistics(0, len(chosen), rules.nearest_to_median(near))
    assert values(got) == pytest.approx(reference.bulyan(made, f))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=12), st.data())
def test_the_values_nearest_the_median_are_found_among_ties_too(column, data):
    count = data.draw(st.integers(1, len(column)))
    ordered = [np.array([float(v)]) for v in sorted(column)]
    before = [v.copy() for v in ordered]
    middle = np.median(column)
    got = rules.nearest_to_median(count)([v.copy() for v in ordered])
    off = np.sort(abs(np.array(column) - middle))[:count]
    # Which of two equally near values counts is free; the window of one choice must explain it.
    windows = [np.sort(column)[at : at + count] for at in range(len(column) - count + 1)]
    fitting = [w.mean() for w in windows if np.allclose(np.sort(abs(w - middle)), off)]
    assert np.isclose(got[0], fitting).any()
    rules.nearest_to_median(count)(ordered)
    assert ordered == before


def test_the_weights_count_among_the_chosen_alone():
    made = updates_of([[1.0], [5.0], [100.0]])
    assert values(rules.mean_of(made, [1, 3, 1000], [0, 1])).tolist() == [4.0]
    assert values(rules.multi_krum(made, [1, 3, 1000], 1, 2)).tolist() == [4.0]
    assert values(rules.multi_krum(made, [1, 3, 1000], 1, 1)).tolist() == [1.0]
    assert values(rules.multi_krum(made, [1, 1, 1], 0, 9)) == pytest.approx([106 / 3])


# --- Geometric median and centred clipping ------------------------------------------------------


def combined(coefficients, made):
    return coefficients @ made


@settings(max_examples=40, deadline=None)
@given(rows(least=3))
def test_the_geometric_median_has_the_least_sum_of_distances(made):
    coefficients = rules.geometric_median(gram_of(made))
    assert coefficients.sum() == pytest.approx(1)
    got = reference.sum_of_distances(made, combined(coefficients, made))
    found = minimize(
        lambda x: reference.sum_of_distances(made, x), np.median(made, 0), method="Nelder-Mead",
        options={"maxiter": 2000, "xatol": 1e-9, "fatol": 1e-12},
    )  # fmt: skip
    best = min(found.fun, *(reference.sum_of_distances(made, row) for row in made))
    # A thousand steps are few where the updates that pull almost balance a pile of equal ones.
    assert got <= best * (1 + 1e-3) + 1e-12 * np.abs(made).max()


def test_hand_worked_geometric_medians():
    # A square's centre; of a majority in one place, that place; of points on a line, the median.
    square = np.array([[0.0, 0], [2, 0], [0, 2], [2, 2]])
    assert combined(rules.geometric_median(gram_of(square)), square) == pytest.approx([1, 1])
    pile = np.array([[3.0, 4], [3, 4], [3, 4], [100, 0], [0, 90]])
    assert combined(rules.geometric_median(gram_of(pile)), pile) == pytest.approx([3, 4])
    line = np.array([[0.0], [1], [5], [6], [1000]])
    assert combined(rules.geometric_median(gram_of(line)), line) == pytest.approx([5], rel=1e-3)


@pytest.mark.parametrize("distance", [1e3, 1e6, 1e9, 1e12, 1e15, 1e18])
@pytest.mark.parametrize("together", [True, False])
def test_far_attackers_move_the_geometric_median_no_more_than_near_ones(distance, together):
    rng = np.random.default_rng(1)
    honest, far = rng.normal(size=(5, 6)), rng.normal(size=(1 if together else 4, 6))
    far = np.resize(far / np.linalg.norm(far, axis=1)[:, None], (4, 6))

    def at(distance):
        made = np.concatenate([far * distance, honest])
        return combined(rules.geometric_median(gram_of(made)), made)

    # From some distance on only the direction of the attackers counts.
    assert at(distance) == pytest.approx(at(1e5), abs=0.02)
    assert np.linalg.norm(at(distance) - honest.mean(axis=0)) < 10


@settings(max_examples=60, deadline=None)
@given(
    rows(), st.sampled_from([None, 0.01, 1.0, 5.0, 1e12, float("inf")]), st.integers(1, 5),
)  # fmt: skip
def test_centred_clipping_is_the_plain_loop(made, tau, steps):
    centre = made[0] * 0.5
    updates = updates_of(made, centre)
    shares = rules.centered_clipping(updates.gram(), tau, steps)
    got = combined(shares, made) + (1 - shares.sum()) * centre
    wanted = reference.centered_clipping(made, centre, tau, steps)
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6 * abs(made).max())


def test_hand_worked_centred_clipping():
    # Around 0 with radius 1: 1, -1, 1, -0.5 of the four; their mean is 0.125.
    made = [[4.0], [-2.0], [9.0], [-0.5]]
    assert rules.centered_clipping(gram_of(made), 1.0, 1) @ np.ravel(made) == pytest.approx(0.125)
    # The median distance is 3: 3, -2, 3, -0.5.
    assert rules.centered_clipping(gram_of(made), None, 1) @ np.ravel(made) == pytest.approx(0.875)


def test_clipping_can_start_elsewhere_and_leaves_the_start_as_it_was():
    made, start = np.array([[4.0], [-2.0], [9.0]]), np.array([1.0, 0.0, 0.0])
    shares = rules.centered_clipping(gram_of(made), 1.0, 1, start)
    # Around 4: 4, 3 and 5.
    assert shares @ made == pytest.approx([4.0])
    assert shares.sum() == pytest.approx(1)
    assert start.tolist() == [1.0, 0.0, 0.0]


# --- Mixing -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000), st.data())
def test_mixing_with_the_nearest_is_the_explicit_computation(count, seed, data):
    f = data.draw(st.integers(0, count - 1))
    made = np.random.default_rng(seed).normal(size=(count, 4))
    mix = rules.nearest_neighbours(rules.squared_distances(gram_of(made)), f)
    assert mix @ made == pytest.approx(reference.nearest_neighbour_mixing(made, f))
    assert (np.diag(mix) > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(2, 25), st.integers(0, 100))
def test_bucketing_is_the_explicit_computation(count, size, seed):
    made = np.random.default_rng(seed).normal(size=(count, 3))
    mix = rules.buckets(count, size, np.random.default_rng(seed))
    order = np.random.default_rng(seed).permutation(count).tolist()
    assert mix @ made == pytest.approx(reference.bucketing(made, size, order))
    assert ((mix > 0).sum(axis=0) == 1).all()
    assert sorted((mix > 0).sum(axis=1))[1:] == [size] * (len(mix) - 1)


@pytest.mark.parametrize("mix", [
    np.array([[0.5, 0.5, 0, 0, 0], [0, 0, 0.5, 0.5, 0], [0, 0, 0, 0, 1]]),
    rules.nearest_neighbours(reference.distances(np.arange(5.0)[:, None] ** 2), 2),
])  # fmt: skip
def test_all_rules_work_on_mixtures_as_on_their_rows(mix):
    made = np.random.default_rng(3).normal(size=(5, 7))
    mixed, plain = updates_of(made).mixed(mix), updates_of(mix @ made)
    weights = [1.0] * len(mix)
    for rule in (
        rules.median,
        lambda u: rules.trimmed_mean(u, 0.34),
        lambda u: rules.multi_krum(u, weights, 0, 2),
        lambda u: u.weighted_sum(rules.geometric_median(u.gram())),
        lambda u: u.subset([2, 0, 1]).order_statistics(0, 3, rules.nearest_to_median(2)),
    ):
        assert values(rule(mixed)) == pytest.approx(values(rule(plain)))


# --- What holds for all of them -----------------------------------------------------------------


def clipped(updates):
    shares = rules.centered_clipping(updates.gram(), None, 3)
    return updates.weighted_sum(shares, rest=1 - shares.sum())


def bulyan(updates, f=1):
    chosen = rules.bulyan_selection(rules.squared_distances(updates.gram()), f)
    near = max(1, len(chosen) - 2 * f)
    return updates.subset(chosen).order_statistics(0, len(chosen), rules.nearest_to_median(near))


def neighbours(updates):
    mix = rules.nearest_neighbours(rules.squared_distances(updates.gram()), 1)
    return rules.median(updates.mixed(mix))


RULES = {
    "median": rules.median,
    "trimmed mean": lambda u: rules.trimmed_mean(u, 0.2),
    "Krum": lambda u: rules.multi_krum(u, [1.0] * u.count, 1, 1),
    "MultiKrum": lambda u: rules.multi_krum(u, [1.0] * u.count, 1, 4),
    "Bulyan": bulyan,
    "geometric median": lambda u: u.weighted_sum(rules.geometric_median(u.gram())),
    "centred clipping": clipped,
    "nearest neighbours": neighbours,
}


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_the_sites_does_not_matter(name):
    # With f = 3, Krum has two neighbours to the end; with one, a pair of updates always ties.
    rule = functools.partial(bulyan, f=3) if name == "Bulyan" else RULES[name]
    rng = np.random.default_rng(7)
    made = rng.normal(size=(15, 20))
    wanted = values(rule(updates_of(made)))
    for _ in range(5):
        assert values(rule(updates_of(rng.permutation(made)))) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_moving_the_model_and_all_updates_moves_the_outcome(name):
    rng = np.random.default_rng(8)
    made, centre, shift = rng.normal(size=(8, 20)), rng.normal(size=20), 100 * rng.normal(size=20)
    wanted = values(RULES[name](updates_of(made, centre))) + shift
    got = values(RULES[name](updates_of(made + shift, centre + shift)))
    assert got == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("count", [3, 4, 9])
@pytest.mark.parametrize("same", ["elsewhere", "at the model"])
def test_of_equal_updates_each_rule_makes_that_update(name, count, same):
    row = np.array([1.5, -2.0, 1e-3, 1e3], np.float32)
    centre = np.zeros(4) if same == "elsewhere" else row
    with np.errstate(all="raise"):
        got = values(RULES[name](updates_of([row] * count, centre, np.float32)))
    assert got == pytest.approx(row, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("Bulyan",)])
def test_of_one_update_each_rule_makes_that_update(name):
    made = updates_of([[1.5, -2.0]])
    rule = rules.median if name == "nearest neighbours" else RULES[name]
    assert values(rule(made)).tolist() == [1.5, -2.0]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("far", [1e6, 1e9, 1e12, 1e15, 1e18])
@pytest.mark.parametrize("place", [0, 3, 8])
def test_one_far_update_does_not_take_the_outcome_with_it(name, far, place):
    made = np.random.default_rng(9).normal(size=(9, 6))
    made[place] = far
    got = values(RULES[name](updates_of(made, dtype=np.float32)))
    honest = np.delete(made, place, axis=0)
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    assert np.linalg.norm(got - honest.mean(axis=0)) < 1.5 * spread


@pytest.mark.parametrize("name", RULES)
def test_integers_take_no_part_in_distances_and_keep_their_dtype(name):
    rng = np.random.default_rng(10)
    made = rng.normal(size=(9, 6))
    records = [arrays(w=row, n=np.array(10 * k, np.int64)) for k, row in enumerate(made)]
    centre = arrays(w=np.zeros(6), n=np.array(0, np.int64))
    got = RULES[name](Updates(records, centre, centre))
    assert values(got).tolist() == values(RULES[name](updates_of(made))).tolist()
    assert got["n"].numpy().dtype == np.int64
    assert got["n"].numpy().shape == ()
    assert 0 <= int(got["n"].numpy()) <= 80


@pytest.mark.parametrize("name", RULES)
def test_the_updates_are_left_as_they_were(name):
    made = np.random.default_rng(11).normal(size=(9, 6))
    records = [arrays(w=row, n=np.array(1)) for row in made]
    before = [dump(record) for record in records]
    RULES[name](Updates(records, records[0], records[0]))
    assert [dump(record) for record in records] == before


# --- Planted attackers --------------------------------------------------------------------------


F, SITES = 2, 11


def flip(honest, rng):
    return -honest[:F]


def other_direction(honest, rng):
    away = rng.normal(size=(F, honest.shape[1]))
    length = np.linalg.norm(honest, axis=1).mean()
    return 5 * length * away / np.linalg.norm(away, axis=1)[:, None]


def planted(attack, ratio, trial):
    """Return the model, and the updates in float32 with the attackers first."""
    rng = np.random.default_rng((trial, int(1 / ratio)))
    model = rng.normal(size=4000).astype(np.float32)
    common = rng.normal(size=4000)
    honest = common + 0.8 * rng.normal(size=(SITES - F, 4000))
    honest *= ratio * np.linalg.norm(model) / np.linalg.norm(honest, axis=1)[:, None]
    updates = np.concatenate([attack(honest, rng), honest])
    return model, (model + updates).astype(np.float32)


HARD = pytest.mark.parametrize("ratio", [1e-3, 1e-4, 3e-5])
ATTACKS = pytest.mark.parametrize("attack", [flip, other_direction])


@HARD
@ATTACKS
def test_krum_multi_krum_and_bulyan_never_select_a_planted_attacker(attack, ratio):
    for trial in range(10):
        model, made = planted(attack, ratio, trial)
        for rows, attackers in ((made, {0, 1}), (made[1:], {0})):
            updates = updates_of(rows, model, np.float32)
            distances = rules.squared_distances(updates.gram())
            assert set(rules.krum_order(distances, F)[-len(attackers) :]) == attackers
        assert 0 not in rules.bulyan_selection(distances, 1)


@HARD
@ATTACKS
def test_a_planted_attacker_is_not_selected_where_no_global_model_is_known(attack, ratio):
    for trial in range(10):
        _, made = planted(attack, ratio, trial)
        records = [arrays(w=row) for row in made]
        distances = rules.squared_distances(Updates(records, records[0]).gram())
        assert set(rules.krum_order(distances, F)[-F:]) == {0, 1}


@HARD
@ATTACKS
@pytest.mark.parametrize("name", ["MultiKrum", "geometric median", "centred clipping"])
def test_the_outcome_stays_with_the_honest_in_each_trial(attack, ratio, name):
    rule = RULES[name]
    if name == "MultiKrum":
        rule = functools.partial(
            rules.multi_krum, weights=[1.0] * SITES, num_malicious=F, num_selected=SITES - F
        )
    for trial in range(10):
        model, made = planted(attack, ratio, trial)
        got = values(rule(updates_of(made, model, np.float32))).astype(float)
        honest, all_sites = made[F:].mean(axis=0, dtype=float), made.mean(axis=0, dtype=float)
        assert np.linalg.norm(got - honest) < 0.5 * np.linalg.norm(all_sites - honest)


@HARD
@ATTACKS
def test_choices_in_float32_are_those_of_exact_arithmetic(attack, ratio):
    for trial in range(5):
        model, made = planted(attack, ratio, trial)
        updates, exact = updates_of(made, model, np.float32), made.astype(float)
        distances = rules.squared_distances(updates.gram())
        assert rules.krum_order(distances, F)[0] == reference.krum(exact, F)
        assert rules.bulyan_selection(distances, F) == reference.bulyan_chosen(exact, F)
        got = values(bulyan(updates, F))
        assert got == pytest.approx(reference.bulyan(exact, F), rel=1e-6, abs=1e-6)


def test_flowers_multi_krum_selects_planted_attackers():
    caught = 0
    for trial in range(10):
        _, made = planted(other_direction, 3e-5, trial)
        contents = [RecordDict({"arrays": arrays(w=row), "m": MetricRecord()}) for row in made]
        attackers = {id(content) for content in contents[:F]}
        selected = select_multikrum(contents, F, SITES - F)
        caught += not attackers & {id(content) for content in selected}
    assert caught < 10
