"""The command `fedmed node`: a hospital's SuperNode."""

from __future__ import annotations

from fedmed_flower.cli.launching import (
    FlowersOptions,
    GivenPoll,
    Launched,
    NoForkServer,
    launch,
)
from fedmed_flower.cli.tables import input_errors
from fedmed_flower.engines.forking import HOSPITAL_COMMANDS, HOSPITAL_MODULES


def node(
    options: FlowersOptions = None, poll: GivenPoll = 0.1, no_fork_server: NoForkServer = False
) -> None:
    """Start a hospital's SuperNode: `flower-supernode`, with a fork server for its messages.

    The fork server has imported what apps need, so that a message does not wait for it. Telemetry,
    the check for updates and installations are off unless the environment sets them; a proxy is
    not used for this machine itself. All other options are Flower's, and so are signals and the
    exit code: `fedmed node -- --help` shows them.
    """
    with input_errors():
        supernode = Launched("flower-supernode", False, HOSPITAL_COMMANDS, HOSPITAL_MODULES)
        launch(supernode, options or [], poll, not no_fork_server)
