"""Intervals and curves of a test, compared with scikit-learn and with counts by hand."""

import numpy as np
import pytest
from sklearn.metrics import auc as area
from sklearn.metrics import roc_curve

from fedmed_flower.metrics.classification import classification_metrics, noised_counts
from fedmed_flower.metrics.counts import counted
from fedmed_flower.metrics.outcomes import outcome_metrics
from fedmed_flower.metrics.pooling import pool
from fedmed_flower.reports.scores import of_test
from fedmed_flower.reports.tested import estimates, evidence_of, share_of

RNG = np.random.default_rng(0)


def rows(count=120, classes=2):
    labels = np.arange(count) % classes
    if classes == 2:
        return labels, (1.5 * labels + RNG.normal(size=count) - 0.7)[:, None]
    return labels, 2 * np.eye(classes)[labels] + RNG.normal(size=(count, classes))


def made(task="binary", sites=("north", "south"), classes=2, coarse=False):
    data = {site: rows(classes=classes) for site in sites}
    records = {s: outcome_metrics(task, y, z, coarse=coarse) for s, (y, z) in data.items()}
    summary = {
        "test": {
            "federated": pool([*records.values()]),
            "sites": {
                site: {k: v for k, v in found.items() if not isinstance(v, list)}
                for site, found in records.items()
            },
        }
    }
    return data, summary, counted(records)


def test_the_curve_of_all_is_that_of_all_rows_together():
    data, _, counts = made()
    found = evidence_of(counts)
    assert [(curve.name, curve.site) for curve in found.roc] == [
        ("north", "north"),
        ("south", "south"),
        ("all together", None),
    ]
    labels = np.concatenate([labels for labels, _ in data.values()])
    scores = np.concatenate([scores[:, 0] for _, scores in data.values()])
    x, y, _ = roc_curve(labels, scores)
    mine = np.asarray(found.roc[-1].points)
    assert area(mine[:, 0], mine[:, 1]) == pytest.approx(area(x, y), abs=0.005)
    assert found.prevalence == pytest.approx(0.5)
    assert found.missing == ""


def test_intervals_hold_the_metrics_that_they_are_of():
    _, summary, counts = made()
    for metric in ("auc", "sensitivity", "specificity", "accuracy"):
        found = estimates(summary, counts, metric)
        for estimate in (*found.sites.values(), found.total):
            low, high = estimate.interval
            assert 0 <= low < estimate.value < high <= 1
        assert found.total.value == summary["test"]["federated"][metric]
        # More rows say more.
        width = np.ptp(found.total.interval)
        assert all(np.ptp(estimate.interval) > width for estimate in found.sites.values())
    assert estimates(summary, counts, "brier").total.interval is None
    assert estimates(summary, None, "auc").total.interval is None


def test_there_is_no_total_interval_without_the_counts_of_one_hospital():
    _, summary, counts = made()
    summary["test"]["sites"]["west"] = {"auc": 0.7}
    found = estimates(summary, counts, "auc")
    assert found.sites["west"].interval is None
    assert found.sites["north"].interval is not None
    assert found.total.interval is None


def test_calibration_is_that_of_the_sums_or_of_the_scores():
    data, _, counts = made()
    by_sums = evidence_of(counts).calibration
    assert sum(each.rows for each in by_sums) == 240
    plain = {s: classification_metrics(y, z) for s, (y, z) in data.items()}
    by_scores = evidence_of(counted(plain)).calibration
    assert len(by_scores) == len(by_sums)
    for one, other in zip(by_scores, by_sums, strict=True):
        assert one.rows == pytest.approx(other.rows, abs=1)
        assert one.predicted == pytest.approx(other.predicted, abs=0.02)
        low, high = one.interval
        assert low <= one.observed <= high


def test_net_benefit_by_hand():
    data, _, counts = made()
    by_model, everybody = evidence_of(counts).net_benefit
    labels = np.concatenate([labels for labels, _ in data.values()])
    scores = np.concatenate([scores[:, 0] for _, scores in data.values()])
    alarms = scores > 0
    # At one half a false alarm is as bad as a missed record.
    right = (alarms & (labels == 1)).sum() - (alarms & (labels == 0)).sum()
    assert dict(by_model.points)[0.5] == pytest.approx(right / 240, abs=0.01)
    assert dict(everybody.points)[0.5] == pytest.approx(0, abs=1e-9)
    assert min(value for _, value in everybody.points) >= -0.05


def test_counts_of_sites_that_are_not_of_this_test_are_left_out():
    _, _, counts = made()
    assert of_test(counts, {"test": {"sites": {}}}) is None
    assert of_test(None, {"test": {"sites": {"north": {}}}}) is None
    assert evidence_of(None) is None
    found = evidence_of(of_test(counts, {"test": {"sites": {"south": {}}}}))
    assert [curve.name for curve in found.roc] == ["south", "all together"]


def test_more_classes_have_a_curve_each():
    _, summary, counts = made("multi-class", classes=3)
    found = evidence_of(counts)
    assert [curve.name for curve in found.roc] == ["class 0", "class 1", "class 2"]
    assert found.prevalence is None
    assert np.asarray(found.confusion).sum() == 240
    assert estimates(summary, counts, "auc").total.interval is None
    assert estimates(summary, counts, "accuracy").total.interval is not None


def test_coarse_counts_give_no_curve_and_say_so():
    _, summary, counts = made(coarse=True)
    found = evidence_of(counts)
    assert found.coarse == ("north", "south")
    assert found.missing == "some hospitals report coarsely"
    assert not found.roc
    assert estimates(summary, counts, "auc").sites["north"].interval is None


def test_noised_counts_give_a_curve_of_all_without_intervals():
    records = {}
    for site in ("north", "south"):
        labels, outputs = rows(600)
        patients = [str(number) for number in range(len(labels))]
        counts = noised_counts(labels, outputs, patients, 1.0)
        records[site] = {"num-examples": 600, "noised-counts": counts}
    sites = {site: {"auc": 0.8} for site in records}
    found = evidence_of(counted(records))
    assert found.noised
    assert found.confusion is None
    assert [curve.name for curve in found.roc] == ["all together"]
    points = np.asarray(found.roc[0].points)
    assert ((points >= 0) & (points <= 1)).all()
    assert all(each.interval is None for each in found.calibration)
    summary = {"test": {"sites": sites, "federated": {"auc": 0.8}}}
    assert estimates(summary, counted(records), "auc").total.interval is None


def test_noise_larger_than_the_counts_gives_no_curve():
    counts = counted({"north": {"num-examples": 0, "noised-counts": [-1.0] * 64}})
    found = evidence_of(counts)
    assert not found.roc
    assert "the noise is larger than the counts" in found.missing


def test_shares_by_hand():
    confusion = [[40, 10], [5, 45]]
    assert share_of(confusion, "sensitivity") == (45, 50)
    assert share_of(confusion, "specificity") == (40, 50)
    assert share_of(confusion, "accuracy") == (85, 100)
    assert share_of(confusion, "auc") is None
    assert share_of(None, "accuracy") is None
    assert share_of([[0, 0], [1, 2]], "specificity") is None
