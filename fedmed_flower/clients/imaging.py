"""Clients for images, on MONAI's transforms, datasets and networks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, PILReader, get_track_meta, set_track_meta
from monai.transforms import (
    Compose,
    EnsureTyped,
    LoadImage,
    NormalizeIntensityd,
    RandomizableTrait,
    Transform,
)
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.training import predict, probe_places, train_epochs
from fedmed_flower.data.site import SPLITS, Row, SiteData
from fedmed_flower.errors import InputError
from fedmed_flower.metrics import (
    NOISED,
    classification_metrics,
    noised_counts,
    noised_metrics,
)
from fedmed_flower.privacy.validate import require_independent


class ClassificationClient(MedicalClient):
    """Trains a network that tells classes of images apart.

    A subclass gives `num_classes`, `build_model` and `load_data`. The network has `num_classes`
    outputs (cross entropy), or one output for two classes (binary cross entropy). Rows are dicts:

    - ``image``: an array of shape (*spatial) or (channels, *spatial), or a path that MONAI reads;
    - ``label``: an integer from 0 to ``num_classes - 1``; for two classes, 1 is the finding;
    - ``patient``: anything hashable.

    Hooks
    -----
    transforms
        MONAI dictionary transforms for ``image``. The default loads, brings the channel first and
        scales each image to mean 0 and standard deviation 1.
    augment
        Random changes of a training batch. The default makes none.
    loss
        Maps (outputs, labels) to a number.

    Attributes
    ----------
    num_classes : int
    spatial_dims : int
        2 or 3.
    """

    num_classes: int
    spatial_dims: int = 2

    def transforms(self, train: bool) -> Sequence[Callable[[Any], Any]]:
        """Return the transforms of a row.

        MONAI transforms up to the first random one (or the first plain function) are done once a
        run and what they give is kept in memory.
        """
        return [
            LoadRow(self.spatial_dims),
            NormalizeIntensityd("image", channel_wise=True),
        ]

    def augment(self, images: Tensor) -> Tensor:
        """Return a training batch with random changes; torch's generator is seeded beforehand.

        Parameters
        ----------
        images : Tensor
            (batch, channels, *spatial), on the device. What is done to a whole batch here takes a
            fraction of the time that MONAI's random transforms take, one image after the other.
        """
        return images

    def loss(self) -> nn.Module:
        """Return the training loss: cross entropy, or its binary form for one output."""
        return _CrossEntropy()

    def check(self, data: SiteData) -> None:
        """Raise `InputError` where a label is not an integer in range or an image is missing."""
        for split in SPLITS:
            for number, row in enumerate(getattr(data, split)):
                where = f"row {number} of the {split} split of {self.site.name}"
                if missing := {"image", "label"} - set(row):
                    raise InputError(f"{where} has no {min(missing)}")
                label = row["label"]
                label = label.item() if isinstance(label, np.generic) else label
                whole = isinstance(label, int) and not isinstance(label, bool)
                if not whole or not 0 <= label < self.num_classes:
                    raise InputError(
                        f"label {label!r} of {where} is out of range: labels must be integers from "
                        f"0 to {self.num_classes - 1} (num_classes - 1)"
                    )

    def describe(self, data: SiteData) -> dict[str, Any]:
        """Return the number of training rows of each class."""
        labels = [int(row["label"]) for row in data.train]
        return {"labels": np.bincount(labels, minlength=self.num_classes).tolist()}

    def prepare(self, rows: Sequence[Row], train: bool) -> CacheDataset:
        """Return a dataset that keeps the rows in memory after the transforms that never change."""
        steps = list(self.transforms(train))
        random = (i for i, step in enumerate(steps) if isinstance(step, RandomizableTrait))
        # What is kept is copied for each random step: a plain tensor is copied ten times faster.
        steps.insert(next(random, len(steps)), EnsureTyped("image", track_meta=False))
        chain = Compose([*steps, EnsureTyped("image", track_meta=False)])
        return CacheDataset(list(rows), chain, progress=False, num_workers=0)

    def fit(self, model: nn.Module, prepared: CacheDataset, seed: int) -> dict[str, Any]:
        """Train for ``local-epochs`` and return the mean ``loss`` of the last of them."""
        settings, device = self.settings, self.settings.torch_device()
        size = settings.batch_size
        self.seed_transforms(prepared, seed)
        batches = DataLoader(
            prepared,
            size,
            shuffle=True,
            # One row alone has no variance, which batch normalisation needs.
            drop_last=len(prepared) > size and len(prepared) % size == 1,
            collate_fn=_collate,
            generator=torch.Generator().manual_seed(seed),
        )
        with _plain_tensors():
            mean = train_epochs(
                model,
                batches,
                self.loss(),
                settings.make_optimizer(model),
                settings.local_epochs,
                device,
                settings.mixed_precision and device.type == "cuda",
                self.augment,
                self.proximal_mu,
            )
        return {"loss": mean}

    def seed_transforms(self, prepared: CacheDataset, seed: int) -> None:
        """Seed MONAI's random transforms."""
        prepared.transform.set_random_state(seed)

    def batch_of(self, prepared: CacheDataset, places: Sequence[int]) -> dict[str, Tensor]:
        """Return ``image``, augmented, and ``label`` of some training rows."""
        device = self.settings.torch_device()
        with _plain_tensors():
            batch = _collate([prepared[place] for place in places])
        images = self.augment(batch["image"].to(device))
        return {"image": images, "label": batch["label"].to(device)}

    def loss_of(self, model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the training loss."""
        value: Tensor = self._loss(model(batch["image"]), batch["label"])
        return value

    def check_private(self, model: nn.Module, prepared: CacheDataset) -> None:
        """Raise `InputError` where model, loss or `augment` mix patients."""
        super().check_private(model, prepared)
        with _plain_tensors():
            rows = _collate([prepared[place] for place in probe_places(len(prepared))])
        if len(prepared) > 1:
            require_independent(self.augment, rows["image"].to(self.settings.torch_device()))

    @cached_property
    def _loss(self) -> nn.Module:
        return self.loss()

    def measure(self, model: nn.Module, prepared: CacheDataset) -> dict[str, Any]:
        """Return ``loss`` and the figures and counts of `classification_metrics`."""
        outputs, labels = self._predict(model, prepared, max(self.settings.batch_size, 64))
        loss = self.loss()(torch.from_numpy(outputs), torch.from_numpy(labels))
        return classification_metrics(labels, outputs) | {"loss": float(loss)}

    def measure_privately(
        self, model: nn.Module, prepared: CacheDataset, patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        """Return what follows from `noised_counts`, and those counts; no loss.

        Each record goes through the model by itself, so that none can change another's score.
        """
        outputs, labels = self._predict(model, prepared, 1)
        counts = noised_counts(labels, outputs, patients, noise)
        return noised_metrics(counts) | {NOISED: counts}

    def _predict(
        self, model: nn.Module, prepared: CacheDataset, batch_size: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        settings, device = self.settings, self.settings.torch_device()
        batches = DataLoader(prepared, batch_size, collate_fn=_collate)
        with _plain_tensors():
            return predict(
                model, batches, device, settings.mixed_precision and device.type == "cuda"
            )


class LoadRow(Transform):  # type: ignore[misc]
    """Bring a row's ``image`` to a float32 array of shape (channels, *spatial).

    Parameters
    ----------
    spatial_dims : int
        2 or 3. An image of so many dimensions gets one channel.

    Raises
    ------
    InputError
        Where the image cannot be read, has another number of dimensions or is not finite.
    """

    def __init__(self, spatial_dims: int) -> None:
        self.spatial_dims = spatial_dims

    def __call__(self, row: Row) -> dict[str, Any]:
        """Return the row with its image loaded; an error names the patient."""
        try:
            return {**row, "image": self._load(row["image"])}
        except InputError as error:
            raise InputError(f"image of patient {row['patient']}: {error}") from error

    def _load(self, image: Any) -> NDArray[np.float32]:
        if isinstance(image, str | Path):
            if not Path(image).exists():
                raise InputError(f"{image} is not there")
            try:
                image = _read(str(image)).numpy()
            except Exception as error:  # MONAI's readers fail in a dozen ways.
                cause = error.__cause__ or error
                raise InputError(f"{image} cannot be read: {cause}") from error
        array = np.array(image, dtype=np.float32)
        if array.ndim == self.spatial_dims:
            array = array[None]
        if array.ndim != self.spatial_dims + 1:
            raise InputError(
                f"its shape is {array.shape}; spatial_dims = {self.spatial_dims} asks for "
                f"{self.spatial_dims} dimensions, or one more with the channel first"
            )
        if not np.isfinite(array).all():
            raise InputError("it holds NaN or infinite values")
        return array


def _read(path: str) -> Any:
    """Read a file; pictures come as (rows, columns), as arrays do, and not transposed."""
    pictures = PILReader(reverse_indexing=False)
    return LoadImage(pictures, image_only=True, ensure_channel_first=True)(path)


class _CrossEntropy(nn.Module):
    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch."""
        if outputs.shape[1] == 1:
            return nn.functional.binary_cross_entropy_with_logits(
                outputs[:, 0], labels.to(outputs.dtype)
            )
        return nn.functional.cross_entropy(outputs, labels)


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Let MONAI's transforms return torch tensors: tracking where each came from takes longer."""
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


def _collate(rows: list[Row]) -> dict[str, Tensor]:
    return {
        "image": torch.stack([row["image"] for row in rows]),
        "label": torch.tensor([int(row["label"]) for row in rows]),
    }
