"""Medical federated learning on Flower: hospitals train one model and share no record."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.clients.bags import BagClient as BagClient
    from fedmed_flower.clients.base import MedicalClient as MedicalClient
    from fedmed_flower.clients.classification import ClassificationClient as ClassificationClient
    from fedmed_flower.clients.findings import FindingsClient as FindingsClient
    from fedmed_flower.clients.grading import GradingClient as GradingClient
    from fedmed_flower.clients.measurement import MeasurementClient as MeasurementClient
    from fedmed_flower.clients.segmentation import SegmentationClient as SegmentationClient
    from fedmed_flower.clients.survival import SurvivalClient as SurvivalClient
    from fedmed_flower.clients.tabular import TabularClient as TabularClient
    from fedmed_flower.data.schema import Schema as Schema
    from fedmed_flower.data.site import Site as Site
    from fedmed_flower.data.site import SiteData as SiteData
    from fedmed_flower.engines.local import run_local as run_local
    from fedmed_flower.errors import InputError as InputError
    from fedmed_flower.genomics.client import GenomicsClient as GenomicsClient
    from fedmed_flower.runs.experiment import federate as federate
    from fedmed_flower.trees.server import grow as grow

__getattr__, __all__ = on_demand(
    __name__,
    {
        "BagClient": "clients.bags",
        "ClassificationClient": "clients.classification",
        "FindingsClient": "clients.findings",
        "GenomicsClient": "genomics.client",
        "GradingClient": "clients.grading",
        "InputError": "errors",
        "MeasurementClient": "clients.measurement",
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
