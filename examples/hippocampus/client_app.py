"""A hospital that outlines the hippocampus in brain MR."""

from dataclasses import dataclass

import numpy as np
from monai.losses import DiceCELoss

from fedmed_flower import SegmentationClient, Site, SiteData
from fedmed_flower.clients.augmenting import random_affine, random_intensity
from fedmed_flower.data.datalist import load_folder, split_patients
from fedmed_flower.data.decathlon import load_hippocampus
from fedmed_flower.data.partition import by_quantity
from fedmed_flower.data.phantoms import hippocampi
from fedmed_flower.settings import OneOf, Section, setting


@dataclass(frozen=True)
class Source(Section):
    """The volumes of a simulation."""

    dataset: str = setting(
        "hippocampus",
        "hippocampus: Medical Segmentation Decathlon. phantoms: generated volumes.",
        OneOf(("hippocampus", "phantoms")),
    )


class HippocampusHospital(SegmentationClient):
    sections = (Source,)
    classes = ("anterior", "posterior")
    spatial_dims = 3
    modality = "mr"

    def load_data(self, site: Site) -> SiteData:
        seed = self.settings.seed
        if site.data_dir is not None:
            return load_folder(site.data_dir, seed, series=self.imaging.series)
        name = Source.from_run_config(self.context.run_config).dataset
        volumes = load_hippocampus() if name == "hippocampus" else hippocampi(60, seed)
        # The first hospital has twice as many patients as the last.
        shares = np.linspace(2, 1, site.num_sites)
        part = by_quantity(len(volumes.rows), shares, seed)[site.index]
        splits = split_patients([volumes.rows[number] for number in part], seed)
        return SiteData(**splits, source=volumes.source, generated=volumes.generated)

    def loss(self):
        if not self.privacy.on:
            return super().loss()
        # Nearly all voxels are background: under noise nothing else would be learnt of them.
        return DiceCELoss(softmax=True, include_background=False, lambda_ce=0.2)

    def augment(self, images, labels):
        images, labels = random_affine(images, labels, turn=0.25, scale=0.15, shift=0.05)
        return random_intensity(images), labels


app = HippocampusHospital.client_app()
