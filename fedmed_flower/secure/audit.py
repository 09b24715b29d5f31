"""Audit trails: what a hospital or a server was told and did, as a file of signed lines.

A trail is a hash chain (Haber and Stornetta: How to Time-Stamp a Digital Document, Journal of
Cryptology 3, 1991). The head of an entry is the SHA-512/256 of its number, kind, content and the
head before it, and is signed. A line that is changed, removed, added or moved later is found by
anybody. The owner of the key could rewrite its trail from some line on; the others find that, since
heads travel: a head that they were told is then no longer in the trail.

What the entries of a sum hold; every digest is text, and other fields may stand beside these:

========  ========================================================================================
kind      fields
========  ========================================================================================
key       who, role, public: the key that signs from here on; nonce, so that no two trails begin
          alike. The trail writes it itself
hello     run, key: the key of this run
sent      run, round, purpose, digest (of all that decides the answer), names; model (its digest)
          and question (the digest of what is asked, whoever is asked, in whichever round) where
          there are; group, if a group of the study is summed by itself. A server writes it before
          it sends, a hospital when it was told
masked    run, round, digest, masked: the digest of what a hospital sends, before it leaves
opened    run, round, digest, members: the set that a sum is opened over
model     run, round, model: the digest of the server's model after the round
========  ========================================================================================

Any entry may hold ``heads``, which maps other hospitals to the last heads that they told.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fedmed_flower.errors import InputError, shown
from fedmed_flower.files import MALFORMED, MOST_TEXT, open_file, require_posix
from fedmed_flower.secure.encoding import SecureError, Value, digest
from fedmed_flower.secure.identity import Identity, key_of, key_text
from fedmed_flower.secure.identity import verify as verify_signature

# Name of the trail in a run folder.
AUDIT = "audit.jsonl"
HOSPITAL = "hospital"
SERVER = "server"
KEY = "key"
# The head of a trail without entries.
START = bytes(32)

_LABEL = "head"
_FIELDS: dict[str, dict[str, type]] = {
    KEY: {"who": str, "role": str, "public": str, "nonce": str},
    "hello": {"run": str, "key": str},
    "sent": {"run": str, "round": int, "purpose": str, "digest": str, "names": list},
    "masked": {"run": str, "round": int, "digest": str, "masked": str},
    "opened": {"run": str, "round": int, "digest": str, "members": list},
    "model": {"run": str, "round": int, "model": str},
}
# Fields that may be left out, in any entry.
_OPTIONAL: dict[str, type] = {"model": str, "question": str, "heads": dict, "group": str}
_WORDS = {str: "a text", int: "a whole number", list: "a list of texts", dict: "a dict of texts"}
_SIGNATURE_BYTES = 64
_NONCE_BYTES = 16
# Bytes of a line: heads of 255 hospitals with long names are a fifth of it.
_MOST_LINE = 1 << 18
_MOST_DEEP = 16
_MOST_INT = 1 << 63
# Lines of one trail that are named as wrong.
_MOST_FAULTS = 50


class Entry(NamedTuple):
    """One line of a trail.

    Attributes
    ----------
    number : int
        From 1, without gaps.
    kind : str
    about : dict
        Texts, numbers, and lists and dicts of these.
    previous : bytes
        Head of the entry before; `START` for the first.
    head : bytes
        32 bytes.
    signature : bytes
        Of the head, by the owner's Ed25519 key.
    """

    number: int
    kind: str
    about: dict[str, Any]
    previous: bytes
    head: bytes
    signature: bytes

    def expected_head(self) -> bytes:
        """Return the digest of number, kind, content and the head before."""
        return digest([self.number, self.kind, self.about, self.previous])

    def is_signed_by(self, public: bytes) -> bool:
        """Return whether the head is signed by a key."""
        try:
            verify_signature(public, _LABEL, self.head, self.signature, "an audit trail")
        except SecureError:
            return False
        return True

    def line(self) -> bytes:
        """Return the entry as a line of JSON, without its end; there is one way to write it."""
        fields = {
            "number": self.number,
            "kind": self.kind,
            "about": self.about,
            "previous": self.previous.hex(),
            "head": self.head.hex(),
            "signature": self.signature.hex(),
        }
        return json.dumps(fields, separators=(",", ":")).encode("ascii")


class Chain:
    """The trail of one owner, to which entries are added.

    Several processes may add to one file. An entry is on the disk before its head is returned. If
    a process is killed while it writes, the unfinished line is removed by the next `append`: nobody
    was told its head.

    Parameters
    ----------
    path : Path
        Made by the first `append`, readable by its owner alone.
    identity : Identity or None
        A hospital's. With None the trail is a server's: it makes a key that this object alone has.
    who : str
        Whose trail it is, such as the hospital's name.
    """

    def __init__(self, path: Path, identity: Identity | None, who: str) -> None:
        require_posix()
        self.path = path
        self.who = who
        self._role = SERVER if identity is None else HOSPITAL
        self._identity = identity or Identity.simulated(who, secrets.token_hex(32))

    @property
    def head(self) -> bytes:
        """The head of the last entry, 32 bytes; `START` if there is none.

        Raises
        ------
        SecureError
            If the last line was changed.
        InputError
            If the file cannot be read.
        """
        if not self.path.exists():
            return START
        with self._locked() as descriptor:
            last = self._end(descriptor).last
        return START if last is None else last.head

    def append(self, kind: str, about: Mapping[str, Value]) -> bytes:
        """Add an entry and return its head.

        Parameters
        ----------
        kind : str
            One of those in this module's table, whose fields are checked, or another.
        about : mapping
            Texts, whole numbers of 64 bits, finite floats, bytes, which become hex, and lists and
            dicts of these. Nothing from which a patient or a small figure could be guessed, not
            even its digest.

        Raises
        ------
        InputError
            If `about` holds anything else, or the file cannot be written or would get too large.
        SecureError
            If the last line was changed.
        """
        if kind == KEY:
            raise InputError(f"a trail writes entries of kind {KEY!r} itself: use another kind")
        plain = _plain_about(kind, about)
        with self._locked() as descriptor:
            end = self._end(descriptor)
            new: list[Entry] = []
            if end.last is None or not end.last.is_signed_by(self._identity.public):
                new.append(self._entry(end.last, KEY, self._key()))
            new.append(self._entry(new[-1] if new else end.last, kind, plain))
            lines = b"".join(entry.line() + b"\n" for entry in new)
            if end.size + len(lines) > MOST_TEXT:
                raise InputError(
                    f"the audit trail {self.path} has {end.size:,} bytes, and can have at most "
                    f"{MOST_TEXT:,}: keep it, and let a new one begin in another folder"
                )
            os.ftruncate(descriptor, end.size)
            _write(descriptor, lines if end.is_closed else b"\n" + lines)
            if end.last is None:
                _sync_folder(self.path.parent)
        return new[-1].head

    @classmethod
    def read(cls, path: Path) -> list[Entry]:
        """Return the entries of a file, without an unfinished last line. They are not verified.

        Raises
        ------
        SecureError
            If a line is no entry.
        InputError
            If the file cannot be read.
        """
        entries = []
        for line, entry in enumerate(read_trail(path).entries, start=1):
            if entry is None:
                raise SecureError(_no_entry(line, str(path)))
            entries.append(entry)
        return entries

    def _key(self) -> dict[str, Any]:
        key = {
            "who": self.who,
            "role": self._role,
            "public": key_text(self._identity.public),
            "nonce": secrets.token_bytes(_NONCE_BYTES),
        }
        return _plain_about(KEY, key)

    def _entry(self, last: Entry | None, kind: str, about: dict[str, Any]) -> Entry:
        number = 1 if last is None else last.number + 1
        entry = Entry(number, kind, about, START if last is None else last.head, b"", b"")
        head = entry.expected_head()
        entry = entry._replace(head=head, signature=self._identity.sign(_LABEL, head))
        size = len(entry.line())
        if size >= _MOST_LINE:
            raise InputError(
                f"an entry of the audit trail {self.path} must have less than {_MOST_LINE:,} "
                f"bytes, got {size:,} for kind {kind!r}: write a digest of what it is about"
            )
        return entry

    def _end(self, descriptor: int) -> _End:
        """Return how the file ends; nothing but its last lines is read."""
        size = os.fstat(descriptor).st_size
        start = max(0, size - 2 * _MOST_LINE)
        data = os.pread(descriptor, size - start, start)
        tail = data[data.rfind(b"\n") + 1 :]
        if _is_torn(tail):
            data = data[: len(data) - len(tail)]
        if not data and start == 0:
            return _End(None, start, is_closed=True)
        last = _entry_of(data.removesuffix(b"\n").rpartition(b"\n")[2])
        if last is None or last.head != last.expected_head():
            raise SecureError(
                f"the last line of the audit trail {self.path} was changed: keep the file for an "
                "audit, and put back a copy, or let a new trail begin in another folder"
            )
        return _End(last, start + len(data), data.endswith(b"\n"))

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Yield the descriptor of the file, which no other process reads or writes meanwhile."""
        import fcntl

        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, flags, 0o600)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise OSError(None, "it is no file")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(
                f"the audit trail {self.path} cannot be used ({error.strerror}): repair its folder "
                "or disk"
            ) from error


