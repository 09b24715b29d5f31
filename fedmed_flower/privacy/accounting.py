"""What releases with Gaussian noise cost together.

By privacy loss distributions (Doroshenko, Ghazi, Kamath, Kumar, Manurangsi: Connect the Dots, PETS
2022, https://arxiv.org/abs/2207.04380), as dp-accounting computes them: an upper bound, and the
tightest that is known. Neighbours are two sets that differ by one member; samples are Poisson
samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import dp_accounting
from dp_accounting import dp_event, pld

from fedmed_flower.errors import InputError


class Release(NamedTuple):
    """One sum of clipped contributions, with Gaussian noise.

    Attributes
    ----------
    sampling_rate : float
        Probability with which each member takes part; above 0, at most 1.
    noise_multiplier : float
        Standard deviation of the noise in units of the clipping norm; 0 for no noise.
    """

    sampling_rate: float
    noise_multiplier: float


def epsilon_of(releases: Iterable[Release] | Mapping[Release, int], delta: float) -> float:
    """Return the epsilon of all releases together.

    Parameters
    ----------
    releases : iterable of Release, or mapping to their numbers
        Equal ones are composed together.
    delta : float
        Above 0, below 1.

    Returns
    -------
    float
        0 without releases; infinite where one of them had no noise.

    Raises
    ------
    InputError
        Where a value is out of its range.
    """
    if not 0 < delta < 1:
        raise InputError(f"delta must be above 0 and below 1, got {delta}")
    counts = Counter(releases)
    accountant = pld.PLDAccountant()
    for release, count in sorted(counts.items()):
        require_release(*release)
        if release.noise_multiplier == 0:
            return float("inf")
        accountant.compose(_event(release), count)
    return float(accountant.get_epsilon(delta)) if counts else 0.0


def require_release(sampling_rate: float, noise_multiplier: float) -> None:
    """Raise `InputError` where a value of a release is out of its range."""
    if not 0 < sampling_rate <= 1:
        raise InputError(f"sampling_rate must be above 0 and at most 1, got {sampling_rate}")
    if not 0 <= noise_multiplier < float("inf"):
        raise InputError(f"noise_multiplier must be at least 0 and finite, got {noise_multiplier}")


def _event(release: Release) -> dp_accounting.DpEvent:
    gaussian = dp_event.GaussianDpEvent(release.noise_multiplier)
    if release.sampling_rate == 1:
        return gaussian
    return dp_event.PoissonSampledDpEvent(release.sampling_rate, gaussian)
