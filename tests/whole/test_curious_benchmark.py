"""The attacks of the benchmark work where a rule is taken away, and are judged fairly."""

import importlib
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import fedmed_flower.clients.base
import fedmed_flower.genomics.client
from fedmed_flower.clients.book import Book
from fedmed_flower.privacy.ledger import Ledger

PATH = list(sys.path)
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
script, files, membership, tables, victim = map(
    importlib.import_module,
    ("curious_server", "curious.files", "curious.membership", "curious.tables", "curious.victim"),
)
sys.path[:] = PATH
sys.modules.pop("client_app", None)


def held(*values):
    """Return what draws these numbers for the victim, and others for other hospitals."""
    return lambda seed: np.array(values, float)[:, None] + 100 * seed


def test_each_patient_is_found_once_and_chance_is_what_other_hospitals_give():
    found = victim.scored([1, 1.04, 3, 250], held(1, 1, 2, 50), 0.05)
    # 250 is the fourth patient of the second of 20 others.
    assert found == (2, 4, 2 / 20)
    assert victim.scored([1, 9, 2, 50], held(1, 1, 2, 50), 0.05, named=True) == (3, 4, 1 / 20)
    assert victim.scored([], held(1), 0.05) == (0, 1, 1 / 20)


@pytest.mark.parametrize(
    ("right", "of", "chance", "works"),
    [
        *[(10, 10, 0.05, True), (1, 10, 0.05, False), (9, 12, 6, False), (12, 12, 6, True)],
        *[(0, 5, 0.0, False), (1, 5, 0.0, True), (480, 960, 463, False), (520, 960, 463, True)],
    ],
)
def test_an_attack_works_that_is_right_more_often_than_chance_once_in_a_thousand(
    right, of, chance, works
):
    assert victim.Found(right, of, chance).works is works


def test_networks_are_what_they_are_said_to_be():
    ages = np.array([20.0, 61.3, 90.0])
    features = torch.tensor(np.column_stack([(ages - 50) / 25, [1, -2, 0], [0, 1, 1]])).float()
    plain = {name: torch.tensor(value) for name, value in tables.linear(2.0, -7.0).items()}
    np.testing.assert_allclose(
        features @ plain["weight"][0] + plain["bias"], 2 * ages - 7, rtol=1e-5
    )
    layers = tables.hidden([30, 60], [0.5, 2.0], [1.0, -3.0])
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Dropout(0), torch.nn.Linear(2, 1)
    )
    network.load_state_dict({name: torch.tensor(value) for name, value in layers.items()})
    expected = 0.5 * np.maximum(ages - 30, 0) - 6 * np.maximum(ages - 60, 0)
    np.testing.assert_allclose(network(features)[:, 0].detach(), expected, atol=1e-3)


def test_a_batch_of_ten_is_read_from_a_plain_update_and_not_with_a_budget(tmp_path):
    assert tables.rows(tmp_path, 0.0, 10) == (10, 10, pytest.approx(0.05))
    assert not tables.rows(tmp_path, 1.0, 10).works


def test_what_is_withheld_of_few_is_read_where_the_hospital_counts_to_one(tmp_path):
    few = {"batch": 1, "updates": 6}
    assert tables.rows(tmp_path, 0.0, **few).right == 0
    assert tables.rows(tmp_path, 0.0, **few, min_train_patients=1).works
    for name, least, expected in (("usual", 10, 0), ("one", 1, 6)):
        (tmp_path / name).mkdir()
        found = files.lesions(tmp_path / name, 0.0, 2, min_evaluated_patients=least)
        assert found.right == expected


def test_a_coarse_hospital_tells_ages_to_nobody_who_asks_once(tmp_path):
    assert tables.ages(tmp_path, 0.0).works
    assert not tables.ages(tmp_path, 0.0, coarse_figures=True).works


