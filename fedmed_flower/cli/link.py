"""The command `fedmed link`: the server's SuperLink."""

from __future__ import annotations

from fedmed_flower.cli.launching import (
    FlowersOptions,
    GivenPoll,
    Launched,
    NoForkServer,
    launch,
)
from fedmed_flower.cli.tables import input_errors
from fedmed_flower.engines.forking import SERVER_COMMANDS, SERVER_MODULES


def link(
    options: FlowersOptions = None, poll: GivenPoll = 1.0, no_fork_server: NoForkServer = False
) -> None:
    """Start the server's SuperLink: `flower-superlink`, with a fork server for its runs.

    The fork server has imported what apps need, so that a run does not wait for it. Telemetry,
    the check for updates and installations are off unless the environment sets them; a proxy is
    not used for this machine itself. All other options are Flower's, and so are signals and the
    exit code: `fedmed link -- --help` shows them.
    """
    with input_errors():
        superlink = Launched("flower-superlink", True, SERVER_COMMANDS, SERVER_MODULES)
        launch(superlink, options or [], poll, not no_fork_server)
