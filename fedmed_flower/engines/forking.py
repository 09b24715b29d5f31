"""Start a fork server for the commands that Flower starts for each message.

A SuperNode starts ``flwr-clientapp`` for each message, a SuperLink ``flwr-serverapp`` for each run.
Each of these processes imports torch, MONAI and Flower anew. Where `fork_server` yields an
environment and Flower is started in it, a small script stands in the command's place on ``PATH``:
it has a process forked that has imported all of them once. Flower itself is not changed.

docs/explanation/fork-server.md says what a child shares with its server, and when none is used.
"""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedmed_flower.engines import fork_client
from fedmed_flower.errors import shown

HOSPITAL_COMMANDS = ("flwr-clientapp",)
SERVER_COMMANDS = ("flwr-serverapp",)


def _files_of(room: str) -> tuple[str, ...]:
    """Return the modules of a folder of this package by name, without importing any."""
    folder = Path(__file__).parents[1] / room
    return tuple(
        f"fedmed_flower.{room}.{each.name}" for each in pkgutil.iter_modules([str(folder)])
    )


# What either side imports, now or when it first needs it: an optimizer imports torch._dynamo, a
# connection httpcore. A ServerApp may name its client. An app's own modules are never imported
# beforehand.
_BOTH = (
    "httpcore",
    "monai.losses",
    "monai.networks.nets",
    "monai.transforms",
    "opacus",
    "pandas",
    "safetensors.torch",
    "sklearn.metrics",
    "torch._dynamo",
    "fedmed_flower.data.cohorts",
    *_files_of("clients"),
)
_HOSPITAL_ROOMS = ("data", "images", "methods", "metrics", "models", "privacy", "secure")
HOSPITAL_MODULES = (
    "flwr.supernode.cli",
    *_BOTH,
    "fedmed_flower.approval.gate",
    *(module for room in _HOSPITAL_ROOMS for module in _files_of(room)),
    "fedmed_flower.genomics.client",
    "fedmed_flower.statistics.client",
    "fedmed_flower.trees.client",
)
SERVER_MODULES = (
    "flwr.superlink.cli",
    *_BOTH,
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    *_files_of("server"),
    *_files_of("strategies"),
    *_files_of("runs"),
    *_files_of("reports"),
)
# Without it, pandas' Arrow starts a thread, beside which no process should be forked.
_ENVIRONMENT = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
_SERVER = """\
from fedmed_flower.engines.fork_server import main

main()
"""
# Seconds for all imports, on a machine that has much else to do.
_IMPORTS = 600.0
# Seconds in which running commands may end by themselves, and in which the server then must.
_GRACE = 10.0
# Letters of a path in the first line of a script, and of a socket's path.
_MOST_SHEBANG = 127
_MOST_SOCKET = 107


class _OffError(Exception):
    """There is no fork server, for a reason."""


@contextmanager
def fork_server(
    commands: Collection[str],
    modules: Sequence[str],
    environment: Mapping[str, str],
    log: Callable[[str], None],
) -> Iterator[dict[str, str]]:
    """Run a fork server; yield the environment in which its commands are served.

    Everything that is started in the yielded environment, and names a command without a folder,
    has it run in a child of the server. A process whose environment differs in more than what
    Flower's own modules set becomes the real command, so all settings belong into `environment`.
    If there can be no fork server, one line says why, and `environment` is yielded as it is.

    At the end of the block no new command is taken; those that still run are killed after ten
    seconds. If this process is killed, the server ends with its last command.

    Parameters
    ----------
    commands : collection of str
        Names of commands, such as `HOSPITAL_COMMANDS`.
    modules : sequence of str
        Modules that are imported beforehand, such as `HOSPITAL_MODULES`.
    environment : mapping
        In which Flower would be started; its ``PATH`` has the real commands.
    log : callable
        Called with one line at a time, also from another thread.
    """
    with ExitStack() as stack:
        try:
            served = _start(commands, modules, environment, log, stack)
        except _OffError as reason:
            log(shown(f"no fork server, each command is a new process: {reason}"))
            served = dict(environment)
        yield served


