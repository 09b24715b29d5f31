import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin

from fedmed_flower.clients.pictures import heatmap, outlined
from fedmed_flower.data.pictures import MOST_BYTES, PALETTE, Picture, sound
from fedmed_flower.errors import InputError

FIRST, SECOND, THIRD = (tuple(bytes.fromhex(colour[1:])) for colour in PALETTE[:3])
ORANGE, BLUE = (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)
START = b"\x89PNG\r\n\x1a\n"


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB")).astype(int)


def near(found, colour, tolerance=40):
    return np.abs(found - np.asarray(colour)).max(axis=-1) <= tolerance


def square(top, bottom, left, right, value=1):
    mask = np.zeros((8, 8), int)
    mask[top:bottom, left:right] = value
    return mask


def marked_slices():
    """A volume of 8 x 8 x 4 whose slice k is bright in quadrant k: x and y low, x high, ..."""
    image = np.zeros((1, 8, 8, 4))
    for k, (x, y) in enumerate([(0, 0), (4, 0), (0, 4), (4, 4)]):
        image[0, x : x + 4, y : y + 4, k] = 1.0
    return image


def bright_quadrant(picture):
    """Return (row, column) of the bright quarter of a picture of 320 pixels."""
    found = pixels(picture)[[80, 80, 240, 240], [80, 240, 80, 240]].mean(axis=1)
    assert (found > 200).sum() == 1
    return divmod(int(found.argmax()), 2)


def test_outlines_lie_on_the_border_truth_solid_and_prediction_dashed():
    truth, guess = square(2, 6, 1, 3), square(2, 6, 5, 7)
    picture = outlined(np.zeros((1, 8, 8)), truth, guess, ["organ"], "a case", (1, 1))
    found = pixels(picture)
    assert picture.title == "a case"
    # 8 columns are 320 pixels wide: a mask from column 1 begins at pixel 40.
    for edge, solid in ((40, True), (120, True), (200, False), (280, False)):
        drawn = near(found[100:220, edge - 1 : edge + 1], FIRST).any(axis=1)
        assert drawn.all() == solid
        assert drawn.mean() > 0.3
        assert drawn[0] or drawn[:20].any()
    for edge, solid in ((80, True), (240, True)):
        assert near(found[edge - 1 : edge + 1, 60:100], FIRST).any(axis=0).all() == solid
        assert 0.3 < near(found[edge - 1 : edge + 1, 220:260], FIRST).any(axis=0).mean() < 1
    for row, column in ((160, 80), (160, 160), (160, 240), (20, 20)):
        assert near(found[row, column], (0, 0, 0), 0)


def test_each_class_has_its_colour_and_its_name():
    truth = square(1, 3, 1, 3, 1) + square(1, 3, 5, 7, 2) + square(5, 7, 1, 3, 3)
    found = pixels(outlined(np.zeros((1, 8, 8)), truth, None, ["a", "b", "c"], ""))
    for (row, column), colour in (((80, 40), FIRST), ((80, 200), SECOND), ((240, 40), THIRD)):
        assert near(found[row, column - 1 : column + 1], colour).any()
    # Truth and three names, two a line.
    assert found.shape == (320 + 2 * 14 + 6, 320, 3)
    legend = found[320:]
    for colour in (FIRST, SECOND, THIRD, (255, 255, 255)):
        assert near(legend, colour).any()
    one = pixels(outlined(np.zeros((1, 8, 8)), truth * (truth == 2), None, ["a", "b", "c"], ""))
    assert one.shape == (320 + 14 + 6, 320, 3)
    assert not near(one, FIRST).any()


