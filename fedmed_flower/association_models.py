"""Regressions of one variant at a time, and principal components, from sums over hospitals.

Each hospital has an intercept of its own, as a pooled analysis with one indicator a hospital has.
A. L. Price et al., "Principal components analysis corrects for stratification in genome-wide
association studies", Nature Genetics 38:904-909, 2006.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, special

from fedmed_flower.association import Floats, Results, log10_p_of_t, log10_p_of_z

# A regression takes the covariates first and the copies of A1 last.
MOST_STEPS = 25
_CONVERGED, _SINGULAR, _SPENT = 1e-7, 1e-10, 1e-12
_MORE_COLUMNS, _MOST_COLUMNS, _MOST_ROUNDS, _STILL = 2, 400, 100, 1e-6
# In each of two arrays at the server: 128 MB.
_MOST_NUMBERS = 1 << 24


def pairs(width: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return rows and columns of a symmetric matrix as it is sent: its upper triangle."""
    return np.triu_indices(width)


def _square(packed: Floats, width: int) -> Floats:
    """Return matrices (..., width, width) from their upper triangles."""
    whole = np.zeros((*packed.shape[:-1], width, width))
    rows, columns = pairs(width)
    whole[..., rows, columns] = packed
    whole[..., columns, rows] = packed
    return whole


def _copies(genotypes: NDArray[np.int8]) -> tuple[Floats, Floats]:
    """Return copies of A1, 0 where missing, and 1 where known; (m, n) both."""
    known = genotypes.T >= 0
    return np.where(known, genotypes.T, np.int8(0)).astype(np.float64), known.astype(np.float64)


def linear_sums(genotypes: NDArray[np.int8], trait: Floats, covariates: Floats) -> Floats:
    """Return what a hospital adds to the linear models of some variants.

    Parameters
    ----------
    genotypes : (n, m) int8 array
        Negative where missing.
    trait : (n,) float array
    covariates : (n, c) float array

    Returns
    -------
    (m, (c + 2) (c + 3) / 2) float array
        Sums of products of covariates, copies and trait about their means over the people whose
        genotype is known: the upper triangle of a matrix.
    """
    copies, known = _copies(genotypes)
    others = np.column_stack([covariates, trait])
    others = others - others.mean(0)
    width = others.shape[1] + 1
    people = np.maximum(known.sum(1), 1)
    copies = (copies - (copies.sum(1) / people)[:, None]) * known
    rows, columns = pairs(width - 1)
    sums = known @ others
    among = known @ (others[:, rows] * others[:, columns])
    among -= sums[:, rows] * sums[:, columns] / people[:, None]
    whole = np.zeros((len(copies), width, width))
    # The copies' place is before the trait, which is the last of `others`.
    order = np.array([*range(width - 2), width - 1])
    whole[:, order[rows], order[columns]] = among
    whole[:, order[columns], order[rows]] = among
    with_copies = copies @ others
    whole[:, width - 2, order] = whole[:, order, width - 2] = with_copies
    whole[:, width - 2, width - 2] = np.einsum("ij,ij->i", copies, copies)
    rows, columns = pairs(width)
    return np.asarray(whole[:, rows, columns], np.float64)


