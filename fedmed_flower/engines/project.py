"""A Flower app in a folder, as its ``pyproject.toml`` describes it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from flwr.app import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.config import flatten_dict, get_project_config
from flwr.serverapp import ServerApp
from flwr.supercore.object_ref import load_app

from fedmed_flower.errors import InputError


@dataclass(frozen=True)
class Project:
    """A Flower app in a folder.

    Attributes
    ----------
    path : Path
    name : str
    declared : dict
        The run config in its pyproject, flattened.
    server, client : str
        References of its ServerApp and its ClientApp, as ``module:name``.
    """

    path: Path
    name: str
    declared: UserConfig
    server: str
    client: str

    def server_app(self) -> ServerApp:
        """Return the ServerApp.

        Raises
        ------
        InputError
            If it cannot be loaded.
        """
        app = self._load(self.server)
        if not isinstance(app, ServerApp):
            raise InputError(f"{self.server} is a {type(app).__name__}, not a ServerApp")
        return app

    def client_app(self) -> ClientApp:
        """Return the ClientApp.

        Raises
        ------
        InputError
            If it cannot be loaded.
        """
        app = self._load(self.client)
        if not isinstance(app, ClientApp):
            raise InputError(f"{self.client} is a {type(app).__name__}, not a ClientApp")
        return app

    def _load(self, reference: str) -> object:
        return load_app(reference, InputError, self.path.resolve())


def load_project(path: Path) -> Project:
    """Return the Flower app in a folder.

    Raises
    ------
    InputError
        If the folder is no Flower app.
    """
    try:
        project = get_project_config(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is no Flower app: it has no pyproject.toml") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path / 'pyproject.toml'}: {' '.join(str(error).split())}") from error
    section = project["tool"]["flwr"]["app"]
    components = section["components"]
    return Project(
        path=path,
        name=project["project"]["name"],
        declared=flatten_dict(section.get("config", {})),
        server=components["serverapp"],
        client=components["clientapp"],
    )


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
