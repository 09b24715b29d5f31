"""FLamby's protocol on Heart Disease and TCGA-BRCA, beside its published table.

du Terrail et al.: FLamby: Datasets and Benchmarks for Cross-Silo Federated Learning in Realistic
Healthcare Settings, NeurIPS 2022, https://arxiv.org/abs/2210.04620. The published figures are means
over five seeds, computed from the result files of owkin/FLamby @ edacf54. As there: the same
patients in training and test, logistic regression on 13 columns of complete rows, 15 rounds of 100
SGD steps on batches of 4 (Heart), a linear Cox model, 5 rounds of 100 steps on batches of 8 (TCGA).
"avg client" is the mean over hospitals of the figure on each hospital's own test patients; "all"
that on all test patients together, who are scaled there by the means of all.

Not as there: Flower's FedAdam corrects its first steps for their bias, which makes them about three
times smaller; its server rate is larger by that factor.

``FEDMED_DATA=... python benchmarks/flamby.py [--seeds 42 43 44 45 46] [--dataset heart tcga]``
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import documented
import numpy as np
import pandas as pd
from flwr.serverapp import ServerApp
from lifelines.utils import concordance_index
from safetensors.numpy import load_file
from sklearn.model_selection import train_test_split

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "heart"))
from client_app import HeartHospital

from fedmed_flower import Schema, SiteData, SurvivalClient, TabularClient, federate, run_local
from fedmed_flower.data.cohorts import REGIONS, TCGA_FLAGS, breast_cancer
from fedmed_flower.data.preparation import Preparation
from fedmed_flower.data.schema import table_of
from fedmed_flower.data.sources import load_heart_disease
from fedmed_flower.server.run_folder import MODEL, SUMMARY, RunFolder
from fedmed_flower.strategies import FedAdagrad, FedAdam, FedAvg, FedYogi

RAW = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak")
TAU = 1e-8
logging.getLogger("flwr").setLevel(logging.ERROR)


def heart_tables():
    """Return FLamby's rows of each hospital: complete in ten columns, with its split."""
    tables = {}
    for name, table in load_heart_disease().items():
        frame = pd.DataFrame(table.features[:, :10], columns=list(RAW))
        frame["disease"], frame["row"] = table.target, np.arange(len(frame))
        frame = frame.dropna().reset_index(drop=True)
        frame["patient"] = [f"{name}-{row}" for row in frame.pop("row")]
        few = np.bincount(frame["disease"], minlength=2).min() <= 2
        train, _ = train_test_split(
            np.arange(len(frame)),
            train_size=0.66,
            test_size=0.34,
            random_state=43,
            stratify=None if few else frame["disease"],
        )
        frame["split"] = np.where(np.isin(np.arange(len(frame)), train), "train", "test")
        tables[name] = frame
    return tables


HEART = heart_tables()
EVERYBODY = pd.get_dummies(
    pd.concat(HEART, names=["hospital"]).reset_index("hospital"),
    columns=["cp", "restecg"],
    drop_first=True,
    dtype=float,
)
DUMMIES = tuple(c for c in EVERYBODY if c not in ("disease", "patient", "split", "hospital"))


def splits(frame, schema):
    parts = {
        split: table_of(frame[frame["split"] == split], schema, split).rows
        for split in ("train", "test")
    }
    return SiteData(train=parts["train"], test=parts["test"], source="FLamby's split")


class FlambyHeart(TabularClient):
    """Its 13 columns, each a number."""

    schema = Schema(target="disease", task="binary", numeric=DUMMIES)

    def load_data(self, site):
        """Return the rows of one of the four hospitals, scaled by nobody yet."""
        own = EVERYBODY[EVERYBODY["hospital"] == list(HEART)[site.index]]
        return splits(own, self.schema)


class OurHeart(TabularClient):
    """The same patients; columns as the example app declares them."""

    schema = HeartHospital.schema

    def load_data(self, site):
        """Return the rows of one of the four hospitals."""
        frame = HEART[list(HEART)[site.index]].copy()
        # No living patient has a pressure or a cholesterol of 0: it stands for a missing value.
        zero = frame[["trestbps", "chol"]] == 0
        frame[["trestbps", "chol"]] = frame[["trestbps", "chol"]].mask(zero)
        return splits(frame, self.schema)


