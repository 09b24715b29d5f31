"""Secure sums of real hospitals: a SuperLink, SuperNodes with key files, and kills."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployment_helper import SCRIPT, Deployment, deployment, write_app
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from key_files import make_hospitals, pin_another_key
from lines import SETTINGS, SIZE, change_of, rows_of

from fedmed_flower.arrays.views import view
from fedmed_flower.secure.encoding import SecureError, decoded
from fedmed_flower.secure.record import Record

pytestmark = pytest.mark.slow

CLIENT = Path(__file__).parents[1] / "helpers" / "lines.py"
# Every message and reply is kept as bytes; at each stop the test says when to go on.
SERVER = """
    import json
    import time
    from itertools import count
    from pathlib import Path

    import numpy as np
    from flwr.app import Array, ArrayRecord
    from flwr.common.serde import recorddict_to_proto
    from flwr.serverapp import ServerApp

    from fedmed_flower.strategies import FedAvg, WeightedFedAvg

    FOLDER = Path({folder!r})
    app = ServerApp()
    numbers = count()


    def keep(way, message):
        content = recorddict_to_proto(message.content) if message.has_content() else None
        data = b"" if content is None else content.SerializeToString(deterministic=True)
        kind = message.metadata.message_type
        (FOLDER / f"{next(numbers):04d}-{way}-{kind}").write_bytes(data)


    def watch(grid, after_upload):
        push, pull = grid.push_messages, grid.pull_messages

        def pushed(messages):
            messages = list(messages)
            for message in messages:
                keep("to", message)
            return push(messages)

        def pulled(ids):
            replies = list(pull(ids))
            for reply in replies:
                keep("from", reply)
                if reply.has_content() and reply.metadata.message_type == "train":
                    after_upload(str(reply.content["site"]["name"]))
            return replies

        grid.push_messages, grid.pull_messages = pushed, pulled


    def stop(event):
        (FOLDER / f"{event}.stop").touch()
        while not (FOLDER / f"{event}.go").exists():
            time.sleep(0.2)


    def wait_for(grid, count):
        while len(list(grid.get_node_ids())) != count:
            time.sleep(0.5)


    def run(grid, strategy, rounds, part, before_round=lambda number: None):
        models, starts = {}, []

        def begin(number):
            before_round(number)
            starts.append(time.monotonic())

        def keep_model(number, arrays):
            models[number] = arrays["weight"].numpy().ravel().astype(float).tolist()

        strategy.before_round = begin
        initial = ArrayRecord({"weight": Array(np.zeros((1, SIZE), np.float32))})
        strategy.start(grid, initial, num_rounds=rounds, timeout=600, evaluate_fn=keep_model)
        ended = time.monotonic()
        story = {
            "models": models,
            "failures": [list(vars(each).values()) for each in strategy.history.failures],
            "notes": [list(vars(each).values()) for each in strategy.history.notes],
            "seconds": [after - began for began, after in zip(starts, [*starts[1:], ended])],
        }
        (FOLDER / f"{part}.json").write_text(json.dumps(story))
"""
THREE = """
    @app.main()
    def main(grid, context):
        watch(grid, lambda site: None)
        common = {"fraction_evaluate": 0.0, "min_available_nodes": 3}
        run(grid, FedAvg(**common), 1, "plain")
        (FOLDER / "plain").mkdir()
        for path in FOLDER.glob("[0-9]*"):
            path.rename(FOLDER / "plain" / path.name)
        run(grid, FedAvg(secure="sum", secure_exponent=0, **common), 2, "secure")
"""
REFUSED = """
    @app.main()
    def main(grid, context):
        common = {"fraction_evaluate": 0.0, "min_available_nodes": 3}
        run(grid, FedAvg(secure="sum", secure_exponent=0, **common), 1, "refused")
"""
# Four are needed of five, so that one may be lost in each round.
FIVE = """
    @app.main()
    def main(grid, context):
        now = [0]

        def before_round(number):
            now[0] = number
            if number == 3:
                wait_for(grid, 4)
            if number in (2, 4):
                stop(f"round-{number}")
            if number == 4:
                wait_for(grid, 5)

        def after_upload(site):
            if now[0] == 4 and site == "south":
                stop("uploaded")

        watch(grid, after_upload)
        common = {"fraction_evaluate": 0.0, "min_available_nodes": 4}
        rule = WeightedFedAvg(
            weights="uniform", secure="sum", secure_exponent=0, grace=20.0, **common
        )
        run(grid, rule, 4, "five", before_round)
