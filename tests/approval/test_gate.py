import hashlib
import py_compile
import shutil
import subprocess
import sys
from importlib.util import cache_from_source
from types import SimpleNamespace

import pytest
from app_bundles import bundle
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.cli.install import install_from_fab
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp

from fedmed_flower.approval.approvals import Approvals
from fedmed_flower.approval.gate import _REPLACED, guard
from fedmed_flower.approval.rules import parse
from fedmed_flower.server.screening import error_text


@pytest.fixture
def hospital(tmp_path, monkeypatch):
    """Flower's steps of one message with stand-ins for the network, behind the gate."""
    for name in _REPLACED:
        monkeypatch.setattr(run_clientapp, name, getattr(run_clientapp, name))
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    return Hospital(tmp_path, monkeypatch)


class Hospital:
    def __init__(self, folder, monkeypatch):
        self.approvals = folder / "list"
        self.home = folder / "home"
        self.steps = []
        self.installed = self.home / "apps"
        self.monkeypatch = monkeypatch

    def approve(self, found, content, *rules):
        Approvals.load(self.approvals).with_bundle(found, content, dict(map(parse, rules))).save()

    def answer(self, found, content, config=None, **claims):
        """Go through Flower's steps in its order, and return the reply."""
        claimed = {"fab_id": found.app, "fab_version": found.version, "digest": found.digest}
        claimed |= claims
        context = Context(1, 2, {"site-name": "north"}, RecordDict(), config or found.declared)
        content_of = RecordDict({"config": ConfigRecord({"server-round": 1})})
        message = Message(content_of, 2, "train")
        run = SimpleNamespace(fab_id=claimed["fab_id"], fab_version=claimed["fab_version"])
        fab = SimpleNamespace(content=content, hash_str=claimed["digest"])

        def install(content, skip_prompt):
            self.steps.append("installed")
            self.installed = install_from_fab(content, self.home, skip_prompt=skip_prompt)

        def load(**_):
            self.steps.append("loaded")
            return lambda *_: lambda message, context: "the app's reply"

        steps = {
            "pull_task_input": lambda client: (message, context, run, fab),
            "install_from_fab": install,
            "install_app_dependencies": lambda *_, **__: self.steps.append("packages"),
            "get_project_dir": lambda *_: self.installed,
            "get_load_client_app_fn": load,
        }
        for name, step in steps.items():
            self.monkeypatch.setattr(run_clientapp, name, step)
        guard(self.approvals)
        pulled, context, run, fab = run_clientapp.pull_task_input(None)
        run_clientapp.install_from_fab(fab.content, skip_prompt=True)
        run_clientapp.get_project_dir(run.fab_id, run.fab_version, fab.hash_str)
        if claims.get("packages"):
            run_clientapp.install_app_dependencies("app", launch_id="1")
        loading = run_clientapp.get_load_client_app_fn(app_path=None)
        app = loading(run.fab_id, run.fab_version, fab.hash_str)
        return app(message=pulled, context=context)


@pytest.fixture
def app(tmp_path):
    return bundle(tmp_path / "app")


def test_an_approved_app_is_installed_and_runs(hospital, app):
    hospital.approve(*app)
    assert hospital.answer(*app) == "the app's reply"
    assert hospital.steps == ["installed", "loaded"]


def test_an_app_that_is_not_approved_is_neither_installed_nor_loaded(hospital, app):
    reply = hospital.answer(*app)
    assert hospital.steps == []
    assert error_text(reply).startswith("declined: app lab/toy 1.0.0 (SHA-256 ")
    assert error_text(reply).endswith("...) is not approved here")
    (asked,) = Approvals.load(hospital.approvals).asked()
    assert asked.bundle == app[0]
    assert asked.content == app[1]


def test_a_setting_that_is_not_allowed_stops_the_app(hospital, app):
    hospital.approve(*app, "rounds=1..5")
    assert hospital.answer(*app, config={"rounds": 5}) == "the app's reply"
    hospital.steps.clear()
    reply = hospital.answer(*app, config={"rounds": 6})
    assert "rounds is 6, allowed is the app's 3 or 1..5" in error_text(reply)
    assert hospital.steps == []


@pytest.mark.parametrize(
    ("claim", "text"),
    [
        ({"fab_id": "lab/other"}, "the run says that it is of app lab/other 1.0.0"),
        ({"fab_version": "0.9"}, "the run says that it is of app lab/toy 0.9"),
        ({"digest": "0" * 64}, f"the app's bundle has not the SHA-256 {'0' * 64}"),
        ({"packages": True}, "packages may not be installed at this hospital"),
    ],
)
def test_a_server_that_says_what_is_not_so_is_refused(hospital, app, claim, text):
    hospital.approve(*app)
    assert text in error_text(hospital.answer(*app, **claim))
    assert "loaded" not in hospital.steps
    assert "packages" not in hospital.steps


def test_another_app_in_the_folder_of_the_approved_one_does_not_run(hospital, app, tmp_path):
    hospital.approve(*app)
    hospital.answer(*app)
    (hospital.installed / "toy" / "client.py").write_text("answer = 41\n")
    hospital.steps.clear()
    reply = hospital.answer(*app)
    assert error_text(reply) == "declined: the app that is installed here is not the approved one"
    assert "loaded" not in hospital.steps
    shutil.rmtree(hospital.installed)
    assert hospital.answer(*app) == "the app's reply"


def test_code_that_somebody_has_compiled_beside_the_approved_files_does_not_run(hospital, app):
    hospital.approve(*app)
    hospital.answer(*app)
    evil = hospital.home / "evil.py"
    evil.write_text("answer = 41\n")
    # Python runs such a file whatever the source beside it holds.
    compiled = cache_from_source(hospital.installed / "toy" / "client.py")
    py_compile.compile(
        evil, compiled, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    program = "from toy.client import answer; print(answer)"

    def imported():
        command = [sys.executable, "-c", program]
        return subprocess.check_output(command, cwd=hospital.installed, text=True)

    assert imported() == "41\n"
    assert hospital.answer(*app) == "the app's reply"
    assert imported() == "42\n"


def test_what_is_taken_off_the_list_does_not_answer_the_next_message(hospital, app):
    hospital.approve(*app)
    assert hospital.answer(*app) == "the app's reply"
    left, _ = Approvals.load(hospital.approvals).without(app[0].digest[:8])
    left.save()
    assert "is not approved here" in error_text(hospital.answer(*app))


def test_what_is_no_bundle_or_a_broken_list_approves_nothing(hospital, app):
    hospital.approve(*app)
    digest = hashlib.sha256(b"none").hexdigest()
    text = "the app's bundle or the hospital's list of approved ones is unreadable"
    assert text in error_text(hospital.answer(app[0], b"none", digest=digest))
    (hospital.approvals / "approved.toml").write_text("[")
    assert text in error_text(hospital.answer(*app))
    assert hospital.steps == []


def test_a_flower_without_these_steps_is_refused(tmp_path, monkeypatch):
    for name in _REPLACED:
        monkeypatch.setattr(run_clientapp, name, getattr(run_clientapp, name))
    monkeypatch.delattr(run_clientapp, "pull_task_input")
    with pytest.raises(RuntimeError, match="this Flower has no pull_task_input"):
        guard(tmp_path)


def test_the_steps_are_where_flower_looks_them_up():
    used = run_clientapp.run_clientapp.__code__.co_names
    assert {*_REPLACED} <= {*used}
