"""A hospital that trains a chest X-ray classifier."""

from monai.networks.nets import ResNet
from monai.transforms import RandAffined

from fedmed_flower import ClassificationClient, Site, SiteData
from fedmed_flower.data.partition import dirichlet_shares, split_by_shares
from fedmed_flower.data.sources import load_dataset, load_medmnist


class PneumoniaHospital(ClassificationClient):
    num_classes = 2

    def build_model(self):
        return ResNet(
            block="basic",
            layers=[1, 1, 1, 1],
            block_inplanes=[12, 24, 48, 96],
            spatial_dims=2,
            n_input_channels=1,
            conv1_t_size=3,
            conv1_t_stride=2,
            no_max_pool=True,
            num_classes=2,
            norm=("group", {"num_groups": 4}),
        )

    def load_data(self, site: Site) -> SiteData:
        name, seed = str(self.context.run_config["dataset"]), self.settings.seed
        if site.data_dir is not None:
            images = load_medmnist(name, path=site.data_dir / f"{name}.npz")
        else:
            images = load_dataset(name)
        # The same shares for each split: a hospital is tested on patients like those it trains on.
        alpha = float(self.context.run_config["alpha"])
        shares = dirichlet_shares(self.num_classes, site.num_sites, alpha, seed)
        rows = {}
        for split, labels in images.labels.items():
            least = 1 if split == "train" else 0
            parts = split_by_shares(labels, shares, seed, min_patients=least)
            rows[split] = images.rows(split, parts[site.index])
        return SiteData(**rows, source=images.source, generated=images.generated)

    def transforms(self, train: bool):
        shaken = RandAffined(
            "image",
            prob=0.5,
            rotate_range=0.15,  # radians
            translate_range=3,
            scale_range=0.1,
            padding_mode="border",
        )
        return [*super().transforms(train), *([shaken] if train else [])]


app = PneumoniaHospital.client_app()
