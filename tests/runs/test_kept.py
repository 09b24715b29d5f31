"""Which model a whole run keeps: in its folder, its test, its predictor and its report."""

import json

import numpy as np
import pytest
from flwr.app import MetricRecord
from safetensors.numpy import load_file
from tables import TinyTable, predicting, run_tables
from tiny import TinyClient, bits, halves, nodes_of, run_tiny, says, says_of_setting

from fedmed_flower import InputError
from fedmed_flower.prediction import Predictor
from fedmed_flower.reports.card import card
from fedmed_flower.strategies import DPFedAvg, FedAvg

BEST = {"keep_model": "best", "keep_metric": "wanted"}


def wanting(*figures, base=TinyClient, stop_in=0):
    """Return a client whose validation has these figures, one a round; it may be interrupted."""

    class Wanting(base):
        rounds = 0

        def measure(self, model, prepared):
            found = super().measure(model, prepared)
            if self.split == "val":
                # Two sites evaluate in each round.
                found["wanted"] = figures[type(self).rounds // 2]
                type(self).rounds += 1
                if stop_in and type(self).rounds == 2 * stop_in + 1:
                    raise KeyboardInterrupt
            return found

    return Wanting


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def written(folder):
    return {k: v.tobytes() for k, v in load_file(folder / "model.safetensors").items()}


def test_a_run_tests_writes_and_reports_the_model_of_its_best_round(tmp_path):
    two = run_tiny(tmp_path / "two", num_server_rounds=2)
    figures = (0.5, 0.75, 0.25, 0.5, 0.9)
    kept = run_tiny(tmp_path / "kept", wanting(*figures), num_server_rounds=5, patience=2, **BEST)
    assert bits(kept.arrays) == bits(two.arrays) == written(tmp_path / "kept")
    summary = summary_of(tmp_path / "kept")
    assert summary["test"] == summary_of(tmp_path / "two")["test"]
    assert summary["kept"] == {
        "round": 2, "metric": "wanted", "value": 0.75, "direction": "highest",
    }  # fmt: skip
    reason = "wanted has not improved in 2 rounds (patience): the best is 0.75, of round 2"
    assert summary["stopped"] == {"round": 4, "reason": reason}
    assert summary["rounds"] == 4
    log = (tmp_path / "kept" / "log.txt").read_text()
    assert "rounds are compared by the highest wanted" in log
    assert "the model of round 2 is kept: its wanted, 0.75, is the highest" in log
    sentence = (
        "The model of round 2 is kept: its wanted on validation records, 0.750, is the highest"
    )
    assert (tmp_path / "kept" / "report.html").read_text().count(sentence) == 1
    assert sentence in card(tmp_path / "kept")
    for last in (two, tmp_path / "two"):
        assert "is kept" not in (tmp_path / "two" / "report.html").read_text(), last
    assert summary_of(tmp_path / "two")["kept"] is None


def test_the_predictor_holds_the_model_of_the_best_round(tmp_path):
    folder = tmp_path / "kept"
    result, _ = run_tables(folder, wanting(0.9, 0.5, base=TinyTable), 2, baselines=True, **BEST)
    held = Predictor.load(folder).state
    assert {k: v.numpy().tobytes() for k, v in held.items()} == bits(result.arrays)
    one, summary = run_tables(tmp_path / "one", TinyTable, 2, num_server_rounds=1)
    assert bits(one.arrays) == bits(result.arrays)
    # Models for comparison are those of their last round.
    assert summary_of(folder)["test"]["local"].keys() == summary["sites"].keys()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_killed_between_rounds_keeps_the_same_model_and_stops_alike(tmp_path, stop):
    figures = (0.5, 0.75, 0.25, 0.5, 0.9)
    options = {"num_server_rounds": 5, "patience": 2, **BEST}
    whole = run_tiny(tmp_path / "whole", wanting(*figures), **options)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "cut", wanting(*figures, stop_in=stop), **options)
    rest = wanting(*figures[stop:])
    again = run_tiny(tmp_path / "cut", rest, resume=True, **options)
    assert bits(again.arrays) == bits(whole.arrays) == written(tmp_path / "cut")
    for key in ("kept", "stopped", "test", "rounds", "notes"):
        assert summary_of(tmp_path / "cut")[key] == summary_of(tmp_path / "whole")[key]


def test_another_figure_or_patience_does_not_go_on_with_a_run(tmp_path):
    options = {"patience": 2, **BEST}
    run_tiny(tmp_path, wanting(0.5, 0.6), **options)
    for key, value in (("patience", 3), ("keep_metric", "auc"), ("keep_model", "last")):
        name = key.replace("_", "-")
        with pytest.raises(InputError, match=f"^{name} was .* when .* resume with the settings of"):
            run_tiny(tmp_path, **options | {key: value}, num_server_rounds=3, resume=True)


