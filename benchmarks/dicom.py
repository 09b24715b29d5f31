"""What becomes of each DICOM file that pydicom's packages bring along, compared with two readers.

The files are those with pixels among the test files in pydicom's wheel and in pydicom-data; nothing
is downloaded. Each is read by `read_dicom`, and if it holds frames that are no slices, frame by
frame as the error says. The values are compared with pydicom's pixels in the units of the modality,
and with those that SimpleITK (GDCM) reads; spacing, position and direction with what pydicom finds
in the header and with SimpleITK's. A file counts as wrong if a value differs from pydicom's, or
where pydicom cannot decode it from SimpleITK's, or if its place differs from the header's.

A line for each file goes to the standard error.

``python benchmarks/dicom.py``
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import data_store
import documented
import numpy as np
import pydicom
import pydicom.data
import SimpleITK
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import pixel_array

from fedmed_flower.errors import InputError
from fedmed_flower.images.dicom import read_dicom

PACKAGES = {
    "pydicom": Path(pydicom.data.__file__).parent / "test_files",
    "pydicom-data": Path(next(iter(data_store.__path__))),
}
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
HEAD = (
    "package",
    "files with pixels",
    "read and equal",
    "frame by frame, and equal",
    "of both, equal to SimpleITK's too",
    "refused",
    "wrong",
)

Array = NDArray[Any]


@dataclass
class Verdict:
    """What became of a file: ``read``, ``frames``, ``refused`` or ``wrong``, and why."""

    name: str
    kind: str
    why: str = ""
    agrees: list[str] = field(default_factory=list)


def main() -> None:
    """Read all files, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    documented.add_options(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    found = {package: list(verdicts(folder)) for package, folder in PACKAGES.items()}
    versions = ("pydicom", "SimpleITK", "pylibjpeg-openjpeg", "pyjpegls", "python-gdcm")
    documented.show("dicom files", HEAD, counts(found), options, versions=versions)
    refused = (v for all_ in found.values() for v in all_ if v.kind in ("refused", "wrong"))
    rows = ((v.name, v.why) for v in refused)
    documented.show("dicom refused", ("file", "why"), rows, options, versions=versions)
    if any(v.kind == "wrong" for all_ in found.values() for v in all_):
        raise SystemExit("some files are read wrong")


def counts(found: dict[str, list[Verdict]]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table of counts."""
    everything = [verdict for verdicts in found.values() for verdict in verdicts]
    for package, some in {**found, "both": everything}.items():
        kinds = Counter(verdict.kind for verdict in some)
        agree = sum("SimpleITK" in verdict.agrees for verdict in some)
        cells = (len(some), kinds["read"], kinds["frames"], agree, kinds["refused"], kinds["wrong"])
        yield package, *map(str, cells)


def verdicts(folder: Path) -> Iterator[Verdict]:
    """Yield what becomes of each file with pixels of a folder."""
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        try:
            part = pydicom.dcmread(file, force=True)
            has_pixels = any(name in part for name in PIXELS)
        except Exception:  # No DICOM file.
            continue
        if has_pixels:
            verdict = judged(file, part)
            agrees = f" (as {' and '.join(verdict.agrees)})" if verdict.agrees else ""
            print(f"{verdict.kind:8} {verdict.name}{agrees} {verdict.why}", file=sys.stderr)
            yield verdict


def judged(file: Path, part: pydicom.Dataset) -> Verdict:
    """Read a file and compare it."""
    count = 1
    try:
        images = [read_dicom(file)]
    except InputError as error:
        why = str(error).replace(str(file), "").lstrip(": ")
        try:
            count = int(part.get("NumberOfFrames") or 1)
            images = [read_dicom(file, number) for number in range(count)]
        except (InputError, ValueError):
            return Verdict(file.name, "refused", why)
        if count == 1:
            return Verdict(file.name, "refused", why)
    values = np.concatenate([image[0] for image in images], axis=3)
    verdict = Verdict(file.name, "frames" if count > 1 else "read")
    references = {"pydicom": by_pydicom, "SimpleITK": by_simpleitk}
    for reader, read in references.items():
        try:
            reference = read(file, part)
        except Exception:  # The reference cannot read it.
            continue
        if same(values, reference, part):
            verdict.agrees.append(reader)
        elif reader == "pydicom" or not verdict.agrees:
            return Verdict(file.name, "wrong", f"its values differ from {reader}'s")
    if not verdict.agrees:
        return Verdict(file.name, "wrong", "no reference reads it")
    if (problem := misplaced(file, part, images[0])) is not None:
        return Verdict(file.name, "wrong", problem)
    return verdict


def same(values: Array, reference: Array, part: pydicom.Dataset) -> bool:
    """Return whether two volumes, (channels, columns, rows, slices), are equal as float32.

    The readers turn MONOCHROME1 about different values, so that only differences can be compared.
    """
    if values.shape != reference.shape:
        return False
    if part.PhotometricInterpretation == "MONOCHROME1":
        return np.allclose(values - values.min(), reference - reference.min(), rtol=1e-5)
    return np.allclose(values, reference, rtol=1e-6, atol=1e-6)


def by_pydicom(file: Path, part: pydicom.Dataset) -> Array:
    """Return the values that pydicom reads, in the units of the modality."""
    if not part.file_meta.get("TransferSyntaxUID"):
        part.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2"
    frames = int(part.get("NumberOfFrames") or 1)
    volume = []
    for number in range(frames):
        pixels = pixel_array(part, index=number)
        if part.PhotometricInterpretation == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, part)
            if part.BitsAllocated == 8 and pixels.max() > 255:
                pixels = pixels >> 8  # As SimpleITK does.
        pixels = apply_modality_lut(pixels, part)
        if "DoseGridScaling" in part:
            pixels = pixels * float(part.DoseGridScaling)
        for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
            for group in part.get(groups, [])[number if groups.startswith("Per") else 0 :][:1]:
                for scale in group.get("PixelValueTransformationSequence", []):
                    pixels = pixels * float(scale.RescaleSlope) + float(scale.RescaleIntercept)
        volume.append(np.asarray(pixels, np.float32))
    values = in_order(np.stack(volume), part)
    if part.PhotometricInterpretation == "MONOCHROME1":
        values = -values
    return values


def by_simpleitk(file: Path, part: pydicom.Dataset) -> Array:
    """Return the values that SimpleITK reads; it does not scale a dose."""
    values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file))).astype(np.float32)
    values = values * float(part.get("DoseGridScaling", 1))
    colours = 3 if values.shape[-1] == 3 and values.ndim > 2 else 0
    side = (part.Rows, part.Columns, *([colours] if colours else []))
    return in_order(values.reshape(-1, *side), part)


def in_order(frames: Array, part: pydicom.Dataset) -> Array:
    """Return frames, (frames, rows, columns, [colours]), as a volume with slices in order."""
    places = [frame.PlanePositionSequence[0].ImagePositionPatient
              for frame in part.get("PerFrameFunctionalGroupsSequence", [])]  # fmt: skip
    if len(places) > 1:
        shared = part.SharedFunctionalGroupsSequence[0]
        directions = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3))
        frames = frames[np.argsort(np.asarray(places, float) @ np.cross(*directions))]
    volume = np.moveaxis(frames, -1, 0) if frames.ndim == 4 else frames[None]
    return volume.transpose(0, 3, 2, 1)


def misplaced(file: Path, part: pydicom.Dataset, image: tuple[Array, Array, bool]) -> str | None:
    """Return how spacing and position of an image differ from the header's or SimpleITK's."""
    _, affine, placed = image
    spacing = np.linalg.norm(affine[:3, :2], axis=0)
    stated = None
    for where in (part, *(part.get("SharedFunctionalGroupsSequence") or [])):
        item = next(iter(where.get("PixelMeasuresSequence", [])), where)
        stated = item.get("PixelSpacing") or item.get("ImagerPixelSpacing") or stated
    expected = [float(stated[1]), float(stated[0])] if stated and min(stated) > 0 else [1.0, 1.0]
    if not np.allclose(spacing, expected, rtol=1e-4):
        return f"its spacing is {spacing}, the header's {expected}"
    if not placed:
        return None
    try:
        reference = SimpleITK.ReadImage(str(file))
    except RuntimeError:
        return None
    matrix = np.reshape(reference.GetDirection(), (3, 3)) * reference.GetSpacing()
    other = np.column_stack([matrix, reference.GetOrigin()]) * [[-1], [-1], [1]]
    if affine[:3, 2] @ other[:, 2] < 0:  # SimpleITK leaves frames in the order of the file.
        other[:, 3] += other[:, 2] * (image[0].shape[3] - 1)
        other[:, 2] *= -1
    # Of a single slice, readers state different distances to the next.
    columns = [0, 1, 2, 3] if image[0].shape[3] > 1 else [0, 1, 3]
    if not np.allclose(affine[:3, columns], other[:, columns], atol=1e-3):
        return f"its affine is {affine[:3].tolist()}, SimpleITK's {other.tolist()}"
    return None


if __name__ == "__main__":
    main()
