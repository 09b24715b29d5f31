"""Sites that work side by side in forked processes: the same bits, and what happens if one dies.

Each script is a process of its own, since the tests' process may have threads.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from tiny import says

from fedmed_flower import InputError, run_local
from fedmed_flower.engines import workers
from fedmed_flower.engines.workers import Workers, number_of_workers

# An app without torch, whose server a script gives as `serve(work, workers)`.
PRELUDE = """
import json, logging, os, random, sys, time
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from fedmed_flower.engines.local import run_local

WEIGHTS = ArrayRecord({"w": Array(np.arange(50_000.0)), "b": Array(np.ones(3))})
app = ClientApp()


def content_of(**config):
    return RecordDict({"arrays": WEIGHTS, "config": ConfigRecord(config)})


def to_all(grid, timeout=None, **config):
    messages = [Message(content_of(**config), node, "train") for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages, timeout=timeout))


def serve(work, sites, workers, **options):
    server, results = ServerApp(), []

    @server.main()
    def main(grid, context):
        results.append(work(grid))

    run_local(server, app, sites, workers=workers, **options)
    return results[0]
"""
HELPERS = Path(__file__).parents[1] / "helpers"


def start(folder, script, *arguments, **environment):
    path = folder / "script.py"
    path.write_text(PRELUDE + dedent(script))
    python_path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(path), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": python_path} | environment,
        start_new_session=True,
    )


def run(folder, script, *arguments, **environment):
    """Run a script and return what its last line of output holds, and all it wrote on stderr."""
    with start(folder, script, *arguments, **environment) as process:
        out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def test_replies_states_lines_and_prints_are_those_of_one_site_after_the_other(tmp_path):
    script = """
    seen = []


    class Kept(logging.Handler):
        def emit(self, record):
            seen.append([record.name, record.levelname, record.getMessage(), record.exc_text])


    flower = logging.getLogger("flwr")
    flower.addHandler(Kept())
    ours = logging.getLogger("flwr.fedmed.app")


    @app.train()
    def train(message, context):
        number = context.node_config["partition-id"]
        print("site", number)
        ours.warning("%s of %d", "a line", number)
        count = context.state.setdefault("count", MetricRecord({"n": 0}))
        count["n"] += 1
        if number == 1 and count["n"] > 1:
            raise OSError("no disk")
        if number == 2:
            return None
        if message.content["config"].get("debug"):
            breakpoint()
        # The first one of a worker takes the longest: replies come in another order.
        time.sleep(0.2 if number < 2 else 0)
        context.state["weights"] = message.content["arrays"]
        weights = message.content["arrays"]["w"].numpy() + number * count["n"]
        arrays = ArrayRecord({"w": Array(weights), "b": message.content["arrays"]["b"]})
        return Message(RecordDict({"arrays": arrays, "n": MetricRecord(count)}), reply_to=message)


    def told(replies):
        return [
            [
                reply.metadata.src_node_id,
                reply.metadata.reply_to_message_id == ids[reply.metadata.src_node_id],
                reply.error.reason if reply.has_error() else [
                    reply.content["n"]["n"], float(reply.content["arrays"]["w"].numpy().sum())
                ],
            ]
            for reply in replies
        ]


    def work(grid):
        global ids
        rounds = []
        nodes = list(grid.get_node_ids())
        for _ in range(2):
            messages = [Message(content_of(), node, "train") for node in nodes]
            sent = list(grid.push_messages(messages))
            ids = dict(zip(nodes, sent, strict=True))
            rounds.append(told(reply for one in sent for reply in grid.pull_messages([one])))
        states = grid.export_states()
        # Two messages to one site, as when it evaluates several models.
        messages = [Message(content_of(), node, "train") for node in (1001, 1004, 1001)]
        list(grid.push_messages(messages))
        twice = [
            reply.content["n"]["n"]
            for message in messages
            for reply in grid.pull_messages([message.metadata.message_id])
        ]
        grid.import_states(states)
        again = [r.error.reason if r.has_error() else r.content["n"]["n"] for r in to_all(grid)]
        return rounds, twice, again, {key: value.hex() for key, value in states.items()}


    import contextlib, io

    results = []
    for count in (1, 2, 3):
        seen.clear()
        printed, heard = io.StringIO(), []
        listen = lambda message, done, sent: heard.append((done, sent))
        with contextlib.redirect_stdout(printed):
            found = serve(work, 5, count, on_message=listen)
        results.append([found, list(seen), printed.getvalue(), heard])
    printed = serve(lambda grid: [r.error.reason for r in to_all(grid, debug=True)
                                  if r.has_error()], 2, 2)
    print(json.dumps([results, printed]))
    """
    (results, debugged), _ = run(tmp_path, script)
    alone, *side_by_side = results
    (rounds, twice, again, states), lines, printed, heard = alone
    assert [reply[:2] for reply in rounds[0]] == [[1001 + n, True] for n in (0, 1, 3, 4)]
    assert "no disk" in rounds[1][1][2]
    assert twice == [3, 3, 4]
    assert again[0] == 3
    assert set(states) == {"1001", "1002", "1003", "1004", "1005"}
    assert [line[2] for line in lines if "a line" in line[2]][:5] == [
        f"a line of {n}" for n in range(5)
    ]
    assert printed.splitlines()[:5] == [f"site {n}" for n in range(5)]
    assert heard[:6] == [[n, 5] for n in range(6)]
    tracebacks = [line for line in lines if line[2].startswith("Traceback")]
    assert tracebacks
    for other in side_by_side:
        assert other == alone
    assert len(debugged) == 2
    assert "a debugger needs the terminal, which a worker does not have" in debugged[0]


def test_a_worker_that_dies_fails_its_site_alone_and_the_next_round_has_a_new_one(tmp_path):
    script = """
    @app.train()
    def train(message, context):
        number = context.node_config["partition-id"]
        how = message.content["config"].get(str(number))
        count = context.state.setdefault("count", MetricRecord({"n": 0}))
        count["n"] += 1
        if how == "killed":
            print("last words", flush=True)
            os.kill(os.getpid(), 9)
        if how == "exit":
            os._exit(3)
        if how == "system exit":
            raise SystemExit(4)
        content = RecordDict({"m": MetricRecord({"n": count["n"], "pid": os.getpid()})})
        return Message(content, reply_to=message)


    def work(grid):
        rounds = []
        for config in ({}, {"0": "killed", "4": "exit"}, {"1": "system exit"}, {}):
            replies = to_all(grid, timeout=600.0, **config)
            rounds.append([
                r.error.reason if r.has_error() else [r.content["m"]["n"], r.content["m"]["pid"]]
                for r in replies
            ])
        return rounds


    print(json.dumps(serve(work, 5, 2)))
    """
    rounds, err = run(tmp_path, script)
    first, second, third, last = rounds
    assert len({pid for _, pid in first}) == 2
    killed = "its worker's process was ended by signal 9 (SIGKILL), as the system does if memory "
    assert second[0] == killed + "runs out"
    assert second[4] == "its worker's process ended with exit code 3"
    assert third[1] == "its worker's process ended with exit code 4"
    # The counts are those of a site whose round was lost.
    assert [entry[0] for entry in last] == [3, 3, 4, 4, 3]
    # Sites 0, 2 and 4 have one worker, 1 and 3 the other; the first has been replaced twice.
    assert last[0][1] == last[2][1] == last[4][1] != first[0][1]
    assert second[2][1] not in (first[0][1], last[0][1])
    assert last[1][1] == last[3][1] != first[1][1]
    assert err.count("a new one takes its place") == 3
    assert "worker 2: its process was ended by signal 9" in err or "worker 1: its" in err


def test_a_site_that_hangs_is_late_and_another_of_its_worker_has_a_new_one(tmp_path):
    script = """
    @app.train()
    def train(message, context):
        number = context.node_config["partition-id"]
        logging.getLogger("flwr.fedmed").warning("begun %d", number)
        if message.content["config"].get("hang") == number:
            time.sleep(3600)
        return Message(RecordDict({"m": MetricRecord({"pid": os.getpid()})}), reply_to=message)


    def work(grid):
        before = [reply.content["m"]["pid"] for reply in to_all(grid)]
        messages = [Message(content_of(hang=0), node, "train") for node in (1001, 1002, 1003)]
        sent = list(grid.push_messages(messages))
        late, seconds = grid.pull_within(sent[:1], 0.1)
        others, _ = grid.pull_within(sent[1:], 600)
        again = to_all(grid, 600)
        return [
            before, len(late), seconds, [reply.content["m"]["pid"] for reply in others],
            [reply.content["m"]["pid"] for reply in again],
        ]


    print(json.dumps(serve(work, 3, 2)))
    """
    (before, late, seconds, others, again), err = run(tmp_path, script)
    assert late == 0
    assert seconds > 0.1
    assert others[0] == before[1]
    assert others[1] != before[2]
    assert again == [others[1], others[0], others[1]]
    assert "its process was ended after twice the timeout; a new one takes its place" in err
    assert err.count("begun 0") == 3


HANGING = """
@app.train()
def train(message, context):
    with open(f"begun-{os.getpid()}", "w"):
        pass
    time.sleep(3600)


