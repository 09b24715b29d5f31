"""A hospital's share of a secure sum's noise, and the change of the model that it hides.

`secure.shares` says what must hold. Here stands what a hospital adds: its change without noise, in
float64, and the noise. They leave as one, as the words of `Share.words`, or not at all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from numpy.typing import NDArray

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.views import view
from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.privacy.accounting import Release
from fedmed_flower.privacy.ledger import TRAIN, purpose_in_sums
from fedmed_flower.privacy.noise import gaussian, secure_generator
from fedmed_flower.privacy.patient import budget_of
from fedmed_flower.secure.encoding import SecureError
from fedmed_flower.secure.parts import BY, MODEL, NOISE, NORM, ONES, UNIFORM
from fedmed_flower.secure.record import Record
from fedmed_flower.secure.ring import Layout, Words
from fedmed_flower.secure.shares import HospitalNoise, PatientNoise, Shares
from fedmed_flower.secure.study import Study
from fedmed_flower.wire import SERVER_ROUND

if TYPE_CHECKING:
    from torch import Tensor, nn

# In a ledger, who stands for all of the hospital; no patient's text is a tuple of one.
WHOLE = ("the hospital as a whole",)
_HOSPITAL = "all of the hospital"

Changes = dict[str, NDArray[np.float64]]


class Share(ABC):
    """One hospital's share of the noise of one sum.

    Parameters
    ----------
    shares : Shares
    release : Release
        What the sum releases.
    """

    def __init__(self, shares: Shares, release: Release) -> None:
        self.shares = shares
        self.release = release

    @abstractmethod
    def changes(self, before: ArrayRecord, after: ArrayRecord) -> Changes:
        """Return the change of each entry of the model that has one, flat, without noise.

        One unit, a patient or the hospital, changes all of them together by at most `sensitivity`
        times the number of hospitals. Entries of one object are one tensor under two names.
        """

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Charge what the reply costs, unless it was charged before the training."""
        yield

    def words(self, layout: Layout, before: ArrayRecord, after: ArrayRecord) -> Words:
        """Return what this hospital adds to the sum, noise included, as words of the ring.

        Parameters
        ----------
        layout : Layout
            As `Shares.require_layout` has let it pass.
        before, after : ArrayRecord
            The model of the message and that of the reply.
        """
        changes = self.changes(before, after)
        values: dict[str, NDArray[Any]] = {}
        noise: Changes = {}
        # By tensor: to add two noises to one would tell more of it than one noise does.
        drawn: dict[int, NDArray[np.float64]] = {}
        generator = secure_generator()
        for part in layout.parts:
            change = changes.get(part.name.removeprefix(MODEL))
            if part == ONES:
                values[part.name] = np.array([1])
            elif change is None:
                # No patient and no hospital decides about an entry that is not trained.
                values[part.name] = np.zeros(part.size)
            else:
                values[part.name] = change
                if id(change) not in drawn:
                    drawn[id(change)] = gaussian(change.size, self.shares.share, generator)
                noise[part.name] = drawn[id(change)]
        return layout.encode(values, 1 / self.shares.hospitals, noise=noise).words


class PatientShare(Share):
    """A share of noise that hides each patient.

    Parameters
    ----------
    shares : Shares
    declared : PatientNoise
    server_round : int
        Decides the learning rate.
    """

    def __init__(self, shares: Shares, declared: PatientNoise, server_round: int) -> None:
        super().__init__(shares, declared.release)
        self.purpose = purpose_in_sums(TRAIN, shares.needed)
        self._factor = declared.factor(server_round)
        self._changes: Changes | None = None

    def take(self, model: nn.Module, sums: Mapping[str, Tensor]) -> None:
        """Keep the sum of clipped gradients of a step, as a change of the model.

        Parameters
        ----------
        model : Module
        sums : mapping of str to Tensor
            By the name of the trained parameter, in float64.
        """
        flat = {
            name: total.detach().cpu().numpy().reshape(-1) * -self._factor
            for name, total in sums.items()
        }
        of_parameter = {id(model.get_parameter(name)): change for name, change in flat.items()}
        self._changes = {
            name: of_parameter[id(parameter)]
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if id(parameter) in of_parameter
        }

    def changes(self, before: ArrayRecord, after: ArrayRecord) -> Changes:
        """Return what `take` has kept; the model of the reply is the one that came.

        Raises
        ------
        SecureError
            If there is nothing.
        """
        if self._changes is None:
            raise SecureError("the step was not made by private training: nothing is to be sent")
        return self._changes


