"""The server's side of a method for hospitals that differ.

Nothing here knows a strategy: the functions take and return plain values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tomli_w
from flwr.app import Array, ArrayRecord

from fedmed_flower.arrays.views import view
from fedmed_flower.errors import InputError
from fedmed_flower.methods.base import Method, Moved, ServerRound
from fedmed_flower.server.screening import capped
from fedmed_flower.wire import KEEP, KEEP_SENT, METHOD, METHOD_RECORD, METHOD_SETTINGS, OWN, TAKEN

# What names begin with in a strategy's state, for what the server keeps of the method.
STATE = "method state "
# The record of the sites: of each, its replies that were taken, and its last weight.
SITES = "method sites"
# The record of the companions' lengths.
LENGTHS = "method lengths"


@dataclass
class MethodState:
    """What the server knows of a method from one round to the next.

    Attributes
    ----------
    records : dict of str to ArrayRecord
        What `Method.move` kept, by name.
    taken : dict of str to int
        How many replies of each site have made a model.
    weights : dict of str to float
        The last weight of each site.
    lengths : dict of str to float
        As `Limits.lengths`.
    """

    records: dict[str, ArrayRecord] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    lengths: dict[str, float] = field(default_factory=dict)

    def after(
        self,
        records: Mapping[str, ArrayRecord],
        weights: Mapping[str, float],
        lengths: Mapping[str, float],
    ) -> MethodState:
        """Return the state after a round.

        Parameters
        ----------
        records : mapping of str to ArrayRecord
        weights : mapping of str to float
            Of the sites whose replies have made the model. A site that was sent two messages in a
            round went on from one state in both, so it counts once.
        lengths : mapping of str to float
        """
        taken = dict(self.taken)
        for site in weights:
            taken[site] = taken.get(site, 0) + 1
        return MethodState(dict(records), taken, self.weights | dict(weights), dict(lengths))

    def shares(
        self, weights: Mapping[str, float], most: float | None = None
    ) -> tuple[float, float]:
        """Return `retained` and `share` of a round whose replies have these weights.

        Parameters
        ----------
        weights : mapping of str to float
        most : float, optional
            Largest share of one site in the sum of all: ``max_weight_share``.
        """
        known = self.weights | dict(weights)
        cut = dict(zip(known, capped([*known.values()], most), strict=True))
        total = sum(cut.values())
        before = sum(cut[site] for site in self.weights)
        return before / total, sum(cut[site] for site in weights) / total

    def export(self) -> dict[str, ArrayRecord]:
        """Return the state for a checkpoint; empty if nothing has been done by a method."""
        exported = {f"{STATE}{name}": record for name, record in self.records.items()}
        if self.taken:
            exported[SITES] = ArrayRecord(
                {
                    site: Array(np.array([count, self.weights.get(site, 0.0)], np.float64))
                    for site, count in self.taken.items()
                }
            )
        if self.lengths:
            exported[LENGTHS] = ArrayRecord(
                {name: Array(np.array([length])) for name, length in self.lengths.items()}
            )
        return exported

    @classmethod
    def pop_from(cls, state: dict[str, ArrayRecord]) -> MethodState:
        """Take what `export` returned out of a checkpoint's state.

        Raises
        ------
        ValueError
            If the record of the sites is not one that `export` has made.
        """
        names = [name for name in state if name.startswith(STATE)]
        records = {name.removeprefix(STATE): state.pop(name) for name in names}
        taken: dict[str, int] = {}
        weights: dict[str, float] = {}
        for site, array in state.pop(SITES, ArrayRecord()).items():
            count, weight = view(array).tolist()
            if not (count >= 1 and count == int(count) and 0 <= weight < math.inf):
                raise ValueError(f"{site} cannot have {count} replies of the weight {weight}")
            taken[site] = int(count)
            weights[site] = weight
        lengths = {
            name: float(view(array)[0]) for name, array in state.pop(LENGTHS, ArrayRecord()).items()
        }
        return cls(records, taken, weights, lengths)


def config_of(
    method: Method | None, keep: str, keep_sent: bool, taken: int, own: bool
) -> dict[str, Any]:
    """Return what the config of a message says of the method.

    Parameters
    ----------
    method : Method or None
    keep : str
        The setting of this name: which layers stay different at each site.
    keep_sent : bool
        Whether sites send them; only training messages say so.
    taken : int
        How many replies of the site have made a model.
    own : bool
        Whether the site's own model is meant.
    """
    config: dict[str, Any] = {TAKEN: taken}
    if method is not None:
        config[METHOD] = method.name
        config[METHOD_SETTINGS] = tomli_w.dumps(method.config())
    if keep:
        config[KEEP] = keep
    if own:
        config[OWN] = True
    elif keep:
        config[KEEP_SENT] = keep_sent
    return config


def companions_of(
    method: Method | None, model: ArrayRecord, trained: Sequence[str]
) -> dict[str, ArrayRecord]:
    """Return what goes beside the model in the first round, by the name of the record."""
    if method is None:
        return {}
    first = method.companions(model, trained)
    return {f"{METHOD_RECORD}{name}": record for name, record in first.items()}


def moved(
    method: Method,
    state: MethodState,
    sent: ArrayRecord,
    model: ArrayRecord,
    trained: Sequence[str],
    before: Mapping[str, ArrayRecord],
    after: Mapping[str, ArrayRecord],
    weights: Mapping[str, float],
    max_share: float | None = None,
) -> Moved:
    """Let a method make the next model of what the strategy's rule has made.

    Parameters
    ----------
    method : Method
    state : MethodState
    sent, model : ArrayRecord
        The global model that was sent, and what the rule has made.
    trained : sequence of str
        Keys of the model that are trained.
    before, after : mapping of str to ArrayRecord
        All companions that were sent, and what the rule has made of them.
    weights : mapping of str to float
        The weights of the sites that replied.
    max_share : float, optional
        Largest share of one site in the sum of all weights.

    Returns
    -------
    Moved
        Its companions by the names of their records.
    """
    retained, share = state.shares(weights, max_share)
    result = method.move(
        ServerRound(
            sent, model, tuple(trained), _own(before), _own(after), state.records, retained, share
        )
    )
    companions = {f"{METHOD_RECORD}{name}": record for name, record in result.companions.items()}
    return Moved(result.model, companions, result.state)


def _own(records: Mapping[str, ArrayRecord]) -> dict[str, ArrayRecord]:
    return {
        name.removeprefix(METHOD_RECORD): record
        for name, record in records.items()
        if name.startswith(METHOD_RECORD)
    }


def require_fitting(
    method: Method, strategy: str, plain: bool, optimiser: bool, fixed: bool
) -> None:
    """Refuse a method that a strategy would make wrong.

    Parameters
    ----------
    method : Method
    strategy : str
        The strategy's name.
    plain : bool
        Whether its rule may combine further arrays as it combines models.
    optimiser : bool
        Whether a server optimiser moves the model.
    fixed : bool
        Whether it draws the sites by a law of its own.

    Raises
    ------
    InputError
    """
    if not plain and method.defines("companions", "move"):
        raise InputError(
            f"{strategy} takes no method with further arrays or a step of its own at the server, "
            f"got {method.name}: take FedAvg, or a method that is the hospitals' alone"
        )
    if optimiser and method.moves:
        raise InputError(
            f"{method.name} and the server optimiser of {strategy} would both move the model: take "
            "FedAvg, or another method"
        )
    if fixed and method.defines("choose"):
        raise InputError(
            f"{method.name} and {strategy} would both choose the sites of a round: take FedAvg"
        )