BREAST = breast_cancer().assign(T=lambda frame: frame["T"].clip(lower=0.5))


class Region(SurvivalClient):
    """A region of TCGA-BRCA."""

    schema = Schema(
        target="T",
        event="E",
        task="survival",
        numeric=("age_at_index",),
        ranges={"age_at_index": (18, 100)},
        categorical=TCGA_FLAGS,
        categories=dict.fromkeys(TCGA_FLAGS, ("0", "1")),
    )

    def load_data(self, site):
        """Return its patients."""
        return splits(BREAST[BREAST["region"] == REGIONS[site.index]], self.schema)


PRIVATE = {
    "privacy": "patient",
    # The figures of the table are those of the models, as without privacy.
    "private-metrics": False,
    "preparation": "declared",
    "optimizer": "sgd",
    "sampling-rate": 1.0,
    "local-steps": 2,
}
SITE = {"preparation": "site", "local-steps": 100, "batch-size": 4, "optimizer": "sgd"}
# Name, strategy, settings, published (avg client, all).
HEART_RUNS = [
    ("FedAvg", FedAvg, {}, SITE | {"learning-rate": 0.001}, (0.685, 0.748)),
    (
        *("FedAdam", FedAdam, {"eta": 0.03162, "tau": TAU, "beta_2": 0.999}),
        *(SITE | {"learning-rate": 0.01}, (0.726, 0.779)),
    ),
    (
        *("FedYogi", FedYogi, {"eta": 0.01, "tau": TAU, "beta_2": 0.999}),
        *(SITE | {"learning-rate": 0.003162}, (0.731, 0.779)),
    ),
    (
        *("FedAdagrad", FedAdagrad, {"eta": 0.316228, "tau": TAU}),
        *(SITE | {"learning-rate": 0.003162}, (0.731, 0.779)),
    ),
]
OURS = {"preparation": "federated", "local-steps": 20, "batch-size": 16, "optimizer": "sgd"}
OUR_HEART = [
    ("ours: FedAvg, federated preparation", FedAvg, {}, OURS | {"learning-rate": 0.03}, None)
]
OUR_HEART += [
    (
        *(f"ours, private: epsilon {epsilon}", FedAvg, {}),
        *(PRIVATE | {"target-epsilon": float(epsilon), "learning-rate": 1.0}, None),
    )
    for epsilon in (8, 3, 1)
]
COX = {"local-steps": 100, "batch-size": 8, "optimizer": "sgd", "learning-rate": 0.03}
TCGA_RUNS = [
    ("FedAvg", FedAvg, {}, COX, (0.732, 0.735)),
    ("FedAdam", FedAdam, {"eta": 0.2, "tau": TAU, "beta_2": 0.999}, COX, (0.815, 0.842)),
]
DISCRETE = {"survival-loss": "discrete", "survival-horizon": 3650.0, "survival-intervals": 5}
TCGA_RUNS += [
    (
        "ours: discrete time",
        FedAvg,
        {},
        DISCRETE | OURS | {"learning-rate": 1.0, "batch-size": 64, "local-steps": 5},
        None,
    )
]
TCGA_RUNS += [
    (
        *(f"ours, private: epsilon {epsilon}", FedAvg, {}),
        *(PRIVATE | DISCRETE | {"target-epsilon": float(epsilon), "learning-rate": 2.0}, None),
    )
    for epsilon in (8, 3, 1)
]


DATASETS = {
    "heart": ("accuracy", 15, 4, [(FlambyHeart, HEART_RUNS), (OurHeart, OUR_HEART)]),
    "tcga": ("c-index", 5, 6, [(Region, TCGA_RUNS)]),
}
# Published figures of training on all data pooled: avg client, all.
PUBLISHED_POOLED = {"heart": (0.735, 0.795), "tcga": (0.676, 0.704)}
# Private runs: few steps on all patients, each with all its noise.
PRIVATE_ROUNDS = 10


