"""A hospital's rows: from files, tables, public datasets and generators."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.data.datalist import load_folder as load_folder
    from fedmed_flower.data.decathlon import load_hippocampus as load_hippocampus
    from fedmed_flower.data.partition import by_quantity as by_quantity
    from fedmed_flower.data.partition import dirichlet_shares as dirichlet_shares
    from fedmed_flower.data.partition import split_by_shares as split_by_shares
    from fedmed_flower.data.phantom_folders import phantom_folder as phantom_folder
    from fedmed_flower.data.phantoms import brain_tumours as brain_tumours
    from fedmed_flower.data.phantoms import chest_xrays as chest_xrays
    from fedmed_flower.data.phantoms import hippocampi as hippocampi
    from fedmed_flower.data.phantoms import slides as slides
    from fedmed_flower.data.schema import Schema as Schema
    from fedmed_flower.data.schema import read_table as read_table
    from fedmed_flower.data.schema import table_of as table_of
    from fedmed_flower.data.site import Site as Site
    from fedmed_flower.data.site import SiteData as SiteData
    from fedmed_flower.data.sources import load_dataset as load_dataset
    from fedmed_flower.data.splits import split_patients as split_patients

__getattr__, __all__ = on_demand(
    __name__,
    {
        "Schema": "schema",
        "Site": "site",
        "SiteData": "site",
        "by_quantity": "partition",
        "brain_tumours": "phantoms",
        "chest_xrays": "phantoms",
        "dirichlet_shares": "partition",
        "hippocampi": "phantoms",
        "load_dataset": "sources",
        "load_folder": "datalist",
        "load_hippocampus": "decathlon",
        "phantom_folder": "phantom_folders",
        "read_table": "schema",
        "slides": "phantoms",
        "split_by_shares": "partition",
        "split_patients": "splits",
        "table_of": "schema",
    },
)
