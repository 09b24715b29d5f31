"""Whether a run has a result: a model that has not diverged, and figures that say something.

A run without one does not end as `finished`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from flwr.app import ArrayRecord

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.views import view
from fedmed_flower.errors import DivergedError
from fedmed_flower.server.history import Failure
from fedmed_flower.strategies.server_optimizers import stepped
from fedmed_flower.wire import DECLINED

# How many times as long as at the start the weights of a model may be. Those of a model that
# starts at 0 may be this on average.
_MOST_GROWTH = 1000.0


class RunFailedError(RuntimeError):
    """A run ended without a result."""


def require_bounded(initial: ArrayRecord, model: ArrayRecord, buffers: Collection[str]) -> None:
    """Raise `DivergedError` if the weights of a model have grown out of proportion.

    Parameters
    ----------
    initial, model : ArrayRecord
        The model at the start and now.
    buffers : collection of str
        Keys of the buffers, which do not count.
    """
    keys = stepped(initial, buffers)
    count = sum(view(initial[key]).size for key in keys)
    first = max(_length(initial, keys), math.sqrt(count))
    last = _length(model, keys)
    if last > _MOST_GROWTH * first:
        raise DivergedError(
            f"the model has diverged: its weights are {last / first:.1g} times as large as at the "
            "start; lower learning-rate"
        )


def _length(model: ArrayRecord, keys: Iterable[str]) -> float:
    lengths = [float(np.linalg.norm(kernels.widen(view(model[key])).ravel())) for key in keys]
    return math.hypot(*lengths)


def require_measured(
    table: Mapping[str, Mapping[str, float]],
    failures: Sequence[Failure],
    validated: bool,
    summed: bool = False,
) -> None:
    """Raise `RunFailedError` if nobody could evaluate the final model.

    Hospitals with too few patients to report anything about them have evaluated it.

    Parameters
    ----------
    table : mapping of str to mapping
        Metrics of the test rows by site.
    failures : sequence of Failure
        Of the test.
    validated : bool
        Whether a round has metrics of validation rows. Then all hospitals may have declined the
        test, such as at the end of their budgets.
    summed : bool
        Whether the figures are a secure sum, which one hospital that is lost or declines leaves
        without any.
    """
    if table or not failures:
        return
    errors = [failure for failure in failures if not failure.reason.startswith(DECLINED)]
    first = (errors or failures)[0]
    if summed:
        raise RunFailedError(
            "the model has no test figures, since a secure sum is of all hospitals or of none: "
            f"{first.site}: {first.reason}"
        )
    if not errors and validated:
        return
    raise RunFailedError(
        f"nobody could evaluate the model, so it has no figures: {first.site}: {first.reason}"
    )


def require_tested(tested: int, why: Counter[str]) -> None:
    """Raise `RunFailedError` if no variant of an association study has a result.

    Parameters
    ----------
    tested : int
        How many have one.
    why : Counter
        Why the others have none, with how many each.
    """
    if tested:
        return
    if not why:
        raise RunFailedError(
            "no variant was tested: none of the hospitals' variants is on chromosomes 1 to 22 and "
            "has a position"
        )
    reason, count = why.most_common(1)[0]
    raise RunFailedError(
        f"none of {why.total():,} variants has a result; {count:,} of them: {reason}"
    )


def require_two_classes(rows_of_class: Sequence[int]) -> None:
    """Raise `RunFailedError` if all test rows together are of one class.

    Parameters
    ----------
    rows_of_class : sequence of int
        All hospitals' test rows by class; empty if they are not known.
    """
    classes = [label for label, count in enumerate(rows_of_class) if count]
    if len(classes) == 1:
        raise RunFailedError(
            f"all {sum(rows_of_class)} test rows are of class {classes[0]}, so figures say "
            "nothing: look at the labels, or give the test split rows of another class"
        )
