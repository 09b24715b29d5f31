"""The local loop, plain and private."""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed_flower.privacy.gradients import PROBE, Batch, Loss, RecordGradients
from fedmed_flower.privacy.patient import Mechanism
from fedmed_flower.privacy.sampling import PatientSampler

log = logging.getLogger("flwr.fedmed")

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# On a CPU several sites may train side by side.
_CPU_MEMORY, _MOST_RECORDS = 4 * 2**30, 256
# Records on which the two methods are measured: with few, vmap's start would decide.
_PROBE = 32


def train_epochs(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    mixed_precision: bool = False,
    proximal_mu: float = 0.0,
) -> float:
    """Train a model in place.

    A batch for which the memory is too small is from then on taken in parts, whose gradients are
    added up to that of the whole batch; batch normalisation then sees a part at a time.

    Parameters
    ----------
    model : Module
    batches : iterable of dict of tensors
        Iterated once an epoch; on the model's device, the first dimension counting records.
    loss : callable
        Maps (model, batch) to the mean over the batch's records.
    optimizer : Optimizer
    epochs : int
    mixed_precision : bool
        Run model and loss in bfloat16 by autocast.
    proximal_mu : float
        Holds the parameters near those they begin with: adds ``mu / 2`` times the squared distance
        to the loss (FedProx, Li et al. 2020, https://arxiv.org/abs/1812.06127, equation 2). At
        least 0.

    Returns
    -------
    float
        Mean loss over the rows of the last epoch.

    Raises
    ------
    FloatingPointError
        If a batch has a loss that is not finite; the model is of no use from then on.
    torch.OutOfMemoryError
        If the memory does not do for one record.
    """
    model.train()
    held = [(p, p.detach().clone()) for p in model.parameters()] if proximal_mu else []
    parts, mean = Parts(), float("nan")

    def backward(part: Batch, share: float) -> float:
        kind = next(iter(part.values())).device.type
        with torch.autocast(kind, torch.bfloat16, enabled=mixed_precision):
            value: Any = loss(model, part)
        (value if share == 1 else value * share).backward()
        return float(value.item() * share)

    for epoch in range(epochs):
        total, rows = 0.0, 0
        for batch in batches:
            values = parts.run(
                batch, backward, before=lambda: optimizer.zero_grad(set_to_none=True)
            )
            value, count = sum(values), len(next(iter(batch.values())))
            for parameter, start in held:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - start, alpha=proximal_mu)
            optimizer.step()
            total, rows = total + value * count, rows + count
            if not math.isfinite(total):
                raise FloatingPointError(f"the training loss is {value} in epoch {epoch + 1}")
        mean = total / rows
    return mean


class Steps:
    """Yields `count` batches in each pass, going over the data as often as that takes.

    Parameters
    ----------
    batches : iterable of dict of tensors
        Restarted from the beginning when exhausted. If it is empty, no batch is produced.
    count : int
        At least 1.
    """

    def __init__(self, batches: Iterable[Batch], count: int) -> None:
        self._batches, self._count = batches, count

    def __iter__(self) -> Iterator[Batch]:
        left = self._count
        while left:
            batch = None
            for batch in itertools.islice(self._batches, left):
                left -= 1
                yield batch
            if batch is None:
                return


