"""The report in a browser: nothing is loaded, and the script adds what it should."""

import json

import pytest

from fedmed_flower.metrics.counts import COUNTS_FILE, counted
from fedmed_flower.metrics.outcomes import outcome_metrics
from fedmed_flower.metrics.pooling import pool
from fedmed_flower.reports.report import write_report

HOSTILE = '<img src=x onerror="window.bad=1">"\'${1}</script><script>window.bad=1</script>'
SITES = ("north", "south", HOSTILE)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Write a run of three hospitals, one of them with a hostile name."""
    folder = tmp_path_factory.mktemp("run")
    records = {}
    for number, site in enumerate(SITES):
        labels = [0, 1] * (30 + number)
        scores = [2.0 * label - 1 + ((7 * row) % 5 - 2) for row, label in enumerate(labels)]
        records[site] = outcome_metrics("binary", labels, scores)
    local = {
        model: {
            "auc": 0.9,
            "all": {"auc": 0.8},
            "sites": {
                site: {"auc": 0.9 if site == model else 0.5 + number / 10}
                for number, site in enumerate(SITES)
            },
        }
        for model in SITES
    }
    summary = {
        "status": "finished",
        "app": HOSTILE,
        "generated": True,
        "rounds": 3,
        "rounds-planned": 3,
        "sites": {site: {"train": 100 + n, "val": 9, "test": 60} for n, site in enumerate(SITES)},
        "trained": dict.fromkeys(SITES, 3),
        "test": {
            "federated": pool([*records.values()]),
            "sites": {
                site: {k: v for k, v in found.items() if not isinstance(v, list)}
                for site, found in records.items()
            },
            "local": local,
        },
        "failures": [],
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    counts = counted(records, (HOSTILE, "sick")).content()
    (folder / COUNTS_FILE).write_text(json.dumps(counts), encoding="utf-8")
    lines = ["round,phase,site,metric,value"]
    lines += [
        f"{turn},val,{site},auc,{0.5 + turn / 10 + number / 100}"
        for turn in (1, 2, 3)
        for number, site in enumerate(SITES[:2])
    ]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return write_report(folder)


@pytest.fixture
def open_page(opened, report):
    """Return a function that opens the report."""

    def visit(**options):
        return opened(report.as_uri(), **{"viewport": {"width": 1200, "height": 900}} | options)

    return visit


def test_hostile_names_stay_text(open_page):
    page = open_page()
    assert page.evaluate("window.bad === undefined")
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    choice = page.locator(".tools select")
    assert choice.locator("option").all_inner_texts() == ["all hospitals", *sorted(SITES)]
    choice.select_option(label=HOSTILE)
    chosen = page.locator("tr.on th").first
    assert HOSTILE in chosen.inner_text()
    assert page.evaluate("window.bad === undefined")


def test_a_table_is_sorted_by_mouse_and_by_keyboard(open_page):
    page = open_page()
    table = page.locator("table", has_text="Records per split")
    head = table.locator("thead th").nth(1)
    names = table.locator("tbody th")
    before = names.all_inner_texts()
    foot = table.locator("tfoot").inner_text()
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    values = [int(text) for text in table.locator("tbody td:nth-child(2)").all_inner_texts()]
    assert values == [100, 101, 102]
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    values = [int(text) for text in table.locator("tbody td:nth-child(2)").all_inner_texts()]
    assert values == [102, 101, 100]
    assert sorted(names.all_inner_texts()) == sorted(before)
    assert table.locator("tfoot").inner_text() == foot
    other = table.locator("thead th").nth(2)
    other.locator("button").click()
    assert head.get_attribute("aria-sort") is None


def test_models_are_sorted_by_what_they_reach_at_a_hospital(open_page):
    page = open_page()
    table = page.locator("table.heat")
    names = table.locator("tbody th")
    head = table.locator("thead th", has_text="south")
    head.locator("button").click()
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert "south" in names.first.inner_text()
    assert table.locator("tfoot th").inner_text() == "Federated"
    page.locator(".tools select").select_option(label="south")
    assert "south" in table.locator("tr.on th").inner_text()
    # Which colour a cell has, and on it the text, follows the scheme.
    cell = table.locator("td.h8").first
    colours = "cell => [getComputedStyle(cell).backgroundColor, getComputedStyle(cell).color]"
    light = cell.evaluate(colours)
    page.get_by_role("button", name="Dark colours").click()
    dark = cell.evaluate(colours)
    assert light == ["rgb(7, 76, 124)", "rgb(255, 255, 255)"]
    assert dark == ["rgb(241, 229, 135)", "rgb(14, 19, 24)"]


def test_a_curve_shows_its_values_to_mouse_and_keyboard(open_page):
    page = open_page()
    chart = page.locator('svg.chart[aria-label^="Validation AUC"]')
    chart.scroll_into_view_if_needed()
    tip = page.locator(".tip")
    assert not tip.is_visible()
    at = chart.evaluate(
        """chart => {
          const [x, y] = chart.querySelector(".series").dataset.at.split(" ")[2].split(",");
          const there = new DOMPoint(x, y).matrixTransform(chart.getScreenCTM());
          return [there.x, there.y];
        }"""
    )
    page.mouse.move(*at)
    tip.wait_for(state="visible")
    assert tip.inner_text() == "north · round 3 · Validation AUC 0.800"
    page.mouse.move(0, 0)
    tip.wait_for(state="hidden")
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() == "north · round 2 · Validation AUC 0.700"
    page.keyboard.press("ArrowDown")
    assert tip.inner_text() == "south · round 2 · Validation AUC 0.710"
    assert page.locator("[aria-live]").inner_text() == tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_dark_colours_by_the_system_and_by_the_button(open_page):
    paper = "getComputedStyle(document.body).backgroundColor"
    page = open_page(color_scheme="dark")
    assert page.evaluate(paper) == "rgb(21, 25, 30)"
    button = page.get_by_role("button", name="Light colours")
    button.click()
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.get_by_role("button", name="Dark colours").click()
    assert page.evaluate(paper) == "rgb(21, 25, 30)"
    page = open_page(color_scheme="light")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.get_by_role("button", name="Dark colours").click()
    assert page.evaluate(paper) == "rgb(21, 25, 30)"
    page.emulate_media(media="print")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"


def test_all_is_there_without_the_script(open_page):
    page = open_page(java_script_enabled=False)
    for text in ("In plain words", "Confusion matrix", "How the hospitals compare"):
        assert page.get_by_text(text).first.is_visible()
    assert page.locator("svg.chart").count() == 5
    assert page.locator(".tools").count() == 0


def test_nothing_is_wider_than_a_telephone(open_page):
    page = open_page(viewport={"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 400


def test_the_skip_link_is_the_first_stop(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    skip = page.locator(".skip")
    assert skip.evaluate("link => link === document.activeElement")
    assert skip.bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.url.endswith("#main")
