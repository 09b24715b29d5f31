"""Flower's server optimisers under our rules: their step, and their state between rounds.

Our rule makes one model of all replies, and the optimiser is given that model as if it were the
only reply. So each optimiser works with each rule, and only the step is Flower's code.

Flower's optimisers also step the running statistics of batch normalisation: with momentum a running
variance turns negative, and the model returns NaN. Here buffers are those of the rule's model.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.views import array_of, is_finite, keep_dtypes, not_finite, view
from fedmed_flower.errors import InputError

# Flower's rules that a class of ours with the same name replaces.
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
# Attributes in which the optimisers keep state, apart from the model.
_LIST = "momentum_vector"
_STATE = ("m_t", "v_t", _LIST)
# Numbers of a model that are stepped together.
_PART = 1 << 22
# How the names of batch normalisation's running statistics end. They are buffers, also if nobody
# has named the model's buffers.
_STATISTICS = ("running_mean", "running_var")


def minima(
    init: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, int]:
    """Return 1 for each minimum number of nodes that the arguments of a class leave out."""
    signature = inspect.signature(init)
    parameters = signature.parameters.values()
    if any(parameter.kind == parameter.VAR_POSITIONAL for parameter in parameters):
        # Somebody else's strategy, which passes its arguments on to Flower's.
        signature = inspect.signature(flower.FedAvg)
    named = {name: value for name, value in kwargs.items() if name in signature.parameters}
    given = signature.bind_partial(*args, **named).arguments
    return {name: 1 for name in _MINIMA if name not in given}


def class_below(cls: type, base: type) -> type[Any] | None:
    """Return the class after `base` whose ``aggregate_train`` is called, or None if none is.

    What may be mixed, `base` being our `FedAvg`:

    ============================================  ================================================
    bases                                         what makes the model
    ============================================  ================================================
    ours                                          our rule
    ours, one of Flower's optimisers              our rule, then the optimiser's step
    our FedAvg, somebody else's strategy          that strategy's ``aggregate_train``
    our FedAvg, a rule of Flower                  refused: take ours of that name
    another rule of ours, somebody else's         refused: one of the two would be left out
    two of Flower's optimisers                    refused: both move the model
    Flower's optimiser before ours                refused: ours would not be called
    ============================================  ================================================

    Raises
    ------
    TypeError
        If one of two rules would be ignored silently.
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
    # While a class is being made, ABCMeta's issubclass gives and caches wrong answers about it.
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
    """Refuse a rule of Flower that no class of ours replaces."""
    ruling = [other for other in cls.__mro__ if not vars(other).keys().isdisjoint(_RULING)]
    for rule in RULES:
        if rule in cls.__mro__ and not any(rule in other.__mro__ for other in ruling):
            flowers = next(other for other in cls.__mro__ if _is_flowers(other, rule))
            raise TypeError(
                f"{cls.__name__}: take {flowers.__name__} from fedmed_flower.strategies, "
                "not from Flower"
            )


def _is_flowers(cls: type, rule: type) -> bool:
    return rule in cls.__mro__ and cls.__module__.startswith("flwr.")


def stepped(model: ArrayRecord, buffers: Collection[str]) -> list[str]:
    """Return the keys that an optimiser steps: of the floating-point entries that are no buffers.

    Parameters
    ----------
    model : ArrayRecord
    buffers : collection of str
        Keys of the model's buffers, as far as they are known.
    """
    return [
        key
        for key, array in model.items()
        if kernels.is_floating(view(array).dtype)
        and key not in buffers
        and not key.endswith(_STATISTICS)
    ]


def require_real(optimiser: str, model: ArrayRecord) -> None:
    """Raise `InputError` if an entry is complex: an optimiser's rule is for real numbers."""
    for key, array in model.items():
        if view(array).dtype.kind == "c":
            raise InputError(
                f"{key} is {array.dtype}, which {optimiser} cannot step: its rule is for real "
                "numbers; take FedAvg, or keep real and imaginary part as two entries"
            )


def known_model(attributes: Mapping[str, Any]) -> ArrayRecord | None:
    """Return the global model that was set as ``current_arrays`` by hand; None if none was.

    Flower's optimisers keep it there, as a record or as a dictionary of NumPy arrays.
    """
    current = attributes.get("current_arrays")
    if not current:
        return None
    if isinstance(current, ArrayRecord):
        return current
    return ArrayRecord({key: Array(np.asarray(values)) for key, values in current.items()})


