"""Time and memory of the rules next to Flower's, in one run.

Prints a row for each number of replies, model and rule: seconds of Flower's class and of ours
(best of the repeats, taken in turn), their ratio, and the peak memory of each on top of the
replies, in models. "read" is the time to read every byte of the replies once. `--crossover`
prints instead where sorting columns becomes faster than the sorting network, ``--stream`` the peak
memory of the mean of 1,000 replies that come one by one. Threads: ``OMP_NUM_THREADS``.

``python benchmarks/aggregation.py [--repeats 3] [--replies 5,20,100] [--parameters 10000000]``
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

from fedmed_flower import strategies
from fedmed_flower.arrays import kernels

Rule = Callable[[object], object]

FAR = {"num_malicious_nodes": 1}
RULES: dict[str, tuple[Rule, int]] = {
    "FedAvg": (lambda home: home.FedAvg(), 1),
    "FedMedian": (lambda home: home.FedMedian(), 1),
    "FedTrimmedAvg": (lambda home: home.FedTrimmedAvg(beta=0.2), 1),
    "Krum": (lambda home: home.Krum(num_malicious_nodes=1), 5),
    "MultiKrum": (lambda home: home.MultiKrum(num_nodes_to_select=3, **FAR), 5),
    "Bulyan": (lambda home: home.Bulyan(num_malicious_nodes=1), 7),
    "GeometricMedian": (lambda home: home.GeometricMedian(), 1),
    "CenteredClipping": (lambda home: home.CenteredClipping(), 1),
    "FedMedian, nearest": (lambda home: home.FedMedian(mixing="nearest", **FAR), 5),
    "FedMedian, bucketing": (lambda home: home.FedMedian(mixing="bucketing"), 1),
}


def layouts(parameters: int) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes of the models, by name."""
    from monai.networks.nets import DenseNet121

    network = DenseNet121(spatial_dims=2, in_channels=1, out_channels=2).state_dict()
    return {
        f"20 layers, {parameters:,}": [(parameters // 20,)] * 20,
        f"one layer, {parameters:,}": [(parameters,)],
        f"DenseNet121, {len(network)} entries": [tuple(v.shape) for v in network.values()],
    }


def make(shapes: list[tuple[int, ...]], count: int, seed: int = 0) -> list[Message]:
    """Return replies as hospitals send them, around a common model."""
    rng = np.random.default_rng(seed)
    model = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    replies = []
    for _ in range(count):
        arrays = ArrayRecord()
        for place, values in enumerate(model):
            moved = np.asarray(rng.standard_normal(values.shape, dtype=np.float32))
            moved *= np.float32(0.01)
            arrays[f"{place}.weight"] = Array(np.asarray(moved + values))
        metrics = MetricRecord({"num-examples": int(rng.integers(50, 500)), "loss": 1.0})
        content = RecordDict({"arrays": arrays, "metrics": metrics, "config": ConfigRecord()})
        replies.append(Message(content, dst_node_id=1, message_type="train"))
    return replies


def copies(replies: list[Message]) -> list[Message]:
    """Return messages with records of their own: Flower's median takes arrays out of them."""
    made = []
    for reply in replies:
        content = RecordDict(dict(reply.content))
        content["arrays"] = ArrayRecord(dict(reply.content["arrays"]))
        made.append(Message(content, dst_node_id=1, message_type="train"))
    return made


def seconds(strategy: object, replies: list[Message]) -> float:
    """Return how long one aggregation takes."""
    given = copies(replies)
    gc.collect()
    began = time.perf_counter()
    strategy.aggregate_train(1, given)
    return time.perf_counter() - began


def extra(strategy: object, replies: list[Message]) -> int:
    """Return the most bytes that one aggregation takes at a time."""
    given = copies(replies)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    strategy.aggregate_train(1, given)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return peak


def reading(replies: list[Message]) -> float:
    """Return how long it takes to read every byte of the replies once."""
    views = [np.frombuffer(a.data, np.uint8) for r in replies for a in r.content["arrays"].values()]
    words = [v[-(v.size // 8 * 8) :].view(np.uint64) if v.size > 4096 else v for v in views]
    began = time.perf_counter()
    for values in words:
        np.bitwise_xor.reduce(values)
    return time.perf_counter() - began


def compare(
    name: str, shapes: list[tuple[int, ...]], count: int, args: argparse.Namespace
) -> Iterator[list[str]]:
    """Yield the rows of a number of replies of a model."""
    replies = make(shapes, count)
    size = sum(len(array.data) for array in replies[0].content["arrays"].values())
    read = min(reading(replies) for _ in range(args.repeats))
    what = f"reading every byte once, {count * size / 2**20:.0f} MB"
    yield [str(count), name, what, "", short(read), "", "", ""]
    for rule, (build, least) in RULES.items():
        if count < least or (args.rules and rule not in args.rules):
            continue
        ours = build(strategies)
        theirs = build(flower) if hasattr(flower, rule) else None
        pair = [strategy for strategy in (theirs, ours) if strategy is not None]
        times: dict[int, list[float]] = {id(strategy): [] for strategy in pair}
        for _ in range(args.repeats):
            for strategy in pair:
                times[id(strategy)].append(seconds(strategy, replies))
        best = {key: min(values) for key, values in times.items()}
        memory = {id(s): extra(s, replies) / size for s in pair} if args.memory else {}
        own, other = best[id(ours)], best.get(id(theirs))
        figures = (other, own, other and other / own, memory.get(id(theirs)), memory.get(id(ours)))
        yield [str(count), name, rule, *map(short, figures)]


def short(figure: float | None) -> str:
    """Return two digits that count, or more before the point; nothing for what there is not."""
    if figure is None:
        return ""
    return f"{figure:.2g}" if figure < 10 else f"{figure:.0f}"


def rows(args: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the rows of all numbers of replies and models that are asked for."""
    for count in map(int, args.replies.split(",")):
        for name, shapes in layouts(args.parameters).items():
            if args.models in name:
                yield from compare(name, shapes, count, args)


def crossover(repeats: int) -> None:
    """Print the time of the median for each number of replies, by both ways of sorting."""
    print(f"{'replies':>8}{'network s':>11}{'columns s':>11}   (median of 10M float32)")
    for count in (10, 20, 40, 50, 64, 80, 100, 150, 200):
        size = 2_000_000 // count * 10
        rng = np.random.default_rng(0)
        rows = [[rng.standard_normal(size, dtype=np.float32)] for _ in range(count)]
        outs = [np.empty(size, np.float32)]
        best = []
        for limit in (count, 0):
            kernels.NETWORK_UP_TO = limit
            times = []
            for _ in range(repeats):
                began = time.perf_counter()
                kernels.order_statistics(rows, outs, (count - 1) // 2, count // 2 + 1)
                times.append(time.perf_counter() - began)
            best.append(min(times) * 1e7 / size)
        print(f"{count:8}{best[0]:11.3f}{best[1]:11.3f}", flush=True)


def streaming(count: int = 1000, parameters: int = 1_000_000) -> None:
    """Print the peak memory of the mean of replies that come one by one."""
    (model,) = make([(parameters,)], 1)
    size = len(next(iter(model.content["arrays"].values())).data)

    def sent() -> Iterator[Message]:
        for number in range(count):
            # Bytes of its own, as from the network.
            (reply,) = make([(parameters,)], 1, seed=number)
            yield reply

    tracemalloc.start()
    began = time.perf_counter()
    strategies.FedAvg().aggregate_train(1, sent())
    took, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{count} replies of {parameters:,} float32 from an iterator: {took:.0f} s with making")
    print(f"them; at most {peak / size:.0f} models in memory at a time")


def main() -> None:
    """Parse the arguments and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--replies", default="5,20,100")
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--models", default="", help="part of the names of the models to take")
    parser.add_argument("--rules", nargs="*", default=[])
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--stream", action="store_true")
    documented.add_options(parser)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    if args.stream:
        streaming()
        return
    if args.crossover:
        crossover(args.repeats)
        return
    head = ("replies", "model", "rule", "Flower s", "here s", "ratio")
    head += ("Flower, models of memory", "here, models of memory")
    versions = ("numpy", "flwr")
    threads = kernels.threads()
    documented.show("aggregation", head, rows(args), args, versions=versions, threads=threads)


if __name__ == "__main__":
    main()
