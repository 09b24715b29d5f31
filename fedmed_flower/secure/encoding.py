"""Values as canonical bytes, one way each, and their digests."""

from __future__ import annotations

import hashlib
import math
import struct
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.errors import InputError

# None, bool, int, float, str, bytes, and sequences and mappings (by str) of these.
Value = Any

_DEEPEST = 32
_NONE, _FALSE, _TRUE, _INT, _FLOAT, _TEXT, _BYTES, _LIST, _MAP = b"nftidsblm"


class SecureError(InputError):
    """Something in a secure exchange is not as it must be; the text names who and what."""


def encoded(value: Value) -> bytes:
    """Return the canonical bytes of a value.

    Each value is a letter for its type, the length of what follows in 8 bytes, and its bytes: whole
    numbers in decimal digits, floats in 8 bytes, texts in UTF-8 after NFC, mappings as pairs in the
    order of their keys' bytes. Values of other types have other bytes: 1, 1.0 and True are three.

    Raises
    ------
    InputError
        If the value is NaN, of another type, no Unicode, or a mapping with one key twice.
    """
    return b"".join(_pieces(value, 0))


def _pieces(value: Value, depth: int) -> list[bytes]:
    if depth > _DEEPEST:
        raise InputError(f"values may be nested at most {_DEEPEST} deep")
    if value is None:
        return _piece(_NONE, b"")
    if isinstance(value, bool | np.bool_):
        return _piece(_TRUE if value else _FALSE, b"")
    if isinstance(value, int | np.integer):
        return _piece(_INT, str(int(value)).encode())
    if isinstance(value, float | np.floating):
        if math.isnan(value):
            raise InputError("NaN has no canonical bytes")
        # Both zeros are equal.
        return _piece(_FLOAT, struct.pack(">d", float(value) + 0.0))
    if isinstance(value, str):
        try:
            return _piece(_TEXT, unicodedata.normalize("NFC", value).encode())
        except UnicodeEncodeError as error:
            raise InputError(f"a text that is no Unicode has no canonical bytes: {error}") from None
    if isinstance(value, bytes | bytearray | memoryview):
        return _piece(_BYTES, bytes(value))
    if isinstance(value, Mapping):
        pairs = {encoded(_text(key)): item for key, item in value.items()}
        if len(pairs) < len(value):
            raise InputError("two keys of a mapping are one text in NFC")
        inner = [piece for key in sorted(pairs) for piece in (key, *_pieces(pairs[key], depth + 1))]
        return _piece(_MAP, b"".join(inner))
    if isinstance(value, Sequence):
        return _piece(_LIST, b"".join(p for item in value for p in _pieces(item, depth + 1)))
    raise InputError(f"a value of type {type(value).__name__} has no canonical bytes")


def _text(key: object) -> str:
    if not isinstance(key, str):
        raise InputError(f"a key must be a text, got {key!r}")
    return key


def _piece(kind: int, content: bytes) -> list[bytes]:
    return [bytes([kind]), struct.pack(">Q", len(content)), content]


def decoded(data: bytes) -> Any:
    """Return the value of canonical bytes: lists and dicts for sequences and mappings.

    Raises
    ------
    SecureError
        If `encoded` would not have made these bytes.
    """
    try:
        value, rest = _value(memoryview(data), 0)
        sound = not len(rest) and encoded(value) == data
    except (ValueError, KeyError, TypeError, struct.error, IndexError) as error:
        raise SecureError(f"bytes that stand for no value: {error}") from None
    if not sound:
        raise SecureError("bytes that are not canonical")
    return value


def _value(data: memoryview, depth: int) -> tuple[Any, memoryview]:
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    kind = data[0]
    (length,) = struct.unpack(">Q", data[1:9])
    content, rest = data[9 : 9 + length], data[9 + length :]
    if len(content) != length:
        raise ValueError("they end too early")
    if kind in (_LIST, _MAP):
        items = []
        while len(content):
            item, content = _value(content, depth + 1)
            items.append(item)
        if kind == _LIST:
            return items, rest
        return dict(zip(items[::2], items[1::2], strict=True)), rest
    return _scalar(kind, bytes(content)), rest


def _scalar(kind: int, content: bytes) -> Any:
    if kind == _INT:
        return int(content.decode("ascii"))
    if kind == _FLOAT:
        return struct.unpack(">d", content)[0]
    if kind == _TEXT:
        return content.decode()
    if kind == _BYTES:
        return content
    return {_NONE: None, _FALSE: False, _TRUE: True}[kind]


def digest(value: Value) -> bytes:
    """Return the SHA-512/256 of a value's canonical bytes: 32 bytes."""
    return hashlib.new("sha512_256", encoded(value)).digest()


def digest_of_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the digest of arrays: of their names, types, shapes and bytes, in any order.

    The bytes of each stand in it by their SHA-256, for which processors have an instruction: over a
    model it takes half the time of SHA-512/256. Its length is fixed and the outer digest tells
    arrays apart, so that only a collision of SHA-256 itself could make two alike.
    """
    content = {}
    for name, array in arrays.items():
        whole = np.ascontiguousarray(array)
        flat = whole.reshape(-1).view(np.uint8).data if whole.size else b""
        inside = hashlib.sha256(flat).digest()
        content[name] = [whole.dtype.str, list(np.shape(array)), inside]
    return digest(content)
