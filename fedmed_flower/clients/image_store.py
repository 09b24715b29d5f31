"""A folder of a hospital's own disk with images that are ready for the network.

The folder holds patient data: it belongs to the user who trains, nobody else can read it, and no
link is followed in it. Each entry is a file with a checksum in front. An entry that is damaged is
deleted, and is made anew; nothing ever depends on an entry being there. Several processes may use a
folder at once: a file is whole when it appears, and whoever reads it keeps it though it is deleted.
"""

from __future__ import annotations

import errno
import io
import logging
import mmap
import os
import re
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.bounded import leads_out, real_path
from fedmed_flower.data.download import user_cache
from fedmed_flower.data.site import Site
from fedmed_flower.errors import InputError
from fedmed_flower.files import replacing, require_posix
from fedmed_flower.settings.node import NodeSettings
from fedmed_flower.settings.text import setting_error

log = logging.getLogger("flwr.fedmed")

OFF = "off"
# An entry that was not used for this long is deleted.
DAYS_UNUSED = 30
# What is left free on the disk, where the ledger may lie as well.
_LEFT_FREE = 1 << 30
# What a process that was killed left behind.
_SECONDS_UNFINISHED = 3600
# Bytes of an entry that hold the checksum, and that hold all but its arrays.
_SUM = 8
_MOST_HEAD = 1 << 20
_NAME = r"[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{32}-[0-9a-f]{32}\.entry"
_OURS = re.compile(rf"{_NAME}|\.{_NAME}\.[0-9a-f]{{16}}\.tmp")

Bytes = NDArray[np.uint8]


class Name(NamedTuple):
    """The name of an entry.

    Attributes
    ----------
    space : str
        16 hexadecimal digits of the hospital's data and the app that reads them.
    row : str
        16 hexadecimal digits of the row.
    slot : str
        32 hexadecimal digits of what was made of the row.
    state : str
        32 hexadecimal digits of the state in which the row's files were. A new state takes the
        place of the old one.
    """

    space: str
    row: str
    slot: str
    state: str

    @property
    def start(self) -> str:
        """The beginning of the file's name, which entries of all states share."""
        return f"{self.space}-{self.row}-{self.slot}-"

    @property
    def file(self) -> str:
        """The name of the file."""
        return f"{self.start}{self.state}.entry"


class Deleted(NamedTuple):
    """How many entries were deleted, and how many bytes they had."""

    entries: int
    bytes: int


def default_folder() -> Path:
    """Return the folder of a hospital that names none: in the cache folder of its user."""
    return user_cache() / "images"


def open_store(settings: NodeSettings, site: Site) -> ImageStore | None:
    """Return the entries of a real hospital; None if it keeps none.

    Raises
    ------
    InputError
        If the node config names a folder that cannot be used. If it names none, and the default one
        cannot be used, the log says so and nothing is kept.
    """
    if settings.image_cache == OFF:
        return None
    try:
        folder = folder_of(settings.image_cache, site.data_dir)
        return ImageStore(folder, settings.image_cache_gigabytes * 2**30)
    except InputError as error:
        if settings.image_cache:
            raise
        log.warning("%s: no images are kept on the disk: %s", site.name, error)
        return None


def folder_of(text: str, data_dir: Path | None = None) -> Path:
    """Return the folder that ``image-cache`` names, or the default one if it is empty.

    Raises
    ------
    InputError
        If the path is not absolute, or lies in the folder of the hospital's data.
    """
    try:
        folder = Path(text or default_folder()).expanduser()
    except RuntimeError as error:
        raise setting_error(
            f"image-cache cannot be found ({error}): give an absolute path", "image-cache"
        ) from error
    if not folder.is_absolute():
        raise setting_error(
            f"image-cache in the node config must be an absolute path or {OFF}, got {text!r}: a "
            "relative path names another folder in another working directory",
            "image-cache",
        )
    if data_dir is not None and not leads_out(folder, real_path(data_dir)):
        raise setting_error(
            f"image-cache must not lie in data-dir, whose files are taken for patients', got "
            f"{folder}: give a folder outside of {data_dir}",
            "image-cache",
        )
    return folder


