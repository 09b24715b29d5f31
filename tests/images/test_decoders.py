"""Compressed DICOM files: each syntax gives the pixels that were compressed."""

import base64
import io
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_files import at, write_enhanced, write_image
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.decoders.base import get_decoder
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.images import decoders
from fedmed_flower.images.dicom import read_dicom

# 8 x 8 signed pixels, 300 a column and 37 a row from -700 on, encoded by OpenJPH.
HTJ2K = """
/0//UQApQAAAAAAIAAAACAAAAAAAAAAAAAAACAAAAAgAAAAAAAAAAAABjwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wA
EyCIkJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAFkAAf+TwAAligEHdAAAAMAAE0AA
EoCw+gMHdABQAYd0AMAAE8AAEwBEEfUCgnQApKQAQ1QAwAAqoAAVQFasWLHyqnICdQBIBEH+wBCB7LYA/9k=
"""


def pictures():
    """Return pixels of the kinds that hospitals have, by name, and how many bits they have."""
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(24), 2 * np.arange(20))
    return {
        "grey of 8 bits": ((smooth + rng.integers(0, 9, smooth.shape)).astype(np.uint8), 8),
        "grey of 12 bits": ((60 * smooth % 4096).astype(np.uint16), 12),
        "grey of 16 bits": ((900 * smooth).astype(np.uint16), 16),
        "signed, of 16 bits": ((500 * smooth - 20000).astype(np.int16), 16),
        "signed, of 12 bits": ((50 * smooth % 4096 - 2048).astype(np.int16), 12),
        "colours": (rng.integers(0, 256, (24, 20, 3)).astype(np.uint8), 8),
    }


def write(path, array, bits):
    tags = {} if array.ndim == 3 else {"BitsStored": bits, "HighBit": bits - 1}
    return write_image(path, array, **tags)


def by_pydicom(path, syntax):
    part = pydicom.dcmread(path)
    part.compress(syntax)
    part.save_as(path)


def by_gdcm(path, syntax):
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()


def as_stored(path, syntax):
    part = pydicom.dcmread(path)
    part.decode()
    if syntax == uid.ExplicitVRBigEndian:
        part["PixelData"].VR = "OW"
        part.PixelData = np.frombuffer(part.PixelData, "<u2").astype(">u2").tobytes()
    part.file_meta.TransferSyntaxUID = syntax
    implicit = syntax == uid.ImplicitVRLittleEndian
    part.set_original_encoding(implicit, syntax != uid.ExplicitVRBigEndian)
    part.save_as(path)


LOSSLESS = {
    uid.ImplicitVRLittleEndian: as_stored,
    uid.DeflatedExplicitVRLittleEndian: as_stored,
    uid.ExplicitVRBigEndian: as_stored,
    uid.RLELossless: by_pydicom,
    uid.JPEGLSLossless: by_pydicom,
    uid.JPEG2000Lossless: by_gdcm,
    uid.JPEGLossless: by_gdcm,
    uid.JPEGLosslessSV1: by_gdcm,
}


@pytest.mark.parametrize("kind", pictures())
@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.name[:40])
def test_what_was_compressed_without_loss_is_read_as_it_was(tmp_path, syntax, kind):
    array, bits = pictures()[kind]
    path = write(tmp_path / "x.dcm", array, bits)
    LOSSLESS[syntax](path, syntax)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    values = read_dicom(path)[0][..., 0].transpose(2, 1, 0)
    assert np.array_equal(values if array.ndim == 3 else values[..., 0], array)


@pytest.mark.parametrize("plugin", ["fedmed", "pillow"])
@pytest.mark.parametrize("kind", pictures())
def test_both_decoders_of_jpeg_2000_give_the_same(tmp_path, monkeypatch, plugin, kind):
    array, bits = pictures()[kind]
    path = write(tmp_path / "x.dcm", array, bits)
    by_gdcm(path, uid.JPEG2000Lossless)
    monkeypatch.setitem(decoders._PLUGINS, uid.JPEG2000Lossless, (plugin,))
    values = read_dicom(path)[0][..., 0].transpose(2, 1, 0)
    assert np.array_equal(values if array.ndim == 3 else values[..., 0], array)


