"""What each room exports is what the docs list, and is there."""

import importlib
import re
from pathlib import Path

import pytest

import fedmed_flower

PACKAGE = Path(fedmed_flower.__file__).parent
ROOT = PACKAGE.parent
TEXT = (ROOT / "docs" / "reference" / "public-names.md").read_text()
LISTED = {
    row[1]: re.findall(r"`(\w+)`", row[2]) for row in re.finditer(r"\| `([\w.]+)` \| (.*) \|", TEXT)
}
ROOMS = ["fedmed_flower", *(f"fedmed_flower.{path.parent.name}" for path in
                            sorted(PACKAGE.glob("*/__init__.py")))]  # fmt: skip
# Rooms of which nothing is public.
INSIDE = {"approval", "arrays", "cli"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_exports_what_the_docs_list(room):
    names = getattr(importlib.import_module(room), "__all__", [])
    assert sorted(names) == LISTED.get(room, [])
    assert bool(names) != (room.rpartition(".")[2] in INSIDE)
    for name in names:
        assert getattr(importlib.import_module(room), name).__name__ == name


def test_another_name_is_none_of_a_room():
    with pytest.raises(
        AttributeError, match=r"^module 'fedmed_flower.trees' has no attribute 'x'$"
    ):
        fedmed_flower.trees.x  # noqa: B018


TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.toml")]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_whatever_the_docs_name_is_there(path):
    # The changelog tells of what has moved.
    text = path.read_text().partition("### If you have used an earlier state")[0]
    for full in {*re.findall(r"\bfedmed_flower(?:\.\w+)+", text)}:
        *parents, name = full.split(".")
        try:
            importlib.import_module(full)
        except ImportError:
            for depth in range(len(parents), 0, -1):
                try:
                    found = importlib.import_module(".".join(parents[:depth]))
                    break
                except ImportError:
                    continue
            for part in [*parents[depth:], name]:
                assert hasattr(found, part), full
                found = getattr(found, part)
