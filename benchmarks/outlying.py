"""How often a hospital whose column is wrong is named, and how often one that is not.

``FEDMED_DATA=... python benchmarks/outlying.py`` divides the patients of the heart, breast cancer
and intensive care tables at random into 3, 5 and 10 hospitals, and spoils a column of one of them.
"""

import argparse
import logging
import math
import runpy
from dataclasses import replace
from pathlib import Path

import documented
import numpy as np

from fedmed_flower.data.cohorts import breast_cancer, heart_disease, intensive_care
from fedmed_flower.data.outlying import outlying
from fedmed_flower.data.preparation import contribution
from fedmed_flower.data.schema import table_of

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
COUNTS = (3, 5, 10)
MINIMUM = 10


def one_cell(value, number):
    """Return the value, but for one cell a typing error."""
    return 1e9 if number == 0 else value


FAULTS = {
    "one cell of 1e9": one_cell,
    "times 10": lambda value, _: value * 10,
    "times 88.4": lambda value, _: value * 88.4,
    "a tenth": lambda value, _: value / 10,
    "30% more missing": lambda value, number: math.nan if number % 10 < 3 else value,
}


def tables():
    """Yield name, rows and schema of each table; nothing is declared, so that all is compared."""
    frames = {
        "heart disease": ("heart", "HeartHospital", heart_disease()[0].values()),
        "breast cancer": (
            "survival",
            "BreastCancerHospital",
            [breast_cancer().drop(columns="split")],
        ),
        "intensive care": ("icu", "IntensiveCareUnit", [intensive_care()]),
    }
    for name, (app, client, parts) in frames.items():
        declared = runpy.run_path(str(EXAMPLES / app / "client_app.py"))[client].schema
        schema = replace(declared, ranges={}, categories={})
        rows = [row for part in parts for row in table_of(part, schema, name).rows]
        # The same patient's number at two hospitals is two patients.
        yield name, [row | {"patient": f"{n}"} for n, row in enumerate(rows)], schema


def divided(rows, count, rng):
    """Return the rows of each of some hospitals, drawn at random."""
    parts = np.array_split(rng.permutation(len(rows)), count)
    return {f"hospital-{n}": [rows[index] for index in part] for n, part in enumerate(parts)}


def named(sites, schema):
    """Return who is named, with the column."""
    sent = {site: contribution(rows, schema, MINIMUM) for site, rows in sites.items()}
    counts = {site: len(rows) for site, rows in sites.items()}
    return {(one.site, one.column) for one in outlying(sent, schema, counts)}


def counted(divisions, spoilt_divisions):
    """Yield the rows: how often the hospital is named, of each table, number and fault."""
    rng = np.random.default_rng(0)
    for name, rows, schema in tables():
        for count in COUNTS:
            clean = sum(bool(named(divided(rows, count, rng), schema)) for _ in range(divisions))
            cells = [name, f"{len(rows):,}", str(count), f"{clean} of {divisions}"]
            for spoil in FAULTS.values():
                found = 0
                for _ in range(spoilt_divisions):
                    sites = divided(rows, count, rng)
                    for column in schema.numeric:
                        spoilt = [
                            row | {column: spoil(row[column], number)}
                            for number, row in enumerate(sites["hospital-1"])
                        ]
                        found += ("hospital-1", column) in named(
                            sites | {"hospital-1": spoilt}, schema
                        )
                cells.append(f"{found} of {spoilt_divisions * len(schema.numeric)}")
            yield cells


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clean", type=int, default=70, help="Divisions of each table and number.")
    parser.add_argument("--spoilt", type=int, default=8, help="Divisions in which a column is.")
    documented.add_options(parser)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    head = ("table", "patients", "hospitals", "named, nothing wrong", *FAULTS)
    rows = counted(options.clean, options.spoilt)
    documented.show("outlying", head, rows, options, versions=["numpy"])


if __name__ == "__main__":
    main()
