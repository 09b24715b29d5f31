"""What a server that asks as it likes learns of a hospital's patients: a table of attacks.

Each line is an attack on a hospital that is set up as a SuperNode is: ``site-name`` and
``data-dir`` in its node config, asked by messages to its ClientApp. The server chooses run config,
weights and messages, and knows the app's code; of the hospital it has the replies alone.

- before: what the attack got when it was found; not measured here.
- plain: from a hospital whose node config says nothing more.
- budget: from one with ``budget-epsilon`` (``--epsilon``) and ``budget-delta`` 1e-5.
- by chance: what the same guesses get right of other patients, drawn in the same way.
- works: got more than chance gives in one of 1,000.

Without a budget several attacks work: a plain run trusts the server. The script exits with 1 where
one works with a budget, or where the audit refutes the epsilon that training claims.

Rows of a whole batch from one update: L. Fowl et al., "Robbing the Fed: Directly Obtaining Private
Data in Federated Learning with Modified Models", ICLR 2022, https://arxiv.org/abs/2110.13057, here
with one threshold of the age after the other. Behind the table stand the membership test and the
audit by canaries of `membership`.

``FEDMED_DATA=... python benchmarks/curious_server.py [--only rows membership ...] [--rounds 10]``
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import logging
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from bed_reader import to_bed
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy import special, stats
from torch import nn

from fedmed_flower import (
    ClassificationClient,
    GenomicsClient,
    MedicalClient,
    Schema,
    SegmentationClient,
    Site,
    SiteData,
    SurvivalClient,
    TabularClient,
)
from fedmed_flower.arrays import view
from fedmed_flower.clients.models import ModelSettings, build_network
from fedmed_flower.clients.trees import as_trees
from fedmed_flower.data.datalist import load_folder
from fedmed_flower.data.site import RUN_KEY
from fedmed_flower.data.splits import split_patients
from fedmed_flower.ensembles import model_bytes, read_trees, write_trees
from fedmed_flower.pictures import Picture
from fedmed_flower.privacy.accounting import noise_for
from fedmed_flower.ranking import EDGES

Floats = NDArray[np.float64]
Arrays = Mapping[str, ArrayLike]

DELTA, DECOYS, SURE = 1e-5, 20, 1e-3
PLAIN = {"preparation": "declared", "optimizer": "sgd", "learning-rate": 0.1, "device": "cpu"}
PRIVATE = {"privacy": "patient", "sampling-rate": 1.0, "delta": DELTA, "num-server-rounds": 1}


class Found(NamedTuple):
    """What an attack got.

    Attributes
    ----------
    right, of : int
        How many of how many answers are right.
    chance : float
        How many would be right by chance.
    """

    right: int
    of: int
    chance: float

    @property
    def works(self) -> bool:
        """Whether chance gives as many right answers less often than once in 1,000."""
        return bool(stats.binom.sf(self.right - 1, self.of, self.chance / self.of) < SURE)


class Victim:
    """A real hospital, as a server meets it.

    Parameters
    ----------
    client : type of MedicalClient
        The app that runs there.
    folder : Path
        The hospital's own, with its data.
    epsilon : float
        Of its budget; 0 for none. A server knows it, and asks privately where it must.
    node : dict
        What else the node config says.
    """

    _run_ids = itertools.count(1)

    def __init__(
        self, client: type[MedicalClient], folder: Path, epsilon: float, **node: Any
    ) -> None:
        self.client, self._ids = client, dict[str, int]()
        self._node = {"site-name": "north", "data-dir": str(folder)}
        self._node |= {key.replace("_", "-"): value for key, value in node.items()}
        self._run = dict(PLAIN)
        if epsilon:
            self._node |= {"budget-epsilon": epsilon, "budget-delta": DELTA}
            self._run |= PRIVATE | {"target-epsilon": epsilon}

    def context(self, run: Mapping[str, Any]) -> Context:
        """Return a run's context at this hospital; a run config has one run."""
        config = self._run | {key.replace("_", "-"): value for key, value in run.items()}
        number = self._ids.setdefault(json.dumps(config, sort_keys=True), next(self._run_ids))
        return Context(number, 1, self._node, RecordDict(), config)

    def ask(
        self, kind: str, arrays: Arrays | None = None, message: Any = None, **run: Any
    ) -> RecordDict:
        """Return a reply, without records where the hospital sends an error.

        Parameters
        ----------
        kind : str
            Of the message, such as ``train``.
        arrays : dict of str to array, optional
        message : dict, optional
            More for the message's config. All runs give one run key, so that they count as one.
        **run
            Run config, with ``_`` for ``-``.
        """
        context = self.context(run)
        TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, SUPERLINK_NODE_ID
        TaskIdentity.task_id = 1
        config = ConfigRecord({"server-round": 1, RUN_KEY: "k"} | (message or {}))
        sent = {name: Array(np.ascontiguousarray(a)) for name, a in (arrays or {}).items()}
        content = RecordDict({"arrays": ArrayRecord(sent), "config": config})
        reply = self.client.client_app()(Message(content, 1, kind), context)
        if reply.has_error():
            return RecordDict({"error": ConfigRecord({"reason": reply.error.reason})})
        return reply.content

    def figures(self, arrays: Arrays, split: str = "test", **run: Any) -> dict[str, Any]:
        """Return what an evaluation tells; nothing where it is declined."""
        reply = self.ask("evaluate", arrays, {"split": split}, **run)
        return dict(reply["metrics"]) if "metrics" in reply else {}

    def update(self, arrays: Arrays, **run: Any) -> dict[str, Floats]:
        """Return what a round of training has changed; nothing where it is declined."""
        reply = self.ask("train", arrays, **run)
        if "arrays" not in reply:
            return {}
        after = {name: view(array).astype(np.float64) for name, array in reply["arrays"].items()}
        return {name: after[name] - np.asarray(arrays[name], np.float64) for name in after}


