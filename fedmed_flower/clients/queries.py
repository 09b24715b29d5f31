"""A site's answers to queries other than training and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.duplicates import digests_of
from fedmed_flower.clients.secure import asks_for_sum, in_sums_alone
from fedmed_flower.clients.storage import keep_pictures, output_folder
from fedmed_flower.clients.trial import try_batch
from fedmed_flower.data.cells import LARGEST
from fedmed_flower.data.pictures import Picture
from fedmed_flower.data.site import SPLITS, patient_text
from fedmed_flower.data.summed import added
from fedmed_flower.errors import DeclinedError
from fedmed_flower.metrics.plain import plain_metrics
from fedmed_flower.models.device import require_device
from fedmed_flower.privacy.patient import budget_of
from fedmed_flower.settings.text import with_type_of
from fedmed_flower.wire import (
    COLUMNS,
    CONTRIBUTION,
    COUNT,
    EMPTY,
    FILLED,
    IMAGES,
    LACKING,
    MEANS,
    PICTURES,
    REJECTED,
    TITLES,
    VERSION,
    VersionError,
    require_version,
)

log = logging.getLogger("flwr.fedmed")

# The most pictures that leave a real hospital in a run, whatever number the server asks for.
MOST_PICTURES = 6


def refuse_other_version(client: MedicalClient, message: Message) -> None:
    """Raise `DeclinedError` if the first message of a server is of another version."""
    config = message.content.config_records.get("config", ConfigRecord())
    try:
        require_version(config.get(VERSION), client.site.name, "server")
    except VersionError as error:
        raise DeclinedError(error) from error


def describe(client: MedicalClient, message: Message) -> RecordDict:
    """Return the number of rows of each split; of patients if the client is `secretive`.

    If figures leave in secure sums alone, only whether a split has rows is told. Before, a batch is
    tried: a site whose network does not fit its rows says so here.

    Raises
    ------
    DeclinedError
        If messages of the server have another version.
    """
    refuse_other_version(client, message)
    require_device(client.settings)
    # Before the first round: a folder that is not there would be missed only when it is needed.
    output_folder(client.context, client.site, {})
    if not client.sealed:
        client.screened_data()
    try_batch(client)
    if in_sums_alone(client, "describe"):
        filled: dict[str, Any] = {split: client.count(split) > 0 for split in SPLITS}
        return RecordDict({FILLED: ConfigRecord(filled)})
    counts: dict[str, Any] = {split: client.count(split) for split in SPLITS}
    counts["num-examples"] = counts["train"]
    if not client.secretive:
        data = client.data()
        unusable = sum(len(getattr(data, s)) - len(client.screened(s)) for s in SPLITS)
        counts[REJECTED] = data.rejected + unusable
    if client.site.simulated:
        counts |= client.describe(client.screened_data())
    content = RecordDict(
        {
            "metrics": MetricRecord(plain_metrics(counts)),
            **digests_of(client.site, client.data(), client.context.run_id),
        }
    )
    if not client.secretive:
        columns = {LACKING: client.data().lacking, EMPTY: client.empty_columns()}
        for record, names in columns.items():
            if names:
                content[record] = ConfigRecord({COLUMNS: list(names)})
    return content


def pictures(client: MedicalClient, message: Message) -> RecordDict:
    """Draw test rows; the pictures leave only if the hospital allows it.

    A real hospital allows it by ``share-images=true`` in its node config. It sends pictures once a
    run, at most `MOST_PICTURES`, and in later runs only of the same patients. A simulated site
    sends pictures unless its node config has ``share-images=false``. Pictures that may not leave
    are written to the hospital's own folder, if it has one. A hospital with a privacy budget draws
    no pictures: one picture would exceed the budget, and the server's model would decide whom it
    shows and whether drawing succeeds.

    Raises
    ------
    DeclinedError
        If the run already had its pictures.
    """
    config = client.read(message)
    site = client.site
    shared: list[Picture] = []
    if site.simulated or budget_of(client.context) is None:
        given = client.context.node_config.get("share-images", site.simulated)
        share = with_type_of(False, given, "share-images")
        if share and site.simulated:
            shared = _draw(client, message, config)
        elif share:
            shared = _draw_in_book(client, message, config)
        elif (folder := output_folder(client.context, site, config)) is not None:
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
    """Return pictures of test rows; if patients are given, only of these."""
    from fedmed_flower.models.adapters import merge_adapters

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
        return client.draw(merge_adapters(model), prepared, int(config[COUNT]))  # type: ignore[arg-type]


def _draw_in_book(client: MedicalClient, message: Message, config: ConfigRecord) -> list[Picture]:
    """Return the pictures that leave a real hospital, after writing them down in its book."""
    run = client.run_key(config)
    with client.open_book(config, 1) as book:
        had, seen = book.shown(run)
        if had:
            raise DeclinedError("pictures leave once a run")
        # Before drawing: if that fails, the server must not try again with another model.
        book.show(run, ())
        drawn = _draw(client, message, config, seen)
        named = [(patient_text(p.patient), p) for p in drawn if p.patient is not None]
        # A subclass's `draw` may show patients other than those it was asked for.
        allowed = [(patient, p) for patient, p in named if seen is None or patient in seen]
        allowed = allowed[-MOST_PICTURES:]
        book.show(run, {patient for patient, _ in allowed})
    return [picture for _, picture in allowed]


def contribution(client: MedicalClient, message: Message) -> RecordDict:
    """Return what the site contributes before the first round, such as means and categories.

    For a secure sum it is what the site adds to each part of it.
    """
    config = client.read(message)
    if client.secretive:
        raise DeclinedError("contributions before the first round carry no noise")
    reported = client.contribute()
    if asks_for_sum(message):
        parts: dict[str, Any] = {**added(reported, client.columns_to_sum(), _means(config))}
        return RecordDict({"metrics": MetricRecord(parts)})
    return RecordDict({CONTRIBUTION: ConfigRecord(reported)})


def _means(config: ConfigRecord) -> dict[str, float]:
    """Return the common means by column that a message holds.

    Raises
    ------
    DeclinedError
        If they are no numbers by column.
    """
    columns: Any = config.get(COLUMNS, [])
    means: Any = config.get(MEANS, [])
    lists = isinstance(columns, list) and isinstance(means, list) and len(columns) == len(means)
    if not lists or not all(isinstance(mean, float) and abs(mean) <= LARGEST for mean in means):
        raise DeclinedError("the means of columns must be finite numbers, one for each column")
    return dict(zip(columns, means, strict=True))
