"""What may leave a hospital, whatever it has answered before.

The rule: no set of patients that can be singled out by combining the answers so far is smaller than
the minimum, for any variable or pair of variables. So no sum over the cells of any number of
answers, and no difference of such sums, is one over fewer patients.

For each variable the hospital keeps a partition of its rows into classes. An answer gives each row
a cell, or leaves it outside. The partition is refined by the cells: rows of one class stay together
if they are in one cell. If a class would then have patients, but fewer than the minimum, nothing is
answered. Rows that came since the last answer are a class of their own. Rows that have gone, or
whose value has changed, are outside from then on. Repeating a question splits no class further, so
it may be answered again. Auditing answers in this way goes back to F. Y. Chin and G. Ozsoyoglu,
"Auditing and inference control in statistical databases", IEEE Transactions on Software Engineering
8, 1982.

An answer about one variable under a condition on another discloses something of both. It also
refines the partition of that pair, with which a later two-way table must agree.

If patients have several rows, two classes of many patients may still differ by one patient: all
first visits, and all second visits. So the rows of a patient are also examined together; see
`fewest.fewest_left`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.files import require_format
from fedmed_flower.privacy.ledger import give_name, transaction
from fedmed_flower.statistics.columns import Columns
from fedmed_flower.statistics.fewest import class_codes, fewest_left, numbered, one_row_each
from fedmed_flower.statistics.types import Codes, Hashes, Mask

# Cell codes: the row is not part of the answer; the answer reveals that its value is missing.
OUTSIDE = -1
LACKING = 2**31
# The label of rows that no answer has counted.
NEW = -1
# Digests that are in memory at a time.
_DIGESTS = 4096
_VERSION = 2
_SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE partitions (key TEXT PRIMARY KEY, elements BLOB NOT NULL, patients BLOB NOT NULL,
  labels BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE shown (run TEXT NOT NULL, patient BLOB NOT NULL, PRIMARY KEY (run, patient))
  WITHOUT ROWID;
CREATE TABLE compared (column_name TEXT NOT NULL, value TEXT NOT NULL,
  PRIMARY KEY (column_name, value)) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Partition:
    """The classes into which answers about one key have split the rows.

    Attributes
    ----------
    elements : ndarray of uint64
        Hashes of rows, ascending.
    patients : ndarray of uint64
        Hashes of their patients.
    labels : ndarray of int32
        The class of each row.
    """

    elements: Hashes
    patients: Hashes
    labels: NDArray[np.int32]


@dataclass(frozen=True)
class _Found:
    """Where members stand in a partition.

    Attributes
    ----------
    partition : Partition
    places : ndarray of int32
        (members,) the place among its elements, -1 if the member has none.
    complete : bool
        Whether each element of the partition is one of the members.
    """

    partition: Partition
    places: NDArray[np.int32]
    complete: bool

    @property
    def labels(self) -> Codes:
        """(members,) int64 the class, `NEW` if the member has no place."""
        # Not kept: of all columns they take as much memory as the table.
        known = self.places >= 0
        if known.all():
            return self.partition.labels[self.places].astype(np.int64)
        labels = np.full(self.places.size, NEW, np.int64)
        labels[known] = self.partition.labels[self.places[known]]
        return labels


@dataclass(frozen=True)
class Members:
    """The rows that have a value of one key.

    Attributes
    ----------
    key : str
    names : tuple of str
        The columns that stand for the key in this request; empty for all rows.
    rows : ndarray of int64
        The indices of the rows.
    elements : ndarray of uint64
        A hash of each row's patient and value.
    """

    key: str
    names: tuple[str, ...]
    rows: Codes
    elements: Hashes


class Guard:
    """The partitions of one hospital's rows, while one request is answered.

    Parameters
    ----------
    connection : sqlite3.Connection
        Open on a hospital's file.
    columns : Columns
        The rows.
    minimum : int
        At least 1.
    hide_missing : bool
        If true, the rows without a value are protected like any other class: they belong to no
        patient or to at least `minimum`. If false, their number may be disclosed.

    Attributes
    ----------
    beside : tuple of str
        The columns by which rows were chosen, once the choice is admitted.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        columns: Columns,
        minimum: int,
        hide_missing: bool = False,
    ) -> None:
        self._connection = connection
        self._columns = columns
        self.minimum = minimum
        self._hide_missing = hide_missing
        self.beside: tuple[str, ...] = ()
        (self._key,) = connection.execute("SELECT value FROM about WHERE key = 'key'").fetchone()
        patients = [_encoded(patient) for patient in columns.distinct_patients]
        self._patients = self._hashes(patients)[columns.patient_of_row]
        # Hashes stand for patients also where their rows are no longer there.
        self._patient_of_row = np.unique(self._patients, return_inverse=True)[1].astype(np.int64)
        self._lines = [patient + b"\n" for patient in patients]
        self._partitions: dict[str, Partition | None] = {}
        self._changed: dict[str, Partition] = {}
        self._members: dict[str, Members] = {}
        self._found: dict[str, _Found] = {}
        self._all_rows = np.arange(columns.count)

    def members(self, *names: str) -> Members:
        """Return the rows that have a value in a column, or in two; without a name, all rows.

        Columns of one family share a key, because they are made of the same values.
        """
        families = sorted({self._columns.family(name) for name in names})
        key = json.dumps(families)
        if key not in self._members:
            if names:
                codes, texts = self._encoded_identities(families)
                rows = np.flatnonzero(codes >= 0)
                # Most columns have a value in all rows: one array of indices serves them all.
                rows = self._all_rows if rows.size == codes.size else rows
                self._members[key] = Members(key, names, rows, self._elements(rows, codes, texts))
            else:
                self._members[key] = self.everybody(key)
        return self._members[key]

    def _encoded_identities(self, families: list[tuple[str, ...]]) -> tuple[Codes, list[bytes]]:
        codes, texts = self._columns.identities(families, self._hide_missing)
        return codes, list(map(_encoded, texts))

    def everybody(self, kind: str) -> Members:
        """Return all rows, for a kind of answer that is combined only with others of its kind."""
        contents = self._columns.contents()
        # A patient's rows are distinguished only by a number, in the order of their contents.
        rows = np.array(sorted(range(self._columns.count), key=contents.__getitem__), np.int64)
        codes = np.zeros(self._columns.count, np.int64)
        return Members(kind, (), rows, self._elements(rows, codes, [b""]))

    def _elements(self, rows: Codes, codes: Codes, texts: list[bytes]) -> Hashes:
        """Return a hash of each of these rows.

        It is made of patient and text, and of a number that distinguishes rows that agree in both.

        Parameters
        ----------
        rows : ndarray of int64
            The indices of the rows.
        codes : ndarray of int64
            (rows,) of all rows, the number of the row's text.
        texts : list of bytes
            They are overwritten.
        """
        patient_of_row = self._columns.patient_of_row[rows]
        patients = map(self._lines.__getitem__, patient_of_row.tolist())
        numbers = _repeats(class_codes(patient_of_row, codes[rows]))
        first = not numbers.any()
        for index, text in enumerate(texts):
            texts[index] = text + (b"\n0" if first else b"\n")
        parts = map(add, patients, map(texts.__getitem__, codes[rows].tolist()))
        if first:
            return self._hashes(parts)
        return self._hashes(map(add, parts, (str(n).encode() for n in numbers.tolist())))

    def _hash(self, text: str) -> int:
        return int(self._hashes([_encoded(text)])[0])

    def _hashes(self, texts: Iterable[bytes]) -> Hashes:
        """Return the first eight bytes of a keyed digest of each text."""
        start = hashlib.blake2b(key=self._key)
        copy = start.copy
        step = start.digest_size // 8
        left = iter(texts)
        hashes = [np.zeros(0, np.uint64)]
        while part := [*islice(left, _DIGESTS)]:
            digests = []
            for text in part:
                # A copy takes half the time of a new one with the key.
                digest = copy()
                digest.update(text)
                digests.append(digest.digest())
            hashes.append(np.frombuffer(b"".join(digests), ">u8")[::step].astype(np.uint64))
        return np.concatenate(hashes)

    def labels(self, members: Members) -> Codes:
        """Return (rows,) the class of each row so far; `NEW` if no answer has counted the row."""
        labels = np.full(self._columns.count, NEW, np.int64)
        partition = self._partition(members.key)
        if partition is not None:
            labels[members.rows] = self._find(members, partition).labels
        return labels

    def _find(self, members: Members, partition: Partition) -> _Found:
        """Return where the members stand in a partition; kept until the partition is split."""
        found = self._found.get(members.key)
        if found is not None and found.partition is partition:
            return found
        if found is None or found.partition.elements is not partition.elements:
            places = np.full(members.elements.size, -1, np.int32)
            if partition.elements.size:
                indices = np.searchsorted(partition.elements, members.elements)
                indices = np.minimum(indices, partition.elements.size - 1)
                known = partition.elements[indices] == members.elements
                places[known] = indices[known]
        else:
            places = found.places
        complete = np.count_nonzero(places >= 0) == partition.elements.size
        self._found[members.key] = _Found(partition, places, complete)
        return self._found[members.key]

    def admit(self, keys: Sequence[Members], cells: Sequence[Codes], waiting: Mask) -> bool:
        """Record that an answer puts rows into these cells, if the answer may leave.

        Parameters
        ----------
        keys : sequence of Members
            What the answer is about.
        cells : sequence of ndarray of int64
            For each key (rows,) cells, with `OUTSIDE` for rows that the answer leaves out.
        waiting : ndarray of bool
            (rows,) rows that the answer does not count yet; those of them that are new remain new.

        Returns
        -------
        bool
            Whether the answer may leave, by all keys. If not, nothing changes.
        """
        names = {name for members in keys for name in members.names}
        pairs = [
            self.members(name, other)
            for name in sorted(names)
            for other in self.beside
            if other not in names and self._columns.family(other) != self._columns.family(name)
        ]
        joint = [_joint(cells)] * len(pairs) if pairs else []
        # Nothing is assigned before all are admitted: a refusal must leave no trace.
        refined: dict[str, Partition] = {}
        for members, values in zip((*keys, *pairs), (*cells, *joint), strict=True):
            known = refined.get(members.key) or self._partition(members.key)
            partition = self._refine(known, members, values, waiting)
            if partition is None:
                return False
            if partition is not known:
                refined[members.key] = partition
        self._partitions |= refined
        self._changed |= refined
        return True

    def _refine(
        self, partition: Partition | None, members: Members, cells: Codes, waiting: Mask
    ) -> Partition | None:
        """Return the partition split by an answer's cells; None if a class would be too small.

        Parameters
        ----------
        partition : Partition or None
            The classes that earlier answers have made; None if there were none.
        members : Members
        cells, waiting : ndarray
            (rows,) of all the hospital's rows, as `admit` takes them.
        """
        rows = members.rows
        elements = members.elements
        found = None if partition is None else self._find(members, partition)
        labels = np.full(rows.size, NEW, np.int64) if found is None else found.labels
        places = None if found is None else found.places
        taken = (labels != NEW) | ~waiting[rows]
        complete = found is not None and found.complete
        if not taken.all():
            rows = rows[taken]
            elements = elements[taken]
            labels = labels[taken]
            places = None if places is None else places[taken]
        patients = self._patients[rows]
        patient_of_row = self._patient_of_row[rows]
        new_cells = cells[rows]
        if partition is not None and places is not None and not complete:
            # All known members are taken, so the others have gone.
            gone = np.ones(partition.elements.size, bool)
            gone[places[places >= 0]] = False
            elements = np.concatenate((elements, partition.elements[gone]))
            patients = np.concatenate((patients, partition.patients[gone]))
            labels = np.concatenate((labels, partition.labels[gone]))
            places = np.concatenate((places, np.flatnonzero(gone)), dtype=np.int32)
            outside = np.full(int(gone.sum()), OUTSIDE, np.int64)
            new_cells = np.concatenate((new_cells, outside))
            patient_of_row = np.unique(patients, return_inverse=True)[1].astype(np.int64)
        classes = class_codes(labels, new_cells)
        if fewest_left(classes, patient_of_row, self.minimum) < self.minimum:
            return None
        if partition is None or places is None or places.size != partition.elements.size:
            order = np.argsort(elements)
            made = Partition(elements[order], patients[order], classes[order].astype(np.int32))
            if elements is members.elements:
                places = np.empty(order.size, np.int32)
                places[order] = np.arange(order.size)
                self._found[members.key] = _Found(made, places, True)
            return made
        if classes.max(initial=-1) + 1 == numbered(partition.labels.astype(np.int64))[0].size:
            return partition  # Asked again: no class is split.
        split = np.empty(classes.size, np.int32)
        split[places] = classes
        return Partition(partition.elements, partition.patients, split)

    def shown(self, run: str) -> tuple[bool, set[str] | None]:
        """Return whether this run has shown pictures, and the patients whom any run has shown.

        Of the patients, those in the hospital's present rows are returned; None if no run has shown
        anybody.
        """
        rows = self._connection.execute("SELECT run, patient FROM shown").fetchall()
        had_pictures = any(name == run for name, _ in rows)
        blobs = {patient for _, patient in rows} - {b""}
        if not blobs:
            return had_pictures, None
        return had_pictures, {
            name for name in dict.fromkeys(self._columns.patients) if self._blob(name) in blobs
        }

    def show(self, run: str, patients: Iterable[str]) -> None:
        """Record that a run has its pictures, and of which patients."""
        rows = [(run, b""), *((run, self._blob(patient)) for patient in patients)]
        self._connection.executemany("INSERT OR IGNORE INTO shown VALUES (?, ?)", rows)

    def _blob(self, patient: str) -> bytes:
        return self._hash(f"picture of {patient}").to_bytes(8)

    def save(self) -> None:
        """Write the changed partitions into the file."""
        # One after the other: together they may take as much memory as the table.
        self._connection.executemany(
            "INSERT OR REPLACE INTO partitions VALUES (?, ?, ?, ?)",
            (
                (
                    *(key, p.elements.tobytes(), p.patients.tobytes()),
                    p.labels.astype(np.int64).tobytes(),
                )
                for key, p in self._changed.items()
            ),
        )

    def _partition(self, key: str) -> Partition | None:
        if key not in self._partitions:
            query = "SELECT elements, patients, labels FROM partitions WHERE key = ?"
            row = self._connection.execute(query, (key,)).fetchone()
            if row is not None:
                dtypes = (np.uint64, np.uint64, np.int64)
                parts: Any = [
                    np.frombuffer(blob, dtype) for blob, dtype in zip(row, dtypes, strict=True)
                ]
                if len({part.size for part in parts}) > 1:
                    raise sqlite3.DatabaseError(f"the partition of {key!r} is damaged")
                elements, patients, labels = parts
                row = Partition(elements, patients, labels.astype(np.int32))
            self._partitions[key] = row
        return self._partitions[key]


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")


