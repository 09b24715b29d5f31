"""The page of `fedmed watch` in a real browser, beside runs in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
from live_runs import rounds_of, watching, write_json, write_live, write_metrics

from fedmed_flower.reports.report import write_report

pytestmark = pytest.mark.slow
HELPERS = str(Path(__file__).parents[1] / "helpers")
HOSTILE = "<img src=x onerror=alert(1)>"

# Each round waits for a file of the test; in the second one the third site fails.
PACED = """
import sys, time
from pathlib import Path
from tiny import TinyClient, run_tiny

folder, gates, hostile = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
served = []


class Paced(TinyClient):
    def fit(self, model, prepared, seed):
        server_round = 1 + len(served) // 3
        site = 1 + len(served) % 3
        served.append(site)
        while not (gates / str(server_round)).exists():
            time.sleep(0.02)
        if (server_round, site) == (2, 3):
            raise RuntimeError("the scanner is broken")
        return super().fit(model, prepared, seed)


nodes = [{}, {"site-name": hostile, "data-dir": str(gates)}, {}]
run_tiny(folder, Paced, 3, node_configs=nodes, num_server_rounds=3)
"""


def corners(page):
    """Return how many corners the curve of all sites has."""
    return page.locator("#chart path").first.get_attribute("d").count("L")


def test_a_run_is_followed_from_before_its_folder_to_its_report(tmp_path, opened):
    folder = tmp_path / "run"
    gates = tmp_path / "gates"
    gates.mkdir()
    with watching(folder, "--no-browser") as (_, url):
        page = opened(url)
        page.get_by_text("Waiting for the run").wait_for()
        code = f"import sys; sys.path.insert(0, {HELPERS!r})\n{PACED}"
        command = [sys.executable, "-c", code, folder, gates, HOSTILE]
        run = subprocess.Popen(
            [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            page.get_by_text("Running: round 1 of 3, training").wait_for()
            page.get_by_text("3 training, 0 replied, 0 failed").wait_for()
            (gates / "1").touch()
            page.get_by_text("Running: round 2 of 3, training").wait_for()
            assert corners(page) == 0
            page.get_by_role("rowheader", name=HOSTILE, exact=True).wait_for()
            (gates / "2").touch()
            page.get_by_text("Running: round 3 of 3, training").wait_for()
            assert corners(page) == 1
            row = page.locator("#failed tr")
            assert row.locator("td, th").all_inner_texts()[:3] == ["2", "train", "hospital-3"]
            assert "the scanner is broken" in row.inner_text()
            page.get_by_label("Phase").select_option("train")
            page.get_by_label("Metric").select_option("loss")
            page.get_by_role("columnheader", name="loss, last").wait_for()
            (gates / "3").touch()
            page.get_by_text("Finished: 3 of 3 rounds").wait_for()
            report = page.frame_locator("iframe")
            report.get_by_role("heading", name="Over the rounds").wait_for()
            assert page.locator("img").count() == 0
            out, _ = run.communicate(timeout=60)
            assert run.returncode == 0, out
        finally:
            run.kill()
            run.communicate()
        page.close()


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_can_be_read(tmp_path, opened, scheme, width):
    write_metrics(tmp_path, rounds_of(6, epsilon=True))
    patient = {"target-epsilon": 8.0, "delta": 1e-5}
    write_json(
        tmp_path, "summary.json", status="running", generated=True, privacy={"patient": patient}
    )
    long = {"site": "hospital-3", "reason": "RuntimeError: " + "x" * 280}
    write_live(tmp_path, round=7, replied=["hospital-1"], failed=[long], failures=[long])
    with watching(tmp_path, "--no-browser") as (_, url):
        page = opened(url, color_scheme=scheme, viewport={"width": width, "height": 900})
        page.get_by_text("Running: round 7 of 10, training").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_text("Figures of validation and test records are counted").wait_for()
        contrasts = page.evaluate(CONTRAST)
        assert len(contrasts) > 20
        assert {text: each for text, each in contrasts if each < 4.5} == {}
        # The numbers of the table are those of the round that the arrow keys choose.
        chart = page.locator("#chart")
        chart.focus()
        chart.press("ArrowLeft")
        page.get_by_role("columnheader", name="auc, round 5").wait_for()
        row = page.locator("#sites tr", has=page.get_by_role("rowheader", name="hospital-1"))
        assert "0.820" in row.inner_text()
        assert "3.000" in row.inner_text()
        chart.press("Escape")
        page.get_by_role("columnheader", name="auc, last").wait_for()
        chart.hover(position={"x": 60, "y": 100})
        page.get_by_role("columnheader", name="auc, round 1").wait_for()
        page.close()


def test_a_run_that_was_killed_a_page_that_was_closed_and_many_hospitals(tmp_path, opened):
    names = [f"clinic {number}" for number in range(40)]
    write_metrics(tmp_path, rounds_of(3, names))
    write_live(tmp_path, asked=names)
    with watching(tmp_path, "--no-browser") as (_, url):
        page = opened(url)
        page.get_by_text("40 training, 0 replied, 0 failed").wait_for()
        page.get_by_text("each hospital", exact=True).wait_for()
        # The clock of the page goes on alone.
        page.clock.install()
        page.clock.fast_forward("05:00")
        page.get_by_text("No update for 5 minutes: the run was killed").wait_for()
        page.close()


def test_the_end_of_the_watcher_is_said(tmp_path, browser):
    write_live(tmp_path)
    with watching(tmp_path, "--no-browser") as (process, url):
        page = browser.new_page()
        page.goto(url)
        page.get_by_text("Running: round 2 of 10, training").wait_for()
        process.kill()
        page.get_by_text("fedmed watch was ended").wait_for()
        page.close()


def test_a_run_of_somebody_elses_strategy_is_shown_too(tmp_path, opened):
    write_metrics(tmp_path, [(n, "server", "all", "some-metric", n) for n in range(3)])
    write_report(tmp_path)
    with watching(tmp_path, "--no-browser") as (_, url):
        page = opened(url)
        page.get_by_role("columnheader", name="some-metric, last").wait_for()
        assert page.get_by_label("Phase").input_value() == "server"
        assert corners(page) == 2
        page.close()


# Of each text that is shown: its ratio to what stands behind it, as WCAG 2.2 defines it.
CONTRAST = """() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => parts(colour).slice(0, 3).map(each => each / 255)
    .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
    .reduce((sum, each, index) => sum + each * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const colour = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(colour), light(behind(element))].sort((x, y) => y - x);
    found.push([element.textContent, (a + 0.05) / (b + 0.05)]);
  }
  return found;
}"""
