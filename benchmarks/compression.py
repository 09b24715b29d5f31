"""What codes of the replies save and cost: PneumoniaMNIST in five hospitals.

The example's hospitals (Dirichlet(2) shares of the 4,708 training images) train the example's
DenseNet for 20 rounds of 10 local steps under FedAvg, with each ``compression``. Bytes are those of
all training messages and replies of a run, and ``fewer`` is how many times fewer came from the
hospitals than without a code. Figures are areas under the ROC curve of the last model on the 624
official test images, their mean and each seed's. In the last row hospitals forget what the code has
lost. All other settings are in `SETTINGS`.

``FEDMED_DATA=... python benchmarks/compression.py [--seeds 3] [--dataset phantoms]``
``[--rounds 20]``
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
import torch
from documented import without_zero
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid, ServerApp

from fedmed_flower import run_local
from fedmed_flower.server.traffic import saved
from fedmed_flower.strategies import FedAvg

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "pneumonia"
sys.path.insert(0, str(EXAMPLE))
from client_app import PneumoniaHospital  # noqa: E402

SITES = 5
SETTINGS: dict[str, Any] = {
    "alpha": 2.0,
    "local-steps": 10,
    "optimizer": "adam",
    "learning-rate": 0.003,
    "batch-size": 32,
    "device": "cpu",
}


class Case(NamedTuple):
    """A row of the table: its name, the arguments of the strategy, and what sites forget."""

    name: str
    arguments: dict[str, Any]
    forgetful: bool = False


CASES = (
    Case("none", {}),
    Case("int8", {"compression": "int8"}),
    Case("int4", {"compression": "int4"}),
    Case("top-k, 10%", {"compression": "top-k", "top_k_share": 0.1}),
    Case("top-k, 3%", {"compression": "top-k", "top_k_share": 0.03}),
    Case("top-k, 1%", {"compression": "top-k"}),
    Case("top-k, 1%, without error feedback", {"compression": "top-k"}, forgetful=True),
)


class Found(NamedTuple):
    """Of one run: test AUC, bytes from and to all hospitals."""

    auc: float
    from_sites: int
    to_sites: int


def forget(message: Message, context: Context, call: ClientAppCallable) -> Message:
    """Answer as a hospital does that has lost its state."""
    context.state = RecordDict()
    return call(message, context)


def run(case: Case, seed: int, options: argparse.Namespace) -> Found:
    """Train with one code."""
    found: list[Found] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(seed)
        start = ArrayRecord(PneumoniaHospital(context).build_model().state_dict())
        strategy = FedAvg(fraction_evaluate=0.0, **case.arguments)
        model = strategy.start(grid, start, num_rounds=options.rounds).arrays
        if failures := strategy.history.failures:
            raise RuntimeError(f"{failures[0].site}: {failures[0].reason}")
        sent = saved(strategy.history.traffic)
        auc = FedAvg().test(grid, model)["all"]["auc"]
        found.append(Found(auc, sent["from-sites"][0], sent["to-sites"][0]))

    config = {"seed": seed, "dataset": options.dataset, "num-server-rounds": options.rounds}
    app = PneumoniaHospital.client_app([forget] if case.forgetful else [])
    run_local(server, app, SITES, run_config=SETTINGS | config)
    return found[0]


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Train with each code and yield its row."""
    plain = 0.0
    for case in CASES:
        found = [run(case, seed, options) for seed in range(options.seeds)]
        from_sites = statistics.mean(one.from_sites for one in found)
        to_sites = statistics.mean(one.to_sites for one in found)
        plain = plain or from_sites
        yield [
            case.name,
            f"{from_sites / 1e6:.2f}",
            f"{plain / from_sites:.1f}",
            f"{to_sites / 1e6:.2f}",
            without_zero(f"{statistics.mean(one.auc for one in found):.3f}"),
            " ".join(without_zero(f"{one.auc:.3f}") for one in found),
        ]


def main() -> None:
    """Train with each code and print a table, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dataset", default="pneumoniamnist", help="or phantoms")
    documented.add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Each run would log its rounds between the rows of the table.
    logging.disable(logging.CRITICAL)
    began = time.perf_counter()
    head = ("compression", "MB from hospitals", "fewer", "MB to hospitals", "AUC", "each seed")
    documented.show("compression", head, rows(options), options, versions=("torch", "monai"))
    print(f"{(time.perf_counter() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