def scored(
    guesses: ArrayLike, draw: Callable[[int], Floats], within: ArrayLike, named: bool = False
) -> Found:
    """Compare guesses with the patients of a hospital, and with those of others.

    Parameters
    ----------
    guesses : array of shape (m, k)
    draw : callable
        Returns (n, k) numbers of a hospital's patients by its seed; the victim's is 0.
    within : float or array of shape (k,)
        How far a right guess is off, at most, in each number.
    named : bool
        Whether each guess is about the patient in its place; else it may be about any, once.
    """

    def right(truth: Floats) -> int:
        if named:
            return int((np.abs(guess - truth) <= within).all(1).sum())
        left = guess
        for one in truth:
            near = np.flatnonzero((np.abs(left - one) <= within).all(1))
            left = np.delete(left, near[:1], axis=0)
        return len(guess) - len(left)

    truth = draw(0)
    guess = np.asarray(guesses, np.float64).reshape(-1, truth.shape[1])
    others = sum(right(draw(seed)) for seed in range(1, DECOYS + 1))
    return Found(right(truth), len(truth), (others + 1) / DECOYS)


# Tables -------------------------------------------------------------------------------------------

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
    return np.array(
        [[float(row[c] == "m" if c == "sex" else row[c]) for c in columns] for row in rows]
    )


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
    rows = [{k: v for k, v in row.items() if k != "split"} for row in people(0, train=60)]
    write_rows(folder, rows)
    victim, inside, told = Victim(Table, folder, epsilon), [], []
    for seed in range(75):
        reply = victim.ask("query.contribution", seed=seed, preparation="federated")
        if "contribution" in reply:
            drawn = split_patients([{"patient": row["patient"]} for row in rows], seed)["train"]
            names = {row["patient"] for row in drawn}
            inside.append([float(row["patient"] in names) for row in rows])
            moments = [reply["contribution"][f"moments {c}"] for c in ("age", "pressure")]
            told.append([count * mean for count, mean, _ in moments])
    guess = np.linalg.lstsq(np.array(inside), np.array(told))[0] if told else np.zeros((60, 2))
    return scored(guess, lambda seed: numbers(people(seed, x=60), "age", "pressure"), 0.05, True)


