"""The study as a hospital sees it: members whose keys it has pinned, and what a sum needs."""

from __future__ import annotations

import base64
import binascii
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import tomli_w

from fedmed_flower.errors import InputError
from fedmed_flower.secure.encoding import digest
from fedmed_flower.secure.identity import (
    KEY_BYTES,
    Identity,
    key_of,
    key_text,
    read_toml,
    require_name,
    require_private,
    write_whole,
)

LEAST = 3
# Shares have a byte for the position of a member.
MOST_MEMBERS = 255
MOST_GROUPS = MOST_MEMBERS // LEAST
_FEWEST_SECRET_BYTES = 16
_FIELDS = ("name", "least", "c", "groups", "members", "secrets")
_MADE = "a peers file is made by fedmed keys pin"

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Study:
    """The members of a study and what they ask of a sum; `of` fills in what is not given.

    Attributes
    ----------
    name : str
        The study's name, the same at all members.
    members : mapping of str to bytes
        Public key of each member, itself included, in the order of the names: 3 to 255.
    least : int
        Honest members, at least, in each sum that is opened: 3 or more.
    colluders : int
        Members, at most, that may work with the server: c.
    groups : tuple of tuple of str
        Sets of members, each of which has sums of its own, for robust rules; empty if there are
        none. In the order of the names.
    secrets : mapping of str to bytes
        Secrets that this hospital shares with one other each, by its name; may be empty.

    Raises
    ------
    InputError
        If a name, a key or a number is not allowed, or no set of the members would be enough.
    """

    name: str
    members: Mapping[str, bytes]
    least: int
    colluders: int
    groups: Groups = ()
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        require_name(self.name, "a study's name")
        _require_members(self.members)
        count = len(self.members)
        if not LEAST <= count <= MOST_MEMBERS:
            raise InputError(
                f"a study must have from {LEAST} to {MOST_MEMBERS} members, got {count}: pin those "
                "that are missing with fedmed keys pin"
            )
        _require_number("least", self.least, LEAST)
        _require_number("c", self.colluders, 0)
        if self.needed > count:
            raise InputError(
                f"a sum needs least + c = {self.least} + {self.colluders} members, and the study "
                f"has {count}: pin more members, or lower least (not below {LEAST}) or c"
            )
        object.__setattr__(self, "members", dict(sorted(self.members.items())))
        object.__setattr__(self, "groups", tuple(sorted(tuple(sorted(g)) for g in self.groups)))
        object.__setattr__(self, "secrets", dict(sorted(self.secrets.items())))
        self._check_groups()
        _require_secrets(self.secrets, self.members)

    def _check_groups(self) -> None:
        fewest = self.least + self.colluders
        if len(self.groups) == 1:
            raise InputError(
                f"groups must be two or more, or none, got one: {', '.join(self.groups[0])}; "
                "without groups all members are summed together"
            )
        for group in self.groups:
            if len(group) < fewest:
                raise InputError(
                    f"a group must have at least least + c = {self.least} + {self.colluders} "
                    f"members, got {len(group)}: {', '.join(group)}; {len(self.groups)} groups "
                    f"need {len(self.groups) * fewest} members"
                )
        placed: set[str] = set()
        for name in (name for group in self.groups for name in group):
            if name not in self.members:
                raise InputError(f"a group holds {name!r}, which is no member: pin its key first")
            if name in placed:
                raise InputError(f"{name} is in the groups twice: each member is in one, once")
            placed.add(name)
        missing = [name for name in self.members if self.groups and name not in placed]
        if missing:
            raise InputError(
                f"{', '.join(missing)}: in no group; each member must be in one: fedmed keys "
                "regroup"
            )

    @classmethod
    def of(
        cls,
        name: str,
        members: Mapping[str, bytes],
        least: int = LEAST,
        colluders: int | None = None,
        groups: Sequence[Sequence[str]] = (),
        secrets: Mapping[str, bytes] | None = None,
    ) -> Study:
        """Return a study; `colluders` is 1 by default, and 0 for three members.

        Raises
        ------
        InputError
            As in `Study`.
        """
        if colluders is None:
            colluders = _usual_colluders(len(members))
        return cls(name, members, least, colluders, tuple(map(tuple, groups)), secrets or {})

    @classmethod
    def load(cls, path: Path) -> Study:
        """Read a peers file.

        Raises
        ------
        InputError
            If the file cannot be read, holds secrets that others can read, or is malformed; or if
            the study is not complete. The text names the file.
        """
        peers = Peers.load(path)
        try:
            return peers.study()
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def simulated(cls, names: Sequence[str], run: str, groups: int = 0) -> Study:
        """Return the study of a simulation, whose members have the keys of `Identity.simulated`.

        Parameters
        ----------
        names : sequence of str
        run : str
        groups : int
            Into how many groups members are parted, one after the other; 0 for none.

        Raises
        ------
        InputError
            As in `Study`.
        """
        members = {name: Identity.simulated(name, run).public for name in names}
        parted = [sorted(names)[first::groups] for first in range(groups)]
        return cls.of("simulation", members, groups=parted)

    @property
    def threshold(self) -> int:
        """Shares that open a mask, and signatures that a set needs: t = (n + c) // 2 + 1.

        Two sets with so many signers each have an honest one in common.
        """
        return (len(self.members) + self.colluders) // 2 + 1

    @property
    def needed(self) -> int:
        """Members, at least, of a set whose sum is opened: max(t, least + c)."""
        return max(self.threshold, self.least + self.colluders)

    @property
    def tolerated(self) -> int:
        """Members that may be lost in a round: n - `needed`."""
        return len(self.members) - self.needed

    @property
    def sums(self) -> Groups:
        """The sets of members whose training is summed: the groups, or all members."""
        return self.groups or (tuple(self.members),)

    @property
    def named_groups(self) -> dict[str, tuple[str, ...]]:
        """The groups by their names, which follow from their order: A, B and so on."""
        return {group_name(index): group for index, group in enumerate(self.groups)}

    @property
    def grouping(self) -> bytes:
        """Digest of all groups, by which members compare theirs; empty if there are none."""
        return digest([list(group) for group in self.groups]) if self.groups else b""

    def group_of(self, name: str) -> str:
        """Return the name of a member's group; empty if there are none.

        Raises
        ------
        InputError
            If there is no such member.
        """
        if name not in self.members:
            raise InputError(
                f"{name} is no member of the study {self.name}; its members: "
                f"{', '.join(self.members)}"
            )
        return next((key for key, group in self.named_groups.items() if name in group), "")

    def within(self, group: str) -> Study:
        """Return the study as it would be with the members of a group alone.

        Parameters
        ----------
        group : str
            Name of a group. Empty gives back the whole study.
        """
        if not group:
            return self
        names = self.named_groups[group]
        members = {name: self.members[name] for name in names}
        secrets = {name: self.secrets[name] for name in names if name in self.secrets}
        return Study(self.name, members, self.least, self.colluders, secrets=secrets)

    def content(self) -> dict[str, Any]:
        """Return the study as plain values, without secrets: what a digest holds."""
        return {
            "name": self.name,
            "members": dict(self.members),
            "least": self.least,
            "c": self.colluders,
            "groups": [list(group) for group in self.groups],
        }


