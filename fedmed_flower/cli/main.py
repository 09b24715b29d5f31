"""The command `fedmed`: all subcommands; here are `report` and `privacy`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from fedmed_flower.cli.data import data_app
from fedmed_flower.cli.run import demo, run
from fedmed_flower.cli.statistics import statistics
from fedmed_flower.cli.tables import console, input_errors, print_ledger
from fedmed_flower.errors import InputError
from fedmed_flower.files import as_input_error, require_lone_database
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.reports.report import write_report

app = typer.Typer(
    help="Medical federated learning on Flower.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.command()(run)
app.command()(demo)
app.command()(statistics)
log = logging.getLogger("flwr.fedmed")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Rewrite report.html of a run folder."""
    with input_errors():
        try:
            console.print(f"report: {write_report(folder)}")
        except OSError as error:
            raise InputError(f"no report in {folder}: {error}") from error


@app.command()
def privacy(
    ledger: Annotated[Path, typer.Argument(help="A hospital's ledger, or a folder of ledgers.")],
    delta: Annotated[
        float | None, typer.Option(help="Delta of epsilon.  [default: the budget's, or 1e-5]")
    ] = None,
    new: Annotated[bool, typer.Option("--new", help="Make a new, empty ledger.")] = False,
) -> None:
    """Show what each run released about a hospital's patients, and what is left of the budget."""
    with input_errors():
        if new:
            if ledger.exists():
                raise InputError(f"{ledger} exists already: give the new ledger another name")
            Ledger(ledger)
        paths = sorted(ledger.glob("*.sqlite")) if ledger.is_dir() else [ledger]
        if not paths:
            raise InputError(f"there is no ledger (*.sqlite) in the folder {ledger}")
        for path in paths:
            file = path if ledger.is_dir() else path.resolve()
            require_lone_database(file.parent, file.name)
            with as_input_error(f"the privacy ledger {path}", "restore it from a copy"):
                print_ledger(console, path, Ledger(path, read_only=True), delta)


@app.callback()
def _set_up_log() -> None:
    logging.getLogger("flwr").handlers = [_ConsoleHandler()]


def main() -> None:
    """Run the command line."""
    # A library gives the root logger a handler, which would write each line a second time.
    logging.getLogger("flwr").propagate = False
    app()


class _ConsoleHandler(logging.Handler):
    """Prints this package's log lines from INFO on, and Flower's from WARNING on."""

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.startswith("flwr.fedmed")
        if record.levelno >= (logging.INFO if ours else logging.WARNING):
            style = "yellow" if record.levelno >= logging.WARNING else None
            console.print(record.getMessage(), style=style)
