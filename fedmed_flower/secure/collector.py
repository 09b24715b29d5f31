"""The server's side of a secure sum: masked vectors added, one set opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.problems: dict[str, str] = {}
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
                    raise SecureError(f"{one} and {other} disagree about their common mask")
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
        lost = [name for name in record.names if name not in members]
        helpers = sorted(self._answers)[: record.threshold]
        coordinates = [record.coordinate(name) for name in helpers]
        seeds = self._joined(
            [[self._answers[helper]["self"][name] for name in members] for helper in helpers],
            coordinates,
        )
        added: list[bytes] = []
        subtracted: list[bytes] = []
        for name, seed in zip(members, seeds, strict=True):
            if commitment(seed, SELF, name, name) != chosen.letters[name].commitments[name]:
                raise SecureError(f"the shares of {name}'s seed make another seed")
            subtracted.append(seed)
        for name in members:
            for gone, seed in self._pairs(name, lost, helpers, coordinates).items():
                committed = chosen.letters[name].commitments[gone]
                if commitment(seed, PAIR, name, gone) != committed:
                    raise SecureError(f"the shares of {name}'s seed with {gone} make another seed")
                (subtracted if gone > name else added).append(seed)
        words = (chosen.words[0].copy(), chosen.words[1].copy())
        for index, vector in enumerate(vectors(words)):
            add_streams(vector, added, subtracted, index)
        return words

    def _pairs(
        self, name: str, lost: list[str], helpers: list[str], coordinates: list[int]
    ) -> dict[str, bytes]:
        """Return a member's seeds with the lost hospitals: its own words, or from shares."""
        if name in self._answers:
            return dict(self._answers[name]["pairs"])
        told = [self._answers[helper]["shares"][name] for helper in helpers]
        rows = [[shares[gone] for gone in lost] for shares in told]
        return dict(zip(lost, self._joined(rows, coordinates), strict=True))

    @staticmethod
    def _joined(rows: list[list[bytes]], coordinates: list[int]) -> list[bytes]:
        if not rows or not rows[0]:
            return []
        flat = np.frombuffer(b"".join(piece for row in rows for piece in row), np.uint8)
        joined: NDArray[np.uint8] = join(flat.reshape(len(rows), -1, SEED_BYTES), coordinates)
        return [row.tobytes() for row in joined]


def _require_bytes(
    values: object, names: Iterable[str], what: str, length: int | None = None
) -> None:
    """Raise `SecureError` unless there are bytes, of a length if it is given, for each name."""
    if not isinstance(values, Mapping) or values.keys() != {*names}:
        raise SecureError(f"its {what} are of other hospitals than those asked for")
    for value in values.values():
        if not isinstance(value, bytes) or (length is not None and len(value) != length):
            raise SecureError(f"one of its {what} has a wrong length")
