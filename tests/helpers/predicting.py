"""Small apps in a folder, runs of them, and `fedmed predict` in a fresh process."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
from flwr.serverapp import ServerApp
from tiny import CONFIG
from torch import nn
from typer.testing import CliRunner

from fedmed_flower import ClassificationClient, SegmentationClient, SiteData, federate, run_local
from fedmed_flower.cli.main import app
from fedmed_flower.data.phantoms import hippocampi
from fedmed_flower.strategies import FedAvg

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


def run_of(folder, client, num_sites=2, **config):
    """Run a client of images in this process."""
    server = ServerApp()

    @server.main()
    def main(grid, context):
        federate(FedAvg(), grid, context, client(context))

    settings = CONFIG | {"num-server-rounds": 1, "run-dir": str(folder)} | config
    run_local(server, client.client_app(), num_sites, run_config=settings)
    return folder


def predict(*arguments, code=0):
    """Run `fedmed predict` and return what it printed."""
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    assert result.exit_code == code, (result.stdout, result.exception)
    return result.stdout


class Pictures(ClassificationClient):
    """Pictures of a network that the app builds."""

    num_classes = 3
    image_shape = (1, 12, 12)

    def build_model(self):
        return nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(24, 3),
        )

    def load_data(self, site):
        rows = [picture(number, site.index) for number in range(40)]
        return SiteData(rows[:24], rows[24:28], rows[28:], source="made up")


def picture(number, seed, size=12):
    rng = np.random.default_rng((number, seed))
    pixels = rng.integers(0, 90, (size, size)).astype(np.uint8)
    pixels[:, 4 * (number % 3) : 4 * (number % 3) + 4] += 60
    return {"image": pixels, "label": number % 3, "patient": f"{seed}-{number}"}


AFFINE = np.array([[0, -1.1, 0, 20], [1.3, 0, 0, -9], [0, 0, 2.0, 4], [0, 0, 0, 1]])
NAMED = '{spatial_dims = 3, in_channels = 1, out_channels = 3, channels = [4, 8], strides = [2], norm = "instance"}'  # noqa: E501
GRID = {"spacing": "1.0,1.2,1.6", "patch-size": "16,16,16", "batch-size": 2}
GRID |= {"network": "UNet", "network-args": NAMED}


class Volumes(SegmentationClient):
    classes = ("anterior", "posterior")
    spatial_dims = 3
    modality = "mr"
    label_values = (0, 5, 9)

    def load_data(self, site):
        rows = volumes(self.folder, site.index)
        return SiteData(rows[:2], rows[2:3], rows[3:], source="made up")


class Regions(Volumes):
    """The same volumes, with regions that overlap."""

    label_values = ()
    regions = {"body": (5, 9), "Front part": (5,), "back": (9,)}  # noqa: RUF012
    classes = tuple(regions)


def volumes(folder, seed):
    return [
        {"image": f"{folder}/{seed}-{n}.nii.gz", "label": f"{folder}/{seed}-{n}-m.nii.gz"}
        | {"patient": f"{seed}-{n}"}
        for n in range(5)
    ]


def write_volumes(folder):
    """Write five volumes and masks of each of three hospitals."""
    values = np.array(Volumes.label_values, np.uint8)
    for seed in range(3):
        for number, row in enumerate(hippocampi(5, seed, 20).rows):
            image = nibabel.Nifti1Image(row["image"], AFFINE)
            nibabel.save(image, folder / f"{seed}-{number}.nii.gz")
            mask = nibabel.Nifti1Image(values[row["label"]], AFFINE)
            nibabel.save(mask, folder / f"{seed}-{number}-m.nii.gz")

    Volumes.folder = folder
