"""The sections of a report on the test, as HTML."""

import re

import numpy as np

from fedmed_flower.metrics.classification import noised_counts
from fedmed_flower.metrics.counts import counted
from fedmed_flower.metrics.outcomes import outcome_metrics
from fedmed_flower.reports import evidence, plots
from fedmed_flower.reports.tested import Estimate, Estimates, evidence_of

LABELS = [0, 1] * 40
SCORES = [2.0 * label - 1 + (row % 5 - 2) for row, label in enumerate(LABELS)]
HOSTILE = '"><script>x</script>'


def text_of(page):
    return " ".join(re.sub("<[^>]*>", " ", page).split())


def section(coarse=False, names=("healthy", HOSTILE)):
    records = {
        site: outcome_metrics("binary", LABELS, SCORES, coarse=coarse)
        for site in ("north", "south")
    }
    found = evidence_of(counted(records, names))
    return evidence.curves(found, plots.styles([*records]))


def test_a_forest_row_has_its_interval_in_figures_and_as_a_line():
    listed = Estimates("auc", {"north": Estimate(0.75, (0.5, 1.0), 80)}, Estimate(0.8))
    page = evidence.forest([listed], plots.styles(["north"]), noised=False)
    # The scale goes from 0.475 to 1: 0.5 lies at 4.8%, 0.75 at 52.4%, the total at 61.9%.
    assert 'd="M4.8 6H100.0"' in page
    assert 'd="M52.4 6h0"' in page
    assert 'd="M61.9 0V12"' in page
    assert "0.750 0.500 to 1.000" in text_of(page)
    assert "Lines are 95% intervals" in page


def test_without_intervals_the_forest_says_why():
    listed = Estimates("dice", {"north": Estimate(0.75), "south": Estimate(0.5)}, None)
    styles = plots.styles(["north", "south", "west"])
    page = evidence.forest([listed], styles, noised=False)
    assert "Intervals are not shown: they do not follow" in " ".join(page.split())
    assert "95%" not in page
    assert '<tr data-site="west">' in page
    noised = " ".join(evidence.forest([listed], styles, noised=True).split())
    assert "one from noised counts would be too narrow" in noised
    assert evidence.forest([Estimates("dice", {}, None)], styles, noised=False) == ""


def test_one_value_alone_can_be_drawn():
    for value in (0.0, 1.0, 12.5, -3.0):
        listed = Estimates("mae", {"north": Estimate(value)}, None)
        page = evidence.forest([listed], plots.styles(["north"]), noised=False)
        assert "nan" not in page


def test_curves_of_two_classes():
    page = section()
    assert re.findall(r"<figcaption><b>(.*?)</b>", page) == [
        "ROC curve",
        "Precision and recall",
        "Calibration",
        "Net benefit",
    ]
    assert page.count('data-name="north" data-site="north"') == 2
    matrix = np.asarray([int(cell) for cell in re.findall(r"<td[^>]*>(\d+)<small>", page)]).reshape(
        2, 2
    )
    guess = np.asarray(SCORES) > 0
    right = [((np.asarray(LABELS) == c) & (guess == g)).sum() for c in (0, 1) for g in (0, 1)]
    assert matrix.ravel().tolist() == [2 * count for count in right]
    assert "<script" not in page


def test_coarse_counts_leave_a_sentence_instead_of_curves():
    words = text_of(section(coarse=True))
    assert "There is no curve of all records together: some hospitals report coarsely." in words
    assert "ROC curve" not in words


def test_noised_curves_say_so_and_have_no_interval():
    patients = [str(row) for row in range(len(LABELS))]
    noised = noised_counts(LABELS, np.asarray(SCORES)[:, None], patients, 0.5)
    found = evidence_of(counted({"north": {"num-examples": 80, "noised-counts": noised}}))
    page = evidence.curves(found, plots.styles(["north"]))
    assert "The counts carry noise that protects patients." in page
    assert "interval" not in page.replace("They have no intervals", "")
    assert "Confusion" not in page
    assert 'data-site="north"' not in page


def test_without_counts_there_is_no_section():
    assert evidence.curves(None, {}) == ""
