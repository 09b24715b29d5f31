"""Rounds that end with K replies: worked by hand, repeated, disturbed, refused."""

import gc
import re
from collections import Counter

import numpy as np
import pytest
from builders import arrays, dump, run, site_app
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower
from squares import Squares, pooled_optimum, run_squares, weights_of
from tiny import run_tiny, says, says_of_setting

from fedmed_flower import InputError
from fedmed_flower.server import Listener
from fedmed_flower.strategies import (
    DPFedAvg,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    Krum,
    WeightedFedAvg,
)
from fedmed_flower.strategies.asynchronous import Dispatch, moved, staleness_factor

W = arrays(w=[0.0])


def index_of(context):
    return context.node_config["partition-id"]


def round_of(message):
    return message.content["config"]["server-round"]


def adding(*steps):
    """Return the app of sites that each add a number of their own to the model."""

    def train(values, message, context):
        step = np.float32(steps[index_of(context)])
        return {key: array + step for key, array in values.items()}, {}

    return site_app(train)


def halfway(values, message, context):
    """Go halfway to the site's own optimum, and a little to another side in each round."""
    target = np.float32(3 * index_of(context) + 0.1 * round_of(message))
    metrics = {"num-examples": index_of(context) + 1, "loss": float(target)}
    return {key: array + (target - array) / 2 for key, array in values.items()}, metrics


def figures(strategy, metric):
    return [row for row in strategy.history.rows if row[3] == metric]


def clock(strategy):
    return [row[4] for row in figures(strategy, "virtual-seconds")]


def ages(strategy):
    """Return the sites of each round with the ages of their models."""
    found = {}
    for server_round, _, site, _, age in figures(strategy, "staleness"):
        found.setdefault(server_round, {})[site] = age
    return found


def trained(strategy, site):
    return [r for r, phase, name, _, _ in strategy.history.rows if (phase, name) == ("train", site)]


# --- Worked by hand ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "exponent", "factor"),
    [(0, 0.5, 1.0), (1, 1.0, 0.5), (3, 0.5, 0.5), (8, 0.5, 1 / 3), (7, 0.0, 1.0), (1, 10, 2**-10)],
)
def test_the_weight_of_an_old_reply(age, exponent, factor):
    assert staleness_factor(age, exponent) == pytest.approx(factor, rel=1e-15)


def test_a_change_is_moved_onto_the_current_model():
    def record(w, n, h):
        return arrays(w=[w, 2.0], n=np.array([n]), h=np.array([h], np.float16), s=[w])

    new = moved(record(5, 9, 2), record(1, 4, 0.5), record(100, 7, 8), ["w", "h"])
    # 100 + (5 - 1) and 2 + (2 - 2); the others are the site's own.
    assert dump(new) == dump(
        arrays(w=[104.0, 2.0], n=np.array([9]), h=np.array([9.5], np.float16), s=[5.0])
    )


def test_rounds_worked_by_hand():
    # Sites 0 and 1 reply after 1 s, site 2 after 2.5 s; each adds 1, 3 and 10.
    strategy = FedAvg(buffer=2, fraction_evaluate=0.0)
    run(strategy, adding(1, 3, 10), W, 3, speeds=[1, 1, 0.4])
    # At 1 s: (1 + 3) / 2 = 2. At 2 s: 2 + 2 = 4. At 2.5 s site 2 has added 10 to 0, two rounds ago:
    # its change weighs 1 / sqrt(3). At 3 s site 0 has added 1 to 4.
    factor = 3**-0.5
    expected = 4 + (10 * factor + 1) / (factor + 1)
    assert strategy.result.arrays["w"].numpy() == pytest.approx([expected], rel=1e-6)
    assert clock(strategy) == [1.0, 2.0, 3.0]
    assert ages(strategy) == {
        1: {"site-0": 0, "site-1": 0},
        2: {"site-0": 0, "site-1": 0},
        3: {"site-0": 0, "site-2": 2},
    }


