"""One site's answer to one message, in whichever process it is made."""

from __future__ import annotations

import copy
import logging
import traceback
from logging import DEBUG
from typing import Any, NamedTuple

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import ClientAppException
from flwr.common.constant import ErrorCode

from fedmed_flower.arrays.views import records_of

log = logging.getLogger("flwr.fedmed")

# Flower's integers: those from 2^63 on are sent as unsigned.
_LEAST = -(2**63)
_MOST = 2**64 - 1


class Answer(NamedTuple):
    """What a message has led to.

    Attributes
    ----------
    reply : Message or None
        None if the client does not reply.
    state : RecordDict
        The site's ``context.state`` afterwards; as it was if the client raised.
    seconds : float
        How long the client took.
    """

    reply: Message | None
    state: RecordDict
    seconds: float


def answer(app: ClientApp, message: Message, context: Context) -> tuple[Message | None, RecordDict]:
    """Run a client on copies; return its reply and the state that it leaves.

    If it raises, the reply is the one that Flower's engine would send, and the state is as it was.
    """
    own = Context(
        context.run_id,
        context.node_id,
        dict(context.node_config),
        copy_content(context.state),
        dict(context.run_config),
    )
    try:
        reply: object = app(copy_message(message), own)
        if not isinstance(reply, Message | None):
            raise TypeError(f"a ClientApp must return a Message, got {type(reply).__name__}")
        if reply is not None and reply.has_content():
            _require_64_bits(reply.content)
        _require_64_bits(own.state)
    except Exception as error:
        log.log(DEBUG, "%s", traceback.format_exc())
        raised = ClientAppException(str(error))
        reason = f"{type(raised)}:<'{raised}'>"
        failure = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
        return Message(failure, reply_to=message), context.state
    return None if reply is None else copy_message(reply), copy_content(own.state)


def _require_64_bits(content: RecordDict) -> None:
    """Raise `ValueError` if a record holds an integer that Flower's wire format cannot."""
    records: list[Any] = [
        *records_of(content, MetricRecord).values(),
        *records_of(content, ConfigRecord).values(),
    ]
    for key, value in (entry for record in records for entry in record.items()):
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, int) and not _LEAST <= number <= _MOST:
                raise ValueError(f"{key} is an integer beyond 64 bits")


def copy_message(message: Message) -> Message:
    """Copy a message so that changing the copy in place leaves the original as it is."""
    copied = copy.copy(message)
    copied.__dict__["_metadata"] = copy.copy(message.metadata)
    if message.has_content():
        copied.content = copy_content(message.content)
    return copied


def copy_content(content: RecordDict) -> RecordDict:
    """Copy records so that changing the copy in place leaves the original as it is.

    The arrays' values are immutable bytes and are shared.
    """
    copied = RecordDict()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            copied[name] = ArrayRecord(
                {k: Array(a.dtype, tuple(a.shape), a.stype, a.data) for k, a in record.items()}
            )
        else:
            copied[name] = copy.deepcopy(record)
    return copied
