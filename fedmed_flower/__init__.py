"""Medical federated learning on Flower: hospitals train one model and share no record."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmed_flower.clients.base import MedicalClient
    from fedmed_flower.clients.classification import ClassificationClient
    from fedmed_flower.clients.genomics import GenomicsClient
    from fedmed_flower.clients.segmentation import SegmentationClient
    from fedmed_flower.clients.survival import SurvivalClient
    from fedmed_flower.clients.tabular import TabularClient
    from fedmed_flower.data.schema import Schema
    from fedmed_flower.data.site import Site, SiteData
    from fedmed_flower.errors import InputError
    from fedmed_flower.experiment import federate
    from fedmed_flower.growing import grow
    from fedmed_flower.simulation import run_local

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

_HOMES = {
    "ClassificationClient": "clients.classification",
    "GenomicsClient": "clients.genomics",
    "InputError": "errors",
    "MedicalClient": "clients.base",
    "Schema": "data.schema",
    "SegmentationClient": "clients.segmentation",
    "Site": "data.site",
    "SiteData": "data.site",
    "SurvivalClient": "clients.survival",
    "TabularClient": "clients.tabular",
    "federate": "experiment",
    "grow": "growing",
    "run_local": "simulation",
}


def __getattr__(name: str) -> Any:
    # A server that only takes a strategy must not wait for torch and MONAI to load.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
