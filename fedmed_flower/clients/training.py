"""The training loop of a site, plain and private."""

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
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from fedmed_flower.errors import DivergedError
from fedmed_flower.methods.base import PLAIN, Method
from fedmed_flower.privacy.gradients import PROBE, Batch, Loss, RecordGradients
from fedmed_flower.privacy.patient import Mechanism
from fedmed_flower.privacy.sampling import PatientSampler

log = logging.getLogger("flwr.fedmed")

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
# Bytes that are assumed free on a CPU, where several sites may train side by side.
_CPU_MEMORY = 4 * 2**30
_MOST_RECORDS = 256
# Records on which the two methods are compared: with fewer, vmap's start-up would decide.
_PROBE = 32


def train_epochs(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    mixed_precision: bool = False,
    method: Method = PLAIN,
) -> float:
    """Train a model in place.

    If a batch does not fit into memory, this and all later batches are split into parts. Their
    gradients add up to the gradient of the whole batch; batch normalisation sees one part at a
    time.

    Parameters
    ----------
    model : Module
    batches : iterable of dict of tensors
        Iterated once in each epoch. Tensors are on the model's device; their first dimension counts
        records.
    loss : callable
        Maps (model, batch) to the mean over the batch's records.
    optimizer : Optimizer
    epochs : int
    mixed_precision : bool
        Run model and loss in bfloat16 by autocast.
    method : Method
        Its `loss`, `before_step` and `after_step` are called for each batch.

    Returns
    -------
    float
        Mean loss over the rows of the last epoch, as ``method.loss`` returns it.

    Raises
    ------
    DivergedError
        If the loss of a batch is not finite; the model cannot be used any more.
    torch.OutOfMemoryError
        If one record does not fit into memory.
    """
    model.train()
    parts = Parts()
    mean = float("nan")

    def backward(part: Batch, share: float) -> float:
        kind = next(iter(part.values())).device.type
        with torch.autocast(kind, torch.bfloat16, enabled=mixed_precision):
            value: Any = method.loss(model, part, loss)
        (value if share == 1 else value * share).backward()
        return float(value.item() * share)

    for epoch in range(epochs):
        total = 0.0
        rows = 0
        for batch in batches:
            values = parts.run(
                batch, backward, before=lambda: optimizer.zero_grad(set_to_none=True)
            )
            value = sum(values)
            count = len(next(iter(batch.values())))
            method.before_step(model)
            optimizer.step()
            method.after_step(model, batch)
            total += value * count
            rows += count
            if not math.isfinite(total):
                raise DivergedError(
                    f"the training loss is {value} in epoch {epoch + 1}: a lower learning-rate may "
                    "help"
                )
        mean = total / rows
    return mean


def random_batches(
    batch_of: Callable[[list[int]], Batch], count: int, size: int, seed: int
) -> DataLoader[Batch]:
    """Return the batches of a pass over rows, in an order that differs from pass to pass.

    Parameters
    ----------
    batch_of : callable
        Maps the indices of some rows to a batch.
    count : int
        Number of rows.
    size : int
        Rows in a batch. A last batch of one row is left out: it has no variance, which batch
        normalisation needs.
    seed : int
        Decides the order.
    """
    generator = torch.Generator().manual_seed(seed)
    order = RandomSampler(range(count), generator=generator)
    # The loader is given whole batches: to fetch row by row takes longer than to train.
    return DataLoader(
        _Picked(batch_of),
        batch_size=None,
        sampler=BatchSampler(order, size, drop_last=count > size and count % size == 1),
        collate_fn=_unchanged,
        generator=generator,
    )


class _Picked(Dataset[Batch]):
    """The batches of `random_batches`, by the indices of their rows."""

    def __init__(self, batch_of: Callable[[list[int]], Batch]) -> None:
        self._batch_of = batch_of

    def __getitem__(self, indices: list[int]) -> Batch:
        return self._batch_of(indices)


def _unchanged(batch: Any) -> Any:
    return batch


