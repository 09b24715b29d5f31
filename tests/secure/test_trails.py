import pytest
from audit_trails import NAMES, Trails, finished

from fedmed_flower.secure.audit import Chain, faults
from fedmed_flower.secure.encoding import digest
from fedmed_flower.secure.trails import compare, in_words, rounds_of

SWAPPED = digest("another model").hex()


def differences(trails, *names):
    entries = trails.entries()
    for name, listed in entries.items():
        assert faults(listed, name) == []
    chosen = names or entries
    return compare({name: entries[name] for name in chosen})


@pytest.fixture
def trails(tmp_path):
    """Trails of one finished round, after which a test goes on."""
    return finished(tmp_path, rounds=1)


def test_in_consistent_trails_nothing_differs(tmp_path):
    trails = finished(tmp_path)
    assert differences(trails) == []
    assert differences(trails, "north", "south") == []
    assert differences(trails, "north") == []
    assert compare({}) == []


def test_rounds_of_a_trail(trails):
    entries = trails.entries()
    assert rounds_of(entries["north"]) == {("ab12", 0), ("ab12", 1)}
    assert rounds_of(entries["the server"]) == {("ab12", 1)}


def test_a_swapped_model_is_named_with_round_and_run(trails):
    trails.sent(2, "server")
    trails.sent(2, "north")
    trails.sent(2, "south", model=SWAPPED)
    assert differences(trails, "north", "south") == [
        "north and south were told different models in round 2 of run ab12: the server swapped one "
        "of them"
    ]
    assert differences(trails) == [
        "north and south were told different models in round 2 of run ab12: the server swapped one "
        "of them",
        "the trail of the server shows another model in round 2 of run ab12 than south was told",
    ]
    trails.sent(2, "west")
    assert differences(trails, "north", "south", "west") == [
        "north and west were told another model than south in round 2 of run ab12: the server "
        "swapped one of them"
    ]


def test_other_settings_under_the_same_model_are_named(trails):
    trails.sent(2, "north")
    trails.sent(2, "south", question=digest("rate 0").hex())
    assert differences(trails, "north", "south") == [
        "north and south were told different questions in round 2 of run ab12: the server asked "
        "them for different things, or with different settings"
    ]


def test_another_company_is_named(trails):
    trails.sent(2, "north")
    trails.sent(2, "south", names=["east", "south", "west"])
    assert differences(trails, "north", "south") == [
        "north and south were told different lists of hospitals in round 2 of run ab12: the server "
        "named other hospitals to each"
    ]


def test_one_of_many_questions_of_a_round_is_found(trails):
    for name in ("north", "south"):
        for number in range(3):
            trails.sent(0, name, purpose="survey", question=digest(number).hex())
    assert differences(trails, "north", "south") == []
    trails.sent(0, "north", purpose="survey", question=digest("a").hex())
    trails.sent(0, "south", purpose="survey", question=digest("b").hex())
    (text,) = differences(trails, "north", "south")
    assert "different questions in round 0 (survey) of run ab12" in text


def test_without_a_question_records_are_compared(trails):
    trails.sent(2, "north", question="")
    trails.sent(2, "south", question="", attempt=1)
    assert differences(trails, "north", "south") == [
        "north and south were told different records in round 2 of run ab12: the server asked them "
        "differently, or each of them missed another attempt"
    ]


def test_lost_messages_and_new_attempts_are_no_difference(trails):
    for attempt, reached in enumerate([("north", "west"), ("south", "west"), NAMES]):
        record = trails.sent(2, "server", attempt=attempt)
        for name in reached:
            trails.sent(2, name, attempt=attempt)
            trails.masked(2, name, record)
    for name in ("server", *NAMES):
        trails.opened(2, name, record)
    # North loses the message of round 3, and the others go on.
    record = trails.sent(3, "server")
    for name in ("south", "west"):
        trails.sent(3, name)
        trails.masked(3, name, record)
        trails.opened(3, name, record, ["south", "west"])
    assert differences(trails) == []


def test_a_round_that_the_server_hides_is_named(trails):
    record = trails.sent(4, "north")
    trails.masked(4, "north", record)
    assert differences(trails) == [
        "the server shows no round 4 of run ab12 that north took part in"
    ]
    trails.sent(4, "west")
    assert differences(trails) == [
        "the server shows no round 4 of run ab12 that north and west took part in"
    ]