def _start(
    commands: Collection[str],
    modules: Sequence[str],
    environment: Mapping[str, str],
    log: Callable[[str], None],
    stack: ExitStack,
) -> dict[str, str]:
    if sys.platform != "linux":
        raise _OffError("it runs on Linux alone")
    real = [_real_command(name, environment) for name in commands]
    try:
        folder = Path(tempfile.mkdtemp(prefix="fedmed-fork-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        shims = _write_shims(folder, commands)
    except OSError as error:
        raise _OffError(str(error)) from error
    path = str(folder / "socket")
    if len(os.fsencode(path)) > _MOST_SOCKET:
        raise _OffError(f"the path of the socket is too long, set TMPDIR to a shorter one: {path}")
    served = {
        **_ENVIRONMENT,
        **environment,
        "PATH": os.pathsep.join([str(shims), environment["PATH"]]),
        fork_client.SOCKET: path,
    }
    control, other = socket.socketpair()
    stack.callback(control.close)
    with other:
        orders = {
            "socket": path,
            "control": other.fileno(),
            "commands": real,
            "modules": list(modules),
        }
        script = folder / "fork-server"
        script.write_text(_SERVER, encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(orders)],
            env=served,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[other.fileno()],
            # A signal from a terminal is for the commands, which pass it on.
            start_new_session=True,
        )
    serving = threading.Event()
    reader = threading.Thread(target=_follow, args=(process, serving, log), daemon=True)
    reader.start()
    stack.callback(_stop, process, control, serving, reader)
    control.settimeout(_IMPORTS)
    try:
        with control.makefile(encoding="utf-8", errors="replace") as answers:
            answer = answers.readline()
    except TimeoutError as error:
        process.kill()
        raise _OffError(f"the imports took more than {_IMPORTS:g} s") from error
    if answer != "\n":
        raise _OffError(answer.strip() or "it ended while it started")
    serving.set()
    return served


def _real_command(name: str, environment: Mapping[str, str]) -> str:
    found = shutil.which(name, path=environment.get("PATH", ""))
    if found is None:
        raise _OffError(f"PATH has no {name}")
    return found


def _write_shims(folder: Path, commands: Collection[str]) -> Path:
    """Write the script of `fork_client` under the name of each command."""
    first = f"#!{sys.executable} -IS\n"
    if len(first) > _MOST_SHEBANG or len(first.split()) != 2:
        raise _OffError(f"no script can start {sys.executable}: too long a path, or a blank in it")
    shims = folder / "bin"
    shims.mkdir(mode=0o700)
    text = first + Path(fork_client.__file__).read_text(encoding="utf-8")
    for name in commands:
        shim = shims / name
        shim.write_text(text, encoding="utf-8")
        shim.chmod(0o700)
        if not os.access(shim, os.X_OK):
            raise _OffError(f"nothing can be run in {folder}, set TMPDIR to another folder")
    return shims


def _follow(
    process: subprocess.Popen[str], serving: threading.Event, log: Callable[[str], None]
) -> None:
    """Hand on the server's lines, and say so if it ends before it should."""
    for line in process.stdout or ():
        log(shown(line.rstrip()))
    code = process.wait()
    if serving.is_set():
        log(f"the fork server has ended ({code}): from now on each command is a new process")


def _stop(
    process: subprocess.Popen[str],
    control: socket.socket,
    serving: threading.Event,
    reader: threading.Thread,
) -> None:
    serving.clear()
    control.close()
    for request in (process.terminate, process.kill):
        try:
            process.wait(_GRACE)
            break
        except subprocess.TimeoutExpired:
            request()
    process.wait()
    reader.join()
    if process.stdout is not None:
        process.stdout.close()
