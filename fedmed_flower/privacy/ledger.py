"""A hospital's durable record of what was released about its patients; no charge is removed."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import secrets
import shutil
import sqlite3
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from fedmed_flower.data.site import patient_text
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.files import require_format, require_posix
from fedmed_flower.privacy.accounting import Release, epsilon_of, require_release

log = logging.getLogger("flwr.fedmed")

_VERSION = 3
# The arithmetic of charges since version 3; one without a row has no bound that is known.
_ROUNDING = (
    "CREATE TABLE rounding (charge INTEGER PRIMARY KEY REFERENCES charges, "
    "divergence REAL NOT NULL)"
)
_SCHEMA = f"""
CREATE TABLE about (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE datasets (id INTEGER PRIMARY KEY, fingerprint TEXT UNIQUE NOT NULL,
  patients INTEGER NOT NULL);
CREATE TABLE members (patient BLOB NOT NULL, dataset INTEGER NOT NULL REFERENCES datasets,
  PRIMARY KEY (patient, dataset)) WITHOUT ROWID;
CREATE TABLE overlaps (dataset INTEGER NOT NULL REFERENCES datasets,
  other INTEGER NOT NULL REFERENCES datasets, PRIMARY KEY (dataset, other)) WITHOUT ROWID;
CREATE TABLE charges (id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, run TEXT NOT NULL,
  app TEXT NOT NULL, purpose TEXT NOT NULL, round INTEGER NOT NULL,
  dataset INTEGER NOT NULL REFERENCES datasets, sampling_rate REAL NOT NULL,
  noise_multiplier REAL NOT NULL, releases INTEGER NOT NULL, settled INTEGER NOT NULL DEFAULT 0);
CREATE INDEX charges_of_dataset ON charges (dataset);
CREATE TABLE plain (id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, run TEXT NOT NULL,
  app TEXT NOT NULL, purpose TEXT NOT NULL, dataset INTEGER NOT NULL REFERENCES datasets);
CREATE TABLE runs (run TEXT PRIMARY KEY, time TEXT NOT NULL) WITHOUT ROWID;
{_ROUNDING};
"""
# SQLite makes this table itself, for AUTOINCREMENT.
_COUNTER = "CREATE TABLE sqlite_sequence(name,seq)"
_BUDGET = ("budget-epsilon", "budget-delta")
_SPLIT_KEY = "split-key"
_KEY_BYTES = 32
TRAIN = "train"
# While one run at a hospital is charged, another waits.
_WAIT_SECONDS = 120


def purpose_in_sums(what: str, hospitals: int) -> str:
    """Return the purpose of a charge whose noise is that of a secure sum of so many hospitals."""
    return f"{what}, in sums of at least {hospitals} hospitals"


class Limit(NamedTuple):
    """How much may be released about a patient.

    Attributes
    ----------
    epsilon : float
        Above 0.
    delta : float
        Above 0, below 1.
    name : str
        Stands in the message of a decline.
    """

    epsilon: float
    delta: float
    name: str


class Entry(NamedTuple):
    """What one run released for one purpose about one set of patients.

    Attributes
    ----------
    run, app, purpose : str
        Purpose is ``train`` or the split of an evaluation; behind a comma it says if the noise
        was that of a secure sum, and of how many hospitals at least.
    began : str
        UTC time of the first charge.
    rounds : int
        Number of charges.
    unsettled : int
        Number of charges of rounds that were interrupted; they count all the same.
    patients : int
    releases : Counter of Release
    dataset : int
    divergence : float or None
        How far the numbers are from numbers with exact noise, for `grid.excess_delta`. None if no
        bound is known: for a charge of an earlier version, or noise that is rounded to no grid.
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
    divergence: float | None


class Plain(NamedTuple):
    """How often one run measured one set of patients for one purpose without noise.

    Attributes
    ----------
    run, app, purpose : str
        Purpose is the split of an evaluation.
    began : str
        UTC time of the first measurement.
    times : int
        Number of measurements.
    patients : int
    """

    run: str
    app: str
    purpose: str
    began: str
    times: int
    patients: int


class Ledger:
    """One SQLite file of one hospital, for all its runs and sets of patients.

    If two sets of patients share a patient, their releases add up. Of each patient the ledger
    stores a hash, under a key that only this file holds. It also stores the key by which the
    hospital's patients are split, what was measured without noise, and when each run began.

    Parameters
    ----------
    path : Path
    read_only : bool
        Open an existing file for reading only.
    create : bool
        If the file does not exist, make it, readable by its owner alone, and its folder.

    Raises
    ------
    InputError
        If the file does not exist and is not to be made, is no ledger, is damaged, or cannot be
        written.
    """

    def __init__(self, path: Path, read_only: bool = False, create: bool = True) -> None:
        self.path = path
        self._read_only = read_only
        with _as_input_error(path):
            if not path.exists():
                if read_only or not create:
                    raise InputError(
                        f"there is no ledger {path}: mend the path or the disk, or make a new one "
                        "(fedmed privacy --new)"
                    )
                self._create()
        with self._open() as connection:
            version = self._about(connection, "version")
            if version == _VERSION - 1 and not read_only:
                version = self._upgrade(connection)
        if type(version) is int:
            require_format(path, version, _VERSION)
        if version not in (_VERSION - 1, _VERSION):
            raise InputError(
                f"the ledger {path} has version {version}, this package reads versions "
                f"{_VERSION - 1} and {_VERSION}: use the version of fedmed-flower that wrote it"
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
        divergence: float | None = None,
    ) -> int:
        """Record releases before anything of them is computed.

        When this returns, the charge has reached the disk, and no kill or power failure removes
        it. `settle` later notes that the round ended.

        Parameters
        ----------
        patients : iterable of hashable
            All patients whose records may take part; a repeated patient counts once.
        release : Release
        count : int
            Number of such releases; at least 1.
        run : str
            One name for all rounds of a run, and for those after a restart.
        purpose : str
            ``train``, or the split of an evaluation; as `purpose_in_sums` if the noise is that of
            a sum.
        server_round : int
        app : str
            Name of the app, shown to whoever reads the ledger.
        run_limit : Limit, optional
            What this run may release about these patients.
        budget : Limit, optional
            What all runs together may release about any of these patients.
        divergence : float, optional
            How far the arithmetic takes all these numbers from numbers with exact noise (see
            `privacy.grid`). None if no bound is known.

        Returns
        -------
        int
            Number of the charge, for `settle`.

        Raises
        ------
        DeclinedError
            If a limit would be passed; then nothing is charged.
        InputError
            If a value is out of range or the ledger cannot be written.
        """
        require_release(*release)
        if count < 1:
            raise InputError(f"the number of releases must be at least 1, got {count}")
        if divergence is not None and not 0 <= divergence < math.inf:
            raise InputError(f"divergence must be at least 0 and finite, got {divergence}")
        with self._open() as connection:
            members, fingerprint, overlapping = self._find(connection, patients)
            self._store_budget(connection, budget)
            new = Counter({release: count})
            exceeded = self._exceeded(connection, overlapping, new, run, run_limit, budget)
            if exceeded is None:
                dataset = self._dataset(connection, members, fingerprint, overlapping)
                row = (
                    _now(),
                    run,
                    app,
                    purpose,
                    server_round,
                    dataset,
                    *map(float, release),
                    count,
                )
                cursor = connection.execute(
                    "INSERT INTO charges (time, run, app, purpose, round, dataset, sampling_rate, "
                    "noise_multiplier, releases) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    row,
                )
                charge = int(cursor.lastrowid or 0)
                if divergence is not None:
                    connection.execute("INSERT INTO rounding VALUES (?, ?)", (charge, divergence))
                return charge
        limit, epsilon = exceeded
        log.info(
            "declined: epsilon would come to %.3f at delta %g, above %g, %s",
            epsilon,
            limit.delta,
            limit.epsilon,
            limit.name,
        )
        # Raised after the commit, which stores the budget of a declined charge too. The message
        # has no number: from the budget one could work out what other runs have released.
        raise DeclinedError(f"{limit.name} would be passed")

    @staticmethod
    def _store_budget(connection: sqlite3.Connection, budget: Limit | None) -> None:
        """Replace the stored budget, which `budget` shows to whoever reads the ledger later."""
        connection.execute("DELETE FROM about WHERE key IN (?, ?)", _BUDGET)
        if budget is not None:
            rows = zip(_BUDGET, (budget.epsilon, budget.delta), strict=True)
            connection.executemany("INSERT INTO about VALUES (?, ?)", rows)

    def _exceeded(
        self,
        connection: sqlite3.Connection,
        datasets: set[int],
        new: Counter[Release],
        run: str,
        run_limit: Limit | None,
        budget: Limit | None,
    ) -> tuple[Limit, float] | None:
        """Return the first limit that `new` would exceed, and epsilon; None if it exceeds none.

        The limit of this run comes first, then that of all runs.
        """
        for limit, runs in ((run_limit, run), (budget, None)):
            if limit is not None:
                total = self._releases(connection, datasets, runs) + new
                epsilon = epsilon_of(total, limit.delta)
                if epsilon > limit.epsilon:
                    return limit, epsilon
        return None

    def settle(self, charge: int) -> None:
        """Note that the round of a charge came to its end; what it costs stays the same."""
        with self._open() as connection:
            connection.execute("UPDATE charges SET settled = 1 WHERE id = ?", (charge,))

    def released(
        self, patients: Iterable[Hashable], run: str | None = None, app: str | None = None
    ) -> Counter[Release]:
        """Return all releases about these patients; only those of `run` or `app` if it is given."""
        with self._open() as connection:
            _, _, overlapping = self._find(connection, patients)
            return self._releases(connection, overlapping, run, app)

    def split_key(self) -> bytes:
        """Return the key by which patients are split into train, val and test.

        The key is made together with the file and never again: under a new key, patients on whom
        an earlier run has trained would be measured by the next.

        Raises
        ------
        InputError
            If the file has no valid key.
        """
        with self._open() as connection:
            key = self._about(connection, _SPLIT_KEY)
        if not isinstance(key, bytes) or len(key) != _KEY_BYTES:
            raise InputError(
                f"the ledger {self.path} has no key by which patients are split: restore the file "
                "from a copy, or give each row its split in the hospital's table"
            )
        return key

    def has_trained(self, patients: Iterable[Hashable]) -> bool:
        """Return whether a run has trained with noise on any of these patients."""
        with self._open() as connection:
            _, _, overlapping = self._find(connection, patients)
            sets = ", ".join(map(str, overlapping))
            query = (
                "SELECT 1 FROM charges WHERE (purpose = ? OR purpose GLOB ?) "
                f"AND dataset IN ({sets}) LIMIT 1"
            )
            return connection.execute(query, (TRAIN, f"{TRAIN}, *")).fetchone() is not None

    def note_plain(
        self, patients: Iterable[Hashable], *, run: str, purpose: str, app: str = ""
    ) -> None:
        """Record, before it is done, that patients are measured without noise."""
        with self._open() as connection:
            members, fingerprint, overlapping = self._find(connection, patients)
            dataset = self._dataset(connection, members, fingerprint, overlapping)
            connection.execute(
                "INSERT INTO plain (time, run, app, purpose, dataset) VALUES (?, ?, ?, ?, ?)",
                (_now(), run, app, purpose, dataset),
            )

    def plain(self) -> list[Plain]:
        """Return what was measured without noise, oldest first."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT p.run, p.app, p.purpose, min(p.time), count(*), d.patients FROM plain p "
                "JOIN datasets d ON d.id = p.dataset GROUP BY p.run, p.purpose, p.dataset "
                "ORDER BY min(p.id)"
            ).fetchall()
        return [Plain(*row) for row in rows]

    def most_plain(self) -> int:
        """Return the largest number of times that one patient was measured without noise."""
        query = (
            "SELECT max(times) FROM (SELECT count(*) AS times FROM plain "
            "JOIN members USING (dataset) GROUP BY patient)"
        )
        with self._open() as connection:
            (most,) = connection.execute(query).fetchone()
        return int(most or 0)

    def begin_run(self, run: str, most: int) -> None:
        """Record when a run began; a run that is already recorded is left as it is.

        Raises
        ------
        DeclinedError
            If `most` other runs began within the last 24 hours; then this run is not recorded.
        """
        since = (datetime.now(UTC) - timedelta(days=1)).isoformat(timespec="seconds")
        with self._open() as connection:
            query = "SELECT count(*) FROM runs WHERE run = ?"
            if connection.execute(query, (run,)).fetchone()[0]:
                return
            query = "SELECT count(*) FROM runs WHERE time > ?"
            allowed = connection.execute(query, (since,)).fetchone()[0] < most
            if allowed:
                connection.execute("INSERT INTO runs VALUES (?, ?)", (run, _now()))
        if not allowed:
            raise DeclinedError(f"{most} runs have begun here within a day (most-runs-a-day)")

    def note_rows(self, run: str, rows: Iterable[str]) -> bool:
        """Record which rows a run uses; return whether it has used others before.

        Parameters
        ----------
        run : str
        rows : iterable of str
            A text for each row, in any order. Only a keyed hash of all is recorded.
        """
        name = f"rows of {run}"
        with self._open() as connection:
            key = self._about(connection, "key")
            digest = hashlib.blake2b("\n".join(sorted(rows)).encode(), key=key).digest()
            before = self._about(connection, name)
            if before != digest:
                connection.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, digest))
        return before not in (None, digest)

    def most(self, delta: float) -> float:
        """Return the highest epsilon of any patient, at `delta`."""
        query = "SELECT DISTINCT group_concat(dataset) FROM members GROUP BY patient"
        with self._open() as connection:
            together = [sets.split(",") for (sets,) in connection.execute(query)]
            totals = [self._releases(connection, sets) for sets in together]
        return max((epsilon_of(releases, delta) for releases in totals), default=0.0)

    def budget(self) -> Limit | None:
        """Return the hospital's budget as of the last charge or decline; None if it set none."""
        with self._open() as connection:
            epsilon, delta = (self._about(connection, key) for key in _BUDGET)
        return None if epsilon is None else Limit(epsilon, delta, "the hospital's privacy budget")

    def entries(self) -> list[Entry]:
        """Return what each run released, oldest first."""
        entries: dict[tuple[Any, ...], Entry] = {}
        with self._open() as connection:
            rows = connection.execute(
                "SELECT c.run, c.app, c.purpose, c.dataset, c.time, c.settled, c.sampling_rate, "
                "c.noise_multiplier, c.releases, d.patients, r.divergence FROM charges c "
                "JOIN datasets d ON d.id = c.dataset LEFT JOIN rounding r ON r.charge = c.id "
                "ORDER BY c.id"
            )
            for run, app, purpose, dataset, time, settled, *release, patients, divergence in rows:
                rate, noise, count = release
                key = (run, purpose, dataset)
                new = Entry(run, app, purpose, time, 0, 0, patients, Counter(), dataset, 0.0)
                before = entries.get(key, new)
                entries[key] = before._replace(
                    rounds=before.rounds + 1,
                    unsettled=before.unsettled + (not settled),
                    releases=before.releases + Counter({Release(rate, noise): count}),
                    divergence=_added(before.divergence, divergence),
                )
        return list(entries.values())

    def _create(self) -> None:
        """Write the whole file, then give it its name, so that an empty ledger is a damaged one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        try:
            with transaction(draft, "rwc", _SCHEMA, _VERSION) as connection:
                about = {"version": _VERSION, "key": secrets.token_bytes(_KEY_BYTES)}
                about[_SPLIT_KEY] = secrets.token_bytes(_KEY_BYTES)
                connection.executemany("INSERT INTO about VALUES (?, ?)", about.items())
            draft.chmod(0o600)
            give_name(draft, self.path)
        finally:
            draft.unlink(missing_ok=True)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with _as_input_error(self.path), ExitStack() as stack:
            mode = "ro" if self._read_only else "rw"
            try:
                connection = stack.enter_context(transaction(self.path, mode, _SCHEMA, _VERSION))
            except sqlite3.OperationalError as error:
                if mode == "rw" or error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
                    raise
                # A killed write must be rolled back before reading, here in a copy of the file.
                copy = Path(stack.enter_context(TemporaryDirectory())) / "ledger"
                for ending in ("", "-journal"):
                    shutil.copyfile(f"{self.path}{ending}", f"{copy}{ending}")
                connection = stack.enter_context(transaction(copy, "rw", _SCHEMA, _VERSION))
            if self._read_only:
                self._view_rounding(connection)
            yield connection

    @staticmethod
    def _upgrade(connection: sqlite3.Connection) -> int:
        """Give a ledger of the version before what it lacks; its charges stay as they are."""
        connection.execute(_ROUNDING)
        connection.execute("UPDATE about SET value = ? WHERE key = 'version'", (_VERSION,))
        connection.execute(f"PRAGMA user_version = {_VERSION}")
        return _VERSION

    @staticmethod
    def _view_rounding(connection: sqlite3.Connection) -> None:
        """Let a ledger of the version before, which must not be changed, look like a new one."""
        query = "SELECT count(*) FROM sqlite_master WHERE name = 'rounding'"
        if not connection.execute(query).fetchone()[0]:
            connection.execute(_ROUNDING.replace("TABLE", "TEMP TABLE"))

    def _find(
        self, connection: sqlite3.Connection, patients: Iterable[Hashable]
    ) -> tuple[list[bytes], str, set[int]]:
        """Return the patients' hashes, the hash of their set, and the sets that overlap with it."""
        key = self._about(connection, "key")
        texts = {patient_text(patient).encode() for patient in patients}
        members = sorted(hashlib.blake2b(text, key=key, digest_size=16).digest() for text in texts)
        if not members:
            raise InputError("a ledger needs at least one patient")
        fingerprint = hashlib.blake2b(b"".join(members), key=key).hexdigest()
        query = "SELECT other FROM overlaps JOIN datasets ON dataset = id WHERE fingerprint = ?"
        rows = connection.execute(query, (fingerprint,)).fetchall()
        if not rows:
            query = "SELECT dataset FROM members WHERE patient = ?"
            rows = [row for member in members for row in connection.execute(query, (member,))]
        return members, fingerprint, {dataset for (dataset,) in rows}

    @staticmethod
    def _dataset(
        connection: sqlite3.Connection,
        members: Collection[bytes],
        fingerprint: str,
        overlapping: set[int],
    ) -> int:
        """Return the number of a set of patients, under which it is stored if it is new."""
        query = "SELECT id FROM datasets WHERE fingerprint = ?"
        row = connection.execute(query, (fingerprint,)).fetchone()
        if row is not None:
            return int(row[0])
        query = "INSERT INTO datasets (fingerprint, patients) VALUES (?, ?)"
        dataset = int(connection.execute(query, (fingerprint, len(members))).lastrowid or 0)
        rows = ((member, dataset) for member in members)
        connection.executemany("INSERT INTO members VALUES (?, ?)", rows)
        pairs = {(dataset, dataset)}
        for other in overlapping:
            pairs |= {(dataset, other), (other, dataset)}
        connection.executemany("INSERT INTO overlaps VALUES (?, ?)", pairs)
        return dataset

    @staticmethod
    def _releases(
        connection: sqlite3.Connection,
        datasets: Iterable[object],
        run: str | None = None,
        app: str | None = None,
    ) -> Counter[Release]:
        """Add up the charges of some sets of patients."""
        rows = connection.execute(
            "SELECT sampling_rate, noise_multiplier, sum(releases) FROM charges "
            f"WHERE dataset IN ({', '.join(map(str, datasets))}) AND (? IS NULL OR run = ?) "
            "AND (? IS NULL OR app = ?) GROUP BY sampling_rate, noise_multiplier",
            (run, run, app, app),
        ).fetchall()
        return Counter({Release(rate, noise): int(count) for rate, noise, count in rows})

    @staticmethod
    def _about(connection: sqlite3.Connection, key: str) -> Any:
        row = connection.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]


