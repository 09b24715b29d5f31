"""The command `fedmed settings`: what can be set, and what an app sets."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedmed_flower.cli.tables import console, input_errors, print_table
from fedmed_flower.errors import InputError

if TYPE_CHECKING:
    from fedmed_flower.settings.registry import Entry


def settings(
    path: Annotated[
        Path | None, typer.Argument(metavar="[APP]", help="Folder of a Flower app.")
    ] = None,
    search: Annotated[
        str, typer.Option(help="Show only settings whose name or meaning has this word.")
    ] = "",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables of the documentation.")
    ] = False,
) -> None:
    """List all settings; with an app, also its own and the values that it sets."""
    from fedmed_flower.settings.registry import RUN, as_markdown, entries, node_entries

    with input_errors():
        if markdown:
            typer.echo(as_markdown())
            return
        own, node_keys, given = ([], (), {}) if path is None else _of_app(path)
        listed = [*entries([*RUN, *own]), *node_entries(node_keys)]
        word = search.lower()
        matching = [entry for entry in listed if word in f"{entry.key} {entry.meaning}".lower()]
        if not matching:
            of_apps = "" if path else ": `fedmed settings APP` also lists those of an app"
            raise InputError(f"no setting has {search!r} in its name or meaning{of_apps}")
        print_table(console, _table(matching, given, path is not None))


def _of_app(path: Path) -> tuple[list[Any], Collection[str], dict[str, Any]]:
    """Return an app's own sections, its keys of the node config, and the values that it sets."""
    from fedmed_flower.engines.project import load_project
    from fedmed_flower.settings.registry import Sectioned
    from fedmed_flower.settings.text import expand

    project = load_project(path)
    client = project.client_app()
    if not isinstance(client, Sectioned):
        raise InputError(
            f"the client of {project.name} is not one of this package: it has the settings that "
            "its pyproject.toml declares"
        )
    return [*client.sections], client.node_keys, expand(project.declared)


def _table(listed: list[Entry], given: dict[str, Any], of_app: bool) -> Table:
    from fedmed_flower.settings.text import text_of

    table = Table("setting", "default", *(["this app"] if of_app else []), "allowed", "meaning")
    where = ""
    for entry in listed:
        if entry.where != where:
            where = entry.where
            table.add_section()
            table.add_row(where, *[""] * (len(table.columns) - 1), style="bold")
        set_here = where == "run config" and entry.key in given
        value = [text_of(given[entry.key]) if set_here else ""] if of_app else []
        allowed = " ".join(filter(None, [entry.allowed, f"({entry.unit})" if entry.unit else ""]))
        table.add_row(entry.key, text_of(entry.default), *value, allowed, entry.meaning)
    return table
