import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from fedmed_flower.metrics import check_counts, class_margins, classification_metrics, pool


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
        ("score-counts", lambda v: [-1, *v[1:-1], v[-1] + 1], "whole numbers of at least 0"),
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
