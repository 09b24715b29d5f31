"""Rounds with validate="next": the same figures as with "own", an exchange fewer a round."""

import math
from collections import Counter
from typing import ClassVar

import pytest
from builders import FakeGrid, arrays, dump, error_reply, reply, run, site_app
from flwr.app import ConfigRecord, MetricRecord
from tiny import says

from fedmed_flower import InputError
from fedmed_flower.engines.local import LocalGrid
from fedmed_flower.server.listener import Listener
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.strategies import DPFedAvg, FedAvg, FedAvgM, FedMedian, FedProx

W = arrays(w=[0.0, 0.0])
NAN = math.nan


def moved(values, message, context):
    server_round = message.content["config"]["server-round"]
    return {key: value * 2 + server_round for key, value in values.items()}, {"loss": 1.0}


def scripted(figures, train=moved, ended=None):
    """Return sites that report these figures, one a round, in either way; None is no figure."""

    def figures_of(server_round, site):
        value = figures[server_round - 1]
        return {"loss": 0.5 + site} | ({} if value is None else {"auc": value})

    def evaluate(values, message, context):
        if ended is not None:
            ended()
        server_round = message.content["config"]["server-round"]
        return {}, figures_of(server_round, context.node_config["partition-id"])

    app = site_app(train, evaluate)

    def answer(message, context):
        answered = app(message, context)
        config = message.content["config"]
        if config.get("validate"):
            metrics = figures_of(config["server-round"] - 1, context.node_config["partition-id"])
            answered.content["validation"] = MetricRecord({"num-examples": 1} | metrics)
        return answered

    return answer


def outcome(strategy):
    """Return the round whose model is the result, and the round after which the run stopped."""
    history = strategy.history
    kept = history.kept and history.kept.round
    return kept, history.stopped and history.stopped.round


def all_of(strategy):
    history = strategy.history
    return (
        dump(strategy.result.arrays),
        sorted(history.rows),
        history.kept,
        history.sent.table(),
        history.failures,
        sorted(history.notes, key=lambda note: note.round),
        strategy.result.evaluate_metrics_clientapp,
    )


class Counting(LocalGrid):
    """Counts the exchanges of a run by kind."""

    exchanges: ClassVar[Counter] = Counter()

    def push_messages(self, messages):
        messages = list(messages)
        self.exchanges.update({message.metadata.message_type for message in messages})
        return super().push_messages(messages)


@pytest.mark.parametrize("kind", [FedAvg, FedAvgM, FedMedian])
@pytest.mark.parametrize("figures", [[0.6, 0.9, 0.7, 0.8], [NAN, 0.5, None, 0.4], [0.5]])
def test_all_figures_and_the_kept_model_are_those_of_exchanges_of_their_own(
    kind, figures, monkeypatch
):
    monkeypatch.setattr("fedmed_flower.engines.local.LocalGrid", Counting)
    options = {"seed": 1, "keep_model": "best", "keep_metric": "auc"}
    options |= {"server_momentum": 0.5} if kind is FedAvgM else {}
    found = {}
    for validate in ("own", "next"):
        Counting.exchanges.clear()
        strategy = kind(**options, validate=validate)
        run(strategy, scripted(figures), W, len(figures))
        found[validate] = all_of(strategy)
        evaluations = len(figures) if validate == "own" else 1
        assert Counting.exchanges == {"train": len(figures), "evaluate": evaluations}
    assert found["own"] == found["next"]


