"""A hospital's long-term key: its file, its signatures, and how a public key is written."""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
import shlex
import tomllib
import unicodedata
from pathlib import Path
from typing import Any

import tomli_w
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedmed_flower.errors import InputError
from fedmed_flower.files import open_file, replacing, require_format
from fedmed_flower.secure.encoding import SecureError, Value, digest, encoded
from fedmed_flower.secure.streams import LABEL

KEY_BYTES = 32
MOST_NAME = 64
_KIND = "ed25519:"
_FORMAT = 1
_FIELDS = ("format", "name", "id", "private")
_ID = re.compile(r"[0-9a-f]{32}")
_MOST_BYTES = 1 << 20
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
# 160 bits: nobody finds two keys, or two studies, that have the same letters.
_FINGERPRINT_LETTERS = 32


class Identity:
    """A hospital's long-term Ed25519 key, with which it signs what it says in secure sums.

    Parameters
    ----------
    name : str
        The hospital's name in the study.
    private : Ed25519PrivateKey
        The secret key.
    identity_id : str
        32 hexadecimal digits.

    Attributes
    ----------
    name : str
        The hospital's name in the study.
    public : bytes
        The public key, 32 bytes.
    id : str
        A random number that key file and book share; it stays when the key is changed.

    Raises
    ------
    InputError
        If the name cannot be one of a member, or the id is malformed.
    """

    def __init__(self, name: str, private: Ed25519PrivateKey, identity_id: str) -> None:
        require_name(name, "a hospital's name")
        if not _ID.fullmatch(identity_id):
            raise InputError(f"id must be 32 hexadecimal digits, got {identity_id!r}")
        self.name = name
        self.public = private.public_key().public_bytes_raw()
        self.id = identity_id
        self._private = private

    def __repr__(self) -> str:
        return f"Identity(name={self.name!r}, public={key_text(self.public)!r})"

    @classmethod
    def create(cls, path: Path, name: str) -> Identity:
        """Make a new key and write its file, which its owner alone can read.

        Raises
        ------
        InputError
            If there is such a file already, it cannot be written, or the name is not allowed.
        """
        identity = cls(name, Ed25519PrivateKey.generate(), secrets.token_hex(16))
        _write_new(path, identity._file(), "give the new key another file, or use fedmed keys show")
        return identity

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read a key file.

        Raises
        ------
        InputError
            If the file cannot be read, others than its owner can read it, or it is malformed.
        FormatError
            If it was written by a later version of this package.
        """
        table, mode = read_toml(path, "a hospital's key is made by fedmed keys new")
        require_private(path, mode)
        require_format(path, table.get("format", 0), _FORMAT)
        try:
            return cls._of_table(table)
        except InputError as error:
            raise InputError(
                f"{path} is no key file ({error}): restore it from a copy, or give the file that "
                "fedmed keys new has made"
            ) from None

    @classmethod
    def _of_table(cls, table: dict[str, Any]) -> Identity:
        if {*table} != {*_FIELDS}:
            raise InputError(f"it must hold {', '.join(_FIELDS)}, and nothing else")
        for field in ("name", "id", "private"):
            if not isinstance(table[field], str):
                raise InputError(f"{field} must be a text")
        try:
            private = serialization.load_pem_private_key(table["private"].encode(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            # The library's own text could repeat a part of the key.
            raise InputError("private is no PEM of a private key without a password") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise InputError("private is not an Ed25519 key")
        return cls(table["name"], private, table["id"])

    @classmethod
    def rotate(cls, path: Path) -> tuple[Identity, Path]:
        """Put a new key in the place of the old one; name and id stay.

        Returns
        -------
        identity : Identity
            The new key.
        old : Path
            Where the old key is kept, beside the new one.

        Raises
        ------
        InputError
            As in `load`, and if a file cannot be written.
        """
        before = cls.load(path)
        real = Path(os.path.realpath(path))
        letters = base64.urlsafe_b64encode(before.public).decode()[:8]
        old = path.with_name(f"{path.name}.old-{letters}")
        kept = real.with_name(old.name)
        # After a crash between the two writes the old key is there already.
        if not kept.exists() or cls.load(kept).public != before.public:
            _write_new(kept, before._file(), "move that file away")
        identity = cls(before.name, Ed25519PrivateKey.generate(), before.id)
        write_whole(real, identity._file(), private=True)
        return identity, old

    @classmethod
    def simulated(cls, name: str, run: str) -> Identity:
        """Return a key that follows from two texts, for simulations on one machine.

        Anybody can compute it: it protects nothing, and no file of it is ever written. The id is
        the same in each run, as a real hospital's is, so that its book serves all of them.
        """
        seed = digest([LABEL, "simulated", run, name])
        private = Ed25519PrivateKey.from_private_bytes(seed)
        return cls(name, private, digest([LABEL, "simulated id", name]).hex()[:32])

    def sign(self, label: str, content: bytes) -> bytes:
        """Return the signature, 64 bytes, over a content under a label.

        Parameters
        ----------
        label : str
            What is signed, such as "hello". A signature under one label is none under another.
        content : bytes
            Any bytes.
        """
        return self._private.sign(_signed(label, content))

    def _file(self) -> bytes:
        private = self._private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        table = {"format": _FORMAT, "name": self.name, "id": self.id, "private": private.decode()}
        heading = "# The secret key of a hospital. It never leaves this machine.\n"
        return (heading + tomli_w.dumps(table, multiline_strings=True)).encode()


def verify(public: bytes, label: str, content: bytes, signature: bytes, who: str) -> None:
    """Refuse a signature that does not hold.

    Parameters
    ----------
    public : bytes
        The public key of the one who is said to have signed, 32 bytes.
    label : str
        As in `Identity.sign`.
    content : bytes
        What is said to be signed.
    signature : bytes
        64 bytes.
    who : str
        Whose signature it is said to be.

    Raises
    ------
    SecureError
        If the signature does not hold, or something is malformed; the text names `who`.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
        key.verify(signature, _signed(label, content))
    except (InvalidSignature, ValueError, TypeError):
        raise SecureError(
            f"the signature of {who} ({label}) does not hold under the key that is pinned for it: "
            "the message was changed, or the key was; compare fedmed keys show by phone"
        ) from None


