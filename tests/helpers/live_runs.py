"""Run folders as a run writes them, made by hand, and `fedmed watch` in its own process."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime

from fedmed_flower.files import write_atomic
from fedmed_flower.server.history import History
from fedmed_flower.wire import ALL_SITES

SITES = ("hospital-1", "hospital-2", "hospital-3")


def write_json(folder, name, **content):
    write_atomic(folder / name, json.dumps(content).encode())


def write_live(folder, **changes):
    """Write ``live.json`` of a run in its second round."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    content = {
        "version": 1,
        "app": "pneumonia",
        "status": "running",
        "message": "",
        "started": now,
        "updated": now,
        "part": "",
        "round": 2,
        "rounds": 10,
        "phase": "train",
        "asked": list(SITES),
        "replied": [],
        "failed": [],
        "failures": [],
        "seconds_left": None,
    }
    write_json(folder, "live.json", **content | changes)


def write_metrics(folder, rows):
    """Write ``metrics.csv``; rows are those of `History`."""
    write_atomic(folder / "metrics.csv", History(rows=list(rows)).to_csv())


def rounds_of(count, sites=SITES, epsilon=False):
    """Yield rows of so many rounds: a loss and an AUC of each site and of all."""
    for number in range(1, count + 1):
        for index, site in enumerate(sites):
            yield (number, "train", site, "loss", 1.0 / number + index / 10)
            if epsilon:
                yield (number, "train", site, "patient-epsilon", 0.5 * number + index / 10)
        yield (number, "train", ALL_SITES, "loss", 1.0 / number)
        for index, site in enumerate((*sites, ALL_SITES)):
            yield (number, "val", site, "auc", 0.9 - 0.4 / (number + index))
            yield (number, "val", site, "loss", 0.8 / number + index / 20)


@contextlib.contextmanager
def watching(folder, *options, **environment):
    """Run the command; yield the process and the address that it prints."""
    command = [sys.executable, "-c", "from fedmed_flower.cli.main import main; main()", "watch"]
    process = subprocess.Popen(
        [*command, str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        # A shell that runs tests in the background lets its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        line = process.stdout.readline()
        yield process, re.search(r"http://\S+", line)[0]
    finally:
        process.kill()
        process.communicate()
