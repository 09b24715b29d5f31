"""What a hospital's node needs before it starts: looked at all at once, and said in one table."""

from __future__ import annotations

import argparse
import os
import shutil
import ssl
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from fedmed_flower.engines.processes import LOOPBACK
from fedmed_flower.errors import InputError, shown

if TYPE_CHECKING:
    from cryptography import x509
    from flwr.app import UserConfig
    from rich.console import Console

    from fedmed_flower.settings.node import NodeSettings

OK = "ok"
LOOK = "look"
WRONG = "wrong"
_STYLES = {OK: "green", LOOK: "yellow", WRONG: "red"}

# Where Flower looks for a SuperLink if none is named.
_LINK = "127.0.0.1:9092"
_SOON = timedelta(days=30)
_PATIENCE = 10.0
_LEAST_BYTES = 2 << 30
_MOST_CERTIFICATE = 1 << 20


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes
    ----------
    what : str
    text : str
    state : {"ok", "look", "wrong"}
        ``look``: the node can start, and somebody should look at it. ``wrong``: it cannot work.
    """

    what: str
    text: str
    state: str = OK


@dataclass
class _Node:
    """What is known of a node from its options."""

    link: str
    certificates: str
    key: str
    insecure: bool
    approvals: Path | None
    config: UserConfig
    settings: NodeSettings
    now: datetime = field(default_factory=lambda: datetime.now(UTC))


def findings(options: Sequence[str], approvals: Path | None) -> list[Finding]:
    """Return what is found of a node before it starts.

    Nothing is changed, and no row of a patient is read.

    Parameters
    ----------
    options : sequence of str
        Options of ``flower-supernode``.
    approvals : Path, optional
        Folder of the hospital's list of approved apps.
    """
    try:
        node = _node_of(options, approvals)
    except InputError as error:
        return [Finding("node config", str(error), WRONG)]
    found: list[Finding] = []
    for check in _CHECKS:
        try:
            found += check(node)
        except InputError as error:
            found.append(Finding(_NAMES[check], str(error), WRONG))
    return found


def print_findings(console: Console, found: Sequence[Finding]) -> None:
    """Print a table of findings."""
    table = Table(title="Before the node starts")
    for column in ("", "what", "found"):
        table.add_column(column)
    for each in found:
        table.add_row(each.state, each.what, shown(each.text), style=_STYLES[each.state])
    console.print(table)


def _node_of(options: Sequence[str], approvals: Path | None) -> _Node:
    import click
    from flwr.common.config import parse_config_args

    from fedmed_flower.settings.node import NODE_KEYS, NodeSettings

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--superlink", default=_LINK)
    parser.add_argument("--root-certificates", default="")
    parser.add_argument("--auth-supernode-private-key", default="")
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--node-config", default="")
    try:
        given, _ = parser.parse_known_args(options)
        config = parse_config_args([given.node_config] if given.node_config else None)
    except (argparse.ArgumentError, click.ClickException, OSError, ValueError) as error:
        raise InputError(f"the node's options cannot be read: {error}") from None
    return _Node(
        given.superlink,
        given.root_certificates,
        given.auth_supernode_private_key,
        given.insecure,
        approvals,
        config,
        NodeSettings.of(config, [key for key in config if key not in NODE_KEYS]),
    )


def _name(node: _Node) -> Iterator[Finding]:
    from fedmed_flower.data.site import Site

    if not node.settings.site_name:
        raise InputError("site-name is not in the node config: the hospital has no name")
    yield Finding("name", Site(node.settings.site_name).name)


def _keys(node: _Node) -> Iterator[Finding]:
    from fedmed_flower.settings.node import NODE_KEYS
    from fedmed_flower.settings.text import unknown_key

    for key in node.config:
        if key not in NODE_KEYS:
            told = unknown_key("the node config has an unknown key", key, NODE_KEYS)
            yield Finding("node config", f"{told}; only an app that adds it can use it", LOOK)


def _data(node: _Node) -> Iterator[Finding]:
    text = node.settings.data_dir
    if not text:
        yield Finding("data", "data-dir is not in the node config", LOOK)
        return
    folder = Path(text).expanduser()
    try:
        entries = len(list(folder.iterdir()))
    except OSError as error:
        raise InputError(f"data-dir {folder} cannot be read: {error.strerror}") from None
    if not entries:
        yield Finding("data", f"{folder} is empty", LOOK)
    elif not folder.is_absolute():
        yield Finding("data", f"{folder} is no absolute path", LOOK)
    else:
        yield Finding("data", f"{folder}; `fedmed data check` reads all that it holds")


def _code(node: _Node) -> Iterator[Finding]:
    from fedmed_flower.approval.approvals import Approvals

    if node.approvals is None:
        text = "no list of approved apps: whatever the server sends runs here (--approvals)"
        yield Finding("apps", text, LOOK)
        return
    approvals = Approvals.load(node.approvals)
    count = len(approvals.bundles) + len(approvals.signers)
    asked = len(approvals.asked())
    text = f"{len(approvals.bundles)} apps and {len(approvals.signers)} signers are approved"
    if asked:
        text += f", {asked} more were asked for: fedmed approve show {node.approvals}"
    yield Finding("apps", text, OK if count and not asked else LOOK)


def _budget(node: _Node) -> Iterator[Finding]:
    from flwr.app import Context, RecordDict

    from fedmed_flower.data.site import Site
    from fedmed_flower.privacy.ledger import Ledger
    from fedmed_flower.privacy.patient import ledger_path

    settings = node.settings
    if not settings.budget_epsilon:
        yield Finding("privacy", "no budget: what a run asks for is not bounded by noise", LOOK)
    if not settings.ledger and not settings.data_dir:
        return
    context = Context(0, 0, node.config, RecordDict(), {})
    path = ledger_path(context, Site.from_context(context), {})
    if not path.exists():
        if settings.ledger:
            raise InputError(f"there is no ledger {path}: mend the path, or fedmed privacy --new")
        _require_writable(path.parent, "the ledger")
        yield Finding("ledger", f"{path} will be made: nothing was ever released", LOOK)
        return
    ledger = Ledger(path, read_only=True)
    _require_writable(path.parent, "the ledger")
    text = str(path)
    if settings.budget_epsilon:
        spent = ledger.most(settings.budget_delta)
        left = settings.budget_epsilon - spent
        text += f": epsilon {spent:.2f} of {settings.budget_epsilon:g} is spent"
        yield Finding("ledger", text, OK if left > 0 else LOOK)
    else:
        yield Finding("ledger", text)


def _secure(node: _Node) -> Iterator[Finding]:
    settings = node.settings
    if not settings.secure_key and not settings.secure_peers:
        return
    if not (settings.secure_key and settings.secure_peers):
        raise InputError("secure-key and secure-peers of the node config belong together")
    from fedmed_flower.secure.identity import Identity, fingerprint
    from fedmed_flower.secure.study import Peers

    identity = Identity.load(Path(settings.secure_key).expanduser())
    peers = Peers.load(Path(settings.secure_peers).expanduser())
    study = peers.study()
    if peers.members.get(identity.name) != identity.public:
        raise InputError(
            f"{settings.secure_peers} pins another key for {identity.name} than that of "
            f"{settings.secure_key}"
        )
    print_ = fingerprint(study.content())
    yield Finding("secure sums", f"{identity.name} in the study {peers.name}, {print_}")


def _folders(node: _Node) -> Iterator[Finding]:
    from flwr.supercore.utils import get_flwr_home

    settings = node.settings
    homes = {"FLWR_HOME": str(get_flwr_home())}
    homes |= {"output-dir": settings.output_dir} if settings.output_dir else {}
    if settings.image_cache and settings.image_cache != "off":
        homes["image-cache"] = settings.image_cache
    for what, text in homes.items():
        folder = Path(text).expanduser()
        _require_writable(folder, what)
        free = shutil.disk_usage(_nearest(folder)).free
        state = OK if free >= _LEAST_BYTES else LOOK
        yield Finding("disk", f"{what} {folder}: {free / 1e9:.1f} GB are free", state)


def _own_key(node: _Node) -> Iterator[Finding]:
    if not node.key:
        yield Finding("node key", "no key of the node: the server may refuse it", LOOK)
        return
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    path = Path(node.key).expanduser()
    try:
        content = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise InputError(f"the node's key {path} cannot be read: {error.strerror}") from None
    try:
        key = load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(
            f"{path} is no key that Flower takes: make one with "
            "ssh-keygen -t ecdsa -b 384 -N '' -f FILE"
        )
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputError(f"others on this machine can use {path}: chmod 600 {path}")
    yield Finding("node key", str(path))


def _trust(node: _Node) -> Iterator[Finding]:
    if node.insecure:
        near = node.link.rpartition(":")[0].strip("[]") in LOOPBACK
        text = "--insecure: anybody on the way reads and changes all"
        yield Finding("certificate", text, LOOK if near else WRONG)
        return
    if not node.certificates:
        yield Finding("certificate", "that of the server is checked by this machine's list")
        return
    from cryptography import x509

    path = Path(node.certificates).expanduser()
    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes()[:_MOST_CERTIFICATE])
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path} holds no certificate in PEM form") from None
    for certificate in certificates:
        yield _dates(certificate, "certificate", str(path), node.now)


def _dates(certificate: x509.Certificate, what: str, name: str, now: datetime) -> Finding:
    first = certificate.not_valid_before_utc
    last = certificate.not_valid_after_utc
    if now > last:
        raise InputError(f"{name} ended on {last:%Y-%m-%d}: ask the server's side for a new one")
    if now < first:
        raise InputError(f"{name} begins on {first:%Y-%m-%d}: is this machine's clock right?")
    state = LOOK if last - now < _SOON else OK
    return Finding(what, f"{name} holds until {last:%Y-%m-%d}", state)


def _link(node: _Node) -> Iterator[Finding]:
    import httpx
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    scheme = "http" if node.insecure else "https"
    path = str(Path(node.certificates).expanduser()) if node.certificates else None
    try:
        verify: ssl.SSLContext | bool = False
        if not node.insecure:
            verify = ssl.create_default_context(cafile=path)
        with httpx.Client(verify=verify, timeout=_PATIENCE) as client:
            before = datetime.now(UTC)
            reply = client.get(f"{scheme}://{node.link}/")
            after = datetime.now(UTC)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        text = f"{node.link} does not answer ({error}): the node goes on trying"
        yield Finding("server", text, LOOK)
        return
    yield Finding("server", f"{node.link} answers")
    date = reply.headers.get("date")
    try:
        there = parsedate_to_datetime(date).astimezone(UTC)
    except (TypeError, ValueError):
        return
    # The header has whole seconds.
    behind = (there - before).total_seconds()
    ahead = (after - there).total_seconds() - 1
    if behind > TIMESTAMP_TOLERANCE or ahead > SYSTEM_TIME_TOLERANCE:
        late = behind > TIMESTAMP_TOLERANCE
        seconds = behind if late else ahead
        side = "behind" if late else "ahead of"
        text = (
            f"this machine is {seconds:.0f} s {side} the server, which refuses a node that is more "
            f"than {TIMESTAMP_TOLERANCE} s behind or {SYSTEM_TIME_TOLERANCE} s ahead: set the clock"
        )
        yield Finding("clock", text, WRONG)
    else:
        yield Finding("clock", "agrees with the server's")


def _require_writable(folder: Path, what: str) -> None:
    near = _nearest(folder)
    if not os.access(near, os.W_OK | os.X_OK):
        raise InputError(f"{what}: {near} cannot be written to by this user")


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


# In the order of the table.
_NAMES: dict[Callable[[_Node], Iterator[Finding]], str] = {
    _name: "name",
    _keys: "node config",
    _data: "data",
    _code: "apps",
    _budget: "ledger",
    _secure: "secure sums",
    _folders: "disk",
    _own_key: "node key",
    _trust: "certificate",
    _link: "server",
}
_CHECKS = tuple(_NAMES)
