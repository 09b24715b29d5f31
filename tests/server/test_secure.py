"""Secure sums of hospitals with key files, whose answers are late, missing or come again."""

import re

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import ServerApp
from key_files import make_hospitals, pin_another_key
from lines import SETTINGS, SIZE, app, change_of

from fedmed_flower import run_local
from fedmed_flower.server.listener import Listener
from fedmed_flower.strategies import WeightedFedAvg

FIVE = ("east", "graz", "north", "south", "west")


class Link:
    """A grid as a SuperLink is one: one reply at a look, none of who is silent, nodes that change.

    Attributes
    ----------
    silent, dead : set of (str, str)
        Kind of a message and hospital: no reply comes, or the SuperLink's own that it is gone.
    present : set of str
        The hospitals that are connected.
    moved : dict of int to int
        The new node id of a hospital by its first one.
    listed : list of int
        Further nodes, of which the SuperLink does not yet know that they are gone.
    sent : list of (str, str)
        Kind and hospital of all messages.
    """

    def __init__(self, grid, names):
        self.grid = grid
        self.names = dict(zip(grid.get_node_ids(), names, strict=True))
        self.silent = set()
        self.dead = set()
        self.present = {*names}
        self.moved = {}
        self.listed = []
        self.sent = []
        self._messages = {}

    def get_node_ids(self):
        there = [self.moved.get(i, i) for i, name in self.names.items() if name in self.present]
        return [*there, *self.listed]

    def push_messages(self, messages):
        first = {new: old for old, new in self.moved.items()}
        ids = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            message.metadata.dst_node_id = first.get(node_id, node_id)
            ids += self.grid.push_messages([message])
            kind = message.metadata.message_type.removeprefix("query.")
            self.sent.append((kind, self.names[message.metadata.dst_node_id]))
            self._messages[ids[-1]] = (self.sent[-1], message)
            message.metadata.dst_node_id = node_id
        return ids

    def pull_messages(self, ids):
        for key in ids:
            what, message = self._messages[key]
            if what in self.dead:
                error = Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable")
                return [Message(error, reply_to=message)]
            if what not in self.silent:
                return self.grid.pull_messages([key])
        return []


def train(folder, rounds, before_round, names=FIVE, groups=(), **arguments):
    """Train by secure sums; return the models by round, the strategy and the link.

    `before_round` maps number and link to None.
    """
    configs = make_hospitals(folder, names, groups=groups)
    models, links = {}, []
    rule = {"weights": "uniform", "fraction_evaluate": 0.0, "grace": 0.2, "min_available_nodes": 4}
    strategy = WeightedFedAvg(secure="sum", secure_exponent=0, **(rule | arguments))
    server = ServerApp()

    @server.main()
    def main(grid, context):
        link = Link(grid, names)
        links.append(link)
        strategy.before_round = lambda number: before_round(number, link)

        def keep(number, arrays):
            models[number] = arrays["weight"].numpy().ravel().astype(float)

        initial = ArrayRecord({"weight": Array(np.zeros((1, SIZE), np.float32))})
        strategy.start(link, initial, num_rounds=rounds, timeout=300, evaluate_fn=keep)

    nodes = [configs[name] for name in names]
    run_local(server, app, len(names), run_config=dict(SETTINGS), node_configs=nodes)
    return models, strategy, links[0]


def require_means(models, *members):
    """Require that the rounds' models are those of plain means over these hospitals; None: lost."""
    weights = np.zeros(SIZE)
    for server_round, names in enumerate(members, start=1):
        if names is not None:
            changes = [change_of(name, weights) for name in names]
            weights = weights + np.mean(changes, axis=0)
        assert np.abs(models[server_round] - weights).max() < 1e-6, server_round


def told(strategy):
    failures = strategy.history.failures
    return [(each.round, each.phase, each.site, each.reason) for each in failures]


def but(*lost):
    return [name for name in FIVE if name not in lost]


class Hearing(Listener):
    def __init__(self):
        self.heard = []

    def failed(self, server_round, phase, site, reason):
        self.heard.append((server_round, phase, site, reason))


def test_who_sends_no_shares_is_waited_for_no_longer_than_grace(tmp_path):
    def before_round(number, link):
        link.silent = {("unmask", "south")}

    hearing = Hearing()
    models, strategy, _ = train(tmp_path, 1, before_round, listeners=[hearing])
    require_means(models, FIVE)
    ((server_round, phase, site, reason),) = told(strategy)
    assert (server_round, phase, site) == (1, "unmask", "south")
    assert re.fullmatch(r"no answer within \d+ s; 4 of 5 had replied", reason)
    assert hearing.heard == told(strategy)


def test_who_does_not_sign_is_waited_for_no_longer_than_grace(tmp_path):
    names = (*FIVE, "wien")

    def before_round(number, link):
        link.dead = {("train", "north")}
        link.silent = {("alive", "south")}

    models, strategy, _ = train(tmp_path, 1, before_round, names)
    require_means(models, [name for name in names if name != "north"])
    (_, (server_round, phase, site, reason)) = told(strategy)
    assert (server_round, phase, site) == (1, "alive", "south")
    assert re.fullmatch(r"no answer within \d+ s; 4 of 5 had replied", reason)


