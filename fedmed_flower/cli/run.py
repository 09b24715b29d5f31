"""The commands `fedmed run` and `fedmed demo`: their options. The work is done in `cli/job`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmed_flower.cli.listing import examples
from fedmed_flower.cli.options import Engine, Options
from fedmed_flower.cli.tables import console, input_errors


def run(
    path: Annotated[Path, typer.Argument(metavar="APP", help="Folder of the Flower app.")],
    sites: Annotated[
        int | None, typer.Option(help="Number of hospitals.  [default: the app's number, or 5]")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Overrides num-server-rounds.")] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", "-c", help="A setting: key=value. `fedmed settings` lists them."),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="local: in this process. flower: Flower's simulation engine.")
    ] = Engine.LOCAL,
    out: Annotated[
        Path | None, typer.Option(help="Run folder.  [default: runs/APP-date-time]")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A folder with one folder for each hospital, which is named after it."),
    ] = None,
    node_config: Annotated[
        Path | None,
        typer.Option(
            help="TOML with a table of node config for each hospital of --data that shall be "
            "treated as a real one."
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show Flower's own lines too.")
    ] = False,
) -> None:
    """Run a Flower app with simulated hospitals."""
    # Loading torch and Flower takes seconds, which `fedmed --help` need not wait for.
    from fedmed_flower.cli.job import execute, prepare

    with input_errors(verbose):
        options = Options(
            sites, rounds, config or [], engine, out, resume, data, node_config, verbose
        )
        execute(prepare(path, options))


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Run folder.  [default: runs/pneumonia-date-time]")
    ] = None,
) -> None:
    """Train a chest X-ray classifier at five simulated hospitals, and write a report."""
    from fedmed_flower.cli.job import execute, prepare
    from fedmed_flower.data.download import SourceUnavailable
    from fedmed_flower.data.site import GENERATED
    from fedmed_flower.data.sources import load_dataset

    with input_errors():
        settings = ["baselines=true"]
        try:
            load_dataset("pneumoniamnist", timeout=10)
        except SourceUnavailable as error:
            console.print(str(error), style="yellow")
            console.print(f"The demo goes on with {GENERATED}.", style="yellow")
            settings.append("dataset=phantoms")
        app = examples() / "pneumonia"
        execute(prepare(app, Options(settings=settings, out=out)))
