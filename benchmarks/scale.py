"""Time and memory of large tables, next to pandas and a plain loop of torch in the same run.

Five hospitals have generated tables of a million rows by 30 columns together: a patient, 20 numbers
(a quarter of them measured to one decimal, whole, to three decimals, and in full precision; a third
of the columns with one in twenty missing), 8 categories and a target. Each stage runs in a process
of its own with one thread. Prints CPU seconds, their ratio to the peer's, and the peak memory
beyond that of the process before, as a multiple of the table as float64. Statistics are asked and
answered as by ``fedmed statistics``, in a simulation.

``python benchmarks/scale.py [--rows 1000000] [--stage read,statistics,epoch]``
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

HOSPITALS = 5
COLUMNS = 30
NUMBERS = tuple(f"lab{number}" for number in range(20))
CATEGORIES = tuple(f"group{number}" for number in range(8))
RANGES = dict(zip(NUMBERS, [(0, 250), (0, 110), (0, 60), (-6, 6)] * 5, strict=True))
BATCH = 1024
STAGES = ("read", "statistics", "epoch")
HEAD = ("", "CPU seconds", "next to", "ratio", "peak memory, in tables")


def write_tables(folder: Path, rows: int) -> None:
    """Write the table of each hospital as CSV."""
    import pandas as pd

    for hospital in range(HOSPITALS):
        rng = np.random.default_rng(hospital)
        count = rows // HOSPITALS
        columns: dict[str, Any] = {"patient": [f"p{hospital}-{n}" for n in range(count)]}
        for number, name in enumerate(NUMBERS):
            if number % 4 == 0:
                values = rng.normal(120, 20, count).round(1)
            elif number % 4 == 1:
                values = rng.integers(18, 95, count).astype(float)
            elif number % 4 == 2:
                values = rng.lognormal(1, 0.6, count).round(3)
            else:
                values = rng.normal(size=count)
            columns[name] = np.where(rng.random(count) < 0.05 * (number % 3 == 0), np.nan, values)
        for number, name in enumerate(CATEGORIES):
            columns[name] = rng.choice([*"abcde"][: 2 + number % 4], count)
        columns["died"] = rng.integers(0, 2, count)
        pd.DataFrame(columns).to_csv(folder / f"{hospital}.csv", index=False)


def schema() -> Any:
    from fedmed_flower import Schema

    categories = {name: tuple("abcde"[: 2 + n % 4]) for n, name in enumerate(CATEGORIES)}
    return Schema(
        target="died",
        task="binary",
        numeric=NUMBERS,
        categorical=CATEGORIES,
        ranges=RANGES,
        categories=categories,
    )


def peak() -> int:
    """Return the most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def read(files: list[Path]) -> dict[str, float]:
    """Read all tables, of which all stay in memory."""
    import pandas as pd

    from fedmed_flower.data import read_table

    declared = schema()
    before = peak()
    tables: list[Any] = []
    ours = seconds(lambda: tables.extend(read_table(file, declared) for file in files))
    memory = peak() - before
    theirs = seconds(lambda: [pd.read_csv(file) for file in files])
    return {"seconds": ours, "peer": theirs, "memory": memory}


def statistics(files: list[Path]) -> dict[str, float]:
    """Ask for counts, means, histograms and correlations, and for counts and means alone."""
    from flwr.serverapp import ServerApp

    from fedmed_flower import SiteData, TabularClient, run_local
    from fedmed_flower.data import read_table
    from fedmed_flower.statistics.request import Request
    from fedmed_flower.statistics.server import ask

    def seconds_of(tables: list[Any], kinds: tuple[str, ...]) -> float:
        class Hospital(TabularClient):
            def load_data(self, site: Any) -> SiteData:
                return SiteData(tables[site.index])

        Hospital.schema = schema()
        server = ServerApp()
        with tempfile.TemporaryDirectory() as folder:

            @server.main()
            def main(grid: Any, context: Any) -> None:
                answer = ask(grid, Request(kinds=kinds), 3600, {"ledger-dir": folder})
                pooled = answer.overall()
                if len(answer.sites) != HOSPITALS or len(pooled["numeric"]) != len(NUMBERS):
                    raise SystemExit(f"an answer is lacking: {answer.failures}")

            return seconds(lambda: run_local(server, Hospital.client_app(), HOSPITALS))

    few = ("moments", "tables")
    all_kinds = (*few, "histograms", "correlations")
    with tempfile.TemporaryDirectory() as small:
        # What is imported, and the memory for it, does not depend on the table.
        write_tables(Path(small), 1000 * HOSPITALS)
        tables = [read_table(Path(small) / file.name, schema()).rows for file in files]
        seconds_of(tables, all_kinds)
    before = peak()
    tables = [read_table(file, schema()).rows for file in files]
    found = {"few": seconds_of(tables, few), "seconds": seconds_of(tables, all_kinds)}
    return found | {"memory": peak() - before}


