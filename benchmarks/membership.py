"""Who was trained on, told from a model: a membership test, and an audit by canaries.

`membership_test`: five hospitals with 100 chest X-rays each (PneumoniaMNIST, or generated ones
where that cannot be had) train the CNN of `private_pneumonia`. Who has the final model is given
those 500 images and 500 others of the same source, and ranks them by how likely each was trained
on: by the loss alone (Yeom et al. 2018, https://arxiv.org/abs/1709.01604), and by the ratio of
likelihoods among shadow models that were trained in the same way on a random half of the 1,000
(LiRA, Carlini et al. 2022, https://arxiv.org/abs/2112.03570, with one variance for all). An area
under the ROC curve of one half is a guess.

`canary_audit`: a real hospital with 4,000 canaries, about half of which a fair coin lets in, is
asked for updates; from the weights that come back follows what epsilon is refuted, as
`privacy_audit` has it. Without noise that is as much as so many canaries can refute.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import nn

from fedmed_flower import Site, SiteData, federate, run_local
from fedmed_flower.data.phantoms import chest_xrays
from fedmed_flower.data.sources import SourceUnavailable, load_medmnist
from fedmed_flower.strategies import FedAvg

sys.path.insert(0, str(Path(__file__).resolve().parent))
import private_pneumonia  # noqa: E402

SITES, MEMBERS, SHADOWS = 5, 500, 8
Floats = NDArray[np.float64]


class Candidates(NamedTuple):
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    source: str


def candidates() -> Candidates:
    try:
        found = load_medmnist("pneumoniamnist")
    except SourceUnavailable:
        found = chest_xrays(2 * MEMBERS, 0, 0, seed=0)
    chosen = np.random.default_rng(0).permutation(len(found.labels["train"]))[: 2 * MEMBERS]
    return Candidates(found.images["train"][chosen], found.labels["train"][chosen], found.source)


class Hospital(private_pneumonia.Hospital):
    pool: Any = None
    inside: Any = None

    def load_data(self, site: Site) -> SiteData:
        places = np.flatnonzero(self.inside)[site.index :: site.num_sites]
        return SiteData(
            [
                {"image": self.pool.images[p], "label": int(self.pool.labels[p]), "patient": int(p)}
                for p in places
            ]
        )


def trained(data: Candidates, inside, rounds: int, epsilon: float, seed: int, **more) -> nn.Module:
    client = type("Member", (Hospital,), {"pool": data, "inside": inside})
    with tempfile.TemporaryDirectory() as folder:
        config = private_pneumonia.SETTINGS | {
            "num-server-rounds": rounds,
            "seed": seed,
            "run-dir": f"{folder}/run",
            "pictures": 0,
        }
        if epsilon:
            config |= {"privacy": "patient", "target-epsilon": epsilon, "private-metrics": False}
        else:
            config |= {"batch-size": 32, "learning-rate": 0.003}
        config |= more
        server, found = ServerApp(), []

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            model = client(context).build_model()
            result = federate(FedAvg(), grid, context, client(context).build_model)
            model.load_state_dict(result.arrays.to_torch_state_dict())
            found.append(model)

        run_local(server, client.client_app(), SITES, run_config=config)
    return found[0]


@torch.no_grad()
def confidence(model, data: Candidates) -> Floats:
    """log odds of the right class."""
    model.eval()
    images = torch.from_numpy(data.images).float()[:, None] / 127.5 - 1
    out = model(images).double().numpy()
    margin = out[:, 1] - out[:, 0]
    return np.where(data.labels == 1, margin, -margin)
