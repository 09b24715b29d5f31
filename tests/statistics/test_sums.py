"""Statistics by secure sums give what plain ones give, and show no single hospital."""

import json

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from key_files import make_hospitals
from statistics_rows import make_patients
from surveys import Ward, surveyed
from tiny import context_of, says

from fedmed_flower import SiteData
from fedmed_flower.clients.app import answer as answer_of
from fedmed_flower.engines.local import LocalGrid
from fedmed_flower.errors import InputError
from fedmed_flower.statistics import client as hospital
from fedmed_flower.statistics.request import Request, Survival, parse_filter
from fedmed_flower.wire import MESSAGE_VERSION

SUM = {"run_config": {"secure": "sum"}}
CENTRES = {"sex": ("f", "m"), "centre": ("a", "b", "c")}
QUESTION = Request(
    columns=("age", "lab", "sex", "centre"),
    categories=CENTRES,
    kinds=("tables", "moments", "correlations"),
    pairs=(("sex", "centre"),),
)


def ward(*counts, change=lambda rows, site: rows):
    """Return hospitals with so many patients each."""

    class Counted(Ward):
        def load_data(self, site):
            rows = make_patients(counts[site.index], site.index, f"{site.index}-")
            return SiteData(change(rows, site), source="made up", generated=True)

    return Counted


def both(client, request, folder, sites=4):
    plain = surveyed(client, request, folder / "plain", sites)
    summed = surveyed(client, request, folder / "sums", sites, **SUM)
    return plain.overall(), summed.overall(), summed


