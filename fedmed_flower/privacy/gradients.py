"""One gradient per record; `PatientOptimizer` turns them into a step that hides each patient.

Each record goes through model and loss alone, so no operation of a network or a loss on a batch
can mix two patients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad_and_value, vmap

from fedmed_flower.errors import InputError

Batch = Mapping[str, Tensor]
# Maps (model, batch of one record) to one number.
Loss = Callable[[Callable[..., Any], Batch], Tensor]
METHODS = ("auto", "vmap", "loop")

# Number of records on which a model is tried.
PROBE = 4
# How often each method is timed.
_REPEATS = 2


class RecordGradients:
    """Computes the gradient of each record of a batch on its own.

    Parameters
    ----------
    model : Module
        In training mode. The parameters that require a gradient are the trained ones.
    loss : callable
        Maps (model, batch of one record) to one number. A batch is a dict of tensors whose first
        dimension counts records.
    mixed_precision : bool
        Run model and loss in bfloat16 by autocast; gradients keep the parameters' dtype.
    method : {"auto", "vmap", "loop"}
        ``vmap`` vectorises over the records. ``loop`` takes one record after the other: it works
        with every model and needs the least memory. ``auto`` lets `choose` decide.

    Attributes
    ----------
    parameters : dict
        The trained parameters by name.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, mixed_precision: bool = False, method: str = "auto"
    ) -> None:
        if method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        self.model = model
        self.loss = loss
        self.method = method
        self.mixed_precision = mixed_precision
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def __call__(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Return the gradient and the loss of each record.

        Parameters
        ----------
        batch : dict of tensors of shape (n, ...)
            n records, at least 1.

        Returns
        -------
        list of tensors of shape (n, *shape of the parameter)
            The gradients, one tensor per parameter, in the order of `parameters`.
        Tensor of shape (n,)
            The loss of each record.

        Raises
        ------
        InputError
            If the loss of a record is not one number.
        """
        if self.method == "auto":
            self.choose(batch)
        return self._vectorised(batch) if self.method == "vmap" else self._one_by_one(batch)

    def choose(self, batch: Batch) -> None:
        """Set `method` to the faster one for batches of this size, or to loop if vmap fails."""
        try:
            self._vectorised(batch)
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception:  # vmap fails with many kinds of errors.
            self.method = "loop"
            return
        probe = {key: value[:PROBE] for key, value in batch.items()}
        share = len(next(iter(probe.values()))) / len(next(iter(batch.values())))
        together = self._seconds(self._vectorised, batch)
        alone = self._seconds(self._one_by_one, probe) / share
        self.method = "vmap" if together <= alone else "loop"

    def bytes_per_record(self, batch: Batch) -> int:
        """Estimate the bytes that a record takes: tensors saved for backward, and its gradient."""
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            # The size of the tensor, not of its storage: a view may be of a larger tensor.
            pointer = tensor.untyped_storage().data_ptr()
            saved[pointer] = max(saved.get(pointer, 0), tensor.numel() * tensor.element_size())
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            self._value(self.model, {key: value[:1] for key, value in batch.items()})
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        activations = sum(size for pointer, size in saved.items() if pointer not in weights)
        gradients = sum(p.numel() * p.element_size() for p in self.parameters.values())
        # Twice, because vmap needs about as much again for intermediate results.
        return activations + 2 * gradients

    def _value(self, model: Callable[..., Any], row: Batch) -> Tensor:
        kind = next(iter(row.values())).device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.mixed_precision):
            return require_number(self.loss(model, row))

    def _vectorised(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        def one(parameters: dict[str, Tensor], row: Batch) -> Tensor:
            model = with_values(self.model, parameters)
            return self._value(model, {key: value.unsqueeze(0) for key, value in row.items()})

        weights = {name: p.detach() for name, p in self.parameters.items()}
        # Each record draws its own dropout.
        vectorised = vmap(grad_and_value(one), in_dims=(None, 0), randomness="different")
        gradients, losses = vectorised(weights, dict(batch))
        return [gradients[name] for name in self.parameters], losses.detach()

    def _one_by_one(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        parameters = list(self.parameters.values())
        rows = []
        losses = []
        for index in range(len(next(iter(batch.values())))):
            value = self._value(self.model, {k: v[index : index + 1] for k, v in batch.items()})
            rows.append(torch.autograd.grad(value, parameters, materialize_grads=True))
            losses.append(value.detach())
        return [torch.stack(column) for column in zip(*rows, strict=True)], torch.stack(losses)

    def _seconds(self, run: Callable[[Batch], Any], batch: Batch) -> float:
        device = next(iter(batch.values())).device
        best = float("inf")
        for _ in range(_REPEATS):
            began = time.perf_counter()
            run(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
        return best


def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> Callable[..., Any]:
    """Return `model` as a function in which the named parameters have other values.

    Parameters
    ----------
    model : Module
        Is not changed, even if a layer or a parameter stands in it several times.
    values : dict of tensors
        The new values, by the names of ``model.named_parameters()``.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if name in values}
    # Each layer once: torch's own tying leaves the values behind in a layer that has two names.
    everywhere = {
        f"{prefix}.{local}" if prefix else local: values[names[parameter]]
        for prefix, layer in model.named_modules()
        for local, parameter in layer.named_parameters(recurse=False, remove_duplicate=False)
        if parameter in names
    }

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, everywhere, args, kwargs, tie_weights=False)

    return run


def require_number(value: Tensor) -> Tensor:
    """Return the loss of one record if it is one number.

    Raises
    ------
    InputError
        If its shape is not ().
    """
    if value.ndim:
        raise InputError(
            f"the loss of one record must be one number, got shape {tuple(value.shape)}"
        )
    return value
