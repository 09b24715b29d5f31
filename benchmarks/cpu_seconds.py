"""CPU seconds of two states of the code, in turns, with the range.

    git worktree add /tmp/before COMMIT
    python benchmarks/cpu_seconds.py --checkout /tmp/before . [--pairs 9] [--jobs rules example]

``rules`` are rounds of 20 sites that compute nothing, under each rule; ``example`` is the run of
`simulation.py`: the pneumonia example with 5 sites, run folder and checkpoints, for 5 rounds. Each
process has the code of one checkout and one thread, and counts its CPU seconds without imports.
Prints, for each, the median of both and of their ratio pair by pair, with the range.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import simulation

RULES = ("FedAvg", "FedMedian", "Krum", "FedAdam")
SITES, ROUNDS, SIZE, MANY, SMALL = 20, 15, 1_000_000, 120, 1000
JOBS = ("rules", "example")


def seconds_of(rule: str, sites: int, rounds: int, size: int) -> float:
    """Run rounds in this process and return the CPU seconds that they took."""
    import numpy as np
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    from fedmed_flower import run_local, strategies

    client, server = ClientApp(), ServerApp()
    rng = np.random.default_rng(0)
    sent = [Array(rng.normal(size=size).astype(np.float32)) for _ in range(sites)]

    @client.train()
    def _(message: Message, context: object) -> Message:
        number = int(context.node_config["partition-id"])  # type: ignore[attr-defined]
        metrics = MetricRecord({"num-examples": 10 + number, "loss": 1.0})
        content = RecordDict({"arrays": ArrayRecord({"w": sent[number]}), "metrics": metrics})
        return Message(content, reply_to=message)

    @server.main()
    def _(grid: object, context: object) -> None:
        strategy = getattr(strategies, rule)(fraction_evaluate=0.0)
        initial = ArrayRecord({"w": Array(np.zeros(size, np.float32))})
        strategy.start(grid, initial, num_rounds=rounds)

    run_local(server, client, sites)
    began = time.process_time()
    run_local(server, client, sites)
    return time.process_time() - began


def seconds_of_example(rounds: int) -> float:
    """Train the pneumonia example in this process and return the CPU seconds of that."""
    sys.path.insert(0, str(simulation.EXAMPLE))
    with tempfile.TemporaryDirectory() as folder:
        simulation.federated(simulation.example_config(1), 5, f"{folder}/warm-up")
        began = time.process_time()
        simulation.federated(simulation.example_config(rounds), 5, f"{folder}/run")
        return time.process_time() - began


def child(jobs: list[str]) -> None:
    """Print where the code comes from, and the seconds of each job."""
    import logging

    import fedmed_flower

    logging.disable(logging.WARNING)
    found = {}
    if "rules" in jobs:
        found |= {rule: seconds_of(rule, SITES, ROUNDS, SIZE) for rule in RULES}
        found[f"FedAvg, {MANY} sites"] = seconds_of("FedAvg", MANY, 10, SMALL)
    if "example" in jobs:
        found["pneumonia example"] = seconds_of_example(5)
    package = Path(fedmed_flower.__file__).resolve().parent
    print(json.dumps({"checkout": str(package.parent), "seconds": found}))


def measure(checkout: Path, jobs: list[str]) -> dict[str, float]:
    """Run a process with a checkout's code."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    command = [sys.executable, __file__, "--child", "--jobs", *jobs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    if found["checkout"] != str(checkout):
        raise SystemExit(f"fedmed_flower was loaded from {found['checkout']}, not from {checkout}")
    seconds: dict[str, float] = found["seconds"]
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", nargs=2, type=Path)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.jobs)
        return
    if not arguments.checkout:
        parser.error("--checkout BEFORE AFTER must be given")
    before, after = (path.resolve() for path in arguments.checkout)
    pairs = []
    for number in range(arguments.pairs):
        # Which of the two goes first changes from pair to pair.
        order = (before, after) if number % 2 else (after, before)
        found = {path: measure(path, arguments.jobs) for path in order}
        pairs.append((found[before], found[after]))
    print(f"{'CPU seconds':<20}  before   after   ratio  (range of {len(pairs)} pairs)")
    for name in pairs[0][0]:
        ratios = [new[name] / old[name] for old, new in pairs]
        medians = [statistics.median(pair[k][name] for pair in pairs) for k in (0, 1)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        ratio = statistics.median(ratios)
        print(f"{name:<20} {medians[0]:7.3f} {medians[1]:7.3f} {ratio:7.3f}  ({spread})")


if __name__ == "__main__":
    main()
