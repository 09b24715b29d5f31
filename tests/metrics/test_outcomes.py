import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import softmax
from sklearn import metrics as reference
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.classification import classification_metrics
from fedmed_flower.metrics.names import in_groups, is_pooled_only
from fedmed_flower.metrics.outcomes import (
    by_group,
    gaps,
    noised_error_metrics,
    noised_errors,
    outcome_metrics,
)
from fedmed_flower.metrics.pooling import check_counts, pool

# One test in a million fails by chance.
CHANCE = 1e-6
TASKS = ("binary", "multi-class", "continuous", "count")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def drawn(task, count, seed=0):
    """Return targets and outputs that have something to do with them."""
    rng = np.random.default_rng([TASKS.index(task), seed])
    if task == "binary":
        target = rng.integers(0, 2, count)
        return target, rng.normal(size=(count, 1)) + target[:, None]
    if task == "multi-class":
        target = rng.integers(0, 4, count)
        return target, rng.normal(size=(count, 4)) + 1.5 * np.eye(4)[target]
    if task == "continuous":
        outputs = rng.normal(50, 9, size=(count, 1))
        return outputs[:, 0] + rng.normal(0, 4, count), outputs
    rates = rng.normal(1, 0.8, size=(count, 1))
    return rng.poisson(np.exp(rates[:, 0])), rates + 0.1


def parts_of(task, sizes, seed=0):
    """Return all rows, and what each of several hospitals measures."""
    target, outputs = drawn(task, sum(sizes), seed)
    ends = np.cumsum(sizes)[:-1]
    pairs = zip(np.split(target, ends), np.split(outputs, ends), strict=True)
    return target, outputs, [outcome_metrics(task, one, other) for one, other in pairs]


# --- One hospital -------------------------------------------------------------------------------


