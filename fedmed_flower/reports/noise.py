"""Which figures of a test that was counted with noise can be told. No HTML is made here.

A hospital that protects its test patients sends counts with Gaussian noise. With few patients the
noise decides what follows from them: an AUC of 1.000 may be one of 0.84. So a figure is told only
if its error by noise is small:

- Of a classifier, each class has a histogram of 32 counts. With P and N patients with and without
  the class, by these counts, and noise of standard deviation s on a sum of 32, the figure is told
  if s sqrt(1/P² + 1/N²) is at most 0.1. This is about how far, 19 times of 20, noise moves the AUC.
  Of more than two classes it must hold for each.
- The noise is not recorded, but counts below 0 are noise alone. The root of their mean square
  estimates its standard deviation; if none is below 0, the noise is too small to matter.
- Of other models the noise cannot be known. Their figures are told of 100 test patients or more at
  a hospital, and of all hospitals together of 100 times the root of the number of hospitals, as the
  noise grows with that root.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmed_flower.metrics.counts import Counts
from fedmed_flower.metrics.curves import histograms_of
from fedmed_flower.metrics.names import NOISED
from fedmed_flower.reports.summary import by_site, counted_at, nested, number
from fedmed_flower.wire import Sent

# Of an AUC, by noise alone.
MOST_ERROR = 0.1
# Patients behind a figure whose noise is not known.
FEWEST_PATIENTS = 100
MARK = "counted with noise"
TOO_LARGE = (
    "The test was counted with noise that protects patients. With so few patients the noise is too "
    "large to tell how good the model is, so no figure is given. More test patients or a larger "
    "epsilon would help."
)


@dataclass(frozen=True)
class Noise:
    """What the noise of a test hides.

    Attributes
    ----------
    sites
        The hospitals that counted with noise.
    hidden
        Those of `sites` whose own figures are not told.
    hides_total
        Whether the figures of all hospitals together are not told.
    """

    sites: frozenset[str]
    hidden: frozenset[str]
    hides_total: bool


def noise_of(summary: dict[str, Any], counts: Counts | None) -> Noise | None:
    """Return what the noise of the test hides; None if no tested hospital counted with noise.

    Parameters
    ----------
    summary
        Of the run folder.
    counts
        Those of the test, if the run folder has them.
    """
    tested = counted_at(summary)
    records = {} if counts is None else counts.sites
    counted = {site: record for site, record in records.items() if NOISED in record}
    sites = {*Sent.of(summary.get("sent")).noised, *counted} & {*tested}
    if not sites:
        return None
    if counted.keys() >= sites:
        counted = {site: counted[site] for site in sites}
        hidden = {site for site, record in counted.items() if error([record]) > MOST_ERROR}
        return Noise(frozenset(sites), frozenset(hidden), error(counted.values()) > MOST_ERROR)
    patients = {site: _patients(summary, site) for site in sites}
    fewest = FEWEST_PATIENTS * math.sqrt(len(sites))
    return Noise(
        sites=frozenset(sites),
        hidden=frozenset(site for site in sites if patients[site] < FEWEST_PATIENTS),
        hides_total=sum(patients.values()) < fewest,
    )


def _patients(summary: dict[str, Any], site: str) -> float:
    """Return how many test patients a hospital has: as it said at the start, else with noise."""
    exact = number(nested(summary, "sites", site), "test")
    if exact is not None:
        return exact
    return number(nested(summary, "test", "sites", site), "num-examples") or 0.0


def error(records: Iterable[Mapping[str, Any]]) -> float:
    """Return how far noise moves the AUC of some hospitals together, about 19 times of 20.

    Parameters
    ----------
    records
        Counts with noise of each hospital, of the same classes.

    Returns
    -------
    float
        Infinite if a class has no patient by these counts, or all are of one class.
    """
    listed = [histograms_of(record) for record in records]
    cells = [np.concatenate([np.concatenate(part[1:]) for part in parts]) for parts in listed]
    variance = sum(float(np.mean(c[c < 0] ** 2)) for c in cells if (c < 0).any())
    worst = 0.0
    for of_class in zip(*listed, strict=True):
        spread = math.sqrt(variance * len(of_class[0].with_class))
        groups = [
            sum(float(part.with_class.sum()) for part in of_class),
            sum(float(part.without.sum()) for part in of_class),
        ]
        if min(groups) <= 0:
            return math.inf
        worst = max(worst, math.hypot(*(spread / group for group in groups)))
    return worst


def told(summary: dict[str, Any], noise: Noise | None) -> dict[str, Any]:
    """Return a summary without the figures of the test that its noise hides."""
    if noise is None or not (noise.hidden or noise.hides_total):
        return summary
    test = dict(nested(summary, "test"))
    test["federated"] = _without(nested(test, "federated"), noise.hides_total)
    test["sites"] = {
        site: _without(nested(metrics), site in noise.hidden)
        for site, metrics in nested(test, "sites").items()
    }
    for key in ("local", "personal", "own"):
        models = {
            site: _told_of(nested(metrics), site, noise)
            for site, metrics in nested(test, key).items()
        }
        models = {site: metrics for site, metrics in models.items() if metrics}
        test = {name: part for name, part in test.items() if name != key}
        test |= {key: models} if models else {}
    pooled = nested(test, "pooled")
    sites = nested(pooled, "sites")
    kept = {} if noise.hides_total else pooled
    known = {site: metrics for site, metrics in sites.items() if site not in noise.hidden}
    test = {name: part for name, part in test.items() if name != "pooled"}
    if known or len(kept) > 1:
        test["pooled"] = {**kept, "sites": known}
    return {**summary, "test": test}


def _told_of(metrics: dict[str, Any], site: str, noise: Noise) -> dict[str, Any]:
    """Return what a hospital's model reaches there, and elsewhere, as far as noise lets it tell."""
    kept = {} if site in noise.hidden else metrics
    if noise.hides_total:
        kept = {key: value for key, value in kept.items() if key != "all"}
    if "sites" not in metrics:
        return kept
    elsewhere = {
        other: found
        for other, found in nested(metrics, "sites").items()
        if other not in noise.hidden
    }
    if elsewhere:
        return {**kept, "sites": elsewhere}
    return {key: value for key, value in kept.items() if key != "sites"}


def _without(metrics: dict[str, Any], hidden: bool) -> dict[str, Any]:
    return {key: metrics[key] for key in metrics if key == "num-examples" or not hidden}


def number_tested(summary: dict[str, Any], noise: Noise | None) -> float | None:
    """Return the number of test records: of patients, if they were counted with noise.

    That number is the one that the hospitals gave at the start, so that it is the same everywhere;
    the test itself counts it with noise. None if it is not known.
    """
    if noise is None:
        return number(nested(summary, "test", "federated"), "num-examples")
    exact = by_site(nested(summary, "sites"), "test")
    tested = nested(summary, "test", "sites")
    if tested.keys() <= exact.keys():
        return sum(exact[site] for site in tested)
    return number(nested(summary, "test", "federated"), "num-examples")
