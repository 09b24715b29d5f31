"""The virtual clock: whose reply is due when, and what is refused."""

import pytest
from builders import arrays, message, run, site_app
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from tiny import TinyClient, run_tiny, says, says_of_setting

from fedmed_flower import InputError
from fedmed_flower.engines.clock import speeds_of
from fedmed_flower.engines.local import InTurn, LocalGrid
from fedmed_flower.strategies import FedAvg


def grid_of(*speeds, silent=()):
    # Flower makes messages only within a task.
    message(1)
    app = ClientApp()

    def answer(asked, context):
        if context.node_id in silent:
            return None
        content = RecordDict({"from": ConfigRecord({"node": context.node_id})})
        return Message(content, reply_to=asked)

    app.train()(answer)
    app.evaluate()(answer)
    contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in range(1, len(speeds) + 1)}
    return LocalGrid(InTurn(app), contexts, speeds=dict(zip(contexts, speeds, strict=True)))


def send(grid, *nodes, kind="train"):
    return list(grid.push_messages([Message(RecordDict(), node, kind) for node in nodes]))


def next_of(grid, ids, until=float("inf")):
    found = grid.next_reply(ids, until)
    return None if found is None else (found.content["from"]["node"], grid.now)


def test_replies_come_in_the_order_of_their_time():
    grid = grid_of(1, 0.25, 0.5)
    ids = send(grid, 1, 2, 3)
    assert [next_of(grid, ids) for _ in ids] == [(1, 1.0), (3, 2.0), (2, 4.0)]
    assert next_of(grid, ids) is None


def test_of_equal_times_the_lower_index_comes_first():
    grid = grid_of(1, 1, 1)
    ids = send(grid, 3, 1, 2)
    assert [next_of(grid, ids) for _ in ids] == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_a_message_counts_from_when_it_was_sent():
    grid = grid_of(1, 0.4)
    ids = send(grid, 1, 2)
    assert next_of(grid, ids) == (1, 1.0)
    ids += send(grid, 1)
    assert [next_of(grid, ids) for _ in range(2)] == [(1, 2.0), (2, 2.5)]


def test_what_is_due_later_does_not_come_and_the_clock_goes_on():
    grid = grid_of(1, 0.1)
    ids = send(grid, 1, 2)
    assert next_of(grid, ids, 5.0) == (1, 1.0)
    assert next_of(grid, ids, 5.0) is None
    assert grid.now == 5.0
    assert next_of(grid, ids, 10.0) == (2, 10.0)


def test_only_the_messages_that_are_asked_for_come():
    grid = grid_of(1, 0.5)
    first, second = send(grid, 1, 2)
    assert next_of(grid, [second]) == (2, 2.0)
    # It was due before: the clock does not go back.
    assert next_of(grid, [first]) == (1, 2.0)


def test_evaluation_takes_no_time():
    grid = grid_of(0.1, 1)
    assert next_of(grid, send(grid, 1, kind="evaluate")) == (1, 0.0)


def test_a_client_without_a_reply_is_passed_over():
    grid = grid_of(1, 0.5, silent={1})
    ids = send(grid, 1, 2)
    assert next_of(grid, ids, 9.0) == (2, 2.0)
    assert next_of(grid, ids, 9.0) is None
    assert grid.now == 9.0


def test_a_dropped_message_never_comes():
    grid = grid_of(1, 1)
    first, second = send(grid, 1, 2)
    grid.drop([first, "unknown"])
    assert next_of(grid, [first, second]) == (2, 1.0)
    assert list(grid.pull_messages([first])) == []


@pytest.mark.parametrize(
    ("config", "speeds"),
    [
        ({}, None),
        ({"virtual-speeds": ""}, None),
        ({"virtual-speeds": "1, 0.5,2"}, [1.0, 0.5, 2.0]),
        ({"settings": 'virtual-speeds = "3,2,1"'}, [3.0, 2.0, 1.0]),
        # Somebody else's app may have a key of that name.
        ({"data": 7}, None),
    ],
)
def test_speeds_of_a_run_config(config, speeds):
    assert speeds_of(config, 3) == speeds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            "1,2",
            "virtual-speeds must have one speed for each of the 3 sites, got 2",
        ),
        (
            "1,0,2",
            "virtual-speeds must be empty or numbers above 0 separated by commas, got '1,0,2'",
        ),
    ],
)
def test_wrong_speeds_are_refused(value, text):
    with pytest.raises(InputError, match=says_of_setting(text)):
        speeds_of({"virtual-speeds": value}, 3)


@pytest.mark.parametrize(
    ("speeds", "text"),
    [
        ([1, 2], "virtual_speeds must have num_sites = 3 items, got 2"),
        ([1, -1, 2], "virtual_speeds must be above 0 and finite, got [1, -1, 2]"),
    ],
)
def test_wrong_speeds_of_run_local_are_refused(speeds, text):
    app = site_app(lambda values, *_: (values, {}))
    with pytest.raises(InputError, match=says(text)):
        run(FedAvg(), app, arrays(w=[0.0]), 1, 3, speeds)


def test_speeds_on_another_engine_are_refused(tmp_path, monkeypatch):
    # Without it a grid is like those of Flower.
    monkeypatch.delattr(LocalGrid, "set_clock")
    text = (
        "virtual-speeds needs a run in one process, `fedmed run` with the engine local: sites that "
        "work at the same time have their own speeds"
    )
    with pytest.raises(InputError, match=says_of_setting(text)):
        run_tiny(tmp_path / "run", TinyClient, 2, virtual_speeds="1,2")
