"""Files of a run folder: whole at every moment, with safe names and cells, and read with a bound.

A stranger may have written a folder that is read. Its files are JSON, TOML, tables of text, PNG and
arrays of plain numbers; none of them can name code. No file is reached through a link that leads
out of the folder, no more bytes are read than a bound, and no archive unpacks to more bytes than it
has.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
import secrets
import stat
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO

from fedmed_flower.errors import FormatError, InputError

# Files of a run folder that are read while a run writes them.
METRICS = "metrics.csv"
SUMMARY = "summary.json"
LOG = "log.txt"
LIVE = "live.json"
RELEASES = "privacy.json"
REPORT = "report.html"
CROSS_SITES = "cross-sites.csv"
# Bytes of a file that is read at once; its objects take twenty times as much memory.
MOST_TEXT = 1 << 26
# Bytes of a table, which is read line by line.
MOST_TABLE = 1 << 34
# Errors that a reader raises if somebody else's content is malformed.
MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    csv.Error,
)
# A spreadsheet takes a cell that starts with one of these for a formula; the last four are the
# wide forms of the first four (OWASP, "CSV Injection").
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
# File name of the data of all sites together, which no site has.
POOLED_FILE = "all-sites"
_MOST_LINE = 1 << 16
_MOST_ENTRIES = 1_000_000
_MOST_LEVELS = 20
_MOST_MEMBERS = 1_000_000
# The last bytes of an SQLite journal that names another file, which SQLite deletes when it plays
# the journal back.
_SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")


def require_posix() -> None:
    """Refuse Windows, which lacks what keeps files whole: a sync of folders, flags, locks.

    Raises
    ------
    InputError
        On Windows.
    """
    if sys.platform == "win32":
        raise InputError("fedmed_flower does not run on Windows: use Linux, macOS or WSL 2")


@contextmanager
def as_input_error(what: str, remedy: str) -> Iterator[None]:
    """Turn an error of `MALFORMED` into an `InputError` of one line.

    Parameters
    ----------
    what : str
        Name of the content in the error.
    remedy : str
        What to do, as the end of the error.
    """
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
        Largest number of bytes of the file.

    Raises
    ------
    OSError
        If there is no such file, a link leads out of the folder, the file is too large, or it is
        no regular file. `strerror` is the reason in words.
    InputError
        On Windows.
    """
    require_posix()
    real = _inside(folder, folder / name)
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        if status.st_size > most:
            reason = f"it has {status.st_size:,} bytes, more than {most:,}"
            raise OSError(errno.EFBIG, reason)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _inside(folder: Path, path: Path) -> str:
    """Resolve a path, which must not lead out of a folder."""
    real = os.path.realpath(path)
    if not Path(real).is_relative_to(os.path.realpath(folder)):
        raise OSError(errno.ELOOP, f"a link leads out of the folder, to {real}")
    return real


def read_file(folder: Path, name: str, most: int = MOST_TEXT) -> bytes:
    """Return the bytes of a file of a folder.

    Raises
    ------
    OSError
        As in `open_file`.
    """
    with open_file(folder, name, most) as file:
        return file.read(most)


def read_lines(text: TextIO) -> Iterator[str]:
    """Yield the lines of a table.

    Raises
    ------
    csv.Error
        If a line has 65,536 letters or more, which no table of this package has.
    """
    while line := text.readline(_MOST_LINE):
        if len(line) == _MOST_LINE:
            raise csv.Error(f"a line has {_MOST_LINE:,} letters or more")
        yield line


def write_rows(file: TextIO, rows: Iterable[Iterable[object]], ending: str = "\r\n") -> None:
    """Write lines of a CSV table, in which a spreadsheet finds no formula.

    Parameters
    ----------
    file : text file
        Opened with ``newline=""``.
    rows : iterable of iterable
        Numbers and texts. A text that starts as a formula does, such as ``=1+1``, is written after
        an apostrophe, which `cell_text` removes. A text that is a number, such as ``-1``, stays.
    ending : str
        End of each line.
    """
    csv.writer(file, lineterminator=ending).writerows(map(_cell, row) for row in rows)


def cell_text(cell: str) -> str:
    """Return the text that `write_rows` wrote as `cell`."""
    return cell[1:] if cell.startswith("'") and _is_formula(cell) else cell


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and _is_formula(value) else value


def _is_formula(text: str) -> bool:
    """Return whether a text starts as a formula does, after any number of apostrophes."""
    bare = text.lstrip("'")
    if not bare.startswith(_FORMULA):
        return False
    try:
        float(bare)
    except ValueError:
        return True
    return False


