"""Tables of the command line, and its one console, which shows each text literally."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmed_flower.errors import InputError, shown
from fedmed_flower.metrics.names import lower_is_better, main_metric
from fedmed_flower.wire import Sent

if TYPE_CHECKING:
    from fedmed_flower.privacy.ledger import Ledger, Plain


class LineConsole(Console):
    """Prints each text literally and on one line.

    Names come from messages and files. However such a text reaches the terminal, it cannot act as
    markup, break a line, move the cursor or change the direction of a line.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text to show; rich calls this for each cell and each printed text."""
        return super().render_str(shown(text), **options)


console = LineConsole()


def print_table(console: Console, table: Table) -> None:
    """Print a table; if the output is no terminal, each row is one line, for programs to read."""
    if not console.is_terminal:
        wide = console.options.update(width=10_000)
        console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)


def print_results(console: Console, summary: dict[str, Any]) -> None:
    """Print the tables of a run, or the test results of each hospital."""
    for entry in summary.get("tables", []):
        table = Table(*entry["head"], title=entry["title"])
        for row in entry["rows"]:
            table.add_row(*row)
        console.print(table)
    if "test" in summary:
        _print_test(console, summary)


def _print_test(console: Console, summary: dict[str, Any]) -> None:
    """Print the test results of each hospital, their mean and worst, and those of all test data."""
    test = summary["test"]
    columns = _test_columns(test)
    results = [test["federated"], *(part for parts in columns.values() for part in parts.values())]
    metric = main_metric({name for result in results for name in result})
    title = {"auc": "AUC", "dice": "Dice", "r2": "R2"}.get(metric, metric)
    # Of secure sums nothing is known of a single hospital.
    sites = {} if summary.get("secure") else summary["sites"]
    title += (
        " on each hospital's own test data" if sites else " on all hospitals' test data together"
    )
    noised = not Sent.of(summary.get("sent")).noised.isdisjoint(test["sites"])
    if noised:
        title += ", counted with noise"
    table = Table("hospital", "train", "test", title=title)
    for name in columns:
        table.add_column(name, justify="right")
    for site, counts in sites.items():
        values = [column.get(site, {}).get(metric) for column in columns.values()]
        rows = [str(counts.get(split, "–")) for split in ("train", "test")]
        table.add_row(site, *rows, *map(_show, values))
    # Mean and worst compare the same hospitals in each column: those with a value in all.
    compared = [
        site
        for site in sites
        if all(column.get(site, {}).get(metric) is not None for column in columns.values())
    ]
    known = [[column[site][metric] for site in compared] for column in columns.values()]
    worst = max if lower_is_better(metric) else min
    if sites:
        table.add_section()
        table.add_row("mean", "", "", *(_show(sum(k) / len(k) if k else None) for k in known))
        table.add_row("worst", "", "", *(_show(worst(k, default=None)) for k in known))
    overall = {"federated": test["federated"], "all data pooled": test.get("pooled", {})}
    totals = [overall.get(name, {}) for name in columns]
    table.add_row("all test data", "", "", *(_show(total.get(metric)) for total in totals))
    # Hospitals with coarse figures report bounds.
    for label, bound in (("  at least", f"{metric}-low"), ("  at most", f"{metric}-high")):
        if any(bound in total for total in totals):
            table.add_row(label, "", "", *(_show(total.get(bound)) for total in totals))
    console.print(table)
    if noised:
        console.print(
            "counted with noise: with few patients these figures say little, see report.html"
        )


def _test_columns(test: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the title of each column of a test table, and its results by site."""
    columns = {"federated": test["sites"]}
    if "local" in test:
        columns = {"alone": test["local"], **columns}
    if test.get("own"):
        columns["own"] = test["own"]
    if "personal" in test:
        columns["fine-tuned"] = test["personal"]
    if "pooled" in test:
        columns["all data pooled"] = test["pooled"]["sites"]
    return columns


def print_ledger(console: Console, path: Path, ledger: Ledger, delta: float | None) -> None:
    """Print what each run released, the highest epsilon of a patient, and the budget left."""
    from fedmed_flower.privacy.accounting import epsilon_of

    budget = ledger.budget()
    if delta is None:
        delta = 1e-5 if budget is None else budget.delta
    table = Table(title=f"{path}: epsilon per patient at delta {delta:g}", title_justify="left")
    texts = ("since (UTC)", "run", "app", "on")
    for name in (*texts, "patients", "rounds", "steps", "epsilon", "delta +"):
        table.add_column(name, justify="left" if name in texts else "right", overflow="fold")
    entries = ledger.entries()
    for entry in entries:
        epsilon = epsilon_of(entry.releases, delta)
        rounds = f"{entry.rounds}"
        if entry.unsettled:
            rounds += f" ({entry.unsettled} interrupted)"
        table.add_row(
            entry.began[:16].replace("T", " "),
            entry.run,
            entry.app,
            entry.purpose,
            f"{entry.patients}",
            rounds,
            f"{entry.releases.total()}",
            _show(epsilon),
            _show_excess(entry.divergence, epsilon),
        )
    print_table(console, table)
    if entries:
        console.print(
            "delta +: by how much at most the computer's arithmetic raises delta; - where no bound "
            "is known"
        )
    spent = ledger.most(delta)
    text = f"highest epsilon of a patient, all runs together: {_show(spent)}"
    if budget is not None and budget.delta == delta:
        left = max(0.0, budget.epsilon - spent)
        text += f" of {budget.epsilon:g}; left: about {_show(left)}"
    console.print(text if budget else f"{text}; no budget was set")
    if plain := ledger.plain():
        _print_plain(console, plain, ledger.most_plain())


def _show_excess(divergence: float | None, epsilon: float) -> str:
    from fedmed_flower.privacy.grid import excess_delta

    return "-" if divergence is None else f"{excess_delta(divergence, epsilon):.1g}"


def _print_plain(console: Console, plain: list[Plain], most: int) -> None:
    """Print what was measured without noise, which no epsilon bounds."""
    table = Table(title="measured without noise", title_justify="left")
    for name in ("since (UTC)", "run", "app", "on", "patients", "times"):
        numbers = name in ("patients", "times")
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for entry in plain:
        table.add_row(
            entry.began[:16].replace("T", " "),
            entry.run,
            entry.app,
            entry.purpose,
            f"{entry.patients}",
            f"{entry.times}",
        )
    console.print(table)
    console.print(f"the patient who was measured without noise most often: {most} times")


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


class _ConsoleHandler(logging.Handler):
    """Prints this package's log lines from INFO on, and Flower's from `level` on."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._flowers = level

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.startswith("flwr.fedmed")
        if record.levelno >= (logging.INFO if ours else self._flowers):
            style = "yellow" if record.levelno >= logging.WARNING else ""
            # A style of `print` would also colour the bar below.
            console.print(console.render_str(record.getMessage(), style=style))


@contextmanager
def input_errors(verbose: bool = False) -> Iterator[None]:
    """Show log lines on the console; turn an `InputError` into one line and exit code 2.

    Of Flower's own lines `verbose` shows those of INFO too.

    A command imports what it needs before: at its import Flower adds a handler of its own, and
    another library gives the root logger one, which would write each line a second time.
    """
    flower = logging.getLogger("flwr")
    handlers, propagate = flower.handlers, flower.propagate
    flower.handlers = [_ConsoleHandler(logging.INFO if verbose else logging.WARNING)]
    flower.propagate = False
    try:
        yield
    except InputError as error:
        console.print(f"not started: {error}", style="red")
        raise typer.Exit(2) from None
    finally:
        flower.handlers = handlers
        flower.propagate = propagate
