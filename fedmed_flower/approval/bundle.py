"""An app bundle, as Flower sends it to a hospital: its files, settings and digest."""

from __future__ import annotations

import hashlib
import shutil
import stat
import tomllib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from flwr.app import UserConfig
from flwr.common.config import flatten_dict

from fedmed_flower.errors import InputError
from fedmed_flower.files import open_file
from fedmed_flower.settings.registry import complete

PROJECT = "pyproject.toml"
ENDING = ".fab"
# Flower refuses larger ones.
MOST_BYTES = 10_000_000
_MOST_UNPACKED = 100_000_000
_MOST_FILES = 5_000
# Flower's own list of the files and their digests, which the files here are read without.
_INFO = ".info"
# What Python writes beside the files when they are imported.
_WRITTEN = "__pycache__"
# What reading a broken zip file raises.
_BROKEN = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError, OSError)


@dataclass(frozen=True)
class Bundle:
    """What is in an app bundle.

    Attributes
    ----------
    digest : str
        SHA-256 of all its bytes, 64 hexadecimal digits.
    app : str
        Publisher and name, as ``publisher/name``.
    version : str
    files : dict of str to bytes
        Content by name, with ``/`` between folders.
    declared : dict
        Its run config, flattened, as its ``pyproject.toml`` has it.
    dependencies : tuple of str
        Packages that it says it needs.
    """

    digest: str
    app: str
    version: str
    files: Mapping[str, bytes]
    declared: UserConfig
    dependencies: tuple[str, ...]

    @property
    def settings(self) -> UserConfig:
        """All settings of a run that changes none."""
        return settled(self.declared)


def settled(config: UserConfig) -> UserConfig:
    """Return a run config with its text ``settings`` read and this package's defaults filled in.

    A ``settings`` that is not one of this package's stays as it is.
    """
    try:
        return complete(config)
    except InputError:
        return dict(config)


def read_bundle(content: bytes) -> Bundle:
    """Return what is in a bundle, and unpack nothing.

    Raises
    ------
    InputError
        If it is no bundle, too large, or one of its files would lie outside the app's folder.
    """
    if len(content) > MOST_BYTES:
        raise InputError(
            f"an app bundle has at most {MOST_BYTES:,} bytes, this one {len(content):,}"
        )
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            files = _files_of(archive)
    except _BROKEN as error:
        raise InputError(f"this is no app bundle, which is a zip file: {error}") from None
    return _bundle_of(hashlib.sha256(content).hexdigest(), files)


def bundle_at(path: Path) -> tuple[Bundle, bytes]:
    """Return the bundle of a file, or that which ``flwr run`` makes of an app's folder.

    Returns
    -------
    tuple of (Bundle, bytes)
        What is in it, and its bytes.

    Raises
    ------
    InputError
        If there is none, or it cannot be read.
    """
    if path.is_dir():
        from flwr.cli.build import build_fab_from_disk

        try:
            content = build_fab_from_disk(path)
        except (ValueError, OSError) as error:
            raise InputError(f"{path} is no Flower app: {error}") from None
    else:
        try:
            with open_file(path.parent, path.name, MOST_BYTES) as file:
                content = file.read()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return read_bundle(content), content
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def unlike(bundle: Bundle, folder: Path) -> list[str]:
    """Return the files in which an installed app differs from a bundle, in the order of names.

    A file that one of them lacks is among them, and so is a link.
    """
    names: set[str] = set()
    odd: set[str] = set()
    for path in folder.rglob("*"):
        place = path.relative_to(folder)
        if path.is_symlink():
            odd.add(place.as_posix())
        elif not path.is_dir():
            names.add(place.as_posix())
    odd |= names ^ set(bundle.files)
    for name in names & set(bundle.files):
        with open_file(folder, name, _MOST_UNPACKED) as file:
            if file.read() != bundle.files[name]:
                odd.add(name)
    return sorted(odd)


def forget_compiled(folder: Path) -> None:
    """Delete what Python has compiled beside the files of an installed app.

    Python may run such a file whatever its source holds, and anybody may have put it there.
    """
    for path in list(folder.rglob(_WRITTEN)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _files_of(archive: zipfile.ZipFile) -> dict[str, bytes]:
    members = archive.infolist()
    if len(members) > _MOST_FILES:
        raise InputError(f"an app bundle has at most {_MOST_FILES:,} files, got {len(members):,}")
    total = sum(member.file_size for member in members)
    if total > _MOST_UNPACKED:
        raise InputError(
            f"an app bundle has at most {_MOST_UNPACKED:,} bytes unpacked, got {total:,}"
        )
    files: dict[str, bytes] = {}
    for member in members:
        name = member.filename
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or "\\" in name or not place.parts:
            raise InputError(f"a file of the bundle would lie outside the app's folder: {name}")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise InputError(f"a file of the bundle is a link: {name}")
        if member.is_dir() or place.parts[0] == _INFO:
            continue
        if _WRITTEN in place.parts:
            raise InputError(f"a bundle must hold no compiled code, and this one holds {name}")
        if place.as_posix() in files:
            raise InputError(f"the bundle has two files of one name: {name}")
        # Not all that a bomb of this name would unpack: zipfile stops at the size that is named.
        files[place.as_posix()] = archive.read(member)
    return files


def _bundle_of(digest: str, files: dict[str, bytes]) -> Bundle:
    if PROJECT not in files:
        raise InputError(f"an app bundle must have a {PROJECT}")
    try:
        table = tomllib.loads(files[PROJECT].decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{PROJECT} of the bundle cannot be read: {error}") from None
    project = _table(table, "project")
    app = _table(table, "tool", "flwr", "app")
    texts = {
        "project.name": project.get("name"),
        "project.version": project.get("version"),
        "tool.flwr.app.publisher": app.get("publisher"),
    }
    for key, value in texts.items():
        if not isinstance(value, str) or not value:
            raise InputError(f"{PROJECT} of the bundle must have {key} as a text, got {value!r}")
    needed = project.get("dependencies", [])
    if not isinstance(needed, list) or not all(isinstance(each, str) for each in needed):
        raise InputError(f"dependencies in {PROJECT} of the bundle must be a list of texts")
    try:
        declared = flatten_dict(_table(app, "config"))
    except ValueError as error:
        raise InputError(f"the run config in {PROJECT} of the bundle: {error}") from None
    name, version, publisher = (str(value) for value in texts.values())
    return Bundle(digest, f"{publisher}/{name}", version, files, declared, tuple(needed))


def _table(table: Any, *keys: str) -> dict[str, Any]:
    for key in keys:
        table = table.get(key, {})
        if not isinstance(table, dict):
            raise InputError(f"{key} in {PROJECT} of the bundle must be a table")
    return dict(table)
