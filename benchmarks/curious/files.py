"""Attacks on hospitals with images and genotypes: each maps a folder and epsilon to `Found`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from bed_reader import to_bed
from curious.tables import numbers, people
from curious.victim import DELTA, Arrays, Floats, Found, Victim, scored
from PIL import Image
from scipy import special
from torch import nn

from fedmed_flower import (
    ClassificationClient,
    GenomicsClient,
    SegmentationClient,
    Site,
    SiteData,
)
from fedmed_flower.arrays.views import view
from fedmed_flower.data.datalist import load_folder
from fedmed_flower.data.pictures import Picture
from fedmed_flower.models.networks import build_network
from fedmed_flower.privacy.accounting import noise_for
from fedmed_flower.settings.model import ModelSettings
from fedmed_flower.wire import RUN_KEY


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


def lesions(folder: Path, epsilon: float, patients: int, **node: Any) -> Found:
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
        dice = Victim(Masks, own, epsilon, **node).figures(sent).get("dice-worst", 0.0)
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
            how = {"local_steps": 1, "learning_rate": 1.0, "max_grad_norm": 1.0}
            after = victim.trained(arrays, **how)
            noise = noise_for(epsilon, DELTA, 1.0, 1)
            sums = 40 - noise / (after["1.weight"] - arrays["1.weight"]).std() if after else 0
        else:
            sums = victim.ask("query.describe")["metrics"].get("rejected", 0)
        right += round(float(sums)) == count
    return Found(right, len(counts), len(counts) / 6)


def pictures(folder: Path, epsilon: float) -> Found:
    """Ask for pictures in ten runs, of networks that fail for others; six patients are allowed."""
    write_images(folder, [n % 4 for n in range(42)], ["train"] * 12 + ["test"] * 30)
    victim, seen = Victim(Shown, folder, epsilon, share_images=True), set()
    for seed in range(10):
        arrays, how = classifier(4, seed)
        message = {"count": 1000, RUN_KEY: f"run {seed}"}
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
        if "sums" not in reply:
            return np.full((VARIANTS, 9), np.nan)
        sums = {name: view(array) for name, array in reply["sums"].items()}
        return np.where(sums["withheld"][:, None], np.nan, sums["values"])

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
    sums = np.stack([ask(5000.0, -5000 * age) for age in about_mean()])
    return compared(sums[..., 5] / sums[..., 3])


def mild(folder: Path, epsilon: float) -> Found:
    """Ask at 168 gentle slopes, none of which gives a person a tenth of the weight, and solve.

    With risks p and weights w = p (1 - p), which ages and slopes give, the answers are sums of p g,
    w g and w g age over the people. Genotypes g are whole: the surest is rounded and taken out,
    then the next.
    """
    ask, age = ask_genomes(folder, epsilon), about_mean()
    parts, sums = [], []
    for size, sign, middle in itertools.product(
        np.geomspace(0.005, 0.5, 6), (1, -1), np.linspace(age.min(), age.max(), 14)
    ):
        answer = ask(sign * size, -sign * size * middle)
        if np.isfinite(answer).all():
            risk = special.expit(sign * size * (age - middle))
            weight = risk * (1 - risk)
            # One number more: the copies of all cases together.
            parts += [[*-risk, 1.0], [*weight, 0.0], [*weight * age, 0.0]]
            sums += [*answer[:, [2, 5, 7]].T]
    guess = np.full((PEOPLE + 1, VARIANTS), np.nan)
    left = [*range(PEOPLE + 1)] if sums else []
    scale = np.linalg.norm(parts, axis=1)[:, None] if sums else 1.0
    matrix, rest = np.array(parts) / scale, np.array(sums) / scale
    while left:
        inverse = np.linalg.pinv(matrix[:, left], rcond=1e-15)
        surest = int(np.argmin((inverse**2).sum(1)))
        place = left.pop(surest)
        guess[place] = np.round(inverse[surest] @ rest)
        rest = rest - matrix[:, [place]] * guess[place]
    return compared(guess[:PEOPLE])
