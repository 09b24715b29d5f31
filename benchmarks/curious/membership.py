"""Who was trained on, told from a model: a membership test, and an audit by canaries.

`test`: a hospital with 200 chest X-rays (PneumoniaMNIST, or generated ones where that cannot be
had) trains the CNN of `private_pneumonia`, asked by messages. Who has the final model is given
these images and 200 others of the same source, and ranks the 400 by how likely each was trained on:

- by the loss alone: S. Yeom et al., "Privacy Risk in Machine Learning", CSF 2018,
  https://arxiv.org/abs/1709.01604;
- by the ratio of likelihoods: N. Carlini et al., "Membership Inference Attacks From First
  Principles", S&P 2022, https://arxiv.org/abs/2112.03570, algorithm 1, with one variance for all
  images that were trained on and one for all others. Its shadow models come from random halves of
  the 400, in the same way. Each model is the one under attack in turn, and the others its shadows.

An area under the ROC curve of one half is a guess.

`audit`: a hospital with chest X-rays and canaries, of which a fair coin lets about half in, is
asked for one update of eight steps; which epsilon the weights refute that come back is worked out
as in `privacy_audit`. Without noise that is as much as so many canaries can refute.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
import numpy as np
import torch
from curious.victim import DELTA, Floats, Victim
from numpy.typing import ArrayLike, NDArray
from privacy_audit import BRIGHTNESS, CONFIDENCE, SIDE, XRAYS, bound_of_scores
from private_pneumonia import Hospital
from sklearn.metrics import roc_auc_score
from torch import nn

from fedmed_flower import ClassificationClient, Site, SiteData
from fedmed_flower.clients.imaging import LoadRow
from fedmed_flower.data.download import SourceUnavailable
from fedmed_flower.data.phantoms import chest_xrays
from fedmed_flower.data.sources import load_medmnist

PARTS = ("membership", "canaries")
PATIENTS = 200
EPSILON = 8.0
HOW: dict[str, Any] = {"optimizer": "adam", "learning_rate": 0.003, "local_epochs": 10}
# With noise more passes make the model no better.
PRIVATELY = HOW | {"learning_rate": 0.006, "local_epochs": 4, "sampling_rate": 0.25}


class Candidates(NamedTuple):
    """400 images (400, 28, 28) with their labels, and where they come from."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    source: str


def candidates() -> Candidates:
    """Return images of PneumoniaMNIST, or generated ones where it cannot be had."""
    try:
        found = load_medmnist("pneumoniamnist")
    except SourceUnavailable:
        found = chest_xrays(2 * PATIENTS, 0, 0, seed=0)
    images, labels = found.images["train"], found.labels["train"]
    chosen = np.random.default_rng(0).permutation(len(labels))[: 2 * PATIENTS]
    return Candidates(images[chosen], labels[chosen], found.source)


class Member(Hospital):
    """The hospital of `private_pneumonia`, with the images in its folder."""

    def load_data(self, site: Site) -> SiteData:
        """Return the rows; all are for training."""
        with np.load(site.data_dir / "rows.npz") as held:
            parts = zip(held["images"], held["labels"], held["patients"], strict=True)
            rows = [{"image": i, "label": int(n), "patient": int(p)} for i, n, p in parts]
        return SiteData(rows)


def write_rows(folder: Path, *columns: ArrayLike) -> None:
    """Write images, labels and patients into a hospital's folder."""
    names = ("images", "labels", "patients")
    np.savez(folder / "rows.npz", **dict(zip(names, columns, strict=True)))


class Trained(NamedTuple):
    """A model.

    Attributes
    ----------
    inside : ndarray of bool
        (400,) which images it was trained on.
    odds : ndarray
        (400,) log odds that it gives each image's own class.
    """

    inside: NDArray[np.bool_]
    odds: Floats


