"""A hospital's book of secure sums: which set of hospitals each question was answered over.

What a message covers is committed before the message leaves. A hospital that signs two sets for one
question lets the server find one hospital's figures as the difference of two sums, so a book that
is lost, older or another hospital's answers nothing until its owner says so (`regroup`).
"""

from __future__ import annotations

import json
import logging
import secrets
import sqlite3
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fedmed_flower.errors import FormatError, InputError
from fedmed_flower.files import read_object, replacing, require_format
from fedmed_flower.privacy.ledger import give_name, transaction
from fedmed_flower.secure.encoding import SecureError, decoded, encoded

log = logging.getLogger("flwr.fedmed")

DATA = "data"
TRAIN = "train"

# Not ".sqlite": the file lies beside the ledger and must not be taken for one.
_ENDING = ".secure"
_VERSION = 1
_SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE run_keys (run TEXT PRIMARY KEY, private BLOB);
CREATE TABLE attempts (digest BLOB PRIMARY KEY, kind TEXT NOT NULL, run TEXT NOT NULL,
  question BLOB NOT NULL, names BLOB NOT NULL, members BLOB, kept BLOB);
CREATE INDEX attempts_of_run ON attempts (run);
CREATE TABLE questions (number INTEGER PRIMARY KEY, question BLOB UNIQUE NOT NULL,
  kind TEXT NOT NULL, run TEXT NOT NULL, members BLOB NOT NULL);
CREATE INDEX questions_of_kind ON questions (kind);
CREATE TABLE peers (name TEXT NOT NULL, message TEXT NOT NULL, book TEXT NOT NULL,
  row_count INTEGER NOT NULL, mark BLOB NOT NULL, PRIMARY KEY (name, message)) WITHOUT ROWID;
"""
# Keys of the table `about` that hold the day on which a run was last used begin so.
_STAMP = "used "
_MOST_ROWS = 2**63 - 1
_ID_BYTES = 16
_ID_LETTERS = 64
_REGROUP = (
    "put the newest copy back, or accept what is there with `fedmed keys regroup`: after that, "
    "single hospitals' figures could be the difference of two sums"
)


class BookError(SecureError):
    """The book's files are not as they must be; the text names them, and is for the hospital."""


class Change(NamedTuple):
    """Two training questions, one after the other, that were settled over different sets.

    Attributes
    ----------
    run : str
        Run of the later question.
    before, after : tuple of str
        Names of the hospitals, sorted. What hospitals in one of them alone have sent can be
        estimated by difference.
    """

    run: str
    before: tuple[str, ...]
    after: tuple[str, ...]


class Peer(NamedTuple):
    """What a message of another hospital says of that hospital's book.

    Attributes
    ----------
    name : str
        Of the hospital.
    rows : int
        Entries of its book.
    book : str
        The book's id.
    mark : bytes
        What tells the message from others: a key of a run, or a digest.
    """

    name: str
    rows: int
    book: str = ""
    mark: bytes = b""


def secure_path(ledger: Path) -> Path:
    """Return the path of a hospital's book of secure sums, beside its ledger."""
    return ledger.with_name(ledger.name.removesuffix(".sqlite") + _ENDING)


