"""An optimizer whose steps hide each patient: it clips one gradient per patient and adds noise.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang: Deep Learning with Differential Privacy,
CCS 2016, https://arxiv.org/abs/1607.00133, algorithm 1, with a fixed denominator.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from threading import Thread

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from fedmed_flower.privacy.noise import gaussian, on_grid, secure_generator, standard

# How many numbers are clipped and added at a time: as many as the cache of a CPU holds, and as
# many as keep a GPU busy.
_CPU_BLOCK = 2**18
_GPU_BLOCK = 2**24
# Noise takes several passes over a block, so on a CPU the inner cache must hold it.
_NOISE_BLOCK = 2**15


class PatientOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus's optimizer, with noise that depends on no seed.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Makes the step. Its weight decay and momentum are applied after clipping and noise.
    noise_multiplier : float
        Standard deviation of the noise on the sum of clipped gradients, in units of
        `max_grad_norm`.
    max_grad_norm : float
        Norm to which the gradient of each patient is clipped.
    expected_patients : float
        Divisor of the sum, however many patients were drawn; above 0.
    step : float
        The noised sums are rounded to its multiples; a power of two (see `privacy.grid`). 0 for no
        grid.

    Attributes
    ----------
    dropped : int
        Number of patients who were left out because their gradient was not finite, or could not be
        computed (see `drop_patient`).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_patients: float,
        step: float = 0.0,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_patients,
        )
        self.dropped = 0
        self._step = step
        self._generator = secure_generator()
        self._ahead: Future[Tensor] | None = None

    def draw_ahead(self) -> None:
        """Start to draw the noise of the next step, in a thread that runs beside the gradients."""
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
            One tensor per trained parameter, in the order of the parameters.
        """
        for parameter, gradient in zip(self.params, gradients, strict=True):
            parameter.grad_sample = gradient
        self.clip_and_accumulate()
        self._forget_patients()

    def drop_patient(self) -> None:
        """Count a patient who adds nothing to the sum: the gradient could not be computed."""
        self.dropped += 1

    def clip_and_accumulate(self) -> None:
        """Add the clipped gradients of the patients in `grad_samples` to the sums, in float64.

        In float32 a norm over millions of numbers comes out up to a few percent too small, which
        would leave the clipped gradient too long by as much.
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
            rows = [row[finite] for row in rows]
            squares = squares[finite]
        factors = (self.max_grad_norm / squares.sqrt()).clamp(max=1.0)
        for parameter, row in zip(self.params, rows, strict=True):
            if parameter.summed_grad is None:
                parameter.summed_grad = _zeros(parameter)
            total = parameter.summed_grad.view(-1)
            for across, along in _blocks(row):
                total[along] += factors[across] @ row[across, along].double()

    def take_sums(self) -> list[Tensor]:
        """Return the sums without noise, in float64, and forget them.

        Only for a noise that is added before they leave the hospital.
        """
        self._complete()
        sums = [parameter.summed_grad for parameter in self.params]
        self.zero_grad(set_to_none=True)
        return sums

    def _complete(self) -> None:
        """Make the sum 0 where no patient was drawn."""
        for parameter in self.params:
            if parameter.summed_grad is None:
                parameter.summed_grad = _zeros(parameter)
        self._forget_patients()

    def release(self) -> None:
        """Add noise to the sum, divide it, and make a step, even if no patient was drawn."""
        self._complete()
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        self.original_optimizer.step()
        self.zero_grad(set_to_none=True)

    def add_noise(self) -> None:
        """Add noise to the sum of clipped gradients, and round to the grid."""
        # Reset before anything can fail: no noise is ever used twice.
        ahead = self._ahead
        self._ahead = None
        noise = self._draw() if ahead is None else ahead.result()
        parts = torch.split(noise, [parameter.numel() for parameter in self.params])
        for parameter, part in zip(self.params, parts, strict=True):
            total = parameter.summed_grad.view(-1)
            gradient = torch.empty_like(total, dtype=parameter.dtype)
            size = _GPU_BLOCK if total.device.type == "cuda" else _NOISE_BLOCK
            for start in range(0, len(total), size):
                block = slice(start, start + size)
                gradient[block] = self._noised(total[block], part[block].to(total.device))
            parameter.grad = gradient.view_as(parameter)

    @property
    def _std(self) -> float:
        return float(self.noise_multiplier * self.max_grad_norm)

    def _draw(self) -> Tensor:
        count = sum(parameter.numel() for parameter in self.params)
        if self._step:
            return torch.from_numpy(standard(count, self._generator))
        return torch.from_numpy(gaussian(count, self._std, self._generator))

    def _noised(self, total: Tensor, noise: Tensor) -> Tensor:
        """Return a sum with noise as `_draw` returns it."""
        return on_grid(total, noise, self._std, self._step) if self._step else total + noise

    def _forget_patients(self) -> None:
        for parameter in self.params:
            parameter.grad_sample = parameter.detach().new_empty((0, *parameter.shape))


def _blocks(row: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into blocks so small that a copy of one in float64 costs little."""
    size = _GPU_BLOCK if row.device.type == "cuda" else _CPU_BLOCK
    height, width = row.shape
    block_height = max(1, size // max(1, width))
    block_width = min(max(1, width), size)
    for top in range(0, height, block_height):
        for left in range(0, width, block_width):
            yield slice(top, top + block_height), slice(left, left + block_width)


def _zeros(layout: Tensor) -> Tensor:
    return torch.zeros(layout.shape, dtype=torch.float64, device=layout.device)
