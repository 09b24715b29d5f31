"""Flower's server optimisers under our rules: their step, and what they keep between rounds.

Our rule makes one model of all replies, and the optimiser is given that model as if it were the
only reply. So each optimiser goes with each rule, and of Flower's code no more than the step runs.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.views import keep_dtypes, not_finite, view
from fedmed_flower.errors import InputError

# Flower's rules in whose place ours come, by a class of the same name.
RULES = (
    flower.FedAvg,
    flower.FedMedian,
    flower.FedTrimmedAvg,
    flower.MultiKrum,
    flower.Bulyan,
    flower.QFedAvg,
)
OPTIMISERS = (flower.FedAdam, flower.FedYogi, flower.FedAdagrad, flower.FedAvgM)
# Our methods that say how replies are combined.
_RULING = {"combine", "rule"}
_MINIMA = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
# What they keep, apart from the model itself.
_STATE = ("m_t", "v_t", "momentum_vector")


def minima(
    init: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, int]:
    """Return 1 for each minimum number of nodes that is not among the arguments of a class."""
    signature = inspect.signature(init)
    if any(each.kind == each.VAR_POSITIONAL for each in signature.parameters.values()):
        # Somebody else's strategy that passes on what it is given.
        signature = inspect.signature(flower.FedAvg)
    named = {name: value for name, value in kwargs.items() if name in signature.parameters}
    given = signature.bind_partial(*args, **named).arguments
    return {name: 1 for name in _MINIMA if name not in given}


def class_below(cls: type, base: type) -> type[Any] | None:
    """Return the class after `base` whose ``aggregate_train`` no rule of ours stands in for.

    What may be mixed, `base` being our `FedAvg`:

    ==========================================  ==================================================
    bases                                       what makes the model
    ==========================================  ==================================================
    ours                                        our rule
    ours, one of Flower's optimisers            our rule, then the optimiser's step
    FedAvg of ours, a strategy of its own       that strategy's ``aggregate_train``
    FedAvg of ours, a rule of Flower            refused: take ours of that name
    another rule of ours, a strategy of its own refused: one of the two would be left out
    two of Flower's optimisers                  refused: both move the model
    Flower's optimiser before ours              refused: ours would not be called
    ==========================================  ==================================================

    Raises
    ------
    TypeError
        If one of two rules would be left out without a word.
    """
    _require_one_optimiser(cls)
    _require_ours_first(cls, base)
    _require_our_rules(cls)
    owner = next(other for other in cls.__mro__ if "combine" in vars(other))
    for other in cls.__mro__[cls.__mro__.index(base) + 1 :]:
        if "aggregate_train" in vars(other) and other not in (*RULES, flower.Strategy):
            if set(OPTIMISERS).isdisjoint(other.__mro__) and owner is not base:
                raise TypeError(
                    f"{cls.__name__}: {owner.__name__} and {other.__name__} both say how replies "
                    "are combined: derive it from one of them"
                )
            return other
    return None


def _require_one_optimiser(cls: type) -> None:
    # Of a class that is being made, ABCMeta's issubclass gives, and remembers, wrong answers.
    optimisers = [other for other in OPTIMISERS if other in cls.__mro__]
    if len(optimisers) > 1:
        names = " and ".join(other.__name__ for other in optimisers)
        raise TypeError(f"{cls.__name__}: {names} both move the model: derive it from one of them")


def _require_ours_first(cls: type, base: type) -> None:
    for other in cls.__mro__[: cls.__mro__.index(base)]:
        if not set(OPTIMISERS).isdisjoint(other.__mro__) and base not in other.__mro__:
            raise TypeError(
                f"{cls.__name__}: name {base.__name__} before {other.__name__} among its bases"
            )


def _require_our_rules(cls: type) -> None:
    """Refuse a rule of Flower in whose place no class of ours comes."""
    ruling = [other for other in cls.__mro__ if not vars(other).keys().isdisjoint(_RULING)]
    for rule in RULES:
        if rule in cls.__mro__ and not any(rule in other.__mro__ for other in ruling):
            taken = next(other for other in cls.__mro__ if _is_flowers(other, rule))
            raise TypeError(
                f"{cls.__name__}: take {taken.__name__} from fedmed_flower.strategies, "
                "not from Flower"
            )


def _is_flowers(cls: type, rule: type) -> bool:
    return rule in cls.__mro__ and cls.__module__.startswith("flwr.")


def step(
    optimiser: type[Any],
    attributes: Mapping[str, Any],
    server_round: int,
    new: ArrayRecord,
    old: ArrayRecord,
    arrays_key: str,
    weight_key: str,
) -> tuple[ArrayRecord | None, dict[str, Any]]:
    """Move the global model towards a round's outcome as a server optimiser does.

    Only floating-point entries are moved, in float32 at least; the others are those of `new`.

    Parameters
    ----------
    optimiser : type
        One of `OPTIMISERS`.
    attributes : mapping of str to any
        Those of the strategy: the optimiser's settings, and what it keeps between rounds.
    new, old : ArrayRecord
        What the rule made of the replies, and the global model that was sent.
    arrays_key, weight_key : str
        Names of a reply's record of arrays, and of its weight.

    Returns
    -------
    tuple of (ArrayRecord or None, dict)
        The model, and the attributes that have changed. None and nothing if the step leads beyond
        the numbers of a dtype.
    """
    floating = [key for key, array in old.items() if kernels.is_floating(view(array).dtype)]
    wide_new = {key: _wide(new[key]) for key in floating}
    wide_old = {key: _wide(old[key]) for key in floating}
    # FedAvgM wants a record, the others arrays by name.
    current: Any = wide_old
    if issubclass(optimiser, flower.FedAvgM):
        current = ArrayRecord({key: Array(values) for key, values in wide_old.items()})
    # Made of the optimiser's class alone, so that neither our rule nor another of Flower's runs.
    trial = object.__new__(optimiser)
    vars(trial).update(
        attributes,
        current_arrays=current,
        # The caller's own is for the sites' metrics, not for this reply.
        train_metrics_aggr_fn=lambda contents, key: MetricRecord(),
    )
    content = RecordDict(
        {
            arrays_key: ArrayRecord({key: Array(values) for key, values in wide_new.items()}),
            "metrics": MetricRecord({weight_key: 1.0}),
        }
    )
    reply = Message(content, dst_node_id=1, message_type=MessageType.TRAIN)
    with np.errstate(over="ignore", invalid="ignore"), _quiet():
        moved, _ = trial.aggregate_train(server_round, [reply])
        moved = keep_dtypes(moved, old)
    if any(not_finite(record) for record in (moved, *export_state(vars(trial)).values())):
        return None, {}
    changed = {
        name: value
        for name, value in vars(trial).items()
        if name != "train_metrics_aggr_fn" and value is not attributes.get(name)
    }
    return ArrayRecord({key: moved.get(key, new[key]) for key in old}), changed


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Flower from telling of "1 results", which is the stand-in reply."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _wide(array: Array) -> np.ndarray[Any, Any]:
    values = kernels.widen(view(array))
    return values.astype(np.float32) if values.dtype.itemsize < 4 else values


def export_state(attributes: Mapping[str, Any]) -> dict[str, ArrayRecord]:
    """Return what Flower's server optimisers keep between rounds, by name.

    Parameters
    ----------
    attributes : mapping of str to any
        Those of the strategy.
    """
    state = {}
    for name in _STATE:
        kept = attributes.get(name)
        if kept:
            items = kept.items() if isinstance(kept, dict) else enumerate(kept)
            state[name] = ArrayRecord({str(key): Array(np.asarray(v)) for key, v in items})
    return state


def import_state(
    attributes: Mapping[str, Any], state: Mapping[str, ArrayRecord], strategy: str
) -> dict[str, Any]:
    """Return the attributes with which a strategy is as it was at `export_state`.

    Parameters
    ----------
    attributes : mapping of str to any
        Those of the strategy.
    state : mapping of str to ArrayRecord
    strategy : str
        The strategy's name.

    Raises
    ------
    InputError
        If another optimiser kept it.
    """
    for name in state:
        if name not in _STATE or name not in attributes:
            raise InputError(
                f"the checkpoint holds {name}, which {strategy} does not keep: "
                "resume it with the strategy that it was started with"
            )
    found: dict[str, Any] = {}
    for name in _STATE:
        if name in attributes:
            kept = {key: view(array) for key, array in state.get(name, ArrayRecord()).items()}
            found[name] = (list(kept.values()) if name == "momentum_vector" else kept) or None
    return found
