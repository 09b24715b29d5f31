"""Whether the covariates of all hospitals together can be told apart.

If one of them is constant or follows from others, no variant's regression has a result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.genomics.types import Floats

# Share of a covariate's variance below which it follows from the others: what rounding leaves.
_SPENT = 1e-9
# A standardised slope above this makes a covariate one of those from which another follows.
_INVOLVED = 1e-4


class CovariateCheck:
    """Checks the covariates once, by the first sums that hospitals send for their regressions.

    Parameters
    ----------
    names : sequence of str
        Of the covariates and of the components, in the order of their slopes.

    Attributes
    ----------
    names : list of str
    done : bool
        Whether all hospitals' covariates were checked. Without covariates, there is nothing to do.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._sums: dict[int, Floats] = {}
        self.done = not self.names

    def add(self, sums: Floats, people: NDArray[np.int64], sites: Collection[int]) -> None:
        """Take the sums of some variants.

        Nothing is checked until each hospital has sent those of one variant: a covariate that is
        constant at some hospitals may vary at another.

        Parameters
        ----------
        sums : (hospitals, m, c, c) float array
            Of products of the covariates, each centred on its mean at the hospital.
        people : (hospitals, m) int array
            How many people are in the sums; 0 if a hospital takes no part.
        sites : collection of int
            The hospitals that take part in the study.

        Raises
        ------
        InputError
            If all hospitals have sent sums by which the covariates cannot be told apart.
        """
        if self.done:
            return
        for site in sites:
            variant = int(people[site].argmax())
            if site not in self._sums and people[site, variant]:
                self._sums[site] = sums[site, variant]
        if not set(sites) <= self._sums.keys():
            return
        self.done = True
        together = np.sum([self._sums[site] for site in sites], 0)
        require_distinct(together, self.names)


def require_distinct(sums: Floats, names: Sequence[str]) -> None:
    """Raise `InputError` if a covariate is constant or follows from those before it.

    Parameters
    ----------
    sums : (c, c) float array
        Of products of the covariates, each centred on its mean at each hospital; all people.
    names : sequence of str
        Of the covariates, for the error.
    """
    if same := constant(sums, names):
        raise InputError(
            f"{_listed('covariate', same)} the same for everybody at each hospital. The "
            "hospital is in the model already: take it out of covariates"
        )
    for name, others in dependent(sums, names):
        raise InputError(
            f"the covariate {name} follows from {' and '.join(others)} at each hospital, so their "
            f"effects cannot be told apart: take {name} out of covariates"
        )


def constant(sums: Floats, names: Sequence[str]) -> list[str]:
    """Return the covariates of which everybody has the same; see `require_distinct`."""
    spread = np.diagonal(sums)
    return [name for name, value in zip(names, spread, strict=True) if not value > 0]


def dependent(sums: Floats, names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each covariate that follows from those before it, and which these are.

    Parameters
    ----------
    sums, names
        As `require_distinct` takes them; no covariate is constant.
    """
    scale = np.sqrt(np.diagonal(sums))
    correlation = sums / (scale[:, None] * scale)
    for index, name in enumerate(names):
        # Least squares, since sums that no people can have may be singular.
        slopes, *_ = np.linalg.lstsq(correlation[:index, :index], correlation[:index, index])
        rest = 1 - correlation[:index, index] @ slopes
        if rest <= _SPENT:
            involved = np.flatnonzero(np.abs(slopes) > _INVOLVED).tolist()
            yield name, [names[other] for other in involved]


def _listed(what: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"the {what} {names[0]} is"
    return f"the {what}s {', '.join(names)} are each"
