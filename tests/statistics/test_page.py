"""Drawings show a line where a figure is known, and a band between its bounds elsewhere."""

import numpy as np
import pytest

from fedmed_flower.reports import plots
from fedmed_flower.statistics import page
from fedmed_flower.statistics.curve import pool_noised_survival, pool_survival


@pytest.fixture
def drawn(monkeypatch):
    """Return the axes that are drawn."""
    found = []
    monkeypatch.setattr(plots, "svg", lambda axes, *_, **__: found.append(axes) or "<svg/>")
    return found


def group(curve, sites=("north",)):
    return {"overall": {"survival": curve._asdict() | {"sites": [*sites]}}, "sites": {}}


def outline(axes):
    """Return the corners of the band."""
    (band,) = axes.collections
    return {(float(x), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}


def test_a_curve_is_a_line_as_far_as_it_is_known(drawn):
    part = {"times": [1.0, 2.0, 4.0], "events": [2, 2, 2], "censored": [0, 0, 4]}
    text = page._survival(group(pool_survival([part], 4.0, 1.0)), plots.styles(["north", "west"]))
    (axes,) = drawn
    *_, line = axes.lines
    assert line.get_xdata().tolist() == [0.0, 1.0, 2.0]
    assert line.get_ydata() == pytest.approx([1.0, 0.8, 0.6])
    assert line.get_drawstyle() == "steps-post"
    # From 2 to 4 it may have fallen at once, after the four were censored, or not at all.
    assert {(2.0, 0.6), (4.0, 0.6), (2.0, 0.0), (4.0, 0.0)} <= outline(axes)
    # From 0 to 1 it lies between 1 and what it is at 1.
    assert {(0.0, 1.0), (1.0, 1.0), (0.0, 0.8), (1.0, 0.8)} <= outline(axes)
    assert "10 patients of 1 of 2 hospitals; not west" in text


def test_a_curve_with_noise_has_no_band(drawn):
    part = {"times": [1.0, 2.0], "events": [2.5, 2.0], "censored": [0.5, 4.0]}
    page._survival(group(pool_noised_survival([part])), plots.styles(["north"]))
    (axes,) = drawn
    assert not axes.collections
    assert axes.lines[0].get_xdata().tolist() == [0.0, 1.0, 2.0]


def test_a_group_that_is_not_pooled_says_so(drawn):
    text = page._survival(group(pool_survival([], 4.0, 1.0), ()), plots.styles(["north"]))
    assert "Kaplan-Meier, not pooled" in text


def test_a_distribution_is_a_line_where_all_hospitals_have_an_edge(drawn):
    parts = {
        "north": {"edges": [0.0, 1.0, 2.0, 3.0], "counts": [0, 10, 10, 10, 0]},
        "west": {"edges": [0.0, 1.0, 3.0], "counts": [0, 10, 20, 0]},
    }
    histograms = {site: {"histogram": part} for site, part in parts.items()}
    page._histogram("x", histograms, plots.styles(["north", "west"]))
    (axes,) = drawn
    shares = axes.lines[-1].get_ydata()
    np.testing.assert_allclose(shares, [0, 100 / 3, np.nan, 100])
    assert {(2.0, 50.0), (2.0, round(500 / 6, 6))} <= outline(axes)


def test_groups_stand_side_by_side_over_the_same_hospitals(drawn):
    part = {"times": [1.0, 2.0], "events": [2, 2], "censored": [0, 4]}
    curve = pool_survival([part], 2.0, 1.0)
    survey = {
        "request": {"by": "<stage>"},
        "sites": {"north": {}, "west": {}},
        "groups": {"I": group(curve), "II": group(curve), "III": group(curve, ())},
    }
    text = page._side_by_side(survey)
    (axes,) = drawn
    # Of each of the two groups a line, and the edges of its band.
    assert len(axes.lines) == 6
    assert len(axes.collections) == 2
    assert "Survival by &lt;stage&gt;" in text
    assert "each group of the same 1 of 2 hospitals; not west" in text
    del survey["groups"]["II"]
    assert page._side_by_side(survey) == ""


def test_a_drawing_of_weeks_says_what_its_colour_and_cross_mean():
    weeks = {"site": "north", "group": "", "weeks": ["2020-01-06", "2020-01-13", "2020-01-20"]}
    found = page._weeks(weeks | {"counts": [10, 40, None], "alert": [False, True, None]})
    assert "rows by week · 1 alert (orange) · × withheld</figcaption>" in found
    quiet = page._weeks(weeks | {"counts": [10, 40, 11], "alert": [False, False, None]})
    assert "rows by week · 0 alerts</figcaption>" in quiet


def test_what_was_asked_is_written_as_words():
    assert page._listed(["age", "sex"]) == "age, sex"
    assert page._listed(["time", "event", 9.0, 1.0]) == ["time", "event", 9.0, 1.0]
    assert page._listed("age") == "age"