class Steps:
    """Yields `count` batches in each pass, and goes over the data as often as that needs.

    Parameters
    ----------
    batches : iterable of dict of tensors
        Restarted from the beginning when exhausted. If it is empty, no batch is produced.
    count : int
        Batches in a pass; at least 1.
    """

    def __init__(self, batches: Iterable[Batch], count: int) -> None:
        self._batches = batches
        self._count = count

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
    """Runs batches whole, and in parts once a batch did not fit into memory.

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
            Maps (part, share) to a result; the shares of all parts add up to 1.
        before : callable
            Called before the first part, and again each time when all parts are repeated with fewer
            records.

        Raises
        ------
        torch.OutOfMemoryError
            If one record is too large.
        """
        count = len(next(iter(batch.values())))
        while True:
            size = min(self.size or count, count)
            # Of equal size, since a last part of one record would have no variance for batch
            # normalisation.
            pieces = math.ceil(count / size)
            parts = zip(*(values.tensor_split(pieces) for values in batch.values()), strict=True)
            try:
                before()
                return [
                    work(dict(zip(batch, part, strict=True)), len(part[0]) / count)
                    for part in parts
                ]
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            # Outside the handler, whose traceback keeps the failed parts in memory.
            self.size = _half(size)


def _half(size: int) -> int:
    """Return half the size of a part, rounded up, and free the memory of the larger parts."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = (size + 1) // 2
    log.warning("out of memory with %d records at a time: going on with %d", size, half)
    return half


def train_privately(
    model: nn.Module,
    batch_of: Callable[[Sequence[int]], Batch],
    patients: Sequence[Hashable],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    mechanism: Mechanism,
    probe: Batch,
    mixed_precision: bool = False,
    method: Method = PLAIN,
) -> tuple[float, int]:
    """Train a model in place with differential privacy for each patient.

    Parameters
    ----------
    model : Module
        A model that `require_private_model` accepts.
    batch_of : callable
        Maps indices of training rows to their batch, on the model's device.
    patients : sequence of hashable
        The patient of each usable training row; may be empty.
    loss : callable
        Maps (model, batch of one record) to one number.
    optimizer : Optimizer
        Over the parameters that require a gradient. Weight decay is applied after the noise.
    mechanism : Mechanism
        Sampling rate, noise, clipping norm, number of steps, and number of all patients.
    probe : dict of tensors
        Made-up records. The method of computing gradients is chosen on them, so that no patient's
        record decides it.
    mixed_precision : bool
        Run the model in bfloat16 by autocast.
    method : Method
        Its `before_step` changes gradients after clipping and noise; `after_step` gets no batch.

    Returns
    -------
    tuple of (float, int)
        Mean loss of the drawn records, NaN if none was drawn. The number of patients who were left
        out since their gradients were not finite or could not be computed. Neither carries noise.

    Raises
    ------
    torch.OutOfMemoryError
        If one record does not fit into memory.
    """
    model.train()
    steps = _PatientSteps(
        model, batch_of, patients, loss, optimizer, mechanism, probe, mixed_precision
    )
    private = steps.optimizer
    private.attach_step_hook(lambda _: method.before_step(model))
    losses = [torch.zeros(0)]
    for _ in range(mechanism.steps):
        private.draw_ahead()
        losses += steps.accumulate()
        private.release()
        method.after_step(model, {})
    all_losses = torch.cat(losses)
    return float(all_losses[all_losses.isfinite()].mean()), private.dropped


def sum_privately(
    model: nn.Module,
    batch_of: Callable[[Sequence[int]], Batch],
    patients: Sequence[Hashable],
    loss: Loss,
    mechanism: Mechanism,
    probe: Batch,
    mixed_precision: bool = False,
) -> tuple[dict[str, Tensor], int]:
    """Return the sum of one step's clipped gradients, WITHOUT noise, for a noise that follows.

    Nothing of it may leave the hospital before noise is added. The model is not changed.

    Parameters
    ----------
    model, batch_of, patients, loss, mechanism, probe, mixed_precision
        As in `train_privately`; the mechanism's steps are not counted.

    Returns
    -------
    tuple of (dict of str to Tensor, int)
        The sums in float64 by the name of the parameter. One patient changes all of them together
        by at most the clipping norm. The number of patients who were left out.
    """
    model.train()
    # It never steps; `PatientOptimizer` takes the parameters from it.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    steps = _PatientSteps(
        model, batch_of, patients, loss, optimizer, mechanism, probe, mixed_precision
    )
    steps.accumulate()
    names = steps.gradients.parameters
    sums = dict(zip(names, steps.optimizer.take_sums(), strict=True))
    return sums, steps.optimizer.dropped


class _PatientSteps:
    """Draws patients, and adds up their clipped gradients; parameters as in `train_privately`."""

    def __init__(
        self,
        model: nn.Module,
        batch_of: Callable[[Sequence[int]], Batch],
        patients: Sequence[Hashable],
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        mechanism: Mechanism,
        probe: Batch,
        mixed_precision: bool,
    ) -> None:
        # Imported here: Opacus takes a second, in each process that answers one message.
        from fedmed_flower.privacy.optimizer import PatientOptimizer

        keep_freed_memory()
        settings = mechanism.settings
        release = mechanism.release
        self._sampler = PatientSampler(
            patients, release.sampling_rate, settings.patient_records, mechanism.num_patients
        )
        expected = self._sampler.expected
        self.optimizer = PatientOptimizer(
            optimizer,
            release.noise_multiplier,
            settings.max_grad_norm,
            expected,
            mechanism.grid,
        )
        self.gradients = RecordGradients(model, loss, mixed_precision)
        drawn = max(1, round(expected))
        size = micro_batch_size(self.gradients, probe, drawn, settings.micro_batch_size)
        self._batches = _MicroBatches(self.gradients, batch_of, size)

    def accumulate(self) -> list[Tensor]:
        """Draw the patients of a step and add up their gradients; return the records' losses."""
        losses = []
        for computed in self._batches.run(self._sampler.draw()):
            if computed is None:
                self.optimizer.drop_patient()
                continue
            clippable, record_losses = computed
            losses.append(record_losses.float().cpu())
            self.optimizer.accumulate(clippable)
            del computed, clippable  # Free them before the next patients' gradients are computed.
        return losses


