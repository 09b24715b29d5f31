"""Envelopes that one hospital alone can open, though the server carries them.

AES-GCM (Dworkin: Recommendation for Block Cipher Modes of Operation: Galois/Counter Mode, NIST SP
800-38D, https://doi.org/10.6028/NIST.SP.800-38D).
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedmed_flower.secure.encoding import SecureError

_NONCE_BYTES = 12
_TAG_BYTES = 16


def seal(key: bytes, header: bytes, content: bytes) -> bytes:
    """Return an envelope: a random nonce of 12 bytes, the content encrypted, a tag of 16 bytes.

    Parameters
    ----------
    key : bytes
        Of this round and direction, from `streams.envelope_key`.
    header : bytes
        What the content belongs to: digest of the round, sender, receiver. It is not sent: the
        receiver must know it.
    content : bytes
    """
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, header)


def unseal(key: bytes, header: bytes, sealed: bytes, sender: str) -> bytes:
    """Return what is in an envelope.

    Parameters
    ----------
    key, header : bytes
        As of `seal`.
    sealed : bytes
        The envelope.
    sender : str
        Who made it, for the error.

    Raises
    ------
    SecureError
        If it was changed on its way, or was made with another key or for another header.
    """
    if len(sealed) < _NONCE_BYTES + _TAG_BYTES:
        raise SecureError(f"the envelope from {sender} is too short: {len(sealed)} bytes")
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], header)
    except InvalidTag:
        raise SecureError(
            f"the envelope from {sender} does not open: it was changed on its way, or belongs to "
            "another round or another hospital"
        ) from None
