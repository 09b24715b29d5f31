"""What a server, or a hospital that works against the others, has tried: each opens nothing."""

import shutil

import numpy as np
import pytest
from secure_members import (
    RUN,
    expected,
    masked_by,
    members_of,
    names_of,
    record_of,
    summed,
)

from fedmed_flower.secure.book import SecureBook
from fedmed_flower.secure.collector import Collector
from fedmed_flower.secure.encoding import SecureError, decoded, encoded
from fedmed_flower.secure.ring import FIXED, REAL, Layout, Part
from fedmed_flower.secure.study import Study


def pair_of(book):
    return [book.path, book.head_path]


def next_record(members, hellos, number, **fields):
    return record_of(members, hellos=hellos, nonce=bytes([number]) * 16, **fields)


def test_a_book_that_was_restored_within_a_run_is_noticed_at_the_next_round(folder, tmp_path):
    members = members_of(folder, 5)
    hellos = [members[name].hello(RUN) for name in names_of(5)]
    own = members["h04"]
    summed(members, next_record(members, hellos, 1))
    for path in pair_of(own.book):
        shutil.copy(path, tmp_path / path.name)
    summed(members, next_record(members, hellos, 2))
    for path in pair_of(own.book):
        shutil.copy(tmp_path / path.name, path)
    with pytest.raises(SecureError, match=r"the book of h04 has \d+ rows and had"):
        summed(members, next_record(members, hellos, 3))


def test_a_book_that_was_lost_is_noticed_in_a_run_and_in_the_next(folder):
    members = members_of(folder, 5)
    hellos = [members[name].hello(RUN) for name in names_of(5)]
    summed(members, next_record(members, hellos, 1))
    own = members["h04"]
    for path in pair_of(own.book):
        path.unlink()
    own.book = SecureBook(own.book.path, own.identity.id)
    # However many entries the server lets the new one make.
    for _ in range(20):
        hello = own.hello(RUN)
    with pytest.raises(SecureError, match="h04 has another book than before"):
        summed(members, next_record(members, [*hellos[:4], hello], 2))
    # The others accept it when their owners say so.
    for name in names_of(4):
        members[name].book.regroup(["h04"])
    summed(members, next_record(members, [*hellos[:4], hello], 3))


def masked_round(members, hellos, run, number):
    """Let all hospitals mask a round of a run; return what collects it."""
    record = next_record(members, hellos, number, server_round=number)
    about = {"run": run, "number": number}
    collector = Collector(record)
    for index, name in enumerate(record.names):
        masked = masked_by(members[name], record, index, about, about)
        collector.add(name, masked.words, masked.letter)
    collector.settle()
    return collector


def unmasked(members, collector):
    for name in collector.members:
        members[name].unmask(collector.digest, collector.envelopes_for(name))


def test_rounds_of_two_runs_side_by_side_do_not_look_like_a_lost_book(folder):
    members = members_of(folder, 4)
    hellos = {}
    for run in ("one", "two"):
        hellos[run] = [members[name].hello(run) for name in names_of(4)]
        unmasked(members, masked_round(members, hellos[run], run, 1))
    for number in (2, 3):
        one, two = [masked_round(members, hellos[run], run, number) for run in ("one", "two")]
        unmasked(members, two)
        unmasked(members, one)


def test_two_runs_that_begin_at_once_are_told_what_to_do(folder):
    members = members_of(folder, 4)
    hellos = {run: [members[n].hello(run) for n in names_of(4)] for run in ("one", "two")}
    masked_round(members, hellos["two"], "two", 1)
    with pytest.raises(SecureError, match="if two runs began at once, begin this one again"):
        masked_round(members, hellos["one"], "one", 1)
    again = [members[name].hello("one") for name in names_of(4)]
    unmasked(members, masked_round(members, again, "one", 2))


def spoiled(members, record, liars, lost=(), silent=()):
    """Return a collector that has answers; those of some hospitals hold wrong shares."""
    collector = Collector(record)
    for index, name in enumerate(record.names):
        if name not in lost:
            masked = masked_by(members[name], record, index)
            collector.add(name, masked.words, masked.letter)
    signatures = {}
    if not collector.settle():
        for name in collector.members:
            collector.certify(name, members[name].alive(collector.digest, collector.members))
        signatures = collector.certificate()
    for name in collector.members:
        if name in silent:
            continue
        envelopes = collector.envelopes_for(name)
        answer = members[name].unmask(collector.digest, envelopes, collector.members, signatures)
        values = decoded(answer)
        if name in liars:
            values["self"] = {peer: bytes(16) for peer in values["self"]}
            values["shares"] = {
                peer: {gone: bytes(16) for gone in shares}
                for peer, shares in values["shares"].items()
            }
        collector.answer(name, encoded(values))
    return collector


