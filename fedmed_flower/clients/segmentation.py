"""A client that outlines structures in images, 2D and 3D."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.transforms import (
    Compose,
    DivisiblePadd,
    Invertd,
    SpatialPadd,
    Transform,
)
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed_flower.clients.cache import CachedRows, tracking
from fedmed_flower.clients.imaging import ImagingClient, plain
from fedmed_flower.clients.pictures import outlined
from fedmed_flower.clients.structures import (
    Classes,
    CropOnStructured,
    Overlapping,
    Structures,
)
from fedmed_flower.clients.training import Parts
from fedmed_flower.data.pictures import Picture
from fedmed_flower.data.site import Row, SiteData, patient_text
from fedmed_flower.errors import InputError
from fedmed_flower.images.geometry import spacing_of
from fedmed_flower.images.names import plain_name
from fedmed_flower.images.reading import read_image
from fedmed_flower.images.regions import Regions, listed, require_regions
from fedmed_flower.images.volumes import frames_of
from fedmed_flower.metrics.names import DICE, NOISED_DICE, WORST
from fedmed_flower.metrics.segmentation import (
    dice_of,
    mean_scores,
    noised_dice,
    patient_dice,
    site_scores,
)
from fedmed_flower.models.device import half_precision, torch_device

log = logging.getLogger("flwr.fedmed")

# The metrics of a class of this name would have the same key as those of the worst patient.
_WORST_CLASS = WORST.removeprefix(f"{DICE}-")
# Whole images are padded to a multiple of this: networks halve them several times.
_DIVISOR = 16


class SegmentationClient(ImagingClient):
    """Trains a network that outlines structures.

    A subclass defines `classes` or `regions`, `load_data` and, unless the run config names a
    network, `build_model`. With `classes`, of which each voxel has one, the network has one output
    channel for the background and one for each class. With `regions`, which may overlap, it has one
    output channel for each region. Rows are dicts:

    - ``image``: as for `ClassificationClient`;
    - ``label``: a mask of the same shape and position, an array or a file, with 0 for the
      background and the numbers 1, 2, ... for the classes (or `label_values`); or DICOM SEG or
      RTSTRUCT, a path or several, whose structures are found by the names in `classes`;
      or the values of `regions`. With `regions` it may also be one mask of 0 and 1 for each
      region: a list of files, or an array (regions, *spatial); or, if the row names the regions in
      their order by ``mask_regions``, one file of several volumes (4D). In DICOM files regions are
      found by name, and may overlap;
    - ``patient``: anything hashable.

    The network's output is brought back to the grid of each mask and is measured there.

    Hooks
    -----
    transforms, intensity, random_transforms
        As in `ImagingClient`, for ``image`` and ``label``.
    to_size
        The transforms that cut out a training patch, one for each image and step.
    augment
        Random changes of a training batch. The default makes none.
    loss
        Maps (outputs, truth), both (batch, channels, *spatial), to a number. The default is Dice of
        each image plus cross entropy; for regions, plus binary cross entropy.
    postprocess
        Changes the mask that the network predicts. The default leaves it as it is.

    Attributes
    ----------
    classes : sequence of str
        Names of the classes 1, 2, ...; left out if there are `regions`, whose names they then are.
    regions : dict of str to sequence of int
        Regions that may overlap: for each, the values of masks that belong to it, such as
        ``{"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}``. A mask holds 0 and these values. Each
        region is thresholded at a probability of 0.5 and has metrics of its own.
    surface_tolerance : float
        Millimetres within which an outline counts as correct, for surface Dice; at least 0.
    overlap : float
        Part of a patch that it shares with a neighbouring patch in inference; in [0, 1).
    """

    # A hospital has few masks, and a pass over ten of them is one step.
    fewest_steps = 16
    regions: Regions = MappingProxyType({})
    surface_tolerance: float = 1.0
    overlap: float = 0.25
    _keys = ("image", "label")

    @property
    def classes(self) -> Sequence[str]:
        """The names of the regions, where a subclass does not name classes."""
        if not self.regions:
            raise InputError(f"{type(self).__name__} must define classes, or regions")
        return tuple(self.regions)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of output channels: classes with the background, or regions."""
        return self._structures.channels

    @cached_property
    def _structures(self) -> Structures:
        if self.regions:
            return Overlapping({name: tuple(values) for name, values in self.regions.items()})
        return Classes(tuple(self.classes), tuple(self.label_values))

    def transforms(self, train: bool) -> Sequence[Callable[[Any], Any]]:
        """Return the transforms of a row.

        In evaluation ``label`` stays as it was read. A transform that changes the position of
        ``image`` must then be one of MONAI's invertible transforms.
        """
        if train:
            return super().transforms(train)
        return [self._load(train), *self.to_grid(["image"]), *self.intensity()]

    def to_size(self, train: bool) -> list[Callable[[Any], Any]]:
        """Return the transforms that cut one training patch, half of the time on a structure."""
        if not self.patch_size:
            fitted = [SpatialPadd(self._keys, self.image_size)] if self.image_size else []
            return [*fitted, DivisiblePadd(self._keys, _DIVISOR)]
        size = self.patch_size
        return [
            SpatialPadd(self._keys, size),
            CropOnStructured(self._keys, "label", size, num_samples=1),
        ]

    def _load(self, train: bool) -> Callable[[Any], Any]:
        return LoadPair(self.spatial_dims, self._structures, train, self._channels)

    @property
    def _checking(self) -> dict[str, Any]:
        more = {"names": self._structures.names, "regions": dict(self.regions)}
        return super()._checking | more

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return a training batch with random changes; torch's generator is seeded beforehand.

        Parameters
        ----------
        images : Tensor
            (batch, channels, *spatial), on the device.
        labels : Tensor
            (batch, 1, *spatial), uint8; with `regions` (batch, regions, *spatial).
        """
        return images, labels

    def loss(self) -> nn.Module:
        """Return the training loss: Dice of each image plus cross entropy, binary for regions."""
        return self._structures.loss()

    def postprocess(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the mask that is measured, such as its largest connected part.

        Parameters
        ----------
        mask : array of shape (*spatial)
            Class numbers. With `regions` it is (regions, *spatial), of 0 and 1.
        """
        return mask

    def check(self, data: SiteData) -> None:
        """Raise `InputError` if a setting or an attribute is out of its range."""
        super().check(data)
        if self.regions:
            require_regions(self.regions)
        names = self.classes
        if isinstance(names, str) or not 0 < len(names) == len({*names, _WORST_CLASS}) - 1:
            raise InputError(
                f"classes must be a tuple of one or more different names, none of them "
                f"{_WORST_CLASS!r}, got {names!r}"
            )
        plain_names = [plain_name(str(name)) for name in names]
        if "" in plain_names or len({*plain_names}) < len(names):
            raise InputError(
                "classes must differ by more than case, blanks, '_' and '-', and hold more than "
                f"these, got {names!r}"
            )
        if self.regions:
            self._require_regions_alone()
            self._require_regions_of(data)
        elif data.regions:
            raise InputError(
                f"the data name regions that may overlap ({listed(data.regions)}), and this client "
                f"classes of which each voxel has one, {', '.join(names)}: give the client regions "
                "in place of classes, or name classes in the data"
            )
        elif data.class_names and [*map(plain_name, data.class_names)] != plain_names:
            raise InputError(
                f"the data name their classes {', '.join(data.class_names)}, this client "
                f"{', '.join(names)}: a class must mean the same at all hospitals, so make classes "
                "and data agree"
            )
        if not 0 <= self.overlap < 1:
            raise InputError(f"overlap must be at least 0 and below 1, got {self.overlap}")
        if not 0 <= self.surface_tolerance < math.inf:
            raise InputError(
                f"surface_tolerance must be at least 0 and finite, got {self.surface_tolerance}"
            )

    def _require_regions_alone(self) -> None:
        if self.label_values:
            raise InputError(
                "regions name the values of masks, so that label_values must be left out, got "
                f"{self.label_values!r}"
            )
        if tuple(self.classes) != tuple(self.regions):
            raise InputError(
                f"classes are the names of the regions, {', '.join(self.regions)}: leave out "
                f"classes, got {self.classes!r}"
            )

    def _require_regions_of(self, data: SiteData) -> None:
        """Raise `InputError` if the data name other regions, or other values of them."""

        def meaning(regions: Regions) -> dict[str, set[int]]:
            return {plain_name(str(name)): {*values} for name, values in regions.items()}

        if data.regions and meaning(data.regions) != meaning(self.regions):
            raise InputError(
                f"the data name the {listed(data.regions)}, this client the "
                f"{listed(self.regions)}: a region must mean the same at all hospitals, so make "
                "regions and data agree"
            )

    def describe(self, data: SiteData) -> dict[str, Any]:
        """Return no numbers, since counting voxels would mean reading all masks."""
        return {}

    def _made_up_label(self, number: int, sides: Sequence[int], rng: np.random.Generator) -> Any:
        values = np.asarray(self._structures.values)
        # In each mask, another class is the most frequent.
        shares = 4.0 ** -((np.arange(len(values)) + number) % len(values))
        return rng.choice(values, size=tuple(sides), p=shares / shares.sum())

    def _steps(self, train: bool) -> list[Callable[[Any], Any]]:
        """Return the transforms of a row; those for evaluation can be inverted."""
        return super()._steps(train) if train else list(self.transforms(train))

    def loss_of(self, model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the training loss."""
        outputs = self._first(model(batch["image"]))
        truth = self._structures.truth(batch["label"])
        if outputs.shape[2:] != truth.shape[2:]:
            raise InputError(
                f"the network returns a mask of shape {tuple(outputs.shape[2:])} for an image of "
                f"shape {tuple(truth.shape[2:])}: the shapes must be the same"
            )
        value: Tensor = self._loss(outputs.float(), truth.float())
        return value

    @cached_property
    def _loss(self) -> nn.Module:
        return self.loss()

    def _first(self, outputs: Any) -> Tensor:
        """Return the main output, since some networks return several outputs in training."""
        first: Tensor = outputs[0] if isinstance(outputs, list | tuple) else outputs
        # Deep supervision as in DynUNet: (batch, outputs, channels, *spatial).
        first = first[:, 0] if first.ndim == self.spatial_dims + 3 else first
        if first.shape[1] != self.num_classes:
            raise InputError(
                f"the network has {first.shape[1]} output channels: {self.num_classes} are "
                f"needed, {self._structures.needed}"
            )
        return first

    def _labels(self, rows: Sequence[Row]) -> Tensor:
        return torch.stack([row["label"] for row in rows])

    def _changed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images, labels = self.augment(batch["image"], batch["label"])
        return {"image": images, "label": labels}

    def predict(self, model: nn.Module, prepared: CachedRows) -> Iterator[NDArray[np.uint8]]:
        """Outline one row after the other; yield masks (*spatial) of class numbers.

        With `regions`, they are (regions, *spatial) of 0 and 1. Each lies on the grid of its image
        as it was read.
        """
        for index in range(len(prepared)):
            yield self._mask(model, prepared[index], prepared.transform)

    def measure(self, model: nn.Module, prepared: CachedRows) -> dict[str, Any]:
        """Return the metrics of `site_scores`; those of a patient's images are averaged first."""
        by_patient: dict[Hashable, list[dict[str, float]]] = {}
        for row, _, scores in self._outlines(model, prepared):
            by_patient.setdefault(patient_text(row["patient"]), []).append(scores)
        return site_scores([mean_scores(scores) for scores in by_patient.values()])

    def measure_privately(
        self, model: nn.Module, prepared: CachedRows, patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        """Return the mean Dice that follows from the sums of `noised_dice`, and those sums."""
        scores = []
        patient_of_row = []
        for index, patient in enumerate(patients):
            try:
                scores.append(self._outlined(model, prepared, index)[2])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                log.debug("the network fails for a record: %s", error)
                continue
            patient_of_row.append(patient)
        sums = noised_dice(scores, patient_of_row, noise, self.classes)
        return dice_of(sums, self.classes) | {NOISED_DICE: sums}

    def draw(self, model: nn.Module, prepared: CachedRows, count: int) -> list[Picture]:
        """Return pictures of the first rows, and of the one with the lowest Dice, as the last."""
        shown: list[tuple[Row, NDArray[np.uint8], float]] = []
        worst: tuple[Row, NDArray[np.uint8], float] | None = None
        for row, mask, scores in self._outlines(model, prepared):
            dice = patient_dice(scores)
            case = (row, mask, dice)
            if len(shown) < count:
                shown.append(case)
            if worst is None or dice < worst[2]:
                worst = case
        if worst is not None:
            shown = [case for case in shown if case is not worst] + [worst]
        pictures = []
        for number, (row, mask, dice) in enumerate(shown, start=1):
            name = "the lowest Dice" if number == len(shown) else f"case {number}"
            frames = frames_of({**row, "image": row["source"]}, self._channels)
            image = read_image(row["source"], self.spatial_dims, frames)
            spacing = row["spacing"]
            layers = [plain(image)[0].numpy(), row["label"], mask]
            if self.spatial_dims == 3:
                # `outlined` expects the axes of a volume in the order RAS.
                turn: NDArray[Any] = io_orientation(image.affine.numpy())  # type: ignore[no-untyped-call]
                layers = [_turned(layer, turn) for layer in layers]
                spacing = [spacing[axis] for axis in np.argsort(turn[:, 0])]
            title = f"{name}: Dice {dice:.2f}"
            pixels, truth, guess = layers
            picture = outlined(pixels[None], truth, guess, tuple(self.classes), title, spacing)
            pictures.append(replace(picture, patient=row["patient"]))
        return pictures

    def _outlines(
        self, model: nn.Module, prepared: CachedRows
    ) -> Iterator[tuple[Row, NDArray[np.uint8], dict[str, float]]]:
        """Outline one row after the other on its own grid; yield row, mask and scores."""
        for index in range(len(prepared)):
            yield self._outlined(model, prepared, index)

    def _outlined(
        self, model: nn.Module, prepared: CachedRows, index: int
    ) -> tuple[Row, NDArray[np.uint8], dict[str, float]]:
        row = prepared[index]
        mask = self._mask(model, row, prepared.transform)
        truth = row["label"]
        if mask.shape != truth.shape:
            raise InputError(
                f"the network's mask has shape {mask.shape}, the label {truth.shape}: transforms "
                "that change an image's position must be invertible, and postprocess must keep the "
                "shape"
            )
        scores = self._structures.scores(truth, mask, row["spacing"], self.surface_tolerance)
        return row, mask, scores

    def _mask(self, model: nn.Module, row: Row, chain: Compose) -> NDArray[np.uint8]:
        model.eval()
        return self.postprocess(self._outline(model, row, chain))

    @torch.no_grad()
    def _outline(self, model: nn.Module, row: Row, chain: Compose) -> NDArray[np.uint8]:
        image = row["image"]
        device = torch_device(self.settings)
        sides = self.image_size or tuple(image.shape[1:])
        roi = self.patch_size or tuple(math.ceil(side / _DIVISOR) * _DIVISOR for side in sides)
        parts = Parts()

        def forward(windows: Tensor) -> Tensor:
            def of_part(part: Mapping[str, Tensor], _: float) -> Tensor:
                with torch.autocast(device.type, torch.bfloat16, half_precision(self.settings)):
                    return self._first(model(part["image"])).float()

            return torch.cat(parts.run({"image": windows}, of_part))

        outputs = sliding_window_inference(
            plain(image)[None].to(device),
            roi,
            4,
            forward,
            overlap=self.overlap,
            mode="gaussian",
        )
        shares = self._structures.shares(outputs[0]).cpu()
        if isinstance(image, MetaTensor) and image.applied_operations:
            invert = Invertd("shares", chain, orig_keys="image", nearest_interp=False)
            with tracking(True):
                shares = invert({"image": image, "shares": MetaTensor(shares)})["shares"]
        return self._structures.decided(plain(shares))


class LoadPair(Transform):  # type: ignore[misc]
    """Read a row's ``image`` and ``label``.

    For evaluation, the mask is an array that no transform moves, in the form of
    `Structures.decided`. Two entries are added: ``spacing`` in millimetres, and ``source``, the
    row's ``image`` before it was read. A row that is only predicted has no ``label``.

    Parameters
    ----------
    spatial_dims : int
        2 or 3.
    structures : Structures
        How masks stand for structures.
    train : bool
        Whether the row is for training.
    channels : int
        As in `LoadRow`.

    Raises
    ------
    InputError
        If image or mask cannot be read or do not fit; it names the patient.
    """

    def __init__(
        self, spatial_dims: int, structures: Structures, train: bool, channels: int = 1
    ) -> None:
        self.spatial_dims = spatial_dims
        self.structures = structures
        self.train = train
        self.channels = channels

    def __call__(self, row: Row) -> dict[str, Any]:
        """Return the row with image and mask loaded; an error names the patient."""
        try:
            frames = frames_of(row, self.channels)
            image = read_image(row["image"], self.spatial_dims, frames)
            if "label" not in row and not self.train:
                return {**row, "image": image}
            # A mask without a position of its own takes the image's.
            mask = self.structures.read(row, self.spatial_dims, image)
        except InputError as error:
            raise InputError(f"patient {row['patient']}: {error}") from error
        if self.train:
            return {**row, "image": image, "label": mask}
        origin = {"spacing": spacing_of(image), "source": row["image"]}
        return {**row, "image": image, "label": self.structures.known(plain(mask)), **origin}


def _turned(layer: NDArray[Any], turn: NDArray[Any]) -> NDArray[Any]:
    """Return a volume, or a stack of volumes, with its axes in another order or direction."""
    stack = layer.ndim > len(turn)
    # `apply_orientation` turns the first axes.
    first = np.moveaxis(layer, 0, -1) if stack else layer
    turned: NDArray[Any] = apply_orientation(first, turn)  # type: ignore[no-untyped-call]
    return np.moveaxis(turned, -1, 0) if stack else turned
