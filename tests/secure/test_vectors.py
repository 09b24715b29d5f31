"""Known answers: the file, the slow reference that wrote it, and the package agree."""

import json

import numpy as np
import pytest
import secure_reference
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmed_flower.secure import member, streams
from fedmed_flower.secure.audit import Chain
from fedmed_flower.secure.book import SecureBook
from fedmed_flower.secure.collector import Collector
from fedmed_flower.secure.encoding import decoded, digest, digest_of_arrays, encoded
from fedmed_flower.secure.envelopes import unseal
from fedmed_flower.secure.identity import Identity
from fedmed_flower.secure.member import Member
from fedmed_flower.secure.record import TRAIN, Record
from fedmed_flower.secure.ring import COUNT, FIXED, Layout, Part
from fedmed_flower.secure.shamir import join, values_at
from fedmed_flower.secure.study import Study

KNOWN = json.loads(secure_reference.VECTORS.read_text())
OF_TYPE = {"bool": bool, "int": int, "float": float.fromhex, "text": str, "bytes": bytes.fromhex}


def value_of(typed):
    kind, content = typed
    if kind == "none":
        return None
    if kind == "list":
        return [value_of(item) for item in content]
    if kind == "map":
        return {key: value_of(item) for key, item in content}
    return OF_TYPE[kind](content)


def array_of(known):
    content = np.frombuffer(bytes.fromhex(known["bytes"]), known["dtype"])
    return content.reshape(known["shape"])


def test_the_reference_writes_the_file():
    assert secure_reference.text() == secure_reference.VECTORS.read_text()


@pytest.mark.parametrize("known", KNOWN["encoding"], ids=lambda known: str(known["value"])[:30])
def test_canonical_bytes(known):
    value = value_of(known["value"])
    data = encoded(value)
    assert data.hex() == known["bytes"]
    assert digest(value).hex() == known["digest"]
    assert encoded(decoded(data)) == data


def test_digest_of_arrays():
    check_arrays(KNOWN["arrays"][0])


def test_digest_of_a_scalar():
    check_arrays(KNOWN["arrays"][1])


def check_arrays(known):
    arrays = {one["name"]: array_of(one) for one in known["arrays"]}
    assert digest_of_arrays(arrays).hex() == known["digest"]


@pytest.mark.parametrize("known", KNOWN["keys"], ids=["without secret", "with secret"])
def test_keys(known):
    one, other = known["names"]
    keys = [X25519PrivateKey.from_private_bytes(bytes.fromhex(key)) for key in known["private"]]
    publics = [key.public_key().public_bytes_raw() for key in keys]
    assert [public.hex() for public in publics] == known["public"]
    salt = bytes.fromhex(known["salt"])
    secret = bytes.fromhex(known["secret"])
    for key, public in zip(keys, reversed(publics), strict=True):
        assert streams.agreed_key(key, public, salt, secret).hex() == known["prk"]
    prk = bytes.fromhex(known["prk"])
    seed = streams.pair_seed(prk, one, other)
    assert seed.hex() == known["pair_seed"]
    directions = [streams.envelope_key(prk, one, other), streams.envelope_key(prk, other, one)]
    assert [key.hex() for key in directions] == known["envelope_key"]
    assert streams.expanded(prk, "other use", one, other, 12, 80).hex() == known["expanded"]
    assert [streams.stream_key(seed, index).hex() for index in (0, 1)] == known["stream_key"]
    assert streams.commitment(seed, "pair", one, other).hex() == known["commitment"]


@pytest.mark.parametrize(
    "known", KNOWN["streams"], ids=lambda known: f"{known['bits']}x{known['length']}"
)
def test_masked_vectors(known):
    dtype = np.dtype(f"u{known['bits'] // 8}")
    places = np.arange(known["length"], dtype=dtype)
    start = ~(places * places)
    seed = bytes.fromhex(known["seed"])
    for subtract, field in ((False, "digest"), (True, "digest_subtracted")):
        vector = start.copy()
        streams.add_stream(vector, seed, known["index"], subtract)
        data = vector.astype(dtype.newbyteorder("<")).tobytes()
        assert secure_reference.sha512_256(data).hex() == known[field]
        assert subtract or data[:48].hex() == known["first"]


