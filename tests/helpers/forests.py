"""Hospitals that grow trees, for tests."""

import math

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy.strategy_utils import aggregate_bagging
from tiny import ask, context_of

from fedmed_flower import Schema, SiteData, TabularClient
from fedmed_flower.trees.client import as_trees
from fedmed_flower.trees.ensembles import (
    model_bytes,
    write_trees,
)

DECLARED = {"device": "cpu", "preparation": "declared", "min-cell-count": 1}


def make_rows(count, seed, name, target):
    """Rows whose outcome hangs on a product that no single column shows."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        a, b = generator.normal(size=2)
        c = "xyz"[generator.integers(3)]
        row = {"patient": f"{name}-{number}", "a": a, "b": b, "c": c}
        row |= target(2 * a * b + (c == "y"), generator)
        row["a"] = math.nan if generator.random() < 0.1 else a
        row["c"] = None if generator.random() < 0.1 else c
        rows.append(row)
    return rows


def binary(score, generator):
    return {"y": int(generator.random() < 1 / (1 + math.exp(-score)))}


TARGETS = {
    "binary": binary,
    "multi-class": lambda score, generator: {"y": int(np.digitize(score, [-0.5, 1]))},
    "count": lambda score, generator: {"y": int(generator.poisson(math.exp(score / 2)))},
    "continuous": lambda score, generator: {"y": 5 + score + generator.normal()},
    "survival": lambda score, generator: {
        "y": generator.exponential(math.exp(-score)) + 0.01,
        "died": int(generator.random() < 0.7),
    },
}


def schema_of(task):
    more = {"classes": ("low", "middle", "high")} if task == "multi-class" else {}
    more |= {"event": "died"} if task == "survival" else {}
    more["ranges"] = {"a": (-5, 5), "b": (-5, 5)}
    more["ranges"] |= {"y": (0, 10)} if task in ("count", "continuous") else {}
    categories = {"c": ("x", "y", "z")}
    return Schema("y", task, ("a", "b"), ("c",), categories=categories, **more)


class Hospital(TabularClient):
    schema = schema_of("binary")
    sizes = (60, 30, 200)

    def load_data(self, site):
        target = TARGETS[self.schema.task]
        parts = zip(("train", "val", "test"), self.sizes, strict=True)
        splits = {
            split: make_rows(size, (site.index, number), f"{site.name}-{split}", target)
            for number, (split, size) in enumerate(parts)
        }
        return SiteData(**splits, source="made up")


def bagged(client, rounds, **config):
    """Let one hospital grow trees by messages, added up by Flower's function alone."""
    context = context_of(num_sites=1, **DECLARED | config)
    model = write_trees(as_trees(client(context)).form, [])
    for server_round in range(1, rounds + 1):
        arrays = ArrayRecord([np.frombuffer(model, np.uint8)])
        told = {"server_round": server_round, "trees": "bagging"}
        reply = ask(client, "train", context, arrays, **told)
        assert not reply.has_error(), reply.error.reason
        model = aggregate_bagging(model, model_bytes(reply.content["arrays"]))
    return model, as_trees(client(context))


STUMP = {
    "left_children": [1, -1, -1],
    "right_children": [2, -1, -1],
    "split_indices": [1, 0, 0],
    "default_left": [1, 0, 0],
    "split_conditions": [0.5, -1.0, 2.0],
}
