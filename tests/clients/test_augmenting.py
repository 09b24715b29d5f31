import math

import numpy as np
import pytest
import torch
from scipy.ndimage import rotate
from tiny import says

from fedmed_flower.clients.augmenting import random_affine, random_intensity
from fedmed_flower.errors import InputError
from fedmed_flower.privacy.validate import require_independent


def drawing(monkeypatch, *draws):
    """Let `random_affine` draw this for each image, in parts of what is the most.

    Three turns, a scale, three shifts.
    """
    values = torch.tensor([list(draws)], dtype=torch.float32)
    monkeypatch.setattr(
        torch, "rand", lambda count, width, device=None: (values.expand(count, width) + 1) / 2
    )


def numbered(*shape):
    return torch.arange(math.prod(shape), dtype=torch.float32).view(1, 1, *shape)


def test_a_quarter_turn_in_2d_worked_out_by_hand(monkeypatch):
    drawing(monkeypatch, 1, 0, 0, 0, 0, 0, 0)
    image = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])[None, None]
    turned, mask = random_affine(image, image.to(torch.uint8), turn=math.pi / 2)
    wanted = torch.tensor([[3.0, 6.0, 9.0], [2.0, 5.0, 8.0], [1.0, 4.0, 7.0]])
    torch.testing.assert_close(turned[0, 0], wanted, atol=1e-4, rtol=0)
    assert mask.dtype == torch.uint8
    assert torch.equal(mask[0, 0], wanted.to(torch.uint8))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_quarter_turn_in_3d_is_about_one_axis(monkeypatch, axis):
    draws = [0] * 7
    draws[axis] = 1
    drawing(monkeypatch, *draws)
    image = numbered(4, 4, 4)
    turned, mask = random_affine(image, image.to(torch.int64), turn=math.pi / 2)
    # The axes of the grid are counted from the last: x, y, z.
    plane = [a for a in (0, 1, 2) if a != 2 - axis]
    wanted = [torch.rot90(image[0, 0], times, plane) for times in (1, -1)]
    (place,) = [n for n, one in enumerate(wanted) if torch.equal(mask[0, 0], one.to(torch.int64))]
    torch.testing.assert_close(turned[0, 0], wanted[place], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("dims", "which", "axis"), [(2, 4, -1), (2, 5, -2), (3, 4, -1), (3, 5, -2), (3, 6, -3)]
)
def test_a_shift_is_a_part_of_the_length_of_its_axis(monkeypatch, dims, which, axis):
    draws = [0] * 7
    draws[which] = 1
    drawing(monkeypatch, *draws)
    shape = (8, 4, 12)[-dims:]
    image = numbered(*shape)
    moved, mask = random_affine(image, image.long(), shift=0.25)
    step = shape[axis] // 4
    inside = torch.roll(image, -step, axis).narrow(axis, 0, shape[axis] - step)
    kept = moved.narrow(axis, 0, shape[axis] - step)
    torch.testing.assert_close(kept, inside, atol=1e-3, rtol=0)
    assert torch.equal(mask.narrow(axis, 0, shape[axis] - step), inside.long())
    # Beyond the border: the border's values, and no structure.
    edge = image.narrow(axis, shape[axis] - 1, 1)
    beyond = moved.narrow(axis, shape[axis] - step, step)
    torch.testing.assert_close(beyond, edge.expand_as(beyond), atol=1e-3, rtol=0)
    assert not mask.narrow(axis, shape[axis] - step, step).any()


def test_scaling_by_a_half_shows_the_middle_twice_as_large(monkeypatch):
    drawing(monkeypatch, 0, 0, 0, -1, 0, 0, 0)
    image = numbered(8, 8)
    moved, mask = random_affine(image, image.long(), scale=0.5)
    middle = image[0, 0, 2:6, 2:6].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(mask[0, 0], middle.long())
    assert moved[0, 0].min() == pytest.approx(float(middle.min()) - 0.25 * 9, abs=1e-3)


def test_turns_are_in_radians(monkeypatch):
    drawing(monkeypatch, 1, 0, 0, 0, 0, 0, 0)
    y, x = np.mgrid[-1:1:41j, -1:1:41j]
    image = np.exp(-8 * ((x - 0.3) ** 2 + (y / 0.6) ** 2)).astype(np.float32)
    turned, _ = random_affine(torch.from_numpy(image)[None, None], turn=0.5)
    wanted = rotate(image, math.degrees(0.5), reshape=False, order=1)
    np.testing.assert_allclose(turned[0, 0], wanted, atol=0.02)
    assert np.abs(turned[0, 0].numpy() - image).max() > 0.2


