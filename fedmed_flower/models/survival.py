"""Losses for times until an event; survival and risk from hazards."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.survival import check_outcomes, require_same_length
from fedmed_flower.metrics.types import Numbers

_TIES = ("efron", "breslow")


def cox_loss(log_hazards: Tensor, times: Tensor, events: Tensor, ties: str = "efron") -> Tensor:
    """Return Cox's negative log partial likelihood, as a mean over the events.

    Parameters
    ----------
    log_hazards : Tensor of shape (n,) or (n, 1)
    times : Tensor of shape (n,)
        0 or more.
    events : Tensor of shape (n,)
        0 or 1. If there is no event, the loss is 0, and so are its gradients.
    ties : {"efron", "breslow"}
        Method for events at the same time.

    Raises
    ------
    InputError
        If `ties` is unknown, lengths differ, or a time or an event is out of its range.
    """
    if ties not in _TIES:
        raise InputError(f"ties must be one of {', '.join(_TIES)}, got {ties!r}")
    require_same_length(log_hazards=log_hazards.numel(), times=len(times), events=len(events))
    check_outcomes(times.detach().cpu(), events.detach().cpu())
    # Half precision is too coarse for the sums.
    scores = log_hazards.reshape(-1).to(torch.promote_types(log_hazards.dtype, torch.float32))
    order = torch.argsort(times, descending=True)
    scores = scores[order]
    happened = events[order].long()
    _, group, sizes = torch.unique_consecutive(
        times[order], return_inverse=True, return_counts=True
    )
    last = sizes.cumsum(0) - 1
    # Patients with the same or a later time are at risk.
    at_risk = torch.logcumsumexp(scores, 0)[last][group]
    if ties == "efron":
        # Events in each group of equal times, and for each event those before it in its group.
        tied = torch.zeros_like(sizes).index_add(0, group, happened)
        total = happened.cumsum(0)
        earlier = (total - happened - (total[last] - tied)[group]) * happened
        # Shares of the hazard at risk, so that no exponential overflows.
        shares = (scores - at_risk).exp() * happened
        dying = torch.zeros_like(last, dtype=shares.dtype).index_add(0, group, shares)[group]
        at_risk = at_risk + torch.log1p(
            -earlier.to(scores.dtype) / tied[group].clamp(min=1) * dying
        )
    return ((at_risk - scores) * happened).sum() / happened.sum().clamp(min=1)


def discrete_time_loss(logits: Tensor, times: Tensor, events: Tensor, edges: Tensor) -> Tensor:
    """Return the negative log-likelihood of a hazard in each interval, as a mean over the rows.

    The hazard sigmoid(logit) of an interval is the probability of an event in it, for a patient who
    reaches its start. An interval includes its end, not its start; the first includes time 0 too. A
    patient with an event survived all intervals before that of the event. A censored patient
    survived the intervals that ended by the time of censoring; the interval in which that time lies
    does not count. A patient with a time beyond the last edge survived all intervals, with or
    without a later event.

    Parameters
    ----------
    logits : Tensor of shape (n, intervals)
    times, events : Tensor of shape (n,)
        Valid for `check_outcomes`. It is not called here, since ``torch.func.vmap``, which may run
        this loss row by row, allows no check of values.
    edges : Tensor of shape (intervals + 1,)
        Ascending from 0, as `interval_edges` returns them.

    Raises
    ------
    InputError
        If shapes do not fit.
    """
    require_same_length(logits=len(logits), times=len(times), events=len(events))
    if logits.ndim != 2 or edges.shape != (logits.shape[1] + 1,):
        raise InputError(
            "logits must have shape (n, intervals) and edges (intervals + 1,), "
            f"got {tuple(logits.shape)} and {tuple(edges.shape)}"
        )
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # A time that was rounded to fewer bits equals an edge only if the edge is rounded as well.
    ends = edges.to(times.device, times.dtype if times.is_floating_point() else edges.dtype)
    time = times[:, None]
    happened = events[:, None].to(scores.dtype)
    starts = torch.cat([ends.new_tensor([-1.0]), ends[1:-1]])
    fails = (starts < time) * (time <= ends[1:]) * happened
    survives = (ends[1:] <= time) * (1 - fails)
    likelihood = fails * logsigmoid(scores) + survives * logsigmoid(-scores)
    return -likelihood.sum() / len(logits)


def interval_edges(horizon: float, count: int) -> Tensor:
    """Return the edges of `count` equal intervals from 0 to `horizon`, in float64.

    Raises
    ------
    InputError
        If `count` is below 1, or `horizon` is not a finite number above 0.
    """
    if count < 1:
        raise InputError(f"count must be at least 1 interval, got {count}")
    if not 0 < horizon < math.inf:
        raise InputError(f"horizon must be a finite number above 0, got {horizon}")
    return torch.linspace(0, horizon, count + 1, dtype=torch.float64)


def survival_from_hazards(logits: ArrayLike) -> Numbers:
    """Return the probability of no event up to each edge, (n, intervals + 1); the first is 1.

    Parameters
    ----------
    logits : array of shape (n, intervals)
        As `discrete_time_loss` takes them.
    """
    scores = np.asarray(logits, dtype=np.float64)
    logs = -np.cumsum(np.logaddexp(0, scores), axis=1)
    survival: Numbers = np.exp(np.pad(logs, ((0, 0), (1, 0))))
    return survival


def risk_from_hazards(logits: ArrayLike) -> Numbers:
    """Return a risk (n,) for `concordance`, from -intervals to -1/2; higher for an earlier event.

    It is minus the mean time without the event up to the last edge, in numbers of equal intervals,
    by the trapezoidal rule.

    Parameters
    ----------
    logits : array of shape (n, intervals)
        As `discrete_time_loss` takes them.
    """
    survival = survival_from_hazards(logits)
    risks: Numbers = (survival[:, -1] - survival[:, 0]) / 2 - survival[:, 1:].sum(axis=1)
    return risks


class Hazards(nn.Module):
    """Adds the log odds of each interval to one score a patient (Cox 1972, section 6).

    With one score for all intervals, a private run has few numbers to hide in noise.
    """

    def __init__(self, score: nn.Module, intervals: int) -> None:
        super().__init__()
        self.score = score
        # Events are rare. From even odds, a private run would spend all its steps learning that.
        self.baseline = nn.Parameter(torch.full((intervals,), -3.0))

    def forward(self, features: Tensor) -> Tensor:
        """Return the log odds, (batch, intervals)."""
        return self.score(features) + self.baseline  # type: ignore[no-any-return]
