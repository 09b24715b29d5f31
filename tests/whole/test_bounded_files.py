"""Files that unpack to more than memory, or say so, are refused before they take it."""

import bz2
import gzip
import io
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from contextlib import contextmanager

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
from dicom_files import at, write_enhanced, write_image, write_series
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless
from tiny import says

from fedmed_flower.data import bounded
from fedmed_flower.data.cells import Cells, category_text
from fedmed_flower.data.checks import check_row
from fedmed_flower.data.datalist import read_folder
from fedmed_flower.data.decathlon import load_hippocampus
from fedmed_flower.data.schema import Schema, read_table
from fedmed_flower.data.sources import load_medmnist
from fedmed_flower.errors import InputError
from fedmed_flower.genomics.scores import read_weights
from fedmed_flower.images.reading import read_image

MIB = 1 << 20
LIMIT = MIB
# What a test's file unpacks to, or says that it holds.
BOMB = 32 * MIB
SCHEMA = Schema("x", "continuous", ("age",))
SPLITS = [f"{split}_{kind}" for split in ("train", "val", "test") for kind in ("images", "labels")]


@pytest.fixture
def limit(monkeypatch):
    for kind in bounded.MOST:
        monkeypatch.setitem(bounded.MOST, kind, LIMIT)


@contextmanager
def frugal():
    """Fail where Python and NumPy take more than a few times the bound at once."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * LIMIT, f"{peak / MIB:.1f} MiB"


def nifti(shape=(4, 3, 2), dtype=np.int16, extension=b""):
    """Return the bytes of a header, of what stands behind it, and of a few voxels."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_sform(np.eye(4), 1)
    header["magic"] = b"n+1"
    header["vox_offset"] = 352 + len(extension)
    flag = bytes([bool(extension), 0, 0, 0])
    return header.binaryblock + flag + extension + bytes(48)


def npy(shape, dtype=np.uint8, values=b"\0\0\0\0"):
    file = io.BytesIO()
    header = {"shape": shape, "fortran_order": False, "descr": np.dtype(dtype).str}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + values


