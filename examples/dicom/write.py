"""Write DICOM series of generated CT for some hospitals: python write.py FOLDER NAME [NAME ...]

Each hospital scans its own way: slices of another thickness, axial, coronal or sagittal. A scout
lies beside each volume, as scanners write it. Half of the patients have a lesion, which
``labels.csv`` says.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy.ndimage import gaussian_filter, zoom

# Directions of a slice's rows and columns in the patient (left, posterior, superior).
PLANES = {
    "axial": ([1, 0, 0], [0, 1, 0]),
    "coronal": ([1, 0, 0], [0, 0, -1]),
    "sagittal": ([0, 1, 0], [0, 0, -1]),
}
SIDE = 24


def draw(rng, lesion):
    """Return a cube of Hounsfield units with 3 mm voxels: air, a body, organs, perhaps a lesion."""
    at = np.stack(np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 3, indexing="ij"))
    body = np.hypot(at[0] / 0.9, at[1] / 0.75) < 1
    organs = 120 * gaussian_filter(rng.normal(size=(SIDE,) * 3), 2)
    units = np.where(body, 40.0, -1000.0) + organs
    if lesion:
        place = rng.uniform(-0.4, 0.4, 3)[:, None, None, None]
        units += 90 * np.exp(-((at - place) ** 2).sum(axis=0) / (2 * 0.16**2))
    return units + rng.normal(0, 12, units.shape)


def slices(units, plane, thickness):
    """Cut a cube (x, y, z) into slices (rows, columns) and say where the first voxel of each is."""
    along = {"axial": 2, "coronal": 1, "sagittal": 0}[plane]
    factors = [1.0, 1.0, 1.0]
    factors[along] = 3.0 / thickness
    resampled = zoom(units, factors, order=1)
    for number in range(resampled.shape[along]):
        cut = np.take(resampled, number, axis=along)
        place = np.zeros(3)
        place[along] = number * thickness
        if plane != "axial":
            # Rows go from the head down.
            place[2], cut = 3.0 * (SIDE - 1), cut[:, ::-1]
        yield cut.T, place


def write_patient(folder, patient, units, plane, thickness):
    folder.mkdir(parents=True)
    study = {
        "PatientID": patient,
        "StudyInstanceUID": generate_uid(),
        "FrameOfReferenceUID": generate_uid(),
    }
    middle = list(slices(units, "coronal", 3.0))[SIDE // 2]
    scout = {
        "SeriesNumber": 1,
        "SeriesDescription": "Scout",
        "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"],
    }
    write_series(folder / "scout", [middle], "coronal", 3.0, study | scout)
    volume = {
        "SeriesNumber": 2,
        "SeriesDescription": f"Body {thickness} {plane}",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    }
    write_series(folder, slices(units, plane, thickness), plane, thickness, study | volume)


def write_series(folder, cuts, plane, thickness, shared):
    folder.mkdir(exist_ok=True)
    series = generate_uid()
    row, column = PLANES[plane]
    for number, (cut, place) in enumerate(cuts, start=1):
        part = Dataset()
        part.file_meta = FileMetaDataset()
        part.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        part.file_meta.MediaStorageSOPClassUID = part.SOPClassUID = CTImageStorage
        part.file_meta.MediaStorageSOPInstanceUID = part.SOPInstanceUID = generate_uid()
        part.SeriesInstanceUID, part.Modality, part.InstanceNumber = series, "CT", number
        for name, value in shared.items():
            setattr(part, name, value)
        part.ImageOrientationPatient = [*row, *column]
        part.ImagePositionPatient = [float(value) for value in place]
        part.PixelSpacing, part.SliceThickness = [3.0, 3.0], thickness
        part.Rows, part.Columns = cut.shape
        part.SamplesPerPixel, part.PhotometricInterpretation = 1, "MONOCHROME2"
        part.BitsAllocated, part.BitsStored, part.HighBit, part.PixelRepresentation = 16, 16, 15, 0
        part.RescaleSlope, part.RescaleIntercept = 1, -1024
        stored = np.clip(np.rint(cut + 1024), 0, 4095).astype(np.uint16)
        part.PixelData = np.ascontiguousarray(stored).tobytes()
        part.save_as(folder / f"slice-{number:03}.dcm", enforce_file_format=True)


def write_hospital(folder, seed, patients):
    plane = list(PLANES)[seed % 3]
    thickness = [3.0, 4.5, 2.0][seed % 3]
    rng = np.random.default_rng([seed, 9])
    folder.mkdir(parents=True)
    (folder / "GENERATED").touch()
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["patient", "label"])
        for number in range(patients):
            patient, lesion = f"{folder.name}-{number:03}", number % 2
            write_patient(folder / patient, patient, draw(rng, lesion), plane, thickness)
            table.writerow([patient, lesion])
    print(f"{folder}: {patients} patients, {plane}, slices of {thickness} mm")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--patients", type=int, default=40)
    options = parser.parse_args()
    for seed, name in enumerate(options.names):
        write_hospital(options.folder / name, seed, options.patients)
