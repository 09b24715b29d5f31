"""`fedmed new`: each kind of app runs at once, and its README says what is true."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from flwr.cli.utils import validate_project_name
from typer.testing import CliRunner

from fedmed_flower.cli.main import app
from fedmed_flower.cli.new import app_files
from fedmed_flower.cli.options import MEANINGS, Kind
from fedmed_flower.data.phantom_folders import PHANTOMS
from fedmed_flower.engines.project import load_project
from fedmed_flower.settings.registry import defaults, require_known
from fedmed_flower.settings.text import SETTINGS

ROOT = Path(__file__).parents[2]
# Whole runs on images take a quarter of a minute.
SMALL = ["--sites", "2", "--rounds", "1", "-c", "pictures=0"]
SHORT = {"images": SMALL, "masks": SMALL}
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def fedmed(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.output


def ran(*arguments):
    code, output = fedmed(*arguments)
    assert code == 0, output
    return output


def run(*arguments):
    """Run an app and return its summary."""
    ran("run", *arguments, "--out", "run")
    return json.loads(Path("run/summary.json").read_text())


@pytest.mark.parametrize("kind", Kind)
def test_an_app_runs_at_once_and_says_that_its_patients_are_generated(kind):
    assert ran("new", "heart2", "--for", kind).splitlines() == [
        "heart2: README.md, client_app.py, pyproject.toml, server_app.py",
        "run it, on generated patients: fedmed run heart2",
        "your own data, privacy, real hospitals: see heart2/README.md",
    ]
    summary = run("heart2", *SHORT.get(kind, []))
    assert summary["status"] == "finished"
    assert summary["generated"] is True
    assert re.search("generated (data|rows)|people.csv", Path("run/report.html").read_text())


@slow
@pytest.mark.parametrize(
    ("kind", "metric", "least"),
    [
        ("images", "auc", 0.75),
        ("masks", "dice", 0.8),
        ("table", "auc", 0.68),
        ("survival", "c-index", 0.62),
        ("other", "auc", 0.85),
    ],
)
def test_the_defaults_of_an_app_learn_what_is_planted(kind, metric, least):
    ran("new", "heart2", "--for", kind)
    summary = run("heart2")
    assert len(summary["sites"]) == 5
    assert summary["test"]["federated"][metric] > least


def test_the_study_finds_the_variant_that_is_planted():
    ran("new", "heart2", "--for", "genomes")
    run("heart2")
    lines = [line.split(",") for line in Path("run/association.csv").read_text().splitlines()]
    head = lines[0]
    p_of = {line[head.index("id")]: float(line[head.index("p")]) for line in lines[1:]}
    assert min(p_of, key=p_of.get) == "rs500"
    assert p_of["rs500"] < 1e-10


@pytest.mark.parametrize(
    "kind",
    [
        *("table", "survival"),
        *(pytest.param(kind, marks=slow) for kind in ("images", "masks")),
    ],
)
def test_one_setting_trains_privately(kind):
    ran("new", "heart2", "--for", kind)
    summary = run("heart2", *SMALL, "-c", "privacy=patient")
    assert summary["status"] == "finished"
    assert summary["privacy"]["patient"]["sites"].keys() == {"hospital-1", "hospital-2"}


@slow
def test_an_app_runs_on_flowers_engine():
    ran("new", "heart2", "--for", "table")
    summary = run("heart2", *SMALL, "--engine", "flower")
    assert (summary["status"], summary["generated"]) == ("finished", True)


def commands(text):
    """Return the arguments of each command of ours in the shell blocks of a page.

    Those of real hospitals and their server are left out: they run until they are stopped.
    """
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    typed = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fedmed ")]
    return [arguments for arguments in typed if arguments[0] not in ("link", "node")]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[slow] * (kind != "genomes")) for kind in Kind]
)
def test_each_command_of_the_readme_works(kind):
    ran("new", "heart2", "--for", kind)
    typed = commands(Path("heart2/README.md").read_text())
    assert ["data", "phantoms", "data", "north", "south", "east", "--for", kind] in typed
    private = kind not in ("genomes", "other")
    assert len(typed) == 6 if private else 5
    for number, arguments in enumerate(typed):
        out = ["--out", f"out-{number}"] if arguments[0] in ("run", "statistics") else []
        output = ran(*arguments, *out)
        # Folders that hold the generated patients are marked, too.
        assert "generated" in output or not out
    if kind in ("images", "masks"):
        assert "no problems" in ran("data", "check", "data/north")


@slow
def test_the_pages_commands_work_in_order():
    page = (ROOT / "docs" / "guides" / "new-app.md").read_text()
    typed = commands(page)
    assert typed[0][0] == "new"
    for number, arguments in enumerate(typed):
        out = ["--out", f"out-{number}"] if arguments[0] in ("run", "statistics") else []
        ran(*arguments, *out)
    assert all(f"`{kind}`" in page for kind in Kind)


@pytest.mark.parametrize("kind", Kind)
def test_what_is_written_is_what_the_examples_look_like(kind, workdir):
    ran("new", "heart2", "--for", kind)
    project = load_project(Path("heart2"))
    assert project.name == "heart2"
    own = project.client_app().sections
    assert project.declared[SETTINGS] == ""
    require_known(project.declared, own)
    known = defaults(own)
    assert not {key for key, value in project.declared.items() if known.get(key) == value}
    ruff = [sys.executable, "-m", "ruff"]
    rules = ["--config", ROOT / "pyproject.toml"]
    rules += ["--config", 'lint.isort.known-first-party = ["fedmed_flower"]']
    for command in (["check", "--ignore", "D"], ["format", "--check"]):
        done = subprocess.run(
            [*ruff, *command, *rules, "heart2"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_kind_has_a_template_a_meaning_and_generated_patients():
    rooms = {path.name for path in (ROOT / "fedmed_flower" / "templates").iterdir()}
    assert rooms == {*Kind, "common"}
    assert {*MEANINGS} == {*Kind} == {*PHANTOMS}
    _, output = fedmed("new", "--help")
    shown = " ".join(output.replace("│", " ").split())
    for kind, meaning in MEANINGS.items():
        assert f"{kind}: {meaning}" in shown


@pytest.mark.parametrize("name", ["a", "heart-2", "H" * 32])
def test_names_that_flower_takes_are_taken(name):
    validate_project_name(name, "")
    ran("new", name, "--for", "table")
    assert tomllib.loads(app_files(Kind.TABLE, name)["pyproject.toml"])["project"]["name"] == name


@pytest.mark.parametrize("name", ["2heart", "my_app", "my app", "H" * 33, "ü", "heart-", "..", "-"])
def test_a_name_that_flower_would_refuse_is_refused(name, workdir):
    code, output = fedmed("new", "--for", "table", "--", name)
    assert code == 2
    assert "must start with a letter and have at most 32 letters, digits and hyphens" in output
    assert output.rstrip().endswith(f"got {Path(name).name!r}")
    assert [*workdir.iterdir()] == []


def test_nothing_is_overwritten():
    Path("heart2").mkdir()
    for file in "cbafed":
        (Path("heart2") / file).touch()
    code, output = fedmed("new", "heart2", "--for", "table")
    assert code == 2
    assert "heart2 is there already, a folder with a, b, c, d, e, ...: give another name" in output
    Path("file").touch()
    Path("empty").mkdir()
    for name, what in (("file", "a file"), ("empty", "an empty folder")):
        code, output = fedmed("new", name, "--for", "table")
        assert code == 2
        assert f"{name} is there already, {what}: give another name" in output
    code, output = fedmed("new", "nowhere/heart2", "--for", "table")
    assert code == 2
    assert "nowhere/heart2 cannot be made: No such file or directory" in output
    assert [*Path("empty").iterdir()] == []


def test_a_disk_that_is_full_leaves_no_half_an_app(monkeypatch, workdir):
    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, output = fedmed("new", "heart2", "--for", "table")
    assert code == 2
    assert "heart2 cannot be written: No space left on device" in output
    assert [*workdir.iterdir()] == []