def test_slice_is_the_one_that_the_truth_covers_most_whatever_the_guess():
    truth, guess = np.zeros((8, 8, 4), int), np.zeros((8, 8, 4), int)
    truth[1, 1:3, 1] = 1
    truth[1, 1:4, 2] = 1
    guess[2, 0:6, 3] = 1
    # 2 voxels in slice 1, 3 in slice 2; the guess has 6 in slice 3.
    image = marked_slices()
    image[0, :, :, 2] *= 1 - truth[:, :, 2]
    assert bright_quadrant(outlined(image, truth, guess, ["organ"], "")) == (0, 1)
    # Without a truth the guess decides.
    nothing = np.zeros_like(truth)
    last = outlined(marked_slices(), None, guess, ["organ"], "").png
    assert outlined(marked_slices(), nothing, guess, ["organ"], "").png != last
    assert bright_quadrant(outlined(marked_slices(), nothing, guess, ["organ"], "")) == (0, 0)


def test_volumes_are_shown_with_anterior_up_and_the_patients_right_on_the_left():
    nothing = np.zeros((8, 8, 4), int)
    places = {}
    for k in range(4):
        at = nothing.copy()
        at[0, 0, k] = 1
        places[k] = bright_quadrant(outlined(marked_slices(), None, at, ["organ"], ""))
    # x high is the patient's right, y high is anterior.
    assert places == {0: (1, 1), 1: (1, 0), 2: (0, 1), 3: (0, 0)}
    # Two dimensions are shown as they are.
    assert bright_quadrant(outlined(marked_slices()[..., 1], None, None, [], "")) == (1, 0)


def test_masks_lie_where_their_image_lies():
    mask = np.zeros((8, 8, 2), int)
    mask[1:3, 5:7, 1] = 1
    for array, dims in ((mask, 3), (mask[:, :, 1], 2)):
        found = pixels(outlined(array[None], array, None, ["organ"], ""))[:320]
        bright = np.argwhere(found.min(axis=-1) > 230)
        edge = np.argwhere(near(found, FIRST))
        assert len(bright) > 1000, dims
        assert np.abs(bright.min(axis=0) - edge.min(axis=0)).max() <= 3
        assert np.abs(bright.max(axis=0) - edge.max(axis=0)).max() <= 3


def test_middle_slice_is_shown_where_the_masks_cover_nothing():
    nothing = np.zeros((8, 8, 4), int)
    expected = bright_quadrant(
        outlined(marked_slices(), None, np.eye(8)[..., None] * [0, 0, 1, 0], ["organ"], "")
    )
    assert bright_quadrant(outlined(marked_slices(), nothing, nothing, ["organ"], "")) == expected
    assert bright_quadrant(outlined(marked_slices(), None, None, [], "")) == expected
    assert bright_quadrant(heatmap(marked_slices(), nothing, "")) == expected


def test_spacing_gives_the_shape():
    flat, volume = np.zeros((1, 8, 8)), np.zeros((1, 8, 4, 2))
    assert pixels(outlined(flat, None, None, [], "", (1, 2))).shape == (160, 320, 3)
    assert pixels(outlined(volume, None, None, [], "", (1, 1, 5))).shape == (160, 320, 3)
    assert pixels(outlined(volume, None, None, [], "", np.array([1, 2, 5]))).shape == (320, 320, 3)
    assert pixels(heatmap(volume, volume[0], "", (1, 2, 5))).shape == (320, 320, 3)
    assert pixels(heatmap(volume, volume[0], "")).shape == (160, 320, 3)
    # Very long and very flat ones are fitted in.
    assert pixels(outlined(flat, None, None, [], "", (90, 1))).shape == (480, 320, 3)
    assert pixels(outlined(flat, None, None, [], "", (1, 90))).shape == (120, 320, 3)