def test_with_seeds_that_move_patients_runs_measure_whom_the_first_was_trained_on(
    tmp_path, monkeypatch
):
    assert tables.second_run(tmp_path, 0.0, "test").right == 0
    monkeypatch.setattr(fedmed_flower.clients.base, "splitting_by", lambda key: nullcontext())
    monkeypatch.setattr(Ledger, "has_trained", lambda ledger, patients: False)
    (tmp_path / "moving").mkdir()
    found = tables.second_run(tmp_path / "moving", 0.0, "test")
    assert 0 < found.right <= found.of


def test_with_seeds_that_move_patients_and_no_book_sums_give_each_age(tmp_path, monkeypatch):
    assert not tables.preparation(tmp_path, 0.0).works
    monkeypatch.setattr(fedmed_flower.clients.base, "splitting_by", lambda key: nullcontext())
    monkeypatch.setattr(Book, "column", lambda book, name, inside, values=None: inside)
    assert tables.preparation(tmp_path, 0.0)[:2] == (60, 60)


def test_gentle_slopes_give_all_genotypes_and_steep_ones_where_nobody_weighs(tmp_path, monkeypatch):
    assert files.mild(tmp_path, 0.0)[:2] == (960, 960)
    assert not files.steep(tmp_path, 0.0).works
    terms = fedmed_flower.genomics.client.logistic_terms
    monkeypatch.setattr(
        fedmed_flower.genomics.client,
        "logistic_terms",
        lambda *given: (terms(*given)[0], np.zeros(len(given[-1]))),
    )
    assert files.steep(tmp_path, 0.0)[:2] == (960, 960)
    for attack in (files.steep, files.mild):
        assert not attack(tmp_path, 1.0).works


def models(shift, count=16, images=400):
    """Return models whose odds are higher by a number for images they were trained on."""
    rng = np.random.default_rng(0)
    own = rng.normal(0, 5, images)
    insides = [rng.random(images) < 0.5 for _ in range(count)]
    return [
        membership.Trained(inside, own + shift * inside + rng.normal(size=images))
        for inside in insides
    ]


@pytest.mark.parametrize(("shift", "low", "high"), [(0.0, 0.42, 0.58), (2.0, 0.85, 0.95)])
def test_ratios_tell_members_where_training_moves_their_odds_and_losses_hardly(shift, low, high):
    target, *shadows = models(shift)
    ratio = roc_auc_score(target.inside, membership.likelihood_ratios(target, shadows))
    assert low < ratio < high
    # How hard an image is covers what being trained on adds.
    assert roc_auc_score(target.inside, target.odds) < 0.68


def test_an_image_that_all_shadows_were_trained_on_tells_nothing():
    target, *shadows = models(2.0)
    for number, shadow in enumerate(shadows):
        shadow.inside[:2] = (True, False)
        shadow.inside[2] = number == 0
    ratios = membership.likelihood_ratios(target, shadows)
    assert ratios[0] == ratios[1] == 0
    assert ratios[2] != 0


def test_canaries_refute_much_without_noise_and_never_what_a_budget_promises():
    assert membership.refuted(200, 0.0) > 3.0
    assert membership.refuted(200, 2.0) <= 2.0


def attack(with_budget):
    def run(folder, epsilon):
        return victim.Found(with_budget if epsilon else 9, 9, 1)

    return script.Attack("rows", "rows", "all", run)


@pytest.mark.parametrize(("with_budget", "code"), [(1, 0), (9, 1)])
def test_the_script_fails_where_an_attack_works_with_a_budget(
    monkeypatch, capsys, with_budget, code
):
    monkeypatch.setattr(script, "ATTACKS", (attack(with_budget),))
    monkeypatch.setattr(sys, "argv", ["curious_server.py", "--only", "rows"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == code
    lines = capsys.readouterr().out.splitlines()
    told = {1: "1 of 9", 9: "**9 of 9, works**"}[with_budget]
    assert f"| rows | all | **9 of 9, works** | {told} | 1 |" in lines


def test_every_attack_is_one_line_and_its_name_can_be_chosen():
    parts = [one.part for one in script.ATTACKS]
    assert len({(one.part, one.what) for one in script.ATTACKS}) == len(parts)
    assert all(re.fullmatch(r"[a-z-]+", part) for part in parts)
    assert not {*parts} & {*membership.PARTS}
