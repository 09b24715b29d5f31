"""Replies one by one: of a grid that is polled, and of one that orders them itself."""

import math

import pytest
from builders import FakeGrid, arrays, message, reply, run, site_app
from flwr.app import Context, RecordDict

from fedmed_flower.engines.local import InTurn, LocalGrid
from fedmed_flower.server import arrivals as module
from fedmed_flower.server.arrivals import Polled, arrivals_of
from fedmed_flower.strategies import FedAvg


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now = 100.0
        self.slept = []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


class SlowGrid(FakeGrid):
    """Sites that work side by side: each replies so many seconds after it was asked, once."""

    in_process = False

    def __init__(self, seconds, clock):
        super().__init__(list(seconds), lambda message: None)
        self.seconds = seconds
        self.clock = clock
        self.due = {}
        self.pulled = []

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        for sent in messages:
            seconds = self.seconds[sent.metadata.dst_node_id]
            if sent.metadata.message_type == "evaluate":
                seconds = 0
            self.due[sent.metadata.message_id] = self.clock.now + seconds
        return ids

    def pull_messages(self, message_ids):
        ids = list(message_ids)
        self.pulled.append(len(ids))
        come = [key for key in ids if self.due.get(key, 1e9) <= self.clock.now]
        for key in come:
            del self.due[key]
        return [self.reply_to(self.sent[int(key.split()[1])]) for key in come]

    def reply_to(self, sent):
        node_id = sent.metadata.dst_node_id
        training = sent.metadata.message_type == "train"
        values = {"w": sent.content["arrays"]["w"].numpy() + node_id} if training else None
        return reply(node_id, values, f"site-{node_id}", to=sent)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def pushed(grid, count):
    return grid.push_messages([message(node_id) for node_id in list(grid.nodes)[:count]])


def test_the_next_reply_is_the_one_that_comes_first(clock):
    grid = SlowGrid({1: 7.0, 2: 2.0}, clock)
    grid.reply_to = lambda sent: reply(sent.metadata.dst_node_id, to=sent)
    ids = pushed(grid, 2)
    polled = Polled(grid)
    nodes = [polled.next_reply(ids, 200.0).metadata.src_node_id for _ in ids]
    assert nodes == [2, 1]
    assert 107.0 <= clock.now < 107.15


@pytest.mark.parametrize("seconds", [0.31, 4.0, 30.0, 300.0])
def test_a_reply_is_found_late_by_a_fiftieth_of_its_time_at_most(clock, seconds):
    grid = SlowGrid({1: seconds}, clock)
    grid.reply_to = lambda sent: reply(sent.metadata.dst_node_id, to=sent)
    began = clock.now
    Polled(grid).next_reply(pushed(grid, 1), 1000.0)
    late = clock.now - began - seconds
    assert 0 <= late <= max(0.1, min(0.02 * seconds, 1)) + 1e-9
    # Ten looks a second in the first five, fewer and fewer later, one a second in the end.
    assert len(clock.slept) <= 52 + 50 * math.log(10) + max(0, seconds - 50)


def test_nothing_comes_until_the_end_and_the_last_look_is_then(clock):
    grid = SlowGrid({1: 50.0}, clock)
    ids = pushed(grid, 1)
    assert Polled(grid).next_reply(ids, 103.0) is None
    assert clock.now == 103.0
    assert sum(clock.slept) == pytest.approx(3.0)


def test_replies_that_come_together_are_handed_on_one_by_one(clock):
    grid = SlowGrid(dict.fromkeys(range(1, 31), 0.0), clock)
    grid.reply_to = lambda sent: reply(sent.metadata.dst_node_id, to=sent)
    ids = pushed(grid, 30)
    polled = Polled(grid)
    nodes = [polled.next_reply(ids, 200.0).metadata.src_node_id for _ in ids]
    assert nodes == list(range(1, 31))
    # Not more than twenty at a time, and none before it is needed.
    assert grid.pulled == [20, 20, 10]
    assert clock.slept == []


def test_a_grid_with_an_order_of_its_own_is_asked_for_it():
    context = Context(1, 1001, {}, RecordDict(), {})
    grid = LocalGrid(InTurn(site_app(None)), {1001: context})
    assert arrivals_of(grid) is grid
    assert isinstance(arrivals_of(FakeGrid([1], None)), Polled)


def test_rounds_of_a_grid_that_is_polled_wait_for_no_slow_site(clock, monkeypatch):
    monkeypatch.setattr("fedmed_flower.server.ask.time", clock)
    grid = SlowGrid({1: 1.0, 2: 1.0, 3: 1000.0}, clock)
    strategy = FedAvg(buffer=2)
    strategy.start(grid, arrays(w=[0.0]), 5, timeout=30)
    assert clock.now < 112
    # Sites 1 and 2 add 1 and 2 in each round.
    assert strategy.result.arrays["w"].numpy().tolist() == [7.5]
    (failure,) = strategy.history.failures
    assert (failure.site, failure.round) == ("node 3", 5)
    assert failure.reason == "no reply by the end of the run to what round 1 sent"


def test_a_site_of_a_polled_grid_that_never_replies_fails_once_after_the_timeout(
    clock, monkeypatch
):
    monkeypatch.setattr("fedmed_flower.server.ask.time", clock)
    grid = SlowGrid({1: 1.0, 2: 1.0, 3: 1e6}, clock)
    strategy = FedAvg(buffer=3, fraction_evaluate=0.0)
    strategy.start(grid, arrays(w=[0.0]), 4, timeout=30)
    # Only the first round, which could not be full without site 3, waits for it.
    assert 130 <= clock.now < 140
    (failure,) = strategy.history.failures
    assert failure.reason == "no reply within 30 s to what round 1 sent"
    assert strategy.result.arrays["w"].numpy().tolist() == [6.0]


def test_what_cannot_be_sent_is_recorded():
    class Refusing(FakeGrid):
        def push_messages(self, messages):
            ids = super().push_messages(messages)
            return [
                "" if sent.metadata.dst_node_id == 2 else key
                for sent, key in zip(messages, ids, strict=True)
            ]

    def answer(sent):
        training = sent.metadata.message_type == "train"
        return reply(sent.metadata.dst_node_id, {"w": [1.0]} if training else None, to=sent)

    grid = Refusing([1, 2, 3], answer)
    strategy = FedAvg(buffer=2, fraction_evaluate=0.0)
    strategy.start(grid, arrays(w=[0.0]), 2)
    assert [failure.reason for failure in strategy.history.failures] == [
        "the message could not be sent"
    ] * 2
    assert len(strategy.result.train_metrics_clientapp) == 2


def test_the_same_model_comes_of_both_ways(clock):
    """A polled grid and the virtual clock take replies in the same order."""

    def train(values, message, context):
        return {"w": values["w"] + context.node_config["partition-id"] + 1}, {}

    virtual = FedAvg(buffer=2, fraction_evaluate=0.0)
    run(virtual, site_app(train), arrays(w=[0.0]), 3, 3, [1 / 10, 1 / 23, 1 / 40])
    polled = FedAvg(buffer=2, fraction_evaluate=0.0)
    polled.start(SlowGrid({1: 10.0, 2: 23.0, 3: 40.0}, clock), arrays(w=[0.0]), 3)
    assert polled.result.arrays["w"].numpy() == virtual.result.arrays["w"].numpy()
    assert [r for r in polled.history.rows if r[3] == "staleness"] == [
        (number, phase, f"site-{int(site[-1]) + 1}", metric, value)
        for number, phase, site, metric, value in virtual.history.rows
        if metric == "staleness"
    ]