def same(one, other):
    """Compare two figures to nine digits, and all else exactly."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            same(*pair)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-9, abs=1e-12)
    else:
        assert one == other


def without_hospitals(figures):
    """Return figures without over how many hospitals correlations and tables are."""
    for part in (*figures["correlations"], *figures["pairs"]):
        part.pop("hospitals")
    return figures


def test_figures_are_those_of_the_plain_survey(tmp_path):
    def change(rows, site):
        # Of each pair of categories there are enough.
        return [{**row, "centre": "a" if row["centre"] == "c" else row["centre"]} for row in rows]

    plain, sums, answer = both(ward(350, 400, 500, 420, change=change), QUESTION, tmp_path)
    same(without_hospitals(plain), without_hospitals(sums))
    assert sums["numeric"]["lab"]["hospitals"] == 4
    assert [entry["columns"] for entry in sums["correlations"]] == [["age", "lab"]]
    assert sums["pairs"][0]["counts"] == plain["pairs"][0]["counts"]
    assert list(answer.sites) == ["sum of 4 hospitals"]
    assert answer.generated
    assert answer.members == [f"hospital-{n}" for n in (1, 2, 3, 4)]
    page = (tmp_path / "sums" / "report.html").read_text()
    assert "The sums are over hospital-1, hospital-2, hospital-3, hospital-4." in page


def test_conditions_and_moments_alone(tmp_path):
    request = Request(columns=("age", "lab"), kinds=("moments",), where=(parse_filter("age>=40"),))
    plain, sums, _ = both(ward(150, 200, 160, 120), request, tmp_path)
    same(plain, sums)


def test_quantiles_lie_between_edges_at_which_all_hospitals_count(tmp_path):
    request = Request(
        columns=("age",),
        kinds=("moments", "histograms"),
        ranges={"age": (20.0, 90.0)},
        resolutions={"age": 5.0},
    )
    client = ward(350, 400, 500, 120)
    plain, sums, answer = both(client, request, tmp_path)
    (group,) = answer.sites["sum of 4 hospitals"]["groups"]
    histogram = group["numeric"]["age"]["histogram"]
    assert set(histogram["edges"]) <= {5.0 * step for step in range(4, 19)}
    assert len(histogram["edges"]) >= 4
    ages = np.array(
        [
            row["age"]
            for site, count in enumerate((350, 400, 500, 120))
            for row in make_patients(count, site, f"{site}-")
        ]
    )
    edges = [-np.inf, *histogram["edges"], np.inf]
    assert histogram["counts"] == np.histogram(ages, edges)[0].tolist()
    for share, bounds in sums["numeric"]["age"]["quantiles"].items():
        assert bounds["low"] <= np.quantile(ages, float(share)) <= bounds["high"]
        assert bounds["low"] <= plain["numeric"]["age"]["quantiles"][share]["low"]
        assert bounds["high"] >= plain["numeric"]["age"]["quantiles"][share]["high"]


def test_a_range_of_too_many_cells_is_refused(tmp_path):
    request = Request(
        columns=("age",),
        kinds=("histograms",),
        ranges={"age": (0.0, 1e6)},
        resolutions={"age": 1.0},
    )
    text = (
        "the range of age must have at most 1000 cells, got 0 to 1e+06 in cells of 1.0: choose a "
        "larger --resolution"
    )
    with pytest.raises(InputError, match=says(text)):
        surveyed(Ward, request, tmp_path / "run", **SUM)


def test_a_column_in_any_unit(tmp_path):
    def change(rows, site):
        return [{**row, "lab": row["age"] * 1e-15, "age": row["age"] * 1e15} for row in rows]

    client = ward(150, 200, 160, 120, change=change)
    request = Request(columns=("age", "lab"), kinds=("moments", "correlations"))
    plain, sums, _ = both(client, request, tmp_path)
    # Two columns of which one follows from the other have a correlation of 1, but for rounding.
    assert sums["correlations"][0]["r"] == pytest.approx(1, abs=1e-9)
    for figures in (plain, sums):
        figures["correlations"] = []
    for name in ("age", "lab"):
        for figure in ("mean", "sd"):
            expected = plain["numeric"][name][figure]
            assert sums["numeric"][name][figure] == pytest.approx(expected, rel=1e-9)


def test_what_too_few_hospitals_tell_is_not_asked_for(tmp_path):
    def change(rows, site):
        if site.index == 0:
            rows = [{**row, "lab": None} if index > 3 else row for index, row in enumerate(rows)]
        if site.index < 2:
            rows = [{name: value for name, value in row.items() if name != "age"} for row in rows]
        return rows

    client = ward(150, 200, 260, 220, 150, change=change)
    request = Request(columns=("age", "lab"))
    _, sums, answer = both(client, request, tmp_path, sites=5)
    assert list(sums["numeric"]) == ["lab"]
    assert sums["numeric"]["lab"]["hospitals"] == 4
    assert answer.sites["sum of 5 hospitals"]["withheld"] == [
        ["", "age", "3 of 5 hospitals tell it, and a sum needs 4"],
        ["", "lab", "4 of 5 hospitals tell it: the figure is of these"],
    ]
    text = (tmp_path / "sums" / "report.html").read_text()
    assert "4 of 5 hospitals tell it: the figure is of these" in text


def test_the_rest_of_one_hospital_is_not_known_by_subtraction(tmp_path):
    def change(rows, site):
        # Only one hospital has centres that the question lacks.
        if site.index != 2:
            return [
                {**row, "centre": "a" if row["centre"] == "c" else row["centre"]} for row in rows
            ]
        return [{**row, "centre": "z" if row["centre"] == "c" else row["centre"]} for row in rows]

    client = ward(350, 400, 900, 420, change=change)
    request = Request(columns=("centre",), categories={"centre": ("a", "b")})
    plain, sums, _ = both(client, request, tmp_path)
    counts = plain["categorical"]["centre"]["counts"]
    assert counts["z"] >= 10
    found = sums["categorical"]["centre"]
    assert found["counts"] == {"a": counts["a"]}
    assert found["few"] == counts["b"] + counts["z"]


def test_a_hospital_that_is_lost_loses_the_sum(tmp_path, monkeypatch):
    original = hospital.tallies

    def failing(client, message):
        if client.site.name == "hospital-2":
            raise OSError("the disk is gone")
        return original(client, message)

    monkeypatch.setattr(hospital, "tallies", failing)
    with pytest.raises(InputError) as error:
        surveyed(
            ward(150, 200, 160, 120, 90), Request(columns=("age",)), tmp_path / "run", 5, **SUM
        )
    assert str(error.value).startswith(
        "no hospital has sent statistics: the secure sum of tallies is lost: hospital-2 could not "
        "be added, and figures of patients are summed over all 5 hospitals or not at all; "
        "hospital-2: OSError: the disk is gone. Ask again when all of them answer"
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"


def test_a_hospital_that_declines_takes_no_part(tmp_path):
    class Noised(Ward):
        def load_data(self, site):
            rows = make_patients(100 + site.index, site.index, f"{site.index}-")
            return SiteData(rows, source="made up")

        @property
        def secretive(self):
            return self.site.index == 1

    answer = surveyed(Noised, Request(columns=("age",)), tmp_path / "run", 5, **SUM)
    assert answer.members == [f"hospital-{number}" for number in (1, 3, 4, 5)]
    assert answer.overall()["patients"] == 100 + 102 + 103 + 104
    assert answer.failures == [
        (
            "hospital-2",
            "declined: this hospital, or this run, protects patients by noise, and a secure sum of "
            "statistics carries none",
        )
    ]


def test_no_reply_holds_a_number_of_one_hospital(tmp_path, monkeypatch):
    replies = []
    original = LocalGrid.pull_within

    def noting(self, ids, timeout):
        pulled, seconds = original(self, ids, timeout)
        replies.extend(pulled)
        return pulled, seconds

    monkeypatch.setattr(LocalGrid, "pull_within", noting)
    surveyed(ward(150, 200, 160, 120), Request(columns=("age", "lab")), tmp_path / "run", **SUM)
    assert {name for reply in replies for name in reply.content} == {"masked", "secure", "site"}
    words = [
        reply.content["masked"]["words64"].numpy() for reply in replies if "masked" in reply.content
    ]
    assert len(words) == 16
    # Bare, all counts are below 2^56.
    assert np.mean(np.concatenate(words) > 1 << 56) > 0.9


def test_real_hospitals_answer_in_sums_alone_and_later_over_the_same(tmp_path):
    names = ("north", "south", "east")
    nodes = [
        config | {"secure-only": "statistics"}
        for config in make_hospitals(tmp_path, names).values()
    ]

    class Real(Ward):
        def load_data(self, site):
            number = names.index(site.name)
            rows = make_patients((150, 200, 160)[number], number, f"{site.name}-")
            return SiteData(rows, source="made up")

    request = Request(columns=("age",))
    answer = surveyed(Real, request, tmp_path / "run", 3, nodes, **SUM)
    assert answer.members == sorted(names)
    assert answer.overall()["patients"] == 510
    assert answer.overall()["numeric"]["age"]["hospitals"] == 3
    again = surveyed(Real, request, tmp_path / "again", 3, nodes, **SUM)
    assert again.overall() == answer.overall()
    declined = (
        "declined: statistics would tell this hospital's own figures, which leave in secure sums "
        'alone: ask for it by secure="sum" in the run config'
    )
    with pytest.raises(InputError, match=says(f"no hospital has sent statistics: {declined}")):
        surveyed(Real, request, tmp_path / "plain", 3, nodes)


def test_what_is_no_question_of_a_sum_is_refused_by_the_hospital(tmp_path):
    content = RecordDict({"config": ConfigRecord({"version": MESSAGE_VERSION})})
    message = Message(content, 1, "query.tallies")
    reply = answer_of(Ward, "fedmed_flower.statistics.client:tallies", message, context_of(0, 4))
    assert "statistics are counted in a secure sum alone" in reply.error.reason


ALONE = {"columns": ("age",)}


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({}, "a question about all columns: name them: --column"),
        (ALONE | {"by": "sex"}, "by: ask for one group at a time: --where"),
        (
            ALONE | {"by": "age", "by_width": 10.0},
            "windows: ask for one window at a time: --where",
        ),
        (
            ALONE | {"weekly": "day"},
            "weekly counts, of which hospitals leave out some: leave them out",
        ),
        (
            ALONE | {"survival": Survival("time", "event", 10.0, 1.0)},
            "a survival curve, whose times each hospital merges: leave it out",
        ),
        (
            ALONE | {"kinds": ("histograms",)},
            "quantiles of age without its range, from which the cells follow that all hospitals "
            "count: declare it: --range age=LOW,HIGH",
        ),
        (ALONE | {"epsilon": 1.0}, "noise (epsilon): leave --epsilon out"),
        (
            ALONE | {"pairs": (("sex", "centre"),)},
            "sex without its categories, which hospitals would have to name: declare them: "
            "--categories sex=A,B",
        ),
    ],
)
def test_what_is_no_sum_is_refused_by_name(tmp_path, request_, text):
    with pytest.raises(InputError, match=says(f'secure="sum" excludes {text}')):
        surveyed(Ward, Request(**request_), tmp_path / "run", **SUM)
    assert not (tmp_path / "run").exists()


def test_drift_is_refused(tmp_path):
    text = 'secure="sum" excludes drift, which compares single hospitals: leave it out'
    with pytest.raises(InputError, match=says(text)):
        surveyed(Ward, Request(columns=("age",)), tmp_path / "run", drift="sites", **SUM)
