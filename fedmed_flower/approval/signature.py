"""A consortium's signature inside an app bundle: who vouches for all its other files.

It stands in a file of the app's folder, since Flower carries nothing beside a bundle. What is
signed are app, version, and the SHA-256 of each other file by its name.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import tomllib
from pathlib import Path
from typing import NamedTuple

import tomli_w

from fedmed_flower.approval.bundle import Bundle, bundle_at
from fedmed_flower.errors import InputError
from fedmed_flower.files import write_atomic
from fedmed_flower.secure.encoding import encoded
from fedmed_flower.secure.identity import Identity, key_of, key_text, verify

SIGNATURE = "fedmed-signature.toml"
_LABEL = "app bundle"
_FORMAT = 1
_HEADING = "# Written by `fedmed sign`. A change of any other file makes it void.\n"


class Signed(NamedTuple):
    """Who has signed a bundle: the public key, 32 bytes, and the name that it gives itself."""

    public: bytes
    name: str


def sign(folder: Path, identity: Identity) -> Bundle:
    """Sign an app's folder: write the file that vouches for the bundle of it.

    Returns
    -------
    Bundle
        With the signature in it.

    Raises
    ------
    InputError
        If the folder is no app, or the file cannot be written.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give the folder of a Flower app")
    bundle, _ = bundle_at(folder)
    signature = identity.sign(_LABEL, _signed_of(bundle))
    table = {
        "format": _FORMAT,
        "signer": identity.name,
        "public-key": key_text(identity.public),
        "signature": base64.b64encode(signature).decode(),
    }
    try:
        write_atomic(folder / SIGNATURE, (_HEADING + tomli_w.dumps(table)).encode())
    except OSError as error:
        raise InputError(f"{folder / SIGNATURE} cannot be written: {error.strerror}") from None
    signed, _ = bundle_at(folder)
    if signature_of(signed) is None:
        raise InputError(
            f"the bundle of {folder} leaves {SIGNATURE} out: take it out of .gitignore and of "
            "fab-exclude, and name it in fab-include if that is there"
        )
    return signed


def signature_of(bundle: Bundle) -> Signed | None:
    """Return who has signed a bundle; None if it holds no signature.

    Raises
    ------
    InputError
        If a signature is there and does not hold.
    """
    content = bundle.files.get(SIGNATURE)
    if content is None:
        return None
    try:
        table = tomllib.loads(content.decode())
        if {*table} != {"format", "signer", "public-key", "signature"}:
            raise InputError("it must hold format, signer, public-key and signature")
        if table["format"] != _FORMAT or not all(
            isinstance(table[key], str) for key in ("signer", "public-key", "signature")
        ):
            raise InputError(f"format must be {_FORMAT} and all else a text")
        public = key_of(table["public-key"])
        signature = base64.b64decode(table["signature"], validate=True)
        verify(public, _LABEL, _signed_of(bundle), signature, str(table["signer"]))
    except (ValueError, RecursionError, binascii.Error) as error:
        raise InputError(f"{SIGNATURE} of the bundle does not hold: {error}") from None
    return Signed(public, table["signer"])


def _signed_of(bundle: Bundle) -> bytes:
    files = {
        name: hashlib.sha256(content).digest()
        for name, content in bundle.files.items()
        if name != SIGNATURE
    }
    return encoded({"app": bundle.app, "version": bundle.version, "files": files})
