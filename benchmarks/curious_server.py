"""What a server that asks as it likes learns of a hospital's patients: a table of attacks.

Each line is an attack on a hospital that is set up as a SuperNode is: ``site-name`` and
``data-dir`` in its node config, asked by messages to its ClientApp. The server chooses run config,
weights and messages, and knows the app's code; of the hospital it has the replies alone.

- before these rules: what this script got of the package as it was when the attacks were found,
  from a hospital without a budget; ``-`` where the setting was not there yet.
- plain: what it gets from one whose node config says nothing more.
- budget: from one with ``budget-epsilon`` (``--epsilon``) and ``budget-delta``.
- chance: what the same guesses, with the budget, get right of other hospitals' patients. Who
  knows nothing of genotypes guesses the most frequent one.
- works: more than chance gives once in 1,000.

Without a budget several attacks work: a plain run trusts the server. The script exits with 1 where
one works with a budget, or where the audit refutes the epsilon that a budget promises: once in some
hundred runs by bad luck. Below the table stand a membership test and an audit by canaries, see
`curious.membership`.

``FEDMED_DATA=... python benchmarks/curious_server.py [--only rows membership] [--rounds 10]``
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
from curious import files, membership, tables
from curious.victim import Found


class Attack(NamedTuple):
    """A line of the table.

    Attributes
    ----------
    part : str
        Its name for ``--only``.
    what : str
        What the server wants to know, and how.
    before : str
    run : callable
        Maps (an empty folder, the budget's epsilon or 0) to `Found`.
    """

    part: str
    what: str
    before: str
    run: Callable[[Path, float], Found]


ten, batch, all_rows = (
    partial(tables.rows, batch=size, updates=count) for size, count in ((1, 10), (10, 1), (42, 1))
)
coarse = partial(tables.ages, coarse_figures=True)
two, twelve = (partial(files.lesions, patients=count) for count in (2, 12))
unseen, seen = (partial(tables.second_run, split=split) for split in ("test", "train"))

ATTACKS = (
    Attack("errors", "a label, by which network fails", "12 of 12, budget too", files.errors),
    Attack("preparation", "age and pressure, by sums at 75 seeds", "60 of 60", tables.preparation),
    Attack("rows", "row and label, by ten updates of one patient", "10 of 10", ten),
    Attack("rows", "rows and labels of a batch of ten, by one update", "10 of 10", batch),
    Attack("rows", "rows and labels of all in training, by one update", "42 of 42", all_rows),
    Attack("ages", "ages to 0.1 year, by the scores of one model", "85 of 120", tables.ages),
    Attack("ages", "the same, `coarse-figures=true`", "-", coarse),
    Attack("ages", "the same, by 700 models", "-", tables.ages_by_steps),
    Attack("lives", "day and event, by a band and a moved horizon", "18 of 18", tables.lives),
    Attack("genotypes", "genotypes, ages known, by steep slopes", "960 of 960", files.steep),
    Attack("genotypes", "the same, by 168 gentle slopes", "960 of 960", files.mild),
    Attack("thresholds", "ages, by the thresholds of trees", "6 of 50", tables.thresholds),
    Attack("lesions", "size of the smallest of two lesions, by the worst Dice", "6 of 6", two),
    Attack("lesions", "the same, of twelve lesions", "6 of 6", twelve),
    Attack("second-run", "privately trained patients, exactly, by other seeds", "42 of 42", unseen),
    Attack("second-run", "the same, by `split=train`", "42 of 42", seen),
    Attack("unreadable", "how many files cannot be read", "4 of 4, budget too", files.unreadable),
    Attack("pictures", "whom pictures show beyond the six of a run", "6 of 24", files.pictures),
)


def row(one: Attack, epsilon: float) -> tuple[list[str], bool]:
    """Return a row of the table, and whether the attack works with a budget."""
    cells, found = [one.what, one.before], Found(0, 1, 0.0)
    for budget in (0.0, epsilon):
        with tempfile.TemporaryDirectory() as folder:
            found = one.run(Path(folder), budget)
        told = f"{found.right} of {found.of}"
        cells.append(f"**{told}, works**" if found.works else told)
    chance = f"{found.chance:.0f}" if found.chance >= 10 else f"{found.chance:.2g}"
    return [*cells, chance], found.works


def rows(options: argparse.Namespace, working: list[str]) -> Iterator[list[str]]:
    """Yield the rows; add to `working` what works with a budget."""
    for one in ATTACKS:
        if one.part in options.only:
            cells, works = row(one, options.epsilon)
            if works:
                working.append(one.what)
            yield cells


def main() -> None:
    """Run the attacks and print a table; exit with 1 where one works with a budget."""
    names = [*dict.fromkeys(one.part for one in ATTACKS), *membership.PARTS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--epsilon", type=float, default=1.0, help="of the hospital's budget")
    parser.add_argument("--rounds", type=int, default=10, help="of the membership test")
    parser.add_argument("--shadows", type=int, default=16, help="models of the membership test")
    parser.add_argument("--canaries", type=int, default=4000)
    documented.add_options(parser)
    options = parser.parse_args()
    if options.shadows < 4:
        parser.error(f"--shadows must be at least 4, got {options.shadows}")
    began = time.perf_counter()
    working: list[str] = []
    refuted = 0
    if any(one.part in options.only for one in ATTACKS):
        head = ["what the server is after, and how", "before these rules", "plain"]
        head += [f"budget of epsilon {options.epsilon:g}", "chance"]
        documented.show("curious_server", head, rows(options, working), options)
    if "membership" in options.only:
        membership.test(options)
    if "canaries" in options.only:
        refuted = membership.audit(options)
    print(f"{time.perf_counter() - began:.0f} s")
    sys.exit(1 if working or refuted else 0)


if __name__ == "__main__":
    membership.quiet()
    main()
