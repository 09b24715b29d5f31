"""What differs between the audit trails of several hospitals and a server, in plain words.

A trail says what its owner wrote down. Hospitals that were told the same by an honest server have
trails in which nothing differs, also where messages were lost or a round was tried again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from fedmed_flower.errors import shown
from fedmed_flower.secure.audit import HOSPITAL, KEY, SERVER, START, Entry

_MOST_NAME = 64
_HEAD_LETTERS = 12
# What two hospitals may have been told differently, and what the server must have done.
_SEVERAL = {
    "model": "models",
    "list of hospitals": "lists of hospitals",
    "question": "questions",
    "record": "records",
}
_SERVER_DID = {
    "model": "the server swapped one of them",
    "list of hospitals": "the server named other hospitals to each",
    "question": "the server asked them for different things, or with different settings",
    "record": "the server asked them differently, or each of them missed another attempt",
}


class Place(NamedTuple):
    """Where in a study something was asked."""

    run: str
    round: int
    purpose: str = "train"
    group: str = ""

    def __str__(self) -> str:
        purpose = "" if self.purpose == "train" else f" ({_short(self.purpose)})"
        group = f" of group {_short(self.group)}" if self.group else ""
        return f"round {self.round}{purpose}{group} of run {_short(self.run)}"


class _Told(NamedTuple):
    """What an owner says that hospitals were told under one digest."""

    place: Place
    digest: str
    names: tuple[str, ...]
    model: str
    question: str

    @property
    def content(self) -> tuple[object, ...]:
        """What another attempt at the same, which has another digest, has too."""
        return (self.names, self.question) if self.question else (self.digest,)


_Contents = dict[tuple[object, ...], _Told]


class _Opened(NamedTuple):
    """What one trail says of the opening of a sum over one set."""

    digest: str
    place: Place
    label: str


_Sums = dict[frozenset[str], list[_Opened]]


class _Trail:
    """The entries of one trail by what they say.

    Parameters
    ----------
    label : str
        Name of the trail in the texts.
    entries : sequence of Entry
    questions : mapping of str to str
        By the digest of a record, the question that a hospital had with it. A server does not know
        the whole question, which holds the hospitals' code.
    """

    def __init__(self, label: str, entries: Sequence[Entry], questions: Mapping[str, str]) -> None:
        self.label = label
        self.entries = entries
        about = entries[0].about if entries and entries[0].kind == KEY else {}
        self.who = about.get("who", label)
        self.role = about.get("role", HOSPITAL)
        self.heads = {entry.head.hex() for entry in entries}
        self.runs = {run for run, _ in rounds_of(entries)}
        self.masked = {entry.about["digest"] for entry in entries if entry.kind == "masked"}
        known = questions if self.role == SERVER else {}
        self.told = [_told(entry, known) for entry in entries if entry.kind == "sent"]
        self.opened = [entry for entry in entries if entry.kind == "opened"]
        self._at: dict[Place, _Contents] = {}
        for told in self.told:
            self._at.setdefault(told.place, {})[told.content] = told

    def at(self, place: Place) -> _Contents:
        """Return what was told at a place, by its content."""
        return self._at.get(place, {})


def rounds_of(entries: Iterable[Entry]) -> set[tuple[str, int]]:
    """Return runs and rounds of which a trail says something; round 0 is the run's beginning."""
    found = set()
    for entry in entries:
        run = entry.about.get("run")
        number = entry.about.get("round", 0)
        if isinstance(run, str) and isinstance(number, int):
            found.add((run, number))
    return found


def compare(chains: Mapping[str, Sequence[Entry]]) -> list[str]:
    """Return what differs between trails, each of which `verify` has found to be whole.

    Parameters
    ----------
    chains : mapping of str to sequence of Entry
        Entries by the name that stands in the texts. Whose they are, their first entry says.

    Returns
    -------
    list of str
        A sentence for each thing that differs; empty if nothing does.
    """
    questions: dict[str, str] = {}
    for entry in (entry for entries in chains.values() for entry in entries):
        if entry.kind == "sent" and entry.about.get("question"):
            questions.setdefault(entry.about["digest"], entry.about["question"])
    trails = [_Trail(label, entries, questions) for label, entries in chains.items()]
    hospitals = [trail for trail in trails if trail.role != SERVER]
    servers = [trail for trail in trails if trail.role == SERVER]
    return [
        *_rewritten(trails, hospitals),
        *_told_apart(hospitals, servers),
        *_hidden_rounds(hospitals, servers),
        *_unlike_records(trails),
        *_unlike_sums(trails),
        *_missing_parts(trails, hospitals),
    ]


