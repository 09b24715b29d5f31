"""Sums over the groups of a study: each of its own, and no other set of the hospitals."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from secure_members import (
    RUN,
    expected,
    masked_by,
    members_of,
    names_of,
    opened_from,
    record_of,
    summed,
)

from fedmed_flower.secure.collector import Collector
from fedmed_flower.secure.encoding import SecureError, encoded
from fedmed_flower.secure.parts import ONES, ROWS, rows_by_group, rows_of
from fedmed_flower.secure.record import DATA, Hello, Record, TooFewOfGroupError
from fedmed_flower.secure.ring import Layout
from fedmed_flower.secure.study import Study


def grouped(folder, size, groups, **study):
    """Return members of a study with groups, and the names of each group, by its own name."""
    names = names_of(size * groups)
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    members = members_of(folder, len(names), groups=parts, **study)
    return members, members[names[0]].study.named_groups


def record_in(members, groups, group, names=None, **fields):
    """Return the record of a sum of training over hospitals of a group."""
    names = groups[group] if names is None else names
    return record_of(members, names, group=group, **fields)


def test_each_group_has_a_sum_of_its_own_with_the_threshold_of_its_members(folder):
    members, groups = grouped(folder, 3, 3, colluders=0)
    records = {group: record_in(members, groups, group) for group in groups}
    assert {record.threshold for record in records.values()} == {2}
    assert {record.members for record in records.values()} == {9}
    for record in records.values():
        sums, remaining = summed(members, record)
        assert remaining == [*record.names]
        for name, values in expected(record, remaining).items():
            np.testing.assert_array_equal(sums[name], values)
    assert len({record.digest({}) for record in records.values()}) == 3
    assert len({record.question({}) for record in records.values()}) == 1


def test_a_group_may_lose_as_many_as_a_study_of_its_size(folder):
    members, groups = grouped(folder, 5, 2)
    record = record_in(members, groups, "A")
    assert (record.threshold, record.needed) == (4, 4)
    sums, remaining = summed(members, record, lost_before=["h02"])
    assert remaining == ["h00", "h01", "h03", "h04"]
    for name, values in expected(record, remaining).items():
        np.testing.assert_array_equal(sums[name], values)
    other = record_in(members, groups, "B")
    with pytest.raises(SecureError, match="at least 4 hospitals, and this one is over 3"):
        summed(members, other, lost_before=["h05", "h06"])


def test_a_group_answers_one_question_over_one_set(folder):
    members, groups = grouped(folder, 5, 2)
    summed(members, record_in(members, groups, "A"), lost_before=["h02"])
    # Nobody in the other group is bound by that.
    summed(members, record_in(members, groups, "B"))
    again = record_in(members, groups, "A", nonce=b"x" * 16)
    with pytest.raises(SecureError, match="settled over h00, h01, h03, h04"):
        summed(members, again)
    fewer = record_in(members, groups, "B", names_of(9)[5:], nonce=b"x" * 16)
    with pytest.raises(SecureError, match="settled over h05, h06, h07, h08, h09"):
        masked_by(members["h05"], fewer, 0)


def test_what_a_server_makes_of_the_groups_is_refused_and_named(folder):
    members, groups = grouped(folder, 4, 3)
    own = members["h00"]
    hellos = {name: members[name].hello(RUN) for name in members}

    def refused(text, names, group, **fields):
        record = record_of(members, hellos=[hellos[name] for name in names], group=group, **fields)
        with pytest.raises(SecureError, match=text):
            own.require_sound(Record.from_bytes(record.to_bytes()))

    everybody = [*members]
    own.require_sound(record_of(members, hellos=[hellos[n] for n in groups["A"]], group="A"))
    # Merged.
    refused("the server asks for one sum of training over all", everybody, "")
    refused("h04 is in group B by its hello, and the sum is of group A", [*everybody[:8]], "A")
    # Swapped.
    refused("h04 is in group B by its hello", [*groups["A"][:3], "h04"], "A")
    # Renamed.
    refused("h00 is in group A by its hello, and the sum is of group B", groups["A"], "B")
    refused("summed over the whole study, and the server asks", groups["A"], "A", kind=DATA)
    own.require_sound(
        record_of(members, hellos=[*hellos.values()], kind=DATA, purpose="count", nonce=b"y" * 16)
    )


def test_a_hello_that_names_another_group_is_refused_though_it_is_signed(folder):
    members, groups = grouped(folder, 4, 3)
    own = members["h00"]
    hellos = {name: members[name].hello(RUN) for name in members}

    def said_by(name, **fields):
        """Return what a hospital that works with the server would sign."""
        hello = replace(hellos[name], **fields, signature=b"")
        return hello.signed(members[name].identity.sign("hello", hello.content()))

    moved = said_by("h04", group="A")
    listed = [*(hellos[name] for name in groups["A"][:3]), moved]
    with pytest.raises(SecureError, match="h04 is in group B of the study, and the server has"):
        own.require_sound(record_of(members, hellos=listed, group="A"))
    few = said_by("h03", group_members=1)
    listed = [*(hellos[name] for name in groups["A"][:3]), few]
    with pytest.raises(SecureError, match="h03 has other groups in its study than h00"):
        own.require_sound(record_of(members, hellos=listed, group="A"))
    # Even if all the others say that there is a group of another name.
    listed = [said_by(name, group="B") for name in groups["A"]]
    with pytest.raises(SecureError, match="h00 is in group A of the study, and the server asks"):
        own.require_sound(record_of(members, hellos=listed, group="B"))


def test_a_hospital_with_other_groups_is_named_in_every_sum(folder):
    members, groups = grouped(folder, 4, 2)
    parts = [["h00", "h01", "h02", "h04"], ["h03", "h05", "h06", "h07"]]
    odd = members["h01"]
    odd.study = Study.of("study", odd.study.members, groups=parts)
    for kind, group in (("train", "A"), (DATA, "")):
        names = groups["A"] if group else [*members]
        record = record_of(members, names, kind=kind, group=group)
        with pytest.raises(SecureError, match="study of h01 has other groups than that of h00"):
            Record.from_bytes(record.to_bytes())
        with pytest.raises(SecureError, match="h01 has other groups in its study than h02"):
            members["h02"].require_sound(record)


def test_a_study_without_groups_knows_none(folder):
    members = members_of(folder, 4)
    record = record_of(members)
    assert record.hellos[0].group == ""
    with pytest.raises(SecureError, match="the study study has no groups, and the server asks"):
        members["h00"].require_sound(replace(record, group="A"))
    with pytest.raises(SecureError, match="h00 is in no group by its hello, and the sum is of"):
        Record.from_bytes(encoded(record.values() | {"group": "A"}))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"group": ""}, "it is in group '', and there are 2 groups"),
        ({"group": "C"}, "it is in group 'C', and there are 2 groups"),
        ({"group": "A\n"}, "it is in group 'A ', and there are 2 groups"),
        ({"groups": 0}, "it is in group 'A', and there are 0 groups"),
        ({"groups": 86}, "a study has at most 85 groups, and by the hello of h00 86"),
        ({"group_members": -1}, "has a number below 0"),
        ({"grouping": "text"}, "grouping of a hello must be of type bytes"),
    ],
)
def test_a_hello_with_wrong_groups_is_refused(folder, fields, text):
    members, _ = grouped(folder, 4, 2)
    hello = members["h00"].hello(RUN)
    assert Hello.of(hello.values()) == hello
    with pytest.raises(SecureError, match=text):
        Hello.of(hello.values() | fields)


def test_rows_are_counted_by_group_in_one_sum_over_all(folder):
    members, groups = grouped(folder, 3, 3, colluders=0)
    layout = Layout((*map(rows_of, groups), ONES))
    record = record_of(members, kind=DATA, purpose="count", layout=layout)
    collector = Collector(record)
    for rows, name in enumerate(record.names, start=10):
        member = members[name]
        member.require_sound(record)
        values = rows_by_group(rows, member.group, layout) | {ONES.name: 1}
        arrays = {key: np.array([value]) for key, value in values.items()}
        words, _ = layout.encode(arrays, 1.0)
        masked = member.mask(record, {}, {}, words)
        collector.add(name, masked.words, masked.letter)
    sums, _ = opened_from(members, record, collector)
    counts = [int(sums[rows_of(group).name][0]) for group in groups]
    assert counts == [10 + 11 + 12, 13 + 14 + 15, 16 + 17 + 18]
    assert rows_of("") == ROWS
    assert rows_by_group(5, "A", Layout((ROWS, ONES))) == {}


def test_of_each_group_a_question_about_data_is_over_enough_hospitals_or_none(folder):
    members, _ = grouped(folder, 3, 3, colluders=0)
    names = names_of(9)
    record = record_of(members, kind=DATA, purpose="count")
    # A whole group may be missing; more of the others than the study's threshold are there.
    record.require_enough(names[:6])
    with pytest.raises(TooFewOfGroupError) as error:
        record.require_enough(names[:8])
    assert error.value.groups == ["C"]
    assert str(error.value) == (
        "of group C at least least + c = 3 + 0 hospitals that do not tell their own figures must "
        "be in the sum, or none"
    )
    collector = Collector(record)
    for index, name in enumerate(names[:8]):
        masked = masked_by(members[name], record, index)
        collector.add(name, masked.words, masked.letter)
    with pytest.raises(TooFewOfGroupError):
        collector.settle()
    # A server that goes on nevertheless gets no signature.
    with pytest.raises(TooFewOfGroupError):
        members["h00"].alive(collector.digest, names[:8])


def test_one_who_tells_its_own_figures_does_not_hide_its_group(folder):
    members, groups = grouped(folder, 4, 2, colluders=0)
    hellos = [members[name].hello(RUN, tells=name in ("h04", "h05")) for name in members]
    record = record_of(members, hellos=hellos, kind=DATA, purpose="count")
    with pytest.raises(TooFewOfGroupError, match="of group B at least"):
        members["h00"].require_sound(record)
    with pytest.raises(SecureError, match="2 tell their own figures and 0 may work with"):
        record_of(members, hellos=hellos[4:], group="B").require_enough(groups["B"])


@pytest.mark.parametrize("kind", ["train", DATA])
def test_of_all_sets_of_hospitals_only_those_of_a_group_are_trained(folder, kind):
    # Every set of six hospitals in two groups, under every name that a server may give it.
    members, _ = grouped(folder, 3, 2, colluders=0)
    hellos = {name: members[name].hello(RUN) for name in members}
    taken = set()
    for size in range(1, 7):
        for names in itertools.combinations(members, size):
            for group in ("", "A", "B"):
                listed = [hellos[name] for name in names]
                record = record_of(members, hellos=listed, group=group, kind=kind)
                for name in ("h00", "h05"):
                    try:
                        members[name].require_sound(record)
                    except SecureError:
                        continue
                    taken.add((group, names))
    everybody = tuple(members)
    if kind == "train":
        assert taken == {("A", everybody[:3]), ("B", everybody[3:])}
        # Of the hospitals of a group there is one set, so no question is opened over two.
        sets = [frozenset(names) for _, names in taken]
        assert all(one.isdisjoint(other) for one, other in itertools.combinations(sets, 2))
    else:
        assert taken == {("", everybody)}