@pytest.mark.parametrize(
    ("figures", "patience", "own", "late"),
    [
        # Known in round 5 that round 4 is the second without a better figure.
        ([0.6, 0.8, 0.7, 0.75, 0.7, 0.9], 2, (2, 4), (2, 5)),
        # Round 5 was trained by then, and is better: the run goes on.
        ([0.6, 0.8, 0.7, 0.75, 0.9, 0.7], 2, (2, 4), (5, None)),
        ([0.6, 0.5, 0.4, 0.9, 0.9], 1, (1, 2), (1, 3)),
        ([0.6, 0.5, 0.7, 0.6, 0.6, 0.9], 1, (1, 2), (3, 5)),
        ([0.6, 0.8, 0.7, 0.75], 2, (2, None), (2, None)),
    ],
)
def test_patience_acts_a_round_later(figures, patience, own, late):
    options = {"keep_model": "best", "keep_metric": "auc", "patience": patience}
    for validate, wanted in (("own", own), ("next", late)):
        strategy = FedAvg(**options, validate=validate)
        run(strategy, scripted(figures), W, len(figures))
        assert outcome(strategy) == wanted
        done = strategy.history.stopped.round if wanted[1] else len(figures)
        for number in range(1, done + 1):
            figure = strategy.result.evaluate_metrics_clientapp[number]["auc"]
            assert figure == pytest.approx(figures[number - 1])
    if late == (2, 5):
        assert strategy.history.stopped.reason == (
            "auc has not improved in 3 rounds (patience): the best is 0.8, of round 2"
        )


def test_a_figure_of_the_server_acts_at_once():
    def evaluate(server_round, record):
        return MetricRecord({"loss": [9.0, 0.5, 0.2, 0.3, 0.4][server_round]})

    def outcome_of(validate):
        options = {"keep_model": "best", "keep_metric": "server:loss", "patience": 1}
        strategy = FedAvg(**options, validate=validate)
        run(strategy, scripted([0.5] * 4), W, 4, evaluate_fn=evaluate)
        return all_of(strategy), strategy.history.stopped

    assert outcome_of("own") == outcome_of("next")


