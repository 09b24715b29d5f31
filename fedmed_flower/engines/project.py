"""Read the ``pyproject.toml`` of a Flower app."""

from __future__ import annotations

import tomllib
from pathlib import Path

from flwr.app import UserConfig
from flwr.common.config import flatten_dict, get_project_config

from fedmed_flower.errors import InputError


def load_project(path: Path) -> tuple[str, UserConfig, tuple[str, str]]:
    """Return name, default run config, and references of ServerApp and ClientApp of a Flower app.

    Raises
    ------
    InputError
        If the folder is no Flower app, or does not declare a setting that ``fedmed run`` sets.
    """
    try:
        project = get_project_config(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is no Flower app: it has no pyproject.toml") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path / 'pyproject.toml'}: {' '.join(str(error).split())}") from error
    section = project["tool"]["flwr"]["app"]
    defaults = flatten_dict(section.get("config", {}))
    for key in ("run-dir", "resume", "num-server-rounds"):
        if key not in defaults:
            raise InputError(
                f"{path / 'pyproject.toml'} lacks {key} in [tool.flwr.app.config]: add it, since "
                "Flower sets only declared settings"
            )
    components = section["components"]
    return project["project"]["name"], defaults, (components["serverapp"], components["clientapp"])


def default_sites(path: Path) -> int:
    """Return ``sites`` in ``[tool.fedmed]`` of an app's ``pyproject.toml``; 5 if it is not set.

    Raises
    ------
    InputError
        If ``sites`` is no whole number.
    """
    table = tomllib.loads((path / "pyproject.toml").read_text(encoding="utf-8"))
    count = table.get("tool", {}).get("fedmed", {}).get("sites", 5)
    if type(count) is not int:
        raise InputError(
            f"sites in [tool.fedmed] of {path / 'pyproject.toml'} must be a whole number, "
            f"got {count!r}"
        )
    return count
