"""PneumoniaMNIST in five hospitals, with secure sums and without.

The example's hospitals (Dirichlet(2) shares of the 4,708 training images) train the small CNN of
``private_pneumonia.py`` twice from the same seed: once the server sees each hospital's model, once
it sees sums alone. Figures are areas under the ROC curve of the final model on the 624 official
test images. In the secure run hospitals count scores in cells, and the server makes the area of
these counts; the other figure of that run is by the scores themselves, which a simulation has.

``FEDMED_DATA=... python benchmarks/secure_pneumonia.py [--seeds 3] [--rounds 10]``
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
import torch
from documented import without_zero
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from private_pneumonia import Hospital
from safetensors.torch import load_file
from torchmetrics.functional.classification import binary_auroc

from fedmed_flower import federate, run_local
from fedmed_flower.data.sources import load_dataset
from fedmed_flower.strategies import FedAvg

SITES = 5
SETTINGS: dict[str, Any] = {
    "dataset": "pneumoniamnist",
    "alpha": 2.0,
    "local-epochs": 1,
    "batch-size": 32,
    "optimizer": "adam",
    "learning-rate": 0.003,
    "device": "cpu",
}