def run(dataset, group, number, seed):
    """Run once; return the mean over hospitals, the figure on all test patients, and epsilon."""
    figure, rounds, sites, groups = DATASETS[dataset]
    client, runs = groups[group]
    _, strategy, arguments, settings, _ = runs[number]
    if "privacy" in settings or "survival-loss" in settings:
        rounds = PRIVATE_ROUNDS
    server = ServerApp()

    @server.main()
    def main(grid, context):
        federate(strategy(**arguments), grid, context, client(context))

    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name) / "run")
        config = {"run-dir": str(folder.path), "num-server-rounds": rounds, "seed": seed}
        run_local(server, client.client_app(), sites, run_config=config | settings)
        summary = json.loads((folder / SUMMARY).path.read_text())
        arrays = load_file((folder / MODEL).path)
        agreed = folder.read_config()["run"].get("agreed")
    each = {site: figures[figure] for site, figures in summary["test"]["sites"].items()}
    if client is FlambyHeart:
        everybody = flamby_pooled(arrays)
    elif client is Region:
        everybody = concordance_of_all(arrays, agreed)
    else:
        everybody = summary["test"]["federated"][figure]
    costs = summary["privacy"].get("patient", {}).get("sites", {})
    spent = max((site["epsilon"] for site in costs.values()), default=None)
    return float(np.mean(list(each.values()))), everybody, spent, list(each.values())


def flamby_pooled(arrays):
    """Return the accuracy on all test patients, scaled by the means of all training patients."""
    rows = {
        split: EVERYBODY.loc[EVERYBODY["split"] == split, list(DUMMIES)].to_numpy()
        for split in ("train", "test")
    }
    features = (rows["test"] - rows["train"].mean(axis=0)) / rows["train"].std(axis=0)
    scores = features @ arrays["weight"][0] + arrays["bias"][0]
    truth = EVERYBODY.loc[EVERYBODY["split"] == "test", "disease"].to_numpy()
    return float(np.mean((scores > 0) == truth))


def concordance_of_all(arrays, agreed):
    """Return the concordance index among all regions' test patients together."""
    schema = Region.schema
    prepared = Preparation.from_text(agreed) if agreed else Preparation.declared(schema)
    rows = table_of(BREAST[BREAST["split"] == "test"], schema, "test").rows
    (weight,) = (values for values in arrays.values() if values.ndim == 2)
    risks = prepared.transform(rows) @ weight[0]
    return float(concordance_index([row["T"] for row in rows], -risks, [row["E"] for row in rows]))


def rows(dataset, seeds):
    """Yield a row for each run, and the published one of pooled training."""
    _, _, _, groups = DATASETS[dataset]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for group, (_, runs) in enumerate(groups):
            for number, (name, _, _, _, published) in enumerate(runs):
                futures = [pool.submit(run, dataset, group, number, seed) for seed in seeds]
                means, everybody, spent, each = zip(*(f.result() for f in futures), strict=True)
                yield [
                    *(name, short(np.mean(means)), short(np.mean(everybody))),
                    *(["", ""] if published is None else map(short, published)),
                    "" if spent[0] is None else f"{max(spent):.2f}",
                    " ".join(map(short, means)),
                    " ".join(map(short, np.mean(each, axis=0))),
                ]
    yield ["pooled training", "", "", *map(short, PUBLISHED_POOLED[dataset]), "", "", ""]


def short(value):
    return documented.without_zero(f"{value:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--dataset", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    documented.add_options(parser)
    options = parser.parse_args()
    began = time.perf_counter()
    head = ["average client", "all test patients", "average client, published"]
    head += ["all test patients, published", "most in a ledger", "each seed", "each hospital"]
    if "heart" in options.dataset:
        named = ["heart disease, accuracy", *head]
        documented.show("flamby-heart", named, rows("heart", options.seeds), options, threads=1)
    if "tcga" in options.dataset:
        named = ["TCGA-BRCA, concordance index", *head]
        documented.show("flamby-tcga", named, rows("tcga", options.seeds), options, threads=1)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
