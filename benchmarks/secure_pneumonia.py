"""PneumoniaMNIST in five hospitals, with secure sums and without: accuracy.

The example's hospitals (Dirichlet(2) shares of the 4,708 training images) train the small CNN of
``private_pneumonia.py``. Two tables:

- without privacy, from the same seeds: the server sees each hospital's model, or sums alone;
- patient-level epsilon 3 at delta 1e-5, one step a round with a quarter of the patients: each
  hospital adds all of its own noise, or a share of the sum's. Epsilon is the highest that a
  hospital's own ledger has at the end.

Figures are areas under the ROC curve of the final model on the 624 official test images, by the
scores themselves.

``FEDMED_DATA=... python benchmarks/secure_pneumonia.py [--seeds 3]``
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
import numpy as np
import torch
from documented import without_zero
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from private_pneumonia import Hospital
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from fedmed_flower import federate, run_local
from fedmed_flower.data.sources import load_dataset
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.strategies import FedAvg

SITES = 5
SETTINGS: dict[str, Any] = {
    "dataset": "pneumoniamnist",
    "alpha": 2.0,
    "device": "cpu",
    "pictures": 0,
}
PLAIN: dict[str, Any] = {
    "local-epochs": 1,
    "batch-size": 32,
    "optimizer": "adam",
    "learning-rate": 0.003,
}
PRIVATE: dict[str, Any] = {
    "privacy": "patient",
    "target-epsilon": 3.0,
    "delta": 1e-5,
    "private-metrics": False,
    "max-grad-norm": 1.0,
    "sampling-rate": 0.25,
    "local-steps": 1,
    "optimizer": "sgd",
    "batch-size": 235,
    "learning-rate": 1.0,
}
SUM = {"secure": "sum"}
TABLES = ("sums", "shares")


class Found(NamedTuple):
    """Test AUC of a run's model, and the highest epsilon of a ledger."""

    auc: float
    spent: float


def run(job: tuple[dict[str, Any], int]) -> Found:
    """Train with settings and a seed."""
    settings, seed = job
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        config = SETTINGS | settings | {"seed": seed, "run-dir": str(path)}
        server = ServerApp()
        hospitals: list[Hospital] = []
        strategy = FedAvg(fraction_evaluate=0.0)

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            hospitals.append(Hospital(context))
            build = hospitals[0].build_model
            federate(strategy, grid, context, lambda: build(), sections=Hospital.sections)

        run_local(server, Hospital.client_app(), SITES, run_config=config)
        auc = auc_of(hospitals[0], path / "model.safetensors")
        ledgers = (path / "ledgers").glob("*.sqlite")
        spent = max((Ledger(each, read_only=True).most(1e-5) for each in ledgers), default=0.0)
    if strategy.history.failures:
        raise RuntimeError(f"replies are missing: {strategy.history.failures[0]}")
    return Found(auc, spent)


def auc_of(hospital: Hospital, model: Path) -> float:
    """Return the area under the ROC curve of a model on the official test images."""
    images = load_dataset("pneumoniamnist")
    network = hospital.build_model()
    network.load_state_dict(load_file(model))
    network.eval()
    # As the hospitals' transform has them: from -1 to 1.
    pixels = torch.from_numpy(np.array(images.images["test"], np.float32))[:, None] / 127.5 - 1
    with torch.no_grad():
        scores = network(pixels).softmax(1)[:, 1]
    return float(roc_auc_score(images.labels["test"], scores))


def figures(options: argparse.Namespace, settings: dict[str, Any]) -> list[Found]:
    """Return what each seed gives."""
    jobs = [(settings, seed) for seed in range(options.seeds)]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        return pool.map(run, jobs, chunksize=1)


def aucs_in_words(found: Sequence[Found]) -> list[str]:
    """Return the mean, and each seed's."""
    aucs = [each.auc for each in found]
    mean, *each = (without_zero(f"{auc:.4f}") for auc in (statistics.mean(aucs), *aucs))
    return [mean, " ".join(each)]


def rows_sums(options: argparse.Namespace) -> Iterator[list[str]]:
    """Yield a row without sums, and one with them."""
    settings = PLAIN | {"num-server-rounds": options.rounds}
    plain = figures(options, settings)
    yield ["each hospital's model", *aucs_in_words(plain), ""]
    sums = figures(options, settings | SUM)
    largest = max(abs(one.auc - other.auc) for one, other in zip(plain, sums, strict=True))
    yield ["sums alone", *aucs_in_words(sums), without_zero(f"{largest:.5f}")]


def rows_shares(options: argparse.Namespace) -> Iterator[list[str]]:
    """Yield a row with each hospital's own noise, and one with shares."""
    settings = PRIVATE | {"num-server-rounds": options.steps}
    for name, more in (("all of its own noise", {}), ("a share of the sum's", SUM)):
        found = figures(options, settings | more)
        spent = max(each.spent for each in found)
        yield [name, f"{spent:.3f}", *aucs_in_words(found)]


def main() -> None:
    """Print the tables, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4, help="of a run without privacy")
    parser.add_argument("--steps", type=int, default=12, help="rounds of one step, with privacy")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    documented.add_options(parser)
    options = parser.parse_args()
    auc = ("AUC, mean", "each seed")
    if "sums" in options.tables:
        head = ("the server sees", *auc, "largest difference")
        documented.show("secure-pneumonia", head, rows_sums(options), options)
    if "shares" in options.tables:
        head = ("each hospital adds", "most in a ledger", *auc)
        documented.show("secure-pneumonia-shares", head, rows_shares(options), options)


if __name__ == "__main__":
    main()