def _repeats(codes: Codes) -> Codes:
    """Return for each code how often it stands before."""
    if one_row_each(codes):
        return np.zeros_like(codes)
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=-1))
    lengths = np.diff(begins, append=codes.size)
    repeats = np.empty_like(codes)
    repeats[order] = np.arange(codes.size) - np.repeat(begins, lengths)
    return repeats


def _joint(cells: Sequence[Codes]) -> Codes:
    """Return cells that are the combinations of others; a row outside of one is outside."""
    joint = class_codes(*cells)
    for special in (LACKING, OUTSIDE):
        joint[np.logical_or.reduce([values == special for values in cells])] = special
    return joint


@contextmanager
def open_guard(
    path: Path, columns: Columns, minimum: int, hide_missing: bool = False
) -> Iterator[Guard]:
    """Open a hospital's file; when the block ends, what was admitted has reached the disk.

    That holds also if the block ends with an error, which may have disclosed the answer, unless it
    is an error of the file itself.

    Raises
    ------
    InputError
        If the file is not a hospital's record of answers, is damaged or cannot be written. Nothing
        may leave then.
    """
    failure: BaseException | None = None
    with _opened(path) as connection:
        guard = Guard(connection, columns, minimum, hide_missing)
        try:
            yield guard
        except (sqlite3.Error, OSError):
            raise
        except BaseException as error:
            # Raised after the commit: raised here, it would undo the commit.
            failure = error
        guard.save()
    if failure is not None:
        raise failure