def _rewritten(trails: Sequence[_Trail], hospitals: Sequence[_Trail]) -> Iterator[str]:
    """Find trails of which another trail knew other lines."""
    for one, other in combinations(trails, 2):
        if not one.entries or not other.entries or one.entries[0].head != other.entries[0].head:
            continue
        pairs = zip(one.entries, other.entries, strict=False)
        for line, (first, second) in enumerate(pairs, start=1):
            if first.head != second.head:
                yield (
                    f"{one.label} and {other.label} are copies of one trail that differ from line "
                    f"{line} on: one of them was rewritten"
                )
                break
    known: dict[str, set[str]] = {}
    for trail in hospitals:
        known.setdefault(trail.who, {START.hex()}).update(trail.heads)
    for trail in trails:
        named = set()
        for line, entry in enumerate(trail.entries, start=1):
            for who, head in entry.about.get("heads", {}).items():
                if head and who in known and head not in known[who] and who not in named:
                    named.add(who)
                    yield (
                        f"{trail.label} was told the head {_short(head[:_HEAD_LETTERS])}... of the "
                        f"trail of {_short(who)} (line {line} of the trail of {trail.label}), "
                        f"which is not in the trail of {_short(who)}: it was rewritten, or its end "
                        "was cut off"
                    )


def _told_apart(hospitals: Sequence[_Trail], servers: Sequence[_Trail]) -> Iterator[str]:
    """Find what one hospital was told in place of what another one was told."""
    for place in _places(hospitals):
        groups: dict[frozenset[tuple[object, ...]], list[_Trail]] = {}
        for trail in hospitals:
            groups.setdefault(frozenset(trail.at(place)), []).append(trail)
        alike = list(groups.values())
        for some, others in combinations(alike, 2):
            what = _what_differs(some[0].at(place), others[0].at(place))
            if what is None:
                continue
            if len(some) == len(others) == 1:
                start = f"{_listed([*some, *others])} were told different {_SEVERAL[what]}"
            else:
                start = f"{_listed(some)} {_was(some)} told another {what} than {_listed(others)}"
            yield f"{start} in {place}: {_SERVER_DID[what]}"
        for server in servers:
            for some in alike:
                what = _what_differs(server.at(place), some[0].at(place))
                if what is not None:
                    yield (
                        f"the trail of {server.label} shows another {what} in {place} than "
                        f"{_listed(some)} {_was(some)} told"
                    )


def _what_differs(one: _Contents, other: _Contents) -> str | None:
    """Return what differs if each side was told something that the other was not."""
    only_one = [told for content, told in one.items() if content not in other]
    only_other = [told for content, told in other.items() if content not in one]
    if not only_one or not only_other:
        # One side lost a message.
        return None
    if {told.model for told in only_one}.isdisjoint(told.model for told in only_other):
        return "model"
    if {told.names for told in only_one}.isdisjoint(told.names for told in only_other):
        return "list of hospitals"
    return "question" if all(told.question for told in only_one + only_other) else "record"


def _hidden_rounds(hospitals: Sequence[_Trail], servers: Sequence[_Trail]) -> Iterator[str]:
    """Find what a hospital was told and the server's trail does not show."""
    for server in servers:
        sent = {told.digest for told in server.told}
        hidden: dict[Place, list[_Trail]] = {}
        for trail in hospitals:
            unknown = [told.place for told in trail.told if told.digest not in sent]
            for place in dict.fromkeys(unknown):
                if place.run in server.runs:
                    hidden.setdefault(place, []).append(trail)
        for place, trails in sorted(hidden.items()):
            if not server.at(place):
                yield f"{server.label} shows no {place} that {_listed(trails)} took part in"
                continue
            # Those that were told something else instead have been named.
            rest = [
                trail for trail in trails if not _what_differs(server.at(place), trail.at(place))
            ]
            if rest:
                yield (
                    f"the trail of {server.label} does not show all that {_listed(rest)} "
                    f"{_was(rest)} told in {place}"
                )


def _unlike_records(trails: Sequence[_Trail]) -> Iterator[str]:
    """Find one digest of which two trails say different things."""
    first: dict[str, tuple[_Told, _Trail]] = {}
    for trail in trails:
        for told in dict.fromkeys(trail.told):
            before, owner = first.setdefault(told.digest, (told, trail))
            if told != before:
                yield (
                    f"{owner.label} has {before.place} and {trail.label} {told.place} under one "
                    f"digest, with different {_unlike(before, told)}: one of them does not say "
                    "what was told"
                )


