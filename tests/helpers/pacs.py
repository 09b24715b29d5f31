"""Writes what PACS export: everyday cases, each with what should become of it.

A case writes the files of one patient into a folder, as many folders deep as it likes, and returns
what must be read of them: voxels (columns, rows, slices) in units of the modality, and the mask.
"""

from dataclasses import dataclass

import numpy as np
import pydicom
from dicom_files import write_image, write_series
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    RTStructureSetStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

SIDES = (12, 10, 8)
SPACING = (0.8, 0.9, 2.5)
ORIGIN = (-20.0, -30.0, 100.0)


@dataclass(frozen=True)
class Expected:
    """What must become of a patient's files."""

    series: str
    voxels: np.ndarray
    mask: np.ndarray | None = None
    part: str = ""


def anatomy(seed):
    """Return stored values and a mask of one structure, a box, (columns, rows, slices)."""
    rng = np.random.default_rng(seed)
    voxels = rng.integers(0, 2000, SIDES).astype(np.int16)
    mask = np.zeros(SIDES, np.uint8)
    mask[3:8, 2:6, 1:4] = 1
    return voxels, mask


def study(patient, modality, **tags):
    """Return the elements that all files of a study have; a scanner writes these and more."""
    shared = {
        "PatientName": f"{patient}^",
        "PatientBirthDate": "19500101",
        "PatientSex": "O",
        "StudyInstanceUID": generate_uid(entropy_srcs=[patient]),
        "StudyDate": "20200101",
        "StudyTime": "120000",
        "StudyID": "1",
        "AccessionNumber": "2",
        "ReferringPhysicianName": "",
        "FrameOfReferenceUID": generate_uid(entropy_srcs=[patient, "frame"]),
        "Modality": modality,
        "Manufacturer": "maker",
        "SliceThickness": SPACING[2],
        "SeriesNumber": 2,
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SOPClassUID": MRImageStorage if modality == "MR" else CTImageStorage,
        "AcquisitionNumber": 1,
        "PositionReferenceIndicator": "",
        "PatientPosition": "HFS",
    }
    return shared | tags


def slices(
    folder, voxels, patient, modality="CT", uid=None, origin=ORIGIN, spacing=SPACING, **tags
):
    """Write a series of one file a slice; return its SeriesInstanceUID and the files."""
    uid = uid or generate_uid()
    more = study(patient, modality, **tags)
    return uid, write_series(folder, voxels, spacing, patient, uid, origin=origin, **more)


# What a mask is written in


def write_seg(path, sources, mask, name):
    """Let highdicom write a mask (columns, rows, slices), as an annotation tool does."""
    import highdicom
    from pydicom.sr.codedict import codes

    # Frames of one file are not always in the order of their positions.
    heights = [height for source in sources for height in _heights(source)]
    planes = np.rint((np.asarray(heights) - ORIGIN[2]) / SPACING[2]).astype(int)
    organ = codes.SCT.Organ
    structure = highdicom.seg.SegmentDescription(1, name, organ, organ, "MANUAL")
    seg = highdicom.seg.Segmentation(
        sources,
        mask.transpose(2, 1, 0)[planes].astype(np.uint8),
        "BINARY",
        [structure],
        generate_uid(),
        9,
        generate_uid(),
        1,
        "maker",
        "model",
        "1",
        "1",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(path)


def _heights(source):
    """Return the height of each frame of a file."""
    groups = source.get("PerFrameFunctionalGroupsSequence")
    if groups is None:
        return [source.ImagePositionPatient[2]]
    return [group.PlanePositionSequence[0].ImagePositionPatient[2] for group in groups]


def write_rtstruct(path, files, mask, name):
    """Write the outline of a box in each slice that it is in, as a planning system does."""
    first = pydicom.dcmread(files[0], stop_before_pixels=True)
    frame = first.FrameOfReferenceUID
    (inside,) = np.nonzero(mask.any(axis=(0, 1)))
    columns, rows = (np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2)))
    # Half a voxel around the outermost centres, less a little.
    across = ORIGIN[0] + SPACING[0] * np.array([columns[0] - 0.4, columns[-1] + 0.4])
    down = ORIGIN[1] + SPACING[1] * np.array([rows[0] - 0.4, rows[-1] + 0.4])
    contours = []
    for number in inside:
        height = ORIGIN[2] + SPACING[2] * number
        corners = [(across[i], down[j], height) for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))]
        contours.append(
            item(
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=4,
                ContourData=[f"{value:.8g}" for corner in corners for value in corner],
            )
        )
    drawn = item(RTReferencedSeriesSequence=[item(SeriesInstanceUID=first.SeriesInstanceUID)])
    write_object(
        path,
        RTStructureSetStorage,
        **_study_of(first),
        FrameOfReferenceUID=frame,
        ReferencedFrameOfReferenceSequence=[
            item(FrameOfReferenceUID=frame, RTReferencedStudySequence=[drawn])
        ],
        StructureSetROISequence=[
            item(ROINumber=1, ROIName=name, ReferencedFrameOfReferenceUID=frame)
        ],
        ROIContourSequence=[item(ReferencedROINumber=1, ContourSequence=contours)],
    )


