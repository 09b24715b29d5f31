"""Figures as sums: the total of several hospitals gives the metrics of all their rows."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.classification import classification_metrics, noised_counts
from fedmed_flower.metrics.names import COUNTS, GRID, NOISED
from fedmed_flower.metrics.outcomes import outcome_metrics
from fedmed_flower.metrics.pooling import check_counts, pool
from fedmed_flower.metrics.summing import (
    FIRST_GRID,
    SUM_BINS,
    edges_of,
    finer_grids,
    is_whole,
    partial_metrics,
    rebinned,
    record_of_sums,
    sums_of_record,
)


def total(records, grids=()):
    """Return the sums over hospitals."""
    sums = [sums_of_record(record, grids) for record in records]
    names = {name for each in sums for name in each}
    return {name: sum(each[name] for each in sums if name in each) for name in names}


def resolved(records):
    """Return the record of the total on grids that resolve the scores, and how many were tried."""
    grids = ()
    tried = 1
    while (finer := finer_grids(sums := total(records, grids), grids)) is not None:
        grids = finer
        tried += 1
        assert tried < 10
    return record_of_sums(sums, grids), tried


def scores(mean, deviation, shift, prevalence, step=0.0, rows=300, hospitals=5, seed=1):
    """Return classes and log odds of each hospital; of a class they are `shift` higher."""
    rng = np.random.default_rng(seed)
    for number in range(hospitals):
        truth = (rng.random(rows) < prevalence).astype(int)
        yield truth, rng.normal(mean + step * number, deviation, rows) + shift * truth


@pytest.mark.parametrize(
    ("given", "tried"),
    [
        ((-1, 2, 2, 0.3, 0.2), 1),
        ((-4, 0.5, 0.5, 0.1, 0.1), 2),
        ((-4, 0.05, 0.05, 0.1, 0.01), 2),
        ((-3, 0.01, 0.01, 0.3, 0.002), 2),
        # Scores within one bin of the first grid.
        ((-3, 0.001, 0.001, 0.3, 0.0002), 3),
        # Some are beyond the ends of the first grid.
        ((0, 40, 40, 0.3, 3), 2),
        ((-1, 1, 1, 0.3, 3), 1),
    ],
)
def test_scores_of_any_width_give_the_metrics_of_all_rows(given, tried):
    hospitals = [*scores(*given)]
    record, needed = resolved([outcome_metrics("binary", *each) for each in hospitals])
    assert needed <= tried
    assert check_counts(record) is None
    pooled = pool([record])
    truth, odds = (np.concatenate(part) for part in zip(*hospitals, strict=True))
    assert pooled["auc"] == pytest.approx(roc_auc_score(truth, odds), abs=2e-4)
    assert pooled["average-precision"] == pytest.approx(
        average_precision_score(truth, odds), abs=3e-3
    )
    brier = np.mean((1 / (1 + np.exp(-odds)) - truth) ** 2)
    assert pooled["brier"] == pytest.approx(brier, abs=1e-12)


def test_pairs_of_one_hospital_are_counted_exactly():
    # One pair a hospital, in one bin of the first grid; the hospitals are far apart.
    hospitals = [(np.array([0, 1]), np.array([at, at + 1e-9])) for at in (-40.0, 0.0, 40.0)]
    sums = total([outcome_metrics("binary", *each) for each in hospitals])
    exact = roc_auc_score(*(np.concatenate(part) for part in zip(*hospitals, strict=True)))
    assert pool([record_of_sums(sums)])["auc"] == pytest.approx(exact, abs=1e-12)


def test_three_classes_and_means_of_metrics_of_the_app():
    rng = np.random.default_rng(2)
    hospitals = [(rng.integers(0, 3, rows), rng.normal(size=(rows, 3))) for rows in (40, 70, 90)]
    records = [
        classification_metrics(*each) | {"loss": number + 0.5, "weights": [1.0, number]}
        for number, each in enumerate(hospitals)
    ]
    record, _ = resolved(records)
    pooled = pool(records)
    assert {name: pool([record])[name] for name in pooled} == pytest.approx(pooled, abs=1e-3)
    assert record["loss"] == pytest.approx((0.5 * 40 + 1.5 * 70 + 2.5 * 90) / 200, abs=1e-12)
    assert record["weights"] == pytest.approx([1.0, (70 + 2 * 90) / 200], abs=1e-12)


@pytest.mark.parametrize(
    ("task", "scale"),
    [*(("continuous", scale) for scale in (1e-6, 1.0, 1e5)), ("count", 1), ("count", 1e5)],
)
def test_numbers_and_counts_give_the_metrics_of_all_rows(task, scale):
    rng = np.random.default_rng(3)
    records = []
    for rows, mean in ((30, 2.0), (50, 5.0), (20, 9.0)):
        target = rng.poisson(mean, rows) * scale
        guess = target + rng.normal(0, scale, rows)
        if task == "count":
            guess = np.log(np.maximum(guess, scale / 2))
        records.append(outcome_metrics(task, target, guess))
    pooled = pool(records)
    assert {"mae"} < pooled.keys()
    assert pool([record_of_sums(total(records))]) == pytest.approx(pooled, rel=1e-9)


def test_a_target_that_never_varies_has_no_share_explained():
    records = [outcome_metrics("continuous", [1e5 / 3] * rows, [0.0] * rows) for rows in (9, 4)]
    pooled = pool([record_of_sums(total(records))])
    assert pooled.keys() == {"num-examples", "mae", "rmse"}


def test_noised_counts_add_up_with_their_noise():
    rng = np.random.default_rng(4)
    records = []
    for _ in range(4):
        counts = noised_counts(rng.integers(0, 2, 50), rng.normal(size=(50, 1)), range(50), 1.0)
        records.append({"num-examples": 50.0, NOISED: counts, "accuracy": 0.5, "auc": 0.5})
    sums = total(records)
    assert sums.keys() == {"sum/num-examples", f"sum/{NOISED}"}
    assert pool([record_of_sums(sums)]) == pytest.approx(pool(records), abs=1e-9)


def test_what_is_no_sum_is_not_sent():
    record = {
        "num-examples": 4,
        "dice": 0.5,
        "dice-worst": 0.1,
        "lowest-auc": 0.2,
        "loss": math.nan,
    }
    assert sums_of_record(record).keys() == {"sum/num-examples", "sum/dice", "rows/dice"}


@pytest.mark.parametrize("record", [{"num-examples": 3}, {"num-examples": 0, "loss": 1.0}, {}])
def test_a_hospital_with_too_few_patients_sends_nothing(record):
    assert sums_of_record(record) == {}


def test_groups_have_rows_of_their_own_and_those_without_rows_have_no_metrics():
    first = {"num-examples": 9, "loss": 1.0, "num-examples@sex=f": 5, "loss@sex=f": 2.0}
    second = {"num-examples": 6, "loss": 3.0, "num-examples@sex=f": 3}
    sums = total([first, second]) | {"sum/num-examples@sex=m": np.zeros(1, int)}
    assert record_of_sums(sums) == {
        "num-examples": 15,
        "loss": pytest.approx(27 / 15),
        "num-examples@sex=f": 5,
        "loss@sex=f": 2.0,
        "num-examples@sex=m": 0,
    }


def test_a_metric_that_some_hospitals_lack_is_the_mean_of_the_others():
    sums = total([{"num-examples": 10, "loss": 1.0, "f1": 0.4}, {"num-examples": 30, "loss": 2.0}])
    assert record_of_sums(sums) == {"num-examples": 40, "loss": 1.75, "f1": 0.4}
    assert partial_metrics(sums) == {"f1": 10}


def test_whole_numbers_are_known_by_name():
    record = classification_metrics([0, 1, 1], [[-1.0], [0.5], [2.0]]) | {"loss": 0.5}
    whole = {name for name in sums_of_record(record) if is_whole(name)}
    assert whole == {"sum/num-examples", "sum/confusion-counts", f"sum/{COUNTS}", "rows/loss"}


def test_coarse_figures_are_refused_with_the_way_out():
    rng = np.random.default_rng(5)
    record = classification_metrics(rng.integers(0, 2, 99), rng.normal(size=(99, 1)), coarse=True)
    with pytest.raises(InputError, match="set coarse-figures=false in the node config"):
        sums_of_record(record)


def test_there_must_be_a_grid_for_each_score():
    record = classification_metrics([0, 1, 1], [[-1.0], [0.5], [2.0]])
    assert len(record[GRID]) == 3
    with pytest.raises(InputError, match="one grid for each of 1 scores: 2"):
        sums_of_record(record, [FIRST_GRID] * 2)


def test_bins_go_whole_to_where_their_middle_is():
    edges = edges_of(FIRST_GRID)
    assert len(edges) == SUM_BINS + 1
    assert edges[-1] == pytest.approx(110.13, abs=0.01)
    moved = rebinned(np.array([0.0, 1.0, 2.0, 9.0]), np.array([[1, 2, 4]]), np.array([0, 0.7, 1.9]))
    assert moved.tolist() == [[1, 6]]