"""


@dataclass
class Trial:
    """A deployment of hospitals with keys, and the server's apps of this file on it."""

    folder: Path
    started: Deployment
    process: Any = None

    def data(self, name: str) -> Path:
        return self.folder / "data" / name

    def app(self, name: str, main: str) -> tuple[Path, Path]:
        """Write an app; return its folder and the one for what its server keeps."""
        kept = self.folder / "kept" / name
        kept.mkdir(parents=True)
        server = SERVER.replace("{folder!r}", repr(str(kept))).replace("SIZE", str(SIZE))
        written = write_app(self.folder / "apps" / name, server + main, "", **SETTINGS)
        shutil.copy(CLIENT, written / "client_app.py")
        return written, kept

    @contextmanager
    def running(self, app: Path) -> Iterator[None]:
        """Run an app; at the end it must have ended well."""
        command = [sys.executable, str(SCRIPT), "run", str(app)]
        command += ["--dir", str(self.started.directory)]
        log = self.folder / f"{app.name}.log"
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield
            assert self.process.wait(1500) == 0, log.read_text()
        finally:
            self.process.kill()
            self.process.wait()

    def wait_for(self, path: Path) -> None:
        """Wait until a file is there, while the app runs."""
        deadline = time.monotonic() + 900
        while not path.exists():
            assert self.process.poll() is None, f"the run ended before {path.name}"
            assert time.monotonic() < deadline, path.name
            time.sleep(0.2)

    def at_stop(self, kept: Path, event: str, act: Callable[[], object]) -> None:
        """Do something while the server waits at a stop."""
        self.wait_for(kept / f"{event}.stop")
        act()
        (kept / f"{event}.go").touch()


@contextmanager
def trial(folder: Path, names: tuple[str, ...]) -> Iterator[Trial]:
    """Make each hospital's keys and peers file, and start all."""
    make_hospitals(folder, names)
    keys = folder / "keys"
    more = f'secure-key="{keys}/{{site}}.key" secure-peers="{keys}/{{site}}.toml"'
    arguments = ["--data-root", str(folder / "data"), "--node-config", more]
    with deployment(folder / "files", *arguments) as started:
        yield Trial(folder, started)


def contents(kept: Path, way: str, kind: str = "*") -> list[RecordDict]:
    """Return what was kept of messages, in their order."""
    paths = sorted(kept.glob(f"[0-9]*-{way}-{kind}"))
    protos = [ProtoRecordDict.FromString(path.read_bytes()) for path in paths]
    return [recorddict_from_proto(proto) for proto in protos]


def story_of(kept: Path, part: str) -> dict[str, Any]:
    return json.loads((kept / f"{part}.json").read_text())


def model_of(story: dict[str, Any], server_round: int) -> np.ndarray:
    return np.array(story["models"][str(server_round)])


def near(words: np.ndarray, others: np.ndarray) -> int:
    """Return how many words are near: of two vectors without relation one in a hundred."""
    away = np.abs((words - others).view(np.int32).astype(float))
    return int((away < 2**31 / 100).sum())


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    with trial(tmp_path_factory.mktemp("three"), ("east", "north", "south")) as started:
        yield started


