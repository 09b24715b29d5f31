"""Five hospitals outline the hippocampus: federated, alone, pooled, and with patients' privacy.

The example app on the 260 volumes of the Medical Segmentation Decathlon's Task04, one fifth of each
hospital's patients held out. Each part is a whole ``fedmed run`` in a process of its own; two at a
time, with one torch thread each.

``FEDMED_DATA=... python benchmarks/hippocampus.py [--seeds 1] [--rounds 36] [--epsilon 8]``
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import documented

START = "from fedmed_flower.cli.main import main; main()"
APP = Path(__file__).resolve().parent.parent / "examples" / "hippocampus"
FIGURES = {
    "dice-anterior": "Dice anterior",
    "dice-posterior": "Dice posterior",
    "hd95": "HD95 (mm)",
    "surface-dice": "surface Dice at 1 mm",
    "dice-worst": "worst patient",
}
PARTS = {
    "federated": [],
    "alone and pooled": ["baselines=true"],
    # Few patients: a small network, every gradient clipped, all patients in each of few steps.
    "private": [
        *("privacy=patient", "private-metrics=false", "sampling-rate=1.0"),
        *("num-server-rounds=12", "local-epochs=3"),
        *("optimizer=sgd", "learning-rate=4.0", "max-grad-norm=0.05"),
        "network-args={spatial_dims = 3, in_channels = 1, out_channels = 3, num_res_units = 1, "
        'channels = [8, 16, 32], strides = [2, 2], norm = "instance"}',
    ],
}


def run(folder, name, seed, rounds, epsilon):
    """Run the app once and return its summary, and how many seconds the whole command took."""
    out = Path(folder) / f"{name}-{seed}".replace(" ", "-")
    settings = [f"num-server-rounds={rounds}", f"seed={seed}", "pictures=0", *PARTS[name]]
    settings.append(f"target-epsilon={epsilon}")
    command = [sys.executable, "-c", START, "run", str(APP), "--out", str(out)]
    command += [part for setting in settings for part in ("-c", setting)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-2000:]}")
    return json.loads((out / "summary.json").read_text()), time.perf_counter() - began


def mean(parts):
    return {name: sum(part[name] for part in parts) / len(parts) for name in FIGURES}


def row(seed, name, figures, seconds=None):
    cells = [documented.without_zero(f"{figures[figure]:.3f}") for figure in FIGURES]
    return [str(seed), name, *cells, "" if seconds is None else f"{seconds / 60:.1f}"]


def seed_rows(seed, found):
    """Yield the rows of one seed."""
    summary, seconds = found["federated"]
    test = summary["test"]
    yield row(seed, "federated, all test patients", test["federated"], seconds)
    yield row(seed, "federated, mean over hospitals", mean(list(test["sites"].values())))
    summary, seconds = found["alone and pooled"]
    test = summary["test"]
    local = list(test["local"].values())
    alone = mean([part["all"] for part in local])
    yield row(seed, "each hospital alone, all test patients (mean)", alone)
    yield row(seed, "each hospital alone, its own test patients", mean(local))
    yield row(seed, "all data pooled, all test patients", test["pooled"], seconds)
    summary, seconds = found["private"]
    sites = summary["privacy"]["patient"]["sites"]
    most = max(site["epsilon"] for site in sites.values())
    name = f"private, epsilon {most:.2f} a patient, all test patients"
    yield row(seed, name, summary["test"]["federated"], seconds)


def rows(options):
    """Yield the rows of each seed."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for seed in range(options.seeds):
            tasks = {
                name: pool.submit(run, folder, name, seed, options.rounds, options.epsilon)
                for name in PARTS
            }
            yield from seed_rows(seed, {name: task.result() for name, task in tasks.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=36)
    parser.add_argument("--epsilon", type=float, default=8.0)
    documented.add_options(parser)
    options = parser.parse_args()
    head = ("seed", "on held-out patients", *FIGURES.values(), "minutes, whole command")
    documented.show("hippocampus", head, rows(options), options, threads=1)


if __name__ == "__main__":
    main()
