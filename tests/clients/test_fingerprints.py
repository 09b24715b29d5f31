import enum
import functools
import itertools
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import (
    Compose,
    Lambdad,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
    Transform,
)
from numpy import stack
from torch.nn.functional import pad

from fedmed_flower import SegmentationClient
from fedmed_flower.clients import fingerprints
from fedmed_flower.clients.fingerprints import Unreadable, code_digest, code_in, digest
from fedmed_flower.clients.segmentation import LoadPair
from fedmed_flower.images.series import Series

LIMIT = 3.0
log = logging.getLogger("an app")


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Clip(Transform):
    """A transform of an app."""

    kind = "soft"

    def __init__(self, low):
        self.low = low

    def __call__(self, row):
        return min(max(row, self.low), LIMIT)


VALUES = [
    *(None, True, 1, 1.0, "1", b"1", (1,), [1], {1}, frozenset({1}), {"a": 1}, {"a": 1.0}),
    *(math.nan, math.inf, -0.0, 0.0, Path("1"), Colour.RED, Colour.BLUE, Colour, np.float32(1)),
    *(np.ones(2), np.ones((2, 1)), np.ones(2, int), torch.ones(2), torch.zeros(2)),
    *(torch.float32, torch.float64, np.dtype("f4"), torch.device("cpu"), {}),
    *(Series("1", ("a", "b")), Series("1", ("a",)), {"a": 1, "b": 2}, {"b": 2, "a": 1}),
    *(Orientationd("image", "RAS"), Orientationd("image", "LPS"), Spacingd("image", (1, 1, 1))),
    *(Spacingd("image", (1, 1, 2)), Spacingd("image", (1, 1, 1), mode="nearest"), Clip(1), Clip(2)),
    *(ScaleIntensityRanged("image", 0, 1, 0, 1), ScaleIntensityRanged("image", 0, 2, 0, 1)),
    *(NormalizeIntensityd("image"), NormalizeIntensityd("label"), LoadPair(3, 2, (), True)),
    *(LoadPair(3, 2, (0, 7), True), LoadPair(3, 2, (), False)),
]


def test_different_values_have_different_digests():
    digests = [digest(value) for value in VALUES]
    for one, other in itertools.combinations(range(len(VALUES)), 2):
        assert digests[one] != digests[other], (VALUES[one], VALUES[other])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Orientationd(["image", "label"], axcodes="RAS", labels=None),
        lambda: Spacingd("image", pixdim=(1, 2, 3), mode="bilinear"),
        lambda: NormalizeIntensityd("image", channel_wise=True),
        lambda: LoadPair(3, 2, (0, 1), True),
        lambda: Clip(2),
        lambda: {"b": [1, (2.5, None)], "a": np.arange(4)},
    ],
)
def test_equal_values_have_equal_digests(make):
    assert digest(make()) == digest(make())


def test_the_digest_of_a_set_does_not_depend_on_its_order():
    names = [f"n{number}" for number in range(20)]
    backwards = dict.fromkeys(reversed(names), 0).keys()
    assert digest(set(names)) == digest(set(backwards)) == digest({*names[7:], *names[:7]})


class Odd:
    pass


@pytest.mark.parametrize(
    "value",
    [
        lambda row: row,
        Lambdad("image", lambda image: image),
        functools.partial(max, 1),
        Odd(),
        np.array([Odd()]),
        iter([]),
    ],
)
def test_what_could_do_anything_has_no_digest(value):
    with pytest.raises(Unreadable):
        digest(value)


def test_a_value_that_holds_itself_has_no_digest():
    value = []
    value.append(value)
    with pytest.raises(Unreadable, match="in more than 20 levels"):
        digest(value)


def test_what_a_transform_of_the_app_takes_from_its_module_counts(monkeypatch):
    before = digest(Clip(1))
    monkeypatch.setitem(globals(), "LIMIT", 4.0)
    changed = digest(Clip(1))
    monkeypatch.setattr(Clip, "kind", "hard")
    assert len({before, changed, digest(Clip(1))}) == 3


def test_what_a_transform_of_the_app_takes_from_a_function_around_it_counts():
    def made(limit):
        class Around(Transform):
            def __call__(self, row):
                return min(row, limit)

        return Around()

    assert digest(made(1)) == digest(made(1)) != digest(made(2))
    with pytest.raises(Unreadable):
        digest(made(Odd()))