def note_compared(path: Path, values: Iterable[tuple[str, float | str]], most: int) -> None:
    """Record the values of columns, or the widths, by which a request distinguishes rows.

    The record has reached the disk when this returns or declines, whatever becomes of the request.

    Parameters
    ----------
    path : Path
        The hospital's file of answers.
    values : iterable of (str, float or str)
        Column and value.
    most : int
        How many different values a column may have, all requests together; no more are recorded.

    Raises
    ------
    DeclinedError
        If a column has already had `most` other values. With enough of them the values of single
        patients could be found from what is refused.
    InputError
        If the file cannot be used; see `open_guard`.
    """
    exhausted = []
    with _opened(path) as connection:
        for column, value in values:
            if not _record(connection, column, value, most):
                exhausted.append(column)
    if exhausted:
        raise DeclinedError(
            f"all requests together may compare {exhausted[0]} with at most {most} values "
            "(conditions and cell widths), and these are used up: use values of earlier requests"
        )


def _record(connection: sqlite3.Connection, column: str, value: float | str, most: int) -> bool:
    """Record one value of a column, if it may have one more; return whether it is recorded."""
    query = "SELECT value FROM compared WHERE column_name = ?"
    values = {known for (known,) in connection.execute(query, (column,))} | {ascii(value)}
    if len(values) > most:
        return False
    connection.execute("INSERT OR IGNORE INTO compared VALUES (?, ?)", (column, ascii(value)))
    return True


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open one transaction on a hospital's file, which is created if it is missing."""
    try:
        if not path.exists():
            _create(path)
        with transaction(path, "rw", _SCHEMA, _VERSION) as connection:
            query = "SELECT value FROM about WHERE key = 'version'"
            version = connection.execute(query).fetchone()
            if version is not None and type(version[0]) is int:
                require_format(path, version[0], _VERSION)
            if version != (_VERSION,):
                raise sqlite3.DatabaseError(f"version {version} instead of {_VERSION}")
            yield connection
    except (sqlite3.Error, OSError) as error:
        raise InputError(
            f"the record of answers {path} cannot be used ({error}): repair its folder, or restore "
            "it from a copy; without it nobody knows what was disclosed before"
        ) from error


def _create(path: Path) -> None:
    """Complete the file before it gets its name, so that an empty file is always a damaged one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with transaction(draft, "rwc", _SCHEMA, _VERSION) as connection:
            about = {"version": _VERSION, "key": secrets.token_bytes(32)}
            connection.executemany("INSERT INTO about VALUES (?, ?)", about.items())
        draft.chmod(0o600)
        give_name(draft, path)
    finally:
        draft.unlink(missing_ok=True)