def encapsulated(path, array, syntax, *frames, **tags):
    """Write a file whose compressed frames are given."""
    write_image(path, array)
    part = pydicom.dcmread(path)
    part.file_meta.TransferSyntaxUID = syntax
    part.PixelData = encapsulate([*frames])
    part["PixelData"].VR = "OB"
    part["PixelData"].is_undefined_length = True
    for name, value in tags.items():
        setattr(part, name, value)
    part.save_as(path)
    return path


@pytest.mark.parametrize("syntax", [uid.HTJ2K, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL])
def test_high_throughput_jpeg_2000_of_another_encoder(tmp_path, syntax):
    expected = np.add.outer(37 * np.arange(8), 300 * np.arange(8)) - 700
    frame = base64.b64decode(HTJ2K)
    path = encapsulated(tmp_path / "x.dcm", expected.astype(np.int16), syntax, frame)
    assert np.array_equal(read_dicom(path)[0][0, ..., 0].T, expected)


def test_baseline_jpeg_is_what_pillow_and_simpleitk_read(tmp_path):
    rows, columns = np.mgrid[:32, :24]
    array = np.stack([4 * rows, 5 * columns, rows + columns], axis=-1).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(array).save(content, "JPEG", quality=90)
    path = encapsulated(
        tmp_path / "x.dcm", array, uid.JPEGBaseline8Bit, content.getvalue(),
        PhotometricInterpretation="YBR_FULL_422",
    )  # fmt: skip
    values = read_dicom(path)[0][..., 0].transpose(2, 1, 0)
    assert np.abs(values - np.asarray(Image.open(content), float)).max() <= 1
    reference = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    assert np.abs(values - reference.reshape(values.shape)).max() <= 1


@pytest.mark.parametrize(
    "name",
    [
        "JPGExtended.dcm",  # 12 bits
        "JPEG-LL.dcm",
        "JPEGLSNearLossless_16.dcm",
        "JPEG2000.dcm",
        "693_J2KI.dcm",
        "J2K_pixelrep_mismatch.dcm",
        "SC_rgb_dcmtk_+eb+cy+s2.dcm",
        "SC_rgb_jls_lossy_sample.dcm",
        "GDCMJ2K_TextGBR.dcm",
        "image_dfl.dcm",
        "bad_sequence.dcm",
    ],
)
def test_files_of_other_makers_are_what_simpleitk_reads(name):
    path = Path(get_testdata_file(name, download=False))
    values = read_dicom(path)[0][..., 0].transpose(2, 1, 0)
    reference = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    assert np.array_equal(values, reference.reshape(values.shape).astype(np.float32))


@pytest.mark.parametrize(
    ("packed", "plain"),
    [
        ("SC_rgb_rle_16bit.dcm", "SC_rgb_16bit.dcm"),
        ("SC_rgb_rle_32bit.dcm", "SC_rgb_32bit.dcm"),
        ("OBXXXX1A_rle.dcm", "OBXXXX1A.dcm"),
        ("OBXXXX1A_expb.dcm", "OBXXXX1A.dcm"),
        ("rtdose_expb_1frame.dcm", "rtdose_1frame.dcm"),
        ("MR2_J2KR.dcm", "MR2_UNCR.dcm"),
    ],
)
def test_a_compressed_file_is_its_uncompressed_sibling(packed, plain):
    one, other = (read_dicom(Path(get_testdata_file(n, download=False))) for n in (packed, plain))
    assert np.array_equal(one[0], other[0])
    assert np.array_equal(one[1], other[1])


