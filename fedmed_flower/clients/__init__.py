"""Clients to subclass for a hospital's data."""

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.classification import ClassificationClient
from fedmed_flower.clients.segmentation import SegmentationClient
from fedmed_flower.data.site import Site, SiteData

__all__ = ["ClassificationClient", "MedicalClient", "SegmentationClient", "Site", "SiteData"]
