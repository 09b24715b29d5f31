import base64
import itertools
import pickle
import random
import re
import stat
import tomllib
import unicodedata

import numpy as np
import pytest
import tomli_w

from fedmed_flower.errors import InputError
from fedmed_flower.secure.encoding import digest
from fedmed_flower.secure.identity import Identity, key_text
from fedmed_flower.secure.study import (
    MOST_GROUPS,
    Peers,
    Study,
    differences,
    group_name,
    place_of,
)


def key(number):
    return number.to_bytes(32, "big")


def members(names):
    return {name: key(number) for number, name in enumerate(names)}


def study(names, **options):
    return Study.of("lungs", members(names), **options)


def compared(before, after):
    return differences(before.sums, after.sums, after.least + after.colluders)


def letters(count):
    return [f"h{number:03}" for number in range(count)]


def written(path, **entries):
    table = {"name": "lungs", "members": {n: key_text(k) for n, k in members("abcd").items()}}
    path.write_text(tomli_w.dumps({"study": table | entries}))
    return path


@pytest.mark.parametrize(
    ("count", "colluders", "threshold", "needed", "tolerated"),
    [
        (3, 0, 2, 3, 0),
        (4, 1, 3, 4, 0),
        (5, 1, 4, 4, 1),
        (6, 1, 4, 4, 2),
        (10, 1, 6, 6, 4),
        (20, 1, 11, 11, 9),
        (255, 1, 129, 129, 126),
    ],
)
def test_what_a_sum_needs_by_default(count, colluders, threshold, needed, tolerated):
    found = study(letters(count))
    assert (found.least, found.colluders) == (3, colluders)
    assert (found.threshold, found.needed, found.tolerated) == (threshold, needed, tolerated)


def test_any_two_sets_of_signers_share_an_honest_member():
    for count in range(3, 30):
        for colluders in range(count - 2):
            t = study(letters(count), colluders=colluders).threshold
            # Two sets of t among n share 2t - n members, of whom c may sign both.
            assert 2 * t - count > colluders
            assert t <= count


def test_members_stand_in_the_order_of_their_names():
    found = study("cab", least=3)
    assert [*found.members] == ["a", "b", "c"]
    assert found == Study("lungs", members("cab"), 3, 0)


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        ("ab", {}, "a study must have from 3 to 255 members, got 2: pin those that are missing"),
        (letters(256), {}, "a study must have from 3 to 255 members, got 256"),
        ("abcd", {"least": 2}, "least must be a whole number, at least 3, got 2"),
        ("abcd", {"least": 3.0}, "least must be a whole number, at least 3, got 3.0"),
        ("abcd", {"least": True}, "least must be a whole number, at least 3, got True"),
        ("abcd", {"colluders": -1}, "c must be a whole number, at least 0, got -1"),
        (
            "abc",
            {"colluders": 1},
            "a sum needs least + c = 3 + 1 members, and the study has 3: pin more members, or "
            "lower least (not below 3) or c",
        ),
        ("abcd", {"least": 4}, "a sum needs least + c = 4 + 1 members, and the study has 4"),
        (
            ["north", "North", "x"],
            {},
            "north and North differ in upper and lower case only: one of them must have another "
            "name",
        ),
        (["straße", "STRASSE", "x"], {}, "straße and STRASSE differ in upper and lower case only"),
        (["a" * 65, "b", "c"], {}, "a member's name must have at most 64 bytes, got 65"),
        (
            [unicodedata.normalize("NFD", "ä"), "b", "c"],
            {},
            "a member's name must be in the Unicode normal form NFC",
        ),
        (
            "abcdefgh",
            {"groups": ["abc", "defgh"]},
            "a group must have at least least + c = 3 + 1 members, got 3: a, b, c; 2 groups need 8 "
            "members",
        ),
        (
            "abcdef",
            {"groups": ["abc", "cde"], "colluders": 0},
            "c is in the groups twice: each member is in one, once",
        ),
        (
            "abcdefg",
            {"groups": ["abc", "def"], "colluders": 0},
            "g: in no group; each member must be in one: fedmed keys regroup",
        ),
        (
            "abcdef",
            {"groups": ["abc", "dex"], "colluders": 0},
            "a group holds 'x', which is no member: pin its key first",
        ),
        ("abc", {"secrets": {"x": bytes(16)}}, "secrets hold one for x, which is no member"),
        (
            "abc",
            {"secrets": {"a": bytes(15)}},
            "a: a secret must have at least 16 bytes, got 15",
        ),
    ],
)
def test_a_study_that_protects_nobody_is_refused(names, options, said):
    with pytest.raises(InputError) as caught:
        study(names, **options)
    assert str(caught.value).startswith(said)


