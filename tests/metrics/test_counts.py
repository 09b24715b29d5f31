"""Counts of a test, as the run folder keeps them."""

import json

import numpy as np
import pytest

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.auc import EDGES
from fedmed_flower.metrics.classification import noised_counts
from fedmed_flower.metrics.counts import COUNTS_FILE, counted, histogram_edges, read_counts
from fedmed_flower.metrics.outcomes import outcome_metrics
from fedmed_flower.metrics.pooling import pool

NORTH = outcome_metrics("binary", [0, 0, 1, 1], [-2.0, 1.0, 0.5, 3.0])
SOUTH = outcome_metrics("binary", [0, 1, 1], [-1.0, -0.5, 2.0])


def written(folder, counts):
    text = json.dumps(counts.content(), allow_nan=False)
    (folder / COUNTS_FILE).write_text(text)
    return json.loads(text)


def test_counts_of_two_hospitals_by_hand(tmp_path):
    counts = counted({"north": NORTH, "south": SOUTH}, ["healthy", "sick"])
    content = written(tmp_path, counts)
    assert content["version"] == 1
    assert content["classes"] == ["healthy", "sick"]
    north = content["sites"]["north"]
    assert north["rows"] == 4
    # One healthy patient was taken for a sick one; in the south one sick patient was missed.
    assert north["confusion"] == [[1, 1], [0, 2]]
    assert content["all"]["confusion"] == [[2, 1], [1, 3]]
    assert content["all"]["rows"] == 7
    (histogram,) = north["histograms"]
    edges = histogram_edges(histogram["centre"], histogram["width"])
    bins = histogram["with"]["bins"]
    assert histogram["with"]["rows"] == [1, 1]
    assert edges[bins[0]] <= 0.5 <= edges[bins[0] + 1]
    assert edges[bins[1]] <= 3.0 <= edges[bins[1] + 1]
    # The log odds -2 of the only bin below 0.2 is a probability of 0.119.
    assert content["all"]["calibration"][1] == [1, pytest.approx(0.1192, abs=1e-4), 0]
    assert edges.shape == EDGES.shape


def test_what_is_read_is_what_was_written(tmp_path):
    counts = counted({"north": NORTH, "south": SOUTH})
    written(tmp_path, counts)
    back = read_counts(tmp_path)
    assert back == counts
    assert back.classes == ("0", "1")
    assert not back.noised
    # The figures are those that the server has from the replies.
    keys = ("auc", "sensitivity", "calibration-error")
    assert [pool([*back.sites.values()])[key] for key in keys] == [
        pool([NORTH, SOUTH])[key] for key in keys
    ]


def test_counts_of_a_coarse_report_and_of_more_classes(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    outputs = rng.normal(size=(300, 3)) + 2 * np.eye(3)[labels]
    for coarse in (False, True):
        record = outcome_metrics("multi-class", labels, outputs, coarse=coarse)
        counts = counted({"north": record})
        content = written(tmp_path, counts)
        histograms = content["sites"]["north"]["histograms"]
        assert [one["class"] for one in histograms] == [0, 1, 2]
        assert [sum(one["with"]["rows"]) for one in histograms] == [100, 100, 100]
        assert all(one["merged"] == coarse for one in histograms)
        assert read_counts(tmp_path) == counts


def test_noised_counts_are_kept_as_they_are(tmp_path):
    noised = noised_counts([0, 1, 1], [[-1.0], [1.0], [2.0]], "abc", 1.0)
    records = {"north": {"num-examples": 3, "noised-counts": noised}}
    counts = counted(records)
    content = written(tmp_path, counts)
    assert content["sites"]["north"] == {"rows": 3, "noised": noised}
    assert content["all"] == {"rows": 3, "noised": noised}
    assert read_counts(tmp_path).noised
    assert counts.confusion() is None


def test_a_part_that_one_hospital_withholds_has_no_total():
    withheld = {key: value for key, value in SOUTH.items() if key != "confusion-counts"}
    counts = counted({"north": NORTH, "south": withheld})
    assert counts.confusion() is None
    assert counts.confusion("south") is None
    assert counts.confusion("north") == [[1, 1], [0, 2]]
    assert counts.calibration() is not None


def test_what_has_no_counts_is_not_kept(tmp_path):
    assert counted({"north": {"num-examples": 3, "dice": 0.8}}) is None
    assert counted({}) is None
    three = outcome_metrics("multi-class", [0, 1, 2], np.eye(3))
    assert counted({"north": NORTH, "south": three}) is None
    assert read_counts(tmp_path) is None
    # What is said of training patients or of groups stays out.
    more = NORTH | {"loss": 0.3, "score-grid@sex=0": [0.0, 1.0, 0.5]}
    assert counted({"north": more}) == counted({"north": NORTH})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(version=2), "version in .* must be 1, got 2: restore it from a copy"),
        (lambda c: c.update(sites=[]), "cannot be shown"),
        (lambda c: c["sites"]["north"].update(rows=5), "north: confusion-counts do not add up"),
        (lambda c: c["sites"]["north"].update(rows=1e99), "rows must be a number from 0 to 1e.12"),
        (lambda c: c["sites"]["north"].update(confusion=[[1, -1], [2, 2]]), "at least 0"),
        (
            lambda c: c["sites"]["north"]["histograms"][0]["with"].update(bins=[1, 99999]),
            "there is no bin 99999: they are from 0 to 2047",
        ),
        (lambda c: c["sites"].update(west={"rows": 3}), "must all have counts"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, words):
    content = counted({"north": NORTH, "south": SOUTH}).content()
    change(content)
    (tmp_path / COUNTS_FILE).write_text(json.dumps(content))
    with pytest.raises(InputError, match=words):
        read_counts(tmp_path)
