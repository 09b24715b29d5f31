"""Public tables of patients from several hospitals."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from fedmed_flower.data.bounded import unpacked
from fedmed_flower.data.download import PublicFile, SourceUnavailable, obtain
from fedmed_flower.data.sources import HEART_FEATURES, load_heart_disease
from fedmed_flower.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

# What pandas raises if a table is cut off, damaged or not the expected one.
_UNREADABLE = (OSError, EOFError, ValueError, LookupError, TypeError, zlib.error)
_FLAMBY = "https://github.com/owkin/FLamby/raw/edacf54/flamby/datasets/fed_tcga_brca"
_TCGA = {
    name: PublicFile(
        f"TCGA-BRCA, {name}", Path(f"tcga-brca/{name}.csv"), f"{_FLAMBY}/{folder}{name}.csv", md5
    )
    for name, folder, md5 in (
        ("brca", "", "989df4ddec084f749d9593146d7ba92f"),
        ("train_test_split", "dataset_creation_scripts/", "e648057e47463ee7763924d779cd7f2d"),
    )
}
TCGA_SOURCE = "TCGA-BRCA clinical table (GDC), FLamby's split"
# FLamby's numbering of the regions of the source sites.
REGIONS = ("Northeast", "South", "West", "Midwest", "Europe", "Canada")
# The columns besides age, 0 or 1: in each group those that FLamby's authors kept.
TCGA_FLAGS = tuple(
    f"{group}_{value}"
    for group, values in {
        "ethnicity": ("not hispanic or latino", "not reported"),
        "race": ("asian", "black or african american", "not reported", "white"),
        "ajcc_pathologic_m": ("MX",),
        "ajcc_pathologic_n": ("N0 (i-)", "N1", "N1a", "N2", "N2a"),
        "ajcc_pathologic_stage": (
            *("Stage IA", "Stage IIA", "Stage IIB", "Stage IIIA", "Stage IIIC"),
        ),
        "ajcc_pathologic_t": ("T1c", "T2", "T3"),
        "ajcc_staging_system_edition": ("5th", "6th", "7th"),
        "icd_10_code": ("C50.9",),
        "morphology": ("8500/3", "8520/3"),
        "primary_diagnosis": ("Infiltrating duct carcinoma, NOS", "Lobular carcinoma, NOS"),
        "prior_malignancy": ("yes",),
        "synchronous_malignancy": ("Not Reported",),
        "treatment_or_therapy": ("not reported", "yes"),
        "tumor_stage": (
            *("stage i", "stage ia", "stage iia", "stage iib", "stage iiia", "stage iiic"),
        ),
    }.items()
    for value in values
)
ICU_SOURCE = "eICU-CRD demo 2.0.1 (PhysioNet, ODbL)"
_EICU = ("patient", "apacheapsvar", "apachepredvar")
# The code of a missing value in the APACHE tables.
_MISSING = -1
# Flags of the APACHE tables, 0 or 1.
ICU_FLAGS = (
    *("intubated", "vent", "dialysis", "electivesurgery", "hepaticfailure", "lymphoma"),
    *("metastaticcancer", "leukemia", "immunosuppression", "cirrhosis", "diabetes"),
)
# A plausible range of each measurement, so that one mistyped value moves no mean.
ICU_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "age": (0, 120),
        "temperature": (20, 45),
        "respiratoryrate": (0, 80),
        "heartrate": (0, 300),
        "meanbp": (0, 250),
        "urine": (0, 15000),
        "wbc": (0, 200),
        "sodium": (90, 200),
        "hematocrit": (5, 80),
        "creatinine": (0, 30),
        "albumin": (0, 10),
        "bun": (0, 300),
        "glucose": (0, 2000),
        "bilirubin": (0, 80),
        "ph": (6.5, 8.0),
        "pao2": (0, 800),
        "pco2": (0, 250),
        "fio2": (0, 100),
        "eyes": (1, 4),
        "motor": (1, 6),
        "verbal": (1, 5),
    }
)


def heart_disease(timeout: float = 10) -> tuple[dict[str, pd.DataFrame], str]:
    """Load UCI Heart Disease: 13 columns and ``disease`` (0 or 1), by hospital.

    Zeros in ``chol`` and ``trestbps``, which no living patient has, count as missing. Parameters
    and errors are those of `load_heart_disease`.

    Returns
    -------
    tables : dict of str to DataFrame
        By hospital: cleveland, hungarian, switzerland, va.
    source : str
        Where the tables come from.
    """
    import pandas as pd

    tables = {}
    sources = set()
    for name, table in load_heart_disease(timeout).items():
        frame = pd.DataFrame(table.features, columns=list(HEART_FEATURES))
        impossible = frame[["chol", "trestbps"]] == 0
        frame[["chol", "trestbps"]] = frame[["chol", "trestbps"]].mask(impossible)
        frame["disease"] = table.target
        frame["patient"] = [f"{name}-{number}" for number in range(1, len(frame) + 1)]
        tables[name] = frame
        sources.add(table.source.partition(",")[0])
    return tables, "; ".join(sorted(sources))


def breast_cancer(timeout: float = 10) -> pd.DataFrame:
    """Load TCGA-BRCA: 39 numeric columns, ``E`` (died), ``T`` (days), ``region`` and ``split``.

    It holds 1,088 patients, those with a time of 0 or less included. ``split`` is train or test as
    FLamby divides them. Parameters and errors are those of `load_heart_disease`.
    """
    import pandas as pd

    paths = [obtain(_TCGA[name], timeout).path for name in ("brca", "train_test_split")]
    try:
        table, split = map(pd.read_csv, paths)
        frame = table.merge(split, on="pid", validate="one_to_one")
        frame["region"] = [REGIONS[int(text[-1])] for text in frame.pop("fold2")]
        frame = frame.rename(columns={"pid": "patient", "fold": "split"})
        return frame[["patient", "age_at_index", *TCGA_FLAGS, "E", "T", "region", "split"]]
    except _UNREADABLE as error:
        where = " or ".join(map(str, paths))
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error


def intensive_care(folder: str | Path | None = None) -> pd.DataFrame:
    """Load the eICU demo: one row a stay, with the APACHE variables of its first day.

    Columns: ``stay``, ``patient``, ``hospital``, ``age`` (above 89: 90), ``gender``, ``unit``,
    those of `ICU_RANGES` and `ICU_FLAGS`, and ``died`` (in hospital: 1). It holds 2,179 stays in
    186 hospitals. Stays without APACHE variables or with an unknown outcome are left out.

    Parameters
    ----------
    folder : str or Path, optional
        The folder that holds patient.csv.gz, apacheapsvar.csv.gz and apachepredvar.csv.gz. If left
        out: ``eicu-demo`` in the folder that the environment variable ``FEDMED_DATA`` names.

    Raises
    ------
    SourceUnavailable
        If a table is missing. Nothing is downloaded, because the publisher gives no checksum.
    InputError
        If a table cannot be read or lacks a column.
    """
    import pandas as pd

    home = os.environ.get("FEDMED_DATA")
    where: Path | None = None
    if folder:
        where = Path(folder)
    elif home:
        where = Path(home).expanduser() / "eicu-demo"
    files = {name: (where or Path("eicu-demo")) / f"{name}.csv.gz" for name in _EICU}
    if where is None or not all(path.is_file() for path in files.values()):
        raise SourceUnavailable(
            f"eICU demo: there is no {', '.join(f'{name}.csv.gz' for name in _EICU)} in "
            f"{where or 'a folder that FEDMED_DATA names'}: get them from "
            "https://physionet.org/content/eicu-crd-demo/2.0.1/ into a folder eicu-demo, and set "
            "FEDMED_DATA to the folder above it"
        )
    try:
        patient, aps, predicted = map(_packed_table, files.values())
        stays = patient.merge(aps, on="patientunitstayid", validate="one_to_one")
        flags = predicted[["patientunitstayid", *{*ICU_FLAGS} - {*aps.columns}]]
        stays = stays.merge(flags, on="patientunitstayid", validate="one_to_one")
        stays = stays[stays["hospitaldischargestatus"].isin(["Alive", "Expired"])]
        frame = pd.DataFrame(
            {
                "stay": stays["patientunitstayid"],
                "patient": stays["uniquepid"],
                "hospital": stays["hospitalid"],
                "gender": stays["gender"],
                "unit": stays["unittype"],
                "died": (stays["hospitaldischargestatus"] == "Expired").astype(int),
            }
        )
        age = pd.to_numeric(stays["age"].replace("> 89", 90), errors="coerce")
        for name in (*ICU_RANGES, *ICU_FLAGS):
            values = age if name == "age" else stays[name]
            known = values.where(values != _MISSING)
            # A blank flag was not set.
            frame[name] = known.fillna(0) if name in ICU_FLAGS else known
    except _UNREADABLE as error:
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error
    return frame.reset_index(drop=True)


def _packed_table(path: Path) -> pd.DataFrame:
    import pandas as pd

    with gzip.open(path) as packed:
        return pd.read_csv(io.BytesIO(unpacked(packed, path, "a table")))
