"""Which round's model is kept, and when a run ends, worked out by hand from scripted figures."""

import math
import re

import numpy as np
import pytest
from builders import arrays, dump, run, site_app
from flwr.app import MetricRecord
from flwr.serverapp import strategy as flower
from safetensors.numpy import load_file

from fedmed_flower import InputError
from fedmed_flower.server.history import Kept
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.strategies import DPFedAvg, FedAvg, FedAvgM
from fedmed_flower.strategies.selection import Selection
from fedmed_flower.wire import Sent

W = arrays(w=[0.0, 0.0])
NAN = math.nan


def moved(values, message, context):
    # Each round's model is its own, and depends on all before.
    server_round = message.content["config"]["server-round"]
    return {key: value * 2 + server_round for key, value in values.items()}, {"loss": 1.0}


def scripted(figures, name="auc", train=moved):
    """Return sites that report these figures, one a round; None stands for no figure."""

    def evaluate(values, message, context):
        value = figures[message.content["config"]["server-round"] - 1]
        return {}, {"loss": 0.5} | ({} if value is None else {name: value})

    return site_app(train, evaluate)


def model_of_round(number):
    """Return the model of a round as a run of so many rounds makes it."""
    return dump(run(FedAvg(seed=1), scripted([0.5] * number), W, number).arrays)


def outcome(strategy):
    """Return the round whose model is the result, and the round after which the run stopped."""
    history = strategy.history
    kept = history.kept and history.kept.round
    return kept, history.stopped and history.stopped.round


@pytest.mark.parametrize(
    ("figures", "patience", "kept", "stopped"),
    [
        ([0.6, 0.8, 0.7, 0.75], 0, 2, None),
        ([0.6, 0.8, 0.7, 0.75], 2, 2, None),
        ([0.6, 0.8, 0.7, 0.75, 0.9], 2, 2, 4),
        ([0.6, 0.8, 0.7, 0.75, 0.9], 3, 5, None),
        # Of equal figures the earlier counts, and an equal one is no improvement.
        ([0.8, 0.8, 0.8, 0.8], 3, 1, None),
        ([0.8, 0.8, 0.8, 0.8, 0.9], 3, 1, 4),
        # A round without the figure does not improve.
        ([0.6, None, NAN, 0.9], 2, 1, 3),
        ([0.6, None, 0.7, None, 0.65, 0.9], 2, 3, 5),
        ([NAN, 0.5, 0.4], 0, 2, None),
    ],
)
def test_the_best_round_is_kept_and_patience_ends_a_run(figures, patience, kept, stopped, tmp_path):
    strategy = FedAvg(
        seed=1, keep_model="best", keep_metric="auc", patience=patience, run_dir=tmp_path
    )
    result = run(strategy, scripted(figures), W, len(figures))
    assert outcome(strategy) == (kept, stopped)
    value = pytest.approx(figures[kept - 1])
    assert strategy.history.kept == Kept(kept, "auc", value, "highest")
    assert dump(result.arrays) == model_of_round(kept)
    written = load_file(tmp_path / "model.safetensors")
    assert {key: value.tobytes() for key, value in written.items()} == {
        key: entry[2] for key, entry in model_of_round(kept).items()
    }


def test_training_goes_on_from_the_last_model_whichever_is_kept(tmp_path):
    figures = [0.9, 0.5, 0.6]
    strategy = FedAvg(seed=1, keep_model="best", keep_metric="auc", run_dir=tmp_path)
    run(strategy, scripted(figures), W, 3)
    assert dump(RunFolder(tmp_path).load().arrays) == model_of_round(3)
    assert dump(strategy.result.arrays) == model_of_round(1)


def test_what_is_better_when_lower_is_kept_when_lowest(caplog):
    caplog.set_level("INFO", "flwr.fedmed")
    strategy = FedAvg(keep_model="best", keep_metric="hd95")
    run(strategy, scripted([9.0, 3.0, 5.0], "hd95"), W, 3)
    assert strategy.history.kept == Kept(2, "hd95", 3.0, "lowest")
    assert "rounds are compared by the lowest hd95" in caplog.messages
    assert "the model of round 2 is kept: its hd95, 3, is the lowest" in caplog.messages


def test_without_a_name_the_figure_is_that_by_which_a_run_is_judged():
    strategy = FedAvg(keep_model="best")
    run(strategy, scripted([0.6, 0.8, 0.7], "dice"), W, 3)
    assert strategy.history.kept == Kept(2, "dice", 0.8, "highest")


def test_patience_alone_ends_a_run_and_keeps_the_last_model():
    strategy = FedAvg(seed=1, keep_metric="auc", patience=1)
    result = run(strategy, scripted([0.7, 0.6, 0.9]), W, 3)
    assert outcome(strategy) == (None, 2)
    assert strategy.history.stopped.reason == (
        "auc has not improved in 1 round (patience): the best is 0.7, of round 1"
    )
    assert dump(result.arrays) == model_of_round(2)


