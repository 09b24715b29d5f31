import numpy as np
import pytest
import reference
import statsmodels.api as sm
from scipy.special import expit
from sklearn import metrics as scikit
from sklearn.calibration import calibration_curve
from statsmodels.stats.proportion import proportion_confint

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.classification import classification_metrics, noised_counts
from fedmed_flower.metrics.curves import (
    Histograms,
    auc_interval,
    auc_of,
    auc_variance,
    calibration,
    decision_curve,
    denoised,
    histograms_of,
    precision_recall,
    recalibration,
    roc,
    together,
    wilson,
)


def cohort(size=1500, seed=0, shift=0.0, scale=1.0):
    """Labels and log-odds that tell something of them, and are too extreme."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(shift, 1.3, size)
    labels = generator.binomial(1, expit(truth))
    return labels, scale * (truth + generator.normal(0, 0.5, size))


def histograms(labels, scores):
    (counts,) = histograms_of(classification_metrics(labels, scores[:, None]))
    return counts


@pytest.fixture(scope="module")
def hospitals():
    """Three hospitals with scores at different places, and their rows together."""
    parts = [cohort(900, 1), cohort(500, 2, -2.0, 1.7), cohort(700, 3, 1.0, 0.4)]
    labels, scores = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    return together([histograms(*part) for part in parts]), labels, scores


def test_a_curve_with_one_row_a_bin_equals_scikit_learn():
    labels = np.array([0, 1, 0, 0, 1, 1, 0, 1])
    got = roc(labels, 1 - labels)
    false, true, _ = scikit.roc_curve(labels, np.arange(8), drop_intermediate=False)
    np.testing.assert_allclose(got.false_positive_rate, false)
    np.testing.assert_allclose(got.sensitivity, true)
    drawn = precision_recall(labels, 1 - labels)
    precision, recall, _ = scikit.precision_recall_curve(labels, np.arange(8))
    np.testing.assert_allclose(drawn.precision, precision[-2::-1])
    np.testing.assert_allclose(drawn.recall, recall[-2::-1])


def test_rows_of_one_bin_are_tied_as_in_scikit_learn():
    with_class, without = [1, 0, 4, 2], [3, 2, 1, 0]
    scores = np.repeat([0, 1, 2, 3] * 2, with_class + without)
    labels = np.repeat([1, 0], [7, 6])
    got = roc(with_class, without)
    false, true, _ = scikit.roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(got.false_positive_rate, false)
    np.testing.assert_allclose(got.sensitivity, true)
    assert auc_of(with_class, without) == pytest.approx(scikit.roc_auc_score(labels, scores))
    area, variance = reference.delong(scores[labels == 1], scores[labels == 0])
    assert auc_of(with_class, without) == pytest.approx(area)
    assert auc_variance(with_class, without) == pytest.approx(variance)


def test_curves_over_hospitals_equal_scikit_learn_to_the_width_of_bins(hospitals):
    (_, with_class, without), labels, scores = hospitals
    got = roc(with_class, without)
    false, true, _ = scikit.roc_curve(labels, scores)
    at = np.linspace(0.02, 0.98, 49)
    np.testing.assert_allclose(
        np.interp(at, got.false_positive_rate, got.sensitivity),
        np.interp(at, false, true),
        atol=0.005,
    )
    assert auc_of(with_class, without) == pytest.approx(
        scikit.roc_auc_score(labels, scores), abs=0.001
    )
    drawn = precision_recall(with_class, without)
    precision, recall, _ = scikit.precision_recall_curve(labels, scores)
    np.testing.assert_allclose(
        np.interp(at, drawn.recall, drawn.precision),
        np.interp(at, recall[::-1], precision[::-1]),
        atol=0.02,
    )


def test_thinned_curves_keep_their_ends_and_stay_near(hospitals):
    (_, with_class, without), _, _ = hospitals
    whole = roc(with_class, without)
    thin = roc(with_class, without, most=60)
    assert len(thin.sensitivity) <= 60 < len(whole.sensitivity)
    assert (thin.false_positive_rate[0], thin.sensitivity[0]) == (0, 0)
    assert (thin.false_positive_rate[-1], thin.sensitivity[-1]) == pytest.approx((1, 1))
    at = np.linspace(0, 1, 101)
    np.testing.assert_allclose(
        np.interp(at, thin.false_positive_rate, thin.sensitivity),
        np.interp(at, whole.false_positive_rate, whole.sensitivity),
        atol=0.05,
    )
    assert len(precision_recall(with_class, without, most=40).recall) <= 40
    with pytest.raises(InputError, match="most must be at least 2 points, got 1"):
        roc(with_class, without, most=1)


def test_the_variance_of_the_auc_equals_delongs_on_raw_scores(hospitals):
    (_, with_class, without), labels, scores = hospitals
    area, variance = reference.delong(scores[labels == 1], scores[labels == 0])
    assert auc_variance(with_class, without) == pytest.approx(variance, rel=0.01)
    got = auc_interval(with_class, without)
    assert got.value == pytest.approx(area, abs=0.001)
    # With many rows the interval is nearly symmetric.
    assert got.low == pytest.approx(area - 1.96 * variance**0.5, abs=0.002)
    assert got.high == pytest.approx(area + 1.96 * variance**0.5, abs=0.002)
    assert auc_interval(with_class, without, 0.5).low > got.low


def test_the_interval_covers_the_true_auc_as_often_as_it_says():
    # Normal scores whose means differ by 1: the AUC is the normal distribution's at 1 / sqrt(2).
    true = 0.7602499389065233
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(400):
        scores = np.concatenate([generator.normal(1, 1, 40), generator.normal(0, 1, 60)])
        order = np.argsort(scores)
        labels = (order < 40).astype(int)
        got = auc_interval(labels, 1 - labels)
        hits += got.low <= true <= got.high
    assert 0.92 <= hits / 400 <= 0.98


def test_an_auc_without_a_variance_has_wilsons_interval_of_the_rarer_rows():
    perfect = auc_interval([0, 0, 7], [20, 5, 0])
    assert perfect.value == 1
    assert perfect.high == 1
    assert perfect.low == pytest.approx(proportion_confint(7, 7, method="wilson")[0])
    alone = auc_interval([0, 1], [3, 1])
    assert alone.value == 0.875
    assert alone.low < 0.2


@pytest.mark.parametrize(("successes", "total"), [(0, 9), (3, 9), (9, 9), (412, 1000)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_equals_statsmodels(successes, total, level):
    got = wilson(successes, total, level)
    assert got.value == successes / total
    expected = proportion_confint(successes, total, alpha=1 - level, method="wilson")
    np.testing.assert_allclose(got[1:], expected, atol=1e-12)


def test_calibration_equals_scikit_learn_to_the_width_of_bins(hospitals):
    counts, labels, scores = hospitals
    got = calibration(*counts)
    observed, predicted = calibration_curve(labels, expit(scores), n_bins=10)
    np.testing.assert_allclose(got.observed, observed, atol=0.01)
    np.testing.assert_allclose(got.predicted, predicted, atol=0.002)
    rows, _ = np.histogram(expit(scores), np.linspace(0, 1, 11))
    np.testing.assert_allclose(got.rows, rows, atol=2)
    assert got.rows.sum() == pytest.approx(len(labels))
    expected = (rows * np.abs(observed - predicted)).sum() / rows.sum()
    assert got.error == pytest.approx(expected, abs=0.002)


def test_calibration_of_wide_bins_takes_the_mean_probability_over_the_bin():
    # Worked out: of log-odds from 0 to 2 the mean probability is log((1 + e^2) / 2) / 2.
    got = calibration([0.0, 2.0], [3], [1], bins=1)
    assert got.predicted[0] == pytest.approx(np.log((1 + np.e**2) / 2) / 2)
    assert got.observed[0] == 0.75
    assert got.rows[0] == 4
    # The end of a bin of probability, 0.5, halves the rows of a bin around it.
    halves = calibration([-1.0, 1.0], [4], [0], bins=2)
    np.testing.assert_allclose(halves.rows, [2, 2])


def test_recalibration_equals_a_logistic_regression(hospitals):
    counts, labels, scores = hospitals
    expected = sm.GLM(labels, sm.add_constant(scores), family=sm.families.Binomial()).fit()
    np.testing.assert_allclose(recalibration(*counts), expected.params, atol=0.005)
    with pytest.raises(InputError, match="no slope here"):
        recalibration([-1.0, 0.0, 1.0], [0, 4], [3, 0])
    with pytest.raises(InputError, match="no slope here"):
        recalibration([-1.0, 0.0, 1.0], [0, 4], [0, 3])


def test_net_benefit_equals_that_of_raw_scores(hospitals):
    counts, labels, scores = hospitals
    thresholds = [0.1, 0.25, 0.5, 0.8]
    got = decision_curve(*counts, thresholds)
    expected = [reference.net_benefit(labels, expit(scores), one) for one in thresholds]
    np.testing.assert_allclose(got.model, expected, atol=0.002)
    everybody = [reference.net_benefit(labels, np.ones(len(labels)), one) for one in thresholds]
    np.testing.assert_allclose(got.treat_all, everybody)


@pytest.mark.parametrize("wrong", [[0.0], [0.5, 1.0], [[0.5]], [np.nan]])
def test_a_threshold_is_a_probability(wrong):
    with pytest.raises(InputError, match="thresholds must be probabilities between 0 and 1"):
        decision_curve([0.0, 1.0], [1], [1], wrong)


def test_three_classes_have_a_histogram_each():
    generator = np.random.default_rng(4)
    labels = generator.integers(0, 3, 600)
    logits = generator.normal(size=(600, 3)) + np.eye(3)[labels]
    parts = histograms_of(classification_metrics(labels, logits))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for number, counts in enumerate(parts):
        assert counts.with_class.sum() == (labels == number).sum()
        got = calibration(*counts)
        observed, predicted = calibration_curve(
            labels == number, probabilities[:, number], n_bins=10
        )
        np.testing.assert_allclose(got.predicted, predicted, atol=0.003)
        np.testing.assert_allclose(got.observed, observed, atol=0.03)


def test_counts_with_noise_give_curves_once_denoised():
    labels, scores = cohort(4000, 6)

    def noised():
        record = {"noised-counts": noised_counts(labels, scores[:, None], [*range(4000)], 6.0)}
        return histograms_of(record)[0]

    first = noised()
    assert min(first.without.min(), first.with_class.min()) < 0
    counts = together([first, first])
    np.testing.assert_allclose(counts.without, 2 * first.without)
    with pytest.raises(InputError, match="counts with noise go through denoised first"):
        roc(counts.with_class, counts.without)
    with_class, without = denoised(first.with_class), denoised(first.without)
    assert with_class.min() >= 0
    assert with_class.sum() == pytest.approx(first.with_class.sum())
    # Noise is new in each run, and moves one AUC by .008: the mean of many is compared.
    drawn = [noised() for _ in range(16)]
    areas = [auc_of(denoised(each.with_class), denoised(each.without)) for each in drawn]
    area = np.mean(areas)
    assert area == pytest.approx(scikit.roc_auc_score(labels, scores), abs=0.02)
    got = calibration(first.edges, with_class, without)
    assert np.abs(got.predicted - got.observed).max() < 0.25


def test_denoised_counts_are_the_nearest_of_the_sum():
    np.testing.assert_allclose(denoised([3.0, -1.0, 1.0]), [2.5, 0.0, 0.5])
    np.testing.assert_allclose(denoised([2.0, 0.0, 1.0]), [2.0, 0.0, 1.0])
    with pytest.raises(InputError, match="noise is larger than the counts"):
        denoised([2.0, -3.0])
    with pytest.raises(InputError, match="finite and of shape"):
        denoised([1.0, np.inf])


def test_parts_with_noise_cannot_be_spread_over_other_edges():
    noised = Histograms(np.array([0.0, 1.0]), np.array([-1.0]), np.array([2.0]))
    other = Histograms(np.array([0.0, 2.0]), np.array([1.0]), np.array([2.0]))
    with pytest.raises(InputError, match="at least 0, got -1"):
        together([noised, other])
    with pytest.raises(InputError, match="got none"):
        together([])


def test_counts_of_a_hospital_that_reports_coarsely_are_refused():
    labels, scores = cohort()
    record = classification_metrics(labels, scores[:, None], coarse=True)
    with pytest.raises(InputError, match="the hospital reports coarsely"):
        histograms_of(record)
    with pytest.raises(InputError, match="the record has loss"):
        histograms_of({"loss": 1.0})
    with pytest.raises(InputError, match="fits no number of classes"):
        histograms_of({"noised-counts": [1.0] * 5})
    with pytest.raises(InputError, match="numbers a class, got 3 and 2"):
        histograms_of({"score-grid": [0.0, 1.0, 0.5], "score-counts": [1, 2]})


@pytest.mark.parametrize(
    ("with_class", "without", "words"),
    [
        ([1, 2], [1], "shapes"),
        ([], [], "shapes"),
        ([1, np.nan], [1, 1], "finite and at least 0"),
        ([1, 2], [0, 0], "got 3 and 0"),
        ([0, 0], [1, 2], "got 0 and 3"),
    ],
)
@pytest.mark.parametrize("measure", [roc, precision_recall, auc_interval, auc_variance, auc_of])
def test_bad_counts_are_refused_in_words(measure, with_class, without, words):
    with pytest.raises(InputError, match=words):
        measure(with_class, without)


def test_bad_arguments_are_refused_in_words():
    with pytest.raises(InputError, match="more than one row"):
        auc_variance([1, 0], [2, 2])
    with pytest.raises(InputError, match=r"level must be between 0 and 1, such as 0\.95, got 95"):
        wilson(1, 2, 95)
    for successes, total in ((0, 0), (-1, 4), (5, 4), (1, np.inf)):
        with pytest.raises(InputError, match="counts with noise have no such interval"):
            wilson(successes, total)
    with pytest.raises(InputError, match="edges must be 2 finite, ascending numbers"):
        calibration([1.0, 1.0], [1], [1])
    with pytest.raises(InputError, match="counts are all 0"):
        calibration([0.0, 1.0], [0], [0])
    with pytest.raises(InputError, match="bins must be at least 1, got 0"):
        calibration([0.0, 1.0], [1], [1], bins=0)
