"""Evaluation by secure sums: the same figures over all rows as in the plain run, and no others."""

import json
from dataclasses import replace

import numpy as np
import pytest
from flwr.serverapp import ServerApp
from tables import SCHEMA, TinySurvival, TinyTable, predicting
from tiny import CONFIG, TinyClient, make_rows
from torch import nn

from fedmed_flower import SegmentationClient, SiteData, federate, run_local
from fedmed_flower.strategies import FedAvg

# Of scores on the grid of all hospitals.
TOLERANCES = {"auc": 1e-3, "average-precision": 2e-3}
# Spreads are differences of two sums.
EXACT = 1e-9
DECLARED = {"preparation": "declared"}


class Three(TinyClient):
    num_classes = 3

    def load_data(self, site):
        train, val, test = (
            make_rows(count, (site.index, split), f"{site.name}-{split}", 3)
            for split, count in enumerate((12, 6, 20 + site.index))
        )
        return SiteData(train=train, val=val, test=test, source="tiny images")


class Declared(TinyTable):
    schema = replace(SCHEMA, categories={"sex": ("f", "m"), "ward": ("a", "b", "c")})


class Masks(SegmentationClient):
    classes = ("low", "high")
    image_shape = (1, 8, 8)

    def build_model(self):
        return nn.Conv2d(1, 3, 1)

    def load_data(self, site):
        def rows(split, count):
            rng = np.random.default_rng((site.index, split))
            masks = [rng.integers(0, 3, (8, 8)).astype(np.uint8) for _ in range(count)]
            return [
                {
                    "image": (mask * 80.0 + rng.normal(0, 30, mask.shape)).astype(np.float32),
                    "label": mask,
                    "patient": f"{site.name}-{split}-{number}",
                }
                for number, mask in enumerate(masks)
            ]

        return SiteData(train=rows(0, 4), val=rows(1, 2), test=rows(2, 3 + site.index))


def run(folder, client, num_sites=4, strategy=None, **config):
    """Run an experiment; return its summary."""
    server = ServerApp()

    @server.main()
    def main(grid, context):
        federate(strategy or FedAvg(), grid, context, client(context))

    settings = CONFIG | {"num-server-rounds": 1, "run-dir": str(folder)}
    settings |= {key.replace("_", "-"): value for key, value in config.items()}
    run_local(server, client.client_app(), num_sites, run_config=settings)
    return json.loads((folder / "summary.json").read_text())


def differences(folder, client, **config):
    """Return the figures of one model by plain replies, and those by a secure sum that differ."""
    run(folder / "model", client, **config)
    plain, secure = (
        run(folder / kind, client, evaluate=str(folder / "model"), secure=kind, **config)
        for kind in ("none", "sum")
    )
    first = plain["test"]["federated"]
    second = secure["test"]["federated"]
    assert secure["test"]["sites"] == {}
    assert len(plain["test"]["sites"]) == 4
    return first, {
        name: (first.get(name), second.get(name))
        for name in first.keys() | second.keys()
        if second.get(name)
        != pytest.approx(
            first.get(name), rel=EXACT, abs=TOLERANCES.get(name.partition("@")[0], EXACT)
        )
    }


@pytest.mark.parametrize(
    ("client", "config", "expected"),
    [
        (TinyClient, {}, {"loss", "accuracy", "sensitivity", "auc"}),
        (Three, {}, {"loss", "accuracy", "balanced-accuracy", "auc"}),
        (Masks, {}, {"dice", "dice-low", "hd95-high"}),
        (
            Declared,
            DECLARED | {"report-by": "sex,age-band"},
            {"auc", "average-precision", "brier", "calibration-error", "auc@sex=f", "loss"},
        ),
        (predicting("multi-class"), DECLARED, {"auc", "brier", "calibration-error"}),
        (predicting("continuous"), DECLARED, {"r2", "mae", "rmse"}),
        (predicting("cost"), DECLARED, {"r2", "mae", "rmse"}),
        (predicting("count"), DECLARED, {"d2", "mae", "deviance"}),
        (predicting("stays"), DECLARED, {"d2", "mae", "deviance"}),
        (
            TinySurvival,
            DECLARED | {"survival-horizon": 365.0},
            {"c-index", "integrated-brier", "loss"},
        ),
    ],
)
def test_figures_of_all_rows_are_those_of_the_plain_run(tmp_path, client, config, expected):
    plain, different = differences(tmp_path, client, **config)
    # What is no sum, the lowest Dice of a patient, does not travel.
    different.pop("dice-worst", None)
    assert not different
    assert expected <= plain.keys()