class _End(NamedTuple):
    """How a file ends: its last entry, the bytes up to there, whether they end a line."""

    last: Entry | None
    size: int
    is_closed: bool


class Trail(NamedTuple):
    """The lines of a file.

    Attributes
    ----------
    entries : list of Entry or None
        None for a line that is no entry.
    unfinished : bool
        Whether the last line, which is left out, is unfinished, as after a kill.
    """

    entries: list[Entry | None]
    unfinished: bool


def read_trail(path: Path) -> Trail:
    """Read a file that may be damaged, or no trail at all: it ends with the 50th such line.

    Raises
    ------
    InputError
        If the file cannot be read.
    """
    entries: list[Entry | None] = []
    wrong = 0
    try:
        with open_file(path.parent, path.name, MOST_TEXT) as file:
            while wrong < _MOST_FAULTS and (line := file.readline(_MOST_LINE)):
                if len(line) < _MOST_LINE and not line.endswith(b"\n") and _is_torn(line):
                    return Trail(entries, unfinished=True)
                entries.append(_entry_of(line.removesuffix(b"\n")))
                wrong += entries[-1] is None
    except OSError as error:
        raise InputError(
            f"the audit trail {path} cannot be read ({error.strerror}): give a trail, or a folder "
            "with one"
        ) from error
    return Trail(entries, unfinished=False)