def test_the_exponent_decides_what_an_old_reply_weighs():
    weighted = {}
    for exponent in (0.0, 1.0):
        strategy = FedAvg(buffer=2, staleness_exponent=exponent, fraction_evaluate=0.0)
        run(strategy, adding(1, 3, 10), W, 3, speeds=[1, 1, 0.4])
        weighted[exponent] = float(strategy.result.arrays["w"].numpy()[0])
    assert weighted == pytest.approx({0.0: 4 + 11 / 2, 1.0: 4 + (10 / 3 + 1) / (4 / 3)}, rel=1e-6)


def reference(optima, speeds, size, exponent, rounds):
    """FedBuff on quadratics in plain Python; no site counts twice in a round."""
    model, now, sent = 0.0, 0.0, {k: (0.0, 1, 1 / s) for k, s in enumerate(speeds)}
    models = []
    for number in range(1, rounds + 1):
        buffer = {}
        while len(buffer) < size:
            site = min(sent, key=lambda k: (sent[k][2], k))
            start, age, now = sent.pop(site)
            buffer[site] = ((optima[site] - start) / 2, (number - age + 1) ** -exponent)
        total = sum(weight for _, weight in buffer.values())
        model += sum(change * weight for change, weight in buffer.values()) / total
        models.append(model)
        sent |= {k: (model, number + 1, now + 1 / speeds[k]) for k in buffer}
    return models


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_quadratics_go_as_in_a_plain_reference(size):
    optima, speeds, served = [0.0, 1.0, 5.0, 20.0], [1, 0.9, 0.7, 0.15], []

    def train(values, message, context):
        return {"w": values["w"] + (optima[index_of(context)] - values["w"]) / 2}, {}

    strategy = FedAvg(buffer=size, fraction_evaluate=0.0)

    def keep(number, model):
        served.append(float(model["w"].numpy()[0]))

    start = arrays(w=np.zeros(1))
    run(strategy, site_app(train), start, 12, 4, speeds, evaluate_fn=keep)
    assert served[1:] == pytest.approx(reference(optima, speeds, size, 0.5, 12), rel=1e-12)


STRATEGIES = [
    pytest.param(make, id=make.__name__)
    for make in (FedAvg, FedMedian, FedAdam, FedAvgM, Krum, FedProx, WeightedFedAvg)
]


@pytest.mark.parametrize("make", STRATEGIES)
def test_a_buffer_of_all_sites_gives_the_bits_of_synchronous_rounds(make):
    more = {"num_malicious_nodes": 1} if make is Krum else {}
    more |= {"max_weight_share": 0.5, "max_update_norm": 3.0, "seed": 1}
    models = []
    for buffer in (0, 5):
        strategy = make(buffer=buffer, **more)
        run(strategy, site_app(halfway), W, 4, 5, [1, 1, 1, 1, 1])
        rows = [row for row in strategy.history.rows if row[3] != "staleness"]
        models.append((dump(strategy.result.arrays), rows))
    assert models[0] == models[1]


# --- The virtual clock ---------------------------------------------------------------------------


def test_a_synchronous_round_takes_as_long_as_its_slowest_site():
    strategy = FedAvg()
    run(strategy, site_app(halfway), W, 3, 4, [1, 2, 4, 0.2])
    assert clock(strategy) == [5.0, 10.0, 15.0]


def test_neither_time_nor_age_stands_for_a_rounds_quality():
    strategy = FedAvg(buffer=2)
    run(strategy, adding(1, 2), W, 1, 2, [1, 1])
    assert strategy.history.describe(1) == "val sum 1.5000"


def test_without_speeds_no_time_is_recorded():
    for buffer in (0, 2):
        strategy = FedAvg(buffer=buffer)
        run(strategy, site_app(halfway), W, 2)
        assert clock(strategy) == []


def test_a_run_repeats_to_the_same_bits(tmp_path):
    texts = []
    for name in ("first", "second"):
        folder = tmp_path / name
        run_tiny(folder, num_sites=4, buffer=2, virtual_speeds="1,1.5,0.7,0.2", num_server_rounds=5)
        rows = (folder / "metrics.csv").read_text().splitlines()
        texts.append([row for row in rows if ",seconds," not in row])
        texts.append((folder / "model.safetensors").read_bytes())
    assert texts[:2] == texts[2:]
    times = [float(row.rpartition(",")[2]) for row in texts[0] if ",virtual-seconds," in row]
    assert len(times) == 5
    assert times == sorted(times)
    assert times[-1] < 5 / 0.7


