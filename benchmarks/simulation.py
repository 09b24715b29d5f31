"""One process against a bare training loop and against `flwr run`, in one run.

    python benchmarks/simulation.py [--rounds 5] [--repeats 3]

Prints three tables. "Overhead": the pneumonia example (real images where FEDMED_DATA names them,
generated ones elsewhere) as a bare loop over the same training function, as `run_local`, and as
`fedmed run --engine flower`; the models must be equal to the bit. "Toy": a NumPy app with 4 sites
and 3 rounds, as a whole command. "Memory": peak resident memory of the local engine with 5 and with
50 sites. One torch thread in every process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "pneumonia"

BARE = """
import numpy as np, torch
from flwr.app import ArrayRecord, Context, RecordDict
from fedmed_flower.clients.training import derive_seed, torch_environment
from fedmed_flower.data.site import simulation

def bare(client_class, config, num_sites):
    rounds, seed = config["num-server-rounds"], config["seed"]
    def client(index):
        node = {"partition-id": index, "num-partitions": num_sites}
        return client_class(Context(0, index, node, RecordDict(), config))
    clients = [client(index) for index in range(num_sites)]
    with simulation():
        names = [c.site.name for c in clients]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = clients[0].build_model()
    weights = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    data = [c.load_data(c.site) for c in clients]
    train = [c.prepare(d.train, train=True) for c, d in zip(clients, data)]
    val = [c.prepare(d.val, train=False) for c, d in zip(clients, data)]
    total = sum(len(d.train) for d in data)
    torch.set_num_threads(1)
    for number in range(1, rounds + 1):
        mean = {}
        for c, d, prepared in zip(clients, data, train):
            model.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
            round_seed = derive_seed(seed, c.site.name, number, "train")
            with torch_environment(round_seed, 1, torch.device("cpu")):
                c.fit(model, prepared, round_seed)
            share = len(d.train) / total
            for key, value in model.state_dict().items():
                part = value.numpy() * share
                mean[key] = part if key not in mean else mean[key] + part
        weights = mean
        model.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
        for c, prepared in zip(clients, val):
            c.measure(model, prepared)
    return weights
"""

JOB = """
import hashlib, json, logging, resource, sys, time
logging.disable(logging.WARNING)
sys.path.insert(0, {example!r})
config, kind, num_sites = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
import client_app, numpy as np
# Both sides start with the libraries loaded and the images in memory.
client_app.load_dataset(config["dataset"])
def digest(arrays):
    return hashlib.sha256(b"".join(arrays[k].tobytes() for k in sorted(arrays))).hexdigest()
if kind == "bare":
    {bare}
    began = time.perf_counter()
    weights = bare(client_app.PneumoniaHospital, config, num_sites)
else:
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp
    from fedmed_flower import run_local
    from fedmed_flower.strategies import FedAvg
    import torch
    app, result = ServerApp(), []
    @app.main()
    def main(grid, context):
        with torch.random.fork_rng():
            torch.manual_seed(config["seed"])
            model = client_app.PneumoniaHospital(context).build_model()
        run_dir = config["run-dir"] or None
        strategy = FedAvg(seed=config["seed"], run_dir=run_dir)
        rounds = config["num-server-rounds"]
        result.append(strategy.start(grid, ArrayRecord(model.state_dict()), rounds))
    began = time.perf_counter()
    run_local(app, client_app.app, num_sites, run_config=config)
    weights = {{k: a.numpy() for k, a in result[0].arrays.items()}}
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({{"seconds": seconds, "model": digest(weights), "peak": peak}}))
"""

TOY_CLIENT = """
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()

@app.train()
def train(message, context):
    moved = Array(message.content["arrays"]["w"].numpy() + 1)
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": ArrayRecord({"w": moved}), "metrics": metrics})
    return Message(content, reply_to=message)

@app.evaluate()
def evaluate(message, context):
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
"""

TOY_SERVER = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from fedmed_flower.strategies import FedAvg
app = ServerApp()

@app.main()
def main(grid, context):
    strategy = FedAvg(run_dir=context.run_config["run-dir"])
    arrays = ArrayRecord({"w": Array(np.zeros(1000, np.float32))})
    strategy.start(grid, arrays, num_rounds=context.run_config["num-server-rounds"])
"""

TOY_PROJECT = """
[project]
name = "toy"
version = "1.0.0"
[tool.flwr.app]
publisher = "benchmarks"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
num-server-rounds = 3
run-dir = ""
resume = false
"""

TOY_LOCAL = """
import sys
sys.path.insert(0, sys.argv[1])
import client_app, server_app
from fedmed_flower.simulation import run_local
config = {"num-server-rounds": 3, "run-dir": sys.argv[2]}
run_local(server_app.app, client_app.app, 4, run_config=config)
"""

