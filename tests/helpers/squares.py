"""Hospitals whose losses are squares: where a run must end is known in closed form."""

import numpy as np
import torch
from flwr.serverapp import ServerApp
from safetensors.numpy import load_file
from torch import nn

from fedmed_flower import MedicalClient, SiteData, federate, run_local
from fedmed_flower.strategies import FedAvg

# Rows, curvature and optimum differ between the sites.
ROWS = (12, 36)
SQUARES = {"optimizer": "sgd", "learning-rate": 0.1, "batch-size": 100, "device": "cpu"}
SQUARES |= {"pictures": 0, "local-epochs": 8}


def problem():
    """Return features and targets of each site."""
    generator = np.random.default_rng(3)
    sites = []
    for number, count in enumerate(ROWS):
        features = generator.normal(size=(count, 2)) * (1 + number, 2 - number)
        truth = np.array([3.0, -1.0]) if number else np.array([-2.0, 2.0])
        targets = features @ truth + generator.normal(size=count)
        sites.append((features.astype(np.float32), targets.astype(np.float32)))
    return sites


def pooled_optimum(sites):
    """Return the least-squares solution of all rows together."""
    features = np.concatenate([each[0] for each in sites]).astype(np.float64)
    targets = np.concatenate([each[1] for each in sites]).astype(np.float64)
    return np.linalg.lstsq(features, targets, rcond=None)[0]


class Squares(MedicalClient):
    """Least squares in two weights; each step sees all rows of the site."""

    sites = problem()

    def build_model(self):
        return nn.Linear(self.sites[0][0].shape[1], 1, bias=False)

    def load_data(self, site):
        features, targets = self.sites[site.index]
        splits = {
            split: [
                {"x": x, "y": y, "patient": f"{site.name}-{split}-{number}"}
                for number, (x, y) in enumerate(zip(features, targets, strict=True))
            ]
            for split in ("train", "val", "test")
        }
        return SiteData(**splits, source="squares")

    def prepare(self, rows, train):
        features = torch.tensor(np.array([row["x"] for row in rows]))
        return list(zip(features, torch.tensor([float(row["y"]) for row in rows]), strict=True))

    def batch_of(self, prepared, indices):
        features, targets = zip(*(prepared[index] for index in indices), strict=True)
        return {"x": torch.stack(features), "y": torch.stack(targets)}

    def loss_of(self, model, batch):
        return 0.5 * ((model(batch["x"])[:, 0] - batch["y"]) ** 2).mean()

    def measure(self, model, prepared):
        with torch.no_grad():
            loss = float(self.loss_of(model, self.batch_of(prepared, range(len(prepared)))))
        return {"num-examples": len(prepared), "loss": loss, "mae": loss}


def points(*values):
    """Return a client whose sites estimate one number each, from these values."""
    made = [(np.ones((len(v), 1), np.float32), np.array(v, np.float32)) for v in values]
    return type("Points", (Squares,), {"sites": made})


def run_squares(folder, client=Squares, strategy=None, **config):
    """Run an experiment and return its result."""
    server = ServerApp()
    made = FedAvg() if strategy is None else strategy

    @server.main()
    def main(grid, context):
        federate(made, grid, context, client(context))

    settings = SQUARES | {"run-dir": str(folder)}
    settings |= {key.replace("_", "-"): value for key, value in config.items()}
    run = run_local(server, client.client_app(), len(client.sites), run_config=settings)
    return run.result


def weights_of(result):
    """Return the weights of a run's model as float64."""
    return result.arrays["weight"].numpy().astype(np.float64).ravel()


def own_weights(folder, site):
    """Return the weights of a site's own model, as a run has written them."""
    return load_file(folder / "own" / f"{site}.safetensors")["weight"].astype(np.float64).ravel()


def dying(client, number, server_round):
    """Return a client that is interrupted as the second site trains in a round, once."""
    left = [server_round]

    def fit(self, model, prepared, seed):
        if self.site.index == number and self.progress >= (server_round - 1) / 6 and left:
            left.clear()
            raise KeyboardInterrupt
        return client.fit(self, model, prepared, seed)

    return type("Dying", (client,), {"fit": fit})