def test_the_code_of_a_client_is_its_package_and_what_is_installed(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    files = {"__init__.py": "", "client.py": "from own import rest\nclass Client: pass\n"}
    for name, text in (files | {"rest.py": "x = 1\n"}).items():
        (tmp_path / "own" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    from own.client import Client

    first = code_digest([Client])
    for change in ("# other\n", "x = 1\n"):
        (tmp_path / "own" / "rest.py").write_text(change)
        fingerprints._source_digest.cache_clear()
        assert (code_digest([Client]) == first) is (change == "x = 1\n")
    installed = fingerprints._environment()
    assert any(name.startswith("monai-") for name in installed)
    monkeypatch.setattr(fingerprints, "_environment", lambda: [*installed, "other-1.0.dist-info"])
    assert code_digest([Client]) != first


def test_a_class_without_a_source_file_has_no_digest():
    made = type("Made", (SegmentationClient,), {"__module__": "nowhere"})
    with pytest.raises(Unreadable, match="the module nowhere, which has no source file"):
        code_digest([made])


def test_the_number_of_threads_counts(monkeypatch):
    first = code_digest([SegmentationClient])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert code_digest([SegmentationClient]) != first


def test_a_package_may_have_so_many_files_and_no_more(tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.py").write_text("")
    monkeypatch.setattr(fingerprints, "_MOST_FILES", 3)
    fingerprints._source_digest(str(tmp_path))
    (tmp_path / "3.py").write_text("")
    fingerprints._source_digest.cache_clear()
    with pytest.raises(Unreadable, match="more than 3 source files"):
        fingerprints._source_digest(str(tmp_path))


def test_classes_and_functions_of_transforms_within_transforms_are_found():
    steps = [Spacingd("image", (1, 1, 1)), Compose([Clip(1), Lambdad("image", doubled)])]
    found = set(code_in(steps))
    assert {"Spacingd", "Spacing", "SpatialResample", "Clip", "Lambdad"} <= {
        part.__name__ for part in found
    }
    assert doubled in found


def doubled(image):
    return image * FACTOR


def raised(image):
    """A function of the app that calls another."""
    log.debug("raised")
    return pad(stack([doubled(image) + 1]), (1, 1))


FACTOR = 2.0
NETWORK = torch.nn.Linear(1, 1)


def by_network(image):
    return NETWORK(image)


def test_a_function_at_the_top_of_a_module_has_a_digest_of_what_it_takes_from_there(monkeypatch):
    functions = [doubled, raised]
    before = [digest(Lambdad("image", function)) for function in functions]
    assert before == [digest(Lambdad("image", function)) for function in functions]
    assert before[0] != before[1]
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    for one, function in zip(before, functions, strict=True):
        assert digest(Lambdad("image", function)) != one
    monkeypatch.setattr(doubled, "__defaults__", (np.ones(2),))
    assert len({*before, digest(Lambdad("image", doubled))}) == 3
    with pytest.raises(Unreadable, match=r"torch\.nn\.modules\.linear\.Linear, which is no plain"):
        digest(by_network)


def test_a_function_without_a_name_is_told_how_to_get_one():
    text = (
        r"the function \S*test_fingerprints\.<lambda> \(define it by its name at the top of a "
        r"module, and not as a lambda or within another function\)"
    )
    with pytest.raises(Unreadable, match=text):
        digest(Lambdad("image", MADE))
    with pytest.raises(Unreadable, match=r"the function \S*test_fingerprints\.wrapped"):
        digest(wrapped)


MADE = lambda image: image  # noqa: E731


@functools.wraps(doubled)
def wrapped(image):
    return image


wrapped.__qualname__ = "wrapped.inner"


def test_the_source_of_a_function_is_part_of_the_code(tmp_path, monkeypatch):
    (tmp_path / "own_steps.py").write_text("def same(image):\n    return image\n")
    monkeypatch.syspath_prepend(tmp_path)
    from own_steps import same

    first = code_digest(code_in([Lambdad("image", same)]))
    (tmp_path / "own_steps.py").write_text("def same(image):\n    return 2 * image\n")
    fingerprints._source_digest.cache_clear()
    assert code_digest(code_in([Lambdad("image", same)])) != first