def rows(folder: Path, epsilon: float, batch: int) -> Found:
    """Read a batch from one update. Thresholds are so dense that few patients share a bin.

    The gradient of a bin's weights is that of its bias times the patient's row, and the sign of the
    latter tells the label.
    """
    count, bins = 42, 4096
    write_rows(folder, people(0, train=count))
    network = hidden(np.linspace(*AGES, bins), np.full(bins, 0.04), np.full(bins, 1e-4))
    how = one_layer(bins) | {"local_steps": 1, "batch_size": batch, "learning_rate": 1e4}
    moved, found = Victim(Table, folder, epsilon).update(network, **how), []
    if moved:
        weight, bias = (
            -np.diff(moved[name], axis=0, append=0 * moved[name][:1])
            for name in ("0.weight", "0.bias")
        )
        for place in np.argsort(-np.abs(bias))[:batch]:
            age, pressure, man = weight[place] / bias[place] if bias[place] else np.zeros(3)
            found.append([50 + 25 * age, 150 + 50 * pressure, man, float(bias[place] > 0)])

    def truth(seed: int) -> Floats:
        return numbers(people(seed, train=count), "age", "pressure", "sex", "ill")

    return scored(found, truth, [0.05, 0.5, 0.1, 0])._replace(of=batch)


def test_ages(seed: int) -> Floats:
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
    return scored(found, test_ages, [0.05, 0])


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
    return scored(found, test_ages, [0.05, 0])


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


# Images and genomes -------------------------------------------------------------------------------


class Images(ClassificationClient):
    """A hospital with images of four classes in its folder; the network is the run config's."""

    num_classes = 4
    image_shape = (1, 8, 8)

    def load_data(self, site: Site) -> SiteData:
        """Return the folder's rows."""
        return load_folder(site.data_dir, self.settings.seed)


class Wide(Images):
    """One with a network that has many weights."""

    def build_model(self) -> nn.Module:
        """Return a network with 65,536 weights in front of a ReLU."""
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 4))


class Shown(Images):
    """One that notes, for the judge, of whom each picture is."""

    whose: ClassVar[dict[bytes, Any]] = {}

    def draw(self, model: nn.Module, prepared: Any, count: int) -> list[Picture]:
        """Return the pictures."""
        found = super().draw(model, prepared, count)
        self.whose.update({picture.png: picture.patient for picture in found})
        return found


class Masks(SegmentationClient):
    """A hospital with outlined lesions; its network looks at one pixel at a time."""

    classes = ("lesion",)
    image_shape = (1, 32, 32)
    load_data = Images.load_data

    def build_model(self) -> nn.Module:
        """Return a convolution of one pixel."""
        return nn.Conv2d(1, 2, 1)


def write_images(folder: Path, labels: Sequence[int], splits: Sequence[str], seed: int = 0) -> None:
    """Write an image for each label; that of a label below 0 cannot be read."""
    rng, lines = np.random.default_rng((18, seed)), ["image,label,patient,split"]
    for number, (label, split) in enumerate(zip(labels, splits, strict=True)):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(path)
        if label < 0:
            path.write_bytes(b"no picture")
        lines.append(f"{path.name},{max(0, label)},p{number},{split}")
    (folder / "datalist.csv").write_text("\n".join(lines))


def classifier(outputs: int, seed: int = 0) -> tuple[Arrays, dict[str, Any]]:
    """Return weights of a network by run config, and that run config."""
    args = {"in_shape": [1, 8, 8], "classes": outputs, "channels": [2], "strides": [2]}
    how = {"network": "Classifier", "network_args": json.dumps(args)}
    torch.manual_seed(seed)
    model = build_network(ModelSettings(**how))
    return {name: value.numpy() for name, value in model.state_dict().items()}, how


