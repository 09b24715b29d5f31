"""Regressions of one variant at a time, and principal components, from sums over hospitals.

Each hospital has an intercept, like a pooled analysis with one indicator variable a hospital.
A. L. Price et al., "Principal components analysis corrects for stratification in genome-wide
association studies", Nature Genetics 38:904-909, 2006.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, special

from fedmed_flower.genomics.association import (
    QUANTILE,
    Results,
    Spread,
    log10_p_of_t,
    log10_p_of_z,
    spread_of,
)
from fedmed_flower.genomics.types import Floats

MOST_STEPS = 25
_CONVERGED = 1e-7
_SINGULAR = 1e-10
_SPENT = 1e-12
# Among the carriers of an allele, one person may have this many times the share allowed among all.
_CARRIERS = 5
_MORE_COLUMNS = 2
_MOST_COLUMNS = 400
_MOST_ROUNDS = 100
_MOST_INTERCEPT_STEPS = 100
_STILL = 1e-6
# Numbers in each of two arrays at the server: 128 MB.
_MOST_NUMBERS = 1 << 24


def pairs(width: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the row and column indices of the upper triangle of a symmetric matrix.

    Only this triangle of such a matrix is sent.
    """
    return np.triu_indices(width)


def _square(packed: Floats, width: int) -> Floats:
    """Return matrices (..., width, width) from their upper triangles."""
    whole = np.zeros((*packed.shape[:-1], width, width))
    rows, columns = pairs(width)
    whole[..., rows, columns] = packed
    whole[..., columns, rows] = packed
    return whole


def _copies(genotypes: NDArray[np.int8]) -> tuple[Floats, Floats]:
    """Return the copies of A1, 0 if missing, and whether they are known, 1 or 0; both (m, n)."""
    known = genotypes.T >= 0
    copies = np.where(known, genotypes.T, np.int8(0))
    return copies.astype(np.float64), known.astype(np.float64)


