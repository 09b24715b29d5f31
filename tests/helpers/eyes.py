"""Hospitals with generated eyes, for clients that say something of a whole image."""

import torch
from tiny import run_tiny
from torch import nn

from fedmed_flower import FindingsClient, GradingClient, MeasurementClient, SiteData
from fedmed_flower.data.phantoms import eyes

FINDINGS = ("haemorrhages", "exudates", "large cup")
GRADES = ("none", "mild", "moderate", "severe", "proliferative")


def network(outputs):
    """Return a small network that sees bright and dark spots, and where they are."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, outputs),
    )


class Eyes:
    """The rows of a hospital; `label` says which part of an eye is its label."""

    image_shape = (1, 32, 32)
    train = 60
    test = 60

    def load_data(self, site):
        rows = [
            {"image": row["image"], "label": self.told(row, site), "patient": row["patient"]}
            for row in eyes(self.train + self.test, seed=site.index + 1)
        ]
        return SiteData(rows[: self.train], test=rows[self.train :], generated=True)


class Findings(Eyes, FindingsClient):
    findings = FINDINGS

    def build_model(self):
        return network(3)

    def told(self, row, site):
        # The second hospital never looks for exudates.
        return {name: row["findings"][name] for name in FINDINGS if (name, site.index) != UNREAD}


UNREAD = ("exudates", 1)


class Cups(Eyes, MeasurementClient):
    low = 0.0
    high = 1.0
    unit = "of the disc"

    def build_model(self):
        return network(1)

    def told(self, row, site):
        return row["cup"]


class Grades(Eyes, GradingClient):
    grades = GRADES

    def build_model(self):
        return network(4)

    def told(self, row, site):
        return row["grade"]


def run_eyes(folder, client, outputs, num_sites=2, **config):
    """Run a client's hospitals in this process."""
    settings = {"num_server_rounds": 4, "local_epochs": 6, "learning_rate": 0.01}
    settings |= {"optimizer": "adam", "batch_size": 16} | config
    return run_tiny(folder, client, num_sites, model=lambda: _fresh(outputs), **settings)


def _fresh(outputs):
    torch.manual_seed(0)
    return network(outputs)