def test_two_classes_by_hand():
    chances = np.array([0.05, 0.31, 0.39, 0.8, 1.0])
    with np.errstate(divide="ignore"):
        logits = np.clip(np.log(chances / (1 - chances)), -40, 40)
    found = outcome_metrics("binary", [0, 1, 0, 1, 1], logits)
    assert found["brier"] == pytest.approx((0.0025 + 0.4761 + 0.1521 + 0.04) / 5)
    # The two in the bin from 0.3 to 0.4 have 0.70 together, and one of them came true.
    wanted = [[0, 0, 0]] * 10
    wanted[0], wanted[3], wanted[8], wanted[9] = [1, 0.05, 0], [2, 0.7, 1], [1, 0.8, 1], [1, 1, 1]
    assert found["calibration-sums"] == pytest.approx(np.ravel(wanted))
    assert found["calibration-error"] == pytest.approx((0.05 + 0.3 + 0.2 + 0) / 5)
    # Positives are first, second and fourth.
    assert found["average-precision"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert found["auc"] == pytest.approx(5 / 6)


def test_one_output_equals_two_and_a_vector():
    target, outputs = drawn("binary", 60)
    pair = np.concatenate([np.zeros_like(outputs), outputs], axis=1)
    one = outcome_metrics("binary", target, outputs)
    assert one == outcome_metrics("binary", target, pair)
    assert one == outcome_metrics("binary", target, outputs[:, 0])


@pytest.mark.parametrize("task", ["binary", "multi-class"])
def test_classes_equal_scikit_learn(task):
    target, outputs = drawn(task, 300)
    found = outcome_metrics(task, target, outputs)
    assert found.items() >= classification_metrics(target, outputs).items()
    if task == "binary":
        chances = 1 / (1 + np.exp(-outputs[:, 0]))
        precision = reference.average_precision_score(target, outputs)
    else:
        chances = softmax(outputs, axis=1)
        # Of these, one class against the rest ranks as its log-odds do.
        precision = reference.average_precision_score(np.eye(4)[target], chances)
    assert found["average-precision"] == pytest.approx(precision)
    brier = reference.brier_score_loss(target, chances, scale_by_half=task == "binary")
    assert found["brier"] == pytest.approx(brier)


def test_calibration_of_several_classes_is_that_of_the_likeliest():
    # Probabilities 0.5, 0.25, 0.25 (right) and 0.6, 0.2, 0.2 (wrong).
    found = outcome_metrics("multi-class", [0, 1], np.log([[2.0, 1.0, 1.0], [3.0, 1.0, 1.0]]))
    assert found["calibration-error"] == pytest.approx((0.5 + 0.6) / 2)
    assert found["brier"] == pytest.approx((0.25 + 2 * 0.0625 + 0.36 + 0.64 + 0.04) / 2)


def test_numbers_by_hand_and_by_scikit_learn():
    found = outcome_metrics("continuous", [1.0, 2.0, 6.0], [[2.0], [2.0], [4.0]])
    assert found["target-sums"] == [3, 3, 14, 5, 3]
    assert found["r2"] == pytest.approx(1 - 5 / 14)
    assert (found["mae"], found["rmse"]) == (1.0, pytest.approx(math.sqrt(5 / 3)))
    target, outputs = drawn("continuous", 200)
    found = outcome_metrics("continuous", target, outputs)
    assert found["r2"] == pytest.approx(reference.r2_score(target, outputs))
    assert found["mae"] == pytest.approx(reference.mean_absolute_error(target, outputs))
    assert found["rmse"] == pytest.approx(reference.root_mean_squared_error(target, outputs))
    assert found["num-examples"] == 200


def test_counts_by_hand_and_by_scikit_learn():
    found = outcome_metrics("count", [0, 4], [[0.0], [math.log(2)]])
    assert found["mae"] == pytest.approx(1.5)
    # -2 (0 - 1) of the first and 2 (4 log 2 - 2) of the second; of a model of the mean, 8 log 2.
    assert found["deviance"] == pytest.approx((2 + 8 * math.log(2) - 4) / 2)
    assert found["d2"] == pytest.approx(2 / (8 * math.log(2)))
    target, outputs = drawn("count", 200)
    found = outcome_metrics("count", target, outputs)
    rates = np.exp(outputs[:, 0])
    assert found["mae"] == pytest.approx(reference.mean_absolute_error(target, rates))
    assert found["deviance"] == pytest.approx(reference.mean_poisson_deviance(target, rates))
    assert found["d2"] == pytest.approx(reference.d2_tweedie_score(target, rates, power=1))


@pytest.mark.parametrize(
    ("task", "target", "outputs", "missing"),
    [
        ("binary", [1, 1, 1], [[0.5], [-1.0], [2.0]], {"auc", "average-precision"}),
        ("binary", [0], [[0.5]], {"auc", "average-precision"}),
        ("multi-class", [0, 1], np.eye(3)[:2], {"auc", "average-precision"}),
        ("continuous", [7.5], [[7.0]], {"r2"}),
        ("continuous", [0.1] * 3, [[0.1], [0.2], [0.3]], {"r2"}),
        ("continuous", [1e6 + 0.1] * 7, np.ones(7), {"r2"}),
        ("count", [3], [[1.0]], {"d2"}),
        ("count", [0, 0], [[1.0], [-1.0]], {"d2"}),
        ("count", [7, 7, 7], np.full(3, 2.0), {"d2"}),
    ],
)
def test_what_the_rows_leave_undefined_is_left_out(task, target, outputs, missing):
    full = {key for key in outcome_metrics(task, *drawn(task, 40)) if not key.startswith("s")}
    found = outcome_metrics(task, target, outputs)
    assert full - found.keys() == missing
    numbers = np.concatenate([np.ravel(value) for value in found.values()])
    assert np.isfinite(numbers).all()
    assert check_counts(found) is None
    # Two such hospitals have no more of it together.
    pooled = pool([found, found])
    assert not missing & pooled.keys()
    assert all(map(math.isfinite, pooled.values()))


def test_a_deviance_that_rounds_below_zero_is_none():
    found = outcome_metrics("count", [3], [math.log(3) - 6.08e-9])
    assert (found["deviance"], check_counts(found)) == (0.0, None)


def test_a_model_that_has_diverged_gives_finite_figures():
    for task, worst in (("count", 1e4), ("continuous", 3e38), ("binary", 1e30)):
        found = outcome_metrics(task, [0, 1, 1], np.array([worst, -worst, worst]))
        assert all(math.isfinite(v) for v in found.values() if not isinstance(v, list))
        assert check_counts(found) is None
        assert all(map(math.isfinite, pool([found] * 3).values()))


@pytest.mark.parametrize(
    ("task", "target", "outputs", "text"),
    [
        ("rank", [1], [1.0],
         "task must be one of binary, multi-class, continuous, count, got 'rank'"),
        ("count", [1, 2], [1.0],
         "target and outputs must be of the same rows, one or more: they have the shapes (2,) and "
         "(1, 1)"),
        ("count", [], np.empty((0, 1)),
         "target and outputs must be of the same rows, one or more: they have the shapes (0,) and "
         "(0, 1)"),
        ("count", [1], [[1.0, 2.0]], "outputs for the task 'count' must have 1 columns, got 2"),
        ("binary", [1], [[1.0] * 3],
         "outputs for the task 'binary' must have 1 or 2 columns, got 3"),
        ("multi-class", [1], [[1.0]],
         "outputs for the task 'multi-class' must have 2 or more columns, got 1"),
        ("continuous", [1, 2, 3], [1.0, math.nan, math.inf],
         "outputs of 2 of 3 rows are not finite: the model has diverged; a lower learning-rate may "
         "help"),
        ("multi-class", [0, 3], np.eye(3)[:2],
         "target of row 1 must be a class from 0 to 2, got 3"),
        ("binary", [0, 0.5], [1.0, 1.0], "target of row 1 must be a class from 0 to 1, got 0.5"),
        ("count", [1, -1], [1.0, 1.0],
         "target of row 1 must be a whole number of at least 0, got -1"),
        ("continuous", [math.nan], [1.0], "target of row 0 must be a finite number, got nan"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(task, target, outputs, text):
    with pytest.raises(InputError, match=says(text)):
        outcome_metrics(task, target, outputs)


# --- Several hospitals --------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(300,), (40, 1, 159, 100), (2, 2, 296)])
@pytest.mark.parametrize("task", TASKS)
def test_pooled_figures_are_those_of_all_rows(task, sizes):
    target, outputs, records = parts_of(task, sizes)
    whole, pooled = outcome_metrics(task, target, outputs), pool(records)
    assert pooled.keys() == {name for name in whole if not is_pooled_only(name)}
    for name, value in pooled.items():
        ranked = name in ("auc", "average-precision")
        assert value == pytest.approx(whole[name], rel=1e-12, abs=2e-3 if ranked else 1e-12)


def test_pooled_figures_of_large_numbers_keep_their_digits():
    target, outputs, records = parts_of("continuous", (50, 70))
    far = [
        outcome_metrics("continuous", y + 1e6, z + 1e6)
        for y, z in ((target[:50], outputs[:50]), (target[50:], outputs[50:]))
    ]
    assert pool(far)["r2"] == pytest.approx(pool(records)["r2"], rel=1e-8)


def test_hospitals_that_differ_explain_what_none_of_them_does_alone():
    # Within a hospital the target is the same in every row.
    records = [outcome_metrics("continuous", [v, v], [[v], [v + 1]]) for v in (1.0, 4.0)]
    assert pool(records)["r2"] == pytest.approx(1 - 2 / 9)
    records = [outcome_metrics("count", [v], [[math.log(2)]]) for v in (1, 3)]
    assert pool(records)["d2"] == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sites=st.integers(2, 6),
    shape=st.sampled_from(["normal", "heavy", "skewed", "few values"]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    separation=st.floats(0, 3),
    size=st.sampled_from([(150, 400), (500, 1200)]),
)
def test_pooled_average_precision_is_right_to_two_thousandths(
    seed, sites, shape, scale, separation, size
):
    rng = np.random.default_rng(seed)
    records, labels, scores = [], [], []
    for _ in range(sites):
        count = int(rng.integers(*size))
        y = (rng.random(count) < rng.uniform(0.3, 0.7)).astype(int)
        # One of these at a table of some categories, with the same scores at every hospital.
        noise = {
            "normal": rng.normal(size=count),
            "heavy": rng.standard_t(3, size=count),
            "skewed": rng.exponential(size=count) ** 2,
            "few values": rng.integers(0, 6, count) + y * (rng.random(count) < separation / 4),
        }[shape]
        shift = 0 if shape == "few values" else separation * y + rng.normal() / 2
        labels.append(y)
        scores.append(scale * (noise + shift))
        records.append(outcome_metrics("binary", y, scores[-1]))
    exact = reference.average_precision_score(np.concatenate(labels), np.concatenate(scores))
    # Histograms do not tell which of two rows at the top comes first if their bins overlap. Each
    # such pair is half of one over the number of rows with the class.
    bound = max(2e-3, 1 / np.concatenate(labels).sum())
    assert pool(records)["average-precision"] == pytest.approx(exact, abs=bound)


def test_average_precision_of_hospitals_with_one_class_each():
    records = [outcome_metrics("binary", [0, 0], [-1.0, 0.5]),
               outcome_metrics("binary", [1, 1], [0.0, 2.0])]  # fmt: skip
    assert "average-precision" not in records[0].keys() | records[1].keys()
    # First and third.
    assert pool(records)["average-precision"] == pytest.approx((1 + 2 / 3) / 2, abs=2e-3)


@pytest.mark.parametrize("task", ["binary", "multi-class"])
def test_average_precision_of_one_hospital_is_its_own(task):
    record = outcome_metrics(task, *drawn(task, 300))
    for records in ([record], [record, {"num-examples": 5, "loss": 1.0}]):
        assert pool(records)["average-precision"] == record["average-precision"]


def test_images_have_the_figures_that_they_had():
    target, outputs = drawn("binary", 50)
    assert "average-precision" not in pool([classification_metrics(target, outputs)])


def test_pairs_add_up_to_a_concordance_index_and_scores_to_their_mean():
    records = [
        {"num-examples": 10, "concordance-pairs": [6.0, 2.0, 10.0], "integrated-brier": 0.1},
        {"num-examples": 1, "loss": 2.0},
        {"num-examples": 30, "concordance-pairs": [1.0, 0.0, 6.0], "integrated-brier": 0.3},
    ]
    assert pool(records) == pytest.approx(
        {"num-examples": 41, "c-index": 8 / 16, "integrated-brier": 0.25}
    )
    assert pool([{"num-examples": 2, "concordance-pairs": [0.0, 0.0, 0.0]}]) == {}


def test_a_hospital_without_sums_takes_no_part_in_the_figure():
    _, _, records = parts_of("continuous", (30, 20))
    missing = {"num-examples": 9, "loss": 1.0}
    pooled = pool([missing, *records])
    assert pooled == pool(records) | {"num-examples": 59}


def test_some_hospitals_with_noise_and_others_without_give_no_figures():
    _, _, (plain,) = parts_of("continuous", (30,))
    noised = {"num-examples": 9, "mae": 1.0, "noised-errors": [9.0, 9.0]}
    assert pool([plain, noised]) == pool([noised, plain]) == {}


def test_hospitals_with_another_number_of_classes_give_no_pooled_figures_of_classes():
    records = [parts_of(task, (30,))[2][0] for task in ("binary", "multi-class")]
    assert pool(records).keys() == {"num-examples", "brier", "calibration-error"}


BINS = [2.0, 0.5, 1.0, *[0.0] * 27]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("calibration-sums", BINS[:29], "calibration-sums must be a list of 30 finite numbers"),
        ("calibration-sums", 3.0, "calibration-sums must be a list of 30 finite numbers"),
        ("calibration-sums", [2.0, -0.5, *BINS[2:]],
         "calibration-sums must hold no number below 0"),
        ("calibration-sums", [2.0, 2.1, *BINS[2:]],
         "calibration-sums must hold no sum above the number of rows of its bin"),
        ("calibration-sums", [3.0, *BINS[1:]], "calibration-sums is not of num-examples = 2 rows"),
        ("target-sums", [2.0, 1.0, 1.0, 1.0], "target-sums must be a list of 5 finite numbers"),
        ("target-sums", [2.0, 1.0, math.nan, 1.0, 1.0],
         "target-sums must be a list of 5 finite numbers"),
        ("target-sums", [2.0, 1e200, 1.0, 1.0, 1.0],
         "target-sums must be a list of 5 finite numbers"),
        ("target-sums", [2.0, 1.0, -1.0, 1.0, 1.0], "target-sums must hold no number below 0"),
        ("target-sums", [3.0, 1.0, 1.0, 1.0, 1.0], "target-sums is not of num-examples = 2 rows"),
        ("count-sums", [2.0, -1.0, 1.0, 1.0, 1.0], "count-sums must hold no number below 0"),
        ("count-sums", [0.0, 1.0, 1.0, 1.0, 1.0], "count-sums is not of num-examples = 2 rows"),
        ("concordance-pairs", [1.0, 2.0], "concordance-pairs must be a list of 3 finite numbers"),
        ("concordance-pairs", [1.0, math.inf, 2.0],
         "concordance-pairs must be a list of 3 finite numbers"),
        ("concordance-pairs", [-1.0, 0.0, 2.0], "concordance-pairs must hold no number below 0"),
        ("concordance-pairs", [2.0, 1.0, 2.0],
         "concordance-pairs must not count more pairs than can be compared"),
        ("noised-errors", [1.0], "noised-errors must be a list of 2 finite numbers"),
        ("noised-errors", [math.nan, 1.0], "noised-errors must be a list of 2 finite numbers"),
    ],
)  # fmt: skip
def test_sums_that_cannot_be_pooled_are_told(key, value, text):
    assert check_counts({"num-examples": 2, key: value}) == text
    group = {"num-examples": 9, "num-examples@sex=1": 2, f"{key}@sex=1": value}
    assert check_counts(group) == f"{text}, in @sex=1"


def test_sound_sums_pass():
    sound = {
        "num-examples": 2,
        "calibration-sums": [2.0, 2.0 + 1e-12, 1.0, *BINS[3:]],
        "target-sums": [2.0, -5.0, 1.0, 1.0, 1.0],
        "count-sums": [2.0, 5.0, 1.0, 1.0, 1.0],
        "concordance-pairs": [0.0, 0.0, 0.0],
        "noised-errors": [-1.0, -2.0],
        "recall@5": 0.5,
    }
    assert check_counts(sound) is None
    for task in TASKS:
        for size in (1, 2, 60):
            assert check_counts(outcome_metrics(task, *drawn(task, size))) is None


@pytest.mark.parametrize("value", [10, -1, math.nan, [1.0]])
def test_a_group_has_no_more_rows_than_there_are(value):
    text = "num-examples@sex=1 must be a number from 0 to num-examples = 9"
    assert check_counts({"num-examples": 9, "num-examples@sex=1": value}) == text
    assert check_counts({"num-examples": 9, "num-examples@sex=1": 9}) is None


# --- Groups -------------------------------------------------------------------------------------


def people(**counts):
    """Return rows of one patient each, so many of each value of ``sex``; ``none`` has no value."""
    values = [value for value, count in counts.items() for _ in range(count)]
    return [
        {"patient": number, "sex": None if value == "none" else value, "age": 3.0}
        for number, value in enumerate(values)
    ]


def sizes(rows, minimum=10, columns=("sex",)):
    return by_group(rows, columns, minimum, lambda places: {"rows": len(places)})


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"a": 10, "b": 11}, {"a": 10, "b": 11}),
        # The nine alone would be all less the others: so the next smallest goes with them.
        ({"a": 9, "b": 11, "c": 12}, {"c": 12}),
        ({"a": 9, "b": 30}, {}),
        # Those two are more than nine together.
        ({"a": 5, "b": 5, "c": 12}, {"c": 12}),
        ({"a": 4, "b": 5, "c": 12, "d": 13}, {"d": 13}),
        # Who has no value is a group like others.
        ({"none": 3, "b": 11, "c": 12}, {"c": 12}),
        ({"none": 10, "b": 11, "c": 12}, {"b": 11, "c": 12}),
        ({"none": 6, "a": 4, "c": 12}, {"c": 12}),
        ({"none": 20}, {}),
        ({"b": 11, "c": 11, "a": 1}, {"b": 11}),
    ],
)
def test_no_group_of_fewer_than_the_minimum_can_be_told(counts, told):
    found = sizes(people(**counts))
    assert found == {
        f"{name}@sex={value}": count
        for value, count in told.items()
        for name in ("num-examples", "rows")
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=6), st.integers(1, 12))
def test_what_is_hidden_is_never_few(counts, minimum):
    rows = people(**{f"v{number}": count for number, count in enumerate(counts)})
    found = sizes(rows, minimum)
    told = [count for name, count in found.items() if name.startswith("rows@")]
    assert all(count >= minimum for count in told)
    assert not told or sum(counts) - sum(told) not in range(1, minimum)


