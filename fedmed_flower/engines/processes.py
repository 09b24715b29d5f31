"""Processes of this machine: the environment they are given, which of them live, who started whom.

No other program is needed on Linux: images for containers often lack ``ps``.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Programs prefer the one or the other.
_BYPASSES = {"no_proxy": "NO_PROXY", "NO_PROXY": "no_proxy"}
_PROC = Path("/proc")
# Elsewhere than on Linux it is part of the system.
_PS = ("/bin/ps", "-Awwo", "pid=,ppid=,stat=,args=")


class Process(NamedTuple):
    """A living process: the number of the one that started it, and its command line."""

    parent: int
    command: str


def without_loopback_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment whose proxies, if it has any, are not used for this machine itself.

    ``localhost``, ``127.0.0.1`` and ``::1`` are appended to what ``no_proxy`` and ``NO_PROXY``
    hold, and to ``no_grpc_proxy`` if it is set, which gRPC reads in place of the others.
    """
    bypasses = {
        name: environment.get(name) or environment.get(other, "")
        for name, other in _BYPASSES.items()
    }
    if "no_grpc_proxy" in environment:
        bypasses["no_grpc_proxy"] = environment["no_grpc_proxy"]
    return {**environment, **{name: _with_loopback(text) for name, text in bypasses.items()}}


def _with_loopback(text: str) -> str:
    hosts = [host for part in text.split(",") if (host := part.strip())]
    if "*" in hosts:
        return text
    return ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])


def living() -> dict[int, Process]:
    """Return the living processes by their number; a process that has ended is left out."""
    return _living_in(_PROC) if (_PROC / "self" / "stat").exists() else _living_by_ps()


def _living_in(proc: Path) -> dict[int, Process]:
    table: dict[int, Process] = {}
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            status = (folder / "stat").read_text(errors="replace")
            command = (folder / "cmdline").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            # It has ended since the folder was listed, or is somebody else's.
            continue
        # The name in parentheses may itself hold spaces and parentheses.
        state, parent = status.rpartition(")")[2].split()[:2]
        if state not in "ZX":
            table[int(folder.name)] = Process(int(parent), command.rstrip("\0").replace("\0", " "))
    return table


def _living_by_ps() -> dict[int, Process]:
    table: dict[int, Process] = {}
    lines = subprocess.run(_PS, capture_output=True, text=True, check=True).stdout.splitlines()
    for line in lines:
        pid, parent, state, *command = line.split(None, 3)
        if not state.startswith("Z"):
            table[int(pid)] = Process(int(parent), "".join(command))
    return table


def family(pids: Collection[int], table: Mapping[int, Process]) -> set[int]:
    """Return these processes and all that descend from them, as far as they are in the table.

    Flower's processes name their parent with ``--parent-pid``, which outlives the parent.
    """
    children: dict[int, set[int]] = defaultdict(set)
    for pid, process in table.items():
        for parent in (process.parent, *re.findall(r"--parent-pid (\d+)", process.command)):
            children[int(parent)].add(pid)
    kin = set[int]()
    new = set(pids)
    while new:
        kin |= new
        new = {child for pid in new for child in children[pid]} - kin
    return kin & table.keys()
