"""Asynchronous rounds beside synchronous ones, by the virtual clock: PneumoniaMNIST.

The example's five hospitals, the last of which is five times slower than the others, train the
example's network with 10 local steps a message. Synchronously they train for 20 rounds, which is
until 100 virtual seconds; with a buffer until the AUC that the synchronous run has after its last
round is reached, but at least until half of its time and at most until all of it. AUC is that of
all hospitals' test images together, after each round.

Then twenty hospitals, of which one never replies, train for ten rounds.

``FEDMED_DATA=... python benchmarks/asynchronous.py [--seeds 1] [--buffers 2 3]``
``[--rounds 20] [--dataset phantoms]``
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
import torch
from documented import without_zero
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedmed_flower import run_local
from fedmed_flower.metrics.names import VIRTUAL_SECONDS
from fedmed_flower.strategies import FedAvg

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "pneumonia"
sys.path.insert(0, str(EXAMPLE))
from client_app import PneumoniaHospital  # noqa: E402

SPEEDS = (1.0, 1.0, 1.0, 1.0, 0.2)
# The last site would reply after eleven days.
MANY_SPEEDS = (*[1.0] * 19, 1e-6)
MANY_BUFFER, MANY_ROUNDS = 10, 10
SETTINGS: dict[str, Any] = {
    "alpha": 2.0,
    "local-steps": 10,
    "optimizer": "adam",
    "learning-rate": 0.003,
    "batch-size": 32,
    "device": "cpu",
}


@dataclass
class Curve:
    """AUC after each round, beside the virtual time; and what failed."""

    seconds: list[float] = field(default_factory=list)
    aucs: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def at(self, seconds: float) -> float:
        """Return the AUC of the last round that had ended by a time; NaN if none had."""
        ended = [auc for time, auc in zip(self.seconds, self.aucs, strict=True) if time <= seconds]
        return ended[-1] if ended else math.nan

    def reached(self, auc: float) -> float:
        """Return when an AUC was first reached; infinite if it was not."""
        pairs = zip(self.seconds, self.aucs, strict=True)
        return next((time for time, found in pairs if found >= auc), math.inf)


class Until(FedAvg):
    """Ends when an AUC was reached, but not before `least` and not after `most` virtual seconds."""

    def __init__(self, curve: Curve, auc: float, least: float, most: float, **kwargs: Any) -> None:
        super().__init__(fraction_evaluate=0.0, **kwargs)
        self.curve = curve
        self.auc = auc
        self.least = least
        self.most = most

    def stop_reason(self) -> str | None:
        """Return why the run ends."""
        now = self.curve.seconds[-1] if self.curve.seconds else 0.0
        done = now >= self.least and self.curve.reached(self.auc) < math.inf
        return "there is enough to see" if done or now >= self.most else None


def run(
    speeds: Sequence[float],
    rounds: int,
    seed: int,
    dataset: str,
    buffer: int = 0,
    auc: float = math.inf,
    least: float = math.inf,
    most: float = math.inf,
) -> Curve:
    """Train, and return the curve."""
    curve = Curve()
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(seed)
        start = ArrayRecord(PneumoniaHospital(context).build_model().state_dict())

        def measure(server_round: int, model: ArrayRecord) -> None:
            if server_round:
                table = FedAvg().test(grid, model)
                curve.aucs.append(table.get("all", {}).get("auc", math.nan))
                rows = strategy.history.rows
                curve.seconds.append(next(r[4] for r in rows[::-1] if r[3] == VIRTUAL_SECONDS))

        strategy = Until(curve, auc, least, most, buffer=buffer, seed=seed)
        strategy.start(grid, start, rounds, evaluate_fn=measure)
        curve.failures = [
            f"{failure.site}: {failure.reason}" for failure in strategy.history.failures
        ]

    config = SETTINGS | {"seed": seed, "dataset": dataset, "num-server-rounds": rounds}
    app = PneumoniaHospital.client_app()
    run_local(server, app, len(speeds), run_config=config, virtual_speeds=speeds)
    return curve


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Train synchronously and with each buffer, and yield the rows."""
    seeds = range(options.seeds)
    whole = [run(SPEEDS, options.rounds, seed, options.dataset) for seed in seeds]
    ends = [curve.seconds[-1] for curve in whole]
    aucs = [curve.aucs[-1] for curve in whole]
    yield row("synchronous", whole, ends, ends, aucs)
    for buffer in options.buffers:
        curves = [
            run(SPEEDS, 1000, seed, options.dataset, buffer, aucs[seed], ends[seed] / 2, ends[seed])
            for seed in seeds
        ]
        times = [curve.reached(auc) for curve, auc in zip(curves, aucs, strict=True)]
        yield row(f"`buffer={buffer}`", curves, times, ends, aucs)


def row(
    name: str,
    curves: list[Curve],
    times: list[float],
    ends: list[float],
    aucs: list[float],
) -> list[str]:
    """Return a row: name, AUC at a quarter and at half of the time, when the last AUC was reached.

    The time of the synchronous run is that of its last round, even if it had its AUC before.
    """
    quarters = [curve.at(end / 4) for curve, end in zip(curves, ends, strict=True)]
    halves = [curve.at(end / 2) for curve, end in zip(curves, ends, strict=True)]
    reached = " ".join(f"{time:.0f}" if time < math.inf else "not" for time in times)
    shares = [time / end for time, end in zip(times, ends, strict=True)]
    worst = max(shares)
    share = without_zero(f"{worst:.2f}") if worst < math.inf else "not reached"
    return [name, each(quarters), each(halves), each(aucs), reached, share]


def each(values: list[float]) -> str:
    """Return AUCs beside each other."""
    return " ".join(without_zero(f"{value:.3f}") for value in values)


def many_rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Train twenty sites of which one never replies, and yield a row for each seed."""
    for seed in range(options.seeds):
        curve = run(MANY_SPEEDS, MANY_ROUNDS, seed, options.dataset, MANY_BUFFER)
        failures = "; ".join(dict.fromkeys(curve.failures))
        yield [
            f"{seed}",
            f"{len(curve.aucs)}",
            f"{curve.seconds[-1]:.0f}",
            each(curve.aucs[-1:]),
            f"{len(curve.failures)} ({failures})",
        ]


def main() -> None:
    """Print both tables, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--buffers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rounds", type=int, default=20, help="of the synchronous run")
    parser.add_argument("--dataset", default="pneumoniamnist", help="or phantoms")
    documented.add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Each run would log its rounds and failures between the rows of the table.
    logging.disable(logging.CRITICAL)
    began = time.perf_counter()
    versions = ("torch", "monai", "flwr")
    head = (
        "rounds",
        "AUC at a quarter of the time",
        "at half",
        "AUC to be reached",
        "reached after (virtual seconds)",
        "share of the time, worst seed",
    )
    documented.show("asynchronous", head, rows(options), options, versions=versions)
    head = ("seed", "rounds", "virtual seconds", "AUC", "recorded as failed")
    documented.show("asynchronous-silent", head, many_rows(options), options, versions=versions)
    print(f"{(time.perf_counter() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
