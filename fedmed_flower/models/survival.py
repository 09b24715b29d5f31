"""Losses for times until an event, and what follows from hazards."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
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
        Above 0.
    events : Tensor of shape (n,)
        0 or 1. Without an event the loss is 0, and so are its gradients.
    ties : {"efron", "breslow"}
        What is done with events at the same time.

    Raises
    ------
    InputError
        If `ties` is unknown, lengths differ, or a time or an event is out of its range.
    """
    if ties not in _TIES:
        raise InputError(f"ties must be one of {', '.join(_TIES)}, got {ties!r}")
    require_same_length(log_hazards=log_hazards.numel(), times=len(times), events=len(events))
    check_outcomes(times.detach().cpu(), events.detach().cpu())
    # Sums are too much for half precision.
    scores = log_hazards.reshape(-1).to(torch.promote_types(log_hazards.dtype, torch.float32))
    order = torch.argsort(times, descending=True)
    scores, happened = scores[order], events[order].long()
    _, group, sizes = torch.unique_consecutive(
        times[order], return_inverse=True, return_counts=True
    )
    last = sizes.cumsum(0) - 1
    # Those at risk are the patients with a time as late or later.
    at_risk = torch.logcumsumexp(scores, 0)[last][group]
    if ties == "efron":
        here = torch.zeros_like(sizes).index_add(0, group, happened)
        total = happened.cumsum(0)
        earlier = (total - happened - (total[last] - here)[group]) * happened
        # Shares of the hazard at risk, so that no exponential overflows.
        shares = (scores - at_risk).exp() * happened
        dying = torch.zeros_like(last, dtype=shares.dtype).index_add(0, group, shares)[group]
        at_risk = at_risk + torch.log1p(
            -earlier.to(scores.dtype) / here[group].clamp(min=1) * dying
        )
    return ((at_risk - scores) * happened).sum() / happened.sum().clamp(min=1)


def discrete_time_loss(logits: Tensor, times: Tensor, events: Tensor, edges: Tensor) -> Tensor:
    """Return the negative log-likelihood of a hazard in each interval, as a mean over the rows.

    The hazard sigmoid(logit) of an interval is the probability of an event in it for who comes to
    its start. An interval holds its end, not its start. A patient with an event survived the
    intervals before it; a censored one survived those that have ended by the time, and tells
    nothing about the interval in which he or she was last seen, whatever part of it has passed.
    Who has a time beyond the last edge survived all intervals, with or without an event later.

    Parameters
    ----------
    logits : Tensor of shape (n, intervals)
    times, events : Tensor of shape (n,)
        As `check_outcomes` wants them. It is not called here, as nothing in here depends on values:
        the loss of one row can go through ``torch.func.vmap``.
    edges : Tensor of shape (intervals + 1,)
        Ascending from 0, as from `interval_edges`.

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
    # A time that is rounded to fewer bits lies on an edge only if the edge is rounded likewise.
    ends = edges.to(times.device, times.dtype if times.is_floating_point() else edges.dtype)
    when, happened = times[:, None], events[:, None].to(scores.dtype)
    fails = (ends[:-1] < when) * (when <= ends[1:]) * happened
    survives = (ends[1:] <= when) * (1 - fails)
    likelihood = fails * logsigmoid(scores) + survives * logsigmoid(-scores)
    return -likelihood.sum() / len(logits)


def interval_edges(horizon: float, count: int) -> Tensor:
    """Return the edges of `count` intervals of one length from 0 to `horizon`, in float64."""
    if count < 1:
        raise InputError(f"count must be at least 1 interval, got {count}")
    if not 0 < horizon < math.inf:
        raise InputError(f"horizon must be a finite number above 0, got {horizon}")
    return torch.linspace(0, horizon, count + 1, dtype=torch.float64)


def survival_from_hazards(logits: ArrayLike) -> Numbers:
    """Return the probability of being without the event at each edge, the first one 1.

    From logits of shape (n, intervals), as `discrete_time_loss` takes them, to (n, intervals + 1).
    """
    scores = np.asarray(logits, dtype=np.float64)
    logs = -np.cumsum(np.logaddexp(0, scores), axis=1)
    survival: Numbers = np.exp(np.pad(logs, ((0, 0), (1, 0))))
    return survival


def risk_from_hazards(logits: ArrayLike) -> Numbers:
    """Return a score for `concordance` from logits of shape (n, intervals).

    It is the mean time without the event up to the last edge, by trapezoids, in intervals of one
    length, with a minus: from -intervals to -1/2, higher for an earlier event.
    """
    survival = survival_from_hazards(logits)
    risks: Numbers = (survival[:, -1] - survival[:, 0]) / 2 - survival[:, 1:].sum(axis=1)
    return risks