def linear_sums(genotypes: NDArray[np.int8], trait: Floats, covariates: Floats) -> Floats:
    """Return the sums of one hospital for the linear models of some variants.

    Parameters
    ----------
    genotypes : (n, m) int8 array
        Negative if missing.
    trait : (n,) float array
    covariates : (n, c) float array

    Returns
    -------
    (m, (c + 2) (c + 3) / 2) float array
        Sums of products of covariates, copies and trait, centred on their means over the people
        whose genotype is known: the upper triangle of a matrix. Its columns are the covariates, the
        copies of A1 and the trait.
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
    # The copies come before the trait, which is the last of `others`.
    order = np.array([*range(width - 2), width - 1])
    whole[:, order[rows], order[columns]] = among
    whole[:, order[columns], order[rows]] = among
    with_copies = copies @ others
    whole[:, width - 2, order] = whole[:, order, width - 2] = with_copies
    whole[:, width - 2, width - 2] = np.einsum("ij,ij->i", copies, copies)
    rows, columns = pairs(width)
    return np.asarray(whole[:, rows, columns], np.float64)


def linear_covariance(sums: Floats) -> Floats:
    """Return the (..., c, c) sums of products of the covariates that are in `linear_sums`."""
    return _square(sums, _width(sums))[..., :-2, :-2]


def linear_test(sums: Floats, people: NDArray[np.int64]) -> Results:
    """Return the slope of the trait on the copies of A1, as ``plink --linear``.

    The hospitals' own slopes, of which the results say how much they differ, are those of one model
    a hospital. A covariate that has one value there is left out of it.

    Parameters
    ----------
    sums : (hospitals, m, k) float array
        `linear_sums`; 0 if a hospital takes no part.
    people : (hospitals, m) int array
        How many people are in the sums.
    """
    together = sums.sum(0)
    spread = spread_of(*own_slopes(sums, people, linear_scale(together)))
    return linear_result(together, people.sum(0), (people > 0).sum(0), spread)


def linear_scale(sums: Floats) -> Floats:
    """Return the (..., c + 2) diagonal of the matrices in `linear_sums`."""
    return np.asarray(np.einsum("...ii->...i", _square(sums, _width(sums))), np.float64)


def linear_result(
    sums: Floats, people: NDArray[np.int64], hospitals: NDArray[np.int64], spread: Spread
) -> Results:
    """Return the slope of the trait on the copies of A1, from sums over hospitals.

    Parameters
    ----------
    sums : (m, k) float array
        `linear_sums`, added up.
    people, hospitals : (m,) int array
        How many are in the sums.
    spread : Spread
        Of the hospitals' own slopes.
    """
    whole = _square(sums, _width(sums))
    freedom = (people - hospitals - (whole.shape[-1] - 1)).astype(np.float64)
    effect, error = _least_squares(whole, freedom)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = effect / error
        reach = special.stdtrit(freedom, QUANTILE) * error
    log10_p = log10_p_of_t(t, freedom)
    return Results(effect, error, effect - reach, effect + reach, t, log10_p, *spread)


def own_slopes(sums: Floats, people: NDArray[np.int64], scale: Floats) -> tuple[Floats, Floats]:
    """Return each hospital's own slope and its standard error; NaN if it has none.

    Parameters
    ----------
    sums : (hospitals, m, k) float array
        `linear_sums`.
    people : (hospitals, m) int array
    scale : (m, c + 2) float array
        `linear_scale` of all hospitals.
    """
    whole = _square(sums, _width(sums))
    covariates = whole.shape[-1] - 2
    own, constant = _without_constant(whole, scale, covariates)
    freedom = people - 1 - (covariates + 1 - constant)
    slopes, errors = _least_squares(own.reshape(-1, *own.shape[2:]), freedom.ravel())
    return slopes.reshape(people.shape), errors.reshape(people.shape)


def _width(sums: Floats) -> int:
    return round((math.sqrt(8 * sums.shape[-1] + 1) - 1) / 2)


def _least_squares(sums: Floats, freedom: NDArray[Any]) -> tuple[Floats, Floats]:
    """Return slope of the copies and its standard error; NaN if the model is not identified.

    Parameters
    ----------
    sums : (m, c + 2, c + 2) float array
        Of products of covariates, copies and trait.
    freedom : (m,) array
        Degrees of freedom that the model leaves.
    """
    inverse, sound = _inverse(sums[:, :-1, :-1])
    slopes = np.einsum("mij,mj->mi", inverse, sums[:, :-1, -1])
    rest = sums[:, -1, -1] - np.einsum("mi,mi->m", slopes, sums[:, :-1, -1])
    # If the trait is explained wholly, the residual sum is rounding.
    exact = rest <= 1e-13 * sums[:, -1, -1]
    known = sound & (freedom > 0) & ~exact
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(np.maximum(rest, 0) / freedom * inverse[:, -1, -1])
    return np.where(known, slopes[:, -1], np.nan), np.where(known, error, np.nan)


def _without_constant(
    own: Floats, scale: Floats, covariates: int
) -> tuple[Floats, NDArray[np.int64]]:
    """Return hospitals' matrices without the covariates that are constant there, and how many.

    Parameters
    ----------
    own : (hospitals, m, p, p) float array
        Covariates first; then the copies and, maybe, the trait.
    scale : (m, p) float array
        The diagonal of the sum over all hospitals.
    covariates : int
        How many covariates there are.

    Returns
    -------
    matrices : (hospitals, m, p, p) float array
        A constant covariate has 1 on the diagonal and 0 elsewhere, so its slope is 0.
    constant : (hospitals, m) int array
    """
    spread = np.einsum("smii->smi", own)
    kept = spread > _SINGULAR * scale
    matrices = np.where(kept[..., :, None] & kept[..., None, :], own, 0.0)
    constant = ~kept
    # If everybody has the same copies, the matrix stays singular: there is no result.
    constant[..., covariates:] = False
    matrices += constant[..., :, None] * np.eye(own.shape[-1])
    return matrices, constant.sum(2)


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
) -> tuple[Floats, Floats]:
    """Return the terms of one hospital for a Newton step of the logistic models of some variants.

    The server chooses the models' parameters, and so how much each person weighs. With risk p and
    outcome y, a person adds (y - p) x to the score and p (1 - p) x x' to the information; x are 1,
    the covariates and the copies. If a slope is steep, p (1 - p) is next to 0 for all but the
    person at the threshold, and the information discloses this person's x. Two scores also differ
    by a person's x if the person lies between their thresholds.

    So the largest share of one person is returned beside the sums. It is the largest of the
    person's shares in the sum of p (1 - p), in the sum of abs(y - p) and, divided by 5, in the sums
    of p (1 - p) times the copies of either allele. The division is needed because one of ten
    carriers may have several tenths in an honest fit. Measured so, no person has more than a tenth
    in 999 of 1,000 honest fits, from 0 to convergence, at a hospital with ten cases, ten controls,
    ten copies and fifty people or more, if covariates move the log odds by a standard deviation of
    up to 1.

    Two shares are not measured, because no server chooses them. In the sum of abs(y - p) times the
    copies, the only case among ten carriers has half in any study, as the counts disclose anyway.
    In the sums of a covariate, a person whose covariate is far from all others' has most.

    Parameters
    ----------
    genotypes : (n, m) int8 array
        Negative if missing.
    cases : (n,) bool array
    covariates : (n, c) float array
    slopes : (m, c + 1) float array
        The models' present slopes: of the covariates and, last, of the copies of A1.
    intercepts : (m,) float array
        The models' present intercepts for this hospital.

    Returns
    -------
    terms : (m, p + p (p + 1) / 2) float array, p = c + 2
        Score, and the upper triangle of the information; intercept first.
    shares : (m,) float array
        The largest share of one person, 0 to 1. NaN if nobody weighs anything or a number is too
        large for a float; the terms are then of no use.
    """
    copies, known = _copies(genotypes)
    fixed = np.column_stack([np.ones(len(cases)), covariates])
    with np.errstate(over="ignore", invalid="ignore"):
        line = intercepts[:, None] + slopes[:, :-1] @ covariates.T + slopes[:, -1:] * copies
        risk = special.expit(line)
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
    shares = np.maximum(_largest_share(weight), _largest_share(np.abs(rest)))
    others = 2 * known - copies
    for carried, carrier_weight in ((copies, weighted), (others, weight * others)):
        # An allele that nobody has discloses nobody.
        share = np.where(carried.any(1), _largest_share(carrier_weight), 0.0)
        shares = np.maximum(shares, share / _CARRIERS)
    return np.column_stack([score, information[:, rows, columns]]), shares


def logistic_covariance(terms: Floats, covariates: int) -> Floats:
    """Return the (..., c, c) sums of products of the covariates that are in `logistic_terms`.

    Each person weighs p (1 - p), and the covariates are centred.
    """
    width = covariates + 2
    information = _square(terms[..., width:], width)
    weight = information[..., :1, :1]
    sums = information[..., :1, 1:-1]
    means = sums / np.where(weight > 0, weight, np.inf)
    return information[..., 1:-1, 1:-1] - np.swapaxes(means, -1, -2) * sums


def _largest_share(weights: Floats) -> Floats:
    """Return the largest share of one person in (m, n) weights that are not negative."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(weights.max(1) / weights.sum(1), np.float64)