def write_nifti(path, files, mask):
    """Write a mask as another tool does: NIfTI whose axes lead right, anterior, superior."""
    import nibabel

    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = ORIGIN
    affine[:2] *= -1
    image = nibabel.Nifti1Image(mask, affine)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.as_closest_canonical(image), path)


# Cases


def compressed_ct(folder, patient):
    """Slices in JPEG lossless, beside a report, a dose screen and a scout; an RTSTRUCT."""
    voxels, mask = anatomy(1)
    uid, files = slices(folder / "SE02", voxels, patient, SeriesDescription="Thorax 2.5")
    write_rtstruct(folder / "RS1.dcm", files, mask, "Tumour")
    for file in files:
        compress(file)
    write_scout(folder / "SE01", patient)
    write_report(folder / "SE02" / "report.dcm", files[0])
    screen = study(patient, "CT", ImageType=["DERIVED", "SECONDARY", "OTHER"], SeriesNumber=501)
    screen |= {"SOPClassUID": SecondaryCaptureImageStorage, "SeriesDescription": "Patient Protocol"}
    write_image(folder / "SE501" / "1.dcm", np.zeros((8, 8), np.uint8), patient, **screen)
    return Expected(uid, voxels, mask)


def enhanced(folder, patient, modality):
    """One file of many frames, and a SEG that was drawn on it."""
    import highdicom

    voxels, mask = anatomy(2)
    with_exposure = {"KVP": 120} if modality == "CT" else {"MagneticFieldStrength": 1.5}
    _, files = slices(folder / "single", voxels, patient, modality, **with_exposure)
    kinds = {
        "CT": highdicom.legacy.LegacyConvertedEnhancedCTImage,
        "MR": highdicom.legacy.LegacyConvertedEnhancedMRImage,
    }
    uid = generate_uid()
    parts = [pydicom.dcmread(file) for file in files]
    whole = kinds[modality](parts, uid, 3, generate_uid(), 1)
    for file in files:
        file.unlink()
    (folder / "single").rmdir()
    whole.save_as(folder / "IM1")
    write_seg(folder / "IM2", [pydicom.dcmread(folder / "IM1")], mask, "tumour")
    return Expected(uid, voxels, mask)


def thick_and_thin(folder, patient):
    """Two reconstructions in one folder; the SEG was drawn on the second."""
    voxels, mask = anatomy(3)
    thick = {"spacing": (*SPACING[:2], 2 * SPACING[2]), "SeriesDescription": "Abdomen 5.0"}
    slices(folder / "a", voxels[:, :, ::2], patient, SeriesNumber=3, **thick)
    uid, files = slices(folder / "b", voxels, patient, SeriesDescription="Abdomen 2.5")
    write_seg(folder / "seg.dcm", [pydicom.dcmread(file) for file in files], mask, "Tumour")
    return Expected(uid, voxels, mask)