def test_a_figure_of_the_server_decides(tmp_path):
    def evaluate(server_round, record):
        return MetricRecord({"loss": [9.0, 0.5, 0.2, 0.3][server_round]})

    strategy = FedAvg(
        seed=1, keep_model="best", keep_metric="server:loss", fraction_evaluate=0.0, patience=1
    )
    result = run(strategy, scripted([0.5] * 3), W, 3, evaluate_fn=evaluate)
    assert strategy.history.kept == Kept(2, "server:loss", 0.2, "lowest")
    assert dump(result.arrays) == model_of_round(2)


def test_a_round_without_the_figure_is_noted():
    strategy = FedAvg(keep_model="best", keep_metric="auc")
    run(strategy, scripted([0.6, None, NAN]), W, 3)
    said = {note.round: note.text for note in strategy.history.notes}
    assert said[3] == "no auc in this round: it counts as one without improvement"
    assert 1 not in said


def test_rounds_that_nobody_evaluates_do_not_improve():
    def evaluate(values, message, context):
        raise RuntimeError("abc"[context.node_config["partition-id"]])

    strategy = FedAvg(keep_model="best", patience=2)
    run(strategy, site_app(moved, evaluate), W, 5)
    assert outcome(strategy) == (None, 2)
    assert strategy.history.stopped.reason == (
        "no figure by which models can be compared has come in 2 rounds"
    )
    assert {note.text for note in strategy.history.notes} == {
        "nobody evaluated the model: the round counts as one without improvement"
    }


def test_rounds_before_the_first_trained_model_do_not_count():
    def failing(values, message, context):
        if message.content["config"]["server-round"] < 3:
            raise RuntimeError("abc"[context.node_config["partition-id"]])
        return moved(values, message, context)

    strategy = FedAvg(keep_model="best", keep_metric="auc", patience=1)
    run(strategy, scripted([0.9, 0.9, 0.5, 0.6], train=failing), W, 4)
    assert outcome(strategy) == (4, None)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"keep_model": "best", "keep_metric": "acu"},
            "keep-metric: there is no figure 'acu': did you mean auc? (round 1 has auc, loss)",
        ),
        (
            {"patience": 1, "keep_metric": "server:auc"},
            "keep-metric: there is no figure 'server:auc': did you mean auc? "
            "(round 1 has auc, loss)",
        ),
    ],
)
def test_a_figure_that_never_comes_is_refused_after_the_first_round(options, text, tmp_path):
    rounds = []

    def train(values, message, context):
        rounds.append(message.content["config"]["server-round"])
        return moved(values, message, context)

    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        run(FedAvg(**options), scripted([0.5] * 3, train=train), W, 3)
    assert {*rounds} == {1}


def test_an_app_without_known_figures_must_name_one():
    def evaluate(values, message, context):
        return {}, {"found": 0.5}

    text = (
        "keep-metric must name the figure by which rounds are compared, got none, and round 1 has "
        "found"
    )
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        run(FedAvg(keep_model="best"), site_app(moved, evaluate), W, 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep_model": "first"}, "keep_model must be 'last' or 'best', got 'first'"),
        ({"patience": -1}, "patience must be a whole number, at least 0, got -1"),
        ({"patience": 1.5}, "patience must be a whole number, at least 0, got 1.5"),
        ({"keep_metric": 3}, "keep_metric must be the name of a figure, got 3"),
        (
            {"keep_metric": "auc"},
            "keep_metric='auc' decides nothing: set keep_model=\"best\" or patience as well",
        ),
        (
            {"keep_model": "best", "fraction_evaluate": 0.0},
            "keep_model and patience need figures of validation rows, and fraction_evaluate is 0: "
            "set it above 0, or name a figure of the server (keep_metric='server:NAME')",
        ),
    ],
)
def test_the_constructor_says_what_is_wrong(options, text):
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        FedAvg(**options)


def test_a_strategy_that_hides_hospitals_is_not_led_by_their_figures():
    private = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "population_size": 3}
    for options in ({"keep_model": "best"}, {"patience": 2}):
        with pytest.raises(InputError, match="cannot keep the best model or stop by figures of"):
            DPFedAvg(**private, **options)
    DPFedAvg(**private, keep_model="best", keep_metric="server:auc")


def sent_by(train, evaluate):
    return Sent({"train": {"a": set(train)}, "evaluate": {"a": {"metrics.auc"}, "b": evaluate}})


def test_in_a_private_run_only_figures_with_noise_decide():
    private, noised = {"arrays.*", "metrics.patient-epsilon"}, {"metrics.auc"}
    exact = sent_by(private, noised)
    text = "in a private run only figures with noise may decide which model is kept, and a"
    with pytest.raises(InputError, match=text):
        Selection("best", "auc").observe(1, W, {"auc": 0.5}, exact)
    # A figure of the server is of no hospital's patients, and a plain run protects nobody.
    assert Selection("best", "server:auc").observe(1, W, {"server:auc": 0.5}, exact) is None
    assert Selection("best").observe(1, W, {"auc": 0.5}, sent_by({"arrays.*"}, noised)) is None
    exact.keys["evaluate"]["a"].add("metrics.noised-counts")
    exact.keys["evaluate"]["b"] = {"metrics.num-examples"}
    assert Selection("best").observe(1, W, {"auc": 0.5}, exact) is None


