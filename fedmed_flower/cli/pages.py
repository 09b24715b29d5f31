"""The commands `fedmed card` and `fedmed compare`: what is written from finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmed_flower.cli.tables import console, input_errors


def card(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[
        Path | None, typer.Option(help="The Markdown file.  [default: card.md in the run folder]")
    ] = None,
) -> None:
    """Draft a model card of a run, in Markdown, for people to complete."""
    from fedmed_flower.reports.card import write_card

    with input_errors():
        console.print(f"card: {write_card(folder, out)}")


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN...", help="Run folders; the first is the reference."),
    ],
    out: Annotated[Path, typer.Option(help="The page; one that exists is replaced.")] = Path(
        "compare.html"
    ),
) -> None:
    """Put runs side by side on one page."""
    from fedmed_flower.reports.compare import write_comparison

    with input_errors():
        console.print(f"comparison: {write_comparison(folders, out)}")
