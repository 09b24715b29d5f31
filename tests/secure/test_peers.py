"""What the pages say of others' secure sums is so: their own code opens, and is measured, here."""

import importlib
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = list(sys.path)
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
secure, ckks, costs, opened, ours, secaggplus = map(
    importlib.import_module,
    ("secure", "peers.ckks", "peers.costs", "peers.opened", "peers.ours", "peers.secaggplus"),
)
sys.path[:] = PATH


@pytest.fixture
def flower_log():
    """Leave the level of Flower's log as it was."""
    logger = logging.getLogger("flwr")
    before = logger.level
    yield logger
    logger.setLevel(before)


@pytest.mark.parametrize(("threshold", "asked"), [(3, 3), (1, 1)])
def test_one_request_for_both_kinds_of_shares_opens_a_hospital_of_flowers(threshold, asked):
    found = opened.opened(costs.vectors_of(1000, 5), threshold=threshold)
    assert found.difference <= found.step
    assert found.asked == asked
    # 450 of 1,000 rows; Flower rounds to 16 / 2^22.
    assert found.step == pytest.approx(16 / 2**22 / 0.45, rel=1e-6)
    assert found.largest > 1000 * found.step


def test_nothing_is_opened_without_the_masks_of_pairs(monkeypatch):
    monkeypatch.setattr(opened, "generate_shared_key", lambda private, public: os.urandom(32))
    found = opened.opened(costs.vectors_of(1000, 5), threshold=3)
    assert found.difference > 1


def test_a_round_of_flowers_own_server_gives_the_mean_and_a_lost_hospital_is_left_out():
    vectors = costs.vectors_of(1000, 5)
    rows = [400, 450, 500, 550, 600]
    whole = secaggplus.Exchange(secaggplus.hospitals_of(vectors))
    mean = secaggplus.mean_of(whole)
    np.testing.assert_allclose(mean, np.average(vectors, 0, rows), atol=2e-5)
    lossy = secaggplus.Exchange(secaggplus.hospitals_of(vectors), lost=12)
    rest = np.average(vectors[:1] + vectors[2:], 0, rows[:1] + rows[2:])
    np.testing.assert_allclose(secaggplus.mean_of(lossy), rest, atol=2e-5)
    assert np.abs(mean - rest).max() > 1e-3
    assert len(whole.at_hospital["unmask"]) == 5
    assert len(lossy.at_hospital["unmask"]) == 4


def test_a_round_that_ends_early_gives_no_figures(flower_log):
    flower_log.setLevel(logging.CRITICAL)
    exchange = secaggplus.Exchange(secaggplus.hospitals_of(costs.vectors_of(10, 1)))
    with pytest.raises(RuntimeError, match="ended without a mean"):
        secaggplus.mean_of(exchange)


def test_what_a_round_of_flowers_costs_is_counted():
    cost = secaggplus.flower(1000, 5)
    assert cost.exchanges == 4
    assert 2 < cost.upload < 5
    assert 0 < cost.error < 2e-5
    assert min(cost) >= 0
    # Of Flower's masks and shares the server draws and joins more where one is lost.
    assert cost.mask > cost.quantise


def test_a_round_of_ours_gives_the_mean_change_and_a_lost_hospital_is_left_out(tmp_path):
    vectors = costs.vectors_of(1000, 5)
    changes = [vector.astype(float) - costs.model_of(1000) for vector in vectors]
    federation = ours.Federation(tmp_path, vectors)
    lossy = federation.round(1, ["h001"])
    whole = federation.round(2)
    np.testing.assert_allclose(whole.mean, np.average(changes, 0, ours.rows_of(5)), atol=2e-9)
    rows = np.array(ours.rows_of(5)) / sum(ours.rows_of(5))
    rows[1] = 0
    # Those that remain count the same in its place.
    rest = sum(row * change for row, change in zip(rows, changes, strict=True)) / (4 / 5)
    np.testing.assert_allclose(lossy.mean, rest, atol=2e-9)
    assert np.abs(whole.mean - rest).max() > 1e-4
    assert len(whole.mask) == 5
    assert len(lossy.mask) == 4


def test_what_a_round_of_ours_costs_is_counted():
    cost = ours.ours(1000, 5)
    assert cost.exchanges == 2
    assert 1 < cost.upload < 2
    assert 0 < cost.error < 2e-9
    assert min(cost) >= 0


def test_of_three_hospitals_none_may_be_lost():
    cost = ours.ours(1000, 3)
    assert np.isnan(cost.open_one_lost)
    assert secure.seconds_in_words(cost.open_one_lost) == ""


def test_masks_cost_more_than_the_cipher_alone():
    masking = ours.masking(1_000_000, 3)
    assert 0 < masking.cipher < masking.masking


@pytest.mark.parametrize("question", ["seed_of_32_bits", "keys_unsigned", "counts_in_clear"])
def test_what_was_seen_of_flowers_mod_is_so(question):
    assert getattr(opened, question)() is True


def test_seeds_of_two_hospitals_of_flowers_differ_in_28_bits():
    assert opened.varying_bits() == 28


@pytest.mark.parametrize(
    ("weight", "examples", "mean", "warnings"),
    [(2.0, 1000, 2.0, 0), (20.0, 1000, 8.0, 0), (2.0, 10_000, 0.8, 5)],
)
def test_flower_clips_what_is_out_of_range_and_warns_of_many_rows_only(
    weight, examples, mean, warnings
):
    found = opened.clipped(weight, examples)
    assert found.mean == pytest.approx(mean, abs=1e-4)
    assert found.warnings == warnings


def test_a_sum_of_ciphertexts_is_that_of_the_vectors():
    pytest.importorskip("tenseal", reason="needs tenseal")
    found = ckks.encrypted(5000, 3)
    assert 0 < found.error < 1e-6
    assert found.up > 10
    assert found.back == pytest.approx(found.up, rel=0.01)


@pytest.mark.slow
def test_the_benchmark_prints_its_tables(monkeypatch, capsys, flower_log):
    given = ["secure.py", "--size", "1000", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", given)
    secure.main()
    printed = capsys.readouterr().out
    assert "| 3 of 5 | 3 other hospitals | " in printed
    assert "| hospitals accept a threshold of 1 | yes |" in printed
    assert printed.count("| Flower's SecAgg+ | ") == 1
    assert "CKKS" not in printed


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--sites", "2"], "--sites is 2: a sum needs at least 3"),
        (["--size", "9"], "--size is 9: "),
        (["--repeats", "0"], "--repeats is 0: at least 1"),
    ],
)
def test_numbers_that_cannot_be_measured_are_refused(monkeypatch, capsys, given, text):
    monkeypatch.setattr(sys, "argv", ["secure.py", *given])
    with pytest.raises(SystemExit):
        secure.main()
    assert text in capsys.readouterr().err
