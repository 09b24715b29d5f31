"""`fedmed settings`, and the page of the documentation that it writes."""

import re
import sys
from pathlib import Path

import pytest
from deployment_helper import write_app
from typer.testing import CliRunner

from fedmed_flower.cli.main import app
from fedmed_flower.errors import InputError
from fedmed_flower.settings.registry import (
    RUN,
    entries,
    node_entries,
    require_known,
    sections_of,
)

ROOT = Path(__file__).parents[2]
SERVER = """
    from flwr.serverapp import ServerApp

    app = ServerApp()
"""


def shown(*arguments):
    result = CliRunner().invoke(app, ["settings", *map(str, arguments)])
    return result.exit_code, result.output


def row(output, key):
    (line,) = [line for line in output.splitlines() if re.match(rf"│ {key} +│", line)]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_every_setting_is_listed_with_default_bound_unit_and_meaning():
    code, output = shown()
    assert code == 0
    for entry in (*entries(RUN), *node_entries()):
        assert re.search(rf"│ {entry.key} +│", output), entry.key
    assert row(output, "batch-size") == [
        *("batch-size", "32", "from 1 to 1,000,000 (rows)", "Rows in a step."),
    ]


def test_an_app_shows_its_own_settings_and_the_values_that_it_sets():
    _, output = shown(ROOT / "examples" / "pneumonia")
    assert row(output, "learning-rate")[1:3] == ["0.001", "0.003"]
    assert row(output, "batch-size")[1:3] == ["32", ""]
    assert row(output, "alpha")[1:4] == ["2.0", "", "above 0 and finite"]
    assert "dataset" not in shown()[1]


def test_a_search_finds_names_and_meanings():
    _, output = shown("--search", "Fine-Tune")
    assert re.search(r"│ personal-epochs +│", output)
    assert not re.search(r"│ batch-size +│", output)
    code, output = shown("--search", "xyzzy")
    assert code == 2
    assert "no setting has 'xyzzy' in its name or meaning: `fedmed settings APP` also" in output


def test_what_an_error_about_a_setting_says_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    client = """
        from dataclasses import dataclass

        from tiny import TinyClient

        from fedmed_flower.settings import Section, Within, setting


        @dataclass(frozen=True)
        class Own(Section):
            depth: int = setting(2, "How deep.", Within(1, 9))


        class Client(TinyClient):
            sections = (Own,)
            node_keys = ("ward",)


        app = Client.client_app()
    """
    write_app(tmp_path / "app", SERVER, client, settings="")
    listed = {}
    for text in ("depth=10", "batch-size=0", "batchsize=3", "seed=-1"):
        result = CliRunner().invoke(app, ["run", str(tmp_path / "app"), "-c", text])
        assert result.exit_code == 2
        last = result.output.splitlines()[-1]
        (command,) = re.findall(r" see `fedmed (.*)`$", last)
        listed[text] = command
        code, output = shown(*command.replace("APP", str(tmp_path / "app")).split()[1:])
        assert code == 0
        assert re.search(rf"│ {command.split()[-1]} +│", output)
    assert listed["depth=10"] == "settings APP --search depth"
    assert listed["batch-size=0"] == listed["batchsize=3"] == "settings --search batch-size"
    # The error about a node config can name a key that the app adds to it.
    assert row(shown(tmp_path / "app")[1], "ward")[-1] == "The app's own, which its client reads."


def test_an_app_of_somebody_else_has_the_settings_that_it_declares(tmp_path):
    toy = ROOT / "benchmarks" / "toy"
    code, output = shown(toy)
    assert code == 2
    assert "is not one of this package: it has the settings that its pyproject.toml" in output
    code, output = shown(tmp_path)
    assert (code, "is no Flower app" in output) == (2, True)


def test_the_page_of_the_documentation_is_what_the_command_prints():
    _, output = shown("--markdown")
    page = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    assert page.endswith(output), "write the page again: fedmed settings --markdown"
    assert "| `min-cell-count` | `10` | at least 1, patients |" in output
    for key in ("min-cell-count", "bundle", "private-metrics"):
        assert output.count(f"| `{key}` |") == 2


def test_the_section_that_the_page_shows_is_known_and_checked():
    page = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {"__name__": "page"}
    exec(compile(code, "settings.md", "exec"), names)
    own = sections_of(names["Hospital"])
    require_known({"min-age": 20, "ward": "icu", "local-epochs": 2}, own)
    with pytest.raises(InputError, match=r"^min-age must be from 0 to 120, got 130; see `"):
        names["Cohort"].from_run_config({"min-age": 130})
