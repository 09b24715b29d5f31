"""What a model card says of the scores behind a test."""

import numpy as np
import pytest
import reference
import statsmodels.api as sm
from run_folders import SITES, rows_of, write_run
from scipy.special import expit, softmax
from sklearn.calibration import calibration_curve
from statsmodels.stats.proportion import proportion_confint

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.counts import Counts, read_counts
from fedmed_flower.reports.scores import benefit, by_class, joined, of_test, recalibrated


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_counts(write_run(tmp_path_factory.mktemp("run")))


def every_row(classes=2):
    parts = [rows_of(size, classes, number) for number, size in enumerate(SITES.values())]
    return tuple(np.concatenate(rows) for rows in zip(*parts, strict=True))


def test_net_benefit_and_recalibration_are_those_of_the_raw_rows(run):
    labels, outputs = every_row()
    thresholds = (0.2, 0.5, 0.7)
    expected = [reference.net_benefit(labels, expit(outputs), each) for each in thresholds]
    np.testing.assert_allclose(benefit(run, thresholds).model, expected, atol=0.005)
    fitted = sm.GLM(labels, sm.add_constant(outputs), family=sm.families.Binomial()).fit()
    np.testing.assert_allclose(recalibrated(run), fitted.params, atol=0.01)


def test_each_of_more_classes_has_its_figures_against_the_rest(tmp_path):
    figures = by_class(read_counts(write_run(tmp_path, classes=3)))
    labels, outputs = every_row(3)
    probabilities = softmax(outputs, axis=1)
    assert [one.name for one in figures] == ["kind 0", "kind 1", "kind 2"]
    for number, one in enumerate(figures):
        is_class = labels == number
        assert one.records == is_class.sum()
        right = (outputs.argmax(axis=1) == number)[is_class]
        ends = proportion_confint(right.sum(), right.size, method="wilson")
        assert one.sensitivity[1:] == pytest.approx(ends)
        against = outputs[:, number] - np.log(
            np.exp(np.delete(outputs, number, axis=1)).sum(axis=1)
        )
        area, variance = reference.delong(against[is_class], against[~is_class])
        assert one.auc.value == pytest.approx(area, abs=0.002)
        assert one.auc.high - one.auc.low == pytest.approx(3.92 * variance**0.5, rel=0.1)
        observed, predicted = calibration_curve(is_class, probabilities[:, number], n_bins=10)
        rows, _ = np.histogram(probabilities[:, number], np.linspace(0, 1, 11))
        error = (rows[rows > 0] * np.abs(observed - predicted)).sum() / rows.sum()
        assert one.calibration_error == pytest.approx(error, abs=0.01)


def test_two_classes_and_counts_with_noise_have_no_figures_by_class(run, tmp_path):
    assert by_class(run) == []
    noised = read_counts(write_run(tmp_path, classes=3, noise=1.0))
    assert by_class(noised) == []


def test_counts_with_noise_come_without_counts_below_0(tmp_path):
    noised = read_counts(write_run(tmp_path, noise=1.0))
    ((_, with_class, without),) = joined(noised)
    assert min(with_class.min(), without.min()) >= 0
    assert with_class.sum() + without.sum() == pytest.approx(sum(SITES.values()), abs=60)
    assert recalibrated(noised).slope > 0


def test_a_hospital_that_reports_coarsely_gives_no_scores(tmp_path):
    coarse = read_counts(write_run(tmp_path, coarse=True, sizes={"a": 400, "b": 500}))
    with pytest.raises(InputError, match="reports coarsely"):
        joined(coarse)
    assert recalibrated(coarse) is None


def test_counts_with_noise_and_without_do_not_add_up(run, tmp_path):
    noised = read_counts(write_run(tmp_path, noise=1.0))
    mixed = Counts(run.classes, {"a": run.sites["hospital-1"], "b": noised.sites["hospital-1"]})
    with pytest.raises(InputError, match="some without"):
        joined(mixed)


def test_counts_of_hospitals_that_were_not_tested_are_left_out(run):
    summary = {"test": {"sites": {"hospital-2": {"auc": 0.5}, "new": {"auc": 0.5}}}}
    assert [*of_test(run, summary).sites] == ["hospital-2"]
    assert of_test(run, {"test": {"sites": {"new": {}}}}) is None
    assert of_test(None, summary) is None
