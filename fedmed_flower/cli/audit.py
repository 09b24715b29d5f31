"""The command `fedmed audit`: whether audit trails are whole, and what differs between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedmed_flower.cli.tables import console, input_errors, print_table
from fedmed_flower.errors import InputError

if TYPE_CHECKING:
    from fedmed_flower.secure.audit import Entry, Trail

_ENDING = "*.audit"
_MOST_TRAILS = 300
_NOT_SHOWN = (
    "not shown: that the server's model is the sum of what the hospitals sent, nor that their "
    "figures are right. A trail says what its owner wrote down."
)

Keys = Mapping[str, frozenset[bytes]]


def audit(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="A run folder, a hospital's output folder, or the file of an audit trail. Several "
            "are compared too.",
        ),
    ],
    public_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=KEY",
            help="The public key of a hospital, as fedmed keys show prints it; may be repeated, "
            "also for the older keys of one hospital.",
        ),
    ] = None,
    peers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A peers file with the public keys.")
    ] = None,
) -> None:
    """Verify audit trails of secure sums and compare them: exit code 1 if anything differs."""
    with input_errors():
        differences = _audit(folders, public_key or [], peers)
    if differences:
        raise typer.Exit(1)


def _audit(folders: Sequence[Path], texts: Sequence[str], peers: Path | None) -> int:
    """Print what is found and return the number of differences."""
    from fedmed_flower.secure.trails import compare, in_words

    keys = _keys(texts, peers)
    audited = [_Audited(path, keys, peers) for path in _files(folders)]
    _require_used(texts, audited)
    labels = _labels(audited)
    whole = {label: trail.sound for label, trail in labels.items() if not trail.faults}
    found = [fault for trail in audited for fault in trail.faults]
    found += compare(whole)
    print_table(console, _table(labels))
    for text in found:
        console.print(f"differs: {text}", style="red")
    broken = [label for label, trail in labels.items() if trail.faults]
    if broken and len(audited) > 1:
        console.print(f"note: not compared, since lines are wrong: {in_words(broken)}")
    notes = [note for trail in audited for note in trail.notes]
    for note in (*notes, *_strangers(labels), *_coverage(whole)):
        console.print(f"note: {note}")
    if found:
        console.print(f"{len(found)} {'thing differs' if len(found) == 1 else 'things differ'}")
    else:
        console.print("nothing differs", style="green")
    console.print(_NOT_SHOWN)
    return len(found)


class _Audited:
    """One trail, verified in itself.

    Parameters
    ----------
    path : Path
    keys : mapping of str to frozenset of bytes
        Public keys by name.
    peers : Path or None
        The peers file, all members of which are in `keys`.

    Attributes
    ----------
    who : str
        Whose it says that it is; the path if it does not say it.
    faults, notes : list of str
        What is wrong with it, and what should be known of it.
    sound : list of Entry
        Its entries.
    """

    def __init__(self, path: Path, keys: Keys, peers: Path | None) -> None:
        from fedmed_flower.secure.audit import KEY, SERVER, faults, read_trail

        self.path = path
        trail = read_trail(path)
        self.sound = [entry for entry in trail.entries if entry is not None]
        first = trail.entries[0] if trail.entries else None
        about = first.about if first is not None and first.kind == KEY else {}
        self.who: str = about.get("who", str(path))
        self.is_server = about.get("role") == SERVER
        self.key: str = about.get("public", "")
        own = keys.get(self.who, frozenset())
        self.is_known = bool(own)
        self.faults = faults(trail.entries, str(path), own)
        if about and peers is not None and not own and not self.is_server:
            self.faults.append(f"{path} is of {self.who}, which is no member of {peers}")
        self.notes = self._notes(trail)

    def _notes(self, trail: Trail) -> list[str]:
        from fedmed_flower.secure.audit import KEY

        notes = []
        if trail.unfinished:
            notes.append(
                f"the last line of {self.path} is unfinished, as after a kill: nobody was told its "
                "head, and the next entry replaces it"
            )
        if self.is_known or self.faults:
            return notes
        changes = [
            line
            for line, entry in enumerate(self.sound, start=1)
            if entry.kind == KEY and entry.about["public"] != self.key
        ]
        if changes:
            lines = ", ".join(map(str, changes))
            notes.append(f"another key signs {self.path} from these lines on: {lines}")
        return notes


def _keys(texts: Sequence[str], peers: Path | None) -> Keys:
    """Return all public keys that were given, by name."""
    from fedmed_flower.secure.identity import key_of
    from fedmed_flower.secure.study import Study

    keys: dict[str, set[bytes]] = {}
    if peers is not None:
        for name, public in Study.load(peers).members.items():
            keys.setdefault(name, set()).add(public)
    for text in texts:
        name, _, key = text.partition("=")
        try:
            keys.setdefault(name, set()).add(key_of(key))
        except InputError as error:
            raise InputError(f"--public-key must be NAME=KEY, got {text!r}: {error}") from error
    return {name: frozenset(publics) for name, publics in keys.items()}


def _require_used(texts: Sequence[str], audited: Sequence[_Audited]) -> None:
    """Refuse a key for a name that no trail has: it would verify nothing."""
    owners = sorted({trail.who for trail in audited})
    for text in texts:
        name = text.partition("=")[0]
        if name not in owners:
            raise InputError(
                f"--public-key has a key for {name!r}, and the trails are of {', '.join(owners)}: "
                "give its trail too, or write the name as the trail does"
            )


def _files(folders: Sequence[Path]) -> list[Path]:
    """Return the files of all trails, each once."""
    from fedmed_flower.secure.audit import AUDIT

    found: dict[Path, Path] = {}
    for folder in folders:
        paths = [folder]
        if folder.is_dir():
            paths = sorted({*folder.glob(AUDIT), *folder.glob(_ENDING)})
        if not paths:
            raise InputError(
                f"there is no audit trail ({AUDIT} or {_ENDING}) in the folder {folder}: give the "
                "folder of a run with secure sums, or the file of a trail"
            )
        for path in paths:
            found.setdefault(path.resolve(), path)
    if len(found) > _MOST_TRAILS:
        raise InputError(f"at most {_MOST_TRAILS} trails can be compared, got {len(found)}")
    return list(found.values())


def _labels(audited: Sequence[_Audited]) -> dict[str, _Audited]:
    """Return the trails by the names that stand in the texts."""
    owners = [(trail.who, trail.is_server) for trail in audited]
    labels = {}
    for trail, owner in zip(audited, owners, strict=True):
        name = "the server" if trail.is_server else trail.who
        alone = owners.count(owner) == 1 and name != str(trail.path)
        labels[name if alone and name not in labels else f"{name} ({trail.path})"] = trail
    return labels


def _table(labels: Mapping[str, _Audited]) -> Table:
    from fedmed_flower.secure.trails import rounds_of

    table = Table("trail", "file", "entries", "runs", "verified by")
    for label, trail in labels.items():
        runs = sorted({run for run, _ in rounds_of(trail.sound)})
        by = "the key that was given" if trail.is_known else "the key that it names itself"
        entries = str(len(trail.sound))
        table.add_row(label, str(trail.path), entries, ", ".join(runs), "-" if trail.faults else by)
    return table


def _strangers(labels: Mapping[str, _Audited]) -> list[str]:
    """Say whose key is not known."""
    from fedmed_flower.secure.trails import in_words

    unknown = [label for label, trail in labels.items() if not trail.is_known and not trail.faults]
    if not unknown:
        return []
    return [
        f"no key was given for {in_words(unknown)}: verified by the key that a trail names itself, "
        "which shows that it is whole, and not whose it is"
    ]


def _coverage(whole: Mapping[str, Sequence[Entry]]) -> list[str]:
    """Say what could be compared."""
    from fedmed_flower.secure.trails import in_words, rounds_of

    owners: dict[tuple[str, int], int] = {}
    for entries in whole.values():
        for place in rounds_of(entries):
            owners[place] = owners.get(place, 0) + 1
    shared = [place for place, count in owners.items() if count > 1]
    if len(whole) < 2:
        return ["nothing was compared: give the trails of other hospitals or of the server too"]
    if not shared:
        return [f"nothing could be compared: {in_words(list(whole))} have no run in common"]
    runs = sorted({run for run, _ in shared})
    return [
        f"run {run} was compared: "
        f"{sum(place[0] == run and place[1] > 0 for place in shared)} rounds that two or more "
        "trails show"
        for run in runs
    ]
