"""What ``live.json`` says of a run, and how often it is written."""

import json
import logging
from datetime import UTC, datetime, timedelta

import pytest

from fedmed_flower.server.live import Live
from fedmed_flower.server.run_folder import RunFolder

START = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
SITES = [f"hospital-{number}" for number in range(1, 1001)]


class Counting(RunFolder):
    """Counts what is written."""

    writes = 0

    def write_json(self, name, content):
        self.writes += 1
        super().write_json(name, content)


class Watch:
    """A clock that goes as the test says."""

    def __init__(self):
        self.seconds = 0.0

    def live(self):
        # The thread does not look: the test does.
        return Live(lambda: self.seconds, lambda: START + timedelta(seconds=self.seconds), 1e6)


@pytest.fixture
def watch():
    return Watch()


@pytest.fixture
def live(watch):
    live = watch.live()
    yield live
    live.ended("finished", "")


def read(folder):
    return json.loads((folder / "live.json").read_text())


def test_a_round_from_the_first_message_to_the_end(live, watch, tmp_path):
    live.open(RunFolder(tmp_path), "hearts")
    assert read(tmp_path) == {
        "version": 1, "app": "hearts", "status": "running", "message": "",
        "started": "2030-01-02T03:04:05+00:00", "updated": "2030-01-02T03:04:05.000+00:00",
        "part": "", "round": 0, "rounds": 0, "phase": "", "asked": [], "replied": [],
        "failed": [], "failures": [], "seconds_left": None,
    }  # fmt: skip
    live.began("", 3, ())
    live.asked(1, "train", ["north", "node 7", "east", "east"])
    live.replied("north")
    live.named("node 7", "south")
    live.failed(1, "train", "south", "no GPU\nhere")
    watch.seconds = 1.5
    live.tick()
    now = read(tmp_path)
    assert now["updated"] == "2030-01-02T03:04:06.500+00:00"
    assert (now["round"], now["rounds"], now["phase"]) == (1, 3, "train")
    assert now["asked"] == ["north", "south", "east"]
    assert now["replied"] == ["north"]
    assert now["failed"] == [{"site": "south", "reason": "no GPU here"}]
    assert now["failures"] == [
        {"round": 1, "phase": "train", "site": "south", "reason": "no GPU here"}
    ]
    # Its reply has come, and does not pass screening.
    live.replied("east")
    live.failed(1, "train", "east", "NaN")
    live.failed(1, "train", "all", "0 usable replies")
    live.replied("south")
    watch.seconds = 3
    live.tick()
    now = read(tmp_path)
    assert now["replied"] == ["north"]
    assert [each["site"] for each in now["failed"]] == ["south", "east"]
    assert [each["site"] for each in now["failures"]] == ["south", "east", "all"]
    live.asked(1, "val", ["north"])
    live.ended("stopped", "stopped by the user")
    now = read(tmp_path)
    assert (now["status"], now["message"]) == ("stopped", "stopped by the user")
    assert (now["phase"], now["asked"], now["replied"], now["failed"]) == ("", [], [], [])
    assert len(now["failures"]) == 3


@pytest.mark.parametrize(
    ("phase", "name"),
    [("describe", "roll call"), ("contribution", "roll call"), ("train", "train"),
     ("val", "validate"), ("test", "test"), ("pictures", "pictures"), ("personal", "")],
)  # fmt: skip
def test_the_names_of_the_phases(phase, name, live, tmp_path):
    live.asked(0, phase, ["north"])
    live.open(RunFolder(tmp_path), "hearts")
    assert read(tmp_path)["phase"] == name


def test_it_is_written_at_most_once_a_second_however_many_sites_reply(live, watch, tmp_path):
    folder = Counting(tmp_path)
    live.open(folder, "hearts")
    live.asked(1, "train", SITES)
    for number, site in enumerate(SITES):
        watch.seconds = number / 100
        live.replied(site)
        live.tick()
    assert watch.seconds == 9.99
    # At 0, 1, ... 9 seconds.
    assert folder.writes == 10
    assert len(read(tmp_path)["replied"]) == 901
    watch.seconds = 10.5
    live.tick()
    assert len(read(tmp_path)["replied"]) == 1000


