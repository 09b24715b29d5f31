"""Folders of generated patients, in the layouts in which a hospital's own data lie.

An app that `fedmed new` writes reads them as long as it is given no data. They show no patients,
and nothing that is learned from them is a medical finding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.site import MARK, Site
from fedmed_flower.errors import InputError
from fedmed_flower.files import write_rows

_BEAT = 100


def phantom_folder(site: Site, kind: str) -> Path:
    """Return a folder with generated patients of a hospital of a simulation.

    It is a temporary folder, written once in a process. The patients follow from the number of the
    hospital alone: `write_phantoms` writes the same.

    Parameters
    ----------
    site : Site
    kind : str
        One of `PHANTOMS`.

    Raises
    ------
    InputError
        As `write_phantoms`; and if the hospital is a real one, which must not train on generated
        patients without a word.
    """
    # Raises, and says what to give, if a real hospital has no folder.
    return _written(kind, site.index) if site.simulated else site.folder


@cache
def _written(kind: str, index: int) -> Path:
    folder = Path(tempfile.mkdtemp(dir=_temporary().name)) / f"hospital-{index + 1}"
    write_phantoms(folder, kind, index)
    return folder


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="fedmed-phantoms-")


def write_phantoms(folder: Path, kind: str, index: int) -> None:
    """Write the folder of a hospital with generated patients.

    The empty file ``GENERATED`` in it marks them, in log, summary and report too.

    Parameters
    ----------
    folder : Path
        It must not exist.
    kind : str
        One of `PHANTOMS`.
    index : int
        Number of the hospital, 0 or greater: its patients differ from those of the others.

    Raises
    ------
    InputError
        If the kind is unknown, the folder exists or cannot be written, or `kind` is "genomes" and
        bed-reader is not installed.
    """
    if kind not in PHANTOMS:
        raise InputError(f"kind must be one of {', '.join(PHANTOMS)}, got {kind!r}")
    if folder.exists():
        raise InputError(f"{folder} exists already: give another folder")
    try:
        folder.mkdir(parents=True)
        (folder / MARK).touch()
        PHANTOMS[kind](folder, index)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error


def _images(folder: Path, index: int) -> None:
    """120 chest X-rays as PNG, half a megabyte in all, and the list of them."""
    from PIL import Image

    from fedmed_flower.data.phantoms import chest_xrays

    xrays = chest_xrays(120, 0, 0, seed=index)
    (folder / "images").mkdir()
    rows = []
    for number, label in enumerate(xrays.labels["train"]):
        name = f"images/{number:03}.png"
        Image.fromarray(xrays.images["train"][number]).save(folder / name)
        rows.append((name, label, _patient(index, number)))
    _write(folder / "datalist.csv", ("image", "label", "patient"), rows)


def _masks(folder: Path, index: int) -> None:
    """16 MR volumes as NIfTI, their masks, and the list of them."""
    import nibabel

    from fedmed_flower.data.phantoms import hippocampi

    rows = []
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number, row in enumerate(hippocampi(16, seed=index).rows):
        names = {"image": f"images/{number:02}.nii.gz", "label": f"masks/{number:02}.nii.gz"}
        for key, name in names.items():
            volume = nibabel.Nifti1Image(row[key], np.eye(4))  # type: ignore[no-untyped-call]
            nibabel.save(volume, folder / name)
        rows.append((*names.values(), _patient(index, number)))
    _write(folder / "datalist.csv", ("image", "label", "patient"), rows)


def _table(folder: Path, index: int) -> None:
    """200 patients of whom some come back, the likelier the older and the sicker they are."""
    rng, people = _people(index, 200)
    creatinine = people["creatinine"]
    risk = 0.06 * (people["age"] - 65) + 0.8 * (creatinine - 1.2) + 1.2 * people["diabetes"]
    readmitted = rng.random(200) < 1 / (1 + np.exp(1.2 - risk))
    # Not every patient has been measured.
    people["creatinine"] = np.where(rng.random(200) < 0.05, "", creatinine.astype(str))
    people["readmitted"] = readmitted.astype(int)
    _write_people(folder / "patients.csv", people, index)


def _survival(folder: Path, index: int) -> None:
    """200 patients who die the sooner the older and the sicker they are; some are alive at last."""
    rng, people = _people(index, 200)
    risk = 0.05 * (people["age"] - 65) + 0.6 * (people["creatinine"] - 1.2)
    death = rng.exponential(8 * np.exp(-risk - 0.8 * people["diabetes"]))
    watched = rng.uniform(1, 10, 200)
    people["years"] = np.minimum(death, watched).clip(0.1).round(1)
    people["died"] = (death <= watched).astype(int)
    _write_people(folder / "patients.csv", people, index)


def _genomes(folder: Path, index: int) -> None:
    """150 people with 1,000 variants, of which one, rs500, makes diabetes likelier."""
    from fedmed_flower.genomics.plink import bed_reader

    count, variants = 150, 1000
    frequency = np.random.default_rng(7).uniform(0.1, 0.9, variants)
    rng = np.random.default_rng([7, index])
    copies = rng.binomial(2, frequency, (count, variants)).astype(np.int8)
    age = rng.normal(55, 10, count).round().astype(int)
    sex = rng.integers(0, 2, count)
    risk = 0.04 * (age - 55) + 1.1 * (copies[:, 500] - 2 * frequency[500])
    diabetes = (rng.random(count) < 1 / (1 + np.exp(-risk))).astype(int)
    people = [_patient(index, number) for number in range(count)]
    about = {
        "fid": people,
        "iid": people,
        "sid": [f"rs{number}" for number in range(variants)],
        "chromosome": [str(1 + 22 * number // variants) for number in range(variants)],
        "bp_position": [1_000_000 + 20_000 * number for number in range(variants)],
        "allele_1": ["A"] * variants,
        "allele_2": ["G"] * variants,
    }
    path = str(folder / "cohort.bed")
    bed_reader().to_bed(path, copies, properties=about, num_threads=1)
    _write_people(folder / "people.csv", {"age": age, "sex": sex, "diabetes": diabetes}, index)


def _other(folder: Path, index: int) -> None:
    """100 heart beats; those of the sick have a flatter wave after the peak."""
    rng = np.random.default_rng([11, index])
    sick = rng.integers(0, 2, 100)
    time = np.linspace(0, 1, _BEAT)
    wave = 0.4 - 0.25 * sick[:, None] + rng.normal(0, 0.08, (100, 1))
    peak = np.exp(-(((time - 0.3) / 0.02) ** 2))
    beats = peak + wave * np.exp(-(((time - 0.6) / 0.06) ** 2)) + rng.normal(0, 0.1, (100, _BEAT))
    patients = [_patient(index, number) for number in range(100)]
    np.savez(folder / "beats.npz", beat=beats.astype(np.float32), sick=sick, patient=patients)


# The layouts, by the word by which `fedmed new --for` names them.
PHANTOMS: dict[str, Callable[[Path, int], None]] = {
    "images": _images,
    "masks": _masks,
    "table": _table,
    "survival": _survival,
    "genomes": _genomes,
    "other": _other,
}


def _people(index: int, count: int) -> tuple[np.random.Generator, dict[str, NDArray[Any]]]:
    """Return a generator, and columns of some people.

    At each hospital they are five years older than at the one before; the sixth begins anew.
    """
    rng = np.random.default_rng([5, index])
    people = {
        "age": rng.normal(58 + 5 * (index % 5), 10, count).clip(18, 100).round().astype(int),
        "sex": np.where(rng.random(count) < 0.5, "f", "m"),
        "creatinine": rng.lognormal(0.1, 0.35, count).clip(0.3, 10).round(2),
        "diabetes": (rng.random(count) < 0.3).astype(int),
    }
    return rng, people


def _patient(index: int, number: int) -> str:
    return f"H{index + 1}-{number:03}"


def _write_people(path: Path, columns: dict[str, NDArray[Any]], index: int) -> None:
    patients = [_patient(index, number) for number in range(len(columns["age"]))]
    rows = zip(patients, *(column.tolist() for column in columns.values()), strict=True)
    _write(path, ("patient", *columns), rows)


def _write(path: Path, names: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        write_rows(file, [names, *rows])
