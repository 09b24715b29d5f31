"""What a folder that a stranger has written can do to who looks at it or goes on with it: nothing.

A hook sees each module that is imported, each piece of code that runs, each file that is opened and
each process that is started, by Python and by libraries that are written in it.
"""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import sqlite3
import struct
import sys
import tomllib
import unicodedata
import zipfile
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import tomli_w
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_trees import HOSTILE, ODD, changed_tree
from PIL import Image
from rich.table import Table
from typer.main import get_command

from fedmed_flower import files
from fedmed_flower.cli.job import with_choices_of
from fedmed_flower.cli.main import app
from fedmed_flower.cli.tables import LineConsole
from fedmed_flower.engines.project import load_project
from fedmed_flower.errors import InputError
from fedmed_flower.genomics.page import COLUMNS
from fedmed_flower.models.graph import graph_of
from fedmed_flower.privacy.accounting import Release
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.reports import frame
from fedmed_flower.runs.experiment import read_before
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.settings.registry import RUN, choices, complete
from fedmed_flower.statistics.request import KINDS, Request, Survival

ROOT = Path(__file__).parents[2]
EXAMPLES = [*(ROOT / "examples").glob("*/pyproject.toml")]
# Made once: making it evaluates annotations, which the hook would see.
COMMAND = get_command(app)
PROJECT = """
[project]
name = "tiny"
version = "1.0.0"
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
num-server-rounds = 1
settings = ""
pictures = 1
batch-size = 4
learning-rate = 0.05
optimizer = "sgd"
schedule = "constant"
device = "cpu"
cache-gigabytes = 1.0
"""
CLIENT = """
from tiny import TinyClient

from fedmed_flower.models.networks import ModelSettings, build_network


class Client(TinyClient):
    def build_model(self):
        settings = ModelSettings.from_run_config(self.context.run_config)
        if settings.bundle or settings.network:
            return build_network(settings)
        return super().build_model()


app = Client.client_app()
"""
SERVER = """
from client_app import Client
from flwr.serverapp import ServerApp

from fedmed_flower import federate
from fedmed_flower.strategies import FedAdam

app = ServerApp()


@app.main()
def main(grid, context):
    federate(FedAdam(), grid, context, Client(context))
"""


def traces_network():
    """Tell whether torch records the app's own network, for which it runs code that it makes."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not graph_of.__code__:
        frame = frame.f_back
    return frame is not None


class Watch:
    """What happened, while it was on, that reading a stranger's folder must not do."""

    def __init__(self):
        self.seen, self.allowed, self.writable, self.modules = None, (), (), frozenset()

    def __call__(self, event, args):
        if self.seen is not None and (judge := getattr(self, f"on_{event.replace('.', '_')}", 0)):
            # What looking at the event does is no event.
            seen, self.seen = self.seen, None
            try:
                if (wrong := judge(*args)) is not None:
                    seen.append(f"{event}: {wrong}")
            finally:
                self.seen = seen

    def on_import(self, module, *rest):
        return None if module.partition(".")[0] in self.modules else module

    def on_exec(self, code):
        name = code.co_filename
        fine = name.startswith("<frozen") if "<" in name else self.inside(name, self.allowed)
        return None if fine or traces_network() else f"{name}: {code.co_names}"

    def on_open(self, path, mode, flags):
        if isinstance(path, int):
            return None
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        places = self.writable if writes else (*self.allowed, *self.writable)
        return None if self.inside(path, places) else f"{path} {mode}"

    def on_sqlite3_connect(self, database):
        path = str(database).removeprefix("file:").partition("?")[0]
        return None if self.inside(path, (*self.allowed, *self.writable)) else database

    def within(self, path, places):
        """Tell whether a name, which may be one of a link, is in one of some places."""
        if isinstance(path, int):
            return True
        path = Path(os.fsdecode(path))
        real = str(Path(os.path.realpath(path.parent), path.name))
        return any(real == place or real.startswith(f"{place}{os.sep}") for place in places)

    def inside(self, path, places):
        """Tell whether what a path leads to is in one of some places."""
        return self.within(os.path.realpath(os.fsdecode(path)), places)


def _changes(count):
    """Return what judges an event whose first so many arguments are paths that are changed."""

    def judge(self, *args):
        fine = all(self.within(path, self.writable) for path in args[:count])
        return None if fine else repr(args[:count])

    return judge


for _name in ("remove", "rmdir", "mkdir", "chmod", "truncate", "chown"):
    setattr(Watch, f"on_os_{_name}", _changes(1))
for _name in ("rename", "link", "symlink"):
    setattr(Watch, f"on_os_{_name}", _changes(2))