def test_of_each_group_as_many_are_waited_for_as_its_sum_needs(tmp_path):
    first = [f"{name}-2" for name in FIVE]

    def before_round(number, link):
        # Eight replies are as many as both sums need, five of one group and three of the other.
        link.silent = {("train", "north")}

    models, strategy, _ = train(
        tmp_path,
        1,
        before_round,
        [*first, *FIVE],
        (FIVE, first),
        quorum=1,
        grace=0.0,
        min_available_nodes=10,
    )
    require_means(models, [*first, *but("north")])
    assert [site for _, phase, site, _ in told(strategy) if phase == "train"] == ["north"]
    sizes = [len(each.sites) for each in strategy.history.sums]
    assert sizes == [4, 5]


def test_a_quorum_below_what_a_sum_needs_is_raised_to_it(tmp_path):
    def before_round(number, link):
        link.silent = {("train", "north")}

    models, strategy, _ = train(tmp_path, 1, before_round, quorum=1, grace=0.0)
    require_means(models, but("north"))
    (reason,) = (what[3] for what in told(strategy) if what[1] == "train")
    assert re.fullmatch(r"no reply within \d+ s; 4 of 5 had replied", reason)


def test_after_a_set_was_signed_and_not_opened_the_same_hospitals_are_asked(tmp_path):
    def before_round(number, link):
        link.dead = {("train", "north"), ("alive", "south")} if number == 1 else set()

    models, strategy, link = train(tmp_path, 3, before_round)
    # Had all five been asked in the second round, three would have refused.
    require_means(models, None, but("north"), FIVE)
    assert [what[:3] for what in told(strategy)] == [
        (1, "train", "north"),
        (1, "alive", "south"),
        (1, "train", "all"),
    ]
    assert told(strategy)[-1][3] == (
        "the secure sum is lost: 3 hospitals have signed who remains, and 4 must"
    )
    assert link.sent.count(("train", "north")) == 2


def test_if_one_of_a_signed_set_is_gone_the_others_say_why_nothing_opens(tmp_path):
    def before_round(number, link):
        link.dead = {("train", "north"), ("alive", "south")} if number == 1 else set()
        link.present = {*but("south")} if number == 2 else {*FIVE}

    models, strategy, _ = train(tmp_path, 3, before_round)
    # With south the set of the first round is whole again.
    require_means(models, None, None, but("north"))
    refused = [what for what in told(strategy) if what[0] == 2]
    assert [what[1:3] for what in refused[:3]] == [
        ("train", "east"),
        ("train", "graz"),
        ("train", "west"),
    ]
    assert refused[0][3] == (
        "declined: the secure sum is refused: this question was settled over east, graz, south, "
        "west, and the hospitals that are asked now lack south: wait until all of the first set "
        "take part, or train with another seed"
    )


def test_a_hospital_that_comes_back_as_another_node_says_hello_again(tmp_path):
    def before_round(number, link):
        if number == 2:
            former.append(link.get_node_ids()[2])
            link.moved = {former[0]: 77}
        if number == 3:
            # Until two heartbeats are missed, the SuperLink still lists it.
            link.listed = former

    former = []
    models, strategy, link = train(tmp_path, 3, before_round)
    require_means(models, FIVE, FIVE, FIVE)
    assert told(strategy) == []
    assert link.sent.count(("hello", "north")) == 2
    assert link.sent.count(("hello", "south")) == 1
    assert strategy.site_names[77] == "north"
    assert former[0] not in strategy.site_names


def test_who_comes_later_and_says_no_hello_is_waited_for_no_longer_than_grace(tmp_path):
    def before_round(number, link):
        link.present = {*but("west")} if number == 1 else {*FIVE}
        link.silent = {("hello", "west")} if number == 2 else set()

    models, strategy, _ = train(tmp_path, 3, before_round, quorum=1)
    require_means(models, but("west"), but("west"), FIVE)
    ((server_round, phase, _, reason),) = told(strategy)
    assert (server_round, phase) == (2, "hello")
    assert re.fullmatch(r"no answer within \d+ s; 0 of 1 had replied", reason)


def test_a_hospital_that_pins_another_key_says_so_in_words(tmp_path):
    def before_round(number, link):
        if number == 2:
            pin_another_key(tmp_path, "north", "east")

    models, strategy, _ = train(tmp_path, 2, before_round)
    require_means(models, FIVE, but("east"))
    assert told(strategy) == [
        (
            2,
            "train",
            "east",
            "declined: the secure sum is refused: the key of north is not the one that is pinned: "
            "ask that hospital whether it has a new one, then `fedmed keys pin --replace`",
        )
    ]


@pytest.mark.parametrize("ending", [".secure", ".secure-head"])
def test_a_hospital_that_has_lost_its_book_says_so_in_words(tmp_path, ending):
    def before_round(number, link):
        if number == 2:
            (tmp_path / "data" / "east" / f"privacy-ledger{ending}").unlink()

    models, strategy, _ = train(tmp_path, 2, before_round)
    require_means(models, FIVE, but("east"))
    ((_, phase, site, reason),) = told(strategy)
    assert (phase, site) == ("train", "east")
    assert reason.startswith("declined: the secure sum is refused: ")
    assert reason.endswith("the hospital's book of secure sums cannot be used; its log says why")