class SecureBook:
    """One SQLite file of one hospital for all its runs, and a head file beside it (``*-head``).

    What a method writes has reached the disk when it returns: no kill and no power failure removes
    it. Each change is one entry. The head holds the number of entries and the identity's id, and is
    replaced after each commit. A kill in between leaves it one entry behind, and the next call
    brings it up. In any other state of the two files every method but `regroup` raises an error:
    one is missing, one is older than the other, or one belongs to another identity. The constructor
    does not, so that `regroup` can be called.

    If both files come from one older backup, or both are lost, nothing here shows it. The other
    hospitals see it, since each hello and each envelope holds the book's random `id` and its row
    count: `note_peers` refuses another id, or a count that fell, until they regroup too.

    Parameters
    ----------
    path : Path
        As `secure_path` returns it. If neither the book nor its head exists, both are made,
        readable by their owner alone.
    identity_id : str
        The id of the hospital's identity.

    Raises
    ------
    SecureError
        If a file is missing, older, damaged, another identity's, or cannot be written.
    FormatError
        If a file was written by a later version of this package.
    """

    def __init__(self, path: Path, identity_id: str) -> None:
        self.path = path
        self.head_path = path.with_name(f"{path.name}-head")
        self._identity = identity_id
        with self._as_secure_error():
            # The head first: another process that makes both files makes the book first.
            if not self.head_path.exists() and not path.exists():
                self._create()

    @property
    def rows(self) -> int:
        """Number of entries ever made in this book; it only grows."""
        with self._open() as connection:
            return _rows(connection)

    @property
    def id(self) -> str:
        """A random number that was drawn when the book was made."""
        with self._open() as connection:
            row = _one(connection, "SELECT value FROM about WHERE key = 'book'")
        if row is None or not isinstance(row[0], str):
            raise BookError(f"the book of secure sums {self.path} has no id: {_REGROUP}")
        return row[0]

    def new_run_key(self, run: str, private: bytes) -> None:
        """Write down the private key of a run before the hello leaves; it voids an older one."""
        with self._open() as connection:
            connection.execute(
                "INSERT INTO run_keys VALUES (?, ?) "
                "ON CONFLICT (run) DO UPDATE SET private = excluded.private",
                (run, private),
            )
            _stamp(connection, run)

    def run_key(self, run: str) -> bytes:
        """Return the private key of a run.

        Raises
        ------
        SecureError
            If the run has none, or it was erased when the run was closed.
        """
        with self._open() as connection:
            row = _one(connection, "SELECT private FROM run_keys WHERE run = ?", run)
        if row is None:
            raise SecureError(f"run {run} has no key here: the server must first ask for a hello")
        return _unless_erased(row[0], f"the key of run {run}")

    def idle_runs(self, days: int) -> list[str]:
        """Return the runs that have a key and began nothing for so many days, by this clock."""
        with self._open() as connection:
            query = (
                "SELECT run, value FROM run_keys LEFT JOIN about ON key = ? || run "
                "WHERE private IS NOT NULL ORDER BY run"
            )
            stamped = connection.execute(query, (_STAMP,)).fetchall()
        return [run for run, day in stamped if _today() - _count(day or 0) >= days]

    def close_run(self, run: str) -> None:
        """Erase a run's private key and what its attempts kept; settled questions stay.

        The bytes are overwritten in the file. Blocks that the disk or the file system has given
        up, such as those of SQLite's deleted journals, are not in reach.
        """
        with self._open() as connection:
            for table, column in (("run_keys", "private"), ("attempts", "kept")):
                connection.execute(
                    f"UPDATE {table} SET {column} = NULL WHERE run = ? AND {column} IS NOT NULL",
                    (run,),
                )

    def begin(
        self,
        run: str,
        kind: str,
        question: bytes,
        digest: bytes,
        names: Sequence[str],
        kept: bytes,
    ) -> None:
        """Write down an attempt to answer a question, before the masked reply leaves.

        Parameters
        ----------
        run : str
        kind : {"data", "train"}
            Questions about data are all settled over one set.
        question : bytes
            What is asked, without run, round, nonce, names, keys and thresholds.
        digest : bytes
            Of everything that decides this answer.
        names : sequence of str
            The hospitals that are asked.
        kept : bytes
            What is needed to answer later, such as own seeds.

        Raises
        ------
        SecureError
            If there is an attempt of this digest already, or a set that this question, or any
            question about data, was settled over is not within `names`.
        """
        if kind not in (DATA, TRAIN):
            raise SecureError(f"kind must be {DATA!r} or {TRAIN!r}, got {kind!r}")
        asked = _sorted(names)
        with self._open() as connection:
            if _one(connection, "SELECT 1 FROM attempts WHERE digest = ?", digest):
                raise SecureError(
                    f"attempt {digest.hex()[:16]} was answered before, and a masked reply is not "
                    "made twice for one digest: ask again with a new nonce"
                )
            for bound, what in self._bounds(connection, kind, question):
                lacking = sorted(set(bound) - set(asked))
                if lacking:
                    raise SecureError(
                        f"{what} settled over {_listed(bound)}, and the hospitals that are asked "
                        f"now lack {_listed(lacking)}: {_remedy(kind)}"
                    )
            connection.execute(
                "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, NULL, ?)",
                (digest, kind, run, question, encoded(asked), kept),
            )
            _stamp(connection, run)

    def kept(self, digest: bytes) -> bytes:
        """Return what `begin` kept.

        Raises
        ------
        SecureError
            If the digest is unknown, or what it kept was erased when its run was closed.
        """
        with self._open() as connection:
            row = _one(connection, "SELECT kept FROM attempts WHERE digest = ?", digest)
        if row is None:
            raise _unknown(digest)
        return _unless_erased(row[0], f"what attempt {digest.hex()[:16]} kept")

    def settle(self, digest: bytes, members: Sequence[str]) -> None:
        """Write down the set over which a digest is opened, before a signature or answer leaves.

        The same set once more is no new entry: the identical request gets the identical answer.

        Parameters
        ----------
        digest : bytes
            Of an attempt that began.
        members : sequence of str
            The hospitals of the set, in any order.

        Raises
        ------
        SecureError
            If the digest is unknown, the set is not within its names, or the digest, its question
            or, for a question about data, any such question was settled over another set.
        """
        chosen = _sorted(members)
        with self._open() as connection:
            query = "SELECT kind, run, question, names, members FROM attempts WHERE digest = ?"
            attempt = _one(connection, query, digest)
            if attempt is None:
                raise _unknown(digest)
            kind, run, question, names, before = attempt
            if before is not None:
                _require_same(_names(before), chosen, "this attempt was", "ask for that set")
                return
            strange = sorted(set(chosen) - set(_names(names)))
            if strange:
                raise SecureError(
                    f"attempt {digest.hex()[:16]} asks {_listed(_names(names))}, and the set has "
                    f"{_listed(strange)} too: settle over hospitals that were asked"
                )
            for bound, what in self._bounds(connection, kind, question):
                _require_same(bound, chosen, what, _remedy(kind))
            blob = encoded(chosen)
            if kind == TRAIN:
                _tell_change(connection, chosen)
            connection.execute("UPDATE attempts SET members = ? WHERE digest = ?", (blob, digest))
            connection.execute(
                "INSERT OR IGNORE INTO questions (question, kind, run, members) "
                "VALUES (?, ?, ?, ?)",
                (question, kind, run, blob),
            )

    def note_peers(self, peers: Sequence[Peer], run: str = "", reply: bool = False) -> None:
        """Write down the state of other hospitals' books, as their messages tell it.

        The same message once more is no new entry. Messages of two runs may be read in another
        order than they were written, so a masked reply is compared with the run's own messages.

        Parameters
        ----------
        peers : sequence of Peer
        run : str
        reply : bool
            Whether they came with masked replies; else with hellos.

        Raises
        ------
        SecureError
            If a row count is none, a book is another one than before, or it has not grown since an
            earlier message. Nothing is then written down.
        """
        with self._open() as connection:
            for peer in peers:
                _note_peer(connection, peer, run, reply)

    def steady_rows(self, rows: int, patients: int, fewest: int) -> int:
        """Return a number of rows that changes only if many patients have come or gone.

        Parameters
        ----------
        rows, patients : int
            What there are now.
        fewest : int
            By how many patients more or fewer the number may change.

        Returns
        -------
        int
            `rows`, or what was returned before.
        """
        with self._open() as connection:
            query = "SELECT key, value FROM about WHERE key IN ('counted', 'patients')"
            before = {key: _count(value) for key, value in connection.execute(query)}
            if len(before) == 2 and abs(before["patients"] - patients) < fewest:
                return before["counted"]
            values = [("counted", rows), ("patients", patients)]
            connection.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", values)
        return rows

    def regroup(self, names: Sequence[str] = ()) -> None:
        """Accept the book as it is, and let questions about data be settled over another set.

        A missing book is made anew. Sets of training questions that the book knows stay for good.
        The row count of a new or older book is below the one that other hospitals know, so each of
        them has to regroup for this hospital's name.

        Parameters
        ----------
        names : sequence of str
            Hospitals whose next row count is accepted whatever it is; empty for all.
        """
        with self._as_secure_error():
            if not self.path.exists():
                self._create()
        with self._locked() as connection:
            former = _data_members(connection)
            connection.execute("DELETE FROM questions WHERE kind = ?", (DATA,))
            if names:
                values = [(name,) for name in names]
                connection.executemany("DELETE FROM peers WHERE name = ?", values)
            else:
                connection.execute("DELETE FROM peers")
            query = "INSERT OR REPLACE INTO about VALUES ('identity', ?)"
            connection.execute(query, (self._identity,))
            _count_entry(connection)
        # In a transaction, so that no other process writes the head at the same time.
        with self._locked() as connection:
            self._write_head(_rows(connection))
        log.warning(
            "regrouped: %s is accepted as it is; questions about data, until now answered over %s, "
            "may be answered over another set",
            self.path,
            _listed(former) if former else "no set",
        )

    def changes(self) -> list[Change]:
        """Return each change of the set from one settled training question to the next."""
        with self._open() as connection:
            query = "SELECT run, members FROM questions WHERE kind = ? ORDER BY number"
            settled = [(run, _names(blob)) for run, blob in connection.execute(query, (TRAIN,))]
        return [
            Change(run, before, after)
            for (_, before), (run, after) in pairwise(settled)
            if before != after
        ]

    @staticmethod
    def _bounds(
        connection: sqlite3.Connection, kind: str, question: bytes
    ) -> list[tuple[tuple[str, ...], str]]:
        """Return the sets that bind a question, each with the beginning of a sentence."""
        bounds = []
        row = _one(connection, "SELECT members FROM questions WHERE question = ?", question)
        if row is not None:
            bounds.append((_names(row[0]), "this question was"))
        study = _data_members(connection) if kind == DATA else None
        if study is not None:
            bounds.append((study, "questions about data were"))
        return bounds

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open one transaction on sound files; what it changes is one entry."""
        with self._as_secure_error():
            # The head first, as in the constructor.
            if self.head_path.exists() and not self.path.exists():
                raise BookError(
                    f"the book of secure sums {self.path} is missing, and its head "
                    f"{self.head_path} is there: {_REGROUP}"
                )
        with self._locked() as connection:
            self._check(connection)
            yield connection
            changed = connection.total_changes > 0
            if changed:
                _count_entry(connection)
        if changed:
            with self._locked() as connection:
                self._check(connection)

    @contextmanager
    def _locked(self) -> Iterator[sqlite3.Connection]:
        """Open one transaction, during which no other process writes the book or its head."""
        with (
            self._as_secure_error(),
            transaction(self.path, "rw", _SCHEMA, _VERSION) as connection,
        ):
            connection.execute("PRAGMA secure_delete = ON")
            yield connection

    def _check(self, connection: sqlite3.Connection) -> None:
        """Refuse a book and a head that do not belong together; bring a late head up."""
        rows = _rows(connection)
        identity = _one(connection, "SELECT value FROM about WHERE key = 'identity'")
        self._require_identity(self.path, None if identity is None else identity[0])
        head = self._read_head()
        if head is None and rows:
            raise BookError(
                f"{self.head_path} is missing, which tells whether the book of secure sums "
                f"{self.path} is the newest: {_REGROUP}"
            )
        if head is not None and head > rows:
            raise BookError(
                f"the book of secure sums {self.path} is older than its head {self.head_path}: it "
                f"has {rows} entries instead of {head}: {_REGROUP}"
            )
        if head is not None and head < rows - 1:
            raise BookError(
                f"{self.head_path} is older than the book of secure sums {self.path}: it knows "
                f"{head} entries instead of {rows}: {_REGROUP}"
            )
        if head != rows:
            self._write_head(rows)

    def _read_head(self) -> int | None:
        """Return the number of entries that the head knows; None if there is no head."""
        if not self.head_path.exists():
            return None
        try:
            content = read_object(self.head_path.parent, self.head_path.name, _REGROUP)
            require_format(self.head_path, content.get("format"), _VERSION)
        except FormatError:
            raise
        except InputError as error:
            raise BookError(error) from error
        rows = content.get("rows")
        if type(rows) is not int or rows < 0:
            raise BookError(
                f"rows in {self.head_path} must be a whole number, at least 0, got {rows!r}: "
                f"{_REGROUP}"
            )
        self._require_identity(self.head_path, content.get("identity"))
        return rows

    def _require_identity(self, path: Path, identity: object) -> None:
        if identity != self._identity:
            raise BookError(
                f"{path} belongs to another identity than this hospital's key file: {_REGROUP}"
            )

    def _write_head(self, rows: int) -> None:
        content = {"format": _VERSION, "identity": self._identity, "rows": rows}
        with replacing(self.head_path) as temporary:
            temporary.touch(mode=0o600, exist_ok=False)
            temporary.write_text(json.dumps(content))

    def _create(self) -> None:
        """Complete the book before it gets its name, so that an empty file is always damaged."""
        draft = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.touch(mode=0o600, exist_ok=False)
            with transaction(draft, "rwc", _SCHEMA, _VERSION) as connection:
                book = secrets.token_hex(_ID_BYTES)
                about = {"identity": self._identity, "book": book, "rows": 0}
                connection.executemany("INSERT INTO about VALUES (?, ?)", about.items())
            give_name(draft, self.path)
        finally:
            draft.unlink(missing_ok=True)

    @contextmanager
    def _as_secure_error(self) -> Iterator[None]:
        try:
            yield
        # SQLite's module raises the last where a damaged file spoils SQLite's own error text.
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            raise BookError(
                f"the book of secure sums {self.path} cannot be used ({error}): repair its folder "
                "or disk, or restore its newest copy; if it is lost, remove it and run `fedmed "
                "keys regroup`"
            ) from error


def _one(connection: sqlite3.Connection, query: str, *values: object) -> tuple[Any, ...] | None:
    row: tuple[Any, ...] | None = connection.execute(query, values).fetchone()
    return row


def _rows(connection: sqlite3.Connection) -> int:
    row = _one(connection, "SELECT value FROM about WHERE key = 'rows'")
    return _count(None if row is None else row[0])


def _count(value: object) -> int:
    """Return a count out of the book."""
    if type(value) is not int or value < 0:
        raise sqlite3.DatabaseError(f"a count in it is {value!r}")
    return value


def _count_entry(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE about SET value = value + 1 WHERE key = 'rows'")


def _stamp(connection: sqlite3.Connection, run: str) -> None:
    """Write down the day on which a run was used."""
    values = (f"{_STAMP}{run}", _today())
    connection.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", values)


def _today() -> int:
    """Return the number of days since 1970."""
    return int(time.time() // 86400)


def _data_members(connection: sqlite3.Connection) -> tuple[str, ...] | None:
    """Return the set over which questions about data are settled; None before the first."""
    row = _one(connection, "SELECT members FROM questions WHERE kind = ? LIMIT 1", DATA)
    return None if row is None else _names(row[0])


def _tell_change(connection: sqlite3.Connection, chosen: tuple[str, ...]) -> None:
    """Log if training goes on with other hospitals than before."""
    query = "SELECT members FROM questions WHERE kind = ? ORDER BY number DESC LIMIT 1"
    row = _one(connection, query, TRAIN)
    before = chosen if row is None else _names(row[0])
    if before != chosen:
        log.warning(
            "training goes on over %s, before over %s: what %s has sent can be estimated by "
            "difference",
            _listed(chosen),
            _listed(before),
            _listed(sorted({*before} ^ {*chosen})),
        )


def _names(blob: object) -> tuple[str, ...]:
    """Return names out of the book."""
    try:
        names = decoded(blob) if isinstance(blob, bytes) else None
    except SecureError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise sqlite3.DatabaseError("a list of names in it is damaged")
    return tuple(names)


def _sorted(names: Sequence[str]) -> tuple[str, ...]:
    """Return names as they are compared."""
    ordered = tuple(sorted(unicodedata.normalize("NFC", name) for name in names))
    if not ordered:
        raise SecureError("a set of hospitals must name at least one: got none")
    for before, name in pairwise(ordered):
        if name == before:
            raise SecureError(f"a set of hospitals names {name} twice: name each once")
    return ordered


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _require_same(bound: tuple[str, ...], chosen: tuple[str, ...], what: str, remedy: str) -> None:
    if chosen != bound:
        raise SecureError(
            f"{what} settled over {_listed(bound)}, not {_listed(chosen)}: the difference of two "
            f"sums would be single hospitals' figures: {remedy}"
        )


def _note_peer(connection: sqlite3.Connection, peer: Peer, run: str, reply: bool) -> None:
    name, rows, book, mark = peer
    if len(book) > _ID_LETTERS:
        raise SecureError(f"the id of {name}'s book must have at most {_ID_LETTERS} letters")
    if type(rows) is not int or not 0 <= rows <= _MOST_ROWS:
        raise SecureError(
            f"the row count of {name} must be a whole number, at least 0, got {rows!r}"
        )
    query = "SELECT message, book, row_count, mark FROM peers WHERE name = ?"
    told = {message: rest for message, *rest in connection.execute(query, (name,))}
    message = f"{'reply' if reply else 'hello'} {run}"
    if told.get(message) == [book, rows, mark]:
        return
    if any(other != book for other, _, _ in told.values()):
        raise SecureError(f"{name} has another book than before: {_doubtful(name)}")
    compared = {f"hello {run}", f"reply {run}"} if reply else {*told}
    before = max((_count(told[key][1]) for key in compared & {*told}), default=-1)
    if rows <= before:
        raise SecureError(f"the book of {name} has {rows} rows and had {before}: {_doubtful(name)}")
    values = (name, message, book, rows, mark)
    connection.execute("INSERT OR REPLACE INTO peers VALUES (?, ?, ?, ?, ?)", values)


def _doubtful(name: str) -> str:
    return (
        "it is lost or was restored from a copy, so it may answer one question over two sets: ask "
        f"{name} what happened, then accept its book with `fedmed keys regroup`; if two runs began "
        "at once, begin this one again"
    )


def _remedy(kind: str) -> str:
    if kind == DATA:
        return (
            "wait until all of the first set take part, or let every hospital run `fedmed keys "
            "regroup`"
        )
    return "wait until all of the first set take part, or train with another seed"


def _unknown(digest: bytes) -> SecureError:
    return SecureError(
        f"attempt {digest.hex()[:16]} did not begin here: the server must first ask for the masked "
        "reply"
    )


def _unless_erased(value: object, what: str) -> bytes:
    if not isinstance(value, bytes):
        raise SecureError(f"{what} was erased when the run was closed: begin a new run")
    return value
