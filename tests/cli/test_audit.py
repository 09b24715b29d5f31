"""The command that verifies and compares audit trails."""

import pytest
from audit_trails import NAMES, Trails, finished, identity
from typer.testing import CliRunner

from fedmed_flower.cli.main import app
from fedmed_flower.secure.encoding import digest
from fedmed_flower.secure.identity import key_text
from fedmed_flower.secure.study import Peers

NOT_SHOWN = "not shown: that the server's model is the sum"


def fedmed(*arguments):
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)])
    assert result.exit_code in (0, 1, 2), result.exception
    return result.exit_code, result.output


def folders(trails):
    return sorted({path.parent for path in trails.files()})


def key(name):
    return f"{name}={key_text(identity(name).public)}"


@pytest.fixture
def trails(tmp_path):
    return finished(tmp_path)


def test_consistent_trails_end_with_code_0_and_what_is_not_shown(trails):
    code, output = fedmed(*folders(trails))
    assert code == 0, output
    assert "nothing differs" in output
    assert "note: run ab12 was compared: 3 rounds that two or more trails show" in output
    assert NOT_SHOWN in output
    for name in (*NAMES, "the server"):
        assert name in output


def test_one_trail_alone_is_verified_and_not_more_is_claimed(trails):
    code, output = fedmed(trails.path("north"), "--public-key", key("north"))
    assert code == 0
    assert "the key that was given" in output
    assert "note: nothing was compared: give the trails of other hospitals" in output
    assert "no key was given" not in output


def test_without_keys_it_says_what_its_own_key_shows(trails):
    code, output = fedmed(trails.path("north"))
    assert code == 0
    assert (
        "note: no key was given for north: verified by the key that a trail names itself, which "
        "shows that it is whole, and not whose it is"
    ) in output


def test_what_differs_is_said_in_words_and_ends_with_code_1(trails):
    trails.sent(4, "north")
    trails.sent(4, "south", model=digest("other").hex())
    code, output = fedmed(trails.path("north").parent, trails.path("south").parent)
    assert code == 1
    assert (
        "differs: north and south were told different models in round 4 of run ab12: the server "
        "swapped one of them"
    ) in output
    assert "1 thing differs" in output
    assert NOT_SHOWN in output
    assert "nothing differs" not in output


def test_a_changed_line_is_named_and_the_trail_not_compared(trails):
    path = trails.path("north")
    path.write_bytes(path.read_bytes().replace(b'"round":2', b'"round":7'))
    code, output = fedmed(*folders(trails))
    assert code == 1
    assert f"differs: line 6 of {path} was changed" in output
    assert "3 things differ" in output
    assert "note: not compared, since lines are wrong: north" in output
    assert "took part in" not in output


def test_keys_of_a_peers_file_and_of_the_command_count_together(trails, tmp_path):
    peers = tmp_path / "peers.toml"
    members = {name: identity(name).public for name in NAMES}
    Peers(name="heart", members=members).save(peers)
    code, output = fedmed(*folders(trails), "--peers", peers)
    assert code == 0, output
    assert output.count("the key that was given") == 3
    assert "no key was given for the server:" in output
    false = Trails(tmp_path / "false", names=("east",))
    false.hello()
    code, output = fedmed(false.path("east"), "--peers", peers)
    assert code == 1
    assert f"differs: {false.path('east')} is of east, which is no member of {peers}" in output


def test_a_trail_by_another_key_than_the_given_one_is_named(trails):
    other = key("south").replace("south", "north")
    code, output = fedmed(trails.path("north"), "--public-key", other)
    assert code == 1
    assert f"line 1 of {trails.path('north')} goes on with the key ed25519:" in output
    both = ["--public-key", other, "--public-key", key("north")]
    assert fedmed(trails.path("north"), *both)[0] == 0


def test_an_unfinished_line_and_a_new_key_are_notes(trails):
    trails.server = Trails(trails.folder).server
    trails.server.append("note", {})
    path = trails.server.path
    line = len(path.read_bytes().splitlines()) - 1
    path.write_bytes(path.read_bytes()[:-20] + b"\n" + b'{"number')
    code, output = fedmed(path)
    assert code == 1
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]) + b'{"number')
    code, output = fedmed(path)
    assert code == 0, output
    assert f"note: the last line of {path} is unfinished, as after a kill" in output
    assert f"note: another key signs {path} from these lines on: {line}" in output


def test_trails_without_a_common_run_are_not_called_compared(tmp_path):
    first = finished(tmp_path / "a", rounds=1)
    second = Trails(tmp_path / "b", run="cd34")
    second.server.append("model", {"run": "cd34", "round": 1, "model": "00"})
    code, output = fedmed(first.path("north"), second.server.path)
    assert code == 0
    assert "note: nothing could be compared: north and the server have no run in common" in output


def test_two_trails_of_one_name_are_told_apart_by_their_files(tmp_path):
    first = finished(tmp_path / "a", rounds=1)
    second = Trails(tmp_path / "b", run="cd34")
    second.round(7)
    code, output = fedmed(first.path("north"), second.path("north"), first.path("north"))
    assert code == 0
    assert f"north ({first.path('north')})" in output
    assert f"north ({second.path('north')})" in output


def test_a_hospital_that_is_called_the_server_is_told_apart(tmp_path):
    trails = Trails(tmp_path, names=("the server", "south", "west"))
    trails.round(1)
    code, output = fedmed(*trails.files())
    assert code == 0
    assert "the server (" in output


def test_names_from_a_strangers_trail_move_no_cursor(tmp_path):
    trails = Trails(tmp_path)
    trails.run = "\x1b[31mred\nnothing differs"
    trails.sent(1, "north")
    trails.sent(1, "south", model="00")
    code, output = fedmed(trails.path("north"), trails.path("south"))
    assert code == 1
    assert "\x1b" not in output
    assert "\nnothing differs" not in output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{folder}"], "there is no audit trail (audit.jsonl or *.audit) in the folder"),
        (["{folder}/nowhere"], "cannot be read (No such file or directory): give a trail"),
        (["{north}", "--public-key", "north"], "--public-key must be NAME=KEY, got 'north'"),
        (["{north}", "--public-key", "north=ed25519:AA="], "--public-key must be NAME=KEY"),
        (
            ["{north}", "--public-key", key("south")],
            "--public-key has a key for 'south', and the trails are of north: give its trail too",
        ),
        (["{north}", "--peers", "{folder}/none.toml"], "none.toml cannot be read"),
    ],
)
def test_bad_input_ends_with_code_2(trails, tmp_path, arguments, text):
    (tmp_path / "empty").mkdir()
    names = {"folder": tmp_path / "empty", "north": trails.path("north")}
    code, output = fedmed(*(argument.format(**names) for argument in arguments))
    assert code == 2
    assert text in output
