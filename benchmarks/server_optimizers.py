"""Server optimisers on a network with batch normalisation: PneumoniaMNIST in five hospitals.

The example's hospitals (Dirichlet(2) shares of the 4,708 training images) train the example's
DenseNet with MONAI's default norm, batch normalisation, for 20 rounds of 10 local steps: under
FedAvg, and under each server optimiser with Flower's defaults and with settings that do as well as
FedAvg. (Flower's default for FedAvgM is no momentum; its first row has .9.) Figures are areas under
the ROC curve of the last model on the 624 official test images, their mean and each seed's, and the
smallest running variance in the last models. All other settings are in `SETTINGS`.

With ``--flower``, Flower's own classes train: they step running statistics as they step weights.

``FEDMED_DATA=... python benchmarks/server_optimizers.py [--seeds 3] [--flower]``
``[--strategies FedAvg FedAvgM FedAdam FedYogi FedAdagrad] [--dataset phantoms]``
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
import torch
from documented import without_zero
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as flower
from monai.networks.nets import DenseNet
from torch import nn

from fedmed_flower import run_local, strategies
from fedmed_flower.strategies import FedAvg

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "pneumonia"
sys.path.insert(0, str(EXAMPLE))
from client_app import PneumoniaHospital  # noqa: E402

SITES, ROUNDS = 5, 20
SETTINGS: dict[str, Any] = {
    "alpha": 2.0,
    "local-steps": 10,
    "optimizer": "adam",
    "learning-rate": 0.003,
    "batch-size": 32,
    "num-server-rounds": ROUNDS,
    "device": "cpu",
}
# Arguments of each strategy; what is not given is Flower's default.
ROWS: tuple[tuple[str, dict[str, float]], ...] = (
    ("FedAvg", {}),
    ("FedAvgM", {"server_momentum": 0.9}),
    ("FedAvgM", {"server_momentum": 0.9, "server_learning_rate": 0.3}),
    ("FedAdam", {}),
    ("FedAdam", {"eta": 0.01}),
    ("FedYogi", {}),
    ("FedAdagrad", {}),
    ("FedAdagrad", {"eta": 0.03}),
)


class Hospital(PneumoniaHospital):
    """The example's hospital with the example's network, but with batch normalisation."""

    def build_model(self) -> nn.Module:
        """Return a DenseNet with MONAI's default norm."""
        return DenseNet(2, 1, 2, init_features=32, growth_rate=16, block_config=(2, 2), bn_size=2)


def run(
    name: str, arguments: dict[str, float], seed: int, dataset: str, flowers: bool
) -> tuple[float, float]:
    """Train with one strategy; return test AUC (NaN if there is none) and least running_var."""
    found: list[tuple[float, float]] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(seed)
        start = ArrayRecord(Hospital(context).build_model().state_dict())
        kind = getattr(flower if flowers else strategies, name)
        strategy = kind(fraction_evaluate=0.0, **arguments)
        model = strategy.start(grid, start, num_rounds=ROUNDS).arrays
        variances = [array for key, array in model.items() if key.endswith("running_var")]
        least = min(float(array.numpy().min()) for array in variances)
        table = FedAvg().test(grid, model)
        found.append((table.get("all", {}).get("auc", math.nan), least))

    config = SETTINGS | {"seed": seed, "dataset": dataset}
    run_local(server, Hospital.client_app(), SITES, run_config=config)
    return found[0]


def row(name: str, arguments: dict[str, float], found: list[tuple[float, float]]) -> list[str]:
    """Return a row of the table."""
    aucs, variances = zip(*found, strict=True)
    given = ", ".join(f"`{key}={value:g}`" for key, value in arguments.items())
    without = sum(map(math.isnan, aucs))
    mean = without_zero(f"{statistics.mean(aucs):.3f}")
    status = f"no figures in {without} of {len(aucs)}" if without else mean
    each = " ".join(without_zero(f"{auc:.3f}") for auc in aucs)
    return [name, given or "defaults", status, each, without_zero(f"{min(variances):.2g}")]


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Train with each strategy and yield its row."""
    for name, arguments in ROWS:
        if name in options.strategies:
            found = [
                run(name, arguments, seed, options.dataset, options.flower)
                for seed in range(options.seeds)
            ]
            yield row(name, arguments, found)


def main() -> None:
    """Train with each strategy and print a table, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(dict.fromkeys(name for name, _ in ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flower", action="store_true", help="train with Flower's own classes")
    parser.add_argument("--strategies", nargs="+", default=names, choices=names)
    parser.add_argument("--dataset", default="pneumoniamnist", help="or phantoms")
    documented.add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Each run would log its rounds and failures between the rows of the table.
    logging.disable(logging.CRITICAL)
    began = time.perf_counter()
    head = ("strategy", "settings", "AUC", "each seed", "smallest `running_var`")
    versions = ("torch", "monai", "flwr")
    if options.flower:
        documented.show("server_optimizers-flower", head, rows(options), options, versions=versions)
    else:
        documented.show("server_optimizers", head, rows(options), options, versions=versions)
    print(f"{(time.perf_counter() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
