"""Sums that a server cannot take apart: what others' cost, and what one request opens.

Four tables:

- what a server learns of one hospital by a changed last request of Flower's SecAgg+;
- yes or no: what a hospital with Flower's mod accepts, and what its masks are drawn from;
- CPU seconds and bytes of a round, at a hospital and at the server;
- with ``--he``, those of vectors encrypted by CKKS (needs ``tenseal``). It is measured on a tenth
  of the vector, and the seconds are multiplied by ten: each 4,096 numbers are a ciphertext of their
  own, and the whole would take 4 GB.

Seconds are those of the process, all threads together, and the median of ``--repeats``. Training,
network and the strategy's own step are not in them. The second hospital is the one that is opened,
or lost.

``python benchmarks/secure.py [--he] [--size 10000000] [--sites 5] [--repeats 3]``
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
from documented import without_zero
from peers import ckks, opened, secaggplus
from peers.costs import Cost, Weights, vectors_of


def rows_opened(vectors: Sequence[Weights]) -> Iterator[list[str]]:
    """Yield a row for each threshold."""
    count = len(vectors)
    for threshold in (count // 2 + 1, 1):
        found = opened.opened(vectors, threshold=threshold)
        whom = "the hospital itself" if threshold == 1 else f"{found.asked} other hospitals"
        yield [
            f"{threshold} of {count}",
            whom,
            f"{found.difference:.1e}",
            f"{found.step:.1e}",
            without_zero(f"{found.largest:.2f}"),
        ]


def rows_seen() -> Iterator[list[str]]:
    """Yield a row for each question."""

    def answer(yes: bool) -> str:
        return "yes" if yes else "no"

    yield ["masks depend on 32 bits of their seed alone", answer(opened.seed_of_32_bits())]
    yield ["bits of these that vary in the seed of two hospitals", f"{opened.varying_bits()}"]
    yield ["hospitals accept a threshold of 1", answer(opened.threshold_of_one())]
    yield [
        "a hospital encrypts its shares with keys that the server made",
        answer(opened.keys_unsigned()),
    ]
    one = opened.clipped(weight=20.0, examples=1000)
    yield [
        "a weight of 20 of a hospital with `max_weight` rows becomes 8, and no log warns of it",
        answer(abs(one.mean - 8) < 1e-3 and not one.warnings),
    ]
    other = opened.clipped(weight=2.0, examples=10_000)
    yield [
        "a weight of 2 of a hospital with ten times `max_weight` rows becomes .8",
        answer(abs(other.mean - 0.8) < 1e-3),
    ]
    yield ["its log warns of too many rows", answer(other.warnings > 0)]
    yield [
        "each hospital's rows and metrics reach the server unmasked",
        answer(opened.counts_in_clear()),
    ]


class Secured(NamedTuple):
    """A row of the table: its name, and what maps (size, sites) to its `Cost`."""

    name: str
    cost: Callable[[int, int], Cost]


SECURED: list[Secured] = [Secured("Flower's SecAgg+", secaggplus.flower)]
"""Rows of the table of costs; a further protocol is one more."""


def rows_cost(options: argparse.Namespace) -> Iterator[list[str]]:
    """Measure each protocol and yield its row, the median of the repeats."""
    for name, measure in SECURED:
        found = [measure(options.size, options.sites) for _ in range(options.repeats)]
        middle = Cost(*map(statistics.median, zip(*found, strict=True)))
        hospital = middle.quantise + middle.mask + middle.unmask
        yield [
            name,
            *map(seconds_in_words, (middle.quantise, middle.mask, middle.unmask, hospital)),
            *map(seconds_in_words, (middle.add, middle.open, middle.open_one_lost)),
            f"{middle.upload:.6g}",
            f"{middle.error:.1e}",
            f"{middle.exchanges:.0f}",
        ]


def seconds_in_words(seconds: float) -> str:
    """Return two digits that count, and no more than four after the point."""
    if seconds >= 10:
        return f"{seconds:.0f}"
    return without_zero(f"{round(seconds, 4):.2g}")


def rows_encrypted(options: argparse.Namespace, part: int = 10) -> Iterator[list[str]]:
    """Measure CKKS on one of `part` parts of the vector, and yield its row."""
    found = [ckks.encrypted(options.size // part, options.sites) for _ in range(options.repeats)]
    middle = ckks.Encrypted(*map(statistics.median, zip(*found, strict=True)))
    times = (middle.encrypt, middle.add, middle.decrypt)
    yield [
        "CKKS, TenSEAL",
        *(seconds_in_words(part * seconds) for seconds in times),
        f"{middle.up:.1f}",
        f"{middle.back:.1f}",
        f"{middle.error:.1e}",
    ]


def main() -> None:
    """Print the tables, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=10_000_000)
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--he", action="store_true", help="measure CKKS too: needs tenseal")
    documented.add_options(parser)
    options = parser.parse_args()
    if options.sites < 3:
        parser.error(f"--sites is {options.sites}: a sum needs at least 3")
    if options.size < 10:
        parser.error(f"--size is {options.size}: a tenth of it is measured with --he; at least 10")
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}: at least 1")
    if options.he and find_spec("tenseal") is None:
        parser.error("--he needs tenseal: pip install 'fedmed-flower[dev]'")
    # Each round would log its stages between the rows of the table.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    head = ["threshold", "asked", "largest difference", "quantisation step", "largest weight"]
    few = vectors_of(min(options.size, 1_000_000), options.sites)
    of_flower: dict[str, Any] = {"versions": ("flwr", "numpy"), "threads": 1}
    documented.show("secure-opened", head, rows_opened(few), options, **of_flower)
    documented.show("secure-seen", ["", "Flower's SecAgg+"], rows_seen(), options, **of_flower)
    head = ["", "quantise", "keys, shares, masks", "answer", "a hospital in all"]
    head += ["server: add one reply", "server: open", "the same, one lost"]
    head += ["upload / float32", "error of the mean", "exchanges"]
    documented.show("secure-cost", head, rows_cost(options), options, **of_flower)
    if options.he:
        head = ["", "encrypt, a hospital", f"server: add {options.sites}", "decrypt, a hospital"]
        head += ["upload / float32", "download / float32", "error of the mean"]
        versions = ("tenseal", "numpy")
        rows = rows_encrypted(options)
        documented.show("secure-he", head, rows, options, versions=versions, threads=1)


if __name__ == "__main__":
    main()
