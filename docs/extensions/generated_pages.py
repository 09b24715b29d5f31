"""Pages that are written before each build: the reference of public names and commands."""

import os
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from inspect import isclass, unwrap
from pathlib import Path

import click
import typer
from sphinx.application import Sphinx
from typer.main import get_params_from_function
from typer.models import ParamMeta

import fedmed_flower
from fedmed_flower.cli.main import app as fedmed

PACKAGE = Path(fedmed_flower.__file__).parent
DOCS = Path(__file__).parents[1]

API = """\
Python
======

Import a name from where it stands here. Nothing else is promised to stay; the whole list is under
:doc:`../public-names`.

.. list-table::
   :widths: 30 70
   :header-rows: 1

   * - import from
     - what is there
"""


def rooms() -> list[str]:
    """Return the rooms that have public names; the root, whose names stand elsewhere too, last."""
    folders = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    every = [*(f"fedmed_flower.{name}" for name in folders), "fedmed_flower"]
    return [room for room in every if names_of(room, twice=True)]


def names_of(room: str, twice: bool = False) -> Sequence[str]:
    """Return the public names of a room; with `twice` also those that another room documents."""
    names = getattr(import_module(room), "__all__", ())
    if twice:
        return list(names)
    elsewhere = set()
    if room == "fedmed_flower":
        elsewhere = {name for other in rooms()[:-1] for name in names_of(other)}
    return [name for name in names if name not in elsewhere]


def write(path: Path, text: str) -> None:
    """Write a page, unless it is there as it should be: then Sphinx need not read it again."""
    path.parent.mkdir(exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def title(text: str) -> str:
    """Return a heading in reStructuredText."""
    return f"{text}\n{'=' * len(text)}\n\n"


def room_page(room: str) -> str:
    """Return the page of a room in reStructuredText."""
    module = import_module(room)
    text = title(room.rpartition(".")[2]) + f"{module.__doc__}\n\n.. py:module:: {room}\n\n"
    every = ", ".join(f"`{name}`" for name in names_of(room, twice=True))
    text += f"Import from ``{room}``: {every}\n\n"
    for name in names_of(room):
        thing = getattr(module, name)
        kind = "autoclass" if isclass(thing) else "autofunction"
        if isclass(thing) and issubclass(thing, Exception):
            kind = "autoexception"
        text += f".. {kind}:: {room}.{name}\n\n"
    return text


def write_api() -> None:
    """Write the pages of the public names."""
    folder = DOCS / "reference" / "api"
    index = API
    toc = ""
    pages = {folder / "index.rst"}
    for room in rooms():
        page = folder / f"{room.rpartition('.')[2]}.rst"
        pages.add(page)
        write(page, room_page(room))
        index += f"   * - :doc:`{room} <{page.stem}>`\n     - {import_module(room).__doc__}\n"
        toc += f"   {page.stem}\n"
    write(folder / "index.rst", f"{index}\n.. toctree::\n   :hidden:\n\n{toc}")
    for page in set(folder.glob("*.rst")) - pages:
        page.unlink()


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Return each command that does something, with what is typed for it."""
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from commands(each, f"{path} {name}")
    elif not command.hidden:
        yield path, command


def cell(text: str) -> str:
    """Return a text as it may stand in a cell of a table."""
    return " ".join(text.replace("|", r"\|").replace("*", r"\*").split())


def command_page() -> str:
    """Return the page of the command line in Markdown."""
    text = (
        "# Command line\n\n`fedmed COMMAND --help` says the same in the terminal.\n\n"
        "| command | |\n|---|---|\n"
    )
    every = [*commands(typer.main.get_command(fedmed), "fedmed")]
    for path, command in every:
        anchor = path.replace(" ", "-")
        text += f"| [`{path}`](#{anchor}) | {cell((command.help or '').splitlines()[0])} |\n"
    text += f"\n{exit_codes()}"
    for path, command in every:
        context = click.Context(command, info_name=path)
        usage = " ".join(command.collect_usage_pieces(context))
        text += f"\n## {path}\n\n```text\n{path} {usage}\n```\n\n{command.help}\n\n"
        text += "| | |\n|---|---|\n"
        # As the function declares it: click 8.5 drops the help of typer's arguments.
        declared = get_params_from_function(unwrap(command.callback))
        for parameter in command.params:
            text += f"| {names_typed(parameter, context)} | {meaning(parameter, declared)} |\n"
    return text


def names_typed(parameter: click.Parameter, context: click.Context) -> str:
    """Return what is typed for an argument or an option."""
    if isinstance(parameter, click.Argument):
        return f"`{parameter.make_metavar(context)}`"
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    is_flag = isinstance(parameter, click.Option) and parameter.is_flag
    return names if is_flag else f"{names} `{cell(parameter.make_metavar(context))}`"


def meaning(parameter: click.Parameter, declared: dict[str, ParamMeta]) -> str:
    """Return what an argument or an option means, and its default."""
    said = cell(declared[parameter.name].default.help or "")
    default = parameter.default
    if not isinstance(default, str | int | float) or default in ("", False) or "default:" in said:
        return said
    return f"{said} [default: {getattr(default, 'value', default)}]".strip()


def exit_codes() -> str:
    """Return what the exit codes of the commands mean."""
    return (
        "| exit code | |\n|---|---|\n"
        "| 0 | the command did what it should: a run is finished |\n"
        "| 1 | a run failed; `fedmed data check` found something |\n"
        "| 2 | wrong input: nothing was trained or written |\n"
        "| 130 | stopped by Ctrl-C |\n"
    )


def text_of(path: str) -> str:
    """Return a text of the repository with links as the site has them.

    A link into ``docs`` leads to that page, one to CONTRIBUTING to the page with its recipes. Of a
    link to a file that is no page, its text stays.
    """

    def link(found: re.Match[str]) -> str:
        said, target = found.groups()
        if ":" not in target and not target.startswith("#"):
            target = os.path.normpath(Path(path).parent / target)
        if target.startswith("docs/"):
            return f"[{said}](/{target.removeprefix('docs/')})"
        if target.startswith("CONTRIBUTING.md"):
            return f"[{said}](/guides/extend.md{target.removeprefix('CONTRIBUTING.md')})"
        return found[0] if ":" in target or target.startswith("#") else said

    text = (DOCS.parent / path).read_text(encoding="utf-8")
    return re.sub(r"\[([^]]*)\]\(([^)\s]+)\)", link, text)


def write_pages() -> None:
    """Write all pages before Sphinx looks for them."""
    write_api()
    write(DOCS / "reference" / "cli.md", command_page())
    for path in ("CHANGELOG.md", "CONTRIBUTING.md", "examples/deployment/README.md"):
        write(DOCS / "generated" / path.replace("/", "-").lower(), text_of(path))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("config-inited", lambda app, config: write_pages())
    return {"parallel_read_safe": True}
