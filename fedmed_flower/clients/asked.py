"""What a message asks of a secure sum: what must not be asked, and all that decides the answer."""

from __future__ import annotations

import inspect
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType

from fedmed_flower.arrays.views import view
from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.secure.encoding import SecureError, Value, digest_of_arrays, encoded
from fedmed_flower.secure.parts import CLIPPED, LOSS, MODEL, ONES
from fedmed_flower.secure.record import DATA, TRAIN, Record
from fedmed_flower.secure.ring import COUNT, REAL
from fedmed_flower.wire import (
    COMPRESSION,
    KEEP,
    KEEP_SENT,
    LEDGER_DIR,
    METHOD,
    OWN,
    RUN_KEY,
    SECURE,
    SERVER_ROUND,
)

# Entries of a message's config by which a hospital uses what it has kept, and methods without that.
_WITH_STATE = (KEEP, KEEP_SENT, OWN, COMPRESSION)
_STATELESS = ("", "fedprox")
# What differs from one run or round to the next, and does not make another question.
_OF_THE_RUN = (RUN_KEY, SERVER_ROUND, LEDGER_DIR)
_OF_THE_SERVER = ("run-dir", "resume", "round-timeout", "quorum", "grace", "track", "baselines")


def require_kind(record: Record, message_type: str) -> None:
    """Refuse a sum of another purpose than the message has, or of the wrong kind.

    Questions about data that came as training would be answered over one set after the other.
    """
    purpose = message_type.removeprefix("query.")
    if purpose != record.purpose.partition("/")[0]:
        raise SecureError(f"a sum of {record.purpose} was asked for by a message {message_type}")
    kind = TRAIN if message_type == MessageType.TRAIN else DATA
    if record.kind != kind:
        raise SecureError(
            f"a sum of {purpose} is of kind {kind}, and the server says {record.kind}"
        )


def require_layout(record: Record, message: Message) -> None:
    """Refuse a sum of what must not be in it, before anything is computed.

    Training may go on with fewer hospitals, so what stays the same from round to round must not be
    in its sums: the number of rows, or whole numbers in the model, which count batches.
    """
    before = next(iter(message.content.array_records.values()), ArrayRecord())
    for part in record.layout.parts:
        key = part.name.removeprefix(MODEL)
        if part.name.startswith(MODEL):
            values = view(before[key]) if key in before else np.empty(0, np.int8)
            floats = values.dtype.kind == "f" and values.size == part.size
            if record.kind != TRAIN or part.kind == COUNT or not floats:
                raise SecureError(f"{key} is no entry of the model that can be summed so")
        elif part.name == LOSS:
            if part.kind != REAL:
                raise SecureError(f"{LOSS} must be {REAL}, got {part.kind}")
        elif part.name in (ONES.name, CLIPPED.name):
            if part not in (ONES, CLIPPED):
                raise SecureError(f"{part.name} must be one count")
        elif record.kind == TRAIN:
            raise SecureError(f"{part.name} is not summed in training")


def require_alike(message: Message) -> None:
    """Refuse what a hospital answers by something that it alone was told in earlier messages.

    Such a state is in no digest: the server could first set the kept layers of all hospitals but
    one to zero, and then ask all of them the same.
    """
    for config in message.content.config_records.values():
        for key in _WITH_STATE:
            if key in config:
                raise SecureError(f"{key} is for messages outside of secure sums")
        if config.get(METHOD, "") not in _STATELESS:
            raise SecureError(f"the method {config[METHOD]!r} is not for secure sums")


def asked_of(client: MedicalClient, message: Message) -> dict[str, Value]:
    """Return all that a message asks, whoever asks it, in whichever run and round.

    Records and entries are in the message's order, since some are read by it. Texts are bytes: one
    letter that Unicode writes in two ways may name two columns.

    Parameters
    ----------
    client : MedicalClient
        Its settings and its code decide the answer too.
    message : Message
    """
    config = client.context.run_config
    arrays = {
        name: digest_of_arrays({key: view(record[key]) for key in record})
        for name, record in message.content.array_records.items()
    }
    return {
        "kind": message.metadata.message_type,
        "arrays": arrays,
        "records": [_record(name, record) for name, record in message.content.items()],
        "settings": [
            _entry(key, config[key]) for key in sorted(config) if key not in _OF_THE_SERVER
        ],
        "app": code_digest(type(client)),
        "version": version("fedmed-flower"),
    }


def _record(name: str, record: Any) -> list[Value]:
    """Return a record of a message as plain values; of that of the sum, only its place."""
    kind = type(record).__name__
    if isinstance(record, ArrayRecord):
        return [_exact(name), kind, [_exact(key) for key in record]]
    if name == SECURE:
        return [_exact(name), kind]
    return [
        _exact(name),
        kind,
        [_entry(key, value) for key, value in record.items() if key not in _OF_THE_RUN],
    ]


def _entry(key: str, value: Value) -> list[Value]:
    return [_exact(key), _exact(value)]


def _exact(value: Value) -> Value:
    """Return a value with its texts as bytes, which are not brought into a normal form."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return [_exact(item) for item in value] if isinstance(value, list) else value


def run_of(message: Message) -> list[Value]:
    """Return what a message holds of the run and the round."""
    return [
        [_exact(name), [_entry(key, record[key]) for key in _OF_THE_RUN if key in record]]
        for name, record in message.content.config_records.items()
        if name != SECURE
    ]


@cache
def code_digest(cls: type) -> bytes:
    """Return the digest of the Python files beside the one in which a class is defined.

    For a class that was typed into a session it is the digest of its name.
    """
    try:
        source = Path(inspect.getfile(cls))
    except (TypeError, OSError):
        return sha256(cls.__qualname__.encode()).digest()
    files = sorted(source.parent.glob("*.py")) if source.exists() else []
    content = {path.name: sha256(path.read_bytes()).digest() for path in files}
    return sha256(encoded([cls.__qualname__, content])).digest()