def read_object(folder: Path, name: str, hint: str) -> dict[str, Any]:
    """Return the JSON object in a file of a folder.

    Raises
    ------
    InputError
        If the file cannot be read or holds no JSON object. The text ends with `hint`, which says
        what to do.
    """
    path = folder / name
    try:
        content = json.loads(read_file(folder, name).decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not valid JSON: {error}"
        raise InputError(f"{path} cannot be read ({reason}): {hint}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a JSON object: {hint}")
    return content


def require_format(path: Path, found: object, newest: int) -> None:
    """Refuse a file whose format is later than this package reads.

    Parameters
    ----------
    path : Path
        The file, for the error.
    found : object
        The format that the file names; a file from before formats were named counts as 0.
    newest : int
        The latest format that is read.

    Raises
    ------
    FormatError
        If the format is later.
    InputError
        If it is no whole number, or below 0.
    """
    if type(found) is not int or found < 0:
        raise InputError(
            f"format in {path} must be a whole number, at least 0, got {found!r}: restore the file "
            "from a copy"
        )
    if found > newest:
        raise FormatError(
            f"{path} was written by a later fedmed-flower (format {found}, this one reads up to "
            f"{newest}): update fedmed-flower"
        )


def require_closed(folder: Path) -> None:
    """Refuse a folder in which a resumed run could read, change or delete files outside it.

    Raises
    ------
    InputError
        If anything in the folder, at any depth, is a link that leads out, a file that has another
        name elsewhere, or neither a file nor a folder; if a database's journal names another file,
        which SQLite would delete; or if the folder holds too much or is too deep.
    """
    for count, path in enumerate(_everything(folder), start=1):
        if count > _MOST_ENTRIES or len(path.relative_to(folder).parts) > _MOST_LEVELS:
            raise InputError(
                f"{folder} holds more than {_MOST_ENTRIES:,} files and folders, or they are more "
                f"than {_MOST_LEVELS} deep: it is no run folder"
            )
        try:
            status = Path(_inside(folder, path)).stat()
            mode = status.st_mode
        except OSError as error:
            raise InputError(
                f"{path} cannot be used ({error.strerror}): replace it by the file that it "
                "stands for"
            ) from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(f"{path} is neither a file nor a folder: remove it")
        if stat.S_ISREG(mode) and status.st_nlink > 1:
            raise InputError(f"{path} is one file with another name elsewhere: put a copy there")
        if stat.S_ISREG(mode) and path.name.endswith("-journal"):
            _require_single_journal(path)


def _everything(folder: Path) -> Iterator[Path]:
    """Yield all files and folders in a folder, at any depth, without following links."""
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            yield Path(parent, name)


def require_lone_database(folder: Path, name: str) -> None:
    """Refuse an SQLite database if opening it could touch a file outside its folder.

    Raises
    ------
    InputError
        If the database, or a file that SQLite keeps beside it, is a link that leads out or is no
        file, or if its journal names another file.
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
            _require_single_journal(path)


def _require_single_journal(path: Path) -> None:
    """Refuse an SQLite journal that names another file."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(_SUPER_JOURNAL)))
        if file.read() == _SUPER_JOURNAL:
            raise InputError(
                f"{path} names another file, which SQLite would delete: no ledger has such a "
                "journal; do not trust this folder"
            )


class StoredMembers:
    """The members of an uncompressed zip archive, each read when it is asked for.

    Parameters
    ----------
    file : binary file
        The archive.

    Attributes
    ----------
    left : dict of str to zipfile.ZipInfo
        Members that have not been read, by name.

    Raises
    ------
    ValueError
        If there are more than a million members, if one is compressed or encrypted, if two have the
        same name, or if together they claim more bytes than the file has.
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
            raise ValueError("two members have the same name")
        for member in members:
            packed = member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1
            if packed or member.file_size != member.compress_size:
                raise ValueError(
                    f"its member {member.filename} is compressed, encrypted or damaged"
                )
        total = sum(member.file_size for member in members)
        if total > size:
            raise ValueError(f"its members claim {total:,} bytes, and the file has {size:,}")
        self.left = {member.filename: member for member in members}

    def pop(self, name: str, most: int) -> bytes:
        """Return the bytes of a member and remove it from `left`.

        Raises
        ------
        KeyError
            If there is no such member, or it has been read before.
        ValueError
            If the member has more than `most` bytes.
        """
        return self._archive.read(self._taken(name, most))

    def open(self, name: str, most: int) -> IO[bytes]:
        """Open a member for reading bit by bit and remove it from `left`.

        Raises
        ------
        KeyError, ValueError
            As `pop`.
        """
        return self._archive.open(self._taken(name, most))

    def _taken(self, name: str, most: int) -> zipfile.ZipInfo:
        member = self.left.pop(name)
        if member.file_size > most:
            raise ValueError(
                f"its member {name} has {member.file_size:,} bytes, more than {most:,}"
            )
        return member


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file so that a crash leaves either the old or the new one, never a part.

    Raises
    ------
    InputError
        On Windows.
    OSError
        If the file cannot be written.
    """
    with replacing(path) as temporary, temporary.open("xb") as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which then replaces the one at `path`, as `write_atomic`.

    If an error is raised, `path` stays as it was.

    Raises
    ------
    InputError, OSError
        As in `write_atomic`.
    """
    require_posix()
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name cannot be guessed: a stranger's link of that name would be written through.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Let the operating system write a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_name(text: str) -> str:
    """Return a file name, without ending, for the name of a site or of a run.

    Different texts have different file names, also where a file system ignores case. A text is its
    own file name if it has only lowercase letters, digits, ``.``, ``_`` and ``-``; any other is
    followed by its hash after a ``~``, which stands in no such text. None is `POOLED_FILE`.

    Examples
    --------
    >>> file_name("hospital-1")
    'hospital-1'
    >>> file_name("St. Mary")
    'St.-Mary~dd9be0ade746656a'
    """
    plain = plain_text(text)
    if plain == text == text.lower() and text != POOLED_FILE:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{plain}~{digest[:16]}"


def plain_text(text: str) -> str:
    """Return at most 80 letters, digits, ``.``, ``_`` and ``-``, of which a file name can consist.

    Different texts may give the same one.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:80].strip(".-") or "unnamed"
