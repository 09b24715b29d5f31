"""The server's side of a secure sum: masked vectors added, one set opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.secure.encoding import SecureError, decoded
from fedmed_flower.secure.identity import verify
from fedmed_flower.secure.member import (
    PAIR,
    SEED_BYTES,
    SELF,
    certified,
    promise,
)
from fedmed_flower.secure.record import Record
from fedmed_flower.secure.ring import Words, vectors
from fedmed_flower.secure.shamir import join
from fedmed_flower.secure.streams import add_streams, commitment

_DIGEST_BYTES = 32
# Sets of helpers that are tried if the shares of the first do not fit.
_MOST_TRIES = 1_000


class SpoiltError(SecureError):
    """A hospital of a sum has sent what no honest one sends; nobody may know which one."""


@dataclass(frozen=True)
class Letter:
    """What came with a hospital's masked vectors, read and checked."""

    digest: bytes
    commitments: dict[str, bytes]
    envelopes: dict[str, bytes]


@dataclass
class _Told:
    """The hospitals that were told the same, and the sum of their vectors."""

    letters: dict[str, Letter] = field(default_factory=dict)
    words: Words | None = None


class Collector:
    """Adds the masked vectors of one sum, and opens it over one set of hospitals.

    Parameters
    ----------
    record : Record

    Attributes
    ----------
    problems : dict of str to str
        Why a hospital does not count, by name.
    doubts : dict of str to str
        What was wrong with a hospital's shares, by name, though the sum was opened without them.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.problems: dict[str, str] = {}
        self.doubts: dict[str, str] = {}
        self._told: dict[bytes, _Told] = {}
        self._certificates: dict[str, bytes] = {}
        self._answers: dict[str, dict[str, Any]] = {}

    def add(self, name: str, words: Words, letter: bytes) -> None:
        """Add the masked vectors of a hospital.

        Raises
        ------
        SecureError
            If they cannot be used; the text says why.
        """
        if any(name in told.letters for told in self._told.values()):
            raise SecureError("it has sent its vectors already")
        read = self._read(name, letter)
        sizes = self.record.layout.sizes
        for vector, size, kind in zip(vectors(words), sizes, (np.uint32, np.uint64), strict=True):
            if vector.dtype != kind or vector.shape != (size,):
                raise SecureError(
                    f"its vector must have {size} words of {np.dtype(kind)}, got "
                    f"{vector.shape} of {vector.dtype}"
                )
        told = self._told.setdefault(read.digest, _Told())
        told.letters[name] = read
        if told.words is None:
            told.words = (words[0].copy(), words[1].copy())
        else:
            np.add(told.words[0], words[0], out=told.words[0])
            np.add(told.words[1], words[1], out=told.words[1])

    def _read(self, name: str, letter: bytes) -> Letter:
        if name not in self.record.names:
            raise SecureError("it is not among the hospitals of this sum")
        values = decoded(letter)
        others = {*self.record.names} - {name}
        fields = {"digest", "commitments", "envelopes", "signature"}
        if not isinstance(values, dict) or values.keys() != fields:
            raise SecureError("its letter has other fields than a letter has")
        read = Letter(values["digest"], values["commitments"], values["envelopes"])
        if not isinstance(read.digest, bytes) or len(read.digest) != _DIGEST_BYTES:
            raise SecureError("its digest has a wrong length")
        _require_bytes(read.commitments, {*self.record.names}, "commitments")
        _require_bytes(read.envelopes, others, "envelopes")
        signed = promise(read.digest, read.commitments, read.envelopes)
        key = self.record.hello_of(name).key
        verify(key, "upload", signed, values["signature"], f"the letter of {name}")
        return read

    @property
    def members(self) -> list[str]:
        """The hospitals over which the sum can be opened: the most that were told the same."""
        return sorted(self._chosen.letters)

    @property
    def digest(self) -> bytes:
        """The digest by which they answer."""
        return next(key for key, told in self._told.items() if told is self._chosen)

    @property
    def _chosen(self) -> _Told:
        if not self._told:
            raise SecureError("no hospital has sent its vectors")
        return max(self._told.values(), key=lambda told: (len(told.letters), sorted(told.letters)))

    def settle(self) -> bool:
        """Decide which hospitals the sum is over; return whether all are in it.

        Raises
        ------
        SecureError
            If they are too few, or two of them disagree about their common seed.
        """
        members = self.members
        for told in self._told.values():
            if told is not self._chosen:
                for name in told.letters:
                    self.problems[name] = (
                        "it was told something else than the others, or has another version of "
                        "the app"
                    )
        letters = self._chosen.letters
        for one in members:
            for other in members:
                ours = letters[one].commitments[other]
                if one < other and ours != letters[other].commitments[one]:
                    raise SpoiltError(f"{one} and {other} disagree about their common mask")
        self.record.require_enough(members)
        return len(members) == len(self.record.names)

    def envelopes_for(self, name: str) -> dict[str, bytes]:
        """Return what the members of the set have addressed to one of them."""
        letters = self._chosen.letters
        return {peer: letters[peer].envelopes[name] for peer in letters if peer != name}

    def certify(self, name: str, signature: bytes) -> None:
        """Take a hospital's signature over the set.

        Raises
        ------
        SecureError
            If it is not one.
        """
        signed = certified(self.digest, self.members)
        key = self.record.hello_of(name).key
        verify(key, "alive", signed, signature, f"the set that {name} signed")
        self._certificates[name] = signature

    def certificate(self) -> dict[str, bytes]:
        """Return as many signatures over the set as each hospital demands.

        Raises
        ------
        SecureError
            If there are fewer.
        """
        if len(self._certificates) < self.record.threshold:
            raise SecureError(
                f"{len(self._certificates)} hospitals have signed who remains, and "
                f"{self.record.threshold} must"
            )
        names = sorted(self._certificates)[: self.record.threshold]
        return {name: self._certificates[name] for name in names}

    def answer(self, name: str, content: bytes) -> None:
        """Take a hospital's shares.

        Raises
        ------
        SecureError
            If they are not what was asked for.
        """
        values = decoded(content)
        members = {*self.members}
        lost = {*self.record.names} - members
        if name not in members:
            raise SecureError("it is not among the hospitals that were asked for shares")
        if not isinstance(values, dict) or values.keys() != {"self", "pairs", "shares"}:
            raise SecureError("its answer has other fields than an answer has")
        _require_bytes(values["self"], members, "shares", SEED_BYTES)
        _require_bytes(values["pairs"], lost, "seeds", SEED_BYTES)
        if not isinstance(values["shares"], dict) or values["shares"].keys() != members:
            raise SecureError("its answer lists other hospitals than the set")
        for shares in values["shares"].values():
            _require_bytes(shares, lost, "shares of seeds", SEED_BYTES)
        committed = self._chosen.letters[name].commitments
        for gone, seed in values["pairs"].items():
            if commitment(seed, PAIR, name, gone) != committed[gone]:
                raise SecureError(f"its seed with {gone} is not the one that it has masked with")
        self._answers[name] = values

    def open(self) -> Words:
        """Return the sum over the set, without any mask.

        Raises
        ------
        SecureError
            If too few hospitals have answered, or their shares make another seed.
        """
        record = self.record
        if len(self._answers) < record.threshold:
            raise SecureError(
                f"{len(self._answers)} hospitals have sent their shares, and {record.threshold} "
                "must"
            )
        chosen = self._chosen
        if chosen.words is None:
            raise SecureError("no hospital has sent its vectors")
        members = self.members
        masks = self._joined(SELF, {name: [name] for name in members})
        subtracted = [seeds[name] for name, seeds in masks.items()]
        added: list[bytes] = []
        lost = [name for name in record.names if name not in members]
        silent = [name for name in members if name not in self._answers]
        pairs = self._joined(PAIR, {name: lost for name in silent if lost})
        pairs |= {name: self._answers[name]["pairs"] for name in members if name not in silent}
        for name, seeds in pairs.items():
            for gone, seed in seeds.items():
                (subtracted if gone > name else added).append(seed)
        words = (chosen.words[0].copy(), chosen.words[1].copy())
        for index, vector in enumerate(vectors(words)):
            add_streams(vector, added, subtracted, index)
        return words

    def _joined(self, use: str, wanted: Mapping[str, list[str]]) -> dict[str, dict[str, bytes]]:
        """Return seeds of members from their shares: of each member, by the other's name.

        Raises
        ------
        SecureError
            If the shares of no set of helpers that was tried make the seed that was committed to.
        """
        helpers = sorted(self._answers)
        first = helpers[: self.record.threshold]
        places = [(name, other) for name, others in wanted.items() for other in others]
        joined: dict[str, dict[str, bytes]] = {name: {} for name in wanted}
        seeds = self._made_by(first, use, places) if places else []
        for (name, other), seed in zip(places, seeds, strict=True):
            if not self._fits(seed, use, name, other):
                seed = self._made_by_others(helpers, use, name, other)
            joined[name][other] = seed
        return joined

    def _made_by_others(self, helpers: list[str], use: str, name: str, other: str) -> bytes:
        """Return a seed from the shares of helpers without those that spoil it; note these."""
        most = len(helpers) - self.record.threshold
        left_out = (some for count in range(1, most + 1) for some in combinations(helpers, count))
        for without in islice(left_out, _MOST_TRIES):
            rest = [helper for helper in helpers if helper not in without]
            (seed,) = self._made_by(rest[: self.record.threshold], use, [(name, other)])
            if self._fits(seed, use, name, other):
                for helper in without:
                    self.doubts[helper] = (
                        f"its share of a seed of {name} is wrong, or {name} has dealt it a wrong "
                        "one: the sum was opened without it"
                    )
                return seed
        what = f"{name}'s seed" if use == SELF else f"{name}'s seed with {other}"
        raise SpoiltError(f"the shares of {what} make another seed")

    def _made_by(self, helpers: list[str], use: str, places: list[tuple[str, str]]) -> list[bytes]:
        """Return what the shares of helpers make."""
        told = [self._answers[helper] for helper in helpers]
        pieces = [
            values["self"][name] if use == SELF else values["shares"][name][other]
            for values in told
            for name, other in places
        ]
        flat = np.frombuffer(b"".join(pieces), np.uint8).reshape(len(told), -1, SEED_BYTES)
        coordinates = [self.record.coordinate(helper) for helper in helpers]
        joined: NDArray[np.uint8] = join(flat, coordinates)
        return [row.tobytes() for row in joined]

    def _fits(self, seed: bytes, use: str, name: str, other: str) -> bool:
        committed = self._chosen.letters[name].commitments[other]
        return commitment(seed, use, name, other) == committed


def _require_bytes(
    values: object, names: Iterable[str], what: str, length: int | None = None
) -> None:
    """Raise `SecureError` unless there are bytes, of a length if it is given, for each name."""
    if not isinstance(values, Mapping) or values.keys() != {*names}:
        raise SecureError(f"its {what} are of other hospitals than those asked for")
    for value in values.values():
        if not isinstance(value, bytes) or (length is not None and len(value) != length):
            raise SecureError(f"one of its {what} has a wrong length")
