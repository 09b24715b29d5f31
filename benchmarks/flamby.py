"""FLamby's protocol on Heart Disease and TCGA-BRCA, beside its published table.

du Terrail et al.: FLamby: Datasets and Benchmarks for Cross-Silo Federated Learning in Realistic
Healthcare Settings, NeurIPS 2022, https://arxiv.org/abs/2210.04620. The published figures are means
over five seeds, computed from the result files of owkin/FLamby @ edacf54. As there: the same
patients in training and test, logistic regression on 13 columns of complete rows, 15 rounds of 100
SGD steps on batches of 4 (Heart), a linear Cox model, 5 rounds of 100 steps on batches of 8 (TCGA).
"average client" is the mean over hospitals of the figure on each hospital's own test patients; "all
test patients" that on all together, who are scaled there by the means of all. Where hospitals have
models of their own, both are of these: each test patient is judged by the model of the patient's
hospital. Fine-tuning is that of FLamby's personalization example: 100 further steps at each
hospital, here as a 16th round whose local models are the own ones; a published figure for it and
for its FedAvg is of that example. A hospital alone trains as many steps as in the rounds.

Not as there: Flower's FedAdam corrects its first steps for their bias, which makes them about three
times smaller; its server rate is larger by that factor. FLamby's code for cyclic weight transfer
draws an order of the hospitals for each cycle, as one of our two rows. But each hospital trains a
copy there that is never handed on: that figure is not compared.

Learning rates are FLamby's, where it has the method. For the others ``--tune`` shows how they were
chosen: by another seed, on a third of the training patients that is held out. The methods' own
settings are the defaults.

``FEDMED_DATA=... python benchmarks/flamby.py [--seeds 42 43 44 45 46] [--dataset heart tcga]``
``[--tune]``
"""

import argparse
import itertools
import json
import logging
import math
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
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
from fedmed_flower.methods import Ended, Method, register
from fedmed_flower.methods.cyclic import Cyclic
from fedmed_flower.methods.ditto import state_of, with_state
from fedmed_flower.server.run_folder import MODEL, SUMMARY, RunFolder
from fedmed_flower.settings import Section
from fedmed_flower.settings.plan import Plan
from fedmed_flower.settings.section import also
from fedmed_flower.strategies import FedAdagrad, FedAdam, FedAvg, FedYogi

RAW = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak")
TAU = 1e-8
# Settings that were not published are chosen by this seed, which no table has, and these folds.
TUNING_SEED = 41
FOLDS = 3
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


class HeldOut(FlambyHeart):
    """The training patients alone: of each hospital's a third, the fold, is held out for tests."""

    fold = 0

    def load_data(self, site):
        """Return them as training and test rows."""
        rows = super().load_data(site).train
        order = np.random.default_rng(TUNING_SEED).permutation(len(rows))
        held = {int(row) for row in order[self.fold :: FOLDS]}
        train = [row for number, row in enumerate(rows) if number not in held]
        return SiteData(train=train, test=[rows[row] for row in sorted(held)], source="a fold")


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


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes
    ----------
    name : str
    settings : dict
        Of the run config.
    strategy : type of FedAvg
    arguments : dict
        Of the strategy.
    published : tuple of two floats, optional
        Average client, all test patients; NaN where nothing was published.
    grid : dict
        Values of settings among which `tune` lets one choose.
    models : str
        Whose figures are taken: "sites" for the global model's, "own" for those of own models,
        "local" for those of models that each hospital has trained alone.
    """

    name: str
    settings: dict
    strategy: type[FedAvg] = FedAvg
    arguments: dict = field(default_factory=dict)
    published: tuple[float, float] | None = None
    grid: dict = field(default_factory=dict)
    models: str = "sites"


def flamby(name, rate, published=None, models="sites", grid=None, **more):
    """Return a row of FLamby's protocol under FedAvg."""
    settings = SITE | {"learning-rate": rate} | {k.replace("_", "-"): v for k, v in more.items()}
    return Row(name, settings, published=published, models=models, grid=grid or {})


RATES = {"learning-rate": (0.001, 0.01)}


