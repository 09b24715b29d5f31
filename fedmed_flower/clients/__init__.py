"""Clients to subclass for a hospital's data."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.clients.augmenting import random_affine as random_affine
    from fedmed_flower.clients.augmenting import random_intensity as random_intensity
    from fedmed_flower.clients.bags import BagClient as BagClient
    from fedmed_flower.clients.base import MedicalClient as MedicalClient
    from fedmed_flower.clients.classification import ClassificationClient as ClassificationClient
    from fedmed_flower.clients.findings import FindingsClient as FindingsClient
    from fedmed_flower.clients.grading import GradingClient as GradingClient
    from fedmed_flower.clients.measurement import MeasurementClient as MeasurementClient
    from fedmed_flower.clients.segmentation import SegmentationClient as SegmentationClient
    from fedmed_flower.clients.survival import SurvivalClient as SurvivalClient
    from fedmed_flower.clients.tabular import TabularClient as TabularClient

__getattr__, __all__ = on_demand(
    __name__,
    {
        "BagClient": "bags",
        "ClassificationClient": "classification",
        "FindingsClient": "findings",
        "GradingClient": "grading",
        "MeasurementClient": "measurement",
        "MedicalClient": "base",
        "SegmentationClient": "segmentation",
        "SurvivalClient": "survival",
        "TabularClient": "tabular",
        "random_affine": "augmenting",
        "random_intensity": "augmenting",
    },
)