def work(grid):
    print("began", flush=True)
    return to_all(grid)


try:
    serve(work, 2, 2)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_for(condition):
    """Wait until something is so; the test's time limit is that of the suite."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.05)


@pytest.mark.parametrize("request_", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_no_worker_outlives_the_run(request_, tmp_path):
    with start(tmp_path, HANGING) as process:
        wait_for(lambda: len([*tmp_path.glob("begun-*")]) == 2 or process.poll() is not None)
        group = os.getpgid(process.pid)
        members = [
            int(stat.parent.name)
            for stat in Path("/proc").glob("[0-9]*/stat")
            if alive(stat.parent.name) and os.getpgid(int(stat.parent.name)) == group
        ]
        # The run, the process that forks, and two workers.
        assert len(members) == 4
        if request_ == signal.SIGINT:
            # As a terminal does.
            os.killpg(group, request_)
        else:
            os.kill(process.pid, request_)
        out, err = process.communicate(timeout=600)
        wait_for(lambda: not any(map(alive, members)))
    assert ("interrupted" in out) == (request_ == signal.SIGINT), err


def test_a_process_that_has_computed_on_several_threads_is_refused(tmp_path):
    script = """
    import torch
    from fedmed_flower import InputError
    from fedmed_flower.engines import workers

    workers._STARTING = 1.0
    torch.set_num_threads(2)
    torch.ones(1 << 20).sum()
    try:
        serve(lambda grid: "ran", 2, 2)
    except InputError as error:
        print(json.dumps(str(error)))
    """
    text, _ = run(tmp_path, script, OMP_NUM_THREADS="2")
    assert text == (
        "a worker hangs at its start, because this process has computed on several threads before: "
        "set OMP_NUM_THREADS=1, start run_local before anything is computed, or leave workers at 1"
    )


def test_whole_runs_end_with_the_same_bits_however_many_workers(tmp_path):
    # One process for all of them: most of the time goes into importing torch.
    script = """
    import csv, hashlib
    from functools import partial
    from pathlib import Path
    import tables, tiny
    import torch
    from monai.transforms import Randomizable
    from fedmed_flower.engines import local


    def contents(folder):
        # All of a run folder apart from times, the folder's name and the run's random key.
        summary = json.loads((folder / "summary.json").read_text())
        for key in ("seconds", "started", "config"):
            del summary[key]
        for entry in summary["traffic"].values():
            del entry["seconds"]
        with (folder / "metrics.csv").open() as file:
            rows = [row for row in csv.reader(file) if row[3] != "seconds"]
        log = [line[24:] for line in (folder / "log.txt").read_text().splitlines()]
        log = [line for line in log if " round " not in line and "report: " not in line]
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {
            "model": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            "summary": summary,
            "rows": rows,
            "log": log,
            "names": sorted(str(path.relative_to(folder)) for path in files),
            "counts": (folder / "counts.json").read_text(),
            "splits": [path.read_text() for path in sorted((folder / "splits").iterdir())],
        }


    def run(name, workers, helper, function, **config):
        helper.run_local = partial(local.run_local, workers=workers)
        function(Path(name), seed=3, **config)


    late = {"buffer": 2, "virtual_speeds": "1,1.5,0.7,0.2", "num_server_rounds": 3}
    drift = {"method": "scaffold", "num_sites": 3}
    for n in (1, 2):
        run(f"table-{n}", n, tables, tables.run_tables, baselines=True, num_server_rounds=1)
        run(f"late-{n}", n, tiny, tiny.run_tiny, num_sites=4, **late)
        run(f"drift-{n}", n, tiny, tiny.run_tiny, num_server_rounds=2, **drift)
        run(f"stopped-{n}", n, tiny, tiny.run_tiny, num_server_rounds=1, **drift)
        # What began with workers goes on without, and the other way round.
        run(f"stopped-{n}", 3 - n, tiny, tiny.run_tiny, num_server_rounds=2, resume=True, **drift)


    @app.train()
    def train(message, context):
        drawn = [
            random.random(), np.random.random(), torch.rand(1).item(), Randomizable.R.random()
        ]
        return Message(RecordDict({"m": MetricRecord({"drawn": drawn})}), reply_to=message)


    work = lambda grid: [list(reply.content["m"]["drawn"]) for reply in to_all(grid)]
    drawn = [numbers for _ in range(2) for numbers in serve(work, 2, 2)]
    folders = sorted(path for path in Path().iterdir() if path.is_dir())
    found = {path.name: contents(path) for path in folders if (path / "summary.json").exists()}
    print(json.dumps([found, [*zip(*drawn)]]))
    """
    (found, drawn), _ = run(tmp_path, script, OMP_NUM_THREADS="1")
    assert found["table-1"]["rows"]
    assert found["table-1"] == found["table-2"]
    assert found["drift-1"] == found["drift-2"]
    for name in ("stopped-1", "stopped-2"):
        assert found[name]["model"] == found["drift-1"]["model"]
    # The slowest site is still in training at the end. Only workers have begun its message, so that
    # it has written down its split.
    for key in ("names", "splits"):
        one, other = found["late-1"].pop(key), found["late-2"].pop(key)
        assert len(other) == len(one) + 1
        assert all(entry in other for entry in one)
    assert found["late-1"] == found["late-2"]
    # Generators that nobody seeds differ from worker to worker.
    assert len(drawn) == 4
    assert all(len({*numbers}) == 4 for numbers in drawn)


@pytest.mark.parametrize("count", [0, -1, 65])
def test_the_number_of_workers_has_bounds(count):
    with pytest.raises(InputError, match=says(f"workers must be from 1 to 64, got {count}")):
        run_local(ServerApp(), ClientApp(), 2, workers=count)


def test_no_more_workers_than_sites(caplog):
    caplog.set_level("INFO", logger="flwr.fedmed")
    assert number_of_workers(3, 3) == 3
    assert not caplog.messages
    assert number_of_workers(64, 3) == 3
    assert caplog.messages == ["64 workers for 3 sites: one a site is started"]


def refused():
    with pytest.raises(InputError) as caught:
        Workers(ClientApp(), 2)
    return str(caught.value)


def test_workers_are_refused_where_a_fork_is_not_safe(monkeypatch):
    running, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (running.set(), stop.wait()), name="watcher")
    thread.start()
    running.wait()
    try:
        assert "workers cannot be forked while other threads run (" in refused()
        assert "watcher" in refused()
        assert refused().endswith("): start run_local before they start, or leave workers at 1")
    finally:
        stop.set()
        thread.join()
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread()])
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        assert refused() == (
            "workers cannot be forked after this process has used a GPU: start run_local before, "
            "or leave workers at 1"
        )
    with monkeypatch.context() as patch:
        patch.setattr(workers, "in_notebook", lambda: True)
        assert refused() == (
            "workers cannot be forked from a notebook, whose kernel has threads: leave workers at "
            "1, or run `fedmed run APP --workers N` in a terminal"
        )
    for platform in ("win32", "darwin"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", platform)
            assert refused() == (
                f"workers are forked, which is safe on Linux alone, and this is {platform}: leave "
                "workers at 1, or take `fedmed run APP --engine flower`"
            )
