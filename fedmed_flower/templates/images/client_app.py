"""A hospital that learns from its X-rays who has pneumonia."""

from fedmed_flower import ClassificationClient, Site, SiteData
from fedmed_flower.data import load_folder, phantom_folder


class Hospital(ClassificationClient):
    """A hospital with images and their labels."""

    num_classes = 2
    modality = "xray"

    def load_data(self, site: Site) -> SiteData:
        folder = site.data_dir or phantom_folder(site, "images")
        return load_folder(folder, self.settings.seed, series=self.imaging.series)


app = Hospital.client_app()
