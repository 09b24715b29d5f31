"""The global model fine-tuned by one hospital for itself, after the last round."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.storage import keep_model
from fedmed_flower.data.site import Row
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.metrics.names import lower_is_better, main_metric
from fedmed_flower.models.adapters import merge_adapters
from fedmed_flower.models.device import derive_seed
from fedmed_flower.settings.text import setting_error, with_type_of
from fedmed_flower.wire import PERSONAL

log = logging.getLogger("flwr.fedmed")


class _Best(NamedTuple):
    """The best model so far, its metrics on the validation rows, and the pass that made it."""

    state: dict[str, Tensor]
    metrics: dict[str, float]
    epoch: int


def personal(client: MedicalClient, message: Message) -> RecordDict:
    """Fine-tune the global model for this hospital; the model itself stays here."""
    return RecordDict({"metrics": MetricRecord(personalise(client, message))})


def personalise(client: MedicalClient, message: Message) -> dict[str, Any]:
    """Fine-tune the model that came with a message; keep the best one by the validation rows.

    There are at most ``personal-epochs`` passes over the training rows. After each, the model is
    measured on the validation rows. The model with the best main metric is kept; if
    several have the same, the one with the lowest loss; if no pass improves either, the global
    model. So no hospital is worse off on its validation rows. A pass in which the model diverges
    is the last. If the hospital has an output folder, its model is written there, as
    ``personal/SITE.safetensors``.

    Parameters
    ----------
    client : MedicalClient
        Its settings are changed to those of one pass.
    message : Message
        Its first array record is the global model.

    Returns
    -------
    dict
        The metrics of the kept model on the test rows. Also ``val-global`` and ``val-own``, the
        main metric of both models on the validation rows, and ``personal-epochs``, the number of
        passes after which the model was kept; 0 means the global model.

    Raises
    ------
    DeclinedError
        If the hospital does not want a personal model (``personal=false`` in its node config); if
        the client is `secretive`, since fine-tuning carries no noise; or if too few patients are
        behind the metrics.
    InputError
        If ``personal-epochs`` is below 1, or the site has no training or no validation rows.
    """
    config = client.read(message)
    _require_wanted(client)
    train_data, train = client.prepared("train", pooled=False)
    val_data, val = client.prepared("val", pooled=False)
    test_data, test = client.prepared("test", pooled=False)
    client.require_usable(train_data.train)
    if not val_data.val:
        raise InputError(
            "there are no validation rows, by which fine-tuning is judged: give this site some"
        )
    val, val_may_leave = _disclosable_rows(client, val_data.val, val, "val", config)
    test, test_may_leave = _disclosable_rows(client, test_data.test, test, "test", config)
    # `fit` trains for one pass, at the learning rate of the first round.
    client.settings = replace(client.settings, local_epochs=1, local_steps=0, fewest_steps=0)
    model, _ = client.model_of(next(iter(message.content.array_records.values())), config)
    seed = derive_seed(client.settings.seed, client.site.name, "personal")
    with client.seeded(seed):
        before = _measured(client, model, val)
        best = _fine_tuned(client, model, train, val, before, seed)
        model.load_state_dict(best.state)
        merge_adapters(model)
        metrics = client.measure(model, test) if test_data.test else {"num-examples": 0}
    keep_model("personal", client.context, client.site, config, model.state_dict())
    if not (val_may_leave and test_may_leave):
        raise DeclinedError("too few patients are behind the metrics of the personal model")
    metric = main_metric(before)
    personal_metrics = (before[metric], best.metrics[metric], best.epoch)
    return client.disclosed(metrics | dict(zip(PERSONAL, personal_metrics, strict=True)))


def _require_wanted(client: MedicalClient) -> None:
    """Raise an error if the hospital, its privacy or the run config leaves no personal model."""
    if not with_type_of(True, client.context.node_config.get("personal", True), "personal"):
        raise DeclinedError("personal=false in the hospital's node config")
    if client.secretive:
        raise DeclinedError("a personal model is trained without noise")
    epochs = client.settings.personal_epochs
    if epochs < 1:
        raise setting_error(
            f"personal-epochs must be at least 1 to fine-tune, got {epochs}", "personal-epochs"
        )


def _disclosable_rows(
    client: MedicalClient, rows: Sequence[Row], prepared: Any, split: str, config: ConfigRecord
) -> tuple[Any, bool]:
    """Return the prepared rows to measure on, and whether their metrics may leave.

    If metrics of no rows may leave, all rows are returned: the hospital's own model is chosen by
    them.
    """
    if not rows:
        return prepared, True
    reported = client.disclosable(rows, f"personal {split}", config)
    if reported is None:
        return prepared, False
    if len(reported) < len(rows):
        return client.prepare(reported, train=False), True
    return prepared, True


def _fine_tuned(
    client: MedicalClient,
    model: nn.Module,
    train: Any,
    val: Any,
    before: dict[str, float],
    seed: int,
) -> _Best:
    """Train a model pass by pass; return its best state, which may be the first."""
    metric = main_metric(before)
    best = _Best(copy.deepcopy(model.state_dict()), before, 0)
    for epoch in range(1, client.settings.personal_epochs + 1):
        try:
            client.fit(model, train, derive_seed(seed, epoch))
            after = _measured(client, model, val)
        except (ArithmeticError, ValueError) as error:  # The model diverged: outputs are NaN.
            log.warning("%s: fine-tuning ends in pass %d: %s", client.site.name, epoch, error)
            break
        if _improves(after, best.metrics, metric):
            best = _Best(copy.deepcopy(model.state_dict()), after, epoch)
    return best


def _measured(client: MedicalClient, model: nn.Module, prepared: Any) -> dict[str, float]:
    metrics = client.measure(model, prepared)
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _improves(after: dict[str, float], before: dict[str, float], metric: str) -> bool:
    if after[metric] != before[metric]:
        return (after[metric] < before[metric]) == lower_is_better(metric)
    return after.get("loss", 0.0) < before.get("loss", 0.0)
