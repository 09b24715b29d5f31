"""A gradient for each record, from which Opacus's optimizer makes a step that hides a patient.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang: Deep Learning with Differential Privacy,
CCS 2016, https://arxiv.org/abs/1607.00133, algorithm 1, with a fixed denominator.

Each record goes through model and loss by itself, so nothing that a network or a loss does with a
batch can mix two patients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad_and_value, vmap

from fedmed_flower.errors import InputError
from fedmed_flower.privacy.noise import gaussian, secure_generator

Batch = Mapping[str, Tensor]
# Maps (model, batch of one record) to one number.
Loss = Callable[[Callable[..., Any], Batch], Tensor]
METHODS = ("auto", "vmap", "loop")

# Records that show what a model is like, and how often each method is timed.
PROBE, _REPEATS = 4, 2
# Numbers that are clipped and added at a time: what a cache holds, and what keeps a GPU busy.
_BLOCK = (2**18, 2**24)


class RecordGradients:
    """Computes the gradient of each record of a batch on its own.

    Parameters
    ----------
    model : Module
        In training mode. Its parameters that require a gradient are those that are trained.
    loss : callable
        Maps (model, batch of one record) to one number. A batch is a dict of tensors whose first
        dimension counts records.
    mixed_precision : bool
        Run model and loss in bfloat16 by autocast; gradients are in the parameters' dtype.
    method : {"auto", "vmap", "loop"}
        ``vmap`` vectorises over the records. ``loop`` takes one after the other, for what vmap
        cannot do, and needs the least memory. ``auto`` lets `choose` decide.

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
        self.model, self.loss, self.method = model, loss, method
        self.mixed_precision = mixed_precision
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def __call__(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Return gradients and losses.

        Parameters
        ----------
        batch : dict of tensors of shape (n, ...)
            n at least 1.

        Returns
        -------
        list of tensors of shape (n, *shape of the parameter)
            One a parameter, in the order of `parameters`.
        Tensor of shape (n,)
            The loss of each record.

        Raises
        ------
        InputError
            Where the loss of a record is not one number.
        """
        if self.method == "auto":
            self.choose(batch)
        return self._vectorised(batch) if self.method == "vmap" else self._one_by_one(batch)

    def choose(self, batch: Batch) -> None:
        """Take the method that is faster for batches of this size: vmap where it works at all."""
        try:
            self._vectorised(batch)
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception:  # What vmap cannot do fails in a dozen ways.
            self.method = "loop"
            return
        probe = {key: value[:PROBE] for key, value in batch.items()}
        share = len(next(iter(probe.values()))) / len(next(iter(batch.values())))
        together = self._seconds(self._vectorised, batch)
        alone = self._seconds(self._one_by_one, probe) / share
        self.method = "vmap" if together <= alone else "loop"

    def bytes_per_record(self, batch: Batch) -> int:
        """Return about how much memory a record takes: what backward needs, and its gradient."""
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            # A view of a larger tensor keeps no more than itself for this record.
            place = tensor.untyped_storage().data_ptr()
            saved[place] = max(saved.get(place, 0), tensor.numel() * tensor.element_size())
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            self._value(self.model, {key: value[:1] for key, value in batch.items()})
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        activations = sum(size for pointer, size in saved.items() if pointer not in own)
        weights = sum(p.numel() * p.element_size() for p in self.parameters.values())
        # As much again as the gradients take is left for what vmap makes on the way to them.
        return activations + 2 * weights

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
        each = vmap(grad_and_value(one), in_dims=(None, 0), randomness="different")
        gradients, losses = each(weights, dict(batch))
        return [gradients[name] for name in self.parameters], losses.detach()

    def _one_by_one(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        rows, losses, parameters = [], [], list(self.parameters.values())
        for number in range(len(next(iter(batch.values())))):
            value = self._value(self.model, {k: v[number : number + 1] for k, v in batch.items()})
            rows.append(torch.autograd.grad(value, parameters, materialize_grads=True))
            losses.append(value.detach())
        return [torch.stack(column) for column in zip(*rows, strict=True)], torch.stack(losses)

    def _seconds(self, run: Callable[[Batch], Any], batch: Batch) -> float:
        device, best = next(iter(batch.values())).device, float("inf")
        for _ in range(_REPEATS):
            began = time.perf_counter()
            run(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
        return best


def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> Callable[..., Any]:
    """Return `model` as a function, with other values of the parameters that are named.

    Parameters
    ----------
    model : Module
        Is left as it is, also where it has one layer, or one parameter, in several places.
    values : dict of tensors
        By the names of ``model.named_parameters()``.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if name in values}
    # Each layer once: torch's own tying leaves the values behind in a layer that has two names.
    everywhere = {
        f"{prefix}.{own}" if prefix else own: values[names[parameter]]
        for prefix, layer in model.named_modules()
        for own, parameter in layer.named_parameters(recurse=False, remove_duplicate=False)
        if parameter in names
    }

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, everywhere, args, kwargs, tie_weights=False)

    return run


