"""A hospital's rows: from files, tables, public datasets and generators."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.data.datalist import load_folder
    from fedmed_flower.data.decathlon import load_hippocampus
    from fedmed_flower.data.partition import by_quantity, dirichlet_shares, split_by_shares
    from fedmed_flower.data.phantoms import chest_xrays, hippocampi
    from fedmed_flower.data.schema import Schema, read_table, table_of
    from fedmed_flower.data.site import Site, SiteData
    from fedmed_flower.data.sources import load_dataset
    from fedmed_flower.data.splits import split_patients

__all__ = [
    "Schema",
    "Site",
    "SiteData",
    "by_quantity",
    "chest_xrays",
    "dirichlet_shares",
    "hippocampi",
    "load_dataset",
    "load_folder",
    "load_hippocampus",
    "read_table",
    "split_by_shares",
    "split_patients",
    "table_of",
]

__getattr__ = on_demand(
    __name__,
    {
        "Schema": "schema",
        "Site": "site",
        "SiteData": "site",
        "by_quantity": "partition",
        "chest_xrays": "phantoms",
        "dirichlet_shares": "partition",
        "hippocampi": "phantoms",
        "load_dataset": "sources",
        "load_folder": "datalist",
        "load_hippocampus": "decathlon",
        "read_table": "schema",
        "split_by_shares": "partition",
        "split_patients": "splits",
        "table_of": "schema",
    },
)
