"""Clients to subclass for a hospital's data."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.clients.augmenting import random_affine, random_intensity
    from fedmed_flower.clients.base import MedicalClient
    from fedmed_flower.clients.classification import ClassificationClient
    from fedmed_flower.clients.segmentation import SegmentationClient
    from fedmed_flower.clients.survival import SurvivalClient
    from fedmed_flower.clients.tabular import TabularClient

__all__ = [
    "ClassificationClient",
    "MedicalClient",
    "SegmentationClient",
    "SurvivalClient",
    "TabularClient",
    "random_affine",
    "random_intensity",
]

__getattr__ = on_demand(
    __name__,
    {
        "ClassificationClient": "classification",
        "MedicalClient": "base",
        "SegmentationClient": "segmentation",
        "SurvivalClient": "survival",
        "TabularClient": "tabular",
        "random_affine": "augmenting",
        "random_intensity": "augmenting",
    },
)
