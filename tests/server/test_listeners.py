"""What listeners hear of whole runs, in this process."""

import json
import logging

import pytest
from builders import FakeGrid, arrays, reply
from tiny import TinyClient, linear, run_tiny

from fedmed_flower.errors import InputError
from fedmed_flower.server import Listener
from fedmed_flower.server.listeners import Listeners
from fedmed_flower.strategies import FedAvg


class Heard(Listener):
    """Writes down all events."""

    def __init__(self):
        self.events = []


def _noted(name):
    def note(self, *arguments):
        self.events.append((name, *arguments))

    return note


EVENTS = [name for name in vars(Listener) if not name.startswith("_")]
for _name in EVENTS:
    setattr(Heard, _name, _noted(_name))


class Broken(TinyClient):
    """Cannot train at the second hospital."""

    def fit(self, model, prepared, seed):
        if self.site.index:
            raise RuntimeError("no GPU")
        return super().fit(model, prepared, seed)


def answering(names):
    """Return an answer to each message by which site 2 sends a model of another size."""

    def answer(message):
        node_id = message.metadata.dst_node_id
        model = {"w": [1.0] * (3 if names[node_id] == "b" else 2)}
        return reply(node_id, model, names[node_id], to=message, loss=0.5)

    return answer


def live_of(folder):
    return json.loads((folder / "live.json").read_text())


def test_the_events_of_a_run(tmp_path):
    heard = Heard()
    result = run_tiny(tmp_path / "run", strategy=FedAvg(listeners=[heard]), num_server_rounds=1)
    both = ["hospital-1", "hospital-2"]
    names = [event[0] for event in heard.events]
    # The roll call: names become known.
    assert heard.events[0][:3] == ("asked", 0, "describe")
    assert all(site.startswith("node ") for site in heard.events[0][3])
    assert [event[2] for event in heard.events[1:5] if event[0] == "named"] == both
    rest = heard.events[5:]
    assert rest[:4] == [
        ("began", "", 1, ()),
        ("asked", 1, "train", both),
        ("replied", "hospital-1"),
        ("replied", "hospital-2"),
    ]
    assert rest[4:7] == [
        ("asked", 1, "val", both),
        ("replied", "hospital-1"),
        ("replied", "hospital-2"),
    ]
    _, number, rows = rest[7]
    assert (names[12], number) == ("round_ended", 1)
    assert {row[:3] for row in rows} == {
        (1, phase, site) for phase in ("train", "val") for site in (*both, "all")
    }
    loss = next(row[4] for row in rows if row[1:4] == ("train", "all", "loss"))
    assert loss == result.train_metrics_clientapp[1]["loss"]
    assert rest[8:11] == [
        ("asked", 1, "test", both),
        ("replied", "hospital-1"),
        ("replied", "hospital-2"),
    ]
    assert rest[11][0] == "tested"
    assert {row[1] for row in rest[11][1]} == {"test"}
    assert rest[12:] == [("ended", "finished", "")]


def test_every_event_is_handed_on():
    heard = Heard()
    listeners = Listeners([heard])
    for name in EVENTS:
        count = getattr(Listener, name).__code__.co_argcount - 1
        getattr(listeners, name)(*range(count))
        assert heard.events.pop() == (name, *range(count))
        # A listener that overrides nothing hears it too.
        assert getattr(Listener(), name)(*range(count)) is None


def test_a_failing_site_is_heard_once_while_the_phase_is_under_way(tmp_path):
    heard = Heard()
    run_tiny(tmp_path / "run", Broken, strategy=FedAvg(listeners=[heard]), num_server_rounds=1)
    failed = [event for event in heard.events if event[0] == "failed"]
    assert failed == [("failed", 1, "train", "hospital-2", "RuntimeError: no GPU")]
    # Before the evaluation, and so not after all is over.
    assert heard.events.index(failed[0]) < heard.events.index(
        ("asked", 1, "val", ["hospital-1", "hospital-2"])
    )
    live = live_of(tmp_path / "run")
    assert live["status"] == "finished"
    assert live["failures"] == [
        {"round": 1, "phase": "train", "site": "hospital-2", "reason": "RuntimeError: no GPU"}
    ]


def test_a_reply_that_does_not_pass_screening_and_silence_are_heard_as_failures():
    heard = Heard()
    answer = answering({1: "a", 2: "b", 3: "c"})
    grid = FakeGrid(
        [1, 2, 3],
        lambda message: None if message.metadata.dst_node_id == 3 else answer(message),
    )
    FedAvg(listeners=[heard]).start(grid, arrays(w=[0.0, 0.0]), 1)
    failed = {event[3]: event[4] for event in heard.events if event[0] == "failed"}
    assert failed["node 3"].startswith("no reply within")
    assert "w" in failed["b"]
    replied = [event[1] for event in heard.events if event[0] == "replied"]
    assert replied[:2] == ["a", "b"]