def test_three_groups_need_nine_members_and_twelve_with_a_colluder():
    assert study(letters(9), groups=np.reshape(letters(9), (3, 3)).tolist(), colluders=0).groups
    assert study(letters(12), groups=np.reshape(letters(12), (3, 4)).tolist()).groups
    with pytest.raises(InputError, match=r"h000, h001, h002; 3 groups need 12 members$"):
        study(letters(11), groups=[letters(11)[:3], letters(11)[3:7], letters(11)[7:]])


def test_one_key_under_two_names_is_refused():
    with pytest.raises(InputError) as caught:
        Study.of("lungs", {"a": key(1), "b": key(2), "c": key(1)})
    assert str(caught.value) == (
        f"a and c have one key, {key_text(key(1))}: each must have its own; ask both by phone"
    )
    with pytest.raises(InputError, match="b: a public key must have 32 bytes, got 31"):
        Study.of("lungs", {"a": key(1), "b": bytes(31), "c": key(3)})


def test_who_is_summed_with_whom():
    whole = study("abc")
    assert whole.group_of("b") == ""
    assert whole.within("") is whole
    assert (whole.named_groups, whole.grouping) == ({}, b"")
    parted = study("abcdef", groups=["fbd", "ace"], colluders=0)
    assert parted.groups == (("a", "c", "e"), ("b", "d", "f"))
    assert parted.named_groups == {"A": ("a", "c", "e"), "B": ("b", "d", "f")}
    assert parted.group_of("d") == "B"
    with pytest.raises(InputError, match=r"^x is no member of the study lungs; its members: a, b"):
        whole.group_of("x")


def test_a_group_alone_is_a_study_of_its_members():
    secrets = {"b": bytes(16), "c": bytes(16)}
    parted = study("abcdefgh", groups=["abcd", "efgh"], secrets=secrets)
    alone = parted.within("A")
    assert ([*alone.members], alone.groups) == ([*"abcd"], ())
    assert (alone.least, alone.colluders, alone.needed) == (3, 1, 4)
    assert alone.secrets == secrets
    assert parted.within("B").secrets == {}
    assert (parted.threshold, alone.threshold) == (5, 3)


def test_groups_are_named_by_their_order():
    names = [group_name(index) for index in range(MOST_GROUPS)]
    assert names[:2] + names[25:28] + names[-1:] == ["A", "B", "Z", "AA", "AB", "CG"]
    assert [place_of(name) for name in names] == [*range(1, MOST_GROUPS + 1)]


def test_what_a_digest_holds_is_the_study_without_secrets():
    one = study("abcdef", groups=["ace", "bdf"], colluders=0, secrets={"a": bytes(16)})
    other = study("fedcba", groups=["dbf", "eca"], colluders=0)
    assert one.content() == {
        "name": "lungs",
        "members": members("abcdef"),
        "least": 3,
        "c": 0,
        "groups": [["a", "c", "e"], ["b", "d", "f"]],
    }
    # The order in which a hospital wrote them changes nothing.
    assert digest(other.content()) == digest(
        study("fedcba", groups=["bdf", "ace"], colluders=0).content()
    )
    assert "secrets" not in repr(one)
    assert pickle.loads(pickle.dumps(one)) == one


def test_a_simulated_study_has_the_keys_of_simulated_identities():
    found = Study.simulated(["south", "north", "east", "west"], "run")
    assert [*found.members] == ["east", "north", "south", "west"]
    assert found.members["north"] == Identity.simulated("north", "run").public
    assert (found.least, found.colluders, found.groups) == (3, 1, ())
    with pytest.raises(InputError, match="from 3 to 255 members, got 2"):
        Study.simulated(["south", "north"], "run")
    parted = Study.simulated([*"hgfedcba"], "run", groups=2)
    assert parted.named_groups == {"A": (*"aceg",), "B": (*"bdfh",)}
    with pytest.raises(InputError, match="got 3: a, c, e; 2 groups need 8 members"):
        Study.simulated([*"abcdef"], "run", groups=2)


def test_a_peers_file(tmp_path):
    path = written(tmp_path / "peers.toml")
    found = Study.load(path)
    assert found == Study.of("lungs", members("abcd"))
    path = written(path, least=4, c=0)
    found = Study.load(path)
    assert (found.least, found.colluders) == (4, 0)
    six = {name: key_text(public) for name, public in members("abcdef").items()}
    path = written(path, c=0, members=six, groups=[["f", "e", "d"], ["c", "b", "a"]])
    assert Study.load(path).groups == (("a", "b", "c"), ("d", "e", "f"))