# --- Whom a round waits for ----------------------------------------------------------------------


def test_robust_rules_hold_on_the_buffer():
    def train(values, message, context):
        # Site 0 is as fast as all others together, and hostile.
        far = np.float32(1e6) if index_of(context) == 0 else np.float32(1.0)
        return {key: array + (far - array) / 2 for key, array in values.items()}, {}

    ends = {}
    for make in (FedAvg, FedMedian):
        strategy = make(buffer=3)
        run(strategy, site_app(train), W, 20, 5, [4, 1, 1, 1, 0.3])
        ends[make] = float(strategy.result.arrays["w"].numpy()[0])
        assert all(len(sites) == len(set(sites)) == 3 for sites in ages(strategy).values())
    assert ends[FedMedian] == pytest.approx(1.0, abs=1e-3)
    assert ends[FedAvg] > 1e3


def silent_app(silent):
    """Return the app of sites of which some never reply to a training message."""
    app = site_app(halfway)
    answer = ClientApp()

    @answer.train()
    def _(message, context):
        return None if index_of(context) in silent else app(message, context)

    @answer.evaluate()
    def _(message, context):
        return app(message, context)

    return answer


def test_one_of_twenty_sites_that_never_replies_fails_once_and_stops_nothing():
    strategy = FedAvg(buffer=5)
    run(strategy, silent_app({19}), W, 20, 20, [1] * 20, timeout=3)
    (failure,) = strategy.history.failures
    assert failure.reason == "no reply within 3 s to what round 1 sent"
    assert len(strategy.result.train_metrics_clientapp) == 20
    # Nineteen sites give five replies a second each, less what is waited for.
    assert clock(strategy)[-1] <= 7


def test_a_site_without_a_reply_by_the_end_is_named_once():
    strategy = FedAvg(buffer=2)
    run(strategy, site_app(halfway), W, 4, 3, [1, 1, 0.001])
    (failure,) = strategy.history.failures
    assert failure.site == "node 1003"
    assert failure.reason == "no reply by the end of the run to what round 1 sent"
    assert clock(strategy) == [1.0, 2.0, 3.0, 4.0]


def test_what_is_under_way_at_the_end_is_noted():
    strategy = FedAvg(buffer=2)
    run(strategy, site_app(halfway), W, 6, 3, [1, 1, 0.25])
    (note,) = strategy.history.notes
    assert note.site == "all"
    assert re.fullmatch(
        r"still in training at the end and not used: site-\d \(round \d\)(, site-\d \(round \d\))*",
        note.text,
    )
    assert not strategy.history.failures


def test_a_late_reply_is_not_used_and_its_site_is_asked_again():
    strategy = FedAvg(buffer=2)
    run(strategy, site_app(halfway), W, 12, 3, [1, 1, 0.2], timeout=3)
    late = [failure for failure in strategy.history.failures if "within 3 s" in failure.reason]
    assert [failure.round for failure in late] == [4, 9]
    first = strategy.history.notes[0]
    assert (first.site, first.text) == (
        "node 1003",
        "replied too late to what round 1 sent: not used",
    )
    assert trained(strategy, "site-2") == []


def test_with_all_sites_silent_each_round_waits_and_fails():
    strategy = FedAvg(buffer=2)
    run(strategy, silent_app({0, 1, 2}), W, 2, 3, [1, 1, 1], timeout=5)
    assert dump(strategy.result.arrays) == dump(W)
    reasons = [failure.reason for failure in strategy.history.failures]
    waited = "no site can be asked, and none has come back within 5 s"
    assert reasons.count(waited) == 2
    assert reasons.count("no reply within 5 s to what round 1 sent") == 3
    assert reasons.count("0 usable replies, 1 needed: the model stays as it was") <= 2
    assert clock(strategy) == [10.0, 15.0]


