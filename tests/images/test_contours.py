"""Outlines filled as matplotlib tells points in polygons, and RTSTRUCT files as masks."""

import logging
import re

import nibabel
import numpy as np
import pytest
from dicom_files import AXIAL, SAGITTAL, STUDY, write_rtstruct, write_seg, write_series
from matplotlib.path import Path as Polygon
from pydicom.uid import generate_uid

from fedmed_flower.errors import InputError
from fedmed_flower.images.contours import filled
from fedmed_flower.images.reading import read_image, read_label

OBLIQUE = (0.8, 0.6, 0, 0, 0, -1)
SIDES = (20, 16, 6)
SPACING = (0.7, 0.8, 3.0)
ORIGIN = (-9.0, -20.0, 31.0)


def says(text):
    return f"^{re.escape(text)}$"


def by_matplotlib(outlines, sides):
    centres = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), -1).reshape(-1, 2)
    inside = np.zeros(len(centres), bool)
    for outline in outlines:
        inside ^= Polygon([*outline, outline[0]], closed=True).contains_points(centres)
    return inside.reshape(sides)


def star(rng, middle, radius, count=40):
    angles = np.sort(rng.uniform(0, 2 * np.pi, count))
    radii = radius * rng.uniform(0.4, 1, count)
    return np.add(middle, radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1))


# Filling


@pytest.mark.parametrize("seed", range(20))
def test_outlines_are_filled_as_matplotlib_tells_points_in_polygons(seed):
    rng = np.random.default_rng(seed)
    # Some reach out of the plane, and some lie within or across others.
    outlines = [star(rng, rng.uniform(-5, 45, 2), rng.uniform(1, 25)) for _ in range(5)]
    wanted = by_matplotlib(outlines, (40, 33))
    assert np.array_equal(filled(outlines, (40, 33)), wanted)
    assert np.array_equal(filled([outline[::-1] for outline in outlines], (40, 33)), wanted)
    # The first point may be repeated at the end.
    assert np.array_equal(filled([[*line, line[0]] for line in outlines], (40, 33)), wanted)
    assert wanted.any()


def test_an_outline_that_crosses_itself_counts_by_its_windings():
    bow = np.array([(0.5, 0.5), (10.5, 8.3), (10.5, 0.5), (0.5, 8.3)])
    assert np.array_equal(filled([bow], (12, 10)), by_matplotlib([bow], (12, 10)))


def test_a_ring_within_another_is_a_hole_and_a_third_fills_it_again():
    rings = [np.array([(-r, -r), (-r, r), (r, r), (r, -r)]) + 10.0 for r in (8.5, 5.5, 2.5)]
    assert filled(rings, (21, 21)).sum() == 17**2 - 11**2 + 5**2


def test_a_keyhole_keeps_its_hole():
    outer = [(1.5, 1.5), (1.5, 12.5), (12.5, 12.5), (12.5, 1.5)]
    inner = [(4.5, 4.5), (9.5, 4.5), (9.5, 9.5), (4.5, 9.5)]
    keyhole = np.array([*outer, outer[0], *inner, inner[0]])
    assert np.array_equal(filled([keyhole], (15, 15)), filled([outer, inner], (15, 15)))
    assert filled([keyhole], (15, 15)).sum() == 11**2 - 5**2


def test_neighbours_share_an_outline_but_no_voxel():
    square = [(2, 2), (2, 6), (6, 6), (6, 2)]
    marked = [filled([np.add(square, (4 * i, 4 * j))], (12, 12)) for i in (0, 1) for j in (0, 1)]
    total = np.sum(marked, axis=0)
    assert total.max() == 1
    assert total.sum() == 8 * 8
    # Noise of the arithmetic does not decide about a centre on an outline.
    noisy = np.add(square, np.random.default_rng(0).normal(0, 1e-9, (4, 2)))
    assert np.array_equal(filled([noisy], (12, 12)), marked[0])


@pytest.mark.parametrize(
    "outline",
    [
        [(3.2, 3.2), (3.8, 3.2), (3.8, 3.8)],
        [(2, 1), (2, 5), (2, 3)],
        [(-9, -9), (-9, -3), (-3, -3)],
    ],
)
def test_an_outline_around_no_centre_marks_nothing(outline):
    assert not filled([np.array(outline, float)], (8, 8)).any()


