"""The command `fedmed evaluate`: its options. The work is done in `cli/job`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmed_flower.cli.options import (
    Engine,
    GivenData,
    GivenEngine,
    GivenNodes,
    GivenSettings,
    GivenVerbose,
    Options,
)
from fedmed_flower.cli.tables import input_errors


def evaluate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or a .safetensors file.")
    ],
    path: Annotated[Path, typer.Argument(metavar="APP", help="Folder of the Flower app.")],
    sites: Annotated[
        int | None, typer.Option(help="Number of hospitals.  [default: as many as the run had]")
    ] = None,
    config: GivenSettings = None,
    engine: GivenEngine = Engine.LOCAL,
    out: Annotated[
        Path | None, typer.Option(help="Run folder of the test.  [default: runs/APP-date-time]")
    ] = None,
    data: GivenData = None,
    node_config: GivenNodes = None,
    verbose: GivenVerbose = False,
) -> None:
    """Test a finished model at all hospitals of an app, and train nothing.

    Settings are those of the run. Texts among them, such as the network, are given again by -c if
    the app has others, since a folder may come from a stranger.
    """
    from fedmed_flower.cli.job import execute, prepare

    with input_errors(verbose):
        options = Options(
            sites=sites,
            settings=config or [],
            engine=engine,
            out=out,
            data=data,
            node_config=node_config,
            verbose=verbose,
            evaluate=run,
        )
        execute(prepare(path, options))