class _MicroBatches:
    """Computes the gradients of drawn patients, with as many records at a time as memory allows.

    Parameters
    ----------
    gradients : RecordGradients
    batch_of : callable
        Maps indices of records to a batch.
    size : int
        Most records at a time; halved when memory runs out.
    """

    def __init__(
        self, gradients: RecordGradients, batch_of: Callable[[Sequence[int]], Batch], size: int
    ) -> None:
        self._gradients = gradients
        self._batch_of = batch_of
        self._size = size

    def run(self, waiting: list[list[int]]) -> Iterator[tuple[list[Tensor], Tensor] | None]:
        """Yield gradients of patients and losses of their records; None for a patient that fails.

        Parameters
        ----------
        waiting : list of list of int
            The indices of each patient's records.
        """
        # How many of the next patients are computed one by one.
        alone = 0
        while waiting:
            group = waiting[: 1 if alone else _count_that_fit(waiting, self._size)]
            records = min(self._size, sum(map(len, group)))
            computed, failure = self._try(group)
            # A group that failed has yielded nothing, so it can be tried again.
            if isinstance(failure, torch.OutOfMemoryError):
                if records == 1:
                    raise failure
                self._size = _half(records)
            elif failure is not None and len(group) > 1:
                # A patient whose record fails must not decide about the others.
                alone = len(group)
            else:
                waiting = waiting[len(group) :]
                alone = max(0, alone - 1)
                yield computed
            del computed, failure

    def _try(
        self, group: list[list[int]]
    ) -> tuple[tuple[list[Tensor], Tensor] | None, Exception | None]:
        """Return the gradients and losses of patients, or the error without its traceback.

        A traceback would keep the failed batch in memory.
        """
        try:
            return _patient_gradients(self._gradients, self._batch_of, group, self._size), None
        except Exception as error:
            if not isinstance(error, torch.OutOfMemoryError):
                log.debug("gradients of %d patients: %s", len(group), error)
            return None, error.with_traceback(None)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, since new pages for each gradient can double a step's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _count_that_fit(waiting: list[list[int]], size: int) -> int:
    """Return how many of the first patients have together at most `size` records; at least 1."""
    total = 0
    count = 0
    while count < len(waiting) and (not count or total + len(waiting[count]) <= size):
        total += len(waiting[count])
        count += 1
    return count


