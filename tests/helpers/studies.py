"""Association studies over made-up hospitals, for tests."""

import csv

import numpy as np
from bed_reader import to_bed
from flwr.serverapp import ServerApp
from tiny import CONFIG

from fedmed_flower import SiteData, run_local
from fedmed_flower.genomics.client import GenomicsClient
from fedmed_flower.genomics.page import COLUMNS
from fedmed_flower.genomics.server import associate
from fedmed_flower.settings.registry import sections_of

VARIANTS, SIZES = 40, (60, 90, 70)


ALLELES = ("A", "C", "G", "T")


class World:
    """Three hospitals: their people, and what of their files differs."""

    def __init__(self, folder, seed=0, trait="binary", sizes=SIZES):
        self.folder, self.trait, self.sizes = folder, trait, sizes
        generator = np.random.default_rng(seed)
        frequency = np.linspace(0.25, 0.6, VARIANTS)
        self.genotypes, self.phenotypes, self.ages = [], [], []
        for number, size in enumerate(sizes):
            genotypes = generator.binomial(2, frequency, (size, VARIANTS)).astype(np.int8)
            genotypes[generator.random(genotypes.shape) < 0.03] = -127
            age = generator.normal(50 + 5 * number, 10, size)
            line = 1.2 * np.maximum(genotypes[:, 20], 0) - 1.5 + 0.03 * (age - 55) + 0.3 * number
            case = generator.random(size) < 1 / (1 + np.exp(-line))
            noisy = line + generator.normal(size=size)
            self.genotypes.append(genotypes)
            self.phenotypes.append(case.astype(float) if trait == "binary" else noisy)
            self.ages.append(age)
        # All hospitals' files are alike, until a test changes one.
        self.names = [[f"rs{n:02d}" for n in range(VARIANTS)] for _ in sizes]
        self.places = [[(1 + n // 30, 100 + 10 * n) for n in range(VARIANTS)] for _ in sizes]
        # A/C, C/T, G/A, T/G: of none do both strands look the same.
        pairs = [(ALLELES[n % 4], "CTAG"[n % 4]) for n in range(VARIANTS)]
        self.pairs = [list(pairs) for _ in sizes]

    def client(self, base=GenomicsClient, **members):
        for number, genotypes in enumerate(self.genotypes):
            properties = {
                "iid": [f"p{n}" for n in range(len(genotypes))],
                "sid": self.names[number],
                "chromosome": [str(chromosome) for chromosome, _ in self.places[number]],
                "bp_position": [position for _, position in self.places[number]],
                "allele_1": [pair[0] for pair in self.pairs[number]],
                "allele_2": [pair[1] for pair in self.pairs[number]],
            }
            path = str(self.folder / f"h{number}.bed")
            to_bed(path, genotypes, properties=properties, num_threads=1)
        rows = [
            [
                {"patient": f"p{n}", "phenotype": float(value), "age": float(age)}
                for n, (value, age) in enumerate(zip(values, ages, strict=True))
            ]
            for values, ages in zip(self.phenotypes, self.ages, strict=True)
        ]
        own = {
            "trait": self.trait,
            "covariates": ("age",),
            "load_data": lambda client, site: SiteData(rows[site.index], source="made up"),
            "genotypes": lambda client, site: self.folder / f"h{site.index}",
        }
        return type("Hospital", (base,), own | members)

    def pooled(self, variant, sites=(0, 1, 2)):
        """Return outcome and design (hospitals, age, copies) of those with a genotype."""
        copies = np.concatenate([self.genotypes[s][:, variant] for s in sites]).astype(float)
        outcome = np.concatenate([self.phenotypes[s] for s in sites])
        age = np.concatenate([self.ages[s] for s in sites])
        site = np.repeat(np.arange(len(sites)), [self.sizes[s] for s in sites])
        design = np.column_stack([np.eye(len(sites))[site], age, copies])
        return outcome[copies >= 0], design[copies >= 0]

    def trend(self, variant, sites=(0, 1, 2)):
        """Return Mantel's statistic of the trend, the hospitals as strata."""
        excess = variance = 0.0
        for site in sites:
            copies = self.genotypes[site][:, variant].astype(float)
            case = self.phenotypes[site][copies >= 0]
            copies = copies[copies >= 0]
            excess += (case * (copies - copies.mean())).sum()
            variance += case.sum() * (1 - case).sum() / len(case) * copies.var(ddof=1)
        return excess**2 / variance


def study(client, folder, node_configs=None, sites=3, **config):
    """Run a study; return the summary and the lines of the table by variant."""
    server, found = ServerApp(), []

    @server.main()
    def main(grid, context):
        found.append(associate(grid, context, sections_of(client)))

    settings = CONFIG | {"run-dir": str(folder / "run"), "block-size": 16, "seed": 1}
    settings |= {key.replace("_", "-"): value for key, value in config.items()}
    hospital = client.client_app()
    run_local(
        server, hospital, sites, run_config=settings, node_configs=node_configs, app_name="study"
    )
    return found[0], lines_of(folder / "run")


def lines_of(folder):
    with (folder / "association.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    return {line["id"]: line for line in lines}
