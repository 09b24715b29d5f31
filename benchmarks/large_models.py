"""Time and memory of a round at the server with large models, next to Flower's own strategies.

K replies of float32 weights in twenty layers, in one process. Prints a row for each stage: seconds
on one thread, and the most memory on top of what the stage was given, in models; Flower's beside
ours where it has the stage. The last rows are whole rounds of a null client by `run_local`: the
most memory of the run, all models counted, the first one too. The last column is computed and not
run: seconds and gigabytes of a model of 1,000,000,000 weights, as both grow with it.

``python benchmarks/large_models.py [--parameters 100000000] [--replies 4] [--stages sum,step]``
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as flower
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedmed_flower import run_local, strategies
from fedmed_flower.arrays.views import array_of
from fedmed_flower.server.history import History
from fedmed_flower.server.run_folder import Checkpoint, RunFolder
from fedmed_flower.server.screening import screen

LAYERS = 20
LARGE = 1_000_000_000
BYTES = 4
HEAD = (
    "stage",
    "Flower, s",
    "ours, s",
    "Flower, models",
    "ours, models",
    "ours, 1B weights: s, GB",
)
Found = tuple[float, float]
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("FedAvg", {}),
    ("FedAdam", {}),
    ("FedMedian", {}),
    ("FedMedian", {"memory_gigabytes": 1e-9}),
)


def layers(parameters: int, seed: int) -> ArrayRecord:
    """Return a model of different numbers, whose equal parts Flower would send once."""
    rng = np.random.default_rng(seed)
    size = parameters // LAYERS
    return ArrayRecord(
        {
            f"{n}.weight": array_of(rng.standard_normal(size, dtype=np.float32))
            for n in range(LAYERS)
        }
    )


def reply(parameters: int, seed: int) -> Message:
    """Return a reply as a hospital sends it."""
    metrics = MetricRecord({"num-examples": 100 + seed, "loss": 1.0})
    content = RecordDict({"arrays": layers(parameters, seed), "metrics": metrics})
    return Message(content, dst_node_id=1, message_type="train")


def measured(work: Callable[[], object], model: int) -> Found:
    """Return the seconds of some work, and the most memory that it takes on top, in models."""
    gc.collect()
    tracemalloc.start()
    began = time.perf_counter()
    made = work()
    spent = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del made
    return spent, peak / model


def wire(options: argparse.Namespace) -> Iterator[tuple[str, Found, Found | None]]:
    """Yield what Flower does with each message: content to objects, and objects to content."""
    model = options.parameters * BYTES
    contents: dict[str, bytes] = {}
    messages = [reply(options.parameters, 1)]

    def deflate() -> None:
        for key, item in get_all_nested_objects(messages[0]).items():
            contents[key] = item.deflate()

    found = measured(deflate, model)
    yield "a message into Flower's objects", found, None
    top = messages.pop().object_id
    found = measured(lambda: inflate_object_from_contents(top, contents), model)
    yield "objects into a message", found, None


def aggregation(options: argparse.Namespace) -> Iterator[tuple[str, Found | None, Found | None]]:
    """Yield what happens to the replies: screening, rules, the step of an optimiser."""
    model = options.parameters * BYTES
    replies = [reply(options.parameters, seed) for seed in range(options.replies)]
    sent = layers(options.parameters, 99)
    yield (
        f"screening {options.replies} replies",
        None,
        measured(lambda: [screen(each, "num-examples", sent) for each in replies], model),
    )
    for name in ("FedAvg", "FedMedian", "FedAdam"):
        ours = getattr(strategies, name)()
        theirs = getattr(flower, name)()
        ours.run.sent_arrays = sent
        if name == "FedAdam":
            theirs.current_arrays = {key: array.numpy() for key, array in sent.items()}
        pair = [
            measured(lambda one=one: one.aggregate_train(1, shallow(replies)), model)
            for one in (theirs, ours)
        ]
        yield f"{name} of {options.replies} replies", pair[0], pair[1]
        del ours, theirs


def shallow(replies: list[Message]) -> list[Message]:
    """Return messages with records of their own and the same arrays: Flower takes arrays out."""
    made = []
    for each in replies:
        content = RecordDict(dict(each.content))
        content["arrays"] = ArrayRecord(dict(each.content["arrays"]))
        made.append(Message(content, dst_node_id=1, message_type="train"))
    return made


def files(options: argparse.Namespace) -> Iterator[tuple[str, None, Found]]:
    """Yield what a round writes, and what a resumed run reads."""
    model = options.parameters * BYTES
    arrays = layers(options.parameters, 1)
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(place)
        checkpoint = Checkpoint(1, 0, arrays, History(), {})
        yield "checkpoint", None, measured(lambda: folder.save(checkpoint), model)
        yield "`model.safetensors`", None, measured(lambda: folder.write_model(arrays), model)
        yield "reading the checkpoint", None, measured(folder.load, model)


def null_client(message: Message, context: Any) -> Message:
    """Send a model of the same size back."""
    metrics = MetricRecord({"num-examples": 100, "loss": 1.0})
    name = ConfigRecord({"name": f"site {context.node_config['partition-id']}"})
    content = RecordDict({"metrics": metrics, "site": name})
    if message.metadata.message_type == "train":
        sent = message.content["arrays"]
        content["arrays"] = ArrayRecord(
            {key: array_of(array.numpy() + np.float32(1)) for key, array in sent.items()}
        )
    return Message(content, reply_to=message)


def rounds(options: argparse.Namespace) -> Iterator[tuple[str, Found | None, Found]]:
    """Yield whole runs of two rounds."""
    model = options.parameters * BYTES

    def run(strategy: Any) -> None:
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Any) -> None:
            strategy.start(grid, layers(options.parameters, 1), 2)

        run_local(server, null_client, options.replies)  # type: ignore[arg-type]

    for name, more in KINDS:
        theirs = None
        if not more:
            theirs = measured(lambda name=name: run(getattr(flower, name)()), model)
        with tempfile.TemporaryDirectory() as place:
            own = getattr(strategies, name)(run_dir=Path(place, "run"), **more)
            ours = measured(lambda own=own: run(own), model)
        what = ", replies in files" if more else ""
        yield f"two rounds of {name}, ours with a run folder{what}", theirs, ours
        del own


STAGES: dict[str, Callable[[argparse.Namespace], Iterator[Any]]] = {
    "wire": wire,
    "aggregation": aggregation,
    "files": files,
    "rounds": rounds,
}


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    for stage in options.stages.split(","):
        for what, theirs, ours in STAGES[stage](options):
            seconds, models = ours or theirs
            scale = LARGE / options.parameters
            large = f"{seconds * scale:.0f}, {models * LARGE * BYTES / 1e9:.0f}"
            pair = (theirs, ours)
            yield [
                what,
                *(f"{one[0]:.2f}" if one else "" for one in pair),
                *(f"{one[1]:.1f}" if one else "" for one in pair),
                large,
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--replies", type=int, default=4)
    parser.add_argument("--stages", default=",".join(STAGES))
    documented.add_options(parser)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    documented.show("large models", HEAD, rows(options), options, versions=("flwr", "numpy"))


if __name__ == "__main__":
    main()