FIGURES = [0.6, 0.9, 0.7, 0.8, 0.75, 0.95]


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_killed_run_goes_on_to_the_same_bits(stop, patience, tmp_path):
    options = {"seed": 3, "keep_model": "best", "keep_metric": "auc", "patience": patience}
    options |= {"validate": "next"}

    def killed(values, message, context):
        if message.content["config"]["server-round"] == stop + 1:
            raise KeyboardInterrupt
        return moved(values, message, context)

    whole = FedAvg(**options, run_dir=tmp_path / "whole")
    run(whole, scripted(FIGURES), W, 6)
    assert outcome(whole) == ((2, 5) if patience else (6, None))
    cut = FedAvg(**options, run_dir=tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        run(cut, scripted(FIGURES, killed), W, 6)
    again = FedAvg(**options, run_dir=tmp_path / "cut", resume=True)
    run(again, scripted(FIGURES), W, 6)
    assert all_of(again) == all_of(whole)
    # A run that has ended keeps its end.
    again = FedAvg(**options, run_dir=tmp_path / "whole", resume=True)
    run(again, scripted(FIGURES, killed), W, 6)
    assert all_of(again) == all_of(whole)
    for name in ("metrics.csv", "model.safetensors"):
        parts = [(tmp_path / folder / name).read_bytes() for folder in ("cut", "whole")]
        assert parts[0] == parts[1]


def test_a_run_killed_in_its_last_validation_validates_again(tmp_path):
    def ended():
        raise KeyboardInterrupt

    options = {"seed": 3, "keep_model": "best", "keep_metric": "auc", "validate": "next"}
    whole = FedAvg(**options)
    run(whole, scripted(FIGURES), W, 6)
    with pytest.raises(KeyboardInterrupt):
        run(FedAvg(**options, run_dir=tmp_path), scripted(FIGURES, ended=ended), W, 6)
    assert RunFolder(tmp_path).load().server_round == 6
    again = FedAvg(**options, run_dir=tmp_path, resume=True)
    run(again, scripted(FIGURES), W, 6)
    assert all_of(again) == all_of(whole)


def test_a_finished_run_goes_on_and_validates_no_model_twice(tmp_path):
    options = {"seed": 3, "keep_model": "best", "keep_metric": "auc", "validate": "next"}
    whole = FedAvg(**options)
    run(whole, scripted(FIGURES), W, 6)
    run(FedAvg(**options, run_dir=tmp_path), scripted(FIGURES), W, 3)
    more = FedAvg(**options, run_dir=tmp_path, resume=True)
    run(more, scripted(FIGURES), W, 6)
    assert all_of(more) == all_of(whole)


def test_a_run_does_not_go_on_in_the_other_way(tmp_path):
    run(FedAvg(validate="next", run_dir=tmp_path), scripted(FIGURES), W, 1)
    with pytest.raises(InputError, match=r"^validate of FedAvg was 'next' when .* is 'own' now"):
        run(FedAvg(run_dir=tmp_path, resume=True), scripted(FIGURES), W, 2)


def test_a_line_names_the_round_of_its_figures_and_listeners_hear_each_row_once(caplog):
    heard = []

    class Hearing(Listener):
        def round_ended(self, server_round, rows):
            heard.append((server_round, rows))

    caplog.set_level("INFO", "flwr.fedmed")
    # The run goes on after it has validated round 5 by itself.
    figures = [0.6, 0.8, 0.7, 0.75, 0.9, 0.7]
    strategy = FedAvg(validate="next", keep_metric="auc", patience=2, listeners=[Hearing()], seed=1)
    run(strategy, scripted(figures), W, 6)
    lines = [m.rpartition("  ")[0] for m in caplog.messages if m.startswith("round ")]
    assert lines == [
        "round 1/6  train loss 1.0000",
        "round 2/6  train loss 1.0000  val auc 0.6000 (round 1)",
        "round 3/6  train loss 1.0000  val auc 0.8000 (round 2)",
        "round 4/6  train loss 1.0000  val auc 0.7000 (round 3)",
        "round 5/6  train loss 1.0000  val auc 0.7500 (round 4)",
        "round 5 is validated  val auc 0.9000  val loss 1.5000",
        "round 6/6  train loss 1.0000",
        "round 6 is validated  val auc 0.7000  val loss 1.5000",
    ]
    assert [row for _, rows in heard for row in rows] == strategy.history.rows
    assert [number for number, _ in heard] == [1, 2, 3, 4, 5, 5, 6, 6]


# --- Sites that fail ----------------------------------------------------------------------------


def sites(answers, count=3):
    """Return a grid whose node n replies well, but to training in round 2 as `answers` say.

    An answer maps the message to a reply; None stands for silence.
    """

    def good(message):
        node_id = message.metadata.dst_node_id
        values = {"w": [node_id, 0.0]} if message.metadata.message_type == "train" else None
        answered = reply(node_id, values, f"site-{node_id}", to=message, auc=node_id / 10)
        if message.content["config"].get("validate"):
            part = {"num-examples": 1, "auc": node_id / 100}
            answered.content["validation"] = MetricRecord(part)
        return answered

    def answer(message):
        config = message.content["config"]
        train = message.metadata.message_type == "train"
        if train and config["server-round"] == 2 and message.metadata.dst_node_id in answers:
            changed = answers[message.metadata.dst_node_id]
            return changed and changed(message, good(message))
        return good(message)

    return FakeGrid(list(range(1, count + 1)), answer)


def part_of(record):
    """Return what replaces the validation part of a reply."""

    def changed(message, answered):
        del answered.content["validation"]
        if record is not None:
            answered.content["validation"] = record
        return answered

    return changed


def failures_of(strategy):
    return [(f.round, f.phase, f.site, f.reason) for f in strategy.history.failures]


def validated(strategy, server_round=1):
    """Return the figures of sites and of all together in a round."""
    return {
        site: value
        for number, phase, site, metric, value in strategy.history.rows
        if (number, phase, metric) == (server_round, "val", "auc")
    }


NO_FIGURES = (
    "the training reply has no validation figures, as validate=next needs them: take a client of "
    'this package, of the same version as the server\'s, or validate="own"'
)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, NO_FIGURES),
        (arrays(w=[1.0]), NO_FIGURES),
        (ConfigRecord({}), NO_FIGURES),
        (ConfigRecord({"why": 3}), NO_FIGURES),
        (ConfigRecord({"why": "site site-2: ValueError"}), "ValueError"),
        (MetricRecord({"auc": 0.5}), "the metric num-examples is missing"),
        (MetricRecord({"num-examples": -1}), "num-examples must be at least 0 and at most 1e+09, "),
        (MetricRecord({"num-examples": [1, 2]}), "num-examples is a list instead of one number"),
        (
            MetricRecord({f"m{number}": 0.0 for number in range(1001)}),
            "the reply has 1,001 metrics, at most 1,000 are taken",
        ),
    ],
)
def test_a_malformed_part_costs_a_site_its_figures_and_nothing_else(record, reason):
    strategy = FedAvg(validate="next")
    result = strategy.start(sites({2: part_of(record)}), W, 2)
    ((number, phase, site, text),) = failures_of(strategy)
    assert (number, phase, site) == (1, "val", "site-2")
    assert text.startswith(reason)
    assert validated(strategy) == {"site-1": 0.01, "site-3": 0.03, "all": 0.02}
    assert result.arrays["w"].numpy().tolist() == [2.0, 0.0]
    assert strategy.history.rounds_trained() == {"site-1": 2, "site-2": 2, "site-3": 2}