def require_number(value: Tensor) -> Tensor:
    """Return the loss of one record, which must be one number.

    Raises
    ------
    InputError
        Where its shape is not ().
    """
    if value.ndim:
        raise InputError(
            f"the loss of one record must be one number, got shape {tuple(value.shape)}"
        )
    return value


class PatientOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus's optimizer with noise that no seed decides.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Makes the step. Its weight decay, momentum and the like come after clipping and noise.
    noise_multiplier : float
        Standard deviation of the noise on the sum of clipped gradients, in units of
        `max_grad_norm`.
    max_grad_norm : float
        To which the gradient of each patient is clipped.
    expected_patients : float
        What the sum is divided by, however many patients were drawn; above 0.

    Attributes
    ----------
    dropped : int
        Patients whose gradient was not finite and therefore left out.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_patients: float,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_patients,
        )
        self.dropped = 0
        self._generator = secure_generator()
        self._ahead: Future[Tensor] | None = None

    def draw_ahead(self) -> None:
        """Begin to draw the noise of the step to come, in a thread beside the gradients."""
        self._ahead = future = Future[Tensor]()

        def draw() -> None:
            try:
                future.set_result(self._draw())
            except BaseException as error:
                future.set_exception(error)

        Thread(target=draw, daemon=True).start()

    def accumulate(self, gradients: list[Tensor]) -> None:
        """Clip the gradients of some patients and add them to the sum.

        Parameters
        ----------
        gradients : list of tensors of shape (patients, *shape of the parameter)
            One a trained parameter, in their order.
        """
        for parameter, gradient in zip(self.params, gradients, strict=True):
            parameter.grad_sample = gradient
        self.clip_and_accumulate()
        self._forget_patients()

    def clip_and_accumulate(self) -> None:
        """Add the clipped gradients of the patients in `grad_samples` to the sums, in float64.

        In float32 a norm over millions of numbers comes out up to some percent too small, and the
        clipped gradient that much too long.
        """
        pairs = zip(self.grad_samples, self.params, strict=True)
        rows = [gradient.reshape(len(gradient), p.numel()) for gradient, p in pairs]
        squares = torch.zeros(len(rows[0]), dtype=torch.float64, device=rows[0].device)
        for row in rows:
            for across, along in _blocks(row):
                part = row[across, along]
                squares[across] += torch.linalg.vector_norm(
                    part, dim=1, dtype=torch.float64
                ).square()
        finite = squares.isfinite()
        if not bool(finite.all()):
            self.dropped += int((~finite).sum())
            rows, squares = [row[finite] for row in rows], squares[finite]
        factors = (self.max_grad_norm / squares.sqrt()).clamp(max=1.0)
        for parameter, row in zip(self.params, rows, strict=True):
            if parameter.summed_grad is None:
                parameter.summed_grad = _zeros(parameter)
            total = parameter.summed_grad.view(-1)
            for across, along in _blocks(row):
                total[along] += factors[across] @ row[across, along].double()

    def release(self) -> None:
        """Add noise to the sum, divide it, and make a step; also where nobody was drawn."""
        for parameter in self.params:
            if parameter.summed_grad is None:
                parameter.summed_grad = _zeros(parameter)
        self._forget_patients()
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        self.original_optimizer.step()
        self.zero_grad(set_to_none=True)

    def add_noise(self) -> None:
        """Add noise to the sum of clipped gradients, and round once."""
        # Forgotten first: no noise is ever used twice.
        ahead, self._ahead = self._ahead, None
        noise = self._draw() if ahead is None else ahead.result()
        parts = torch.split(noise, [parameter.numel() for parameter in self.params])
        for parameter, part in zip(self.params, parts, strict=True):
            total = parameter.summed_grad
            parameter.grad = (total + part.to(total.device).view_as(total)).to(parameter.dtype)

    def _draw(self) -> Tensor:
        count = sum(parameter.numel() for parameter in self.params)
        std = self.noise_multiplier * self.max_grad_norm
        return torch.from_numpy(gaussian(count, std, self._generator))

    def _forget_patients(self) -> None:
        for parameter in self.params:
            parameter.grad_sample = parameter.detach().new_empty((0, *parameter.shape))


def _blocks(row: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into blocks that a cache holds: copies of them in float64 cost little."""
    entries, (height, width) = _BLOCK[row.device.type == "cuda"], row.shape
    many, long = max(1, entries // max(1, width)), min(max(1, width), entries)
    for top in range(0, height, many):
        for left in range(0, width, long):
            yield slice(top, top + many), slice(left, left + long)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float64, device=like.device)
