import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from secure_members import (
    ABOUT,
    LAYOUT,
    RUN,
    expected,
    masked_by,
    members_of,
    names_of,
    opened_from,
    record_of,
    subsets,
    summed,
)

from fedmed_flower.secure import book as book_module
from fedmed_flower.secure import member as member_module
from fedmed_flower.secure.collector import Collector
from fedmed_flower.secure.encoding import SecureError, decoded, encoded
from fedmed_flower.secure.identity import Identity
from fedmed_flower.secure.member import Member
from fedmed_flower.secure.record import DATA, Record
from fedmed_flower.secure.streams import stream_key
from fedmed_flower.secure.study import Study


def assert_sums(members, record, lost_before, lost_after, about):
    collector = Collector(record)
    for index, name in enumerate(record.names):
        if name not in lost_before:
            masked = masked_by(members[name], record, index, about, about)
            collector.add(name, masked.words, masked.letter)
    sums, remaining = opened_from(members, record, collector, lost_after)
    wanted = expected(record, remaining)
    for name, values in wanted.items():
        np.testing.assert_array_equal(sums[name], values)
    assert {*remaining} == {*record.names} - {*lost_before}


@pytest.mark.parametrize("count", [3, 4, 5, pytest.param(6, marks=pytest.mark.slow)])
def test_every_tolerated_pattern_of_losses_gives_the_sum_to_the_bit(folder, count):
    members = members_of(folder, count)
    study = next(iter(members.values())).study
    names = names_of(count)
    hellos = [members[name].hello(RUN) for name in names]
    patterns = 0
    for before in subsets(names, range(study.tolerated + 1)):
        left = [name for name in names if name not in before]
        for after in subsets(left, range(len(left) - study.threshold + 1)):
            if len(after) > 1 and patterns % 3:
                # Of these there are many alike.
                patterns += 1
                continue
            about = {"number": patterns}
            record = record_of(members, hellos=hellos, nonce=bytes([patterns % 256]) * 16)
            assert_sums(members, record, before, after, about)
            patterns += 1
    assert patterns >= {3: 4, 4: 5, 5: 11, 6: 60}[count]


@pytest.mark.slow
def test_drawn_patterns_of_losses_of_seven_to_twelve(folder):
    draws = random.Random(7)
    for number in range(200):
        count = 7 + number % 6
        colluders = draws.choice([0, 1, 2])
        place = folder / str(number)
        place.mkdir()
        members = members_of(place, count, colluders=colluders)
        study = next(iter(members.values())).study
        names = names_of(count)
        before = draws.sample(names, draws.randint(0, study.tolerated))
        left = [name for name in names if name not in before]
        after = draws.sample(left, draws.randint(0, len(left) - study.threshold))
        assert_sums(members, record_of(members), before, after, {"number": number})


def test_one_loss_too_many_opens_nothing(folder):
    members = members_of(folder, 5)
    with pytest.raises(SecureError, match="at least 4 hospitals, and this one is over 3"):
        summed(members, record_of(members), lost_before=["h00", "h01"])


def test_too_few_answers_open_nothing(folder):
    members = members_of(folder, 5)
    with pytest.raises(SecureError, match="3 hospitals have sent their shares, and 4 must"):
        summed(members, record_of(members), lost_after=["h00", "h01"])


# What a server opens that tells each hospital another set. Hospitals 0 to honest - 1 are honest,
# the others give the server all that they hold.