def test_a_broken_site_is_asked_less_and_less_often():
    def train(values, message, context):
        if index_of(context) == 0:
            raise ValueError("broken")
        return halfway(values, message, context)

    strategy = FedAvg(buffer=2)
    run(strategy, site_app(train), W, 20, 4, [1, 1, 1, 1])
    failures = strategy.history.failures
    assert [failure.round for failure in failures] == [1, 2, 4, 8, 16]
    assert all("broken" in failure.reason for failure in failures)
    assert len(strategy.result.train_metrics_clientapp) == 20


def test_a_site_that_recovers_is_asked_in_each_round_again():
    def train(values, message, context):
        if index_of(context) == 0 and round_of(message) <= 3:
            raise ValueError("broken")
        return halfway(values, message, context)

    strategy = FedAvg(buffer=3)
    run(strategy, site_app(train), W, 8, 3, [1, 1, 1])
    # With three sites a buffer of three waits for nobody else, so the broken one is asked again.
    assert [failure.round for failure in strategy.history.failures] == [1, 2, 3]
    assert [note.round for note in strategy.history.notes] == [1, 2, 3]
    assert strategy.history.notes[0].text == (
        "2 of 3 usable replies: no further site can reply, so the round ends with those that there "
        "are"
    )
    assert set(trained(strategy, "site-0")) == {4, 5, 6, 7, 8}


def test_a_reply_that_cannot_be_used_does_not_fill_the_buffer():
    def train(values, message, context):
        new, metrics = halfway(values, message, context)
        if index_of(context) == 0:
            new = {key: array * np.float32(np.nan) for key, array in new.items()}
        return new, metrics

    strategy = FedAvg(buffer=2)
    run(strategy, site_app(train), W, 3, 4, [1, 1, 1, 1])
    counted = Counter(row[0] for row in figures(strategy, "staleness"))
    assert counted == {1: 2, 2: 2, 3: 2}
    assert {failure.site for failure in strategy.history.failures} == {"site-0"}


def test_sites_that_fail_alike_end_the_run():
    def train(values, message, context):
        raise ValueError("the column age is missing")

    strategy = FedAvg(buffer=2)
    run(strategy, site_app(train), W, 5, 4, [1, 1, 1, 1])
    assert strategy.run.halted.startswith("round 1, train: all 4 sites failed alike")


def test_only_sites_that_are_free_evaluate():
    strategy = FedAvg(buffer=2)
    run(strategy, site_app(halfway), W, 4, 4, [1, 1, 1, 0.25])
    evaluated = {}
    for server_round, phase, site, metric, _ in strategy.history.rows:
        if (phase, metric) == ("val", "sum") and site != "all":
            evaluated.setdefault(server_round, set()).add(site)
    # Site 3 trains until 4 s, and site 2 waits in the first round for the second.
    assert evaluated[1] == {"site-0", "site-1"}
    assert all("site-3" not in sites for sites in evaluated.values())
    assert all(len(sites) >= 2 for sites in evaluated.values())


class Asked(Listener):
    """Remembers how many sites trained at once."""

    def __init__(self):
        self.most = 0
        self.sites = set()

    def asked(self, server_round, phase, sites):
        if phase == "train":
            self.most = max(self.most, len(sites))
            self.sites.update(sites)


@pytest.mark.parametrize("fraction", [0.34, 0.5, 1.0])
def test_the_fraction_is_the_share_of_sites_that_train_at_once(fraction):
    listener = Asked()
    strategy = FedAvg(buffer=3, fraction_train=fraction, listeners=[listener], seed=3)
    run(strategy, site_app(halfway), W, 10, 6, [1, 1, 1, 1, 0.5, 0.2])
    assert listener.most == int(6 * fraction)
    assert all(len(sites) == 3 for sites in ages(strategy).values())
    assert len(strategy.result.train_metrics_clientapp) == 10


# --- What travels and what is kept ---------------------------------------------------------------


def test_running_variances_are_the_sites_own():
    def train(values, message, context):
        # The variance falls at a site of long ago: moved onto a later one it would be negative.
        variance = np.float32(10 - 4 * min(round_of(message), 2))
        return {"w": values["w"] + 1, "bn.running_var": variance + 0 * values["w"]}, {}

    start = ArrayRecord({**W, **{"bn.running_var": arrays(v=[100.0])["v"]}})
    strategy = FedAvg(buffer=2, staleness_exponent=0.0, fraction_evaluate=0.0)
    run(strategy, site_app(train), start, 3, 3, [1, 1, 0.4])
    # Of the last two replies one is of round 1 (6) and one of round 3 (2).
    assert strategy.result.arrays["bn.running_var"].numpy().tolist() == [4.0]
    assert ages(strategy)[3] == {"site-0": 0, "site-2": 2}


