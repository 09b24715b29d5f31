import io
import os
import pdb
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from deployment_helper import write_app
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedmed_flower.cli.progress import Bar, Lines, Position, show_progress
from fedmed_flower.cli.tables import LineConsole

HELPERS = str(Path(__file__).parents[1] / "helpers")
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"
_CODE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def message(kind="train", server_round=None, **config):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    if server_round is not None:
        config["server-round"] = server_round
    return Message(RecordDict({"config": ConfigRecord(config)}), 1, kind)


def terminal(width=100):
    return LineConsole(file=io.StringIO(), force_terminal=True, width=width)


def drawn(console):
    """Return each line that was on the terminal, as it was drawn, without the bar."""
    text = _CODE.sub("", console.file.getvalue())
    lines = [line.strip(" ━╸╺") for line in re.split(r"[\r\n]+", text)]
    return list(dict.fromkeys(line for line in lines if line))


def screen(text):
    """Return the lines that a terminal shows after it has received a text."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif part.endswith("K"):
            rows[row] = ""
        elif part.endswith("A"):
            row -= int(part[2:-1])
        elif not part.startswith("\x1b"):
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in rows if line.strip()]


def test_the_bar_shows_round_phase_sites_time_and_time_left(clock):
    console = terminal()
    with Bar(console, Position(4, clock)) as bar:
        bar.on_message(message("query.describe"), 0, 2)
        clock.now = 10
        for number in (1, 2):
            bar.on_message(message(server_round=number), 0, 2)
            clock.now += 15
            bar.on_message(message("evaluate", server_round=number), 0, 2)
            clock.now += 5
            bar.on_line(f"round {number}/4  train loss 0.5  20.0 s")
        bar.on_message(message(server_round=3), 0, 2)
        bar.on_message(message("evaluate", split="test"), 0, 2)
    lines = drawn(console)
    assert [line for line in lines if not line.startswith("start")] == [
        "describe  0/2 sites 0:00:00",
        "round 1/4  train  0/2 sites 0:00:10",
        "round 1/4  evaluate  0/2 sites 0:00:25",
        "round 2/4  train  0/2 sites 0:00:30, 0:01:00 left",
        "round 2/4  evaluate  0/2 sites 0:00:45, 0:00:45 left",
        "round 3/4  train  0/2 sites 0:00:50, 0:00:40 left",
        "test  0/2 sites 0:00:50, 0:00:40 left",
    ]


def test_the_clock_goes_on_while_no_message_comes(clock):
    position = Position(3, clock)
    position.read_message(message(server_round=1), 0, 1)
    clock.now = 5
    position.read_line("round 1/3  x")
    assert position.times == "0:00:05, 0:00:10 left"
    clock.now = 12
    assert position.times == "0:00:12, 0:00:03 left"
    clock.now = 20
    assert position.times == "0:00:20, 0:00:00 left"


def test_after_a_resume_the_rounds_of_before_do_not_count_for_the_time_left(clock):
    position = Position(10, clock)
    position.read_message(message(server_round=6), 0, 1)
    clock.now = 7
    position.read_line("round 6/10  x")
    assert (position.finished, position.seconds_left) == (6, 28)


def test_a_reply_to_a_message_of_an_earlier_round_does_not_set_the_round_back(clock):
    position = Position(10, clock)
    position.read_line("round 6/10  x")
    position.read_message(message(server_round=2), 0, 1)
    assert position.where == "round 7/10  train  0/1 sites"


def test_each_model_for_comparison_begins_its_rounds_again(clock):
    position = Position(2, clock)
    position.read_line("round 2/2  x")
    position.read_line("for comparison: north alone")
    assert (position.finished, position.where) == (0, "north alone")
    position.read_message(message(server_round=1), 0, 1)
    assert position.where == "north alone  round 1/2  train  0/1 sites"


def test_the_lines_of_flowers_engine_give_rounds_and_time_left(clock):
    position = Position(None, clock)
    position.read_line("INFO :      hospital-1: 10 train")
    assert position.where == ""
    for clock.now, number in ((30, 1), (40, 2)):
        position.read_line(f"INFO :      round {number}/5  train loss 0.5  10.0 s")
    assert (position.where, position.times) == ("2/5 rounds", "0:00:40, 0:00:30 left")
    position.read_line("INFO :      [ROUND 3/4]")
    assert (position.where, position.finished) == ("round 3/4", 2)


def test_of_rounds_whose_number_is_unknown_the_bar_shows_no_share(clock):
    console = terminal()
    with Bar(console, Position(None, clock)) as bar:
        bar.on_message(message(server_round=3), 0, 2)
    assert "round 3  train  0/2 sites 0:00:00" in drawn(console)


@pytest.mark.parametrize("width", [100, 30])
def test_nothing_is_left_of_the_bar_and_lines_of_log_and_clients_stand_above_it(width, capsys):
    console = terminal(width)

    def fail_half_way():
        with Bar(console, Position(10)) as bar:
            bar.on_message(message(server_round=1), 0, 2)
            console.print("a line of the log" + 100 * "x")
            print("a client prints")
            print("a client warns", file=sys.stderr)
            bar.on_message(message("evaluate", server_round=1), 0, 2)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail_half_way()
    text = console.file.getvalue()
    assert screen(text) == ["a line of the log" + 100 * "x", "a client prints", "a client warns"]
    assert text.rindex(SHOWN) > text.rindex(HIDDEN)
    print("after it")
    assert capsys.readouterr().out == "after it\n"


@pytest.mark.parametrize("prompt", [pdb.Pdb, breakpoint, lambda: sys.audit("builtins.input", "")])
def test_a_prompt_has_the_terminal_to_itself_until_the_next_message(prompt, monkeypatch):
    monkeypatch.setattr(sys, "breakpointhook", lambda: None)
    console, stdout = terminal(), sys.stdout
    with Bar(console, Position(2)) as bar:
        bar.on_message(message(server_round=1), 0, 2)
        prompt()
        assert sys.stdout is stdout
        text = console.file.getvalue()
        assert text.rindex(SHOWN) > text.rindex(HIDDEN)
        assert screen(text) == []
        bar.on_message(message(server_round=1), 1, 2)
        assert console.file.getvalue().endswith("0:00:00")
    assert screen(console.file.getvalue()) == []


def test_without_a_terminal_a_line_comes_only_if_none_came_for_a_minute(clock):
    console = LineConsole(file=io.StringIO())
    with Lines(console, Position(3, clock), clock) as lines:
        for clock.now, event in [
            (10, (message(server_round=1), 0, 5)),
            (59, (message(server_round=1), 1, 5)),
            (60, (message(server_round=1), 2, 5)),
            (119, (message(server_round=1), 3, 5)),
            (130, "round 1/3  train loss 0.5  120.0 s"),
            (140, (message(server_round=2), 0, 5)),
            (189, (message(server_round=2), 1, 5)),
            (190, (message(server_round=2), 2, 5)),
        ]:
            lines.on_line(event) if isinstance(event, str) else lines.on_message(*event)
    assert console.file.getvalue() == (
        "round 1/3  train  2/5 sites  0:01:00\nround 2/3  train  2/5 sites  0:03:10, 0:03:00 left\n"
    )


def test_colours_that_are_forced_on_make_no_terminal_of_a_file():
    with show_progress(terminal(), 3) as display:
        assert isinstance(display, Lines)


CLIENT = """
import os
import signal

