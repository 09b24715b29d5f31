"""One way to ask: who answers, who does not and why, how long is waited."""

import numpy as np
import pytest
from builders import FakeGrid, arrays, error_reply
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID

from fedmed_flower.server import ask as module
from fedmed_flower.server.ask import Exchange, NoAnswer, ask, ask_all


def answer(message, value=None, name=None):
    node_id = message.metadata.dst_node_id
    content = RecordDict({"site": ConfigRecord({"name": name or f"site {9 - node_id}"})})
    if value is not None:
        content["told"] = ConfigRecord({"value": value})
    return Message(content, reply_to=message)


def value_of(node_id, content):
    value = content.config_records["told"]["value"]
    if value < 0:
        raise ValueError(f"{value} is below 0")
    return node_id, value


def question(grid, **options):
    contents = {node_id: RecordDict() for node_id in grid.nodes}
    return ask(grid, "number", contents, value_of, 5, {}, **options)


def test_answers_and_failures_stand_by_the_names_of_the_sites():
    def reply_of(message):
        node_id = message.metadata.dst_node_id
        if node_id == 3:
            return error_reply(3, "site north: no rows", message)
        if node_id == 5:
            return None
        if node_id == 6:
            # The SuperLink replies in place of a site that has died.
            found = Message(Error(5, "it is gone"), reply_to=message)
            found.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
            return found
        return answer(message, {1: 4, 2: 7, 4: -1}.get(node_id))

    names = {5: "west"}
    contents = {node_id: RecordDict() for node_id in range(1, 8)}
    grid = FakeGrid(range(1, 8), reply_of)
    answers, failures = ask_all(grid, "number", contents, value_of, 5, names)
    assert {message.metadata.message_type for message in grid.sent} == {"query.number"}
    assert [(a.site, a.node_id, a.value) for a in answers] == [
        ("site 7", 2, (2, 7)),
        ("site 8", 1, (1, 4)),
    ]
    assert failures == [
        NoAnswer(6, "node 6", "it is gone"),
        NoAnswer(3, "north", "no rows"),
        NoAnswer(7, "site 2", "malformed answer: KeyError 'told'"),
        NoAnswer(4, "site 5", "malformed answer: -1 is below 0"),
        NoAnswer(5, "west", "no answer within 5 s", silent=True),
    ]
    assert names == {1: "site 8", 2: "site 7", 3: "north", 4: "site 5", 5: "west", 7: "site 2"}


def test_answers_come_one_by_one():
    read = []
    grid = FakeGrid([1, 2, 3], lambda message: answer(message, read.append(1) or len(read)))
    asked = question(grid)
    for number, each in enumerate(asked, start=1):
        assert each.value[1] == len(read) == number
    assert asked.failures == []


def test_a_second_reply_to_one_message_does_not_count():
    class Doubling(FakeGrid):
        def pull_messages(self, message_ids):
            return [reply for reply in super().pull_messages(message_ids) for _ in range(2)]

    asked = question(Doubling([1, 2], lambda message: answer(message, 1)))
    assert [each.node_id for each in asked] == [1, 2]
    assert asked.failures == []


def test_a_reply_to_nothing_that_was_sent_is_passed_over():
    class Babbling(FakeGrid):
        def pull_messages(self, message_ids):
            found = super().pull_messages(message_ids)
            for reply in found:
                reply.metadata.__dict__["_reply_to_message_id"] = "other"
            return found

    asked = question(Babbling([1], lambda message: answer(message, 1)))
    assert list(asked) == []
    assert [failure.silent for failure in asked.failures] == [True]


def test_several_messages_to_one_site_are_each_replied_to():
    def reply_of(message):
        return None if message.content["config"]["part"] == 1 else answer(message, 1)

    messages = [
        Message(RecordDict({"config": ConfigRecord({"part": part})}), 1, "train")
        for part in range(3)
    ]
    exchange = Exchange(FakeGrid([1], reply_of), messages, 5)
    assert [sent.content["config"]["part"] for sent, _ in exchange] == [0, 2]
    assert exchange.silent == [messages[1]]


