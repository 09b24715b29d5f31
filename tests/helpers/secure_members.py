"""Hospitals of a study in memory, and a server that does with their sums what a test wants."""

import itertools

import numpy as np

from fedmed_flower.secure.audit import Chain
from fedmed_flower.secure.book import SecureBook
from fedmed_flower.secure.collector import Collector
from fedmed_flower.secure.identity import Identity
from fedmed_flower.secure.member import Member
from fedmed_flower.secure.record import TRAIN, Record
from fedmed_flower.secure.ring import COUNT, FIXED, REAL, Layout, Part
from fedmed_flower.secure.study import Study

LAYOUT = Layout(
    (Part("model/w", 5, FIXED, 0.5), Part("rows", 2, COUNT), Part("loss", 1, REAL, 8.0))
)
RUN = "run"
ABOUT = {"model": b"m" * 32}


def names_of(count):
    return [f"h{index:02d}" for index in range(count)]


def members_of(folder, count, run=RUN, **study):
    """Return a `Member` a hospital, by name, each with its own book in a folder."""
    names = names_of(count)
    keys = {name: Identity.simulated(name, run) for name in names}
    known = Study.of("study", {name: key.public for name, key in keys.items()}, **study)
    return {
        name: Member(
            key,
            known,
            SecureBook(folder / f"{name}.secure", key.id),
            Chain(folder / f"{name}.audit", key, name),
        )
        for name, key in keys.items()
    }


def record_of(members, names=None, hellos=None, nonce=b"n" * 16, **fields):
    """Let members say hello, and return the record of a sum over them."""
    names = list(members) if names is None else names
    hellos = hellos or [members[name].hello(RUN) for name in names]
    wanted = {"purpose": "train", "kind": TRAIN, "server_round": 1, "layout": LAYOUT}
    return Record.of_hellos(hellos, nonce=nonce, **(wanted | {"weighting": {}} | fields))


def values_of(index, layout=LAYOUT):
    """Return the values of a hospital, which are exact in the ring."""
    rng = np.random.default_rng(index)
    exact = {FIXED: 2.0**-20, REAL: 2.0**-20, COUNT: 1}
    return {
        part.name: rng.integers(0 if part.kind == COUNT else -1000, 1000, part.size)
        * exact[part.kind]
        for part in layout.parts
    }


def masked_by(member, record, index, about=ABOUT, asked=ABOUT):
    """Return what a member sends: its values, weighted by 1 / the number of hospitals at most."""
    words, _ = record.layout.encode(values_of(index, record.layout), 1.0)
    member.require_sound(record)
    return member.mask(record, about, asked, words)


def summed(members, record, lost_before=(), lost_after=(), collector=None):
    """Do a sum as an honest server does; return the sums and the hospitals that they are over."""
    collector = collector or Collector(record)
    for index, name in enumerate(record.names):
        if name not in lost_before:
            masked = masked_by(members[name], record, index)
            collector.add(name, masked.words, masked.letter)
    return opened_from(members, record, collector, lost_after)


def opened_from(members, record, collector, lost_after=()):
    """Open a sum whose vectors have come, as an honest server does."""
    complete = collector.settle()
    remaining = collector.members
    there = [name for name in remaining if name not in lost_after]
    signatures = {}
    if not complete:
        for name in there:
            collector.certify(name, members[name].alive(collector.digest, remaining))
        signatures = collector.certificate()
    for name in there:
        answer = members[name].unmask(
            collector.digest, collector.envelopes_for(name), remaining, signatures
        )
        collector.answer(name, answer)
    words = collector.open()
    return record.layout.decode(words, len(remaining)), remaining


def expected(record, names):
    """Return the sums over hospitals, added without any mask."""
    every = [values_of(record.names.index(name), record.layout) for name in names]
    return {name: np.sum([values[name] for values in every], axis=0) for name in every[0]}


def subsets(names, sizes):
    return [set(some) for size in sizes for some in itertools.combinations(names, size)]
