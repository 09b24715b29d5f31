import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deployment_helper import write_app

from fedmed_flower.engines import flower as module
from fedmed_flower.engines.flower import EngineError, run_flower
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.server.run_folder import RunFolder

EXAMPLE = Path(__file__).parents[2] / "examples" / "pneumonia"

SERVER = """
    import numpy as np
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp import ServerApp

    from fedmed_flower.strategies import FedAvg

    app = ServerApp()


    @app.main()
    def main(grid, context):
        if context.run_config["server-fails"]:
            raise ArithmeticError("the server made a mistake")
        strategy = FedAvg(run_dir=context.run_config["run-dir"])
        strategy.start(grid, ArrayRecord({"w": Array(np.zeros(2, np.float32))}), 2, timeout=600)
        print("FAILURES", [(f.round, f.phase, f.site, f.reason) for f in strategy.history.failures])
"""

# One site trains until the run's last round has ended.
ASYNCHRONOUS_SERVER = """
    from pathlib import Path

    import numpy as np
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp import ServerApp

    from fedmed_flower.strategies import FedAvg

    app = ServerApp()


    @app.main()
    def main(grid, context):
        def evaluate(server_round, arrays):
            if server_round == 4:
                Path(context.run_config["done"]).touch()

        strategy = FedAvg(buffer=1, run_dir=context.run_config["run-dir"], fraction_evaluate=0.0)
        model = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
        strategy.start(grid, model, 4, timeout=600, evaluate_fn=evaluate)
        print("FAILURES", [f.reason for f in strategy.history.failures])
        print("WAITED", (Path(context.run_config["done"]).parent / "waited").exists())
"""

ASYNCHRONOUS_CLIENT = """
    import time
    from pathlib import Path

    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()


    @app.train()
    def train(message, context):
        index = context.node_config["partition-id"]
        done = Path(context.run_config["done"])
        end = time.monotonic() + 300
        while index == 1 and not done.exists():
            if time.monotonic() > end:
                (done.parent / "waited").touch()
                break
            time.sleep(0.1)
        content = RecordDict({
            "arrays": message.content["arrays"],
            "metrics": MetricRecord({"num-examples": 1}),
            "site": ConfigRecord({"name": f"hospital-{index + 1}"}),
        })
        return Message(content, reply_to=message)
"""

CLIENT = """
    import numpy as np
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()


    @app.train()
    def train(message, context):
        index = context.node_config["partition-id"]
        number = message.content["config"]["server-round"]
        if index == 1 and number == 2:
            raise ValueError("a mistake at one site")
        content = RecordDict({
            "arrays": ArrayRecord({"w": Array(np.full(2, index, np.float32))}),
            "metrics": MetricRecord({"num-examples": 1}),
            "site": ConfigRecord({"name": f"hospital-{index + 1}"}),
        })
        return Message(content, reply_to=message)


    @app.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
"""


def run_in_process(app, config, sites, **environment):
    """Call run_flower in a process of its own, as the command does; return its output."""
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from fedmed_flower.engines.flower import run_flower\n"
        "run_flower(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), print)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(app), json.dumps(config), str(sites)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


class Card:
    def __init__(self, total_memory):
        self.total_memory = total_memory


@pytest.mark.parametrize(
    ("totals", "cores", "sites", "peak", "share"),
    [
        ([], 8, 5, None, 0.0),
        ([80], 8, 8, 0, 0.1249),
        # Five sites need no more than five workers.
        ([80], 8, 5, 3, 0.1999),
        ([80], 2, 5, 3, 0.4999),
        ([80], None, 5, 3, 1.0),
        ([80], 8, 8, 11, 0.1666),
        # The smaller card counts: three sites of 11 fit into 36 of 40.
        ([80, 40], 64, 64, 11, 0.3333),
    ],
)
def test_each_site_is_given_as_much_of_a_gpu_as_it_takes(
    monkeypatch, totals, cores, sites, peak, share, caplog
):
    asked = []

    def measured(app, config, num_sites):
        asked.append((app, config, num_sites))
        return peak * 10**9

    monkeypatch.setattr(module, "measure_site", measured)
    monkeypatch.setattr(module.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(totals))
    cards = [Card(total * 10**9) for total in totals]
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    config = {"device": "auto", "learning-rate": 0.1}
    with caplog.at_level("INFO", "flwr.fedmed"):
        text = module._federation_config(EXAMPLE, config, sites)
    assert text == (
        f"num-supernodes={sites} client-resources-num-cpus=1 client-resources-num-gpus={share}"
    )
    assert asked == ([(EXAMPLE, config, sites)] if totals else [])
    assert caplog.messages == ([f"each site is given {share:g} of a GPU"] if totals else [])


def test_a_run_on_the_cpu_measures_no_gpu_and_takes_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    text = module._federation_config(EXAMPLE, {"device": "cpu"}, 3)
    assert text == "num-supernodes=3 client-resources-num-cpus=1 client-resources-num-gpus=0.0"


