"""Volumes of the Medical Segmentation Decathlon.

M. Antonelli et al., "The Medical Segmentation Decathlon", Nature Communications 13:4128, 2022,
http://medicaldecathlon.com, CC BY-SA 4.0. Address and checksum are those that MONAI has.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from pathlib import Path

from monai.apps import DecathlonDataset

from fedmed_flower.data.download import PublicFile, Volumes, obtain
from fedmed_flower.data.site import Row
from fedmed_flower.errors import InputError

_TASK = "Task04_Hippocampus"
_TITLE = "Hippocampus (Medical Segmentation Decathlon, Task04)"


def load_hippocampus(timeout: float = 30) -> Volumes:
    """Return the training volumes: MR crops of about 35 x 50 x 36 mm around one hippocampus.

    Masks hold 1 for the anterior part (head) and 2 for the posterior part (body and tail). A local
    copy is used first: ``hippocampus`` or ``Task04_Hippocampus``, with ``imagesTr`` and
    ``labelsTr``, in the folder that the environment variable ``FEDMED_DATA`` names. Otherwise the
    archive (28 MB) is downloaded once, its checksum enforced, and unpacked into the folder
    ``FEDMED_CACHE``.

    The set names no patients. Each volume counts as a patient, though some volumes are the two
    sides of one brain.

    Parameters
    ----------
    timeout : float
        Seconds to wait for the first data and then for more, greater than 0.

    Raises
    ------
    InputError
        If the folder lacks images or masks, or the archive has a wrong checksum or cannot be
        unpacked.
    SourceUnavailable
        If the publisher cannot be reached.
    """
    if named := os.environ.get("FEDMED_DATA"):
        for name in ("hippocampus", _TASK):
            folder = Path(named).expanduser() / name
            if (folder / "imagesTr").is_dir():
                return Volumes(_pairs(folder), f"{_TITLE}, local copy")
    address = DecathlonDataset.resource[_TASK]
    md5 = DecathlonDataset.md5[_TASK]
    file = PublicFile(_TITLE, Path(f"hippocampus/{_TASK}.tar"), address, md5)
    archive = obtain(file, timeout, ', or choose dataset="phantoms"')
    unpacked = archive.path.with_name(f"{archive.path.name}-unpacked")
    if not unpacked.is_dir():
        _unpack(archive.path, unpacked)
    return Volumes(_pairs(unpacked / _TASK), f"{_TITLE}, {archive.origin}")


def _pairs(folder: Path) -> tuple[Row, ...]:
    rows = []
    for image in sorted((folder / "imagesTr").glob("[!.]*.nii.gz")):
        label = folder / "labelsTr" / image.name
        if not label.is_file():
            raise InputError(f"{image} has no mask: {label} is not there")
        patient = image.name.removesuffix(".nii.gz")
        rows.append({"image": str(image), "label": str(label), "patient": patient})
    if not rows:
        raise InputError(f"{folder / 'imagesTr'} holds no .nii.gz files")
    return tuple(rows)


def _unpack(archive: Path, target: Path) -> None:
    """Unpack an archive; on an error no part of the folder remains."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as draft:
            # "r:" refuses compression, so the content is no larger than the archive.
            with tarfile.open(archive, "r:") as content:
                content.extractall(Path(draft) / "content", filter="data")
            # tarfile takes a damaged block for the end; the true end is marked by empty blocks.
            if archive.read_bytes()[-1024:].strip(b"\0"):
                raise EOFError("it is cut short")
            (Path(draft) / "content").rename(target)
    except (tarfile.TarError, OSError, EOFError) as error:
        # Another process, such as that of another simulated site, may have unpacked it meanwhile.
        if not target.is_dir():
            raise InputError(f"{archive} cannot be unpacked: {error}") from error
