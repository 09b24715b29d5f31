"""The global model fine-tuned by one hospital for itself, after the last round."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict
from safetensors.torch import save
from torch import nn

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.storage import file_name, own_folder
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.files import write_atomic
from fedmed_flower.metrics.names import lower_is_better, main_metric
from fedmed_flower.models.device import derive_seed
from fedmed_flower.settings.section import with_type_of
from fedmed_flower.wire import PERSONAL

log = logging.getLogger("flwr.fedmed")


def personal(client: MedicalClient, message: Message) -> RecordDict:
    """Fine-tune the global model for this hospital; the model itself stays here."""
    return RecordDict({"metrics": MetricRecord(personalise(client, message))})


def personalise(client: MedicalClient, message: Message) -> dict[str, Any]:
    """Fine-tune the model that came with a message; keep what is best on the validation rows.

    After each of at most ``personal-epochs`` passes over the training rows the model is measured
    on the validation rows. The one with the best main figure is kept, of several with the same
    figure that with the least loss, and the global model where no pass improves either: so no
    hospital is worse off on its validation rows. A pass in which the model diverges is the last.
    If the hospital keeps a folder, its model is
    written there, as ``personal/SITE.safetensors``.

    Returns
    -------
    dict
        The metrics of the kept model on the test rows; ``val-global`` and ``val-own``, the main
        figure of both models on the validation rows, and ``personal-epochs``, after how many
        passes the model was kept; 0 means the global model.

    Raises
    ------
    DeclinedError
        If the hospital does not want one (``personal=false`` in its node config), or in a
        private run: the model would be trained without noise, and what is measured of it leaves.
    InputError
        If the site has no training or no validation rows.
    """
    config = client.read(message)
    if not with_type_of(True, client.context.node_config.get("personal", True), "personal"):
        raise DeclinedError("personal=false in the hospital's node config")
    if client.secretive:
        raise DeclinedError("a personal model is trained without noise")
    settings, site = client.settings, client.site
    if settings.personal_epochs < 1:
        raise InputError(
            f"personal-epochs must be at least 1 to fine-tune, got {settings.personal_epochs}"
        )
    (own, train), (val, val_rows), (test, test_rows) = (
        client.prepared(split, pooled=False) for split in ("train", "val", "test")
    )
    client.require_usable(own.train)
    if not val.val:
        raise InputError("there are no validation rows to tell by whether fine-tuning helps")
    tellable = True
    for split, rows in (("val", val.val), ("test", test.test)):
        reported = client.disclosable(rows, f"personal {split}", config) if rows else rows
        if reported is None:
            tellable = False
        elif len(reported) < len(rows) and split == "val":
            val_rows = client.prepare(reported, train=False)
        elif len(reported) < len(rows):
            test_rows = client.prepare(reported, train=False)
    # A pass at a time, at the learning rate of the first round.
    client.settings = replace(settings, local_epochs=1, local_steps=0)
    model, _ = client.model_of(next(iter(message.content.array_records.values())), config)
    seed = derive_seed(settings.seed, site.name, "personal")
    with client.seeded(seed):
        before = _measured(client, model, val_rows)
        metric = main_metric(before)
        best, after, kept = copy.deepcopy(model.state_dict()), before, 0
        for epoch in range(1, settings.personal_epochs + 1):
            try:
                client.fit(model, train, derive_seed(seed, epoch))
                found = _measured(client, model, val_rows)
            except (ArithmeticError, ValueError) as error:  # Outputs that are no numbers any more.
                log.warning("%s: fine-tuning ends in pass %d: %s", site.name, epoch, error)
                break
            if _improves(found, after, metric):
                best, after, kept = copy.deepcopy(model.state_dict()), found, epoch
        model.load_state_dict(best)
        metrics = client.measure(model, test_rows) if test.test else {"num-examples": 0}
    folder = own_folder(client.context, site, config)
    if folder is not None:
        path = folder / "personal" / f"{file_name(site.name)}.safetensors"
        write_atomic(path, save({key: value.contiguous() for key, value in best.items()}))
        log.info("%s: its own model is in %s", site.name, path)
    if not tellable:
        raise DeclinedError("figures of its own model would be of too few patients")
    return client.disclosed(
        metrics | dict(zip(PERSONAL, (before[metric], after[metric], kept), strict=True))
    )


def _measured(client: MedicalClient, model: nn.Module, prepared: Any) -> dict[str, float]:
    found = client.measure(model, prepared)
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _improves(found: dict[str, float], before: dict[str, float], metric: str) -> bool:
    if found[metric] != before[metric]:
        return (found[metric] < before[metric]) == lower_is_better(metric)
    return found.get("loss", 0.0) < before.get("loss", 0.0)
