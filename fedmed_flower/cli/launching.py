"""What `fedmed node` and `fedmed link` share: Flower's command, its environment, a fork server.

The command takes the place of this process (`execve`), so that its number, its signals and its exit
code are Flower's. A child of it, the keeper, holds the fork server until the command has ended,
however it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import sysconfig
import traceback
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from fedmed_flower.engines import forking
from fedmed_flower.engines.processes import without_loopback_proxy
from fedmed_flower.errors import InputError

POLL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
# What Flower takes; from elsewhere it refuses another value only when an app is to be started.
_SHORTEST_POLL, _LONGEST_POLL = 0.01, 60.0
_NO_INSTALLATION = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    _NO_INSTALLATION: "1",
}

FlowersOptions = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FLOWER'S OPTIONS",
        help="Options of Flower's command, which are handed on as they are. What follows `--` is "
        "Flower's even if an option here has its name: `-- --help` shows all.",
    ),
]
GivenPoll = Annotated[
    float,
    typer.Option(
        envvar=POLL,
        metavar="SECONDS",
        help="Seconds between two looks whether an app is to be started, from 0.01 to 60.",
    ),
]
NoForkServer = Annotated[
    bool,
    typer.Option(
        "--no-fork-server", help="Start each app process anew, as Flower does, with all imports."
    ),
]


@dataclass(frozen=True)
class Launched:
    """One of Flower's lasting commands.

    Attributes
    ----------
    name : str
        Of the command.
    installs : bool
        Whether it installs what an app depends on, if neither an option nor the environment says.
    apps : collection of str
        Commands of the app processes that it starts.
    modules : sequence of str
        What a fork server imports for these.
    """

    name: str
    installs: bool
    apps: Collection[str]
    modules: Sequence[str]


def launch(
    flower: Launched,
    options: Sequence[str],
    poll: float,
    fork_server: bool = True,
    approvals: Path | None = None,
) -> NoReturn:
    """Become Flower's command.

    Parameters
    ----------
    flower : Launched
    options : sequence of str
        All that follows the command's name.
    poll : float
        Seconds between two looks whether an app is to be started.
    fork_server : bool
        Whether app processes come from a fork server. There is none where none is of use; on
        standard error stands why.
    approvals : Path, optional
        Folder of a hospital's list of approved apps: no other app starts.

    Raises
    ------
    InputError
        If the command is not installed or cannot be started, `poll` is out of range, or an option
        would let apps start past the list.
    """
    program = _program(flower.name)
    environment = launch_environment(os.environ, poll, program.parent)
    asked = _options_read().parse_known_args(options)[0]
    if approvals is not None:
        _require_guarded(asked)
        environment = _guarded(environment, approvals)
    if not fork_server or asked.help or asked.version:
        _become(program, options, environment)
    if reason := _hindrance(flower, asked, environment):
        _say(f"no fork server, each command is a new process: {reason}")
        _become(program, options, environment)
    _become(program, options, _kept_fork_server(flower, environment))


def launch_environment(given: Mapping[str, str], poll: float, programs: Path) -> dict[str, str]:
    """Return the environment of Flower's command.

    Parameters
    ----------
    given : mapping of str to str
        An environment, whose variables all stay: calls home and installations are off unless it
        sets them.
    poll : float
        Seconds between two looks whether an app is to be started.
    programs : Path
        Folder of Flower's commands, which becomes the first of PATH: Flower starts others by name.

    Raises
    ------
    InputError
        If `poll` is out of range.
    """
    if not _SHORTEST_POLL <= poll <= _LONGEST_POLL:
        raise InputError(
            f"--poll ({POLL}) must be from {_SHORTEST_POLL:g} to {_LONGEST_POLL:g} seconds, got "
            f"{poll:g}"
        )
    path = os.pathsep.join([str(programs), *filter(None, [given.get("PATH")])])
    own = {POLL: repr(poll), "PATH": path}
    return without_loopback_proxy({**_QUIET, **given, **own})


def _program(name: str) -> Path:
    """Return the file of a command of Flower, beside those of this Python."""
    program = Path(sysconfig.get_path("scripts"), name)
    if not program.is_file():
        raise InputError(
            f"the program {program} is missing: install flwr into the environment of "
            f"{sys.executable}"
        )
    return program


def _require_guarded(asked: argparse.Namespace) -> None:
    """Refuse options by which code would run that no list has seen."""
    if asked.isolation == "process":
        raise InputError(
            "--approvals excludes --isolation process: whoever starts the app processes then is "
            "not bound by the list"
        )
    if asked.allow:
        raise InputError(
            "--approvals excludes --allow-runtime-dependency-installation: packages run code that "
            "nobody has approved"
        )


def _guarded(environment: Mapping[str, str], approvals: Path) -> dict[str, str]:
    """Return the environment with the guarded commands first on ``PATH``."""
    from fedmed_flower.approval.approvals import Approvals
    from fedmed_flower.approval.gate import APPROVALS, write_commands

    folder = approvals.expanduser().absolute()
    # What is wrong with the list is said now, not at the first message.
    Approvals.load(folder)
    path = os.pathsep.join([str(write_commands(folder)), environment["PATH"]])
    return {**environment, "PATH": path, APPROVALS: str(folder)}


def _options_read() -> argparse.ArgumentParser:
    """Return what reads those of Flower's options that decide whether a fork server is of use.

    Flower reads its options by argparse too, so shortened names mean the same.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-V", "--version", action="store_true")
    parser.add_argument("--isolation", nargs="?")
    for name in ("allow", "disable"):
        option = f"--{name}-runtime-dependency-installation"
        parser.add_argument(option, action="store_true", dest=name)
    return parser


