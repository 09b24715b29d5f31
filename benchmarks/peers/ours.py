"""A round of this project's secure sum in one process, and what it costs.

Hospitals and server do what they do in a run, with books and audit trails in a folder; messages are
handed over as bytes. Training, network, the hellos (once a run) and the strategy's own step are not
counted.
"""

from __future__ import annotations

import math
import secrets
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES128
from cryptography.hazmat.primitives.ciphers.modes import CTR
from flwr.app import ArrayRecord
from peers.costs import Cost, Weights, model_of, vectors_of, weighted_mean

from fedmed_flower.arrays.views import array_of, view
from fedmed_flower.secure.audit import Chain
from fedmed_flower.secure.book import SecureBook
from fedmed_flower.secure.collector import Collector
from fedmed_flower.secure.encoding import digest_of_arrays
from fedmed_flower.secure.identity import Identity
from fedmed_flower.secure.member import Member
from fedmed_flower.secure.parts import BY, CLIPPED, EXAMPLES, LOSS, MODEL, ONES, TOTAL
from fedmed_flower.secure.record import TRAIN, Record
from fedmed_flower.secure.ring import FIXED, REAL, ArrayChange, Layout, Part
from fedmed_flower.secure.streams import add_streams
from fedmed_flower.secure.study import Study

EXAMPLES_OF_FIRST = 400
"""Rows of the first hospital; each further one has fifty more, as in `secaggplus`."""

_RUN = "benchmark"
_KEY = "weights"
# The default of secure-exponent, and the bound of a loss.
_BOUND = 2.0**-4
_LOSS_BOUND = 2.0**20
_BLOCK_BYTES = 2**19


