"""Seconds a round of hospitals that are really connected: Flower's commands alone, and ours.

    OMP_NUM_THREADS=1 python benchmarks/deployment.py [--apps heart pneumonia] [--rounds 3]

A SuperLink and three SuperNodes on this machine, with TLS and keys (`examples/deployment`), run an
app: once started by `flower-superlink` and `flower-supernode`, once by `fedmed link` and `fedmed
node`, and once more with ``validate="next"``. Every message and each app process write down when
they began and ended. CPU seconds are those of the SuperLink, the SuperNodes and all that they have
started, ended processes included, from the run's start until it has ended. Of a deployment without
a run they are counted for `IDLE` seconds after it.

- heart: three hospitals of UCI Heart Disease, each its own table (FEDMED_DATA);
- pneumonia: three hospitals with generated images.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import documented

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPT = EXAMPLES / "deployment" / "deploy.py"
TICKS = os.sysconf("SC_CLK_TCK")
# Seconds for which a deployment without a run is watched, and until the processes of one are gone.
IDLE, SETTLED = 20, 4
FLOWER, OURS, NEXT = "Flower's commands", "`fedmed link`, `fedmed node`", '`validate="next"` too'
# How each variant is started, and what its run is told.
VARIANTS = {FLOWER: (["--no-launchers"], []), OURS: ([], []), NEXT: ([], ["validate=next"])}
SETTINGS = {
    "heart": [],
    "pneumonia": ["dataset=phantoms", "local-epochs=1"],
}
# An app's parts that write down, in a file of their own, when each began and ended.
CLIENT = '''
import time

LOADING = time.time()
import json
import os
from pathlib import Path

from client_app import app as timed
from flwr.clientapp import ClientApp

LOADED = time.time()


def process_began():
    """Return when this process was made, by the clock of `time.time`."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


class Timed(ClientApp):
    # By which the settings of an app are checked.
    sections = timed.sections
    node_keys = timed.node_keys

    def __call__(self, message, context):
        times = {"process": process_began(), "loading": LOADING, "loaded": LOADED}
        times["work"] = time.time()
        reply = timed(message, context)
        times["worked"] = time.time()
        key = message.metadata.message_id
        Path(FOLDER, f"client-{key}.json").write_text(json.dumps({"key": key, **times}))
        return reply