def linear_test(sums: Floats, people: NDArray[np.int64], sites: NDArray[np.int64]) -> Results:
    """Return the slope of the trait on the copies of A1, as ``plink --linear``.

    Parameters
    ----------
    sums : (m, k) float array
        `linear_sums`, added up over the hospitals.
    people, sites : (m,) int array
        How many people and hospitals that were.
    """
    width = round((np.sqrt(8 * sums.shape[1] + 1) - 1) / 2)
    whole = _square(sums, width)
    inverse, sound = _inverse(whole[:, :-1, :-1])
    freedom = (people - sites - (width - 1)).astype(np.float64)
    slopes = np.einsum("mij,mj->mi", inverse, whole[:, :-1, -1])
    rest = whole[:, -1, -1] - np.einsum("mi,mi->m", slopes, whole[:, :-1, -1])
    # What is left of a trait that is explained wholly is rounding.
    exact = rest <= 1e-13 * whole[:, -1, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(np.maximum(rest, 0) / freedom * inverse[:, -1, -1])
        known = sound & (freedom > 0) & ~exact
        effect, error = (np.where(known, part, np.nan) for part in (slopes[:, -1], error))
        t = effect / error
    return Results(effect, error, t, log10_p_of_t(t, freedom))


def _inverse(matrices: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Return inverses of (m, p, p) matrices of sums, and which of them are sound."""
    with np.errstate(invalid="ignore"):
        scale = np.sqrt(np.einsum("mii->mi", matrices))
    sound = np.isfinite(matrices).all((1, 2)) & (scale > 0).all(1)
    unit = np.eye(matrices.shape[-1])
    safe = np.where(sound[:, None], scale, 1.0)
    scaled = np.where(sound[:, None, None], matrices, unit) / (safe[:, :, None] * safe[:, None, :])
    sound &= np.linalg.eigvalsh(scaled)[:, 0] > _SINGULAR
    scaled = np.where(sound[:, None, None], scaled, unit)
    inverse = np.linalg.inv(scaled) / (safe[:, :, None] * safe[:, None, :])
    return np.asarray(inverse, np.float64), sound


def logistic_terms(
    genotypes: NDArray[np.int8],
    cases: NDArray[np.bool_],
    covariates: Floats,
    slopes: Floats,
    intercepts: Floats,
) -> Floats:
    """Return what a hospital adds to one Newton step of the logistic models of some variants.

    Parameters
    ----------
    genotypes : (n, m) int8 array
        Negative where missing.
    cases : (n,) bool array
    covariates : (n, c) float array
    slopes : (m, c + 1) float array
        Where the models stand: of the covariates and, last, of the copies of A1.
    intercepts : (m,) float array
        This hospital's.

    Returns
    -------
    (m, 1 + p + p (p + 1) / 2) float array, p = c + 2
        Log-likelihood, score, and the upper triangle of the information; intercept first.
    """
    copies, known = _copies(genotypes)
    fixed = np.column_stack([np.ones(len(cases)), covariates])
    line = intercepts[:, None] + slopes[:, :-1] @ covariates.T + slopes[:, -1:] * copies
    risk = special.expit(line)
    likelihood = ((cases * line - np.logaddexp(0, line)) * known).sum(1)
    rest = (cases - risk) * known
    weight = risk * (1 - risk) * known
    width = fixed.shape[1] + 1
    score = np.column_stack([rest @ fixed, np.einsum("ij,ij->i", rest, copies)])
    information = np.zeros((len(copies), width, width))
    rows, columns = pairs(width - 1)
    information[:, rows, columns] = weight @ (fixed[:, rows] * fixed[:, columns])
    weighted = weight * copies
    information[:, :-1, -1] = weighted @ fixed
    information[:, -1, -1] = np.einsum("ij,ij->i", weighted, copies)
    rows, columns = pairs(width)
    return np.column_stack([likelihood, score, information[:, rows, columns]])


class LogisticFit:
    """Newton's method for the logistic models of some variants, one intercept a hospital.

    Attributes
    ----------
    slopes : (m, c + 1) float array
    intercepts : (hospitals, m) float array
    taking : (hospitals, m) bool array
        Which hospital takes part in which variant.
    failed : (m,) bool array
        The model is not identified, or did not converge.

    Parameters
    ----------
    cases, controls : (hospitals, m) int array
        People at each hospital. One without both takes no part: its intercept is not identified.
    covariates : int
        How many.
    """

    def __init__(
        self, cases: NDArray[np.int64], controls: NDArray[np.int64], covariates: int
    ) -> None:
        self.taking = (cases > 0) & (controls > 0)
        safe = np.where(self.taking, [cases, controls], 1).astype(np.float64)
        self.intercepts = np.log(safe[0] / safe[1])
        variants = cases.shape[1]
        self.slopes = np.zeros((variants, covariates + 1))
        self.failed: NDArray[np.bool_] = np.logical_not(self.taking.any(0))
        self._error = np.full(variants, np.nan)
        self._best = np.full(variants, -np.inf)
        self._step = np.zeros((variants, covariates + 1)), np.zeros_like(self.intercepts)
        self._open: NDArray[np.bool_] = np.logical_not(self.failed)

    @property
    def waiting(self) -> NDArray[np.intp]:
        """Places of the variants that need another step."""
        return np.flatnonzero(self._open)

    def leave_out(self, site: int) -> None:
        """Go on without a hospital."""
        self.taking[site] = False
        self._best[:] = -np.inf
        alone = ~self.taking.any(0)
        self.failed |= alone
        self._open &= ~alone

    def step(self, terms: Floats, waiting: NDArray[np.intp]) -> None:
        """Take one step.

        Parameters
        ----------
        terms : (hospitals, w, k) float array
            `logistic_terms` of the variants at `waiting`; 0 where a hospital takes no part.
        waiting : (w,) int array
        """
        width = self.slopes.shape[1] + 1
        taking, likelihood = self.taking[:, waiting], terms[:, :, 0].sum(0)
        # A step that went too far is halved.
        worse = likelihood < self._best[waiting] - 1e-9 * np.abs(self._best[waiting])
        back = waiting[worse]
        for part, value in zip(self._step, (self.slopes, self.intercepts), strict=True):
            place: tuple[object, ...] = (back,) if value is self.slopes else (slice(None), back)
            part[place] /= 2
            value[place] -= part[place]
        ahead, terms, taking = waiting[~worse], terms[:, ~worse], taking[:, ~worse]
        self._best[ahead] = likelihood[~worse]
        score, information = terms[:, :, 1 : 1 + width], _square(terms[:, :, 1 + width :], width)
        # The intercept of a hospital is in its own terms alone: it is solved for there.
        own = np.where(taking & (information[:, :, 0, 0] > 0), information[:, :, 0, 0], np.inf)
        share = information[:, :, 0, 1:] / own[:, :, None]
        slopes = (information[:, :, 1:, 1:] - share[..., None] * information[:, :, :1, 1:]).sum(0)
        wanted = (score[:, :, 1:] - share * score[:, :, :1]).sum(0)
        inverse, sound = _inverse(slopes)
        change = np.einsum("mij,mj->mi", inverse, wanted)
        shift = np.where(
            np.isfinite(own), score[:, :, 0] / own - np.einsum("smj,mj->sm", share, change), 0.0
        )
        self.failed[ahead[~sound]] = True
        self._open[ahead[~sound]] = False
        change[~sound], shift[:, ~sound] = 0.0, 0.0
        self.slopes[ahead] += change
        self.intercepts[:, ahead] += shift
        self._step[0][ahead], self._step[1][:, ahead] = change, shift
        self._error[ahead] = np.sqrt(inverse[:, -1, -1])
        errors = np.sqrt(np.einsum("mii->mi", inverse))
        done = sound & (np.abs(change) < _CONVERGED * errors).all(1)
        done &= (np.abs(shift) * np.sqrt(np.where(np.isfinite(own), own, 0)) < _CONVERGED).all(0)
        self._open[ahead[done]] = False

    def finish(self) -> Results:
        """Return the odds ratios, as ``plink --logistic``; NaN where a model failed."""
        self.failed |= self._open
        slope, error = (
            np.where(self.failed, np.nan, part) for part in (self.slopes[:, -1], self._error)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            z = slope / error
            return Results(np.exp(slope), error, z, log10_p_of_z(z))


def standardised(genotypes: NDArray[np.int8], frequencies: Floats) -> Floats:
    """Return copies of A1 as (n, m) with mean 0 and variance 1 for these frequencies; missing 0."""
    spread = np.sqrt(2 * frequencies * (1 - frequencies))
    return np.where(genotypes < 0, 0.0, (genotypes - 2 * frequencies) / spread)


def principal_components(
    multiply: Callable[[Floats], Floats], variants: int, people: int, count: int, seed: int
) -> tuple[Floats, Floats, int]:
    """Return the first principal components by the block Lanczos method.

    Each round's answers stay in use, so that the rounds are few where the components are hardly
    stronger than what follows them (Musco and Musco, "Randomized block Krylov methods for stronger
    and faster approximate singular value decomposition", NeurIPS 2015, algorithm 2; restarted from
    the strongest half where they would fill the memory, as in Wu and Simon, "Thick-restart Lanczos
    method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl. 22, 2000).

    Parameters
    ----------
    multiply : callable
        Maps loadings (variants, k) to the sum over all people of g (g' loadings), where g is a
        person's `standardised` genotypes.
    variants, people : int
        How many, all hospitals together.
    count : int
        Components wanted.
    seed : int

    Returns
    -------
    loadings : (variants, count) float array
        Of length 1, the strongest first.
    values : (count,) float array
        Variance of the scores, summed over people and divided by the number of variants.
    rounds : int
        Calls of `multiply`.
    """
    width = min(count + _MORE_COLUMNS, variants, people)
    most = max(4 * width, min(_MOST_COLUMNS, _MOST_NUMBERS // variants))
    block = np.linalg.qr(np.random.default_rng(seed).normal(size=(variants, width)))[0]
    basis = products = np.empty((variants, 0))
    loadings = np.zeros((variants, min(count, width)))
    rounds, moved = 0, np.inf
    while moved > _STILL and rounds < _MOST_ROUNDS and block.shape[1]:
        rest = multiply(block)
        basis, products = np.hstack([basis, block]), np.hstack([products, rest])
        values, turn = np.linalg.eigh(basis.T @ products)
        turn, before, rounds = turn[:, ::-1], loadings, rounds + 1
        loadings = basis @ turn[:, :count]
        moved = float(np.linalg.norm(loadings - before @ (before.T @ loadings)))
        rest = rest - basis @ (basis.T @ rest)
        new, sizes, _ = linalg.qr(rest, mode="economic", pivoting=True)
        # Where nothing new is left, the components are exact.
        block = new[:, np.abs(np.diag(sizes)) > _SPENT * values[-1]]
        for _ in range(2):  # What is hardly new is, as first computed, not orthogonal to the rest.
            block = np.linalg.qr(block - basis @ (basis.T @ block))[0]
        if basis.shape[1] + width > most:
            strongest = turn[:, : most // 2]
            basis, products = basis @ strongest, products @ strongest
    # The sign is free: the largest loading is positive.
    loadings = loadings * np.sign(loadings[np.abs(loadings).argmax(0), range(loadings.shape[1])])
    return loadings, values[::-1][:count] / variants, rounds
