"""The common part of clients for images: from files to batches, by MONAI's transforms."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

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
from fedmed_flower.clients.cache import CachedRows, Chain
from fedmed_flower.clients.image_store import open_store
from fedmed_flower.clients.kept_images import KeptImages
from fedmed_flower.clients.resizing import FitIntod
from fedmed_flower.clients.row_source import RowSource
from fedmed_flower.data.checks import Finding, check_row, shared_images
from fedmed_flower.data.site import SPLITS, Row, SiteData, all_rows
from fedmed_flower.errors import InputError, shown
from fedmed_flower.images.reading import files_of, read_image, reading_once
from fedmed_flower.images.volumes import frames_of
from fedmed_flower.models.device import arranged, torch_device
from fedmed_flower.models.networks import build_network
from fedmed_flower.privacy.validate import require_independent
from fedmed_flower.settings.imaging import ImagingSettings
from fedmed_flower.settings.registry import Sections

log = logging.getLogger("flwr.fedmed")

MODALITIES = ("", "ct", "mr", "xray")
_MOST_LINES = 20
# If a larger share of the rows is wrong in one way, and as many, more is wrong than these rows.
_MOST_WRONG = 0.05
_FEWEST_WRONG = 3


class ImagingClient(MedicalClient):
    """The base of `WholeImageClient` and `SegmentationClient`.

    Hooks
    -----
    build_model
        The default builds the network that the run config names by ``network`` and
        ``network-args``, or by ``bundle``.
    transforms
        MONAI dictionary transforms of a row. The default loads the images, resamples them to the
        grid of the run config, scales their intensity by `modality`, and ends with
        `random_transforms` in training.
    intensity
        The transforms that scale the values.
    random_transforms
        MONAI's random dictionary transforms for training. Angles are in radians.

    Attributes
    ----------
    spatial_dims : int
        2 or 3.
    num_classes : int
    image_shape : tuple of int
        Shape (channels, *spatial) of each image as it is read. Private training, and evaluation
        with noise, need it, ``image-size`` or ``patch-size``: they try the network on made-up
        images before any patient's image is read, and images of another shape add nothing. If one
        of the two settings is set, only the number of channels is used. If `image_shape` is empty,
        images have one channel.
        The volumes of a 4D file whose row does not say what they are count as channels if there are
        as many, and more than one.
    modality : {"", "ct", "mr", "xray"}
        How each channel is scaled. ``ct`` clips values to `ct_window` and scales them to [0, 1].
        ``mr`` brings values other than 0 to mean 0 and standard deviation 1. ``xray`` scales the
        1st to 99th percentile to [0, 1]. The default brings the whole image to mean 0 and standard
        deviation 1.
    ct_window : tuple of float
        Lowest and highest value, in Hounsfield units, to which images are clipped.
    label_values : sequence of int
        The values of masks for class 0, 1, ...; empty if masks hold class numbers.
    empty_masks : bool
        Keep images whose mask holds only the background, such as those of healthy patients. If
        False, they are rejected.
    """

    sections: ClassVar[Sections] = (ImagingSettings,)
    spatial_dims: int = 2
    num_classes: int
    image_shape: tuple[int, ...] = ()
    modality: str = ""
    ct_window: tuple[float, float] = (-160.0, 240.0)
    label_values: Sequence[int] = ()
    empty_masks: bool = False
    # The entries of a row that are images.
    _keys: tuple[str, ...] = ("image",)
    # What labels are that are coded otherwise, and what to do about them.
    _mislabelled: ClassVar[str] = "no class"
    _remedy: ClassVar[str] = "number the classes from 0, or declare more of them"

    @cached_property
    def imaging(self) -> ImagingSettings:
        """The imaging settings of the run config."""
        return ImagingSettings.from_run_config(self.context.run_config)

    @property
    def image_size(self) -> tuple[int, ...]:
        """Voxels into which each image is fitted, one number for each axis; empty for none."""
        return tuple(map(int, self.imaging.numbers("image_size", self.spatial_dims)))

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels of a training patch, one number for each axis; empty for whole images."""
        return tuple(map(int, self.imaging.numbers("patch_size", self.spatial_dims)))

    def build_model(self) -> nn.Module:
        """Return the network that the run config names."""
        return build_network(self.models)

    def transforms(self, train: bool) -> Sequence[Callable[[Any], Any]]:
        """Return the transforms of a row.

        The MONAI transforms before the first random one, or the first plain function, run once in
        a run; their results stay in memory.
        """
        steps = [self._load(train), *self.to_grid(self._keys), *self.intensity()]
        steps += self.to_size(train)
        return [*steps, *self.random_transforms()] if train else steps

    def to_grid(self, keys: Sequence[str]) -> list[Callable[[Any], Any]]:
        """Return the transforms that bring images, and masks, to the grid of the run config.

        The last of them fits images into ``image-size``.
        """
        steps: list[Callable[[Any], Any]] = []
        if self.spatial_dims == 3 and self.imaging.orientation:
            steps.append(Orientationd(keys, axcodes=self.imaging.orientation, labels=None))
        if spacing := self.imaging.numbers("spacing", self.spatial_dims):
            modes = ["nearest" if key == "label" else "bilinear" for key in keys]
            steps.append(Spacingd(keys, pixdim=spacing, mode=modes))
        if self.image_size:
            steps.append(FitIntod(keys, self.image_size))
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
        """Return the transforms that crop or pad images to ``patch-size``, here from the middle.

        Without one, images that were fitted into ``image-size`` are padded to it.
        """
        size = self.patch_size or self.image_size
        return [ResizeWithPadOrCropd(self._keys, size)] if size else []

    def random_transforms(self) -> list[Callable[[Any], Any]]:
        """Return MONAI's random transforms of a training row; the default has none."""
        return []

    def check(self, data: SiteData) -> None:
        """Raise `InputError` if a setting or an attribute is out of its range."""
        if self.modality not in MODALITIES:
            raise InputError(
                f"modality must be one of {', '.join(map(repr, MODALITIES))}, got {self.modality!r}"
            )
        if self.spatial_dims not in (2, 3):
            raise InputError(f"spatial_dims must be 2 or 3, got {self.spatial_dims!r}")
        self.imaging.numbers("spacing", self.spatial_dims)
        self.imaging.numbers("image_size", self.spatial_dims)
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
            If none of `image_shape`, ``image-size`` and ``patch-size`` is set, or ``spacing`` is
            set without ``patch-size``.
        """
        self.check(SiteData(()))
        sides = self.patch_size or self.image_size or self.image_shape[1:]
        shape = (self._channels, *sides)
        if len(shape) == 1:
            raise InputError(
                f"{type(self).__name__} must declare the size of its images before a patient's "
                "image is read: give it image_shape = (channels, *spatial), or set image-size or "
                "patch-size"
            )
        if self.imaging.spacing and not self.patch_size:
            raise InputError(
                "spacing makes images of different shapes, which private training cannot use: set "
                "patch-size as well"
            )
        rng = np.random.default_rng(0)
        # Images with the same average would hide that a loss mixes them: brightness rises along
        # the last axis, more steeply in each further image.
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

    @property
    def found(self) -> dict[int, Finding]:
        """What was found in each row that was screened, by the row's `id`; kept during the run."""
        found: dict[int, Finding] = self.cache.more.setdefault(self.key("found"), {})
        return found

    def screened(self, split: str, pooled: bool = False) -> Sequence[Row]:
        """Return the rows of a split that can be used.

        A row is left out if its image is, value for value, one that another patient has in an
        earlier split: figures of a test would count an image that was trained on. A `sealed` client
        does not look, since other patients would decide about one.

        Raises
        ------
        InputError
            As `screen`; if three rows or more, and more than one in twenty, are such copies: then
            patients have several names.
        """
        key = self.key(pooled, split)
        if pooled or self.sealed or key in self.cache.screened:
            return super().screened(split, pooled)
        earlier = [row for name in SPLITS[: SPLITS.index(split)] for row in self.screened(name)]
        rows = super().screened(split)
        try:
            self.cache.screened[key] = self._without_copies(rows, split, earlier)
        except InputError:
            # Else the next message would be answered with these rows.
            del self.cache.screened[key]
            raise
        return self.cache.screened[key]

    def _without_copies(
        self, rows: Sequence[Row], split: str, earlier: Sequence[Row]
    ) -> Sequence[Row]:
        """Return the rows of a split without images of other patients in earlier ones."""
        # A subclass may screen in its own way, by which nothing is found.
        found = self.found
        before = [("earlier", found[id(row)]) for row in earlier if id(row) in found]
        own = [(split, found[id(row)]) for row in rows if id(row) in found]
        for shared in shared_images(own):
            log.warning("%s: %s split, %s", self.site.name, split, shared)
        owners = {
            shared.digest: shared.findings[0]
            for shared in shared_images([*before, *own])
            if len(shared.splits) > 1
        }
        copies = [row for row in rows if id(row) in found and found[id(row)].digest in owners]
        problems = []
        for row in copies:
            finding = found[id(row)]
            owner = owners[finding.digest]
            problem = (
                f"{finding.image} is the image {owner.image} of patient {owner.patient} in an "
                "earlier split, value for value"
            )
            found[id(row)] = replace(finding, problem=shown(problem))
            problems.append(f"patient {finding.patient}: {problem}")
        if _too_many(len(copies), len(rows)):
            raise InputError(
                f"{len(copies)} of {len(rows)} rows of the {split} split have images of patients "
                f"in an earlier split, such as {problems[0]}; give each patient one name in all "
                "rows"
            )
        self._log_rejected(problems, split)
        left_out = {id(row) for row in copies}
        return [row for row in rows if id(row) not in left_out] if copies else rows

    def _log_rejected(self, problems: Sequence[str], split: str) -> None:
        site = self.site.name
        for problem in problems[:_MOST_LINES]:
            log.warning("%s: rejected, %s split, %s", site, split, problem)
        if len(problems) > _MOST_LINES:
            more = len(problems) - _MOST_LINES
            log.warning("%s: and %d more of the %s split rejected", site, more, split)

    def screen(self, rows: Sequence[Row], split: str) -> list[Row]:
        """Return the rows whose files can be used; the log names the others.

        Raises
        ------
        InputError
            If no training row is left, or three labels or more, and more than one in twenty, are
            no class: then labels are coded otherwise, and to leave out the rows would select
            patients.
        """
        checks = self._findings(rows, train=split == "train")
        self.found.update(zip(map(id, rows), checks, strict=True))
        if not self.sealed:
            _require_labels(checks, split, self._mislabelled, self._remedy)
        channels = Counter(check.shape[0] for check in checks if check.problem is None)
        usual = max(channels, key=lambda count: channels[count], default=0)
        if self.sealed:  # Other patients' images must not decide about this one.
            usual = self._channels
        usable = []
        problems = []
        for row, check in zip(rows, checks, strict=True):
            problem = self._problem(check, usual)
            self.found[id(row)] = replace(check, problem=problem)
            if problem is None:
                usable.append(row)
            else:
                problems.append(f"patient {row.get('patient')}: {problem}")
        if split == "train" and problems and not usable and not self.sealed:
            raise InputError(
                f"all {len(rows)} rows of the train split were rejected; {problems[0]}"
            )
        self._log_rejected(problems, split)
        return usable

    def _checked(self, row: Row) -> Finding:
        """Read a row's files and return what was found; no error is raised, whatever the row is."""
        return check_row(row, **self._checking)

    @property
    def _checking(self) -> dict[str, Any]:
        """All of the client that decides what is found in a row."""
        return {
            "spatial_dims": self.spatial_dims,
            "num_classes": self.num_classes,
            "label_values": self.label_values,
            "empty_masks": self.empty_masks,
            "masks": "label" in self._keys,
            "channels": self._channels,
        }

    def _problem(self, check: Finding, channels: int) -> str | None:
        """Return why a row that was checked cannot be used; None if it can."""
        if check.problem is not None:
            return check.problem
        wants_mask = "label" in self._keys
        if isinstance(check.label, tuple) != wants_mask:
            wanted = "a mask" if wants_mask else "a class number"
            return f"its label is not {wanted}, which {type(self).__name__} needs"
        if check.shape[0] != channels:
            others = "the client expects" if self.sealed else "most images have"
            return f"{check.image} has {check.shape[0]} channels, {others} {channels}"
        return None

    def _findings(self, rows: Sequence[Row], train: bool) -> list[Finding]:
        """Check rows, and prepare each one while its files are at hand if that saves reading them.

        That saves it if they are kept on the disk, or if this message prepares them next.
        """
        kept = self._kept
        source = None
        # A subclass may prepare rows in another way.
        if type(self).prepare is ImagingClient.prepare and (self.preparing or kept is not None):
            source = self._source(train)
            self._sources[train] = source
        slot = None
        if kept is not None:
            kept.tidy(all_rows(self.data(self.pooled)))
            slot = kept.slot_of("checked", self._checking)
            kept.claim(rows, [slot, source.slot if source else None])
        findings = []
        for row in rows:
            finding = None if kept is None else kept.finding(row, slot)
            if finding is None:
                with reading_once():
                    finding = self._checked(row)
                    if finding.problem is None and source and not source.is_on_disk(row):
                        source.prepare(row)
                if kept is not None:
                    kept.keep_finding(row, slot, finding)
            findings.append(finding)
        return findings

    @cached_property
    def _sources(self) -> dict[bool, RowSource]:
        """The sources with rows that were prepared while they were checked, by ``train``."""
        return {}

    @cached_property
    def _kept(self) -> KeptImages | None:
        """What a real hospital keeps of its images on its disk; None if it keeps none."""
        if self.site.simulated:
            return None
        store = open_store(self.node, self.site)
        return None if store is None else KeptImages(store, self.site, type(self))

    def _source(self, train: bool) -> RowSource:
        """Return where prepared rows come from: one that has some of them already, or a new one."""
        source = self._sources.pop(train, None)
        return source or RowSource(Chain(self._steps(train)), self._kept, self._room())

    def _room(self) -> float:
        """Return how many bytes are left in memory for prepared rows of this site."""
        sites = self.site.num_sites if self.site.simulated else 1
        others = self.cache.prepared_of(self.site)
        held = sum(getattr(other, "held", 0) for other in others)
        return self.imaging.cache_gigabytes * 2**30 / sites - held

    def prepare(self, rows: Sequence[Row], train: bool) -> CachedRows:
        """Return the rows after their transforms; results that never change stay in memory.

        A real hospital keeps them on its disk as well, for later messages.
        """
        source = self._source(train)
        cached = CachedRows(rows, source.chain, self._room(), source)
        source.forget()
        if cached.count < len(cached):
            numbers = (cached.count, len(cached))
            log.info("%s: %d of %d rows fit into the cache", self.site.name, *numbers)
        return cached

    def _steps(self, train: bool) -> list[Callable[[Any], Any]]:
        """Return the transforms of a row, with those that make plain tensors of images."""
        steps = list(self.transforms(train))
        random = (i for i, step in enumerate(steps) if isinstance(step, RandomizableTrait))
        # A cached row is copied before its random steps: plain tensors copy ten times faster.
        steps.insert(next(random, len(steps)), EnsureTyped(self._keys, track_meta=False))
        return [*steps, EnsureTyped(self._keys, track_meta=False)]

    def _load(self, train: bool) -> Callable[[Any], Any]:
        """Return the transform that reads the files of a row."""
        return LoadRow(self.spatial_dims, self._channels)

    def seed_transforms(self, prepared: CachedRows, seed: int) -> None:
        """Seed MONAI's random transforms."""
        prepared.transform.set_random_state(seed)

    def batch_of(self, prepared: CachedRows, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return ``image`` and ``label`` of training rows, changed at random."""
        return self._changed(self._rows(prepared, indices))

    def _rows(self, prepared: CachedRows, indices: Sequence[int]) -> dict[str, Tensor]:
        rows: list[Row] = []
        for index in indices:
            samples = prepared[index]
            # MONAI's cropping transforms return lists.
            rows += samples if isinstance(samples, list) else [samples]
        if self.privacy.on and len(rows) != len(indices):
            raise InputError(
                f"the transforms make {len(rows)} samples of {len(indices)} records: private "
                "training needs one sample of each record (num_samples=1)"
            )
        return self._on_device(rows)

    def _on_device(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        shapes = {tuple(row["image"].shape) for row in rows}
        if len(shapes) > 1:
            raise InputError(
                "images of different shapes cannot be in one batch, such as "
                f"{' and '.join(map(str, sorted(shapes)[:2]))}: set image-size, which takes whole "
                "images, or patch-size"
            )
        device = torch_device(self.settings)
        images = torch.stack([row["image"] for row in rows]).to(device)
        if device.type == "cuda" and self.settings.channels_last:
            images = arranged(images)
        batch = {"image": images}
        # Rows that are only predicted have no label.
        if all("label" in row for row in rows):
            batch["label"] = self._labels(rows).to(device)
        return batch

    def _labels(self, rows: Sequence[Row]) -> Tensor:
        """Return the labels of rows as the loss takes them, (0,) if there are no rows."""
        return torch.tensor([int(row["label"]) for row in rows], dtype=torch.long)

    def _changed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a training batch after the subclass's random changes."""
        return dict(batch)

    def check_private(self, model: nn.Module, probe: Mapping[str, Tensor]) -> None:
        """Raise `InputError` if model, loss or ``augment`` mix patients."""
        super().check_private(model, probe)
        images = probe["image"]
        labels = probe["label"]
        masks = labels if labels.ndim == images.ndim else None

        def change(joined: Tensor) -> Tensor:
            channels = images.shape[1]
            parts = {"image": joined[:, :channels], "label": labels}
            if masks is not None:
                parts["label"] = joined[:, channels:].to(masks.dtype)
            changed = self._changed(parts)
            return _joined(changed["image"], None if masks is None else changed["label"])

        require_independent(change, _joined(images, masks))


def _too_many(wrong: int, rows: int) -> bool:
    """Return whether so many rows are wrong that to leave them out would select patients."""
    return wrong >= _FEWEST_WRONG and wrong > _MOST_WRONG * rows


def _require_labels(checks: Sequence[Finding], split: str, mislabelled: str, remedy: str) -> None:
    """Raise `InputError` if too many labels are not what the client takes."""
    wrong = [check for check in checks if check.mislabelled]
    if _too_many(len(wrong), len(checks)):
        raise InputError(
            f"{len(wrong)} of {len(checks)} rows of the {split} split have labels that are "
            f"{mislabelled}, such as that of patient {wrong[0].patient}: {wrong[0].problem}; "
            f"{remedy}"
        )


class LoadRow(Transform):  # type: ignore[misc]
    """Read a row's ``image`` as `read_image` does.

    2D arrays get no position in the patient, so that later transforms take less time.

    Parameters
    ----------
    spatial_dims : int
        2 or 3. An image with this number of dimensions gets one channel.
    channels : int
        The channels of a 4D file whose row does not say what its volumes are, see `frames_of`.

    Raises
    ------
    InputError
        If the image cannot be read, has another number of dimensions or is not finite.
    """

    def __init__(self, spatial_dims: int, channels: int = 1) -> None:
        self.spatial_dims = spatial_dims
        self.channels = channels

    def __call__(self, row: Row) -> dict[str, Any]:
        """Return the row with its image loaded; an error names the patient."""
        try:
            frames = frames_of(row, self.channels)
            image: Any = read_image(row["image"], self.spatial_dims, frames)
        except InputError as error:
            raise InputError(f"image of patient {row['patient']}: {error}") from error
        if self.spatial_dims == 2 and not any(files_of(row["image"])):
            image = plain(image).numpy()
        return {**row, "image": image}


def plain(image: Tensor) -> Tensor:
    """Return the values of an image without its position in the patient."""
    return image.as_tensor() if isinstance(image, MetaTensor) else image


def _joined(images: Tensor, masks: Tensor | None) -> Tensor:
    return images if masks is None else torch.cat([images, masks.to(images.dtype)], dim=1)