def test_patients_count_and_not_their_visits():
    rows = people(a=12, b=12)
    visits = [{"patient": number % 3, "sex": "c"} for number in range(30)]
    assert sizes(rows + visits).keys() == {"num-examples@sex=a", "rows@sex=a"}
    rows += [{"patient": f"p{number}", "sex": "c"} for number in range(10)] * 2
    assert sizes(rows)["num-examples@sex=c"] == 20


def test_a_group_is_measured_on_its_rows():
    rows = [
        {"patient": number, "sex": "fm"[number % 2], "age-band": band}
        for number, band in enumerate(["<50", "50-65", ">=65"] * 8)
    ]
    target, outputs = drawn("binary", 24)

    def measure(places):
        return outcome_metrics("binary", target[places], outputs[places])

    found = by_group(rows, ["sex", "age-band"], 8, measure)
    assert {name.partition("@")[2] for name in found} == {
        "sex=f", "sex=m", "age-band=<50", "age-band=50-65", "age-band=>=65"
    }  # fmt: skip
    wanted = measure([*range(2, 24, 3)])
    for name, value in wanted.items():
        assert found[f"{name}@age-band=>=65"] == value
    assert check_counts({"num-examples": 24} | found) is None


def test_no_rows_have_no_groups():
    assert by_group([], ["sex"], 10, lambda places: {}) == {}


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("sexx",
         "the rows have no column 'sexx': groups can be made of sex, smoker; did you mean "
         "sex?"),
        ("zip", "the rows have no column 'zip': groups can be made of sex, smoker"),
        ("age",
         "the column 'age' holds 3.0, which is no text: groups are made of categories, or "
         "of the bands into which the schema cuts a number"),
    ],
)  # fmt: skip
def test_a_column_that_tells_nothing_apart_is_refused(column, text):
    rows = [{"patient": "p", "sex": "f", "smoker": None, "age": 3.0}]
    with pytest.raises(InputError, match=says(text)):
        sizes(rows, columns=["sex", column])


