"""The common part of clients that say something of a whole image: a class, findings, a number."""

from __future__ import annotations

import difflib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed_flower.clients.cache import CachedRows
from fedmed_flower.clients.imaging import ImagingClient
from fedmed_flower.clients.pictures import heatmap
from fedmed_flower.clients.training import predict, predict_alone
from fedmed_flower.data.pictures import Picture
from fedmed_flower.data.site import Row
from fedmed_flower.errors import InputError
from fedmed_flower.models.device import half_precision

Outputs = NDArray[np.float32]


class WholeImageClient(ImagingClient):
    """The base of clients whose network has a few outputs for each image.

    Hooks
    -----
    transforms, intensity, random_transforms
        As in `ImagingClient`.
    augment
        Random changes of a training batch. The default makes none.
    loss
        Maps (outputs, labels) to a number.
    metrics_of_rows
        The metrics that follow from outputs and labels.

    Attributes
    ----------
    cam_layer : str
        Name of the layer whose activation pictures show (Grad-CAM). If it is empty, they show how
        much the score falls when a part of the image is covered (occlusion sensitivity).
    """

    cam_layer: str = ""

    @property
    @abstractmethod
    def _widths(self) -> tuple[int, ...]:
        """The numbers of outputs that the network may have."""

    @property
    @abstractmethod
    def _predicted(self) -> str:
        """What needs so many outputs, in words."""

    @abstractmethod
    def loss(self) -> nn.Module:
        """Return the training loss, which maps (outputs, labels) to a mean over images."""

    @abstractmethod
    def metrics_of_rows(
        self, outputs: Outputs, labels: NDArray[Any], rows: Sequence[Row]
    ) -> dict[str, Any]:
        """Return the metrics of rows, with ``num-examples`` and what the server pools.

        Parameters
        ----------
        outputs : array of shape (n, c)
            The network's outputs for the rows.
        labels : array of shape (n, ...)
            Their labels, as the loss takes them.
        rows : sequence of n dicts
        """

    @abstractmethod
    def _noised(
        self, outputs: Outputs, labels: NDArray[Any], patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        """Return metrics by counts with noise of this multiplier, and those counts."""

    @abstractmethod
    def _scores(self, outputs: Tensor) -> Tensor:
        """Return the scores (batch, k) of which pictures show what they rest on."""

    @abstractmethod
    def _caption(
        self, output: NDArray[np.float32], label: NDArray[Any], worst: bool
    ) -> tuple[str, int]:
        """Return what a picture says of its case, and the number of the score that it maps.

        Parameters
        ----------
        output, label
            Of one row.
        worst : bool
            Whether it is the case with the highest loss.
        """

    def answers(self, outputs: Outputs) -> NDArray[Any]:
        """Return what `predict` returns, from the network's outputs (n, c)."""
        return outputs

    def augment(self, images: Tensor) -> Tensor:
        """Return a training batch with random changes; torch's generator is seeded beforehand.

        Changing a whole batch here takes a fraction of the time of MONAI's random transforms, which
        change one image after the other.

        Parameters
        ----------
        images : Tensor
            (batch, channels, *spatial), on the device.
        """
        return images

    def loss_of(self, model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the training loss."""
        outputs = self._outputs(model(batch["image"]))
        value: Tensor = self._loss(outputs, batch["label"])
        return value

    def _outputs(self, outputs: Tensor) -> Tensor:
        """Return the network's outputs.

        Raises
        ------
        InputError
            If their number does not fit what is predicted.
        """
        if outputs.ndim != 2 or outputs.shape[1] not in self._widths:
            raise InputError(
                f"the network returns outputs of shape {tuple(outputs.shape)}: {self._predicted} "
                f"(rows, {' or '.join(map(str, self._widths))})"
            )
        return outputs

    def _changed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"image": self.augment(batch["image"]), "label": batch["label"]}

    @cached_property
    def _loss(self) -> nn.Module:
        return self.loss()

    def measure(self, model: nn.Module, prepared: CachedRows) -> dict[str, Any]:
        """Return ``loss`` and what `metrics_of_rows` returns."""
        outputs, labels = self._outputs_and_labels(model, prepared)
        loss = self._loss(torch.from_numpy(outputs), torch.from_numpy(labels))
        return self.metrics_of_rows(outputs, labels, prepared.rows) | {"loss": float(loss)}

    def measure_privately(
        self, model: nn.Module, prepared: CachedRows, patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        """Return metrics by counts with noise, and those counts; no loss.

        Each record goes through the model by itself, so that it cannot change another's score.
        """
        model.eval()
        labels: dict[int, Tensor] = {}

        def batch_at(index: int) -> dict[str, Tensor]:
            batch = self._rows(prepared, [index])
            labels[index] = batch["label"].cpu()
            return {"image": batch["image"]}

        indices, found = predict_alone(
            lambda batch: self._outputs(model(batch["image"])),
            batch_at,
            len(prepared),
            half_precision(self.settings),
        )
        width = found[0].size if found else self._widths[-1]
        outputs = np.asarray(found, np.float32).reshape(-1, width)
        truth = torch.cat([self._labels([]), *(labels[index] for index in indices)])
        return self._noised(outputs, truth.numpy(), [patients[index] for index in indices], noise)

    def draw(self, model: nn.Module, prepared: CachedRows, count: int) -> list[Picture]:
        """Return pictures of the first rows and the one with the highest loss.

        A map over each image shows which parts the score rests on that the title names.
        """
        outputs, labels = self._outputs_and_labels(model, prepared)
        rows = zip(torch.from_numpy(outputs), torch.from_numpy(labels), strict=True)
        losses = [float(self._loss(output[None], label[None])) for output, label in rows]
        worst = int(np.argmax(losses))
        indices = dict.fromkeys([*range(min(count, len(labels))), worst])
        heat = self._heat(model)
        sides = self.imaging.numbers("spacing", self.spatial_dims)
        pictures = []
        for number, index in enumerate(indices, start=1):
            spacing: Sequence[float] = sides
            image = self._rows(prepared, [index])["image"]
            name = "the highest loss" if index == worst else f"case {number}"
            said, score = self._caption(outputs[index], labels[index], index == worst)
            layers = [image[0, 0].cpu().numpy(), heat(image, score)]
            if self.spatial_dims == 3 and (axes := self.imaging.orientation):
                # `heatmap` expects the axes of a volume in the order RAS.
                turn: NDArray[Any] = axcodes2ornt(axes)  # type: ignore[no-untyped-call]
                layers = [apply_orientation(layer, turn) for layer in layers]  # type: ignore[no-untyped-call]
                spacing = [spacing[axis] for axis in np.argsort(turn[:, 0])] if spacing else ()
            picture = heatmap(layers[0][None], layers[1], f"{name}: {said}", spacing)
            pictures.append(replace(picture, patient=prepared.rows[index]["patient"]))
        return pictures

    def _heat(self, model: nn.Module) -> Callable[[Tensor, int], NDArray[np.float32]]:
        """Return a function that maps an image to the parts that one of its scores rests on."""
        from monai.visualize import GradCAM, OcclusionSensitivity

        scores = _Scores(model, self._scores)
        if self.cam_layer:
            names = [name for name, _ in model.named_modules() if name]
            if self.cam_layer not in names:
                near = difflib.get_close_matches(self.cam_layer, names, n=1) or names[-1:]
                hint = f", such as {near[0]}" if near else ""
                raise InputError(
                    f"cam_layer must name a layer of the model{hint}, got {self.cam_layer!r}"
                )
            # MONAI's own postprocessing would turn the largest value to 0.
            grad_cam = GradCAM(scores, f"model.{self.cam_layer}", postprocessing=lambda map: map)
            # Frozen layers before the first trainable one get a gradient only through the image.
            return lambda image, score: _values(
                grad_cam(image.clone().requires_grad_(), class_idx=score)[0, 0]
            )
        parts, windows_at_once = (7, 16) if self.spatial_dims == 2 else (4, 2)

        def occlusion(image: Tensor, score: int) -> NDArray[np.float32]:
            cover = OcclusionSensitivity(
                scores,
                mask_size=[min(side, max(2, side // parts)) for side in image.shape[2:]],
                n_batch=windows_at_once,
                verbose=False,
                overlap=0.5,
                activate=False,
            )
            with warnings.catch_warnings():
                # torch warns about the way in which MONAI indexes.
                warnings.simplefilter("ignore", UserWarning)
                covered = cover(image)[0][0, score]
            return _values(scores(image)[0, score] - covered)

        return occlusion

    def predict(self, model: nn.Module, prepared: CachedRows) -> NDArray[Any]:
        """Return `answers` for the rows; volumes pass one by one, 2D images in batches."""
        return self.answers(self._outputs_and_labels(model, prepared)[0])

    def _outputs_and_labels(
        self, model: nn.Module, prepared: CachedRows
    ) -> tuple[Outputs, NDArray[Any]]:
        """Return the network's outputs, and the labels of the rows if they have some."""
        model.eval()
        size = max(self.settings.batch_size, 64) if self.spatial_dims == 2 else 1
        labels = [self._labels([])]

        def batches() -> Iterator[dict[str, Tensor]]:
            for start in range(0, len(prepared), size):
                batch = self._rows(prepared, range(start, min(start + size, len(prepared))))
                if "label" in batch:
                    labels.append(batch["label"].cpu())
                yield {"image": batch["image"]}

        outputs = predict(
            lambda batch: self._outputs(model(batch["image"])),
            batches(),
            half_precision(self.settings),
        )
        return outputs, torch.cat(labels).numpy()


class _Scores(nn.Module):
    """A model that returns scores in place of its outputs."""

    def __init__(self, model: nn.Module, scores: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.scores = scores

    def forward(self, images: Tensor) -> Tensor:
        """Return (batch, k)."""
        return self.scores(self.model(images))


def _values(map: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = map.detach().float().cpu().numpy()
    return values
