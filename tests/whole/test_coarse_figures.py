import io
import math

import numpy as np
import pytest
from builders import reply
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.metrics import roc_auc_score

from fedmed_flower.cli.tables import print_results
from fedmed_flower.errors import InputError
from fedmed_flower.metrics.auc import EDGES
from fedmed_flower.metrics.classification import class_margins, classification_metrics
from fedmed_flower.metrics.coarse import coarse_sums, coarsened, three_digits
from fedmed_flower.metrics.outcomes import outcome_metrics
from fedmed_flower.metrics.pooling import check_counts, pool
from fedmed_flower.strategies import FedAvg

BINS = len(EDGES) - 1
RATES = {"accuracy", "balanced-accuracy", "sensitivity", "specificity"}


def coarse(labels, logits, patients=None, task=None):
    """Return what a hospital sends that tells coarsely."""
    if task is None:
        return coarsened(classification_metrics(labels, logits, patients, coarse=True))
    return coarsened(outcome_metrics(task, labels, logits, patients, coarse=True))


def bins(record):
    """Return lower end, upper end and count of each bin, by score and class."""
    grid = np.reshape(record["score-grid"], (-1, 3))
    found = {}
    for place, counts in enumerate(np.reshape(record["score-counts"], (-1, BINS))):
        centre, width, _ = grid[place // 2]
        starts = np.flatnonzero(counts >= 0)
        ends = [-math.inf, *(centre + width * EDGES[starts[1:]]), math.inf]
        found[place // 2, place % 2] = list(zip(ends, ends[1:], counts[starts], strict=False))
    return found


# --- What one hospital tells --------------------------------------------------------------------


def drawn(seed, rows, classes, kind, repeats=1, lacking=None):
    """Return labels, logits and patients."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(2, classes), rows)
    if lacking is not None:
        labels[labels == lacking] = 1 - min(lacking, 1)
    logits = {
        "smooth": rng.normal(size=(rows, classes)) * 10.0 ** rng.integers(-3, 3),
        "few": rng.integers(-1, 2, (rows, classes)) / 2,
        "same": np.zeros((rows, classes)),
        "far": 1e4 * rng.normal(size=(rows, classes)),
    }[kind]
    if kind != "same":
        logits[np.arange(rows), labels % classes] += rng.integers(0, 3) * (2 * labels - 1)
    return labels, logits, rng.integers(0, max(1, rows // repeats), rows).tolist()


KINDS = st.sampled_from(["smooth", "few", "same", "far"])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 160),
    classes=st.sampled_from([1, 2, 3, 4]),
    kind=KINDS,
    repeats=st.sampled_from([1, 2, 8]),
)
def test_each_bin_is_of_ten_patients_or_of_all_of_few(seed, rows, classes, kind, repeats):
    labels, logits, patients = drawn(seed, rows, classes, kind, repeats)
    margins, record = class_margins(logits), coarse(labels, logits, patients)
    assert check_counts(record) is None
    for (score, group), found in bins(record).items():
        own = (labels == (1 if margins.shape[1] == 1 else score)) == group
        everybody = {patients[row] for row in np.flatnonzero(own)}
        for low, high, count in found:
            here = np.flatnonzero(own & (margins[:, score] > low) & (margins[:, score] <= high))
            assert len(here) == count
            assert len({patients[row] for row in here}) >= 10 or len(found) == 1
        assert len(found) <= max(1, len(everybody) // 10)


def test_47_patients_with_the_finding_have_at_most_four_bins():
    labels = np.repeat([0, 1], [78, 47])
    logits = np.random.default_rng(0).normal(size=(125, 1)) + 1.5 * labels[:, None] + 4
    found = bins(coarse(labels, logits))
    counts = {group: [int(count) for _, _, count in found[0, group]] for group in (0, 1)}
    assert (len(counts[0]), len(counts[1])) == (7, 4)
    assert min(counts[0] + counts[1]) >= 10
    assert (sum(counts[0]), sum(counts[1])) == (78, 47)


def test_no_score_is_an_end_of_a_bin_and_neither_the_lowest_nor_the_highest_is_told():
    scores = np.random.default_rng(1).normal(size=(400, 1))
    labels = np.arange(400) % 2
    found = bins(coarse(labels, scores))
    # An outlier changes nothing but the rank of one patient.
    scores[np.argmax(scores)] = 1e6
    scores[np.argmin(scores)] = -1e6
    assert bins(coarse(labels, scores)) == found
    ends = {end for each in found.values() for low, high, _ in each for end in (low, high)}
    assert ends.isdisjoint(scores.ravel().tolist())


def sided(*counts):
    """Return labels and logits of patients by true class and side of the threshold."""
    labels = np.repeat([0, 0, 1, 1], counts)
    sides = np.repeat([-1.0, 1.0, -1.0, 1.0], counts)
    return labels, (sides * np.linspace(0.3, 2, len(labels)))[:, None]


@pytest.mark.parametrize(
    ("counts", "told"),
    [((10, 10, 10, 10), True), ((9, 11, 10, 10), False), ((30, 10, 10, 40), True),
     ((30, 10, 9, 40), False), ((30, 0, 10, 40), False)],
)  # fmt: skip
def test_the_confusion_matrix_is_told_where_each_cell_is_of_ten_patients(counts, told):
    labels, logits = sided(*counts)
    found = coarse(labels, logits, task="binary")
    assert ("confusion-counts" in found) == told
    assert (found.keys() >= RATES) == told
    assert (not found.keys() & RATES) == (not told)
    # The threshold ends a bin if and only if it is known otherwise, so that no bins differ by few.
    for group in (0, 1):
        assert any(low == 0.0 for low, _, _ in bins(found)[0, group]) == told
    sums = np.reshape(found["calibration-sums"], (10, 3))
    assert sums[:, 0].tolist()[::5] == ([counts[0] + counts[2], counts[1] + counts[3]] if told
                                        else [sum(counts), 0])  # fmt: skip
    assert np.count_nonzero(sums[:, 0]) == 1 + told
    assert "average-precision" not in found


def test_ten_rows_of_fewer_patients_are_not_told_apart():
    labels, logits = sided(12, 12, 12, 12)
    patients = [*range(12), *[100, 101, *range(102, 109), 108, 108, 108], *range(200, 224)]
    assert "confusion-counts" in coarse(labels, logits)
    assert "confusion-counts" not in coarse(labels, logits, patients)
    with pytest.raises(InputError, match="patients must name one for each of 48 rows, got 47"):
        coarse(labels, logits, patients[1:])


def test_the_auc_of_a_class_of_fewer_than_ten_patients_is_not_told():
    rng = np.random.default_rng(2)
    labels, scores = np.repeat([0, 1], [40, 9]), rng.normal(size=(49, 1))
    found = coarse(labels, scores)
    assert "auc" not in found
    assert found["score-grid"][2] == -1
    assert check_counts(found) is None
    labels[0] = 1
    assert coarse(labels, scores)["auc"] == three_digits(roc_auc_score(labels, scores))


def test_three_classes_have_a_calibration_where_their_confusion_matrix_is_told():
    rng = np.random.default_rng(3)
    labels = np.arange(300) % 3
    logits = rng.normal(size=(300, 3))
    found = coarse(labels, logits, task="multi-class")
    assert sum(found["confusion-counts"]) == found["calibration-sums"][0] == 300
    assert check_counts(found) is None
    logits[np.arange(300), labels] += 9.0
    found = coarse(labels, logits, task="multi-class")
    assert found.keys() == {"num-examples", "auc", "brier", "score-grid", "score-counts"}
    assert check_counts(found) is None


# --- What follows over several hospitals --------------------------------------------------------


def true_auc(labels, logits):
    """Return the mean over the classes; None where one is empty."""
    y, margins = np.concatenate(labels), np.concatenate([class_margins(one) for one in logits])
    wanted = [1] if margins.shape[1] == 1 else range(margins.shape[1])
    if any(not 0 < np.count_nonzero(y == c) < len(y) for c in wanted):
        return None
    pairs = zip(wanted, margins.T, strict=True)
    return float(np.mean([roc_auc_score(y == c, score) for c, score in pairs]))


@settings(max_examples=100, deadline=None)
@given(
    sites=st.lists(
        st.tuples(
            st.integers(0, 10**6),
            st.one_of(st.integers(1, 40), st.integers(60, 200)),
            KINDS,
            st.sampled_from([1, 3]),
            st.sampled_from([None, None, 0, 1, 2]),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    ),
    classes=st.sampled_from([1, 2, 3, 4]),
)
def test_the_true_auc_lies_between_the_bounds(sites, classes):
    parts = [drawn(seed, rows, classes, *rest) for seed, rows, *rest, _ in sites]
    records = [
        coarse(*part) if is_coarse else classification_metrics(*part[:2])
        for part, (*_, is_coarse) in zip(parts, sites, strict=True)
    ]
    assert [check_counts(record) for record in records] == [None] * len(records)
    true = true_auc([labels for labels, _, _ in parts], [logits for _, logits, _ in parts])
    pooled = pool(records)
    assert pooled.get("num-examples") in (None, sum(rows for _, rows, *_ in sites))
    bounded = true is not None and any(is_coarse for *_, is_coarse in sites)
    assert ("auc" in pooled) == (true is not None)
    assert ({"auc-low", "auc-high"} <= pooled.keys()) == bounded
    if bounded:
        assert 0 <= pooled["auc-low"] <= true <= pooled["auc-high"] <= 1
        assert pooled["auc-low"] <= pooled["auc"] <= pooled["auc-high"]


def test_bounds_by_hand():
    # Each hospital has two bins a class, cut between 10 rows at either end.
    logits = np.repeat([-2.0, 2.0, -2.0, 2.0], 10)[:, None]
    near = np.repeat([0, 0, 1, 1], 10)
    record = coarse(near, logits)
    assert [count for each in bins(record).values() for _, _, count in each] == [10, 10, 10, 10]
    pooled = pool([record, record])
    # Within a hospital the AUC is 1/2. Of the pairs of two, a quarter is surely in order, a quarter
    # surely not, and half share a bin.
    assert pooled["auc"] == 0.5
    assert (pooled["auc-low"], pooled["auc-high"]) == (0.374, 0.626)


def test_bounds_allow_for_the_rounding_of_each_auc():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels, logits = np.arange(90) % 3, rng.normal(size=(90, 3))
        pooled = pool([coarse(labels, logits)])
        assert pooled["auc-low"] <= true_auc([labels], [logits]) <= pooled["auc-high"]


def test_rows_that_score_the_same_at_two_hospitals_may_be_in_any_order():
    labels, scores = np.repeat([0, 0, 1, 1], 20), np.tile([0.0, 1.0], 40)[:, None]
    # One bin of the coarse hospital ends, and one of the other begins, at 0.
    ones, zeros = np.ones(1000, dtype=int), np.zeros((1000, 1))
    pooled = pool([coarse(labels, scores), classification_metrics(ones, zeros)])
    assert pooled["auc-low"] <= true_auc([labels, ones], [scores, zeros]) <= pooled["auc-high"]


def test_the_estimate_is_near_and_the_bounds_are_as_wide_as_the_bins():
    rng = np.random.default_rng(4)
    for size, width, error in ((125, 0.33, 0.02), (1000, 0.05, 0.002)):
        labels = [(rng.random(size) < 0.62).astype(int) for _ in range(5)]
        scores = [rng.normal(size=(size, 1)) + 1.8 * y[:, None] for y in labels]
        pooled = pool([coarse(*part) for part in zip(labels, scores, strict=True)])
        assert pooled["auc"] == pytest.approx(true_auc(labels, scores), abs=error)
        assert pooled["auc-high"] - pooled["auc-low"] < width


def test_one_hospital_alone_keeps_its_own_auc():
    labels, logits = sided(30, 20, 20, 30)
    record = coarse(labels, logits)
    pooled = pool([record])
    assert pooled["auc"] == record["auc"]
    assert pooled["auc-high"] - pooled["auc-low"] < 0.0021


def test_what_one_hospital_keeps_back_is_not_told_of_all():
    known, hidden = sided(30, 20, 20, 30), sided(30, 3, 2, 30)
    fine = outcome_metrics("binary", *hidden)
    told, kept = (coarse(*part, task="binary") for part in (known, hidden))
    every = {"num-examples", "auc", "auc-low", "auc-high", "brier", "calibration-error"}
    assert pool([fine, told]).keys() == every | RATES
    assert pool([fine, kept]).keys() == every
    assert pool([fine, fine]).keys() == every - {"auc-low", "auc-high"} | RATES | {
        "average-precision"
    }
    total = np.reshape(fine["confusion-counts"], (2, 2)) + np.reshape(
        told["confusion-counts"], (2, 2)
    )
    assert pool([fine, told])["accuracy"] == pytest.approx(np.trace(total) / total.sum())


def test_groups_have_bounds_and_lack_what_is_kept_back():
    known, hidden = sided(30, 20, 20, 30), sided(30, 3, 2, 30)

    def of_women(record):
        return {"num-examples": 200} | {f"{name}@sex=f": record[name] for name in record}

    records = [
        of_women(outcome_metrics("binary", *known)),
        of_women(coarse(*hidden, task="binary")),
    ]
    assert [check_counts(record) for record in records] == [None, None]
    names = {name.removesuffix("@sex=f") for name in pool(records)}
    assert names == {"num-examples", "auc", "auc-low", "auc-high", "brier", "calibration-error"}


def test_three_classes_without_a_calibration_at_one_hospital_have_none_over_all():
    rng = np.random.default_rng(5)
    labels = np.arange(90) % 3
    logits = rng.normal(size=(90, 3)) + 3 * np.eye(3)[labels]
    fine, kept = (
        outcome_metrics("multi-class", labels, logits),
        coarse(labels, logits, task="multi-class"),
    )
    assert pool([fine, kept]).keys() == {"num-examples", "auc", "auc-low", "auc-high", "brier"}


def test_the_worst_patient_of_all_is_not_told_where_one_hospital_keeps_its_own():
    records = [
        {"num-examples": 5, "dice": 0.8, "dice-worst": 0.2},
        {"num-examples": 9, "dice": 0.7},
    ]
    assert pool(records) == {}
    assert pool([records[0], {"num-examples": 3}]) == {"dice-worst": 0.2}


def test_a_round_gives_the_bounds_and_no_counts():
    records = [coarse(*sided(30, 20, 20, 30)), classification_metrics(*sided(30, 3, 2, 30))]
    replies = [
        reply(node, weight=record.pop("num-examples"), loss=0.5, **record)
        for node, record in enumerate(records, start=1)
    ]
    metrics = FedAvg().aggregate_evaluate(1, replies)
    assert {"loss", "auc", "auc-low", "auc-high", "accuracy", "num-examples"} <= set(metrics)
    assert not {"score-grid", "score-counts", "confusion-counts"} & set(metrics)


HIDDEN = coarse(*sided(30, 3, 2, 30))
KNOWN = coarse(*sided(30, 20, 20, 30))


@pytest.mark.parametrize(
    ("record", "change", "text"),
    [
        (HIDDEN, {"score-grid": None}, "must be lists, and all or none of them sent"),
        (HIDDEN, {"score-grid": 3.0}, "must be lists, and all or none of them sent"),
        (HIDDEN, {"score-grid": []}, "score-grid and score-counts have 0 and 4096 entries"),
        (HIDDEN, {"score-grid": HIDDEN["score-grid"] * 2,
                  "score-counts": HIDDEN["score-counts"] * 2},
         "score-grid and score-counts have 6 and 8192 entries"),
        (HIDDEN, {"num-examples": 64}, "score-counts do not add up to num-examples = 64"),
        (HIDDEN, {"num-examples": None}, "score-counts do not add up to num-examples = None"),
        (HIDDEN, {"score-counts": [-1, *HIDDEN["score-counts"][1:]]},
         "score-counts must begin each histogram with a bin of its own"),
        (HIDDEN, {"score-counts": [float(n) for n in HIDDEN["score-counts"]]},
         "score-counts must be whole numbers of at least 0, or -1 in a bin that is merged"),
        (HIDDEN, {"score-counts": [-2 if n == -1 else n for n in HIDDEN["score-counts"]]},
         "must be lists, and all or none of them sent"),
        (HIDDEN, {"score-grid": [*HIDDEN["score-grid"][:2], -0.5]},
         "score-grid names an AUC outside 0 to 1"),
        (HIDDEN, {"score-grid": [math.nan, *HIDDEN["score-grid"][1:]]},
         "score-grid must be finite, with widths above 0"),
        (KNOWN, {"confusion-counts": [1, 2, 3]}, "which is no square of 2 or more classes"),
        (KNOWN, {"confusion-counts": 4}, "must be lists, and all or none of them sent"),
        (KNOWN, {"confusion-counts": [-1, 0, 0, 101]},
         "confusion-counts must be whole numbers of at least 0"),
        (KNOWN, {"confusion-counts": [1, 2, 3, 4]},
         "confusion-counts do not add up to num-examples = 100"),
        (classification_metrics(*sided(3, 3, 3, 3)), {"confusion-counts": None},
         "must be lists, and all or none of them sent"),
        (classification_metrics(*sided(3, 3, 3, 3)), {"score-grid": [0.0, 1.0, -1.0]},
         "score-grid names an AUC outside 0 to 1"),
    ],
)  # fmt: skip
def test_coarse_counts_that_cannot_be_pooled_are_told(record, change, text):
    assert check_counts(record) is None
    assert text in check_counts(record | change)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    merged=st.sampled_from([0.001, 0.5, 0.999]),
    auc=st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
    width=st.sampled_from([1e-300, 0.01, 1e300]),
)
def test_whatever_passes_the_check_is_pooled_to_figures_that_can_be(seed, merged, auc, width):
    rng = np.random.default_rng(seed)
    counts = np.where(rng.random(2 * BINS) < merged, -1, rng.integers(0, 9, 2 * BINS)).tolist()
    counts[0], counts[1], counts[BINS] = 5, -1, 5
    record = {"score-grid": [0.0, width, auc], "score-counts": counts}
    record["num-examples"] = sum(count for count in counts if count > 0)
    assert check_counts(record) is None
    pooled = pool([record, classification_metrics([0, 1, 1], [[0.0], [1.0], [2.0]]), HIDDEN])
    assert 0 <= pooled["auc-low"] <= pooled["auc"] <= pooled["auc-high"] <= 1


# --- Rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(0.123456, 0.123), (1234.5, 1230.0), (-0.00098765, -0.000988), (0.0, 0.0), (1e-300, 1e-300)],
)
def test_a_number_is_rounded_to_three_significant_digits(value, wanted):
    assert three_digits(value) == wanted


def test_numbers_of_any_client_are_rounded_and_single_patients_left_out():
    found = coarsened(
        {
            "num-examples": 1234.0,
            "patient-epsilon": 1.23456,
            "hospital-epsilon": 2.34567,
            "noised-counts": [1.23456],
            "noised-dice": [2.34567],
            "noised-errors": [1.23456, 2.34567],
            "loss": np.float32(0.123456),
            "hits": 1234,
            "per-class": [0.123456, 0.5],
            "recall@5": 0.98765,
            "auc@sex=f": 0.87654,
            "num-examples@sex=f": 1111,
            "dice-worst": 0.1,
            "worst-loss@sex=f": 9.0,
            "max-error": 3.0,
            "minimum": 0.55555,
        }
    )
    assert found == {
        "num-examples": 1234.0,
        "patient-epsilon": 1.23456,
        "hospital-epsilon": 2.34567,
        "noised-counts": [1.23456],
        "noised-dice": [2.34567],
        "noised-errors": [1.23456, 2.34567],
        "loss": 0.123,
        "hits": 1234,
        "per-class": [0.123, 0.5],
        "recall@5": 0.988,
        "auc@sex=f": 0.877,
        "num-examples@sex=f": 1111,
        "minimum": 0.556,
    }
    assert type(found["loss"]) is float
    assert math.isnan(coarsened({"loss": math.nan})["loss"])


def test_counts_that_are_not_coarse_do_not_leave():
    labels, logits = sided(30, 20, 20, 30)
    fine = outcome_metrics("binary", labels, logits)
    lists = {"confusion-counts", "score-grid", "score-counts", "calibration-sums"}
    assert coarsened(fine).keys() == fine.keys() - lists
    group = {f"{name}@sex=f": value for name, value in fine.items()}
    assert coarsened(group).keys() == group.keys() - {f"{name}@sex=f" for name in lists}


TASKS = {
    "binary": lambda rng: (rng.integers(0, 2, 200), rng.normal(size=(200, 1))),
    "multi-class": lambda rng: (rng.integers(0, 3, 200), rng.normal(size=(200, 3))),
    "continuous": lambda rng: (rng.normal(1e4, 3, 200), rng.normal(1e4, 2, 200)),
    "count": lambda rng: (rng.poisson(3, 200), rng.normal(1, 0.2, 200)),
}


@pytest.mark.parametrize("task", TASKS)
def test_rounding_twice_is_rounding_once_and_what_is_rounded_passes_the_check(task):
    for seed in range(20):
        target, outputs = TASKS[task](np.random.default_rng(seed))
        record = coarse(target, outputs, task=task)
        assert coarsened(record) == record
        assert check_counts(record) is None
        figures = [value for name, value in record.items() if isinstance(value, float)]
        assert figures == [float(f"{value:.3g}") for value in figures]


@pytest.mark.parametrize("task", ["continuous", "count"])
def test_sums_that_are_rounded_give_nearly_the_figures_of_all_rows(task):
    rng = np.random.default_rng(6)
    parts = [TASKS[task](rng) for _ in range(4)]
    if task == "continuous":
        parts = [(y + 2 * k, z + 2 * k) for k, (y, z) in enumerate(parts)]
    whole = outcome_metrics(task, *(np.concatenate(each) for each in zip(*parts, strict=True)))
    pooled = pool([coarse(*part, task=task) for part in parts])
    assert pooled.keys() == whole.keys() - {"target-sums", "count-sums"}
    for name in pooled:
        assert pooled[name] == pytest.approx(whole[name], rel=6e-3, abs=6e-3)


def test_the_mean_of_a_target_is_told_to_a_hundredth_of_its_deviation():
    assert coarse_sums("target-sums", [100.0, 1012.3456, 400.0, 123.456, 78.912]) == pytest.approx(
        [100.0, 1012.34, 400.0, 123.0, 78.9]
    )
    assert coarse_sums("target-sums", [2.0, 1234.5, 0.0, 1.0, 1.0])[1] == 1230.0
    assert coarse_sums("count-sums", [100.0, 1.2345, 40.04, 30.03, 20.02]) == [
        100.0, 1.23, 40.0, 30.0, 20.0]  # fmt: skip


def test_pairs_tell_their_share_in_three_digits():
    found = coarse_sums("concordance-pairs", [7123.0, 12.0, 10456.0])
    assert found == [three_digits(7129 / 10456) * 10500, 0.0, 10500.0]
    assert coarse_sums("concordance-pairs", found) == found
    assert coarse_sums("concordance-pairs", [0.0, 0.0, 0.0]) == [0.0, 0.0, 0.0]
    record = {"num-examples": 9, "concordance-pairs": found}
    assert check_counts(record) is None
    assert pool([record])["c-index"] == pytest.approx(7129 / 10456, abs=5e-4)


def test_no_sum_of_probabilities_is_rounded_above_the_rows():
    sums = [1236.0, 1235.6, 1200.0, *[0.0] * 27]
    assert coarse_sums("calibration-sums", sums)[:3] == [1236.0, 1236.0, 1200.0]
    assert coarse_sums("calibration-sums", [99.0, 12.3456, 7.0, *[0.0] * 27])[:3] == [
        99.0, 12.3, 7.0]  # fmt: skip


# --- What is shown ------------------------------------------------------------------------------


def printed(**bounds):
    site = {"auc": 0.9}
    summary = {
        "sites": {"north": {"train": 10, "test": 5}},
        "test": {"sites": {"north": site}, "federated": {"auc": 0.912} | bounds},
    }
    console = Console(file=io.StringIO(), width=100)
    print_results(console, summary)
    lines = console.file.getvalue().splitlines()
    return [" ".join(line.replace("│", " ").split()) for line in lines]


def test_the_table_of_a_run_shows_the_bounds():
    lines = printed(**{"auc-low": 0.905, "auc-high": 0.919})
    place = lines.index("all test data 0.912")
    assert lines[place + 1 : place + 3] == ["at least 0.905", "at most 0.919"]
    assert not any("at least" in line for line in printed())
