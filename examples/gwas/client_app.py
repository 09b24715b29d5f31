"""A hospital with genotypes around the lactase gene."""

from dataclasses import dataclass

from genotypes import GENERATED, lactase, made_up, read_people

from fedmed_flower import GenomicsClient, SiteData
from fedmed_flower.settings import OneOf, Section, setting


@dataclass(frozen=True)
class Genotypes(Section):
    """The genotypes and the trait of a simulation."""

    dataset: str = setting(
        "lactase",
        "lactase: 1000 Genomes, in the folder FEDMED_DATA. generated: of nobody.",
        OneOf(("lactase", "generated")),
    )
    trait: str = setting(
        "north",
        "north: northern or southern Europe. persistence: lactase persistence, generated.",
        OneOf(("north", "persistence")),
    )


class LactaseHospital(GenomicsClient):
    sections = (Genotypes,)
    phenotype = "phenotype"
    covariates = ("age",)

    def load_data(self, site):
        if site.data_dir is not None:
            return SiteData(read_people(site.data_dir / "people.csv"), source="the hospital's own")
        _, rows, source = self.simulated(site)
        trait = Genotypes.from_run_config(self.context.run_config).trait
        generated = source == GENERATED or trait == "persistence"
        return SiteData(rows, source=source, generated=generated)

    def genotypes(self, site):
        if site.data_dir is not None:
            return site.data_dir / "genotypes"
        return self.simulated(site)[0]

    def simulated(self, site):
        """Return prefix, rows and source of a hospital of the simulation."""
        wanted = Genotypes.from_run_config(self.context.run_config)
        seed = self.settings.seed
        if wanted.dataset == "generated":
            return made_up(site.index, site.num_sites, seed)
        return lactase(wanted.trait, site.index, site.num_sites, seed)


app = LactaseHospital.client_app()
