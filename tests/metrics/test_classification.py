import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from fedmed_flower.metrics.classification import (
    class_margins,
    classification_metrics,
    noised_counts,
    noised_metrics,
    rates_of,
)
from fedmed_flower.metrics.pooling import check_counts, pool


def test_hand_worked_case():
    labels = [0, 0, 1, 1, 1]
    logits = [[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.5], [0.0, 2.0]]
    got = classification_metrics(labels, logits)
    # negatives have margins -2 and 1, positives 3, -0.5 and 2: 5 of 6 pairs are in order.
    assert got["auc"] == pytest.approx(5 / 6)
    assert got["accuracy"] == pytest.approx(3 / 5)
    assert got["sensitivity"] == pytest.approx(2 / 3)
    assert got["specificity"] == pytest.approx(1 / 2)
    assert got["balanced-accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert got["confusion-counts"] == [1, 1, 1, 2]
    assert got["num-examples"] == 5


def test_one_class_leaves_out_what_is_undefined():
    got = classification_metrics([1, 1], [[0.0, 1.0], [0.0, -1.0]])
    assert "auc" not in got
    assert "specificity" not in got
    assert got["sensitivity"] == 0.5


def test_one_logit_equals_two():
    rng = np.random.default_rng(1)
    labels, margin = rng.integers(0, 2, 50), rng.normal(size=50)
    one = classification_metrics(labels, margin[:, None])
    two = classification_metrics(labels, np.stack([np.zeros(50), margin], 1))
    assert one == two


def test_multi_class_equals_scikit_learn():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 4, 300)
    logits = rng.normal(size=(300, 4)) + 1.5 * np.eye(4)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    got = classification_metrics(labels, logits)
    assert got["auc"] == pytest.approx(
        reference.roc_auc_score(labels, probabilities, multi_class="ovr"), abs=1e-9
    )
    guess = logits.argmax(1)
    assert got["balanced-accuracy"] == pytest.approx(
        reference.balanced_accuracy_score(labels, guess)
    )
    assert got["sensitivity"] == pytest.approx(
        reference.recall_score(labels, guess, average="macro")
    )
    assert np.allclose(class_margins(logits), np.log(probabilities / (1 - probabilities)))


@given(st.integers(2, 5), st.booleans(), st.integers(0, 2**32 - 1))
def test_rates_of_a_confusion_matrix_equal_scikit_learn(classes, whole, seed):
    rng = np.random.default_rng(seed)
    confusion = rng.integers(0, 4, (classes, classes))
    confusion[0, 0] += 1
    if not whole:
        confusion = confusion * rng.uniform(0, 1, confusion.shape)
    truth, guess = (index.ravel() for index in np.indices(confusion.shape))
    per_class = reference.multilabel_confusion_matrix(truth, guess, sample_weight=confusion.ravel())
    got = rates_of(confusion)
    assert got["accuracy"] == pytest.approx(
        reference.accuracy_score(truth, guess, sample_weight=confusion.ravel())
    )
    concerned = [1] if classes == 2 else range(classes)
    for name, row in (("specificity", 0), ("sensitivity", 1)):
        cells = [per_class[label, row] for label in concerned]
        # What rounding has left of no row at all is no row.
        known = all(cell.sum() > 1e-9 for cell in cells)
        assert (name in got) == known
        if known:
            rates = [cell[row] / cell.sum() for cell in cells]
            assert got[name] == pytest.approx(np.mean(rates))