def opened_sets(honest, count, threshold, answered):
    """Return the sets of honest hospitals whose sums open, by what each has answered for.

    A vector is hidden by its own mask and by one with each other hospital. A set of honest ones
    opens if all its own masks are known, and no mask with an honest one outside is unknown.
    """
    colluders = count - honest

    def own_known(i):
        shares = sum(
            answered[member] is not None and i in answered[member] for member in range(honest)
        )
        return colluders + shares >= threshold

    def pair_known(i, j):
        for one, other in ((i, j), (j, i)):
            if answered[one] is not None and other not in answered[one]:
                return True
            shares = sum(
                answered[member] is not None
                and one in answered[member]
                and other not in answered[member]
                for member in range(honest)
            )
            if colluders + shares >= threshold:
                return True
        return False

    left = set(range(honest))
    found = []
    while left:
        component = set()
        waiting = [left.pop()]
        while waiting:
            i = waiting.pop()
            component.add(i)
            near = {j for j in left if not pair_known(i, j)}
            left -= near
            waiting += near
        if all(map(own_known, component)):
            found.append(frozenset(component))
    return found


def views(count, hospital, needed):
    others = [name for name in range(count) if name != hospital]
    sizes = range(needed - 1, count)
    return [None] + [
        frozenset((hospital, *some))
        for size in sizes
        for some in itertools.combinations(others, size)
    ]


def exposed(count, colluders, certified):
    """Return how many cases there are, and those in which another sum opens than that of a set."""
    threshold = (count + colluders) // 2 + 1
    needed = max(threshold, 3 + colluders)
    honest = count - colluders
    everybody = frozenset(range(count))
    cases = 0
    bad = []
    for view in itertools.product(*(views(count, member, needed) for member in range(honest))):
        cases += 1
        answered = list(view)
        if certified:
            answered = [
                told if told == everybody or colluders + view.count(told) >= threshold else None
                for told in view
            ]
        legal = {frozenset(i for i in told if i < honest) for told in answered if told}
        opened = opened_sets(honest, count, threshold, answered)
        if len(opened) > 1 or any(one not in legal for one in opened):
            bad.append((view, opened))
    return cases, bad


@pytest.mark.parametrize(("count", "colluders"), [(3, 0), (4, 0), (4, 1), (5, 0), (5, 1)])
def test_no_pattern_of_answers_opens_another_sum(count, colluders):
    cases, bad = exposed(count, colluders, certified=True)
    assert cases > 1
    assert bad == []


@pytest.mark.slow
def test_no_pattern_of_answers_opens_another_sum_of_six():
    cases, bad = exposed(6, 1, certified=True)
    assert cases == 17**5
    assert bad == []


@pytest.mark.parametrize(
    ("count", "colluders", "smallest"),
    [pytest.param(5, 0, 1, marks=pytest.mark.slow), (5, 1, 2)],
)
def test_without_signatures_a_hospital_would_be_exposed(count, colluders, smallest):
    _, bad = exposed(count, colluders, certified=False)
    assert min(len(one) for _, opened in bad for one in opened) == smallest


def test_members_answer_as_the_enumeration_says(folder):
    # Four hospitals, one of which works with the server: it tells each its own set.
    draws = random.Random(3)
    for number in range(6):
        place = folder / str(number)
        place.mkdir()
        members = members_of(place, 5)
        record = record_of(members)
        collector = Collector(record)
        for index, name in enumerate(record.names):
            masked = masked_by(members[name], record, index)
            collector.add(name, masked.words, masked.letter)
        honest = record.names[:4]
        told = {
            name: draws.choice([u for u in subsets(record.names, [4, 5]) if name in u])
            for name in honest
        }
        signed = {
            name: members[name].alive(collector.digest, sorted(told[name])) for name in honest
        }
        hostile = members[record.names[4]].identity
        for name in honest:
            members_told = sorted(told[name])
            content = member_module.certified(collector.digest, members_told)
            signatures = {peer: signed[peer] for peer in honest if told[peer] == told[name]}
            if record.names[4] in members_told:
                signatures[record.names[4]] = hostile.sign("alive", content)
            envelopes = collector.envelopes_for(name)
            may = len(members_told) == 5 or len(signatures) >= record.threshold
            if may:
                members[name].unmask(collector.digest, envelopes, members_told, signatures)
                continue
            with pytest.raises(SecureError, match="hospitals, and 4 must sign it"):
                members[name].unmask(collector.digest, envelopes, members_told, signatures)


