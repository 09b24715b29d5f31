"""What a real hospital keeps of its images on its own disk from one message to the next.

At a real hospital each message is a process of its own. Two things are kept of a row: what
`check_row` found, if there is no problem, and the row after the transforms whose results never
change. What is kept is used only if all that decides it is the same: the row's entries, the state
of its files, the transforms with their parameters, and the code with its versions. A file is taken
for the same if its device, inode, size and times of last change are.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from fedmed_flower.clients.fingerprints import Unreadable, code_digest, code_in, digest
from fedmed_flower.clients.image_store import Bytes, ImageStore, Name
from fedmed_flower.clients.stored_rows import (
    packed,
    packed_row,
    unpacked_row,
    unpacked_text,
)
from fedmed_flower.data.checks import Finding
from fedmed_flower.data.site import Row, Site
from fedmed_flower.files import MALFORMED
from fedmed_flower.images.headers import is_dicom
from fedmed_flower.images.photographs import PICTURES
from fedmed_flower.images.reading import files_of
from fedmed_flower.images.series import Series

log = logging.getLogger("flwr.fedmed")

# Files that hold all of an image. A header such as .hdr or .mhd names a second file.
_WHOLE = (
    *(".nii", ".nii.gz", ".nii.bz2", ".nii.zst", ".mgh", ".mgz", ".npy", ".nrrd", ".mha"),
    *(".dcm", ".dicom", ".ima"),
    *PICTURES,
)
# A file that changed so shortly before may change again without another time of change.
FRESH_NS = 2_000_000_000
_MOST_FILES = 20_000


class _Origin(NamedTuple):
    """A row and the state of its files when it was first looked at in this message."""

    row: str
    state: str


class KeptImages:
    """The kept rows of one hospital, for one message.

    Parameters
    ----------
    store : ImageStore
    site : Site
    client : type
        The class of the client. Another one has entries of its own in the same folder.
    """

    def __init__(self, store: ImageStore, site: Site, client: type) -> None:
        self._store = store
        self._site = site.name
        folder = os.path.realpath(site.data_dir) if site.data_dir else ""
        self._space = digest(site.name, folder, f"{client.__module__}.{client.__qualname__}")[:16]
        self._client = client
        self._is_tidy = False
        # The rows are held so that no other one gets their id.
        self._origins: dict[int, tuple[Row, _Origin | None]] = {}
        self._said: set[str] = set()

    def tidy(self, rows: Iterable[Row]) -> None:
        """Delete what was kept of rows that the hospital does not have any more, once a message.

        Parameters
        ----------
        rows : iterable of Row
            All that it has now.
        """
        if self._is_tidy:
            return
        self._is_tidy = True
        names = set()
        for row in rows:
            try:
                names.add(_row_name(row))
            except Exception as error:  # A row can hold anything, and nothing is kept of this one.
                log.debug("%s: a row has no name: %s", self._site, error)
        deleted = self._store.tidy(self._space, names, _is_gone)
        if deleted.entries:
            text = "%s: %d entries of the image cache deleted: their images are gone or unused"
            log.info(text, self._site, deleted.entries)

    def slot_of(self, *what: Any, steps: Sequence[Any] = ()) -> str | None:
        """Return the digest of all that decides what is made of a row; None if there is none.

        Parameters
        ----------
        what : any
            Arguments.
        steps : sequence of transforms
        """
        try:
            code = code_digest([*self._client.__mro__, *code_in(steps)])
            kept = digest(*what)
        except Unreadable as error:
            self._say(f"{error}: no fingerprint tells what it does")
            return None
        digests = []
        for number, step in enumerate(steps, start=1):
            try:
                digests.append(digest(step))
            except Unreadable as error:
                self._say(
                    f"step {number} of the transforms, {type(step).__name__}, and {error}: no "
                    "fingerprint tells what it does. What is found in each image is kept"
                )
                return None
        return digest(code, kept, digests)

    def claim(self, rows: Iterable[Row], slots: Sequence[str | None]) -> None:
        """Look at the files of rows before they are read, and keep what there is of them."""
        for row in rows:
            names = [self._name(row, slot) for slot in slots]
            self._store.claim(name for name in names if name is not None)

    def finding(self, row: Row, slot: str | None) -> Finding | None:
        """Return what an earlier message found in a row; None if that is not known."""
        name = self._name(row, slot)
        content = None if name is None else self._store.read(name)
        if name is None or content is None:
            return None
        try:
            found = _finding(json.loads(unpacked_text(content))["finding"])
            patient = str(row.get("patient", ""))
            return replace(found, patient=patient, split=str(row.get("split", "")))
        except MALFORMED:
            self._store.drop(name)
            return None

    def keep_finding(self, row: Row, slot: str | None, finding: Finding) -> None:
        """Write down what was found in a row; a problem is looked at again next time."""
        name = self._name(row, slot)
        if finding.problem is not None or name is None or not self._is_unchanged(row):
            return
        # The row itself names them.
        nameless = replace(finding, patient="", split="")
        try:
            text = json.dumps({"files": _first_files(row), "finding": asdict(nameless)})
        except TypeError as error:
            self._say(f"what was found in a row ({error})")
            return
        if _finding(json.loads(text)["finding"]) == nameless:
            self._store.write(name, packed(text))

    def has_prepared(self, row: Row, slot: str | None) -> bool:
        """Return whether a row is kept as its transforms make it."""
        name = self._name(row, slot)
        return name is not None and name in self._store

    def prepared(self, row: Row, slot: str | None, steps: Sequence[Any]) -> Any | None:
        """Return a row as its transforms make it; None if it is not kept."""
        name = self._name(row, slot)
        content = None if name is None else self._store.read(name)
        if name is None or content is None:
            return None
        try:
            return unpacked_row(content, row, steps)
        except MALFORMED:
            self._store.drop(name)
            return None

    def keep_prepared(self, row: Row, slot: str | None, steps: Sequence[Any], result: Any) -> None:
        """Write down a row as its transforms have made it, if its files are as they were."""
        name = self._name(row, slot)
        if name is None or not self._is_unchanged(row):
            return
        try:
            parts = packed_row(result, row, steps, _first_files(row))
        except Unreadable as error:
            self._say(f"{error} cannot be written")
            return
        self._store.write(name, parts)

    def _name(self, row: Row, slot: str | None) -> Name | None:
        origin = self._origin(row)
        if slot is None or origin is None:
            return None
        return Name(self._space, origin.row, slot, origin.state)

    def _origin(self, row: Row) -> _Origin | None:
        if id(row) not in self._origins:
            self._origins[id(row)] = (row, self._looked_at(row))
        return self._origins[id(row)][1]

    def _looked_at(self, row: Row) -> _Origin | None:
        try:
            if any(files_of(row["image"])):
                return _Origin(_row_name(row), _state(row))
        except Unreadable as error:
            self._say(str(error))
        except Exception as error:  # A row can raise anything; what reads its files says more.
            log.debug("%s: no state of a row's files: %s", self._site, error)
        return None

    def _is_unchanged(self, row: Row) -> bool:
        before = self._origin(row)
        return before is not None and before == self._looked_at(row)

    def _say(self, reason: str) -> None:
        """Say why something is not kept, once a message."""
        if reason not in self._said:
            self._said.add(reason)
            log.info("%s: images are not kept on the disk because of %s", self._site, reason)


def _row_name(row: Row) -> str:
    return digest({name: row[name] for name in row})[:16]


def _first_files(row: Row) -> list[str]:
    """Return a file of each entry of a row that names some."""
    firsts = (next(files_of(value), None) for value in row.values())
    return [str(file.absolute()) for file in firsts if file is not None and file.exists()]


def _is_gone(content: Bytes) -> bool:
    """Return whether a file that an entry was made of is gone."""
    try:
        files = json.loads(unpacked_text(content))["files"]
        return not all(Path(file).exists() for file in files)
    except MALFORMED:
        return True


def _state(row: Row) -> str:
    """Return the digest of the state of all files that a row names.

    Raises
    ------
    OSError
        If a file cannot be looked at.
    Unreadable
        If a file names others, or has changed in this moment.
    """
    newest = time.time_ns() - FRESH_NS
    files = []
    for path in _files_named(row):
        status = path.stat()
        if status.st_ctime_ns > newest:
            raise Unreadable("a file that has changed in this moment")
        place = (str(path.absolute()), status.st_dev, status.st_ino)
        files.append((*place, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return digest(files)


def _files_named(row: Row) -> Iterator[Path]:
    """Yield the files that a row names, and those in folders that it names."""
    count = 0
    for name, value in row.items():
        of_series = isinstance(value, Series)
        for path in files_of(value):
            if name not in ("image", "label") and not path.exists():
                continue  # A text that is no path.
            listed = [path]
            if path.is_dir():
                listed += sorted(entry for entry in path.iterdir() if entry.is_file())
            elif not (of_series or path.name.lower().endswith(_WHOLE) or is_dicom(path)):
                raise Unreadable(f"{path.suffix} files, which may name others")
            count += len(listed)
            if count > _MOST_FILES:
                raise Unreadable(f"a row of more than {_MOST_FILES:,} files")
            yield from listed


def _finding(entries: Mapping[str, Any]) -> Finding:
    """Return a finding from its JSON, in which tuples are lists."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()
    }
    return Finding(**values)
