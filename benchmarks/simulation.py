"""One process against a bare training loop and against `flwr run`, in one run.

    python benchmarks/simulation.py [--rounds 5] [--repeats 5] [--skip-flower]

Overhead: the pneumonia example (real images where FEDMED_DATA names them, generated ones elsewhere)
as a bare loop over the same local training, and by `run_local` with run folder and checkpoints, in
turns in one process after a warm-up; and once by `fedmed run --engine flower`. All models must be
equal to the bit. Toy: a NumPy app with 4 sites and 3 rounds, as whole commands. Memory: peak
resident memory of `run_local` with 5 and with 50 sites. One torch thread everywhere.
"""

import argparse
import hashlib
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import documented

from fedmed_flower.settings.text import expand

HERE = Path(__file__).resolve().parent
EXAMPLE, TOY = HERE.parent / "examples" / "pneumonia", HERE / "toy"


def example_config(rounds: int) -> dict:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    # The bare loop draws no pictures of test cases.
    changes = {"num-server-rounds": rounds, "pictures": 0}
    dataset = "pneumoniamnist" if os.environ.get("FEDMED_DATA") else "phantoms"
    config = expand(project["tool"]["flwr"]["app"]["config"])
    return config | changes | {"seed": 0, "dataset": dataset}


def digest(arrays: dict) -> str:
    return hashlib.sha256(b"".join(arrays[key].tobytes() for key in sorted(arrays))).hexdigest()


