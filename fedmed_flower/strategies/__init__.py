"""Strategies to import into a Flower ServerApp in place of Flower's own."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand
from fedmed_flower.strategies.averaging import (
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedProx,
    FedYogi,
    QFedAvg,
    WeightedFedAvg,
)
from fedmed_flower.strategies.base import FedAvg
from fedmed_flower.strategies.robust import (
    Bulyan,
    CenteredClipping,
    FedMedian,
    FedTrimmedAvg,
    GeometricMedian,
    Krum,
    MultiKrum,
)

if TYPE_CHECKING:
    from fedmed_flower.strategies.private import DPFedAvg

__all__ = [
    "Bulyan",
    "CenteredClipping",
    "DPFedAvg",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedMedian",
    "FedProx",
    "FedTrimmedAvg",
    "FedYogi",
    "GeometricMedian",
    "Krum",
    "MultiKrum",
    "QFedAvg",
    "WeightedFedAvg",
]


# The accountant takes a second to load: the other strategies do not wait for it.
__getattr__, _ = on_demand(__name__, {"DPFedAvg": "private"})
