"""Predicted masks as DICOM segmentations, which archives and viewers show over their series."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from monai.data import MetaTensor
from numpy.typing import NDArray
from pydicom.uid import generate_uid
from torch import nn

from fedmed_flower.errors import InputError
from fedmed_flower.images.geometry import FILE_AFFINE
from fedmed_flower.images.headers import dicom_files, is_dicom, is_placed, one_line, open_dicom

# Codes of our own, since classes are named freely: schemes that begin with 99 are private.
_SCHEME = "99FEDMED"
_MOST_LETTERS = 64  # Of a segment's label.
_SERIES_NUMBER = 9000
# How far a slice may lie from its plane of the mask, as a part of the distance of two.
_NEAR = 0.4
# A series must state these, if only as empty; files without names of patients often lack some.
_STATED = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)

Array = NDArray[Any]


class SegmentationWriter:
    """Writes the masks of one model as DICOM SEG.

    Parameters
    ----------
    classes : sequence of str
        Names of the classes 1, 2, ..., or of regions.
    model : str
        The name of the client, which stands as the algorithm.
    network : nn.Module
        A digest of its weights stands as the serial number of the device.

    Raises
    ------
    InputError
        If highdicom is not installed, or a class has a name that a segment cannot have.
    """

    def __init__(self, classes: Sequence[str], model: str, network: nn.Module) -> None:
        if importlib.util.find_spec("highdicom") is None:
            raise InputError("--seg needs highdicom: pip install 'fedmed-flower[imaging]'")
        for name in classes:
            if not 0 < len(name) <= _MOST_LETTERS or "\\" in name:
                raise InputError(
                    f"--seg needs classes of 1 to {_MOST_LETTERS} letters without a backslash, got "
                    f"{name!r}"
                )
        self._classes = classes
        self._model = model
        self._version = version("fedmed-flower")
        self._digest = _digest(network)

    def content(self, mask: NDArray[np.uint8], image: MetaTensor, source: Path) -> bytes:
        """Return a file that references the images of its series.

        Parameters
        ----------
        mask : ndarray
            Class numbers: (columns, rows, slices) as `read_dicom` orders them, or (rows, columns)
            of one slice or an X-ray. Or 0 and 1 of one segment each, which may overlap, with the
            segments as the first axis.
        image : MetaTensor
            What `read_image` returned for the source.
        source : Path
            The DICOM file, or the folder with the files of the series.

        Raises
        ------
        InputError
            If the source is not DICOM, or lacks what a SEG must reference.
        """
        if not is_dicom(source):
            raise InputError(f"no SEG is written, since {source} is not DICOM")
        files = dicom_files(source) if source.is_dir() else [source]
        headers = [open_dicom(file, stop_before_pixels=True) for file in files]
        # highdicom takes (planes, rows, columns), and segments that may overlap as a last axis.
        last = [0] if mask.ndim == image.ndim else []
        within = [axis for axis in range(mask.ndim) if axis not in last]
        is_volume = len(within) == 3
        planes = mask.transpose([*(within[::-1] if is_volume else within), *last])
        planes = planes if is_volume else planes[None]
        options: dict[str, Any] = {}
        if int(headers[0].get("NumberOfFrames") or 1) > 1:
            options = _places(_affine_of(image), len(planes))
        elif len(headers) > 1:
            headers = _in_order(headers, _affine_of(image), len(planes), source)
        if is_volume and not options and len(headers) != len(planes):
            raise InputError(
                f"no SEG is written: {source} has {len(headers)} slices, the mask {len(planes)}"
            )
        for header in headers:
            for name in _STATED:
                if name not in header:
                    setattr(header, name, None)
        try:
            return self._file(headers, planes, options)
        except Exception as error:  # highdicom asks for what a header lacks in many ways.
            raise InputError(f"no SEG is written: {source}: {one_line(error)}") from error

    def _file(
        self, headers: list[pydicom.Dataset], planes: NDArray[np.uint8], options: dict[str, Any]
    ) -> bytes:
        from highdicom.seg import Segmentation

        with warnings.catch_warnings():
            # Of names of patients that are not written as the standard asks.
            warnings.simplefilter("ignore")
            part = Segmentation(
                headers,
                np.ascontiguousarray(planes),
                "BINARY",
                self._descriptions(),
                series_instance_uid=generate_uid(),
                series_number=_SERIES_NUMBER,
                sop_instance_uid=generate_uid(),
                instance_number=1,
                manufacturer="fedmed_flower",
                manufacturer_model_name=self._model[:_MOST_LETTERS],
                software_versions=self._version,
                device_serial_number=self._digest,
                content_label="PREDICTION",
                content_description="research, not for diagnosis",
                series_description=f"{self._model[:32]}, not for diagnosis",
                specific_character_set="ISO_IR 192",
                # highdicom keeps one frame if there are none, with a warning.
                omit_empty_frames=bool(planes.any()),
                **options,
            )
            file = io.BytesIO()
            part.save_as(file)
        return file.getvalue()

    def _descriptions(self) -> list[Any]:
        from highdicom import AlgorithmIdentificationSequence
        from highdicom.seg import SegmentDescription
        from pydicom.sr.codedict import codes
        from pydicom.sr.coding import Code

        algorithm = AlgorithmIdentificationSequence(
            name=self._model[:_MOST_LETTERS],
            family=codes.DCM.ArtificialIntelligence,
            version=self._version,
        )
        return [
            SegmentDescription(
                segment_number=number,
                segment_label=name,
                segmented_property_category=Code("structure", _SCHEME, "Structure"),
                segmented_property_type=Code(str(number), _SCHEME, name),
                algorithm_type="AUTOMATIC",
                algorithm_identification=algorithm,
                tracking_uid=generate_uid(),
                tracking_id=name,
            )
            for number, name in enumerate(self._classes, start=1)
        ]


def _affine_of(image: MetaTensor) -> Array:
    return np.asarray(image.meta.get(FILE_AFFINE, image.affine), float)


def _in_order(
    headers: list[pydicom.Dataset], affine: Array, count: int, source: Path
) -> list[pydicom.Dataset]:
    """Return the images of the planes of a mask in their order.

    Raises
    ------
    InputError
        If a plane has no image, or two.
    """
    by_plane: dict[int, pydicom.Dataset] = {}
    for header in headers:
        corner = np.asarray(header.ImagePositionPatient, float) if is_placed(header) else None
        if corner is None:
            continue
        index = np.linalg.solve(affine[:3, :3], corner * (-1, -1, 1) - affine[:3, 3])[2]
        if abs(index - round(index)) <= _NEAR and 0 <= round(index) < count:
            by_plane.setdefault(round(index), header)
    if len(by_plane) < count:
        raise InputError(
            f"no SEG is written: {source} has images of {len(by_plane)} of the {count} planes of "
            "the mask"
        )
    return [by_plane[plane] for plane in range(count)]


def _places(affine: Array, count: int) -> dict[str, Any]:
    """Return where the planes of a mask lie, for a source of several frames."""
    from highdicom import PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence

    turned = affine.copy()
    turned[:2] *= -1
    steps = turned[:3, :3]
    between_columns, between_rows, between_slices = np.linalg.norm(steps, axis=0)
    directions = [*(steps[:, 0] / between_columns), *(steps[:, 1] / between_rows)]
    return {
        "plane_positions": [
            PlanePositionSequence("PATIENT", (turned[:3, 3] + place * steps[:, 2]).tolist())
            for place in range(count)
        ],
        "plane_orientation": PlaneOrientationSequence("PATIENT", [float(v) for v in directions]),
        "pixel_measures": PixelMeasuresSequence(
            [float(between_rows), float(between_columns)],
            float(between_slices),
            float(between_slices),
        ),
    }


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]
