"""Settings by which a site trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmed_flower.settings.allowed import Matching, OneOf, Within
from fedmed_flower.settings.plan import Plan
from fedmed_flower.settings.section import MOST_ROUNDS, Section, also, setting
from fedmed_flower.settings.text import setting_error


@dataclass(frozen=True)
class Settings(Section):
    """How a site trains."""

    local_epochs: int = setting(
        1, "Passes over the site's training rows in a round.", Within(1, 10_000), "passes"
    )
    local_steps: int = setting(
        0,
        "Batches in a round, whatever number of rows a site has. 0: local-epochs counts instead.",
        Within(0, 10**6),
        "batches",
    )
    fewest_steps: int = setting(
        -1,
        "Fewest batches in a round without privacy: a site whose passes have fewer goes over its "
        "rows again. 0: none. -1: 16 for masks, otherwise none.",
        Within(-1, 10**6),
        "batches",
    )
    batch_size: int = setting(32, "Rows in a step.", Within(1, 10**6), "rows")
    learning_rate: float = setting(1e-3, "Learning rate of the optimizer.", Within(0.0, above=True))
    weight_decay: float = setting(0.0, "Penalty on the weights. 0: none.", Within(0.0))
    optimizer: str = setting("adam", "Each round starts with a new one.", OneOf(("adam", "sgd")))
    momentum: float = setting(0.0, "Momentum of sgd.", Within(0.0, 1.0, below=True))
    schedule: str = setting(
        "constant",
        "Learning rate over the rounds. cosine lowers it from learning-rate in the first round "
        "towards 0 after the last of num-server-rounds. If a run is resumed for more rounds, the "
        "new rounds use the rates of the new number of rounds.",
        OneOf(("constant", "cosine")),
    )
    seed: int = also(Plan, "seed")
    device: str = setting(
        "auto",
        "Where to compute. auto takes a GPU if there is one.",
        Matching(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:NUMBER", ("gpu", "", "cuda:")),
    )
    mixed_precision: bool = setting(True, "bfloat16 on a GPU. No effect on a CPU.")
    channels_last: bool = setting(
        True, "Keep images and weights with their channels last on a GPU. No effect on a CPU."
    )
    torch_threads: int = setting(
        0,
        "Threads of torch. 0: 1 in a simulation, in which sites share the machine, and torch's own "
        "choice at a real hospital.",
        Within(0, 1024),
        "threads",
    )
    personal_epochs: int = also(Plan, "personal_epochs")
    num_server_rounds: int = setting(
        0,
        "How many rounds schedule is planned for.",
        Within(1, MOST_ROUNDS, or_zero=True),
        "rounds",
    )

    def check(self) -> None:
        """Refuse a schedule of an unknown number of rounds."""
        if self.schedule == "cosine" and not self.num_server_rounds:
            raise setting_error(
                "schedule=cosine needs num-server-rounds in the run config", "schedule"
            )

    def progress(self, server_round: int) -> float:
        """Return the share of the run's rounds that precede a round; the first round is 1."""
        rounds = max(1, self.num_server_rounds)
        return min(max(0, server_round - 1), rounds - 1) / rounds

    def rate_at(self, progress: float) -> float:
        """Return the learning rate of a round by ``learning-rate`` and ``schedule``.

        Parameters
        ----------
        progress : float
            Share of the run's rounds that are done; in [0, 1).
        """
        if self.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate
