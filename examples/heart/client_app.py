"""A hospital that predicts heart disease."""

from fedmed_flower import InputError, Site, SiteData, TabularClient
from fedmed_flower.data.cohorts import heart_disease
from fedmed_flower.data.schema import Schema, read_table, table_of
from fedmed_flower.data.splits import split_patients


class HeartHospital(TabularClient):
    schema = Schema(
        target="disease",
        task="binary",
        numeric=("age", "trestbps", "chol", "thalach", "oldpeak"),
        categorical=("sex", "cp", "fbs", "restecg", "exang"),
        ranges={
            "age": (18, 100),
            "trestbps": (60, 260),
            "chol": (50, 700),
            "thalach": (40, 230),
            "oldpeak": (-5, 10),
        },
        categories={
            "sex": ("0", "1"),
            "cp": ("1", "2", "3", "4"),
            "fbs": ("0", "1"),
            "restecg": ("0", "1", "2"),
            "exang": ("0", "1"),
        },
        bands={"age": (50, 60)},
    )

    def load_data(self, site: Site) -> SiteData:
        if site.data_dir is not None:
            table = read_table(site.data_dir / "heart.csv", self.schema)
            source = "the hospital's own table"
        else:
            tables, source = heart_disease()
            if site.index >= len(tables):
                raise InputError(f"there are {len(tables)} hospitals: give --sites {len(tables)}")
            name = list(tables)[site.index]
            table = table_of(tables[name], self.schema, f"{source}, {name}")
        splits = split_patients(table.rows, self.settings.seed)
        return SiteData(**splits, source=source, rejected=table.rejected, lacking=table.lacking)


app = HeartHospital.client_app()
