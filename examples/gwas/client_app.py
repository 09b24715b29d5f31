"""A hospital with genotypes around the lactase gene."""

from genotypes import GENERATED, lactase, made_up, read_people

from fedmed_flower import GenomicsClient, InputError, SiteData


class LactaseHospital(GenomicsClient):
    phenotype = "phenotype"
    covariates = ("age",)

    def load_data(self, site):
        if site.data_dir is not None:
            return SiteData(read_people(site.data_dir / "people.csv"), source="the hospital's own")
        _, rows, source = self.simulated(site)
        made = source == GENERATED or self.context.run_config["trait"] == "persistence"
        return SiteData(rows, source=source, generated=made)

    def genotypes(self, site):
        if site.data_dir is not None:
            return site.data_dir / "genotypes"
        return self.simulated(site)[0]

    def simulated(self, site):
        """Return prefix, rows and source of a hospital of the simulation."""
        config, seed = self.context.run_config, self.settings.seed
        if config["trait"] not in ("north", "persistence"):
            raise InputError(f"trait must be north or persistence, got {config['trait']!r}")
        if config["dataset"] not in ("lactase", "generated"):
            raise InputError(f"dataset must be lactase or generated, got {config['dataset']!r}")
        if config["dataset"] == "generated":
            return made_up(site.index, site.num_sites, seed)
        return lactase(config["trait"], site.index, site.num_sites, seed)


app = LactaseHospital.client_app()