# Files


@pytest.fixture(scope="module", params=[AXIAL, SAGITTAL, OBLIQUE])
def turned(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "series"
    voxels = np.random.default_rng(0).integers(0, 99, SIDES)
    write_series(folder, voxels, SPACING, origin=ORIGIN, orientation=request.param, seed=4, **STUDY)
    return folder, request.param


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "series"
    write_series(folder, np.zeros(SIDES), SPACING, origin=ORIGIN, seed=4, **STUDY)
    return read_image(folder, 3)


def placed(outline, plane, orientation=AXIAL):
    """Points (n, 2) of column and row on a plane, in DICOM's millimetres."""
    right, down = np.reshape(orientation, (2, 3)).astype(float)
    outline = np.asarray(outline, float)
    across = np.cross(right, down) * SPACING[2] * plane
    return ORIGIN + outline[:, :1] * 0.7 * right + outline[:, 1:] * 0.8 * down + across


def square(low, high):
    return np.array([(low, low), (low, high), (high, high), (high, low)], float)


def read(path, image, names, dims=3):
    return read_label(path, dims, 1 + len(names), image=image, names=names)[0].numpy()


def test_contours_are_filled_on_the_planes_of_the_image(turned, tmp_path):
    folder, orientation = turned
    rng = np.random.default_rng(1)
    wanted = np.zeros(SIDES, np.uint8)
    regions = {"Liver ": [], "spleen": []}
    for number, contours in enumerate(regions.values(), start=1):
        for plane in (1, 2, 4):
            middle = (4.6 + 10 * (number - 1), 8)
            rings = [star(rng, middle, radius) for radius in (5, 2.5)]
            contours += [placed(ring, plane, orientation) for ring in rings]
            wanted[:, :, plane][by_matplotlib(rings, SIDES[:2])] = number
    path = write_rtstruct(tmp_path / "rs.dcm", regions)
    image = read_image(folder, 3)
    assert np.array_equal(read(path, image, ("liver", "Spleen")), wanted)
    assert {*np.unique(wanted)} == {0, 1, 2}
    # The image as NIfTI, in other axes.
    volume = nibabel.Nifti1Image(image[0].numpy(), image.affine.numpy())
    nibabel.save(nibabel.as_closest_canonical(volume), tmp_path / "x.nii")
    found = read(path, read_image(tmp_path / "x.nii", 3), ("liver", "spleen"))
    label = nibabel.Nifti1Image(wanted, image.affine.numpy())
    assert np.array_equal(found, nibabel.as_closest_canonical(label).get_fdata())


def test_a_region_that_no_class_names_is_left_out(image, tmp_path):
    regions = {"BODY": [placed(square(0.5, 14.5), 1)], "GTV-1": [placed(square(2.5, 5.5), 1)]}
    path = write_rtstruct(tmp_path / "rs.dcm", regions)
    assert read(path, image, ["gtv_1"]).sum() == 9
    text = (
        "it has none of the structures heart, but BODY, GTV-1: name the classes so, or rename its "
        "structures"
    )
    with pytest.raises(InputError, match=says(text)):
        read(path, image, ["heart"])
    with pytest.raises(InputError, match="GTV-1 and BODY both claim 9 voxels"):
        read(path, image, ("GTV-1", "BODY"))


@pytest.mark.parametrize(
    ("places", "text"),
    [
        (
            (1, 2.5),
            "liver: it outlines a plane 1.5 mm beside the nearest of the image, whose planes are 3 "
            "mm apart, and nothing is interpolated: save it as NIfTI on the image's grid",
        ),
        (
            (5, 7),
            "liver: it outlines a plane 6 mm outside of the image: give the whole series, or the "
            "mask of this one",
        ),
        (
            (0, 2, 4),
            "liver is outlined on each 2. plane alone (6 mm), and nothing is interpolated: "
            "interpolate it in the program that it was drawn in",
        ),
    ],
)
def test_contours_beside_the_planes_of_the_image_are_refused(image, tmp_path, places, text):
    contours = [placed(square(2.5, 5.5), place) for place in places]
    path = write_rtstruct(tmp_path / "rs.dcm", {"liver": contours})
    with pytest.raises(InputError, match=says(text)):
        read(path, image, ["liver"])


def test_two_lesions_of_one_plane_each_are_no_gap(image, tmp_path):
    contours = [placed(square(2.5, 5.5), place) for place in (0, 2)]
    assert read(write_rtstruct(tmp_path / "rs.dcm", {"a": contours}), image, ["a"]).sum() == 18


def test_a_tilted_contour_and_one_outside_of_the_image_are_refused(image, tmp_path):
    tilted = placed(square(2.5, 5.5), 1)
    tilted[2:, 2] += 2
    path = write_rtstruct(tmp_path / "rs.dcm", {"liver": [tilted]})
    with pytest.raises(InputError, match="liver: its planes are tilted against those of the image"):
        read(path, image, ["liver"])
    path = write_rtstruct(tmp_path / "rs.dcm", {"liver": [placed(square(2.5, 5.5) + 200, 1)]})
    with pytest.raises(InputError, match="liver lies outside of the image: give the outlines of"):
        read(path, image, ["liver"])


def test_points_and_open_contours_are_left_out_and_named(image, tmp_path, caplog):
    point = ("POINT", placed([(3, 3)], 1))
    line = ("OPEN_PLANAR", placed([(3, 3), (4, 4)], 1))
    area = placed(square(2.5, 5.5), 1)
    closed = ("CLOSEDPLANAR_XOR", area)
    path = write_rtstruct(tmp_path / "rs.dcm", {"a": [point, closed, line, point], "b": [point]})
    with caplog.at_level(logging.WARNING, "flwr.fedmed"):
        assert read(path, image, ["a"]).sum() == 9
    assert caplog.messages == [
        f"{path}: contours of a that enclose nothing are left out: 1 of type OPEN_PLANAR, 2 of "
        "type POINT"
    ]
    text = "b has no closed contour, but 1 of type POINT: outline it"
    with pytest.raises(InputError, match=says(text)):
        read(path, image, ["b"])


def test_another_frame_of_reference_is_refused(image, tmp_path):
    regions = {"a": [placed(square(2.5, 5.5), 1)]}
    path = write_rtstruct(tmp_path / "rs.dcm", regions, frame_of_reference=generate_uid())
    with pytest.raises(InputError, match="it lies in another frame of reference than the image"):
        read(path, image, ["a"])


def test_one_slice_takes_its_contours(turned, tmp_path):
    folder, orientation = turned
    contours = [placed(square(1.5, 3.5 + plane), plane, orientation) for plane in range(4)]
    path = write_rtstruct(tmp_path / "rs.dcm", {"a": contours})
    counts = {}
    for file in folder.iterdir():
        image = read_image(file, 2)
        found = read(path, image, ["a"], dims=2)
        rows, columns = np.nonzero(found)
        # Rows and columns of a square are the same.
        assert {*rows} == {*columns}
        counts[found.sum()] = counts.get(found.sum(), 0) + 1
    assert counts == {4: 1, 9: 1, 16: 1, 25: 1, 0: 2}


def test_outlines_and_segments_are_joined(image, tmp_path):
    outlines = write_rtstruct(tmp_path / "rs.dcm", {"a": [placed(square(2.5, 5.5), 1)]})
    pixels = np.zeros((16, 20))
    pixels[10:12, 9:12] = 1
    segments = write_seg(
        tmp_path / "m.dcm", [{"SegmentLabel": "b"}], [(1, np.add(ORIGIN, (0, 0, 3)), pixels)],
        spacing=(0.8, 0.7),
    )  # fmt: skip
    found = read([outlines, segments], image, ("a", "b"))
    assert np.bincount(found.ravel()).tolist() == [20 * 16 * 6 - 15, 9, 6]


def test_damaged_outlines_are_refused_by_name(image, tmp_path):
    path = write_rtstruct(tmp_path / "rs.dcm", {"a": [placed(square(2.5, 5.5), 1)]})
    whole = path.read_bytes()
    for length in range(len(whole) - 1, 0, -5):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read(path, image, ["a"])
    odd = write_rtstruct(tmp_path / "odd.dcm", {"a": [placed(square(2.5, 5.5), 1)[:, :2]]})
    with pytest.raises(InputError, match=f"^{re.escape(str(odd))} cannot be read: "):
        read(odd, image, ["a"])
