"""One hospital's side of a private message: try, charge, read patients' rows, train or measure.

Before the ledger is charged, nothing that leaves depends on a patient: model, loss and settings are
tried on made-up rows. After the charge, only noised numbers leave. A row that fails in any way adds
nothing, so that no patient decides whether a reply is sent.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.shares import PatientShare
from fedmed_flower.clients.training import sum_privately, train_privately
from fedmed_flower.data.site import patient_text, patients_of
from fedmed_flower.errors import InputError
from fedmed_flower.models.device import half_precision, make_optimizer
from fedmed_flower.privacy.gradients import PROBE, Batch
from fedmed_flower.privacy.grid import divergence_once
from fedmed_flower.privacy.ledger import TRAIN
from fedmed_flower.privacy.patient import Mechanism, PatientPrivacy, budget_of
from fedmed_flower.privacy.validate import first_changed, held
from fedmed_flower.wire import SERVER_ROUND, SPLIT

log = logging.getLogger("flwr.fedmed")


class UsableRows(NamedTuple):
    """The rows of a split that can be used, whatever the other rows are.

    Attributes
    ----------
    prepared : any
        Rows as the client prepares them.
    indices : list of int
        Positions of the usable rows in `prepared`.
    patients : list of str
        The patient of each index.
    """

    prepared: Any
    indices: list[int]
    patients: list[str]


def train_protected(
    client: MedicalClient, model: nn.Module, config: ConfigRecord
) -> dict[str, Any]:
    """Train with differential privacy for each patient and return the metrics.

    If the hospital adds a share of a secure sum's noise, the model stays as it is: the clipped sum
    is left with the share (`client.noise_share`), which lets it out with noise alone.

    Parameters
    ----------
    client : MedicalClient
        Defines ``batch_of``, ``loss_of``, ``made_up`` and the settings.
    model : Module
        Changed in place.
    config : ConfigRecord
        The message's config.

    Returns
    -------
    dict
        The epsilon that this run has cost so far.

    Raises
    ------
    InputError
        If model, loss or client cannot be trained privately, or there are no training rows; nothing
        is charged then. Also if training changes a part of the model that is not trained.
    DeclinedError
        If the run's target or the hospital's budget would be exceeded; nothing is charged then.
    """
    settings = client.settings
    _refuse_custom_fit(client)
    # An onlooker knows the run's seed and must not be able to repeat the random draws.
    torch.manual_seed(secrets.randbits(63))
    probe = client.probe(PROBE)
    checked = client.key(client.prepared_for, "checked")
    if checked not in client.cache.more:
        client.check_private(client.fresh_model()[0], probe)
        client.cache.more[checked] = True
    # From here on patients' rows are read.
    patients = _patients(client, "train")
    if not patients:
        raise InputError("there are no training rows")
    privacy = _privacy(client, config)
    share = client.noise_share if isinstance(client.noise_share, PatientShare) else None
    if share is None:
        purpose = TRAIN
        mechanism = privacy.plan_training(
            patients,
            settings.local_epochs,
            settings.batch_size,
            settings.local_steps,
            weights=sum(p.numel() for p in model.parameters() if p.requires_grad),
        )
    else:
        purpose = share.purpose
        mechanism = Mechanism(share.release, 1, len(patients), client.privacy)
    with privacy.charged(
        patients,
        mechanism.release,
        mechanism.steps,
        purpose,
        _round(config),
        mechanism.divergence,
    ):
        rows = usable_rows(client, "train", probe, alike=True)
        client.seed_transforms(rows.prepared, secrets.randbits(32))
        before = held(model)

        def batch_of(numbers: Sequence[int]) -> Batch:
            return client.batch_of(rows.prepared, [rows.indices[n] for n in numbers])

        step = (mechanism, probe, half_precision(settings))
        if share is None:
            optimizer = make_optimizer(settings, model, client.progress)
            loss, dropped = train_privately(
                model,
                batch_of,
                rows.patients,
                client.loss_of,
                optimizer,
                *step,
                client.method,
            )
            # The loss has no noise and is not covered by the budget, so it must not leave.
            log.debug("%s: mean training loss %.4f", client.site.name, loss)
        else:
            sums, dropped = sum_privately(model, batch_of, rows.patients, client.loss_of, *step)
            share.take(model, sums)
        name = first_changed(before, model)
        if name is not None:
            raise InputError(
                f"training has changed {name}, which is not trained and would leave the hospital "
                "without noise: the model must not change it"
            )
    if dropped:
        log.warning("%s: %d gradients could not be used", client.site.name, dropped)
    return privacy.spent(patients)


def measure_protected(
    client: MedicalClient, model: nn.Module, config: ConfigRecord
) -> dict[str, Any]:
    """Evaluate on the config's ``split`` by counts with noise, and return the metrics.

    Parameters and errors are those of `train_protected`; the model is not changed.
    """
    split = str(config.get(SPLIT, "val"))
    client.require_measurable()
    # Fails here, before the charge, if the network's outputs do not fit what the client declares.
    probe = client.probe(1)
    model.eval()
    with torch.no_grad():
        client.loss_of(model, probe)
    # From here on patients' rows are read.
    patients = _patients(client, split)
    if not patients:
        return {"num-examples": 0}
    privacy = _privacy(client, config)
    release = privacy.plan_evaluation(split)
    purpose = f"{split} counts"
    with privacy.charged(patients, release, 1, purpose, _round(config), divergence_once()):
        rows = usable_rows(client, split, probe)
        noise = release.noise_multiplier
        return client.measure_privately(model, rows.prepared, rows.patients, noise)


def usable_rows(client: MedicalClient, split: str, probe: Batch, alike: bool = False) -> UsableRows:
    """Return the rows of a split that can be used; no row decides about another.

    Parameters
    ----------
    client : MedicalClient
    split : str
    probe : dict of tensors
        A batch of made-up rows.
    alike : bool
        Leave out rows whose shape or dtype differs from those of made-up rows, as training needs.

    Raises
    ------
    InputError
        If `prepare` returns another number of rows than it was given.
    """
    train = split == "train"
    client.preparing = True
    rows = client.screened(split, client.pooled)
    try:
        prepared = client.prepare(rows, train)
    except Exception as error:
        log.debug("%s: rows are prepared one by one: %s", client.site.name, error)
        rows = [row for row in rows if _works(lambda row=row: client.prepare([row], train))]
        if not _works(lambda: client.prepare(rows, train)):
            # Each row works alone, but not all together: those that match made-up rows stay.
            rows = [row for row in rows if _matches(client, client.prepare([row], train), 0, probe)]
        prepared = client.prepare(rows, train)
    if len(prepared) != len(rows):
        raise InputError(
            f"prepare returned {len(prepared)} rows for {len(rows)}: private training must know "
            "the patient of each row, so prepare must return one row for each, in the same order; "
            "split records in load_data instead"
        )
    indices = list(range(len(rows)))
    if alike:
        indices = [index for index in indices if _matches(client, prepared, index, probe)]
    unusable = len(client.loaded(split)) - len(indices)
    if unusable:
        log.warning(
            "%s: %d rows of the %s split cannot be used and are left out",
            client.site.name,
            unusable,
            split,
        )
    patients = [patient_text(rows[index]["patient"]) for index in indices]
    return UsableRows(prepared, indices, patients)


def _works(step: Any) -> bool:
    try:
        step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        log.debug("a row cannot be used: %s", error)
        return False
    return True


def _matches(client: MedicalClient, prepared: Any, index: int, probe: Batch) -> bool:
    """Return whether the batch of a row has the entries, shapes and dtypes of made-up rows."""
    batch: dict[str, Tensor] = {}

    def make() -> None:
        batch.update(client.batch_of(prepared, [index]))

    return _works(make) and _layout(batch) == _layout(probe)


def _layout(batch: Batch) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape of one record, and the dtype, of each entry of a batch."""
    return {name: (values.shape[1:], values.dtype) for name, values in batch.items()}


