"""Medical federated learning on Flower: hospitals train one model and share no record."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.clients.base import MedicalClient
    from fedmed_flower.clients.classification import ClassificationClient
    from fedmed_flower.clients.segmentation import SegmentationClient
    from fedmed_flower.clients.survival import SurvivalClient
    from fedmed_flower.clients.tabular import TabularClient
    from fedmed_flower.data.schema import Schema
    from fedmed_flower.data.site import Site, SiteData
    from fedmed_flower.engines.local import run_local
    from fedmed_flower.errors import InputError
    from fedmed_flower.genomics.client import GenomicsClient
    from fedmed_flower.runs.experiment import federate
    from fedmed_flower.trees.server import grow

__all__ = [
    "ClassificationClient",
    "GenomicsClient",
    "InputError",
    "MedicalClient",
    "Schema",
    "SegmentationClient",
    "Site",
    "SiteData",
    "SurvivalClient",
    "TabularClient",
    "federate",
    "grow",
    "run_local",
]

__getattr__ = on_demand(
    __name__,
    {
        "ClassificationClient": "clients.classification",
        "GenomicsClient": "genomics.client",
        "InputError": "errors",
        "MedicalClient": "clients.base",
        "Schema": "data.schema",
        "SegmentationClient": "clients.segmentation",
        "Site": "data.site",
        "SiteData": "data.site",
        "SurvivalClient": "clients.survival",
        "TabularClient": "clients.tabular",
        "federate": "runs.experiment",
        "grow": "trees.server",
        "run_local": "engines.local",
    },
)
