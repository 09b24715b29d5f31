"""A hospital's side of a secure sum: hello, masking, the set of those who remain, its shares.

Nothing here trusts the server: each step checks what it is told against the hospital's own study
and book, and is written down before its answer leaves.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmed_flower.errors import shown
from fedmed_flower.secure.audit import Chain
from fedmed_flower.secure.book import Peer, SecureBook
from fedmed_flower.secure.encoding import SecureError, Value, decoded, digest_of_arrays, encoded
from fedmed_flower.secure.encoding import digest as digest_of
from fedmed_flower.secure.envelopes import seal, unseal
from fedmed_flower.secure.identity import Identity, verify
from fedmed_flower.secure.record import TRAIN, Hello, Record
from fedmed_flower.secure.ring import Layout, Words, vectors
from fedmed_flower.secure.shamir import split
from fedmed_flower.secure.streams import (
    add_streams,
    agreed_key,
    commitment,
    envelope_key,
    pair_seed,
)
from fedmed_flower.secure.study import Study

SEED_BYTES = 16
# Uses of seeds, in their commitments.
SELF = "self"
PAIR = "pair"
# Longer than a run waits for a hospital that was restarted.
KEPT_DAYS = 30
# Letters of a run's name, which the book keeps for good.
_MOST_RUN = 200
# Letters of a name that is shown.
_MOST_NAME = 64


@dataclass(frozen=True)
class Masked:
    """What leaves a hospital in the first exchange of a sum.

    Attributes
    ----------
    words : tuple of arrays
        Its vectors under all masks.
    letter : bytes
        Digest, commitments, envelopes and signature, encoded.
    """

    words: Words
    letter: bytes


class Member:
    """A hospital in secure sums.

    Parameters
    ----------
    identity : Identity
    study : Study
        Its own list of members.
    book : SecureBook
        Everything that it has promised.
    trail : Chain
        What it was told and has done, for whoever audits the study.
    """

    def __init__(self, identity: Identity, study: Study, book: SecureBook, trail: Chain) -> None:
        self.identity = identity
        self.study = study
        self.book = book
        self.trail = trail
        own = study.members.get(identity.name)
        if own is None:
            raise SecureError(f"{identity.name} is no member of the study {study.name}")
        if own != identity.public:
            raise SecureError(
                f"the study {study.name} has another key for {identity.name} than its key file"
            )

    @property
    def group(self) -> str:
        """Name of this hospital's group in the study; empty if there are none."""
        return self.study.group_of(self.identity.name)

    def hello(self, run: str, tells: bool = False) -> Hello:
        """Return the hello of a run, with a new key that voids the one before.

        The keys and seeds of runs that began nothing for `KEPT_DAYS` are erased: who steals this
        hospital's book later cannot take off the masks of what it sent.

        Raises
        ------
        SecureError
            If the name of the run is too long.
        """
        if not 0 < len(run) <= _MOST_RUN:
            raise SecureError(f"the name of a run has 1 to {_MOST_RUN} letters, got {len(run)}")
        for idle in self.book.idle_runs(KEPT_DAYS):
            if idle != run:
                self.book.close_run(idle)
        private = X25519PrivateKey.generate()
        public = private.public_key().public_bytes_raw()
        self.book.new_run_key(run, private.private_bytes_raw())
        head = self.trail.append("hello", {"run": run, "key": public, "heads": {}})
        hello = Hello(
            study=self.study.name,
            run=run,
            name=self.identity.name,
            key=self.identity.public,
            run_key=public,
            members=len(self.study.members),
            least=self.study.least,
            colluders=self.study.colluders,
            tells=tells,
            rows=self.book.rows,
            book=self.book.id,
            head=head,
            group=self.group,
            group_members=len(self.study.named_groups.get(self.group, ())),
            groups=len(self.study.groups),
            grouping=self.study.grouping,
        )
        return hello.signed(self.identity.sign("hello", hello.content()))

    def require_sound(self, record: Record) -> None:
        """Check what a server says of a sum against the study, the keys and the book.

        Raises
        ------
        SecureError
            If anything is not as this hospital knows it; the text names it.
        """
        study = self.study
        if record.study != study.name:
            raise SecureError(f"the study is {study.name}, and the server says {record.study!r}")
        if record.members != len(study.members):
            raise SecureError(
                f"the study has {len(study.members)} members, and the server says {record.members}"
            )
        self._require_pinned(record)
        for hello in record.hellos:
            hello.verify()
        self._require_group(record)
        self._require_own(record)
        if record.least < study.least or record.colluders < study.colluders:
            raise SecureError(
                f"least {record.least} and c {record.colluders} are below this hospital's own, "
                f"{study.least} and {study.colluders}"
            )
        record.require_enough(record.names)
        peers = [
            Peer(hello.name, hello.rows, hello.book, hello.run_key)
            for hello in record.hellos
            if hello.name != self.identity.name
        ]
        self.book.note_peers(peers, record.run)

    def _require_pinned(self, record: Record) -> None:
        for hello in record.hellos:
            pinned = self.study.members.get(hello.name)
            if pinned is None:
                raise SecureError(f"{hello.name} is no member of the study {self.study.name}")
            if pinned != hello.key:
                raise SecureError(
                    f"the key of {hello.name} is not the one that is pinned: ask that hospital "
                    "whether it has a new one, then `fedmed keys pin --replace`"
                )

    def _require_group(self, record: Record) -> None:
        """Refuse a sum over other hospitals than this one's own groups say.

        Training is summed within the groups alone, and questions about data over the whole study
        alone. So a group's sum is never the rest of a larger sum of the same.
        """
        study = self.study
        own = self.group
        if record.group and not own:
            raise SecureError(
                f"the study {study.name} has no groups, and the server asks for a sum of group "
                f"{shown(record.group, _MOST_NAME)}"
            )
        if record.group and record.kind != TRAIN:
            raise SecureError(
                "questions about data are summed over the whole study, and the server asks for a "
                f"sum of group {shown(record.group, _MOST_NAME)}"
            )
        if own and record.kind == TRAIN and not record.group:
            raise SecureError(
                f"the study {study.name} has groups, and the server asks for one sum of training "
                "over all of them"
            )
        if record.group and record.group != own:
            raise SecureError(
                f"{self.identity.name} is in group {own} of the study, and the server asks it for "
                f"a sum of group {shown(record.group, _MOST_NAME)}"
            )
        named = study.named_groups
        grouping = study.grouping
        for hello in record.hellos:
            group = study.group_of(hello.name)
            if record.group and group != record.group:
                raise SecureError(
                    f"{hello.name} is in group {group} of the study, and the server has put it "
                    f"into group {record.group}"
                )
            said = (hello.groups, hello.grouping, hello.group, hello.group_members)
            if said != (len(named), grouping, group, len(named.get(group, ()))):
                raise SecureError(
                    f"{hello.name} has other groups in its study than {self.identity.name}: "
                    "compare the fingerprints of `fedmed keys show`, and write the same groups "
                    "(`fedmed keys regroup`)"
                )

    def _require_own(self, record: Record) -> None:
        name = self.identity.name
        if name not in record.names:
            raise SecureError(f"{name} itself is not among the hospitals of this sum")
        own = record.hello_of(name)
        if own.run_key != self._private(record.run).public_key().public_bytes_raw():
            raise SecureError(f"the key of {name} in this sum is not its key of the run")
        if (own.least, own.colluders) != (self.study.least, self.study.colluders):
            raise SecureError(f"least or c of {name} is not what its study says")

    def draw(self, question: bytes) -> str:
        """Return what a question is answered with by chance, which nobody else can compute.

        The same question has the same: training that is repeated is the same, and the training of a
        model that differs a little is another.
        """
        return hashlib.sha256(self.identity.sign("draw", question)).hexdigest()

    def mask(
        self,
        record: Record,
        about: Mapping[str, Value],
        asked: Mapping[str, Value],
        words: Words,
    ) -> Masked:
        """Put all masks on this hospital's vectors, and share the seeds with the others.

        Parameters
        ----------
        record : Record
            As `require_sound` has let it pass.
        about, asked : mapping
            As `Record.digest` and `Record.question` take them.
        words : tuple of arrays
            Changed in place.
        """
        name = self.identity.name
        others = [peer for peer in record.names if peer != name]
        digest = record.digest(about)
        own_seed = secrets.token_bytes(SEED_BYTES)
        keys = self._agreed(record, digest)
        pairs = {peer: pair_seed(keys[peer], name, peer) for peer in others}
        seeds = np.frombuffer(own_seed + b"".join(pairs[peer] for peer in others), np.uint8)
        shares = split(seeds.reshape(-1, SEED_BYTES), record.threshold, len(record.names))
        # The entry that `begin` makes is counted.
        state: list[Value] = [self.book.id, self.book.rows + 1]
        envelopes = {
            peer: seal(
                envelope_key(keys[peer], name, peer),
                header(digest, name, peer),
                encoded([shares[record.coordinate(peer) - 1].tobytes(), *state]),
            )
            for peer in others
        }
        # Without the layout, which no later exchange needs: it can be large.
        rules = replace(record, layout=Layout(()))
        kept: dict[str, Value] = {"record": rules.to_bytes(), "seed": own_seed}
        kept["shares"] = shares[record.coordinate(name) - 1].tobytes()
        kept["fingerprint"] = record.fingerprint
        self.book.begin(
            record.run,
            record.kind,
            record.question(asked),
            digest,
            list(record.names),
            encoded(kept),
        )
        added = [own_seed, *(pairs[peer] for peer in others if peer > name)]
        subtracted = [pairs[peer] for peer in others if peer < name]
        for index, vector in enumerate(vectors(words)):
            add_streams(vector, added, subtracted, index)
        self._note_told(record, about, asked)
        self._note(record, "masked", masked=_bytes_of(words))
        commitments = {peer: commitment(pairs[peer], PAIR, name, peer) for peer in others}
        commitments[name] = commitment(own_seed, SELF, name, name)
        letter: dict[str, Value] = {
            "digest": digest,
            "commitments": commitments,
            "envelopes": envelopes,
            "signature": self.identity.sign("upload", promise(digest, commitments, envelopes)),
        }
        return Masked(words, encoded(letter))

    def alive(self, digest: bytes, members: Sequence[str]) -> bytes:
        """Return the signature over the set of hospitals that remain, for good.

        Raises
        ------
        SecureError
            If the set is not one that this hospital may sign, or not the one that it has signed.
        """
        record, kept = self._begun(digest)
        remaining = self._remaining(record, members)
        self._settle(record, digest, remaining, kept)
        return self.identity.sign("alive", certified(digest, remaining))

    def unmask(
        self,
        digest: bytes,
        envelopes: Mapping[str, bytes],
        members: Sequence[str] | None = None,
        signatures: Mapping[str, bytes] | None = None,
    ) -> bytes:
        """Return this hospital's shares for one set of hospitals, and no other.

        Parameters
        ----------
        digest : bytes
        envelopes : mapping of str to bytes
            The envelope of each other hospital of the set, addressed to this one.
        members : sequence of str, optional
            The set, if hospitals are lost. None is all.
        signatures : mapping of str to bytes, optional
            What `alive` returned at hospitals of the set; as many as the threshold.

        Returns
        -------
        bytes
            ``self``: this hospital's share of each member's own seed. ``pairs``: its seed with each
            lost hospital. ``shares``: of each member, its share of that one's seed with each lost
            hospital. All by name, encoded.

        Raises
        ------
        SecureError
            If anything is missing or not as it must be. Nothing is then told.
        """
        record, kept = self._begun(digest)
        name = self.identity.name
        remaining = list(record.names)
        if members is not None and {*map(str, members)} != {*record.names}:
            remaining = self._remaining(record, members)
            self._require_certified(record, digest, remaining, signatures or {})
        keys = self._agreed(record, digest)
        shares = {name: kept["shares"]}
        peers: list[Peer] = []
        for peer in remaining:
            if peer == name:
                continue
            if not isinstance(envelopes.get(peer), bytes):
                raise SecureError(f"the envelope of {peer} is missing")
            key = envelope_key(keys[peer], peer, name)
            inside = unseal(key, header(digest, peer, name), envelopes[peer], peer)
            shares[peer], book, rows = _inside(inside, peer, len(record.names))
            peers.append(Peer(peer, rows, book, digest))
        self.book.note_peers(peers, record.run, reply=True)
        self._settle(record, digest, remaining, kept)
        lost = [peer for peer in record.names if peer not in remaining]
        answer: dict[str, Value] = {
            "self": {peer: shares[peer][:SEED_BYTES] for peer in remaining},
            "pairs": {peer: pair_seed(keys[peer], name, peer) for peer in lost},
            "shares": {
                peer: {gone: _share_of(record, shares[peer], peer, gone) for gone in lost}
                for peer in remaining
            },
        }
        return encoded(answer)

    def _settle(
        self, record: Record, digest: bytes, remaining: Sequence[str], kept: Mapping[str, Any]
    ) -> None:
        """Write down the set for which this hospital stands, before it says so."""
        self.book.settle(digest, remaining)
        # What is kept of the record is not all of it.
        self._note(record, "opened", digest=kept["fingerprint"], members=list(remaining))

    def _note_told(
        self, record: Record, about: Mapping[str, Value], asked: Mapping[str, Value]
    ) -> None:
        heads = {hello.name: hello.head.hex() for hello in record.hellos}
        self._note(
            record,
            "sent",
            purpose=record.purpose,
            names=list(record.names),
            heads=heads,
            model=digest_of(about.get("arrays")),
            question=record.question(asked),
            **record.noted_group,
        )

    def _note(self, record: Record, kind: str, **more: Value) -> None:
        place: dict[str, Value] = {"run": record.run, "round": record.server_round}
        self.trail.append(kind, place | {"digest": record.fingerprint} | more)

    def _begun(self, digest: bytes) -> tuple[Record, dict[str, Any]]:
        kept = decoded(self.book.kept(digest))
        record = Record.from_bytes(kept["record"])
        # A key may have been revoked since the hospital masked.
        self._require_pinned(record)
        return record, kept

    def _remaining(self, record: Record, members: Sequence[str]) -> list[str]:
        texts = all(isinstance(member, str) for member in members)
        remaining = sorted(set(members)) if texts else []
        if len(remaining) != len(members) or not {*remaining} <= {*record.names}:
            raise SecureError("the set must list hospitals of this sum, each once")
        if self.identity.name not in remaining:
            raise SecureError(f"{self.identity.name} itself is left out of the set")
        record.require_enough(remaining)
        return remaining

    def _require_certified(
        self,
        record: Record,
        digest: bytes,
        remaining: Sequence[str],
        signatures: Mapping[str, bytes],
    ) -> None:
        signed = certified(digest, remaining)
        for name, signature in signatures.items():
            if name not in remaining:
                raise SecureError(f"{name} has signed a set in which it is not")
            key = record.hello_of(name).key
            verify(key, "alive", signed, signature, f"the set that {name} signed")
        if len(signatures) < record.threshold:
            raise SecureError(
                f"the set of those who remain is signed by {len(signatures)} hospitals, and "
                f"{record.threshold} must sign it"
            )

    def _private(self, run: str) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.book.run_key(run))

    def _agreed(self, record: Record, digest: bytes) -> dict[str, bytes]:
        """Return the key that this hospital shares with each other one, for this sum alone."""
        private = self._private(record.run)
        secret = self.study.secrets
        return {
            hello.name: agreed_key(private, hello.run_key, digest, secret.get(hello.name, b""))
            for hello in record.hellos
            if hello.name != self.identity.name
        }