@pytest.mark.parametrize(
    "change",
    [{"model": b"m" * 31 + b"n"}, {"settings": {"learning-rate": 0.1}}, {"filter": "age > 50"}],
)
def test_hospitals_that_are_told_differently_open_nothing_and_are_named(folder, change):
    members = members_of(folder, 5)
    record = record_of(members)
    collector = Collector(record)
    for index, name in enumerate(record.names):
        about = ABOUT | change if name in ("h01", "h03") else ABOUT
        masked = masked_by(members[name], record, index, about, about)
        collector.add(name, masked.words, masked.letter)
    with pytest.raises(SecureError, match="at least 4 hospitals, and this one is over 3"):
        collector.settle()
    assert sorted(collector.problems) == ["h01", "h03"]
    assert "told something else than the others" in collector.problems["h01"]


def test_an_envelope_from_a_hospital_that_was_told_differently_names_it(folder):
    members = members_of(folder, 3)
    record = record_of(members)
    letters = {}
    for index, name in enumerate(record.names):
        about = {"model": b"x" * 32} if name == "h02" else ABOUT
        letters[name] = decoded(masked_by(members[name], record, index, about, about).letter)
    envelopes = {name: letters[name]["envelopes"]["h00"] for name in ("h01", "h02")}
    with pytest.raises(SecureError, match="h02"):
        members["h00"].unmask(letters["h00"]["digest"], envelopes)


@pytest.mark.parametrize("kind", ["train", DATA])
def test_the_same_question_with_one_hospital_fewer_is_refused(folder, kind):
    members = members_of(folder, 5)
    summed(members, record_of(members, kind=kind))
    fewer = names_of(4)
    for run, server_round in ((RUN, 1), (RUN, 2), ("another run", 1)):
        hellos = [members[name].hello(run) for name in fewer]
        record = record_of(members, hellos=hellos, nonce=b"x" * 16, kind=kind)
        record = replace(record, server_round=server_round)
        with pytest.raises(SecureError, match="settled over h00, h01, h02, h03, h04"):
            masked_by(members["h00"], record, 0)
    # All of them may be asked again.
    again = record_of(members, nonce=b"w" * 16, kind=kind)
    _, remaining = summed(members, again)
    assert remaining == names_of(5)


def test_questions_about_data_are_opened_over_one_set_for_good(folder):
    members = members_of(folder, 5)
    summed(members, record_of(members, kind=DATA))
    record = record_of(members, kind=DATA, nonce=b"x" * 16, purpose="count")
    other = {"another": "question"}
    collector = Collector(record)
    for index, name in enumerate(record.names[:4]):
        masked = masked_by(members[name], record, index, other, other)
        collector.add(name, masked.words, masked.letter)
    with pytest.raises(SecureError, match="h00, h01, h02, h03, h04"):
        opened_from(members, record, collector)


def test_a_masked_reply_is_not_made_twice_and_answers_stay_the_same(folder):
    members = members_of(folder, 5)
    record = record_of(members)
    collector = Collector(record)
    for index, name in enumerate(record.names):
        masked = masked_by(members[name], record, index)
        collector.add(name, masked.words, masked.letter)
    with pytest.raises(SecureError, match="masked"):
        masked_by(members["h00"], record, 0)
    envelopes = collector.envelopes_for("h00")
    first = members["h00"].unmask(collector.digest, envelopes)
    assert members["h00"].unmask(collector.digest, envelopes) == first
    with pytest.raises(SecureError, match="settled over h00, h01, h02, h03, h04"):
        members["h00"].alive(collector.digest, ["h00", "h01", "h02", "h03"])


def changed(record, **fields):
    """Return a record with other fields, as a server would send it."""
    return Record.from_bytes(encoded(record.values() | fields))


def hello_of(record, whose, **fields):
    """Return the hellos of a record as plain values, one of them changed and not signed anew."""
    hellos = [hello.values() for hello in record.hellos]
    for hello in hellos:
        if hello["name"] == whose:
            hello.update(fields)
    return sorted(hellos, key=lambda hello: hello["name"])


