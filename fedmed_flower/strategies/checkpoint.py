"""Saving a run after each round, and going on from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.views import view
from fedmed_flower.errors import InputError
from fedmed_flower.server.run_folder import Checkpoint, RunFolder
from fedmed_flower.strategies.server_optimizers import OPTIMISERS, RULES

# Flower's strategies of which nothing is lost between rounds: `export_state` saves what they keep.
_KNOWN = {*RULES, *OPTIMISERS, *flower.FedAdam.__mro__, flower.FedProx, flower.Krum}
# How records that travel beside the model are named in a strategy's state.
COMPANION = "companion "


def require_layout(name: str, kept: ArrayRecord, first: ArrayRecord) -> None:
    """Refuse a record beside the model that is not as the strategy's own.

    Raises
    ------
    InputError
        If keys, shapes or dtypes differ.
    """
    if _layout(kept) != _layout(first):
        raise InputError(
            f"the checkpoint holds another {name} beside the model than this strategy sends: "
            "resume it with the strategy that it was started with"
        )


def metrics_in(result: flower.Result) -> dict[str, dict[str, Any]]:
    """Return the metrics of all rounds as a checkpoint holds them."""
    return {
        name: {str(key): dict(record) for key, record in getattr(result, name).items()}
        for name in vars(result)
        if name != "arrays"
    }


def restore_clients(grid: Grid, checkpoint: Checkpoint, folder: RunFolder) -> None:
    """Give the clients back what they kept between rounds.

    Raises
    ------
    InputError
        If they kept something and live elsewhere now, or it cannot be read.
    """
    if hasattr(grid, "import_states"):
        with read_from(folder):
            grid.import_states(checkpoint.client_states)
    elif checkpoint.client_states:
        raise InputError(
            f"{folder.path} holds what its clients kept between rounds in one process: "
            "go on with it there, by run_local"
        )


def require_resumable(
    strategy: type, checkpoint: Checkpoint, initial_arrays: ArrayRecord, folder: RunFolder
) -> None:
    """Refuse a checkpoint that would not lead to the model of an unbroken run.

    Raises
    ------
    InputError
        If a strategy of Flower keeps state that the checkpoint lacks, or the checkpoint holds
        other arrays than `initial_arrays`, or of one of them something of another shape.
    """
    with_state = {
        base.__name__
        for base in strategy.__mro__
        if base.__module__.startswith("flwr.") and base not in _KNOWN
    }
    if with_state:
        raise InputError(
            f"{strategy.__name__} cannot be resumed: what {min(with_state)} keeps between rounds "
            "is not in the checkpoint"
        )
    wanted = _layout(initial_arrays)
    fits = _layout(checkpoint.arrays) == wanted
    for name, record in checkpoint.strategy_state.items():
        if name.startswith(COMPANION):  # Of a layout of its own: see `require_layout`.
            continue
        shapes = {key: shape for key, (_, _, shape) in _layout(record).items()}
        floating = [shape for _, dtype, shape in wanted.values() if kernels.is_floating(dtype)]
        if name == "momentum_vector":  # A list, whose keys are places in it.
            fits &= [*shapes.values()] == floating
        fits &= all(shapes[key] == wanted[key][2] for key in shapes.keys() & wanted.keys())
    if not fits:
        raise InputError(
            f"the checkpoint in {folder.path} belongs to another model: resume it with the app "
            "and the settings that it was started with"
        )


def _layout(arrays: ArrayRecord) -> dict[str, tuple[str, np.dtype[Any], tuple[int, ...]]]:
    """Return what is claimed of each array, and of what dtype and shape its values are."""
    views = {key: view(array) for key, array in arrays.items()}
    return {key: (arrays[key].dtype, values.dtype, values.shape) for key, values in views.items()}


def metrics_of(checkpoint: Checkpoint, result: flower.Result) -> dict[str, dict[int, MetricRecord]]:
    """Return the metrics of all rounds; under a name that no result has stands something else."""
    if unknown := checkpoint.metrics.keys() - (vars(result).keys() - {"arrays"}):
        raise ValueError(f"a result has no {min(unknown)}")
    return {
        name: {int(key): MetricRecord(value) for key, value in by_round.items()}
        for name, by_round in checkpoint.metrics.items()
    }


@contextmanager
def read_from(folder: RunFolder) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint's parts are taken up into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Of protobuf, of Flower's records and of each strategy.
        raise InputError(
            f"the checkpoint {folder.checkpoint_file} cannot be gone on from "
            f"({type(error).__name__}: {error}): restore it from a copy, or start a new run"
        ) from error