def _bytes_of(words: Words) -> bytes:
    """Return the digest of vectors as they leave."""
    return digest_of_arrays(dict(zip(("words32", "words64"), vectors(words), strict=True)))


def header(digest: bytes, sender: str, receiver: str) -> bytes:
    """Return what an envelope is bound to."""
    return encoded([digest, sender, receiver])


def promise(
    digest: bytes, commitments: Mapping[str, bytes], envelopes: Mapping[str, bytes]
) -> bytes:
    """Return what a hospital signs with its masked vectors."""
    inside = hashlib.new("sha512_256", encoded(dict(envelopes))).digest()
    return encoded([digest, dict(commitments), inside])


def certified(digest: bytes, members: Sequence[str]) -> bytes:
    """Return what a hospital signs to say which hospitals remain."""
    return encoded([digest, sorted(members)])


def share_row(record: Record, owner: str, peer: str) -> int:
    """Return which of an owner's shared seeds is that with a peer; the first is its own."""
    others = [name for name in record.names if name != owner]
    return 1 + others.index(peer)


def _inside(content: bytes, sender: str, count: int) -> tuple[bytes, str, int]:
    """Return what an envelope holds: shares of `count` seeds, id and row count of a book."""
    values = decoded(content)
    types = [type(value) for value in values] if isinstance(values, list) else []
    if types != [bytes, str, int] or len(values[0]) != SEED_BYTES * count:
        raise SecureError(f"the envelope of {sender} holds another number of shares")
    return values[0], values[1], values[2]


def _share_of(record: Record, shares: bytes, owner: str, peer: str) -> bytes:
    start = SEED_BYTES * share_row(record, owner, peer)
    return shares[start : start + SEED_BYTES]