def errors(folder: Path, epsilon: float) -> Found:
    """Send networks of two and of three outputs: which labels are there decides who fails.

    The server has a hospital of its own, whose patients have no label above 0.
    """
    splits = [s for s in ("train", "val", "test") for _ in range(12)]

    def answers(name: str, label: int) -> list[str]:
        own, said = folder / name, []
        own.mkdir()
        write_images(own, [label] + [0] * 35, splits)
        victim = Victim(Images, own, epsilon)
        for outputs in (2, 3):
            arrays, how = classifier(outputs)
            for kind in ("train", "evaluate"):
                reply = victim.ask(kind, arrays, {"split": "train"}, **how)
                said.append(str(reply["error"]["reason"]) if "error" in reply else "")
        return said

    usual, right = answers("server", 0), 0
    for number in range(12):
        above = number % 2 == 0
        right += (answers(str(number), 3 * above) != usual) == above
    return Found(right, 12, 6)


def lesions(folder: Path, epsilon: float, patients: int) -> Found:
    """Send a network that calls everything lesion: the lowest Dice is that of the smallest one."""
    right = 0
    for number in range(6):
        own, rng, smallest = folder / str(number), np.random.default_rng((19, number)), 1024
        own.mkdir()
        lines = ["image,label,patient,split"]
        for patient in range(12 + patients):
            mask = np.zeros(1024, np.uint8)
            mask[: rng.integers(30, 1000)] = 1
            split = "train" if patient < 12 else "test"
            smallest = min(smallest, int(mask.sum())) if split == "test" else smallest
            for name, values in (("mask", mask), ("image", rng.integers(0, 255, 1024, np.uint8))):
                Image.fromarray(values.reshape(32, 32)).save(own / f"{name}{patient}.png")
            lines.append(f"image{patient}.png,mask{patient}.png,p{patient},{split}")
        (own / "datalist.csv").write_text("\n".join(lines))
        sent = {"weight": np.zeros((2, 1, 1, 1), np.float32), "bias": np.float32([0, 9])}
        dice = Victim(Masks, own, epsilon).figures(sent).get("dice-worst", 0.0)
        right += round(1024 * dice / (2 - dice)) == smallest
    return Found(right, 6, 6 / 970)


def unreadable(folder: Path, epsilon: float) -> Found:
    """Divide the noise of weights that have no gradient by what its multiplier says."""
    right, counts = 0, (1, 2, 3, 5)
    for count in counts:
        own = folder / str(count)
        own.mkdir()
        labels = [n % 4 for n in range(40)] + [0, 1, 2, 3] * 3
        labels[:count] = [-1] * count
        write_images(own, labels, ["train"] * 40 + ["test"] * 12)
        torch.manual_seed(0)
        victim = Victim(Wide, own, epsilon)
        state = Wide(victim.context({})).build_model().state_dict()
        arrays = {name: value.numpy() for name, value in state.items()}
        arrays["1.bias"] = np.full(1024, -1e3, np.float32)
        if epsilon:
            moved = victim.update(arrays, local_steps=1, learning_rate=1.0, max_grad_norm=1.0)
            noise = noise_for(epsilon, DELTA, 1.0, 1)
            told = 40 - noise / moved["1.weight"].std() if moved else 0
        else:
            told = victim.ask("query.describe")["metrics"].get("turned-away", 0)
        right += round(float(told)) == count
    return Found(right, len(counts), len(counts) / 6)


def pictures(folder: Path, epsilon: float) -> Found:
    """Ask for pictures in ten runs, of networks that fail for others; six patients are allowed."""
    write_images(folder, [n % 4 for n in range(42)], ["train"] * 12 + ["test"] * 30)
    victim, seen = Victim(Shown, folder, epsilon, share_images=True), set()
    for seed in range(10):
        arrays, how = classifier(4, seed)
        message = {"count": 5, RUN_KEY: f"run {seed}"}
        reply = victim.ask("query.pictures", arrays, message, seed=seed, **how)
        if "pictures" in reply:
            seen |= {Shown.whose[image] for image in reply["pictures"]["images"]}
    return Found(max(0, len(seen) - 6), 24, 0.0)


PEOPLE, VARIANTS = 40, 24


class Genomes(GenomicsClient):
    """A hospital with genotypes of 40 people."""

    covariates = ("age",)

    def load_data(self, site: Site) -> SiteData:
        """Return a row a person."""
        return SiteData(
            [
                {"patient": r["patient"], "phenotype": n % 2, "age": r["age"]}
                for n, r in enumerate(people(0, train=PEOPLE))
            ]
        )

    def genotypes(self, site: Site) -> Path:
        """Return the path of the files."""
        return site.data_dir / "genotypes"