def step(
    optimiser: type[Any],
    attributes: Mapping[str, Any],
    server_round: int,
    new: ArrayRecord,
    old: ArrayRecord,
    arrays_key: str,
    weight_key: str,
    buffers: Collection[str] = (),
) -> tuple[ArrayRecord | None, dict[str, Any]]:
    """Move the global model towards the result of a round as a server optimiser does.

    Only the entries that `stepped` names are moved, in float32 at least; the others are those of
    `new`.

    Parameters
    ----------
    optimiser : type
        One of `OPTIMISERS`.
    attributes : mapping of str to any
        Attributes of the strategy: the optimiser's settings, and its state between rounds.
    server_round : int
        The current round.
    new, old : ArrayRecord
        The model that the rule made of the replies, and the global model that was sent.
    arrays_key, weight_key : str
        Names of a reply's record of arrays, and of its weight.
    buffers : collection of str
        As in `stepped`.

    Returns
    -------
    tuple of (ArrayRecord or None, dict)
        The model, and the attributes that have changed. (None, {}) if the step leads to NaN or
        infinite values.
    """
    keys = stepped(old, buffers)
    positions = {key: place for place, key in enumerate(keys)}
    moved = ArrayRecord()
    state: dict[str, dict[str, Any]] = {}
    # The rules go entry by entry. All at once, Flower's code would hold ten models more.
    for part in _parts(keys, old):
        trial = _trial(optimiser, attributes, {key: positions[key] for key in part}, old)
        content = RecordDict(
            {
                arrays_key: ArrayRecord({key: array_of(_wide(new[key])) for key in part}),
                "metrics": MetricRecord({weight_key: 1.0}),
            }
        )
        reply = Message(content, dst_node_id=1, message_type=MessageType.TRAIN)
        with np.errstate(over="ignore", invalid="ignore"), _quiet():
            stepped_part, _ = trial.aggregate_train(server_round, [reply])
            stepped_part = keep_dtypes(stepped_part, old)
        for name in _STATE:
            values = vars(trial).get(name)
            if values:
                items = values.values() if isinstance(values, dict) else values
                state.setdefault(name, {}).update(zip(part, items, strict=True))
        moved.update(stepped_part)
    kept = [values for record in state.values() for values in record.values()]
    if not_finite(moved) or not all(map(is_finite, kept)):
        return None, {}
    changed: dict[str, Any] = {
        name: list(values.values()) if name == _LIST else values for name, values in state.items()
    }
    model = ArrayRecord({key: moved.get(key, new[key]) for key in old})
    if issubclass(optimiser, flower.FedAvgM):
        # As Flower's FedAvgM does; the others take the model that is sent.
        changed["current_arrays"] = model
    return model, changed


def _parts(keys: Sequence[str], model: ArrayRecord) -> list[list[str]]:
    """Divide keys into groups of few numbers, or of one key."""
    parts: list[list[str]] = []
    size = _PART
    for key in keys:
        if size >= _PART:
            parts.append([])
            size = 0
        parts[-1].append(key)
        size += view(model[key]).size
    return parts


def _trial(
    optimiser: type[Any],
    attributes: Mapping[str, Any],
    places: Mapping[str, int],
    old: ArrayRecord,
) -> Any:
    """Return an optimiser that steps a part of the model.

    Parameters
    ----------
    optimiser, attributes, old
        As in `step`.
    places : mapping of str to int
        The keys of the part, and their places among all keys that are stepped.
    """
    wide = {key: _wide(old[key]) for key in places}
    # FedAvgM takes a record, the others a dictionary of arrays.
    current: Any = wide
    if issubclass(optimiser, flower.FedAvgM):
        current = ArrayRecord({key: array_of(values) for key, values in wide.items()})
    state: dict[str, Any] = {}
    for name in _STATE:
        values = attributes.get(name)
        if values:
            of_part = {key: values[at if name == _LIST else key] for key, at in places.items()}
            state[name] = list(of_part.values()) if name == _LIST else of_part
    # An instance of the optimiser's class alone: neither our rule nor another of Flower's runs.
    trial = object.__new__(optimiser)
    vars(trial).update(
        attributes,
        current_arrays=current,
        # The strategy's own function is for the sites' metrics, not for this reply.
        train_metrics_aggr_fn=lambda contents, key: MetricRecord(),
        **state,
    )
    return trial


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Flower from logging "1 results": the one reply is not a site's."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _wide(array: Array) -> np.ndarray[Any, Any]:
    values = kernels.widen(np.asarray(view(array), order="C"))
    return values.astype(np.float32) if values.dtype.itemsize < 4 else values


def export_state(attributes: Mapping[str, Any]) -> dict[str, ArrayRecord]:
    """Return the state of Flower's server optimisers between rounds, by name.

    Parameters
    ----------
    attributes : mapping of str to any
        Attributes of the strategy.
    """
    state = {}
    for name in _STATE:
        values = attributes.get(name)
        if values:
            items = values.items() if isinstance(values, dict) else enumerate(values)
            state[name] = ArrayRecord(
                {str(key): array_of(np.asarray(v, order="C")) for key, v in items}
            )
    return state


def import_state(
    attributes: Mapping[str, Any], state: Mapping[str, ArrayRecord], strategy: str
) -> dict[str, Any]:
    """Return the attributes that restore the state of a strategy's optimiser.

    Parameters
    ----------
    attributes : mapping of str to any
        Attributes of the strategy.
    state : mapping of str to ArrayRecord
        What `export_state` returned.
    strategy : str
        The strategy's name.

    Raises
    ------
    InputError
        If the state is of another optimiser.
    """
    for name in state:
        if name not in _STATE or name not in attributes:
            raise InputError(
                f"the checkpoint holds {name}, which {strategy} does not keep: "
                "resume it with the strategy that it was started with"
            )
    restored: dict[str, Any] = {}
    for name in _STATE:
        if name in attributes:
            arrays = {key: view(array) for key, array in state.get(name, ArrayRecord()).items()}
            values = list(arrays.values()) if name == _LIST else arrays
            # Flower's optimisers start from None.
            restored[name] = values or None
    return restored
