"""Reading a folder that a stranger may have written: nothing outside it, and no more than a bound.

What is read of a run folder is JSON, TOML, tables of text, PNG and arrays of plain numbers; none of
it can name code. Here is what holds for all of them: no file is reached through a link that leads
out of the folder, no more is read than a bound, and an archive unpacks to no more than it holds.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import secrets
import stat
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from fedmed_flower.errors import InputError

# Of a file that is read at once; as objects it takes twenty times as much memory.
MOST_TEXT = 1 << 26
# Of a table, which is read line by line.
MOST_TABLE = 1 << 34
# What a reader of somebody else's content raises where the content is not what it should be.
MALFORMED = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError),
    *(RecursionError, TypeError, ValueError, csv.Error),
)
_MOST_LINE = 1 << 16
_MOST_ENTRIES, _MOST_LEVELS, _MOST_MEMBERS = 1_000_000, 20, 1_000_000
# The end of SQLite's journal of several files at once, after the name of a file that is deleted
# when the journal is played back.
_SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")


@contextmanager
def as_input_error(what: str, remedy: str) -> Iterator[None]:
    """Turn what a reader raises on somebody else's content into an `InputError` of one line."""
    try:
        yield
    except InputError:
        raise
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{what} cannot be shown ({reason}): {remedy}") from error


def open_file(folder: Path, name: str, most: int) -> BinaryIO:
    """Open a file of a folder for reading.

    Parameters
    ----------
    folder : Path
        May itself be reached through links.
    name : str
        Path of the file in the folder.
    most : int
        Bytes that the file may have.

    Raises
    ------
    OSError
        If there is no such file, a link leads it out of the folder, or it is too large or not
        one that can be read to its end. `strerror` is the reason in words.
    """
    real = _inside(folder, folder / name)
    # Opening a pipe would wait for somebody who writes to it.
    descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        if about.st_size > most:
            reason = f"it has {about.st_size:,} bytes, more than {most:,}"
            raise OSError(errno.EFBIG, reason)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _inside(folder: Path, path: Path) -> str:
    """Return where a path leads to, which must be in a folder."""
    real = os.path.realpath(path)
    if not Path(real).is_relative_to(os.path.realpath(folder)):
        raise OSError(errno.ELOOP, f"a link leads out of the folder, to {real}")
    return real


def read_file(folder: Path, name: str, most: int = MOST_TEXT) -> bytes:
    """Return a file of a folder; what is raised is as in `open_file`."""
    with open_file(folder, name, most) as file:
        return file.read(most)


def read_lines(text: TextIO) -> Iterator[str]:
    """Yield the lines of a table.

    Raises
    ------
    csv.Error
        If one is longer than any line of ours: it could be as long as the file.
    """
    while line := text.readline(_MOST_LINE):
        if len(line) == _MOST_LINE:
            raise csv.Error(f"a line has {_MOST_LINE:,} letters or more")
        yield line


def read_object(folder: Path, name: str, hint: str) -> dict[str, Any]:
    """Return the JSON object in a file of a folder.

    Raises
    ------
    InputError
        If there is none, with `hint`, which says what to do.
    """
    path = folder / name
    try:
        found = json.loads(read_file(folder, name).decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not valid JSON: {error}"
        raise InputError(f"{path} cannot be read ({reason}): {hint}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, not a JSON object: {hint}")
    return found


def require_closed(folder: Path) -> None:
    """Refuse a folder from which a program that goes on in it would be led elsewhere.

    Raises
    ------
    InputError
        If anything in it, at any depth, is a link that leads out, or is neither file nor folder;
        or a database's journal names another file, which SQLite would delete.
    """
    for count, path in enumerate(_everything(folder), start=1):
        if count > _MOST_ENTRIES or len(path.relative_to(folder).parts) > _MOST_LEVELS:
            raise InputError(
                f"{folder} holds more than {_MOST_ENTRIES:,} files and folders, or they are more "
                f"than {_MOST_LEVELS} deep: no run folder does"
            )
        try:
            about = Path(_inside(folder, path)).stat()
            mode = about.st_mode
        except OSError as error:
            raise InputError(
                f"{path} cannot be gone on with ({error.strerror}): put there what it stands for"
            ) from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(f"{path} is neither a file nor a folder: remove it")
        if stat.S_ISREG(mode) and about.st_nlink > 1:
            raise InputError(f"{path} is one file with another name elsewhere: put a copy there")
        if stat.S_ISREG(mode) and path.name.endswith("-journal"):
            _require_own_journal(path)


def _everything(folder: Path) -> Iterator[Path]:
    """Return what is in a folder at any depth; no link is followed."""
    for index, folders, names in os.walk(folder):
        for name in (*folders, *names):
            yield Path(index, name)


def require_lone_database(folder: Path, name: str) -> None:
    """Refuse a database of SQLite that would lead to a file outside its folder when it is opened.

    Raises
    ------
    InputError
        As `require_closed`, of the database and the files that SQLite keeps beside it.
    """
    for ending in ("", "-journal", "-wal", "-shm"):
        path = folder / f"{name}{ending}"
        try:
            with open_file(folder, path.name, sys.maxsize):
                pass
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror}): put the file itself there"
            ) from error
        if ending == "-journal":
            _require_own_journal(path)


def _require_own_journal(path: Path) -> None:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(_SUPER_JOURNAL)))
        if file.read() == _SUPER_JOURNAL:
            raise InputError(
                f"{path} names another file, which SQLite would delete: no ledger has such a "
                "journal; do not trust this folder"
            )


class StoredMembers:
    """The members of a zip archive, each read when it is asked for.

    Parameters
    ----------
    file : binary file
        An archive whose members are stored as they are: all together they are no longer than it.

    Raises
    ------
    ValueError
        If a member is compressed or encrypted, two have one name, or they claim to be longer.
    zipfile.BadZipFile, NotImplementedError, EOFError
        If the archive is damaged.
    """

    def __init__(self, file: BinaryIO) -> None:
        size = file.seek(0, os.SEEK_END)
        self._archive = zipfile.ZipFile(file)
        members = self._archive.infolist()
        if len(members) > _MOST_MEMBERS:
            raise ValueError(f"it has {len(members):,} members, more than {_MOST_MEMBERS:,}")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two members have one name")
        for member in members:
            packed = member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1
            if packed or member.file_size != member.compress_size:
                raise ValueError(f"its member {member.filename} is not stored as it is")
        if (total := sum(member.file_size for member in members)) > size:
            raise ValueError(f"its members claim {total:,} bytes, and the file has {size:,}")
        self.left = {member.filename: member for member in members}

    def pop(self, name: str, most: int) -> bytes:
        """Return what a member holds, which is then not `left`.

        Raises
        ------
        ValueError
            If it is longer than `most` bytes.
        """
        member = self.left.pop(name)
        if member.file_size > most:
            raise ValueError(
                f"its member {name} has {member.file_size:,} bytes, more than {most:,}"
            )
        return self._archive.read(member)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file so that a crash leaves either the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that nobody can know beforehand: a link of this name would be written through.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