@register
class FineTuned(Method):
    """FLamby's fine-tuning: the own model is what the last round's steps made of the global one."""

    name = "last-steps"
    personal = True

    def end(self, site):
        """Keep the model as it is sent."""
        return Ended(state_of(site.model, site.travelling))

    def own(self, model, kept):
        """Return the model that was sent last."""
        return with_state(model, kept)


@dataclass(frozen=True)
class Order(Section):
    """What decides the order of the hospitals."""

    seed: int = also(Plan, "seed")


@register
class Redrawn(Cyclic):
    """FLamby's cyclic weight transfer: each cycle goes through the hospitals in an order drawn."""

    name = "cyclic-redrawn"
    section = Order

    def choose(self, nodes, server_round):
        """Return the one node whose turn it is."""
        cycle, place = divmod(server_round - 1, len(nodes))
        order = np.random.default_rng((self.settings.seed, cycle)).permutation(len(nodes))
        return [nodes[order[place]]]


HEART_RUNS = [
    flamby("FedAvg", 0.001, (0.685, 0.748)),
    Row(
        "FedAdam",
        SITE | {"learning-rate": 0.01},
        FedAdam,
        {"eta": 0.03162, "tau": TAU, "beta_2": 0.999},
        (0.726, 0.779),
    ),
    Row(
        "FedYogi",
        SITE | {"learning-rate": 0.003162},
        FedYogi,
        {"eta": 0.01, "tau": TAU, "beta_2": 0.999},
        (0.731, 0.779),
    ),
    Row(
        "FedAdagrad",
        SITE | {"learning-rate": 0.003162},
        FedAdagrad,
        {"eta": 0.316228, "tau": TAU},
        (0.731, 0.779),
    ),
    flamby("SCAFFOLD", 0.001, (0.684, 0.748), method="scaffold"),
    flamby("FedDyn", 0.001, None, "sites", RATES, method="feddyn"),
    flamby("cyclic weight transfer", 0.01, method="cyclic"),
    flamby("cyclic weight transfer, order drawn", 0.01, method="cyclic-redrawn"),
    flamby("FedAvg, before fine-tuning", 0.003162, (0.718, math.nan)),
    flamby(
        *("own models: fine-tuning by 100 steps", 0.003162, (0.735, math.nan), "own"),
        method="last-steps",
        num_server_rounds=16,
    ),
    flamby("own models: Ditto", 0.01, None, "own", RATES, method="ditto"),
    flamby("own models: APFL", 0.01, None, "own", RATES, method="apfl"),
    flamby("own models: kept bias", 0.01, None, "own", RATES, keep="bias"),
    flamby("own models: FedRep", 0.01, None, "own", RATES, method="fedrep", keep="bias"),
    flamby(
        *("each hospital alone, tested at home", 0.01, None, "local", RATES),
        baselines=True,
    ),
]
OURS = {"preparation": "federated", "local-steps": 20, "batch-size": 16, "optimizer": "sgd"}
OUR_HEART = [Row("ours: FedAvg, federated preparation", OURS | {"learning-rate": 0.03})]
OUR_HEART += [
    Row(
        f"ours, private: epsilon {epsilon}",
        PRIVATE | {"target-epsilon": float(epsilon), "learning-rate": 1.0},
    )
    for epsilon in (8, 3, 1)
]
COX = {"local-steps": 100, "batch-size": 8, "optimizer": "sgd", "learning-rate": 0.03}
DISCRETE = {"survival-loss": "discrete", "survival-horizon": 3650.0, "survival-intervals": 5}
TCGA_RUNS = [
    Row("FedAvg", COX, published=(0.732, 0.735)),
    Row(
        *("FedAdam", COX, FedAdam, {"eta": 0.2, "tau": TAU, "beta_2": 0.999}),
        published=(0.815, 0.842),
    ),
    Row(
        "ours: discrete time",
        DISCRETE | OURS | {"learning-rate": 1.0, "batch-size": 64, "local-steps": 5},
    ),
]
TCGA_RUNS += [
    Row(
        f"ours, private: epsilon {epsilon}",
        PRIVATE | DISCRETE | {"target-epsilon": float(epsilon), "learning-rate": 2.0},
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


def run(dataset, group, number, seed, changes=None, fold=None):
    """Run a row of a table once.

    Parameters
    ----------
    dataset : str
    group, number : int
        Which row of it.
    seed : int
    changes : dict, optional
        Settings in place of the row's.
    fold : int, optional
        Test on a third of the training patients, which is then held out; see `HeldOut`.

    Returns
    -------
    tuple
        The mean over hospitals of the figure on own test patients, the figure on all test patients,
        the largest epsilon in a ledger (None without privacy), and the figure at each hospital.
    """
    figure, rounds, sites, groups = DATASETS[dataset]
    client, runs = groups[group]
    row = runs[number]
    if "privacy" in row.settings or "survival-loss" in row.settings:
        rounds = PRIVATE_ROUNDS
    if fold is not None:
        client = type(f"HeldOut{fold}", (HeldOut,), {"fold": fold})
    server = ServerApp()

    @server.main()
    def main(grid, context):
        federate(row.strategy(**row.arguments), grid, context, client(context))

    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name) / "run")
        config = {"run-dir": str(folder.path), "num-server-rounds": rounds, "seed": seed}
        config |= row.settings | (changes or {})
        run_local(server, client.client_app(), sites, run_config=config)
        summary = json.loads((folder / SUMMARY).path.read_text())
        arrays = load_file((folder / MODEL).path)
        agreed = folder.read_config()["run"].get("agreed")
    tested = summary["test"][row.models]
    each = {site: metrics[figure] for site, metrics in tested.items()}
    if row.models != "sites":
        # Each test patient by the model of the patient's own hospital.
        counts = [metrics["num-examples"] for metrics in tested.values()]
        everybody = float(np.average(list(each.values()), weights=counts))
    elif issubclass(client, FlambyHeart):
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
            for number, row in enumerate(runs):
                futures = [pool.submit(run, dataset, group, number, seed) for seed in seeds]
                means, everybody, spent, each = zip(*(f.result() for f in futures), strict=True)
                yield [
                    *(row.name, settings_of(row), short(np.mean(means)), short(np.mean(everybody))),
                    *(["", ""] if row.published is None else map(short, row.published)),
                    "" if spent[0] is None else f"{max(spent):.2f}",
                    " ".join(map(short, means)),
                    " ".join(map(short, np.mean(each, axis=0))),
                ]
    yield ["pooled training", "", "", "", *map(short, PUBLISHED_POOLED[dataset]), "", "", ""]


