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
from scipy import special

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


# What a hospital adds to the test of a variant: deviation and variance of the statistic, and in the
# letters of Robins, Breslow and Greenland R, S, PR, PS + QR and QS.
TERMS = 7


def allelic_test(counts: Counts) -> Results:
    """Compare the alleles of cases with those of controls, as ``plink --mh`` by hospital.

    This is the test of Cochran, Mantel and Haenszel without a correction for continuity.

    Parameters
    ----------
    counts : (hospitals, m, 5) int64 array
        A hospital without cases or without controls adds nothing.
    """
    return result_of_terms(allelic_terms(counts).sum(0), spread_of(*own_odds(counts)))


def trend_test(counts: Counts) -> Results:
    """Compare the numbers of copies: Mantel's extension of the test, the hospitals as strata.

    With one hospital it is the test of Cochran and Armitage, times (n - 1) / n. The effect is the
    common odds ratio of the alleles, as that of `allelic_test`.

    Parameters
    ----------
    counts : (hospitals, m, 5) int64 array
        With squares. A hospital without cases or without controls adds nothing.
    """
    return result_of_terms(trend_terms(counts).sum(0), spread_of(*own_odds(counts)))


def allelic_terms(counts: Counts) -> Floats:
    """Return what each hospital adds to `allelic_test`, of which sums are enough.

    Parameters
    ----------
    counts : (hospitals, m, 5) int64 array

    Returns
    -------
    (hospitals, m, 7) float array
        See `TERMS`.
    """
    a, b, c, d = _alleles(counts)
    total = a + b + c + d
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = a - (a + b) * (a + c) / total
        variance = (a + b) * (c + d) * (a + c) * (b + d) / (total**2 * (total - 1))
    return _with_odds(counts, excess, variance, total > 1)


def trend_terms(counts: Counts) -> Floats:
    """Return what each hospital adds to `trend_test`, as `allelic_terms`."""
    cases, controls, case_copies, control_copies, squares = np.moveaxis(
        counts.astype(np.float64), -1, 0
    )
    people = cases + controls
    copies = case_copies + control_copies
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = case_copies - cases * copies / people
        spread = people * squares - copies**2
        variance = cases * controls * spread / (people**2 * (people - 1))
    return _with_odds(counts, excess, variance, people > 1)


def _alleles(counts: Counts) -> tuple[Floats, Floats, Floats, Floats]:
    """Return copies of A1 and A2 among cases, and of A1 and A2 among controls."""
    cases, controls, a, c, _ = np.moveaxis(counts.astype(np.float64), -1, 0)
    return a, 2 * cases - a, c, 2 * controls - c


def _with_odds(
    counts: Counts, excess: Floats, variance: Floats, counted: NDArray[np.bool_]
) -> Floats:
    """Return deviation and variance, 0 where nobody is compared, with the terms of the odds."""
    a, b, c, d = _alleles(counts)
    total = np.maximum(a + b + c + d, 1)
    r = a * d / total
    s = b * c / total
    p = (a + d) / total
    q = (b + c) / total
    tested = [np.where(counted, part, 0) for part in (excess, variance)]
    return np.stack([*tested, r, s, p * r, p * s + q * r, q * s], -1)


def own_odds(counts: Counts) -> tuple[Floats, Floats]:
    """Return the logarithm of each hospital's own odds ratio, and its standard error.

    They are not finite if a cell of the hospital's table is empty.
    """
    a, b, c, d = _alleles(counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(a * d) - np.log(b * c), np.sqrt(1 / a + 1 / b + 1 / c + 1 / d)


def result_of_terms(terms: Floats, spread: Spread) -> Results:
    """Return the results of a test, with Mantel and Haenszel's odds ratio of the alleles.

    Parameters
    ----------
    terms : (m, 7) float array
        `allelic_terms` or `trend_terms`, summed over hospitals.
    spread : Spread
        Of the hospitals' own odds ratios.
    """
    from scipy import stats

    deviation, total, r, s, pr, mixed, qs = terms.T
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(total > 0, deviation**2 / total, np.nan)
        known = np.isfinite(statistic) & (r > 0) & (s > 0)
        variance = pr / (2 * r**2) + mixed / (2 * r * s) + qs / (2 * s**2)
        ratio, error = (np.where(known, part, np.nan) for part in (r / s, np.sqrt(variance)))
        reach = stats.norm.ppf(QUANTILE) * error
        low, high = ratio * np.exp(-reach), ratio * np.exp(reach)
        log10_p = log10_p_of_z(np.sqrt(statistic))
    return Results(ratio, error, low, high, statistic, log10_p, *spread)


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
    return _spread(np.where(np.isfinite(freedom), q, np.nan), freedom)


def _spread(q: Floats, freedom: Floats) -> Spread:
    from scipy import stats

    with np.errstate(divide="ignore", invalid="ignore"):
        beyond = np.where(q > freedom, 1 - freedom / q, 0.0)
    i2 = np.where(np.isfinite(q), 100 * beyond, np.nan)
    return Spread(q, np.asarray(stats.chi2.sf(q, freedom), np.float64), i2)


def spread_terms(
    effects: Floats, errors: Floats, centre: Floats
) -> tuple[NDArray[np.int64], Floats]:
    """Return what hospitals add to the spread of their own effects, of which sums are enough.

    Parameters
    ----------
    effects, errors : (..., m) float array
        As in `spread_of`.
    centre : (m,) float array
        About the mean of the effects: the nearer, the more digits are left. NaN stands for 0.

    Returns
    -------
    known : (..., m) int array
        1 for an effect that counts.
    terms : (..., m, 3) float array
        Its weight, times its distance from the centre to the power of 0, 1 and 2. All are 0 for an
        effect that does not count.
    """
    centre = np.where(np.isfinite(centre), centre, 0.0)
    known = np.isfinite(effects) & np.isfinite(errors) & (errors > 0)
    weights = np.where(known, errors, np.inf) ** -2.0
    away = np.where(known, effects, centre) - centre
    return known.astype(np.int64), np.stack([weights, weights * away, weights * away**2], -1)


def spread_of_terms(known: NDArray[np.int64], terms: Floats) -> Spread:
    """Return how much hospitals' own effects differ, from sums of `spread_terms`."""
    freedom = np.where(known > 1, known - 1.0, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.maximum(terms[..., 2] - terms[..., 1] ** 2 / terms[..., 0], 0.0)
    return _spread(np.where(np.isfinite(freedom), q, np.nan), freedom)


def log10_p_of_z(z: Floats) -> Floats:
    """Return the decimal logarithm of the two-sided p-value of a standard normal statistic."""
    from scipy import stats

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
    from scipy import stats

    known = np.asarray(log10_p, np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        return math.nan
    return float(stats.chi2.isf(10 ** np.median(known), 1) / stats.chi2.median(1))
