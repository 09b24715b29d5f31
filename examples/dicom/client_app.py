"""A hospital that finds lesions in CT: its folder of DICOM series is all that it gives."""

from dataclasses import dataclass
from pathlib import Path

from fedmed_flower import ClassificationClient, InputError, Site, SiteData
from fedmed_flower.data.datalist import load_folder
from fedmed_flower.settings import Section, setting


@dataclass(frozen=True)
class Folders(Section):
    """Where the data of a simulation are."""

    folder: str = setting(
        "dicom-data", "A folder with one folder for each hospital, as write.py makes it."
    )


class CTHospital(ClassificationClient):
    sections = (Folders,)
    num_classes = 2
    spatial_dims = 3
    modality = "ct"

    def load_data(self, site: Site) -> SiteData:
        folder = site.data_dir
        if folder is None:
            # In a simulation each hospital is a folder beside the others.
            root = Path(Folders.from_run_config(self.context.run_config).folder)
            folders = sorted(path for path in root.glob("*") if path.is_dir())
            if len(folders) != site.num_sites:
                raise InputError(
                    f"folder {root} holds {len(folders)} hospitals for {site.num_sites} sites: "
                    "write them with examples/dicom/write.py, or give --sites"
                )
            folder = folders[site.index]
        return load_folder(folder, self.settings.seed, series=self.imaging.series)


app = CTHospital.client_app()