def test_frames_are_decoded_one_by_one_and_each_is_its_own(tmp_path):
    frames = np.random.default_rng(0).integers(0, 4000, (5, 16, 12)).astype(np.uint16)
    order = [3, 0, 4, 1, 2]
    path = write_enhanced(tmp_path / "x.dcm", frames, [at(0, 0, place) for place in order])
    by_pydicom(path, uid.JPEGLSLossless)
    assert np.array_equal(read_dicom(path)[0][0].T, frames[np.argsort(order)])
    assert np.array_equal(read_dicom(path, 3)[0][0, ..., 0].T, frames[3])


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        (uid.JPEGLosslessSV1, "JPEG Lossless, Non-Hierarchical, First-Order Prediction (Process 14 "
         "[Selection Value 1])"),
        (uid.JPEGLSLossless, "JPEG-LS Lossless Image Compression"),
        (uid.HTJ2K, "High-Throughput JPEG 2000 Image Compression"),
        (uid.JPEGExtended12Bit, "JPEG Extended (Process 2 and 4)"),
    ],
)  # fmt: skip
def test_a_decoder_that_is_not_installed_is_named_by_its_extra(tmp_path, monkeypatch, syntax, name):
    monkeypatch.setattr(get_decoder(syntax), "_available", {})
    path = encapsulated(
        tmp_path / "x.dcm", np.zeros((8, 8), np.uint16), syntax, b"\xff\xd8\xff\xd9"
    )
    text = f"{path} is compressed by {name}: pip install 'fedmed-flower[imaging]'"
    with pytest.raises(InputError, match=says(text)):
        read_dicom(path)


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (
            uid.MPEG4HP41,
            "is a film by MPEG-4 AVC/H.264 High Profile / Level 4.1, which is not read",
        ),
        (uid.JPEG2000MC, "is compressed by JPEG 2000 Part 2 Multi-component Image Compression, "),
        (uid.UID("1.2.3.4"), "is compressed by 1.2.3.4, which is not read: export it uncompressed"),
    ],
)
def test_what_no_decoder_reads_is_named(tmp_path, syntax, text):
    path = encapsulated(tmp_path / "x.dcm", np.zeros((8, 8), np.uint16), syntax, b"\0" * 8)
    with pytest.raises(InputError, match=f"^{path} {text}"):
        read_dicom(path)


@pytest.mark.parametrize("syntax", [uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.JPEGLosslessSV1])
def test_a_frame_of_another_size_than_the_header_says_is_not_decoded(tmp_path, syntax):
    array = pictures()["grey of 16 bits"][0]
    path = write(tmp_path / "x.dcm", array, 16)
    LOSSLESS[syntax](path, syntax)
    part = pydicom.dcmread(path)
    part.Rows = 12
    part.save_as(path)
    text = (
        f"{path}: its header says 12 x 20 pixels of 1 colour, and its compressed frame 0 says 24 x "
        "20 pixels of 1 colour"
    )
    with pytest.raises(InputError, match=says(text)):
        read_dicom(path)


COMPRESSED = [syntax for syntax in LOSSLESS if syntax.is_encapsulated]


@pytest.mark.parametrize("syntax", COMPRESSED, ids=lambda syntax: syntax.name[:40])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_frame_that_was_cut_off_is_not_filled_up(tmp_path, syntax, share):
    array = np.random.default_rng(0).integers(0, 4000, (32, 32)).astype(np.uint16)
    path = write(tmp_path / "x.dcm", array, 16)
    LOSSLESS[syntax](path, syntax)
    part = pydicom.dcmread(path)
    frame = get_frame(part.PixelData, 0, number_of_frames=1)
    part.PixelData = encapsulate([frame[: int(share * len(frame))]])
    part.save_as(path)
    text = f"{path}: its compressed pixels cannot be unpacked (.*): it may be cut off, so copy it"
    with pytest.raises(InputError, match=f"^{text} again$"):
        read_dicom(path)


@pytest.mark.parametrize("syntax", COMPRESSED, ids=lambda syntax: syntax.name[:40])
def test_a_compressed_file_that_was_cut_off_is_named(tmp_path, syntax):
    path = write(tmp_path / "x.dcm", pictures()["grey of 16 bits"][0], 16)
    LOSSLESS[syntax](path, syntax)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=f"^{path} holds no (image|pixels): it is cut off"):
        read_dicom(path)