def test_a_message_that_could_not_be_sent_is_one_without_a_reply():
    class Refusing(FakeGrid):
        def push_messages(self, messages):
            _, *rest = super().push_messages(messages)
            return [None, *rest]

    asked = question(Refusing([1, 2], lambda message: answer(message, 1)))
    assert [each.node_id for each in asked] == [2]
    assert [failure.site for failure in asked.failures] == ["node 1"]


class Slow(FakeGrid):
    """Sites of another machine: site k answers after k seconds, and time passes in sleep alone."""

    in_process = False

    def __init__(self, nodes, monkeypatch):
        super().__init__(nodes, lambda message: answer(message, 1))
        self.now, self.most = 0.0, 0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.now += seconds

    def pull_messages(self, message_ids):
        ids = list(message_ids)
        self.most = max(self.most, len(ids))
        due = [i for i in ids if self.sent[int(i.split()[1])].metadata.dst_node_id <= self.now]
        return super().pull_messages(due)


def test_sites_are_waited_for_until_the_timeout(monkeypatch):
    grid = Slow([1, 3, 8], monkeypatch)
    asked = question(grid)
    assert [each.node_id for each in asked] == [1, 3]
    assert asked.failures == [NoAnswer(8, "node 8", "no answer within 5 s", silent=True)]
    assert grid.now == pytest.approx(5)


def test_an_answer_is_found_late_by_a_fiftieth_of_its_time_at_most(monkeypatch):
    grid = Slow([4, 30], monkeypatch)
    messages = [Message(RecordDict(), node_id, "train") for node_id in grid.nodes]
    found = [(sent.metadata.dst_node_id, grid.now) for sent, _ in Exchange(grid, messages, 60)]
    assert [node_id for node_id, _ in found] == [4, 30]
    assert 4 <= found[0][1] < 4.11
    assert 30 <= found[1][1] < 30.61


def test_after_enough_answers_the_others_have_the_grace(monkeypatch):
    grid = Slow([1, 2, 3, 4], monkeypatch)
    asked = question(grid, minimum=2, grace=1.5)
    assert [each.node_id for each in asked] == [1, 2, 3]
    text = "no answer within 4 s; 3 of 4 had replied"
    assert asked.failures == [NoAnswer(4, "node 4", text, silent=True)]
    assert 3.5 <= grid.now < 4


def test_in_one_process_the_timeout_is_each_sites_own_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def work(message):
        now[0] += message.metadata.dst_node_id
        return answer(message, 1)

    asked = question(FakeGrid([3, 4, 7, 2], work))
    assert [each.node_id for each in asked] == [3, 4, 2]
    assert asked.failures == [NoAnswer(7, "node 7", "no answer within 5 s", silent=True)]


def test_a_reply_with_more_metrics_than_any_honest_one_is_malformed():
    def work(message):
        reply = answer(message, 1)
        many = 1001 if message.metadata.dst_node_id == 1 else 1000
        reply.content["many"] = MetricRecord({str(k): k for k in range(many)})
        return reply

    asked = question(FakeGrid([1, 2], work))
    assert [each.node_id for each in asked] == [2]
    (failure,) = asked.failures
    assert failure.reason == (
        "malformed answer: the reply has 1,001 metrics, at most 1,000 are taken"
    )


def test_an_error_is_not_one_of_the_answers_that_are_enough(monkeypatch):
    grid = Slow([1, 2, 3], monkeypatch)
    grid.answer = lambda m: error_reply(1, "no", m) if m.metadata.dst_node_id == 1 else answer(m, 1)
    assert [each.node_id for each in question(grid, minimum=1)] == [2]


def test_few_replies_are_pulled_at_a_time(monkeypatch):
    grid = Slow([1] * 50, monkeypatch)
    messages = [Message(RecordDict(), 1, "train") for _ in range(50)]
    assert len(list(Exchange(grid, messages, 5))) == 50
    assert grid.most == 20


def test_replies_with_large_models_are_pulled_one_or_two_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "_BYTES_TOGETHER", 1000)
    for size, most in ((20, 6), (300, 2), (1000, 1)):
        grid = Slow([1] * 10, monkeypatch)
        content = RecordDict({"arrays": arrays(w=np.zeros(size, np.uint8))})
        messages = [Message(content, 1, "train") for _ in range(10)]
        assert len(list(Exchange(grid, messages, 5))) == 10
        assert grid.most == most
