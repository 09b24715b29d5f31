"""One hospital's side of a private message: try, charge, look at patients, train or measure.

Before the ledger is charged, nothing that depends on a patient decides anything that leaves: model,
loss and settings are tried on made-up rows. After it only noised numbers leave. A row that fails,
in whatever way, counts as a row that adds nothing: its patient cannot decide whether a reply comes.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any, NamedTuple

import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.training import train_privately
from fedmed_flower.data.site import patient_text
from fedmed_flower.errors import InputError
from fedmed_flower.models.device import half_precision, make_optimizer
from fedmed_flower.privacy.gradients import PROBE, Batch
from fedmed_flower.privacy.patient import PatientPrivacy, budget_of
from fedmed_flower.privacy.validate import held, unchanged
from fedmed_flower.wire import SERVER_ROUND, SPLIT

log = logging.getLogger("flwr.fedmed")


class UsableRows(NamedTuple):
    """The rows of a split that work, alone and whatever the others are.

    Attributes
    ----------
    prepared
        As the client prepares them.
    indices : list of int
        Those among `prepared`.
    patients : list of str
        The patient of each place.
    """

    prepared: Any
    indices: list[int]
    patients: list[str]


def train_protected(
    client: MedicalClient, model: nn.Module, config: ConfigRecord
) -> dict[str, Any]:
    """Train with differential privacy for each patient and return the metrics.

    Parameters
    ----------
    client : MedicalClient
        Gives ``batch_of``, ``loss_of``, ``made_up`` and the settings.
    model : Module
        Changed in place.
    config : ConfigRecord
        Came with the message.

    Raises
    ------
    InputError
        If model, loss or client cannot be trained privately; nothing is charged then.
    DeclinedError
        If the run's target or the hospital's budget would be passed.
    """
    settings = client.settings
    _require_own_fit(client)
    # Whatever is random about one patient must not follow from what an onlooker may know.
    torch.manual_seed(secrets.randbits(63))
    probe = client.probe(PROBE)
    checked = client.key(client.prepared_for, "checked")
    if checked not in client.cache.more:
        client.check_private(client.fresh_model()[0], probe)
        client.cache.more[checked] = True
    # From here on patients are looked at.
    patients = _patients(client, "train")
    if not patients:
        raise InputError("there are no training rows")
    privacy = _privacy(client, config)
    mechanism = privacy.plan_training(
        patients, settings.local_epochs, settings.batch_size, settings.local_steps
    )
    charge = (patients, mechanism.release, mechanism.steps, "train", _round(config))
    with privacy.charged(*charge):
        rows = usable_rows(client, "train", probe, alike=True)
        client.seed_transforms(rows.prepared, secrets.randbits(32))
        before = held(model)
        loss, dropped = train_privately(
            model,
            lambda numbers: client.batch_of(rows.prepared, [rows.indices[n] for n in numbers]),
            rows.patients,
            client.loss_of,
            make_optimizer(settings, model, client.progress),
            mechanism,
            probe,
            half_precision(settings),
            client.proximal_mu,
        )
        if (name := unchanged(before, model)) is not None:
            raise InputError(
                f"training has changed {name}, which would leave the hospital without noise"
            )
    if dropped:
        log.warning("%s: %d gradients could not be used", client.site.name, dropped)
    # The loss stays here: without noise it would tell of patients what the budget does not cover.
    log.debug("%s: mean training loss %.4f", client.site.name, loss)
    return privacy.spent(patients)


def measure_protected(
    client: MedicalClient, model: nn.Module, config: ConfigRecord
) -> dict[str, Any]:
    """Evaluate with noise on what is counted, and return the metrics.

    Parameters are those of `train_protected`; patients are those of the config's ``split``.
    """
    split = str(config.get(SPLIT, "val"))
    client.require_measurable()
    # What the network gives is compared with what the client declares.
    probe = client.probe(1)
    model.eval()
    with torch.no_grad():
        client.loss_of(model, probe)
    # From here on patients are looked at.
    patients = _patients(client, split)
    if not patients:
        return {"num-examples": 0}
    privacy = _privacy(client, config)
    release = privacy.plan_evaluation(split)
    with privacy.charged(patients, release, 1, f"{split} counts", _round(config)):
        rows = usable_rows(client, split, probe)
        noise = release.noise_multiplier
        return client.measure_privately(model, rows.prepared, rows.patients, noise)


def usable_rows(client: MedicalClient, split: str, probe: Batch, alike: bool = False) -> UsableRows:
    """Return the rows of a split that work; each is tried by itself, and decides for itself alone.

    Parameters
    ----------
    client : MedicalClient
    split : str
    probe : dict of tensors
        A batch of made-up rows.
    alike : bool
        Take those rows alone that are like made-up ones in shape and dtype, as training needs.
    """
    train = split == "train"
    rows = client.screened(split, client.pooled)
    try:
        prepared = client.prepare(rows, train)
    except Exception as error:
        log.debug("%s: rows are prepared one by one: %s", client.site.name, error)
        rows = [row for row in rows if _works(lambda row=row: client.prepare([row], train))]
        if not _works(lambda: client.prepare(rows, train)):
            # Each works alone: those stay that made-up rows can stand beside.
            rows = [row for row in rows if _is_like(client, client.prepare([row], train), 0, probe)]
        prepared = client.prepare(rows, train)
    if len(prepared) != len(rows):
        raise InputError(
            f"prepare has made {len(prepared)} of {len(rows)} rows: to know which patient each is "
            "of, private training needs one of each, in their order; split records in load_data"
        )
    indices = list(range(len(rows)))
    if alike:
        indices = [index for index in indices if _is_like(client, prepared, index, probe)]
    if away := len(client.loaded(split)) - len(indices):
        log.warning(
            "%s: %d rows of the %s split cannot be used and add nothing: the model learns less "
            "than their number suggests",
            *(client.site.name, away, split),
        )
    return UsableRows(
        prepared, indices, [patient_text(rows[index]["patient"]) for index in indices]
    )


def _works(step: Any) -> bool:
    try:
        step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        log.debug("a row cannot be used: %s", error)
        return False
    return True


def _is_like(client: MedicalClient, prepared: Any, index: int, probe: Batch) -> bool:
    """Return whether a row becomes a batch of entries, shapes and dtypes as made-up ones have."""
    found: dict[str, Tensor] = {}

    def make() -> None:
        found.update(client.batch_of(prepared, [index]))

    return _works(make) and {name: (v.shape[1:], v.dtype) for name, v in found.items()} == {
        name: (v.shape[1:], v.dtype) for name, v in probe.items()
    }


def _privacy(client: MedicalClient, config: ConfigRecord) -> PatientPrivacy:
    ledger, budget = client.ledger(config), budget_of(client.context)
    if budget is None and not client.site.simulated:
        log.warning(
            "%s: no budget-epsilon is set: only the server bounds the run", client.site.name
        )
    return PatientPrivacy(
        client.privacy, ledger, client.run_key(config), budget, type(client).__name__
    )


def _patients(client: MedicalClient, split: str) -> list[str]:
    """Return the patients of a split as they were loaded, whether their rows can be used or not."""
    return list(dict.fromkeys(patient_text(row["patient"]) for row in client.loaded(split)))


def _round(config: ConfigRecord) -> int:
    return int(config.get(SERVER_ROUND, 0))  # type: ignore[arg-type]


def _require_own_fit(client: MedicalClient) -> None:
    """Refuse a `fit` of a subclass, which private training would not use."""
    classes = type(client).__mro__
    fit, loss_of = (next(c for c in classes if name in vars(c)) for name in ("fit", "loss_of"))
    if fit is not loss_of and issubclass(fit, loss_of):
        raise InputError(
            f"{fit.__name__} gives its own fit, which private training does not use: give "
            "batch_of and loss_of beside it"
        )
