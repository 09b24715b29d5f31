"""The local loop, and what it needs around it: settings, seeds, device, threads."""

from __future__ import annotations

import ctypes
import hashlib
import math
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed_flower.config import Section
from fedmed_flower.errors import InputError
from fedmed_flower.privacy.gradients import (
    PROBE,
    Batch,
    Loss,
    PatientOptimizer,
    RecordGradients,
)
from fedmed_flower.privacy.patient import Mechanism
from fedmed_flower.privacy.sampling import PatientSampler

_DEVICES = ("auto", "cpu", "cuda")
_OPTIMIZERS = ("adam", "sgd")
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# On a CPU several sites may train side by side.
_CPU_MEMORY, _MOST_RECORDS = 4 * 2**30, 256
# Records on which the two methods are measured: with few, vmap's start would decide.
_PROBE = 32


@dataclass(frozen=True)
class Settings(Section):
    """How a site trains, from the run config (``local-epochs`` there is `local_epochs` here).

    Attributes
    ----------
    local_epochs : int
        Passes over the site's training rows in a round; at least 1.
    batch_size : int
        Rows in a step; at least 1.
    learning_rate : float
        Above 0.
    weight_decay : float
        At least 0; 0 adds no penalty.
    optimizer : {"adam", "sgd"}
        Made anew in each round.
    momentum : float
        For ``sgd``; in [0, 1).
    seed : int
        At least 0. Together with site, round and purpose it decides everything random at a site
        that does not protect privacy.
    device : {"auto", "cpu", "cuda"}
        ``auto`` takes a GPU where there is one. A number may follow: ``cuda:1``.
    mixed_precision : bool
        bfloat16 where the device is a GPU; no effect on a CPU.
    torch_threads : int
        0 means 1 in a simulation, where sites share the machine, and torch's own choice elsewhere.
    """

    local_epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    optimizer: str = "adam"
    momentum: float = 0.0
    seed: int = 0
    device: str = "auto"
    mixed_precision: bool = True
    torch_threads: int = 0

    def __post_init__(self) -> None:
        self.require_at_least(1, "local_epochs", "batch_size")
        self.require_at_least(0, "seed", "torch_threads")
        penalty = 0 <= self.weight_decay < math.inf
        self.require("weight_decay", penalty, "at least 0 and finite")
        self.require_positive("learning_rate")
        self.require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self.require("optimizer", self.optimizer in _OPTIMIZERS, f"one of {', '.join(_OPTIMIZERS)}")
        known = self.device in _DEVICES or re.fullmatch(r"cuda:\d+", self.device) is not None
        self.require("device", known, f"one of {', '.join(_DEVICES)}")

    def torch_device(self) -> torch.device:
        """Return the device to train on.

        Raises
        ------
        InputError
            Where a GPU is asked for that is not there.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(
                f"device is {self.device}, but torch sees no GPU here: set device to auto or cpu"
            )
        return torch.device(self.device)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over the model's trainable parameters."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer == "adam":
            return torch.optim.Adam(
                parameters, lr=self.learning_rate, weight_decay=self.weight_decay
            )
        return torch.optim.SGD(
            parameters,
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )


def derive_seed(*parts: object) -> int:
    """Return a seed that depends on all parts, such as seed, site, round and purpose."""
    text = "/".join(str(part).replace("/", "//") for part in parts)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big")


@contextmanager
def torch_environment(seed: int, threads: int, device: torch.device) -> Iterator[None]:
    """Seed torch and set its threads, and put both back as they were.

    Parameters
    ----------
    seed : int
        For torch's global generators.
    threads : int
        0 leaves the number of threads as it is.
    device : torch.device
        Its generator is put back too.
    """
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if threads:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def train_epochs(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    device: torch.device,
    mixed_precision: bool = False,
    augment: Callable[[Tensor], Tensor] | None = None,
    proximal_mu: float = 0.0,
) -> float:
    """Train a model in place.

    Parameters
    ----------
    model : Module
        On `device`.
    batches : iterable of dict
        Iterated once an epoch; ``image`` is the model's input, ``label`` the loss's target.
    loss : Module
        Maps (outputs, labels) to the mean over the batch.
    optimizer : Optimizer
    epochs : int
    device : torch.device
    mixed_precision : bool
        Run the model in bfloat16 by autocast.
    augment : callable, optional
        Changes the images of a batch, on `device`, before the model sees them.
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
        Where a batch has a loss that is not finite; the model is of no use from then on.
    """
    model.train()
    held = [(p, p.detach().clone()) for p in model.parameters()] if proximal_mu else []
    mean = float("nan")
    for epoch in range(epochs):
        total, rows = 0.0, 0
        for batch in batches:
            images, labels = batch["image"].to(device), batch["label"].to(device)
            if augment is not None:
                images = augment(images)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
                value = loss(model(images), labels)
            value.backward()
            for parameter, start in held:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - start, alpha=proximal_mu)
            optimizer.step()
            total, rows = total + value.item() * len(labels), rows + len(labels)
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"the training loss is {value.item()} in epoch {epoch + 1}"
                )
        mean = total / rows
    return mean


def train_privately(
    model: nn.Module,
    batch_of: Callable[[Sequence[int]], Batch],
    patients: Sequence[Hashable],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    mechanism: Mechanism,
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
        The patient of each training row.
    loss : callable
        Maps (model, batch of one record) to one number.
    optimizer : Optimizer
        Over the parameters that require a gradient. Its weight decay comes after the noise.
    mechanism : Mechanism
        Sampling rate, noise, clipping norm and number of steps.
    mixed_precision : bool
        Run the model in bfloat16 by autocast.
    proximal_mu : float
        As in `train_epochs`; the term enters after clipping and noise, which it does not need.

    Returns
    -------
    tuple of (float, int)
        Mean loss of the records that were drawn, NaN where there were none, and how many patients'
        gradients were not finite and therefore left out. Neither carries noise.
    """
    keep_freed_memory()
    model.train()
    settings, release = mechanism.settings, mechanism.release
    sampler = PatientSampler(patients, release.sampling_rate, settings.patient_records)
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
    size, losses = settings.micro_batch_size, [torch.zeros(0)]
    for _ in range(mechanism.steps):
        private.draw_ahead()
        waiting = sampler.draw()
        while waiting:
            size = size or micro_batch_size(gradients, batch_of, [group[0] for group in waiting])
            group, waiting = _first(waiting, size)
            made, found = _of_patients(gradients, batch_of, group, size)
            losses.append(found.float().cpu())
            private.accumulate(made)
        private.release()
    each = torch.cat(losses)
    return float(each[each.isfinite()].mean()), private.dropped


