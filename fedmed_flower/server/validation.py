"""Validation figures that come with training replies, of the model of the round before.

With ``validate="next"`` a training reply has two parts. The figures are taken out before anything
of the reply is screened, and become a reply of their own, which goes the way of every evaluation
reply. So a malformed part does not touch the other one. Figures count if the training part passes
screening.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fedmed_flower.wire import SITE_RECORD, VALIDATION, WHY

NO_FIGURES = (
    "the training reply has no validation figures, as validate=next needs them: take a client of "
    'this package, of the same version as the server\'s, or validate="own"'
)


def parted(reply: Message, node_id: int) -> tuple[Message, Message]:
    """Return a training reply without its figures, and a reply that has them alone.

    Parameters
    ----------
    reply : Message
        With a content; it is not changed.
    node_id : int
        The node that was asked.

    Returns
    -------
    trained : Message
    figures : Message
        As the site would have replied to an evaluation message: an error if it sent none, or says
        why it could not measure the model.
    """
    records = {name: record for name, record in reply.content.items() if name != VALIDATION}
    trained = copy.copy(reply)
    trained.content = RecordDict(records)
    return trained, _as_reply(reply.content, node_id)


def _as_reply(content: RecordDict, node_id: int) -> Message:
    """Return what a content holds beside its training part as a reply of a node."""
    question = Message(RecordDict(), node_id, MessageType.EVALUATE)
    part = content.get(VALIDATION)
    if isinstance(part, MetricRecord):
        figures = RecordDict({"metrics": part})
        if SITE_RECORD in content:
            figures[SITE_RECORD] = content[SITE_RECORD]
        return Message(figures, reply_to=question)
    why = part.get(WHY) if isinstance(part, ConfigRecord) else None
    reason = why if isinstance(why, str) else NO_FIGURES
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
    return Message(error, reply_to=question)


@dataclass
class Validation:
    """Who was asked for figures with a round's training, and what has come.

    Attributes
    ----------
    nodes : collection of int
        The nodes that were asked; empty if the round's replies have no such part.
    replies : dict of int to Message
        The figures of those whose training reply passed screening, by node, as `parted` returns
        them.
    """

    nodes: Collection[int] = ()
    replies: dict[int, Message] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        """The nodes that were asked and whose training reply did not count."""
        return [node_id for node_id in self.nodes if node_id not in self.replies]
