"""What more is asked takes nothing away, and what is withheld can be asked for alone."""

import json
import re
import shlex

import pytest
from statistics_rows import ask, group, make_patients, where, withheld
from surveys import Ward, surveyed

from fedmed_flower import SiteData
from fedmed_flower.data.cohorts import heart_disease
from fedmed_flower.data.schema import Schema, table_of
from fedmed_flower.statistics.request import KINDS, Request
from fedmed_flower.statistics.withheld import BESIDE, FEW, all_withheld

PLAIN = ("tables", "moments")
BANDS = type("Schema", (), {"bands": {"age": (50,)}})


def patients(seed, count=200):
    """Patients of whom a tenth lack a lab value, three a score, and some a mark."""
    rows = make_patients(count, seed)
    for number, row in enumerate(rows):
        row["age-band"] = "<50" if row["age"] < 50 else ">=50"
        row["score"] = None if number < 3 else float(number % 7)
        row["mark"] = None if number % 13 == 0 else str(number % 3)
    return rows


def plain_figures(told):
    """Return what every request discloses: counts, means, spreads and categories."""
    found = group(told)
    numeric = {
        name: {key: value for key, value in reported.items() if key != "histogram"}
        for name, reported in found["numeric"].items()
    }
    return {**numeric, **found["categorical"]}


def heart_hospitals():
    schema = Schema(
        target="disease",
        task="binary",
        numeric=("age", "trestbps", "chol", "thalach", "oldpeak"),
        categorical=("sex", "cp", "fbs", "restecg", "exang"),
        ranges={"age": (18, 100), "trestbps": (60, 260), "chol": (50, 700)}
        | {"thalach": (40, 230), "oldpeak": (-5, 10)},
        bands={"age": (50, 60)},
    )
    tables, _ = heart_disease()
    return schema, {name: table_of(table, schema, name).rows for name, table in tables.items()}


@pytest.mark.parametrize("seed", range(6))
def test_plain_figures_are_the_same_whatever_else_is_asked(seed, tmp_path):
    rows = patients(seed)
    plain = ask(rows, tmp_path / "plain", schema=BANDS, kinds=PLAIN)
    widths = {"age": 5.0, "lab": 2.0, "time": 2.0, "score": 1.0}
    more = {"kinds": KINDS, "resolutions": widths, "pairs": (("sex", "mark"), ("centre", "sex"))}
    full = ask(rows, tmp_path / "full", schema=BANDS, **more)
    assert plain_figures(full) == plain_figures(plain)
    binned = ask(
        rows, tmp_path / "bins", schema=BANDS, kinds=(*PLAIN, "histograms"), resolutions=widths
    )
    for name, reported in group(binned)["numeric"].items():
        assert ("histogram" in group(full)["numeric"][name]) == ("histogram" in reported)


@pytest.mark.realdata
def test_plain_figures_and_medians_of_heart_disease_stay_beside_correlations(tmp_path):
    schema, hospitals = heart_hospitals()
    for name, rows in hospitals.items():
        asked = {
            "plain": {"kinds": PLAIN},
            "quantiles": {"kinds": (*PLAIN, "histograms")},
            "all": {"kinds": KINDS, "pairs": (("sex", "disease"),)},
        }
        plain, quantiles, everything = (
            ask(rows, tmp_path / f"{name}-{kind}", schema=schema, **more)
            for kind, more in asked.items()
        )
        assert plain_figures(everything) == plain_figures(plain)
        binned = group(quantiles)["numeric"], group(everything)["numeric"]
        for column, reported in binned[0].items():
            if "histogram" in reported:
                alone, beside = (len(r[column]["histogram"]["counts"]) for r in binned)
                assert beside >= min(4, alone)


def test_a_histogram_is_made_coarser_for_a_correlation_only_while_quartiles_can_be_read(tmp_path):
    few, many = make_patients(150), make_patients(4000)
    asked = {"columns": ("age", "lab"), "resolutions": {"age": 5.0, "lab": 2.0}}
    alone = ask(few, tmp_path / "alone", kinds=(*PLAIN, "histograms"), **asked)
    beside = ask(few, tmp_path / "beside", kinds=KINDS, **asked)
    assert group(beside)["numeric"] == group(alone)["numeric"]
    assert withheld(beside) == ["correlation of age and lab"]
    assert withheld(ask(many, tmp_path / "many", kinds=KINDS, **asked)) == []


