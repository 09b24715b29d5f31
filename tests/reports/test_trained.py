"""Method, kept layers and saved bytes in a summary, in the report, the card and a comparison."""

import json
import math

import pytest
from html_pages import Page
from run_folders import write_run

from fedmed_flower.reports.card import card
from fedmed_flower.reports.compare import write_comparison
from fedmed_flower.reports.report import write_report
from fedmed_flower.reports.trained import facts, saved_in_words

HOW = {
    "method": "scaffold",
    "kept-layers": [f"norm{number}.weight" for number in range(7)],
    "compression": "int8",
    "saved": {"from-sites": [2_000_000, 7_800_000], "to-sites": [7_800_000, 7_800_000]},
}


def test_what_was_used_is_said_and_nothing_else():
    assert facts(HOW) == {
        "method": "scaffold",
        "kept at each hospital": "7 of the model’s arrays: norm0.weight, norm1.weight, "
        "norm2.weight, norm3.weight, norm4.weight, ...",
        "messages": "int8",
    }
    assert facts({"method": "", "kept-layers": [], "compression": None}) == {}
    assert facts({"method": 3, "kept-layers": "norm", "compression": ["int8"]}) == {}
    assert facts({"kept-layers": [1, None, "norm.bias"]}) == {
        "kept at each hospital": "1 of the model’s arrays: norm.bias"
    }


def test_bytes_both_ways():
    assert saved_in_words(HOW) == [
        "From the hospitals 2.00 MB were sent instead of 7.80 MB (3.9 times fewer).",
        "To the hospitals 7.80 MB were sent: nothing was saved.",
    ]
    more = {"saved": {"from-sites": [3e6, 2e6]}}
    assert saved_in_words(more) == [
        "From the hospitals 3.00 MB were sent, more than the 2.00 MB of whole arrays."
    ]


@pytest.mark.parametrize(
    "pair", ["12", [1], [1, 2, 3], [0, 5], [5, 0], [-1, 5], [1, math.nan], [1, 1e300], ["1", 2]]
)
def test_bytes_that_cannot_be_are_not_told(pair):
    assert saved_in_words({"saved": {"from-sites": pair}}) == []
    assert saved_in_words({"saved": pair}) == []


def test_report_card_and_comparison_name_the_method(tmp_path):
    folder = write_run(tmp_path / "a", **HOW)
    page = Page(write_report(folder).read_text())
    run = page.table("Run")
    assert [*run][2:6] == ["strategy", "method", "kept at each hospital", "messages"]
    assert run["method"] == ["scaffold"]
    assert "instead of 7.80 MB (3.9 times fewer)." in page.text
    text = card(folder)
    assert "| Method | scaffold |" in text
    assert "| Messages | int8 |" in text
    plain = write_run(tmp_path / "b")
    assert "method" not in Page(write_report(plain).read_text()).table("Run")
    both = Page(write_comparison([folder, plain], tmp_path / "page.html").read_text())
    assert both.table("What differs")["method"] == ["scaffold", "–"]


def test_a_method_is_text(tmp_path):
    name = "<script>alert(1)</script>"
    folder = write_run(tmp_path, method=name, kept=[name], compression=name)
    page = write_report(folder).read_text()
    assert page.lower().count("<script") == 1
    assert Page(page).table("Run")["method"] == [name]
    assert name not in card(folder)


def test_saved_bytes_stand_also_without_a_table_of_traffic(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(HOW))
    page = Page(write_report(tmp_path).read_text())
    assert "Traffic" in page.text
    assert "3.9 times fewer" in page.text