def cine(folder, patient):
    """A heart at three times of its beat: three stacks in one series."""
    voxels, _ = anatomy(4)
    uid = generate_uid()
    for phase in range(3):
        for number, position in enumerate(np.arange(SIDES[2])):
            name = folder / f"IM{3 * number + phase:03}"
            origin = np.add(ORIGIN, (0, 0, position * SPACING[2]))
            tags = {"TriggerTime": 30.0 * phase, "InstanceNumber": 3 * number + phase + 1}
            _, (file,) = slices(
                name.with_suffix(".tmp"),
                voxels[:, :, number : number + 1] + phase,
                patient,
                "MR",
                uid,
                origin=origin,
                SeriesDescription="cine SA",
                **tags,
            )
            file.rename(name)
            file.parent.rmdir()
    return Expected(uid, voxels + 1, part="phase 2")


def diffusion(folder, patient):
    """Two b-values in one series, beside a T2 of another grid."""
    voxels, _ = anatomy(5)
    uid = generate_uid()
    for b in (0, 1000):
        slices(
            folder / f"b{b}",
            voxels - b // 10,
            patient,
            "MR",
            uid,
            SeriesDescription="ep2d_diff",
            DiffusionBValue=float(b),
        )
    t2 = anatomy(6)[0][:8, :6, :5]
    grid = {"spacing": (1.0, 1.2, 3.0), "origin": np.add(ORIGIN, 0.5)}
    slices(folder / "t2", t2, patient, "MR", SeriesDescription="t2 tse", SeriesNumber=4, **grid)
    return Expected(uid, voxels - 100, part="b=1000")


def drawn_elsewhere(folder, patient):
    """Slices whose mask was drawn in another tool, in other axes."""
    voxels, mask = anatomy(7)
    uid, files = slices(folder / "ct", voxels, patient)
    write_nifti(folder / "mask.nii.gz", files, mask)
    return Expected(uid, voxels, mask)


def by_another_tool(folder, patient, ending):
    """An image and a mask as NRRD or MetaImage."""
    import SimpleITK

    voxels, mask = anatomy(8)
    for name, values in (("image", voxels), ("mask", mask)):
        image = SimpleITK.GetImageFromArray(values.transpose(2, 1, 0))
        image.SetSpacing(SPACING)
        image.SetOrigin(ORIGIN)
        folder.mkdir(parents=True, exist_ok=True)
        SimpleITK.WriteImage(image, folder / f"{name}{ending}")
    return Expected("", voxels, mask)


# Parts of cases


def write_scout(folder, patient):
    """Write the localizer of a CT: one slice with a position."""
    types = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "SeriesNumber": 1}
    slices(folder, np.zeros((9, 9, 1)), patient, SeriesDescription="Scout", **types)


def write_report(path, image):
    """Write a structured report of an image's patient."""
    header = pydicom.dcmread(image, stop_before_pixels=True)
    write_object(path, BasicTextSRStorage, Modality="SR", **_study_of(header))


def _study_of(header):
    return {name: header.get(name) for name in ("PatientID", "StudyInstanceUID")}


def compress(file):
    """Write a file again with its pixels in JPEG lossless, by gdcm."""
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(file))
    changer = gdcm.ImageChangeTransferSyntax()
    changer.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    read = reader.Read()
    changer.SetInput(reader.GetImage())
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    if not (read and changer.Change()):
        raise ValueError(f"gdcm cannot compress {file}")
    writer.SetImage(changer.GetOutput())
    writer.SetFileName(str(file))
    if not writer.Write():
        raise ValueError(f"gdcm cannot write {file}")


def flatten(folder):
    """Move all files of a folder into it, under numbers without a suffix, as many exports do."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number, file in enumerate(files):
        file.rename(folder / f"I{number:07}")
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        path.rmdir()


def item(**tags):
    """Return an item of a sequence."""
    part = Dataset()
    for name, value in tags.items():
        setattr(part, name, value)
    return part


def write_object(path, kind, **tags):
    """Write a DICOM object without pixels, such as a report, and return its path."""
    identity = {"SOPClassUID": kind, "SOPInstanceUID": generate_uid()}
    part = item(**identity, **{"PatientID": "p1", "SeriesInstanceUID": generate_uid(), **tags})
    part.file_meta = FileMetaDataset()
    part.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    part.file_meta.MediaStorageSOPClassUID = kind
    part.file_meta.MediaStorageSOPInstanceUID = part.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    part.save_as(path, enforce_file_format=True)
    return path
