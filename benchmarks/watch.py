"""What it costs to watch a run: CPU seconds of an example, alone and with a page open beside it.

    python benchmarks/watch.py [--app examples/pneumonia] [--rounds 10] [--sites 3]

The example runs on generated images, once alone and once while `fedmed watch` serves a page that
Chromium shows and keeps up to date (needs playwright and Chromium). Counted are the CPU seconds of
whole processes, imports included: those of the run, and those of the watcher, which serves the
page. What the browser takes is not counted: it draws, and may stand on another machine.

A watcher takes a fixed time to start, and then some for each second by the clock: on a machine
that is busy with other work a run takes longer by the clock, and its watcher a larger share.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import documented

ROOT = Path(__file__).resolve().parents[1]
FEDMED = (sys.executable, "-c", "from fedmed_flower.cli.main import main; main()")


def run_seconds(app: Path, folder: Path, rounds: int, sites: int) -> float:
    """Run an app and return the CPU seconds of its process."""
    command = [*FEDMED, "run", str(app), "-c", "dataset=phantoms", "--out", str(folder)]
    command += ["--rounds", str(rounds), "--sites", str(sites)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    return cpu_seconds(process)


def cpu_seconds(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> float:
    """Wait for the end of a process and return its CPU seconds."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


@contextmanager
def shown(url: str, chromium: Path) -> Iterator[None]:
    """Keep a page open in a browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(chromium), args=["--no-sandbox", "--no-proxy-server"]
        )
        page = browser.new_page()
        page.goto(url)
        page.get_by_text("Waiting for the run").wait_for()
        yield
        page.get_by_text("Finished: ").wait_for()
        browser.close()


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--app", type=Path, default=ROOT / "examples" / "pneumonia")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--chromium", type=Path, default=Path("/usr/bin/chromium"))
    documented.add_options(parser)
    options = parser.parse_args()
    size = (options.rounds, options.sites)
    with tempfile.TemporaryDirectory() as folder:
        alone = run_seconds(options.app, Path(folder, "alone"), *size)
        watched_folder = Path(folder, "watched")
        watcher = subprocess.Popen(
            [*FEDMED, "watch", str(watched_folder), "--no-browser"],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        if watcher.stdout is None or not (
            found := re.search(r"http\S+", watcher.stdout.readline())
        ):
            raise RuntimeError("fedmed watch printed no address")
        began = time.monotonic()
        with shown(found[0], options.chromium):
            watched = run_seconds(options.app, watched_folder, *size)
        open_for = time.monotonic() - began
        watcher.send_signal(signal.SIGINT)
        watching = cpu_seconds(watcher)
    rows = [
        ["the run alone", f"{alone:.1f}", ""],
        [f"the run, while a page was open for {open_for:.0f} s", f"{watched:.1f}", ""],
        ["the watcher, which serves the page", f"{watching:.2f}", f"{watching / watched:.1%}"],
    ]
    head = ("", "CPU seconds", "of the run")
    documented.show("watch", head, rows, options)


if __name__ == "__main__":
    main()