def test_the_strategy_itself_may_say_what_is_kept(tmp_path):
    strategy = FedAvg(keep_model="best", keep_metric="wanted", patience=1)
    run_tiny(tmp_path, wanting(0.5, 0.4, 0.9), strategy=strategy, num_server_rounds=3)
    summary = summary_of(tmp_path)
    assert (summary["kept"]["round"], summary["stopped"]["round"]) == (1, 2)


def test_a_misspelled_figure_ends_a_run_after_its_first_round(tmp_path):
    text = "keep-metric: there is no figure 'wated': did you mean wanted? (round 1 has "
    with pytest.raises(InputError, match=rf"^{says(text)[1:-1]}accuracy, auc, .*wanted\)$"):
        run_tiny(tmp_path, wanting(0.5, 0.6), keep_model="best", keep_metric="wated")
    assert (summary_of(tmp_path)["status"], summary_of(tmp_path)["rounds"]) == ("failed", 1)


def test_a_figure_that_decides_nothing_is_refused(tmp_path):
    text = 'keep-metric needs keep-model="best" or patience above 0, or it decides nothing'
    with pytest.raises(InputError, match=says_of_setting(text)):
        run_tiny(tmp_path / "run", keep_metric="auc")
    assert not (tmp_path / "run").exists()


PRIVATE = {"privacy": "patient", "target_epsilon": 50.0, "delta": 1e-3, "sampling_rate": 0.5}
Declared = predicting("binary")


def test_in_a_private_run_counts_with_noise_decide(tmp_path):
    result, summary = run_tables(
        tmp_path, Declared, keep_model="best", preparation="declared", **PRIVATE
    )
    assert summary["kept"]["metric"] == "auc"
    assert summary["kept"]["round"] in (1, 2)
    assert written(tmp_path) == bits(result.arrays)


def test_in_a_private_run_figures_without_noise_are_refused(tmp_path):
    text = (
        "private-metrics must be true if figures of hospitals decide which model of a private run "
        'is kept, or when it ends: leave it on, or set keep-model="last" and patience=0'
    )
    with pytest.raises(InputError, match=says_of_setting(text)):
        run_tables(tmp_path / "run", Declared, patience=1, private_metrics=False, **PRIVATE)
    assert not (tmp_path / "run").exists()
    # A hospital may leave the noise out for itself.
    nodes = nodes_of(tmp_path, "north", "south", "west")
    nodes[1]["private-metrics"] = False
    with pytest.raises(InputError, match=r"may decide .* and south evaluates without noise"):
        run_tables(
            tmp_path / "run",
            Declared,
            node_configs=nodes,
            preparation="declared",
            patience=1,
            **PRIVATE,
        )


def test_a_private_run_may_be_led_by_what_the_server_measures(tmp_path):
    def evaluate(server_round, arrays):
        return MetricRecord({"auc": 1.0 - server_round / 10})

    run_tiny(
        tmp_path,
        evaluate_fn=evaluate,
        keep_model="best",
        keep_metric="server:auc",
        private_metrics=False,
        **PRIVATE,
    )
    kept = summary_of(tmp_path)["kept"]
    assert kept == {
        "round": 1, "metric": "server:auc", "value": 0.9, "direction": "highest",
    }  # fmt: skip


def test_a_run_that_hides_hospitals_is_not_led_by_their_figures(tmp_path):
    strategy = DPFedAvg(noise_multiplier=1.0, clipping_norm=1.0, population_size=2)
    with pytest.raises(InputError, match="DPFedAvg cannot keep the best model or stop by figures"):
        run_tiny(tmp_path / "run", strategy=strategy, keep_model="best")
    assert not (tmp_path / "run").exists()


def test_only_the_part_that_travels_is_compared_and_the_whole_is_written(tmp_path):
    Halves = type("Halves", (wanting(0.9, 0.5),), {"build_model": lambda self: halves(0)})  # noqa: N806
    head = {"model": lambda: halves(0), "trainable": "head.*"}
    best = run_tiny(tmp_path / "best", Halves, **head, **BEST)
    Plain = type("Plain", (TinyClient,), {"build_model": lambda self: halves(0)})  # noqa: N806
    one = run_tiny(tmp_path / "one", Plain, num_server_rounds=1, **head)
    assert bits(best.arrays) == bits(one.arrays)
    assert written(tmp_path / "best") == written(tmp_path / "one")
    assert set(load_file(tmp_path / "best" / "model.safetensors")) == set(halves(0).state_dict())
    assert np.isfinite(summary_of(tmp_path / "best")["kept"]["value"])
