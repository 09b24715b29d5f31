import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tiny import ask, context_of, fixed, says

from fedmed_flower import InputError, SiteData
from fedmed_flower.data.site import SPLITS
from fedmed_flower.data.splits import split_patients, splitting_by
from fedmed_flower.privacy.ledger import Ledger


def rows_of(*patients):
    return [{"patient": patient} for patient in patients]


def splits_of(parts):
    return {str(row["patient"]): split for split, rows in parts.items() for row in rows}


names = st.lists(st.text(min_size=1, max_size=4) | st.integers(0, 99), min_size=1, max_size=30)


@given(names, names, st.integers(0, 2**40))
def test_whoever_joins_or_leaves_moves_nobody_else(here, others, seed):
    def split_of(patients):
        try:
            return splits_of(split_patients(rows_of("anchor", *patients), seed, (0.5, 0.2, 0.3)))
        except InputError:  # Nobody is in train.
            return {}

    alone, together = split_of(here), split_of([*others, *here])
    assert all(together[name] == alone[name] for name in alone.keys() & together.keys())


def test_one_patient_more_at_the_head_of_the_list():
    many = [f"p{number:04}" for number in range(200)]
    before, after = (
        splits_of(split_patients(rows_of(*part), 0)) for part in (many, ["a0000", *many])
    )
    assert {name: after[name] for name in many} == before


def test_the_shares_hold_on_average_and_each_patient_is_drawn_alone():
    shares = (0.7, 0.1, 0.2)
    parts = split_patients(rows_of(*range(20_000)), 3, shares)
    counts = [len(parts[split]) for split in SPLITS]
    assert stats.chisquare(counts, np.multiply(shares, 20_000)).pvalue > 1e-4
    split_of = splits_of(parts)
    drawn = [split_of[str(number)] == "train" for number in range(20_000)]
    pairs = [first == second for first, second in itertools.pairwise(drawn)]
    # Neighbours agree with probability 0.7^2 + 0.3^2, as where each is drawn alone.
    assert abs(np.mean(pairs) - 0.58) < 4 * np.sqrt(0.58 * 0.42 / 20_000)


def test_a_share_of_nothing_gets_nobody():
    parts = split_patients(rows_of(*range(500)), 0, (0.85, 0.15, 0.0))
    assert parts["test"] == []
    assert split_patients(rows_of(*range(50)), 0, (1, 0, 0))["train"] == rows_of(*range(50))


def test_however_a_number_is_written_it_is_one_patient():
    same = [7, "7", " 7", "7.0", 7.0, "007", np.int64(7)]
    for seed in range(20):
        parts = split_patients(rows_of(*range(100, 120), *same), seed)
        found = [sum(row["patient"] in same for row in rows) for rows in parts.values()]
        assert sorted(found) == [0, 0, len(same)]


def test_the_key_of_a_hospital_counts_and_no_seed():
    rows = rows_of(*range(300))
    with splitting_by(lambda: b"north"):
        first, second = split_patients(rows, 0), split_patients(rows, 1)
    with splitting_by(lambda: b"south"):
        other = split_patients(rows, 0)
    assert first == second
    assert other != first != split_patients(rows, 0)


def test_a_key_is_not_asked_for_where_the_rows_name_their_split():
    def key():
        raise AssertionError

    rows = [{"patient": n, "split": "train" if n else "test"} for n in range(3)]
    with splitting_by(key):
        assert len(split_patients(rows, 0)["train"]) == 2


NOISED_ONLY = (
    "an earlier run trained with noise on some of these patients: they may be used with noise only"
)


class Splitting(fixed(None)):
    """A hospital that has one table for all runs."""

    image_shape = (1, 2, 2)

    def load_data(self, site):
        images = np.random.default_rng(0).integers(0, 99, (40, 2, 2), np.uint8)
        rows = [{"image": i, "label": n % 2, "patient": f"p{n}"} for n, i in enumerate(images)]
        return SiteData(**split_patients(rows, self.settings.seed))


def kept(folder):
    (table,) = folder.glob("out/*/splits/*.csv")
    content = table.read_text()
    table.unlink()
    return content