class ImageStore:
    """The entries in a folder, for one message.

    Parameters
    ----------
    folder : Path
        Created when the first entry is written.
    most : float
        The most bytes of all entries together. The least recently used ones are deleted first, but
        none that this message uses.

    Raises
    ------
    InputError
        If the folder is a link or no folder, belongs to somebody else, or others can enter it.
    """

    def __init__(self, folder: Path, most: float) -> None:
        require_posix()
        require_private(folder)
        self.folder = folder
        self._most = most
        self._claimed: set[str] = set()
        self._full = False
        self._names: set[str] = set()
        self._size = 0
        self._count()

    def __contains__(self, name: Name) -> bool:
        return name.file in self._names

    def claim(self, names: Iterable[Name]) -> None:
        """Keep entries, whether they are there yet or not, as long as this message lasts."""
        self._claimed.update(name.file for name in names)

    def read(self, name: Name) -> Bytes | None:
        """Return the content of an entry; None if there is none, or none that is whole."""
        try:
            content = _content(self.folder / name.file)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("an entry of the image cache cannot be read (%s)", error.strerror)
            content = None
        if content is None:
            log.warning("a damaged entry of the image cache is deleted, and made anew")
            self._delete(name.file)
        return content

    def drop(self, name: Name) -> None:
        """Delete an entry whose content makes no sense."""
        log.warning("a damaged entry of the image cache is deleted, and made anew")
        self._delete(name.file)

    def write(self, name: Name, parts: Collection[bytes | memoryview]) -> None:
        """Write an entry, unless it does not fit; entries of other states of its row are deleted.

        A disk that is full, or cannot be written, is no error: the log says so, once.
        """
        size = _SUM + sum(len(part) for part in parts)
        for other in [other for other in self._names if other.startswith(name.start)]:
            self._delete(other)
        if self._full or not self._has_room(size):
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            require_private(self.folder)
            if shutil.disk_usage(self.folder).free < size + _LEFT_FREE:
                reason = f"less than {_LEFT_FREE >> 30} GiB of the disk would be left"
                raise OSError(errno.ENOSPC, reason)
            with replacing(self.folder / name.file) as temporary:
                _write(temporary, parts)
        except (OSError, InputError) as error:
            self._full = True
            text = error.strerror if isinstance(error, OSError) else str(error)
            log.warning("images are not kept in %s any more: %s", self.folder, text)
            return
        self._names.add(name.file)
        self._size += size

    def tidy(self, space: str, rows: Collection[str], is_gone: Callable[[Bytes], bool]) -> Deleted:
        """Delete the entries of rows that the hospital does not have any more, and unused ones.

        Parameters
        ----------
        space : str
            That of this message.
        rows : collection of str
            The `Name.row` of all rows that the hospital has now.
        is_gone : callable
            Maps the content of another space's entry to whether files that it was made of are gone.
        """
        now = time.time()
        deleted = []
        for entry in _entries(self.folder):
            own, row, *_ = entry.name.split("-")
            used = entry.stat(follow_symlinks=False).st_mtime
            if entry.name.startswith("."):
                gone = now - used > _SECONDS_UNFINISHED
            elif own == space:
                gone = row not in rows
            else:
                content = _head(self.folder / entry.name)
                gone = content is None or is_gone(content)
            if gone or now - used > DAYS_UNUSED * 24 * 3600:
                deleted.append(entry.stat(follow_symlinks=False).st_size)
                self._delete(entry.name)
        return Deleted(len(deleted), sum(deleted))

    def _has_room(self, size: int) -> bool:
        """Return whether an entry fits, after the least recently used ones were deleted."""
        if self._size + size <= self._most:
            return True
        if size > self._most:
            return False
        self._count()  # Other processes write and delete as well.
        unclaimed = [entry for entry in self._oldest_first() if entry.name not in self._claimed]
        for entry in unclaimed:
            if self._size + size <= self._most:
                break
            self._delete(entry.name)
        return self._size + size <= self._most

    def _oldest_first(self) -> list[os.DirEntry[str]]:
        return sorted(_entries(self.folder), key=lambda e: e.stat(follow_symlinks=False).st_mtime)

    def _count(self) -> None:
        sizes = {entry.name: _size(entry) for entry in _entries(self.folder)}
        self._names = set(sizes)
        self._size = sum(sizes.values())

    def _delete(self, file: str) -> None:
        path = self.folder / file
        try:
            size = path.lstat().st_size
            path.unlink()
        except OSError:  # Another process has deleted it, or none may.
            size = 0
        if file in self._names:
            self._names.discard(file)
            self._size -= size


