"""The heat map of each model at each hospital, as a table."""

import json
import re

import pytest
from crossed_runs import SITES, SUMMARY, elsewhere
from html_pages import Page

from fedmed_flower.reports import frame, plots
from fedmed_flower.reports.crossed import crossed
from fedmed_flower.reports.heat import models_at_hospitals
from fedmed_flower.reports.report import write_report


def drawn(summary=SUMMARY, sites=SITES, metric="auc"):
    return models_at_hospitals(crossed(summary, sites, metric), plots.styles([*sites]))


def test_each_cell_has_its_figure_its_colour_and_its_marks():
    table = Page(drawn()).table("AUC of each model on the test records of each hospital")
    assert table["Trained alone at"] == SITES
    assert table["north"] == [
        "0.900 best here, at home",
        "0.500",
        "– too few test patients, or all of one class",
    ]
    assert table["south"][:2] == ["– that hospital sent no result of this model", "0.600 at home"]
    assert table["Federated"][:2] == ["0.800", "0.700"]
    assert table["Own models, each at home"][0] == "0.850"
    assert table["Trained on pooled data"][1] == "0.710 best here"
    html = drawn()
    assert '<td class="h8 home" data-v="0.9"><b>0.900</b>' in html
    assert '<td class="h0" data-v="0.5">0.500' in html
    assert html.count('scope="col"') == 4
    assert html.count('scope="row"') == 6
    # Hospitals alone are sorted and highlighted, models of all are not.
    assert html.count("data-site=") == 3
    assert '<tfoot><tr><th scope="row">Federated' in html


@pytest.mark.parametrize(
    ("kind", "head", "caption", "one", "such", "mark"),
    [
        ("own", "Own model of", "hospitals' own models", "a hospital's own model", "an own model",
         "own model"),
        ("personal", "Fine-tuned at", "fine-tuned models", "a model that a hospital has fine-tuned",
         "a fine-tuned model", "fine-tuned model"),
    ],
)  # fmt: skip
def test_models_that_hospitals_keep_have_a_table_of_their_own(kind, head, caption, one, such, mark):
    html = drawn(elsewhere(kind))
    page = Page(html)
    table = page.table(f"AUC of {caption} on the test records of each hospital")
    assert table[head] == SITES
    assert table["north"] == ["0.950 best here, at home", "0.650", "0.550"]
    assert table["south"] == [
        "– tested at home only",
        "– that hospital sent no result of this model",
        "– tested at home only",
    ]
    assert table["west"][2] == "0.700 best here, at home"
    first = page.table("AUC of each model on the test records of each hospital")
    assert first["north"][:2] == ["0.900 at home", "0.500"]
    assert [*first][-2:] == ["Federated", "Trained on pooled data"]
    # One scale of colours for both, and both are sorted and highlighted.
    assert '<td class="h8 home" data-v="0.95">' in html
    assert '<td class="h6" data-v="0.82">' in html
    assert '<td class="h7" data-v="0.82">' in drawn()
    assert html.count("data-site=") == 6
    assert html.count("<tfoot>") == 1
    assert f"reaches 0.500; {one} reaches 0.825 there on average; at another" in page.text
    assert f"at another hospital {such} reaches 0.600; the federated model" in page.text
    assert f"– in the row of south ({mark}): tested at home only. " in page.text
    assert "– in the row of west: this model could not be trained or tested. " in page.text
    assert "if it could not be sent there, the log says why." in page.text.replace("\n", " ")


def test_the_page_says_why_models_that_hospitals_keep_were_tested_at_home_only():
    text = "is tested elsewhere in a simulation only"
    assert text in Page(drawn()).text
    summary = json.loads(json.dumps(SUMMARY))
    del summary["test"]["own"]
    assert text not in Page(drawn(summary)).text


def test_words_key_and_notes():
    text = Page(drawn()).text
    assert (
        "AUC, higher is better: a model that one hospital has trained alone reaches 0.750 there on "
        "average; at another hospital such a model reaches 0.500; the federated model reaches "
        "0.750."
    ) in text
    assert "worst 0.500" in text
    assert "0.900 best" in text
    assert "– in the column of west: too few test patients, or all of one class. " in text
    assert "– in the row of west: this model could not be trained or tested. " in text
    assert "– elsewhere: that hospital sent no result of this model. " in text
    lower = json.loads(json.dumps(SUMMARY).replace('"auc"', '"mae"').replace('"loss"', '"x"'))
    text = Page(drawn(lower, metric="mae")).text
    assert "MAE, lower is better" in text
    assert "worst 0.900" in text
    assert models_at_hospitals(None, {}) == ""
    # One hospital has no other, and this run has no federated figure.
    one = {"test": {"local": {"north": {"sites": {"north": {"auc": 0.9}}}}}}
    said = Page(drawn(one, ["north"])).text
    assert "trained alone reaches 0.900 there on average." in said


def many(count):
    names = [f"h{number}" for number in range(count)]
    return names, {
        "test": {
            "sites": {name: {"auc": 0.8} for name in names},
            "local": {
                model: {"sites": {site: {"auc": 1.0 if site == model else 0.7} for site in names}}
                for model in names
            },
        }
    }


def test_of_many_hospitals_figures_are_short_and_of_very_many_there_is_the_spread():
    names, summary = many(12)
    html = drawn(summary, names)
    assert 'class="heat many"' in html
    assert ">.70</td>" in html
    assert "<b>1.00</b>" in html
    assert "Rounded to two digits" in html
    names, summary = many(frame.MANY + 1)
    html = drawn(summary, names)
    assert "heat" not in html
    table = Page(html).table("AUC of models trained at one hospital alone")
    assert table["Hospital"] == ["At home", "Mean elsewhere", "Worst elsewhere"]
    assert table["Median"] == ["1.000", "0.700", "0.700"]
    summary["test"]["own"] = {
        model: {"auc": 0.9, "sites": {site: {"auc": 0.75} for site in names}} for model in names
    }
    both = Page(drawn(summary, names))
    assert both.table("AUC of models trained at one hospital alone") == table
    assert both.table("AUC of hospitals' own models")["Median"] == ["0.900", "0.750", "0.750"]
    assert "cross-sites.csv" in html


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '" onload="x', "\ud800\x00", ""])
def test_hostile_names_are_text(name):
    text = json.dumps(SUMMARY).replace('"north"', json.dumps(name))
    html = drawn(json.loads(text), [name, "south", "west"])
    parsed = Page(html)
    assert "<script" not in html
    assert not [tag for tag, attrs in parsed.tags if "onload" in attrs]
    shown = name.replace("\ud800\x00", "\ufffd\ufffd") or "–"
    table = parsed.table("AUC of each model")
    assert table["Trained alone at"][0] == shown
    assert table[shown][0] == "0.900 best here, at home"


def test_the_page_has_it_beneath_the_comparison(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    page = write_report(tmp_path).read_text()
    headings = re.findall(r"<h[23][^>]*>(.*?)</h[23]>", page)
    assert headings.index("Each model at each hospital") == headings.index("Was it worth it?") + 1
    assert 'style="' not in page
