"""The commands `fedmed keys ...`: a hospital's own key, and the keys that it has pinned."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmed_flower.cli.tables import console, input_errors
from fedmed_flower.errors import InputError

if TYPE_CHECKING:
    from fedmed_flower.secure.study import Groups, Peers, Study

keys_app = typer.Typer(
    help="A hospital's key for secure sums, and the keys of the others that it has pinned.",
    no_args_is_help=True,
)

_OwnKey = Annotated[Path, typer.Argument(metavar="FILE", help="This hospital's key file.")]
_PeersFile = Annotated[
    Path, typer.Argument(metavar="PEERS", help="This hospital's own file of the study's members.")
]
_Member = Annotated[str, typer.Argument(metavar="NAME", help="The member's name in the study.")]


@keys_app.command()
def new(
    name: Annotated[str, typer.Argument(help="This hospital's name in the study.")],
    out: Annotated[Path, typer.Option(help="The key is written to this file.")],
) -> None:
    """Make this hospital's key."""
    from fedmed_flower.secure.identity import Identity

    with input_errors():
        identity = Identity.create(out, name)
        console.print(f"{out}: the secret key of {name}, which never leaves this machine")
        _print_key(identity.public)
        console.print(
            "send the public key to each member of the study, and compare the fingerprint by phone"
        )


@keys_app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A key file, or a file of a study's members.")],
) -> None:
    """Show the public key of a key file, or the members that are pinned, to compare by phone."""
    from fedmed_flower.secure.identity import Identity, read_toml
    from fedmed_flower.secure.study import Peers

    with input_errors():
        content, _ = read_toml(file, "give a file of fedmed keys new or of fedmed keys pin")
        if "study" not in content:
            identity = Identity.load(file)
            console.print(identity.name)
            _print_key(identity.public)
            return
        peers = Peers.load(file)
        for name, key in sorted(peers.members.items()):
            console.print(name)
            _print_key(key)
        _print_study(peers)


@keys_app.command()
def pin(
    file: _PeersFile,
    name: _Member,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The member's public key: ed25519:...")],
    study: Annotated[
        str | None, typer.Option(help="The study's name, for a file that is not there yet.")
    ] = None,
    replace_key: Annotated[
        bool, typer.Option("--replace", help="The member has a new key: forget the old one.")
    ] = False,
) -> None:
    """Pin a member's public key: what is signed with another one is refused."""
    from fedmed_flower.secure.identity import fingerprint, key_of

    with input_errors():
        peers = _peers_of(file, study)
        public = key_of(key)
        pinned = peers.members.get(name)
        if pinned == public:
            console.print(f"{name} is pinned in {file} already, with this key")
            return
        if pinned is not None and not replace_key:
            raise InputError(
                f"{file} pins another key for {name}, with the fingerprint {fingerprint(pinned)}: "
                f"ask {name} by phone whether it has made a new key; if so, give --replace"
            )
        with _named(file):
            after = replace(peers, members={**peers.members, name: public})
        after.save(file)
        console.print(f"pinned {name} in {file}")
        _print_key(public)
        if pinned is None:
            _print_differences(peers, after)
        _print_study(after)


@keys_app.command()
def rotate(file: _OwnKey) -> None:
    """Put a new key in the place of this hospital's key, such as if others may have read it."""
    from fedmed_flower.secure.identity import Identity, key_text

    with input_errors():
        identity, old = Identity.rotate(file)
        command = ["fedmed", "keys", "pin", "PEERS", identity.name, key_text(identity.public)]
        console.print(f"{file}: the new secret key of {identity.name}")
        _print_key(identity.public)
        console.print(f"{old}: the old key; delete it when all members have pinned the new one")
        console.print(
            "each member pins the new key in its own file, and so does this hospital, after "
            "comparing the fingerprint by phone; until then it takes part in no secure sum:"
        )
        console.print(f"  {shlex.join([*command, '--replace'])}")


@keys_app.command()
def revoke(file: _PeersFile, name: _Member) -> None:
    """Remove a member: this hospital takes part in no secure sum with it any more."""
    from fedmed_flower.secure.study import Peers

    with input_errors():
        peers = Peers.load(file)
        _require_pinned(file, peers, [name])
        groups = [tuple(each for each in group if each != name) for group in peers.groups]
        after = replace(
            peers,
            members={each: key for each, key in peers.members.items() if each != name},
            secrets={each: secret for each, secret in peers.secrets.items() if each != name},
            groups=tuple(group for group in groups if group),
        )
        after.save(file)
        console.print(f"removed {name} from {file}; each other member does so in its own file")
        _print_differences(peers, after)
        _print_study(after)


