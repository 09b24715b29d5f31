"""What a server tells all hospitals alike before a sum: who takes part, and by which rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from fedmed_flower.errors import shown
from fedmed_flower.secure.encoding import SecureError, Value, decoded, digest, encoded
from fedmed_flower.secure.identity import verify
from fedmed_flower.secure.ring import Layout
from fedmed_flower.secure.streams import SUITE
from fedmed_flower.secure.study import MOST_GROUPS, group_name

TRAIN = "train"
DATA = "data"

_KEY_BYTES = 32
# Decoding takes thirty times as much memory.
_MOST_BYTES = 1 << 23
_MOST_NAME = 200


@dataclass(frozen=True)
class Hello:
    """What a hospital says of itself once a run, signed with its long-term key.

    Attributes
    ----------
    study, run, name : str
    key : bytes
        Its long-term Ed25519 key.
    run_key : bytes
        Its X25519 key of this run.
    members : int
        Number of members of its study, itself included.
    least : int
        The fewest honest hospitals in a sum that it takes part in.
    colluders : int
        How many of the others may work with the server.
    tells : bool
        Whether it tells its own figures too; it then counts like a colluder.
    rows : int
        Entries of its book, which only grow.
    book : str
        The random id of its book.
    head : bytes
        The last entry of its audit trail; empty if it keeps none.
    signature : bytes
    group : str
        Name of its group in the study; empty if there are none.
    group_members : int
        Number of members of its group, itself included; 0 if there are no groups.
    groups : int
        Number of groups of its study.
    grouping : bytes
        `Study.grouping`.
    """

    study: str
    run: str
    name: str
    key: bytes
    run_key: bytes
    members: int
    least: int
    colluders: int
    tells: bool
    rows: int
    book: str
    head: bytes = b""
    signature: bytes = b""
    suite: int = SUITE
    group: str = ""
    group_members: int = 0
    groups: int = 0
    grouping: bytes = b""

    def content(self) -> bytes:
        """Return the bytes that are signed."""
        fields = {name: value for name, value in vars(self).items() if name != "signature"}
        return encoded(fields)

    def signed(self, signature: bytes) -> Self:
        """Return this hello with its signature."""
        return replace(self, signature=signature)

    def verify(self) -> None:
        """Raise `SecureError` if the signature is not by the key that it names."""
        verify(self.key, "hello", self.content(), self.signature, f"the hello of {self.name}")

    def values(self) -> dict[str, Value]:
        """Return all fields as plain values."""
        return dict(vars(self))

    @classmethod
    def of(cls, values: object) -> Self:
        """Return the hello of plain values.

        Raises
        ------
        SecureError
            If a field is missing, unknown or of a wrong type.
        """
        hello: Self = _made(cls, values, "a hello")
        if len(hello.key) != _KEY_BYTES or len(hello.run_key) != _KEY_BYTES:
            raise SecureError(f"the hello of {_short(hello.name)} has keys of a wrong length")
        if hello.suite != SUITE:
            raise SecureError(
                f"the hello of {_short(hello.name)} is of suite {hello.suite}, not {SUITE}"
            )
        if min(hello.least, hello.colluders, hello.rows, hello.group_members) < 0:
            raise SecureError(f"the hello of {_short(hello.name)} has a number below 0")
        if not 0 <= hello.groups <= MOST_GROUPS:
            raise SecureError(
                f"a study has at most {MOST_GROUPS} groups, and by the hello of "
                f"{_short(hello.name)} {hello.groups}"
            )
        if hello.group not in (map(group_name, range(hello.groups)) if hello.groups else [""]):
            raise SecureError(
                f"by the hello of {_short(hello.name)} it is in group {_short(hello.group)!r}, and "
                f"there are {hello.groups} groups"
            )
        return hello


@dataclass(frozen=True)
class Record:
    """The rules of one sum, the same for every hospital in it.

    Attributes
    ----------
    study, run : str
    purpose : str
        What is summed, such as ``train``, ``val`` or ``count``.
    kind : {"train", "data"}
        Whether the members may change from one sum to the next.
    server_round : int
    nonce : bytes
        Drawn for this sum.
    hellos : tuple of Hello
        By name. A hospital's place in them, from 1, is its coordinate in shared secrets.
    members : int
        Number of the study's members, also of those that take no part.
    threshold, least, colluders : int
        The largest of all hospitals' wishes, and the threshold that follows.
    layout : Layout
        What is summed.
    weighting : dict
        How a hospital's part is weighted, as plain values.
    group : str
        Name of the group of the study whose members alone are summed; empty for the whole study.
    """

    study: str
    run: str
    purpose: str
    kind: str
    server_round: int
    nonce: bytes
    hellos: tuple[Hello, ...]
    members: int
    threshold: int
    least: int
    colluders: int
    layout: Layout
    weighting: Mapping[str, Value]
    group: str = ""

    @classmethod
    def of_hellos(cls, hellos: Sequence[Hello], group: str = "", **fields: Any) -> Self:
        """Return the record of the hospitals that said hello.

        Parameters
        ----------
        hellos : sequence of Hello
            At least one; those that name other members than the rest will refuse it.
        group : str
            The group that they are in, if it is summed by itself.
        **fields
            The other attributes, but those that follow from the hellos.
        """
        listed = tuple(sorted(hellos, key=lambda hello: hello.name))
        least = max(hello.least for hello in listed)
        colluders = max(hello.colluders for hello in listed)
        members = max(hello.members for hello in listed)
        together = max(_together(hello, group) for hello in listed)
        return cls(
            study=listed[0].study,
            run=listed[0].run,
            hellos=listed,
            members=members,
            threshold=threshold_of(together, colluders),
            least=least,
            colluders=colluders,
            group=group,
            **fields,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The hospitals that the sum may be over."""
        return tuple(hello.name for hello in self.hellos)

    @property
    def needed(self) -> int:
        """The fewest hospitals over which a sum may be opened."""
        return max(self.threshold, self.least + self.colluders)

    @property
    def noted_group(self) -> dict[str, str]:
        """What an entry of an audit trail says of the group; empty if there is none."""
        return {"group": self.group} if self.group else {}

    def coordinate(self, name: str) -> int:
        """Return where a hospital's shares are taken; from 1."""
        return self.names.index(name) + 1

    def hello_of(self, name: str) -> Hello:
        """Return what a hospital of this record has said."""
        return self.hellos[self.names.index(name)]

    def require_enough(self, members: Sequence[str]) -> None:
        """Raise `SecureError` if a sum over some hospitals would tell too much.

        Those that tell their own figures, and as many as may work with the server, do not hide the
        others: `least` must remain. In a study with groups they must also remain of each group that
        has hospitals in the sum. Rows are counted by group, so what a larger sum of the same rows
        tells of the rest of a group is then the figure of enough hospitals too.

        Raises
        ------
        TooFewOfGroupError
            If that holds but for some groups.
        SecureError
        """
        if len(members) < self.needed:
            raise SecureError(
                f"a sum must be over at least {self.needed} hospitals, and this one is over "
                f"{len(members)} ({', '.join(members)})"
            )
        silent = sum(not self.hello_of(name).tells for name in members)
        if silent - self.colluders < self.least:
            raise SecureError(
                f"of the hospitals in this sum {len(members) - silent} tell their own figures and "
                f"{self.colluders} may work with the server: fewer than {self.least} remain"
            )
        hellos = [self.hello_of(name) for name in members]
        if exposed := exposed_groups(hellos, self.least, self.colluders):
            raise TooFewOfGroupError(exposed, self.least, self.colluders)

    def values(self) -> dict[str, Value]:
        """Return all of it as plain values."""
        fields = dict(vars(self))
        fields["hellos"] = [hello.values() for hello in self.hellos]
        fields["layout"] = self.layout.content()
        fields["weighting"] = dict(self.weighting)
        return fields

    def to_bytes(self) -> bytes:
        """Return the bytes that travel."""
        return encoded(self.values())

    @classmethod
    def from_bytes(cls, data: object) -> Self:
        """Read the bytes that travelled.

        Raises
        ------
        SecureError
            If they are no record, or its fields contradict each other.
        """
        if not isinstance(data, bytes) or len(data) > _MOST_BYTES:
            raise SecureError(f"a record must be at most {_MOST_BYTES:,} bytes")
        values = decoded(data)
        if not isinstance(values, dict) or not isinstance(values.get("hellos"), list):
            raise SecureError("a record must list hellos")
        hellos = tuple(Hello.of(hello) for hello in values["hellos"])
        layout = Layout.of_content(values.get("layout"))
        record: Self = _made(cls, {**values, "hellos": hellos, "layout": layout}, "a record")
        if record.kind not in (TRAIN, DATA):
            raise SecureError(f"a record must be of kind {TRAIN} or {DATA}, got {record.kind!r}")
        if list(record.names) != sorted(set(record.names)) or not hellos:
            raise SecureError("a record must list each hospital once, in the order of the names")
        first = hellos[0]
        for hello in hellos:
            if (hello.study, hello.run) != (record.study, record.run):
                raise SecureError(f"the hello of {_short(hello.name)} is of another study or run")
            if hello.members != record.members:
                raise SecureError(
                    f"the study of {_short(hello.name)} has {hello.members} members, and that of "
                    f"the sum {record.members}"
                )
            if (hello.groups, hello.grouping) != (first.groups, first.grouping):
                raise SecureError(
                    f"the study of {_short(hello.name)} has other groups than that of "
                    f"{_short(first.name)}: compare the fingerprints of `fedmed keys show`"
                )
            if record.group and hello.group != record.group:
                where = f"group {hello.group}" if hello.group else "no group"
                raise SecureError(
                    f"{_short(hello.name)} is in {where} by its hello, and the sum is of group "
                    f"{_short(record.group)}"
                )
        if record.least != max(hello.least for hello in hellos):
            raise SecureError(f"least is {record.least}, which is not the largest of the hellos")
        if record.colluders != max(hello.colluders for hello in hellos):
            raise SecureError(f"c is {record.colluders}, which is not the largest of the hellos")
        together = max(_together(hello, record.group) for hello in hellos)
        threshold = threshold_of(together, record.colluders)
        if record.threshold != threshold:
            raise SecureError(
                f"the threshold is {record.threshold}; of {together} members, "
                f"{record.colluders} of whom may work with the server, it is {threshold}"
            )
        return record

    @property
    def fingerprint(self) -> bytes:
        """The digest of the record alone, by which audit trails are compared."""
        return digest(self.values())

    def digest(self, about: Mapping[str, Value]) -> bytes:
        """Return the digest of everything that decides the answer.

        Parameters
        ----------
        about : mapping
            What a hospital is about to use: model, settings, question, app.
        """
        return digest({"record": self.values(), "about": about})

    def question(self, asked: Mapping[str, Value]) -> bytes:
        """Return the digest of what is asked, whoever is asked, in whichever run and round.

        The group is no part of it: a hospital that is moved to another one answers a question for
        the hospitals of before, or not at all.

        Parameters
        ----------
        asked : mapping
            The part of `about` that does not change from one run or round to the next.
        """
        layout = self.layout.content()
        rules = [self.study, self.purpose, self.kind, layout, dict(self.weighting)]
        return digest({"rules": rules, "asked": asked})