def test_no_seed_of_a_server_moves_a_patient_of_a_real_hospital(tmp_path):
    (tmp_path / "out").mkdir()
    node = {"site-name": "north", "data-dir": str(tmp_path), "output-dir": str(tmp_path / "out")}
    tables = set()
    for seed in range(4):
        reply = ask(Splitting, "train", context_of(node_config=node, seed=seed))
        assert not reply.has_error()
        tables.add(kept(tmp_path))
    assert len(tables) == 1


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_whom_a_private_run_has_trained_no_later_run_measures_exactly(tmp_path, monkeypatch, split):
    node = {"site-name": "north", "data-dir": str(tmp_path), "min-evaluated-patients": 2}
    private = {"privacy": "patient", "sampling_rate": 0.5, "target_epsilon": 50.0}
    # A key with which each split has patients of both classes.
    monkeypatch.setattr("fedmed_flower.privacy.ledger.secrets.token_bytes", bytes)
    assert not ask(Splitting, "train", context_of(node_config=node, **private)).has_error()
    for seed in range(3):
        reply = ask(Splitting, "evaluate", context_of(node_config=node, seed=seed), split=split)
        if split == "train":
            text = f"declined: {NOISED_ONLY}"
            assert reply.error.reason == f"site north: {text}"
        else:
            assert "loss" in reply.content["metrics"]


def test_in_a_simulation_the_seed_splits():
    sizes = {
        str(ask(Splitting, "query.describe", context_of(seed=seed)).content["metrics"])
        for seed in range(6)
    }
    assert len(sizes) > 1


def test_a_ledger_without_a_key_refuses_to_split_anew(tmp_path, caplog):
    node = {"site-name": "north", "data-dir": str(tmp_path)}
    assert not ask(Splitting, "query.describe", context_of(node_config=node)).has_error()
    path = tmp_path / "privacy-ledger.sqlite"
    with Ledger(path)._open() as connection:
        connection.execute("DELETE FROM about WHERE key = 'split-key'")
    reply = ask(Splitting, "query.describe", context_of(node_config=node))
    assert reply.error.reason == "site north: InputError"
    text = (
        f"the ledger {path} has no key by which patients are split: restore the file from a copy, "
        "or give each row its split in the hospital's table"
    )
    assert caplog.messages[-1] == f"north: {text}"
    with pytest.raises(InputError, match=says(text)):
        Ledger(path).split_key()


def test_a_split_without_a_class_is_said(tmp_path, caplog):
    image = np.zeros((2, 2), np.uint8)
    rows = [{"image": image, "label": n % 2, "patient": n} for n in range(8)]
    data = SiteData(rows[:4], rows[4:5], rows[5:6])
    node = {"site-name": "north", "data-dir": str(tmp_path)}
    ask(fixed(data), "query.describe", context_of(node_config=node))
    assert "north: no row of the val split has class 1" in caplog.messages
    assert "north: no row of the test split has class 0" in caplog.messages


@pytest.mark.parametrize("kind", ["train", "query.personal"])
def test_whom_a_private_run_has_trained_no_later_run_trains_without_noise(tmp_path, kind):
    node = {"site-name": "north", "data-dir": str(tmp_path)}
    private = {"privacy": "patient", "sampling_rate": 0.5, "target_epsilon": 50.0}
    plain = {"personal_epochs": 1}
    assert not ask(Splitting, "train", context_of(node_config=node, **plain)).has_error()
    assert not ask(Splitting, "train", context_of(node_config=node, **private)).has_error()
    # With a learning rate of nothing, the loss would be that of the private model.
    reply = ask(Splitting, kind, context_of(node_config=node, learning_rate=1e-30, **plain))
    assert reply.error.reason == f"site north: declined: {NOISED_ONLY}"
    simulated = context_of(run_dir=str(tmp_path / "run"), **private)
    assert not ask(Splitting, "train", simulated).has_error()
    assert not ask(Splitting, kind, context_of(run_dir=str(tmp_path / "run"), **plain)).has_error()


def test_a_patient_more_moves_nobody():
    def split_of(names):
        parts = split_patients([{"patient": name} for name in names], 0, (0.6, 0.2, 0.2))
        return {row["patient"]: split for split, rows in parts.items() for row in rows}

    names = [f"p{number:04}" for number in range(200)]
    before = split_of(names)
    after = split_of(["a0000", *names])
    assert {name: after[name] for name in names} == before