def test_what_a_server_says_otherwise_is_refused_and_named(folder):
    members = members_of(folder, 5, least=3, colluders=1)
    record = record_of(members)
    own = members["h00"]
    stranger = Identity.simulated("h09", RUN)
    foreign = Identity.simulated("h01", "another run")

    def refused(text, **fields):
        with pytest.raises(SecureError, match=text):
            own.require_sound(changed(record, **fields))

    refused("the hello of h01", hellos=hello_of(record, "h01", run_key=b"r" * 32))
    refused("key of h01 is not the one", hellos=hello_of(record, "h01", key=foreign.public))
    refused("h09 is no member", hellos=hello_of(record, "h01", name="h09", key=stranger.public))
    two = hello_of(record, "h01", key=record.hello_of("h02").key)
    refused("key of h01 is not the one", hellos=two)
    refused("threshold is 3; of 5 members, 1", threshold=3)
    refused("least is 2", least=2)
    refused("c is 0", colluders=0)
    refused("has 5 members, and that of the sum 4", members=4)
    refused("each hospital once", hellos=hello_of(record, "h01", name="h00"))
    refused("another study or run", study="other")
    refused("another study or run", run="other")
    refused("of kind train or data", kind="other")
    alone = [hello.values() for hello in record.hellos if hello.name != "h00"]
    refused("h00 itself is not among", hellos=alone)
    some = [hello.values() for hello in record.hellos[:2]]
    refused("at least 4 hospitals, and this one is over 2", hellos=some)
    own.require_sound(record)


def test_wishes_of_another_hospital_bind_all_and_ones_own_are_the_least(folder):
    members = members_of(folder, 6, least=3, colluders=1)
    careful = members["h01"]
    careful.study = Study.of("study", careful.study.members, least=4, colluders=2)
    record = record_of(members)
    assert (record.least, record.colluders, record.threshold, record.needed) == (4, 2, 5, 6)
    members["h00"].require_sound(record)
    fewer = hello_of(record, "h01", least=3, colluders=1)
    relaxed = encoded(
        record.values() | {"hellos": fewer, "least": 3, "colluders": 1, "threshold": 4}
    )
    with pytest.raises(SecureError, match="the hello of h01"):
        members["h00"].require_sound(Record.from_bytes(relaxed))
    with pytest.raises(SecureError, match="the hello of h01"):
        careful.require_sound(Record.from_bytes(relaxed))


def test_those_that_tell_their_own_figures_do_not_hide_others(folder):
    members = members_of(folder, 5)
    hellos = [members[name].hello(RUN, tells=name in ("h03", "h04")) for name in names_of(5)]
    record = Record.of_hellos(
        hellos,
        purpose="train",
        kind="train",
        server_round=1,
        nonce=b"n" * 16,
        layout=LAYOUT,
        weighting={},
    )
    with pytest.raises(
        SecureError, match="2 tell their own figures and 1 may work with the server"
    ):
        members["h00"].require_sound(record)


def test_an_old_hello_is_void_after_a_new_one(folder):
    members = members_of(folder, 4)
    record = record_of(members)
    members["h00"].hello(RUN)
    with pytest.raises(SecureError, match="is not its key of the run"):
        members["h00"].require_sound(record)


def test_a_run_that_was_not_used_for_a_month_loses_its_keys_and_seeds(folder, monkeypatch):
    day = [20_000]
    monkeypatch.setattr(book_module, "_today", lambda: day[0])
    members = members_of(folder, 3)
    record = record_of(members)
    member = members["h00"]
    masked_by(member, record, 0, ABOUT, ABOUT)
    digest = record.digest(ABOUT)
    day[0] += member_module.KEPT_DAYS - 1
    member.hello("another run")
    assert member.book.run_key(RUN)
    assert member.book.kept(digest)
    day[0] += 1
    member.hello("another run")
    with pytest.raises(SecureError, match="the key of run run was erased when the run was closed"):
        member.book.run_key(RUN)
    with pytest.raises(SecureError, match="kept was erased when the run was closed"):
        member.book.kept(digest)
    # A run that is taken up again begins with a new hello.
    member.hello(RUN)
    assert member.book.run_key(RUN)