def test_pooled_figures_of_groups_are_those_of_their_rows():
    target, outputs = drawn("binary", 300)
    rows = [{"patient": n, "sex": "fm"[n % 3 == 0]} for n in range(300)]
    # The last has too few men to tell of.
    parts = [[*range(150)], [*range(150, 280)], [*range(281, 300, 3), *range(282, 284)]]
    records = []
    for part in parts:

        def measure(places, part=part):
            chosen = np.array(part)[places]
            return outcome_metrics("binary", target[chosen], outputs[chosen]) | {"loss": 1.0}

        groups = by_group([rows[place] for place in part], ["sex"], 1, measure)
        few = {name: v for name, v in groups.items() if part is parts[2] and name.endswith("=m")}
        rest = {name: v for name, v in groups.items() if name not in few}
        records.append(measure([*range(len(part))]) | rest)
    pooled = pool(records)
    for sex, kept in (("f", parts[0] + parts[1] + parts[2]), ("m", parts[0] + parts[1])):
        places = [place for place in kept if rows[place]["sex"] == sex]
        whole = outcome_metrics("binary", target[places], outputs[places]) | {"loss": 1.0}
        for name in [name for name in whole if not is_pooled_only(name)]:
            close = 2e-3 if name in ("auc", "average-precision") else 1e-12
            assert pooled[f"{name}@sex={sex}"] == pytest.approx(whole[name], abs=close)
    assert not [name for name in pooled if is_pooled_only(name)]
    assert "loss" not in pooled