def test_companions_are_moved_as_the_model_is():
    class Controlled(FedAvg):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.companions = {"control": arrays(c=[0.0])}

    app = ClientApp()

    @app.train()
    def _(message, context):
        number = np.float32([1, 3, 10][index_of(context)])
        content = RecordDict(
            {
                "arrays": message.content["arrays"],
                "control": arrays(c=message.content["control"]["c"].numpy() + number),
                "metrics": MetricRecord({"num-examples": 1}),
                "site": ConfigRecord({"name": f"site-{index_of(context)}"}),
            }
        )
        return Message(content, reply_to=message)

    strategy = Controlled(buffer=2, fraction_evaluate=0.0)
    run(strategy, app, W, 3, 3, [1, 1, 0.4])
    # As the model in the rounds worked by hand, but the old reply has its whole weight.
    assert strategy.current_companions["control"]["c"].numpy().tolist() == [4 + (10 + 1) / 2]
    assert dump(strategy.result.arrays) == dump(W)


def test_a_model_is_kept_only_while_a_message_with_it_is_under_way():
    kept = []

    def count(server_round, model):
        gc.collect()
        kept.append(sum(isinstance(one, Dispatch) for one in gc.get_objects()))

    strategy = FedAvg(buffer=1)
    run(strategy, site_app(halfway), W, 30, 3, [1, 1, 0.04], evaluate_fn=count)
    # The current one, and at most one for each of the other sites.
    assert max(kept) <= 3


def test_bytes_are_counted_with_the_reply():
    strategy = FedAvg(buffer=2, fraction_evaluate=0.0)
    run(strategy, site_app(halfway), W, 4, 3, [1, 1, 0.4])
    replies = {site: traffic.replies for site, traffic in strategy.history.traffic.items()}
    counted = Counter(row[2] for row in figures(strategy, "staleness"))
    assert replies == counted
    assert all(traffic.bytes_to_site > 0 for traffic in strategy.history.traffic.values())


# --- Methods for hospitals that differ -----------------------------------------------------------


def parts():
    """Return features and targets of four sites, no two of which have the same optimum."""
    generator = np.random.default_rng(5)
    sites = []
    for number, count in enumerate((6, 9, 12, 15)):
        features = generator.normal(size=(count, 2)) * (1 + number / 4, 1.75 - number / 4)
        targets = features @ (2.0 - number, number) + generator.normal(size=count)
        sites.append((features.astype(np.float32), targets.astype(np.float32)))
    return sites


def test_scaffold_reaches_the_pooled_optimum_although_one_site_is_slow(tmp_path):
    ends = {}
    for method, rounds in (("", 40), ("scaffold", 120)):
        result = run_squares(
            tmp_path / (method or "plain"),
            type("Four", (Squares,), {"sites": parts()}),
            strategy=FedAvg(fraction_evaluate=0.0),
            method=method,
            buffer=2,
            virtual_speeds="1,0.9,0.8,0.23",
            num_server_rounds=rounds,
            local_epochs=2,
        )
        ends[method] = np.abs(weights_of(result) - pooled_optimum(parts())).max()
    assert ends["scaffold"] < 2e-3
    assert ends[""] > 0.1


# --- Resume --------------------------------------------------------------------------------------


def test_a_resumed_run_says_what_is_lost_and_goes_on(tmp_path):
    ends = []
    for name in ("first", "second"):
        folder = tmp_path / name
        speeds = [1, 1, 0.4]
        run(FedAvg(buffer=2, run_dir=folder, seed=1), site_app(halfway), W, 3, 3, speeds)
        again = FedAvg(buffer=2, run_dir=folder, seed=1, resume=True)
        run(again, site_app(halfway), W, 6, 3, speeds)
        ends.append((dump(again.result.arrays), again.history.rows))
        lost = next(note for note in again.history.notes if note.round == 4)
        assert lost.text == (
            "the run goes on: what was under way or in the buffer is lost, and all sites train "
            "from the model of the round before"
        )
        # All sites begin again with round 4, when the clock showed 3 s.
        assert ages(again)[4] == {"site-0": 0, "site-1": 0}
        assert clock(again)[2:4] == [3.0, 4.0]
    assert ends[0] == ends[1]