def _unlike(one: _Told, other: _Told) -> str:
    """Name the fields that differ."""
    words = {"place": "rounds", "names": "names", "model": "models", "question": "questions"}
    return in_words(
        [word for field, word in words.items() if getattr(one, field) != getattr(other, field)]
    )


def _unlike_sums(trails: Sequence[_Trail]) -> Iterator[str]:
    """Find a sum, or a question, that was opened over two sets."""
    told = {each.digest: each for trail in trails for each in trail.told}
    sums: dict[str, _Sums] = {}
    questions: dict[str, _Sums] = {}
    for trail in trails:
        for entry in trail.opened:
            members = frozenset(entry.about["members"])
            opened = _Opened(entry.about["digest"], _place_of(entry, told), trail.label)
            sums.setdefault(opened.digest, {}).setdefault(members, []).append(opened)
            if opened.digest in told and told[opened.digest].question:
                question = told[opened.digest].question
                questions.setdefault(question, {}).setdefault(members, []).append(opened)
    for sets in sums.values():
        if len(sets) > 1:
            over = [
                f"over {_names(members)} (by the trail of "
                f"{in_words(list(dict.fromkeys(each.label for each in opened)))})"
                for members, opened in sets.items()
            ]
            place = next(iter(sets.values()))[0].place
            yield f"{place} was opened {' and '.join(over)}: {_difference(sets)}"
    for every in questions.values():
        # Each group answers a question for itself.
        sets = {
            members: opened
            for members, opened in every.items()
            if any(members & other for other in every if other != members)
        }
        # Two sets of one digest have been named already.
        if len(sets) > 1 and len({each.digest for opened in sets.values() for each in opened}) > 1:
            over = [
                f"over {_names(members)} in {opened[0].place}" for members, opened in sets.items()
            ]
            yield f"one question was opened {' and '.join(over)}: {_difference(sets)}"


def _difference(sets: Iterable[frozenset[str]]) -> str:
    """Say whose figures the difference of two sums is."""
    listed = list(sets)
    apart = frozenset.union(*listed) - frozenset.intersection(*listed)
    return f"the difference of the sums is of {_names(apart)}"


def _missing_parts(trails: Sequence[_Trail], hospitals: Sequence[_Trail]) -> Iterator[str]:
    """Find hospitals over which a sum was opened and whose trails do not show their part."""
    told = {each.digest: each for trail in trails for each in trail.told}
    masked: dict[str, set[str]] = {}
    runs: dict[str, set[str]] = {}
    for hospital in hospitals:
        masked.setdefault(hospital.who, set()).update(hospital.masked)
        runs.setdefault(hospital.who, set()).update(hospital.runs)
    named = set()
    for trail in trails:
        for entry in trail.opened:
            digest = entry.about["digest"]
            run = entry.about["run"]
            for who in entry.about["members"]:
                if who not in masked or digest in masked[who]:
                    continue
                whole_run = run not in runs[who]
                hidden = (who, run if whole_run else digest)
                if hidden in named:
                    continue
                named.add(hidden)
                place = _place_of(entry, told)
                what = f"nothing of run {_short(run)}" if whole_run else f"no part in {place}"
                yield (
                    f"the trail of {_short(who)} shows {what}, and by the trail of {trail.label} a "
                    "sum over its figures was opened there"
                )


def _place_of(entry: Entry, told: Mapping[str, _Told]) -> Place:
    """Return where a sum was opened, with its purpose if that is known."""
    known = told.get(entry.about["digest"])
    return known.place if known else Place(entry.about["run"], entry.about["round"])


def _places(trails: Iterable[_Trail]) -> list[Place]:
    return sorted({told.place for trail in trails for told in trail.told})


def _told(entry: Entry, questions: Mapping[str, str]) -> _Told:
    about = entry.about
    question = about.get("question") or questions.get(about["digest"], "")
    return _Told(
        Place(about["run"], about["round"], about["purpose"], about.get("group", "")),
        about["digest"],
        tuple(about["names"]),
        about.get("model", ""),
        question,
    )


def _was(trails: Sequence[_Trail]) -> str:
    return "was" if len(trails) == 1 else "were"


def _listed(trails: Iterable[_Trail]) -> str:
    return in_words([trail.label for trail in trails])


def _names(names: Iterable[str]) -> str:
    return in_words([_short(name) for name in sorted(names)])


def in_words(names: Sequence[str]) -> str:
    """Return names as a list in words: "north, south and west"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _short(text: str, most: int = _MOST_NAME) -> str:
    return shown(text, most)
