import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest

from fedmed_flower.engines import fork_client
from fedmed_flower.engines.fork_client import LENGTHS, SOCKET, peer
from fedmed_flower.engines.forking import fork_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs on Linux alone")
HELPERS = Path(__file__).parents[1] / "helpers"
# What the server imports in these tests: it leaves what imports may leave.
PRELOADED = """
    import logging, random, sys, warnings, multiprocessing, tempfile, json, uuid

    import fedmed_flower.engines.fork_server

    generator = random.Random()
    logging.getLogger("preloaded").addHandler(logging.StreamHandler())
    logging.basicConfig(stream=sys.stdout)
    warnings.filterwarnings("ignore", "of preloaded")
"""


class Commands:
    """A folder with commands, and an environment in which they are found."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "lib").mkdir()
        self.write("preloaded", PRELOADED)
        path = os.pathsep.join([str(folder / "lib"), str(HELPERS), os.environ.get("PYTHONPATH", "")])
        given = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
        self.environment = {
            **given,
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": path,
            **variables,
        }
        self.log: list[str] = []
        # A command with its folder is not looked for on PATH, where the shims are.
        self.real = folder / "bin" / "probe"

    def write(self, name: str, text: str) -> Path:
        path = self.folder / "lib" / f"{name}.py"
        path.write_text(dedent(text))
        return path

    def command(self, text: str, name: str = "probe") -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!{sys.executable}\n{dedent(text)}")
        path.chmod(0o755)

    @contextmanager
    def served(self, *modules: str, command: str = "probe"):
        with fork_server((command,), modules, self.environment, self.log.append) as environment:
            yield environment


def run(environment, *arguments, command="probe", **options):
    options = {"capture_output": True, "text": True, "timeout": 60, **options}
    return subprocess.run([str(command), *arguments], env=environment, **options)


def server_of(environment):
    """Return the number of the server's process."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(environment[SOCKET])
        return peer(connection)[0]


@contextmanager
def end_of(pid):
    """Wait, at the end of the block, until a process has ended."""
    descriptor = os.pidfd_open(pid)
    try:
        yield
        assert select.select([descriptor], [], [], 30)[0], f"{pid} still runs"
    finally:
        os.close(descriptor)


@pytest.fixture
def commands(tmp_path):
    return Commands(tmp_path)


@pytest.fixture
def echo(commands):
    """A command that says by whom it was started, and with what."""
    commands.command("import os, sys; print(os.getppid(), sys.argv[1:])")
    return commands


def is_served(done, environment):
    return done.stdout.split()[0] == str(server_of(environment))


# As a new process


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"PYTHONUNBUFFERED": "1"},
        # Python then sets LC_CTYPE itself, also in the processes that start the command.
        {"LC_ALL": "", "LANG": "C"},
        {"PYTHONIOENCODING": "latin-1:replace", "PYTHONFAULTHANDLER": "1"},
        {"PYTHONSAFEPATH": "1"},
    ],
)
def test_a_child_finds_what_a_new_process_finds(tmp_path, variables):
    commands = Commands(tmp_path, **variables)
    commands.command("import preloaded, probe\nif __name__ == '__main__': probe.main()")
    arguments = ("--x", "", "\udcff", "a b")
    where = tmp_path / "where"
    where.mkdir()

    def state(command):
        with (tmp_path / "in").open("w+") as given:
            given.write("some lines")
            given.seek(5)
            done = run(environment, *arguments, command=command, cwd=where, stdin=given)
        assert done.stderr == ""
        return json.loads(done.stdout)

    with commands.served("preloaded") as environment:
        fresh, fresh_numbers, _ = state(commands.real)
        _, again, _ = state(commands.real)
        child, numbers, names = state("probe")
        second, others, _ = state("probe")
        assert commands.log[-1].startswith("fork server: ")
    assert child.keys() == fresh.keys()
    assert {n: (v, fresh[n]) for n, v in child.items() if v != fresh[n]} == {}
    assert second == child
    assert numbers.keys() == fresh_numbers.keys() >= {"preloaded.generator"}
    for name, value in numbers.items():
        assert len({value, others[name], fresh_numbers[name], again[name]}) == 4, name
    assert "preloaded" in names