def spoilt(message, answered):
    answered.content["arrays"] = arrays(v=[1.0])
    return answered


def failed(message, answered):
    return error_reply(2, "site site-2: ValueError", to=message)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoilt, "1 arrays are missing, such as w"),
        (failed, "ValueError"),
        (None, "no reply within 3600 s"),
    ],
)
def test_figures_count_with_a_training_reply_that_counts(change, reason):
    strategy = FedAvg(validate="next")
    result = strategy.start(sites({2: change}), W, 2)
    assert failures_of(strategy) == [
        (2, "train", "site-2", reason),
        (1, "val", "site-2", "no figures: its reply to the training of round 2 did not count"),
    ]
    assert validated(strategy) == {"site-1": 0.01, "site-3": 0.03, "all": 0.02}
    assert validated(strategy, 2).keys() == {"site-1", "site-2", "site-3", "all"}
    assert result.arrays["w"].numpy().tolist() == [2.0, 0.0]


def test_figures_count_although_a_rule_leaves_the_update_out():
    def far(message, answered):
        answered.content["arrays"] = arrays(w=[1e6, 0.0])
        return answered

    strategy = FedAvg(validate="next", max_update_norm=5.0)
    strategy.start(sites({2: far}), W, 2)
    assert [failure[:3] for failure in failures_of(strategy)] == [(2, "train", "site-2")]
    assert validated(strategy) == {
        "site-1": 0.01, "site-2": 0.02, "site-3": 0.03, "all": pytest.approx(0.02),
    }  # fmt: skip


def test_figures_that_nobody_asked_for_are_malformed():
    def answer(message):
        answered = reply(1, {"w": [1.0, 0.0]}, "a", to=message)
        answered.content["validation"] = MetricRecord({"num-examples": 1, "auc": 0.5})
        return answered

    for validate in ("own", "next"):
        strategy = FedAvg(validate=validate)
        strategy.start(FakeGrid([1], answer), W, 1)
        assert failures_of(strategy)[0] == (
            1, "train", "a", "the reply has 2 metric records instead of one",
        )  # fmt: skip


def test_clients_that_send_no_figures_end_the_run_in_round_2():
    strategy = FedAvg(validate="next")
    run(strategy, site_app(moved), W, 4)
    assert strategy.run.halted == (
        f"round 1, val: all 3 sites failed alike, so the run ends: {NO_FIGURES}"
    )
    assert max(row[0] for row in strategy.history.rows) == 2


def test_sites_that_cannot_measure_end_the_run_and_say_why():
    why = part_of(ConfigRecord({"why": "site x: ValueError"}))
    strategy = FedAvg(validate="next")
    strategy.start(sites({1: why, 2: why, 3: why}), W, 4)
    assert strategy.run.halted == (
        "round 1, val: all 3 sites failed alike, so the run ends: ValueError"
    )