class _Newton(NamedTuple):
    """A full Newton step of some logistic models.

    Attributes
    ----------
    change : (w, c + 1) float array
        Of the slopes.
    shift : (hospitals, w) float array
        Of the intercepts.
    decrement : (w,) float array
        The Newton decrement before the step.
    errors : (w,) float array
        Standard error of the slope of the copies.
    small : (w,) bool array
        Whether the model has converged: all changes are small beside their standard errors.
    sound : (w,) bool array
        Whether the model is identified and the numbers are finite.
    wanted, information : (hospitals, w, c + 1), (hospitals, w, c + 1, c + 1) float array
        Each hospital's part of the score and of the information of the slopes, its intercept
        eliminated.
    """

    change: Floats
    shift: Floats
    decrement: Floats
    errors: Floats
    small: NDArray[np.bool_]
    sound: NDArray[np.bool_]
    wanted: Floats
    information: Floats


def _newton(terms: Floats, taking: NDArray[np.bool_], width: int) -> _Newton:
    """Return the Newton step of models of `width` coefficients a hospital, intercept included.

    Parameters
    ----------
    terms : (hospitals, w, k) float array
        `logistic_terms`; 0 if a hospital takes no part.
    taking : (hospitals, w) bool array
    width : int
    """
    score = terms[:, :, :width]
    information = _square(terms[:, :, width:], width)
    # A hospital's intercept is in its terms alone, so it is eliminated first.
    known = taking & (information[:, :, 0, 0] > 0)
    pivot = np.where(known, information[:, :, 0, 0], np.inf)
    share = information[:, :, 0, 1:] / pivot[:, :, None]
    own_slopes = information[:, :, 1:, 1:] - share[..., None] * information[:, :, :1, 1:]
    own_wanted = score[:, :, 1:] - share * score[:, :, :1]
    wanted = own_wanted.sum(0)
    together = own_slopes.sum(0)
    inverse, sound = _inverse(together)
    # If everybody has two copies, what is left of the sums is rounding.
    before = np.einsum("smii->mi", information[:, :, 1:, 1:])
    sound &= (np.einsum("mii->mi", together) > _SINGULAR * before).all(1)
    change = np.einsum("mij,mj->mi", inverse, wanted)
    shift = score[:, :, 0] / pivot - np.einsum("smj,mj->sm", share, change)
    with np.errstate(over="ignore", invalid="ignore"):
        decrement = np.einsum("mi,mi->m", wanted, change)
        decrement = decrement + (score[:, :, 0] ** 2 / pivot).sum(0)
    sound &= np.isfinite(decrement)
    errors = np.sqrt(np.einsum("mii->mi", inverse))
    small = (np.abs(change) < _CONVERGED * errors).all(1)
    small &= (np.abs(shift) * np.sqrt(np.where(known, pivot, 0)) < _CONVERGED).all(0)
    return _Newton(change, shift, decrement, errors[:, -1], small, sound, own_wanted, own_slopes)