@pytest.mark.parametrize(
    "known", KNOWN["shamir"], ids=lambda known: f"{known['threshold']} of {len(known['shares'])}"
)
def test_shares(known):
    rows = [bytes.fromhex(row) for row in known["coefficients"]]
    coefficients = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), 1, 16)
    coordinates = range(1, len(known["shares"]) + 1)
    shares = values_at(coefficients, coordinates)
    assert [share.tobytes().hex() for share in shares] == known["shares"]
    threshold = known["threshold"]
    assert join(shares[:threshold], coordinates[:threshold]).tobytes().hex() == known["secret"]
    assert known["secret"] == known["coefficients"][0]


@pytest.mark.parametrize("known", KNOWN["envelopes"], ids=lambda known: known["content"][:8])
def test_envelopes(known):
    key, header, sealed = (bytes.fromhex(known[field]) for field in ("key", "header", "sealed"))
    assert unseal(key, header, sealed, "north").hex() == known["content"]


def words_of(known):
    return (
        np.frombuffer(bytes.fromhex(known["32"]), np.uint32).copy(),
        np.frombuffer(bytes.fromhex(known["64"]), np.uint64).copy(),
    )


@pytest.mark.parametrize("known", KNOWN["rounds"], ids=["three", "five, one lost"])
def test_a_whole_round(known, folder, monkeypatch):
    names = known["names"]
    layout = Layout((Part("model/w", 4, FIXED, 0.5), Part("rows", 4, COUNT)))
    keys = {name: Identity.simulated(name, "run") for name in names}
    study = Study.of("study", {name: key.public for name, key in keys.items()})
    members = {}
    hellos = []
    for name, key in keys.items():
        run_key = X25519PrivateKey.from_private_bytes(bytes.fromhex(known["run_keys"][name]))
        monkeypatch.setattr(member.X25519PrivateKey, "generate", lambda run_key=run_key: run_key)
        book = SecureBook(folder / f"{name}.secure", key.id)
        trail = Chain(folder / f"{name}.audit", key, name)
        members[name] = Member(key, study, book, trail)
        hellos.append(members[name].hello("run"))
    fields = {"purpose": "train", "kind": TRAIN, "server_round": 1, "nonce": bytes(16)}
    record = Record.of_hellos(hellos, layout=layout, weighting={}, **fields)
    assert record.threshold == known["threshold"]
    # Signatures and rules have no part in the vectors; the digest stands for all of them.
    monkeypatch.setattr(Record, "digest", lambda self, about: bytes.fromhex(known["digest"]))
    collector = Collector(record)
    for name in known["remaining"]:
        own = bytes.fromhex(known["own_seeds"][name])
        monkeypatch.setattr(member.secrets, "token_bytes", lambda length, own=own: own)
        masked = members[name].mask(record, {}, {}, words_of(known["vectors"][name]))
        for words, wanted in zip(masked.words, words_of(known["masked"][name]), strict=True):
            np.testing.assert_array_equal(words, wanted)
        collector.add(name, masked.words, masked.letter)
        shares = [bytes.fromhex(share) for share in known["shares_of_own_seeds"][name]]
        some = range(len(names) - known["threshold"], len(names))
        rows = np.array([np.frombuffer(shares[place], np.uint8) for place in some])
        assert join(rows[:, None], [place + 1 for place in some]).tobytes() == own
    monkeypatch.undo()
    monkeypatch.setattr(Record, "digest", lambda self, about: bytes.fromhex(known["digest"]))
    signatures = {}
    if not collector.settle():
        for name in collector.members:
            collector.certify(name, members[name].alive(collector.digest, collector.members))
        signatures = collector.certificate()
    for name in collector.members:
        envelopes = collector.envelopes_for(name)
        answer = members[name].unmask(collector.digest, envelopes, collector.members, signatures)
        collector.answer(name, answer)
    for words, wanted in zip(collector.open(), words_of(known["sum"]), strict=True):
        np.testing.assert_array_equal(words, wanted)