def settings_of(row):
    """Return what a row sets beyond FLamby's protocol, as the table shows it."""
    shown = ("learning-rate", "optimizer", "num-server-rounds", "keep", "method")
    shown += ("dyn-alpha", "ditto-lambda", "apfl-alpha")
    plain = {"optimizer": "sgd"}
    pairs = [(key, row.settings[key]) for key in shown if key in row.settings]
    return ", ".join(f"`{key}={value}`" for key, value in pairs if plain.get(key) != value)


def tune():
    """Print the accuracy on held-out training patients for each setting that was chosen by it."""
    _, runs = DATASETS["heart"][3][0]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for number, row in enumerate(runs):
            for values in itertools.product(*row.grid.values()) if row.grid else ():
                changes = dict(zip(row.grid, values, strict=True))
                futures = [
                    pool.submit(run, "heart", 0, number, TUNING_SEED, changes, fold)
                    for fold in range(FOLDS)
                ]
                means = [future.result()[0] for future in futures]
                each = " ".join(map(short, means))
                print(f"{row.name}, {changes}: {short(np.mean(means))} ({each})", flush=True)


def short(value):
    return "" if math.isnan(value) else documented.without_zero(f"{value:.3f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--dataset", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    parser.add_argument("--tune", action="store_true", help="show how settings were chosen")
    documented.add_options(parser)
    options = parser.parse_args()
    if options.tune:
        tune()
        return
    began = time.perf_counter()
    head = ["settings", "average client", "all test patients", "average client, published"]
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
