"""Tests of one variant at a time, on counts summed over the hospitals.

The statistics are those of PLINK 1.9. P. Armitage, "Tests for linear trends in proportions and
frequencies", Biometrics 11:375-386, 1955. B. Devlin and K. Roeder, "Genomic control for association
studies", Biometrics 55:997-1004, 1999.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from fedmed_flower.genomics.types import Counts, Floats

# Columns of a hospital's counts, a row a variant: people with a genotype, copies of A1 among them,
# and the sum over all people of the squared number of copies. If the trait is continuous, everybody
# is a control.
CASES, CONTROLS, CASE_COPIES, CONTROL_COPIES, SQUARES = range(5)
WITHHELD = -1
_LN10 = math.log(10)


class Results(NamedTuple):
    """Results of a test, one number a variant; NaN if the counts do not determine it.

    Attributes
    ----------
    effect : (m,) float array
        Odds ratio, or the slope of a linear model.
    se : (m,) float array
        Standard error, of the logarithm of an odds ratio.
    statistic : (m,) float array
        Chi-square with one degree of freedom, z, or t.
    log10_p : (m,) float array
        Decimal logarithm of the p-value, which itself may be below what a float can hold.
    """

    effect: Floats
    se: Floats
    statistic: Floats
    log10_p: Floats


def count_copies(genotypes: NDArray[np.int8], cases: NDArray[np.bool_], squares: bool) -> Counts:
    """Return a hospital's counts of each variant.

    Parameters
    ----------
    genotypes : (n, m) int8 array
        0, 1, 2; negative if missing.
    cases : (n,) bool array
    squares : bool
        Whether to count the sum of squares; if not, it is 0.

    Returns
    -------
    (m, 5) int64 array
    """
    people, variants = genotypes.shape
    counts = np.zeros((variants, 5), np.int64)
    # Sums of whole numbers in float32 are exact up to 2 ** 24.
    for start in range(0, people, 1 << 22):
        part = genotypes[start : start + (1 << 22)]
        status = np.stack([cases, ~cases], 1)[start : start + (1 << 22)].astype(np.float32)
        missing = part < 0
        if missing.any():
            counts[:, :2] += ((~missing).T.astype(np.float32) @ status).astype(np.int64)
            part = np.where(missing, np.int8(0), part)
        else:
            counts[:, :2] += status.sum(0).astype(np.int64)
        copies = part.T.astype(np.float32)
        counts[:, 2:4] += (copies @ status).astype(np.int64)
        if squares:
            counts[:, SQUARES] += np.einsum("ij,ij->i", copies, copies).astype(np.int64)
    return counts


def withheld(counts: Counts, minimum: int) -> NDArray[np.bool_]:
    """Return for which variants a hospital must not disclose its counts.

    A variant is withheld if the hospital has fewer than `minimum` copies of its rarer allele, fewer
    than `minimum` cases or fewer than `minimum` controls. A number of 0 may be disclosed.
    """
    people = counts[:, CASES] + counts[:, CONTROLS]
    copies = counts[:, CASE_COPIES] + counts[:, CONTROL_COPIES]
    few = np.zeros(len(counts), bool)
    for number in (np.minimum(copies, 2 * people - copies), counts[:, CASES], counts[:, CONTROLS]):
        few |= (number > 0) & (number < minimum)
    return few


def allelic_test(counts: Counts) -> Results:
    """Compare the alleles of cases with those of controls, as ``plink --assoc``.

    Parameters
    ----------
    counts : (m, 5) int64 array
        Summed over the hospitals.
    """
    a, c = (counts[:, key].astype(np.float64) for key in (CASE_COPIES, CONTROL_COPIES))
    b = 2.0 * counts[:, CASES] - a
    d = 2.0 * counts[:, CONTROLS] - c
    with np.errstate(divide="ignore", invalid="ignore"):
        ways = (a + b) * (c + d) * (a + c) * (b + d)
        statistic = np.where(ways > 0, (a + b + c + d) * (a * d - b * c) ** 2 / ways, np.nan)
        return _with_odds_ratio(a, b, c, d, statistic)


def trend_test(counts: Counts) -> Results:
    """Compare the numbers of copies: Cochran and Armitage's test, as ``plink --model trend``.

    The effect is the odds ratio of the alleles.

    Parameters
    ----------
    counts : (m, 5) int64 array
        Summed over the hospitals, with squares.
    """
    cases, controls, case_copies, control_copies, squares = counts.T.astype(np.float64)
    people = cases + controls
    copies = case_copies + control_copies
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = cases * controls * (people * squares - copies**2)
        statistic = people * (people * case_copies - cases * copies) ** 2 / spread
        statistic = np.where(spread > 0, statistic, np.nan)
        case_others = 2 * cases - case_copies
        control_others = 2 * controls - control_copies
        return _with_odds_ratio(case_copies, case_others, control_copies, control_others, statistic)


def _with_odds_ratio(a: Floats, b: Floats, c: Floats, d: Floats, statistic: Floats) -> Results:
    known = np.isfinite(statistic) & (b * c > 0)
    ratio = np.where(known, a * d / (b * c), np.nan)
    error = np.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    error = np.where(known & np.isfinite(error), error, np.nan)
    return Results(ratio, error, statistic, log10_p_of_z(np.sqrt(statistic)))


def log10_p_of_z(z: Floats) -> Floats:
    """Return the decimal logarithm of the two-sided p-value of a standard normal statistic."""
    return np.asarray((math.log(2) + stats.norm.logsf(np.abs(z))) / _LN10, np.float64)


def log10_p_of_t(t: Floats, freedom: Floats) -> Floats:
    """Return the decimal logarithm of the two-sided p-value of Student's t."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p = np.log(2 * special.stdtr(freedom, -np.abs(t)))
        # If that underflows: the incomplete beta function, as a sum of logarithms.
        a = freedom / 2
        x = freedom / (freedom + t**2)
        rest = t**2 / (freedom + t**2)
        series = special.hyp2f1(a + 0.5, 1.0, a + 1.0, x)
        far = a * np.log(x) + 0.5 * np.log(rest) - np.log(a) - special.betaln(a, 0.5)
        far += np.log(series)
        # With hundreds of thousands of people the series may fail. Wallace's normal approximation
        # is then right to six digits.
        z = np.sqrt(freedom * np.log1p(t**2 / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
        far = np.where(np.isfinite(far), far, log10_p_of_z(z) * _LN10)
        log_p = np.where(log_p < -650, far, log_p)
    return np.asarray(log_p / _LN10, np.float64)


def p_text(log10_p: float) -> str:
    """Return a p-value as text, even if it is too small for a float."""
    if math.isnan(log10_p):
        return "nan"
    if log10_p > -300:
        return f"{10**log10_p:.12g}"
    exponent = math.floor(log10_p)
    return f"{10 ** (log10_p - exponent):.9f}e{exponent}"


def log10_of_text(text: str) -> float:
    """Return the decimal logarithm of a p-value that `p_text` wrote."""
    mantissa, _, exponent = text.partition("e")
    number = float(mantissa)
    if number > 0:
        return math.log10(number) + int(exponent or 0)
    return -math.inf if number == 0 else math.nan


def genomic_inflation(log10_p: Sequence[float] | Floats) -> float:
    """Return the median statistic over that expected without association; NaN without p-values."""
    known = np.asarray(log10_p, np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        return math.nan
    return float(stats.chi2.isf(10 ** np.median(known), 1) / stats.chi2.median(1))
