"""Noise that the hospitals of a secure sum add together.

The server sees the sum alone, so the noise need be large enough in the sum, and each hospital adds
a share of it. What must hold:

- Each member of the sum adds a share, drawn in float64 by the operating system's generator, to its
  real values, before these are rounded to words of the ring. Rounding works on each noised value
  alone, so it is post-processing and costs nothing. (Noise that is added after rounding would have
  to cover the rounding too.)
- One patient, or one hospital, changes the sum without noise by at most `sensitivity`. Values are
  cut to the bound of the ring before the noise, coordinate by coordinate; that brings two vectors
  nowhere further apart. Nothing is cut after the noise.
- A sum opens over at least u hospitals. Of their shares the c that may work with the server can
  subtract theirs; where c is 0, each fellow hospital can still subtract its own from the model that
  it is sent. So h = u - max(c, 1) shares hide a patient of an honest hospital, the hospital's own
  among them. Each has the standard deviation `sensitivity` * z / sqrt(h), and what nobody can
  subtract is at least that of the noise multiplier z, which is charged. More hospitals, or fewer
  colluders, leave more noise than that.
- All of this is the same at each hospital and stands in the digest of the sum: settings, weights,
  u, c and z. A hospital takes u and c from its own study, and works out the rest itself.
- Beside the noised values only a one leaves, by which a wrong mask is noticed. No number of
  patients, no loss, no count of values that were cut.
- Who takes part, and that a hospital fails, is no part of what is hidden.

Dwork, Kenthapadi, McSherry, Mironov, Naor: Our Data, Ourselves: Privacy via Distributed Noise
Generation, EUROCRYPT 2006. Kairouz, Liu, Steinke: The Distributed Discrete Gaussian Mechanism for
Federated Learning with Secure Aggregation, ICML 2021, https://arxiv.org/abs/2102.06387, add
discrete noise to rounded values instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from fedmed_flower.privacy.accounting import Release, epsilon_of, noise_for, require_release
from fedmed_flower.secure.encoding import SecureError, Value
from fedmed_flower.secure.parts import MODEL, NOISE, NORM, ONES
from fedmed_flower.secure.record import Record
from fedmed_flower.secure.ring import FIXED, Layout, Part
from fedmed_flower.settings.privacy import PrivacySettings
from fedmed_flower.settings.text import setting_error
from fedmed_flower.settings.training import Settings
from fedmed_flower.wire import EPSILON

# With a smaller share the steps of the ring could be seen; a larger one leaves its words.
_LEAST_STEPS = 100.0
_MOST_STEPS = 2.0**40
# Two computers may round the same formula differently.
_CLOSE = 1e-9


class Declared(Protocol):
    """What all hospitals of a sum declare alike about its noise."""

    @property
    def weighting(self) -> dict[str, Value]:
        """The entries of a record's weighting that say so."""

    @property
    def buffers(self) -> bool:
        """Whether also entries of the model that are not trained change, and get noise."""

    def sensitivity(self, server_round: int, hospitals: int) -> float:
        """Return by how much one unit changes the sum without noise, as Euclidean length."""

    def spent(self, server_round: int) -> dict[str, float]:
        """Return what rounds have cost, as metrics; empty if the strategy says so itself."""