def test_an_attempt_that_the_server_hides_is_named(trails):
    trails.sent(4, "server")
    trails.sent(4, "north")
    trails.sent(4, "north", attempt=1)
    assert differences(trails) == [
        "the trail of the server does not show all that north was told in round 4 of run ab12"
    ]


def test_runs_of_which_the_server_says_nothing_are_not_its_hidden_rounds(trails):
    other = Trails(trails.folder, run="cd34")
    other.sent(1, "north")
    assert differences(trails) == []


def test_a_round_that_a_hospital_hides_is_named(trails):
    record = trails.sent(2, "server")
    for name in NAMES:
        trails.sent(2, name)
        if name != "north":
            trails.masked(2, name, record)
    trails.opened(2, "server", record)
    trails.opened(2, "south", record)
    assert differences(trails) == [
        "the trail of north shows no part in round 2 of run ab12, and by the trail of the server a "
        "sum over its figures was opened there"
    ]


def test_a_run_that_a_hospital_hides_is_named_once(trails):
    other = Trails(trails.folder, run="cd34")
    for number in (5, 6):
        record = other.sent(number, "south")
        other.masked(number, "south", record)
        other.opened(number, "south", record, ["north", "south"])
    assert differences(trails, "north", "south") == [
        "the trail of north shows nothing of run cd34, and by the trail of south a sum over its "
        "figures was opened there"
    ]


def test_a_sum_over_two_sets_is_named_with_whose_figures_are_the_difference(trails):
    record = trails.sent(2, "server")
    for name in NAMES:
        trails.sent(2, name)
        trails.masked(2, name, record)
    trails.opened(2, "north", record)
    trails.opened(2, "west", record)
    # An answer that was lost is given again.
    trails.opened(2, "west", record)
    trails.opened(2, "south", record, ["north", "south"])
    (text,) = differences(trails)
    assert text == (
        "round 2 of run ab12 was opened over north, south and west (by the trail of north and "
        "west) and over north and south (by the trail of south): the difference of the sums is of "
        "west"
    )


def test_a_question_over_two_sets_is_named(trails):
    other = Trails(trails.folder, run="cd34")
    for run, members in ((trails, NAMES), (other, NAMES[:2])):
        record = run.sent(5, "north", purpose="count", model=SWAPPED)
        run.masked(5, "north", record)
        run.opened(5, "north", record, members)
    assert differences(trails, "north") == [
        "one question was opened over north, south and west in round 5 (count) of run ab12 and "
        "over north and south in round 5 (count) of run cd34: the difference of the sums is of west"
    ]


def test_another_attempt_of_a_round_over_one_hospital_fewer_is_named(trails):
    for attempt, members in enumerate((NAMES, NAMES[:2])):
        record = trails.sent(5, "north", attempt=attempt)
        trails.masked(5, "north", record)
        trails.opened(5, "north", record, members)
    assert differences(trails, "north") == [
        "one question was opened over north, south and west in round 5 of run ab12 and over north "
        "and south in round 5 of run ab12: the difference of the sums is of west"
    ]


def told_by_group(trails, number, **names):
    """Append a round of groups; return the digest of each group's record, by its name."""
    records = {}
    for group, listed in names.items():
        of_group = {"group": group, "names": [*listed]}
        records[group] = trails.sent(number, "server", **of_group)
        for name in listed:
            trails.sent(number, name, **of_group)
            trails.masked(number, name, records[group])
        for name in (*listed, "server"):
            trails.opened(number, name, records[group], listed)
    return records


def test_groups_are_told_other_names_and_answer_a_question_each_for_itself(tmp_path):
    trails = Trails(tmp_path, (*NAMES, "east"))
    told_by_group(trails, 1, A=("east", "north"), B=("south", "west"))
    assert differences(trails) == []


def test_another_company_within_a_group_is_named(tmp_path):
    trails = Trails(tmp_path, (*NAMES, "east"))
    for name, listed in (("server", 2), ("north", 2), ("east", 3)):
        trails.sent(1, name, group="A", names=["east", "north", "south"][:listed])
    trails.hello()
    assert differences(trails, "north", "east", "west") == [
        "north and east were told different lists of hospitals in round 1 of group A of run ab12: "
        "the server named other hospitals to each"
    ]


