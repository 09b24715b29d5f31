"""One hospital of an association study, for tests."""

import numpy as np
from bed_reader import to_bed
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity
from tiny import context_of

from fedmed_flower import SiteData
from fedmed_flower.genomics.client import GenomicsClient
from fedmed_flower.wire import MESSAGE_VERSION

PEOPLE, VARIANTS = 40, 6


def genotypes_of(seed=0, people=PEOPLE):
    generator = np.random.default_rng(seed)
    found = generator.binomial(2, 0.4, (people, VARIANTS)).astype(np.int8)
    found[3, 1] = -127
    return found


def rows_of(seed=0, people=PEOPLE):
    generator = np.random.default_rng((seed, 1))
    return [
        {"patient": f"p{n}", "phenotype": n % 2, "age": float(generator.normal(50, 9))}
        for n in range(people)
    ]


def hospital(folder, genotypes=None, rows=None, **members):
    """Return a client class whose site has these genotypes and rows."""
    genotypes = genotypes_of() if genotypes is None else genotypes
    rows = rows_of() if rows is None else rows
    properties = {
        "iid": [f"p{n}" for n in range(len(genotypes))],
        "sid": [f"rs{n}" for n in range(VARIANTS)],
        "chromosome": ["1"] * VARIANTS,
        "bp_position": list(range(10, 70, 10)),
        "allele_1": ["A"] * VARIANTS,
        "allele_2": ["C"] * VARIANTS,
    }
    to_bed(str(folder / "h.bed"), genotypes, properties=properties, num_threads=1)
    half = len(rows) // 2
    own = {
        "covariates": ("age",),
        # An association takes the rows of all splits.
        "load_data": lambda self, site: SiteData(rows[:half], test=rows[half:]),
        "genotypes": lambda self, site: folder / "h",
    }
    return type("Hospital", (GenomicsClient,), own | members)


def question(client, name, config=None, context=None, **arrays):
    """Ask one site and return the reply."""
    context = context or context_of()
    TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1
    first = {"version": MESSAGE_VERSION} if name == "cohort" else {}
    content = RecordDict({"config": ConfigRecord(first | (config or {}))})
    if arrays:
        content["block"] = ArrayRecord({k: Array(np.asarray(v)) for k, v in arrays.items()})
    return client.client_app()(Message(content, context.node_id, f"query.{name}"), context)


def everything(swapped=()):
    return {"lines": np.arange(VARIANTS), "swapped": np.isin(np.arange(VARIANTS), swapped)}