def test_a_peer_whose_book_was_restored_is_refused(folder):
    members = members_of(folder, 4)
    old = members["h01"].hello(RUN)
    new = members["h01"].hello(RUN)
    others = [members[name].hello(RUN) for name in ("h00", "h02", "h03")]
    members["h00"].require_sound(record_of(members, hellos=[new, *others]))
    with pytest.raises(SecureError, match="h01"):
        members["h00"].require_sound(record_of(members, hellos=[old, *others]))


def test_answers_are_refused_if_anything_is_missing_or_swapped(folder):
    members = members_of(folder, 5)
    record = record_of(members)
    collector = Collector(record)
    for index, name in enumerate(record.names[:4]):
        masked = masked_by(members[name], record, index)
        collector.add(name, masked.words, masked.letter)
    assert not collector.settle()
    digest = collector.digest
    own = members["h00"]
    envelopes = collector.envelopes_for("h00")
    remaining = collector.members

    def refused(text, envelopes=envelopes, told=remaining, signatures=None, digest=digest):
        with pytest.raises(SecureError, match=text):
            own.unmask(digest, envelopes, told, signatures)

    refused("signed by 0 hospitals, and 4 must", signatures={})
    signed = {name: members[name].alive(digest, remaining) for name in remaining}
    wrong = signed | {"h01": signed["h02"]}
    refused("the set that h01 signed", signatures=wrong)
    refused("in which it is not", signatures=signed | {"h04": b"s" * 64})
    refused("itself is left out", told=["h01", "h02", "h03", "h04"], signatures=signed)
    refused("at least 4", told=["h00", "h01", "h02"], signatures=signed)
    refused("each once", told=["h00", "h01", "h02", "h02"], signatures=signed)
    refused("each once", told=[*remaining, "h09"], signatures=signed)
    swapped = envelopes | {"h01": envelopes["h02"], "h02": envelopes["h01"]}
    refused("h01", envelopes=swapped, signatures=signed)
    refused("envelope of h03 is missing", envelopes={**envelopes, "h03": None}, signatures=signed)
    refused("did not begin here", digest=b"d" * 32, signatures=signed)
    own.unmask(digest, envelopes, remaining, signed)


def test_the_server_refuses_what_cannot_be_used(folder):
    members = members_of(folder, 4)
    record = record_of(members)
    collector = Collector(record)
    masked = masked_by(members["h00"], record, 0)
    letter = decoded(masked.letter)

    def refused(text, words=masked.words, letter=masked.letter, name="h00"):
        with pytest.raises(SecureError, match=text):
            collector.add(name, words, letter)

    refused("letter of h01", name="h01", letter=swap_owner(letter, "h00", "h01"))
    refused("must have 5 words of uint32", words=(masked.words[0][:4], masked.words[1]))
    refused("must have 5 words", words=(masked.words[0].astype(np.int32), masked.words[1]))
    refused("other fields", letter=encoded({"digest": b""}))
    refused("wrong length", letter=encoded(letter | {"digest": b"short"}))
    refused("commitments are of other", letter=encoded(letter | {"commitments": {}}))
    refused("the letter of h00", letter=encoded(letter | {"signature": b"s" * 64}))
    collector.add("h00", masked.words, masked.letter)
    refused("already")


def swap_owner(letter, old, new):
    envelopes = {old if name == new else name: value for name, value in letter["envelopes"].items()}
    return encoded(letter | {"envelopes": envelopes})


