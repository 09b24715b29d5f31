"""A client that outlines structures in images, 2D and 3D."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.transforms import (
    Compose,
    DivisiblePadd,
    Invertd,
    RandCropByPosNegLabeld,
    SpatialPadd,
    Transform,
)
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed_flower.clients.cache import CachedRows, tracking
from fedmed_flower.clients.imaging import ImagingClient, plain
from fedmed_flower.clients.pictures import outlined
from fedmed_flower.clients.training import Parts
from fedmed_flower.data.pictures import Picture
from fedmed_flower.data.site import Row, SiteData, patient_text
from fedmed_flower.errors import InputError
from fedmed_flower.images.geometry import spacing_of
from fedmed_flower.images.reading import read_image, read_label
from fedmed_flower.metrics.names import DICE, NOISED_DICE, WORST
from fedmed_flower.metrics.segmentation import (
    dice_of,
    mask_scores,
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

    A subclass defines `classes`, `load_data` and, unless the run config names a network,
    `build_model`, which returns a network with one output channel for the background and one for
    each class. Rows are dicts:

    - ``image``: as for `ClassificationClient`;
    - ``label``: a mask of the same shape and position, an array or a file, with 0 for the
      background and the numbers 1, 2, ... for the classes (or `label_values`);
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
        Maps (outputs, one-hot truth) to a number. The default is Dice of each image plus cross
        entropy.
    postprocess
        Changes the mask that the network predicts. The default leaves it as it is.

    Attributes
    ----------
    classes : sequence of str
        Names of the classes 1, 2, ...
    surface_tolerance : float
        Millimetres within which an outline counts as correct, for surface Dice; at least 0.
    overlap : float
        Part of a patch that it shares with a neighbouring patch in inference; in [0, 1).
    """

    classes: Sequence[str]
    surface_tolerance: float = 1.0
    overlap: float = 0.25
    _keys = ("image", "label")

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of classes, including the background."""
        return 1 + len(self.classes)

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
            return [DivisiblePadd(self._keys, _DIVISOR)]
        size = self.patch_size
        return [
            SpatialPadd(self._keys, size),
            RandCropByPosNegLabeld(self._keys, "label", size, num_samples=1),
        ]

    def _load(self, train: bool) -> Callable[[Any], Any]:
        return LoadPair(self.spatial_dims, self.num_classes, self.label_values, train)

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return a training batch with random changes; torch's generator is seeded beforehand.

        Parameters
        ----------
        images : Tensor
            (batch, channels, *spatial), on the device.
        labels : Tensor
            (batch, 1, *spatial), uint8.
        """
        return images, labels

    def loss(self) -> nn.Module:
        """Return the training loss: Dice of each image plus cross entropy."""
        loss: nn.Module = DiceCELoss(softmax=True)
        return loss

    def postprocess(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the mask (*spatial) that is measured, such as its largest connected part."""
        return mask

    def check(self, data: SiteData) -> None:
        """Raise `InputError` if a setting or an attribute is out of its range."""
        super().check(data)
        names = self.classes
        if isinstance(names, str) or not 0 < len(names) == len({*names, _WORST_CLASS}) - 1:
            raise InputError(
                f"classes must be a tuple of one or more different names, none of them "
                f"{_WORST_CLASS!r}, got {names!r}"
            )
        if data.class_names and tuple(data.class_names) != tuple(names):
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

    def describe(self, data: SiteData) -> dict[str, Any]:
        """Return no numbers, since counting voxels would mean reading all masks."""
        return {}

    def _made_up_label(self, number: int, sides: Sequence[int], rng: np.random.Generator) -> Any:
        values = np.asarray(self.label_values or range(self.num_classes))
        # In each mask, another class is the most frequent.
        shares = 4.0 ** -((np.arange(len(values)) + number) % len(values))
        return rng.choice(values, size=tuple(sides), p=shares / shares.sum())

    def _steps(self, train: bool) -> list[Callable[[Any], Any]]:
        """Return the transforms of a row; those for evaluation can be inverted."""
        return super()._steps(train) if train else list(self.transforms(train))

    def loss_of(self, model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the training loss."""
        outputs = self._first(model(batch["image"]))
        numbers = torch.arange(self.num_classes, device=outputs.device)
        truth = batch["label"] == numbers.view(1, -1, *[1] * self.spatial_dims)
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
                f"needed, one for the background and one for each of {', '.join(self.classes)}"
            )
        return first

    def _labels(self, rows: Sequence[Row]) -> Tensor:
        return torch.stack([row["label"] for row in rows])

    def _changed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images, labels = self.augment(batch["image"], batch["label"])
        return {"image": images, "label": labels}

    def predict(self, model: nn.Module, prepared: CachedRows) -> Iterator[NDArray[np.uint8]]:
        """Outline one row after the other; yield masks (*spatial) of class numbers.

        Each lies on the grid of its image as it was read.
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
            image = read_image(row["source"], self.spatial_dims)
            spacing = row["spacing"]
            layers = [plain(image)[0].numpy(), row["label"], mask]
            if self.spatial_dims == 3:
                # `outlined` expects the axes of a volume in the order RAS.
                turn: NDArray[Any] = io_orientation(image.affine.numpy())  # type: ignore[no-untyped-call]
                layers = [apply_orientation(layer, turn) for layer in layers]  # type: ignore[no-untyped-call]
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
        scores = mask_scores(truth, mask, self.classes, row["spacing"], self.surface_tolerance)
        return row, mask, scores

    def _mask(self, model: nn.Module, row: Row, chain: Compose) -> NDArray[np.uint8]:
        model.eval()
        return self.postprocess(self._outline(model, row, chain))

    @torch.no_grad()
    def _outline(self, model: nn.Module, row: Row, chain: Compose) -> NDArray[np.uint8]:
        image = row["image"]
        device = torch_device(self.settings)
        sides = tuple(image.shape[1:])
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
        shares = outputs[0].softmax(dim=0).cpu()
        if isinstance(image, MetaTensor) and image.applied_operations:
            invert = Invertd("shares", chain, orig_keys="image", nearest_interp=False)
            with tracking(True):
                shares = invert({"image": image, "shares": MetaTensor(shares)})["shares"]
        mask: NDArray[np.uint8] = plain(shares).argmax(dim=0).to(torch.uint8).numpy()
        return mask


class LoadPair(Transform):  # type: ignore[misc]
    """Read a row's ``image`` and ``label``.

    For evaluation, the mask is an array (*spatial) that no transform moves. Two entries are added:
    ``spacing`` in millimetres, and ``source``, the row's ``image`` before it was read. A row that
    is only predicted has no ``label``.

    Parameters
    ----------
    spatial_dims, num_classes, label_values
        As `read_label` takes them.
    train : bool
        Whether the row is for training.

    Raises
    ------
    InputError
        If image or mask cannot be read or do not fit; it names the patient.
    """

    def __init__(
        self, spatial_dims: int, num_classes: int, label_values: Sequence[int], train: bool
    ) -> None:
        self.spatial_dims = spatial_dims
        self.num_classes = num_classes
        self.label_values = label_values
        self.train = train

    def __call__(self, row: Row) -> dict[str, Any]:
        """Return the row with image and mask loaded; an error names the patient."""
        try:
            image = read_image(row["image"], self.spatial_dims)
            if "label" not in row and not self.train:
                return {**row, "image": image}
            # A mask without a position of its own takes the image's.
            mask = read_label(
                row["label"], self.spatial_dims, self.num_classes, self.label_values, image
            )
        except InputError as error:
            raise InputError(f"patient {row['patient']}: {error}") from error
        if self.train:
            return {**row, "image": image, "label": mask}
        origin = {"spacing": spacing_of(image), "source": row["image"]}
        return {**row, "image": image, "label": plain(mask)[0].numpy(), **origin}