def test_pooled_equals_one_site_with_all_rows():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 400)
    logits = rng.normal(size=(400, 3)) + np.eye(3)[labels]
    whole = classification_metrics(labels, logits)
    parts = [classification_metrics(labels[i::4], logits[i::4]) for i in range(4)]
    pooled = pool(parts)
    for name in ("num-examples", "accuracy", "balanced-accuracy", "sensitivity", "specificity"):
        assert pooled[name] == pytest.approx(whole[name])
    assert pooled["auc"] == pytest.approx(whole["auc"], abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sites=st.integers(1, 8),
    shape=st.sampled_from(["normal", "heavy", "skewed", "two humps"]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    separation=st.floats(0, 4),
)
def test_pooled_auc_is_right_to_a_thousandth(seed, sites, shape, scale, separation):
    rng = np.random.default_rng(seed)
    location = rng.normal() * 10
    labels, scores = [], []
    for _ in range(sites):
        n = int(rng.integers(60, 300))
        y = rng.integers(0, 2, n)
        noise = {
            "normal": rng.normal(size=n),
            "heavy": rng.standard_t(3, size=n),
            "skewed": rng.exponential(size=n) ** 2,
            "two humps": np.where(rng.random(n) < 0.8, 0.1, 1.0) * rng.normal(size=n)
            + 10 * (rng.random(n) < 0.2),
        }[shape]
        labels.append(y)
        scores.append(location + scale * (noise + separation * y + rng.normal() / 2))
    pooled = pool(
        [classification_metrics(y, z[:, None]) for y, z in zip(labels, scores, strict=True)]
    )
    exact = reference.roc_auc_score(np.concatenate(labels), np.concatenate(scores))
    assert pooled["auc"] == pytest.approx(exact, abs=1e-3)


def test_sites_with_one_class_each_pool_to_an_auc():
    negatives = classification_metrics([0, 0], [[-1.0], [0.5]])
    positives = classification_metrics([1, 1], [[0.0], [2.0]])
    assert pool([negatives, positives])["auc"] == pytest.approx(3 / 4, abs=1e-3)


def test_identical_scores_are_a_coin_toss():
    records = [classification_metrics([0, 1, 1], [[0.7]] * 3) for _ in range(2)]
    assert pool(records)["auc"] == pytest.approx(0.5, abs=1e-3)


def test_no_list_of_scores_leaves():
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(500, 1))
    got = classification_metrics(rng.integers(0, 2, 500), scores)
    sent = [v for value in got.values() for v in (value if isinstance(value, list) else [value])]
    assert not np.isin(scores.ravel(), np.asarray(sent)).any()


def test_margins_of_sure_networks_stay_apart():
    logits = [[38.0, 0.0, 0.0], [40.0, 0.0, 0.0], [800.0, 0.0, 0.0]]
    margins = class_margins(logits)
    assert margins[:, 0] == pytest.approx([38 - np.log(2), 40 - np.log(2), 800 - np.log(2)])


@pytest.mark.parametrize(
    ("key", "change", "text"),
    [
        ("score-grid", lambda v: [1e308, 1e308, 0.5], "score-grid must be finite"),
        ("score-grid", lambda v: [v[0], 0.0, v[2]], "widths above 0"),
        ("score-grid", lambda v: [*v[:2], 1.5], "names an AUC outside 0 to 1"),
        ("confusion-counts", lambda v: [v[0] + 1, *v[1:]], "do not add up to num-examples = 40"),
        ("confusion-counts", lambda v: v[:3], "which is no square"),
        ("score-counts", lambda v: [-2, *v[1:-1], v[-1] + 2], "whole numbers of at least 0"),
        ("score-counts", lambda v: [-1, *v[1:]], "must begin each histogram with a bin of its own"),
        ("score-counts", lambda v: 3, "must be lists"),
    ],
)
def test_counts_that_cannot_be_pooled_are_told(key, change, text):
    rng = np.random.default_rng(5)
    record = classification_metrics(rng.integers(0, 2, 40), rng.normal(size=(40, 1)))
    assert check_counts(record) is None
    assert text in check_counts(record | {key: change(record[key])})


def test_the_grid_does_not_tell_the_median_patients_score():
    for score in np.random.default_rng(6).normal(size=50):
        centre, width, _ = classification_metrics([1], [[score]])["score-grid"]
        assert centre != score
        assert abs(centre - score) <= width