from tiny import TinyClient


class Stopping(TinyClient):
    def fit(self, *arguments):
        DO
        return super().fit(*arguments)


app = Stopping.client_app()
"""
SERVER = """
from flwr.serverapp import ServerApp
from tiny import linear

from fedmed_flower import federate
from fedmed_flower.strategies import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    federate(FedAvg(), grid, context, linear)
"""
COMMAND = "from fedmed_flower.cli.main import main; main()"


def on_terminal(folder, do, typed=b""):
    """Run a tiny app on a terminal, with what is typed there; return exit code and output."""
    config = {"settings": "", "pictures": 0, "device": "cpu"}
    app = write_app(folder / "app", SERVER, CLIENT.replace("DO", do), **config)
    ours, theirs = pty.openpty()
    os.write(ours, typed)
    path = os.pathsep.join([HELPERS, os.environ.get("PYTHONPATH", "")])
    unset = ("PYTHONBREAKPOINT", "NO_COLOR", "FORCE_COLOR")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "run", app, "--sites", "2", "--rounds", "2"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=environment | {"PYTHONPATH": path, "TERM": "xterm", "COLUMNS": "200"},
        # A shell in the background lets its children ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 10_000):
            text += part
    except OSError:
        # So Linux says that nobody writes any more.
        pass
    os.close(ours)
    return process.wait(), text.decode()


def test_a_debugger_in_a_client_reaches_the_terminal_under_fedmed_run(tmp_path):
    code, text = on_terminal(tmp_path, "breakpoint()", b"p 40 + 2\nc\n" + 3 * b"c\n")
    assert code == 0, text
    assert text.count("(Pdb)") == 5
    assert "\n42\r\n" in text
    before = text[: text.index("(Pdb)")]
    assert before.rindex(SHOWN) > before.rindex(HIDDEN)
    assert len(re.findall(r"^round \d/2  ", "\n".join(screen(text)), re.MULTILINE)) == 2
    assert not [line for line in screen(text) if "sites 0:" in line]


def test_ctrl_c_leaves_a_clean_terminal(tmp_path):
    code, text = on_terminal(tmp_path, "os.kill(os.getpid(), signal.SIGINT)")
    assert code == 130
    assert text.rindex(SHOWN) > text.rindex(HIDDEN)
    assert screen(text)[-1].startswith("stopped by the user: ")
    assert not [line for line in screen(text) if "sites 0:" in line]
