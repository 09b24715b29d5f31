"""A region that predicts how long its patients with breast cancer live."""

from fedmed_flower import InputError, Site, SiteData, SurvivalClient
from fedmed_flower.data.cohorts import REGIONS, TCGA_FLAGS, TCGA_SOURCE, breast_cancer
from fedmed_flower.data.schema import Schema, read_table, table_of
from fedmed_flower.data.splits import split_patients


class BreastCancerHospital(SurvivalClient):
    schema = Schema(
        target="T",
        event="E",
        task="survival",
        numeric=("age_at_index",),
        ranges={"age_at_index": (18, 100)},
        categorical=TCGA_FLAGS,
        categories=dict.fromkeys(TCGA_FLAGS, ("0", "1")),
        bands={"age_at_index": (50, 65)},
    )

    def load_data(self, site: Site) -> SiteData:
        if site.data_dir is not None:
            table = read_table(site.data_dir / "survival.csv", self.schema)
            source = "the hospital's own table"
        else:
            frame, source = breast_cancer(), TCGA_SOURCE
            if site.index >= len(REGIONS):
                raise InputError(f"there are {len(REGIONS)} regions: give --sites {len(REGIONS)}")
            region = REGIONS[site.index]
            # FLamby's split knows no validation patients: all are divided anew.
            own = frame[frame["region"] == region].drop(columns="split")
            table = table_of(own, self.schema, f"{source}, {region}")
        splits = split_patients(table.rows, self.settings.seed)
        return SiteData(**splits, source=source, rejected=table.rejected, lacking=table.lacking)


app = BreastCancerHospital.client_app()