@dataclass(frozen=True)
class PatientNoise:
    """Noise that hides each patient, if a round is one step.

    A hospital draws its patients with the declared sampling rate, clips the gradient of each to the
    declared norm C, adds them up and divides by the declared batch size B, whatever number of
    patients it has. Its change of the model is that times the learning rate; it counts as 1 of n
    hospitals. So a patient changes the sum by at most rate * C / (B * n), and each patient of all
    hospitals counts the same.

    Parameters
    ----------
    settings : Settings
    privacy : PrivacySettings
    noise_multiplier : float
        Of the sum; above 0.

    Raises
    ------
    InputError
        If the settings would make one hospital's sensitivity another than the other's, or would
        make more of a step than the gradient.
    """

    settings: Settings
    privacy: PrivacySettings
    noise_multiplier: float

    buffers = False

    def __post_init__(self) -> None:
        _require_declared(self.settings, self.privacy)
        _require_noise(self.noise_multiplier)

    @classmethod
    def planned(cls, settings: Settings, privacy: PrivacySettings) -> Self:
        """Return the least noise that keeps all rounds of a run to its target."""
        _require_declared(settings, privacy)
        noise = noise_for(
            privacy.target_epsilon,
            privacy.delta,
            privacy.sampling_rate,
            privacy.num_server_rounds,
        )
        return cls(settings, privacy, noise)

    @property
    def weighting(self) -> dict[str, Value]:
        """The noise multiplier."""
        return {NOISE: self.noise_multiplier}

    @property
    def release(self) -> Release:
        """What the sum of a round releases about a patient."""
        return Release(self.privacy.sampling_rate, self.noise_multiplier)

    def factor(self, server_round: int) -> float:
        """Return what the sum of clipped gradients is multiplied by, less its sign."""
        rate = self.settings.rate_at(self.settings.progress(server_round))
        return rate / self.settings.batch_size

    def sensitivity(self, server_round: int, hospitals: int) -> float:
        """Return rate * C / (B * n)."""
        return self.factor(server_round) * self.privacy.max_grad_norm / hospitals

    def spent(self, server_round: int) -> dict[str, float]:
        """Return the epsilon of the rounds so far, each charged once."""
        return {EPSILON: epsilon_of({self.release: server_round}, self.privacy.delta)}


@dataclass(frozen=True)
class HospitalNoise:
    """Noise that hides what each hospital adds.

    A hospital clips its change of the model to the declared norm C, and counts as 1 of n. So what
    it adds changes the sum by at most C / n.

    Parameters
    ----------
    noise_multiplier : float
        Of the sum; above 0.
    clipping_norm : float
        Above 0, finite.
    """

    noise_multiplier: float
    clipping_norm: float

    buffers = True

    def __post_init__(self) -> None:
        _require_noise(self.noise_multiplier)
        if not 0 < self.clipping_norm < math.inf:
            raise SecureError(f"norm must be above 0 and finite, got {self.clipping_norm}")

    @property
    def weighting(self) -> dict[str, Value]:
        """The noise multiplier and the norm."""
        return {NOISE: self.noise_multiplier, NORM: self.clipping_norm}

    @property
    def release(self) -> Release:
        """What the sum of a round releases about a hospital, all of which take part."""
        return Release(1.0, self.noise_multiplier)

    def sensitivity(self, server_round: int, hospitals: int) -> float:
        """Return C / n."""
        return self.clipping_norm / hospitals

    def spent(self, server_round: int) -> dict[str, float]:
        """Return nothing: the strategy keeps the account."""
        return {}