def test_a_run_is_not_resumed_with_another_buffer(tmp_path):
    run(FedAvg(buffer=2, run_dir=tmp_path), site_app(halfway), W, 1)
    with pytest.raises(InputError, match="buffer of FedAvg was '2' when"):
        run(FedAvg(buffer=3, run_dir=tmp_path, resume=True), site_app(halfway), W, 2)


# --- Refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"buffer": -1}, "buffer must be at least 0, got -1"),
        ({"staleness_exponent": -0.5}, "staleness_exponent must be from 0 to 10, got -0.5"),
        ({"staleness_exponent": 11}, "staleness_exponent must be from 0 to 10, got 11"),
        ({"staleness_exponent": float("nan")}, "staleness_exponent must be from 0 to 10, got nan"),
    ],
)
def test_the_constructor_says_what_is_wrong(arguments, text):
    with pytest.raises(InputError, match=says(text)):
        FedAvg(**arguments)


class Foreign(flower.FedAvg):
    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, replies)


class OnForeign(FedAvg, Foreign):
    pass


class TwoMessages(FedAvg):
    def exchange(self, grid, messages, server_round, phase):
        return super().exchange(grid, messages, server_round, phase)


private = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "population_size": 3}


@pytest.mark.parametrize(
    ("make", "arguments", "text"),
    [
        (
            DPFedAvg,
            private,
            "DPFedAvg needs the reply of every site that it has drawn for a round: leave buffer "
            "out",
        ),
        (
            FedAvg,
            {"method": "feddyn"},
            "the method feddyn is wrong with replies to different models: leave buffer out",
        ),
        (
            OnForeign,
            {},
            "the rule of Foreign is not ours, and may count on replies to the current model: "
            "leave buffer out, or take a strategy of fedmed_flower.strategies",
        ),
        (
            TwoMessages,
            {},
            "TwoMessages has its own exchange, which asynchronous rounds do not call: leave "
            "buffer out",
        ),
        (
            FedAvg,
            {"quorum": 2},
            "buffer excludes quorum: a round that ends with a number of replies has one; leave "
            "quorum out",
        ),
        (FedAvg, {"min_replies": 3}, "min_replies must be at most buffer=2, got 3"),
        (
            Krum,
            {"num_malicious_nodes": 1},
            "Krum needs 5 replies a round to keep its promise, but buffer=2: raise buffer or "
            "lower num_malicious_nodes",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(make, arguments, text):
    with pytest.raises(InputError, match=says(text)):
        run(make(buffer=2, **arguments), site_app(halfway), W, 1)
    # Without a buffer each of them is what it was; the sites here know no method.
    if "method" not in arguments:
        run(make(**arguments), site_app(halfway), W, 1, 5)


def test_a_buffer_larger_than_the_number_of_sites_is_refused():
    text = "buffer must be at most the number of sites that train, 3, got 4"
    with pytest.raises(InputError, match=says(text)):
        run(FedAvg(buffer=4), site_app(halfway), W, 1)


def test_a_run_config_with_a_buffer(tmp_path):
    run_tiny(tmp_path / "run", num_sites=3, buffer=2, staleness_exponent=1.0)
    with pytest.raises(InputError, match=says_of_setting(QUORUM)):
        run_tiny(tmp_path / "other", num_sites=3, buffer=2, quorum=2)
    text = "min_replies must be at most buffer=2, got 3"
    with pytest.raises(InputError, match=says(text)):
        run_tiny(tmp_path / "third", num_sites=3, buffer=2, strategy=FedAvg(min_replies=3))
    assert not (tmp_path / "third").exists()


QUORUM = (
    "buffer excludes quorum: a round that ends with a number of replies has one; leave quorum out"
)
