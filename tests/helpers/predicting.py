"""Small apps in a folder, runs of them, and `fedmed predict` in a fresh process."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = """
[project]
name = "small"
version = "1.0.0"
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
settings = ""
num-server-rounds = 2
learning-rate = 0.05
batch-size = 8
pictures = 0
"""
SERVER = """
from client_app import Hospital
from flwr.serverapp import ServerApp
from fedmed_flower import federate
from fedmed_flower.strategies import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    federate(FedAvg(), grid, context, {model})
"""


def write_app(folder, client, model="Hospital(context)", config=""):
    """Write a Flower app whose client's module is a text."""
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT + config)
    (folder / "client_app.py").write_text(client)
    (folder / "server_app.py").write_text(SERVER.format(model=model))
    return folder


def fedmed(*arguments, cwd):
    """Run the command in a fresh process, in a folder from which no app can be imported."""
    here = Path(__file__).resolve().parents[2]
    known = os.environ.get("PYTHONPATH", str(here))
    return subprocess.run(
        [sys.executable, "-c", "from fedmed_flower.cli.main import main; main()"]
        + [str(argument) for argument in arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": known},
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_and_forget(app, out, *arguments):
    """Run an app in a fresh process, and remove it."""
    done = fedmed("run", app, "--sites", "2", "--out", out, *arguments, cwd=app.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(app)
    return json.loads((out / "summary.json").read_text())


def lines_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