def test_grey_goes_from_the_first_to_the_last_percentile():
    image = np.tile(np.arange(200.0), (200, 1))
    image[0, 0], image[1, 1] = 1e6, -1e6
    grey = pixels(outlined(image[None], None, None, [], ""))[160, :, 0]
    assert grey[:2].max() < 10
    assert grey[-2:].min() > 245
    assert abs(int(grey[160]) - 128) < 12


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 6), (1, 1, 1), (6, 6, 3)])
def test_flat_masks_and_images_do_not_warn(shape, value):
    mask = np.full(shape, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pixels(
            outlined(np.zeros((2, *shape)), mask, mask, ["organ"], "", (1,) * len(shape))
        )
        heatmap(np.zeros((2, *shape)), mask, "")
    # What covers all is outlined along the edge of the picture.
    assert near(found[:, :2], FIRST).any() == bool(value)


def test_heatmap_shows_the_slice_of_the_largest_absolute_value():
    map = np.zeros((8, 8, 4))
    map[1, 6, 1], map[6, 6, 3] = 1.0, -2.0
    picture = heatmap(marked_slices() * 0, map, "why")
    found = pixels(picture)
    assert picture.title == "why"
    # x = 6 is the second column from the left, y = 6 the second row from above.
    assert near(found[60, 60], [0.75 * part for part in BLUE], 12)
    assert near(found[60, 260], (0, 0, 0), 0)
    found = pixels(heatmap(np.zeros((1, 8, 8)), map[:, :, 1] + map[:, :, 3] / 4, ""))
    assert near(found[60, 260], [0.75 * part for part in ORANGE], 12)
    assert near(found[260, 260], [0.375 * part for part in BLUE], 12)


def test_pictures_are_small_sound_and_always_the_same():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(1, 700, 500))
    labels = (noise[0] > 2).astype(int)
    labels[:300, :300] = 1
    for shown in (
        lambda: outlined(noise, labels, None, ["organ"], "a"),
        lambda: heatmap(noise, generator.permutation(noise[0]), "a"),
    ):
        picture = shown()
        assert isinstance(picture, Picture)
        assert len(picture.png) < 60_000
        assert sound(picture.png) is None
    case = (noise[:, :40, :30], labels[:40, :30], labels[5:45, :30], ["organ"], "a")
    assert outlined(*case).png == outlined(*case).png
    assert [kind for kind, _ in chunks(outlined(*case).png)] == ["IHDR", "PLTE", "IDAT", "IEND"]


def test_lines_keep_their_colour_and_a_noisy_image_has_none():
    noise = np.random.default_rng(0).integers(0, 255, (1, 320, 320))
    mask = np.zeros((320, 320), int)
    mask[100:200, 100:200] = 1
    found = pixels(outlined(noise, mask, None, ["organ"], ""))
    assert near(found[110:190, 99:101], FIRST, 60).any(axis=1).mean() > 0.9
    # What is grey stays so.
    assert np.ptp(found[:90], axis=-1).max() == 0


def test_odd_names_and_many_classes_are_drawn():
    names = ["$x_{$", "\n\x00", "", "\u809d" * 40, *(f"class {n}" for n in range(296))]
    mask = np.arange(300).reshape(15, 20) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = outlined(np.zeros((1, 15, 20)), mask, None, names, "<title>")
    assert sound(picture.png) is None
    assert b"title" not in picture.png
    # Truth, twelve names and how many more there are.
    assert pixels(picture).shape == (240 + 7 * 14 + 6, 320, 3)


IMAGE = np.zeros((1, 4, 4))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            (np.zeros((4, 4)), None, None, [], ""),
            "image has the shape (4, 4): give (channels, rows, columns) or (channels, x, y, z)",
        ),
        (
            (np.zeros((1, 0, 4)), None, None, [], ""),
            "image has the shape (1, 0, 4): give (channels, rows, columns) or (channels, x, y, z)",
        ),
        (
            (IMAGE, np.zeros((4, 5)), None, ["a"], ""),
            "truth has the shape (4, 5), the image (4, 4): give one class a pixel, or a mask of "
            "each class",
        ),
        (
            (IMAGE, None, np.full((4, 4), 2), ["a"], ""),
            "guess holds 2: it must hold 0 and the numbers of the 1 classes",
        ),
        (
            (IMAGE, None, np.full((4, 4), 0.5), ["a"], ""),
            "guess holds 0.5: it must hold 0 and the numbers of the 1 classes",
        ),
        ((IMAGE, None, None, [], "", (1,)), "spacing must be 2 numbers above 0, got (1.0,)"),
        ((IMAGE, None, None, [], "", (1, 0)), "spacing must be 2 numbers above 0, got (1.0, 0.0)"),
    ],
)
def test_wrong_input_is_named(arguments, problem):
    with pytest.raises(InputError) as error:
        outlined(*arguments)
    assert str(error.value) == problem


