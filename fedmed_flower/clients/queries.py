"""What a site answers beside training and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.duplicates import digests_of
from fedmed_flower.clients.storage import keep_pictures, own_folder
from fedmed_flower.data.pictures import Picture
from fedmed_flower.data.site import SPLITS, patient_text
from fedmed_flower.errors import DeclinedError
from fedmed_flower.models.device import torch_device
from fedmed_flower.privacy.patient import budget_of
from fedmed_flower.settings.section import with_type_of
from fedmed_flower.wire import CONTRIBUTION, COUNT, IMAGES, PICTURES, TITLES, TURNED_AWAY

log = logging.getLogger("flwr.fedmed")

# Of a real hospital, the worst included, however many a server asks for.
MOST_PICTURES = 6


def describe(client: MedicalClient, message: Message) -> RecordDict:
    """Tell the numbers of rows; where what is in files must not show, of patients."""
    torch_device(client.settings)
    if not client.sealed:
        client.screened_data()
    counts: dict[str, Any] = {split: client.count(split) for split in SPLITS}
    counts["num-examples"] = counts["train"]
    if not client.secretive:
        loaded = client.data()
        screened = sum(len(getattr(loaded, s)) - len(client.screened(s)) for s in SPLITS)
        counts[TURNED_AWAY] = loaded.turned_away + screened
    if client.site.simulated:
        counts |= client.describe(client.screened_data())
    return RecordDict(
        {
            "metrics": MetricRecord(counts),
            **digests_of(client.site, client.data(), client.context.run_id),
        }
    )


def pictures(client: MedicalClient, message: Message) -> RecordDict:
    """Draw test rows; the pictures leave only where the hospital lets them.

    That is where its node config has ``share-images=true``, once a run, no more than
    `MOST_PICTURES`, and in later runs of the same patients alone; and in a simulation, unless its
    node config has ``share-images=false``. Others are written into the hospital's own folder, if it
    has one. A hospital with a privacy budget, which a picture would pass at once, draws none: of
    whom, and whether that succeeds, the server's model would decide.

    Raises
    ------
    DeclinedError
        If the run had its pictures.
    """
    config, site = client.read(message), client.site
    shared: list[Picture] = []
    if site.simulated or budget_of(client.context) is None:
        given = client.context.node_config.get("share-images", site.simulated)
        share = with_type_of(False, given, "share-images")
        if share and site.simulated:
            shared = _draw(client, message, config)
        elif share:
            shared = _draw_in_book(client, message, config)
        elif (folder := own_folder(client.context, site, config)) is not None:
            keep_pictures(folder, site, _draw(client, message, config))
        else:
            log.info("%s: no pictures: they may not leave, and output-dir is not set", site.name)
    content: dict[str, Any] = {
        TITLES: [picture.title for picture in shared],
        IMAGES: [picture.png for picture in shared],
    }
    return RecordDict({PICTURES: ConfigRecord(content)})


def _draw(
    client: MedicalClient,
    message: Message,
    config: ConfigRecord,
    patients: Collection[str] | None = None,
) -> list[Picture]:
    """Return pictures of test rows, of some patients alone where they are given."""
    data, prepared = client.prepared("test", pooled=False)
    rows = data.test
    if patients is not None:
        rows = [row for row in rows if patient_text(row["patient"]) in patients]
        prepared = client.prepare(rows, train=False) if rows else prepared
    if not rows:
        return []
    arrays = next(iter(message.content.array_records.values()))
    model, _ = client.model_of(arrays, config)
    with client.seeded(0):
        return client.draw(model, prepared, int(config[COUNT]))  # type: ignore[arg-type]


def _draw_in_book(client: MedicalClient, message: Message, config: ConfigRecord) -> list[Picture]:
    """Return the pictures that leave a real hospital, written down beforehand."""
    run = client.run_key(config)
    with client.open_book(config, 1) as book:
        had, seen = book.shown(run)
        if had:
            raise DeclinedError("pictures leave once a run")
        # Also where drawing fails: else the server could try again with another model.
        book.show(run, ())
        found = _draw(client, message, config, seen)
        named = [(patient_text(p.patient), p) for p in found if p.patient is not None]
        # A client's own draw may show whom it likes.
        allowed = [one for one in named if seen is None or one[0] in seen][-MOST_PICTURES:]
        book.show(run, {patient for patient, _ in allowed})
    return [picture for _, picture in allowed]


def contribution(client: MedicalClient, message: Message) -> RecordDict:
    """Tell what the model is prepared with before the first round."""
    client.read(message)
    if client.secretive:
        raise DeclinedError("what is told before the first round carries no noise")
    return RecordDict({CONTRIBUTION: ConfigRecord(client.contribute())})