KINDS = [torch.float32, torch.float64, torch.float16, torch.uint8, torch.int16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
def test_nothing_moves_where_nothing_may(dims, kind):
    shape = (3, 2, 7, 10, 5)[: dims + 2]
    generator = torch.Generator().manual_seed(dims)
    images = torch.randint(0, 200, shape, generator=generator).to(kind)
    masks = torch.randint(0, 5, (3, 1, *shape[2:]), generator=generator).to(torch.uint8)
    moved, same = random_affine(images, masks, turn=0.0, scale=0.0, shift=0.0)
    assert (moved.dtype, same.dtype) == (kind, torch.uint8)
    torch.testing.assert_close(moved, images, atol=1e-3 * kind.is_floating_point, rtol=1e-3)
    assert torch.equal(same, masks)


def test_whole_numbers_are_rounded_not_cut_off():
    torch.manual_seed(0)
    images = torch.full((2, 1, 9, 9), 77, dtype=torch.uint8)
    moved, none = random_affine(images, turn=3.0, scale=0.5, shift=0.3)
    assert none is None
    assert torch.equal(moved, images)


@pytest.mark.parametrize("dims", [2, 3])
def test_image_and_mask_move_alike(dims):
    torch.manual_seed(dims)
    # Where the image is linear, its value says where it came from.
    shape = (24, 20, 22)[:dims]
    ramp = torch.arange(shape[0], dtype=torch.float32).view(-1, *[1] * (dims - 1)).expand(shape)
    images = ramp.expand(6, 1, *shape).contiguous()
    moved, masks = random_affine(images, images.to(torch.uint8), 0.4, 0.2, 0.1)
    seen = masks > 0
    assert (moved - masks)[seen].abs().max() <= 0.51
    assert seen.float().mean() > 0.7
    assert not torch.equal(moved[0], moved[1])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("seed", [1, 2])
def test_distances_stay_as_they_are_and_nothing_is_mirrored(dims, seed):
    torch.manual_seed(seed)
    size = 33
    axes = torch.meshgrid(*[torch.linspace(-1, 1, size)] * dims, indexing="ij")
    moved, _ = random_affine(torch.stack(axes)[None], turn=3.0, scale=0.0, shift=0.0)
    half = size // 2
    # The image of each axis is linear: its slopes at the middle are a rotation matrix.
    slopes = torch.empty(dims, dims)
    for axis in range(dims):
        ahead, back = [half] * dims, [half] * dims
        ahead[axis], back[axis] = half + 2, half - 2
        slopes[:, axis] = moved[(0, slice(None), *ahead)] - moved[(0, slice(None), *back)]
    slopes *= half / 4
    torch.testing.assert_close(slopes @ slopes.T, torch.eye(dims), atol=1e-3, rtol=0)
    assert torch.det(slopes) == pytest.approx(1, abs=1e-3)
    assert abs(float(slopes.trace()) - dims) > 0.01


@pytest.mark.parametrize("name", ["turn", "scale", "shift"])
def test_each_image_draws_its_own(name):
    torch.manual_seed(0)
    images = numbered(8, 8).expand(5, 1, 8, 8)
    most = {"turn": 0.0, "scale": 0.0, "shift": 0.0} | {name: 0.5}
    moved, _ = random_affine(images, **most)
    assert len(moved.flatten(1).unique(dim=0)) == 5


def test_the_same_seed_gives_the_same_change():
    images = numbered(6, 6)
    outcomes = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outcomes.append(random_affine(images)[0])
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


@pytest.mark.parametrize("dims", [2, 3])
def test_each_image_is_changed_by_itself(dims):
    torch.manual_seed(5)
    images = torch.randn(4, 1, *(9, 8, 7)[:dims])
    masks = (images > 0).to(torch.uint8)

    def change(joined):
        moved, changed = random_affine(joined[:, :1], joined[:, 1:].to(torch.uint8))
        return torch.cat([random_intensity(moved), changed.float()], 1)

    joined = torch.cat([images, masks.float()], 1)
    torch.manual_seed(5)
    assert not torch.equal(change(joined), joined)
    require_independent(change, joined)
    # The same check sees a change that lets one image follow from another.
    with pytest.raises(InputError, match="augment mixes patients"):
        require_independent(lambda batch: change(batch + batch.flip(0)), joined)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("turn", -0.1, "turn must lie in 0 to 3.142, got -0.1"),
        ("turn", 10.0, "turn must lie in 0 to 3.142, got 10.0"),
        ("turn", math.nan, "turn must lie in 0 to 3.142, got nan"),
        ("scale", 1.0, "scale must lie in 0 to 0.999, got 1.0"),
        ("scale", -1.0, "scale must lie in 0 to 0.999, got -1.0"),
        ("shift", 9.5, "shift must lie in 0 to 9, got 9.5"),
        ("shift", -0.5, "shift must lie in 0 to 9, got -0.5"),
    ],
)
def test_bounds_of_what_may_move(name, value, text):
    with pytest.raises(InputError, match=says(text)):
        random_affine(numbered(4, 4), **{name: value})


@pytest.mark.parametrize("name", ["gain", "offset", "noise"])
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_bounds_of_intensities(name, value):
    with pytest.raises(
        InputError, match=says(f"{name} must be at least 0 and finite, got {value}")
    ):
        random_intensity(numbered(4, 4), **{name: value})


def test_values_are_scaled_and_offset_image_by_image_as_far_as_is_said():
    torch.manual_seed(0)
    images = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand(400, 3, 2, 5)
    changed = random_intensity(images, gain=0.3, offset=0.5, noise=0.0)
    offsets, gains = changed[:, :, 0], changed[:, :, 1] - changed[:, :, 0]
    for found, middle, most in ((offsets, 0.0, 0.5), (gains, 1.0, 0.3)):
        torch.testing.assert_close(found, found[:, :1, :1].expand_as(found), atol=1e-6, rtol=0)
        away = found[:, 0, 0] - middle
        assert away.abs().max() <= most + 1e-6
        assert away.max() > 0.95 * most
        assert away.min() < -0.95 * most
    assert abs(np.corrcoef(offsets[:, 0, 0], gains[:, 0, 0])[0, 1]) < 0.25


def test_noise_has_the_deviation_that_is_said_and_differs_everywhere():
    torch.manual_seed(0)
    changed = random_intensity(torch.zeros(10, 1, 50, 50), 0.0, 0.0, noise=0.2)
    assert float(changed.std()) == pytest.approx(0.2, rel=0.02)
    assert len(changed.unique()) > 20_000


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_without_changes_intensities_stay_and_so_does_their_kind(kind):
    images = torch.randn(2, 1, 3, 3).to(kind)
    same = random_intensity(images, 0.0, 0.0, 0.0)
    assert same.dtype == kind
    assert torch.equal(same, images)
    assert random_intensity(images).dtype == kind
