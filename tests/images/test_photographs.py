import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.images.photographs import read_picture
from fedmed_flower.images.reading import read_image, read_label

# Three classes and their colours in a picture of 2 rows and 3 columns.
INDICES = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
RED_GREEN_BLUE = [250, 0, 0, 0, 240, 0, 0, 0, 230]
GREYS = [0, 0, 0, 100, 100, 100, 200, 200, 200]


def with_palette(path, palette, **how):
    picture = Image.fromarray(INDICES)
    picture.putpalette(palette)
    assert picture.mode == "P"
    picture.save(path, **how)
    return path


def saved(path, array, **how):
    Image.fromarray(np.asarray(array)).save(path, **how)
    return path


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif"])
def test_a_palette_becomes_its_colours_and_in_a_mask_its_indices(tmp_path, name):
    path = with_palette(tmp_path / name, RED_GREEN_BLUE)
    expected = [
        [[250, 0, 0], [0, 0, 250]],
        [[0, 240, 0], [0, 240, 0]],
        [[0, 0, 230], [230, 0, 0]],
    ]
    assert read_image(path, 2).tolist() == expected
    assert read_label(path, 2, 3).tolist() == [INDICES.tolist()]


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif"])
def test_a_grey_palette_becomes_one_channel(tmp_path, name):
    path = with_palette(tmp_path / name, GREYS)
    assert read_image(path, 2).tolist() == [[[0, 100, 200], [200, 100, 0]]]
    assert read_label(path, 2, 3).tolist() == [INDICES.tolist()]


def test_colours_are_those_that_pillow_shows(tmp_path):
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8))
    colours.quantize(40).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.mode == "P"
        expected = np.moveaxis(np.asarray(picture.convert("RGB")), -1, 0)
    assert np.array_equal(read_picture(tmp_path / "x.png"), expected)


# EXIF 2.32, table 6: where row 0 and column 0 of what is stored lie in the picture.
TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("number", TURNS)
@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.jpg"])
def test_a_picture_is_turned_as_its_exif_says(tmp_path, name, number):
    stored = np.zeros((16, 24), np.uint8)
    stored[:8] = 200
    stored[:8, :8] = 100
    exif = Image.Exif()
    exif[0x0112] = number
    path = saved(tmp_path / name, stored, exif=exif)
    upright = TURNS[number](stored).astype(np.float32)
    assert np.abs(read_image(path, 2).numpy()[0] - upright).max() <= (2 if name == "x.jpg" else 0)
    if name != "x.jpg":
        label = read_label(path, 2, 3, (0, 100, 200))
        assert np.array_equal(label[0].numpy(), upright // 100)


@pytest.mark.parametrize("kept", [True, False])
def test_16_bits_are_turned_and_keep_their_bits(tmp_path, kept):
    stored = np.array([[0, 1, 256], [40_000, 65_535, 7]], np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 1 if kept else 6
    expected = stored if kept else np.rot90(stored, -1)
    for name in ("x.png", "x.tif"):
        path = saved(tmp_path / name, stored, exif=exif)
        assert np.array_equal(read_image(path, 2).numpy()[0], expected)


def test_if_0_is_white_16_bits_are_inverted_as_8_bits_are(tmp_path):
    for kind in (np.uint8, np.uint16):
        stored = np.array([[0, 1], [100, np.iinfo(kind).max]], kind)
        path = saved(tmp_path / "x.tif", stored)
        content = path.read_bytes()
        black_is_zero = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
        assert content.count(black_is_zero) == 1
        path.write_bytes(content.replace(black_is_zero, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
        expected = np.iinfo(kind).max - stored
        assert np.array_equal(read_image(path, 2).numpy()[0], expected)


def test_one_bit_is_0_or_1(tmp_path):
    bits = np.array([[True, False, True], [False, False, True]])
    for name in ("x.png", "x.tif", "x.bmp"):
        Image.fromarray(bits).save(tmp_path / name)
        assert read_image(tmp_path / name, 2).tolist() == [bits.astype(float).tolist()]
        assert read_label(tmp_path / name, 2, 2).tolist() == [bits.astype(int).tolist()]


def test_an_alpha_channel_that_hides_nothing_is_dropped(tmp_path):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (4, 5, 4)).astype(np.uint8)
    colours[..., 3] = 255
    image = read_image(saved(tmp_path / "x.png", colours), 2)
    assert np.array_equal(image.numpy(), np.moveaxis(colours[..., :3], -1, 0))
    grey = colours[..., 2:]
    image = read_image(saved(tmp_path / "g.png", grey), 2)
    assert np.array_equal(image.numpy(), grey[None, ..., 0])
    path = with_palette(tmp_path / "p.png", RED_GREEN_BLUE, transparency=bytes([255, 255, 255]))
    assert read_image(path, 2).shape == (3, 2, 3)
    path = with_palette(tmp_path / "q.png", GREYS, transparency=7)
    assert read_image(path, 2).tolist() == [[[0, 100, 200], [200, 100, 0]]]
    path = saved(tmp_path / "l.png", INDICES, transparency=7)
    assert torch.equal(read_image(path, 2).as_tensor(), torch.tensor(INDICES[None]).float())
    path = saved(tmp_path / "h.png", INDICES.astype(np.uint16) + 300, transparency=7)
    assert np.array_equal(read_image(path, 2).numpy()[0], INDICES + 300.0)


def test_what_is_transparent_is_refused(tmp_path):
    colours = np.full((4, 5, 4), 255, np.uint8)
    colours[1, 2, 3] = 254
    paths = [
        saved(tmp_path / "x.png", colours),
        saved(tmp_path / "g.png", colours[..., 2:]),
        with_palette(tmp_path / "p.png", RED_GREEN_BLUE, transparency=bytes([255, 9, 255])),
        with_palette(tmp_path / "q.png", GREYS, transparency=1),
        saved(tmp_path / "l.png", INDICES, transparency=1),
        saved(tmp_path / "h.png", INDICES.astype(np.uint16), transparency=1),
    ]
    for path in paths:
        text = (
            f"{path} is transparent in places, and what is seen there depends on the program: save "
            "it without transparency (an alpha channel)"
        )
        with pytest.raises(InputError, match=says(text)):
            read_image(path, 2)
    # The classes of a mask are its indices, whatever colour a program gives them.
    assert read_label(paths[2], 2, 3).tolist() == [INDICES.tolist()]
    with pytest.raises(InputError, match="is transparent in places"):
        read_label(paths[4], 2, 3)


def test_the_colours_of_ink_are_refused(tmp_path):
    for mode, name in (("CMYK", "x.jpg"), ("CMYK", "x.tif"), ("LAB", "y.tif")):
        path = tmp_path / name
        Image.new(mode, (4, 5)).save(path)
        text = f"{path} has {mode} colours: save it as RGB or as grey"
        with pytest.raises(InputError, match=says(text)):
            read_image(path, 2)


def test_colours_of_16_bits_are_refused_instead_of_rounded(tmp_path):
    path = tmp_path / "x.png"
    colours = np.arange(4 * 5 * 3, dtype=np.uint16).reshape(4, 5, 3) * 1000
    path.write_bytes(png_of_16_bits(colours))
    text = (
        f"{path} has several channels of 16 bits, of which 8 would be read: save it with 8 bits, "
        "or each channel as a grey picture of its own"
    )
    with pytest.raises(InputError, match=says(text)):
        read_image(path, 2)


def png_of_16_bits(colours):
    """Return a PNG of colours, (rows, columns, 3), as its specification says (W3C, section 11)."""

    def chunk(name, content):
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows, columns, _ = colours.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in colours)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )
