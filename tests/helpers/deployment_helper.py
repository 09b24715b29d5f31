"""Start and stop the example deployment, and write Flower apps for it, in tests."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

from fedmed_flower.engines.processes import family, living

SCRIPT = Path(__file__).parents[2] / "examples" / "deployment" / "deploy.py"

ECHO_CLIENT = """
    import time

    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()


    @app.train()
    def train(message, context):
        site = context.node_config["site-name"]
        time.sleep(float(context.run_config.get("sleep", 0)))
        content = RecordDict({
            "arrays": message.content["arrays"],
            "metrics": MetricRecord({"num-examples": 1}),
            "site": ConfigRecord({"name": site}),
        })
        return Message(content=content, reply_to=message)
"""


@dataclass(frozen=True)
class Deployment:
    """A deployment in a folder; `deploy.py` is called as a user calls it."""

    directory: Path

    def command(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one command of the script and return its exit code and its text."""
        return subprocess.run(
            [sys.executable, str(SCRIPT), name, *arguments, "--dir", str(self.directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
        )

    @property
    def processes(self) -> dict[str, Any]:
        """What is recorded as started: name -> pid, port, node."""
        return json.loads((self.directory / "processes.json").read_text())

    def log(self, name: str) -> str:
        """The log of the SuperLink or of one hospital."""
        return (self.directory / "logs" / f"{name}.log").read_text()

    def kill(self, name: str) -> None:
        """End a process as a power cut would."""
        os.kill(self.processes[name]["pid"], signal.SIGKILL)

    def cut(self, name: str) -> None:
        """End a hospital's SuperNode and all that it has started, as a power cut would."""
        for pid in family({self.processes[name]["pid"]}, living()):
            os.kill(pid, signal.SIGKILL)

    def restart(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        """Start a hospital's SuperNode again; the SuperLink must know that it was gone.

        Parameters
        ----------
        name : str
        command, environment
            As `started` returned them while it ran.
        """
        with (self.directory / "logs" / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        processes = self.processes
        processes[name]["pid"] = process.pid
        (self.directory / "processes.json").write_text(json.dumps(processes))

    def started(self, name: str) -> tuple[list[str], dict[str, str]]:
        """Return the command by which a process was started, and its environment."""
        folder = Path("/proc") / str(self.processes[name]["pid"])
        command = (folder / "cmdline").read_text().rstrip("\0").split("\0")
        variables = (folder / "environ").read_text().rstrip("\0").split("\0")
        return command, dict(text.split("=", 1) for text in variables)


@contextmanager
def deployment(directory: Path, *arguments: str) -> Iterator[Deployment]:
    """Start a deployment, and stop it whatever happens."""
    started = Deployment(directory)
    try:
        result = started.command("start", *arguments)
        if result.returncode:
            raise RuntimeError(result.stdout)
        yield started
    finally:
        started.command("stop")


def write_app(folder: Path, server: str, client: str = ECHO_CLIENT, **config: Any) -> Path:
    """Write a Flower app of two modules, each with an `app`; `config` are its run settings."""
    folder.mkdir(parents=True)
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items())
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "{folder.name}"\nversion = "1.0.0"\n\n'
        '[tool.flwr.app]\npublisher = "tests"\n\n[tool.flwr.app.components]\n'
        'serverapp = "server_app:app"\nclientapp = "client_app:app"\n\n'
        f"[tool.flwr.app.config]\n{settings}\n"
    )
    (folder / "server_app.py").write_text(dedent(server))
    (folder / "client_app.py").write_text(dedent(client))
    return folder
