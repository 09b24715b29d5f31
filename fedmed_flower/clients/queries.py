"""What a site answers beside training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedmed_flower.clients.keeping import share_pictures
from fedmed_flower.data.site import SPLITS
from fedmed_flower.errors import DeclinedError
from fedmed_flower.namesakes import told_names
from fedmed_flower.pictures import Picture

if TYPE_CHECKING:
    from fedmed_flower.clients.base import MedicalClient

Query = Callable[[Any, Message], RecordDict]


def describe(client: MedicalClient, message: Message) -> RecordDict:
    """Tell the numbers of rows."""
    client.settings.torch_device()
    data, _ = client.prepared(None, pooled=False)
    counts: dict[str, Any] = {split: client.count(data, split) for split in SPLITS}
    counts["num-examples"] = counts["train"]
    if not client.secretive:
        loaded = client.data()
        screened = sum(len(getattr(loaded, s)) - len(getattr(data, s)) for s in SPLITS)
        counts["turned-away"] = loaded.turned_away + screened
    if client.site.simulated:
        counts |= client.describe(data)
    return RecordDict({"metrics": MetricRecord(counts), **told_names(client)})


def pictures(client: MedicalClient, message: Message) -> RecordDict:
    """Draw test rows; the pictures leave only where the hospital lets them."""
    config = client.read(message)
    data, prepared = client.prepared("test", pooled=False)

    def drawn() -> list[Picture]:
        arrays = next(iter(message.content.array_records.values()))
        model, _ = client.model_of(arrays, config)
        with client.seeded(0):
            return client.draw(model, prepared, int(config["count"]))  # type: ignore[arg-type]

    shared = share_pictures(client.context, client.site, config, drawn if data.test else list)
    content: dict[str, Any] = {
        "titles": [picture.title for picture in shared],
        "images": [picture.png for picture in shared],
    }
    return RecordDict({"pictures": ConfigRecord(content)})


def contribution(client: MedicalClient, message: Message) -> RecordDict:
    """Tell what the model is prepared with before the first round."""
    client.read(message)
    if client.secretive:
        raise DeclinedError("what is told before the first round carries no noise")
    return RecordDict({"contribution": ConfigRecord(client.contribute())})


def personal(client: MedicalClient, message: Message) -> RecordDict:
    """Fine-tune the global model for this hospital; the model itself stays here."""
    from fedmed_flower.clients.personal import personalise

    return RecordDict({"metrics": MetricRecord(personalise(client, message))})


def statistics(client: MedicalClient, message: Message) -> RecordDict:
    """Count, as far as the hospital lets that leave."""
    from fedmed_flower.clients.surveying import answer_statistics

    return answer_statistics(client, message)


QUERIES: Mapping[str, Query] = {
    query.__name__: query for query in (describe, pictures, contribution, personal, statistics)
}