for _name in (
    *("subprocess_Popen", "os_system", "os_exec", "os_posix_spawn", "os_fork"),
    *("socket_connect", "pickle_find_class", "ctypes_dlopen"),
):
    setattr(Watch, f"on_{_name}", lambda self, *args: repr(args)[:200])
WATCH = Watch()
sys.addaudithook(WATCH)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An app, folders of three kinds of runs, and a secret that none of them may reach."""
    base = tmp_path_factory.mktemp("world")
    own = base / "app"
    own.mkdir()
    (own / "pyproject.toml").write_text(PROJECT)
    (own / "client_app.py").write_text(CLIENT)
    (own / "server_app.py").write_text(SERVER)
    secret = base / "secret"
    secret.mkdir()
    (secret / "key.txt").write_text("the secret")
    Image.new("L", (4, 4), 7).save(secret / "picture.png")
    done = fedmed("run", own, "--sites", "2", "--out", base / "model")
    assert done.exit_code == 0, done.output
    assert (base / "model" / "pictures" / "1.png").exists()
    ledger = Ledger(base / "model" / "ledgers" / "north.sqlite")
    ledger.charge(range(9), Release(0.1, 1.0), 5, run="first", purpose="train", app="Heart")
    made_survey(base / "statistics")
    made_study(base / "association")
    (base / "work").mkdir()
    for kind in ("model", "statistics", "association"):
        assert fedmed("report", base / kind).exit_code == 0
    assert fedmed("privacy", base / "model" / "ledgers").exit_code == 0
    assert fedmed("run", own, "--resume", base / "model").exit_code == 0
    (base / "scratch").mkdir()
    prefixes = (sys.prefix, sys.base_prefix, ROOT, own, mpl.get_cachedir(), mpl.get_configdir())
    WATCH.allowed = tuple(
        os.path.realpath(place) for place in (*prefixes, "/proc", "/sys", "/dev", "/usr", "/etc")
    )
    WATCH.modules = frozenset(
        {name.partition(".")[0] for name in [*sys.modules, *sys.stdlib_module_names]}
    )
    return base


def made_survey(folder):
    from statistics_rows import make_patients
    from surveys import surveyed

    from fedmed_flower import MedicalClient, SiteData

    class Ward(MedicalClient):
        def load_data(self, site):
            rows = make_patients((150, 120)[site.index], site.index, f"{site.index}-")
            return SiteData(train=rows, source="made up", generated=True)

    request = Request(
        columns=("age", "lab", "sex", "time"),
        kinds=KINDS,
        resolutions={"age": 5.0},
        survival=Survival("time", "event", 12.0, 1.0),
    )
    surveyed(Ward, request, folder, sites=2, drift="sites")


def made_study(folder):
    """Write the folder of an association study of fifty variants."""
    folder.mkdir()
    numbers = {"people": 90, "cases": 40, "variants": 50, "counted": 50, "withheld": 0}
    numbers |= {"swapped": 0, "left out": 0, "absent": 0, "minimum": 10}
    summary = {
        "kind": "association",
        "status": "finished",
        "app": "gwas",
        "data": "made up",
        "generated": True,
        "rounds": 3,
        "started": "2026-11-20T10:15:00+00:00",
        "seconds": 2.0,
        "sites": {"north": numbers},
        "association": {
            **{"test": "trend", "phenotype": "case", "covariates": ["age"], "components": []},
            **{"tested": 50, "variants": 50, "lambda-gc": 1.01},
        },
        "tables": [{"title": "Hits", "head": ["id", "p"], "rows": [["rs1", "3e-9"]]}],
        "failures": [],
        "config": {"test": "trend"},
        "versions": {"numpy": "2.0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder / "association.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number in range(50):
            row = dict.fromkeys(COLUMNS, "1")
            row |= {
                "chrom": 1 + number % 3,
                "position": 1000 + number,
                "p": f"{10 ** -(number % 9)}",
            }
            writer.writerow(row.values())


def fedmed(*arguments):
    return CliRunner().invoke(COMMAND, [str(argument) for argument in arguments])


def watched(*arguments):
    """Run a command; return it and what it did that it must not do."""
    WATCH.seen = seen = []
    try:
        done = fedmed(*arguments)
    finally:
        WATCH.seen = None
    return done, seen


@pytest.fixture
def copied(world, monkeypatch):
    """Return a function that copies a folder of a run to a new place."""
    monkeypatch.setenv("TMPDIR", str(world / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    places = []

    def copy(kind="model"):
        target = world / "work" / f"{kind}-{len(places)}"
        places.append(target)
        shutil.copytree(world / kind, target, symlinks=True)
        places_to_write = (target, world / "scratch", "/dev/null")
        WATCH.writable = tuple(map(os.path.realpath, places_to_write))
        return target

    yield copy
    for place in places:
        shutil.rmtree(place, ignore_errors=True)


def unseen(text):
    """Return the control characters of a text, line breaks excepted, and what turns its lines."""
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return [letter for letter in {*text} - {"\n"} if unicodedata.category(letter) in kinds]


def secrets_of(world):
    return {path.name: path.read_bytes() for path in (world / "secret").iterdir()}


def look_at(world, folder, kind="model"):
    """Do all that one can do with a run folder; each command ends in one line or does its work."""
    before = secrets_of(world)
    commands = [("report", folder)]
    if kind == "model":
        commands += [
            ("privacy", folder / "ledgers"),
            ("run", world / "app", "--resume", folder),
        ]
    outcomes = []
    for command in commands:
        done, seen = watched(*command)
        assert seen == [], (command[0], seen)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        last = done.output.strip().splitlines()[-1]
        failed = last.startswith(("failed: RunFailedError", "failed: IsADirectoryError"))
        assert done.exit_code in (0, 2) or failed, done.output
        assert "Traceback" not in done.output
        if done.exit_code == 2:
            assert last.startswith("not started: "), done.output
        # A line break within a name was cleaned by the console.
        assert not unseen(done.output), done.output
        outcomes.append(last)
    assert secrets_of(world) == before
    if (folder / "report.html").is_file():
        text = (folder / "report.html").read_text()
        assert not unseen(text)
        own = f"<script>{frame.own_file('script.js')}</script>"
        assert "<script" not in text.replace(own, "", 1).lower()
        assert text.count("<img") == text.count('src="data:image/png;base64,')
    return outcomes


def edit_config(folder, **changes):
    """Change tables of config.toml: ``edit_config(folder, config={"bundle": "x"})``."""
    path = folder / "config.toml"
    tables = tomllib.loads(path.read_text())
    for name, values in changes.items():
        tables[name] |= values
    path.write_text(tomli_w.dumps(tables))


def edit_json(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_a_folder_as_it_was_written_is_gone_on_with_and_shown(world, copied):
    folder = copied()
    outcomes = look_at(world, folder)
    assert outcomes[0] == f"report: {folder / 'report.html'}"
    assert outcomes[2].startswith("finished: 1 rounds in")
    for kind in ("statistics", "association"):
        folder = copied(kind)
        assert look_at(world, folder, kind) == [f"report: {folder / 'report.html'}"]


# --- settings ------------------------------------------------------------------------------------


def bundle(folder):
    """Write a bundle whose configuration writes a file when it is read; return the file."""
    mark = folder / "ran"
    (folder / "bundle" / "configs").mkdir(parents=True)
    code = f"$[__import__('pathlib').Path({str(mark)!r}).write_text('x'), torch.nn.Identity()][1]"
    config = {"imports": ["$import torch"], "network_def": code}
    (folder / "bundle" / "configs" / "inference.json").write_text(json.dumps(config))
    return mark


def test_a_bundle_that_the_folder_names_is_not_run(world, copied):
    folder = copied()
    mark = bundle(folder)
    edit_config(folder, config={"bundle": str(folder / "bundle")})
    outcome = look_at(world, folder)[2]
    assert not mark.exists()
    assert outcome == (
        f"not started: bundle was '{folder}/bundle' when {folder} was started and is '' now: "
        "resume with the settings of the start; if you trust that folder, give them: "
        f"-c bundle={folder}/bundle"
    )
    # The same bundle runs where a person names it: the hook sees what it does.
    _, seen = watched(
        *("run", world / "app", "--resume", folder, "-c", f"bundle={folder / 'bundle'}")
    )
    assert mark.exists()
    assert any(event.startswith("exec: <string>") for event in seen)


def test_numbers_and_choices_are_taken_and_texts_must_be_given_again(world, copied):
    folder = copied()
    given = ["-c", "alpha=3.0", "-c", "optimizer=adam", "-c", "batch-size=5", "-c", "dataset=x y"]
    shutil.rmtree(folder)
    done = fedmed("run", world / "app", "--sites", "2", *given, "--out", folder)
    assert done.exit_code == 0, done.output
    done = fedmed("run", world / "app", "--resume", folder)
    assert done.exit_code == 2
    assert done.output.strip() == (
        f"not started: dataset was 'x y' when {folder} was started and is 'mine' now: resume with "
        "the settings of the start; if you trust that folder, give them: -c 'dataset=x y'"
    )
    done = fedmed("run", world / "app", "--resume", folder, "-c", "dataset=x y")
    assert done.exit_code == 0, done.output
    config = tomllib.loads((folder / "config.toml").read_text())["config"]
    told = [config[key] for key in ("alpha", "optimizer", "batch-size", "dataset")]
    assert told == [3.0, "adam", 5, "x y"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"learning-rate": -1.0}, "learning-rate must be above 0 and finite, got -1.0"),
        ({"learning-rate": "fast"}, "learning-rate was 'fast' when"),
        ({"optimizer": "/evil.py"}, "optimizer must be one of adam, sgd, got '/evil.py'"),
        (
            {"device": "cuda:0; rm"},
            "device must be auto, cpu, cuda or cuda:NUMBER, got 'cuda:0; rm'",
        ),
        ({"batch-size": True}, "batch-size must be of type int, got True"),
        ({"cache-gigabytes": -1.0}, "cache-gigabytes must be at least 0 and finite, got -1.0"),
        ({"num-server-rounds": 0}, "num-server-rounds must be from 1 to 100,000, got 0"),
        ({"alpha": "much"}, "alpha was 'much' when"),
        ({"dataset": 3}, "dataset must be of type str, got 3"),
        ({"network": "a'; rm -r ~'"}, """-c 'network=a'"'"'; rm -r ~'"'"''"""),
        ({"other": "x"}, "other was 'x' when"),
    ],
)
def test_each_setting_of_the_folder_is_checked(change, text, world, copied):
    folder = copied()
    edit_config(folder, config=change)
    assert text in look_at(world, folder)[2]


def test_texts_are_taken_only_where_they_are_one_of_a_few_names():
    """A new setting that is a text is not taken, unless it is listed and its section checks it."""
    closed = set()
    for section in RUN:
        for field in dataclasses.fields(section):
            key = field.name.replace("_", "-")
            if isinstance(field.default, str) and key in choices():
                with pytest.raises(InputError, match=f"^{key} must be"):
                    section.from_run_config({key: "../any text"})
                closed.add(key)
    assert closed == choices()
    named = {"bundle", "network", "network-args", "trainable", "report-by", "run-dir"}
    assert not named & choices()


@pytest.mark.parametrize("example", sorted(path.parent for path in EXAMPLES), ids=lambda p: p.name)
def test_a_run_of_each_example_with_its_own_texts_goes_on_by_its_folder_alone(example, tmp_path):
    project = load_project(example)
    own = project.client_app().sections
    before = complete(project.declared, own) | {"seed": 7, "run-dir": "elsewhere"}
    again = with_choices_of(tmp_path, before, project.declared, own)
    assert complete(again, own) == complete(project.declared, own) | {"seed": 7}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sites": 10**9}, "sites in {} must be in 1..100000, got 1000000000"),
        ({"sites": 0}, "sites in {} must be in 1..100000, got 0"),
        ({"sites": True}, "sites in {} must be in 1..100000, got True"),
        ({"sites": "2"}, "sites in {} must be in 1..100000, got '2'"),
        ({"key": "../../etc"}, "key in {} must be up to 64 letters, digits, - and _, got '../../e"),
        ({"key": "k" * 65}, "key in {} must be up to 64 letters, digits, - and _, got 'kkkkk"),
        ({"key": "a\nb"}, "key in {} must be up to 64 letters, digits, - and _, got 'a\\nb'"),
        ({"agreed": 7}, "agreed in {} must be a text, got 7"),
    ],
)
def test_what_the_run_goes_on_under_is_checked(change, text, world, copied):
    folder = copied()
    edit_config(folder, run=change)
    assert look_at(world, folder)[2].startswith(
        f"not started: {text.format(folder / 'config.toml')}"
    )


@pytest.mark.parametrize(
    "text",
    [
        "[config]\nx = " + "[" * 100_000,
        "[config]\nx = " + "{a = " * 100_000,
        ".".join("a" * 100_000) + " = 1",
        "[config]\n" + ".".join("a" * 100_000) + " = 1",
        "[" + ".".join("a" * 100_000) + "]",
        "x = '''\n" + ".".join("a" * 100_000) + "\n'''",
        "[run]\n[config]\nx = 1" + "0" * 5000 + "\n[versions]\n",
        "[run]\n[config]\nx = 99999999999999999999\n[versions]\n",
        "[run]\n[config]\nx = 2020-01-01\n[versions]\n",
        "\x00\x1b",
        "run = 1\n",
    ],
)
def test_a_configuration_of_another_kind_is_refused_at_once(text, tmp_path):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(InputError, match=r"config\.toml cannot be read: ") as caught:
        read_before(RunFolder(tmp_path))
    assert len(str(caught.value)) < 4500


# --- the checkpoint ------------------------------------------------------------------------------


def members_of(folder):
    with zipfile.ZipFile(folder / "checkpoint.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(folder, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(folder / "checkpoint.zip", "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def edit_state(folder, change):
    members = members_of(folder)
    members["state.json"] = json.dumps(change(json.loads(members["state.json"]))).encode()
    write_members(folder, members)


def refused(folder, text):
    with pytest.raises(InputError) as caught:
        RunFolder(folder).load()
    assert str(caught.value).startswith(
        f"the checkpoint {folder / 'checkpoint.zip'} cannot be read ({text}"
    )


def test_a_compressed_member_is_not_unpacked(copied):
    folder = copied()
    members = members_of(folder) | {"state.json": b"[" * 30_000_000}
    write_members(folder, members, zipfile.ZIP_DEFLATED)
    assert (folder / "checkpoint.zip").stat().st_size < 100_000
    refused(folder, "its member state.json is compressed, encrypted or damaged")


def test_a_member_that_no_record_names_is_refused(copied):
    folder = copied()
    write_members(folder, members_of(folder) | {"code.pkl": b"cos\nsystem\n"})
    refused(folder, "state.json does not name its member code.pkl")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(copied):
    folder = copied()
    with zipfile.ZipFile(folder / "checkpoint.zip", "a") as archive:
        archive.writestr("state.json", "{}")
    refused(folder, "two members have the same name")


def test_members_that_lie_in_one_place_are_refused(tmp_path):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("state.json", bytes(10_000))
        first = archive.getinfo("state.json")
        for number in range(5):
            again = zipfile.ZipInfo(f"{number}.bin")
            again.header_offset, again.CRC = first.header_offset, first.CRC
            again.file_size = again.compress_size = first.file_size
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    (tmp_path / "checkpoint.zip").write_bytes(data.getvalue())
    refused(tmp_path, "its members claim 60,000 bytes, and the file has ")


def test_a_checkpoint_of_many_bytes_is_not_read(tmp_path):
    with (tmp_path / "checkpoint.zip").open("wb") as file:
        file.truncate((1 << 36) + 1)
    refused(tmp_path, "it has 68,719,476,737 bytes, more than 68,719,476,736")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"round": -1},
        lambda state: state | {"round": True},
        lambda state: state | {"round": 2**31},
        lambda state: state | {"round": "1"},
        lambda state: state | {"seed": 1.5},
        lambda state: state | {"seed": -1},
        lambda state: state | {"sites": [["1", "a"]]},
        lambda state: state | {"rows": [[1e400, "train", "a", "loss", 1]]},
        lambda state: state | {"rows": [[2**40, "train", "a", "loss", 1]]},
        lambda state: state | {"failures": [{"round": "x", "phase": 1, "site": 2, "reason": 3}]},
        lambda state: state | {"records": {"arrays": {}}},
    ],
)
def test_numbers_of_a_checkpoint_are_whole_and_bounded(change, copied):
    folder = copied()
    edit_state(folder, change)
    refused(folder, "")


def npy(values):
    data = io.BytesIO()
    np.save(data, values, allow_pickle=True)
    return data.getvalue()


def test_an_array_that_only_claims_to_fit_the_model_is_refused(world, copied):
    folder = copied()
    write_members(folder, members_of(folder) | {"arrays/0.npy": npy(np.zeros((2, 5), np.float32))})
    text = f"not started: the checkpoint in {folder} belongs to another model, with other keys"
    assert look_at(world, folder)[2].startswith(text)


def test_what_an_optimiser_kept_must_fit_the_model(world, copied):
    folder = copied()
    members = members_of(folder)
    moments = sorted(name for name in members if name.startswith("state/m_t"))
    # With the model's own weights these would be broadcast to ten thousand times their size.
    write_members(folder, members | {moments[0]: npy(np.zeros((100, 100, 1, 1), np.float32))})
    text = (
        f"not started: the checkpoint in {folder} belongs to another model, for which the strategy "
        "kept arrays of other shapes"
    )
    assert look_at(world, folder)[2].startswith(text)


def test_no_array_is_unpickled(world, copied):
    folder = copied()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder / 'ran'}",)

    write_members(folder, members_of(folder) | {"arrays/0.npy": npy(np.array([Evil()], object))})
    assert "dtype object is not a plain number" in look_at(world, folder)[2]
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"metrics": {"__class__": {"1": {}}}}, "a result has no __class__"),
        ({"metrics": {"arrays": {}}}, "a result has no arrays"),
        ({"metrics": {"train_metrics_clientapp": {"1": {"loss": {}}}}}, "TypeError"),
        ({"metrics": []}, "AttributeError"),
    ],
)
def test_metrics_of_a_checkpoint_set_nothing_else(change, text, world, copied):
    folder = copied()
    edit_state(folder, lambda state: state | change)
    outcome = look_at(world, folder)[2]
    start = f"not started: the checkpoint {folder / 'checkpoint.zip'} cannot be resumed ("
    assert outcome.startswith(start)
    assert text in outcome


@pytest.mark.parametrize("blob", [b"\xff" * 50, b"\x0a\x02\x0a\x00", b"\x0a" * 3000])
def test_what_clients_kept_is_told_where_it_cannot_be_read(blob, world, copied):
    folder = copied()
    members = members_of(folder) | {"clients/0.bin": blob}
    state = json.loads(members["state.json"]) | {"clients": ["1001"]}
    write_members(folder, members | {"state.json": json.dumps(state)})
    outcome = look_at(world, folder)[2]
    start = f"not started: the checkpoint {folder / 'checkpoint.zip'} cannot be resumed ("
    assert outcome.startswith((start, "finished: "))


# --- links ---------------------------------------------------------------------------------------

FILES = {
    "model": ("config.toml", "summary.json", "metrics.csv", "checkpoint.zip", "model.safetensors"),
    "statistics": ("summary.json", "statistics.json"),
    "association": ("summary.json", "association.csv"),
}
FILES["model"] += ("pictures/1.png", "log.txt", "report.html", "ledgers/north.sqlite")
FILES["model"] += ("counts.json",)
READ = {(kind, name) for kind, names in FILES.items() for name in names}
EACH = sorted(READ)


def put(path, kind, secret):
    """Put something that leads elsewhere, or waits for ever, in the place of a file."""
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to(secret / ("picture.png" if path.suffix == ".png" else "key.txt"))


@pytest.mark.parametrize("what", ["link", "pipe", "folder", "endless", "loop"])
def test_no_file_leads_out_of_the_folder_or_waits(what, world, copied):
    for kind, name in EACH:
        folder = copied(kind)
        put(folder / name, what, world / "secret")
        outcomes = look_at(world, folder, kind)
        assert all("the secret" not in line for line in outcomes)
        if name == "pictures/1.png" and what != "folder":
            text = (folder / "report.html").read_text()
            assert "Not shown: " in text
            assert (
                text.count("<img") == (world / kind / "report.html").read_text().count("<img") - 1
            )
        if kind == "model" and what != "folder":
            wanted = "not started: " if name != "report.html" else "finished: "
            assert outcomes[2].startswith(wanted), (name, outcomes[2])


def test_a_picture_behind_a_link_is_not_in_the_report(world, copied):
    folder = copied()
    shutil.rmtree(folder / "pictures")
    (folder / "pictures").symlink_to(world / "secret")
    (world / "secret" / "1.png").write_bytes((world / "secret" / "picture.png").read_bytes())
    look_at(world, folder)
    (world / "secret" / "1.png").unlink()
    text = (folder / "report.html").read_text()
    assert f"a link leads out of the folder, to {world / 'secret' / '1.png'}" in text
    assert "<img" not in text


def test_nothing_is_written_through_a_link(world, copied):
    for name in ("pictures", "ledgers", "splits", "baselines", "log.txt"):
        folder = copied()
        place = folder / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        place.symlink_to(world / "secret")
        outcome = look_at(world, folder)[2]
        text = f"not started: {place} cannot be used (a link leads out of the folder, to "
        assert outcome.startswith(text)


def test_a_file_that_waits_under_the_name_of_a_temporary_one_is_not_written_through(tmp_path):
    from fedmed_flower.files import write_atomic

    secret = tmp_path / "secret"
    secret.write_text("kept")
    (tmp_path / f".report.html.{os.getpid()}.tmp").symlink_to(secret)
    write_atomic(tmp_path / "report.html", b"new")
    assert secret.read_text() == "kept"


def test_a_link_within_the_folder_is_fine(world, copied):
    folder = copied()
    (folder / "checkpoint.zip").rename(folder / "first.zip")
    (folder / "checkpoint.zip").symlink_to("first.zip")
    link = world / "work" / "link"
    link.symlink_to(folder)
    WATCH.writable = (*WATCH.writable, str(link))
    assert look_at(world, link)[2].startswith("finished: ")
    link.unlink()


def test_a_folder_without_end_is_refused(tmp_path):
    deep = tmp_path.joinpath(*"a" * 30)
    deep.mkdir(parents=True)
    with pytest.raises(InputError, match=r"more than 20 deep: it is no run folder$"):
        files.require_closed(tmp_path)


def hot_journal(folder, victim):
    """Write a ledger whose last change was broken off, with a journal that names another file."""
    path, live = folder / "north.sqlite", folder / "live"
    shutil.copyfile(path, live)
    connection = sqlite3.connect(live, isolation_level=None)
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("CREATE TABLE more (x)")
    for _ in range(2000):
        connection.execute("INSERT INTO more VALUES (?)", ("y" * 100,))
    shutil.copyfile(live, path)
    journal = Path(f"{live}-journal").read_bytes()
    connection.execute("ROLLBACK")
    connection.close()
    live.unlink()
    name = str(victim).encode()
    page_of_locks = 0x40000000 // 4096 + 1
    journal += struct.pack(">I", page_of_locks) + name
    journal += struct.pack(">II", len(name), sum(name)) + bytes.fromhex("d9d505f920a163d7")
    Path(f"{path}-journal").write_bytes(journal)


def test_a_ledgers_journal_deletes_no_other_file(world, copied):
    folder = copied()
    victim = world / "secret" / "key.txt"
    hot_journal(folder / "ledgers", victim)
    outcomes = look_at(world, folder)
    journal = folder / "ledgers" / "north.sqlite-journal"
    text = f"not started: {journal} names another file, which SQLite would delete: no ledger has"
    assert [line.startswith(text) for line in outcomes] == [False, True, True]
    done, seen = watched("privacy", folder / "ledgers" / "north.sqlite")
    assert done.output.startswith(text)
    assert seen == []
    assert victim.exists()


# --- what is shown -------------------------------------------------------------------------------


def test_a_console_shows_each_text_as_it_is_on_one_line():
    out = io.StringIO()
    console = LineConsole(file=out, width=2000, force_terminal=True, color_system="truecolor")
    table = Table(HOSTILE, "plain", title=HOSTILE, caption=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE, "x")
    console.print(HOSTILE)
    console.print(table)
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert not unseen(text)
    assert text.count("[red]x[/red]:warning:") == 6
    assert not any(line.startswith("not started") for line in text.splitlines())
    assert "\\x1b[2J" in text


def test_names_of_a_summary_reach_the_terminal_on_one_line(capsys):
    from fedmed_flower.cli.tables import print_results

    summary = {
        "tables": [{"title": HOSTILE, "head": [HOSTILE, "p"], "rows": [[HOSTILE, HOSTILE]]}],
        "sites": {HOSTILE: {"train": 3, "test": 4}},
        "test": {"sites": {HOSTILE: {"auc": 0.5}}, "federated": {"auc": 0.5}},
    }
    out = io.StringIO()
    print_results(LineConsole(file=out, width=600), summary)
    assert not unseen(out.getvalue())
    assert out.getvalue().count("[red]x[/red]") == 5


@given(st.text() | st.just(HOSTILE))
def test_nothing_unseen_reaches_a_page(text):
    shown = frame.escaped(text)
    assert not unseen(shown)
    assert "\n" not in shown
    assert not re.search(r"[<>\"']", shown)


def test_a_page_of_more_cells_than_anybody_can_look_at_is_refused_at_once(world, copied):
    """What is few bytes in a file must not become hours of work, or all memory."""
    many = {f"{number}": {} for number in range(4000)}
    folder = copied()
    groups = {f"auc@age=<{number}": 0.5 for number in range(4000)}

    def of_groups(summary):
        summary["test"] |= {"federated": groups, "sites": many}
        return summary

    edit_json(folder / "summary.json", of_groups)
    done = fedmed("report", folder)
    assert done.exit_code == 2
    assert "would have 16,000,000 cells, more than 10,000,000" in done.output
    folder = copied("statistics")

    def of_columns(found):
        (group,) = found["groups"].values()
        group["overall"]["numeric"] = many
        group["sites"] = many
        return found

    edit_json(folder / "statistics.json", of_columns)
    done = fedmed("report", folder)
    assert done.exit_code == 2
    assert " cells, more than 10,000,000" in done.output


def test_what_is_too_much_to_draw_is_said(world, copied):
    folder = copied("statistics")

    def change(found):
        (group,) = found["groups"].values()
        one = group["overall"]["correlations"][0]
        names = [[f"a{number}", f"b{number}"] for number in range(20_000)]
        group["overall"]["correlations"] = [one | {"columns": pair} for pair in names]
        weeks = {"weeks": ["day 0"] * 50_000, "counts": [1] * 50_000}
        found["alerts"] = [{"site": "north", "group": "", **weeks}]
        return found

    edit_json(folder / "statistics.json", change)
    assert look_at(world, folder, "statistics") == [f"report: {folder / 'report.html'}"]
    text = (folder / "report.html").read_text()
    assert "Correlations of 40,000 columns are not drawn." in text
    assert "50,000 weeks are not drawn." in text


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (f"{10**30},val,north,auc,0.5", "there is no round 1000000000000000000000000000000"),
        ("1,val,north,auc", "is not a metric"),
        ("1,val,north,auc," + "9" * 200_000, "is not a metric"),
    ],
)
def test_a_line_of_metrics_that_cannot_be_drawn_is_named(line, text, world, copied):
    folder = copied()
    with (folder / "metrics.csv").open("a") as file:
        file.write(f"{line}\n")
    outcome = look_at(world, folder)[0]
    assert outcome.startswith(f"not started: {folder / 'metrics.csv'} line ")
    assert text in outcome


def test_chromosomes_without_end_are_not_drawn(world, copied):
    folder = copied("association")
    with (folder / "association.csv").open("a") as file:
        file.writelines(
            f"{number},{','.join('1' * (len(COLUMNS) - 1))}\n" for number in range(30_000)
        )
    (outcome,) = look_at(world, folder, "association")
    assert outcome == (f"not started: {folder / 'association.csv'} has more than 100 chromosomes")


# --- fuzz ----------------------------------------------------------------------------------------


@st.composite
def changed_bytes(draw, data):
    """Return bytes of which a part is gone, others or twice."""
    start = draw(st.integers(0, len(data)))
    stop = draw(st.integers(start, min(len(data), start + 64)))
    return draw(
        st.sampled_from(
            [
                data[:start],
                data[:start] + data[stop:],
                data[:start] + bytes(b ^ 0xFF for b in data[start:stop]) + data[stop:],
                data[:stop] + data[start:],
                bytes(stop - start),
            ]
        )
    )


@st.composite
def changed_table(draw, text):
    """Return a table in which up to three cells are others."""
    rows = list(csv.reader(io.StringIO(text)))
    for _ in range(draw(st.integers(1, 3))):
        row = rows[draw(st.integers(0, len(rows) - 1))]
        if row:
            row[draw(st.integers(0, len(row) - 1))] = f"{draw(ODD)}"
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode(errors="replace")


@st.composite
def changed_file(draw, path):
    """Return other bytes for a file of a run folder, most of them of its own kind."""
    data = path.read_bytes()
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(data))
    if path.suffix == ".json":
        return json.dumps(draw(changed_tree(json.loads(data)))).encode()
    if path.suffix == ".csv":
        return draw(changed_table(data.decode()))
    if path.suffix == ".toml":
        tree = draw(changed_tree(tomllib.loads(data.decode())))
        try:
            return tomli_w.dumps(tree).encode(errors="replace")
        except (TypeError, ValueError):
            return draw(changed_bytes(data))
    if path.suffix == ".zip":
        return draw(changed_checkpoint(path))
    return draw(changed_bytes(data))


@st.composite
def changed_checkpoint(draw, path):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw(st.sampled_from(["state.json", *members]))
    if name == "state.json":
        members[name] = json.dumps(draw(changed_tree(json.loads(members[name])))).encode()
    else:
        members[name] = draw(changed_bytes(members[name]))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    return out.getvalue()


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_whatever_a_file_holds_nothing_is_run_or_reached(world, copied, data):
    kind, name = data.draw(st.sampled_from(EACH))
    content = data.draw(changed_file(world / kind / name))
    folder = copied(kind)
    (folder / name).write_bytes(content)
    look_at(world, folder, kind)
    shutil.rmtree(folder)


def test_a_line_without_end_is_not_read(world, copied):
    folder = copied()
    with (folder / "metrics.csv").open("ab") as file:
        file.truncate(8 << 30)
    outcome = look_at(world, folder)[0]
    assert outcome.startswith(f"not started: {folder / 'metrics.csv'} line ")
    assert "a line has 65,536 letters or more" in outcome


def test_a_member_that_is_longer_than_its_array_is_not_read(copied):
    folder = copied()
    members = members_of(folder)
    name = "arrays/0.npy"
    write_members(folder, members | {name: members[name] + bytes(1 << 20)})
    refused(folder, f"its member {name} has ")


def test_a_file_with_another_name_elsewhere_is_not_written(world, copied):
    folder, victim = copied(), world / "victim"
    victim.write_text("kept")
    (folder / "log.txt").unlink()
    os.link(victim, folder / "log.txt")
    text = f"not started: {folder / 'log.txt'} is one file with another name elsewhere"
    assert look_at(world, folder)[2].startswith(text)
    assert victim.read_text() == "kept"


def test_what_sites_beyond_number_have_sent_is_not_sorted_for_days(world, copied):
    folder = copied()
    sent = {"evaluate": {f"s{n}": [f"metrics.k{n}"] for n in range(20_000)}}
    edit_json(folder / "summary.json", lambda summary: summary | {"sent": sent})
    outcome = look_at(world, folder)[0]
    assert "would have 400,000,000 cells, more than 10,000,000" in outcome