def exposed_groups(hellos: Sequence[Hello], least: int, colluders: int) -> list[str]:
    """Return the groups of which too few hospitals are among some, and not none."""
    silent: dict[str, int] = {}
    for hello in hellos:
        silent[hello.group] = silent.get(hello.group, 0) + (not hello.tells)
    return sorted(group for group, count in silent.items() if count < least + colluders)


class TooFewOfGroupError(SecureError):
    """Of a group there are hospitals in a sum, and too few.

    Parameters
    ----------
    groups : sequence of str
        Their names.
    least, colluders : int
        As in `Record`.
    """

    def __init__(self, groups: Sequence[str], least: int, colluders: int) -> None:
        super().__init__(
            f"of group {' and of group '.join(groups)} at least least + c = {least} + "
            f"{colluders} hospitals that do not tell their own figures must be in the sum, or none"
        )
        self.groups = list(groups)


def _together(hello: Hello, group: str) -> int:
    """Return the number of members of which a sum can be: of a group, or of the study."""
    return hello.group_members if group else hello.members


def threshold_of(members: int, colluders: int) -> int:
    """Return how many shares open a secret: two sets of so many members share an honest one."""
    return (members + colluders) // 2 + 1


def _made(cls: type[Any], values: object, what: str) -> Any:
    """Make a dataclass of plain values, each of the type that its field has."""
    fields = cls.__dataclass_fields__
    if not isinstance(values, Mapping) or values.keys() != fields.keys():
        raise SecureError(f"{what} must have the fields {', '.join(fields)}")
    kinds = {"str": str, "bytes": bytes, "int": int, "bool": bool}
    for name, entry in fields.items():
        kind = kinds.get(str(entry.type))
        if kind is not None and type(values[name]) is not kind:
            raise SecureError(f"{name} of {what} must be of type {entry.type}")
    if "weighting" in fields and not isinstance(values["weighting"], Mapping):
        raise SecureError(f"weighting of {what} must be a mapping")
    return cls(**values)


def _short(name: str) -> str:
    return shown(name, _MOST_NAME)
