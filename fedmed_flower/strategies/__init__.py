"""Strategies to import into a Flower ServerApp in place of Flower's own."""

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

__all__ = [
    "Bulyan",
    "CenteredClipping",
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
