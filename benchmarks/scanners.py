"""Hospitals with four different scanners: what keeping layers or a model of one's own is worth.

Each of four hospitals has a quarter of the 4,708 training images of PneumoniaMNIST, with the same
share of pneumonia, as one scanner would show them: darker in the middle grey values (gamma 2.5),
blurred (Gaussian, 1 pixel), with noise (0.15 of the range), or with a fifth of the contrast. A
hospital is tested on the 624 official test images as its own scanner shows them, by the model that
it would use: its own where the method has own models. A small network with batch normalisation is
trained for 10 rounds of one pass; all other settings are in `SETTINGS`, and were chosen once.

Figures are areas under the ROC curve: their mean over the hospitals and that of the worst one, the
mean of all seeds, which also deal the images to the hospitals.

``FEDMED_DATA=... python benchmarks/scanners.py [--seeds 3] [--rounds 10]``
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
import numpy as np
from documented import without_zero
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from monai.transforms import ScaleIntensityRanged
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import nn

from fedmed_flower import ClassificationClient, Site, SiteData, federate, run_local
from fedmed_flower.clients.imaging import LoadRow
from fedmed_flower.data.partition import split_by_shares
from fedmed_flower.data.sources import load_medmnist
from fedmed_flower.strategies import FedAvg

SCANNERS = ("gamma", "blur", "noise", "contrast")
SETTINGS: dict[str, Any] = {
    "local-epochs": 1,
    "optimizer": "adam",
    "learning-rate": 0.003,
    "batch-size": 32,
    "device": "cpu",
    "pictures": 0,
}
# What each run adds; one run gives several rows.
RUNS: dict[str, dict[str, Any]] = {
    "FedAvg": {"baselines": True, "personal-epochs": 5},
    "FedBN": {"keep": "norm"},
    "kept head": {"keep": "head.*"},
    "Ditto": {"method": "ditto"},
}
# Name, settings as the table shows them, run, and whose figures of its summary.
ROWS = (
    ("each hospital alone", "", "FedAvg", "local"),
    ("FedAvg", "", "FedAvg", "sites"),
    ("FedBN", "`keep=norm`", "FedBN", "own"),
    ("kept head", "`keep=head.*`", "kept head", "own"),
    ("fine-tuning", "`personal-epochs=5`", "FedAvg", "personal"),
    ("Ditto", "`method=ditto`", "Ditto", "own"),
    ("all data pooled", "", "FedAvg", "pooled"),
)


def scanned(images: NDArray[np.uint8], scanner: str, seed: int) -> NDArray[np.uint8]:
    """Return images (n, H, W) as a scanner shows them; `seed` decides the noise."""
    values = images / 255
    if scanner == "gamma":
        values = values**2.5
    elif scanner == "blur":
        values = gaussian_filter(values, (0, 1, 1))
    elif scanner == "noise":
        values = values + np.random.default_rng(seed).normal(0, 0.15, values.shape)
    else:
        values = 0.5 + (values - 0.5) / 5
    return np.uint8(np.rint(255 * values.clip(0, 1)))


class Network(nn.Module):
    """Three convolutions with batch normalisation, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(32 * 16, 2)

    def forward(self, images: Any) -> Any:
        """Return the scores of the two classes."""
        return self.head(self.body(images))


class Hospital(ClassificationClient):
    """A hospital with one of the scanners."""

    num_classes = 2
    class_names = ("normal", "pneumonia")
    image_shape = (1, 28, 28)

    def build_model(self) -> nn.Module:
        """Return the small network."""
        return Network()

    def transforms(self, train: bool) -> list[Any]:
        """Scale pixels to -1 to 1; what a scanner has done stays."""
        return [LoadRow(2), ScaleIntensityRanged("image", 0, 255, -1, 1)]

    def load_data(self, site: Site) -> SiteData:
        """Return a quarter of the training images, and all test images, as the scanner shows."""
        images = load_medmnist("pneumoniamnist")
        shares = np.full((2, site.num_sites), 1 / site.num_sites)
        rows = {}
        for number, (split, labels) in enumerate(images.labels.items()):
            mine = np.arange(len(labels))
            if split != "test":
                mine = split_by_shares(labels, shares, self.settings.seed)[site.index]
            found = images.rows(split, mine)
            shown = scanned(images.images[split][mine], SCANNERS[site.index], number)
            rows[split] = [
                row | {"image": image, "patient": f"{site.name} {row['patient']}"}
                for row, image in zip(found, shown, strict=True)
            ]
        return SiteData(**rows, source=f"{images.source}, {SCANNERS[site.index]}")


def run(name: str, seed: int, rounds: int) -> dict[str, Any]:
    """Return the test figures of a run's summary."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        federate(FedAvg(), grid, context, Hospital(context))

    with tempfile.TemporaryDirectory() as folder:
        config = SETTINGS | RUNS[name] | {"num-server-rounds": rounds, "seed": seed}
        config |= {"run-dir": f"{folder}/run"}
        run_local(server, Hospital.client_app(), len(SCANNERS), run_config=config)
        summary = json.loads(Path(f"{folder}/run/summary.json").read_text())
    test: dict[str, Any] = summary["test"]
    return test | {"pooled": test["pooled"]["sites"]} if "pooled" in test else test


def rows(seeds: int, rounds: int) -> Iterator[list[str]]:
    """Train, and yield the rows of the table."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        waiting = {
            (name, seed): pool.submit(run, name, seed, rounds)
            for name in RUNS
            for seed in range(seeds)
        }
        for label, settings, name, models in ROWS:
            tests = [waiting[name, seed].result()[models] for seed in range(seeds)]
            aucs = [[test[site]["auc"] for site in sorted(test)] for test in tests]
            means = [statistics.mean(each) for each in aucs]
            worst = [min(each) for each in aucs]
            each = [statistics.mean(site) for site in zip(*aucs, strict=True)]
            yield [
                *(label, settings, short(statistics.mean(means)), short(statistics.mean(worst))),
                *(" ".join(map(short, figures)) for figures in (means, worst, each)),
            ]


def short(value: float) -> str:
    """Return a figure as the table shows it."""
    return without_zero(f"{value:.3f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    documented.add_options(parser)
    options = parser.parse_args()
    began = time.perf_counter()
    head = ("AUC on own test images", "settings", "mean of hospitals", "worst hospital")
    head += ("mean, each seed", "worst, each seed", " ".join(SCANNERS))
    found = rows(options.seeds, options.rounds)
    documented.show("scanners", head, found, options, threads=1)
    print(f"{(time.perf_counter() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
