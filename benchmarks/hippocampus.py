"""Five hospitals outline the hippocampus: federated, alone, pooled, and with patients' privacy.

The example app on the 260 volumes of the Medical Segmentation Decathlon's Task04, one fifth of each
hospital's patients held out. Each part is a whole ``fedmed run`` in a process of its own; two at a
time, with one torch thread each.

``FEDMED_DATA=... python benchmarks/hippocampus.py [--seeds 1] [--rounds 36] [--epsilon 8]``
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

START = "from fedmed_flower.cli.main import main; main()"
APP = Path(__file__).resolve().parent.parent / "examples" / "hippocampus"
FIGURES = ("dice-anterior", "dice-posterior", "hd95", "surface-dice", "dice-worst")
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


def row(name, figures, seconds=None):
    cells = "  ".join(f"{figures[figure]:>14.3f}" for figure in FIGURES)
    took = "" if seconds is None else f"{seconds / 60:8.1f} min"
    print(f"{name:<46}{cells}{took}", flush=True)


def show(seed, found):
    """Print the table of one seed."""
    names = "  ".join(f"{figure:>14}" for figure in FIGURES)
    print(f"\nseed {seed}, figures on held-out patients".ljust(47) + names)
    summary, seconds = found["federated"]
    test = summary["test"]
    row("federated, all test patients", test["federated"], seconds)
    row("federated, mean over hospitals", mean(list(test["sites"].values())))
    summary, seconds = found["alone and pooled"]
    test = summary["test"]
    local = list(test["local"].values())
    row("each hospital alone, all test patients (mean)", mean([part["all"] for part in local]))
    row("each hospital alone, its own test patients", mean(local))
    row("all data pooled, all test patients", test["pooled"], seconds)
    summary, seconds = found["private"]
    sites = summary["privacy"]["patient"]["sites"]
    most = max(site["epsilon"] for site in sites.values())
    row(f"private, epsilon {most:.2f} a patient", summary["test"]["federated"], seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=36)
    parser.add_argument("--epsilon", type=float, default=8.0)
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {options.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for seed in range(options.seeds):
            tasks = {
                name: pool.submit(run, folder, name, seed, options.rounds, options.epsilon)
                for name in PARTS
            }
            show(seed, {name: task.result() for name, task in tasks.items()})


if __name__ == "__main__":
    main()
