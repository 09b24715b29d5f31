"""What privacy for each patient costs in accuracy: PneumoniaMNIST in five hospitals.

The example's hospitals (Dirichlet(2) shares of the 4,708 training images) train a small CNN with
GroupNorm for 40 rounds of 8 local steps, a quarter of the patients a step, without privacy and with
patient-level epsilon 8, 3 and 1 at delta 1e-5. Figures are areas under the ROC curve of the
federated model on the 624 official test images; epsilon is the highest that a hospital's own ledger
has at the end. The settings are the same in every row and seed; all are in `SETTINGS`.

``FEDMED_DATA=... python benchmarks/private_pneumonia.py [--seeds 3] [--epsilons 0 8 3 1]``
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from monai.transforms import ScaleIntensityRanged
from torch import nn

from fedmed_flower import federate, run_local
from fedmed_flower.clients.imaging import LoadRow
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.strategies import FedAvg

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "pneumonia"
sys.path.insert(0, str(EXAMPLE))
from client_app import PneumoniaHospital  # noqa: E402

SETTINGS: dict[str, Any] = {
    "dataset": "pneumoniamnist",
    "alpha": 2.0,
    "num-server-rounds": 40,
    "local-epochs": 2,
    "sampling-rate": 0.25,
    "optimizer": "adam",
    "learning-rate": 0.006,
    "max-grad-norm": 1.0,
    "delta": 1e-5,
    "device": "cpu",
}


class Hospital(PneumoniaHospital):
    """The example's hospital with a small CNN, and no augmentation."""

    def build_model(self) -> nn.Module:
        """Return three convolutions with GroupNorm."""
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64), (64, 64)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                nn.GroupNorm(4, outputs),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 2))

    def transforms(self, train: bool) -> list[Any]:
        """Scale pixels to -1 to 1."""
        return [LoadRow(2), ScaleIntensityRanged("image", 0, 255, -1, 1)]

    def augment(self, images: torch.Tensor) -> torch.Tensor:
        """Leave the images as they are."""
        return images


def run(job: tuple[float, int]) -> tuple[float, float, float]:
    """Return test AUC, the highest epsilon of a ledger, and seconds."""
    epsilon, seed = job
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        config = SETTINGS | {"seed": seed, "run-dir": f"{folder}/run"}
        if epsilon:
            config |= {"privacy": "patient", "target-epsilon": epsilon, "private-metrics": False}
        else:
            # As many gradients: a step for every 32 patients instead of a quarter of them.
            config |= {"batch-size": 32, "learning-rate": 0.003}
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            federate(FedAvg(), grid, context, Hospital(context).build_model)

        began = time.perf_counter()
        run_local(server, Hospital.client_app(), 5, run_config=config)
        seconds = time.perf_counter() - began
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        ledgers = Path(folder, "run", "ledgers").glob("*.sqlite")
        spent = max((Ledger(path, read_only=True).most(1e-5) for path in ledgers), default=0.0)
    return summary["test"]["federated"]["auc"], spent, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.0, 8.0, 3.0, 1.0])
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    documented.add_options(parser)
    options = parser.parse_args()
    jobs = [(epsilon, seed) for epsilon in options.epsilons for seed in range(options.seeds)]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        found = dict(zip(jobs, pool.map(run, jobs, chunksize=1), strict=True))
    rows = []
    for epsilon in options.epsilons:
        aucs, spent, seconds = zip(
            *(found[epsilon, seed] for seed in range(options.seeds)), strict=True
        )
        mean, *each = (
            documented.without_zero(f"{auc:.3f}") for auc in (statistics.mean(aucs), *aucs)
        )
        name = f"{epsilon:g}" if epsilon else "no privacy"
        rows.append([name, f"{max(spent):.3f}" if epsilon else "", mean, " ".join(each)])
        print(f"epsilon {name}: {statistics.mean(seconds):.0f} s a run")
    head = ("epsilon per patient, at each hospital", "most in a ledger", "AUC, mean", "each seed")
    print()
    documented.show("private_pneumonia", head, rows, options)


if __name__ == "__main__":
    main()