def test_what_is_no_figure_is_known_by_its_name_with_and_without_a_group():
    known = ("score-grid", "calibration-sums@sex=1", "target-sums", "noised-errors@a=b@c=d")
    assert all(map(is_pooled_only, known))
    assert not any(map(is_pooled_only, ("auc@sex=1", "loss", "recall@5", "num-examples@sex=1")))


def test_a_name_with_an_at_sign_is_no_group_unless_it_names_a_value():
    parts = in_groups({"recall@5": 0.5, "auc@a=b@c=d": 0.25, "loss": 2.0})
    assert parts == {"": {"recall@5": 0.5, "loss": 2.0}, "@a=b@c=d": {"auc": 0.25}}


def test_gaps_lie_between_the_best_and_the_worst_group():
    metrics = {
        "auc": 0.1, "auc@sex=0": 0.8, "auc@sex=1": 0.75, "num-examples@sex=0": 12,
        "num-examples@sex=1": 40, "auc@age-band=>=65": 0.9, "auc@age-band=<50": 0.5,
        "auc@age-band=50-65": 0.6, "mae@age-band=<50": 3.0, "recall@5": 0.5,
        "score-counts@sex=0": [1], "score-counts@sex=1": [1], "loss@sex=0": 0.5,
        "loss@sex=1": math.nan,
    }  # fmt: skip
    assert gaps(metrics) == pytest.approx({"auc@sex": 0.05, "auc@age-band": 0.4})
    assert gaps({"auc": 0.5}) == {}


