"""Run folders that a stranger has written: a card and a comparison, or a refusal of one line."""

import json
import math
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import write_run

from fedmed_flower.errors import InputError
from fedmed_flower.reports.card import card
from fedmed_flower.reports.compare import write_comparison

ODD = st.one_of(
    st.sampled_from([None, True, -1, 0, 10**20, 10**400, 1e308, math.nan, math.inf, "", [], {}]),
    st.sampled_from([[[]], {"a": 1}, ["x"] * 3, "x" * 5000, "<script>", "../../secret", "\ud800"]),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run to compare with, and one that is changed."""
    base = tmp_path_factory.mktemp("world")
    write_run(base / "sound")
    return base


def ways_in(node, here=()):
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*here, key)
        # Of a long list of counts the first ones are enough.
        if isinstance(value, dict | list) and len(here) < 6:
            yield from ways_in(value[:3] if isinstance(value, list) else value, (*here, key))


@st.composite
def changed(draw, tree):
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        ways = [*ways_in(tree)]
        if not ways:
            break
        *way, last = draw(st.sampled_from(ways))
        node = tree
        for key in way:
            node = node[key]
        if draw(st.integers(0, 4)):
            node[last] = draw(ODD)
        else:
            del node[last]
    return tree


def looked_at(folder, sound):
    """Make the card and the comparison; return the errors, which must be refusals in words."""
    errors = []
    try:
        text = card(folder)
    except InputError as error:
        errors.append(str(error))
    else:
        assert "<script" not in text
        text.encode()
    try:
        page = write_comparison([sound, folder], sound.parent / "page.html").read_text()
    except InputError as error:
        errors.append(str(error))
    else:
        assert page.lower().count("<script") == 1
    assert all("\n" not in error for error in errors)
    return errors


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_whatever_the_files_hold_there_is_a_page_or_a_refusal(world, data):
    folder = world / "changed"
    shutil.copytree(world / "sound", folder)
    try:
        name = data.draw(st.sampled_from(["summary.json", "counts.json"]))
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data.draw(changed(tree))))
        looked_at(folder, world / "sound")
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["summary.json", "counts.json", "metrics.csv"])
def test_no_file_leads_out_of_the_folder(world, tmp_path, name):
    secret = tmp_path / "secret.txt"
    secret.write_text('{"the secret": 1}')
    folder = tmp_path / "run"
    shutil.copytree(world / "sound", folder)
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    errors = looked_at(folder, world / "sound")
    assert errors
    assert all(name in error and "the secret" not in error for error in errors)


def test_a_split_behind_a_link_is_not_read(world, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(world / "sound", folder)
    secret = tmp_path / "secret.csv"
    secret.write_text("x,test\n")
    (folder / "splits" / "hospital-1.csv").unlink()
    (folder / "splits" / "hospital-1.csv").symlink_to(secret)
    page = write_comparison([world / "sound", folder], tmp_path / "page.html").read_text()
    assert "whether the patients are the same is not recorded" in page
