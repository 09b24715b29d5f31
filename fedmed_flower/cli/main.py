"""The command `fedmed`: all subcommands; here are `report` and `privacy`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from fedmed_flower.cli.approve import approve_app, sign
from fedmed_flower.cli.audit import audit
from fedmed_flower.cli.data import data_app
from fedmed_flower.cli.evaluate import evaluate
from fedmed_flower.cli.keys import keys_app
from fedmed_flower.cli.link import link
from fedmed_flower.cli.listing import list_all
from fedmed_flower.cli.new import new
from fedmed_flower.cli.node import node
from fedmed_flower.cli.pages import card, compare
from fedmed_flower.cli.predict import export, predict
from fedmed_flower.cli.run import demo, run
from fedmed_flower.cli.settings import settings
from fedmed_flower.cli.statistics import statistics
from fedmed_flower.cli.tables import console, input_errors, print_ledger
from fedmed_flower.cli.watch import watch
from fedmed_flower.errors import InputError

app = typer.Typer(
    help="Medical federated learning on Flower.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(keys_app, name="keys")
app.add_typer(approve_app, name="approve")
app.command()(new)
app.command()(run)
app.command()(demo)
app.command()(evaluate)
app.command()(predict)
app.command()(export)
app.command()(statistics)
app.command()(settings)
app.command()(card)
app.command()(compare)
app.command("list")(list_all)
app.command()(watch)
app.command()(audit)
app.command()(sign)
# Flower's options pass through untouched.
app.command(context_settings={"ignore_unknown_options": True})(node)
app.command(context_settings={"ignore_unknown_options": True})(link)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Rewrite report.html of a run folder."""
    from fedmed_flower.reports.report import write_report

    with input_errors():
        try:
            console.print(f"report: {write_report(folder)}")
        except OSError as error:
            raise InputError(f"no report in {folder}: {error}") from error


@app.command()
def privacy(
    ledger: Annotated[
        Path,
        typer.Argument(
            help="A hospital's ledger, a folder of ledgers, or a simulation's run folder."
        ),
    ],
    delta: Annotated[
        float | None, typer.Option(help="Delta of epsilon.  [default: the budget's, or 1e-5]")
    ] = None,
    new: Annotated[bool, typer.Option("--new", help="Make a new, empty ledger.")] = False,
) -> None:
    """Show what each run released about a hospital's patients, and what is left of the budget."""
    from fedmed_flower.files import as_input_error, require_lone_database
    from fedmed_flower.privacy.ledger import Ledger
    from fedmed_flower.privacy.patient import LEDGERS
    from fedmed_flower.server.run_folder import SUMMARY

    with input_errors():
        if new:
            if ledger.exists():
                raise InputError(f"{ledger} exists already: give the new ledger another name")
            Ledger(ledger)
        if (ledger / SUMMARY).is_file():
            ledger = ledger / LEDGERS
        paths = sorted(ledger.glob("*.sqlite")) if ledger.is_dir() else [ledger]
        if not paths or (ledger.name == LEDGERS and not ledger.exists()):
            raise InputError(
                f"there is no ledger (*.sqlite) in the folder {ledger}: only a simulation with "
                "privacy keeps ledgers in its run folder; a real hospital's is at the hospital"
            )
        for path in paths:
            file = path if ledger.is_dir() else path.resolve()
            require_lone_database(file.parent, file.name)
            with as_input_error(f"the privacy ledger {path}", "restore it from a copy"):
                print_ledger(console, path, Ledger(path, read_only=True), delta)


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"fedmed-flower {version('fedmed-flower')}, flwr {version('flwr')}")
        raise typer.Exit


@app.callback()
def _set_up(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show versions and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app()