# --- Privacy ------------------------------------------------------------------------------------


def test_errors_without_noise_by_hand():
    # Patient a is off by 1 and 20, which counts as 10; b by 2.
    sums = noised_errors("continuous", [1, 1, 5], [2.0, 21.0, 3.0], (0, 10), ["a", "a", "b"], 0.0)
    assert sums == pytest.approx([2, 5.5 + 2])
    assert noised_error_metrics(sums) == pytest.approx({"num-examples": 2, "mae": 3.75})
    sums = noised_errors("count", [3, 0], [[math.log(2)], [1e9]], (0, 7), ["a", "b"], 0.0)
    assert sums == pytest.approx([2, 1 + 7])


NUMBER = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["continuous", "count"]),
    st.lists(st.tuples(st.sampled_from("abc"), NUMBER, NUMBER), min_size=1, max_size=9),
    st.sampled_from([(0.0, 1.0), (-3.0, 90.0), (1e-3, 2e-3)]),
)
def test_a_patient_changes_the_sums_by_no_more_than_is_claimed(task, rows, limits):
    def sums(rows):
        patients, target, outputs = zip(*rows, strict=True)
        return np.array(noised_errors(task, target, outputs, limits, patients, 0.0))

    rest = [row for row in rows if row[0] != rows[0][0]]
    change = sums(rows) - (sums(rest) if rest else 0)
    change[1] /= limits[1] - limits[0]
    assert np.linalg.norm(change) <= math.sqrt(2) + 1e-9


