"""Which model of a run is kept, and when a run ends that no longer improves."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from fedmed_flower.arrays.views import view
from fedmed_flower.errors import InputError, shown
from fedmed_flower.metrics.names import lower_is_better, main_metric
from fedmed_flower.server.history import Kept
from fedmed_flower.wire import Sent

log = logging.getLogger("flwr.fedmed")

LAST = "last"
BEST = "best"
# What the name of a figure begins with that the server measures by `evaluate_fn`.
SERVER = "server:"
# Records of a strategy's state: the model of the best round, and what is known of the figure.
KEPT_MODEL = "kept model"
KEPT_FIGURE = "kept figure"
_MOST_NAMED = 20


class Selection:
    """Follows one validation figure over the rounds of a run.

    A round improves on the earlier ones if its figure is better than the best so far; of equal ones
    the earlier counts. A round without the figure does not improve. Rounds before the first that
    trained a model do not count at all.

    Parameters
    ----------
    keep_model : {"last", "best"}
        Which model is the run's at its end.
    keep_metric : str
        A figure of all sites' validation rows together; after ``server:`` one that the server
        measures. Empty: the one by which a run is judged (`main_metric`), chosen in the first round
        that has figures.
    patience : int
        Rounds without improvement after which a run ends; 0 sets no end.

    Attributes
    ----------
    metric : str
        The figure that is followed; empty as long as it is not known.
    round : int
        The best round; 0 if there is none yet.
    value : float
        Its figure; NaN if there is none yet.
    waited : int
        Rounds since then without an improvement.
    model : ArrayRecord or None
        Its model, if the best model is kept.

    Raises
    ------
    InputError
        If an argument is none of these, or `keep_metric` has nothing to decide.
    """

    def __init__(self, keep_model: str = LAST, keep_metric: str = "", patience: int = 0) -> None:
        if keep_model not in (LAST, BEST):
            raise InputError(f"keep_model must be {LAST!r} or {BEST!r}, got {keep_model!r}")
        if type(patience) is not int or patience < 0:
            raise InputError(f"patience must be a whole number, at least 0, got {patience!r}")
        if not isinstance(keep_metric, str):
            raise InputError(f"keep_metric must be the name of a figure, got {keep_metric!r}")
        self.keeps_best = keep_model == BEST
        self.patience = patience
        self._wanted = keep_metric
        if keep_metric and not self.on:
            raise InputError(
                f'keep_metric={keep_metric!r} decides nothing: set keep_model="best" or patience '
                "as well"
            )
        self.metric = ""
        self.round = 0
        self.value = math.nan
        self.waited = 0
        self.model: ArrayRecord | None = None

    @property
    def on(self) -> bool:
        """Whether a figure decides anything."""
        return self.keeps_best or self.patience > 0

    @property
    def by_hospitals(self) -> bool:
        """Whether figures of hospitals decide, and not those that the server measures."""
        return self.on and not self._wanted.startswith(SERVER)

    @property
    def direction(self) -> str:
        """``lowest`` or ``highest``: which value of the figure is the best."""
        lower = lower_is_better(self.metric.removeprefix(SERVER))
        return "lowest" if lower else "highest"

    def observe(
        self,
        server_round: int,
        model: ArrayRecord,
        figures: Mapping[str, Any],
        sent: Sent,
    ) -> str | None:
        """Take up a round; return why it cannot be compared with the others, None if it can.

        Parameters
        ----------
        server_round : int
            At least 1.
        model : ArrayRecord
            The model after that round. It is not copied.
        figures : mapping of str to value
            Of the round, over all sites; those of the server are named as in `server_figures`.
        sent : Sent
            What the sites have sent so far.

        Raises
        ------
        InputError
            If the figure has not come in the first round that has figures; or if training is
            private and a hospital's figures carry no noise.
        """
        if self.by_hospitals and (exact := sent.exact_in_private_run):
            raise InputError(
                "in a private run only figures with noise may decide which model is kept, and "
                f"{min(exact)} evaluates without noise: leave private-metrics on there, or set "
                'keep-model="last" and patience=0'
            )
        known = {
            name: float(value)
            for name, value in figures.items()
            if isinstance(value, int | float) and name.removeprefix(SERVER) != "num-examples"
        }
        if known and not self.metric:
            self.metric = self._named(known, _named_by(sent), server_round)
            log.info("rounds are compared by the %s %s", self.direction, self.metric)
        value = known.get(self.metric, math.nan)
        if math.isfinite(value) and (self.round == 0 or self._is_better(value)):
            self.round = server_round
            self.value = value
            self.waited = 0
            self.model = model if self.keeps_best else None
            return None
        self.waited += 1
        if math.isfinite(value):
            return None
        if not known:
            return "nobody evaluated the model: the round counts as one without improvement"
        what = f"{self.metric} is not finite" if self.metric in known else f"no {self.metric}"
        return f"{what} in this round: it counts as one without improvement"

    def stop_reason(self) -> str | None:
        """Return why the run ends before a further round; None if it goes on."""
        if not self.patience or self.waited < self.patience:
            return None
        rounds = f"{self.waited} round{'s' * (self.waited != 1)}"
        if self.round == 0:
            return f"no figure by which models can be compared has come in {rounds}"
        return (
            f"{self.metric} has not improved in {rounds} (patience): the best is {self.value:.6g}, "
            f"of round {self.round}"
        )

    def kept(self) -> Kept | None:
        """Return, and log, whose round's model is kept; None if it is that of the last round."""
        if self.model is None:
            return None
        text = "the model of round %d is kept: its %s, %.6g, is the %s"
        log.info(text, self.round, self.metric, self.value, self.direction)
        return Kept(self.round, self.metric, self.value, self.direction)

    def export_state(self) -> dict[str, ArrayRecord]:
        """Return the state between rounds as arrays; empty if no figure decides anything."""
        if not self.on:
            return {}
        figure = ArrayRecord(
            {
                "name": Array(np.frombuffer(self.metric.encode(), np.uint8)),
                "value": Array(np.array([self.value], np.float64)),
                "rounds": Array(np.array([self.round, self.waited], np.int64)),
            }
        )
        state = {KEPT_FIGURE: figure}
        if self.model is not None:
            state[KEPT_MODEL] = self.model
        return state

    def import_state(self, state: Mapping[str, ArrayRecord]) -> dict[str, ArrayRecord]:
        """Take up what `export_state` returned, and return the other records of a state.

        Raises
        ------
        ValueError
            If the records are none that `export_state` can have returned.
        """
        rest = dict(state)
        if not self.on or KEPT_FIGURE not in rest:
            return rest
        figure = rest.pop(KEPT_FIGURE)
        model = rest.pop(KEPT_MODEL, None)
        name = view(figure["name"]).astype(np.uint8).tobytes().decode()
        (value,) = view(figure["value"]).astype(np.float64).tolist()
        best, waited = view(figure["rounds"]).astype(np.int64).tolist()
        has_model = self.keeps_best and best > 0
        if min(best, waited) < 0 or math.isfinite(value) != (best > 0):
            raise ValueError(f"the best round is {best}, with {value}, {waited} rounds ago")
        if (model is not None) != has_model:
            raise ValueError("the model of the best round is missing, or there is one too many")
        self.metric = name
        self.value = value
        self.round = best
        self.waited = waited
        self.model = model
        return rest

    def _is_better(self, value: float) -> bool:
        return value < self.value if self.direction == "lowest" else value > self.value

    def _named(self, known: Mapping[str, float], sent: set[str], server_round: int) -> str:
        """Return the figure to follow, which a site must have sent or the server measured.

        It may be undefined in this round: `known` holds those of all sites together, `sent` the
        names of all that a site has sent, also as NaN.
        """
        metric = self._wanted or main_metric(sent.union(known))
        if metric in known or metric in sent:
            return metric
        bare = {name.removeprefix(SERVER): name for name in known}
        near = difflib.get_close_matches(metric.removeprefix(SERVER), bare, n=1, cutoff=0.6)
        listed = sorted(known)[:_MOST_NAMED]
        more = f" and {len(known) - len(listed)} more" if len(known) > len(listed) else ""
        there = f"round {server_round} has {', '.join(listed)}{more}"
        if not self._wanted:
            raise InputError(
                "keep-metric must name the figure by which rounds are compared, got none, and "
                f"{there}"
            )
        hint = f"did you mean {bare[near[0]]}? " if near else ""
        raise InputError(f"keep-metric: there is no figure {shown(metric, 100)!r}: {hint}({there})")


def _named_by(sent: Sent) -> set[str]:
    """Return the names of figures that sites have sent, whatever their values."""
    sites = sent.keys.get("evaluate", {}).values()
    return {key.removeprefix("metrics.") for keys in sites for key in keys}


def server_figures(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return figures that the server measured, each by its name after ``server:``."""
    return {f"{SERVER}{name}": value for name, value in (metrics or {}).items()}