def probe_places(count: int) -> list[int]:
    """Return the places of a few of so many rows, far apart: rows may be sorted by their label."""
    return sorted({number * (count - 1) // (PROBE - 1) for number in range(PROBE)})


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
    places = [place for group in groups for place in group]
    if len(places) == len(groups):
        return gradients(batch_of(places))
    owners = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    share = 1 / torch.tensor([len(group) for group in groups])
    sums: list[Tensor] = []
    losses = []
    for start in range(0, len(places), size):
        made, found = gradients(batch_of(places[start : start + size]))
        if not sums:
            sums = [g.new_zeros((len(groups), *g.shape[1:])) for g in made]
        of = owners[start : start + size].to(found.device)
        for total, gradient in zip(sums, made, strict=True):
            weights = share.to(gradient)[of].view(-1, *[1] * (gradient.ndim - 1))
            total.index_add_(0, of, gradient * weights)
        losses.append(found)
    return sums, torch.cat(losses)


def micro_batch_size(
    gradients: RecordGradients, batch_of: Callable[[Sequence[int]], Batch], places: list[int]
) -> int:
    """Choose the method, and how many gradients fit into a quarter of the free memory.

    Parameters
    ----------
    gradients : RecordGradients
        Its method is set.
    batch_of : callable
        Returns the records at some places, on the device.
    places : list of int
        Of some records, such as those of a step; at least one.
    """
    first = batch_of(places[:1])
    device = next(iter(first.values())).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _CPU_MEMORY
    most = max(1, min(_MOST_RECORDS, free // 4 // gradients.bytes_per_record(first)))
    gradients.choose(batch_of(places[: min(most, _PROBE)]))
    return most if gradients.method == "vmap" else min(most, PROBE)


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    device: torch.device,
    mixed_precision: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the model's outputs (n, c) and the labels (n,) over all batches."""
    model.eval()
    outputs, labels = [], []
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
            output = model(batch["image"].to(device))
        outputs.append(output.float().cpu())
        labels.append(batch["label"])
    return torch.cat(outputs).numpy(), torch.cat(labels).numpy().astype(np.int64)
