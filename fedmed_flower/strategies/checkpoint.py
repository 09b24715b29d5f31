"""Saving a run after each round, and going on from there."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedmed_flower.arrays.views import view
from fedmed_flower.errors import InputError
from fedmed_flower.methods.base import Method
from fedmed_flower.server.run_folder import Checkpoint, RunFolder
from fedmed_flower.strategies.methods import LENGTHS, SITES
from fedmed_flower.strategies.selection import KEPT_FIGURE, KEPT_MODEL, LAST
from fedmed_flower.strategies.server_optimizers import OPTIMISERS, RULES, stepped

# Each array's declared dtype, and dtype and shape of its values.
_Layout = dict[str, tuple[str, np.dtype[Any], tuple[int, ...]]]

# Flower's strategies that can be resumed: `export_state` saves all their state between rounds.
_KNOWN = {*RULES, *OPTIMISERS, *flower.FedAdam.__mro__, flower.FedProx, flower.Krum}
# What the names of companions begin with in a strategy's state.
COMPANION = "companion "
# Arguments of a strategy that a resumed run may change: how long it runs, where, and with how many
# sites. The checkpoint holds the seed.
_FREE = {
    "run_dir",
    "resume",
    "seed",
    "min_train_nodes",
    "min_evaluate_nodes",
    "min_available_nodes",
    "min_replies",
    "quorum",
    "grace",
    "memory_gigabytes",
    "target_epsilon",
}


def arguments_of(strategy: object) -> dict[str, Any]:
    """Return a strategy's class and arguments as a checkpoint records them.

    An argument is the attribute of its name, as long as it is made of numbers, texts, lists and
    dictionaries. Functions and those that a resumed run may change are left out.

    Parameters
    ----------
    strategy : object
        Before its first round: some arguments are state that changes.

    Returns
    -------
    dict
        ``class``: the name of the class; ``arguments``: value by name.
    """
    inits = [vars(cls)["__init__"] for cls in type(strategy).__mro__ if "__init__" in vars(cls)]
    names = {name for init in inits for name in inspect.signature(init).parameters}
    arguments: dict[str, Any] = {}
    for name in sorted((names & vars(strategy).keys()) - _FREE):
        value = vars(strategy)[name]
        if isinstance(value, Method):
            value = {"name": value.name, **value.config()}
        try:
            # As it is read back: a tuple is a list then.
            arguments[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return {"class": type(strategy).__name__, "arguments": arguments}


def _require_same_strategy(before: Mapping[str, Any], now: Mapping[str, Any], path: object) -> None:
    """Refuse to go on with another strategy, or with other arguments of it."""
    if not before:  # A checkpoint of a version that did not record it.
        return
    remedy = "resume it with the strategy and the arguments that it was started with"
    if before["class"] != now["class"]:
        raise InputError(
            f"the checkpoint in {path} is of the strategy {str(before['class'])[:100]!r}, and this "
            f"is {now['class']}: {remedy}"
        )
    for name in sorted(before["arguments"].keys() & now["arguments"].keys()):
        first = before["arguments"][name]
        if first != now["arguments"][name]:
            raise InputError(
                f"{name} of {now['class']} was {str(first)[:100]!r} when {path} was started and is "
                f"{now['arguments'][name]!r} now: {remedy}"
            )


def require_layout(name: str, saved: ArrayRecord, first: ArrayRecord) -> None:
    """Refuse a companion of a checkpoint if its layout differs from that of the strategy's first.

    Raises
    ------
    InputError
        If keys, shapes or dtypes differ.
    """
    if _layout(saved) != _layout(first):
        raise InputError(
            f"the companion {name} in the checkpoint has other keys, shapes or dtypes than this "
            "strategy's: resume the run with the strategy that it was started with"
        )


def metrics_as_dicts(result: flower.Result) -> dict[str, dict[str, Any]]:
    """Return the metrics of all rounds as a checkpoint holds them."""
    return {
        name: {str(key): dict(record) for key, record in getattr(result, name).items()}
        for name in vars(result)
        if name != "arrays"
    }


def restore_clients(grid: Grid, checkpoint: Checkpoint, folder: RunFolder) -> None:
    """Give the clients the states back that they had after the checkpoint's round.

    Raises
    ------
    InputError
        If the checkpoint holds states and the clients run in other processes now, or a state cannot
        be read.
    """
    if hasattr(grid, "import_states"):
        with read_from(folder):
            grid.import_states(checkpoint.client_states)
    elif checkpoint.client_states:
        raise InputError(
            f"{folder.path} holds states of clients that ran in one process: resume it with "
            "run_local"
        )


def require_resumable(
    strategy: object,
    checkpoint: Checkpoint,
    initial_arrays: ArrayRecord,
    buffers: Collection[str],
    folder: RunFolder,
) -> None:
    """Refuse a checkpoint that would not lead to the model of an unbroken run.

    Parameters
    ----------
    strategy : object
        Before its first round.
    checkpoint : Checkpoint
    initial_arrays : ArrayRecord
    buffers : collection of str
        Keys of the model's buffers, as far as they are known.
    folder : RunFolder
        The folder of the checkpoint.

    Raises
    ------
    InputError
        If the checkpoint is of another strategy or of other arguments, if a strategy of Flower has
        state that the checkpoint lacks, if the checkpoint's model has another layout than
        `initial_arrays`, or if a saved state has another shape than the array of the model that it
        belongs to.
    """
    kind = type(strategy)
    with_state = {
        base.__name__
        for base in kind.__mro__
        if base.__module__.startswith("flwr.") and base not in _KNOWN
    }
    if with_state:
        raise InputError(
            f"{kind.__name__} cannot be resumed: what {min(with_state)} keeps between rounds "
            "is not in the checkpoint"
        )
    wanted = _layout(initial_arrays)
    if _layout(checkpoint.arrays) != wanted:
        raise _other_model(folder, "with other keys, shapes or dtypes")
    now = arguments_of(strategy)
    _require_same_strategy(checkpoint.strategy, now, folder.path)
    compares = now["arguments"].get("keep_model", LAST) != LAST or now["arguments"].get("patience")
    if compares and KEPT_FIGURE not in checkpoint.strategy_state:
        raise InputError(
            f"{folder.path} was written by a version that did not compare rounds: resume it with "
            "keep_model='last' and patience=0"
        )
    moved = [wanted[key][2] for key in stepped(initial_arrays, buffers)]
    misfit = _state_misfit(checkpoint, wanted, moved)
    if misfit is not None:
        raise _other_model(folder, misfit)


def _other_model(folder: RunFolder, misfit: str) -> InputError:
    return InputError(
        f"the checkpoint in {folder.path} belongs to another model, {misfit}: resume it with the "
        "app and the settings that it was started with"
    )


def _state_misfit(
    checkpoint: Checkpoint, wanted: _Layout, moved: list[tuple[int, ...]]
) -> str | None:
    """Return in what the strategy's state differs from the wanted layout; None if in nothing.

    `moved` are the shapes of the entries that an optimiser steps.
    """
    for name, record in checkpoint.strategy_state.items():
        # These have layouts of their own: see `require_layout`, `MethodState.pop_from` and
        # `Selection.import_state`.
        if name.startswith(COMPANION) or name in (SITES, LENGTHS, KEPT_FIGURE):
            continue
        if name == KEPT_MODEL and _layout(record) != wanted:
            return "whose best model has other keys, shapes or dtypes"
        shapes = {key: shape for key, (_, _, shape) in _layout(record).items()}
        # Flower holds the momentum as a list: its keys are indices.
        if name == "momentum_vector" and [*shapes.values()] != moved:
            return "whose momentum has other shapes"
        if any(shapes[key] != wanted[key][2] for key in shapes.keys() & wanted.keys()):
            return "for which the strategy kept arrays of other shapes"
    return None


def _layout(arrays: ArrayRecord) -> _Layout:
    """Return each array's declared dtype, and dtype and shape of its values."""
    views = {key: view(array) for key, array in arrays.items()}
    return {key: (arrays[key].dtype, values.dtype, values.shape) for key, values in views.items()}


def metrics_as_records(
    checkpoint: Checkpoint, result: flower.Result
) -> dict[str, dict[int, MetricRecord]]:
    """Return the metrics of all rounds as a result holds them.

    Raises
    ------
    ValueError
        If the checkpoint holds metrics of a name that `result` lacks.
    """
    if unknown := checkpoint.metrics.keys() - (vars(result).keys() - {"arrays"}):
        raise ValueError(f"a result has no {min(unknown)}")
    return {
        name: {int(key): MetricRecord(value) for key, value in by_round.items()}
        for name, by_round in checkpoint.metrics.items()
    }


@contextmanager
def read_from(folder: RunFolder) -> Iterator[None]:
    """Turn an error in reading the parts of a checkpoint into an `InputError` of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Protobuf, Flower's records and each strategy raise their own.
        raise InputError(
            f"the checkpoint {folder.checkpoint_file} cannot be resumed "
            f"({type(error).__name__}: {error}): restore it from a copy, or start a new run"
        ) from error
