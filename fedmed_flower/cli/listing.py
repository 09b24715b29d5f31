"""The command `fedmed list`: the names that there are, with a line on each."""

from __future__ import annotations

import ast
import difflib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedmed_flower.cli.new import about_of
from fedmed_flower.cli.options import MEANINGS
from fedmed_flower.cli.tables import console, input_errors, print_table
from fedmed_flower.errors import InputError


def list_all(
    what: Annotated[
        str,
        typer.Argument(
            metavar="[WHAT]",
            help="strategies, networks, datasets, examples or templates.  [default: all]",
            show_default=False,
        ),
    ] = "",
) -> None:
    """List strategies, networks, data sets, example apps, and templates of `fedmed new`."""
    with input_errors():
        if what and what not in _TABLES:
            near = difflib.get_close_matches(what.lower(), _TABLES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_TABLES)}"
            raise InputError(f"there is no list of {what!r}: {hint}")
        for name in [what] if what else _TABLES:
            print_table(console, _TABLES[name]())
        if what == "networks":
            _print_others()


def examples() -> Path:
    """Return the folder of the example apps."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "examples", package / "examples"):
        if (folder / "pneumonia" / "pyproject.toml").is_file():
            return folder
    raise InputError("the example apps are not installed: run fedmed demo from a checkout")


def _strategies() -> Table:
    from fedmed_flower import strategies

    # Read, not imported: Flower takes longer to load than all lists together.
    files = Path(strategies.__path__[0]).glob("*.py")
    about = {
        node.name: ast.get_docstring(node) or ""
        for file in files
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    table = _table("Strategies: from fedmed_flower.strategies import ...", "strategy", "")
    for name in strategies.__all__:
        table.add_row(name, about[name].partition("\n")[0].replace("`", ""))
    return table


def _networks() -> Table:
    from fedmed_flower.models.catalog import NETWORKS

    title = "Networks that are tested, 2D and 3D: -c network=..., -c network-args='{...}'"
    table = _table(title, "network", "predicts", "privacy=patient", "network-args to start from")
    for network in NETWORKS:
        table.add_row(network.name, network.purpose, network.private, network.args)
    return table


def _print_others() -> None:
    """Print what else can be named; MONAI, which knows it, takes seconds to load."""
    from fedmed_flower.models.catalog import NETWORKS
    from fedmed_flower.models.networks import known_networks

    known = known_networks()
    tested = [known[network.name] for network in NETWORKS]
    # Of several spellings of one network, its own name.
    names = {network: name for name, network in known.items() if network not in tested}
    names |= {network: network.__name__ for network in names if network.__name__ in known}
    console.print(f"monai.networks.nets also has, not tested: {', '.join(sorted(names.values()))}")


def _datasets() -> Table:
    from fedmed_flower.data.catalog import DATA_SETS

    title = "Data sets: from fedmed_flower.data import ..."
    table = _table(title, "data set", "", "licence, publisher", "size", "where it comes from")
    for data in DATA_SETS:
        table.add_row(data.name, data.what, data.licence, data.size, data.way)
    return table


def _examples() -> Table:
    folder = examples()
    table = _table(f"Example apps: fedmed run {folder}/...", "example", "")
    for path in sorted(folder.iterdir()):
        if (file := path / "pyproject.toml").is_file():
            project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
            table.add_row(path.name, project["description"])
        elif (file := path / "README.md").is_file():
            heading = file.read_text(encoding="utf-8").partition("\n")[0]
            table.add_row(path.name, f"{heading.lstrip('# ')}: see its README.md.")
    return table


def _templates() -> Table:
    table = _table("Templates: fedmed new NAME --for ...", "template", "hospitals hold", "as it is")
    for kind, meaning in MEANINGS.items():
        table.add_row(kind, meaning, about_of(kind))
    return table


_TABLES: dict[str, Callable[[], Table]] = {
    "strategies": _strategies,
    "networks": _networks,
    "datasets": _datasets,
    "examples": _examples,
    "templates": _templates,
}


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, no_wrap=number == 0, overflow="fold")
    return table