def test_map_of_another_shape_is_named():
    with pytest.raises(InputError) as error:
        heatmap(IMAGE, np.zeros((2, 2)), "")
    problem = "map has the shape (2, 2), the image (4, 4): give one value a pixel"
    assert str(error.value) == problem


# What a site may send.


def chunk(kind, content):
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def chunks(png):
    at = len(START)
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        yield kind.decode(), png[at + 8 : at + 8 + length]
        at += 12 + length


def handmade(width=4, height=4, rows=None, header=b"\x08\0\0\0\0", before=b"", after=b""):
    """A grey PNG, put together here."""
    raw = b"\0" * (width + 1) * height if rows is None else rows
    ihdr = chunk(b"IHDR", struct.pack(">II", width, height) + header)
    return START + ihdr + before + chunk(b"IDAT", zlib.compress(raw)) + after + chunk(b"IEND", b"")


def saved(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (13, 7), (1024, 1024)])
def test_what_pillow_writes_is_sound(mode, size):
    assert sound(saved(Image.new(mode, size))) is None


def test_what_matplotlib_writes_is_sound():
    file = io.BytesIO()
    FigureCanvasAgg(Figure((2, 2))).print_png(file)
    assert b"tEXt" in file.getvalue()
    assert sound(file.getvalue()) is None
    assert sound(handmade()) is None


def animated():
    frames = [Image.new("L", (4, 4), shade) for shade in (0, 90, 200)]
    return saved(frames[0], save_all=True, append_images=frames[1:])


def packed_text():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("note", "x" * 100_000_000, zip=True)
    return saved(Image.new("L", (4, 4)), pnginfo=texts)