def _is_torn(tail: bytes) -> bool:
    """Return whether a line without an end is the beginning of one: it holds no whole object."""
    try:
        json.JSONDecoder().raw_decode(tail.decode("latin-1"))
    except (ValueError, RecursionError):
        return bool(tail)
    return False


def _entry_of(line: bytes) -> Entry | None:
    """Return the entry of a line, None if `Entry.line` would not have written it so."""
    try:
        fields = json.loads(line.decode("ascii"))
        entry = Entry(
            fields["number"],
            fields["kind"],
            _plain_about(fields["kind"], fields["about"]),
            *(bytes.fromhex(fields[name]) for name in ("previous", "head", "signature")),
        )
        sizes = (len(entry.previous), len(entry.head), len(entry.signature))
        sound = (
            type(entry.number) is int
            and sizes == (len(START), len(START), _SIGNATURE_BYTES)
            and entry.line() == line
        )
    except MALFORMED:
        return None
    return entry if sound else None


def _plain_about(kind: str, about: Mapping[str, Value]) -> dict[str, Any]:
    """Return what an entry is about as it is written, or refuse it."""
    if not isinstance(kind, str) or not isinstance(about, Mapping):
        raise InputError(f"an entry must have a kind and a mapping, got {kind!r} and {about!r}")
    if _plain_text(kind, "kind") != kind:
        raise InputError(f"kind of an entry must be in the Unicode normal form NFC, got {kind!r}")
    plain: dict[str, Any] = _plain(about, kind, 0)
    required = _FIELDS.get(kind, {})
    for name, wanted in (_OPTIONAL | required).items():
        if name not in plain and name not in required:
            continue
        value = plain.get(name)
        if not _fits(value, wanted):
            raise InputError(
                f"{name} of an entry of kind {kind!r} must be {_WORDS[wanted]}, got {value!r}"
            )
    return plain


def _fits(value: object, wanted: type) -> bool:
    """Return whether a value is of a type, and holds texts if it is a list or a dict."""
    if not isinstance(value, wanted):
        return False
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(isinstance(text, str) for text in inner)