@pytest.mark.slow
def test_a_failing_site_is_named_and_a_failing_server_raises(tmp_path, monkeypatch):
    config = {"server-fails": False, "run-dir": str(tmp_path / "run")}
    app = write_app(tmp_path / "toy", SERVER, CLIENT, **config)
    done = run_in_process(app, config, 3, MARK=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAILURES")]
    assert "(2, 'train', 'hospital-2'" in line
    assert "a mistake at one site" in line
    assert (tmp_path / "run" / "checkpoint.zip").exists()
    assert superlinks(tmp_path) == []

    running = []

    def on_line(line):
        running.extend(superlinks(tmp_path))

    monkeypatch.setenv("MARK", str(tmp_path))
    with pytest.raises(EngineError, match=r"finished:failed .*the server made a mistake"):
        run_flower(app, config | {"server-fails": True}, 2, on_line)
    assert running
    assert superlinks(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two sites at once need two cores")
def test_asynchronous_rounds_wait_for_no_site_that_trains_on(tmp_path):
    config = {"done": str(tmp_path / "done"), "run-dir": str(tmp_path / "run")}
    app = write_app(tmp_path / "toy", ASYNCHRONOUS_SERVER, ASYNCHRONOUS_CLIENT, **config)
    done = run_in_process(app, config, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAILURES")]
    assert "no reply by the end of the run to what round 1 sent" in line
    assert "WAITED False" in done.stdout
    checkpoint = RunFolder(tmp_path / "run").load()
    assert checkpoint.server_round == 4
    trained = {row[2] for row in checkpoint.history.rows if row[1] == "train"}
    assert trained == {"hospital-1"}


def path_without_ps(folder):
    """Make a folder with the programs of the system, but those of procps; return it."""
    folder.mkdir()
    for program in Path("/usr/bin").iterdir():
        if program.name not in ("ps", "pgrep", "pkill", "top"):
            (folder / program.name).symlink_to(program)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["behind a proxy", "without ps"])
def test_a_run_ends_well_and_leaves_nothing(tmp_path, place):
    if place == "behind a proxy":
        # Nothing listens there.
        names = ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "grpc_proxy")
        environment = dict.fromkeys(names, "http://127.0.0.1:9")
    else:
        environment = {"PATH": path_without_ps(tmp_path / "bin")}
    config = {"server-fails": False, "run-dir": str(tmp_path / "run")}
    app = write_app(tmp_path / "toy", SERVER, CLIENT, **config)
    done = run_in_process(app, config, 2, MARK=str(tmp_path), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert RunFolder(tmp_path / "run").load().server_round == 2
    assert superlinks(tmp_path) == []


@pytest.mark.slow
def test_one_process_and_flowers_engine_give_the_same_bits(tmp_path):
    texts = ["-c", "dataset=phantoms", "-c", "alpha=50.0", "--sites", "3", "--rounds", "2"]
    models = []
    for engine in ("local", "flower"):
        folder = tmp_path / engine
        command = [str(Path(sys.executable).parent / "fedmed"), "run", str(EXAMPLE), *texts]
        done = subprocess.run(
            [*command, "--engine", engine, "--out", str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.strip().splitlines()[-1].endswith(str(folder))
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
        models.append((folder / "model.safetensors").read_bytes())
    assert models[0] == models[1]


@pytest.mark.slow
def test_a_stopped_run_leaves_no_process_that_goes_on_training(tmp_path):
    texts = ["-c", "dataset=phantoms", "--sites", "2", "--rounds", "50", "--engine", "flower"]
    texts += ["-c", "privacy=patient", "-c", "sampling-rate=0.1"]
    program = str(Path(sys.executable).parent / "fedmed")
    folder = tmp_path / "run"
    command = [program, "run", str(EXAMPLE), *texts, "--out", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "round 1/50" in line:
                family = descendants(process.pid)
                assert any("flwr-simulation" in args for args in family.values())
                process.terminate()
                break
        rest = process.stdout.read()
    assert process.returncode == 130
    assert rest.strip().splitlines()[-1].startswith("stopped by the user: ")
    assert family.keys() & processes().keys() == set()
    assert (folder / "checkpoint.zip").exists()
    done = RunFolder(folder).load().server_round
    for index in (1, 2):
        ledger = Ledger(folder / "ledgers" / f"hospital-{index}.sqlite", read_only=True)
        assert ledger.entries()[0].rounds >= done >= 1


def processes():
    """Living processes: number -> (parent, command)."""
    columns = ["ps", "-Awwo", "pid=,ppid=,stat=,args="]
    table = subprocess.run(columns, capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 3) for line in table.splitlines())
    return {int(p): (int(q), " ".join(args)) for p, q, state, *args in rows if state[0] != "Z"}


def descendants(pid):
    table = processes()
    found, new = {}, {pid}
    while new:
        new = {child for child, (parent, _) in table.items() if parent in new}
        found |= {child: table[child][1] for child in new}
    return found


def superlinks(mark):
    """SuperLinks that have `mark` in their environment; other tests start theirs beside these."""
    columns = ["ps", "axeww", "-o", "pid=,args="]
    table = subprocess.run(columns, capture_output=True, text=True, check=True).stdout
    lines = [line for line in table.splitlines() if "flower-superlink" in line]
    return [line for line in lines if f"MARK={mark}" in line]
