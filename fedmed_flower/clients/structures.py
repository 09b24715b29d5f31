"""What a network outlines: classes that exclude each other, or regions that may overlap."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss, DiceLoss
from monai.transforms import RandCropByPosNegLabeld
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed_flower.data.site import Row
from fedmed_flower.images.reading import read_label
from fedmed_flower.images.regions import (
    Regions,
    read_regions,
    regions_named,
    require_no_regions,
    values_of,
)
from fedmed_flower.metrics.segmentation import mask_scores, region_scores

Mask = NDArray[np.uint8]


class Structures(ABC):
    """How masks, and the outputs of a network, stand for structures."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The structures, in the order of their numbers or channels."""

    @property
    @abstractmethod
    def values(self) -> tuple[int, ...]:
        """What a mask may hold, as it is written; the first is the background."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Output channels of the network."""

    @property
    @abstractmethod
    def needed(self) -> str:
        """What the output channels are, in words."""

    @abstractmethod
    def read(self, row: Row, spatial_dims: int, image: MetaTensor) -> MetaTensor:
        """Read the mask of a row's image, as `truth` takes it; (k, *spatial), uint8.

        Raises
        ------
        InputError
            As `read_label` or `read_regions`.
        """

    @abstractmethod
    def loss(self) -> nn.Module:
        """Return the loss of outputs and truth, both (batch, channels, *spatial)."""

    @abstractmethod
    def truth(self, labels: Tensor) -> Tensor:
        """Return masks (batch, k, *spatial) as booleans (batch, channels, *spatial)."""

    @abstractmethod
    def shares(self, outputs: Tensor) -> Tensor:
        """Return the probabilities (channels, *spatial) that outputs stand for."""

    @abstractmethod
    def decided(self, shares: Tensor) -> Mask:
        """Return the mask that probabilities (channels, *spatial) amount to."""

    @abstractmethod
    def known(self, label: Tensor) -> Mask:
        """Return a mask (k, *spatial) in the form of `decided`."""

    @abstractmethod
    def scores(
        self, truth: Mask, guess: Mask, spacing: Sequence[float], tolerance: float
    ) -> dict[str, float]:
        """Compare two masks in the form of `decided`, as `mask_scores` does."""


@dataclass(frozen=True)
class Classes(Structures):
    """Classes of which each voxel has one; a mask holds their numbers.

    Attributes
    ----------
    classes : tuple of str
        Names of the classes 1, 2, ...
    label_values : tuple of int
        The values of masks for class 0, 1, ...; empty if masks hold the class numbers.
    """

    classes: tuple[str, ...]
    label_values: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The classes without the background."""
        return self.classes

    @property
    def values(self) -> tuple[int, ...]:
        """What a mask may hold."""
        return self.label_values or tuple(range(self.channels))

    @property
    def channels(self) -> int:
        """One for the background, and one a class."""
        return 1 + len(self.classes)

    @property
    def needed(self) -> str:
        """What the output channels are, in words."""
        return f"one for the background and one for each of {', '.join(self.names)}"

    def read(self, row: Row, spatial_dims: int, image: MetaTensor) -> MetaTensor:
        """Read a mask of class numbers, (1, *spatial)."""
        require_no_regions(row)
        # The arguments of `check_row`, so that a mask is looked at once.
        values = self.label_values
        return read_label(row["label"], spatial_dims, self.channels, values, image, self.names)

    def loss(self) -> nn.Module:
        """Return Dice of each image plus cross entropy."""
        loss: nn.Module = DiceCELoss(softmax=True)
        return loss

    def truth(self, labels: Tensor) -> Tensor:
        """Return masks as one channel a class, the background first."""
        numbers = torch.arange(self.channels, device=labels.device)
        return labels == numbers.view(1, -1, *[1] * (labels.ndim - 2))

    def shares(self, outputs: Tensor) -> Tensor:
        """Return the softmax over the channels."""
        return outputs.softmax(dim=0)

    def decided(self, shares: Tensor) -> Mask:
        """Return the likeliest class of each voxel, (*spatial)."""
        mask: Mask = shares.argmax(dim=0).to(torch.uint8).numpy()
        return mask

    def known(self, label: Tensor) -> Mask:
        """Return the class numbers, (*spatial)."""
        mask: Mask = label[0].numpy()
        return mask

    def scores(
        self, truth: Mask, guess: Mask, spacing: Sequence[float], tolerance: float
    ) -> dict[str, float]:
        """Compare the classes of two masks."""
        return mask_scores(truth, guess, self.names, spacing, tolerance)


@dataclass(frozen=True)
class Overlapping(Structures):
    """Regions that may overlap: a mask has a channel for each, of 0 and 1.

    Attributes
    ----------
    regions : dict
        For each region, the values of the mask that belong to it.
    """

    regions: Regions

    @property
    def names(self) -> tuple[str, ...]:
        """The regions."""
        return tuple(self.regions)

    @property
    def values(self) -> tuple[int, ...]:
        """What a mask of all regions may hold."""
        return values_of(self.regions)

    @property
    def channels(self) -> int:
        """One a region."""
        return len(self.regions)

    @property
    def needed(self) -> str:
        """What the output channels are, in words."""
        return f"one for each of {', '.join(self.names)}"

    def read(self, row: Row, spatial_dims: int, image: MetaTensor) -> MetaTensor:
        """Read a mask as one channel a region, (regions, *spatial)."""
        return read_regions(row["label"], spatial_dims, self.regions, image, regions_named(row))

    def loss(self) -> nn.Module:
        """Return the loss of regions."""
        return RegionLoss()

    def truth(self, labels: Tensor) -> Tensor:
        """Return masks as booleans."""
        return labels > 0

    def shares(self, outputs: Tensor) -> Tensor:
        """Return the sigmoid of each channel."""
        return outputs.sigmoid()

    def decided(self, shares: Tensor) -> Mask:
        """Return 1 where a region has a probability of at least 0.5, (regions, *spatial)."""
        mask: Mask = (shares >= 0.5).to(torch.uint8).numpy()
        return mask

    def known(self, label: Tensor) -> Mask:
        """Return the masks, (regions, *spatial)."""
        mask: Mask = label.numpy()
        return mask

    def scores(
        self, truth: Mask, guess: Mask, spacing: Sequence[float], tolerance: float
    ) -> dict[str, float]:
        """Compare the regions of two masks."""
        return region_scores(truth, guess, self.names, spacing, tolerance)


class RegionLoss(nn.Module):
    """Dice and binary cross entropy of each region of each image, the mean over all of them.

    MONAI's DiceCELoss has no such form: with several channels its second part is the cross entropy
    of classes that exclude each other, also if its first part is Dice after a sigmoid.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dice = DiceLoss(sigmoid=True)

    def forward(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """Return one number from two tensors (batch, regions, *spatial)."""
        dice: Tensor = self.dice(outputs, truth)
        return dice + nn.functional.binary_cross_entropy_with_logits(outputs, truth)


class CropOnStructured(RandCropByPosNegLabeld):  # type: ignore[misc]
    """MONAI's RandCropByPosNegLabeld for masks with any number of channels.

    MONAI takes the first of several channels for the background; here each is a structure.
    """

    def randomize(
        self,
        label: Tensor | None = None,
        fg_indices: Any = None,
        bg_indices: Any = None,
        image: Tensor | None = None,
    ) -> None:
        """Choose the places of patches."""
        on = None if label is None else label.any(dim=0, keepdim=True)
        super().randomize(on, fg_indices, bg_indices, image)