def test_a_run_with_models_for_comparison(tmp_path):
    heard = Heard()
    strategy = FedAvg(listeners=[heard])
    run_tiny(tmp_path / "run", strategy=strategy, baselines=True, personal_epochs=1)
    parts = [event[1] for event in heard.events if event[0] == "began"]
    assert parts == [
        "",
        "fine-tuned models",
        "hospital-1 alone",
        "hospital-2 alone",
        "all data pooled",
        "hospital-1, fine-tuned model",
        "hospital-2, fine-tuned model",
    ]
    tested = [row[1] for event in heard.events if event[0] == "tested" for row in event[1]]
    assert {"test", "personal-test", "local-test", "local-test-all", "pooled-test"} == {*tested}
    assert [event[0] for event in heard.events].count("ended") == 1
    assert not list((tmp_path / "run" / "baselines").rglob("live.json"))
    live = live_of(tmp_path / "run")
    assert (live["part"], live["status"], live["message"]) == ("", "finished", "")


def test_a_strategy_without_federate(tmp_path):
    heard = Heard()
    strategy = FedAvg(run_dir=tmp_path, listeners=[heard])
    grid = FakeGrid([1, 2], answering({1: "a", 2: "b"}))
    result = strategy.start(grid, arrays(w=[0.0, 0.0]), 2)
    live = live_of(tmp_path)
    assert (live["status"], live["round"], live["rounds"]) == ("finished", 2, 2)
    strategy.test(grid, result.arrays)
    assert [event[0] for event in heard.events][-5:] == [
        "asked", "replied", "replied", "tested", "ended",
    ]  # fmt: skip
    again = live_of(tmp_path)
    assert (again["status"], again["started"]) == ("finished", live["started"])
    assert again["updated"] > live["updated"]


def test_a_strategy_with_which_nobody_trains_has_failed(tmp_path):
    strategy = FedAvg(run_dir=tmp_path)
    strategy.start(FakeGrid([1], lambda message: None), arrays(w=[0.0]), 1)
    live = live_of(tmp_path)
    assert (live["status"], live["message"]) == ("failed", "no site could train")


def test_a_resumed_run_hears_the_figures_so_far(tmp_path):
    run_tiny(tmp_path / "run", num_server_rounds=1)
    heard = Heard()
    run_tiny(
        tmp_path / "run",
        strategy=FedAvg(listeners=[heard]),
        num_server_rounds=2,
        resume=True,
    )
    _, part, rounds, rows = next(event for event in heard.events if event[0] == "began")
    assert (part, rounds, {row[0] for row in rows}) == ("", 2, {1})
    assert [event[1] for event in heard.events if event[0] == "round_ended"] == [2]


def test_what_the_server_measures_before_the_first_round_is_heard(tmp_path):
    heard = Heard()
    run_tiny(
        tmp_path / "run",
        strategy=FedAvg(listeners=[heard]),
        num_server_rounds=1,
        evaluate_fn=lambda server_round, arrays: {"score": float(server_round)},
    )
    rows = next(event[2] for event in heard.events if event[0] == "round_ended")
    assert [row for row in rows if row[1] == "server"] == [
        (0, "server", "all", "score", 0.0),
        (1, "server", "all", "score", 1.0),
    ]


class Raising(Heard):
    """Raises at one event."""

    def __init__(self, event, error):
        super().__init__()
        setattr(self, event, self._raise)
        self.error = error

    def _raise(self, *_):
        self.events.append("raised")
        raise self.error


@pytest.mark.parametrize("event", ["asked", "round_ended", "ended"])
def test_a_listener_that_raises_is_left_out_and_the_others_hear_on(event, tmp_path, caplog):
    raising = Raising(event, ValueError("no such server"))
    heard = Heard()
    with caplog.at_level(logging.WARNING):
        run_tiny(tmp_path / "run", strategy=FedAvg(listeners=[raising, heard]), num_server_rounds=2)
    assert raising.events.count("raised") == 1
    assert raising.events[-1] == "raised"
    assert heard.events[-1] == ("ended", "finished", "")
    lines = [record.message for record in caplog.records if "listener" in record.message]
    assert lines == [
        f"the listener Raising failed in {event} and hears no more: ValueError: no such server"
    ]


def test_a_run_that_is_stopped(tmp_path):
    stopping = Raising("round_ended", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "run", strategy=FedAvg(listeners=[stopping]))
    live = live_of(tmp_path / "run")
    assert (live["status"], live["message"]) == ("stopped", "stopped by the user")


def test_a_run_that_fails_says_why(tmp_path):
    def evaluate(server_round, arrays):
        raise OSError("the table is not there")

    with pytest.raises(OSError, match="not there"):
        run_tiny(tmp_path / "run", evaluate_fn=evaluate)
    live = live_of(tmp_path / "run")
    assert (live["status"], live["message"]) == ("failed", "OSError: the table is not there")


def test_a_run_that_is_refused_leaves_nothing_and_is_heard(tmp_path):
    heard = Heard()
    with pytest.raises(InputError):
        run_tiny(tmp_path / "run", strategy=FedAvg(listeners=[heard]), num_server_rounds=0)
    assert [event[:2] for event in heard.events] == [("ended", "failed")]
    assert not (tmp_path / "run").exists()


def test_listeners_change_no_bit_of_the_model(tmp_path):
    first = run_tiny(tmp_path / "a", strategy=FedAvg(listeners=[Heard()]), model=linear)
    second = run_tiny(tmp_path / "b", model=linear)
    assert {k: v.data for k, v in first.arrays.items()} == {
        k: v.data for k, v in second.arrays.items()
    }