def test_a_round_that_nobody_trains_leaves_the_figures_out_and_says_so():
    grid = sites({})
    strategy = FedAvg(validate="next", keep_model="best", keep_metric="auc")

    def before_round(server_round):
        strategy.only = set() if server_round == 2 else None

    strategy.before_round = before_round
    strategy.start(grid, W, 3)
    reason = "no figures: nobody was sent the training of round 2, with which they come"
    assert (1, "val", "all", reason) in failures_of(strategy)
    assert validated(strategy) == {}
    # The model stayed as it was, and its figures count for round 2.
    assert validated(strategy, 2)["all"] == pytest.approx(0.02)
    assert validated(strategy, 3)["all"] == pytest.approx(0.2)
    said = {note.round: note.text for note in strategy.history.notes}
    assert said == {1: "nobody evaluated the model: the round counts as one without improvement"}


def test_figures_of_more_sites_than_are_kept_in_memory():
    strategy = FedAvg(validate="next")
    strategy.start(sites({}, count=101), W, 2)
    assert len(validated(strategy)) == 102
    assert strategy.history.failures == []


# --- What does not go together ------------------------------------------------------------------


class Drawing(FedAvg):
    def choose(self, nodes, count, server_round, training):
        return sorted(nodes)[:1]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: FedAvg(validate="next", fraction_train=0.5),
            'fraction_train must be 1 with validate="next", got 0.5: only a site that trains on a '
            'model validates it; or set validate="own"',
        ),
        (
            lambda: FedAvg(validate="next", fraction_evaluate=0.0),
            'fraction_evaluate must be 1 with validate="next", got 0: each site that trains on a '
            'model validates it; or set validate="own"',
        ),
        (
            lambda: FedAvg(validate="next", buffer=2),
            'validate="next" excludes buffer: in asynchronous rounds sites train on models of '
            'several rounds at a time; set validate="own", or leave buffer out',
        ),
        (
            lambda: FedAvg(validate="next", secure="sum"),
            'validate="next" excludes secure="sum": a secure sum is of one kind of numbers, the '
            'change of the model or the figures; set validate="own"',
        ),
        (
            lambda: DPFedAvg(
                validate="next", noise_multiplier=1.0, clipping_norm=1.0, population_size=3
            ),
            'validate="next" excludes DPFedAvg, which draws the sites of a round by a law of its '
            'own, so that figures of two rounds would be of different sites; set validate="own"',
        ),
        (
            lambda: Drawing(validate="next"),
            'validate="next" excludes Drawing, which draws the sites of a round by a law of its '
            'own, so that figures of two rounds would be of different sites; set validate="own"',
        ),
        (
            lambda: FedAvg(validate="next", method="cyclic"),
            'validate="next" excludes the method cyclic, in which not every site trains in each '
            'round; set validate="own"',
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_sent(make, text):
    grid = FakeGrid([1, 2, 3], lambda message: None)
    with pytest.raises(InputError, match=says(text)):
        make().start(grid, W, 2)
    assert grid.sent == []


def test_a_wrong_value_is_refused():
    with pytest.raises(InputError, match=says("validate must be 'own' or 'next', got 'later'")):
        FedAvg(validate="later")


def test_a_config_of_evaluation_alone_is_refused():
    text = (
        'evaluate_config must hold nothing with validate="next" that train_config does not hold '
        "too, got split='train': a site reads one config for both; add it to train_config, or set "
        'validate="own"'
    )
    grid = FakeGrid([1], lambda message: None)
    with pytest.raises(InputError, match=says(text)):
        FedAvg(validate="next").start(grid, W, 2, evaluate_config=ConfigRecord({"split": "train"}))
    assert grid.sent == []
    same = ConfigRecord({"run-key": "k"})
    strategy = FedProx(proximal_mu=0.1, validate="next")
    strategy.start(sites({}), W, 2, train_config=same, evaluate_config=ConfigRecord({**same}))
    assert validated(strategy)["all"] == pytest.approx(0.02)


def test_the_messages_ask_from_the_second_round_on():
    grid = sites({})
    FedAvg(validate="next").start(grid, W, 3)
    asked = Counter(
        (message.metadata.message_type, message.content["config"]["server-round"])
        for message in grid.sent
        if message.content["config"].get("validate")
    )
    assert asked == {("train", 2): 3, ("train", 3): 3}
