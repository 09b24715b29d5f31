"""The Kaplan-Meier curve of several hospitals, between bounds where counts were withheld.

A hospital reports how many events and how many censored patients it has in each interval
(previous stop, stop]. Where in the interval they were is unknown. By E. L. Kaplan, P. Meier,
"Nonparametric estimation from incomplete observations", JASA 53, 1958, the survival is the product
over the events of 1 - 1 / (patients at risk).

The bounds follow from one comparison. Of an event and a censoring next to each other in time, with
n patients at risk before both, the order event, censoring gives the factor (n - 1) / n, the other
order the smaller one (n - 2) / (n - 1). Both leave n - 2 at risk, so nothing else changes. So
exchanging neighbours leads from any arrangement to the two extreme ones. The survival at a time t
is lowest if all are censored as early as their interval allows and all events are as late as theirs
allows, but by t. It is highest if events are as early and censorings as late as possible, and none
in an interval that contains t has happened yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedmed_flower.statistics.types import Codes, Floats, Reported

# What rounding may add to the length of an interval of one step.
_ROUNDING = 1e-9


class Curve(NamedTuple):
    """A Kaplan-Meier curve; each list has one entry a time.

    Attributes
    ----------
    patients : float
        How many are followed.
    times : list of float
        The ends of all hospitals' intervals, ascending.
    at_risk_low, at_risk_high : list of float
        How many are followed for longer than the time: at least, at most.
    events_low, events_high : list of float
        How many events have happened by the time: at least, at most.
    survival : list of (float or None)
        The estimate; None from the first time on that an interval of more than one step reaches.
    survival_low, survival_high : list of (float or None)
        What the survival of the patients, whose times are not rounded, is at least and at most.
        None with noise.
    """

    patients: float
    times: list[float]
    at_risk_low: list[float]
    at_risk_high: list[float]
    events_low: list[float]
    events_high: list[float]
    survival: list[float | None]
    survival_low: list[float | None]
    survival_high: list[float | None]


@dataclass(frozen=True)
class _Intervals:
    """The intervals in which somebody is, of all hospitals.

    Attributes
    ----------
    times : ndarray
        (times,) the ends of all hospitals' intervals up to the horizon, ascending.
    start, stop : ndarray
        (intervals,) indices of times, from 1 on. A start of 0 is before every time, a stop of one
        more than the number of times beyond the horizon.
    events, censored : ndarray
        (intervals,) how many are in each.
    """

    times: Floats
    start: Codes
    stop: Codes
    events: Floats
    censored: Floats

    @property
    def patients(self) -> float:
        """How many are in all intervals together."""
        return float(self.events.sum() + self.censored.sum())

    def until(self, ends: Codes, counts: Floats) -> Floats:
        """Return (times + 1,), the sum of counts whose index is at most 0, 1, 2, ..."""
        size = self.times.size + 1
        return np.bincount(ends, counts, size)[:size].cumsum()

    def wide(self, width: float) -> Codes:
        """Return the starts of the intervals that are longer than a step."""
        ends = np.concatenate(([0.0], self.times))
        length = ends[np.minimum(self.stop, self.times.size)] - ends[self.start]
        return self.start[length > width * (1 + _ROUNDING)]


def pool_survival(parts: Iterable[Reported], horizon: float, width: float) -> Curve:
    """Return the Kaplan-Meier curve of all patients, and certain bounds of it.

    The estimate is that of times rounded up to the ends of their intervals. It is left out where a
    hospital's interval of more than one step makes it a guess; the bounds hold everywhere. They
    also hold for times that are not rounded.

    Parameters
    ----------
    parts : iterable of dict
        ``times``, ``events`` and ``censored``, of equal length: exact counts. In an interval that
        ends beyond the horizon are patients who are followed beyond it.
    horizon, width : float
        Where the curve was asked to end, and in which steps.
    """
    intervals = _intervals(parts, horizon)
    curve = _rounded_up(intervals)
    low = _lowest(intervals)
    high = _highest(intervals)
    size = len(curve.times)
    known = int(intervals.wide(width).min(initial=size))
    # Rounding must not put an estimate beside its bounds.
    estimate = np.array(curve.survival[:known], np.float64)
    low[:known] = np.minimum(low[:known], estimate)
    high[:known] = np.maximum(high[:known], estimate)
    begun = intervals.until(intervals.start, intervals.events + intervals.censored)[:-1]
    return curve._replace(
        at_risk_low=(intervals.patients - begun).tolist(),
        events_high=intervals.until(intervals.start, intervals.events)[:-1].tolist(),
        survival=[*curve.survival[:known], *[None] * (size - known)],
        survival_low=low.tolist(),
        survival_high=high.tolist(),
    )


def pool_noised_survival(parts: Iterable[Reported]) -> Curve:
    """Return the Kaplan-Meier curve of counts with noise: an estimate, without bounds.

    Parameters
    ----------
    parts : iterable of dict
        As `pool_survival` takes them. With noise all hospitals have the same intervals.
    """
    return _rounded_up(_intervals(parts, math.inf))


def _intervals(parts: Iterable[Reported], horizon: float) -> _Intervals:
    """Return the intervals of all hospitals.

    Who is followed beyond the horizon is censored. So of an interval that ends beyond it, all
    events have happened by the horizon.
    """
    reported = [part for part in parts if part["times"]]
    stops = [np.array(part["times"], np.float64) for part in reported]
    times = np.unique(np.minimum(np.concatenate([[], *stops]), horizon))
    tables = [np.zeros((4, 0))]
    for part, ends in zip(reported, stops, strict=True):
        stop = np.searchsorted(times, ends) + 1
        start = np.concatenate(([0], stop[:-1]))
        by_horizon = np.maximum(np.minimum(stop, times.size), start + 1)
        nobody = np.zeros(stop.size)
        tables.append(np.array([start, by_horizon, part["events"], nobody], np.float64))
        tables.append(np.array([start, stop, nobody, part["censored"]], np.float64))
    start, stop, events, censored = np.concatenate(tables, axis=1)
    some = events + censored > 0
    return _Intervals(
        times,
        start[some].astype(np.int64),
        stop[some].astype(np.int64),
        events[some],
        censored[some],
    )


def _rounded_up(intervals: _Intervals) -> Curve:
    """Return the curve of times rounded up to the ends of their intervals, without bounds."""
    size = intervals.times.size
    events = intervals.until(intervals.stop, intervals.events)
    left = intervals.patients - events - intervals.until(intervals.stop, intervals.censored)
    # Sums of counts with noise are rounded.
    left = np.maximum(left, 0.0)
    survival = np.cumprod(_surviving(np.diff(events), left[:-1]))
    none: list[float | None] = [None] * size
    at_risk = left[1:].tolist()
    until = events[1:].tolist()
    times = intervals.times.tolist()
    return Curve(
        intervals.patients, times, at_risk, at_risk, until, until, survival.tolist(), none, none
    )


def _lowest(intervals: _Intervals) -> Floats:
    """Return (times,) the least survival: censored after the start, events at the stop."""
    stopped = intervals.until(intervals.stop, intervals.events)
    begun = intervals.until(intervals.start, intervals.events)[:-1]
    censored = intervals.until(intervals.start, intervals.censored)[:-1]
    at_risk = intervals.patients - stopped[:-1] - censored
    # At the time itself, all events of intervals that contain it or end there.
    last = _surviving(begun - stopped[:-1], at_risk)
    before = np.cumprod(_surviving(np.diff(stopped), at_risk))
    return np.concatenate(([1.0], before[:-1]))[: last.size] * last


def _highest(intervals: _Intervals) -> Floats:
    """Return (times,) the greatest survival: events after the start, censored at the stop.

    An interval counts from its stop on. Its events then change the curve after its start, and no
    earlier part of it.
    """
    size = intervals.times.size
    order = np.argsort(intervals.stop, kind="stable")
    ends = np.searchsorted(intervals.stop[order], np.arange(1, size + 2))
    censored = intervals.until(intervals.stop, intervals.censored)
    # By index of time: events right after it, events before those, survival before those.
    events = np.zeros(size + 1)
    happened = np.zeros(size + 1)
    reached = np.ones(size + 1)
    highest = np.ones(size)
    for index in range(1, size + 1):
        ended = order[ends[index - 1] : ends[index]]
        first = int(intervals.start[ended].min(initial=index - 1))
        np.add.at(events, intervals.start[ended], intervals.events[ended])
        new = events[first:index]
        earlier = happened[first] + np.cumsum(new) - new
        factors = _surviving(new, intervals.patients - earlier - censored[first:index])
        happened[first + 1 : index + 1] = earlier + new
        reached[first + 1 : index + 1] = reached[first] * np.cumprod(factors)
        highest[index - 1] = reached[index]
    return highest


def _surviving(events: Floats, at_risk: Floats) -> Floats:
    """Return the share that survives events of those at risk; 1 if nobody is at risk."""
    shares = np.divide(events, at_risk, out=np.zeros_like(at_risk), where=at_risk > 0)
    return np.clip(1.0 - shares, 0.0, 1.0)