def test_three_hospitals_train_and_no_single_one_is_seen(three: Trial) -> None:
    names = ("east", "north", "south")
    app, kept = three.app("three", THREE)
    with three.running(app):
        pass
    plain, secure = story_of(kept, "plain"), story_of(kept, "secure")
    # A hospital with a key that does not tell its own figures trains in sums alone.
    refused = {site: reason for _, _, site, reason in plain["failures"] if site != "all"}
    assert sorted(refused) == list(names)
    assert all("leave in secure sums alone" in reason for reason in refused.values())
    assert not any(map(len, contents(kept / "plain", "from", "train")))
    assert secure["failures"] == secure["notes"] == []
    print("seconds of rounds", secure["seconds"])

    weights = np.zeros(SIZE)
    rows = {name: len(rows_of(name)[0]) for name in names}
    for server_round in (1, 2):
        changes = {name: change_of(name, weights) for name in names}
        weights = weights + sum(rows[name] * changes[name] for name in names) / sum(rows.values())
        assert np.abs(model_of(secure, server_round) - weights).max() < 1e-6

    change = {name: change_of(name, weights * 0) for name in names}

    # The server has no hospital's model, neither as it is nor as the ring would hold it.
    kinds = [path.name.partition("from-")[2] for path in sorted(kept.glob("*-from-*"))]
    exchanges = ["query.hello", *["query.count", "query.unmask"], *2 * ["train", "query.unmask"]]
    assert kinds == [kind for kind in exchanges for _ in names]
    received = b"".join(path.read_bytes() for path in kept.glob("*-from-*"))
    assert len(received) > 3 * 4 * SIZE
    for reply in contents(kept, "from"):
        assert not reply.metric_records
        assert {*reply} <= {"masked", "secure", "site"}
        assert {*reply["secure"]} == {"letter"}
        assert {*reply["site"]} <= {"name", "simulated", "version", "data", "generated"}
    record = Record.from_bytes(contents(kept, "to", "train")[0]["secure"]["record"])
    assert record.names == names
    assert record.weighting["total"] == sum(rows.values())
    layout = record.layout
    zeros = {part.name: np.zeros(part.size) for part in layout.parts}

    def unmasked(name: str) -> np.ndarray:
        share = rows[name] / sum(rows.values())
        words, _ = layout.encode(zeros | {"model/weight": change[name]}, share)
        return words[0]

    assert all(near(unmasked(name), unmasked(name)) == SIZE for name in names)
    for reply in contents(kept, "from", "train"):
        small, large = (view(array).copy() for array in reply["masked"].values())
        assert all(near(small, unmasked(name)) < SIZE / 4 for name in names)
        with pytest.raises(SecureError, match="the masks do not cancel"):
            layout.decode((small, large), 1)


def test_a_hospital_that_pins_another_key_says_so_and_nothing_opens(three: Trial) -> None:
    app, kept = three.app("refused", REFUSED)
    honest = pin_another_key(three.folder, "north", "east")
    try:
        with three.running(app):
            pass
    finally:
        honest.save(three.folder / "keys" / "east.toml")
    story = story_of(kept, "refused")
    assert [failure[:3] for failure in story["failures"]] == [
        [0, "count", "east"],
        [1, "train", "all"],
    ]
    refused, lost = (failure[3] for failure in story["failures"])
    assert re.search("the key of north is not the one that is pinned: ask that hospital", refused)
    assert lost == (
        "the secure sum is lost: a sum must be over at least 3 hospitals, and this one is over 2 "
        "(north, south)"
    )
    assert model_of(story, 1).tolist() == [0.0] * SIZE


def test_of_five_hospitals_one_may_be_killed_in_a_round(tmp_path: Path) -> None:
    names = ("east", "graz", "north", "south", "west")
    with trial(tmp_path, names) as hospitals:
        app, kept = hospitals.app("five", FIVE)
        halt = hospitals.data("north") / "halt"
        halted = hospitals.data("north") / "halted"
        before = hospitals.started.started("north")
        with hospitals.running(app):
            hospitals.at_stop(kept, "round-2", halt.touch)
            hospitals.wait_for(halted)
            hospitals.started.cut("north")
            halt.unlink()
            hospitals.at_stop(kept, "round-4", lambda: hospitals.started.restart("north", *before))
            hospitals.at_stop(kept, "uploaded", lambda: hospitals.started.cut("south"))
    story = story_of(kept, "five")
    four = [name for name in names if name != "north"]
    print("seconds of rounds", story["seconds"])
    weights = np.zeros(SIZE)
    # The one who was killed after its upload counts.
    for server_round, members in enumerate((names, four, four, names), start=1):
        weights = weights + sum(change_of(name, weights) for name in members) / len(members)
        assert np.abs(model_of(story, server_round) - weights).max() < 1e-6, server_round
    failed = [failure[:3] for failure in story["failures"]]
    assert failed == [[2, "train", "north"], [4, "unmask", "south"]]
    assert re.search("Node Unavailable|no reply", story["failures"][0][3])
    assert story["notes"] == [
        [2, "train", "all", "the sum is without north; the others count the same in its place"]
    ]

    records = [
        Record.from_bytes(each["secure"]["record"]) for each in contents(kept, "to", "train")
    ]
    asked = {record.server_round: list(record.names) for record in records}
    assert asked == {1: [*names], 2: [*names], 3: four, 4: [*names]}
    assert {record.needed for record in records} == {4}
    # The hospital that came back goes on with its key of the run.
    assert len(contents(kept, "to", "query.hello")) == len(names)
    signed = [decoded(each["secure"]["asked"]) for each in contents(kept, "to", "query.alive")]
    assert [each["members"] for each in signed] == [four] * 4
