"""Medical federated learning on Flower: hospitals train one model and share no record."""

from fedmed_flower.clients import ClassificationClient, MedicalClient
from fedmed_flower.data.site import Site, SiteData
from fedmed_flower.errors import InputError
from fedmed_flower.experiment import federate
from fedmed_flower.simulation import run_local

__all__ = [
    "ClassificationClient",
    "InputError",
    "MedicalClient",
    "Site",
    "SiteData",
    "federate",
    "run_local",
]