def png(width, height):
    """Return a PNG without pixels: its header alone says how large it is."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def tiff(side):
    file = io.BytesIO()
    Image.fromarray(np.zeros((side, side), np.float32)).save(file, "TIFF", compression="packbits")
    return file.getvalue()


def deflated(path, zeros, rows, columns):
    """Write a deflated DICOM file whose pixels are so many zeros."""
    plain = write_image(path, np.zeros((4, 4), np.uint8))
    part = pydicom.dcmread(plain)
    del part.PixelData
    part.Rows, part.Columns = rows, columns
    part.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    part.save_as(buffer, enforce_file_format=True)
    buffer.seek(0)
    pydicom.filereader.read_preamble(buffer, False)
    meta = pydicom.filereader.read_dataset(
        buffer, False, True, stop_when=lambda tag, *_: tag >> 16 != 2
    )
    assert meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    body = zlib.decompress(buffer.getvalue()[buffer.tell() :], -zlib.MAX_WBITS)
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    with path.open("wb") as file:
        file.write(buffer.getvalue()[: buffer.tell()])
        file.write(packer.compress(body + struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, zeros)))
        for start in range(0, zeros, MIB):
            file.write(packer.compress(bytes(min(MIB, zeros - start))))
        file.write(packer.flush())
    return path


def encapsulated(path, syntax, frame, **tags):
    """Write a DICOM file with one compressed frame and these tags."""
    part = pydicom.dcmread(write_image(path, np.zeros((4, 4), np.uint8)))
    part.file_meta.TransferSyntaxUID = syntax
    part.PixelData = encapsulate([frame])
    part["PixelData"].is_undefined_length = True
    for name, value in tags.items():
        setattr(part, name, value)
    part.save_as(path)
    return path


# Each writes a file and returns what the error says of it: a count of bytes, and the kind.


def a_packed_volume_with_a_tail(path):
    path.write_bytes(gzip.compress(nifti() + bytes(BOMB)))
    return "unpacks to at least", "an image"


def a_packed_volume_in_bzip2(path):
    path.write_bytes(bz2.compress(nifti() + bytes(BOMB)))
    return "unpacks to at least", "an image"


def an_extension_of_a_header(path):
    size = BOMB
    path.write_bytes(gzip.compress(nifti(extension=struct.pack("<ii", size, 6) + bytes(size - 8))))
    return "unpacks to at least", "an image"


def a_header_that_says_petabytes(path):
    path.write_bytes(nifti(shape=(32767,) * 4))
    return f"says that it holds {4 * 32767**4:,}", "an image"


def a_packed_header_that_says_petabytes(path):
    path.write_bytes(gzip.compress(nifti(shape=(32767,) * 4)))
    return f"says that it holds {4 * 32767**4:,}", "an image"


def bytes_that_become_float32(path):
    path.write_bytes(nifti(shape=(512, 513), dtype=np.uint8))
    return f"says that it holds {4 * 512 * 513:,}", "an image"


def an_array_that_says_petabytes(path):
    path.write_bytes(npy((1 << 30, 1 << 30)))
    return f"says that it holds {1 << 60:,}", "an image"


def a_picture_of_many_pixels(path):
    path.write_bytes(png(1 << 13, 1 << 13))
    return f"says that it holds {1 << 26:,}", "a picture or a DICOM file"


def a_picture_of_floats(path):
    path.write_bytes(tiff(1 << 10))
    return f"says that it holds {4 << 20:,}", "a picture or a DICOM file"


def a_deflated_dicom_file(path):
    deflated(path, BOMB, 4, 4)
    return "unpacks to at least", "a picture or a DICOM file"


def a_compressed_frame_that_says_terabytes(path):
    tags = {"Rows": 65535, "Columns": 65535, "SamplesPerPixel": 65535, "PlanarConfiguration": 0}
    encapsulated(path, RLELossless, bytes(64), **tags)
    return f"says that it holds {65535**3:,}", "a picture or a DICOM file"


BOMBS = [
    ("x.nii.gz", a_packed_volume_with_a_tail),
    ("x.nii.bz2", a_packed_volume_in_bzip2),
    ("x.nii.gz", an_extension_of_a_header),
    ("x.nii", a_header_that_says_petabytes),
    ("x.nii.gz", a_packed_header_that_says_petabytes),
    ("x.nii", bytes_that_become_float32),
    ("x.npy", an_array_that_says_petabytes),
    ("x.png", a_picture_of_many_pixels),
    ("x.tif", a_picture_of_floats),
    ("x.dcm", a_deflated_dicom_file),
    ("x.dcm", a_compressed_frame_that_says_terabytes),
]


@pytest.mark.parametrize(("name", "write"), BOMBS, ids=[write.__name__ for _, write in BOMBS])
def test_an_image_that_takes_more_than_it_may_is_refused(tmp_path, limit, name, write):
    path = tmp_path / name
    text, kind = write(path)
    with (
        frugal(),
        pytest.raises(
            InputError, match=f"^{path} {text}[0-9, ]*bytes, and {kind} may have"
        ) as error,
    ):
        read_image(path, None)
    assert str(error.value).endswith(f" {kind} may have 1,048,576: make it smaller, or divide it")


def test_what_a_file_unpacks_to_is_counted_no_further_than_the_bound(tmp_path, limit):
    path = tmp_path / "x.nii.gz"
    a_packed_volume_with_a_tail(path)
    with pytest.raises(InputError) as error:
        read_image(path, 3)
    counted = int(str(error.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    assert LIMIT < counted <= 2 * LIMIT


def test_images_at_the_bound_are_read(tmp_path, limit):
    voxels = np.zeros((64, 64, 63), np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "x.nii.gz")
    assert read_image(tmp_path / "x.nii.gz", 3).shape == (1, 64, 64, 63)
    np.save(tmp_path / "x.npy", np.zeros((512, 512), np.float32))
    assert read_image(tmp_path / "x.npy", 2).shape == (1, 512, 512)
    Image.fromarray(np.zeros((512, 512), np.uint8)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 2).shape == (1, 512, 512)
    deflated(tmp_path / "x.dcm", 512 * 512, 512, 512)
    assert read_image(tmp_path / "x.dcm", 2).shape == (1, 512, 512)


def test_an_array_in_memory_has_a_bound_too():
    endless = np.broadcast_to(np.uint8(1), (1 << 20, 1 << 20))
    text = (
        "as float32 it has 4,398,046,511,104 bytes, and an image may have 4,294,967,296: make it "
        "smaller, or divide it"
    )
    with frugal():
        found = check_row({"image": endless, "label": 0, "patient": "p"}, 2)
    assert found.problem == text


def test_a_series_has_a_bound_for_all_its_slices(tmp_path, limit):
    write_series(tmp_path, np.zeros((256, 256, 5), np.int16))
    text = (
        f"{tmp_path} has at least 1,310,720 bytes, and an image may have 1,048,576: make it "
        "smaller, or divide it"
    )
    with pytest.raises(InputError, match=says(text)):
        read_image(tmp_path, 3)


def test_channels_have_a_bound_together(tmp_path, limit):
    np.save(tmp_path / "x.npy", np.zeros((256, 256), np.float32))
    paths = [str(tmp_path / "x.npy")] * 5
    text = (
        f"{paths[0]} and its other channels have at least 1,310,720 bytes, and an image may have "
        "1,048,576: make it smaller, or divide it"
    )
    with pytest.raises(InputError, match=says(text)):
        read_image(paths, 2)
    assert read_image(paths[:4], 2).shape == (4, 256, 256)


@pytest.mark.parametrize("name", ["x.nii.bz2", "x.mgz"])
def test_packed_volumes_are_what_nibabel_reads(tmp_path, name):
    kind = nibabel.MGHImage if name == "x.mgz" else nibabel.Nifti1Image
    voxels = np.random.default_rng(0).normal(size=(20, 5, 6)).astype(np.float32)
    nibabel.save(kind(voxels, np.diag([1, 2, 3, 1])), tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name, 3)[0].numpy(), voxels)
    content = bytearray((tmp_path / name).read_bytes())
    content[-8] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^{tmp_path / name} cannot be read: "):
        read_image(tmp_path / name, 3)


def test_a_packed_pair_is_not_unpacked(tmp_path):
    nibabel.save(nibabel.Nifti1Pair(np.ones((4, 3, 2), np.uint8), np.eye(4)), tmp_path / "x.img.gz")
    for path in (tmp_path / "x.img.gz", tmp_path / "x.hdr.gz"):
        text = f"{path} is not a NIfTI file with both header and voxels: unpack it"
        with pytest.raises(InputError, match=says(text)):
            read_image(path, 3)


def test_slices_count_with_what_they_unpack_to(tmp_path, limit):
    # Their pixels are few, but what stands beside them is kept in memory too.
    for number in range(3):
        deflated(tmp_path / f"{number}.dcm", 400_000, 4, 4)
    text = rf"^{tmp_path} has at least 1,20[0-9],[0-9]* bytes, and an image may have 1,048,576"
    with pytest.raises(InputError, match=text):
        read_image(tmp_path, 3)


def test_frames_without_number_are_refused_by_their_number(tmp_path):
    tags = {"Rows": 1, "Columns": 1, "NumberOfFrames": 10**9}
    path = encapsulated(tmp_path / "x.dcm", RLELossless, bytes(64), **tags)
    text = f"{path}: its NumberOfFrames must be from 1 to 120,000, got 1,000,000,000"
    with pytest.raises(InputError, match=says(text)):
        read_image(path, 3)


def test_frames_count_together_before_they_are_decoded(tmp_path, limit):
    positions = [at(0, 0, place) for place in range(5)]
    path = write_enhanced(tmp_path / "x.dcm", np.zeros((5, 256, 256), np.uint8), positions)
    text = rf"^{path} has at least 1,310,720 bytes, and an image may have 1,048,576"
    with frugal(), pytest.raises(InputError, match=text):
        read_image(path, 3)


def test_a_jpeg_larger_than_its_dicom_header_says_is_not_unpacked(tmp_path):
    frame = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(frame, "JPEG")
    content = bytearray(frame.getvalue())
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", 10_000, 10_000)
    path = encapsulated(tmp_path / "x.dcm", JPEGBaseline8Bit, bytes(content), Rows=4, Columns=4)
    text = (
        f"{path}: its header says 4 x 4 pixels of 1 colour, and its compressed frame 0 says 10000 "
        "x 10000 pixels of 1 colour"
    )
    with pytest.raises(InputError, match=says(text)):
        read_image(path, 2)


def test_a_picture_beyond_pillows_limit_is_refused_with_it(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png(1 << 14, 1 << 14))
    text = rf"^{path} cannot be read: Image size \(268435456 pixels\) exceeds limit of"
    with pytest.raises(InputError, match=text):
        read_image(path, 2)


def test_a_picture_in_another_format_than_its_name_says_is_not_opened(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "x.png", "GIF")
    with pytest.raises(InputError, match=r"x\.png cannot be read: cannot identify image file"):
        read_image(tmp_path / "x.png", 2)


def test_a_surface_is_no_volume(tmp_path):
    path = tmp_path / "x.surf.gii"
    array = nibabel.gifti.GiftiDataArray(np.zeros((3, 3), np.float32))
    nibabel.save(nibabel.GiftiImage(darrays=[array]), path)
    with pytest.raises(InputError, match=says(f"{path} holds a surface, not a volume")):
        read_image(path, 3)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.nii")
    text = f"{tmp_path / 'x.nii'} is neither a file nor a folder"
    with pytest.raises(InputError, match=says(text)):
        read_image(tmp_path / "x.nii", 3)
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(InputError, match=f"^{tmp_path} holds no data: looked for dataset.json"):
        read_folder(tmp_path)


IN_A_PROCESS = """
import resource, sys, time
from pathlib import Path
from fedmed_flower.images.dicom import read_dicom
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, start = peak(), time.monotonic()
try:
    read_dicom(Path(sys.argv[1]))
