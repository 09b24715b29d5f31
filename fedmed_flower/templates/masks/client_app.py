"""A hospital that learns from its MR volumes to outline the hippocampus."""

from fedmed_flower import SegmentationClient, Site, SiteData
from fedmed_flower.data import load_folder, phantom_folder


class Hospital(SegmentationClient):
    """A hospital with images and their outlined structures."""

    classes = ("anterior", "posterior")
    spatial_dims = 3
    modality = "mr"

    def load_data(self, site: Site) -> SiteData:
        folder = site.data_dir or phantom_folder(site, "masks")
        return load_folder(folder, self.settings.seed, series=self.imaging.series)


app = Hospital.client_app()