@dataclass
class Round:
    """CPU seconds of a round.

    Attributes
    ----------
    digest, quantise, mask, unmask : list of float
        Of each hospital.
    add : list of float
        Of each reply, at the server.
    open : float
        At the server, from the last answers to the mean in float64.
    uploaded : int
        Bytes of all masked vectors and letters.
    mean : ndarray of float64
        Mean change of the model, weighted by rows; of all hospitals, or of those that remain.
    """

    digest: list[float] = field(default_factory=list)
    quantise: list[float] = field(default_factory=list)
    mask: list[float] = field(default_factory=list)
    unmask: list[float] = field(default_factory=list)
    add: list[float] = field(default_factory=list)
    open: float = 0.0
    uploaded: int = 0
    mean: Any = None


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Add the CPU seconds of a block to a list."""
    began = time.process_time()
    yield
    seconds.append(time.process_time() - began)


def rows_of(sites: int) -> list[int]:
    """Return the rows of each hospital."""
    return [EXAMPLES_OF_FIRST + 50 * number for number in range(sites)]


class Federation:
    """Hospitals of a study, and their models after a training.

    Parameters
    ----------
    folder : Path
        Of the books and audit trails.
    vectors : sequence of arrays
        The model of each hospital.
    """

    def __init__(self, folder: Path, vectors: Sequence[Weights]) -> None:
        self.vectors = vectors
        self.rows = rows_of(len(vectors))
        self.model = model_of(vectors[0].size)
        keys = [Identity.simulated(f"h{index:03d}", _RUN) for index in range(len(vectors))]
        self.study = Study.of("benchmark", {key.name: key.public for key in keys})
        self.members = {
            key.name: Member(
                key,
                self.study,
                SecureBook(folder / f"{key.name}.secure", key.id),
                Chain(folder / f"{key.name}.audit", key, key.name),
            )
            for key in keys
        }
        self.hellos = [member.hello(_RUN) for member in self.members.values()]

    def round(self, server_round: int, lost: Sequence[str] = ()) -> Round:
        """Return what a round costs, in which the vectors of some hospitals do not arrive."""
        found = Round()
        record = self._record(server_round)
        collector = Collector(record)
        told = record.to_bytes()
        for name, vector, rows in zip(self.members, self.vectors, self.rows, strict=True):
            if name in lost:
                continue
            words, letter = self._masked(found, told, name, vector, rows)
            found.uploaded += len(letter) + sum(len(array.data) for array in words.values())
            small, large = (view(array) for array in words.values())
            with timed(found.add):
                collector.add(name, (small, large), letter)
        complete = collector.settle()
        members = collector.members
        signatures = {}
        if not complete:
            for name in members:
                collector.certify(name, self.members[name].alive(collector.digest, members))
            signatures = collector.certificate()
        answers = {}
        for name in members:
            envelopes = collector.envelopes_for(name)
            with timed(found.unmask):
                answers[name] = self.members[name].unmask(
                    collector.digest, envelopes, members, signatures
                )
        opening: list[float] = []
        with timed(opening):
            for name, answer in answers.items():
                collector.answer(name, answer)
            sums = record.layout.decode(collector.open(), len(members))
            if record.layout.excess(sums, len(members)) is not None:
                raise RuntimeError("the sum has values that no hospitals can have")
            found.mean = sums[f"{MODEL}{_KEY}"]
            found.mean /= len(members) / len(record.names)
        found.open = opening[0]
        if sums[ONES.name][0] != len(members) or sums[CLIPPED.name][0]:
            raise RuntimeError("a mask was wrong, or a change was clipped")
        return found

    def _record(self, server_round: int) -> Record:
        model = Part(f"{MODEL}{_KEY}", self.model.size, FIXED, _BOUND)
        layout = Layout((model, ONES, CLIPPED, Part(LOSS, 1, REAL, _LOSS_BOUND)))
        return Record.of_hellos(
            self.hellos,
            purpose="train",
            kind=TRAIN,
            server_round=server_round,
            nonce=secrets.token_bytes(16),
            layout=layout,
            weighting={BY: EXAMPLES, TOTAL: sum(self.rows)},
        )

    def _masked(
        self, found: Round, told: bytes, name: str, vector: Weights, rows: int
    ) -> tuple[ArrayRecord, bytes]:
        """Do what a hospital does after its training; return its vectors and its letter."""
        member = self.members[name]
        with timed(found.digest):
            arrays = digest_of_arrays({_KEY: self.model})
        with timed(found.mask):
            record = Record.from_bytes(told)
            member.require_sound(record)
        checking = found.mask.pop()
        with timed(found.quantise):
            weight = rows / sum(self.rows)
            values = {
                f"{MODEL}{_KEY}": ArrayChange(vector, self.model),
                ONES.name: np.array([1]),
                CLIPPED.name: np.array([0]),
                LOSS: np.array([0.5 * weight]),
            }
            words, clipped = record.layout.encode(values, weight)
            words[1][record.layout.start(CLIPPED.name)] = clipped
        with timed(found.mask):
            # A question is answered over one set for good, and here both rounds have one model.
            settings = {"seed": record.server_round}
            asked = {"kind": "train", "arrays": {"arrays": arrays}, "settings": settings}
            masked = member.mask(record, {**asked, "run": {}}, asked, words)
            names = ("words32", "words64")
            sent = ArrayRecord(dict(zip(names, map(array_of, masked.words), strict=True)))
        found.mask[-1] += checking
        return sent, masked.letter


def ours(size: int, sites: int) -> Cost:
    """Return the cost of this project's sum; with one lost it is NaN where none may be lost."""
    vectors = vectors_of(size, sites)
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(Path(folder), vectors)
        can_lose = federation.study.tolerated > 0
        # In a run's first round hospitals also write down how many rows the others' books have.
        first = federation.round(1, [list(federation.members)[1]] if can_lose else [])
        whole = federation.round(2)
    true = weighted_mean(vectors, federation.rows) - federation.model
    return Cost(
        digest=statistics.median(whole.digest),
        quantise=statistics.median(whole.quantise),
        mask=statistics.median(whole.mask),
        unmask=statistics.median(whole.unmask),
        add=statistics.median(whole.add),
        open=whole.open,
        open_one_lost=first.open if can_lose else math.nan,
        upload=whole.uploaded / sites / (4 * size),
        error=float(np.abs(whole.mean - true).max()),
        exchanges=2,
    )


class Masking(NamedTuple):
    """CPU seconds of the cipher alone, and of masking a vector with it."""

    cipher: float
    masking: float


def masking(size: int, sites: int) -> Masking:
    """Return what the masks of one hospital cost, and what AES-128-CTR alone costs.

    The cipher encrypts as many bytes, in blocks that stay in the cache.
    """
    vector = np.zeros(size, np.uint32)
    seeds = [secrets.token_bytes(16) for _ in range(sites)]
    zeros = bytes(_BLOCK_BYTES)
    buffer = bytearray(_BLOCK_BYTES + 16)
    cipher: list[float] = []
    with timed(cipher):
        for seed in seeds:
            stream = Cipher(AES128(seed), CTR(bytes(16))).encryptor()
            for start in range(0, vector.nbytes, _BLOCK_BYTES):
                stream.update_into(zeros[: vector.nbytes - start], buffer)
    added: list[float] = []
    with timed(added):
        # Its own mask, and half of those with others are subtracted.
        add_streams(vector, seeds[: sites // 2 + 1], seeds[sites // 2 + 1 :], 0)
    return Masking(cipher[0], added[0])
