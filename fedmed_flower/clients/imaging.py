"""What clients for images share: from files on a grid to batches, on MONAI's transforms."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    EnsureTyped,
    NormalizeIntensityd,
    Orientationd,
    RandomizableTrait,
    ResizeWithPadOrCropd,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
    Spacingd,
    Transform,
)
from torch import Tensor, nn

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.cache import CachedRows
from fedmed_flower.data.checks import check_row
from fedmed_flower.data.images import files_of, read_image
from fedmed_flower.data.site import Row, SiteData
from fedmed_flower.errors import InputError
from fedmed_flower.models.device import arranged, torch_device
from fedmed_flower.models.networks import build_network
from fedmed_flower.privacy.validate import require_independent
from fedmed_flower.settings.imaging import ImagingSettings

log = logging.getLogger("flwr.fedmed")

MODALITIES = ("", "ct", "mr", "xray")
_MOST_LINES = 20


class ImagingClient(MedicalClient):
    """What `ClassificationClient` and `SegmentationClient` share.

    Hooks
    -----
    build_model
        The default builds what ``network`` and ``network-args``, or ``bundle``, in the run config
        name.
    transforms
        MONAI dictionary transforms of a row. The default loads, brings to the grid of the run
        config, scales the intensity by `modality`, and ends with `random_transforms` in training.
    intensity
        How values are scaled.
    random_transforms
        MONAI's random dictionary transforms, in training. Angles are in radians.

    Attributes
    ----------
    spatial_dims : int
        2 or 3.
    num_classes : int
    image_shape : tuple of int
        (channels, *spatial) that each image has as it is read. Private training, and evaluation
        with noise, need it or ``patch-size``: a network is tried on made-up images before any
        patient's is looked at, and images of another shape add nothing. With ``patch-size`` its
        first number counts alone; where it is empty, images have one channel.
    modality : {"", "ct", "mr", "xray"}
        ``ct`` cuts values to `ct_window` and scales them to [0, 1]; ``mr`` brings what is not 0 to
        mean 0 and standard deviation 1; ``xray`` scales the 1st to 99th percentile to [0, 1]; the
        default brings the whole image to mean 0 and standard deviation 1. Channels by themselves.
    ct_window : tuple of float
        Lowest and highest Hounsfield unit that is told apart.
    label_values : sequence of int
        What stands in masks for class 0, 1, ...; empty if it is the class number.
    empty_masks : bool
        Keep images whose mask holds the background alone, such as those of healthy patients; else
        they are turned away.
    """

    spatial_dims: int = 2
    num_classes: int
    image_shape: tuple[int, ...] = ()
    modality: str = ""
    ct_window: tuple[float, float] = (-160.0, 240.0)
    label_values: Sequence[int] = ()
    empty_masks: bool = False
    # The entries of a row that are images.
    _keys: tuple[str, ...] = ("image",)

    @cached_property
    def imaging(self) -> ImagingSettings:
        """The settings of `ImagingSettings`."""
        return ImagingSettings.from_run_config(self.context.run_config)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels of a training patch, one number an axis; empty for whole images."""
        return tuple(map(int, self.imaging.numbers("patch_size", self.spatial_dims)))

    def build_model(self) -> nn.Module:
        """Return the network that the run config names."""
        return build_network(self.models)

    def transforms(self, train: bool) -> Sequence[Callable[[Any], Any]]:
        """Return the transforms of a row.

        MONAI transforms up to the first random one (or the first plain function) are done once a
        run and what they give is kept in memory.
        """
        steps = [self._load(train), *self.to_grid(self._keys), *self.intensity()]
        steps += self.to_size(train)
        return [*steps, *self.random_transforms()] if train else steps

    def to_grid(self, keys: Sequence[str]) -> list[Callable[[Any], Any]]:
        """Return the transforms that bring images, and masks, to the grid of the run config."""
        steps: list[Callable[[Any], Any]] = []
        if self.spatial_dims == 3 and self.imaging.orientation:
            steps.append(Orientationd(keys, axcodes=self.imaging.orientation, labels=None))
        if spacing := self.imaging.numbers("spacing", self.spatial_dims):
            modes = ["nearest" if key == "label" else "bilinear" for key in keys]
            steps.append(Spacingd(keys, pixdim=spacing, mode=modes))
        return steps

    def intensity(self) -> list[Callable[[Any], Any]]:
        """Return the transforms that scale the values of ``image``, by `modality`."""
        if self.modality == "ct":
            low, high = self.ct_window
            return [ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True)]
        if self.modality == "mr":
            return [NormalizeIntensityd("image", nonzero=True, channel_wise=True)]
        if self.modality == "xray":
            return [
                ScaleIntensityRangePercentilesd(
                    "image", 1, 99, 0.0, 1.0, clip=True, channel_wise=True
                )
            ]
        return [NormalizeIntensityd("image", channel_wise=True)]

    def to_size(self, train: bool) -> list[Callable[[Any], Any]]:
        """Return the transforms that bring images to ``patch-size``; here about their middle."""
        return [ResizeWithPadOrCropd(self._keys, self.patch_size)] if self.patch_size else []

    def random_transforms(self) -> list[Callable[[Any], Any]]:
        """Return MONAI's random transforms of a training row; none here."""
        return []

    def check(self, data: SiteData) -> None:
        """Raise `InputError` where a setting or an attribute is out of its range."""
        if self.modality not in MODALITIES:
            raise InputError(
                f"modality must be one of {', '.join(map(repr, MODALITIES))}, got {self.modality!r}"
            )
        if self.spatial_dims not in (2, 3):
            raise InputError(f"spatial_dims must be 2 or 3, got {self.spatial_dims!r}")
        self.imaging.numbers("spacing", self.spatial_dims)
        self.imaging.numbers("patch_size", self.spatial_dims)
        sides = self.image_shape
        whole = all(isinstance(side, int) and 0 < side < 10**6 for side in sides)
        if sides and not (whole and len(sides) == 1 + self.spatial_dims):
            raise InputError(
                f"image_shape must be (channels, *spatial), {1 + self.spatial_dims} whole numbers "
                f"above 0, got {sides!r}"
            )

    def made_up(self, count: int) -> list[Row]:
        """Return rows with images of random numbers, and each class in turn.

        Raises
        ------
        InputError
            If neither `image_shape` nor ``patch-size`` says how large an image is.
        """
        self.check(SiteData(()))
        shape = (self._channels, *(self.patch_size or self.image_shape[1:]))
        if len(shape) == 1:
            raise InputError(
                f"{type(self).__name__} must say how large its images are before one is looked at: "
                "give it image_shape = (channels, *spatial), or set patch-size"
            )
        if self.imaging.spacing and not self.patch_size:
            raise InputError(
                "spacing makes images of different shapes, which private training cannot take: set "
                "patch-size beside it"
            )
        rng = np.random.default_rng(0)
        # Each is brighter towards another end: images alike on average would hide that a loss
        # mixes them.
        ramp = np.linspace(0.1, 1.0, shape[-1])
        return [
            {
                "image": (rng.uniform(0, 256, shape) * ramp**number).astype(np.float32),
                "label": self._made_up_label(number, shape[1:], rng),
                "patient": f"made up {number}",
            }
            for number in range(count)
        ]

    def _made_up_label(self, number: int, sides: Sequence[int], rng: np.random.Generator) -> Any:
        return number % self.num_classes

    @property
    def _channels(self) -> int:
        return self.image_shape[0] if self.image_shape else 1

    def screen(self, rows: Sequence[Row], split: str) -> list[Row]:
        """Turn away rows whose files cannot be used; the log names each.

        Raises
        ------
        InputError
            If no training row is left.
        """
        kept, problems = [], []
        how = (self.spatial_dims, self.num_classes, self.label_values, self.empty_masks)
        findings = [check_row(row, *how) for row in rows]
        channels = Counter(found.shape[0] for found in findings if found.problem is None)
        usual = max(channels, key=lambda count: channels[count], default=0)
        if self.sealed:  # Others' images must not decide.
            usual = self._channels
        for row, found in zip(rows, findings, strict=True):
            problem = found.problem
            if problem is None and isinstance(found.label, tuple) != ("label" in self._keys):
                wanted = "a mask" if "label" in self._keys else "a class number"
                problem = f"its label is not {wanted}, which {type(self).__name__} asks for"
            if problem is None and found.shape[0] != usual:
                others = "declared are" if self.sealed else "most images have"
                problem = f"{found.image} has {found.shape[0]} channels, {others} {usual}"
            if problem is None:
                kept.append(row)
            else:
                problems.append(f"patient {row.get('patient')}: {problem}")
        if split == "train" and problems and not kept and not self.sealed:
            raise InputError(
                f"all {len(rows)} rows of the train split were turned away; {problems[0]}"
            )
        site = self.site.name
        for problem in problems[:_MOST_LINES]:
            log.warning("%s: turned away, %s split, %s", site, split, problem)
        if len(problems) > _MOST_LINES:
            more = len(problems) - _MOST_LINES
            log.warning("%s: and %d more of the %s split turned away", site, more, split)
        return kept

    def prepare(self, rows: Sequence[Row], train: bool) -> CachedRows:
        """Return the rows after their transforms; what never changes stays in memory."""
        steps = list(self.transforms(train))
        random = (i for i, step in enumerate(steps) if isinstance(step, RandomizableTrait))
        # What is kept is copied for each random step: a plain tensor is copied ten times faster.
        steps.insert(next(random, len(steps)), EnsureTyped(self._keys, track_meta=False))
        return self._cached(rows, [*steps, EnsureTyped(self._keys, track_meta=False)])

    def _load(self, train: bool) -> Callable[[Any], Any]:
        """Return what reads the files of a row."""
        return LoadRow(self.spatial_dims)

    def _cached(self, rows: Sequence[Row], steps: Sequence[Callable[[Any], Any]]) -> CachedRows:
        """Keep as many rows in memory as this site may, all its splits together."""
        sites = self.site.num_sites if self.site.simulated else 1
        mine = self.cache.prepared_of(self.site)
        held = sum(kept.held for kept in mine if isinstance(kept, CachedRows))
        made = CachedRows(rows, steps, self.imaging.cache_gigabytes * 2**30 / sites - held)
        if made.count < len(made):
            log.info("%s: %d of %d rows fit into the cache", self.site.name, made.count, len(made))
        return made

    def seed_transforms(self, prepared: CachedRows, seed: int) -> None:
        """Seed MONAI's random transforms."""
        prepared.transform.set_random_state(seed)

    def batch_of(self, prepared: CachedRows, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return ``image`` and ``label`` of some training rows, changed at random."""
        return self._changed(self._rows(prepared, indices))

    def _rows(self, prepared: CachedRows, indices: Sequence[int]) -> dict[str, Tensor]:
        found = [prepared[index] for index in indices]
        # MONAI's cropping transforms return lists.
        rows = [row for part in found for row in (part if isinstance(part, list) else [part])]
        if self.privacy.on and len(rows) != len(indices):
            raise InputError(
                f"the transforms make {len(rows)} samples of {len(indices)} records: private "
                "training needs one of each (num_samples=1)"
            )
        return self._on_device(rows)

    def _on_device(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        shapes = {tuple(row["image"].shape) for row in rows}
        if len(shapes) > 1:
            raise InputError(
                "images of different shapes cannot be in one batch, such as "
                f"{' and '.join(map(str, sorted(shapes)[:2]))}: set patch-size"
            )
        device = torch_device(self.settings)
        images = torch.stack([row["image"] for row in rows]).to(device)
        if device.type == "cuda" and self.settings.channels_last:
            images = arranged(images)
        return {"image": images, "label": self._labels(rows).to(device)}

    def _labels(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([int(row["label"]) for row in rows])

    def _changed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a training batch with the random changes of the subclass."""
        return dict(batch)

    def check_private(self, model: nn.Module, probe: Mapping[str, Tensor]) -> None:
        """Raise `InputError` where model, loss or ``augment`` mix patients."""
        super().check_private(model, probe)
        images, labels = probe["image"], probe["label"]
        masks = labels if labels.ndim == images.ndim else None

        def change(joined: Tensor) -> Tensor:
            channels = images.shape[1]
            parts = {"image": joined[:, :channels], "label": labels}
            if masks is not None:
                parts["label"] = joined[:, channels:].to(masks.dtype)
            found = self._changed(parts)
            return _joined(found["image"], found["label"] if masks is not None else None)

        require_independent(change, _joined(images, masks))


class LoadRow(Transform):  # type: ignore[misc]
    """Read a row's ``image`` as `read_image` does.

    2D arrays come without a place, so that what follows takes less time.

    Parameters
    ----------
    spatial_dims : int
        2 or 3. An image of so many dimensions gets one channel.

    Raises
    ------
    InputError
        If the image cannot be read, has another number of dimensions or is not finite.
    """

    def __init__(self, spatial_dims: int) -> None:
        self.spatial_dims = spatial_dims

    def __call__(self, row: Row) -> dict[str, Any]:
        """Return the row with its image loaded; an error names the patient."""
        try:
            image: Any = read_image(row["image"], self.spatial_dims)
        except InputError as error:
            raise InputError(f"image of patient {row['patient']}: {error}") from error
        if self.spatial_dims == 2 and not any(files_of(row["image"])):
            image = plain(image).numpy()
        return {**row, "image": image}


def plain(image: Tensor) -> Tensor:
    """Return the values of an image without its place."""
    return image.as_tensor() if isinstance(image, MetaTensor) else image


def _joined(images: Tensor, masks: Tensor | None) -> Tensor:
    return images if masks is None else torch.cat([images, masks.to(images.dtype)], dim=1)
