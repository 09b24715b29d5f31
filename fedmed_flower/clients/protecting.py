"""One hospital's side of a private round: check, plan, charge, train or measure, tell the cost."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ConfigRecord, Context
from torch import nn

from fedmed_flower.clients.training import train_privately
from fedmed_flower.config import with_type_of
from fedmed_flower.data.site import RUN_KEY, Row, SiteData, patient_text
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.privacy.patient import (
    PatientPrivacy,
    PrivacySettings,
    budget_of,
    ledger_path,
)
from fedmed_flower.privacy.validate import held, unchanged

if TYPE_CHECKING:
    from fedmed_flower.clients.base import MedicalClient

log = logging.getLogger("flwr.fedmed")


def require_protection(settings: PrivacySettings, context: Context) -> None:
    """Decline a run without privacy where the hospital has set a budget.

    Raises
    ------
    DeclinedError
    """
    if not settings.on and budget_of(context) is not None:
        raise DeclinedError(
            'this hospital has set a privacy budget and trains with privacy="patient" only'
        )


def require_unseen(client: MedicalClient, split: str) -> None:
    """Decline to measure exactly, on the patients that a private run trains on.

    Raises
    ------
    DeclinedError
    """
    if split == "train" and client.privacy.on and not private_metrics(client):
        raise DeclinedError("training patients are measured with private-metrics=true only")


def private_metrics(client: MedicalClient) -> bool:
    """Return whether what evaluation counts carries noise, and is charged.

    Where the run or the hospital asks for it, and always where the hospital has set a budget: what
    a server may ask for exactly, no budget bounds.
    """
    given = client.context.node_config.get("private-metrics", False)
    asked: bool = with_type_of(False, given, "private-metrics")
    return client.privacy.private_metrics or asked or budget_of(client.context) is not None


def train_protected(
    client: MedicalClient, model: nn.Module, data: SiteData, prepared: Any, config: ConfigRecord
) -> dict[str, Any]:
    """Train with differential privacy for each patient and return the metrics.

    Parameters
    ----------
    client : MedicalClient
        Gives ``batch_of``, ``loss_of`` and the settings.
    model : Module
        Changed in place.
    data, prepared
        The site's rows, and its training rows as the client prepares them.
    config : ConfigRecord
        Came with the message.

    Raises
    ------
    InputError
        Where model, loss or client cannot be trained privately; nothing is charged then.
    DeclinedError
        Where the run's target or the hospital's budget would be passed.
    """
    settings = client.settings
    _require_own_fit(client)
    # Whatever is random about one patient must not follow from what an onlooker may know.
    torch.manual_seed(secrets.randbits(63))
    client.seed_transforms(prepared, secrets.randbits(32))
    patients = _patients(data.train, prepared)
    checked = client.key("checked")
    if checked not in client.kept:
        # Fresh weights: with those that were sent, whether this fails could tell of a record.
        client.check_private(client.fresh_model()[0], prepared)
        client.kept[checked] = True
    privacy = _privacy(client, config)
    mechanism = privacy.plan_training(
        patients, settings.local_epochs, settings.batch_size, settings.local_steps
    )
    charge = (patients, mechanism.release, mechanism.steps, "train", _round(config))
    with privacy.charged(*charge):
        before = held(model)
        loss, dropped = train_privately(
            model,
            partial(client.batch_of, prepared),
            patients,
            client.loss_of,
            settings.make_optimizer(model, client.progress),
            mechanism,
            settings.half_precision,
            client.proximal_mu,
        )
        if (name := unchanged(before, model)) is not None:
            raise InputError(
                f"training has changed {name}, which would leave the hospital without noise"
            )
    if dropped:
        log.warning("%s: %d gradients were not finite", client.site.name, dropped)
    # The loss stays here: without noise it would tell of patients what the budget does not cover.
    log.debug("%s: mean training loss %.4f", client.site.name, loss)
    return privacy.spent(patients)


def measure_protected(
    client: MedicalClient, model: nn.Module, data: SiteData, prepared: Any, config: ConfigRecord
) -> dict[str, Any]:
    """Evaluate with noise on what is counted, and return the metrics.

    Parameters are those of `train_protected`; `prepared` are the rows of the config's ``split``.
    """
    split = str(config.get("split", "val"))
    patients = _patients(getattr(data, split), prepared)
    privacy = _privacy(client, config)
    release = privacy.plan_evaluation(split)
    with privacy.charged(patients, release, 1, f"{split} counts", _round(config)):
        return client.measure_privately(model, prepared, patients, release.noise_multiplier)


def _privacy(client: MedicalClient, config: ConfigRecord) -> PatientPrivacy:
    context, site = client.context, client.site.name
    path = ledger_path(context, client.site, config)
    # A ledger that the hospital has named and that is gone is no reason to begin anew.
    named = "ledger" in context.node_config
    if not client.site.simulated:
        if not named and not path.exists():
            log.warning("%s: %s is a new ledger, in which nothing was ever released", site, path)
        if budget_of(context) is None:
            log.warning("%s: no budget-epsilon is set: only the server bounds the run", site)
    ledger = Ledger(path, create=not named)
    run = str(config.get(RUN_KEY, context.run_id))
    return PatientPrivacy(client.privacy, ledger, run, budget_of(context), type(client).__name__)


def _patients(rows: Sequence[Row], prepared: Any) -> list[str]:
    """Return the patient of each prepared row, told apart as the ledger does."""
    if len(prepared) != len(rows):
        raise InputError(
            f"prepare has made {len(prepared)} of {len(rows)} rows: to know which patient each is "
            "of, private training needs one of each, in their order; split records in load_data"
        )
    return [patient_text(row["patient"]) for row in rows]


def _round(config: ConfigRecord) -> int:
    return int(config.get("server-round", 0))  # type: ignore[arg-type]


def _require_own_fit(client: MedicalClient) -> None:
    """Refuse a `fit` of a subclass, which private training would not use."""
    classes = type(client).__mro__
    fit, loss_of = (next(c for c in classes if name in vars(c)) for name in ("fit", "loss_of"))
    if fit is not loss_of and issubclass(fit, loss_of):
        raise InputError(
            f"{fit.__name__} gives its own fit, which private training does not use: give "
            "batch_of and loss_of beside it"
        )
