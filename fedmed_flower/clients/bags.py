"""A client that classifies bags of patches, such as those of a slide."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed_flower.clients.cache import CachedRows
from fedmed_flower.clients.classification import ClassificationClient
from fedmed_flower.clients.pictures import outlined
from fedmed_flower.data.bags import check_bag
from fedmed_flower.data.checks import Finding
from fedmed_flower.data.pictures import Picture
from fedmed_flower.data.site import Row
from fedmed_flower.errors import InputError
from fedmed_flower.images.bags import patches_of
from fedmed_flower.metrics.classification import class_probabilities
from fedmed_flower.models.bags import AttentionMIL, absent, marked, padded
from fedmed_flower.models.device import half_precision, torch_device
from fedmed_flower.settings.bags import BagSettings
from fedmed_flower.settings.registry import Sections

# A picture shows so many patches along a side.
_SIDE = 3


class BagClient(ClassificationClient):
    """Trains a network that classifies bags of patches, of which only the bag has a label.

    A subclass defines `num_classes`, `load_data` and, unless the run config names a network for
    patches, `build_model`. Rows are dicts:

    - ``image``: a bag: a folder of patches, a list of files, or an array of shape
      (patches, channels, *spatial). Bags may differ in size, and all patches have one shape;
    - ``label``, ``patient``: as in `ClassificationClient`.

    A training step takes at most ``bag-size`` patches of a bag, drawn at random. Evaluation takes
    all of them, and holds those of one bag in memory. A bag is one record: ``privacy=patient``
    clips the gradient of all its patches together.

    Hooks
    -----
    build_model
        A network that maps (batch, patches, channels, *spatial) to (batch, outputs), and leaves out
        patches of NaN, which fill up smaller bags, as `AttentionMIL` does. The default is
        `AttentionMIL` over the network that the run config names, whose outputs are the
        ``patch-features`` of a patch.
    transforms, intensity, random_transforms, augment
        As in `ClassificationClient`, for patches: a batch of `augment` is (patches, channels,
        *spatial), of all bags.

    Attributes
    ----------
    spatial_dims : int
        Of a patch.
    image_shape : tuple of int
        Of a patch; else as in `ImagingClient`.
    num_classes, modality, class_names
        As in `ClassificationClient`. `cam_layer` is not used.
    """

    sections: ClassVar[Sections] = (BagSettings,)

    @cached_property
    def bags(self) -> BagSettings:
        """The settings of bags in the run config."""
        return BagSettings.from_run_config(self.context.run_config)

    def build_model(self) -> nn.Module:
        """Return attention over the features of the network that the run config names."""
        settings = self.bags
        outputs = 1 if self.num_classes == 2 else self.num_classes
        features = super().build_model()
        return AttentionMIL(features, settings.patch_features, outputs, settings.attention_size)

    def made_up(self, count: int) -> list[Row]:
        """Return rows with bags of ``bag-size`` patches, as `ImagingClient.made_up` makes images.

        With fewer, an `augment` that mixes bags might mix padding alone, and go unnoticed.

        Raises
        ------
        InputError
            As `ImagingClient.made_up`.
        """
        size = self.bags.bag_size
        return [
            {**row, "image": np.stack([np.roll(row["image"], k, -1) for k in range(size)])}
            for row in super().made_up(count)
        ]

    def _checked(self, row: Row) -> Finding:
        return check_bag(row, self.spatial_dims, self.num_classes)

    def prepare(self, rows: Sequence[Row], train: bool) -> Any:
        """Return the rows as `Bags`; each patch goes through the transforms by itself."""
        patches: list[Row] = []
        counts = []
        for row in rows:
            bag = patches_of(row["image"], self.spatial_dims)
            patches += [{**row, "image": patch} for patch in bag]
            counts.append(len(bag))
        return Bags(super().prepare(patches, train), rows, counts)

    def batch_of(self, prepared: Any, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return ``image`` (batch, patches, channels, *spatial) and ``label`` of training rows.

        torch's generator draws the patches. In private training each bag is filled up to
        ``bag-size``, so that no patient decides about the shape of a batch.
        """
        bags = [_stacked(prepared, self._drawn(prepared.patches_of(index))) for index in indices]
        _require_alike(tuple(bag.shape[1:]) for bag in bags)
        most = self.bags.bag_size if self.privacy.on else max(map(len, bags))
        device = torch_device(self.settings)
        batch = {"image": padded(bags, most).to(device)}
        batch["label"] = self._labels([prepared.rows[index] for index in indices]).to(device)
        return self._changed(batch)

    def _drawn(self, patches: range) -> list[int]:
        size = self.bags.bag_size
        if len(patches) <= size:
            return list(patches)
        return [patches[k] for k in torch.randperm(len(patches))[:size].tolist()]

    def _changed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bags = batch["image"]
        lacking = absent(bags)
        shown = bags.nan_to_num(0.0).flatten(0, 1)
        changed = self.augment(shown).reshape(bags.shape)
        _require_numbers(changed, "augment")
        return {"image": marked(changed, lacking), "label": batch["label"]}

    def _rows(self, prepared: Any, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return whole bags, on the CPU: `_InParts` takes them to the device."""
        bags = [_stacked(prepared, prepared.patches_of(index)) for index in indices]
        batch = {"image": padded(bags, max(map(len, bags)))}
        rows = [prepared.rows[index] for index in indices]
        # Rows that are only predicted have no label.
        if all("label" in row for row in rows):
            batch["label"] = self._labels(rows)
        return batch

    def _outputs_and_labels(
        self, model: nn.Module, prepared: Any
    ) -> tuple[NDArray[np.float32], NDArray[Any]]:
        whole = self._in_parts(model)
        # One bag after the other, since all their patches together may not fit into memory.
        pairs = [
            super(BagClient, self)._outputs_and_labels(whole, prepared.only(index))
            for index in range(len(prepared))
        ]
        outputs, labels = zip(*pairs, strict=True)
        return np.concatenate(outputs), np.concatenate(labels)

    def measure_privately(
        self, model: nn.Module, prepared: Any, patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        """Return metrics by counts with noise, as `ClassificationClient` does."""
        return super().measure_privately(self._in_parts(model), prepared, patients, noise)

    def _in_parts(self, model: nn.Module) -> _InParts:
        return _InParts(
            model, self.bags.bag_size, torch_device(self.settings), half_precision(self.settings)
        )

    def draw(self, model: nn.Module, prepared: Any, count: int) -> list[Picture]:
        """Return pictures of the patches with the most weight: first rows, and the highest loss.

        Only `AttentionMIL` has such weights, and pictures are of 2D patches.
        """
        if not isinstance(model, AttentionMIL) or self.spatial_dims != 2:
            return []
        outputs, labels = self._outputs_and_labels(model, prepared)
        pairs = zip(torch.from_numpy(outputs), torch.from_numpy(labels), strict=True)
        losses = [float(self._loss(output[None], label[None])) for output, label in pairs]
        worst = int(np.argmax(losses))
        shares = class_probabilities(outputs)
        pictures = []
        indices = dict.fromkeys([*range(min(count, len(labels))), worst])
        for number, index in enumerate(indices, start=1):
            name = "the highest loss" if index == worst else f"case {number}"
            label = int(labels[index])
            patches = _stacked(prepared, prepared.patches_of(index))
            weights = self._in_parts(model).weights_of(patches)
            best = np.argsort(-weights, kind="stable")[: _SIDE**2]
            title = (
                f"{name}: class {label}, given {shares[index, label]:.0%}; {len(best)} of "
                f"{len(weights)} patches with {weights[best].sum():.0%} of the weight"
            )
            picture = outlined(_side_by_side(patches[best]), None, None, (), title)
            pictures.append(replace(picture, patient=prepared.rows[index]["patient"]))
        return pictures


class Bags:
    """Rows whose image is a bag of patches, after the transforms of each patch.

    Parameters
    ----------
    patches : CachedRows
        A row for each patch, bag after bag.
    rows : sequence of dict
        The rows of the bags.
    counts : sequence of int
        Number of patches of each bag.
    first : int
        Index in `patches` of the first patch of the first bag.
    """

    def __init__(
        self, patches: CachedRows, rows: Sequence[Row], counts: Sequence[int], first: int = 0
    ) -> None:
        self.patches = patches
        self.rows = list(rows)
        self.counts = list(counts)
        self._starts = list(accumulate(self.counts, initial=first))

    def __len__(self) -> int:
        """Return the number of bags."""
        return len(self.rows)

    @property
    def transform(self) -> Any:
        """The steps of each patch; a caller seeds them here."""
        return self.patches.transform

    @property
    def held(self) -> int:
        """Bytes of patches in memory."""
        return self.patches.held

    def patches_of(self, index: int) -> range:
        """Return the indices of a bag's patches."""
        return range(self._starts[index], self._starts[index + 1])

    def only(self, index: int) -> Bags:
        """Return one of the bags by itself."""
        rows = self.rows[index : index + 1]
        return Bags(self.patches, rows, self.counts[index : index + 1], self._starts[index])


class _InParts(nn.Module):
    """A network for bags that takes one bag, some of its patches after the other."""

    def __init__(self, model: nn.Module, size: int, device: torch.device, mixed: bool) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.device = device
        self.mixed = mixed

    def forward(self, bags: Tensor) -> Tensor:
        """Return (1, outputs) for a bag (1, patches, channels, *spatial)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            if isinstance(self.model, AttentionMIL):
                return self.model.pool(self._embedded(self.model, bags[0])).float()
            outputs: Tensor = self.model(bags.to(self.device))
            return outputs.float()

    @torch.no_grad()
    def weights_of(self, patches: Tensor) -> NDArray[np.float32]:
        """Return the weight of each patch of a bag (patches, channels, *spatial)."""
        if not isinstance(self.model, AttentionMIL):
            raise TypeError(f"{type(self.model).__name__} has no weights of patches")
        self.eval()
        embedded = self._embedded(self.model, patches)
        weights: NDArray[np.float32] = self.model.weights(embedded)[0].float().cpu().numpy()
        return weights

    def _embedded(self, model: AttentionMIL, patches: Tensor) -> Tensor:
        parts = [
            model.embed(patches[start : start + self.size].to(self.device))
            for start in range(0, len(patches), self.size)
        ]
        return torch.cat(parts)[None]


def _stacked(prepared: Bags, indices: Sequence[int]) -> Tensor:
    """Return patches (n, channels, *spatial).

    Raises
    ------
    InputError
        If their shapes differ, or a transform makes NaN, or several samples of a patch.
    """
    patches = [prepared.patches[index] for index in indices]
    if any(isinstance(patch, list) for patch in patches):
        raise InputError(
            "the transforms make several samples of one patch: they must make one (num_samples=1)"
        )
    images: list[Tensor] = [patch["image"] for patch in patches]
    _require_alike(tuple(image.shape) for image in images)
    stacked = torch.stack(images)
    _require_numbers(stacked, "the transforms")
    return stacked


def _require_numbers(patches: Tensor, maker: str) -> None:
    """Raise `InputError` if patches hold NaN, which would count as padding."""
    if bool(patches.isnan().any()):
        raise InputError(f"patches hold NaN after {maker}, which marks those that fill up a bag")


def _require_alike(shapes: Iterable[tuple[int, ...]]) -> None:
    """Raise `InputError` if patches of one batch differ in shape."""
    different = sorted({*shapes})
    if len(different) > 1:
        raise InputError(
            "patches of different shapes cannot be in one batch, such as "
            f"{' and '.join(map(str, different[:2]))}: set patch-size"
        )


def _side_by_side(patches: Tensor) -> NDArray[np.float32]:
    """Return 2D patches (n, channels, rows, columns) in rows of three, as one image in grey."""
    grey = patches.float().mean(dim=1).numpy()
    _, rows, columns = grey.shape
    across = min(_SIDE, len(grey))
    down = math.ceil(len(grey) / across)
    sheet = np.full((down * rows, across * columns), grey.min(), np.float32)
    for number, patch in enumerate(grey):
        top = number // across * rows
        left = number % across * columns
        sheet[top : top + rows, left : left + columns] = patch
    return sheet[None]
