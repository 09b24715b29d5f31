"""Small Flower apps in folders, and what Flower makes of them."""

from pathlib import Path

from fedmed_flower.approval.bundle import Bundle, bundle_at

PROJECT = """
[project]
name = "toy"
version = "{version}"
dependencies = [{dependencies}]

[tool.flwr.app]
publisher = "lab"

[tool.flwr.app.components]
serverapp = "toy.server:app"
clientapp = "toy.client:app"

[tool.flwr.app.config]
{config}
"""
CLIENT = "answer = 42\n"


def write_app(
    folder: Path,
    config: str = "rounds = 3",
    client: str = CLIENT,
    version: str = "1.0.0",
    dependencies: str = '"numpy>=1"',
) -> Path:
    """Write an app that does nothing, and return its folder."""
    (folder / "toy").mkdir(parents=True, exist_ok=True)
    text = PROJECT.format(version=version, dependencies=dependencies, config=config)
    (folder / "pyproject.toml").write_text(text)
    (folder / "toy" / "client.py").write_text(client)
    (folder / "toy" / "server.py").write_text("app = None\n")
    return folder


def bundle(folder: Path, **changes: str) -> tuple[Bundle, bytes]:
    """Write an app and return its bundle."""
    return bundle_at(write_app(folder, **changes))
