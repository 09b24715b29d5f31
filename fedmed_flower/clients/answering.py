"""From a message to a reply: of what fails at a real site, the class alone leaves it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedmed_flower.data.site import Site
from fedmed_flower.errors import FAILED, DeclinedError, InputError
from fedmed_flower.settings.node import NodeSettings
from fedmed_flower.wire import DECLINED, SITE_RECORD, tell_error

if TYPE_CHECKING:
    from fedmed_flower.clients.base import MedicalClient

log = logging.getLogger("flwr.fedmed")


def answer(
    cls: type[MedicalClient],
    handle: Callable[[Any, Message], RecordDict],
    message: Message,
    context: Context,
) -> Message:
    """Return the reply to a message, or the error in its place.

    Parameters
    ----------
    cls : type of MedicalClient
    handle : callable
        Maps (an instance, message) to the content of the reply.
    message, context
        As Flower gives them.
    """
    site, client, state = None, None, copy.deepcopy(context.state)
    try:
        site = Site.from_context(context)
        # A misspelled budget is none: nothing is answered before all keys are understood.
        NodeSettings.of(context.node_config, cls.node_keys)
        client = cls(context)
        content = handle(client, message)
        about: dict[str, Any] = {"name": site.name, "simulated": site.simulated}
        if client.touched or not client.sealed:
            data = client.data()
            about |= {"data": data.source, "generated": data.generated}
        content[SITE_RECORD] = ConfigRecord(about)
        return Message(content, reply_to=message)
    except Exception as error:
        context.state = state
        told = _input_error(error) or error
        wrong_input = isinstance(told, InputError)
        name = "without a name" if site is None else site.name
        reason, level = type(told).__name__, logging.ERROR
        if isinstance(told, DeclinedError):
            reason, level = f"{DECLINED}{told}", logging.DEBUG
        elif site is not None and site.simulated:
            # Nothing leaves: the server, which runs on the same machine, logs this text.
            reason = f"{told}" if wrong_input else f"{reason}: {told}"
            level = logging.DEBUG if wrong_input else logging.ERROR
        elif client is not None and client.touched and client.sealed:
            # Which error it is may depend on a patient.
            reason = FAILED
        log.log(level, "%s: %s", name, told, exc_info=level == logging.ERROR and not wrong_input)
        failure = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=tell_error(name, reason))
        return Message(failure, reply_to=message)


def _input_error(error: BaseException | None) -> InputError | None:
    """Return the wrong input that caused an error: MONAI wraps what its transforms raise."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error