def test_a_patient_who_is_all_wrong_changes_the_sums_by_all_that_is_claimed():
    sums = noised_errors("continuous", [0.0, 0.0], [99.0, -99.0], (2, 6), ["a", "a"], 0.0)
    assert sums == [1, 4]


def test_the_sums_have_the_noise_that_is_claimed():
    arguments = ("continuous", [1.0, 2.0], [1.5, 2.0], (0.0, 40.0), ["a", "b"])
    exact = np.array(noised_errors(*arguments, 0.0))
    found = np.array([noised_errors(*arguments, 2.5) for _ in range(500)]) - exact
    found /= 2.5 * math.sqrt(2) * np.array([1.0, 40.0])
    for column in found.T:
        low, high = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], column.size)
        assert low < (column**2).sum() < high
        assert stats.kstest(column, "norm").pvalue > CHANCE


def test_noised_errors_of_several_hospitals_add_up():
    target, outputs = drawn("continuous", 40)
    patients = [*range(40)]

    def sums(part):
        return noised_errors(
            "continuous", target[part], outputs[part], (0, 90), patients[part], 0.0
        )

    records = [{"noised-errors": sums(part)} for part in (slice(0, 15), slice(15, 40))]
    assert pool(records) == pytest.approx(noised_error_metrics(sums(slice(0, 40))))
    mae = outcome_metrics("continuous", target, outputs)["mae"]
    assert pool(records) == pytest.approx({"num-examples": 40, "mae": mae})


def test_noise_that_drowns_everything_gives_no_figures_that_cannot_be():
    for count, total in np.random.default_rng(0).normal(size=(50, 2)) * 50:
        found = noised_error_metrics([count, total])
        assert min(found.values()) >= 0
        assert ("mae" in found) == (found["num-examples"] > 0)
    assert noised_error_metrics([0.49, 3.0]) == {"num-examples": 0.0}


@pytest.mark.parametrize(
    ("task", "limits", "text"),
    [
        ("binary", (0, 1), "task must be one of continuous, count, got 'binary'"),
        ("count", (5, 5), "limits must be two finite numbers, the lower first, got 5, 5"),
        ("count", (0, math.inf), "limits must be two finite numbers, the lower first, got 0, inf"),
        ("count", (math.nan, 1), "limits must be two finite numbers, the lower first, got nan, 1"),
    ],
)
def test_errors_without_a_range_are_refused(task, limits, text):
    with pytest.raises(InputError, match=says(text)):
        noised_errors(task, [1], [1.0], limits, ["a"], 0.0)


def test_a_missing_text_that_a_data_frame_has_written_is_no_group():
    rows = [{"patient": n, "sex": "f" if n % 2 else float("nan")} for n in range(40)]
    found = by_group(rows, ["sex"], 10, lambda places: {"n": len(places)})
    assert found == {"num-examples@sex=f": 20, "n@sex=f": 20}
