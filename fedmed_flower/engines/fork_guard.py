"""Whether a child of a fork server would be what a new process is.

What a process was given by the one that started it, and what has been imported and installed, is
noted when the server starts and compared at each request.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
# Lines of /proc/PID/status that a child has from this process.
_STATUS = re.compile(
    r"^(Umask|Uid|Gid|Groups|Sig(?:Blk|Ign)|Cap\w+|NoNewPrivs|Seccomp|Cpus_allowed|Mems_allowed):"
    r"[ \t]*(.*)$",
    re.MULTILINE,
)


# Variables that may have any value, since nothing that is imported beforehand reads them. Flower's
# SuperExec sets this one for a package that an app of agents imports.
FREE = (b"BROWSER_USE_SETUP_LOGGING",)


class RefusedError(Exception):
    """A child would not be what a new process is; the text names what differs."""


def surroundings(pid: int | str, variables: Mapping[bytes, bytes]) -> dict[str, str]:
    """Return what a process was given by the one that started it, apart from its environment.

    Parameters
    ----------
    pid : int or "self"
    variables : mapping of bytes to bytes
        Its environment. If ``PYTHONPATH`` has relative parts, the working folder counts.

    Raises
    ------
    OSError
        If the process has ended or is another user's.
    """
    folder = _PROC / str(pid)
    found = dict(_STATUS.findall((folder / "status").read_text(errors="replace")))
    for line in (folder / "limits").read_text().splitlines()[1:]:
        name, *values = re.split(r"\s{2,}", line.strip())
        found[name] = " ".join(values)
    # The name in parentheses may itself hold spaces and parentheses.
    found["nice value"] = (
        (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[16]
    )
    for name in ("cgroup", "oom_score_adj"):
        found[name] = (folder / name).read_text().strip()
    paths = (variables.get(b"PYTHONPATH") or b"/").split(os.fsencode(os.pathsep))
    if not all(path.startswith(b"/") for path in paths):
        found["the folder to which parts of PYTHONPATH are relative"] = str(
            (folder / "cwd").readlink()
        )
    return found


def environment(content: bytes) -> dict[bytes, bytes]:
    """Return an environment as ``/proc/PID/environ`` has it, by name."""
    pairs = (text.partition(b"=") for text in content.split(b"\0") if b"=" in text)
    return {name: value for name, _, value in pairs}


@dataclass(frozen=True)
class Surroundings:
    """What this process was given at its start, to be compared with what others were given.

    Attributes
    ----------
    variables : dict
        The environment before anything was imported.
    others : dict
        As `surroundings` returns it.
    """

    variables: Mapping[bytes, bytes]
    others: Mapping[str, str]

    @classmethod
    def own(cls) -> Surroundings:
        """Return those of this process, before it has changed any."""
        content = (_PROC / "self" / "environ").read_bytes()
        variables = environment(content)
        return cls(variables, surroundings("self", variables))

    def check(self, variables: Mapping[bytes, bytes], pid: int) -> None:
        """Refuse a process that was given something else.

        A variable may also have the value that it has in this process by now: what Flower's modules
        set when they are imported is set in the process that starts the command, too.

        Raises
        ------
        RefusedError
            With the first name that differs; values are not shown.
        """
        for name in sorted((self.variables.keys() | variables.keys()) - set(FREE)):
            known = (self.variables.get(name), os.environb.get(name))
            if variables.get(name) not in known:
                text = name.decode("ascii", "backslashreplace")
                raise RefusedError(f"{text} differs in the environment")
        try:
            others = surroundings(pid, variables)
        except OSError as error:
            raise RefusedError(f"the asking process cannot be read ({error.strerror})") from error
        for what, value in self.others.items():
            if others.get(what) != value:
                raise RefusedError(f"{what} differs")


Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Packages:
    """Files of what was imported, and what was installed, to notice a change.

    Attributes
    ----------
    files : dict
        Path -> time of change in nanoseconds, bytes, inode; of all modules and mapped libraries.
    installed : dict
        The same of folders of metadata and ``.pth`` files in the folders of ``sys.path``.
    """

    files: Mapping[str, Stamp]
    installed: Mapping[str, Stamp]

    @classmethod
    def now(cls) -> Packages:
        """Return what this process has imported."""
        return cls(dict(_stamps(_loaded())), dict(_stamps(_installed())))

    def check(self) -> None:
        """Refuse if a file has changed since.

        Raises
        ------
        RefusedError
            With the path of the first one.
        """
        for path, stamp in self.files.items():
            if _stamp(path) != stamp:
                raise RefusedError(f"{path} has changed since the fork server imported it")
        installed = dict(_stamps(_installed()))
        for path in sorted(installed.keys() | self.installed.keys()):
            if installed.get(path) != self.installed.get(path):
                raise RefusedError(f"{path} has changed since the fork server started")


def _loaded() -> Iterator[str]:
    for module in list(sys.modules.values()):
        # Some modules import others when they are asked for an attribute.
        path = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(path, str):
            yield path
    for line in (_PROC / "self" / "maps").read_text(errors="surrogateescape").splitlines():
        path = line.split(maxsplit=5)[-1]
        if path.startswith("/") and ".so" in path:
            yield path


def _installed() -> Iterator[str]:
    for folder in sys.path:
        with suppress(OSError), os.scandir(folder or ".") as entries:
            for entry in entries:
                if entry.name.endswith((".dist-info", ".egg-info", ".pth", ".egg-link")):
                    yield entry.path


def _stamps(paths: Iterable[str]) -> Iterator[tuple[str, Stamp]]:
    for path in paths:
        stamp = _stamp(path)
        # A module without a file, such as one in an archive, cannot be watched.
        if stamp is not None:
            yield path, stamp


def _stamp(path: str) -> Stamp | None:
    try:
        # Path would take three times as long, for thousands of files at each request.
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def threads() -> list[str]:
    """Return the names of this process's threads beside the one that calls."""
    own = threading.get_native_id()
    return [
        (task / "comm").read_text(errors="replace").strip()
        for task in (_PROC / "self" / "task").iterdir()
        if int(task.name) != own
    ]


def descriptors() -> dict[int, str]:
    """Return this process's open descriptors beyond 2, and what each leads to."""
    found: dict[int, str] = {}
    for link in list((_PROC / "self" / "fd").iterdir()):
        # The descriptor of the listing itself is gone by now.
        with suppress(OSError):
            if int(link.name) > 2:
                found[int(link.name)] = str(link.readlink())
    return found


def own_interpreter(command: bytes) -> None:
    """Refuse a command that is no script of this Python, without options.

    Raises
    ------
    RefusedError
    """
    name = os.fsdecode(command)
    with Path(name).open("rb") as file:
        line = file.readline(4096).strip()
    if not line.startswith(b"#!/"):
        raise RefusedError(f"{name} is no Python script")
    if line[2:].split() != [line[2:].strip()]:
        raise RefusedError(f"{name} starts Python with options")
    found = os.fsdecode(line[2:].strip())
    same = [(path.parent.resolve(), path.resolve()) for path in map(Path, (found, sys.executable))]
    if same[0] != same[1]:
        raise RefusedError(f"{name} is a script of {found}, not of {sys.executable}")
