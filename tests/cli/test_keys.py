import re
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fedmed_flower.cli.main import app
from fedmed_flower.secure.book import Peer, SecureBook
from fedmed_flower.secure.encoding import SecureError
from fedmed_flower.secure.identity import Identity, fingerprint, key_text
from fedmed_flower.secure.study import Peers, Study


def keys(*arguments):
    """Return exit code and printed lines."""
    result = CliRunner().invoke(app, ["keys", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, [line.rstrip() for line in result.stdout.splitlines()]


def refused(*arguments):
    """Return the text of a command that did nothing."""
    code, lines = keys(*arguments)
    assert code == 2
    (line,) = lines
    return line


def public(name):
    return Identity.simulated(name, "run").public


def pinned(path, names, **options):
    Peers("lungs", {name: public(name) for name in names}, **options).save(path)
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "peers.toml"


def test_a_new_key_and_what_is_shown_of_it(tmp_path):
    path = tmp_path / "north.key"
    code, lines = keys("new", "north", "--out", path)
    identity = Identity.load(path)
    assert code == 0
    said = [
        f"  public key:  {key_text(identity.public)}",
        f"  fingerprint: {fingerprint(identity.public)}",
    ]
    assert lines == [
        f"{path}: the secret key of north, which never leaves this machine",
        *said,
        "send the public key to each member of the study, and compare the fingerprint by phone",
    ]
    assert keys("show", path) == (0, ["north", *said])
    secret = path.read_text().split("-----")[2].strip()
    assert secret not in "".join(lines)


def test_a_new_key_overwrites_nothing(tmp_path):
    path = tmp_path / "north.key"
    keys("new", "north", "--out", path)
    assert refused("new", "north", "--out", path) == (
        f"not started: {path} exists already: give the new key another file, or use fedmed keys "
        "show"
    )
    assert refused("new", "north ", "--out", tmp_path / "other").startswith(
        "not started: a hospital's name must have no control characters and no blanks at its ends"
    )
    assert not (tmp_path / "other").exists()


def test_what_others_can_read_is_not_shown(tmp_path):
    path = tmp_path / "north.key"
    keys("new", "north", "--out", path)
    path.chmod(0o640)
    assert refused("show", path) == (
        f"not started: {path} holds secrets and has the mode 640, so others on this machine can "
        f"use it: chmod 600 {path}"
    )
    assert refused("rotate", path).endswith(f"chmod 600 {path}")


def test_show_refuses_what_is_no_file_of_keys(tmp_path):
    assert refused("show", tmp_path / "none") == (
        f"not started: {tmp_path / 'none'} cannot be read (No such file or directory): give a file "
        "of fedmed keys new or of fedmed keys pin"
    )
    path = tmp_path / "a.toml"
    path.write_text("a = 1")
    path.chmod(0o600)
    assert refused("show", path).startswith(
        f"not started: {path} is no key file (it must hold format, name, id, private, and nothing "
        "else)"
    )
    path.write_text("study = 1")
    assert refused("show", path).startswith(f"not started: {path}: it must hold the table [study]")


def test_a_file_of_members_is_begun_and_filled(file):
    code, lines = keys("pin", file, "north", key_text(public("north")), "--study", "lungs")
    assert code == 0
    assert lines == [
        f"pinned north in {file}",
        f"  public key:  {key_text(public('north'))}",
        f"  fingerprint: {fingerprint(public('north'))}",
        "the study lungs: 1 member",
        "  not ready, so there are no secure sums: a study must have from 3 to 255 members, got 1: "
        "pin those that are missing with fedmed keys pin",
    ]
    for name in ("south", "east"):
        code, lines = keys("pin", file, name, key_text(public(name)))
        assert code == 0
    study = Study.load(file)
    assert study.name == "lungs"
    assert study.members == {name: public(name) for name in ("east", "north", "south")}
    assert lines[-6:] == [
        "the study lungs: 3 members",
        f"  fingerprint: {fingerprint(study.content())}",
        "  least: 3 honest members in each sum",
        "  c: 0 members may work with the server",
        "  sum over east, north, south: of at least 3 of 3 members (t = 2), 0 losses tolerated",
        "  since c is 0: a member that works with the server learns the sum of the others",
    ]


def test_what_is_shown_of_a_study(file):
    names = [f"h{number}" for number in range(6)]
    pinned(file, names)
    code, lines = keys("show", file)
    assert code == 0
    assert lines[:3] == [
        "h0",
        f"  public key:  {key_text(public('h0'))}",
        f"  fingerprint: {fingerprint(public('h0'))}",
    ]
    assert lines[18:] == [
        "the study lungs: 6 members",
        f"  fingerprint: {fingerprint(Study.load(file).content())}",
        "  least: 3 honest members in each sum",
        "  c: 1 member may work with the server",
        f"  sum over {', '.join(names)}: of at least 4 of 6 members (t = 4), 2 losses tolerated",
    ]


@pytest.mark.parametrize(("count", "tolerated"), [(3, 0), (4, 0), (5, 1), (6, 2), (10, 4), (20, 9)])
def test_how_many_losses_are_tolerated(file, count, tolerated):
    pinned(file, [f"h{number}" for number in range(count)])
    _, lines = keys("show", file)
    (line,) = (line for line in lines if line.startswith("  sum over"))
    assert re.search(r"\), (\d+) loss(es)? tolerated", line)[1] == str(tolerated)


def test_each_group_has_a_line_of_its_own(file):
    pinned(file, "abcdefg", colluders=0, groups=(("a", "b", "c"), ("d", "e", "f", "g")))
    _, lines = keys("show", file)
    assert [line for line in lines if "sum over" in line] == [
        "  group A: sum over a, b, c: of at least 3 of 3 members (t = 2), 0 losses tolerated",
        "  group B: sum over d, e, f, g: of at least 3 of 4 members (t = 3), 1 loss tolerated",
    ]
    assert lines[-2] == (
        "  questions about data are summed over all: at least 4 of 7 members (t = 4), and of each "
        "group at least 3 or none"
    )


def test_two_who_show_the_same_letters_have_the_same_study(tmp_path):
    files = [tmp_path / name for name in "ab"]
    pinned(files[0], "abc")
    pinned(files[1], "cba")
    one, other = (keys("show", path)[1] for path in files)
    assert one == other
    keys("pin", files[1], "b", key_text(public("x")), "--replace")
    shown = keys("show", files[1])[1]
    assert len({*one} ^ {*shown}) == 6


def test_another_key_for_a_pinned_name_is_refused(file):
    pinned(file, "abc")
    before = file.read_bytes()
    assert refused("pin", file, "a", key_text(public("x"))) == (
        f"not started: {file} pins another key for a, with the fingerprint "
        f"{fingerprint(public('a'))}: ask a by phone whether it has made a new key; if so, give "
        "--replace"
    )
    assert file.read_bytes() == before
    code, lines = keys("pin", file, "a", key_text(public("a")))
    assert (code, lines) == (0, [f"a is pinned in {file} already, with this key"])
    code, lines = keys("pin", file, "a", key_text(public("x")), "--replace")
    assert code == 0
    assert Study.load(file).members["a"] == public("x")
    # The members are the same: no sum holds others' figures than before.
    assert "before and after" not in " ".join(lines)


def test_pins_that_would_mix_up_members_are_refused(file):
    pinned(file, ["north", "south", "east"])
    before = file.read_bytes()
    new = key_text(public("x"))
    said = {
        (
            "North",
            new,
        ): "north and North differ in upper and lower case only: one of them must have",
        ("west", key_text(public("east"))): "east and west have one key, ed25519:",
        ("a" * 65, new): "a member's name must have at most 64 bytes, got 65",
        ("we\nst", new): "a member's name must have no control characters",
    }
    for (name, key), text in said.items():
        assert refused("pin", file, name, key).startswith(
            f"not started: {file} was left as it is: {text}"
        )
    assert refused("pin", file, "west", "x").startswith(
        "not started: a public key must be ed25519: and 44 letters of base64, as fedmed keys show "
        "prints it, got 'x'"
    )
    assert file.read_bytes() == before


def test_a_new_file_needs_the_name_of_a_study_and_an_old_one_keeps_its(file):
    key = key_text(public("a"))
    assert refused("pin", file, "a", key) == (
        f"not started: there is no file {file}: give --study NAME to begin one, with the name that "
        "all members give the study"
    )
    assert refused("pin", file, "a", key, "--study", "").startswith(
        "not started: a study's name must be a text of at least one letter"
    )
    assert not file.exists()
    pinned(file, "abc")
    assert refused("pin", file, "d", key, "--study", "hearts") == (
        f"not started: --study hearts: {file} is of the study lungs; give another file, or leave "
        "--study out"
    )
    assert keys("pin", file, "d", key_text(public("d")), "--study", "lungs")[0] == 0


def test_whose_figures_a_new_member_shows(file):
    pinned(file, "abc")
    _, lines = keys("pin", file, "d", key_text(public("d")))
    assert lines[3] == (
        "if one question is answered before and after this change, the figures of d are the "
        "difference of its sums"
    )


def test_a_rotation_says_what_the_others_do(tmp_path, file):
    path = tmp_path / "a.key"
    Identity.create(path, "St. Märy")
    before = Identity.load(path)
    Peers("lungs", {before.name: before.public}).save(file)
    code, lines = keys("rotate", path)
    after = Identity.load(path)
    (old,) = tmp_path.glob("a.key.old-*")
    assert code == 0
    assert lines == [
        f"{path}: the new secret key of St. Märy",
        f"  public key:  {key_text(after.public)}",
        f"  fingerprint: {fingerprint(after.public)}",
        f"{old}: the old key; delete it when all members have pinned the new one",
        "each member pins the new key in its own file, and so does this hospital, after comparing "
        "the fingerprint by phone; until then it takes part in no secure sum:",
        f"  fedmed keys pin PEERS 'St. Märy' {key_text(after.public)} --replace",
    ]
    # The command does what it says.
    _, _, *arguments = shlex.split(lines[-1])
    assert keys(*[file if each == "PEERS" else each for each in arguments])[0] == 0
    assert Peers.load(file).members == {"St. Märy": after.public}


def test_a_key_that_is_not_there_is_not_rotated(tmp_path):
    assert refused("rotate", tmp_path / "none").endswith(
        "cannot be read (No such file or directory): a hospital's key is made by fedmed keys new"
    )
    assert not [*tmp_path.iterdir()]


def test_a_member_that_is_removed(file):
    pinned(file, "abcd", secrets={"b": bytes(16), "d": bytes(16)})
    code, lines = keys("revoke", file, "d")
    assert code == 0
    assert lines[:3] == [
        f"removed d from {file}; each other member does so in its own file",
        "if one question is answered before and after this change, the figures of d are the "
        "difference of its sums",
        "the study lungs: 3 members",
    ]
    assert "  c: 0 members may work with the server" in lines
    study = Study.load(file)
    assert [*study.members] == ["a", "b", "c"]
    assert study.secrets == {"b": bytes(16)}
    assert refused("revoke", file, "d") == (
        f"not started: {file} pins no key for d; its members: a, b, c"
    )


def test_a_stolen_key_is_removed_also_if_too_few_members_are_left(file):
    pinned(file, "abc")
    code, lines = keys("revoke", file, "a")
    assert code == 0
    assert lines == [
        f"removed a from {file}; each other member does so in its own file",
        "the study lungs: 2 members",
        "  not ready, so there are no secure sums: a study must have from 3 to 255 members, got 2: "
        "pin those that are missing with fedmed keys pin",
    ]
    keys("revoke", file, "b")
    keys("revoke", file, "c")
    assert refused("revoke", file, "c").endswith("pins no key for c; its members: none")


def test_a_member_that_is_removed_leaves_its_group(file):
    pinned(file, "abcdefg", colluders=0, groups=(("a", "b", "c"), ("d", "e", "f", "g")))
    _, lines = keys("revoke", file, "c")
    assert Peers.load(file).groups == (("a", "b"), ("d", "e", "f", "g"))
    assert lines[-1].startswith(
        "  not ready, so there are no secure sums: a group must have at least least + c = 3 + 0 "
        "members, got 2: a, b; 2 groups need 6 members"
    )
    code, lines = keys("regroup", file, "a,b,d", "e,f, g")
    assert code == 0
    assert Study.load(file).groups == (("a", "b", "d"), ("e", "f", "g"))
    assert lines[1] == (
        "if one question is answered before and after this change, the figures of d are the "
        "difference of its sums"
    )


def test_groups_and_whose_figures_they_show(file):
    pinned(file, "abcdef", colluders=0)
    code, lines = keys("regroup", file, "a,b,c", "d,e,f")
    assert code == 0
    assert lines[0] == f"wrote {file}; each other member writes the same groups into its own file"
    assert "before and after" not in " ".join(lines)
    code, lines = keys("regroup", file, "a,b,d", "c,e,f")
    assert lines[1] == (
        "if one question is answered before and after this change, the figures of c less those of "
        "d are the difference of its sums"
    )
    assert Study.load(file).groups == (("a", "b", "d"), ("c", "e", "f"))
    assert keys("regroup", file, "f,e,d,c,b,a")[0] == 0
    assert Study.load(file).groups == ()


def test_several_who_are_in_one_difference_are_named_together(file):
    pinned(file, "abcdefghij", groups=(tuple("abcde"), tuple("fghij")))
    _, lines = keys("regroup", file, "a,b,c,f", "d,e,g,h,i,j")
    assert lines[1] == (
        "if one question is answered before and after this change, the figures of d and e together "
        "less those of f are the difference of its sums"
    )


def test_groups_that_cannot_be_are_refused(file):
    pinned(file, "abcdef", colluders=0)
    before = file.read_bytes()
    said = {
        ("a,b", "c,d,e,f"): "a group must have at least least + c = 3 + 0 members, got 2: a, b; 2",
        ("a,b,c", "c,d,e"): "c is in the groups twice: each member is in one, once",
        ("a,b,c", "d,e,x"): "a group holds 'x', which is no member: pin its key first",
        ("a,b,c", "d,e,"): "a group holds '', which is no member: pin its key first",
        ("a,b,c",): "groups must be two or more, or none, got one: a, b, c; without groups all",
    }
    for groups, text in said.items():
        assert refused("regroup", file, *groups).startswith(
            f"not started: {file} was left as it is: {text}"
        )
    assert file.read_bytes() == before


def test_a_member_that_is_in_no_group_yet(file):
    pinned(file, "abcdef", colluders=0, groups=(tuple("abc"), tuple("def")))
    _, lines = keys("pin", file, "g", key_text(public("g")))
    assert lines[-1] == (
        "  not ready, so there are no secure sums: g: in no group; each member must be in one: "
        "fedmed keys regroup"
    )
    _, lines = keys("regroup", file, "a,b,c", "d,e,f,g")
    assert lines[1].endswith("the figures of g are the difference of its sums")


def test_commands_on_a_file_that_is_not_there(file):
    for arguments in (("revoke", file, "a"), ("regroup", file, "a,b,c", "d,e,f")):
        assert refused(*arguments) == (
            f"not started: {file} cannot be read (No such file or directory): a peers file is made "
            "by fedmed keys pin"
        )


def test_a_folder_in_which_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "peers.toml"
    assert refused("pin", path, "a", key_text(public("a")), "--study", "lungs").startswith(
        f"not started: {path} cannot be written ("
    )
    assert refused("new", "a", "--out", path).startswith(f"not started: {path} cannot be written (")


@pytest.fixture
def book(tmp_path):
    """Return a book in which questions about data are settled over a, b, c, and the key's file."""
    path, key = tmp_path / "a.secure", tmp_path / "a.key"
    made = SecureBook(path, Identity.create(key, "a").id)
    made.begin("run", "data", b"question", b"digest", [*"abc"], b"kept")
    made.settle(b"digest", [*"abc"])
    made.note_peers([Peer("b", 9)])
    made.note_peers([Peer("c", 9)])
    return path, key


def test_questions_about_data_go_to_another_set_after_regroup(file, book):
    path, key = book
    pinned(file, "abd")
    made = SecureBook(path, Identity.load(key).id)
    asked = ("run", "data", b"question", b"other", [*"abd"], b"kept")
    with pytest.raises(SecureError, match="settled over a, b, c"):
        made.begin(*asked)
    before = file.read_bytes()
    code, lines = keys("regroup", file, "--book", path, "--key", key)
    assert code == 0
    assert lines[0] == (
        f"regrouped: {path} is accepted as it is; questions about data, until now answered over a, "
        "b, c, may be answered over another set"
    )
    assert lines[1] == "the study lungs: 3 members"
    made.begin(*asked)
    # The groups stay, and a member's book may be any.
    assert file.read_bytes() == before
    made.note_peers([Peer("b", 1)])
    made.note_peers([Peer("c", 1)])


def test_the_book_of_one_member_alone_is_accepted(file, book):
    path, key = book
    pinned(file, "abc")
    assert keys("regroup", file, "--book", path, "--key", key, "--accept", "b")[0] == 0
    made = SecureBook(path, Identity.load(key).id)
    made.note_peers([Peer("b", 1)])
    with pytest.raises(SecureError, match="the book of c has 1 rows and had 9"):
        made.note_peers([Peer("c", 1)])


def test_a_book_that_was_lost_is_made_anew(file, book):
    path, key = book
    pinned(file, "abc")
    path.unlink()
    with pytest.raises(SecureError, match="is missing"):
        _ = SecureBook(path, Identity.load(key).id).rows
    assert keys("regroup", file, "--book", path, "--key", key)[0] == 0
    assert SecureBook(path, Identity.load(key).id).rows


def test_what_does_not_go_with_a_book_is_refused(file, book, tmp_path):
    path, key = book
    pinned(file, "abc")
    none = tmp_path / "none.secure"
    shown = keys("show", file)
    said = {
        (): "give groups, such as north,south,east, or --book",
        ("--book", path): "--book and --key go together: give both, or none",
        ("a,b,c", "--key", key): "--book and --key go together: give both, or none",
        ("a,b,c", "--accept", "b"): "--accept needs --book: it is this hospital's book that",
        ("--book", path, "--key", key, "--accept", "x"): (
            f"{file} pins no key for x; its members: a, b, c"
        ),
        ("a,b,c", "--book", none, "--key", key): (
            f"there is neither a book {none} nor its head: give the path that the hospital's"
        ),
    }
    for arguments, text in said.items():
        assert refused("regroup", file, *arguments).startswith(f"not started: {text}")
    assert not none.exists()
    assert keys("show", file) == shown


@pytest.mark.parametrize("arguments", [["--help"], ["keys", "--help"], ["keys", "new", "--help"]])
def test_help_loads_no_cryptography(arguments):
    code = (
        "import sys\nfrom fedmed_flower.cli.main import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        "print('LOADED', *({'cryptography', 'numpy', 'tomli_w', 'flwr'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"