def require_private(folder: Path) -> None:
    """Refuse a folder in which others could read patients' images, or put something in their place.

    Raises
    ------
    InputError
        If it is there and is a link or no folder, belongs to somebody else, or others can enter it.
    """
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(
            f"image-cache cannot be used ({error.strerror}): {folder}; give another folder"
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        what = "a link" if stat.S_ISLNK(status.st_mode) else "no folder"
        raise InputError(f"image-cache must be a folder, and {folder} is {what}: give the folder")
    if status.st_uid != os.geteuid():
        raise InputError(
            f"image-cache must belong to the user who trains (number {os.geteuid()}), and {folder} "
            f"belongs to number {status.st_uid}: give another folder"
        )
    if status.st_mode & 0o077:
        raise InputError(
            f"image-cache must be closed to others, and {folder} has the mode "
            f"{stat.S_IMODE(status.st_mode):o}: chmod 700 {folder}"
        )


def forget(folder: Path) -> Deleted:
    """Delete all entries of a folder, and the folder if it then is empty.

    Raises
    ------
    InputError
        As `ImageStore`, or if an entry cannot be deleted.
    """
    require_posix()
    require_private(folder)
    sizes = []
    try:
        for entry in _entries(folder):
            sizes.append(entry.stat(follow_symlinks=False).st_size)
            Path(entry.path).unlink()
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be emptied ({error.strerror}): delete it by hand"
        ) from error
    return Deleted(len(sizes), sum(sizes))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what this module has written into a folder, unfinished files as well."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if _OURS.fullmatch(entry.name)]
    except FileNotFoundError:
        return []
    return [entry for entry in found if _is_there(entry)]


def _is_there(entry: os.DirEntry[str]) -> bool:
    """Return whether a file is still there; its status is then known."""
    try:
        entry.stat(follow_symlinks=False)
    except OSError:
        return False
    return not entry.is_dir(follow_symlinks=False)


def _size(entry: os.DirEntry[str]) -> int:
    return entry.stat(follow_symlinks=False).st_size


def _content(path: Path) -> Bytes | None:
    """Return the content of an entry, and note its use; None if it is damaged."""
    with _opened(path) as file:
        if os.fstat(file.fileno()).st_size <= _SUM:
            return None
        # A private copy: what is changed in memory stays there. No entry is ever made shorter.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        content: Bytes = np.frombuffer(mapped, np.uint8)
        if _sum(content[_SUM:].data) != content[:_SUM].tobytes():
            return None
        os.utime(file.fileno())
    return content[_SUM:]


def _head(path: Path) -> Bytes | None:
    """Return the beginning of an entry's content, which is not verified; None if there is none."""
    try:
        with _opened(path) as file:
            content: Bytes = np.frombuffer(file.read(_SUM + _MOST_HEAD), np.uint8)
    except OSError:
        return None
    return content[_SUM:]


def _opened(path: Path) -> io.FileIO:
    """Open a file for reading; raise `OSError` if it is a link or no file."""
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = io.FileIO(os.open(path, flags))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no file")
    return file


def _write(path: Path, parts: Collection[bytes | memoryview]) -> None:
    """Write a new file that nobody else can read."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with io.FileIO(os.open(path, flags, 0o600), "wb") as file:
        for part in (_sum(*parts), *parts):
            view = memoryview(part)
            while len(view):
                view = view[file.write(view) :]


def _sum(*parts: bytes | memoryview) -> bytes:
    """Return the checksum of parts that are one content."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value.to_bytes(_SUM, "little")