@dataclass(frozen=True)
class Peers:
    """What a peers file says, also while the study lacks members or they lack groups.

    Attributes
    ----------
    name, members, groups, secrets
        As in `Study`.
    least, colluders : int or None
        As in `Study`; None if the file leaves it to the default.

    Raises
    ------
    InputError
        If a name, a key or a secret is not allowed.
    """

    name: str
    members: Mapping[str, bytes]
    least: int | None = None
    colluders: int | None = None
    groups: Groups = ()
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        require_name(self.name, "a study's name")
        _require_members(self.members)
        _require_secrets(self.secrets, self.members)

    @classmethod
    def load(cls, path: Path) -> Peers:
        """Read a peers file.

        Raises
        ------
        InputError
            If the file cannot be read, holds secrets that others can read, or is malformed. The
            text names the file.
        """
        content, mode = read_toml(path, _MADE)
        try:
            peers = cls._of_table(content)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if peers.secrets:
            require_private(path, mode)
        return peers

    @classmethod
    def _of_table(cls, content: dict[str, Any]) -> Peers:
        table = content.get("study")
        if not isinstance(table, dict) or len(content) > 1:
            raise InputError(f"it must hold the table [study], and nothing else: {_MADE}")
        unknown = [key for key in table if key not in _FIELDS]
        if unknown:
            raise InputError(
                f"[study] holds {', '.join(unknown)}, which means nothing; it may hold "
                f"{', '.join(_FIELDS)}"
            )
        groups = table.get("groups", [])
        if not isinstance(groups, list) or not all(map(_is_names, groups)):
            raise InputError(f"groups must be a list of lists of names, got {groups!r}")
        keys = _texts(table, "members")
        secrets = _texts(table, "secrets")
        return cls(
            name=table.get("name", ""),
            members={name: _named(name, key_of, text) for name, text in keys.items()},
            least=_number(table, "least", LEAST),
            colluders=_number(table, "c", 0),
            groups=tuple(map(tuple, groups)),
            secrets={name: _named(name, _secret_of, text) for name, text in secrets.items()},
        )

    def save(self, path: Path) -> None:
        """Write a peers file; one with secrets can be read by its owner alone.

        Raises
        ------
        InputError
            If the file cannot be written.
        """
        table: dict[str, Any] = {"name": self.name}
        if self.least is not None:
            table["least"] = self.least
        if self.colluders is not None:
            table["c"] = self.colluders
        if self.groups:
            table["groups"] = [list(group) for group in self.groups]
        table["members"] = {name: key_text(key) for name, key in sorted(self.members.items())}
        if self.secrets:
            table["secrets"] = {
                name: base64.b64encode(secret).decode() for name, secret in self.secrets.items()
            }
        data = tomli_w.dumps({"study": table}).encode()
        write_whole(Path(os.path.realpath(path)), data, private=bool(self.secrets))

    @property
    def sums(self) -> Groups:
        """The sets of members of which sums are made; none while the study is too small."""
        if len(self.members) < LEAST:
            return ()
        return self.groups or (tuple(self.members),)

    @property
    def fewest(self) -> int:
        """Members, at least, of a sum: least + c."""
        least = LEAST if self.least is None else self.least
        usual = _usual_colluders(len(self.members))
        return least + (usual if self.colluders is None else self.colluders)

    def study(self) -> Study:
        """Return the study.

        Raises
        ------
        InputError
            As in `Study`, such as if members are missing.
        """
        least = LEAST if self.least is None else self.least
        return Study.of(self.name, self.members, least, self.colluders, self.groups, self.secrets)


