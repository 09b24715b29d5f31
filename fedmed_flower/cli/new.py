"""The command `fedmed new`: the folder of an app that runs at once, to start from."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from fedmed_flower.cli.options import WHAT_THEY_HOLD, Kind
from fedmed_flower.cli.tables import console, input_errors
from fedmed_flower.errors import InputError

# What Flower allows, but for other alphabets and a hyphen at the end, which pyproject.toml forbids.
_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?")
_TEMPLATES = Path(__file__).resolve().parents[1] / "templates"


def new(
    path: Annotated[
        Path, typer.Argument(metavar="NAME", help="Name of the app, which is its new folder.")
    ],
    kind: Annotated[Kind, typer.Option("--for", help=f"{WHAT_THEY_HOLD}.")],
) -> None:
    """Write an app to start from: until you give it your data, it runs on generated patients."""
    with input_errors():
        if not _NAME.fullmatch(path.name):
            raise InputError(
                "the name of an app must start with a letter and have at most 32 letters, digits "
                f"and hyphens, no hyphen at the end, got {path.name!r}"
            )
        files = app_files(kind, path.name)
        _write(path, files)
    console.print(f"{path}: {', '.join(files)}")
    console.print(f"run it, on generated patients: fedmed run {path}")
    console.print(f"your own data, privacy, real hospitals: see {path / 'README.md'}")


def app_files(kind: Kind, name: str) -> dict[str, str]:
    """Return the content of each file of an app, by the file's name."""
    common, own = _TEMPLATES / "common", _TEMPLATES / kind
    client = (own / "client_app.py").read_text(encoding="utf-8")
    server = next(path for room in (own, common) if (path := room / "server_app.py").exists())

    def filled(template: Path, **texts: str) -> str:
        text = template.read_text(encoding="utf-8")
        return Template(text).substitute(texts, name=name, kind=kind, about=about_of(kind))

    about_data = filled(own / "README.md")
    settings = filled(own / "settings.toml")
    return {
        "README.md": filled(common / "README.md", data=about_data),
        "client_app.py": client,
        "pyproject.toml": filled(common / "pyproject.toml") + settings,
        "server_app.py": server.read_text(encoding="utf-8"),
    }


def about_of(kind: Kind) -> str:
    """Return the first line of what a template says of itself."""
    client = (_TEMPLATES / kind / "client_app.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(client)) or ""
    return docstring.partition("\n")[0]


def _write(path: Path, files: dict[str, str]) -> None:
    """Write a new folder, or none."""
    try:
        path.mkdir()
    except FileExistsError:
        held = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        what = "an empty folder" if path.is_dir() else "a file"
        if held:
            what = f"a folder with {', '.join(held[:5])}{', ...' * (len(held) > 5)}"
        raise InputError(f"{path} is there already, {what}: give another name") from None
    except OSError as error:
        raise InputError(f"{path} cannot be made: {error.strerror}") from error
    try:
        for name, text in files.items():
            (path / name).write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