def own_step(wanted: Floats, information: Floats, scale: Floats) -> tuple[Floats, Floats]:
    """Return one Newton step of each hospital's slope towards its own, and its standard error.

    Parameters
    ----------
    wanted : (hospitals, m, c + 1) float array
        Score of the slopes, the intercept eliminated.
    information : (hospitals, m, c + 1, c + 1) float array
    scale : (m, c + 1) float array
        The diagonal of the information of all hospitals.

    Returns
    -------
    change, errors : (hospitals, m) float array
        The errors are NaN if a hospital has no slope of its own.
    """
    covariates = wanted.shape[-1] - 1
    matrices, constant = _without_constant(information, scale, covariates)
    inverse, sound = _inverse(matrices.reshape(-1, *matrices.shape[2:]))
    change = np.einsum("mj,mj->m", inverse[:, -1], wanted.reshape(-1, covariates + 1))
    with np.errstate(invalid="ignore"):
        errors = np.where(sound, np.sqrt(inverse[:, -1, -1]), np.nan)
    return change.reshape(constant.shape), errors.reshape(constant.shape)


def own_intercepts(
    genotypes: NDArray[np.int8],
    cases: NDArray[np.bool_],
    covariates: Floats,
    slopes: Floats,
) -> Floats:
    """Return the intercepts of one hospital that fit best, given the slopes.

    Parameters
    ----------
    genotypes, cases, covariates, slopes
        As in `logistic_terms`. There is a case and a control with a genotype of each variant.

    Returns
    -------
    (m,) float array
        NaN if a number is too large for a float.
    """
    copies, known = _copies(genotypes)
    wanted = (known @ cases.astype(np.float64))[:, None]
    people = known.sum(1)[:, None]
    with np.errstate(all="ignore"):
        line = slopes[:, :-1] @ covariates.T + slopes[:, -1:] * copies
        start = special.logit(wanted / people)
        # With everybody's line as the highest, or the lowest, the cases are too many or too few.
        low = start - np.where(known > 0, line, -np.inf).max(1, keepdims=True)
        high = start - np.where(known > 0, line, np.inf).min(1, keepdims=True)
        intercepts = start - (line * known).sum(1, keepdims=True) / people
        for _ in range(_MOST_INTERCEPT_STEPS):
            risk = special.expit(intercepts + line) * known
            excess = risk.sum(1, keepdims=True) - wanted
            high = np.where(excess > 0, intercepts, high)
            low = np.where(excess < 0, intercepts, low)
            following = intercepts - excess / (risk * (1 - risk)).sum(1, keepdims=True)
            inside = (following >= low) & (following <= high)
            following = np.where(inside, following, (low + high) / 2)
            still = np.abs(following - intercepts) <= 1e-14 * (1 + np.abs(intercepts))
            intercepts = following
            if (still | ~np.isfinite(intercepts)).all():
                break
    return np.asarray(intercepts[:, 0], np.float64)