GOOD = handmade()
DAMAGED = "it is damaged or cut short"
IHDR = chunk(b"IHDR", struct.pack(">II", 4, 4) + b"\x08\0\0\0\0")
IDAT, IEND = chunk(b"IDAT", zlib.compress(b"\0" * 20)), chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("png", "problem"),
    [
        (b"", "it is not a PNG"),
        (START[:5], "it is not a PNG"),
        (saved(Image.new("L", (4, 4)), "JPEG"), "it is not a PNG"),
        (
            b"<svg><script>alert(1)</script></svg>",
            "it is not a PNG",
        ),
        (START, DAMAGED),
        (GOOD[:-1], DAMAGED),
        (GOOD[:-12], DAMAGED),
        (GOOD[:40], DAMAGED),
        (GOOD[:50] + b"?" + GOOD[51:], DAMAGED),
        (START + IEND, DAMAGED),
        (START + IDAT + IHDR + IEND, DAMAGED),
        (START + IHDR + IHDR + IDAT + IEND, DAMAGED),
        (START + chunk(b"IHDR", b"\0\0\0\x04") + IDAT + IEND, DAMAGED),
        (GOOD + b"\n", "1 bytes follow its end"),
        (GOOD + GOOD, f"{len(GOOD)} bytes follow its end"),
        (animated(), "it holds more than one still picture ('acTL')"),
        (packed_text(), "it holds more than one still picture ('zTXt')"),
        (
            saved(Image.new("L", (4, 4)), icc_profile=b"\0" * 1000),
            "it holds more than one still picture ('iCCP')",
        ),
        (handmade(before=chunk(b"QQQQ", b"")), "it holds more than one still picture ('QQQQ')"),
        (
            handmade(before=chunk(b"\xff\0<>", b"")),
            "it holds more than one still picture ('\ufffd\\x00<>')",
        ),
        (
            handmade(before=chunk(b"tEXt", b"a\0" + b"a" * MOST_BYTES)),
            f"it has {len(GOOD) + MOST_BYTES + 14:,} bytes, more than 512,000",
        ),
        (handmade(1025, 1), "it has 1025 x 1 pixels, more than 1024 x 1024 or none"),
        (handmade(1, 1025), "it has 1 x 1025 pixels, more than 1024 x 1024 or none"),
        (handmade(0, 4), "it has 0 x 4 pixels, more than 1024 x 1024 or none"),
        (
            handmade(2**31 - 1, 2**31 - 1, b""),
            "it has 2147483647 x 2147483647 pixels, more than 1024 x 1024 or none",
        ),
        (handmade(rows=b"\0" * 100_000_000), "its data are not those of 4 x 4 pixels"),
        (handmade(rows=b"\0" * 21), "its data are not those of 4 x 4 pixels"),
        (handmade(rows=b"\0" * 19), "its data are not those of 4 x 4 pixels"),
        (handmade(after=chunk(b"IDAT", b"more")), "its data are not those of 4 x 4 pixels"),
        (START + IHDR + IEND, "its data are not those of 4 x 4 pixels"),
        (START + IHDR + chunk(b"IDAT", b"no zlib") + IEND, "it cannot be decoded (error)"),
        (handmade(header=b"\x08\0\0\0\1"), "it is interlaced"),
        (handmade(header=b"\x08\x09\0\0\0"), "it cannot be decoded (UnidentifiedImageError)"),
    ],
)
def test_what_is_no_sound_picture_is_not_shown(png, problem):
    assert sound(png) == problem


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_anywhere_never_raises_and_never_passes(data):
    good = saved(Image.new("RGB", (9, 9), "teal"))
    at = data.draw(st.integers(0, len(good) - 1))
    other = data.draw(st.binary(max_size=6).filter(lambda found: found != good[at : at + 1]))
    assert sound(good[:at] + other + good[at + 1 :]) is not None


def test_module_needs_no_torch():
    code = "import fedmed_flower.data.pictures, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_masks_of_each_class_are_outlined_also_where_they_overlap():
    image = np.zeros((1, 8, 8))
    left = square(1, 7, 1, 5)
    right = square(1, 7, 3, 7)
    stacked = pixels(outlined(image, np.stack([left, right]), None, ["a", "b"], ""))
    # The same outlines as each alone: class numbers would have cut one of the squares.
    for mask, colour in ((left, FIRST), (right, SECOND)):
        alone = near(pixels(outlined(image, mask, None, ["a"], "")), FIRST)
        kept = near(stacked, colour)[: len(alone)] & alone
        assert kept[:-40].sum() > 0.6 * alone[:-40].sum()
    # Of two that coincide, both are seen.
    same = pixels(outlined(image, np.stack([left, left]), None, ["a", "b"], ""))
    assert near(same[:-40], FIRST).sum() > 200
    assert near(same[:-40], SECOND).sum() > 200
    cut = left + 2 * (right & ~left)
    exclusive = pixels(outlined(image, cut, None, ["a", "b"], ""))
    assert near(exclusive, SECOND).sum() < near(stacked, SECOND).sum()
    # The slice of a volume is that which any of the classes covers most.
    volume = np.zeros((2, 8, 8, 3), int)
    volume[1, 2:5, 2:5, 2] = 1
    picture = outlined(np.zeros((1, 8, 8, 3)), None, volume, ["a", "b"], "")
    assert near(pixels(picture), SECOND).any()


def test_a_mask_of_each_class_holds_0_and_1():
    masks = np.full((2, 4, 4), 2)
    with pytest.raises(InputError, match="guess holds 2: it must hold 0 and 1"):
        outlined(np.zeros((1, 4, 4)), None, masks, ["a", "b"], "")
