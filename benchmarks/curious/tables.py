"""Attacks on hospitals with tables. Each maps an empty folder and a budget's epsilon to `Found`.

The rows of a whole batch from one update: L. Fowl et al., "Robbing the Fed: Directly Obtaining
Private Data in Federated Learning with Modified Models", ICLR 2022,
https://arxiv.org/abs/2110.13057, here with one threshold of the age after the other.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from curious.victim import PRIVATE, Arrays, Floats, Found, Victim, scored
from numpy.typing import ArrayLike

from fedmed_flower import Schema, Site, SiteData, SurvivalClient, TabularClient
from fedmed_flower.data.splits import split_patients
from fedmed_flower.metrics.auc import EDGES
from fedmed_flower.trees.client import as_trees
from fedmed_flower.trees.ensembles import model_bytes, read_trees, write_trees

AGES, PRESSURES = (20.0, 90.0), (50.0, 250.0)
COLUMNS: dict[str, Any] = {
    "numeric": ("age", "pressure"),
    "categorical": ("sex",),
    "ranges": {"age": (0, 100), "pressure": PRESSURES},
    "categories": {"sex": ("f", "m")},
}


class Table(TabularClient):
    """A hospital with a table in its folder."""

    schema = Schema("ill", "binary", **COLUMNS)

    def load_data(self, site: Site) -> SiteData:
        """Return the rows, in the table's splits where it has some."""
        rows = json.loads((site.data_dir / "rows.json").read_text())
        return SiteData(**split_patients(rows, self.settings.seed))


class Lives(SurvivalClient):
    """A hospital with times until death."""

    schema = Schema("days", "survival", event="died", **COLUMNS)
    load_data = Table.load_data


def people(seed: int, **sizes: int) -> list[dict[str, Any]]:
    """Return made-up patients, so many of each split; ages to a hundredth of a year."""
    rng, rows = np.random.default_rng((17, seed)), []
    for split in [split for split, count in sizes.items() for _ in range(count)]:
        age, pressure = round(rng.uniform(*AGES), 2), round(rng.normal(140, 20), 1)
        life, seen = rng.exponential(500 * math.exp((50 - age) / 20)), rng.uniform(100, 1500)
        row = {"patient": f"p{len(rows)}", "age": age, "pressure": pressure, "split": split}
        row |= {"sex": "fm"[rng.integers(2)], "ill": int(rng.random() < age / 110)}
        rows.append(row | {"days": math.ceil(min(life, seen)), "died": int(life <= seen)})
    return rows


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    (folder / "rows.json").write_text(json.dumps(rows))


def numbers(rows: Sequence[Mapping[str, Any]], *columns: str) -> Floats:
    """Return columns of rows, (n, k); of the sex, 1 for men."""
    codes = {"f": 0, "m": 1}
    return np.array([[float(codes.get(row[c], row[c])) for c in columns] for row in rows])


def linear(slope: float, shift: float) -> Arrays:
    """Return a linear model: slope times the age, and a shift. Features are (age - 50) / 25."""
    weight, bias = [[25 * slope, 0, 0]], [50 * slope + shift]
    return {"weight": np.asarray(weight, np.float32), "bias": np.asarray(bias, np.float32)}


def hidden(ages: ArrayLike, slopes: ArrayLike, last: ArrayLike) -> dict[str, Any]:
    """Return a network with a hidden layer: the sum of last * relu(slope * (age - its age))."""
    steep = 25 * np.asarray(slopes, np.float64)
    weight = np.zeros((steep.size, 3))
    weight[:, 0] = steep
    layers = {"0.weight": weight, "0.bias": -steep * (np.asarray(ages) - 50) / 25}
    layers |= {"3.weight": np.asarray(last)[None], "3.bias": np.zeros(1)}
    return {name: value.astype(np.float32) for name, value in layers.items()}


def one_layer(width: int) -> dict[str, Any]:
    """Return the run config of such a network."""
    return {"tabular_network": "mlp", "network_width": width, "network_depth": 1}


def preparation(folder: Path, epsilon: float) -> Found:
    """Ask for the sums before the first round with 75 seeds, which once drew the training rows."""
    records = [{k: v for k, v in row.items() if k != "split"} for row in people(0, x=60)]
    write_rows(folder, records)
    victim, inside, told = Victim(Table, folder, epsilon), [], []
    for seed in range(75):
        reply = victim.ask("query.contribution", seed=seed, preparation="federated")
        if "contribution" in reply:
            drawn = split_patients([{"patient": row["patient"]} for row in records], seed)["train"]
            names = {row["patient"] for row in drawn}
            inside.append([float(row["patient"] in names) for row in records])
            moments = [reply["contribution"][f"moments {c}"] for c in ("age", "pressure")]
            told.append([count * mean for count, mean, _ in moments])
    guess = np.linalg.lstsq(np.array(inside), np.array(told))[0] if told else np.zeros((60, 2))
    return scored(guess, lambda seed: numbers(people(seed, x=60), "age", "pressure"), 0.05, True)


def rows(folder: Path, epsilon: float, batch: int, updates: int = 1, **node: Any) -> Found:
    """Read the batches behind updates. Thresholds are so dense that few patients share a bin.

    The gradient of a bin's weights is that of its bias times the patient's row, and the sign of the
    latter tells the label.
    """
    write_rows(folder, people(0, train=42))
    victim, bins, found = Victim(Table, folder, epsilon, **node), 4096, []
    network = hidden(np.linspace(*AGES, bins), np.full(bins, 0.04), np.full(bins, 1e-4))
    how = one_layer(bins) | {"local_steps": 1, "batch_size": batch, "learning_rate": 1e4}
    for seed in range(updates):
        after = victim.trained(network, seed=seed, **how)
        moved = {name: value.astype(np.float64) - network[name] for name, value in after.items()}
        if not moved:
            continue
        weight, bias = (
            -np.diff(moved[name], axis=0, append=0 * moved[name][:1])
            for name in ("0.weight", "0.bias")
        )
        for place in np.argsort(-np.abs(bias))[:batch]:
            age, pressure, man = weight[place] / (bias[place] or 1.0)
            found.append([50 + 25 * age, 150 + 50 * pressure, man, float(bias[place] > 0)])

    def truth(seed: int) -> Floats:
        return numbers(people(seed, train=42), "age", "pressure", "sex", "ill")

    return scored(found, truth, [0.05, 0.5, 0.1, 0])._replace(of=batch * updates)


def measured(seed: int) -> Floats:
    """Return age and label of the 120 test patients of a hospital."""
    return numbers(people(seed, train=10, test=120)[10:], "age", "ill")


def ages(folder: Path, epsilon: float, **node: Any) -> Found:
    """Ask for the scores of a model that gives out the age, by bins of the score and by label."""
    write_rows(folder, people(0, train=10, test=120))
    # With noise there are 32 bins, from -8 to 8.
    slope = 16 / (AGES[1] - AGES[0]) if epsilon else 1.0
    told = Victim(Table, folder, epsilon, **node).figures(linear(slope, -55 * slope))
    edges, counts = np.linspace(-8, 8, 33), np.round(told.get("noised-counts", np.zeros(64)))
    if "score-counts" in told:
        centre, width, _ = told["score-grid"]
        edges, counts = centre + width * EDGES, np.array(told["score-counts"])
    found = []
    for label, part in enumerate(counts.reshape(2, -1)):
        # A bin below 0 is merged with the one before it.
        starts = np.arange(len(part)) if "noised-counts" in told else np.flatnonzero(part >= 0)
        for low, high, inside in zip(starts, [*starts[1:], len(part)], part[starts], strict=True):
            ends = np.clip(55 + edges[[low, high]] / slope, *AGES)
            each = np.linspace(*ends, 2 * max(0, int(inside)) + 1)[1::2]
            found += [(age, label) for age in each]
    return scored(found, measured, [0.05, 0])


def ages_by_steps(folder: Path, epsilon: float) -> Found:
    """Ask how many are below an age, for one age after the other."""
    write_rows(folder, people(0, train=10, test=120))
    victim, found = Victim(Table, folder, epsilon, coarse_figures=True), []
    before: Any = None
    for age in np.arange(*AGES, 0.1):
        told = victim.figures(linear(1.0, -age))
        below = np.array(told["confusion-counts"])[[0, 2]] if "confusion-counts" in told else None
        if before is not None and below is not None:
            for label, more in enumerate(below - before):
                found += [(age - 0.05, label)] * int(more)
        before = below
    return scored(found, measured, [0.05, 0])