def profile_terms(terms: Floats, covariates: int) -> Floats:
    """Return the terms of one hospital for its slopes alone, its own intercept eliminated.

    Parameters
    ----------
    terms : (m, p + p (p + 1) / 2) float array, p = c + 2
        `logistic_terms` at `own_intercepts`.
    covariates : int

    Returns
    -------
    (m, q + q (q + 1) / 2) float array, q = c + 1
        Score, and the upper triangle of the information. A slope that rounding alone identifies
        has zeros.
    """
    width = covariates + 2
    score = terms[:, :width]
    information = _square(terms[:, width:], width)
    share = information[:, 0, 1:] / information[:, :1, 0]
    slopes = information[:, 1:, 1:] - share[..., None] * information[:, :1, 1:]
    wanted = score[:, 1:] - share * score[:, :1]
    before = np.einsum("mii->mi", information[:, 1:, 1:])
    kept = np.einsum("mii->mi", slopes) > _SINGULAR * before
    slopes = np.where(kept[:, :, None] & kept[:, None, :], slopes, 0.0)
    rows, columns = pairs(width - 1)
    return np.column_stack([np.where(kept, wanted, 0.0), slopes[:, rows, columns]])


def profile_parts(terms: Floats, covariates: int) -> tuple[Floats, Floats]:
    """Return the (..., q) score and the (..., q, q) information in `profile_terms`, q = c + 1."""
    width = covariates + 1
    return terms[..., :width], _square(terms[..., width:], width)


def with_intercept(terms: Floats, covariates: int) -> Floats:
    """Return sums of `profile_terms` as `logistic_terms` of a hospital whose intercept fits."""
    width = covariates + 1
    shape = terms.shape[:-1]
    one = np.ones((*shape, 1))
    zeros = np.zeros((*shape, width))
    return np.concatenate(
        [np.zeros((*shape, 1)), terms[..., :width], one, zeros, terms[..., width:]], -1
    )


