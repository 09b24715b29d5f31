"""Metrics as plain numbers: Flower's records take neither NumPy's nor torch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmed_flower.errors import InputError


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics as Python's numbers and lists of numbers.

    Parameters
    ----------
    metrics : mapping of str to any
        Numbers, one-dimensional arrays and lists of numbers, of Python, NumPy or torch. True counts
        as 1, False as 0. A list with a fraction becomes a list of floats.

    Raises
    ------
    InputError
        If a name is no text, or a value is none of these, such as a text or a complex number. It
        names the metric.

    Examples
    --------
    >>> import numpy as np
    >>> plain_metrics({"loss": np.float32(0.5), "counts": np.array([3, 4]), "done": True})
    {'loss': 0.5, 'counts': [3, 4], 'done': 1}
    """
    return {_name(name): _value(name, value) for name, value in metrics.items()}


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise InputError(f"the name of a metric must be a text, got {name!r}")
    return name


def _value(name: str, value: Any) -> Any:
    # NumPy's scalars and arrays, and torch's tensors, wherever they lie.
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, tuple | list):
        numbers = [_number(name, value, entry) for entry in plain]
        fractions = any(isinstance(number, float) for number in numbers)
        return [float(number) for number in numbers] if fractions else numbers
    return _number(name, value, plain)


def _number(name: str, value: Any, entry: Any) -> int | float:
    if hasattr(entry, "tolist"):
        entry = entry.tolist()
    if not isinstance(entry, int | float):
        raise InputError(
            f"the metric {name} must be a number or a list of numbers, got {_described(value)}"
        )
    return int(entry) if isinstance(entry, bool) else entry


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    return f"{kind} of shape {tuple(shape)}" if shape is not None else kind
