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
    RTStructureSetStorage,
    SegmentationStorage,
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


# What an archive's files state besides, without which highdicom writes no mask of them.
STUDY = {
    "PatientName": "Doe^Jo",
    "PatientBirthDate": "19500101",
    "PatientSex": "O",
    "StudyInstanceUID": generate_uid(),
    "StudyDate": "20200101",
    "StudyTime": "120000",
    "StudyID": "1",
    "AccessionNumber": "2",
    "ReferringPhysicianName": "",
    "FrameOfReferenceUID": generate_uid(),
    "Modality": "CT",
    "SliceThickness": 3.0,
}


def write_highdicom(path, sources, masks, names, kind="BINARY", **options):
    """Let highdicom write masks of single-frame files.

    Parameters
    ----------
    masks : array
        (slices, rows, columns, structures), bool, or floats in [0, 1] for ``kind="FRACTIONAL"``.
    """
    import highdicom
    import pydicom
    from pydicom.sr.codedict import codes

    descriptions = [
        highdicom.seg.SegmentDescription(number, name, codes.SCT.Organ, codes.SCT.Organ, "MANUAL")
        for number, name in enumerate(names, start=1)
    ]
    seg = highdicom.seg.Segmentation(
        [pydicom.dcmread(file) for file in sources],
        masks if kind == "FRACTIONAL" else np.asarray(masks, np.uint8),
        kind,
        descriptions,
        generate_uid(),
        9,
        generate_uid(),
        1,
        "maker",
        "model",
        "1",
        "1",
        **options,
    )
    seg.save_as(path)
    return Path(path)


def write_seg(
    path,
    segments,
    frames,
    orientation=AXIAL,
    spacing=(1.0, 1.0),
    between=1.0,
    frame_of_reference=STUDY["FrameOfReferenceUID"],
    kind="BINARY",
    kind_uid=SegmentationStorage,
    **tags,
):
    """Write a DICOM SEG by hand.

    Parameters
    ----------
    segments : sequence of dict
        Elements of each; ``meaning`` and ``modifier`` are those of its code.
    frames : sequence of tuple
        Number of the segment, ImagePositionPatient or None, pixels (rows, columns).
    spacing : tuple
        Between rows and columns.
    """
    part = Dataset()
    part.file_meta = FileMetaDataset()
    part.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    part.file_meta.MediaStorageSOPClassUID = part.SOPClassUID = kind_uid
    part.file_meta.MediaStorageSOPInstanceUID = part.SOPInstanceUID = generate_uid()
    part.SeriesInstanceUID = generate_uid()
    part.PatientID = "p1"
    if frame_of_reference:
        part.FrameOfReferenceUID = frame_of_reference
    part.SegmentationType = kind
    part.SegmentSequence = [_segment(number, one) for number, one in enumerate(segments, start=1)]
    shared = Dataset()
    if frames[0][1] is not None:
        shared.PlaneOrientationSequence = [Dataset()]
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = list(map(float, orientation))
        shared.PixelMeasuresSequence = [Dataset()]
        shared.PixelMeasuresSequence[0].PixelSpacing = list(map(float, spacing))
        shared.PixelMeasuresSequence[0].SliceThickness = float(between)
    part.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for number, position, _ in frames:
        own = Dataset()
        own.SegmentIdentificationSequence = [Dataset()]
        own.SegmentIdentificationSequence[0].ReferencedSegmentNumber = number
        if position is not None:
            own.PlanePositionSequence = [Dataset()]
            own.PlanePositionSequence[0].ImagePositionPatient = [float(v) for v in position]
        groups.append(own)
    part.PerFrameFunctionalGroupsSequence = groups
    pixels = np.stack([np.asarray(pixels, np.uint8) for _, _, pixels in frames])
    bits = 1 if kind == "BINARY" else 8
    content = np.packbits(pixels.ravel(), bitorder="little") if bits == 1 else pixels
    part.Rows, part.Columns = pixels.shape[1:]
    part.NumberOfFrames = len(frames)
    part.SamplesPerPixel = 1
    part.PhotometricInterpretation = "MONOCHROME2"
    part.BitsAllocated = part.BitsStored = bits
    part.HighBit = bits - 1
    part.PixelRepresentation = 0
    part.PixelData = content.tobytes() + b"\0" * (content.size % 2)
    part["PixelData"].VR = "OB"
    for name, value in tags.items():
        setattr(part, name, value)
    part.save_as(path, enforce_file_format=True)
    return Path(path)


def _segment(number, elements):
    item = Dataset()
    item.SegmentNumber = number
    for name, value in elements.items():
        if name not in ("meaning", "modifier"):
            setattr(item, name, value)
    if meaning := elements.get("meaning"):
        item.SegmentedPropertyTypeCodeSequence = [_code(meaning)]
        if side := elements.get("modifier"):
            code = item.SegmentedPropertyTypeCodeSequence[0]
            code.SegmentedPropertyTypeModifierCodeSequence = [_code(side)]
    return item


def _code(meaning):
    code = Dataset()
    code.CodeValue = "1"
    code.CodingSchemeDesignator = "99TEST"
    code.CodeMeaning = meaning
    return code


def write_rtstruct(path, regions, frame_of_reference=STUDY["FrameOfReferenceUID"]):
    """Write outlines.

    Parameters
    ----------
    regions : dict
        By name, a list of contours: points (n, 3) in DICOM's millimetres, or pairs of type and
        points.
    """
    part = Dataset()
    part.file_meta = FileMetaDataset()
    part.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    part.file_meta.MediaStorageSOPClassUID = part.SOPClassUID = RTStructureSetStorage
    part.file_meta.MediaStorageSOPInstanceUID = part.SOPInstanceUID = generate_uid()
    part.SeriesInstanceUID = generate_uid()
    part.PatientID = "p1"
    part.StructureSetROISequence = []
    part.ROIContourSequence = []
    for number, (name, contours) in enumerate(regions.items(), start=1):
        item = Dataset()
        item.ROINumber = number
        item.ROIName = name
        if frame_of_reference:
            item.ReferencedFrameOfReferenceUID = frame_of_reference
        part.StructureSetROISequence.append(item)
        region = Dataset()
        region.ReferencedROINumber = number
        region.ContourSequence = []
        for contour in contours:
            kind, points = contour if isinstance(contour, tuple) else ("CLOSED_PLANAR", contour)
            one = Dataset()
            one.ContourGeometricType = kind
            one.NumberOfContourPoints = len(points)
            one.ContourData = [f"{float(v):.10g}" for v in np.ravel(points)]
            region.ContourSequence.append(one)
        part.ROIContourSequence.append(region)
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