class HospitalShare(Share):
    """A share of noise that hides all that the hospital adds.

    Parameters
    ----------
    shares : Shares
    declared : HospitalNoise
    client : MedicalClient
        Has the ledger.
    config : ConfigRecord
        The message's config.
    """

    def __init__(
        self, shares: Shares, declared: HospitalNoise, client: MedicalClient, config: ConfigRecord
    ) -> None:
        super().__init__(shares, declared.release)
        self._norm = declared.clipping_norm
        self._client = client
        self._config = config

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Charge the hospital's ledger, run the block, then settle.

        The entry stands among those of patients, for a member that is all of the hospital. A budget
        that the hospital has set bounds it too.

        Raises
        ------
        DeclinedError
            If the hospital's budget would be passed.
        """
        client = self._client
        ledger = client.ledger(self._config)
        charge = ledger.charge(
            [WHOLE],
            self.release,
            1,
            run=client.run_key(self._config),
            purpose=purpose_in_sums(_HOSPITAL, self.shares.needed),
            server_round=int(self._config.get(SERVER_ROUND, 0)),  # type: ignore[arg-type]
            app=type(client).__name__,
            budget=budget_of(client.context),
        )
        yield
        ledger.settle(charge)

    def changes(self, before: ArrayRecord, after: ArrayRecord) -> Changes:
        """Return the change of each float of the model, all together clipped to the norm.

        A number that is not finite counts as 0.
        """
        changes = {}
        for key, array in before.items():
            old = view(array)
            if not kernels.is_floating(old.dtype):
                continue
            new = view(after[key])
            with np.errstate(invalid="ignore", over="ignore"):
                change = np.subtract(new, old, dtype=np.float64).reshape(-1)
            change[~np.isfinite(change)] = 0.0
            changes[key] = change
        return _clipped(changes, self._norm)


def _clipped(changes: Changes, norm: float) -> Changes:
    """Return changes scaled to at most a norm, all together."""
    largest = max([float(np.abs(change).max(initial=0.0)) for change in changes.values()] or [0.0])
    if not largest:
        return changes
    # In units of the largest one, so that no square leaves float64.
    squares = math.fsum(float(np.square(change / largest).sum()) for change in changes.values())
    length = math.sqrt(squares)
    # The last places of a sum of squares may be off; a change may be too short, never too long.
    factor = min(1.0, norm / largest / length * (1 - 1e-9))
    return {key: change * factor for key, change in changes.items()}


def share_of(
    client: MedicalClient, message: Message, record: Record, study: Study
) -> PatientShare | HospitalShare | None:
    """Return the share of noise that a sum asks of this hospital; None if it asks for none.

    Nothing of a patient has been looked at.

    Raises
    ------
    SecureError
        If the record is not one on which this hospital's account can rest.
    InputError
        If the run's settings allow no shares.
    """
    noise = record.weighting.get(NOISE)
    if noise is None:
        return None
    if record.weighting.get(BY) != UNIFORM or record.purpose != TRAIN:
        raise SecureError("shares of noise are for training, in which all hospitals weigh the same")
    if (record.needed, record.colluders) != (study.needed, study.colluders):
        raise SecureError(
            f"the noise counts on sums of at least {record.needed} hospitals of which "
            f"{record.colluders} may work with the server, and this hospital's study says "
            f"{study.needed} and {study.colluders}: all members must set the same least and c"
        )
    arrays = next(iter(message.content.array_records.values()), ArrayRecord())
    sizes = {key: view(array).size for key, array in arrays.items()}
    norm = record.weighting.get(NORM)
    if norm is None:
        patients = PatientNoise(client.settings, client.privacy, noise)
        shares = Shares.of(record, patients)
        shares.require_layout(record.layout, sizes)
        return PatientShare(shares, patients, record.server_round)
    hospitals = HospitalNoise(noise, norm)
    shares = Shares.of(record, hospitals)
    shares.require_layout(record.layout, sizes)
    config = next(iter(message.content.config_records.values()), ConfigRecord())
    return HospitalShare(shares, hospitals, client, config)