@dataclass(frozen=True)
class Shares:
    """How much noise each hospital of one sum adds.

    Parameters
    ----------
    noise_multiplier : float
        What is left of the noise when some shares are subtracted, in units of `sensitivity`.
    sensitivity : float
        Above 0.
    hospitals : int
        Hospitals that are asked: n.
    needed : int
        Hospitals, at least, over which the sum opens: u.
    colluders : int
        Hospitals that may work with the server: c.

    Raises
    ------
    SecureError
        If no share would be left.

    Examples
    --------
    Of ten hospitals six must be in a sum, one of them may work with the server, and five shares
    hide a patient.

    >>> shares = Shares(1.0, sensitivity=0.5, hospitals=10, needed=6, colluders=1)
    >>> shares.counted
    5
    >>> round(shares.share, 4), round(shares.total, 4)
    (0.2236, 0.7071)
    """

    noise_multiplier: float
    sensitivity: float
    hospitals: int
    needed: int
    colluders: int

    def __post_init__(self) -> None:
        if self.counted < 1:
            raise SecureError(
                f"of {self.needed} shares of noise {max(self.colluders, 1)} can be subtracted, and "
                "none is left: pin more members (fedmed keys pin), or lower c"
            )

    @classmethod
    def of(cls, record: Record, declared: Declared) -> Self:
        """Return the shares of the sum that a record describes."""
        hospitals = len(record.names)
        return cls(
            noise_multiplier=declared.weighting[NOISE],
            sensitivity=declared.sensitivity(record.server_round, hospitals),
            hospitals=hospitals,
            needed=record.needed,
            colluders=record.colluders,
        )

    @property
    def counted(self) -> int:
        """Shares that nobody can subtract: h = u - max(c, 1)."""
        return self.needed - max(self.colluders, 1)

    @property
    def share(self) -> float:
        """Standard deviation of one hospital's share, in each value."""
        return self.sensitivity * self.noise_multiplier / math.sqrt(self.counted)

    @property
    def total(self) -> float:
        """Standard deviation of the noise of all hospitals that are asked."""
        return self.share * math.sqrt(self.hospitals)

    def require_room(self, part: Part) -> None:
        """Check that a part of a layout takes a share as it is.

        Raises
        ------
        SecureError
            If its sigma is another than the total, or the share is below 100 steps of the ring or
            not below 2^40.
        """
        if not math.isclose(part.sigma, self.total, rel_tol=_CLOSE):
            raise SecureError(
                f"{part.name} leaves room for noise of {part.sigma:g}, and the shares of "
                f"{self.hospitals} hospitals make {self.total:g}"
            )
        steps = self.share * part.scale
        if not _LEAST_STEPS <= steps < _MOST_STEPS:
            raise SecureError(
                f"a hospital's share of the noise must be from {_LEAST_STEPS:g} to below 2^40 "
                f"steps of the ring, got {steps:.3g} for {part.name}: lower secure-exponent, which "
                f"bounds changes at {part.bound:g} and so makes the steps as wide"
            )

    def require_layout(self, layout: Layout, sizes: Mapping[str, int]) -> None:
        """Check that nothing is summed beside the model's noised changes and the ones.

        Parameters
        ----------
        layout : Layout
        sizes : mapping of str to int
            Number of values of each entry of the model.

        Raises
        ------
        SecureError
        """
        for part in layout.parts:
            if part == ONES:
                continue
            key = part.name.removeprefix(MODEL)
            of_model = part.name.startswith(MODEL) and part.kind == FIXED
            if not of_model or sizes.get(key) != part.size:
                raise SecureError(
                    f"beside noise nothing may be summed but changes of the model, got {part.name}"
                )
            self.require_room(part)


def _require_noise(noise_multiplier: object) -> None:
    if type(noise_multiplier) is not float or not noise_multiplier > 0:
        raise SecureError(f"the noise multiplier must be a number above 0, got {noise_multiplier}")
    require_release(1.0, noise_multiplier)


def has_shares(settings: Settings, privacy: PrivacySettings) -> bool:
    """Return whether patients' noise may come in shares: nothing else bounds several steps."""
    return privacy.on and settings.local_steps == 1


def _require_declared(settings: Settings, privacy: PrivacySettings) -> None:
    """Raise `InputError` unless a step is one that all hospitals declare alike."""
    if not has_shares(settings, privacy):
        raise setting_error(
            'local-steps must be 1 and privacy "patient" for shares of noise, got '
            f'{settings.local_steps} and "{privacy.privacy}": with several steps a round each '
            "hospital adds noise of its own",
            "local-steps",
        )
    way_out = 'with shares of noise (secure="sum", privacy="patient", local-steps=1)'
    if not privacy.sampling_rate:
        raise setting_error(
            f"sampling-rate must be above 0 {way_out}, got 0: all hospitals draw patients with one "
            "probability; batch-size is then the mean number of patients that a hospital draws",
            "sampling-rate",
        )
    plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    for name, wanted in plain.items():
        value = getattr(settings, name)
        if value != wanted:
            key = name.replace("_", "-")
            raise setting_error(
                f"{key} must be {wanted} {way_out}, got {value}: the sum is of clipped gradients "
                "alone; let a strategy such as FedAdam or FedAvgM make more of it, or take several "
                "local-steps, in which each hospital adds noise of its own",
                key,
            )