def test_a_file_with_secrets_must_be_the_owners_alone(tmp_path):
    secret = bytes(range(32))
    path = written(tmp_path / "peers.toml", secrets={"b": base64.b64encode(secret).decode()})
    path.chmod(0o644)
    with pytest.raises(InputError, match=r"has the mode 644, .*: chmod 600 \S+peers.toml$"):
        Study.load(path)
    path.chmod(0o600)
    assert Study.load(path).secrets == {"b": secret}
    written(path)
    path.chmod(0o644)
    assert not Study.load(path).secrets


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"least": 2}, "least must be a whole number, at least 3, got 2"),
        ({"least": "3"}, "least must be a whole number, at least 3, got '3'"),
        ({"c": True}, "c must be a whole number, at least 0, got True"),
        ({"c": 2}, "a sum needs least + c = 3 + 2 members, and the study has 4"),
        ({"name": 1}, "a study's name must be a text of at least one letter, got 1"),
        ({"name": ""}, "a study's name must be a text of at least one letter, got ''"),
        (
            {"lest": 3},
            "[study] holds lest, which means nothing; it may hold name, least, c, groups, members, "
            "secrets",
        ),
        ({"groups": ["abcd"]}, "groups must be a list of lists of names, got ['abcd']"),
        ({"groups": [[1]]}, "groups must be a list of lists of names, got [[1]]"),
        (
            {"groups": [["a", "b", "c", "d"]]},
            "groups must be two or more, or none, got one: a, b, c, d; without groups all members "
            "are summed together",
        ),
        ({"members": []}, "[study.members] must be a table of texts, one for each member"),
        ({"members": {"a": 1}}, "[study.members] must be a table of texts"),
        ({"members": {"a": "x"}}, "a: a public key must be ed25519: and 44 letters of base64"),
        ({"members": {}}, "a study must have from 3 to 255 members, got 0"),
        ({"secrets": {"a": "?"}}, "a: a secret must be base64"),
        ({"secrets": {"a": "ä"}}, "a: a secret must be base64"),
        ({"secrets": {"a": "AAAA"}}, "a: a secret must have at least 16 bytes, got 3"),
        ({"secrets": {"x": "A" * 24}}, "secrets hold one for x, which is no member: remove it"),
    ],
)
def test_a_malformed_peers_file_is_named(tmp_path, entries, said):
    path = written(tmp_path / "peers.toml", **entries)
    path.chmod(0o600)
    with pytest.raises(InputError) as caught:
        Study.load(path)
    assert str(caught.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize("text", ["", "study = 1", "[study]\nname = 'a'\n[more]", "[studies]"])
def test_a_file_without_a_study_is_refused(tmp_path, text):
    path = tmp_path / "peers.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        Study.load(path)
    assert str(caught.value) == (
        f"{path}: it must hold the table [study], and nothing else: a peers file is made by fedmed "
        "keys pin"
    )


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"none cannot be read \(No such file or directory\): a pe"
    ):
        Study.load(tmp_path / "none")


@pytest.mark.parametrize(
    "peers",
    [
        Peers("lungs", {}),
        Peers("lungs", members("ba")),
        Peers("Große Studie", {"St. Märy [2]": key(1)}, 4, 0),
        Peers("lungs", members("abcdef"), None, 0, (("a", "b", "c"), ("d", "e", "f"))),
        Peers("lungs", members("abc"), secrets={"b": bytes(range(20))}),
    ],
)
def test_a_peers_file_is_written_as_it_is_read(tmp_path, peers):
    path = tmp_path / "peers.toml"
    peers.save(path)
    assert Peers.load(path) == peers
    assert stat.S_IMODE(path.stat().st_mode) == (0o600 if peers.secrets else 0o644)
    (table,) = tomllib.loads(path.read_text()).values()
    assert table["name"] == peers.name


def test_a_peers_file_that_is_a_link_stays_one(tmp_path):
    path, link = tmp_path / "peers.toml", tmp_path / "link"
    link.symlink_to(path)
    Peers("lungs", members("abc")).save(link)
    assert link.is_symlink()
    assert Study.load(path).tolerated == 0


def test_a_member_that_joins_or_leaves_is_the_difference():
    three, four, five, six = (study("abcdef"[:n], colluders=0) for n in (3, 4, 5, 6))
    assert compared(four, three) == [(("d",), ())]
    assert compared(three, four) == [(("d",), ())]
    assert compared(five, three) == [(("d", "e"), ())]
    assert compared(three, three) == []
    # Three honest ones are a sum like others.
    assert compared(six, three) == []
    assert compared(study("abcd"), study("abc")) == [(("d",), ())]


def test_members_that_change_places_are_the_difference():
    before = study("abcdef", colluders=0, groups=["abc", "def"])
    after = study("abcdef", colluders=0, groups=["abd", "cef"])
    # {a, b, c} - {a, b, d} is c less d; {d, e, f} - {c, e, f} is the same the other way round.
    assert compared(before, after) == [(("c",), ("d",))]
    assert compared(before, before) == []
    # From groups to one sum over all: the groups' sums add up to it.
    assert compared(before, study("abcdef", colluders=0)) == []


