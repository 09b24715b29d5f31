"""The commands `fedmed run` and `fedmed demo`: their options. The work is done in `cli/job`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmed_flower.cli.listing import examples
from fedmed_flower.cli.options import (
    Engine,
    GivenData,
    GivenEngine,
    GivenNodes,
    GivenSettings,
    GivenVerbose,
    GivenWorkers,
    Options,
)
from fedmed_flower.cli.tables import console, input_errors


def run(
    path: Annotated[Path, typer.Argument(metavar="APP", help="Folder of the Flower app.")],
    sites: Annotated[
        int | None, typer.Option(help="Number of hospitals.  [default: the app's number, or 5]")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Overrides num-server-rounds.")] = None,
    config: GivenSettings = None,
    engine: GivenEngine = Engine.LOCAL,
    out: Annotated[
        Path | None, typer.Option(help="Run folder.  [default: runs/APP-date-time]")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    data: GivenData = None,
    node_config: GivenNodes = None,
    workers: GivenWorkers = 1,
    verbose: GivenVerbose = False,
) -> None:
    """Run a Flower app with simulated hospitals."""
    # Loading torch and Flower takes seconds, which `fedmed --help` need not wait for.
    from fedmed_flower.cli.job import execute, prepare

    with input_errors(verbose):
        options = Options(
            sites, rounds, config or [], engine, out, resume, data, node_config, verbose, workers
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