FIGURES = [0.6, 0.9, 0.7, 0.8, 0.95]


def all_of(strategy):
    history = strategy.history
    return dump(strategy.result.arrays), history.rows, history.kept, history.stopped, history.notes


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [FedAvg, FedAvgM])
def test_a_killed_run_goes_on_to_the_same_model_and_the_same_stop(kind, stop, patience, tmp_path):
    options = {"seed": 3, "keep_model": "best", "keep_metric": "auc", "patience": patience}
    options |= {"server_momentum": 0.5} if kind is FedAvgM else {}

    def killed(values, message, context):
        if message.content["config"]["server-round"] == stop + 1:
            raise KeyboardInterrupt
        return moved(values, message, context)

    whole = kind(**options, run_dir=tmp_path / "whole")
    run(whole, scripted(FIGURES), W, 5)
    assert outcome(whole) == ((2, 4) if patience else (5, None))
    cut = kind(**options, run_dir=tmp_path / "cut")
    if not (patience and stop == 4):
        with pytest.raises(KeyboardInterrupt):
            run(cut, scripted(FIGURES, train=killed), W, 5)
        again = kind(**options, run_dir=tmp_path / "cut", resume=True)
        run(again, scripted(FIGURES), W, 5)
        assert all_of(again) == all_of(whole)
    # A run that has ended keeps its end.
    for _ in range(2):
        again = kind(**options, run_dir=tmp_path / "whole", resume=True)
        run(again, scripted(FIGURES), W, 5)
        assert all_of(again) == all_of(whole)
    for name in ("metrics.csv", "model.safetensors"):
        there = tmp_path / "cut" / name
        if there.exists():
            assert there.read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_goes_on_from_its_last_model(tmp_path):
    options = {"seed": 3, "keep_model": "best", "keep_metric": "auc"}
    whole = FedAvg(**options, run_dir=tmp_path / "whole")
    run(whole, scripted(FIGURES), W, 5)
    run(FedAvg(**options, run_dir=tmp_path / "parts"), scripted(FIGURES), W, 3)
    more = FedAvg(**options, run_dir=tmp_path / "parts", resume=True)
    run(more, scripted(FIGURES), W, 5)
    assert all_of(more) == all_of(whole)


@pytest.mark.parametrize(
    ("name", "now"), [("keep_model", "last"), ("keep_metric", "loss"), ("patience", 3)]
)
def test_what_is_kept_does_not_change_when_a_run_goes_on(name, now, tmp_path):
    options = {"keep_model": "best", "keep_metric": "auc", "patience": 2}
    run(FedAvg(**options, run_dir=tmp_path), scripted(FIGURES), W, 1)
    again = FedAvg(**options | {name: now}, run_dir=tmp_path, resume=True)
    with pytest.raises(InputError, match=f"^{name} of FedAvg was '{options[name]}' when "):
        run(again, scripted(FIGURES), W, 2)


def test_a_checkpoint_that_compared_no_rounds_is_not_gone_on_from(tmp_path):
    run(FedAvg(run_dir=tmp_path), scripted(FIGURES), W, 1)
    checkpoint = RunFolder(tmp_path).load()
    checkpoint.strategy = {}
    RunFolder(tmp_path).save(checkpoint)
    with pytest.raises(InputError, match="by a version that did not compare rounds"):
        run(FedAvg(keep_model="best", run_dir=tmp_path, resume=True), scripted(FIGURES), W, 2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("kept model"), "the model of the best round is missing"),
        (
            lambda state: state.update({"kept model": arrays(v=[1.0, 2.0])}),
            "whose best model has other keys, shapes or dtypes",
        ),
        (
            lambda state: state["kept figure"].update(
                arrays(rounds=np.array([-1, 0], np.int64)).items()
            ),
            "the best round is -1",
        ),
        (lambda state: state["kept figure"].pop("name"), "cannot be resumed"),
    ],
)
def test_a_damaged_state_is_refused(change, text, tmp_path):
    options = {"keep_model": "best", "keep_metric": "auc"}
    run(FedAvg(**options, run_dir=tmp_path), scripted(FIGURES), W, 1)
    checkpoint = RunFolder(tmp_path).load()
    change(checkpoint.strategy_state)
    RunFolder(tmp_path).save(checkpoint)
    with pytest.raises(InputError, match=re.escape(text)):
        run(FedAvg(**options, run_dir=tmp_path, resume=True), scripted(FIGURES), W, 2)


def test_a_strategy_of_flower_does_not_know_these_arguments():
    # They are this package's own: nobody takes them for Flower's.
    with pytest.raises(TypeError):
        flower.FedAvg(keep_model="best")
