"""A hospital that learns from a table how long its patients live."""

from fedmed_flower import Schema, Site, SiteData, SurvivalClient
from fedmed_flower.data import phantom_folder, read_table, split_patients


class Hospital(SurvivalClient):
    """A hospital with a table of times and events."""

    schema = Schema(
        target="years",
        event="died",
        task="survival",
        numeric=("age", "creatinine"),
        categorical=("sex", "diabetes"),
        ranges={"age": (18, 100), "creatinine": (0.3, 10)},
        categories={"sex": ("f", "m"), "diabetes": ("0", "1")},
        bands={"age": (60, 75)},
    )

    def load_data(self, site: Site) -> SiteData:
        folder = site.data_dir or phantom_folder(site, "survival")
        table = read_table(folder / "patients.csv", self.schema)
        return SiteData(
            **split_patients(table.rows, self.settings.seed),
            source="patients.csv",
            generated=(folder / "GENERATED").exists(),
            rejected=table.rejected,
            lacking=table.lacking,
        )


app = Hospital.client_app()