def counted(labels, logits, patients, noise=0.0):
    return np.asarray(noised_counts(labels, logits, patients, noise))


@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_noised_counts_without_noise_give_the_true_figures(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, max(2, classes), 400)
    logits = rng.normal(size=(400, classes))
    logits[np.arange(400), labels % classes] += 1.5 if classes > 1 else 0
    exact = classification_metrics(labels, logits)
    found = noised_metrics(counted(labels, logits, range(400)))
    assert set(found) == {key for key, value in exact.items() if not isinstance(value, list)}
    for name, value in found.items():
        assert value == pytest.approx(exact[name], abs=0.02 if name == "auc" else 1e-12)


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_a_patient_changes_noised_counts_by_no_more_than_is_claimed(classes):
    rng = np.random.default_rng(classes)
    bound = 1.0 if classes < 3 else (classes + 1) ** 0.5
    for _ in range(50):
        rows = int(rng.integers(2, 12))
        labels, logits = rng.integers(0, max(2, classes), rows), rng.normal(size=(rows, classes))
        logits *= 10 ** rng.uniform(-2, 3)
        patients = rng.integers(0, 3, rows)
        rest = patients != patients[0]
        whole = counted(labels, logits, patients.tolist())
        if rest.any():
            whole = whole - counted(labels[rest], logits[rest], patients[rest].tolist())
        assert np.linalg.norm(whole) <= bound + 1e-9


def test_noised_counts_have_the_noise_that_is_claimed():
    labels, logits = np.zeros(3, int), np.zeros((3, 1))
    exact = counted(labels, logits, range(3))
    drawn = np.concatenate([counted(labels, logits, range(3), 2.5) - exact for _ in range(100)])
    assert stats.kstest(drawn / 2.5, "norm").pvalue > 1e-6
    labels, logits = np.zeros(3, int), np.zeros((3, 3))
    exact = counted(labels, logits, range(3))
    drawn = np.concatenate([counted(labels, logits, range(3), 1.0) - exact for _ in range(40)])
    assert stats.kstest(drawn / 2.0, "norm").pvalue > 1e-6


def test_noised_counts_of_several_sites_add_up():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 2, 60), rng.normal(size=(60, 1))
    halves = [slice(0, 30), slice(30, 60)]
    records = [
        {"noised-counts": noised_counts(labels[h], logits[h], range(30), 0.0)} for h in halves
    ]
    assert pool(records) == noised_metrics(counted(labels, logits, range(60)))


def test_noise_that_drowns_everything_gives_no_figures_that_cannot_be():
    rng = np.random.default_rng(1)
    for _ in range(40):
        found = noised_metrics(rng.normal(size=64) * 50)
        assert found["num-examples"] >= 0
        assert all(0 <= value <= 1 for name, value in found.items() if name != "num-examples")
    assert noised_metrics(np.full(64, -1.0)) == {"num-examples": 0.0}


@pytest.mark.parametrize(
    "value", [[1.0] * 63, [1.0] * 132, [float("nan")] * 64, [float("inf")] * 64, 3.0, []]
)
def test_noised_counts_that_cannot_be_pooled_are_told(value):
    text = "noised-counts must be a list of finite numbers whose length fits a number of classes"
    assert check_counts({"noised-counts": value, "num-examples": 3}) == text
    assert check_counts({"noised-counts": [0.0] * 64, "num-examples": 3}) is None
    assert check_counts({"noised-counts": [0.0] * 201, "num-examples": 3}) is None


@pytest.mark.parametrize("key", ["noised-counts", "noised-dice"])
@pytest.mark.parametrize("value", [1e308, math.nan, math.inf])
def test_noised_counts_that_cannot_be_added_up_are_refused(key, value):
    assert check_counts({key: [value] * 64, "num-examples": 3}).startswith(f"{key} must be")
    assert check_counts({key: [1.5] * 64, "num-examples": 3}) is None
