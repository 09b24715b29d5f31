"""Run folders that a stranger has written: a card and a comparison, or a refusal of one line."""

import json
import shutil

import pytest
from crossed_runs import SUMMARY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_trees import changed_tree
from run_folders import write_run

from fedmed_flower.errors import InputError
from fedmed_flower.reports.card import card
from fedmed_flower.reports.compare import write_comparison
from fedmed_flower.reports.report import write_report


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run to compare with, and one that is changed."""
    base = tmp_path_factory.mktemp("world")
    write_run(base / "sound")
    return base


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
        (folder / name).write_text(json.dumps(data.draw(changed_tree(tree, most=3, deep=6))))
        looked_at(folder, world / "sound")
    finally:
        shutil.rmtree(folder)


OTHER_MODELS = {
    "test": SUMMARY["test"] | {"personal": {"north": {"auc": 0.9, "personal-epochs": 1}}},
    "method": "ditto",
    "kept-layers": ["norm.weight"],
    "compression": "int8",
    "saved": {"from-sites": [10, 40], "to-sites": [40, 40]},
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(changed_tree(OTHER_MODELS))
def test_whatever_is_said_of_other_models_there_is_a_page_or_a_refusal(tmp_path_factory, summary):
    folder = tmp_path_factory.mktemp("run")
    (folder / "summary.json").write_text(json.dumps(summary))
    errors = []
    try:
        page = write_report(folder).read_text()
    except InputError as error:
        errors.append(str(error))
    else:
        assert page.lower().count("<script") == 1
        assert "\u202e" not in page
    assert not [error for error in errors if "\n" in error]


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
