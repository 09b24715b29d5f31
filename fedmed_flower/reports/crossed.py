"""What each model reaches at each hospital, read from a run's summary. No HTML is made here."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedmed_flower.metrics.names import lower_is_better
from fedmed_flower.reports import frame
from fedmed_flower.reports.noise import Noise
from fedmed_flower.reports.summary import by_site, nested

LEVELS = 9
_FEDERATED = "Federated"
FEW = "too few test patients"
NOISED = "too few test patients to tell by counts with noise"
NO_ANSWER = "that hospital sent no result of this model"
NOT_TRAINED = "this model could not be trained or tested"
# Why else a hospital may have no figure of any model.
_UNDEFINED = {
    "auc": ", or all of one class",
    "c-index": ", or no two whose times can be compared",
    "r2": ", or the same value in all",
    "d2": ", or the same value in all",
}


class Model(NamedTuple):
    """A model, or one a hospital, and what it reaches.

    Attributes
    ----------
    name
        What it is called; of a model that was trained at one hospital alone, that hospital.
    values
        The metric by the hospital whose patients it was tested on.
    is_federated
        Whether it is the model that the run is about.
    """

    name: str
    values: dict[str, float]
    is_federated: bool = False


@dataclass(frozen=True)
class Crossed:
    """Models by hospitals.

    Attributes
    ----------
    metric
        Its name.
    sites
        The hospitals with test patients, in order.
    alone
        Models that were trained at one hospital alone.
    others
        Models of all hospitals; of a model that each hospital has for itself, the value of each.
    silent
        Why hospitals have no figure of any model.
    ends
        The lowest and the highest figure.
    """

    metric: str
    sites: list[str]
    alone: list[Model]
    others: list[Model]
    silent: dict[str, str]
    ends: tuple[float, float]

    @property
    def has_gaps(self) -> bool:
        """Whether a hospital has figures of some models and not of another that has figures."""
        return any(
            site not in model.values and self.why(model, site) == NO_ANSWER
            for model in self.models
            for site in self.sites
        )

    @property
    def models(self) -> list[Model]:
        """All models."""
        return [*self.alone, *self.others]

    def level(self, value: float) -> int:
        """Return how good a figure is among all, from 0 (worst) to 8 (best)."""
        low, high = self.ends
        if low == high:
            return LEVELS // 2
        share = (value - low) / (high - low)
        share = 1 - share if lower_is_better(self.metric) else share
        return min(int(LEVELS * share), LEVELS - 1)

    def why(self, model: Model, site: str) -> str:
        """Return why a model has no figure at a hospital."""
        if not model.values:
            return NOT_TRAINED
        return self.silent.get(site, NO_ANSWER)

    def best(self, site: str) -> str:
        """Return the best figure at a hospital, as it is shown; an empty text if there is none."""
        values = [model.values[site] for model in self.models if site in model.values]
        if len(values) < 2:
            return ""
        best = min(values) if lower_is_better(self.metric) else max(values)
        return frame.format_value(best, frame.format_of(self.metric))

    def at_home(self) -> dict[str, float]:
        """Return what the models that were trained alone reach at their own hospital."""
        return {
            model.name: model.values[model.name]
            for model in self.alone
            if model.name in model.values
        }

    def elsewhere(self) -> dict[str, dict[str, float]]:
        """Return what they reach at the others, by the hospital they were trained at."""
        return {
            model.name: others
            for model in self.alone
            if (others := {s: v for s, v in model.values.items() if s != model.name})
        }

    def mean_elsewhere(self) -> dict[str, float]:
        """Return the mean of `elsewhere`, by the hospital that the models were trained at."""
        return {site: statistics.fmean(v.values()) for site, v in self.elsewhere().items()}


def crossed(
    summary: dict[str, Any], sites: Iterable[str], main: str, noise: Noise | None = None
) -> Crossed | None:
    """Return what each model reaches at each hospital; None if the run has no such table.

    Parameters
    ----------
    summary
        As `noise.told` returns it.
    sites
        All hospitals, in the order in which they are shown.
    noise
        That of the test.
    """
    test = nested(summary, "test")
    local = nested(test, "local")
    at_each = {
        site: by_site(nested(metrics, "sites"), main)
        for site, metrics in local.items()
        if "sites" in nested(metrics)
    }
    if not any(at_each.values()):
        return None
    frame.require_small(len(at_each), max(map(len, at_each.values())))
    tested = nested(test, "sites")
    others = {
        _FEDERATED: by_site(tested, main),
        "Own models, each at home": by_site(nested(test, "own"), main),
        "Fine-tuned, each at home": by_site(nested(test, "personal"), main),
        "Trained on pooled data": by_site(nested(test, "pooled", "sites"), main),
    }
    measured = {site for values in (*at_each.values(), *others.values()) for site in values}
    order = [*sites]
    columns = [site for site in order if site in measured or nested(tested, site)]
    figures = [v for values in (*at_each.values(), *others.values()) for v in values.values()]
    few = FEW + _UNDEFINED.get(main, "")
    hidden: Collection[str] = () if noise is None else noise.hidden
    return Crossed(
        metric=main,
        sites=columns,
        alone=[Model(site, at_each[site]) for site in order if site in at_each],
        others=[
            Model(name, values, name == _FEDERATED) for name, values in others.items() if values
        ],
        silent={s: NOISED if s in hidden else few for s in columns if s not in measured},
        ends=(min(figures), max(figures)),
    )