app = Timed()
'''
SERVER = """
import json
import time
from pathlib import Path

from flwr.serverapp import ServerApp
from server_app import app as timed

sent = []
came = {}


def watch(grid):
    push, pull = grid.push_messages, grid.pull_messages

    def pushed(messages):
        messages = list(messages)
        now = time.time()
        keys = list(push(messages))
        if keys:
            sent.append({"type": messages[0].metadata.message_type, "time": now, "keys": keys})
        return keys

    def pulled(keys):
        replies = list(pull(keys))
        now = time.time()
        came.update({reply.metadata.reply_to_message_id: now for reply in replies})
        return replies

    grid.push_messages, grid.pull_messages = pushed, pulled


class Timed(ServerApp):
    def __call__(self, grid, context):
        watch(grid)
        timed(grid, context)
        Path(FOLDER, "server.json").write_text(json.dumps({"sent": sent, "came": came}))


app = Timed()
"""
# The parts of an exchange: from one time to the next.
PARTS = {
    "sent, until the hospital starts a process": ("sent", "process"),
    "the process, until it loads the app": ("process", "loading"),
    "loading the app": ("loading", "loaded"),
    "until the work begins": ("loaded", "work"),
    "the work": ("work", "worked"),
    "worked, until the server has the reply": ("worked", "came"),
    "in all": ("sent", "came"),
}


@dataclass(frozen=True)
class Exchange:
    """Messages that were sent together: kind, and the times of each message by name."""

    kind: str
    sent: float
    messages: list[dict[str, float]]

    @property
    def ended(self) -> float:
        """When the last reply came."""
        return max(times["came"] for times in self.messages)


@dataclass(frozen=True)
class Measured:
    """What one run of one deployment gave."""

    exchanges: list[Exchange]
    # CPU seconds of the run: of the server, and of all hospitals.
    server: float
    hospitals: float
    # CPU seconds in one second of the whole deployment without a run.
    idle: float
    auc: float

    def seconds_a_round(self) -> list[float]:
        """Return the seconds from each round's first message to that of the next round."""
        begun = [exchange.sent for exchange in self.exchanges if exchange.kind == "train"]
        return [after - before for before, after in pairwise(begun)]

    def seconds_between(self) -> list[float]:
        """Return the seconds from the last reply of an exchange of a round to the next message."""
        kinds = [exchange.kind for exchange in self.exchanges]
        within = self.exchanges[kinds.index("train") : len(kinds) - kinds[::-1].index("train")]
        return [after.sent - before.ended for before, after in pairwise(within)]

    def seconds_of(self, kind: str) -> list[float]:
        """Return the seconds of each exchange of messages whose kind begins so."""
        return [each.ended - each.sent for each in self.exchanges if each.kind.startswith(kind)]

    def seconds_of_part(self, part: str) -> list[float]:
        """Return the seconds of a part of each message of training and validation."""
        begin, end = PARTS[part]
        kinds = ("train", "evaluate")
        exchanges = [exchange for exchange in self.exchanges if exchange.kind in kinds]
        return [times[end] - times[begin] for each in exchanges for times in each.messages]


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the CPU seconds of processes and all that they have started, what has ended included.

    A process that has ended counts in its parent, or for itself as long as nobody has asked for it.
    """
    children = defaultdict(list)
    seconds = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children[int(fields[1])].append(int(path.parent.name))
        # Of itself and of the children that it has waited for, as user and as system.
        seconds[int(path.parent.name)] = sum(map(int, fields[11:15])) / TICKS
    total = 0.0
    left = list(pids)
    while left:
        pid = left.pop()
        total += seconds[pid]
        left += children[pid]
    return total


def timed_app(name: str, folder: Path, times: Path) -> Path:
    """Copy an example whose parts write down when they began and ended."""
    app = Path(shutil.copytree(EXAMPLES / name, folder / name))
    project = app / "pyproject.toml"
    text = project.read_text()
    for part, code in (("client", CLIENT), ("server", SERVER)):
        (app / f"timed_{part}.py").write_text(f"FOLDER = {str(times)!r}\n{code}")
        before = f'{part}app = "{part}_app:app"'
        if before not in text:
            raise SystemExit(f"{project} lacks the line {before}")
        text = text.replace(before, f'{part}app = "timed_{part}:app"')
    project.write_text(text)
    return app


def write_data(name: str, folder: Path) -> None:
    """Write what three hospitals hold, each in a folder of its name."""
    if name == "pneumonia":
        split = [sys.executable, str(EXAMPLES / name / "split.py"), str(folder)]
        command([*split, "north", "south", "east", "--dataset", "phantoms"])
        return
    from fedmed_flower.data.cohorts import heart_disease

    tables, _ = heart_disease()
    for site in ("cleveland", "hungarian", "va"):
        (folder / site).mkdir(parents=True)
        tables[site].to_csv(folder / site / "heart.csv", index=False)


def command(words: Sequence[str]) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-3000:]}")
    return done.stdout


@contextmanager
def deployed(folder: Path, data: Path, options: Sequence[str]) -> Iterator[dict[str, int]]:
    """Start a deployment and yield the number of each process; stop it whatever happens."""
    script = [sys.executable, str(SCRIPT)]
    where = ["--dir", str(folder)]
    try:
        command([*script, "start", *where, "--data-root", str(data), *options])
        processes = json.loads((folder / "processes.json").read_text())
        yield {name: process["pid"] for name, process in processes.items()}
    finally:
        subprocess.run([*script, "stop", *where], stdout=subprocess.DEVNULL, check=False)


def measure(name: str, variant: str, data: Path, rounds: int) -> Measured:
    """Run an app once in a deployment of its own."""
    options, more = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        times = folder / "times"
        times.mkdir()
        app = timed_app(name, folder, times)
        settings = [*SETTINGS[name], *more, "min-sites=3", f"num-server-rounds={rounds}"]
        settings.append(f"run-dir={json.dumps(str(folder / 'run'))}")
        texts = [part for setting in settings for part in ("-c", setting)]
        with deployed(folder / "deployment", data, options) as pids:
            server = [pids.pop("superlink")]
            hospitals = list(pids.values())
            # Until the fork servers have imported all.
            time.sleep(SETTLED)
            before = [cpu_seconds(server), cpu_seconds(hospitals)]
            run = [sys.executable, str(SCRIPT), "run", str(app), *texts]
            command([*run, "--dir", str(folder / "deployment")])
            time.sleep(SETTLED)
            after = [cpu_seconds(server), cpu_seconds(hospitals)]
            time.sleep(IDLE)
            idle = (cpu_seconds(server) + cpu_seconds(hospitals) - sum(after)) / IDLE
        summary = json.loads((folder / "run" / "summary.json").read_text())
        if summary["failures"]:
            raise SystemExit(f"{name}, {variant}: {summary['failures']}")
        return Measured(
            exchanges_in(times),
            after[0] - before[0],
            after[1] - before[1],
            idle,
            summary["test"]["federated"]["auc"],
        )


def exchanges_in(folder: Path) -> list[Exchange]:
    """Return the exchanges of a run, in order, from what its parts have written down."""
    server = json.loads((folder / "server.json").read_text())
    clients = [json.loads(path.read_text()) for path in folder.glob("client-*.json")]
    by_key = {times.pop("key"): times for times in clients}
    return [
        Exchange(
            sent["type"],
            sent["time"],
            [
                {"sent": sent["time"], **by_key[key], "came": server["came"][key]}
                for key in sent["keys"]
            ],
        )
        for sent in server["sent"]
    ]


def knows_next(name: str) -> bool:
    """Return whether an app has the setting that validates a model with the next training."""
    fedmed = [sys.executable, "-c", "from fedmed_flower.cli.main import main; main()"]
    lines = command([*fedmed, "settings", str(EXAMPLES / name)]).splitlines()
    return any(line.split()[1:2] == ["validate"] for line in lines)


def median(values: Sequence[float] | None) -> str:
    """Return a median as the table has it; empty if nothing was measured."""
    return f"{statistics.median(values):.2f}" if values else ""


def spread(values: Sequence[float]) -> str:
    """Return a median with its range."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def rows(
    apps: Sequence[str], rounds: int, found: dict[tuple[str, str], Measured]
) -> Iterator[list[str]]:
    """Measure each app in each variant and yield the rows of the first table."""
    for name in apps:
        with tempfile.TemporaryDirectory() as temporary:
            # The same hospitals with the same splits in each variant.
            data = Path(temporary)
            write_data(name, data)
            for variant in VARIANTS:
                if variant == NEXT and not knows_next(name):
                    reason = "not measured: the app has no setting `validate`"
                    yield [name, variant, reason, "", "", "", "", "", ""]
                    continue
                run = found[name, variant] = measure(name, variant, data, rounds)
                yield row(name, variant, run)


def row(name: str, variant: str, run: Measured) -> list[str]:
    """Return what one run gave."""
    trained = run.exchanges[[each.kind for each in run.exchanges].index("train") :]
    second = [number for number, each in enumerate(trained) if each.kind == "train"][1]
    messages = sum(len(each.messages) for each in run.exchanges)
    return [
        name,
        variant,
        spread(run.seconds_a_round()),
        str(second),
        spread(run.seconds_of("query")),
        f"{run.hospitals / messages:.2f}",
        f"{run.hospitals + run.server:.0f}",
        f"{run.idle:.3f}",
        documented.without_zero(f"{run.auc:.4f}"),
    ]


def parts(apps: Sequence[str], found: dict[tuple[str, str], Measured]) -> Iterator[list[str]]:
    """Yield the rows of the second table: where the seconds of a round went."""
    for name in apps:
        runs = [found.get((name, variant)) for variant in VARIANTS]
        for part in PARTS:
            yield [name, part, *(median(run and run.seconds_of_part(part)) for run in runs)]
        between = "the server, from an exchange's last reply to the next message"
        yield [name, between, *(median(run and run.seconds_between()) for run in runs)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--apps", nargs="+", default=["heart"], choices=SETTINGS)
    parser.add_argument("--rounds", type=int, default=3)
    documented.add_options(parser)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2: a round lasts until the next one begins")
    found: dict[tuple[str, str], Measured] = {}
    head = ["app", "started by", "s a round (range)", "exchanges a round", "s a question (range)"]
    head += ["CPU s a message", "CPU s of the run", "CPU s a second without a run", "test AUC"]
    documented.show(
        "deployed rounds", head, rows(options.apps, options.rounds, found), options, threads=1
    )
    head = ["app", "median s, of each message of training or validation", *VARIANTS]
    documented.show("deployed messages", head, parts(options.apps, found), options, threads=1)


if __name__ == "__main__":
    main()
