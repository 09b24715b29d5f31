"""A hospital that trains a chest X-ray classifier."""

from dataclasses import dataclass, replace

import torch
from monai.networks.nets import DenseNet
from torch.nn import functional

from fedmed_flower import ClassificationClient, Site, SiteData
from fedmed_flower.data.partition import dirichlet_shares, split_by_shares
from fedmed_flower.data.sources import load_dataset, load_medmnist
from fedmed_flower.settings import OneOf, Section, Within, setting


@dataclass(frozen=True)
class Source(Section):
    """The images of a simulation, and how they are split."""

    dataset: str = setting(
        "pneumoniamnist",
        "phantoms: generated images.",
        OneOf(("pneumoniamnist", "breastmnist", "phantoms")),
    )
    alpha: float = setting(
        2.0, "How unequal the hospitals are; small: very.", Within(0.0, above=True)
    )


class PneumoniaHospital(ClassificationClient):
    sections = (Source,)
    num_classes = 2
    image_shape = (1, 28, 28)

    @property
    def class_names(self):
        source = Source.from_run_config(self.context.run_config)
        is_breast = source.dataset == "breastmnist"
        return ("malignant", "benign or normal") if is_breast else ("normal", "pneumonia")

    def build_model(self):
        return DenseNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=2,
            init_features=32,
            growth_rate=16,
            block_config=(2, 2),
            bn_size=2,
            norm=("group", {"num_groups": 8}),
        )

    def load_data(self, site: Site) -> SiteData:
        source = Source.from_run_config(self.context.run_config)
        name = source.dataset
        seed = self.settings.seed
        if site.data_dir is not None:
            images = load_medmnist(name, path=site.data_dir / f"{name}.npz")
            if site.simulated:
                # Each file numbers its images from 0: they are different patients all the same.
                images = replace(images, prefix=f"{site.name}-")
        else:
            images = load_dataset(name)
        # The same shares for each split: a hospital is tested on patients like those it trains on.
        shares = dirichlet_shares(self.num_classes, site.num_sites, source.alpha, seed)
        rows = {}
        for split, labels in images.labels.items():
            least = 1 if split == "train" else 0
            parts = split_by_shares(labels, shares, seed, min_patients=least)
            rows[split] = images.rows(split, parts[site.index])
        return SiteData(**rows, source=images.source, generated=images.generated)

    def augment(self, images):
        """Turn (by up to 0.15 radians), scale and shift (by up to a tenth) each image anew."""
        turn, scale, x, y = torch.rand(4, len(images), device=images.device) * 2 - 1
        turn, scale = 0.15 * turn, 1 + 0.1 * scale
        cos, sin = scale * torch.cos(turn), scale * torch.sin(turn)
        rows = torch.stack([cos, -sin, 0.1 * x, sin, cos, 0.1 * y], dim=1)
        grid = functional.affine_grid(rows.view(-1, 2, 3), images.shape, align_corners=False)
        return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


app = PneumoniaHospital.client_app()