def _hindrance(
    flower: Launched, asked: argparse.Namespace, environment: Mapping[str, str]
) -> str | None:
    """Return why a fork server would be of no use; None if it is of use."""
    if asked.isolation == "process":
        return "with --isolation process somebody else starts the app processes"
    if asked.allow or (
        flower.installs and not asked.disable and environment[_NO_INSTALLATION] != "1"
    ):
        return "each app process uses packages that are installed for its app"
    return None


def _kept_fork_server(flower: Launched, environment: Mapping[str, str]) -> dict[str, str]:
    """Start a keeper with a fork server, and return the environment of Flower's command."""
    own, of_keeper = socket.socketpair()
    keeper = os.fork()
    if keeper == 0:
        own.close()
        _keep(flower, environment, of_keeper)
    of_keeper.close()
    answer = b""
    try:
        while part := own.recv(1 << 16):
            answer += part
    except KeyboardInterrupt:
        # Otherwise it would end after the imports.
        os.kill(keeper, signal.SIGINT)
        raise
    if not answer:
        raise InputError("the fork server did not start, see above; --no-fork-server does without")
    # It stays open as long as the command lives, and closes however that ends.
    os.set_inheritable(own.detach(), True)
    return dict(json.loads(answer))


def _keep(flower: Launched, environment: Mapping[str, str], launcher: socket.socket) -> NoReturn:
    """Hold a fork server until the launcher's end of a connection is closed; then end."""
    code = 1
    try:
        # Ctrl-C in the terminal is for Flower's command.
        os.setsid()
        with forking.fork_server(flower.apps, flower.modules, environment, _say) as forked:
            # A service manager asks all processes at once to end; this one ends after the command.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            # The launcher may have been killed meanwhile.
            with suppress(BrokenPipeError):
                launcher.sendall(json.dumps(forked).encode())
                launcher.shutdown(socket.SHUT_WR)
                launcher.recv(1)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # Without the exit handlers of the process that it was forked from.
        os._exit(code)


def _say(line: str) -> None:
    """Write a line where Flower's command writes its own."""
    print(line, file=sys.stderr, flush=True)


def _become(program: Path, options: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace this process by a program."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program, [str(program), *options], environment)
    except OSError as error:
        raise InputError(f"{program} cannot be started: {error.strerror}") from error
