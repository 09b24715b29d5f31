"""A hospital that finds lesions in CT: its folder of DICOM series is all that it gives."""

from dataclasses import replace
from pathlib import Path

from fedmed_flower import ClassificationClient, InputError, Site, SiteData
from fedmed_flower.data.datalist import load_folder


class CTHospital(ClassificationClient):
    num_classes = 2
    spatial_dims = 3
    modality = "ct"

    def load_data(self, site: Site) -> SiteData:
        folder = site.data_dir
        if folder is None:
            # In a simulation each hospital is a folder beside the others.
            root = Path(str(self.context.run_config["folder"]))
            folders = sorted(path for path in root.glob("*") if path.is_dir())
            if len(folders) != site.num_sites:
                raise InputError(
                    f"folder {root} holds {len(folders)} hospitals for {site.num_sites} sites: "
                    "write them with examples/dicom/write.py, or give --sites"
                )
            folder = folders[site.index]
        data = load_folder(folder, self.settings.seed)
        return replace(data, generated=(folder / "GENERATED").exists())


app = CTHospital.client_app()
