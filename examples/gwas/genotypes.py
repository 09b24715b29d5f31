"""Filesets of some hospitals: people of five populations, or made up."""

import csv
import logging
import os
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from fedmed_flower import InputError
from fedmed_flower.genomics.plink import bed_reader

log = logging.getLogger("flwr.fedmed")

POPULATIONS = ("CEU", "FIN", "GBR", "IBS", "TSI")
NORTH = ("CEU", "FIN", "GBR")
HIT = "rs4988235"  # allele A: lactase persistence
FOLDER = tempfile.TemporaryDirectory(prefix="fedmed-gwas-")
GENERATED = "generated genotypes with one planted hit"
LACTASE = "1000 Genomes, 503 Europeans around the lactase gene"


@cache
def lactase(trait, index, num_sites, seed):
    """Write one hospital's people of the real genotypes; return prefix, rows and source.

    The trait "north" is where a population lives; each hospital then has people of all five, since
    cases are compared with controls of the same hospital. The trait "persistence" and the ages are
    made up: likelier with each allele A of rs4988235. Five hospitals are then the five populations.
    """
    folder = Path(os.environ.get("FEDMED_DATA", "")).expanduser() / "genotypes-lct"
    if not (folder / "LCT.bed").is_file():
        log.warning("FEDMED_DATA names no folder with genotypes-lct: %s", GENERATED)
        return made_up(index, num_sites, seed)
    with (folder / "LCT.pop.csv").open(newline="") as file:
        population = {row["iid"]: row["population"] for row in csv.DictReader(file)}
    with bed_reader().open_bed(folder / "LCT.bed") as file:
        genotypes, people = file.read(dtype="int8"), [str(name) for name in file.iid]
        (hit,) = np.flatnonzero(file.sid == HIT)
        about = {
            "sid": file.sid,
            "chromosome": file.chromosome,
            "bp_position": file.bp_position,
            "allele_1": file.allele_1,
            "allele_2": file.allele_2,
        }
    generator = np.random.default_rng(seed)
    age = generator.normal(50, 12, len(people)).round()
    # Not sharper than this: Wald's test loses power where the odds ratio is huge.
    risk = -1.5 + 1.6 * genotypes[:, hit] + 0.02 * (age - 50)
    persistent = generator.random(len(people)) < 1 / (1 + np.exp(-risk))
    north = np.array([population[name] in NORTH for name in people])
    sites = np.array([POPULATIONS.index(population[name]) for name in people])
    if trait == "north" or num_sites != len(POPULATIONS):
        sites = np.arange(len(people)) % num_sites
    values = north if trait == "north" else persistent
    source = f"{LACTASE}; ages are generated"
    source += ", and so is lactase persistence" if trait != "north" else ""
    own = np.flatnonzero(sites == index)
    prefix = _write(index, f"{trait}-{num_sites}", genotypes[own], [people[i] for i in own], about)
    return prefix, _rows([people[i] for i in own], values[own], age[own]), source


@cache
def made_up(index, num_sites, seed, people=150, variants=3000):
    """Write one hospital's made-up people; each variant is inherited with its neighbours."""
    shared = np.random.default_rng(seed)
    frequency, copied = shared.uniform(0.1, 0.9, variants), shared.random(variants) < 0.85
    hit = variants // 2
    copied[:: variants // 3] = False
    # Neighbours that are inherited together are as frequent.
    for place in np.flatnonzero(copied):
        frequency[place] = frequency[place - 1]
    frequency[hit:][: np.argmin(np.append(copied[hit + 1 :], False)) + 1] = 0.4
    generator = np.random.default_rng((seed, index))
    haplotypes = generator.random((2 * people, variants)) < frequency
    for place in np.flatnonzero(copied):
        same = generator.random(2 * people) < 0.95
        haplotypes[same, place] = haplotypes[same, place - 1]
    genotypes = (haplotypes[:people].astype(np.int8) + haplotypes[people:]).astype(np.int8)
    age = generator.normal(50, 12, people).round()
    risk = -0.8 + 0.9 * (genotypes[:, hit] - 0.8) + 0.02 * (age - 50)
    case = generator.random(people) < 1 / (1 + np.exp(-risk))
    genotypes[generator.random(genotypes.shape) < 0.01] = -127
    names = [f"H{index + 1}-{number:04d}" for number in range(people)]
    about = {
        "sid": [f"{'hit' if place == hit else 'v'}{place}" for place in range(variants)],
        "chromosome": [str(1 + 3 * place // variants) for place in range(variants)],
        "bp_position": [1_000_000 + 20_000 * (place % 1000) for place in range(variants)],
        "allele_1": ["A"] * variants,
        "allele_2": ["G"] * variants,
    }
    prefix = _write(index, f"made-up-{num_sites}", genotypes, names, about)
    return prefix, _rows(names, case, age), GENERATED


def read_people(path):
    """Return a hospital's own rows; ids are texts, and an empty cell is a missing value."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for column in row.keys() - {"patient"}:
            try:
                row[column] = float(row[column]) if row[column] else None
            except ValueError as error:
                raise InputError(f"{path}, patient {row['patient']}: {error}") from None
    return rows


def _rows(names, values, ages):
    return [
        {"patient": name, "phenotype": float(value), "age": float(age)}
        for name, value, age in zip(names, values, ages, strict=True)
    ]


def _write(index, kind, genotypes, names, about):
    folder = Path(FOLDER.name) / kind
    folder.mkdir(exist_ok=True)
    prefix = folder / f"hospital-{index + 1}"
    about = about | {"iid": names, "fid": names}
    bed_reader().to_bed(f"{prefix}.bed", genotypes, properties=about, num_threads=1)
    return prefix
