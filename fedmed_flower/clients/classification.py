"""A client that classifies images, 2D and 3D."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
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
from fedmed_flower.data.site import Row, SiteData, patient_text
from fedmed_flower.errors import InputError
from fedmed_flower.metrics.classification import (
    classification_metrics,
    noised_counts,
    noised_metrics,
)
from fedmed_flower.metrics.names import NOISED
from fedmed_flower.models.device import half_precision


class ClassificationClient(ImagingClient):
    """Trains a network that classifies images.

    A subclass defines `num_classes`, `load_data` and, unless the run config names a network,
    `build_model`. The network has `num_classes` outputs (cross entropy), or one output for two
    classes (binary cross entropy). Rows are dicts:

    - ``image``: an array of shape (*spatial) or (channels, *spatial), a file that MONAI reads, a
      DICOM file or a folder with a DICOM series, or a list of files that are channels;
    - ``label``: an integer from 0 to ``num_classes - 1``; for two classes, 1 is the finding;
    - ``patient``: anything hashable.

    Hooks
    -----
    transforms, intensity, random_transforms
        As in `ImagingClient`.
    augment
        Random changes of a training batch. The default makes none.
    loss
        Maps (outputs, labels) to a number.

    Attributes
    ----------
    num_classes, spatial_dims, modality
        As in `ImagingClient`.
    class_names : tuple of str
        What the classes 0, 1, ... are called in the report. If there is not one for each class,
        they are called by their numbers.
    cam_layer : str
        Name of the layer whose activation pictures show (Grad-CAM). If it is empty, they show how
        much the score falls when a part of the image is covered (occlusion sensitivity).
    """

    cam_layer: str = ""
    class_names: tuple[str, ...] = ()

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

    def loss(self) -> nn.Module:
        """Return the training loss: cross entropy, or its binary form for one output."""
        return _CrossEntropy()

    def describe(self, data: SiteData) -> dict[str, Any]:
        """Return the number of training rows of each class."""
        labels = [int(row["label"]) for row in data.train]
        return {"labels": np.bincount(labels, minlength=self.num_classes).tolist()}

    def label_of(self, row: Row) -> Hashable | None:
        """Return the class of a row."""
        return str(row.get("label"))

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
            If their number does not fit the number of classes.
        """
        allowed = (1, 2) if self.num_classes == 2 else (self.num_classes,)
        if outputs.ndim != 2 or outputs.shape[1] not in allowed:
            raise InputError(
                f"the network returns outputs of shape {tuple(outputs.shape)}: {self.num_classes} "
                f"classes need (rows, {' or '.join(map(str, allowed))})"
            )
        return outputs

    def _changed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"image": self.augment(batch["image"]), "label": batch["label"]}

    @cached_property
    def _loss(self) -> nn.Module:
        return self.loss()

    def measure(self, model: nn.Module, prepared: CachedRows) -> dict[str, Any]:
        """Return ``loss`` and the metrics and counts of `classification_metrics`."""
        outputs, labels = self._outputs_and_labels(model, prepared)
        loss = self._loss(torch.from_numpy(outputs), torch.from_numpy(labels))
        patient_of_row = [patient_text(row["patient"]) for row in prepared.rows]
        metrics = classification_metrics(labels, outputs, patient_of_row, self.node.coarse_figures)
        return metrics | {"loss": float(loss)}

    def measure_privately(
        self, model: nn.Module, prepared: CachedRows, patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        """Return the metrics that follow from `noised_counts`, and those counts; no loss.

        Each record goes through the model by itself, so that it cannot change another's score.
        """
        model.eval()
        labels: dict[int, int] = {}

        def batch_at(index: int) -> dict[str, Tensor]:
            batch = self._rows(prepared, [index])
            labels[index] = int(batch["label"])
            return {"image": batch["image"]}

        indices, scores = predict_alone(
            lambda batch: self._outputs(model(batch["image"])),
            batch_at,
            len(prepared),
            half_precision(self.settings),
        )
        width = scores[0].size if scores else self.num_classes
        outputs = np.asarray(scores).reshape(-1, width)
        truth = [labels[index] for index in indices]
        counts = noised_counts(truth, outputs, [patients[index] for index in indices], noise)
        return noised_metrics(counts) | {NOISED: counts}

    def draw(self, model: nn.Module, prepared: CachedRows, count: int) -> list[Picture]:
        """Return pictures of the first rows and the one with the highest loss.

        A map over each image shows which parts the score of its class rests on.
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
            guess = _share(outputs[index], int(labels[index]))
            title = f"{name}: class {labels[index]}, given {guess:.0%}"
            layers = [image[0, 0].cpu().numpy(), heat(image)]
            if self.spatial_dims == 3 and (axes := self.imaging.orientation):
                # `heatmap` expects the axes of a volume in the order RAS.
                turn: NDArray[Any] = axcodes2ornt(axes)  # type: ignore[no-untyped-call]
                layers = [apply_orientation(layer, turn) for layer in layers]  # type: ignore[no-untyped-call]
                spacing = [spacing[axis] for axis in np.argsort(turn[:, 0])] if spacing else ()
            picture = heatmap(layers[0][None], layers[1], title, spacing)
            pictures.append(replace(picture, patient=prepared.rows[index]["patient"]))
        return pictures

    def _heat(self, model: nn.Module) -> Callable[[Tensor], NDArray[np.float32]]:
        """Return a function that maps an image to the parts its likeliest class rests on."""
        from monai.visualize import GradCAM, OcclusionSensitivity

        scores = _Scores(model)
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
            return lambda image: _values(grad_cam(image.clone().requires_grad_())[0, 0])
        parts, windows_at_once = (7, 16) if self.spatial_dims == 2 else (4, 2)

        def occlusion(image: Tensor) -> NDArray[np.float32]:
            best = int(scores(image)[0].argmax())
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
                covered = cover(image)[0][0, best]
            return _values(scores(image)[0, best] - covered)

        return occlusion

    def predict(self, model: nn.Module, prepared: CachedRows) -> NDArray[np.float32]:
        """Return the outputs, (n, 1) or (n, classes); volumes pass one by one, 2D in batches."""
        return self._outputs_and_labels(model, prepared)[0]

    def _outputs_and_labels(
        self, model: nn.Module, prepared: CachedRows
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return outputs, and the labels of the rows if they have some."""
        model.eval()
        size = max(self.settings.batch_size, 64) if self.spatial_dims == 2 else 1
        labels = [torch.zeros(0, dtype=torch.long)]

        def batches() -> Any:
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
        return outputs, torch.cat(labels).numpy().astype(np.int64)


class _CrossEntropy(nn.Module):
    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch."""
        if outputs.shape[1] == 1:
            return nn.functional.binary_cross_entropy_with_logits(
                outputs[:, 0], labels.to(outputs.dtype)
            )
        return nn.functional.cross_entropy(outputs, labels)


class _Scores(nn.Module):
    """Returns the log-odds of each class against the rest, also if the model has one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return (batch, classes)."""
        outputs: Tensor = self.model(images)
        if outputs.shape[1] == 1:
            return torch.cat([-outputs, outputs], dim=1)
        rest = [
            torch.cat([outputs[:, :c], outputs[:, c + 1 :]], dim=1).logsumexp(dim=1)
            for c in range(outputs.shape[1])
        ]
        return outputs - torch.stack(rest, dim=1)


def _values(map: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = map.detach().float().cpu().numpy()
    return values


def _share(outputs: NDArray[np.float32], label: int) -> float:
    """Return the probability that the network assigns to a class."""
    if len(outputs) == 1:
        outputs = np.asarray([0.0, outputs[0]], np.float32)
    shares = np.exp(outputs - outputs.max())
    return float(shares[label] / shares.sum())