def test_it_is_written_every_ten_seconds_if_nothing_happens(live, watch, tmp_path):
    folder = Counting(tmp_path)
    live.open(folder, "hearts")
    for second in range(36):
        watch.seconds = second
        live.tick()
    assert folder.writes == 4
    assert read(tmp_path)["updated"] == "2030-01-02T03:04:35.000+00:00"


def test_the_end_is_written_at_once(live, watch, tmp_path):
    folder = Counting(tmp_path)
    live.open(folder, "hearts")
    live.ended("failed", "OSError: no space")
    assert folder.writes == 2
    assert read(tmp_path)["message"] == "OSError: no space"


def test_the_thread_writes_what_happens_between_two_events(watch, tmp_path):
    live = Live(pause=0.01, clock=lambda: watch.seconds)
    live.open(RunFolder(tmp_path), "hearts")
    written = (tmp_path / "live.json").stat().st_ino
    live.asked(4, "train", ["north"])
    watch.seconds = 2
    # Until the thread has looked.
    while (tmp_path / "live.json").stat().st_ino == written:
        pass
    assert read(tmp_path)["round"] == 4
    live.ended("finished", "")
    assert read(tmp_path)["status"] == "finished"


def test_the_time_left_is_that_of_the_mean_round(live, watch, tmp_path):
    live.open(RunFolder(tmp_path), "hearts")
    live.began("", 5, ())
    for number, end in ((1, 10), (2, 30)):
        live.asked(number, "train", ["north"])
        live.asked(number, "val", ["north"])
        watch.seconds = end
        live.round_ended(number, ())
    live.tick()
    # Three rounds of 15 seconds.
    assert read(tmp_path)["seconds_left"] == 45
    watch.seconds = 34
    live.replied("north")
    live.tick()
    assert read(tmp_path)["seconds_left"] == 41
    live.ended("finished", "")
    assert read(tmp_path)["seconds_left"] is None


def test_a_resumed_run_does_not_know_its_time_left_before_a_round_has_ended(live, watch, tmp_path):
    live.began("", 5, [(3, "train", "all", "loss", 0.5)])
    live.asked(4, "train", ["north"])
    live.open(RunFolder(tmp_path), "hearts")
    now = read(tmp_path)
    assert (now["round"], now["seconds_left"]) == (4, None)
    watch.seconds = 8
    live.round_ended(4, ())
    live.tick()
    assert read(tmp_path)["seconds_left"] == 8


def test_a_model_for_comparison_is_named_with_its_failures(live, watch, tmp_path):
    live.open(RunFolder(tmp_path), "hearts")
    live.began("north alone", 2, ())
    live.failed(1, "val", "north", "no answer")
    watch.seconds = 1
    live.tick()
    now = read(tmp_path)
    assert (now["part"], now["round"], now["rounds"]) == ("north alone", 0, 2)
    assert now["failures"][0]["phase"] == "north alone, validate"


def test_the_latest_hundred_failures_are_kept(live, tmp_path):
    for number in range(150):
        live.failed(number + 1, "train", "north", "x" * 1000)
    live.open(RunFolder(tmp_path), "hearts")
    failures = read(tmp_path)["failures"]
    assert [each["round"] for each in failures] == list(range(51, 151))
    assert {len(each["reason"]) for each in failures} == {399}


def test_a_file_that_cannot_be_written_ends_nothing_and_is_logged_once(
    live, watch, tmp_path, caplog
):
    (tmp_path / "live.json").mkdir()
    with caplog.at_level(logging.WARNING):
        live.open(RunFolder(tmp_path), "hearts")
        for second in range(30):
            watch.seconds = second
            live.tick()
        live.ended("finished", "")
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(f"{tmp_path / 'live.json'} cannot be written: ")


def test_nothing_is_written_before_the_run_has_a_folder(watch, tmp_path):
    live = watch.live()
    live.asked(0, "describe", ["north"])
    live.tick()
    live.ended("failed", "InputError: no site answered")
    assert list(tmp_path.iterdir()) == []
