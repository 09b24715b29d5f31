"""What a curious server sends, for tests."""

import json

import torch
from hospitals import Images, Lives, Masks, Table
from tiny import context_of

from fedmed_flower.models.networks import build_network
from fedmed_flower.settings.model import ModelSettings

PRIVATE = {"privacy": "patient", "preparation": "declared", "num-server-rounds": 1}
PRIVATE |= {"sampling-rate": 0.5, "local-steps": 1, "target-epsilon": 8.0, "device": "cpu"}


def network(outputs):
    return {
        "network": "Classifier",
        "network-args": json.dumps(
            {"in_shape": [1, 8, 8], "classes": outputs, "channels": [2], "strides": [2]}
        ),
    }


def model_of(client, outputs):
    torch.manual_seed(0)
    if client is Images:
        return build_network(
            ModelSettings(**{k.replace("-", "_"): v for k, v in network(outputs).items()})
        )
    if client is Masks:
        return torch.nn.Conv2d(1, outputs, 1)
    if client is Lives:
        run = {
            "survival-loss": "discrete",
            "survival-horizon": 365.0,
            "survival-intervals": outputs,
        }
        return Lives(context_of(node_config={"site-name": "a"}, **PRIVATE | run)).build_model()
    return torch.nn.Linear(2, outputs)


OUTPUTS = {Images: 4, Masks: 2, Table: 3, Lives: 3}
