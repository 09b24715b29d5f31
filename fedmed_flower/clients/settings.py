"""How a site trains, on tables too, and what is around it: settings, seeds, device, threads."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmed_flower.config import MOST_ROUNDS, Section
from fedmed_flower.errors import InputError
from fedmed_flower.tabular_networks import KINDS

_DEVICES = ("auto", "cpu", "cuda")
_OPTIMIZERS = ("adam", "sgd")
_PREPARATIONS = ("federated", "site", "declared")


@dataclass(frozen=True)
class Settings(Section):
    """How a site trains, from the run config (``local-epochs`` there is `local_epochs` here).

    Attributes
    ----------
    local_epochs : int
        Passes over the site's training rows in a round; from 1 to 10,000.
    local_steps : int
        Batches in a round, whatever number of rows a site has; up to a million. 0 goes by
        `local_epochs`.
    batch_size : int
        Rows in a step; from 1 to a million.
    learning_rate : float
        Above 0.
    weight_decay : float
        At least 0; 0 adds no penalty.
    optimizer : {"adam", "sgd"}
        Made anew in each round.
    momentum : float
        For ``sgd``; in [0, 1).
    schedule : {"constant", "cosine"}
        How the learning rate goes over the rounds: ``cosine`` brings it down from `learning_rate`
        in the first round towards 0 after the last of ``num-server-rounds``. A run that is resumed
        for more rounds takes, from there on, the rates of so many.
    seed : int
        From 0 to 2^63 - 1. Together with site, round and purpose it decides everything random at a
        site that does not protect privacy. At a real hospital it does not decide how patients are
        split.
    device : {"auto", "cpu", "cuda"}
        ``auto`` takes a GPU where there is one. A number may follow: ``cuda:1``.
    mixed_precision : bool
        bfloat16 where the device is a GPU; no effect on a CPU.
    channels_last : bool
        Keep images and weights with their channels last where the device is a GPU; no effect on a
        CPU.
    torch_threads : int
        Up to 1024. 0 means 1 in a simulation, where sites share the machine, and torch's own choice
        elsewhere.
    personal_epochs : int
        Most passes in which a hospital may fine-tune the last global model for itself; up to
        10,000. 0 for none.
    num_server_rounds : int
        How many rounds `schedule` is planned for; up to 100,000. ``cosine`` needs at least 1.
    """

    local_epochs: int = 1
    local_steps: int = 0
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    optimizer: str = "adam"
    momentum: float = 0.0
    schedule: str = "constant"
    seed: int = 0
    device: str = "auto"
    mixed_precision: bool = True
    channels_last: bool = True
    torch_threads: int = 0
    personal_epochs: int = 0
    num_server_rounds: int = 0

    def __post_init__(self) -> None:
        self.require_within(1, 10_000, "local_epochs")
        self.require_within(1, 10**6, "batch_size")
        self.require_within(0, 10**6, "local_steps")
        self.require_within(0, 10_000, "personal_epochs")
        self.require_within(0, 1024, "torch_threads")
        self.require_within(0, MOST_ROUNDS, "num_server_rounds")
        self.require_within(0, 2**63 - 1, "seed")
        penalty = 0 <= self.weight_decay < math.inf
        self.require("weight_decay", penalty, "at least 0 and finite")
        self.require_positive("learning_rate")
        self.require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self.require("optimizer", self.optimizer in _OPTIMIZERS, f"one of {', '.join(_OPTIMIZERS)}")
        schedules = ("constant", "cosine")
        self.require("schedule", self.schedule in schedules, f"one of {', '.join(schedules)}")
        if self.schedule == "cosine" and not self.num_server_rounds:
            raise InputError("schedule=cosine needs num-server-rounds in the run config")
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

    @property
    def half_precision(self) -> bool:
        """Whether models run in bfloat16."""
        return self.mixed_precision and self.torch_device().type == "cuda"

    def progress(self, server_round: int) -> float:
        """Return which part of the run's rounds is done before this one, the first being 1."""
        rounds = max(1, self.num_server_rounds)
        return min(max(0, server_round - 1), rounds - 1) / rounds

    def make_optimizer(self, model: nn.Module, progress: float = 0.0) -> torch.optim.Optimizer:
        """Return the optimizer over the model's trainable parameters.

        Parameters
        ----------
        model : Module
        progress : float
            Which part of the run's rounds is done, for `schedule`; in [0, 1).
        """
        parameters, rate = [p for p in model.parameters() if p.requires_grad], self.learning_rate
        if self.schedule == "cosine":
            rate *= (1 + math.cos(math.pi * progress)) / 2
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters, lr=rate, momentum=self.momentum, weight_decay=self.weight_decay
        )


@dataclass(frozen=True)
class TabularSettings(Section):
    """How tables are prepared, modelled and reported, from the run config.

    Attributes
    ----------
    preparation : {"federated", "site", "declared"}
        Where means, scales and lists of categories come from: from all hospitals' training rows,
        told before the first round; from each hospital's own (all categories must then be
        declared); or from the schema's ``ranges`` and ``categories`` alone, so that nothing is
        learnt from patients, as privacy needs it. A number to predict has the mean and scale that
        all hospitals tell, and else those of its declared range.
    tabular_network : {"linear", "mlp", "residual"}
        Linear (or logistic) regression, or a network of `network_depth` layers or blocks.
    network_width, network_depth : int
        From 1 to 65,536 and to 1,000; no effect on ``linear``.
    network_dropout : float
        In [0, 1).
    report_by : str
        Columns, with commas between them, for whose values the figures are reported apart, such as
        ``sex,age-band``.
    """

    preparation: str = "federated"
    tabular_network: str = "linear"
    network_width: int = 64
    network_depth: int = 2
    network_dropout: float = 0.0
    report_by: str = ""

    def __post_init__(self) -> None:
        known = ", ".join(_PREPARATIONS)
        self.require("preparation", self.preparation in _PREPARATIONS, f"one of {known}")
        kinds = f"one of {', '.join(KINDS)}"
        self.require("tabular_network", self.tabular_network in KINDS, kinds)
        self.require_within(1, 2**14, "network_width")
        self.require_within(1, 1000, "network_depth")
        weights = self.network_width**2 * self.network_depth
        self.require(
            "network_width",
            weights <= 2**28,
            f"at most {2**14} and, squared and times network-depth, at most {2**28:,}",
        )

    @property
    def groups(self) -> tuple[str, ...]:
        """The columns of `report_by`."""
        return tuple(name.strip() for name in self.report_by.split(",") if name.strip())


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


def arranged(values: Tensor) -> Tensor:
    """Return images, or the weights of a convolution, with their channels last in memory."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(values.ndim)
    return values if layout is None else values.contiguous(memory_format=layout)
