"""Whether two models' figures on the same records differ by more than chance.

A run keeps a figure of each model and no scores of single records. So an interval is made from the
figure and the number of records alone, and the interval of a difference from the two intervals.
Two models that are right on the same records differ by less chance than this allows for: a
difference may be real and still not be called so.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.curves import Interval, wilson

_QUANTILE = NormalDist().inv_cdf(0.975)


def auc_interval_by_size(auc: float, with_class: float, without: float) -> Interval:
    """Return the 95% interval of an AUC from its value and the numbers of records.

    Parameters
    ----------
    auc : float
        From 0 to 1.
    with_class, without : float
        Numbers of records, each of at least 1.

    Raises
    ------
    InputError

    Notes
    -----
    The variance is that of scores with exponential distributions, which depends on the AUC alone:
    Hanley and McNeil, The Meaning and Use of the Area under a Receiver Operating Characteristic
    (ROC) Curve, Radiology 143, 1982, https://doi.org/10.1148/radiology.143.1.7063747. The interval
    is symmetric on the scale of the AUC's log-odds. If the AUC is 0 or 1 it is Wilson's for as many
    independent pairs as the rarer kind has records, as in `curves.auc_interval`.
    """
    if not (0 <= auc <= 1 and 1 <= with_class < math.inf and 1 <= without < math.inf):
        raise InputError(
            "an AUC's interval needs an AUC from 0 to 1 and a record or more of each kind, got "
            f"{auc:g} of {with_class:g} and {without:g}"
        )
    if not 0 < auc < 1:
        fewest = min(with_class, without)
        return wilson(auc * fewest, fewest)
    # Q1 - AUC² and Q2 - AUC² of the paper, in a form that rounding cannot make negative.
    one_above_two = auc * (1 - auc) ** 2 / (2 - auc)
    two_above_one = auc**2 * (1 - auc) / (1 + auc)
    spread = auc * (1 - auc)
    spread += (with_class - 1) * one_above_two + (without - 1) * two_above_one
    centre = math.log(auc / (1 - auc))
    reach = _QUANTILE * math.sqrt(spread / (with_class * without)) / (auc * (1 - auc))
    return Interval(auc, _expit(centre - reach), _expit(centre + reach))


def _expit(log_odds: float) -> float:
    return 0.5 * (1 + math.tanh(log_odds / 2))


def difference_interval(one: Interval, other: Interval) -> Interval:
    """Return `one` less `other` with its interval, of the level of theirs.

    Notes
    -----
    Zou and Donner, Construction of Confidence Intervals about Effect Measures: a General Approach,
    Statistics in Medicine 27, 2008, https://doi.org/10.1002/sim.3095. Of two shares with Wilson's
    intervals it is method 10 of Newcombe, Interval Estimation for the Difference between
    Independent Proportions, Statistics in Medicine 17, 1998. The figures are taken to be
    independent, which makes it too wide for two models on the same records.
    """
    difference = one.value - other.value
    down = math.hypot(one.value - one.low, other.high - other.value)
    up = math.hypot(one.high - one.value, other.value - other.low)
    return Interval(difference, difference - down, difference + up)