@pytest.mark.parametrize("liars", [["h00"], ["h00", "h03"], ["h05", "h06"]])
def test_wrong_shares_spoil_no_sum_while_enough_others_are_there(folder, liars):
    members = members_of(folder, 8)
    record = record_of(members)
    collector = spoiled(members, record, liars)
    sums = record.layout.decode(collector.open(), 8)
    for name, values in expected(record, record.names).items():
        np.testing.assert_array_equal(sums[name], values)
    # Those that were not needed are not looked at.
    first = record.names[: record.threshold]
    assert sorted(collector.doubts) == [name for name in liars if name in first]
    assert all("is wrong, or" in text for text in collector.doubts.values())


def test_wrong_shares_of_seeds_with_a_lost_hospital_spoil_no_sum(folder):
    members = members_of(folder, 9, colluders=0)
    record = record_of(members)
    collector = spoiled(members, record, ["h01"], lost=["h08"], silent=["h00", "h02"])
    sums = record.layout.decode(collector.open(), 8)
    for name, values in expected(record, names_of(8)).items():
        np.testing.assert_array_equal(sums[name], values)
    assert [*collector.doubts] == ["h01"]


def test_a_hospital_that_is_not_in_the_sum_is_refused_by_name(folder):
    members = members_of(folder, 5)
    record = record_of(members)
    collector = spoiled(members, record, [], lost=["h04"])
    masked = masked_by(members["h04"], record, 4)
    with pytest.raises(SecureError, match="not among the hospitals of this sum"):
        collector.add("stranger", masked.words, masked.letter)
    with pytest.raises(SecureError, match="not among the hospitals that were asked"):
        collector.answer("h04", encoded({}))


@pytest.mark.parametrize("members_told", [[1, "h00"], [["h00"]], [None]])
def test_a_set_that_is_no_list_of_names_is_refused(folder, members_told):
    members = members_of(folder, 4)
    record = record_of(members)
    masked = masked_by(members["h00"], record, 0)
    digest = decoded(masked.letter)["digest"]
    with pytest.raises(SecureError, match="each once"):
        members["h00"].alive(digest, members_told)
    with pytest.raises(SecureError, match="each once"):
        members["h00"].unmask(digest, {}, members_told)


def test_a_book_does_not_grow_with_the_layout(folder):
    members = members_of(folder, 4)
    parts = [Part("model/" + "x" * 900 + str(number), 0, FIXED, 1.0) for number in range(2000)]
    record = record_of(members, layout=Layout(tuple(parts)))
    assert len(record.to_bytes()) > 1 << 20
    own = members["h00"]
    before = own.book.path.stat().st_size
    masked_by(own, record, 0)
    assert own.book.path.stat().st_size - before < 1 << 16


def test_weights_that_a_server_makes_too_large_tell_of_the_sum_alone():
    # What it learns is what it learns of hospitals with other values and the same weighted sum.
    layout = Layout((Part("w", 3, FIXED, 0.5), Part("loss", 1, REAL, 8.0)))
    rows = (7, 300, 20)
    changes = np.array([[0.25, -0.5, 0.125], [0.0, 0.25, -0.25], [0.5, 0.5, 0.375]])
    losses = np.array([1.0, 2.0, 4.0])
    for total in (1, 2, 8, 64, 256, 512):
        small, large = 0, 0
        for count, change, loss in zip(rows, changes, losses, strict=True):
            values = {"w": change, "loss": np.array([loss])}
            words, clipped = layout.encode(values, count / total, weighted=["loss"])
            assert clipped == 0
            small = small + words[0]
            large = large + words[1]
        scale = layout.part("w").scale
        wanted = [int(x * scale) % 2**32 for x in rows @ changes / total]
        assert np.array_equal(small, np.array(wanted, np.uint32))
        unit = 2**50 // 8
        upper = int(rows @ losses * unit) // total % 2**64
        assert large.tolist() == [upper, 0]


def test_a_change_of_those_who_train_is_told_to_each_hospital(folder, caplog):
    members = members_of(folder, 5)
    hellos = [members[name].hello(RUN) for name in names_of(5)]
    unmasked(members, masked_round(members, hellos, RUN, 1))
    assert caplog.text == ""
    unmasked(members, masked_round(members, hellos[:4], RUN, 2))
    assert caplog.text.count("what h04 has sent can be estimated by difference") == 4


def test_a_key_that_was_revoked_since_the_masks_opens_nothing(folder):
    members = members_of(folder, 5)
    record = record_of(members)
    collector = Collector(record)
    for index, name in enumerate(record.names):
        masked = masked_by(members[name], record, index)
        collector.add(name, masked.words, masked.letter)
    own = members["h00"]
    others = {name: key for name, key in own.study.members.items() if name != "h04"}
    own.study = Study.of("study", others)
    with pytest.raises(SecureError, match="h04 is no member"):
        own.unmask(collector.digest, collector.envelopes_for("h00"))
    with pytest.raises(SecureError, match="h04 is no member"):
        own.alive(collector.digest, names_of(4))