def test_a_member_that_leaves_a_group_is_found_behind_several_sums():
    before = study("abcdefghi", colluders=0, groups=["abc", "def", "ghi"])
    after = study("abcdefgh", colluders=0, groups=["adg", "bcefh"])
    # All that was there before less all that is there now.
    assert (("i",), ()) in compared(before, after)


def test_the_sums_of_a_file_in_which_members_or_groups_are_missing():
    assert Peers("lungs", members("ab")).sums == ()
    assert Peers("lungs", members("abc")).sums == (("a", "b", "c"),)
    parted = Peers("lungs", members("abcdefg"), groups=(("a", "b", "c"), ("d", "e", "f")))
    assert parted.sums == (("a", "b", "c"), ("d", "e", "f"))
    # A member that is in no group yet is in no sum.
    whole = tuple("abcdefg")
    assert differences(parted.sums, (whole,), parted.fewest) == [(("g",), ())]
    fewest = {3: 3, 4: 4, 20: 4}
    for count, expected in fewest.items():
        assert Peers("lungs", members(letters(count))).fewest == expected
    assert Peers("lungs", members("abcdef"), 4, 2).fewest == 6


def partition(draw, names, fewest):
    """Draw groups of at least `fewest` members, or none."""
    names = draw.sample(names, len(names))
    groups = []
    while len(names) >= 2 * fewest and draw.random() < 0.8:
        size = draw.randint(fewest, len(names) - fewest)
        groups.append(names[:size])
        names = names[size:]
    return [*groups, names] if groups else []


def exposed(before, after):
    """Return the members in any vector of fewer than least + c entries that the sums span.

    By linear algebra: a vector that is zero outside of some members is in the span of the sums
    exactly if the sums have a lower rank without the columns of these members.
    """
    names = sorted({*before.members, *after.members})
    fewest = after.least + after.colluders
    sums = np.array([[n in g for n in names] for s in (before, after) for g in s.sums], float)
    rank = np.linalg.matrix_rank(sums)
    found = set()
    for size in range(1, fewest):
        for chosen in itertools.combinations(range(len(names)), size):
            smaller = found.issuperset(names[index] for index in chosen)
            if smaller:
                continue
            rest = np.delete(sums, chosen, axis=1)
            if np.linalg.matrix_rank(rest) < rank:
                found.update(support(sums, names, chosen))
    return found


def support(sums, names, chosen):
    """Return those of the chosen members that have an entry in a vector of the span."""
    rest = np.delete(sums, chosen, axis=1)
    _, values, turned = np.linalg.svd(rest.T)
    null = turned[np.sum(values > 1e-9) :]
    vectors = null @ sums[:, chosen]
    return {
        names[i] for i, entry in zip(chosen, abs(vectors).max(axis=0), strict=True) if entry > 1e-9
    }


@pytest.mark.parametrize("seed", range(25))
def test_all_who_are_in_a_small_difference_are_named(seed):
    draw = random.Random(seed)
    names = [*"abcdefghijk"]
    kept = draw.sample(names, draw.randint(8, 11))
    colluders = draw.randint(0, 1)
    before = study(names, colluders=colluders, groups=partition(draw, names, 3 + colluders))
    after = study(kept, colluders=colluders, groups=partition(draw, kept, 3 + colluders))
    found = compared(before, after)
    assert {name for pair in found for side in pair for name in side} == exposed(before, after)
    rows = [[n in g for n in names] for s in (before, after) for g in s.sums]
    rank = np.linalg.matrix_rank(np.array(rows, float))
    for added, subtracted in found:
        # What is said is in the span of the sums: it can be computed.
        vector = [(name in added) - (name in subtracted) for name in names]
        assert np.linalg.matrix_rank(np.array([*rows, vector], float)) == rank
        assert 0 < len(added) + len(subtracted) < 3 + colluders
        assert not {*added} & {*subtracted}


def test_the_largest_study_is_compared_at_once():
    names = letters(255)
    before = study(names, groups=[names[i : i + 5] for i in range(0, 255, 5)])
    after = study(names, groups=[names[i::51] for i in range(51)])
    assert compared(before, after) == []
    moved = [*names]
    moved[0], moved[5] = moved[5], moved[0]
    after = study(names, groups=[moved[i : i + 5] for i in range(0, 255, 5)])
    assert compared(before, after) == [(("h000",), ("h005",))]


def test_the_errors_of_a_study_end_in_what_to_do():
    with pytest.raises(InputError) as caught:
        study("ab")
    assert re.search(r"pin those that are missing with fedmed keys pin$", str(caught.value))
