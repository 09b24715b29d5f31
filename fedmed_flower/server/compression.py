"""Replies in a code, unpacked before anything else sees them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message, RecordDict

from fedmed_flower.arrays.packing import Packing
from fedmed_flower.arrays.views import records_of
from fedmed_flower.errors import InputError
from fedmed_flower.server.screening import form_flaw
from fedmed_flower.server.traffic import size_of


@dataclass(frozen=True)
class Unpacker:
    """Unpacks the training replies of a round.

    Attributes
    ----------
    packing : Packing
        The code that the sites were asked for.
    key : str
        Name of the model's record in a message.
    model : ArrayRecord
        Of the model that was sent: what sites send back. If the message to a site is known, the
        values are taken from there.
    companions : mapping of str to ArrayRecord
        Likewise, what was sent beside it.
    """

    packing: Packing
    key: str
    model: ArrayRecord
    companions: Mapping[str, ArrayRecord]

    def unpacked(self, reply: Message, request: RecordDict | None) -> Message:
        """Return a copy of a reply with each record as the site would change it.

        Parameters
        ----------
        reply : Message
            With content.
        request : RecordDict or None
            What was sent to the site; None if that is not known.

        Raises
        ------
        ValueError
            If a record has not the layout that the code gives what was sent, or stands for no
            finite change. The text is the reason for which the reply is left out.
        """
        content = RecordDict({**reply.content})
        models = 0
        for name, record in records_of(reply.content, ArrayRecord).items():
            if name in self.companions:
                content[name] = self._dense(record, self._sent(name, request), f"in {name}, ")
                continue
            models += 1
            # Many small codes must not become many models.
            if models > 1:
                raise ValueError("the reply has several array records instead of one")
            content[name] = self._dense(record, self._sent(self.key, request), "")
        message = copy.copy(reply)
        message.content = content
        return message

    def _sent(self, name: str, request: RecordDict | None) -> ArrayRecord:
        """Return the record from which the changes in one of the reply's records count."""
        layout = self.model if name == self.key else self.companions[name]
        if request is None:
            return layout
        sent = records_of(request, ArrayRecord).get(name)
        if sent is None or not layout.keys() <= sent.keys():
            raise ValueError(f"the site was not sent all of {name}, from which a change counts")
        return ArrayRecord({key: sent[key] for key in layout})

    def _dense(self, record: ArrayRecord, sent: ArrayRecord, where: str) -> ArrayRecord:
        if not self.packing.is_coded(record):
            raise ValueError(
                f"{where}all arrays came back uncoded, although "
                f'compression="{self.packing.compression}" was asked for: install the same '
                "fedmed-flower at server and hospital, or train without compression"
            )
        flaw = form_flaw(record, self.packing.forms(sent))
        if flaw is not None:
            raise ValueError(f"{where}{flaw}")
        try:
            return self.packing.unpack(sent, record)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error


def require_one_each(messages: Iterable[Message]) -> None:
    """Refuse two messages to a site in one round: it keeps one remainder of what its code loses.

    Raises
    ------
    InputError
    """
    nodes = Counter(message.metadata.dst_node_id for message in messages)
    if any(count > 1 for count in nodes.values()):
        raise InputError(
            'compression must be "none" if a site is sent two training messages in a round, since '
            "it adds what its code has lost to one change"
        )


def saved_bytes(coded: Message, dense: Message) -> int:
    """Return how many bytes fewer a reply has in its code; below 0 if it has more."""
    return size_of(dense.content) - size_of(coded.content)
