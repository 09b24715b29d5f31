"""What the benchmark of deployed rounds counts: seconds of ended processes, and rounds."""

import importlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BURN = """
    import subprocess, sys, time

    code = "import time\\nwhile time.process_time() < 0.4: pass"
    # The first is waited for; the second ends, and nobody asks for it.
    subprocess.run([sys.executable, "-c", code])
    left = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    left.stdout.read()
    print("done", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("deployment")


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_seconds_of_processes_that_have_ended_count(benchmark):
    command = [sys.executable, "-c", textwrap.dedent(BURN)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == b"done\n"
        seconds = benchmark.cpu_seconds([process.pid])
        process.stdin.close()
    # Two of 0.4 s each, in ticks of a hundredth; without either it would be half of that.
    assert 0.7 <= seconds < 8


def test_times_of_messages_become_exchanges_rounds_and_parts(benchmark, tmp_path):
    sent = [
        {"type": "query.describe", "time": 0.0, "keys": ["a"]},
        {"type": "train", "time": 10.0, "keys": ["b", "c"]},
        {"type": "evaluate", "time": 16.0, "keys": ["d"]},
        {"type": "train", "time": 20.0, "keys": ["e"]},
        {"type": "evaluate", "time": 90.0, "keys": ["f"]},
    ]
    came = {"a": 4.0, "b": 13.0, "c": 15.0, "d": 19.0, "e": 22.0, "f": 91.0}
    (tmp_path / "server.json").write_text(json.dumps({"sent": sent, "came": came}))
    for key in came:
        times = {"process": 1.0, "loading": 2.0, "loaded": 3.0, "work": 4.0, "worked": 6.5}
        (tmp_path / f"client-{key}.json").write_text(json.dumps({"key": key, **times}))
    exchanges = benchmark.exchanges_in(tmp_path)
    run = benchmark.Measured(exchanges, 1.0, 2.0, 0.1, 0.9)
    assert run.seconds_a_round() == [10.0]
    assert run.seconds_of("query") == [4.0]
    assert run.seconds_of_part("the work") == [2.5] * 5
    assert run.seconds_of_part("in all") == [3.0, 5.0, 3.0, 2.0, 1.0]
    # After training to validation, and after validation to the next training.
    assert run.seconds_between() == [1.0, 1.0]
    row = benchmark.row("heart", "by hand", run)
    assert row == ["heart", "by hand", "10.0 (10.0 to 10.0)", "2", "4.0 (4.0 to 4.0)",
                   "0.33", "3", "0.100", ".9000"]  # fmt: skip