def epoch(files: list[Path]) -> dict[str, float]:
    """Train a linear network for one epoch on all tables."""
    import torch
    from flwr.app import Context, RecordDict
    from torch import nn

    from fedmed_flower import SiteData, TabularClient
    from fedmed_flower.data import read_table
    from fedmed_flower.data.rows import Rows
    from fedmed_flower.data.site import simulation
    from fedmed_flower.models.device import make_optimizer

    torch.set_num_threads(1)
    tables = [read_table(file, schema()).rows for file in files]
    columns = {
        name: np.concatenate([table.column(name) for table in tables]) for name in tables[0].names
    }

    class Hospital(TabularClient):
        def load_data(self, site: Any) -> SiteData:
            return SiteData(Rows(columns))

    Hospital.schema = schema()
    config = {"batch-size": BATCH, "preparation": "declared", "tabular-network": "linear"}
    node = {"partition-id": 0, "num-partitions": 1}
    with simulation():
        client = Hospital(Context(1, 1, node, RecordDict(), {**config, "local-epochs": 1}))
        _, prepared = client.prepared("train", False)
        features = prepared.inputs["features"]
        target = prepared.inputs["target"].float()

        def plain() -> None:
            model = nn.Linear(features.shape[1], 1)
            optimizer = make_optimizer(client.settings, model)
            total = 0.0
            for indices in torch.randperm(len(features)).split(BATCH):
                optimizer.zero_grad()
                outputs = model(features[indices])[:, 0]
                loss = nn.functional.binary_cross_entropy_with_logits(outputs, target[indices])
                loss.backward()
                optimizer.step()
                total += loss.item() * len(indices)

        def ours() -> None:
            client.fit(client.build_model(), prepared, 0)

        plain()
        ours()
        pairs = [(seconds(ours), seconds(plain)) for _ in range(3)]
        return {"seconds": min(one for one, _ in pairs), "peer": min(two for _, two in pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--stage", default=",".join(STAGES))
    parser.add_argument("--files", help=argparse.SUPPRESS)
    documented.add_options(parser)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    if given.files:
        files = [Path(given.files) / f"{hospital}.csv" for hospital in range(HOSPITALS)]
        print(json.dumps(globals()[given.stage](files)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder), given.rows)
        found = {}
        for stage in given.stage.split(","):
            command = [sys.executable, __file__, "--stage", stage, "--files", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[stage] = json.loads(done.stdout.splitlines()[-1])
    rows = rows_of(found, given.rows * COLUMNS * 8)
    documented.show("scale", HEAD, rows, given, versions=("pandas", "torch"))


def rows_of(found: dict[str, dict[str, float]], size: int) -> Iterator[list[str]]:
    """Yield the rows of the table; `size` is that of all tables together, in bytes."""

    def row(what: str, spent: float, peer: str, other: float = 0, memory: float = 0) -> list[str]:
        ratio = f"{spent / other:.1f}" if other else ""
        beside = f"{peer} {other:.1f}" if other else ""
        return [what, f"{spent:.1f}", beside, ratio, f"{memory / size:.1f}" if memory else ""]

    if one := found.get("read"):
        yield row(
            "reading CSV, by `read_table`",
            *(one["seconds"], "`pandas.read_csv`", one["peer"], one["memory"]),
        )
    if one := found.get("statistics"):
        yield row("counts and means of all columns", one["few"], "")
        what = "the same with histograms and 190 correlations"
        yield row(what, one["seconds"], "", memory=one["memory"])
    if one := found.get("epoch"):
        what = "an epoch of the linear network, batches of 1,024"
        yield row(what, one["seconds"], "a plain loop of torch", one["peer"])


if __name__ == "__main__":
    main()
