"""Hospitals agree on a preparation by secure sums as they do by contributions of their own."""

from dataclasses import replace

import numpy as np
import pytest
from key_files import make_hospitals
from safetensors.numpy import load_file
from tables import SCHEMA, TinyTable, changed, holding, predicting, run_tables
from tiny import says_of_setting

from fedmed_flower import MedicalClient, SiteData
from fedmed_flower.data.preparation import Preparation
from fedmed_flower.errors import InputError
from fedmed_flower.server.run_folder import RunFolder

DECLARED = replace(SCHEMA, categories={"sex": ("f", "m"), "ward": ("a", "b", "c")})


class Declared(TinyTable):
    schema = DECLARED


def agreed_in(folder):
    return Preparation.from_text(RunFolder(folder).read_config()["run"]["agreed"])


def both(folder, client, num_sites=4, **more):
    """Run an app in plain and by secure sums; return what was agreed and the model of each."""
    found = []
    for secure in ("none", "sum"):
        place = folder / secure
        options = {"learning_rate": 0.01, "preparation": "federated", "secure": secure} | more
        run_tables(place, client, num_sites, **options)
        found.append((agreed_in(place), load_file(place / "model.safetensors")))
    return found


def require_alike(first, second):
    for column, mean in first.means.items():
        assert second.means[column] == pytest.approx(mean, rel=1e-12)
        assert second.scales[column] == pytest.approx(first.scales[column], rel=1e-12)
    assert [*first.means] == [*second.means]
    assert (first.categories, first.still) == (second.categories, second.still)


@pytest.mark.parametrize("task", ["binary", "continuous"])
def test_the_preparation_and_the_model_are_those_of_a_plain_run(tmp_path, task):
    client = Declared if task == "binary" else predicting(task, ranges={})
    plain, by_sums = both(tmp_path, client)
    require_alike(plain[0], by_sums[0])
    for key, array in plain[1].items():
        # Weights move in steps of the ring; a target's unit is a factor of its own.
        assert np.abs(by_sums[1][key] - array).max() <= 1e-6 * max(1.0, np.abs(array).max())


def test_a_column_that_too_few_hospitals_can_tell_is_left_out(tmp_path, caplog):
    without = changed(age=float("nan"))
    client = holding({0: without, 1: without}, Declared)
    run_tables(tmp_path, client, 4, secure="sum", num_server_rounds=1)
    found = agreed_in(tmp_path)
    # By its declared range, as if no hospital had a value.
    assert (found.means["age"], found.scales["age"]) == (50.0, 25.0)
    assert found.means["pressure"] != 150.0
    text = "column age: fewer than 3 hospitals have enough patients with a value"
    assert text in caplog.messages


def test_a_hospital_with_few_patients_is_in_no_sum_of_columns(tmp_path):
    def few(data):
        return SiteData(data.train[:9], data.val, data.test, source="made up", generated=True)

    run = {"min_cell_count": 10, "num_server_rounds": 1}
    plain, by_sums = both(tmp_path, holding({2: few}, Declared), **run)
    require_alike(plain[0], by_sums[0])


def test_real_hospitals_agree_by_sums(tmp_path):
    names = ["east", "north", "south"]
    run_tables(tmp_path / "plain", Declared, 3, num_server_rounds=1)
    nodes = make_hospitals(tmp_path, names)
    run_tables(
        tmp_path / "run",
        Declared,
        3,
        node_configs=[nodes[name] for name in names],
        secure="sum",
        num_server_rounds=1,
    )
    # The rows differ by the names of the patients alone.
    require_alike(agreed_in(tmp_path / "plain"), agreed_in(tmp_path / "run"))


def test_categories_must_be_declared(tmp_path):
    text = (
        "secure=\"sum\" needs categories of 'ward' in the schema: which categories a hospital has "
        "leaves no hospital in a secure sum"
    )
    with pytest.raises(InputError, match=says_of_setting(text)):
        run_tables(tmp_path / "run", TinyTable, 4, secure="sum")
    assert not (tmp_path / "run").exists()


def test_an_app_must_say_what_its_contributions_are(tmp_path):
    client = type("Own", (Declared,), {"columns_to_sum": MedicalClient.columns_to_sum})
    text = (
        'secure="sum" needs to know of which columns Own contributes moments before the first '
        "round: define columns_to_sum"
    )
    with pytest.raises(InputError, match=says_of_setting(text)):
        run_tables(tmp_path / "run", client, 4, secure="sum")


def test_who_stands_out_is_not_known(tmp_path):
    _, summary = run_tables(tmp_path / "run", Declared, 4, secure="sum", num_server_rounds=1)
    (note,) = [note for note in summary["notes"] if note["phase"] == "before training"]
    text = "no hospital was compared with the others: what its columns hold leaves in secure sums"
    assert (note["site"], note["text"]) == ("all", f"{text} alone")
    text = (
        'secure="sum" excludes outlying=stop, by which the server learns statistics of each '
        "hospital's columns: leave it out"
    )
    with pytest.raises(InputError, match=f"^{text}"):
        run_tables(tmp_path / "other", Declared, 4, secure="sum", outlying="stop")


def test_a_sum_that_cannot_be_opened_ends_the_run_before_it_begins(tmp_path, caplog):
    class Failing(Declared):
        def contribute(self):
            if self.site.index == 2:
                raise ValueError("a broken disk")
            return super().contribute()

    with pytest.raises(InputError) as caught:
        run_tables(tmp_path / "run", Failing, 4, secure="sum")
    assert str(caught.value).startswith("the statistics of columns cannot be summed: ")
    assert 'set preparation="declared" and give ranges in the schema' in str(caught.value)
    assert any("hospital-3 left out of contribution" in text for text in caplog.messages)