def lives(folder: Path, epsilon: float) -> Found:
    """Move what is predicted for a band of the age, and watch the integrated Brier score.

    The band's survival falls from 1 to 0 at the last of 50 times, the horizon, and there alone. Of
    each patient in the band the error rises by 1 or more who is alive then, falls by 1 or more who
    has died, and stays who was censored. Bands come from halving the ages, times from halving the
    days.
    """
    count, steep = 18, 5000.0
    write_rows(folder, people(0, train=60, test=count))
    victim = Victim(Lives, folder, epsilon)

    def brier(low: float, high: float, horizon: float) -> float:
        network = hidden(
            [low, low + 1 / steep, high, high + 1 / steep], [steep] * 4, [100, -100, -100, 100]
        )
        sent = {f"score.{name}": value for name, value in network.items()}
        sent["baseline"] = np.float32([-200] * 49 + [-60])
        how = {"survival_loss": "discrete", "survival_intervals": 50} | one_layer(4)
        told = victim.figures(sent, survival_horizon=float(horizon), **how)
        return float(told.get("integrated-brier", math.nan))

    def change(band: tuple[float, float], horizon: float) -> float:
        # The mean over 49 steps, of which the last is half the horizon's.
        return 98 * count * (brier(*band, horizon) - brier(0, 1, horizon))

    def bands(low: float, high: float) -> list[tuple[float, float]]:
        # On the first half day all are alive: their number.
        inside = change((low, high), 0.5)
        if not inside > 0.5:
            return []
        if inside < 1.5 or high - low < 0.01:
            return [(low, high)]
        middle = (low + high) / 2
        return bands(low, middle) + bands(middle, high)

    found = []
    for band in bands(AGES[0] - 0.001, AGES[1] + 0.001):
        days = bisect.bisect_left(
            range(1600), True, key=lambda day: not change(band, day + 0.5) > 0.5
        )
        found.append((days, float(change(band, days + 0.5) < -0.5)))

    def truth(seed: int) -> Floats:
        return numbers(people(seed, train=60, test=count)[60:], "days", "died")

    return scored(found, truth, [0.5, 0])


def thresholds(folder: Path, epsilon: float) -> Found:
    """Look for single patients' values among the thresholds of honest trees."""
    write_rows(folder, people(0, train=50))
    victim = Victim(Table, folder, epsilon)
    how = {"trees_a_round": 20, "tree_subsample": 0.8}
    form = as_trees(Table(victim.context(how))).form
    sent = {"0": np.frombuffer(write_trees(form, []), np.uint8)}
    reply, cuts = victim.ask("train", sent, {"trees": "bagging"}, **how), []
    if "arrays" in reply:
        for tree in read_trees(model_bytes(reply["arrays"]), form, 20):
            inner = np.asarray(tree["left_children"]) >= 0
            chosen = inner & (np.asarray(tree["split_indices"]) == 0)
            cuts += [*np.asarray(tree["split_conditions"])[chosen]]
    return scored(np.unique(cuts), lambda seed: numbers(people(seed, train=50), "age"), 1e-4)


class Watched(Table):
    """Notes, for the judge, which patients are in which split."""

    parts: ClassVar[dict[str, set[str]]] = {}

    def load_data(self, site: Site) -> SiteData:
        """Return the rows."""
        data = super().load_data(site)
        for split in ("train", "test"):
            self.parts[split] = {row["patient"] for row in getattr(data, split)}
        return data


def second_run(folder: Path, epsilon: float, split: str) -> Found:
    """Train privately, then have patients measured in runs with other seeds."""
    write_rows(folder, [{k: v for k, v in r.items() if k != "split"} for r in people(0, x=60)])
    victim, measured = Victim(Watched, folder, epsilon), set[str]()
    model = linear(0.0, 0.0)
    victim.ask("train", model, **PRIVATE)
    trained = Watched.parts["train"]
    for seed in range(1, 21):
        if "loss" in victim.figures(model, split, seed=seed):
            measured |= Watched.parts[split] & trained
    return Found(len(measured), len(trained), 0.0)