def differences(before: Groups, after: Groups, fewest: int) -> list[Groups]:
    """Return the differences of sums before and after a change that hold few members' figures.

    If the same question is asked before and after, whoever knows the sums of both can subtract
    some from others. What is left are figures of the members that are in one and not in the other.

    Parameters
    ----------
    before, after : tuple of tuple of str
        The sets of members of which sums are made: `sums` of a `Study` or of `Peers`.
    fewest : int
        Members, at least, of a sum.

    Returns
    -------
    list of (tuple of str, tuple of str)
        Members whose figures a difference adds, and whose it subtracts: together fewer than
        `fewest`. Each member that is in any such difference is in one of these, unless it was in a
        sum of so few before.

    Notes
    -----
    A graph has a node for each sum and one for nothing; each member joins the sum that it was in
    with the one that it is in now. A difference of sums holds the figures of the members that join
    a set of nodes with the rest, a cut. So a member is in a difference of few if the smallest cut
    between its two nodes is small (found by augmenting paths: Ford and Fulkerson 1956).

    Examples
    --------
    >>> before = (("a", "b", "c"), ("d", "e", "f"))
    >>> after = (("a", "b", "d"), ("c", "e", "f"))
    >>> differences(before, after, 3)
    [(('c',), ('d',))]
    """
    old = {name: ("before", index) for index, group in enumerate(before) for name in group}
    new = {name: ("after", index) for index, group in enumerate(after) for name in group}
    ends = {name: (old.get(name, _NOTHING), new.get(name, _NOTHING)) for name in sorted(old | new)}
    known = {frozenset(group) for group in before}
    found: list[Groups] = []
    for source, target in dict.fromkeys(ends.values()):
        side = _side_of_cut(list(ends.values()), source, target, fewest)
        if side is None:
            continue
        cut = {name: (one in side, other in side) for name, (one, other) in ends.items()}
        added = tuple(name for name, sides in cut.items() if sides == (True, False))
        subtracted = tuple(name for name, sides in cut.items() if sides == (False, True))
        # The sign of a difference means nothing: first those of whom there are more.
        pair = (added, subtracted) if len(added) >= len(subtracted) else (subtracted, added)
        by_itself = frozenset(pair[0]) in known and not pair[1]
        if not by_itself and pair not in found and pair[::-1] not in found:
            found.append(pair)
    return found


