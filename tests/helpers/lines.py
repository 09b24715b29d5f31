"""Hospitals that fit a line: the client of a Flower app, and its rounds in plain NumPy.

The text of this file is the client's module in apps that tests write.
"""

import time

import numpy as np
import torch
from torch import nn

from fedmed_flower import MedicalClient, SiteData

SIZE = 40
RATE = 0.05
SETTINGS = {"learning-rate": RATE, "batch-size": 1000, "optimizer": "sgd", "device": "cpu"}


def rows_of(name):
    """Return features and targets of a hospital; the number of rows follows from its name."""
    generator = np.random.default_rng(sum(name.encode()))
    features = generator.normal(size=(20 + sum(name.encode()) % 17, SIZE)).astype(np.float32)
    return features, generator.normal(size=len(features)).astype(np.float32)


def change_of(name, weights):
    """Return by how much a hospital changes the weights in a round: one step on all its rows."""
    features, targets = (part.astype(np.float64) for part in rows_of(name))
    return -RATE * features.T @ (features @ weights - targets) / len(targets)


class Lines(MedicalClient):
    """Least squares, one step a round on all rows."""

    def build_model(self):
        return nn.Linear(SIZE, 1, bias=False)

    def load_data(self, site):
        features, targets = rows_of(site.name)
        rows = [
            {"x": x, "y": y, "patient": f"{site.name}-{number}"}
            for number, (x, y) in enumerate(zip(features, targets, strict=True))
        ]
        return SiteData(train=rows, val=[], test=[], source="lines")

    def prepare(self, rows, train):
        features = torch.tensor(np.array([row["x"] for row in rows]))
        return list(zip(features, torch.tensor([float(row["y"]) for row in rows]), strict=True))

    def batch_of(self, prepared, indices):
        features, targets = zip(*(prepared[index] for index in indices), strict=True)
        return {"x": torch.stack(features), "y": torch.stack(targets)}

    def loss_of(self, model, batch):
        return 0.5 * ((model(batch["x"])[:, 0] - batch["y"]) ** 2).mean()

    def fit(self, model, prepared, seed):
        """Train; if the hospital's folder holds a file ``halt``, say so and never come back."""
        metrics = super().fit(model, prepared, seed)
        if (self.site.folder / "halt").exists():
            (self.site.folder / "halted").touch()
            time.sleep(3600)
        return metrics


app = Lines.client_app()