def test_a_question_that_a_group_answered_over_two_sets_is_named(tmp_path):
    trails = Trails(tmp_path, (*NAMES, "east"))
    names = ("east", "north", "south")
    records = told_by_group(trails, 1, A=names, B=("west",))
    again = trails.sent(1, "north", attempt=1, group="A", names=[*names])
    trails.masked(1, "north", again)
    trails.opened(1, "north", again, names[:2])
    assert len(records) == 2
    assert differences(trails, "north") == [
        "one question was opened over east, north and south in round 1 of group A of run ab12 and "
        "over east and north in round 1 of group A of run ab12: the difference of the sums is of "
        "south"
    ]


def test_a_sum_of_which_nobody_was_told_is_compared_too(trails):
    trails.opened(6, "south", "00", ["south", "west"])
    trails.opened(6, "west", "00", ["west"])
    assert differences(trails, "south", "west")[0] == (
        "round 6 of run ab12 was opened over south and west (by the trail of south) and over west "
        "(by the trail of west): the difference of the sums is of south"
    )


def test_one_digest_for_two_things_is_named(trails):
    record = trails.sent(2, "north")
    trails.sent(2, "south", digest=record, model=SWAPPED, question="")
    assert (
        "north has round 2 of run ab12 and south round 2 of run ab12 under one digest, with "
        "different models and questions: one of them does not say what was told"
    ) in differences(trails, "north", "south")


def test_an_end_that_was_cut_off_is_found_by_the_head_that_another_was_told(tmp_path):
    trails = finished(tmp_path, rounds=1)
    before = trails.path("north").read_bytes().splitlines(keepends=True)
    trails.hello()
    trails.path("north").write_bytes(b"".join(before[:-1]))
    # The same head in another entry is the same finding.
    heads = Chain.read(trails.path("south"))[-1].about["heads"]
    trails.chains["south"].append("note", {"heads": heads})
    assert trails.chains["north"].head.hex() != heads["north"]
    texts = differences(trails, "north", "south")
    assert texts == [
        f"south was told the head {heads['north'][:12]}... of the trail of north (line 6 of the "
        "trail of south), which is not in the trail of north: it was rewritten, or its end was cut "
        "off"
    ]


def test_a_trail_that_its_owner_wrote_anew_is_found(tmp_path):
    trails = finished(tmp_path, rounds=1)
    trails.hello()
    trails.path("north").unlink()
    again = Trails(tmp_path)
    record = again.sent(1, "north")
    again.masked(1, "north", record)
    again.opened(1, "north", record)
    (text,) = differences(trails, "north", "south")
    assert text.startswith("south was told the head")


def test_a_hospital_that_kept_no_trail_yet_has_told_no_head(trails):
    trails.chains["south"].append("note", {"heads": {"north": "", "west": bytes(32)}})
    assert differences(trails) == []


def test_heads_of_hospitals_whose_trails_are_not_there_are_left_alone(tmp_path):
    trails = finished(tmp_path, rounds=1)
    trails.path("north").unlink()
    assert compare({"south": Chain.read(trails.path("south"))}) == []


def test_two_trails_of_one_hospital_count_together(tmp_path):
    first = finished(tmp_path / "first", rounds=1)
    second = Trails(tmp_path / "second", run="cd34")
    second.hello()
    first.hello()
    second.round(4)
    chains = {
        f"{name} {folder}": entries
        for folder, trails in (("first", first), ("second", second))
        for name, entries in trails.entries().items()
    }
    assert compare(chains) == []


def test_copies_of_one_trail_that_differ_are_named(tmp_path):
    trails = finished(tmp_path, rounds=1)
    old = Chain.read(trails.path("north"))
    lines = trails.path("north").read_bytes().splitlines(keepends=True)
    assert compare({"north (old)": old[:-1], "north": old}) == []
    trails.path("north").write_bytes(b"".join(lines[:3]))
    trails.chains["north"].append("note", {})
    assert compare({"north (old)": old, "north": Chain.read(trails.path("north"))}) == [
        "north (old) and north are copies of one trail that differ from line 4 on: one of them was "
        "rewritten"
    ]


def test_names_in_words():
    assert in_words([]) == ""
    assert in_words(["north"]) == "north"
    assert in_words(["north", "south", "west"]) == "north, south and west"
