"""Time and memory of a run with many sites in one process, and whether each costs the same.

Two kinds of runs. "rounds": a null client that sends the model back with eight figures, by a
strategy with a run folder: exchange, screening, mean, history, checkpoint. "experiment": one round
of `federate` with hospitals that have generated tables of a dozen patients: also roll call,
preparation, test, summary and report. Each run is a process of its own with one thread. Seconds are
the processor's. Those of the clients' own work stand apart from the rest. Peak memory is that
beyond the process before the run.

``python benchmarks/sites.py [--sites 250,500,1000,2000] [--kinds rounds,experiment]``
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[threads] = "1"

import documented  # noqa: E402
import numpy as np  # noqa: E402 The number of threads is read at import.

FIGURES = ("accuracy", "auc", "brier", "loss", "sensitivity", "specificity")
ROUNDS = 4
PATIENTS = 12
HEADS = {
    "rounds": (
        "sites",
        "clients, s a round",
        "the rest, s a round",
        "the rest, ms a site",
        "last round to second",
        "peak memory, MB",
    ),
    "experiment": (
        "sites",
        "clients, s",
        "the rest, s",
        "of it the report, s",
        "the rest, ms a site",
        "report, MB",
        "run folder, MB",
        "peak memory, MB",
    ),
}


class Timed:
    """A client app whose seconds of work are counted.

    Parameters
    ----------
    app : callable
        As Flower calls a ClientApp.
    """

    def __init__(self, app: Callable[[Any, Any], Any]) -> None:
        self.app = app
        self.seconds = 0.0

    def __call__(self, message: Any, context: Any) -> Any:
        """Let the app answer a message."""
        began = time.process_time()
        try:
            return self.app(message, context)
        finally:
            self.seconds += time.process_time() - began


def null_client(message: Any, context: Any) -> Any:
    """Send the model back, with a name and figures."""
    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

    index = int(context.node_config["partition-id"])
    metrics = {"num-examples": 100 + index % 7, "seconds": 0.1}
    metrics |= {name: (index % 97) / 97 + place for place, name in enumerate(FIGURES)}
    content = RecordDict(
        {
            "metrics": MetricRecord(metrics),
            "site": ConfigRecord({"name": f"hospital-{index}", "simulated": True}),
        }
    )
    if message.metadata.message_type == "train":
        content["arrays"] = message.content["arrays"]
    return Message(content, reply_to=message)


def peak() -> int:
    """Return the most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rounds(sites: int, folder: Path) -> dict[str, float]:
    """Train a model of a hundred weights by a strategy alone."""
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp import ServerApp

    from fedmed_flower import run_local
    from fedmed_flower.server.listener import Listener
    from fedmed_flower.strategies import FedAvg

    client = Timed(null_client)

    class Clock(Listener):
        def __init__(self) -> None:
            self.ends = [(time.process_time(), 0.0)]

        def round_ended(self, server_round: int, rows: Any) -> None:
            self.ends.append((time.process_time(), client.seconds))

    clock = Clock()
    server = ServerApp()

    @server.main()
    def main(grid: Any, context: Any) -> None:
        strategy = FedAvg(run_dir=folder, seed=0, listeners=[clock])
        strategy.start(grid, ArrayRecord({"w": Array(np.zeros(100, np.float32))}), ROUNDS)
        if len(strategy.history.rounds_trained()) != sites or strategy.history.failures:
            raise SystemExit(f"a site is lacking: {strategy.history.failures[:1]}")

    before = peak()
    clock.ends = [(time.process_time(), 0.0)]
    run_local(server, client, sites)  # type: ignore[arg-type]
    memory = peak() - before
    spent = [b[0] - a[0] - (b[1] - a[1]) for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    # In the first round sites give their names.
    return {
        "clients": client.seconds / ROUNDS,
        "rest": sum(spent[1:]) / (ROUNDS - 1),
        "growth": spent[-1] / spent[1],
        "memory": memory,
    }


def experiment(sites: int, folder: Path) -> dict[str, float]:
    """Train a linear model on tables, with everything that `federate` does."""
    import torch
    from flwr.serverapp import ServerApp

    from fedmed_flower import Schema, SiteData, TabularClient, federate, run_local
    from fedmed_flower.reports.report import write_report
    from fedmed_flower.settings.text import expand
    from fedmed_flower.strategies import FedAvg

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)

    def patients(count: int, name: str) -> list[dict[str, Any]]:
        ages = rng.uniform(20, 90, count)
        return [
            {"patient": f"{name}-{number}", "age": float(age), "ill": int(number % 2)}
            for number, age in enumerate(ages)
        ]

    tables = [
        [patients(PATIENTS, f"{index}-{split}") for split in range(3)] for index in range(sites)
    ]

    class Hospital(TabularClient):
        schema = Schema(target="ill", task="binary", numeric=("age",), ranges={"age": (0, 100)})

        def load_data(self, site: Any) -> SiteData:
            train, val, test = tables[site.index]
            return SiteData(train=train, val=val, test=test, source="made up", generated=True)

    client = Timed(Hospital.client_app())
    server = ServerApp()

    @server.main()
    def main(grid: Any, context: Any) -> None:
        federate(FedAvg(), grid, context, Hospital(context))

    config = expand(
        {
            "num-server-rounds": 1,
            "run-dir": str(folder),
            "tabular-network": "linear",
            "preparation": "declared",
            "local-steps": 1,
            "batch-size": 8,
            "pictures": 0,
            "mixed-precision": False,
        }
    )
    before = peak()
    began = time.process_time()
    run = run_local(server, client, sites, run_config=config)  # type: ignore[arg-type]
    spent = time.process_time() - began
    memory = peak() - before
    if run.folder is None:
        raise SystemExit("the run left no folder")
    began = time.process_time()
    report = write_report(run.folder)
    size = sum(file.stat().st_size for file in run.folder.rglob("*") if file.is_file())
    return {
        "clients": client.seconds,
        "rest": spent - client.seconds,
        "report": time.process_time() - began,
        "page": report.stat().st_size,
        "folder": size,
        "memory": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", default="250,500,1000,2000")
    parser.add_argument("--kinds", default="rounds,experiment")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    documented.add_options(parser)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    counts = [int(count) for count in given.sites.split(",")]
    if given.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(globals()[given.one](counts[0], Path(folder, "run"))))
        return
    kinds = given.kinds.split(",")
    if "rounds" in kinds:
        documented.show("sites rounds", HEADS["rounds"], round_rows(counts), given)
    if "experiment" in kinds:
        documented.show("sites experiment", HEADS["experiment"], experiment_rows(counts), given)


def measured(kind: str, sites: int) -> dict[str, float]:
    """Return what a run in a process of its own measures."""
    command = [sys.executable, __file__, "--one", kind, "--sites", str(sites)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def round_rows(counts: list[int]) -> Iterator[list[str]]:
    for sites in counts:
        found = measured("rounds", sites)
        yield [
            f"{sites:,}",
            f"{found['clients']:.2f}",
            f"{found['rest']:.2f}",
            f"{1000 * found['rest'] / sites:.2f}",
            f"{found['growth']:.2f}",
            f"{found['memory'] / 1e6:.0f}",
        ]


def experiment_rows(counts: list[int]) -> Iterator[list[str]]:
    for sites in counts:
        found = measured("experiment", sites)
        yield [
            f"{sites:,}",
            f"{found['clients']:.1f}",
            f"{found['rest']:.1f}",
            f"{found['report']:.1f}",
            f"{1000 * found['rest'] / sites:.1f}",
            f"{found['page'] / 1e6:.2f}",
            f"{found['folder'] / 1e6:.1f}",
            f"{found['memory'] / 1e6:.0f}",
        ]


if __name__ == "__main__":
    main()
