"""What each model reaches at each hospital, read from a run's summary. No HTML is made here."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence
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
AT_HOME = "tested at home only"
# Models that hospitals keep for themselves, if all were tested at home only, by their kind.
_AT_HOME = {"own": "Own models, each at home", "personal": "Fine-tuned, each at home"}
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
        What it is called; of a model of one hospital, that hospital.
    values
        The metric by the hospital whose patients it was tested on.
    is_federated
        Whether it is the model that the run is about.
    stayed
        Whether it was tested at its own hospital only.
    """

    name: str
    values: dict[str, float]
    is_federated: bool = False
    stayed: bool = False


class Group(NamedTuple):
    """Models of one kind, each of one hospital.

    Attributes
    ----------
    kind
        The key of the kind in a summary: ``local``, ``own`` or ``personal``.
    models
    """

    kind: str
    models: list[Model]

    def at_home(self) -> dict[str, float]:
        """Return what the models reach at their own hospital."""
        return {
            model.name: model.values[model.name]
            for model in self.models
            if model.name in model.values
        }

    def elsewhere(self) -> dict[str, dict[str, float]]:
        """Return what they reach at the others, by the hospital whose model it is."""
        return {
            model.name: others
            for model in self.models
            if (others := {s: v for s, v in model.values.items() if s != model.name})
        }

    def mean_elsewhere(self) -> dict[str, float]:
        """Return the mean of `elsewhere`, by the hospital whose model it is."""
        return {site: statistics.fmean(v.values()) for site, v in self.elsewhere().items()}


@dataclass(frozen=True)
class Crossed:
    """Models by hospitals.

    Attributes
    ----------
    metric
        Its name.
    sites
        The hospitals with test patients, in order.
    groups
        Models of one hospital each: first those that were trained there alone; then each kind that
        hospitals keep for themselves, if one of its models was tested elsewhere too.
    others
        Models of all hospitals; of a kind that was tested at home only, the value of each hospital.
    silent
        Why hospitals have no figure of any model.
    ends
        The lowest and the highest figure.
    """

    metric: str
    sites: list[str]
    groups: list[Group]
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
    def has_stayed(self) -> bool:
        """Whether a model that a hospital keeps for itself was tested at home only."""
        rows = {model.name for model in self.others} & {*_AT_HOME.values()}
        return bool(rows) or any(model.stayed for model in self.models)

    @property
    def models(self) -> list[Model]:
        """All models."""
        return [*(model for group in self.groups for model in group.models), *self.others]

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
        if model.stayed and site != model.name:
            return AT_HOME
        if not model.values and not model.stayed:
            return NOT_TRAINED
        return self.silent.get(site, NO_ANSWER)

    def best(self, site: str) -> str:
        """Return the best figure at a hospital, as it is shown; an empty text if there is none."""
        values = [model.values[site] for model in self.models if site in model.values]
        if len(values) < 2:
            return ""
        best = min(values) if lower_is_better(self.metric) else max(values)
        return frame.format_value(best, frame.format_of(self.metric))


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
    order = [*sites]
    alone = _group("local", test, order, main)
    if not any(model.values for model in alone.models):
        return None
    tested = nested(test, "sites")
    others = {_FEDERATED: by_site(tested, main)}
    groups = [alone]
    for kind, name in _AT_HOME.items():
        group = _group(kind, test, order, main)
        if any(not model.stayed for model in group.models):
            groups.append(group)
        else:
            others[name] = by_site(nested(test, kind), main)
    others["Trained on pooled data"] = by_site(nested(test, "pooled", "sites"), main)
    tables = [model.values for group in groups for model in group.models]
    tables += others.values()
    measured = {site for values in tables for site in values}
    columns = [site for site in order if site in measured or nested(tested, site)]
    figures = [value for values in tables for value in values.values()]
    few = FEW + _UNDEFINED.get(main, "")
    hidden: Collection[str] = () if noise is None else noise.hidden
    return Crossed(
        metric=main,
        sites=columns,
        groups=groups,
        others=[
            Model(name, values, name == _FEDERATED) for name, values in others.items() if values
        ],
        silent={s: NOISED if s in hidden else few for s in columns if s not in measured},
        ends=(min(figures), max(figures)),
    )


def _group(kind: str, test: dict[str, Any], order: Sequence[str], main: str) -> Group:
    """Return the models of a kind.

    A summary has what a model reaches at each hospital under ``sites``. Models that were trained
    alone and have no such table are left out: their run is of before there was one.
    """
    models = nested(test, kind)
    at_each = {
        site: by_site(nested(metrics, "sites"), main)
        for site, metrics in models.items()
        if "sites" in nested(metrics)
    }
    if at_each:
        frame.require_small(len(models), max(map(len, at_each.values())))
    if kind == "local":
        return Group(kind, [Model(site, at_each[site]) for site in order if site in at_each])
    at_home = by_site(models, main)
    made = []
    for site in order:
        if site in models:
            values = dict(at_each.get(site, {}))
            values |= {site: at_home[site]} if site in at_home else {}
            made.append(Model(site, values, stayed=site not in at_each))
    return Group(kind, made)