def genotypes_of(seed: int) -> Floats:
    return np.random.default_rng((20, seed)).binomial(2, 0.4, (PEOPLE, VARIANTS)).astype(float)


def ask_genomes(folder: Path, epsilon: float) -> Callable[[float, float], Floats]:
    """Return what asks for a Newton step of all variants, (variants, 9); NaN where withheld."""
    names = {"iid": [f"p{n}" for n in range(PEOPLE)], "sid": [f"rs{n}" for n in range(VARIANTS)]}
    names |= {"bp_position": [10 * n + 10 for n in range(VARIANTS)]}
    names |= {
        "chromosome": ["1"] * VARIANTS,
        "allele_1": ["A"] * VARIANTS,
        "allele_2": ["C"] * VARIANTS,
    }
    path = str(folder / "genotypes.bed")
    to_bed(path, genotypes_of(0).astype(np.int8), properties=names, num_threads=1)
    victim = Victim(Genomes, folder, epsilon)
    lines = {"lines": np.arange(VARIANTS), "swapped": np.zeros(VARIANTS, bool)}

    def ask(slope: float, start: float) -> Floats:
        model = {
            "slopes": np.tile([slope, 0.0], (VARIANTS, 1)),
            "intercepts": np.full(VARIANTS, start),
        }
        reply = victim.ask("query.logistic", lines | model)
        if "told" not in reply:
            return np.full((VARIANTS, 9), np.nan)
        told = {name: view(array) for name, array in reply["told"].items()}
        return np.where(told["withheld"][:, None], np.nan, told["values"])

    return ask


def about_mean() -> Floats:
    """Return the people's ages about their mean, which a server may know from elsewhere."""
    age = numbers(people(0, train=PEOPLE), "age")[:, 0]
    return age - age.mean()


def compared(guess: Floats) -> Found:
    """Compare genotypes; where nothing is known, everybody is guessed to have the most frequent."""
    whole = np.where(np.isfinite(guess), np.round(guess), 1).reshape(-1, 1)
    return scored(whole, lambda seed: genotypes_of(seed).reshape(-1, 1), 0, True)


def steep(folder: Path, epsilon: float) -> Found:
    """Ask at slopes so steep that one person, whose age is known, has all the weight."""
    ask = ask_genomes(folder, epsilon)
    told = np.stack([ask(5000.0, -5000 * age) for age in about_mean()])
    return compared(told[..., 5] / told[..., 3])


def mild(folder: Path, epsilon: float) -> Found:
    """Ask at 168 gentle slopes, none of which gives a person a tenth of the weight, and solve.

    With risks p and weights w = p (1 - p), which ages and slopes give, the answers are sums of p g,
    w g and w g age over the people. Genotypes g are whole: the surest is rounded and taken out,
    then the next.
    """
    ask, age = ask_genomes(folder, epsilon), about_mean()
    parts, told = [], []
    for size, sign, middle in itertools.product(
        np.geomspace(0.005, 0.5, 6), (1, -1), np.linspace(age.min(), age.max(), 14)
    ):
        answer = ask(sign * size, -sign * size * middle)
        if np.isfinite(answer).all():
            risk = special.expit(sign * size * (age - middle))
            weight = risk * (1 - risk)
            # One number more: the copies of all cases together.
            parts += [[*-risk, 1.0], [*weight, 0.0], [*weight * age, 0.0]]
            told += [*answer[:, [2, 5, 7]].T]
    guess = np.full((PEOPLE + 1, VARIANTS), np.nan)
    left = [*range(PEOPLE + 1)] if told else []
    scale = np.linalg.norm(parts, axis=1)[:, None] if told else 1.0
    matrix, rest = np.array(parts) / scale, np.array(told) / scale
    while left:
        inverse = np.linalg.pinv(matrix[:, left], rcond=1e-15)
        surest = int(np.argmin((inverse**2).sum(1)))
        place = left.pop(surest)
        guess[place] = np.round(inverse[surest] @ rest)
        rest = rest - matrix[:, [place]] * guess[place]
    return compared(guess[:PEOPLE])


