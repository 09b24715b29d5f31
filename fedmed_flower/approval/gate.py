"""Stands between a hospital's SuperNode and the code of an app: what is not approved never starts.

Flower starts a process for each message. It fetches the message and the app's bundle, installs the
bundle and imports it. Here each of these steps first asks the hospital's list. A run that may not
start gets a reply that says why, and of its bundle nothing is installed or imported.

Flower offers no public place for this. The names of its functions that are replaced stand in
`_REPLACED` alone, and a test fails when one of them moves.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

from fedmed_flower.approval.approvals import Approvals
from fedmed_flower.approval.bundle import Bundle, forget_compiled, read_bundle, unlike
from fedmed_flower.data.site import Site
from fedmed_flower.errors import InputError
from fedmed_flower.files import replacing
from fedmed_flower.wire import DECLINED, error_reason

log = logging.getLogger("flwr.fedmed")

APPROVALS = "FEDMED_APPROVALS"
# In flwr.supernode.runtime.run_clientapp, where Flower looks them up.
_MODULE = "flwr.supernode.runtime.run_clientapp"
_REPLACED = (
    "pull_task_input",
    "install_from_fab",
    "install_app_dependencies",
    "get_project_dir",
    "get_load_client_app_fn",
)

_COMMANDS = "commands"
_GUARDED = """\
from fedmed_flower.approval.gate import main

main()
"""
_REFUSED = """\
import sys

sys.exit(f"{sys.argv[0]}: only approved ClientApps run at this hospital")
"""


class _Gate:
    """The steps of one message, each behind the hospital's list.

    Parameters
    ----------
    folder : Path
        Of the hospital's list.
    steps : dict of str to callable
        Flower's own, by their names in `_REPLACED`.
    """

    def __init__(self, folder: Path, steps: dict[str, Callable[..., Any]]) -> None:
        self._folder = folder
        self._steps = steps
        self._bundle: Bundle | None = None
        self._place: Path | None = None
        # Until a bundle was found to be approved, nothing is.
        self._refusal: str | None = "nothing was asked for"

    def pull_task_input(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch message, context, run and bundle, and decide on them."""
        message, context, run, fab = self._steps["pull_task_input"](*args, **kwargs)
        self._refusal = self._decide(context, run, fab)
        if self._refusal is not None:
            log.error("refused: %s", self._refusal)
        return message, context, run, fab

    def _decide(self, context: Context, run: Any, fab: Any) -> str | None:
        digest = hashlib.sha256(fab.content).hexdigest()
        if fab.hash_str != digest:
            return f"the app's bundle has not the SHA-256 {fab.hash_str} that was said"
        try:
            bundle = read_bundle(fab.content)
            approvals = Approvals.load(self._folder)
            refusal = approvals.refusal(bundle, context.run_config)
        except InputError as error:
            log.error("%s", error)
            return "the app's bundle or the hospital's list of approved ones is unreadable"
        if (run.fab_id, run.fab_version) != (bundle.app, bundle.version):
            return (
                f"the run says that it is of app {run.fab_id} {run.fab_version}, and its bundle "
                f"is {bundle.app} {bundle.version}"
            )
        if refusal is not None:
            if not approvals.remember(bundle, fab.content):
                log.error("no room to keep the bundle: fedmed approve forget %s", self._folder)
            return refusal
        self._bundle = bundle
        return None

    def install_from_fab(self, *args: Any, **kwargs: Any) -> Any:
        """Install the bundle, if it is approved."""
        if self._refusal is None:
            return self._steps["install_from_fab"](*args, **kwargs)
        return None

    def install_app_dependencies(self, *_: Any, **__: Any) -> None:
        """Install nothing: packages run code that nobody has approved."""
        self._refusal = "packages may not be installed at this hospital while a run starts"

    def get_project_dir(self, *args: Any, **kwargs: Any) -> Any:
        """Return the folder of the installed app, and remember it."""
        self._place = self._steps["get_project_dir"](*args, **kwargs)
        return self._place

    def get_load_client_app_fn(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """Return what loads the app; of one that may not run, what says so in its place."""
        if self._refusal is None:
            self._refusal = self._installed_otherwise()
        if self._refusal is None:
            load: Callable[..., Any] = self._steps["get_load_client_app_fn"](*args, **kwargs)
            return load
        reason = self._refusal

        def decline(message: Message, context: Context) -> Message:
            text = error_reason(Site.from_context(context).name, DECLINED + reason)
            error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=text)
            return Message(error, reply_to=message)

        return lambda *_: decline

    def _installed_otherwise(self) -> str | None:
        """Return why the installed app is not what was approved; None if it is.

        Flower leaves a folder that is there as it is, and names it by 8 digits of the digest.
        """
        if self._bundle is None or self._place is None:
            return "Flower has installed the app in an unknown way"
        forget_compiled(self._place)
        odd = unlike(self._bundle, self._place)
        if not odd:
            return None
        log.error(
            "%s differs from the approved bundle in %s: remove the folder", self._place, odd[:5]
        )
        return "the app that is installed here is not the approved one"


def guard(folder: Path) -> None:
    """Put the gate between Flower and all app bundles, for the rest of this process.

    Parameters
    ----------
    folder : Path
        Of the hospital's list.

    Raises
    ------
    RuntimeError
        If Flower has no such steps any more.
    """
    module = import_module(_MODULE)
    lacking = [name for name in _REPLACED if not callable(getattr(module, name, None))]
    if lacking:
        raise RuntimeError(
            f"this Flower has no {', '.join(lacking)} in {_MODULE}, so no approval can be checked: "
            "install a version that fedmed-flower names"
        )
    gate = _Gate(folder, {name: getattr(module, name) for name in _REPLACED})
    for name in _REPLACED:
        setattr(module, name, getattr(gate, name))


def write_commands(folder: Path) -> Path:
    """Write the commands that stand before Flower's own on ``PATH``, and return their folder.

    That for ClientApps is guarded; those for all other kinds of tasks say that they do not run.

    Parameters
    ----------
    folder : Path
        Of the hospital's list.

    Raises
    ------
    InputError
        If they cannot be written.
    """
    place = folder / _COMMANDS
    first = f"#!{sys.executable}\n"
    texts = dict.fromkeys(TASK_TYPE_TO_COMMAND.values(), first + _REFUSED)
    texts[TASK_TYPE_TO_COMMAND[TaskType.CLIENT_APP]] = first + _GUARDED
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.mkdir(mode=0o700, exist_ok=True)
        for name, text in texts.items():
            path = place / name
            with replacing(path) as temporary:
                temporary.write_text(text)
                temporary.chmod(0o700)
            if not os.access(path, os.X_OK):
                raise InputError(f"no program can be run in {place}: give the list another folder")
    except OSError as error:
        raise InputError(f"{place} cannot be written: {error.strerror}") from None
    return place


def main() -> None:
    """Run ``flwr-clientapp`` behind the gate; the hospital's list is named by the environment."""
    from flwr.supernode.cli import flwr_clientapp

    folder = os.environ.get(APPROVALS, "")
    if not folder:
        sys.exit(f"{APPROVALS} must name the folder of the hospital's list of approved apps")
    guard(Path(folder))
    flwr_clientapp()
