"""Commands of tests, in a folder of their own, and a fork server that serves one."""

import os
import select
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

from fedmed_flower.engines.fork_client import SOCKET, peer
from fedmed_flower.engines.forking import fork_server


class Commands:
    """A folder with commands, and an environment in which they are found.

    Attributes
    ----------
    environment : dict
        Without settings of Python but those that are given.
    log : list of str
        What the server and its launcher have said.
    real : Path
        The command ``probe`` by its path, for which nobody looks on ``PATH``, where the shims are.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "lib").mkdir()
        own = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        paths = [str(folder / "lib"), str(Path(__file__).parent), *own]
        given = {name: text for name, text in _given().items() if not name.startswith("PYTHON")}
        self.environment = {
            **given,
            "PATH": f"{folder / 'bin'}{os.pathsep}{given['PATH']}",
            "PYTHONPATH": os.pathsep.join(paths),
            **variables,
        }
        self.log: list[str] = []
        self.real = folder / "bin" / "probe"

    def write(self, name: str, text: str) -> Path:
        """Write a module."""
        path = self.folder / "lib" / f"{name}.py"
        path.write_text(dedent(text))
        return path

    def command(self, text: str, name: str = "probe", first: str = f"#!{sys.executable}") -> None:
        """Write a command."""
        path = self.folder / "bin" / name
        path.write_text(f"{first}\n{dedent(text)}")
        path.chmod(0o755)

    @contextmanager
    def served(self, *modules: str, command: str = "probe"):
        """Serve a command; yield the environment in which it is served."""
        with fork_server((command,), modules, self.environment, self.log.append) as environment:
            yield environment


def _given():
    """Return this process's environment without what its own imports have set."""
    initial = Path("/proc/self/environ")
    if not initial.exists():
        return dict(os.environ)
    pairs = [text.split("=", 1) for text in initial.read_text().split("\0") if "=" in text]
    return dict(pairs)


def run(environment, *arguments, command="probe", **options):
    """Run a command to its end."""
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
        assert select.select([descriptor], [], [], 60)[0], f"{pid} still runs"
    finally:
        os.close(descriptor)
