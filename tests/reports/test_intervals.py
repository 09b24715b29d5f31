"""The figures that the counts of a run folder give beyond its metrics."""

import numpy as np
import pytest
import reference
from run_folders import SITES, rows_of, write_run
from scipy.special import expit
from sklearn.calibration import calibration_curve
from statsmodels.stats.proportion import proportion_confint

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.counts import Counts, read_counts
from fedmed_flower.reports.intervals import by_class, calibrated, intervals, recalibrated, scores


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_counts(write_run(tmp_path_factory.mktemp("run")))


def every_row():
    parts = [rows_of(size, seed=number) for number, size in enumerate(SITES.values())]
    return tuple(np.concatenate(rows) for rows in zip(*parts, strict=True))


def test_intervals_of_two_classes_are_those_of_the_raw_rows(run):
    labels, outputs = every_row()
    found = intervals(run)
    assert found.keys() == {"accuracy", "sensitivity", "specificity", "auc"}
    guess = outputs > 0
    for name, of in (("sensitivity", 1), ("specificity", 0)):
        right = (guess == of)[labels == of]
        low, high = proportion_confint(right.sum(), right.size, method="wilson")
        assert found[name].value == pytest.approx(right.mean())
        assert found[name][1:] == pytest.approx((low, high))
    assert found["accuracy"].value == pytest.approx((guess == labels).mean())
    area, variance = reference.delong(outputs[labels == 1], outputs[labels == 0])
    assert found["auc"].value == pytest.approx(area, abs=0.002)
    width = found["auc"].high - found["auc"].low
    assert width == pytest.approx(2 * 1.96 * variance**0.5, rel=0.05)


def test_intervals_of_one_hospital_are_wider(run):
    together = intervals(run)
    alone = intervals(run, "hospital-10")
    for name, found in alone.items():
        assert found.high - found.low > together[name].high - together[name].low


def test_calibration_is_exact_if_hospitals_sent_its_sums_and_else_from_histograms(run):
    labels, outputs = every_row()
    observed, predicted = calibration_curve(labels, expit(outputs), n_bins=10)
    exact = calibrated(run)
    np.testing.assert_allclose(exact.observed, observed)
    np.testing.assert_allclose(exact.predicted, predicted)
    without = {
        site: {key: value for key, value in record.items() if key != "calibration-sums"}
        for site, record in run.sites.items()
    }
    near = calibrated(Counts(run.classes, without))
    np.testing.assert_allclose(near.predicted, predicted, atol=0.005)
    np.testing.assert_allclose(near.observed, observed, atol=0.05)
    assert near.error == pytest.approx(exact.error, abs=0.01)


def test_more_classes_have_an_interval_each(tmp_path):
    run = read_counts(write_run(tmp_path, classes=3))
    assert intervals(run).keys() == {"accuracy"}
    figures = by_class(run)
    assert [one.name for one in figures] == ["kind 0", "kind 1", "kind 2"]
    assert sum(one.records for one in figures) == sum(SITES.values())
    for one in figures:
        assert one.sensitivity.low < one.sensitivity.value < one.sensitivity.high
        assert one.auc.low < one.auc.value < one.auc.high
        assert 0 < one.calibration_error < 0.3


def test_counts_with_noise_have_no_interval_and_a_rough_calibration(tmp_path):
    run = read_counts(write_run(tmp_path, noise=1.0))
    assert intervals(run) == {}
    assert by_class(run) == []
    assert calibrated(run).rows.sum() == pytest.approx(sum(SITES.values()), abs=60)
    assert recalibrated(run).slope > 0


def test_a_hospital_that_reports_coarsely_leaves_its_confusion_matrix(tmp_path):
    run = read_counts(write_run(tmp_path, coarse=True, sizes={"a": 400, "b": 500}))
    assert intervals(run).keys() == {"accuracy", "sensitivity", "specificity"}
    with pytest.raises(InputError, match="reports coarsely"):
        scores(run)
    assert recalibrated(run) is None
    # Its calibration has one bin on either side of one half.
    assert len(calibrated(run).rows) == 2


def test_counts_with_noise_and_without_do_not_add_up(run, tmp_path):
    noised = read_counts(write_run(tmp_path, noise=1.0))
    mixed = Counts(run.classes, {"a": run.sites["hospital-1"], "b": noised.sites["hospital-1"]})
    with pytest.raises(InputError, match="some without"):
        scores(mixed)