def test_a_wrong_common_mask_is_named_before_anything_opens(folder, monkeypatch):
    members = members_of(folder, 4)
    record = record_of(members)
    collector = Collector(record)
    true_seed = member_module.pair_seed
    for index, name in enumerate(record.names):
        if name == "h02":
            monkeypatch.setattr(
                member_module,
                "pair_seed",
                lambda key, one, other: b"w" * 16 if other == "h01" else true_seed(key, one, other),
            )
        masked = masked_by(members[name], record, index)
        collector.add(name, masked.words, masked.letter)
        monkeypatch.setattr(member_module, "pair_seed", true_seed)
    with pytest.raises(SecureError, match="h01 and h02 disagree about their common mask"):
        collector.settle()


def test_shares_that_make_another_seed_open_nothing(folder):
    members = members_of(folder, 4)
    record = record_of(members)
    collector = Collector(record)
    for index, name in enumerate(record.names):
        masked = masked_by(members[name], record, index)
        collector.add(name, masked.words, masked.letter)
    collector.settle()
    for name in record.names:
        answer = decoded(members[name].unmask(collector.digest, collector.envelopes_for(name)))
        if name in ("h01", "h02"):
            answer["self"]["h03"] = bytes(16)
        collector.answer(name, encoded(answer))
    with pytest.raises(SecureError, match="the shares of h03's seed make another seed"):
        collector.open()


def test_no_stream_is_used_for_two_vectors(folder, monkeypatch):
    # A run with a loss, a repeated round, a second hello and another run.
    used = []
    add = member_module.add_streams

    def noted(vector, added, subtracted, index):
        used.extend((stream_key(seed, index), False) for seed in added)
        used.extend((stream_key(seed, index), True) for seed in subtracted)
        add(vector, added, subtracted, index)

    monkeypatch.setattr(member_module, "add_streams", noted)
    members = members_of(folder, 5)
    rounds = 0
    for run in (RUN, "another"):
        for hello in range(2):
            hellos = [members[name].hello(run) for name in names_of(5)]
            for lost in ([], ["h04"]):
                for _ in range(2):
                    rounds += 1
                    nonce = bytes([rounds]) * 16
                    record = record_of(members, hellos=hellos, nonce=nonce, server_round=rounds)
                    about = {"lost": lost, "hello": hello, "run": run}
                    assert_sums(members, record, lost, [], about)
    keys = [key for key, _ in used]
    # A hospital's own stream is used once; one of two hospitals by both, added and subtracted.
    twice = {key for key in keys if keys.count(key) == 2}
    assert {keys.count(key) for key in set(keys)} <= {1, 2}
    assert all({(key, True), (key, False)} <= {*used} for key in twice)
    uploads = sum(5 - len(lost) for _ in range(8) for lost in ([], ["h04"]))
    full = 8 * 10
    partial = 8 * 6
    assert len(twice) == 2 * (full + partial)
    # Alone: its own, and those with the lost hospital, which did not mask.
    assert len(set(keys)) - len(twice) == 2 * (uploads + 8 * 4)


def test_a_member_must_be_in_its_study_with_its_key(folder):
    members = members_of(folder, 3)
    own = members["h00"]
    others = {name: key for name, key in own.study.members.items() if name != "h00"}
    others["h03"] = Identity.simulated("h03", RUN).public
    with pytest.raises(SecureError, match="h00 is no member of the study"):
        Member(own.identity, Study.of("study", others), own.book, own.trail)
    swapped = own.study.members | {"h00": Identity.simulated("h00", "x").public}
    with pytest.raises(SecureError, match="another key for h00"):
        Member(own.identity, Study.of("study", swapped), own.book, own.trail)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (None, "at most"),
        (b"x", "bytes that"),
        (encoded([]), "must list hellos"),
        (encoded({"hellos": []}), "a layout must be"),
        (encoded({"hellos": [{}]}), "a hello must have the fields"),
    ],
)
def test_bytes_that_are_no_record_are_refused(data, text):
    with pytest.raises(SecureError, match=text):
        Record.from_bytes(data)
