"""Strategies to import into a Flower ServerApp in place of Flower's own."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.strategies.averaging import FedAdagrad as FedAdagrad
    from fedmed_flower.strategies.averaging import FedAdam as FedAdam
    from fedmed_flower.strategies.averaging import FedAvgM as FedAvgM
    from fedmed_flower.strategies.averaging import FedProx as FedProx
    from fedmed_flower.strategies.averaging import FedYogi as FedYogi
    from fedmed_flower.strategies.averaging import QFedAvg as QFedAvg
    from fedmed_flower.strategies.averaging import WeightedFedAvg as WeightedFedAvg
    from fedmed_flower.strategies.base import FedAvg as FedAvg
    from fedmed_flower.strategies.private import DPFedAvg as DPFedAvg
    from fedmed_flower.strategies.robust import Bulyan as Bulyan
    from fedmed_flower.strategies.robust import CenteredClipping as CenteredClipping
    from fedmed_flower.strategies.robust import FedMedian as FedMedian
    from fedmed_flower.strategies.robust import FedTrimmedAvg as FedTrimmedAvg
    from fedmed_flower.strategies.robust import GeometricMedian as GeometricMedian
    from fedmed_flower.strategies.robust import Krum as Krum
    from fedmed_flower.strategies.robust import MultiKrum as MultiKrum

__getattr__, __all__ = on_demand(
    __name__,
    {
        "Bulyan": "robust",
        "CenteredClipping": "robust",
        "DPFedAvg": "private",
        "FedAdagrad": "averaging",
        "FedAdam": "averaging",
        "FedAvg": "base",
        "FedAvgM": "averaging",
        "FedMedian": "robust",
        "FedProx": "averaging",
        "FedTrimmedAvg": "robust",
        "FedYogi": "averaging",
        "GeometricMedian": "robust",
        "Krum": "robust",
        "MultiKrum": "robust",
        "QFedAvg": "averaging",
        "WeightedFedAvg": "averaging",
    },
)
