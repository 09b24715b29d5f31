"""Public files: a local copy in a folder that the user names, or a download with its checksum."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.site import Row
from fedmed_flower.errors import InputError

AS_IT_IS = "used as it is"
_LOG = logging.getLogger("flwr.fedmed")


class SourceUnavailable(InputError):  # noqa: N818
    """There is no local copy of a dataset, and it cannot be downloaded."""


@dataclass(frozen=True)
class ImageSplits:
    """Labelled images in the splits "train", "val" and "test".

    Attributes
    ----------
    images : mapping of str to ndarray
        By split, (n, H, W) or (n, H, W, C), read-only; uint8 from 0 to 255 in the public sets. A
        hospital's own file may have another dtype, the same in all splits.
    labels : mapping of str to ndarray
        By split, (n,) int64, 0 or greater, read-only.
    source : str
        Where the images come from, for log, summary and report.
    generated : bool
        True if no real patient stands behind the images.
    prefix : str
        Start of the patients' names, so that the patients of two sets differ.
    """

    images: Mapping[str, NDArray[Any]]
    labels: Mapping[str, NDArray[np.int64]]
    source: str
    generated: bool = False
    prefix: str = ""

    def rows(self, split: str, which: Iterable[int] | None = None) -> list[Row]:
        """Return the images of a split, or those with the indices `which`, as a client's rows.

        These sets name no patients: each image counts as a patient of its own, named by prefix,
        split and index.
        """
        images = self.images[split]
        labels = self.labels[split]
        indices = range(len(labels)) if which is None else which
        return [
            {"image": images[i], "label": int(labels[i]), "patient": f"{self.prefix}{split}-{i}"}
            for i in indices
        ]


def user_cache() -> Path:
    """Return the folder ``FEDMED_CACHE``, or the one that the user's system has for such files."""
    import pooch

    return Path(os.environ.get("FEDMED_CACHE") or pooch.os_cache("fedmed-flower"))


class PublicFile(NamedTuple):
    """A file at its publisher; ``local`` is its path within a folder of local copies."""

    title: str
    local: Path
    url: str
    md5: str


class Copy(NamedTuple):
    """A file on this disk; a key for caching its content, as a changed file gives another key."""

    path: Path
    mtime_ns: int
    size: int
    title: str
    origin: str


def require(fulfilled: bool, text: str) -> None:
    """Raise `InputError` with the text unless a condition is fulfilled."""
    if not fulfilled:
        raise InputError(text)


def local_copy(path: Path, title: str, origin: str) -> Copy:
    """Return a file on this disk with the time of its last change and its size."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from error
    return Copy(path.absolute(), status.st_mtime_ns, status.st_size, title, origin)


def obtain(file: PublicFile, timeout: float, alternative: str = "") -> Copy:
    """Return a public file: a local copy, or a download whose checksum is enforced.

    Parameters
    ----------
    file : PublicFile
    timeout : float
        Seconds to wait for the first data and then for more, greater than 0.
    alternative : str
        Another remedy, which the error names if the publisher cannot be reached.

    Returns
    -------
    Copy

    Raises
    ------
    SourceUnavailable
        If there is no local copy and the publisher cannot be reached.
    InputError
        If the time-out, a folder or the checksum is wrong.
    """
    require(
        isinstance(timeout, Real) and 0 < timeout < math.inf,
        f"timeout must be a finite number of seconds above 0, got {timeout!r}",
    )
    name = file.local.name
    if named := os.environ.get("FEDMED_DATA"):
        folder = Path(named).expanduser()
        require(folder.is_dir(), f"FEDMED_DATA must name a folder, got {folder}")
        for path in (folder / file.local, folder / name):
            if path.is_file():
                origin = "local copy, not compared with the publisher's checksum"
                return local_copy(path, file.title, origin)
        _LOG.info("FEDMED_DATA (%s) holds no %s", folder, file.local)
    import pooch

    remedy = f"put {name} into a folder and set FEDMED_DATA to that folder{alternative}"

    def download(url: str, target: str, _pooch: object) -> None:
        try:
            content = _receive(url, timeout)
        except OSError as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            reason = f"HTTP {status}" if status else type(error).__name__
            raise SourceUnavailable(
                f"{file.title}: no download from {url} ({reason}, time-out {timeout:g} s); {remedy}"
            ) from error
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        require(
            md5 == file.md5,
            f"{file.title}: {name} from {url} has md5 {md5}, expected {file.md5}; "
            f"it was changed at the publisher or on the way: try again later, or {remedy}",
        )
        Path(target).write_bytes(content)

    cache = user_cache().expanduser()
    try:
        path = pooch.retrieve(file.url, f"md5:{file.md5}", name, cache, downloader=download)
    except OSError as error:
        raise InputError(
            f"{file.title}: the folder {cache} cannot be used ({type(error).__name__}); set "
            "FEDMED_CACHE to a folder that you may write to"
        ) from error
    return local_copy(Path(path), file.title, "the publisher's checksum")


class _Buffer(io.BytesIO):
    touched = 0.0

    def write(self, data: Any) -> int:
        self.touched = time.monotonic()
        return super().write(data)


def _receive(url: str, timeout: float) -> bytes:
    """Download a file, in a thread because name look-up and a host's addresses share no time-out.

    Raises
    ------
    TimeoutError
        If no data arrive for `timeout` seconds. Errors of pooch are raised as they are.
    """
    import pooch

    errors: list[Exception] = []
    buffer = _Buffer()
    buffer.touched = time.monotonic()

    def work() -> None:
        try:
            pooch.HTTPDownloader(timeout=timeout)(url, buffer, None)
        except Exception as error:
            errors.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while worker.is_alive() and (wait := buffer.touched + timeout - time.monotonic()) > 0:
        worker.join(wait)
    if worker.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]
    return buffer.getvalue()


def content_of(copy: Copy) -> tuple[bytes, str]:
    """Return a file's bytes, and the text that names it as a source in log and report."""
    try:
        content = copy.path.read_bytes()
    except OSError as error:
        raise InputError(f"{copy.path}: cannot be read ({type(error).__name__})") from error
    sha256 = hashlib.sha256(content).hexdigest()
    _LOG.info("%s: %s, sha256 %s, %s", copy.title, copy.path, sha256, copy.origin)
    # The checksum of a hospital's own file must not leave: it confirms a guess of the content.
    if copy.origin == AS_IT_IS:
        return content, copy.title
    return content, f"{copy.title}, sha256 {sha256[:12]}…"


@dataclass(frozen=True)
class Volumes:
    """Volumes with masks as a client's rows, their source, and whether they are generated."""

    rows: tuple[Row, ...]
    source: str
    generated: bool = False