def _patient_gradients(
    gradients: RecordGradients,
    batch_of: Callable[[Sequence[int]], Batch],
    records: list[list[int]],
    size: int,
) -> tuple[list[Tensor], Tensor]:
    """Return for each patient the mean gradient over the patient's records, and all losses.

    Parameters
    ----------
    gradients : RecordGradients
    batch_of : callable
        Maps indices of records to a batch.
    records : list of list of int
        The indices of each patient's records.
    size : int
        Most records at a time.
    """
    indices = [index for of_patient in records for index in of_patient]
    if len(indices) == len(records):
        return gradients(batch_of(indices))
    patient_of_row = torch.tensor(
        [number for number, of_patient in enumerate(records) for _ in of_patient]
    )
    share = 1 / torch.tensor([len(of_patient) for of_patient in records])
    sums: list[Tensor] = []
    losses = []
    for start in range(0, len(indices), size):
        record_gradients, record_losses = gradients(batch_of(indices[start : start + size]))
        if not sums:
            sums = [g.new_zeros((len(records), *g.shape[1:])) for g in record_gradients]
        patients = patient_of_row[start : start + size].to(record_losses.device)
        for total, gradient in zip(sums, record_gradients, strict=True):
            weights = share.to(gradient)[patients].view(-1, *[1] * (gradient.ndim - 1))
            total.index_add_(0, patients, gradient * weights)
        losses.append(record_losses)
    return sums, torch.cat(losses)


def micro_batch_size(gradients: RecordGradients, probe: Batch, drawn: int, wanted: int = 0) -> int:
    """Choose the method, and return how many gradients fit into a quarter of the free memory.

    Parameters
    ----------
    gradients : RecordGradients
        Its method is set here.
    probe : dict of tensors
        Records of the same shapes as those to come, on the device; at least one.
    drawn : int
        Records of a step on average; at least 1.
    wanted : int
        The most, whatever the memory; 0 chooses by the memory.

    Returns
    -------
    int
        Records at a time; at least 1.

    Raises
    ------
    torch.OutOfMemoryError
        If one record does not fit into memory.
    """
    first = {key: value[:1] for key, value in probe.items()}
    device = next(iter(first.values())).device
    count = len(next(iter(probe.values())))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _CPU_MEMORY
    most = wanted or min(_MOST_RECORDS, free // 4 // gradients.bytes_per_record(first))
    most = max(1, most)
    while True:
        tried = min(most, _PROBE, drawn)
        # Repeated records take as much time and memory as different ones.
        indices = torch.arange(tried, device=device) % count
        try:
            gradients.choose({key: value[indices] for key, value in probe.items()})
        except torch.OutOfMemoryError:
            if tried == 1:
                raise
        else:
            limited = not wanted and gradients.method != "vmap"
            return min(most, PROBE) if limited else most
        most = _half(tried)


@torch.no_grad()
def predict_alone(
    model: Callable[[Batch], Tensor],
    batch_at: Callable[[int], Batch],
    count: int,
    mixed_precision: bool = False,
) -> tuple[list[int], list[NDArray[np.float32]]]:
    """Return a network's outputs for records one by one, so that no record changes another's.

    Parameters
    ----------
    model : callable
        Maps a batch to outputs; the network is in evaluation mode.
    batch_at : callable
        Maps the index of a record to its batch.
    count : int
        Number of records.
    mixed_precision : bool
        Run the model in bfloat16 by autocast.

    Returns
    -------
    indices : list of int
        The records for which the network did not fail.
    outputs : list of arrays of shape (c,)
        The outputs for these records.
    """
    indices = []
    outputs = []
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
        On the model's device; a batch that does not fit into memory is split into parts.
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
