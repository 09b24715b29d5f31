"""A real hospital as a curious server meets it, and how what the server found is judged."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from fedmed_flower import MedicalClient
from fedmed_flower.arrays.views import view
from fedmed_flower.wire import MESSAGE_VERSION, RUN_KEY, VERSION

Floats = NDArray[np.float64]
Arrays = Mapping[str, ArrayLike]

DELTA = 1e-6
# Other hospitals with which guesses are compared; how rarely chance does as well.
DECOYS, SURE = 20, 1e-3
PLAIN = {"preparation": "declared", "optimizer": "sgd", "learning-rate": 0.1, "device": "cpu"}
PRIVATE = {"privacy": "patient", "sampling-rate": 1.0, "delta": DELTA, "num-server-rounds": 1}


class Found(NamedTuple):
    """What an attack got.

    Attributes
    ----------
    right, of : int
        How many of how many answers are right.
    chance : float
        How many would be right by chance.
    """

    right: int
    of: int
    chance: float

    @property
    def works(self) -> bool:
        """Whether chance gives so many right answers less often than once in 1,000."""
        return bool(stats.binom.sf(self.right - 1, self.of, self.chance / self.of) < SURE)


class Victim:
    """A real hospital: asked by messages, with a node config of its own.

    Parameters
    ----------
    client : type of MedicalClient
        The app that runs there.
    folder : Path
        The hospital's own, with its data.
    epsilon : float
        Of its budget; 0 for none. A server knows it and asks privately where there is one.
    **node
        What else the node config says, with ``_`` for ``-``.
    """

    _run_ids = itertools.count(1)

    def __init__(
        self, client: type[MedicalClient], folder: Path, epsilon: float, **node: Any
    ) -> None:
        self.client, self._ids = client, dict[str, int]()
        self._run: dict[str, Any] = dict(PLAIN)
        self._node: dict[str, Any] = {"site-name": "north", "data-dir": str(folder)}
        if epsilon:
            self._run |= PRIVATE | {"target-epsilon": epsilon}
            self._node |= {"budget-epsilon": epsilon, "budget-delta": DELTA}
        self._node |= {key.replace("_", "-"): value for key, value in node.items()}

    def context(self, run: Mapping[str, Any]) -> Context:
        """Return the context of a run at this hospital; each run config has one run."""
        config = self._run | {key.replace("_", "-"): value for key, value in run.items()}
        text = json.dumps(config, sort_keys=True)
        if text not in self._ids:
            self._ids[text] = next(self._run_ids)
        return Context(self._ids[text], 1, self._node, RecordDict(), config)

    def ask(
        self,
        kind: str,
        arrays: Arrays | None = None,
        message: Mapping[str, Any] | None = None,
        **run: Any,
    ) -> RecordDict:
        """Return the content of a reply; of an error, ``error`` with the ``reason`` alone.

        Parameters
        ----------
        kind : str
            Of the message, such as ``train``.
        arrays : dict of str to array, optional
        message : dict, optional
            More for the message's config. All messages name one run, whatever the run config is.
        **run
            For the run config, with ``_`` for ``-``.
        """
        context = self.context(run)
        TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, SUPERLINK_NODE_ID
        TaskIdentity.task_id = 1
        usual = {"server-round": 1, RUN_KEY: "k", VERSION: MESSAGE_VERSION}
        config = ConfigRecord(usual | dict(message or {}))
        sent = {name: Array(np.ascontiguousarray(a)) for name, a in (arrays or {}).items()}
        content = RecordDict({"arrays": ArrayRecord(sent), "config": config})
        reply = self.client.client_app()(Message(content, 1, kind), context)
        if reply.has_error():
            return RecordDict({"error": ConfigRecord({"reason": reply.error.reason})})
        return reply.content

    def figures(self, arrays: Arrays, split: str = "test", **run: Any) -> dict[str, Any]:
        """Return what an evaluation tells; nothing where it fails or is declined."""
        reply = self.ask("evaluate", arrays, {"split": split}, **run)
        return dict(reply["metrics"]) if "metrics" in reply else {}

    def trained(self, arrays: Arrays, server_round: int = 1, **run: Any) -> dict[str, Any]:
        """Return the weights after a round of training; nothing where it fails or is declined."""
        reply = self.ask("train", arrays, {"server-round": server_round}, **run)
        return {name: view(a) for name, a in reply["arrays"].items()} if "arrays" in reply else {}


def scored(
    guesses: ArrayLike, draw: Callable[[int], Floats], within: ArrayLike, named: bool = False
) -> Found:
    """Compare guesses with a hospital's patients, and for chance with those of `DECOYS` others.

    Parameters
    ----------
    guesses : array of shape (m, k)
    draw : callable
        Maps a seed to the numbers (n, k) of a hospital's patients; the victim's is 0.
    within : float or array of shape (k,)
        By how much a right guess is off in each number, at most.
    named : bool
        Whether a guess is about the patient in its place; else about any, each patient once.
    """

    def right(truth: Floats) -> int:
        if named:
            return int((np.abs(guess - truth) <= within).all(1).sum())
        left = guess
        for one in truth:
            near = np.flatnonzero((np.abs(left - one) <= within).all(1))
            left = np.delete(left, near[:1], axis=0)
        return len(guess) - len(left)

    truth = draw(0)
    guess = np.asarray(guesses, np.float64).reshape(-1, truth.shape[1])
    others = sum(right(draw(seed)) for seed in range(1, DECOYS + 1))
    # One more, so that what was never seen is not taken for impossible.
    return Found(right(truth), len(truth), (others + 1) / DECOYS)
