"""Tests of one variant at a time, on the counts of several hospitals.

Each hospital is a stratum: its cases are compared with its own controls. Counts that were summed
over hospitals first would take a hospital with many cases and an allele that is frequent there for
an effect of the allele.

- N. Mantel and W. Haenszel, "Statistical aspects of the analysis of data from retrospective studies
  of disease", Journal of the National Cancer Institute 22:719-748, 1959: the test and the odds
  ratio.
- N. Mantel, "Chi-square tests with one degree of freedom; extensions of the Mantel-Haenszel
  procedure", Journal of the American Statistical Association 58:690-700, 1963: the trend test.
- J. Robins, N. Breslow and S. Greenland, "Estimators of the Mantel-Haenszel variance consistent in
  both sparse data and large-strata limiting models", Biometrics 42:311-323, 1986, equation 10.
- W. G. Cochran, "The combination of estimates from different experiments", Biometrics 10:101-129,
  1954: Q.
- J. P. T. Higgins and S. G. Thompson, "Quantifying heterogeneity in a meta-analysis", Statistics in
  Medicine 21:1539-1558, 2002: I2.
- B. Devlin and K. Roeder, "Genomic control for association studies", Biometrics 55:997-1004, 1999.
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
# Probability below the upper bound of a 95 % interval.
QUANTILE = 0.975
_LN10 = math.log(10)


class Spread(NamedTuple):
    """How much the hospitals' own effects differ, one number a variant.

    NaN if fewer than two hospitals have an effect of their own.

    Attributes
    ----------
    q : (m,) float array
        Cochran's Q.
    p : (m,) float array
        Its p-value: of chi-square, with one degree of freedom less than there are hospitals.
    i2 : (m,) float array
        How much of Q is beyond its degrees of freedom, in percent; 0 to 100.
    """

    q: Floats
    p: Floats
    i2: Floats


class Results(NamedTuple):
    """Results of a test, one number a variant; NaN if the counts do not determine it.

    Attributes
    ----------
    effect : (m,) float array
        Odds ratio, or the slope of a linear model.
    se : (m,) float array
        Standard error, of the logarithm of an odds ratio.
    low, high : (m,) float array
        Bounds of the effect's 95 % interval.
    statistic : (m,) float array
        Chi-square with one degree of freedom, z, or t.
    log10_p : (m,) float array
        Decimal logarithm of the p-value, which itself may be below what a float can hold.
    q, q_p, i2 : (m,) float array
        `Spread` of the hospitals' own effects.
    """

    effect: Floats
    se: Floats
    low: Floats
    high: Floats
    statistic: Floats
    log10_p: Floats
    q: Floats
    q_p: Floats
    i2: Floats


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
    """Compare the alleles of cases with those of controls, as ``plink --mh`` by hospital.

    This is the test of Cochran, Mantel and Haenszel without a correction for continuity.

    Parameters
    ----------
    counts : (hospitals, m, 5) int64 array
        A hospital without cases or without controls adds nothing.
    """
    a, b, c, d = _alleles(counts)
    total = a + b + c + d
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = a - (a + b) * (a + c) / total
        variance = (a + b) * (c + d) * (a + c) * (b + d) / (total**2 * (total - 1))
    return _with_odds_ratio(counts, _chi_square(excess, variance, total > 1))


def trend_test(counts: Counts) -> Results:
    """Compare the numbers of copies: Mantel's extension of the test, the hospitals as strata.

    With one hospital it is the test of Cochran and Armitage, times (n - 1) / n. The effect is the
    common odds ratio of the alleles, as that of `allelic_test`.

    Parameters
    ----------
    counts : (hospitals, m, 5) int64 array
        With squares. A hospital without cases or without controls adds nothing.
    """
    cases, controls, case_copies, control_copies, squares = np.moveaxis(
        counts.astype(np.float64), -1, 0
    )
    people = cases + controls
    copies = case_copies + control_copies
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = case_copies - cases * copies / people
        spread = people * squares - copies**2
        variance = cases * controls * spread / (people**2 * (people - 1))
    return _with_odds_ratio(counts, _chi_square(excess, variance, people > 1))


def _alleles(counts: Counts) -> tuple[Floats, Floats, Floats, Floats]:
    """Return copies of A1 and A2 among cases, and of A1 and A2 among controls."""
    cases, controls, a, c, _ = np.moveaxis(counts.astype(np.float64), -1, 0)
    return a, 2 * cases - a, c, 2 * controls - c


def _chi_square(excess: Floats, variance: Floats, counted: NDArray[np.bool_]) -> Floats:
    """Return the squared sum of (hospitals, m) deviations over the sum of their variances."""
    deviation = np.where(counted, excess, 0).sum(0)
    total = np.where(counted, variance, 0).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, deviation**2 / total, np.nan)


def _with_odds_ratio(counts: Counts, statistic: Floats) -> Results:
    """Return the results with Mantel and Haenszel's odds ratio of the alleles."""
    a, b, c, d = _alleles(counts)
    total = np.maximum(a + b + c + d, 1)
    # In the letters of Robins, Breslow and Greenland.
    r = a * d / total
    s = b * c / total
    p = (a + d) / total
    q = (b + c) / total
    known = np.isfinite(statistic) & (r.sum(0) > 0) & (s.sum(0) > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = r.sum(0) / s.sum(0)
        variance = (p * r).sum(0) / (2 * r.sum(0) ** 2)
        variance = variance + (p * s + q * r).sum(0) / (2 * r.sum(0) * s.sum(0))
        variance = variance + (q * s).sum(0) / (2 * s.sum(0) ** 2)
        own = np.log(a * d) - np.log(b * c)
        own_error = np.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
        ratio, error = (np.where(known, part, np.nan) for part in (ratio, np.sqrt(variance)))
        reach = stats.norm.ppf(QUANTILE) * error
        low, high = ratio * np.exp(-reach), ratio * np.exp(reach)
        log10_p = log10_p_of_z(np.sqrt(statistic))
    return Results(ratio, error, low, high, statistic, log10_p, *spread_of(own, own_error))


def spread_of(effects: Floats, errors: Floats) -> Spread:
    """Return how much the hospitals' own effects of each variant differ.

    Parameters
    ----------
    effects : (hospitals, m) float array
        A hospital's slope, or the logarithm of its odds ratio. One that is not finite, or whose
        error is not finite and above 0, is left out.
    errors : (hospitals, m) float array
        Their standard errors.
    """
    known = np.isfinite(effects) & np.isfinite(errors) & (errors > 0)
    effects = np.where(known, effects, 0.0)
    weights = np.where(known, errors, np.inf) ** -2.0
    freedom = np.where(known.sum(0) > 1, known.sum(0) - 1.0, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (weights * effects).sum(0) / weights.sum(0)
        q = (weights * (effects - mean) ** 2).sum(0)
        q = np.where(np.isfinite(freedom), q, np.nan)
        beyond = np.where(q > freedom, 1 - freedom / q, 0.0)
    i2 = np.where(np.isfinite(q), 100 * beyond, np.nan)
    return Spread(q, np.asarray(stats.chi2.sf(q, freedom), np.float64), i2)


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
