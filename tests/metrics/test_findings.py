import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import average_precision_score, brier_score_loss, recall_score, roc_auc_score

from fedmed_flower.metrics.classification import noised_metrics
from fedmed_flower.metrics.findings import finding_metrics, mean_over_findings, noised_findings
from fedmed_flower.metrics.names import NOISED
from fedmed_flower.metrics.pooling import check_counts, pool
from fedmed_flower.metrics.summing import record_of_sums, sums_of_record

NAMES = ("edema", "nodule", "mass")


def hospital(seed, count=200, unread=()):
    """Return truth, with NaN where nobody has looked, and log-odds."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, (count, 3)).astype(float)
    logits = 2 * truth - 1 + rng.normal(0, 1.5, (count, 3))
    truth[rng.random((count, 3)) < 0.2] = np.nan
    truth[:, [NAMES.index(name) for name in unread]] = np.nan
    return truth, logits


def measured(seed, unread=(), coarse=False, **more):
    truth, logits = hospital(seed, unread=unread, **more)
    rows = [range(len(truth))] * 3
    return finding_metrics(NAMES, truth, logits, range(len(truth)), rows, coarse)


def test_a_finding_is_measured_where_it_was_read():
    truth, logits = hospital(1)
    found = measured(1)
    assert found["num-examples"] == 200
    for number, name in enumerate(NAMES):
        read = ~np.isnan(truth[:, number])
        y, z = truth[read, number], logits[read, number]
        expected = {
            "num-examples": read.sum(),
            "auc": roc_auc_score(y, z),
            "average-precision": average_precision_score(y, z),
            "brier": brier_score_loss(y, expit(z)),
            "sensitivity": recall_score(y, z > 0),
        }
        for key, value in expected.items():
            assert found[f"{key}@finding={name}"] == pytest.approx(value), key
    aucs = [found[f"auc@finding={name}"] for name in NAMES]
    assert found["auc"] == pytest.approx(np.mean(aucs))


def test_hospitals_are_pooled_by_the_findings_that_they_read():
    records = [measured(1), measured(2, unread=["nodule"]), measured(3, unread=["mass"])]
    assert "auc@finding=nodule" not in records[1]
    assert [check_counts(record) for record in records] == [None] * 3
    pooled = pool(records)
    parts = [hospital(1), hospital(2, unread=["nodule"]), hospital(3, unread=["mass"])]
    truth = np.concatenate([part[0] for part in parts])
    logits = np.concatenate([part[1] for part in parts])
    for number, name in enumerate(NAMES):
        read = ~np.isnan(truth[:, number])
        y, z = truth[read, number], logits[read, number]
        assert pooled[f"num-examples@finding={name}"] == read.sum()
        assert pooled[f"auc@finding={name}"] == pytest.approx(roc_auc_score(y, z), abs=1e-3)
        assert pooled[f"sensitivity@finding={name}"] == pytest.approx(recall_score(y, z > 0))
    assert pooled["num-examples"] == 600
    aucs = [pooled[f"auc@finding={name}"] for name in NAMES]
    assert pooled["auc"] == pytest.approx(np.mean(aucs))


def test_sums_give_what_pooling_gives_and_hold_no_mean_over_findings():
    records = [measured(1), measured(2, unread=["nodule"])]
    parts = [sums_of_record(record) for record in records]
    assert "sum/auc" not in parts[0]
    total = {name: sum(part.get(name, 0) for part in parts) for name in {**parts[0], **parts[1]}}
    summed = pool([record_of_sums(total)])
    pooled = pool(records)
    assert summed.keys() == pooled.keys()
    for name, value in pooled.items():
        assert summed[name] == pytest.approx(value, abs=3e-3), name


def test_coarse_figures_have_bounds_for_each_finding():
    pooled = pool([measured(1, coarse=True), measured(2, coarse=True)])
    for name in NAMES:
        low, high = pooled[f"auc-low@finding={name}"], pooled[f"auc-high@finding={name}"]
        assert low <= pooled[f"auc@finding={name}"] <= high
    assert pooled["auc-low"] <= pooled["auc"] <= pooled["auc-high"]


def test_without_noise_noised_counts_give_the_figures_up_to_their_bins():
    truth, logits = hospital(4, 400)
    found = noised_findings(NAMES, truth, logits, range(400), 0.0)
    plain = measured(4, count=400)
    assert check_counts(found) is None
    for name in NAMES:
        for key, tolerance in (("num-examples", 0), ("sensitivity", 1e-9), ("auc", 0.01)):
            key = f"{key}@finding={name}"
            assert found[key] == pytest.approx(plain[key], abs=tolerance), key
    assert found["num-examples"] == max(found[f"num-examples@finding={n}"] for n in NAMES)
    assert pool([found, found])["auc"] == pytest.approx(found["auc"])


def test_the_noise_of_each_finding_covers_a_patient_in_all(monkeypatch):
    seen = []

    def noised_once(total, scale):
        seen.append(scale)
        return total

    monkeypatch.setattr("fedmed_flower.metrics.classification.noised_once", noised_once)
    truth, logits = hospital(5, 30)
    noised_findings(NAMES, truth, logits, range(30), 2.0)
    assert seen == [2.0 * 3**0.5] * 3


def test_a_finding_that_nobody_read_has_counts_with_noise_and_no_figures():
    truth, logits = hospital(6, 50, unread=["mass"])
    found = noised_findings(NAMES, truth, logits, range(50), 0.0)
    assert found["num-examples@finding=mass"] == 0
    assert not any(found[f"{NOISED}@finding=mass"])
    assert noised_metrics(found[f"{NOISED}@finding=edema"])["num-examples"] > 30


def test_groups_of_patients_are_not_averaged():
    assert mean_over_findings({"auc@sex=f": 0.5, "auc": 0.7}) == {}
