"""Seconds a round of the pneumonia example with one worker and with several, in turns.

    FEDMED_DATA=... python benchmarks/workers.py [--pairs 3] [--sites 4] [--rounds 4] [--write]

Each run is the command `fedmed run` in a process of its own, with one torch thread. A round's
seconds are those that the run's log gives, from the second round on: the first one also loads data
and modules. The CPU seconds are those of all processes of the command. All models must be equal to
the bit.
"""

import argparse
import hashlib
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import documented

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "pneumonia"
START = "from fedmed_flower.cli.main import main; main()"
ROUND = re.compile(r" round (\d+)/\d+  .*  ([\d.]+) s$", re.MULTILINE)
HEAD = ("workers", "seconds a round", "ratio", "whole command, s", "CPU s", "same model")


class Run(NamedTuple):
    """What one run took, and the digest of its model."""

    rounds: list[float]
    whole: float
    cpu: float
    model: str


def run(workers: int, options: argparse.Namespace) -> Run:
    """Run the example with so many workers."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        command = [sys.executable, "-c", START, "run", str(EXAMPLE)]
        command += ["--workers", str(workers), "--sites", str(options.sites), "--out", str(folder)]
        command += ["--rounds", str(options.rounds), "-c", "seed=1", "-c", "device=cpu"]
        command += ["-c", "pictures=0"]
        if options.generated:
            command += ["-c", "dataset=phantoms"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        whole = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise SystemExit(done.stdout[-1000:] + done.stderr[-3000:])
        seconds = {int(r): float(s) for r, s in ROUND.findall((folder / "log.txt").read_text())}
        model = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run([s for r, s in seconds.items() if r > 1], whole, cpu, model)


def median(values: Sequence[float]) -> str:
    """Return the median with the range, in words."""
    text = f"{statistics.median(values):.2f}"
    if len(values) > 1:
        text += f" ({min(values):.2f} to {max(values):.2f})"
    return documented.without_zero(text)


def rows(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Run in turns and yield a row for each number of workers."""
    found: dict[int, list[Run]] = {count: [] for count in options.workers}
    for number in range(options.pairs):
        # Which of them goes first changes from turn to turn.
        order = options.workers if number % 2 else options.workers[::-1]
        for count in order:
            found[count].append(run(count, options))
    first = found[options.workers[0]]
    for count, runs in found.items():
        rounds = [seconds for one in runs for seconds in one.rounds]
        ratios = [
            sum(one.rounds) / sum(other.rounds) for one, other in zip(runs, first, strict=True)
        ]
        models = {one.model for one in (*runs, *first)}
        yield (
            str(count),
            median(rounds),
            "" if runs is first else median(ratios),
            median([one.whole for one in runs]),
            median([one.cpu for one in runs]),
            "yes" if len(models) == 1 else "NO",
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--generated", action="store_true", help="generated images: no FEDMED_DATA")
    documented.add_options(parser)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    documented.show("workers", HEAD, rows(options), options, threads=1)


if __name__ == "__main__":
    main()
