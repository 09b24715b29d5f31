"""Folders of made-up hospitals, in each of which one patient may differ, and clients for them."""

import json
import math
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fedmed_flower import (
    ClassificationClient,
    Schema,
    SegmentationClient,
    SiteData,
    SurvivalClient,
    TabularClient,
)
from fedmed_flower.data.datalist import load_folder

# A budget that many rounds do not exhaust, so that what is asked is answered.
BUDGET = {"budget-epsilon": 1e9, "budget-delta": 1e-5}


class Images(ClassificationClient):
    num_classes = 4
    image_shape = (1, 8, 8)

    def load_data(self, site):
        return load_folder(site.data_dir / "images", self.settings.seed)


class Masks(SegmentationClient):
    classes = ("lesion",)
    image_shape = (1, 16, 16)

    def build_model(self):
        return torch.nn.Conv2d(1, 2, 1)

    def load_data(self, site):
        return load_folder(site.data_dir / "masks", self.settings.seed)


class Table(TabularClient):
    schema = Schema(
        target="ill",
        task="multi-class",
        classes=("a", "b", "c"),
        numeric=("age",),
        categorical=("sex",),
        ranges={"age": (0, 100)},
        categories={"sex": ("f", "m")},
    )

    def load_data(self, site):
        rows = json.loads((site.data_dir / "rows.json").read_text())
        splits = {split: rows[split] for split in ("train", "val", "test")}
        return SiteData(**splits, lacking=("weight",))


class Lives(SurvivalClient):
    schema = Schema(
        target="days", event="died", task="survival", numeric=("age",), ranges={"age": (0, 100)}
    )
    load_data = Table.load_data


def write_images(folder, one):
    rng = np.random.default_rng(0)
    lines = ["image,label,patient,split"]
    for number in range(24):
        patient, copies = f"p{number}", 1
        label, content = str(number % 4), rng.integers(0, 255, (8, 8), np.uint8)
        if number == 7:
            if one == "absent":
                continue
            copies = 3 if one == "rows" else 1
            label = {"label": "3", "no label": "9", "odd label": "x"}.get(one, label)
            content = {"value": content[::-1], "shape": content[:4]}.get(one, content)
        name = f"{number}.png"
        Image.fromarray(np.ascontiguousarray(content)).save(folder / name)
        if number == 7 and one == "unreadable":
            (folder / name).write_bytes(b"no picture")
        split = ("train", "train", "val", "test")[number % 4] if number != 7 else "train"
        lines += [f"{name},{label},{patient},{split}"] * copies
    (folder / "datalist.csv").write_text("\n".join(lines))


def write_masks(folder, one):
    rng = np.random.default_rng(0)
    lines = ["image,label,patient,split"]
    for number in range(16):
        image, mask = rng.integers(0, 255, (16, 16), np.uint8), np.zeros((16, 16), np.uint8)
        mask[: 4 + number % 5, :5] = 1
        copies = 1
        if number == 7:
            if one == "absent":
                continue
            copies = 2 if one == "rows" else 1
            if one == "label":
                mask = 1 - mask
            if one in ("no label", "odd label"):
                mask = mask + (7 if one == "no label" else 254)
            image = {"value": image[::-1], "shape": image[:4]}.get(one, image)
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"{number}-mask.png")
        if number == 7 and one == "unreadable":
            (folder / "7.png").write_bytes(b"no picture")
        split = "train" if number < 9 else ("val", "test")[number % 2]
        lines += [f"{number}.png,{number}-mask.png,p{number},{split}"] * copies
    (folder / "datalist.csv").write_text("\n".join(lines))


def write_rows(folder, one):
    rng, parts = np.random.default_rng(0), {"train": [], "val": [], "test": []}
    for number in range(30):
        row = {"patient": f"p{number}", "age": float(rng.integers(20, 90))}
        row |= {"sex": "fm"[number % 2], "ill": number % 3, "group": "ab"[number % 2]}
        row |= {"days": float(rng.integers(1, 900)), "died": number % 2}
        copies = 1
        if number == 7:
            if one == "absent":
                continue
            copies = 3 if one == "rows" else 1
            huge = 10**400
            changed = {
                "list of one": {"age": [50.0], "sex": ["f"]},
                "list as label": {"ill": [1], "days": [9.0], "died": {}},
                "huge": {"age": huge, "ill": huge, "days": huge, "died": huge},
                "no name": {"patient": {"first": "a"}},
                "label": {"ill": 2, "died": 0},
                "no label": {"ill": 9, "died": 9},
                "odd label": {"ill": "x", "days": "x"},
                "value": {"age": 99.0, "sex": "f"},
                "shape": {"age": [1, 2], "sex": {"a": 1}},
                "unreadable": {"age": "old", "sex": 3.5, "group": math.nan},
            }
            row = None if one == "no row" else row | changed.get(one, {})
        split = "train" if number < 12 else ("val", "test")[number % 2]
        parts[split] += [row] * copies
    (folder / "rows.json").write_text(json.dumps(parts))


DIFFERENCES = ("label", "no label", "odd label", "value", "shape", "unreadable", "rows", "absent")
# Of tables alone.
DIFFERENCES += ("list of one", "list as label", "huge", "no name", "no row")
CLIENTS = (Images, Masks, Table, Lives)


@contextmanager
def hospital(one):
    """Write a hospital's folder, in which patient p7 differs, and give its node config."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("images", "masks", "out"):
            (folder / part).mkdir()
        write_images(folder / "images", one)
        write_masks(folder / "masks", one)
        write_rows(folder, one)
        node = {"site-name": "north", "data-dir": name, "output-dir": str(folder / "out")}
        yield node | {"share-images": True} | BUDGET