class LogisticFit:
    """Newton's method for the logistic models of some variants, one intercept a hospital.

    A step is halved if the Newton decrement is larger after it than before. S. Boyd and
    L. Vandenberghe, "Convex Optimization", 2004, section 9.5, define the decrement. They compare
    likelihoods instead, in which one person may have the largest share.

    Attributes
    ----------
    slopes : (m, c + 1) float array
    intercepts : (hospitals, m) float array
    taking : (hospitals, m) bool array
        Which hospital takes part in which variant.
    failed : (m,) bool array
        Whether the model is not identified, or did not converge.

    Parameters
    ----------
    cases, controls : (hospitals, m) int array
        People at each hospital. A hospital without cases or without controls takes no part: its
        intercept is not identified.
    covariates : int
        How many covariates there are.
    """

    def __init__(
        self, cases: NDArray[np.int64], controls: NDArray[np.int64], covariates: int
    ) -> None:
        self.taking = (cases > 0) & (controls > 0)
        safe = np.where(self.taking, [cases, controls], 1).astype(np.float64)
        self._start = np.log(safe[0] / safe[1])
        variants = cases.shape[1]
        self.slopes = np.zeros((variants, covariates + 1))
        self.intercepts = self._start.copy()
        self.failed: NDArray[np.bool_] = np.logical_not(self.taking.any(0))
        self._error = np.full(variants, np.nan)
        self._own_slopes = np.full(cases.shape, np.nan)
        self._own_errors = np.full(cases.shape, np.nan)
        self._decrement = np.full(variants, np.inf)
        self._step = np.zeros((variants, covariates + 1)), np.zeros_like(self.intercepts)
        self._open: NDArray[np.bool_] = np.logical_not(self.failed)

    @property
    def waiting(self) -> NDArray[np.intp]:
        """Indices of the variants that need another step."""
        return np.flatnonzero(self._open)

    def leave_out(self, site: int, variants: NDArray[np.intp]) -> None:
        """Restart the models of some variants from the beginning, without a hospital."""
        self.taking[site, variants] = False
        self.slopes[variants] = 0.0
        self.intercepts[:, variants] = self._start[:, variants]
        self._decrement[variants] = np.inf
        alone = variants[~self.taking[:, variants].any(0)]
        self.failed[alone] = True
        self._open[alone] = False

    def step(self, terms: Floats, waiting: NDArray[np.intp]) -> None:
        """Take one step with the models of some variants.

        Parameters
        ----------
        terms : (hospitals, w, k) float array
            `logistic_terms` of these variants; 0 if a hospital takes no part.
        waiting : (w,) int array
            Indices of the variants.
        """
        newton = _newton(terms, self.taking[:, waiting], self.slopes.shape[1] + 1)
        before = self._decrement[waiting]
        first = np.isinf(before)
        ahead = newton.sound & (first | (newton.decrement <= before))
        self._halve(waiting[~ahead & ~first])
        unidentified = waiting[first & ~newton.sound]
        self.failed[unidentified] = True
        self._open[unidentified] = False
        moved = waiting[ahead]
        self._move(moved, newton.change[ahead], newton.shift[:, ahead], newton.decrement[ahead])
        self._error[moved] = newton.errors[ahead]
        done = ahead & newton.small
        self._open[waiting[done]] = False
        self._step_apart(waiting[done], newton.wanted[:, done], newton.information[:, done])

    def _step_apart(self, variants: NDArray[np.intp], wanted: Floats, information: Floats) -> None:
        """Take one step from the common model towards each hospital's own, for its slope."""
        together = information.sum(0)
        scale = np.einsum("mii->mi", together)
        change, errors = own_step(wanted, information, scale)
        self._own_slopes[:, variants] = self.slopes[variants, -1] + change
        self._own_errors[:, variants] = errors

    def _halve(self, variants: NDArray[np.intp]) -> None:
        """Go back by half of the last step."""
        slopes, intercepts = self._step
        slopes[variants] /= 2
        intercepts[:, variants] /= 2
        self.slopes[variants] -= slopes[variants]
        self.intercepts[:, variants] -= intercepts[:, variants]

    def _move(
        self, variants: NDArray[np.intp], change: Floats, shift: Floats, decrement: Floats
    ) -> None:
        slopes, intercepts = self._step
        slopes[variants] = change
        intercepts[:, variants] = shift
        self.slopes[variants] += change
        self.intercepts[:, variants] += shift
        self._decrement[variants] = decrement

    def finish(self) -> Results:
        """Return the odds ratios, as ``plink --logistic``; NaN if a model failed.

        The hospitals' own slopes, of which the results say how much they differ, come from one
        Newton step of each hospital from the common model towards its own. Covariates have slopes
        of the hospital's own there.
        """
        from scipy import stats

        self.failed |= self._open
        slope, error = (
            np.where(self.failed, np.nan, part) for part in (self.slopes[:, -1], self._error)
        )
        spread = spread_of(
            np.where(self.failed, np.nan, self._own_slopes),
            np.where(self.taking, self._own_errors, np.nan),
        )
        with np.errstate(over="ignore", invalid="ignore"):
            z = slope / error
            reach = stats.norm.ppf(QUANTILE) * error
            low, high = np.exp(slope - reach), np.exp(slope + reach)
            return Results(np.exp(slope), error, low, high, z, log10_p_of_z(z), *spread)