@contextmanager
def transaction(path: Path, mode: str, schema: str, version: int) -> Iterator[sqlite3.Connection]:
    """Open one transaction, which reaches the disk as a whole or not at all.

    Parameters
    ----------
    path : Path
    mode : {"ro", "rw", "rwc"}
        SQLite's mode. With "rwc" the statements of `schema` are run on a new file.
    schema : str
        Statements that make tables and indexes, separated by semicolons.
    version : int
        The file's format, which is written into a new file.

    Raises
    ------
    sqlite3.Error
        If the file is damaged, or if it holds anything that `schema` does not make: in a
        stranger's file a view or a computed column could be read without end, and a trigger could
        write.
    InputError
        If the file is of a later format; on Windows.
    """
    require_posix()
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, timeout=_WAIT_SECONDS, isolation_level=None, uri=True)
    try:
        connection.execute("PRAGMA synchronous = EXTRA")
        # For macOS, where a plain sync reaches only the disk's cache.
        connection.execute("PRAGMA fullfsync = ON")
        connection.execute("BEGIN" if mode == "ro" else "BEGIN IMMEDIATE")
        # SQLite itself does not notice that a part of the last page is lost.
        query = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
        (size,) = connection.execute(query).fetchone()
        if mode != "rwc" and path.stat().st_size < max(size, 1):
            raise sqlite3.DatabaseError("the end of the file is missing")
        statements = [part.strip() for part in schema.split(";") if part.strip()]
        if mode == "rwc":
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version}")
        # Before the tables: a later format may have others. A file without it names its format in
        # a table alone.
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        require_format(path, max(found, 0), version)
        query = "SELECT sql, name FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"
        for sql, name in connection.execute(query).fetchall():
            if sql not in (*statements, _COUNTER):
                raise sqlite3.DatabaseError(f"it holds {name!r}, which fedmed-flower does not make")
        yield connection
        connection.execute("COMMIT")
    finally:
        connection.close()


def give_name(draft: Path, path: Path) -> None:
    """Rename `draft` to `path`, unless `path` was made in the meantime."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return
    except OSError:
        # Without hard links on this filesystem, a lock on the folder keeps others out.
        import fcntl

        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if not os.path.lexists(path):
                draft.rename(path)
        finally:
            os.close(folder)


@contextmanager
def _as_input_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise InputError(
            f"the privacy ledger {path} cannot be used ({error}): repair its folder or disk, or "
            "restore it from a copy; without it nobody knows what was released"
        ) from error


def _added(total: float | None, divergence: object) -> float | None:
    """Return the divergence of the charges of an entry with one more."""
    if total is None or divergence is None:
        return None
    if not isinstance(divergence, float) or not 0 <= divergence < math.inf:
        raise sqlite3.DatabaseError(f"it holds the divergence {divergence!r}")
    return total + divergence


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
