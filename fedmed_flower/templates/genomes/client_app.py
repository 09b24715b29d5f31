"""A hospital with genotypes, whose people are tested for variants that go with diabetes."""

from pathlib import Path

import pandas as pd

from fedmed_flower import GenomicsClient, Site, SiteData
from fedmed_flower.data import phantom_folder


class Hospital(GenomicsClient):
    """A hospital with genotype files and a table of traits."""

    phenotype = "diabetes"
    covariates = ("age", "sex")

    def folder(self, site: Site) -> Path:
        return site.data_dir or phantom_folder(site, "genomes")

    def load_data(self, site: Site) -> SiteData:
        folder = self.folder(site)
        people = pd.read_csv(folder / "people.csv", dtype={"patient": str})
        return SiteData(
            people.to_dict("records"),
            source="people.csv",
            generated=(folder / "GENERATED").exists(),
        )

    def genotypes(self, site: Site) -> Path:
        return self.folder(site) / "cohort"


app = Hospital.client_app()
