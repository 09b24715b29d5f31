"""Writes DICOM files as a hospital's archive gives them out: X-rays and series of slices."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)

AXIAL = (1, 0, 0, 0, 1, 0)
SAGITTAL = (0, 1, 0, 0, 0, -1)


def write_series(
    folder,
    voxels,
    spacing=(1.0, 1.0, 1.0),
    patient="p1",
    series_uid=None,
    slope=1.0,
    intercept=0.0,
    orientation=AXIAL,
    origin=(0.0, 0.0, 0.0),
    seed=None,
    **tags,
):
    """Write one file a slice and return the files in the order of their place.

    Parameters
    ----------
    voxels : array
        (x, y, z) stored values, int16, before slope and intercept: x is the column, y the row.
    spacing : tuple
        Between columns, rows and slices in mm.
    orientation, origin : tuple
        ImageOrientationPatient, and ImagePositionPatient of the first slice (left, posterior,
        superior); the slices follow the cross product of the two directions.
    seed : int, optional
        Shuffles names and instance numbers.
    tags
        Further elements of each slice, such as ``Modality="MR"``; None leaves one out.
    """
    voxels = np.asarray(voxels, np.int16)
    count = voxels.shape[2]
    numbers = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    step = np.cross(orientation[:3], orientation[3:]) * spacing[2]
    shared = {
        "SeriesInstanceUID": series_uid or generate_uid(),
        "PixelSpacing": [spacing[1], spacing[0]],
        "ImageOrientationPatient": list(map(float, orientation)),
        "RescaleSlope": slope,
        "RescaleIntercept": intercept,
    }
    files = []
    for place, number in enumerate(numbers):
        files.append(Path(folder) / f"IM{number + 1:04d}.dcm")
        own = {
            "InstanceNumber": int(number) + 1,
            "ImagePositionPatient": [float(v) for v in np.asarray(origin) + place * step],
        }
        write_image(
            files[-1], voxels[:, :, place].T, patient, CTImageStorage, **shared | own | tags
        )
    return files


def write_image(path, pixels, patient="p1", kind=DigitalXRayImageStorageForPresentation, **tags):
    """Write one DICOM file of (rows, columns) or (rows, columns, 3) pixels and return its path."""
    pixels = np.asarray(pixels)
    part = Dataset()
    part.file_meta = FileMetaDataset()
    part.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    part.file_meta.MediaStorageSOPClassUID = part.SOPClassUID = kind
    part.file_meta.MediaStorageSOPInstanceUID = part.SOPInstanceUID = generate_uid()
    grey = tags.pop("PhotometricInterpretation", "MONOCHROME2")
    part.set_pixel_data(pixels, grey if pixels.ndim == 2 else "RGB", pixels.dtype.itemsize * 8)
    defaults = {"PatientID": patient, "SeriesInstanceUID": generate_uid(), "InstanceNumber": 1}
    for name, value in (defaults | tags).items():
        if value is not None:
            setattr(part, name, value)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    part.save_as(path, enforce_file_format=True)
    return Path(path)


def write_enhanced(path, frames, groups, shared=None, kind=EnhancedMRImageStorage, **tags):
    """Write a file of many frames, with functional groups, and return its path.

    Parameters
    ----------
    frames : array
        (frames, rows, columns) stored values.
    groups : sequence of dict
        For each frame, its functional groups: the keyword of a group, and its elements as a dict.
        An element that is a dict is a sequence of one item.
    shared : dict, optional
        Those of all frames; by default axial, with a spacing of 0.5 and 0.7 mm.
    tags
        Further elements at the top level; None leaves one out.
    """
    frames = np.asarray(frames)
    write_image(path, frames[0], kind=kind, **tags)
    part = pydicom.dcmread(path)
    part.set_pixel_data(frames, "MONOCHROME2", tags.get("BitsStored", 8 * frames.itemsize))
    part.NumberOfFrames = len(frames)
    part.FrameOfReferenceUID = generate_uid()
    default = {
        "PixelMeasuresSequence": {"PixelSpacing": [0.5, 0.7], "SliceThickness": 1.0},
        "PlaneOrientationSequence": {"ImageOrientationPatient": list(map(float, AXIAL))},
    }
    part.SharedFunctionalGroupsSequence = [_item(default if shared is None else shared)]
    part.PerFrameFunctionalGroupsSequence = [_item(own) for own in groups]
    part.save_as(path)
    return Path(path)


def at(*position, **groups):
    """Return the functional groups of a frame at a position, with further ones."""
    return {"PlanePositionSequence": {"ImagePositionPatient": list(map(float, position))}, **groups}


def _item(elements):
    item = Dataset()
    for name, value in elements.items():
        setattr(item, name, [_item(value)] if isinstance(value, dict) else value)
    return item
