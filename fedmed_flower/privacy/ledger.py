"""A hospital's own record of what was released about its patients, durable and only growing."""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.privacy.accounting import Release, epsilon_of, require_release

_VERSION = 1
_SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE datasets (id INTEGER PRIMARY KEY, fingerprint TEXT UNIQUE NOT NULL,
  patients INTEGER NOT NULL);
CREATE TABLE members (patient BLOB NOT NULL, dataset INTEGER NOT NULL REFERENCES datasets,
  PRIMARY KEY (patient, dataset)) WITHOUT ROWID;
CREATE TABLE charges (id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, run TEXT NOT NULL,
  app TEXT NOT NULL, purpose TEXT NOT NULL, round INTEGER NOT NULL,
  dataset INTEGER NOT NULL REFERENCES datasets, sampling_rate REAL NOT NULL,
  noise_multiplier REAL NOT NULL, releases INTEGER NOT NULL, settled INTEGER NOT NULL DEFAULT 0);
CREATE INDEX charges_of_dataset ON charges (dataset);
"""
# Two runs at one hospital wait for each other while one of them is charged.
_WAIT_SECONDS = 120


class Limit(NamedTuple):
    """How much may be released about a patient.

    Attributes
    ----------
    epsilon : float
        Above 0.
    delta : float
        Above 0, below 1.
    name : str
        As a decline shall name it.
    """

    epsilon: float
    delta: float
    name: str


class Entry(NamedTuple):
    """What one run released for one purpose about one set of patients.

    Attributes
    ----------
    run, app, purpose : str
        Purpose is ``train`` or the split of an evaluation.
    began : str
        UTC time of the first charge.
    rounds : int
        Charges.
    unsettled : int
        Charges of rounds that were interrupted; they count all the same.
    patients : int
    releases : Counter of Release
    dataset : int
    """

    run: str
    app: str
    purpose: str
    began: str
    rounds: int
    unsettled: int
    patients: int
    releases: Counter[Release]
    dataset: int


class Ledger:
    """One SQLite file of one hospital, for all its runs and sets of patients.

    What was released about two sets of patients adds up where they share a patient. Of a patient
    the ledger keeps a hash, under a key of its own.

    Parameters
    ----------
    path : Path
        Made, with its folder, where it is not there.
    read_only : bool
        Only look, at a file that is there.

    Raises
    ------
    InputError
        Where the file is no ledger, is damaged, or cannot be written.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path, self._read_only = path, read_only
        if not path.exists():
            if read_only:
                raise InputError(f"there is no ledger {path}")
            self._create()
        with self._open() as connection:
            found = self._about(connection, "version")
        if found != _VERSION:
            raise InputError(
                f"{path} is a ledger of version {found}, and this package knows {_VERSION}"
            )

    def charge(
        self,
        patients: Iterable[Hashable],
        release: Release,
        count: int,
        *,
        run: str,
        purpose: str,
        server_round: int = 0,
        app: str = "",
        run_limit: Limit | None = None,
        budget: Limit | None = None,
    ) -> int:
        """Write down releases before anything of them is computed.

        When this returns, the charge has reached the disk, and no kill or power failure takes it
        back. `settle` later notes that the round came to its end.

        Parameters
        ----------
        patients : iterable of hashable
            All whose records may take part; repetitions count once.
        release : Release
        count : int
            How many of them there will be; at least 1.
        run : str
            One name for all rounds of a run, and for those after a restart.
        purpose : str
            ``train``, or the split of an evaluation.
        server_round : int
        app : str
            For the reader.
        run_limit : Limit, optional
            What this run may release about these patients.
        budget : Limit, optional
            What all runs together may release about any of these patients.

        Returns
        -------
        int
            For `settle`.

        Raises
        ------
        DeclinedError
            Where a limit would be passed; nothing is charged then.
        InputError
            Where a value is out of range or the ledger cannot be written.
        """
        require_release(*release)
        if count < 1:
            raise InputError(f"the number of releases must be at least 1, got {count}")
        with self._open() as connection:
            dataset = self._dataset(connection, patients)
            after = Counter({release: count})
            if run_limit is not None:
                own = self._releases(connection, dataset, run)
                _require(own + after, run_limit)
            if budget is not None:
                _require(self._releases(connection, dataset) + after, budget)
                kept = {"budget-epsilon": budget.epsilon, "budget-delta": budget.delta}
                connection.executemany("REPLACE INTO about VALUES (?, ?)", kept.items())
            row = (_now(), run, app, purpose, server_round, dataset, *map(float, release), count)
            cursor = connection.execute(
                "INSERT INTO charges (time, run, app, purpose, round, dataset, sampling_rate, "
                "noise_multiplier, releases) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            return int(cursor.lastrowid or 0)

    def settle(self, charge: int) -> None:
        """Note that the round of a charge came to its end; what it costs stays the same."""
        with self._open() as connection:
            connection.execute("UPDATE charges SET settled = 1 WHERE id = ?", (charge,))

    def released(self, patients: Iterable[Hashable], run: str | None = None) -> Counter[Release]:
        """Return all releases about any of these patients; of one run only where it is given."""
        with self._open() as connection:
            return self._releases(connection, self._dataset(connection, patients), run)

    def most(self, delta: float) -> float:
        """Return the highest epsilon of any set of patients, at `delta`."""
        with self._open() as connection:
            found = connection.execute("SELECT id FROM datasets").fetchall()
            each = [self._releases(connection, dataset) for (dataset,) in found]
        return max((epsilon_of(releases, delta) for releases in each), default=0.0)

    def budget(self) -> Limit | None:
        """Return the budget that the hospital set when it was last charged."""
        with self._open() as connection:
            values = [self._about(connection, f"budget-{part}") for part in ("epsilon", "delta")]
        epsilon, delta = values
        return None if epsilon is None else Limit(epsilon, delta, "the hospital's privacy budget")

    def entries(self) -> list[Entry]:
        """Return what each run released, oldest first."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT c.run, c.app, c.purpose, c.dataset, c.time, c.settled, c.sampling_rate, "
                "c.noise_multiplier, c.releases, d.patients FROM charges c JOIN datasets d "
                "ON d.id = c.dataset ORDER BY c.id"
            ).fetchall()
        entries: dict[tuple[Any, ...], Entry] = {}
        for run, app, purpose, dataset, time, settled, rate, noise, count, patients in rows:
            key = (run, purpose, dataset)
            before = entries.get(
                key, Entry(run, app, purpose, time, 0, 0, patients, Counter(), dataset)
            )
            entries[key] = before._replace(
                rounds=before.rounds + 1,
                unsettled=before.unsettled + (not settled),
                releases=before.releases + Counter({Release(rate, noise): count}),
            )
        return list(entries.values())

    def _create(self) -> None:
        """Make the file whole and then give it its name, so that an empty one is always damage."""
        with _told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
            try:
                with _transaction(draft) as connection:
                    for statement in _SCHEMA.split(";"):
                        connection.execute(statement)
                    about = {"version": _VERSION, "key": secrets.token_bytes(32)}
                    connection.executemany("INSERT INTO about VALUES (?, ?)", about.items())
                # Unlike a renaming, it never takes the place of a ledger made in the meantime.
                with suppress(FileExistsError):
                    os.link(draft, self.path)
            finally:
                draft.unlink(missing_ok=True)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with _told(self.path), _transaction(self.path, self._read_only) as connection:
            yield connection

    def _dataset(self, connection: sqlite3.Connection, patients: Iterable[Hashable]) -> int:
        """Return the number of a set of patients, new where it has not been seen."""
        key = self._about(connection, "key")
        members = sorted({_hash(patient, key) for patient in patients})
        if not members:
            raise InputError("there are no patients to charge for")
        fingerprint = hashlib.blake2b(b"".join(members), key=key).hexdigest()
        query = "SELECT id FROM datasets WHERE fingerprint = ?"
        if (found := connection.execute(query, (fingerprint,)).fetchone()) is not None:
            return int(found[0])
        cursor = connection.execute(
            "INSERT INTO datasets (fingerprint, patients) VALUES (?, ?)",
            (fingerprint, len(members)),
        )
        dataset = int(cursor.lastrowid or 0)
        connection.executemany(
            "INSERT INTO members VALUES (?, ?)", ((member, dataset) for member in members)
        )
        return dataset

    @staticmethod
    def _releases(
        connection: sqlite3.Connection, dataset: int, run: str | None = None
    ) -> Counter[Release]:
        """Add up the charges of all sets that share a patient with this one."""
        query = (
            "SELECT sampling_rate, noise_multiplier, sum(releases) FROM charges WHERE dataset IN "
            "(SELECT DISTINCT theirs.dataset FROM members ours JOIN members theirs "
            "ON ours.patient = theirs.patient WHERE ours.dataset = ?) AND (? IS NULL OR run = ?) "
            "GROUP BY sampling_rate, noise_multiplier"
        )
        rows = connection.execute(query, (dataset, run, run)).fetchall()
        return Counter({Release(rate, noise): int(count) for rate, noise, count in rows})

    @staticmethod
    def _about(connection: sqlite3.Connection, key: str) -> Any:
        found = connection.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchone()
        return None if found is None else found[0]


@contextmanager
def _transaction(path: Path, read_only: bool = False) -> Iterator[sqlite3.Connection]:
    """Open one transaction, which ends on the disk or not at all."""
    uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    connection = sqlite3.connect(uri, timeout=_WAIT_SECONDS, isolation_level=None, uri=True)
    try:
        if not read_only:
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA synchronous = EXTRA")
        connection.execute("BEGIN" if read_only else "BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")
    finally:
        connection.close()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise InputError(
            f"the privacy ledger {path} cannot be used ({error}): mend its place, or restore it "
            "from a copy; without it nobody knows what was released"
        ) from error


def _require(releases: Counter[Release], limit: Limit) -> None:
    epsilon = epsilon_of(releases, limit.delta)
    if epsilon > limit.epsilon:
        raise DeclinedError(
            f"it would bring epsilon to {epsilon:.3f} at delta {limit.delta:g}, above "
            f"{limit.epsilon:g}, {limit.name}"
        )


def _hash(patient: Hashable, key: bytes) -> bytes:
    return hashlib.blake2b(_plain(patient).encode(), key=key, digest_size=16).digest()


def _plain(patient: Any) -> str:
    """Return one text for a patient, whichever of NumPy's or Python's types its number has."""
    if isinstance(patient, Sequence) and not isinstance(patient, str | bytes):
        return f"({', '.join(map(_plain, patient))})"
    return repr(patient.item() if hasattr(patient, "item") else patient)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