class Parts:
    """Runs batches in parts that fit into the memory: whole until it is found too small.

    Attributes
    ----------
    size : int
        Most records in a part; 0 as long as every batch has fitted.
    """

    def __init__(self) -> None:
        self.size = 0

    def run(
        self,
        batch: Batch,
        work: Callable[[Batch, float], Any],
        before: Callable[[], Any] = lambda: None,
    ) -> list[Any]:
        """Call ``work(part, its share of the records)`` on each part and return the results.

        Parameters
        ----------
        batch : dict of tensors
        work : callable
        before : callable
            Called at the beginning, and again if all begins again with smaller parts.

        Raises
        ------
        torch.OutOfMemoryError
            If one record is too large.
        """
        count = len(next(iter(batch.values())))
        while True:
            size = min(self.size or count, count)
            # Parts are alike: a last one of one record has no variance for batch normalisation.
            parts = zip(*(v.tensor_split(-(-count // size)) for v in batch.values()), strict=True)
            try:
                before()
                return [
                    work(dict(zip(batch, part, strict=True)), len(part[0]) / count)
                    for part in parts
                ]
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            # Outside the handler, whose traceback holds on to what was computed.
            self.size = _half(size)


def _half(size: int) -> int:
    """Return half a size of parts, and free what was reserved for the larger ones."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    log.warning("out of memory with %d records at a time: going on with %d", size, (size + 1) // 2)
    return (size + 1) // 2


def train_privately(
    model: nn.Module,
    batch_of: Callable[[Sequence[int]], Batch],
    patients: Sequence[Hashable],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    mechanism: Mechanism,
    probe: Batch,
    mixed_precision: bool = False,
    proximal_mu: float = 0.0,
) -> tuple[float, int]:
    """Train a model in place with differential privacy for each patient.

    Parameters
    ----------
    model : Module
        One that `require_private_model` lets pass.
    batch_of : callable
        Returns the records at some places of the training rows, on the model's device.
    patients : sequence of hashable
        The patient of each training row that can be used; there may be none.
    loss : callable
        Maps (model, batch of one record) to one number.
    optimizer : Optimizer
        Over the parameters that require a gradient. Its weight decay comes after the noise.
    mechanism : Mechanism
        Sampling rate, noise, clipping norm, number of steps, and of all patients.
    probe : dict of tensors
        Made-up records, on which is measured how gradients are computed: no patient's record
        decides it.
    mixed_precision : bool
        Run the model in bfloat16 by autocast.
    proximal_mu : float
        As in `train_epochs`; the term enters after clipping and noise, which it does not need.

    Returns
    -------
    tuple of (float, int)
        Mean loss of the records that were drawn, NaN if there were none, and how many patients'
        gradients were not finite, or could not be computed, and therefore left out. Neither carries
        noise.
    """
    # Opacus takes a second to import, in each process that answers one message.
    from fedmed_flower.privacy.optimizer import PatientOptimizer

    keep_freed_memory()
    model.train()
    settings, release = mechanism.settings, mechanism.release
    sampler = PatientSampler(
        patients, release.sampling_rate, settings.patient_records, mechanism.num_patients
    )
    private = PatientOptimizer(
        optimizer, release.noise_multiplier, settings.max_grad_norm, sampler.expected
    )
    gradients = RecordGradients(model, loss, mixed_precision)
    held = [(p, p.detach().clone()) for p in gradients.parameters.values()] if proximal_mu else []

    def add_proximal_term(_: object) -> None:
        for parameter, start in held:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=proximal_mu)

    private.attach_step_hook(add_proximal_term)
    drawn = max(1, round(sampler.expected))
    size = micro_batch_size(gradients, probe, drawn, settings.micro_batch_size)
    batches = _MicroBatches(gradients, batch_of, size)
    losses = [torch.zeros(0)]
    for _ in range(mechanism.steps):
        private.draw_ahead()
        for computed in batches.of(sampler.draw()):
            if computed is None:
                private.dropped += 1
                continue
            clippable, of_records = computed
            losses.append(of_records.float().cpu())
            private.accumulate(clippable)
            del computed, clippable  # Before the next patients' gradients are computed.
        private.release()
    each = torch.cat(losses)
    return float(each[each.isfinite()].mean()), private.dropped


class _MicroBatches:
    """The gradients of drawn patients, of as many records at a time as fit into the memory.

    Parameters
    ----------
    gradients : RecordGradients
    batch_of : callable
        Maps numbers of records to a batch.
    size : int
        Records at a time, at first.
    """

    def __init__(
        self, gradients: RecordGradients, batch_of: Callable[[Sequence[int]], Batch], size: int
    ) -> None:
        self._gradients, self._batch_of, self._size = gradients, batch_of, size

    def of(self, waiting: list[list[int]]) -> Iterator[tuple[list[Tensor], Tensor] | None]:
        """Yield gradients of patients and losses of their records; None for a patient that fails.

        Parameters
        ----------
        waiting : list of list of int
            The records of each patient.
        """
        alone = 0
        while waiting:
            group, rest = _first(waiting, self._size)
            if alone:
                group, rest = waiting[:1], waiting[1:]
            records = min(self._size, sum(map(len, group)))
            computed, failure = self._try(group)
            # Nothing of a group that failed was added up yet.
            if isinstance(failure, torch.OutOfMemoryError):
                if records == 1:
                    raise failure
                self._size = _half(records)
            elif failure is not None and len(group) > 1:
                # One of them must not decide about the others: each by itself.
                alone = len(group)
            else:
                waiting, alone = rest, max(0, alone - 1)
                yield computed
            del computed, failure

    def _try(
        self, group: list[list[int]]
    ) -> tuple[tuple[list[Tensor], Tensor] | None, Exception | None]:
        """Return what was computed of some patients, or the error without its traceback.

        A traceback would keep the failed batch in memory.
        """
        try:
            return _of_patients(self._gradients, self._batch_of, group, self._size), None
        except Exception as error:
            if not isinstance(error, torch.OutOfMemoryError):
                log.debug("gradients of %d patients: %s", len(group), error)
            return None, error.with_traceback(None)


def keep_freed_memory() -> None:
    """Let glibc keep what it frees: fresh pages for each gradient can double a step's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _first(waiting: list[list[int]], size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Split off the patients whose records fit into a micro-batch: at least one patient."""
    total, count = 0, 0
    while count < len(waiting) and (not count or total + len(waiting[count]) <= size):
        total += len(waiting[count])
        count += 1
    return waiting[:count], waiting[count:]


def _of_patients(
    gradients: RecordGradients,
    batch_of: Callable[[Sequence[int]], Batch],
    groups: list[list[int]],
    size: int,
) -> tuple[list[Tensor], Tensor]:
    """Return for each patient the mean gradient over the patient's records, and all losses."""
    indices = [index for group in groups for index in group]
    if len(indices) == len(groups):
        return gradients(batch_of(indices))
    owners = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    share = 1 / torch.tensor([len(group) for group in groups])
    sums: list[Tensor] = []
    losses = []
    for start in range(0, len(indices), size):
        made, found = gradients(batch_of(indices[start : start + size]))
        if not sums:
            sums = [g.new_zeros((len(groups), *g.shape[1:])) for g in made]
        of = owners[start : start + size].to(found.device)
        for total, gradient in zip(sums, made, strict=True):
            weights = share.to(gradient)[of].view(-1, *[1] * (gradient.ndim - 1))
            total.index_add_(0, of, gradient * weights)
        losses.append(found)
    return sums, torch.cat(losses)


def micro_batch_size(gradients: RecordGradients, probe: Batch, drawn: int, wanted: int = 0) -> int:
    """Choose the method, and how many gradients fit into a quarter of the free memory.

    Parameters
    ----------
    gradients : RecordGradients
        Its method is set.
    probe : dict of tensors
        Records that are like those to come, on the device; at least one.
    drawn : int
        Records of a step on average; at least 1.
    wanted : int
        The most, whatever the memory; 0 finds out.

    Raises
    ------
    torch.OutOfMemoryError
        If the memory does not do for one record.
    """
    first = {key: value[:1] for key, value in probe.items()}
    device, count = next(iter(first.values())).device, len(next(iter(probe.values())))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _CPU_MEMORY
    most = wanted or min(_MOST_RECORDS, free // 4 // gradients.bytes_per_record(first))
    most = max(1, most)
    while True:
        tried = min(most, _PROBE, drawn)
        # A few records, repeated, take as much time and memory as others.
        indices = torch.arange(tried, device=device) % count
        try:
            gradients.choose({key: value[indices] for key, value in probe.items()})
        except torch.OutOfMemoryError:
            if tried == 1:
                raise
        else:
            return most if wanted or gradients.method == "vmap" else min(most, PROBE)
        most = _half(tried)


@torch.no_grad()
def predict_alone(
    model: Callable[[Batch], Tensor],
    batch_at: Callable[[int], Batch],
    count: int,
    mixed_precision: bool = False,
) -> tuple[list[int], list[NDArray[np.float32]]]:
    """Return a network's outputs for records one by one, so that none can change another's.

    Parameters
    ----------
    model : callable
        Maps a batch to outputs; the network is in evaluation mode.
    batch_at : callable
        Returns the batch of one record.
    count : int
        How many records there are.
    mixed_precision : bool
        Run the model in bfloat16 by autocast.

    Returns
    -------
    indices : list of int
        Of the records for which the network did not fail.
    outputs : list of arrays of shape (c,)
    """
    indices, outputs = [], []
    for index in range(count):
        try:
            (output,) = predict(model, [batch_at(index)], mixed_precision)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            log.debug("the network fails for a record: %s", error)
            continue
        indices.append(index)
        outputs.append(output)
    return indices, outputs


@torch.no_grad()
def predict(
    model: Callable[[Batch], Tensor], batches: Iterable[Batch], mixed_precision: bool = False
) -> NDArray[np.float32]:
    """Return a network's outputs (n, c) over all batches.

    Parameters
    ----------
    model : callable
        Maps a batch to outputs; the network is in evaluation mode.
    batches : iterable of dict of tensors
        On the model's device; taken in parts where the memory is too small.
    mixed_precision : bool
        Run the model in bfloat16 by autocast.
    """
    parts = Parts()

    def forward(part: Batch, _: float) -> Tensor:
        kind = next(iter(part.values())).device.type
        with torch.autocast(kind, torch.bfloat16, enabled=mixed_precision):
            return model(part).float().cpu()

    outputs = [output for batch in batches for output in parts.run(batch, forward)]
    values: NDArray[np.float32] = torch.cat(outputs).numpy()
    return values
