"""The public and generated data sets: what each holds, whose it is, and how one comes by it."""

from __future__ import annotations

from dataclasses import dataclass

_FOLDER = "in the folder FEDMED_DATA"
_FETCHED = f"{_FOLDER}, or downloaded once"
_GENERATED = "generated, offline"


@dataclass(frozen=True)
class DataSet:
    """A data set.

    Attributes
    ----------
    name : str
        The function that loads it, in `fedmed_flower.data` or the room's file that it names; of the
        genotypes, the folder that the example reads.
    what : str
    licence : str
        Licence and publisher; empty if the data are generated.
    size : str
        Of its files.
    way : str
        How it comes to this machine.
    """

    name: str
    what: str
    licence: str
    size: str
    way: str


DATA_SETS = (
    DataSet(
        'load_dataset("pneumoniamnist")',
        "5,856 chest X-rays of 28 x 28 pixels, with or without pneumonia",
        "CC BY 4.0, MedMNIST v2",
        "4 MB",
        _FETCHED,
    ),
    DataSet(
        'load_dataset("breastmnist")',
        "780 breast ultrasound images of 28 x 28 pixels, benign or malignant",
        "CC BY 4.0, MedMNIST v2",
        "0.6 MB",
        _FETCHED,
    ),
    DataSet(
        "load_hippocampus",
        "260 MR volumes of the hippocampus, with masks of two parts",
        "CC BY-SA 4.0, Medical Segmentation Decathlon",
        "28 MB",
        _FETCHED,
    ),
    DataSet(
        "cohorts.heart_disease",
        "920 patients of four hospitals, 13 columns, heart disease or not",
        "CC BY 4.0, UCI Machine Learning Repository",
        "40 kB",
        _FETCHED,
    ),
    DataSet(
        "cohorts.breast_cancer",
        "1,088 patients of six regions with breast cancer, 39 columns, time until death",
        "open access, TCGA-BRCA of the Genomic Data Commons",
        "0.1 MB",
        _FETCHED,
    ),
    DataSet(
        "cohorts.intensive_care",
        "2,179 stays in intensive care at 186 hospitals, 34 columns, death in hospital",
        "ODbL 1.0, eICU demo of PhysioNet",
        "0.3 MB",
        f"{_FOLDER}/eicu-demo",
    ),
    DataSet(
        "examples/gwas",
        "503 people of five European populations, 607 variants around the lactase gene",
        "public, 1000 Genomes",
        "0.1 MB",
        f"{_FOLDER}/genotypes-lct",
    ),
    DataSet("chest_xrays", "small chest X-rays with or without opacities", "", "", _GENERATED),
    DataSet("hippocampi", "small volumes with masks of two parts", "", "", _GENERATED),
    DataSet("brain_tumours", "small volumes with nested regions", "", "", _GENERATED),
    DataSet("slides", "bags of patches with or without lesions", "", "", _GENERATED),
    DataSet(
        "phantom_folder",
        "folders of files: images, masks, table, survival, genomes, other",
        "",
        "",
        f"{_GENERATED}; as files: fedmed data phantoms",
    ),
)