def content(told, **request):
    asked = Request(**request)
    return {
        "request": json.loads(asked.to_text()),
        "sites": {"north": json.loads(json.dumps({"minimum": 10, "noise": None} | told))},
    }


def test_a_figure_that_other_answers_may_withhold_is_asked_for_alone(tmp_path):
    asked = {"kinds": KINDS, "resolutions": {"age": 5.0, "lab": 2.0}, **where("sex == f")}
    told = ask(make_patients(300), tmp_path / "a", **asked)
    (entry,) = [e for e in all_withheld(content(told, **asked)) if "age and lab" in e.what]
    assert (entry.site, entry.group, entry.why) == ("north", "", BESIDE)
    assert entry.alone == Request(
        columns=("age", "lab"),
        where=asked["where"],
        kinds=(*PLAIN, "correlations"),
        resolutions=asked["resolutions"],
    )
    alone = {"columns": entry.alone.columns, "kinds": entry.alone.kinds, "where": asked["where"]}
    assert withheld(ask(make_patients(300), tmp_path / "b", **alone)) == []
    # The same hospital has disclosed the histograms: it remembers them.
    assert withheld(ask(make_patients(300), tmp_path / "a", **alone)) == [entry.what]


def test_counts_that_exclude_a_figure_are_the_reason_the_hospital_gives(tmp_path):
    """Three rows that lack the one column and not the other are too few, whatever was asked."""
    rows = patients(0)
    asked = {"kinds": KINDS, "resolutions": {"age": 5.0, "score": 1.0}}
    told = ask(rows, tmp_path / "a", **asked)
    reasons = {entry.what: entry.why for entry in all_withheld(content(told, **asked))}
    assert reasons["correlation of age and score"] == FEW
    small = ask(make_patients(3), tmp_path / "b", **asked)
    (entry,) = all_withheld(content(small, **asked))
    assert (entry.what, entry.why, entry.alone) == ("patients", FEW, None)


def test_a_hospital_sends_one_reason_whatever_withholds_a_figure(tmp_path):
    asked = {"kinds": KINDS, "resolutions": {"age": 5.0, "lab": 2.0, "score": 1.0}}
    told = ask(patients(1), tmp_path / "a", **asked, pairs=(("sex", "centre"),))
    reasons = {why for _, what, why in told["withheld"] if not what.startswith("histogram")}
    assert reasons == {FEW}


class Half(Ward):
    """Hospitals of which one lacks a lab value of a tenth of its patients."""

    def load_data(self, site):
        rows = make_patients(300, site.index, f"{site.index}-")
        return SiteData(train=rows[1:], val=rows[:1], source="made up", generated=True)


def test_the_page_says_how_to_ask_again_and_the_command_gives_what_was_withheld(tmp_path):
    request = Request(columns=("age", "lab", "sex"), kinds=KINDS, resolutions={"age": 5, "lab": 2})
    given = ["my app", "--sites", "2"]
    surveyed(Half, request, tmp_path / "run", 2, command=given)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    tables = {table["title"]: table for table in summary["tables"]}
    assert [row[3] for row in tables["Withheld"]["rows"]] == [BESIDE] * 2
    ((what, sites, text),) = tables["Ask again"]["rows"]
    assert (what, sites) == ("correlation of age and lab", "hospital-1, hospital-2")
    words = ["fedmed", "statistics", *given, "--column", "age", "--column", "lab"]
    widths = ["--resolution", "age=5", "--resolution", "lab=2"]
    assert shlex.split(text) == [*words, *widths, "--correlations"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert re.search("Ask again.*fedmed statistics &#x27;my app&#x27; --sites 2", page, re.DOTALL)
    assert "A new\nsimulation remembers no answer" in page
    again = Request(columns=("age", "lab"), kinds=(*PLAIN, "correlations"))
    (found,) = surveyed(Half, again, tmp_path / "again", 2).overall()["correlations"]
    assert found["hospitals"] == 2