def _privacy(client: MedicalClient, config: ConfigRecord) -> PatientPrivacy:
    ledger = client.ledger(config)
    budget = budget_of(client.context)
    if budget is None and not client.site.simulated:
        log.warning(
            "%s: budget-epsilon is not set, so that only the server limits what the run may "
            "release: set it in the node config",
            client.site.name,
        )
    return PatientPrivacy(
        client.privacy, ledger, client.run_key(config), budget, type(client).__name__
    )


def _patients(client: MedicalClient, split: str) -> list[str]:
    """Return the patients of a split as loaded, whether or not their rows can be used."""
    return list(dict.fromkeys(patients_of(client.loaded(split))))


def _round(config: ConfigRecord) -> int:
    return int(config.get(SERVER_ROUND, 0))  # type: ignore[arg-type]


def _refuse_custom_fit(client: MedicalClient) -> None:
    """Raise `InputError` if a subclass overrides `fit` alone: private training calls `loss_of`."""
    classes = type(client).__mro__
    fit, loss_of = (next(c for c in classes if name in vars(c)) for name in ("fit", "loss_of"))
    if fit is not loss_of and issubclass(fit, loss_of):
        raise InputError(
            f"{fit.__name__} defines its own fit, which private training does not use: define "
            "batch_of and loss_of as well"
        )
