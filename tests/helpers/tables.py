"""A small client for tables, and the tables of some hospitals."""

import json
from dataclasses import replace

import numpy as np
from flwr.serverapp import ServerApp
from tiny import CONFIG

from fedmed_flower import Schema, SiteData, SurvivalClient, TabularClient, federate, run_local
from fedmed_flower.data.site import SPLITS
from fedmed_flower.strategies import FedAvg

SCHEMA = Schema(
    target="ill",
    task="binary",
    numeric=("age", "pressure"),
    categorical=("sex", "ward"),
    ranges={"age": (0, 100), "pressure": (50, 250)},
    categories={"sex": ("f", "m")},
    bands={"age": (50,)},
)


def patients(count, seed, name="p", wards=("a", "b", "c")):
    """Return rows as `read_table` makes them: who is old, and under pressure, is often ill."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        age, pressure = rng.uniform(20, 90), rng.normal(140, 20)
        odds = np.exp((age - 55) / 10 + (pressure - 140) / 20)
        rows.append(
            {
                "patient": f"{name}-{number}",
                "age": float(age),
                "age-band": "<50" if age < 50 else ">=50",
                "pressure": float(pressure) if rng.random() < 0.9 else float("nan"),
                "sex": "fm"[rng.integers(2)],
                "ward": wards[rng.integers(len(wards))],
                "ill": int(rng.random() < odds / (1 + odds)),
            }
        )
    return rows


class TinyTable(TabularClient):
    schema = SCHEMA
    sizes = (60, 20, 40)

    def load_data(self, site):
        train, val, test = (
            patients(count, (site.index, split), f"{site.name}-{split}")
            for split, count in enumerate(self.sizes)
        )
        return SiteData(train=train, val=val, test=test, source="made up", generated=True)


def _pressure(score, rng):
    return 140 + 20 * np.tanh(score) + rng.normal(0, 4)


# Of each task: a range of the target, and how it follows from a score of about -3 to 3.
OUTCOMES = {
    "binary": (None, lambda score, rng: int(rng.random() < 1 / (1 + np.exp(-2 * score)))),
    "multi-class": (None, lambda score, rng: int(np.digitize(score + rng.normal(0, 0.3), (-1, 1)))),
    "count": ((0, 20), lambda score, rng: int(rng.poisson(4 * np.exp(score / 3)))),
    "continuous": ((80, 200), _pressure),
    "cost": ((0, 400_000), lambda score, rng: 1e5 + 3e4 * score + rng.normal(0, 5e3)),
    "stays": ((0, 4000), lambda score, rng: int(rng.poisson(1000 * np.exp(score / 3)))),
}


def predicting(kind, **schema):
    """Return a client that predicts one of `OUTCOMES` from age and sex, all of it declared."""
    task = {"cost": "continuous", "stays": "count"}.get(kind, kind)
    limits, outcome = OUTCOMES[kind]
    ranges = {"age": (0, 100)} | ({} if limits is None else {"outcome": limits})
    given = {"numeric": ("age",), "categorical": ("sex",), "categories": {"sex": ("f", "m")}}
    given |= {"classes": ("low", "middle", "high")} if task == "multi-class" else {}

    def load_data(self, site):
        rng = np.random.default_rng((site.index, 7))

        def with_outcome(row):
            score = (row["age"] - 55) / 15 + (row["sex"] == "f") - 0.5
            return {"outcome": outcome(score, rng)} | {k: row[k] for k in ("patient", "age", "sex")}

        data = TinyTable.load_data(self, site)
        parts = {s: [with_outcome(row) for row in getattr(data, s)] for s in SPLITS}
        return replace(data, **parts)

    members = {
        "schema": Schema("outcome", task, **{"ranges": ranges} | given | schema),
        "sizes": TinyTable.sizes,
        "load_data": load_data,
    }
    return type("Predicting", (TabularClient,), members)


SURVIVAL = Schema(
    target="days",
    event="died",
    task="survival",
    numeric=("age",),
    ranges={"age": (0, 100)},
)


def lives(count, seed, name="p"):
    """Return rows of which the older have the shorter times; some are censored."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        age = rng.uniform(20, 90)
        life, seen = rng.exponential(400 * np.exp((50 - age) / 15)), rng.uniform(50, 1500)
        rows.append(
            {
                "patient": f"{name}-{number}",
                "age": float(age),
                "days": float(min(life, seen)) + 1.0,
                "died": int(life <= seen),
            }
        )
    return rows


class TinySurvival(SurvivalClient):
    schema = SURVIVAL

    def load_data(self, site):
        train, val, test = (
            lives(count, (site.index, split), f"{site.name}-{split}")
            for split, count in enumerate((60, 20, 40))
        )
        return SiteData(train=train, val=val, test=test, source="made up", generated=True)


def run_tables(folder, client=TinyTable, num_sites=3, *, node_configs=None, wrap=None, **config):
    """Run an experiment in this process; return its result, and the summary."""
    server = ServerApp()

    @server.main()
    def main(grid, context):
        model = client(context) if wrap is None else wrap(client(context))
        federate(FedAvg(), grid, context, model)

    settings = CONFIG | {"num-server-rounds": 2, "batch-size": 16, "run-dir": str(folder)}
    settings |= {key.replace("_", "-"): value for key, value in config.items()}
    run = run_local(
        server, client.client_app(), num_sites, run_config=settings, node_configs=node_configs
    )
    return run.result, json.loads((folder / "summary.json").read_text())


def holding(splits, base=TinyTable, **members):
    """Return a client whose site of index i holds what `splits[i]` gives; the others, their own.

    A value is a `SiteData`, a function that makes one of the site's usual data, or an error.
    """

    def load_data(self, site):
        own = splits.get(site.index)
        if isinstance(own, Exception):
            raise own
        if isinstance(own, SiteData):
            return own
        data = base.load_data(self, site)
        return data if own is None else own(data)

    return type("Holding", (base,), {"load_data": load_data, **members})


def changed(**columns):
    """Return a function for `holding` that puts one value into columns of all rows."""

    def change(data):
        return replace(data, **{s: [r | columns for r in getattr(data, s)] for s in SPLITS})

    return change
