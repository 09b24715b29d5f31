"""The commands that write pages of finished runs."""

import pytest
from run_folders import write_run
from typer.testing import CliRunner

from fedmed_flower.cli.main import app


def fedmed(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def test_card_is_written_into_the_run_folder_or_where_it_is_wanted(run, tmp_path):
    assert fedmed("card", run) == (0, f"card: {run / 'card.md'}")
    assert (run / "card.md").read_text().startswith("# Model card: chest")
    other = tmp_path / "other.md"
    assert fedmed("card", run, "--out", other) == (0, f"card: {other}")
    code, output = fedmed("card", run)
    assert code == 2
    assert "card.md exists already" in output


def test_compare_writes_one_page_and_replaces_it(run, tmp_path):
    second = write_run(tmp_path / "second", rounds=1)
    out = tmp_path / "page.html"
    for _ in range(2):
        assert fedmed("compare", run, second, "--out", out) == (0, f"comparison: {out}")
    assert "Comparison of 2 runs" in out.read_text()


def test_what_is_no_run_ends_with_code_2_and_a_way_out(run, tmp_path):
    code, output = fedmed("compare", run)
    assert code == 2
    assert "compare takes 2 to 12 run folders, got 1" in output
    code, output = fedmed("compare", run, tmp_path / "nowhere")
    assert code == 2
    assert "give the folders of runs that `fedmed run` has started" in output
    code, output = fedmed("card", tmp_path / "nowhere")
    assert code == 2
    assert "give the folder of a run that `fedmed run` has started" in output