TOY_FLOWER = """
import sys
from pathlib import Path
from fedmed_flower.engine import run_flower
config = {"num-server-rounds": 3, "run-dir": sys.argv[2], "resume": False}
run_flower(Path(sys.argv[1]), config, 4, sys.stderr)
"""


def run(code: str, *arguments: str) -> tuple[str, float]:
    """Run a program text in a process of its own; return its last line and its wall seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    lines = done.stdout.strip().splitlines()
    return (lines[-1] if lines else ""), seconds


def job(config: dict, kind: str, num_sites: int) -> dict:
    bare = textwrap.indent(BARE, "    ").strip()
    code = JOB.format(example=str(EXAMPLE), bare=bare)
    return json.loads(run(code, json.dumps(config), kind, str(num_sites))[0])


def flower(config: dict, num_sites: int, folder: Path) -> tuple[str, float]:
    """Run the example by `fedmed run --engine flower`; return the model's digest and seconds."""
    settings = {"num-server-rounds", "dataset"}
    texts = [part for key in settings for part in ("-c", f"{key}={config[key]}")]
    command = [
        str(Path(sys.executable).parent / "fedmed"),
        "run",
        str(EXAMPLE),
        "--engine",
        "flower",
    ]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--sites", str(num_sites), "--out", str(folder), *texts],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])
    seconds = time.perf_counter() - began
    from safetensors.numpy import load_file

    arrays = load_file(folder / "model.safetensors")
    digest = hashlib.sha256(b"".join(arrays[k].tobytes() for k in sorted(arrays))).hexdigest()
    return digest, seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-flower", action="store_true")
    options = parser.parse_args()
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    config = project["tool"]["flwr"]["app"]["config"]
    config |= {"num-server-rounds": options.rounds}
    if not os.environ.get("FEDMED_DATA"):
        config["dataset"] = "phantoms"
    print(f"{config['dataset']}, 5 sites, {options.rounds} rounds, {os.cpu_count()} cores")

    with tempfile.TemporaryDirectory() as folder:
        times: dict[str, list[float]] = {"bare": [], "local": []}
        models = set()
        for repeat in range(options.repeats):
            for kind in times:
                run_dir = f"{folder}/{kind}-{repeat}" if kind == "local" else ""
                result = job(config | {"run-dir": run_dir}, kind, 5)
                times[kind].append(result["seconds"])
                models.add(result["model"])
        ratios = sorted(b / a for a, b in zip(times["bare"], times["local"], strict=True))
        print("\nOverhead (seconds of the job, libraries and images loaded)")
        for kind, values in times.items():
            print(f"  {kind:24} min {min(values):7.2f}  all {' '.join(f'{v:.2f}' for v in values)}")
        print(f"  local / bare             min {min(times['local']) / min(times['bare']):7.3f}"
              f"  median of pairs {ratios[len(ratios) // 2]:.3f}")  # fmt: skip
        if not options.skip_flower:
            digest, seconds = flower(config, 5, Path(folder) / "flower")
            models.add(digest)
            began = time.perf_counter()
            command = [str(Path(sys.executable).parent / "fedmed"), "run", str(EXAMPLE)]
            command += ["--rounds", str(options.rounds), "--out", f"{folder}/command"]
            command += ["-c", f"dataset={config['dataset']}"]
            subprocess.run(command, check=True, capture_output=True)
            whole = time.perf_counter() - began
            print(f"  whole command: local {whole:.1f} s, flower {seconds:.1f} s")
        print(f"  models equal to the bit: {len(models) == 1}")

        toy = Path(folder) / "toy"
        toy.mkdir()
        (toy / "client_app.py").write_text(TOY_CLIENT)
        (toy / "server_app.py").write_text(TOY_SERVER)
        (toy / "pyproject.toml").write_text(TOY_PROJECT)
        local = min(run(TOY_LOCAL, str(toy), f"{folder}/toy-local-{i}")[1] for i in range(3))
        print("\nToy (NumPy, 4 sites, 3 rounds; whole command, start of Python included)")
        print(f"  one process              {local:7.2f} s")
        if not options.skip_flower:
            engine = run(TOY_FLOWER, str(toy), f"{folder}/toy-flower")[1]
            print(f"  flwr run                 {engine:7.2f} s   ratio {engine / local:.1f}")

        print("\nMemory (local engine, 2 rounds, peak resident MB)")
        small = config | {"num-server-rounds": 2}
        peaks = {n: job(small | {"run-dir": f"{folder}/m{n}"}, "local", n)["peak"] for n in (5, 50)}
        for sites, peak in peaks.items():
            print(f"  {sites:3} sites                {peak:7.0f}")
        print(f"  ratio                    {peaks[50] / peaks[5]:7.2f}")


if __name__ == "__main__":
    main()
