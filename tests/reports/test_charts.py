"""Charts that the report draws itself."""

import re

import pytest

from fedmed_flower.reports.charts import Chart, axis


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], (0.0, 0.25, 0.5, 0.75, 1.0)),
        ([0.91, 0.93], (0.91, 0.915, 0.92, 0.925, 0.93)),
        ([-3.0, 9.0], (-2.5, 0.0, 2.5, 5.0, 7.5)),
        ([1e6, 9e6], (2e6, 4e6, 6e6, 8e6)),
    ],
)
def test_ticks_are_round_numbers(values, ticks):
    found = axis("", values)
    assert found.ticks == pytest.approx(ticks)
    assert found.low < min(values)
    assert found.high > max(values)


@pytest.mark.parametrize(
    "values", [[0.5], [0.0, 0.0], [1e99, -1e99], [1e12, 1e12 + 1e-3], [1e-300]]
)
def test_any_numbers_have_an_axis(values):
    found = axis("", values)
    assert found.low < found.high
    assert len(found.ticks) <= 12


def test_rounds_are_whole():
    assert axis("round", [1, 2], whole=True).ticks == (1, 2)
    assert axis("round", [1], whole=True).ticks == (1,)
    assert axis("round", range(1, 101), whole=True).ticks == (0, 25, 50, 75, 100)


def points(drawing):
    (path,) = re.findall(r'<polyline class="l" points="([^"]*)"', drawing)
    return [tuple(map(float, pair.split(","))) for pair in path.split()]


def test_points_lie_where_their_values_are():
    x = axis("round", [], (0.0, 10.0))
    y = axis("AUC", [], (0.0, 1.0))
    chart = Chart("AUC over rounds", x, y)
    chart.line("north", [(0, 0), (5, 0.5), (10, 1)], "s0", site="north")
    (left, bottom), middle, (right, top) = points(chart.svg())
    assert middle == pytest.approx(((left + right) / 2, (top + bottom) / 2), abs=0.1)
    assert (right, bottom) == (330, 186)
    assert top < bottom


def test_values_are_there_for_the_script():
    chart = Chart("AUC", axis("round", [1, 2], whole=True), axis("AUC", [0.5, 0.75]))
    more = ["10 records", "12 records"]
    chart.line('a "<b>', [(1, 0.5), (2, 0.75)], "s0", site='a "<b>', more=more)
    drawing = chart.svg()
    assert 'data-name="a &quot;&lt;b&gt;" data-site="a &quot;&lt;b&gt;"' in drawing
    assert 'data-x="1 2" data-y="0.500 0.750" data-more="10 records;12 records"' in drawing
    assert len(re.search(r'data-at="([^"]*)"', drawing)[1].split()) == 2
    assert "style=" not in drawing
