"""The command `fedmed node`: a hospital's SuperNode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmed_flower.cli.launching import (
    FlowersOptions,
    GivenPoll,
    Launched,
    NoForkServer,
    launch,
)
from fedmed_flower.cli.tables import console, input_errors
from fedmed_flower.engines.forking import HOSPITAL_COMMANDS, HOSPITAL_MODULES
from fedmed_flower.errors import InputError


def node(
    options: FlowersOptions = None,
    poll: GivenPoll = 0.1,
    no_fork_server: NoForkServer = False,
    approvals: Annotated[
        Path | None,
        typer.Option(help="The hospital's list of `fedmed approve`: no other app runs."),
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Start without looking whether all is there.")
    ] = False,
) -> None:
    """Start a hospital's SuperNode: `flower-supernode`, with a fork server for its messages.

    First it looks whether name, data, keys, certificate, ledger, disk, clock and server are as they
    must be, and says in one table what is not. Exit code 2: something cannot work.

    The fork server has imported what apps need, so that a message does not wait for it. Telemetry,
    the check for updates and installations are off unless the environment sets them; a proxy is
    not used for this machine itself. All other options are Flower's, and so are signals and the
    exit code: `fedmed node -- --help` shows them.
    """
    with input_errors():
        given = options or []
        if not no_check and not _only_asks(given):
            _check(given, approvals)
        # Of the SuperExec, which starts the app processes: its imports set environment variables.
        modules = ("flwr.supercore.cli", *HOSPITAL_MODULES)
        supernode = Launched("flower-supernode", False, HOSPITAL_COMMANDS, modules)
        launch(supernode, given, poll, not no_fork_server, approvals)


def _only_asks(options: list[str]) -> bool:
    """Return whether Flower's command would only print its help or its version."""
    return not {"-h", "--help", "-V", "--version"}.isdisjoint(options)


def _check(options: list[str], approvals: Path | None) -> None:
    from fedmed_flower.cli.readiness import WRONG, findings, print_findings

    found = findings(options, approvals)
    print_findings(console, found)
    wrong = [each.what for each in found if each.state == WRONG]
    if wrong:
        raise InputError(
            f"the node was not started, see the table: {', '.join(wrong)} (--no-check starts it "
            "all the same)"
        )
