"""How survival is modelled."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.allowed import OneOf, Within
from fedmed_flower.settings.section import Section, setting


@dataclass(frozen=True)
class SurvivalSettings(Section):
    """How survival is modelled."""

    survival_loss: str = setting(
        "cox",
        "cox: Cox's partial likelihood of the patients of a batch, whose losses depend on each "
        "other. discrete: the likelihood of the hazard in each interval, which can be trained with "
        "privacy.",
        OneOf(("cox", "discrete")),
    )
    survival_horizon: float = setting(
        0.0,
        "The time up to which is predicted and the integrated Brier score goes; above 0 for "
        "discrete. 0: no Brier score.",
        Within(0.0),
        "the table's unit of time",
    )
    survival_intervals: int = setting(
        10,
        "Intervals of equal length between 0 and the horizon, for discrete.",
        Within(1, 10_000),
        "intervals",
    )

    def check(self) -> None:
        """Refuse discrete time without a horizon."""
        if self.survival_loss == "discrete":
            self.require_positive("survival_horizon")
