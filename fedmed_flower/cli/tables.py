"""What the command line prints: through one console, which shows each text as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmed_flower.errors import InputError, shown
from fedmed_flower.metrics.names import lower_is_better, main_metric
from fedmed_flower.privacy.accounting import epsilon_of
from fedmed_flower.privacy.ledger import Ledger, Plain


class LineConsole(Console):
    """Prints each text as one line and as it is.

    Names come from messages and files: nothing in them is markup, breaks a line, moves a cursor or
    turns the direction of a line, on whatever way a text reaches the terminal.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text to be shown; rich makes each cell and each printed text by this."""
        return super().render_str(shown(text), **options)


console = LineConsole()


def print_table(console: Console, table: Table) -> None:
    """Print a table; where no terminal shows it, one line a row for what reads it there."""
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
    """Print the test results of each hospital, with mean and worst beside all together."""
    test = summary["test"]
    columns = {"federated": test["sites"]}
    if "local" in test:
        columns = {"alone": test["local"], **columns}
    if "personal" in test:
        columns["its own"] = test["personal"]
    if "pooled" in test:
        columns["all data pooled"] = test["pooled"]["sites"]
    every = [test["federated"], *(part for parts in columns.values() for part in parts.values())]
    figure = main_metric({name for part in every for name in part})
    name_of = {"auc": "AUC", "dice": "Dice", "r2": "R2"}.get(figure, figure)
    table = Table("hospital", "train", "test", title=f"{name_of} on each hospital's own test data")
    for name in columns:
        table.add_column(name, justify="right")
    for site, counts in summary["sites"].items():
        values = [column.get(site, {}).get(figure) for column in columns.values()]
        table.add_row(site, str(counts["train"]), str(counts["test"]), *map(_show, values))
    # Mean and worst compare the same hospitals in each column: those with a figure in all.
    compared = [
        site
        for site in summary["sites"]
        if all(column.get(site, {}).get(figure) is not None for column in columns.values())
    ]
    known = [[column[site][figure] for site in compared] for column in columns.values()]
    worst = max if lower_is_better(figure) else min
    table.add_section()
    table.add_row("mean", "", "", *(_show(sum(k) / len(k) if k else None) for k in known))
    table.add_row("worst", "", "", *(_show(worst(k, default=None)) for k in known))
    together = {"federated": test["federated"], "all data pooled": test.get("pooled", {})}
    of_all = [together.get(name, {}) for name in columns]
    table.add_row("all test data", "", "", *(_show(found.get(figure)) for found in of_all))
    # Where hospitals tell coarse figures.
    for words, end in (("  at least", f"{figure}-low"), ("  at most", f"{figure}-high")):
        if any(end in found for found in of_all):
            table.add_row(words, "", "", *(_show(found.get(end)) for found in of_all))
    console.print(table)


def print_ledger(console: Console, path: Path, ledger: Ledger, delta: float | None) -> None:
    """Print what each run released, what the patients have spent at most, and what is left."""
    budget = ledger.budget()
    delta = (1e-5 if budget is None else budget.delta) if delta is None else delta
    table = Table(title=f"{path}: epsilon per patient at delta {delta:g}", title_justify="left")
    for name in ("since (UTC)", "run", "app", "on", "patients", "rounds", "steps", "epsilon"):
        numbers = name in ("patients", "rounds", "steps", "epsilon")
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for entry in ledger.entries():
        rounds = f"{entry.rounds}" + (f" ({entry.unsettled} broken off)" if entry.unsettled else "")
        epsilon = _show(epsilon_of(entry.releases, delta))
        steps = f"{entry.releases.total()}"
        began, patients = entry.began[:16].replace("T", " "), f"{entry.patients}"
        words = (began, entry.run, entry.app, entry.purpose, patients)
        table.add_row(*words, rounds, steps, epsilon)
    console.print(table)
    spent = ledger.most(delta)
    text = f"spent on the patient of whom most was released, all runs together: {_show(spent)}"
    if budget is not None and budget.delta == delta:
        left = max(0.0, budget.epsilon - spent)
        text += f" of {budget.epsilon:g}; left: about {_show(left)}"
    console.print(text if budget else f"{text}; no budget was set")
    if plain := ledger.plain():
        _print_plain(console, plain, ledger.most_plain())


def _print_plain(console: Console, plain: list[Plain], most: int) -> None:
    """Print what was measured without noise, which no epsilon bounds."""
    table = Table(title="measured without noise", title_justify="left")
    for name in ("since (UTC)", "run", "app", "on", "patients", "times"):
        numbers = name in ("patients", "times")
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for entry in plain:
        began = entry.began[:16].replace("T", " ")
        counts = f"{entry.patients}", f"{entry.times}"
        table.add_row(began, entry.run, entry.app, entry.purpose, *counts)
    console.print(table)
    console.print(f"the patient who was measured without noise most often: {most} times")


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


@contextmanager
def input_errors() -> Iterator[None]:
    """Turn wrong input into one line and exit code 2."""
    try:
        yield
    except InputError as error:
        console.print(f"not started: {error}", style="red")
        raise typer.Exit(2) from None