def _signed(label: str, content: bytes) -> bytes:
    value: Value = (LABEL, label, content)
    return encoded(value)


def key_text(public: bytes) -> str:
    """Return a public key as text: "ed25519:" and base64.

    Examples
    --------
    >>> key_text(bytes(32))
    'ed25519:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA='
    """
    return _KIND + base64.b64encode(public).decode()


def key_of(text: str) -> bytes:
    """Return the public key, 32 bytes, of a text of `key_text`.

    Raises
    ------
    InputError
        If the text is none of `key_text`.
    """
    try:
        public = base64.b64decode(text.removeprefix(_KIND), validate=True)
    except (binascii.Error, ValueError):
        public = b""
    if len(public) != KEY_BYTES or key_text(public) != text:
        raise InputError(
            f"a public key must be {_KIND} and 44 letters of base64, as fedmed keys show prints "
            f"it, got {text!r}"
        )
    return public


def fingerprint(content: Value) -> str:
    """Return 32 letters and digits in groups of four, to compare by phone.

    Parameters
    ----------
    content : bytes or other value
        A public key, or any value with canonical bytes.

    Examples
    --------
    >>> fingerprint(bytes(32))
    'DRIH QPCO PMBK EJJA KP6E YK2G K7CV BSNS'
    """
    letters = base64.b32encode(digest([LABEL, "fingerprint", content])).decode()
    starts = range(0, _FINGERPRINT_LETTERS, 4)
    return " ".join(letters[start : start + 4] for start in starts)


def require_name(name: object, what: str) -> None:
    """Refuse a name that could be written or shown in two ways.

    Parameters
    ----------
    name : object
        At most 64 bytes of UTF-8, in the normal form NFC, without control characters or blanks at
        its ends.
    what : str
        Of what it is the name, for the error.

    Raises
    ------
    InputError
        If the name is another one.
    """
    if not isinstance(name, str) or not name:
        raise InputError(f"{what} must be a text of at least one letter, got {name!r}")
    # Lone surrogates have no UTF-8; they are not printable.
    if not name.isprintable() or name != name.strip():
        raise InputError(
            f"{what} must have no control characters and no blanks at its ends, got {name!r}"
        )
    if len(name.encode()) > MOST_NAME:
        raise InputError(
            f"{what} must have at most {MOST_NAME} bytes, got {len(name.encode())}: {name}"
        )
    if unicodedata.normalize("NFC", name) != name:
        raise InputError(
            f"{what} must be in the Unicode normal form NFC, got {name!r}: type its accented "
            "letters as one character each"
        )


def read_toml(path: Path, remedy: str) -> tuple[dict[str, Any], int]:
    """Return what a TOML file holds, and its mode.

    Parameters
    ----------
    path : Path
        May be reached through links.
    remedy : str
        What to do if it cannot be read, as the end of the error.

    Raises
    ------
    InputError
        If the file cannot be read, or is no TOML.
    """
    real = Path(os.path.realpath(path))
    try:
        with open_file(real.parent, real.name, _MOST_BYTES) as file:
            mode = os.fstat(file.fileno()).st_mode
            return tomllib.loads(file.read(_MOST_BYTES).decode()), mode
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else f"not valid TOML: {error}"
        raise InputError(f"{path} cannot be read ({reason}): {remedy}") from None


def require_private(path: Path, mode: int) -> None:
    """Refuse a file with secrets that others than its owner can read or write.

    Raises
    ------
    InputError
        With the command that mends it.
    """
    if mode & 0o077:
        raise InputError(
            f"{path} holds secrets and has the mode {mode & 0o777:03o}, so others on this machine "
            f"can use it: chmod 600 {shlex.quote(str(path))}"
        )


def write_whole(path: Path, data: bytes, private: bool) -> None:
    """Replace a file, or make it, so that a crash leaves no part of it.

    Parameters
    ----------
    path : Path
        The file.
    data : bytes
        What it shall hold.
    private : bool
        Whether its owner alone can read it (mode 600); else all can (644).

    Raises
    ------
    InputError
        If it cannot be written.
    """
    mode = 0o600 if private else 0o644
    try:
        with replacing(path) as temporary:
            # The mode is there before the first byte is.
            descriptor = os.open(temporary, _NEW_FILE, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): give a file in a folder of your own"
        ) from None


def _write_new(path: Path, data: bytes, remedy: str) -> None:
    """Write a private file that must not be there yet."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, _NEW_FILE, 0o600))
    except OSError as error:
        if os.path.lexists(path):
            raise InputError(f"{path} exists already: {remedy}") from None
        raise InputError(
            f"{path} cannot be written ({error.strerror}): give a file in a folder of your own"
        ) from None
    try:
        write_whole(path, data, private=True)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
