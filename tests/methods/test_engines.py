"""The state of a site is found again on Flower's engine and on a SuperLink."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deployment_helper import deployment, write_app
from safetensors.numpy import load_file

HELPERS = Path(__file__).parents[1] / "helpers"

SERVER = """
    from client_app import Ours
    from flwr.serverapp import ServerApp

    from fedmed_flower import federate
    from fedmed_flower.strategies import FedAvg

    app = ServerApp()


    @app.main()
    def main(grid, context):
        federate(FedAvg(), grid, context, Ours(context))
"""

CLIENT = """
    from dataclasses import replace

    from squares import Squares


    class Ours(Squares):
        def load_data(self, site):
            # A real hospital's rows follow from its name.
            index = {"north": 0, "south": 1}.get(site.name, site.index)
            return super().load_data(replace(site, index=index, num_sites=2))


    app = Ours.client_app()
"""

pytestmark = pytest.mark.slow


def app_in(folder):
    app = write_app(folder, SERVER, CLIENT, settings="")
    shutil.copy(HELPERS / "squares.py", app)
    return app


MORE = {"method": "scaffold", "optimizer": "sgd", "learning-rate": 0.1, "batch-size": 100}
MORE |= {"local-epochs": 4, "pictures": 0}


def options(more):
    return [text for key, value in more.items() for text in ("-c", f"{key}={value}")]


def fedmed_run(app, folder, engine, rounds, resume=False):
    command = [str(Path(sys.executable).parent / "fedmed"), "run", str(app), "--sites", "2"]
    command += ["--rounds", str(rounds), "--engine", engine]
    command += ["--resume", str(folder)] if resume else ["--out", str(folder)]
    command += options(MORE)
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "model.safetensors").read_bytes()


def test_a_run_on_flowers_engine_goes_on_to_the_bits_of_one_in_one_process(tmp_path):
    app = app_in(tmp_path / "app")
    whole = fedmed_run(app, tmp_path / "whole", "local", 4)
    first = fedmed_run(app, tmp_path / "parts", "flower", 2)
    assert first != whole
    assert fedmed_run(app, tmp_path / "parts", "flower", 4, resume=True) == whole
    states = sorted((tmp_path / "parts").glob("state/rounds/*/*"))
    assert [path.name for path in states] == ["3.safetensors", "4.safetensors"] * 2


def test_on_a_superlink_each_hospital_goes_on_from_the_state_in_its_folder(tmp_path):
    app = app_in(tmp_path / "app")
    folder = tmp_path / "run"
    with deployment(tmp_path / "files", "--sites", "2") as started:
        for name in ("north", "south"):
            # A hospital of this app needs a folder, for its ledger.
            (tmp_path / "files" / "data" / name).mkdir(parents=True, exist_ok=True)
        more = MORE | {"min-sites": 2, "run-dir": folder}
        for rounds, resume in ((2, "false"), (3, "true")):
            part = options(more | {"num-server-rounds": rounds, "resume": resume})
            done = started.command("run", str(app), *part)
            assert done.returncode == 0, done.stdout
        logs = started.log("north") + started.log("south")
    assert "starts anew" not in logs
    states = sorted((tmp_path / "files").rglob("state/rounds/*/*.safetensors"))
    assert [path.name for path in states] == ["2.safetensors", "3.safetensors"] * 2
    control = load_file(states[-1])["method scaffold/weight"]
    assert abs(control).max() > 0