def quiet() -> None:
    """Let a process work on one thread and log nothing."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)


def train(seed: int, data: Candidates, rounds: int, epsilon: float) -> Trained:
    """Let a hospital train on a random half of the candidates, and measure its model on all."""
    images, labels, _ = data
    inside = np.random.default_rng((21, seed)).permutation(2 * PATIENTS) < PATIENTS
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), images[inside], labels[inside], np.flatnonzero(inside))
        victim = Victim(Member, Path(folder), epsilon)
        how = (PRIVATELY if epsilon else HOW) | {"seed": seed, "num_server_rounds": rounds}
        torch.manual_seed(seed)
        model = Member(victim.context(how)).build_model()
        weights = {name: value.numpy() for name, value in model.state_dict().items()}
        for number in range(1, rounds + 1):
            weights = victim.trained(weights, number, **how)
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    model.eval()
    with torch.no_grad():
        outputs = model(torch.from_numpy(images).float()[:, None] / 127.5 - 1).double().numpy()
    return Trained(inside, (outputs[:, 1] - outputs[:, 0]) * (2 * labels - 1))


def likelihood_ratios(target: Trained, shadows: Sequence[Trained]) -> Floats:
    """Return (400,) how much likelier a model's odds are if it was trained on the image, as a log.

    0 for an image that all shadows were trained on, or none.
    """
    inside = np.array([shadow.inside for shadow in shadows])
    odds = np.array([shadow.odds for shadow in shadows])
    logs = []
    for group in (inside, ~inside):
        count = group.sum(0)
        mean = np.where(group, odds, 0).sum(0) / np.maximum(count, 1)
        squares = np.where(group, odds - mean, 0) ** 2
        variance = squares.sum() / (count.sum() - np.count_nonzero(count))
        logs.append(-((target.odds - mean) ** 2) / (2 * variance) - np.log(variance) / 2)
    return np.where(inside.any(0) & ~inside.all(0), logs[0] - logs[1], 0.0)


def test(options: argparse.Namespace) -> None:
    """Show how well members are told from others, plain and with a budget."""
    data = candidates()
    print(f"Membership: {data.source}; {PATIENTS} patients, {options.rounds} rounds, ", end="")
    print(f"{options.shadows} shadow models. Areas under the ROC curve.\n")
    head = ("", "right answers on others", "AUC by the loss", "AUC by the ratio", "of each model")
    documented.show("membership", head, told(data, options.rounds, options.shadows), options)


def told(data: Candidates, rounds: int, shadows: int) -> Iterator[list[str]]:
    """Yield a row without a budget, and one with it."""
    for epsilon in (0.0, EPSILON):
        job = partial(train, data=data, rounds=rounds, epsilon=epsilon)
        with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1), quiet) as pool:
            models = pool.map(job, range(shadows + 1), chunksize=1)
        right = np.mean([(one.odds[~one.inside] > 0).mean() for one in models])
        loss = np.mean([roc_auc_score(one.inside, one.odds) for one in models])
        ratio = []
        for number, one in enumerate(models):
            others = models[:number] + models[number + 1 :]
            ratio.append(roc_auc_score(one.inside, likelihood_ratios(one, others)))
        figures = (right, loss, np.mean(ratio), min(ratio), max(ratio))
        *cells, low, high = (documented.without_zero(f"{value:.3f}") for value in figures)
        yield [f"budget {epsilon:g}" if epsilon else "plain", *cells, f"{low} to {high}"]


class Canaries(ClassificationClient):
    """A hospital with images in its folder, and logistic regression."""

    num_classes = 2
    width = 0

    def build_model(self) -> nn.Module:
        """Return one weight a pixel."""
        return nn.Sequential(nn.Flatten(), nn.Linear(self.width**2, 1))

    def transforms(self, train: bool) -> list[Any]:
        """Take images as they are."""
        return [LoadRow(2)]

    load_data = Member.load_data


def refuted(canaries: int, epsilon: float) -> float:
    """Return the lower bound on epsilon that the update of a hospital with canaries refutes.

    Each canary is one bright pixel of its own, beside the X-rays of others.
    """
    width = math.ceil(math.sqrt(canaries + SIDE**2))
    frame = np.ones((width, width), bool)
    frame[:SIDE, :SIDE] = False
    pixels = np.flatnonzero(frame)[:canaries]
    taken = np.random.default_rng(22).random(canaries) < 0.5
    xrays = chest_xrays(XRAYS, 0, 0, 0, SIDE)
    images = np.zeros((XRAYS + int(taken.sum()), width, width), np.float32)
    images[:XRAYS, :SIDE, :SIDE] = xrays.images["train"] / 255
    images[XRAYS:].reshape(-1, width**2)[range(int(taken.sum())), pixels[taken]] = BRIGHTNESS
    labels = np.r_[xrays.labels["train"], np.ones(int(taken.sum()), np.int64)]
    client = type("Canaries", (Canaries,), {"width": width, "image_shape": (1, width, width)})
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), images, labels, range(len(labels)))
        victim = Victim(client, Path(folder), epsilon)
        how = {"local_steps": 8, "batch_size": len(labels), "learning_rate": 0.1}
        torch.manual_seed(0)
        model = client(victim.context(how)).build_model()
        sent = {name: value.numpy() for name, value in model.state_dict().items()}
        after = victim.trained(sent, **how)
    moved = (after["1.weight"].astype(np.float64) - sent["1.weight"])[0, pixels]
    return bound_of_scores(moved, taken, DELTA)


def audit(options: argparse.Namespace, budgets: tuple[float, ...] = (1.0, 8.0)) -> int:
    """Show what is refuted beside what is promised; return how often the promise is refuted."""
    print(f"Canaries: {options.canaries}; delta {DELTA:g}\n")
    bounds = {epsilon: refuted(options.canaries, epsilon) for epsilon in (0.0, *budgets)}
    rows = [
        [f"budget {epsilon:g}" if epsilon else "plain", f"{bound:.2f}"]
        for epsilon, bound in bounds.items()
    ]
    head = ("", f"epsilon refuted, {CONFIDENCE:.0%} confidence")
    documented.show("canaries", head, rows, options)
    return sum(bound > epsilon > 0 for epsilon, bound in bounds.items())