def _plain(value: Value, name: str, deep: int) -> Any:
    """Return a value as JSON holds it: one way to write what has the same canonical bytes."""
    if deep > _MOST_DEEP:
        raise InputError(f"{name} of an entry must be at most {_MOST_DEEP} deep")
    if isinstance(value, str):
        return _plain_text(value, name)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, int) and not isinstance(value, bool) and -_MOST_INT <= value < _MOST_INT:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        # Both zeros are equal.
        return float(value) + 0.0
    if isinstance(value, list | tuple):
        return [_plain(item, name, deep + 1) for item in value]
    if isinstance(value, Mapping):
        plain = {}
        for key, item in value.items():
            if not isinstance(key, str) or _plain_text(key, name) in plain:
                raise InputError(f"{name} of an entry must have texts as keys, each once: {key!r}")
            plain[_plain_text(key, name)] = _plain(item, key, deep + 1)
        return dict(sorted(plain.items()))
    raise InputError(
        f"{name} of an entry must be a text, a whole number of 64 bits, a finite float, bytes, or "
        f"a list or dict of these, got {shown(repr(value), 100)} of type {type(value).__name__}"
    )


def _plain_text(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} of an entry is no text: {text!r}") from None
    return unicodedata.normalize("NFC", text)


def _write(descriptor: int, data: bytes) -> None:
    """Write all of it to the disk."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_entry(line: int, where: str) -> str:
    return f"line {line} of {where} was changed: it is no entry of an audit trail"


def verify(
    entries: Sequence[Entry | None], where: str = "the audit trail", keys: Collection[bytes] = ()
) -> None:
    """Verify one trail in itself.

    Parameters
    ----------
    entries, where, keys
        As in `faults`.

    Raises
    ------
    SecureError
        If anything in it was changed. The text names the first such line.
    """
    for fault in faults(entries, where, keys):
        raise SecureError(fault)


def faults(entries: Sequence[Entry | None], where: str, keys: Collection[bytes] = ()) -> list[str]:
    """Return what is wrong with one trail in itself: changed, missing, added, moved lines.

    Parameters
    ----------
    entries : sequence of Entry or None
        All lines of the file; None is one that is no entry.
    where : str
        Name of the file in the texts.
    keys : collection of bytes
        The owner's Ed25519 keys, as those know them who compare. If none is given, the keys that
        the trail itself names are believed: it is then whole, and could be anybody's.

    Returns
    -------
    list of str
        A text for each wrong line, at most 51.
    """
    if not entries:
        return [f"{where} has no entry: its lines were removed"]
    check = _Check(where, keys)
    found: list[str] = []
    for line, entry in enumerate(entries, start=1):
        fault = check.fault(line, entry)
        if fault is not None:
            found.append(fault)
        if len(found) == _MOST_FAULTS:
            return [*found, f"more lines of {where} may be wrong: the first {line} were read"]
    return found


class _Check:
    """What is known of a trail after some of its lines."""

    def __init__(self, where: str, keys: Collection[bytes]) -> None:
        self._where = where
        self._keys = keys
        self._signers = list(keys)
        self._expected = 1
        self._heads = {0: START}

    def fault(self, line: int, entry: Entry | None) -> str | None:
        """Return what is wrong with the next line."""
        if entry is None:
            self._expected += 1
            return _no_entry(line, self._where)
        expected = self._expected
        previous = self._heads.get(entry.number - 1)
        self._expected = max(expected, entry.number + 1)
        self._heads[entry.number] = entry.head
        name = f"line {line} of {self._where}"
        if entry.head != entry.expected_head():
            return f"{name} was changed: it is not what its head was made of"
        if entry.number > expected:
            missing = entry.number - expected
            return (
                f"before {name} {missing} {'entry is' if missing == 1 else 'entries are'} missing: "
                f"it holds entry {entry.number} where entry {expected} must stand"
            )
        if entry.number < expected:
            return (
                f"{name} was added or moved: it holds entry {entry.number} where entry {expected} "
                "must stand"
            )
        if previous is not None and entry.previous != previous:
            return f"{name} does not follow the line before, which was changed or replaced"
        return self._signature_fault(name, entry)

    def _signature_fault(self, name: str, entry: Entry) -> str | None:
        if entry.kind == KEY:
            text = entry.about["public"]
            try:
                public = key_of(text)
            except InputError as error:
                return f"{name} names no key: {error}"
            self._signers = [public]
            if self._keys and public not in self._keys:
                return (
                    f"{name} goes on with the key {shown(text, 100)}, which is not one that was "
                    f"given for {entry.about['who']}"
                )
        elif not self._signers:
            # Where the beginning is missing, its number has said so.
            return f"{name} names no key, as the first line must" if entry.number == 1 else None
        if not any(entry.is_signed_by(public) for public in self._signers):
            return f"{name} has a wrong signature: it was not written with the key of its owner"
        return None
