"""Settings of survival models."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmed_flower.settings.section import Section

_LOSSES = ("cox", "discrete")


@dataclass(frozen=True)
class SurvivalSettings(Section):
    """How survival is modelled, from the run config.

    Attributes
    ----------
    survival_loss : {"cox", "discrete"}
        ``cox``: Cox's partial likelihood over a batch, in which the losses of patients depend on
        each other. ``discrete``: the likelihood of the hazard in each of several intervals, which
        can be trained with privacy.
    survival_horizon : float
        Time up to which the model predicts, in the unit of the table; at least 0, and above 0 for
        ``discrete``. The integrated Brier score ends there; with 0 it is left out.
    survival_intervals : int
        Number of intervals of equal length between 0 and the horizon, for ``discrete``; from 1 to
        10,000.
    """

    survival_loss: str = "cox"
    survival_horizon: float = 0.0
    survival_intervals: int = 10

    def __post_init__(self) -> None:
        self.require("survival_loss", self.survival_loss in _LOSSES, f"one of {', '.join(_LOSSES)}")
        self.require_within(1, 10_000, "survival_intervals")
        horizon = 0 <= self.survival_horizon < math.inf
        self.require("survival_horizon", horizon, "at least 0 and finite")
        if self.survival_loss == "discrete":
            self.require_positive("survival_horizon")
