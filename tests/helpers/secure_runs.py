"""Training by secure sums in one process."""

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from tiny import CONFIG

from fedmed_flower import run_local


def start_of(client):
    """Return the model with which a client's training starts, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return ArrayRecord(client.build_model(client).state_dict())


def trained(make, client, folder, sites=5, rounds=2, mods=(), nodes=None, **config):
    """Train by a strategy, and return it."""
    app = ServerApp()
    found = []

    @app.main()
    def main(grid, context):
        strategy = make(run_dir=folder, fraction_evaluate=0.0, seed=1)
        found.append(strategy)
        strategy.start(grid, start_of(client), rounds)

    run_local(
        app,
        client.client_app(mods=list(mods)),
        sites,
        run_config=CONFIG | {"run-dir": str(folder)} | config,
        node_configs=nodes,
    )
    return found[0]


def difference(one, other):
    """Return the largest difference of two models' floats."""
    pairs = [(one[key].numpy(), other[key].numpy()) for key in one]
    return max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in pairs)


def failures(strategy):
    return [(f.round, f.phase, f.site, f.reason) for f in strategy.history.failures]
