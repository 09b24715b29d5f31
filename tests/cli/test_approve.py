import pytest
from app_bundles import bundle, write_app
from typer.testing import CliRunner

from fedmed_flower.approval.approvals import Approvals
from fedmed_flower.cli.main import app as command
from fedmed_flower.secure.identity import Identity, key_text


def fedmed(*arguments, answer=None):
    """Return exit code and what a command printed."""
    result = CliRunner().invoke(command, list(map(str, arguments)), input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "list"


def test_an_app_is_shown_and_approved_after_a_question(tmp_path, folder):
    found, _ = bundle(tmp_path / "app", dependencies='"numpy>=1", "no-such-package"')
    code, said = fedmed("approve", "app", folder, tmp_path / "app", answer="n\n")
    assert code == 1
    assert "nothing was changed" in said
    assert Approvals.load(folder).bundles == {}
    allow = ("--allow", "rounds=1..9")
    code, said = fedmed("approve", "app", folder, tmp_path / "app", *allow, answer="y\n")
    assert code == 0
    for text in (
        "app lab/toy, version 1.0.0",
        f"SHA-256 {found.digest}",
        "not signed",
        "toy/client.py",
        "not installed",
        "no version of this app was approved before: read its files",
        "settings that a run may change: rounds=1..9",
        f"approved in {folder}: {found.digest}",
    ):
        assert text in said
    assert Approvals.load(folder).refusal(found, {"rounds": 9}) is None


def test_what_differs_from_the_version_before_is_shown(tmp_path, folder):
    write_app(tmp_path / "app")
    assert fedmed("approve", "app", folder, tmp_path / "app", "--yes")[0] == 0
    write_app(tmp_path / "app", client="answer = 41\n", config="rounds = 4", version="1.1.0")
    code, said = fedmed("approve", "show", folder, tmp_path / "app")
    assert code == 0
    lines = [line.strip() for line in said.splitlines()]
    assert "-answer = 42" in lines
    assert "+answer = 41" in lines
    assert any(line.split() == ["│", "rounds", "│", "3", "│", "4", "│"] for line in lines)


def test_escape_codes_in_an_app_do_not_reach_the_terminal(tmp_path, folder):
    write_app(tmp_path / "app")
    fedmed("approve", "app", folder, tmp_path / "app", "--yes")
    write_app(tmp_path / "app", client='answer = "\x1b[2J\u202e"\n')
    _, said = fedmed("approve", "show", folder, tmp_path / "app")
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "\\x1b[2J\\u202e" in said


def test_long_differences_are_cut_unless_all_is_asked_for(tmp_path, folder):
    write_app(tmp_path / "app")
    fedmed("approve", "app", folder, tmp_path / "app", "--yes")
    write_app(tmp_path / "app", client="".join(f"a{i} = {i}\n" for i in range(300)))
    _, said = fedmed("approve", "show", folder, tmp_path / "app")
    assert "more lines: --all shows them" in said
    assert "a299 = 299" not in said
    _, said = fedmed("approve", "show", folder, tmp_path / "app", "--all")
    assert "a299 = 299" in said


def test_one_that_a_run_has_asked_for_is_approved_by_its_first_digits(tmp_path, folder):
    found, content = bundle(tmp_path / "app")
    Approvals.load(folder).remember(found, content)
    _, said = fedmed("approve", "show", folder)
    assert "nothing is approved, so no app runs here" in said
    assert f"asked for and not approved: lab/toy 1.0.0, SHA-256 {found.digest}" in said
    assert fedmed("approve", "app", folder, found.digest[:10], "--yes")[0] == 0
    _, said = fedmed("approve", "show", folder)
    assert "asked for" not in said
    assert "lab/toy 1.0.0" in said
    code, said = fedmed("approve", "revoke", folder, found.digest[:8])
    assert (code, said) == (0, "lab/toy 1.0.0 is not approved any more\n")
    Approvals.load(folder).remember(found, content)
    assert fedmed("approve", "forget", folder) == (0, "deleted: 1\n")


def test_a_signed_app_of_an_approved_signer(tmp_path, folder):
    key = tmp_path / "c.key"
    consortium = Identity.create(key, "consortium")
    write_app(tmp_path / "app")
    code, said = fedmed("sign", tmp_path / "app", "--key", key)
    assert code == 0
    assert f"fedmed approve signer FOLDER consortium {key_text(consortium.public)}" in said
    _, said = fedmed("approve", "show", folder, tmp_path / "app")
    assert "signed by consortium, who is not approved" in said
    public = key_text(consortium.public)
    code, said = fedmed("approve", "signer", folder, "ours", public, "--allow", "rounds=*")
    assert code == 0
    assert "all apps that ours signs" in said
    _, said = fedmed("approve", "show", folder, tmp_path / "app")
    assert "signed by consortium, who is approved as ours" in said
    found, _ = bundle(tmp_path / "app")
    assert Approvals.load(folder).refusal(found, {"rounds": 100}) is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("app", "LIST", "none"), "none is no app's folder, no .fab file, and the beginning of 0"),
        (("app", "LIST", "APP", "--allow", "rounds"), "a setting is allowed by KEY=VALUE"),
        (("app", "LIST", "APP", "--allow", "x=1"), "has no setting x"),
        (
            ("app", "LIST", "APP", "--allow", "rounds=1", "--allow", "rounds=2"),
            "--allow is given twice for rounds",
        ),
        (("signer", "LIST", "a", "key"), "a public key must be ed25519"),
        (("revoke", "LIST", "abcdefgh"), "0 entries of"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, folder, arguments, text):
    write_app(tmp_path / "app")
    places = {"LIST": folder, "APP": tmp_path / "app"}
    code, said = fedmed("approve", *(places.get(each, each) for each in arguments))
    assert code == 2
    assert said.startswith("not started: ")
    assert text in said
    assert not folder.exists()