def bare(config: dict, num_sites: int) -> dict:
    """Federated averaging as one writes it without a framework; return the weights."""
    import torch
    from client_app import PneumoniaHospital
    from flwr.app import Context, RecordDict

    from fedmed_flower.data.site import simulation
    from fedmed_flower.models.device import derive_seed, torch_environment

    seed, clients = config["seed"], []
    with simulation():
        for index in range(num_sites):
            node = {"partition-id": index, "num-partitions": num_sites}
            clients.append(PneumoniaHospital(Context(0, index, node, RecordDict(), config)))
            data = clients[-1].load_data(clients[-1].site)
            clients[-1].train = clients[-1].prepare(data.train, train=True)
            clients[-1].val = clients[-1].prepare(data.val, train=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = clients[0].build_model()
    weights = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    total = sum(len(client.train) for client in clients)
    for number in range(1, config["num-server-rounds"] + 1):
        mean: dict = {}
        for client in clients:
            model.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
            round_seed = derive_seed(seed, client.site.name, number, "train")
            with torch_environment(round_seed, 1, torch.device("cpu")):
                client.fit(model, client.train, round_seed)
            for key, value in model.state_dict().items():
                part = value.numpy() * (len(client.train) / total)
                mean[key] = part if key not in mean else mean[key] + part
        weights = mean
        model.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
        for client in clients:
            with torch_environment(0, 1, torch.device("cpu")):
                client.measure(model, client.val)
    return weights


def federated(config: dict, num_sites: int, folder: str) -> dict:
    """The same by `run_local`, with a run folder; return the weights."""
    import torch
    from client_app import PneumoniaHospital
    from client_app import app as client
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp

    from fedmed_flower import run_local
    from fedmed_flower.strategies import FedAvg

    server = ServerApp()

    @server.main()
    def main(grid, context):
        with torch.random.fork_rng():
            torch.manual_seed(config["seed"])
            model = PneumoniaHospital(context).build_model()
        strategy = FedAvg(seed=config["seed"], run_dir=folder)
        arrays = ArrayRecord(model.state_dict())
        strategy.start(grid, arrays, config["num-server-rounds"])

    run = run_local(server, client, num_sites, run_config=config)
    return {key: array.numpy() for key, array in run.result.arrays.items()}


def child_overhead(folder: str, rounds: str, repeats: str) -> dict:
    sys.path.insert(0, str(EXAMPLE))
    config = example_config(int(rounds))
    federated(config | {"num-server-rounds": 1}, 5, f"{folder}/warm-up")
    seconds: dict[str, list[float]] = {"bare": [], "local": []}
    models = set()
    for repeat in range(int(repeats)):
        began = time.perf_counter()
        models.add(digest(bare(config, 5)))
        middle = time.perf_counter()
        models.add(digest(federated(config, 5, f"{folder}/{repeat}")))
        seconds["bare"].append(middle - began)
        seconds["local"].append(time.perf_counter() - middle)
    return {"seconds": seconds, "models": list(models)}


def child_memory(folder: str, num_sites: str) -> dict:
    sys.path.insert(0, str(EXAMPLE))
    federated(example_config(2), int(num_sites), f"{folder}/memory-{num_sites}")
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def child_toy_local(folder: str) -> dict:
    sys.path.insert(0, str(TOY))
    import client_app
    import server_app

    from fedmed_flower.engines.local import run_local

    config = {"num-server-rounds": 3, "run-dir": f"{folder}/toy-{time.monotonic_ns()}"}
    run_local(server_app.app, client_app.app, 4, run_config=config)
    return {}


def child_toy_flower(folder: str) -> dict:
    from fedmed_flower.engines.flower import run_flower

    config = {"num-server-rounds": 3, "run-dir": f"{folder}/toy-flower", "resume": False}
    run_flower(TOY, config, 4, lambda line: print(line, file=sys.stderr, flush=True))
    return {}


def child(name: str, *arguments: object) -> tuple[dict, float]:
    """Run a ``child_`` function in a process of its own; return its result and wall seconds."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", name, *map(str, arguments)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1]), seconds


def command(engine: str, rounds: int, folder: Path) -> tuple[str, float]:
    """Run `fedmed run`; return the model's digest and wall seconds."""
    from safetensors.numpy import load_file

    program = str(Path(sys.executable).parent / "fedmed")
    dataset = f"dataset={example_config(1)['dataset']}"
    texts = ["--rounds", str(rounds), "-c", dataset, "--engine", engine, "--out", str(folder)]
    began = time.perf_counter()
    done = subprocess.run([program, "run", str(EXAMPLE), *texts], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])
    return digest(load_file(folder / "model.safetensors")), seconds


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the rows of the table: two ways to do the same, and their ratio."""
    rounds = f"{options.rounds} rounds"
    with tempfile.TemporaryDirectory() as folder:
        result, _ = child("overhead", folder, options.rounds, options.repeats)
        models, seconds = set(result["models"]), result["seconds"]
        ratios = [b / a for a, b in zip(seconds["bare"], seconds["local"], strict=True)]
        what = f"a bare training loop, and `run_local`: seconds of the job, {rounds}"
        medians = [f"{statistics.median(seconds[kind]):.2f}" for kind in ("bare", "local")]
        middle = f"{statistics.median(ratios):.3f}, median of {len(ratios)} pairs"
        yield [what, *medians, middle]
        if not options.skip_flower:
            whole = []
            for engine in ("local", "flower"):
                model, took = command(engine, options.rounds, Path(folder) / engine)
                models.add(model)
                whole.append(took)
            what = f"one process, and Flower's engine: seconds of the whole command, {rounds}"
            yield [what, *(f"{took:.1f}" for took in whole), f"{whole[1] / whole[0]:.1f}"]
        yield ["all of these models equal to the bit", "", "", "yes" if len(models) == 1 else "NO"]
        if not options.skip_flower:
            local = min(child("toy_local", folder)[1] for _ in range(3))
            _, engine_seconds = child("toy_flower", folder)
            what = "one process, and `flwr run`: seconds of the whole command; "
            what += "NumPy toy, 4 sites, 3 rounds"
            ratio = f"{engine_seconds / local:.1f}"
            yield [what, f"{local:.2f}", f"{engine_seconds:.2f}", ratio]
        peaks = {sites: child("memory", folder, sites)[0]["peak"] for sites in (5, 50)}
        what = "5 sites, and the same images split among 50: peak MB of `run_local`, 2 rounds"
        yield [what, f"{peaks[5]:.0f}", f"{peaks[50]:.0f}", f"{peaks[50] / peaks[5]:.2f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-flower", action="store_true")
    documented.add_options(parser)
    options = parser.parse_args()
    head = (f"{example_config(1)['dataset']}, 5 sites", "the first", "the second", "ratio")
    documented.show("simulation", head, rows(options), options, threads=1)


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    if sys.argv[1:2] == ["--child"]:
        logging.disable(logging.WARNING)
        print(json.dumps(globals()[f"child_{sys.argv[2]}"](*sys.argv[3:])))
    else:
        main()
