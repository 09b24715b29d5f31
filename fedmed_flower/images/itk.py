"""NRRD and MetaImage files: .nrrd, .nhdr, .mha and .mhd, by SimpleITK.

SimpleITK reads both headers, and the voxels of NRRD. The voxels of MetaImage are read here: if they
cannot be unpacked, or are fewer than the header says, it returns whatever its memory held before.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.bounded import real_path, require_within, unpacked
from fedmed_flower.errors import InputError, shown
from fedmed_flower.images.volumes import taken

ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
_MOST_HEADER = 1 << 20
_PART = 1 << 16
_NUMBERS = [f"{kind}{bits}" for kind in ("UInt", "Int") for bits in (8, 16, 32, 64)]
_NUMBERS += ["Float32", "Float64"]
_FIELD = re.compile(rb"[ \t]*(\w+)[ \t]*[=:][ \t]*(.*?)[ \t\r]*")
_OTHER_FILE = re.compile(rb"\s*data\s*file", re.IGNORECASE)
_GZIP = re.compile(rb"encoding: *(gz|gzip)\s*", re.IGNORECASE)
# Fields of MetaImage that change what the voxels mean, with the values that do not.
_USUAL = {
    b"BinaryData": (b"True", b"true", b"1"),
    b"HeaderSize": (b"0",),
    b"ElementToIntensityFunctionSlope": (b"1", b"1.0"),
    b"ElementToIntensityFunctionOffset": (b"0", b"0.0"),
}

Array = NDArray[Any]


def read_itk(path: Path, frames: int | str | None = None) -> tuple[Array, Array]:
    """Return the values of an NRRD or MetaImage file, (channels, *spatial), and its affine.

    The numbers of a voxel are channels. A fourth axis, and the numbers of a voxel that an NRRD file
    calls a list, a time or the gradients of diffusion, may be channels or not: ``frames`` says
    which, see `volumes.taken`. The affine, (4, 4), maps voxels to millimetres (right, anterior,
    superior), while the file's axes point to the left and to the back.

    Raises
    ------
    InputError
        If the file cannot be read, is not complete, or takes more than `bounded.MOST` bytes; if its
        voxels lie in several files or in another folder; if SimpleITK is not installed.
    """
    sitk = _simpleitk(path)
    is_nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if is_nrrd else "MetaImageIO")
    reader.SetFileName(str(path))
    # Before SimpleITK: for NRRD it opens the file of the voxels to read the header.
    header = _Nrrd.of(path) if is_nrrd else _MetaImage.of(path)
    try:
        reader.ReadImageInformation()
        dtype = _dtype(sitk, reader, path)
        shape = (*reversed(reader.GetSize()), reader.GetNumberOfComponents())
        size = math.prod(shape)
        require_within(f"{path} says that it holds", size * max(dtype.itemsize, 4), "an image")
        if isinstance(header, _Nrrd):
            header.require_whole()
            array = sitk.GetArrayFromImage(reader.Execute()).reshape(shape)
        else:
            array = header.numbers(dtype, size).reshape(shape)
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}") from error
    return _channels(path, array.T, frames, reader), _affine(reader)


def _simpleitk(path: Path) -> Any:
    try:
        import SimpleITK
    except ImportError:
        raise InputError(
            f"{path} needs SimpleITK to be read: pip install 'fedmed-flower[imaging]'"
        ) from None
    return SimpleITK


def _channels(path: Path, array: Array, frames: int | str | None, reader: Any) -> Array:
    """Return the channels of (numbers, *axes), of which the fourth axis may hold volumes."""
    if array.ndim == 5 and len(array) == 1:
        return taken(np.moveaxis(array[0], -1, 0), frames, path)
    if array.ndim > 4 or array.ndim < 3:
        sides = "x".join(map(str, array.shape[1:]))
        raise InputError(
            f"{path} has {array.ndim - 1} axes ({sides}) with {len(array)} numbers a voxel: an "
            "image has 2 or 3, or 4 with one number"
        )
    about = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
    is_list = about.get("NRRD_kinds[pixel]") in ("list", "time")
    is_unclear = is_list or about.get("modality") == "DWMRI"
    return taken(array, frames if is_unclear or frames is not None else "channels", path)


def _affine(reader: Any) -> Array:
    axes = reader.GetDimension()
    used = min(axes, 3)
    affine = np.eye(4)
    directions = np.reshape(reader.GetDirection(), (axes, axes))[:used, :used]
    affine[:used, :used] = directions * reader.GetSpacing()[:used]
    affine[:used, 3] = reader.GetOrigin()[:used]
    affine[:2] *= -1
    return affine


def _dtype(sitk: Any, reader: Any, path: Path) -> np.dtype[Any]:
    """Return the type of the numbers of a file."""
    for name in _NUMBERS:
        kinds = (getattr(sitk, f"sitk{name}"), getattr(sitk, f"sitkVector{name}"))
        if reader.GetPixelID() in kinds:
            return np.dtype(name.lower())
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    raise InputError(f"{path} holds values of the type {kind!r}, not numbers")


def _reason(error: RuntimeError) -> str:
    """Return what ITK says, without the place in its source and the address of its object."""
    text = re.split(r"itk::ERROR: |ITK ERROR: ", str(error))[-1]
    return shown(re.sub(r"^\w+\(0x\w+\): ", "", text.strip()), 300)


@dataclass(frozen=True)
class _MetaImage:
    """The header of a MetaImage file.

    Attributes
    ----------
    path : Path
    fields : dict of bytes
    end : int
        Where the header ends, in bytes.
    """

    path: Path
    fields: Mapping[bytes, bytes]
    end: int

    @classmethod
    def of(cls, path: Path) -> _MetaImage:
        """Read the header of a file.

        Raises
        ------
        InputError
            If it does not end with the name of the voxels' file, or a field stands in it twice.
        """
        fields: dict[bytes, bytes] = {}
        end = 0
        for line in _head(path).splitlines(keepends=True):
            end += len(line)
            field = _FIELD.fullmatch(line.rstrip(b"\r\n"))
            if field is None or field[1] in fields:
                name = (field[1] if field else line[:40]).decode("ascii", "backslashreplace")
                problem = "has the field twice" if field else "has a line that is no field"
                raise InputError(f"{path} is no MetaImage file: its header {problem}: {name}")
            fields[field[1]] = field[2]
            if field[1] == b"ElementDataFile":
                return cls(path, fields, end)
        raise InputError(
            f"{path} is no MetaImage file: its header does not end with ElementDataFile"
        )

    def numbers(self, dtype: np.dtype[Any], count: int) -> Array:
        """Return the numbers of all voxels, of which there must be as many as the header says."""
        for name, usual in _USUAL.items():
            if self.fields.get(name, usual[0]) not in usual:
                raise InputError(
                    f"{self.path} has a {name.decode()} other than {usual[0].decode()}, which is "
                    "not read: write it anew with the voxels as they are"
                )
        name = self.fields[b"ElementDataFile"]
        voxels = self.path if name == b"LOCAL" else _other_file(self.path, name)
        wanted = count * dtype.itemsize
        with voxels.open("rb") as file:
            file.seek(self.end if voxels == self.path else 0)
            if self._says(b"CompressedData"):
                content = unpacked(_Inflating(file), self.path, "an image")
            else:
                content = file.read(wanted + 1)
        if len(content) != wanted:
            held = "more" if len(content) > wanted else f"{len(content):,}"
            raise InputError(
                f"{self.path} says that it holds {wanted:,} bytes of voxels, and holds {held}"
            )
        is_big = self._says(b"BinaryDataByteOrderMSB") or self._says(b"ElementByteOrderMSB")
        return np.frombuffer(content, dtype.newbyteorder(">" if is_big else "<"))

    def _says(self, name: bytes) -> bool:
        return self.fields.get(name, b"")[:1] in (b"T", b"t", b"1")


@dataclass(frozen=True)
class _Nrrd:
    """The header of an NRRD file.

    Attributes
    ----------
    path, voxels : Path
        Its file, and that of the voxels.
    start : int
        Where the voxels begin in their file, in bytes.
    packed : bool
    """

    path: Path
    voxels: Path
    start: int
    packed: bool

    @classmethod
    def of(cls, path: Path) -> _Nrrd:
        """Read the header of a file.

        Raises
        ------
        InputError
            If it has no end, or the voxels are neither in this file nor in one beside it.
        """
        head = _head(path)
        end = re.search(rb"\n\r?\n", head)
        if end is None and len(head) == _MOST_HEADER:
            raise InputError(f"{path} is no NRRD file: its header has no end")
        # Any line counts, also behind the header's end: programs differ in where that is.
        lines = re.split(rb"[\r\n]+", head)
        named = [line for line in lines if _OTHER_FILE.match(line)]
        if len(named) > 1:
            raise InputError(f"{path} is no NRRD file: it names the file of its voxels twice")
        packed = any(map(_GZIP.fullmatch, lines))
        if named:
            other = _other_file(path, named[0].split(b":", 1)[-1].strip())
            return cls(path, other, 0, packed)
        return cls(path, path, end.end() if end else len(head), packed)

    def require_whole(self) -> None:
        """Raise an error if packed voxels have changed: SimpleITK verifies no checksum."""
        if self.packed:
            with self.voxels.open("rb") as file:
                file.seek(self.start)
                unpacked(_Inflating(file), self.path, "an image")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MOST_HEADER)


class _Inflating:
    """A file of zlib or gzip content, unpacked while it is read."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._stream = zlib.decompressobj(zlib.MAX_WBITS | 32)

    def read(self, size: int, /) -> bytes:
        """Return at most so many bytes; none at the end, where the checksum is verified."""
        part = b""
        while not part and not self._stream.eof:
            packed = self._stream.unconsumed_tail or self._file.read(_PART)
            if not packed:
                raise EOFError("its compressed voxels end too early")
            part = self._stream.decompress(packed, size)
        return part


def _other_file(path: Path, name: bytes) -> Path:
    """Return the file that holds a header's voxels; raise if it is not one file beside that."""
    text = name.decode("utf-8", "backslashreplace").removeprefix("./")
    if text.split(" ")[0] == "LIST" or "%" in text:
        raise InputError(f"{path}: its voxels lie in several files: write it as one .nrrd or .mha")
    other = path.parent / text
    if Path(text).name != text or real_path(other).parent != real_path(path).parent:
        raise InputError(
            f"{path}: {Path(text).name}, which belongs to it, is in another folder, or a link to "
            "one: put both into one"
        )
    if not other.is_file():
        raise InputError(f"{path}: {text}, which belongs to it, is not there")
    return other