_Node = tuple[str, int]
_NOTHING: _Node = ("nothing", 0)


def _side_of_cut(
    edges: Sequence[tuple[_Node, _Node]], source: _Node, target: _Node, most: int
) -> set[_Node] | None:
    """Return the source's side of the smallest cut, or None if it has `most` edges or more."""
    room: dict[_Node, dict[_Node, int]] = {}
    for one, other in edges:
        for start, end in ((one, other), (other, one)):
            nexts = room.setdefault(start, {})
            nexts[end] = nexts.get(end, 0) + 1
    for _ in range(most):
        came_from = {source: source}
        waiting = [source]
        for node in waiting:
            for end, left in room[node].items():
                if left and end not in came_from:
                    came_from[end] = node
                    waiting.append(end)
        if target not in came_from:
            return {*came_from}
        node = target
        while node != source:
            room[came_from[node]][node] -= 1
            room[node][came_from[node]] += 1
            node = came_from[node]
    return None


def group_name(index: int) -> str:
    """Return the name of a group by its place in their order, from 0.

    Examples
    --------
    >>> [group_name(index) for index in (0, 1, 25, 26, 27)]
    ['A', 'B', 'Z', 'AA', 'AB']
    """
    rest, last = divmod(index, len(ascii_uppercase))
    return (group_name(rest - 1) if rest else "") + ascii_uppercase[last]


def place_of(group: str) -> int:
    """Return the place of a group by its name, from 1; 0 for the empty name.

    Examples
    --------
    >>> [place_of(group_name(index)) for index in (0, 25, 26, 84)], place_of("")
    ([1, 26, 27, 85], 0)
    """
    place = 0
    for letter in group:
        place = place * len(ascii_uppercase) + ascii_uppercase.index(letter) + 1
    return place


def _usual_colluders(members: int) -> int:
    return 1 if members > LEAST else 0


def _require_members(members: Mapping[str, bytes]) -> None:
    """Refuse members of whom two could be mistaken for each other."""
    names: dict[str, str] = {}
    keys: dict[bytes, str] = {}
    for name, key in members.items():
        require_name(name, "a member's name")
        if len(key) != KEY_BYTES:
            raise InputError(f"{name}: a public key must have {KEY_BYTES} bytes, got {len(key)}")
        folded = unicodedata.normalize("NFC", name.casefold())
        if folded in names:
            raise InputError(
                f"{names[folded]} and {name} differ in upper and lower case only: one of them must "
                "have another name"
            )
        if key in keys:
            raise InputError(
                f"{keys[key]} and {name} have one key, {key_text(key)}: each must have its own; "
                "ask both by phone"
            )
        names[folded] = name
        keys[key] = name


def _require_secrets(secrets: Mapping[str, bytes], members: Mapping[str, bytes]) -> None:
    for name, secret in secrets.items():
        if name not in members:
            raise InputError(f"secrets hold one for {name}, which is no member: remove it")
        if len(secret) < _FEWEST_SECRET_BYTES:
            raise InputError(
                f"{name}: a secret must have at least {_FEWEST_SECRET_BYTES} bytes, got "
                f"{len(secret)}"
            )


def _require_number(key: str, value: object, fewest: int) -> None:
    if type(value) is not int or value < fewest:
        raise InputError(f"{key} must be a whole number, at least {fewest}, got {value!r}")


def _number(table: Mapping[str, Any], key: str, fewest: int) -> int | None:
    value = table.get(key)
    if value is None:
        return None
    _require_number(key, value, fewest)
    return int(value)


def _texts(table: Mapping[str, Any], key: str) -> dict[str, str]:
    texts = table.get(key, {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise InputError(f"[study.{key}] must be a table of texts, one for each member")
    return texts


def _named(name: str, read: Callable[[str], bytes], text: str) -> bytes:
    """Read a text of a member; an error names the member."""
    try:
        return read(text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _secret_of(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        # Without the text, which is a secret.
        raise InputError("a secret must be base64") from None


def _is_names(group: object) -> bool:
    return isinstance(group, list) and all(isinstance(name, str) for name in group)