except ValueError as error:
    print(error)
print(peak() - before, time.monotonic() - start)
"""


def test_300_kilobytes_that_become_a_gigabyte_are_refused_at_once(tmp_path):
    path = deflated(tmp_path / "x.dcm", 17000 * 17000, 17000, 17000)
    assert path.stat().st_size < 300_000  # As float32 it is 1.16 GB.
    command = [sys.executable, "-c", IN_A_PROCESS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told, figures = done.stdout.splitlines()
    assert told.startswith(f"{path} unpacks to at least 26")
    assert told.endswith("a DICOM file may have 268,435,456: make it smaller, or divide it")
    grown, seconds = map(float, figures.split())
    assert grown < 100  # MiB
    assert seconds < 10


def test_the_walk_through_a_folder_refuses_what_it_would_unpack(tmp_path, limit):
    write_image(tmp_path / "good.dcm", np.zeros((4, 4), np.uint8))
    path = deflated(tmp_path / "x.dcm", BOMB, 4, 4)
    listing = read_folder(tmp_path)
    assert [row["image"] for row in listing.rows] == [str(tmp_path / "good.dcm")]
    assert listing.problems[0].startswith(f"{path} unpacks to at least ")


# Tables and data sets


def test_a_table_that_unpacks_to_more_than_it_may(tmp_path, limit):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"patient,x\n" + b"1,2\n" * (BOMB // 4)))
    text = f"^{path} unpacks to at least .* a table may have 1,048,576: make"
    with frugal(), pytest.raises(InputError, match=text):
        read_table(path, SCHEMA)


@pytest.mark.parametrize(
    ("value", "count"), [("x" * (MIB // 2), 64), (1.0, MIB)], ids=["text", "number"]
)
def test_a_parquet_file_that_repeats_a_value(tmp_path, limit, value, count):
    # It is written once.
    frame = pd.DataFrame({"patient": [value] * count})
    path = tmp_path / "t.parquet"
    frame.to_parquet(path)
    assert path.stat().st_size < LIMIT
    with pytest.raises(
        InputError, match=f"^{path} .* (at least|that it holds) .* a table may have 1,048,576"
    ):
        read_table(path, SCHEMA)


def test_what_problems_of_a_table_quote_is_short_and_clean(tmp_path):
    path = tmp_path / "t\x1b[2J\n.csv"
    path.write_text(f'patient,x,age\np1,1,"\x1b[31m{"x" * 10_000}"\np2,2,50\n')
    (problem,) = read_table(path, SCHEMA).problems
    assert problem == (
        f"{tmp_path}/t\\x1b[2J .csv: age is not a number in 1 row, counted as missing; the first "
        f"is line 2 with '\\x1b[31m{'x' * 35}'"
    )


def test_whole_numbers_beyond_all_bounds_are_no_numbers():
    for huge, example in ((10**400, f"'1{'0' * 39}'"), (10**5000, "a int")):
        cells = Cells("t", "row", [1], ["age"], lambda _, huge=huge: [huge])
        assert np.isnan(cells.numbers("age")).all()
        assert cells.problems == [
            f"age is not a number in 1 row, counted as missing; the first is row 1 with {example}"
        ]
    assert category_text(10**400) == str(10**400)


def test_weights_that_unpack_to_more_than_they_may(tmp_path, limit):
    path = tmp_path / "w.txt.gz"
    path.write_bytes(gzip.compress(b"id,allele,weight\n" + b"x" * BOMB))
    text = f"^{path} unpacks to at least .* a file of weights may have 1,048,576: make"
    with frugal(), pytest.raises(InputError, match=text):
        read_weights(path)


def npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in SPLITS:
            content = npy((2,)) if name.endswith("labels") else npy((2, 1, 2))
            archive.writestr(f"{name}.npy", members.get(name, content))
    return path


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (npy((1 << 25, 1, 1), values=bytes(BOMB)), BOMB + 14),
        (npy((1 << 40, 1, 1)), (1 << 40) + 14),
        (npy((1 << 20, 1 << 20, 1 << 20), np.float64), (1 << 63) + 14),
    ],
)
def test_a_data_set_that_takes_more_than_it_may(tmp_path, limit, content, size):
    path = npz(tmp_path / "x.npz", train_images=content)
    text = (
        f"{path} says that it holds {size:,} bytes, and a data set may have 1,048,576: make it "
        "smaller, or divide it"
    )
    with frugal(), pytest.raises(InputError, match=says(text)):
        load_medmnist("own", path)


def test_an_archive_that_is_compressed_is_not_unpacked(tmp_path, monkeypatch):
    folder = tmp_path / "hippocampus"
    folder.mkdir()
    with tarfile.open(folder / "Task04_Hippocampus.tar", "w:gz") as archive:
        member = tarfile.TarInfo("zeros")
        member.size = BOMB
        archive.addfile(member, io.BytesIO(bytes(BOMB)))
    monkeypatch.setenv("FEDMED_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"Hippocampus\.tar cannot be unpacked: bad checksum"):
        load_hippocampus()


def test_a_data_set_whose_member_is_no_array_is_not_unpacked(tmp_path):
    path = npz(tmp_path / "x.npz", train_images=bytes(BOMB))
    with frugal(), pytest.raises(InputError, match=f"^{path}: not a complete npz file"):
        load_medmnist("own", path)


def test_deflate_is_counted_to_its_end():
    content = np.random.default_rng(0).bytes(3 * MIB)
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = packer.compress(content) + packer.flush()
    bounded.require_deflated(packed, "x", "an image")
    for most, fits in ((3 * MIB, True), (3 * MIB - 1, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(bounded.MOST, "an image", most)
            if fits:
                bounded.require_deflated(packed, "x", "an image")
            else:
                with pytest.raises(InputError, match=r"^x unpacks to at least 3,145,728 bytes"):
                    bounded.require_deflated(packed, "x", "an image")
    with pytest.raises(zlib.error):
        bounded.require_deflated(b"\xff" * 100, "x", "an image")