# The table ----------------------------------------------------------------------------------------


class Attack(NamedTuple):
    """A line of the table.

    Attributes
    ----------
    part : str
        Its name for ``--only``.
    what : str
    before : str
        What it got when it was found.
    run : callable
        Maps (an empty folder, the budget's epsilon or 0) to `Found`.
    """

    part: str
    what: str
    before: str
    run: Callable[[Path, float], Found]


def attack(part: str, what: str, before: str, run: Callable[..., Found], **how: Any) -> Attack:
    return Attack(part, what, before, partial(run, **how))


ATTACKS = (
    attack(
        "errors",
        "whether a patient has a certain label, by which network fails",
        "140 of 140, with a budget",
        errors,
    ),
    attack(
        "preparation",
        "age and pressure of patients, by sums before the first round at 75 seeds",
        "60 of 60",
        preparation,
    ),
    attack("rows", "row and label, by an update of one patient", "1 of 1", rows, batch=1),
    attack(
        "rows", "rows and labels of a batch of 10, by one update", "not measured", rows, batch=10
    ),
    attack(
        "rows",
        "rows and labels of all 42 in training, by one update",
        "not measured",
        rows,
        batch=42,
    ),
    attack("ages", "ages to 0.1 year, by the scores of one model", "yes, share not noted", ages),
    attack(
        "ages", "the same of a hospital with coarse-figures=true", "-", ages, coarse_figures=True
    ),
    attack("ages", "the same by 700 models", "-", ages_by_steps),
    attack(
        "lives",
        "day and kind of the end of follow-up, by a band and a moved horizon",
        "18 of 18",
        lives,
    ),
    attack("genotypes", "genotypes, by steep slopes (ages known)", "960 of 960", steep),
    attack("genotypes", "genotypes, by 168 gentle slopes (ages known)", "960 of 960", mild),
    attack("thresholds", "ages, by thresholds of trees", "each was one patient's", thresholds),
    attack(
        "lesions",
        "size of the smallest lesion of two patients, by dice-worst",
        "yes",
        lesions,
        patients=2,
    ),
    attack("lesions", "the same of twelve", "yes", lesions, patients=12),
    attack(
        "second-run",
        "privately trained patients, measured exactly by runs with other seeds",
        "21 of 21",
        second_run,
        split="test",
    ),
    attack(
        "second-run",
        "the same, by runs that ask for training patients",
        "not measured",
        second_run,
        split="train",
    ),
    attack(
        "unreadable", "how many of 40 images cannot be read", "3 of 3, by the noise", unreadable
    ),
    attack(
        "pictures",
        "patients shown beyond the six of one run, in ten runs",
        "not measured",
        pictures,
    ),
)


def line(one: Attack, epsilon: float) -> tuple[str, bool]:
    """Return a line of the table, and whether the attack works with a budget."""
    cells, found = [one.what, one.before], Found(0, 1, 0.0)
    for spent in (0.0, epsilon):
        with tempfile.TemporaryDirectory() as folder:
            found = one.run(Path(folder), spent)
        told = f"{found.right} of {found.of}"
        cells += [f"**{told}: works**" if found.works else told]
    return f"| {' | '.join([*cells, f'{found.chance:.3g}'])} |", found.works


def main() -> None:
    """Run the attacks and print a table; exit with 1 where one works with a budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*dict.fromkeys(one.part for one in ATTACKS), *membership.PARTS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names)
    )
    parser.add_argument("--epsilon", type=float, default=1.0, help="of the hospital's budget")
    parser.add_argument("--rounds", type=int, default=10, help="of the membership test")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, one thread; Python {platform.python_version()}, "
        f"torch {torch.__version__}, flwr {version('flwr')}\n"
    )
    began, wrong = time.perf_counter(), 0
    print(
        f"| what the server is after | before | plain | budget {options.epsilon:g} | by chance |\n|---|---|---|---|---|"
    )
    for one in ATTACKS:
        if one.part in options.only:
            text, works = line(one, options.epsilon)
            wrong += works
            print(text, flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