def standardised(genotypes: NDArray[np.int8], frequencies: Floats) -> Floats:
    """Return (n, m) copies of A1, scaled by frequency to mean 0 and variance 1; 0 if missing."""
    spread = np.sqrt(2 * frequencies * (1 - frequencies))
    return np.where(genotypes < 0, 0.0, (genotypes - 2 * frequencies) / spread)


def principal_components(
    multiply: Callable[[Floats], Floats], variants: int, people: int, count: int, seed: int
) -> tuple[Floats, Floats, int]:
    """Return the first principal components by the block Lanczos method.

    The answers of all rounds stay in use, so few rounds are enough even if the components are
    hardly stronger than those that follow: Musco and Musco, "Randomized block Krylov methods for
    stronger and faster approximate singular value decomposition", NeurIPS 2015, algorithm 2. If the
    answers would fill the memory, the method restarts from the strongest half of them: Wu and
    Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix
    Anal. Appl. 22, 2000.

    Parameters
    ----------
    multiply : callable
        Maps loadings (variants, k) to the sum over all people of g (g' loadings), where g is a
        person's `standardised` genotypes.
    variants, people : int
        How many there are, all hospitals together.
    count : int
        How many components to find.
    seed : int
        Seed of the random start.

    Returns
    -------
    loadings : (variants, count) float array
        Of length 1, the strongest first.
    values : (count,) float array
        Variance of the scores, summed over people and divided by the number of variants.
    rounds : int
        How often `multiply` was called.
    """
    width = min(count + _MORE_COLUMNS, variants, people)
    most = max(4 * width, min(_MOST_COLUMNS, _MOST_NUMBERS // variants))
    block = np.linalg.qr(np.random.default_rng(seed).normal(size=(variants, width)))[0]
    basis = products = np.empty((variants, 0))
    loadings = np.zeros((variants, min(count, width)))
    rounds = 0
    moved = np.inf
    while moved > _STILL and rounds < _MOST_ROUNDS and block.shape[1]:
        rest = multiply(block)
        basis = np.hstack([basis, block])
        products = np.hstack([products, rest])
        values, turn = np.linalg.eigh(basis.T @ products)
        turn = turn[:, ::-1]
        before = loadings
        rounds += 1
        loadings = basis @ turn[:, :count]
        moved = float(np.linalg.norm(loadings - before @ (before.T @ loadings)))
        rest = rest - basis @ (basis.T @ rest)
        new, sizes, _ = linalg.qr(rest, mode="economic", pivoting=True)
        # If nothing new is left, the components are exact.
        block = new[:, np.abs(np.diag(sizes)) > _SPENT * values[-1]]
        # Twice: a column that is hardly new is not orthogonal to the basis after the first time.
        for _ in range(2):
            block = np.linalg.qr(block - basis @ (basis.T @ block))[0]
        if basis.shape[1] + width > most:
            strongest = turn[:, : most // 2]
            basis = basis @ strongest
            products = products @ strongest
    # The sign is free: the largest loading is positive.
    loadings = loadings * np.sign(loadings[np.abs(loadings).argmax(0), range(loadings.shape[1])])
    return loadings, values[::-1][:count] / variants, rounds