@keys_app.command()
def regroup(
    file: _PeersFile,
    groups: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[GROUP]...",
            help="The names of members that are summed together, with commas: north,south,east. "
            "One group of all members is no groups.",
        ),
    ] = None,
    book: Annotated[
        Path | None,
        typer.Option(
            help="This hospital's book of secure sums (*.secure): answer questions about data over "
            "another set of members, and accept a book that was lost or restored."
        ),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="This hospital's key file, for --book.")] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            help="With --book: a member whose own book was lost or restored.  [default: all]"
        ),
    ] = None,
) -> None:
    """Say which members are summed together, or let questions be answered over another set."""
    from fedmed_flower.secure.book import SecureBook
    from fedmed_flower.secure.identity import Identity
    from fedmed_flower.secure.study import Peers

    with input_errors():
        peers = Peers.load(file)
        if not groups and book is None:
            raise InputError("give groups, such as north,south,east, or --book")
        _check_book(book, key, accept or [])
        _require_pinned(file, peers, accept or [])
        identity = None if key is None else Identity.load(key)
        after = replace(peers, groups=_groups_of(groups, peers)) if groups else peers
        with _named(file):
            # Refuses groups that are too small or leave members out.
            after.study()
        if groups:
            after.save(file)
            console.print(
                f"wrote {file}; each other member writes the same groups into its own file"
            )
            _print_differences(peers, after)
        if book is not None and identity is not None:
            # Its log says what that means.
            SecureBook(book, identity.id).regroup(accept or [])
        _print_study(after)


def _check_book(book: Path | None, key: Path | None, accept: Sequence[str]) -> None:
    """Refuse options that do not go together, and a book that never was."""
    if (book is None) != (key is None):
        raise InputError("--book and --key go together: give both, or none")
    if accept and book is None:
        raise InputError("--accept needs --book: it is this hospital's book that accepts others'")
    if book is None or book.exists() or book.with_name(f"{book.name}-head").exists():
        return
    raise InputError(
        f"there is neither a book {book} nor its head: give the path that the hospital's error "
        "names; a book that never was needs no regroup"
    )


def _require_pinned(file: Path, peers: Peers, names: Sequence[str]) -> None:
    """Refuse names of hospitals that are no members."""
    for name in names:
        if name not in peers.members:
            raise InputError(
                f"{file} pins no key for {name}; its members: {', '.join(peers.members) or 'none'}"
            )


def _groups_of(groups: Sequence[str], peers: Peers) -> Groups:
    """Return the groups that were given; one of all members is none."""
    parted = tuple(tuple(name.strip() for name in group.split(",")) for group in groups)
    whole = len(parted) == 1 and sorted(parted[0]) == sorted(peers.members)
    return () if whole else parted


def _peers_of(file: Path, study: str | None) -> Peers:
    """Return what a peers file says, or an empty study if there is no such file."""
    from fedmed_flower.secure.study import Peers

    if not os.path.lexists(file):
        if study is None:
            raise InputError(
                f"there is no file {file}: give --study NAME to begin one, with the name that all "
                "members give the study"
            )
        return Peers(study, {})
    peers = Peers.load(file)
    if study is not None and study != peers.name:
        raise InputError(
            f"--study {study}: {file} is of the study {peers.name}; give another file, or leave "
            "--study out"
        )
    return peers


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Name the file in an error about what it would hold."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{file} was left as it is: {error}") from None


def _print_key(public: bytes) -> None:
    from fedmed_flower.secure.identity import fingerprint, key_text

    console.print(f"  public key:  {key_text(public)}")
    console.print(f"  fingerprint: {fingerprint(public)}")


def _print_study(peers: Peers) -> None:
    """Print what the sums of a study need, or why there can be none yet."""
    console.print(f"the study {peers.name}: {_count(len(peers.members), 'member')}")
    try:
        study = peers.study()
    except InputError as error:
        console.print(f"  not ready, so there are no secure sums: {error}", style="yellow")
        return
    for line in _lines_of(study):
        console.print(f"  {line}")


def _lines_of(study: Study) -> list[str]:
    from fedmed_flower.secure.identity import fingerprint

    lines = [
        f"fingerprint: {fingerprint(study.content())}",
        f"least: {study.least} honest members in each sum",
        f"c: {_count(study.colluders, 'member')} may work with the server",
    ]
    lines += [_line_of(study.within(group), group) for group in study.named_groups or ("",)]
    if study.groups:
        lines.append(
            f"questions about data are summed over all: at least {study.needed} of "
            f"{len(study.members)} members (t = {study.threshold}), and of each group at least "
            f"{study.least + study.colluders} or none"
        )
    if not study.colluders:
        lines.append(
            "since c is 0: a member that works with the server learns the sum of the others"
        )
    return lines


def _line_of(study: Study, group: str) -> str:
    """Say what the sums of a group, or of a study without groups, need."""
    start = f"group {group}: sum" if group else "sum"
    return (
        f"{start} over {', '.join(study.members)}: of at least {study.needed} of "
        f"{len(study.members)} members (t = {study.threshold}), "
        f"{_count(study.tolerated, 'loss', 'losses')} tolerated"
    )


def _print_differences(before: Peers, after: Peers) -> None:
    """Print whose figures follow from the sums before and after a change together."""
    from fedmed_flower.secure.study import differences

    for added, subtracted in differences(before.sums, after.sums, after.fewest):
        text = f"the figures of {_together(added)}"
        if subtracted:
            text += f" less those of {_together(subtracted)}"
        console.print(
            f"if one question is answered before and after this change, {text} are the difference "
            "of its sums",
            style="yellow",
        )


def _together(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]} together"


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
