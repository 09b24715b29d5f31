"""Settings by which a site trains."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fedmed_flower.errors import InputError
from fedmed_flower.settings.section import MOST_ROUNDS, Section

_DEVICES = ("auto", "cpu", "cuda")
_OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class Settings(Section):
    """How a site trains, from the run config (``local-epochs`` there is `local_epochs` here).

    Attributes
    ----------
    local_epochs : int
        Passes over the site's training rows in a round; from 1 to 10,000.
    local_steps : int
        Number of batches in a round, whatever number of rows a site has; from 0 to a million. 0
        uses `local_epochs` instead.
    batch_size : int
        Number of rows in a step; from 1 to a million.
    learning_rate : float
        Above 0.
    weight_decay : float
        At least 0; 0 adds no penalty.
    optimizer : {"adam", "sgd"}
        Each round starts with a new one.
    momentum : float
        Momentum of ``sgd``; in [0, 1).
    schedule : {"constant", "cosine"}
        Learning rate over the rounds. ``cosine`` lowers it from `learning_rate` in the first round
        towards 0 after the last of ``num-server-rounds``. If a run is resumed for more rounds, the
        new rounds use the rates of the new number of rounds.
    seed : int
        From 0 to 2^63 - 1. Together with site, round and purpose it determines all random numbers
        at a site that do not protect privacy. At a real hospital it does not determine how patients
        are split.
    device : {"auto", "cpu", "cuda"}
        ``auto`` takes a GPU if there is one. A number may follow: ``cuda:1``.
    mixed_precision : bool
        Train in bfloat16 if the device is a GPU; no effect on a CPU.
    channels_last : bool
        Keep the channels of images and weights last if the device is a GPU; no effect on a CPU.
    torch_threads : int
        From 0 to 1024. 0 means 1 in a simulation, in which sites share the machine, and torch's own
        choice at a real hospital.
    personal_epochs : int
        Largest number of passes in which a hospital may fine-tune the last global model for itself;
        from 0 to 10,000. 0 means no fine-tuning.
    num_server_rounds : int
        Number of rounds for which `schedule` is planned; from 0 to 100,000. ``cosine`` needs at
        least 1.
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

    def progress(self, server_round: int) -> float:
        """Return the share of the run's rounds that precede a round; the first round is 1."""
        rounds = max(1, self.num_server_rounds)
        return min(max(0, server_round - 1), rounds - 1) / rounds
