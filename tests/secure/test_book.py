import json
import multiprocessing
import os
import random
import resource
import secrets
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from fedmed_flower.errors import FormatError, InputError
from fedmed_flower.secure import book as book_module
from fedmed_flower.secure.book import Change, Peer, SecureBook, secure_path
from fedmed_flower.secure.encoding import SecureError

FORK = multiprocessing.get_context("fork")
ALL = ("east", "north", "south", "west")
NO_SOUTH = ("east", "north", "west")
NO_WEST = ("east", "north", "south")
QUESTION, OTHER = b"q" * 32, b"o" * 32
WAY_OUT = (
    "put the newest copy back, or accept what is there with `fedmed keys regroup`: after that, "
    "single hospitals' figures could be the difference of two sums"
)
WAIT = "wait until all of the first set take part, or "
DATA_REMEDY = f"{WAIT}let every hospital run `fedmed keys regroup`"
TRAIN_REMEDY = f"{WAIT}train with another seed"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.secure"


@pytest.fixture
def book(path):
    return SecureBook(path, "me")


def head_of(path):
    return path.with_name(f"{path.name}-head")


def attempt(number):
    return bytes([number]) * 32


def begin(book, number=1, kind="train", question=QUESTION, names=ALL, run="run", kept=b"kept"):
    """Begin an attempt, and return its digest."""
    book.begin(run, kind, question, attempt(number), names, kept)
    return attempt(number)


def refused(work, *arguments, **more):
    """Return the text with which a call is refused."""
    with pytest.raises(SecureError) as caught:
        work(*arguments, **more)
    return str(caught.value)


def test_it_lies_beside_the_ledger_and_is_not_taken_for_one():
    assert secure_path(Path("a/north.sqlite")) == Path("a/north.secure")
    assert secure_path(Path("a/north")) == Path("a/north.secure")


def test_both_files_are_made_for_their_owner_alone(tmp_path):
    path = tmp_path / "folder" / "a.secure"
    before = os.umask(0)
    try:
        SecureBook(path, "me").new_run_key("run", b"key")
    finally:
        os.umask(before)
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.secure", "a.secure-head"]
    assert [file.stat().st_mode & 0o777 for file in path.parent.iterdir()] == [0o600, 0o600]
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()


class TestKeys:
    def test_a_key_is_there_in_the_next_process(self, book, path):
        book.new_run_key("run", b"first")
        book.new_run_key("other", b"second")
        assert SecureBook(path, "me").run_key("run") == b"first"
        assert SecureBook(path, "me").run_key("other") == b"second"

    def test_a_run_without_a_hello_has_none(self, book):
        text = refused(book.run_key, "run")
        assert text == "run run has no key here: the server must first ask for a hello"

    def test_a_new_hello_voids_the_older_key(self, book, path):
        old, new = secrets.token_bytes(32), secrets.token_bytes(32)
        book.new_run_key("run", old)
        assert old in path.read_bytes()
        book.new_run_key("run", new)
        assert book.run_key("run") == new
        assert old not in path.read_bytes()

    def test_what_a_closed_run_kept_is_erased_from_the_file(self, book, path):
        key = secrets.token_bytes(32)
        # One that fits a page of the file, and one of several pages.
        contents = [secrets.token_bytes(size) for size in (300, 30_000)]
        book.new_run_key("run", key)
        book.new_run_key("other", b"stays")
        for number, content in enumerate(contents):
            begin(book, number, question=attempt(number), kept=content)
        begin(book, 7, question=OTHER, run="other", kept=b"stays too")
        book.settle(attempt(0), NO_WEST)
        whole = path.read_bytes()
        assert key in whole
        assert contents[0] in whole
        assert contents[1][-1000:] in whole
        rows = book.rows
        book.close_run("run")
        whole = path.read_bytes()
        for secret in (key, *contents):
            assert not any(secret[at : at + 12] in whole for at in range(0, len(secret) - 12, 4))
        assert refused(book.run_key, "run") == (
            "the key of run run was erased when the run was closed: begin a new run"
        )
        assert refused(book.kept, attempt(0)) == (
            "what attempt 0000000000000000 kept was erased when the run was closed: begin a new run"
        )
        assert book.run_key("other") == b"stays"
        assert book.kept(attempt(7)) == b"stays too"
        assert book.rows == rows + 1
        assert "settled over east, north, south" in refused(book.settle, attempt(0), ALL)
        assert "lack south" in refused(begin, book, 9, question=attempt(0), names=NO_SOUTH)

    def test_runs_are_idle_by_the_day_on_which_they_began_something(self, book, monkeypatch):
        day = [20_000]
        monkeypatch.setattr(book_module, "_today", lambda: day[0])
        book.new_run_key("used", b"key of one")
        book.new_run_key("left", b"key of other")
        day[0] += 20
        begin(book, run="used")
        day[0] += 12
        assert book.idle_runs(32) == ["left"]
        assert book.idle_runs(33) == []
        assert book.idle_runs(12) == ["left", "used"]
        book.close_run("left")
        assert book.idle_runs(0) == ["used"]

    def test_a_run_of_a_book_without_days_is_idle(self, book, path):
        book.new_run_key("old", b"key")
        with sqlite3.connect(path) as connection:
            connection.execute("DELETE FROM about WHERE key = 'used old'")
        assert book.idle_runs(30) == ["old"]


class TestOneQuestionOneSet:
    def test_what_an_attempt_kept(self, book, path):
        begin(book, kept=b"shares")
        assert SecureBook(path, "me").kept(attempt(1)) == b"shares"

    def test_an_unknown_digest(self, book):
        text = (
            "attempt 0101010101010101 did not begin here: the server must first ask for the masked "
            "reply"
        )
        assert refused(book.kept, attempt(1)) == text
        assert refused(book.settle, attempt(1), ALL) == text

    def test_a_masked_reply_is_not_made_twice_for_one_digest(self, book):
        begin(book)
        text = (
            "attempt 0101010101010101 was answered before, and a masked reply is not made twice "
            "for one digest: ask again with a new nonce"
        )
        for question in (QUESTION, OTHER):
            assert refused(begin, book, question=question, run="other") == text
        book.settle(attempt(1), ALL)
        assert refused(begin, book) == text

    def test_the_same_set_again_is_no_new_entry(self, book):
        digest = begin(book)
        book.settle(digest, ("west", "north", "east"))
        rows = book.rows
        for members in (NO_SOUTH, ["north", "east", "west"]):
            book.settle(digest, members)
        assert book.rows == rows

    def test_another_set_for_a_digest(self, book):
        digest = begin(book)
        book.settle(digest, NO_SOUTH)
        assert refused(book.settle, digest, NO_WEST) == (
            "this attempt was settled over east, north, west, not east, north, south: the "
            "difference of two sums would be single hospitals' figures: ask for that set"
        )

    @pytest.mark.parametrize("began", ["before", "after"])
    def test_another_set_for_another_attempt_of_the_question(self, book, began):
        begin(book, 1)
        if began == "before":
            begin(book, 2, run="resumed")
        book.settle(attempt(1), NO_SOUTH)
        if began == "after":
            begin(book, 2, run="resumed")
        assert refused(book.settle, attempt(2), ALL) == (
            "this question was settled over east, north, west, not east, north, south, west: the "
            f"difference of two sums would be single hospitals' figures: {TRAIN_REMEDY}"
        )
        book.settle(attempt(2), NO_SOUTH)

    def test_a_new_attempt_before_any_set_is_free(self, book):
        begin(book, 1)
        begin(book, 2, names=NO_SOUTH)
        book.settle(attempt(2), NO_SOUTH)
        assert "not east, north, south, west" in refused(book.settle, attempt(1), ALL)

    def test_an_attempt_that_could_not_be_opened_over_the_same_set(self, book):
        begin(book, 1)
        book.settle(attempt(1), NO_WEST)
        assert refused(begin, book, 2, names=("east", "west")) == (
            "this question was settled over east, north, south, and the hospitals that are asked "
            f"now lack north, south: {TRAIN_REMEDY}"
        )
        # Nothing of it was written.
        assert "did not begin here" in refused(book.kept, attempt(2))
        begin(book, 2, names=NO_WEST)

    def test_a_set_beyond_the_names(self, book):
        digest = begin(book, names=NO_SOUTH)
        assert refused(book.settle, digest, ("north", "south", "zoo")) == (
            "attempt 0101010101010101 asks east, north, west, and the set has south, zoo too: "
            "settle over hospitals that were asked"
        )

    def test_questions_about_data_are_settled_over_the_first_set(self, book):
        for number in (1, 2, 3):
            begin(book, number, "data", question=attempt(number))
        book.settle(attempt(1), NO_SOUTH)
        assert refused(book.settle, attempt(2), ALL) == (
            "questions about data were settled over east, north, west, not east, north, south, "
            f"west: the difference of two sums would be single hospitals' figures: {DATA_REMEDY}"
        )
        assert refused(begin, book, 4, "data", question=OTHER, names=NO_WEST) == (
            "questions about data were settled over east, north, west, and the hospitals that are "
            f"asked now lack west: {DATA_REMEDY}"
        )
        book.settle(attempt(2), NO_SOUTH)
        begin(book, 4, "data", question=OTHER, names=NO_SOUTH)

    def test_training_questions_may_have_different_sets_each(self, book):
        begin(book, 1, "data", question=OTHER)
        book.settle(attempt(1), ALL)
        sets = {2: ALL, 3: ALL, 4: NO_SOUTH, 5: NO_SOUTH, 6: ALL}
        for number, members in sets.items():
            begin(book, number, question=attempt(number), run=f"run {number}")
            book.settle(attempt(number), members)
        # Another attempt of a question is no change.
        begin(book, 7, question=attempt(4), run="again")
        book.settle(attempt(7), NO_SOUTH)
        found = book.changes()
        assert found == [("run 4", ALL, NO_SOUTH), ("run 6", NO_SOUTH, ALL)]
        assert isinstance(found[0], Change)

    def test_names_are_compared_in_one_form(self, book):
        digest = begin(book, names=("m\u00fcnchen", "n", "o"))
        book.settle(digest, ("mu\u0308nchen", "n"))
        book.settle(digest, ("m\u00fcnchen", "n"))

    @pytest.mark.parametrize(
        ("names", "text"),
        [
            ((), "a set of hospitals must name at least one: got none"),
            (("a", "b", "a"), "a set of hospitals names a twice: name each once"),
        ],
    )
    def test_a_set_that_is_none(self, book, names, text):
        digest = begin(book)
        assert refused(begin, book, 2, names=names) == text
        assert refused(book.settle, digest, names) == text

    def test_a_kind_that_is_none(self, book):
        assert refused(begin, book, kind="other") == "kind must be 'data' or 'train', got 'other'"


class TestPeers:
    def test_a_count_that_fell_is_refused(self, book):
        for rows in (0, 5, 5, 9):
            book.note_peers([Peer("south", rows)])
        book.note_peers([Peer("north", 3)])
        assert refused(book.note_peers, [Peer("south", 8)]) == (
            "the book of south has 8 rows and had 9: it is lost or was restored from a copy, so it "
            "may answer one question over two sets: ask south what happened, then accept its book "
            "with `fedmed keys regroup`; if two runs began at once, begin this one again"
        )
        book.note_peers([Peer("south", 9)])

    def test_another_book_is_refused_until_regroup(self, book):
        book.note_peers([Peer("south", 5, "first")])
        assert "south has another book than before" in refused(
            book.note_peers, [Peer("south", 9, "second")]
        )
        book.regroup(["south"])
        book.note_peers([Peer("south", 1, "second")])

    def test_messages_of_two_runs_may_be_read_in_any_order(self, book):
        book.note_peers([Peer("south", 5, mark=b"key one")], "one")
        book.note_peers([Peer("south", 6, mark=b"key two")], "two")
        book.note_peers([Peer("south", 8, mark=b"second")], "two", reply=True)
        book.note_peers([Peer("south", 7, mark=b"first")], "one", reply=True)
        book.note_peers([Peer("south", 5, mark=b"key one")], "one")
        again = [Peer("south", 7, mark=b"other")]
        assert "has 7 rows and had 7" in refused(book.note_peers, again, "one", True)
        late = [Peer("south", 8, mark=b"key")]
        assert "has 8 rows and had 8" in refused(book.note_peers, late, "one")

    def test_of_several_peers_none_is_noted_if_one_is_refused(self, book):
        book.note_peers([Peer("south", 5)])
        rows = book.rows
        both = [Peer("north", 5), Peer("south", 4)]
        assert "book of south" in refused(book.note_peers, both)
        assert book.rows == rows
        book.note_peers([Peer("north", 1)])

    def test_each_book_has_an_id_of_its_own(self, book, tmp_path):
        other = SecureBook(tmp_path / "other.secure", "me")
        assert len(book.id) == 32
        assert book.id == SecureBook(book.path, "me").id != other.id

    @pytest.mark.parametrize("rows", [-1, 2**63, True, 1.0, "3", None])
    def test_what_is_no_count(self, book, rows):
        assert refused(book.note_peers, [Peer("south", rows)]) == (
            f"the row count of south must be a whole number, at least 0, got {rows!r}"
        )

    def test_regroup_accepts_one_or_all(self, book):
        for name in ("north", "south", "west"):
            book.note_peers([Peer(name, 9)])
        book.regroup(["south"])
        book.note_peers([Peer("south", 1)])
        assert "book of north" in refused(book.note_peers, [Peer("north", 1)])
        book.regroup()
        for name in ("north", "west"):
            book.note_peers([Peer(name, 1)])


class TestRows:
    def test_each_change_is_one_entry_and_nothing_else_is(self, book, path):
        steps = [
            (lambda: book.new_run_key("run", b"a"), 1),
            (lambda: book.new_run_key("run", b"b"), 1),
            (lambda: book.run_key("run"), 0),
            (lambda: begin(book), 1),
            (lambda: book.kept(attempt(1)), 0),
            (lambda: book.settle(attempt(1), ALL), 1),
            (lambda: book.settle(attempt(1), ALL), 0),
            (lambda: refused(book.settle, attempt(1), NO_WEST), 0),
            (lambda: refused(begin, book), 0),
            (book.changes, 0),
            (lambda: book.note_peers([Peer("south", 2)]), 1),
            (lambda: book.note_peers([Peer("south", 2)]), 0),
            (lambda: book.close_run("run"), 1),
            (lambda: book.close_run("run"), 0),
            (book.regroup, 1),
        ]
        rows = 0
        for work, more in steps:
            work()
            rows += more
            assert book.rows == rows
            content = {"format": 1, "identity": "me", "rows": rows}
            assert json.loads(head_of(path).read_text()) == content


CALLS = {
    "rows": lambda book: book.rows,
    "new_run_key": lambda book: book.new_run_key("new", b"key"),
    "run_key": lambda book: book.run_key("run"),
    "begin": lambda book: begin(book, 9, question=OTHER),
    "kept": lambda book: book.kept(attempt(1)),
    "settle": lambda book: book.settle(attempt(1), ALL),
    "note_peers": lambda book: book.note_peers([Peer("south", 2)]),
    "changes": lambda book: book.changes(),
    "idle_runs": lambda book: book.idle_runs(1),
    "close_run": lambda book: book.close_run("run"),
}


class TestFailsClosed:
    """A book that is not certainly the newest of this hospital answers nothing."""

    @pytest.fixture
    def used(self, book):
        book.new_run_key("run", b"key")
        begin(book)
        book.settle(attempt(1), ALL)
        return book

    def refuse_all(self, path, text, identity="me"):
        before = {file: file.read_bytes() for file in path.parent.iterdir()}
        for call in CALLS.values():
            assert refused(call, SecureBook(path, identity)) == text
        assert {file: file.read_bytes() for file in path.parent.iterdir()} == before

    def test_each_call_works_on_sound_files(self, used):
        for call in CALLS.values():
            call(used)

    def test_the_book_is_missing(self, used, path):
        path.unlink()
        head = head_of(path)
        text = f"the book of secure sums {path} is missing, and its head {head} is there: {WAY_OUT}"
        self.refuse_all(path, text)
        book = SecureBook(path, "me")
        book.regroup()
        assert book.rows == 1
        assert path.stat().st_mode & 0o777 == 0o600
        begin(book)
        book.settle(attempt(1), NO_WEST)

    def test_the_head_is_missing(self, used, path):
        head_of(path).unlink()
        text = (
            f"{head_of(path)} is missing, which tells whether the book of secure sums {path} is "
            f"the newest: {WAY_OUT}"
        )
        self.refuse_all(path, text)
        SecureBook(path, "me").regroup()
        assert SecureBook(path, "me").rows == 4

    @pytest.mark.parametrize("entries", [1, 3])
    def test_the_book_is_an_older_copy(self, used, path, entries):
        copy = path.read_bytes()
        for _ in range(entries):
            used.new_run_key("run", b"newer")
        path.write_bytes(copy)
        text = (
            f"the book of secure sums {path} is older than its head {head_of(path)}: it has 3 "
            f"entries instead of {3 + entries}: {WAY_OUT}"
        )
        self.refuse_all(path, text)
        book = SecureBook(path, "me")
        book.regroup()
        assert book.rows == 4
        # What the copy knows still holds.
        assert "settled over" in refused(book.settle, attempt(1), NO_WEST)
        book.settle(attempt(1), ALL)

    def test_both_are_an_older_copy_which_the_others_see(self, used, path, tmp_path):
        copies = {file: file.read_bytes() for file in (path, head_of(path))}
        peer = SecureBook(tmp_path / "peer.secure", "peer")
        used.new_run_key("run", b"newer")
        peer.note_peers([Peer("me", used.rows)])
        for file, content in copies.items():
            file.write_bytes(content)
        assert "the book of me has 3 rows and had 4" in refused(
            peer.note_peers, [Peer("me", used.rows)]
        )

    def test_the_head_is_an_older_copy(self, used, path):
        head = head_of(path).read_bytes()
        used.new_run_key("run", b"newer")
        head_of(path).write_bytes(head)
        # As after a kill between the two.
        assert used.rows == 4
        used.new_run_key("run", b"newest")
        head_of(path).write_bytes(head)
        text = (
            f"{head_of(path)} is older than the book of secure sums {path}: it knows 3 entries "
            f"instead of 5: {WAY_OUT}"
        )
        self.refuse_all(path, text)

    def test_another_identity(self, used, path, tmp_path):
        text = "{} belongs to another identity than this hospital's key file: " + WAY_OUT
        self.refuse_all(path, text.format(path), identity="you")
        other = tmp_path / "other.secure"
        SecureBook(other, "you").new_run_key("run", b"key")
        shutil.copy(head_of(other), head_of(path))
        self.refuse_all(path, text.format(head_of(path)))
        SecureBook(path, "you").regroup()
        assert SecureBook(path, "you").run_key("run") == b"key"

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            ("", "{} cannot be read (not valid JSON: "),
            ("[]", "{} holds a list, not a JSON object: "),
            ('{"rows": 3, "identity": "me"}', "format in {} must be a whole number"),
            ('{"format": 1, "identity": "me"}', "rows in {} must be a whole number, at least 0, "),
            ('{"format": 1, "identity": "me", "rows": -1}', "rows in {} must be a whole number"),
            ('{"format": 1, "rows": 3}', "{} belongs to another identity"),
        ],
    )
    def test_a_damaged_head(self, used, path, content, text):
        head_of(path).write_text(content)
        for call in CALLS.values():
            assert refused(call, SecureBook(path, "me")).startswith(text.format(head_of(path)))
        used.regroup()
        assert used.rows == 4

    @pytest.mark.parametrize("content", [b"", b"no database at all" * 300])
    def test_a_damaged_book(self, used, path, content):
        path.write_bytes(content)
        text = f"the book of secure sums {path} cannot be used ("
        for call in (*CALLS.values(), SecureBook.regroup):
            assert refused(call, SecureBook(path, "me")).startswith(text)
        path.unlink()
        used.regroup()
        assert used.rows == 1

    def test_a_book_that_lost_its_end(self, used, path):
        used.new_run_key("run", secrets.token_bytes(9000))
        path.write_bytes(path.read_bytes()[:-100])
        assert "the end of the file is missing" in refused(lambda: used.rows)

    @pytest.mark.parametrize("seed", range(4))
    def test_a_book_of_which_bytes_are_others(self, used, path, seed):
        """No answer but a sound one, or an error that a user can read."""
        rng = random.Random(seed)
        sound = path.read_bytes()
        head = head_of(path).read_bytes()
        for _ in range(20):
            damaged = bytearray(sound)
            for _ in range(rng.choice([1, 8, 200])):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged)
            head_of(path).write_bytes(head)
            for name in ("rows", "run_key", "kept", "settle", "changes", "note_peers"):
                try:
                    CALLS[name](SecureBook(path, "me"))
                except InputError:
                    continue

    def test_files_of_a_later_version(self, used, path):
        head = head_of(path).read_text()
        head_of(path).write_text(head.replace('"format": 1', '"format": 2'))
        with pytest.raises(FormatError, match=r"secure-head was written by a later fedmed-flower"):
            used.run_key("run")
        head_of(path).write_text(head)
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 2")
        connection.close()
        with pytest.raises(FormatError, match=r"ledger\.secure was written by a later"):
            used.run_key("run")

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "a.secure"
        text = refused(SecureBook, path, "me")
        assert text.startswith(f"the book of secure sums {path} cannot be used (")

    def test_regroup_says_what_is_given_up(self, book, path, caplog):
        begin(book, 1, "data")
        begin(book, 2, "train", question=OTHER)
        book.settle(attempt(1), ALL)
        book.settle(attempt(2), ALL)
        book.regroup()
        assert caplog.messages == [
            f"regrouped: {path} is accepted as it is; questions about data, until now answered "
            "over east, north, south, west, may be answered over another set"
        ]
        begin(book, 3, "data", names=NO_WEST)
        book.settle(attempt(3), NO_WEST)
        # The attempt itself keeps its set, and so does a training question.
        assert "this attempt was" in refused(book.settle, attempt(1), NO_WEST)
        assert "this question was" in refused(begin, book, 4, question=OTHER, names=NO_WEST)


class Model:
    """What a book should do, in plain sets; each method returns a part of the refusal, if any."""

    def __init__(self):
        self.keys = {}
        self.attempts = {}
        self.settled = {}
        self.peers = {}
        self.order = []
        self.rows = 0

    def new_run_key(self, run, private):
        self.keys[run] = private
        self.rows += 1

    def close_run(self, run):
        mine = [a for a in self.attempts.values() if a["run"] == run]
        if self.keys.get(run) or any(a["kept"] for a in mine):
            self.rows += 1
        if run in self.keys:
            self.keys[run] = None
        for each in mine:
            each["kept"] = None

    def bound(self, kind, question):
        if question in self.settled:
            return self.settled[question]
        if kind == "data":
            return next((u for q, u in self.settled.items() if q.startswith(b"data")), None)
        return None

    def begin(self, run, kind, question, digest, names, kept):
        if digest in self.attempts:
            return "not made twice"
        bound = self.bound(kind, question)
        if bound is not None and not bound <= set(names):
            return "are asked now lack"
        about = {"run": run, "kind": kind, "question": question, "names": set(names)}
        self.attempts[digest] = about | {"kept": kept, "set": None}
        self.rows += 1
        return None

    def settle(self, digest, members):
        if digest not in self.attempts:
            return "did not begin here"
        about, chosen = self.attempts[digest], set(members)
        if about["set"] is not None:
            return None if about["set"] == chosen else "this attempt was settled over"
        if not chosen <= about["names"]:
            return "settle over hospitals that were asked"
        bound = self.bound(about["kind"], about["question"])
        if bound is not None and bound != chosen:
            return "the difference of two sums"
        about["set"] = chosen
        if about["question"] not in self.settled:
            self.settled[about["question"]] = chosen
            if about["kind"] == "train":
                self.order.append((about["run"], tuple(sorted(chosen))))
        self.rows += 1
        return None

    def note_peers(self, peers):
        ((name, rows, *_),) = peers
        if rows < self.peers.get(name, -1):
            return "and had"
        if rows != self.peers.get(name):
            self.peers[name] = rows
            self.rows += 1
        return None

    def regroup(self, names=()):
        self.settled = {q: u for q, u in self.settled.items() if not q.startswith(b"data")}
        for name in names or list(self.peers):
            self.peers.pop(name, None)
        self.rows += 1

    def changes(self):
        pairs = zip(self.order, self.order[1:], strict=False)
        return [(run, u, v) for (_, u), (run, v) in pairs if u != v]


def random_call(rng):
    """Return a method's name and arguments, few enough to meet again."""
    run = rng.choice(["a", "b", "c"])
    names = rng.choice([ALL, ALL, ALL, NO_SOUTH, NO_WEST])
    digest = attempt(rng.randrange(30))
    kind = rng.choice(["data", "train"])
    question = f"{kind} {rng.randrange(4)}".encode()
    return rng.choice(
        [
            ("new_run_key", run, rng.randbytes(8)),
            *[("begin", run, kind, question, digest, names, rng.randbytes(20))] * 4,
            *[("settle", digest, rng.choice([ALL, ALL, NO_SOUTH, NO_WEST]))] * 6,
            ("note_peers", [Peer(rng.choice(ALL), rng.randrange(6))]),
            *[("close_run", run)] * (rng.random() < 0.3),
            *[("regroup", rng.choice([(), ("south",)]))] * (rng.random() < 0.2),
        ]
    )


def require_equal(book, model):
    assert book.rows == model.rows
    assert book.changes() == model.changes()
    for run, key in model.keys.items():
        if key is None:
            assert "was erased" in refused(book.run_key, run)
        else:
            assert book.run_key(run) == key
    for digest, about in model.attempts.items():
        if about["kept"] is None:
            assert "was erased" in refused(book.kept, digest)
        else:
            assert book.kept(digest) == about["kept"]


def follow_model(path, seed, calls):
    rng = random.Random(seed)
    model = Model()
    book = SecureBook(path, "me")
    refusals = set()
    for _ in range(calls):
        name, *arguments = random_call(rng)
        expected = getattr(model, name)(*arguments)
        if expected is None:
            getattr(book, name)(*arguments)
        else:
            refusals.add(expected)
            assert expected in refused(getattr(book, name), *arguments)
        if rng.random() < 0.1:
            book = SecureBook(path, "me")
    require_equal(book, model)
    return refusals


def test_it_does_what_a_simple_model_does(path, tmp_path):
    refusals = set()
    for seed in range(3):
        refusals |= follow_model(tmp_path / f"{seed}.secure", seed, 120)
    # Every rule was met.
    assert len(refusals) == 7


@pytest.mark.slow
def test_it_does_what_a_simple_model_does_at_length(tmp_path):
    for seed in range(100, 108):
        follow_model(tmp_path / f"{seed}.secure", seed, 400)


def together(*works):
    """Do things at once, each in a process, and return what each returns or is refused with."""
    gate, queue = FORK.Barrier(len(works)), FORK.SimpleQueue()

    def child(number):
        gate.wait(60)
        try:
            queue.put((number, works[number]()))
        except SecureError as error:
            queue.put((number, str(error)))

    processes = [FORK.Process(target=child, args=(number,)) for number in range(len(works))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(works)
    return [text for _, text in sorted(queue.get() for _ in works)]


RACES = {
    "one digest": ("train", QUESTION, QUESTION, 1, 1),
    "one question": ("train", QUESTION, QUESTION, 1, 2),
    "one study": ("data", QUESTION, OTHER, 1, 2),
}


@pytest.mark.parametrize("race", RACES)
def test_of_two_processes_that_settle_two_sets_one_wins(tmp_path, race):
    kind, *questions, first, second = RACES[race]
    for trial in range(4):
        path = tmp_path / f"{trial}.secure"
        book = SecureBook(path, "me")
        for number, question in {first: questions[0], second: questions[1]}.items():
            begin(book, number, kind, question)
        rows = book.rows
        sets = (NO_SOUTH, NO_WEST)
        answers = together(
            lambda path=path: SecureBook(path, "me").settle(attempt(first), NO_SOUTH),
            lambda path=path: SecureBook(path, "me").settle(attempt(second), NO_WEST),
        )
        assert sorted(answer is None for answer in answers) == [False, True]
        winner = answers.index(None)
        assert f"settled over {', '.join(sets[winner])}, not" in answers[1 - winner]
        assert book.rows == rows + 1
        book.settle(attempt((first, second)[winner]), sets[winner])


def test_processes_that_write_at_once_make_one_book_and_lose_no_entry(path):
    def work(number):
        book = SecureBook(path, "me")
        for index in range(5):
            book.new_run_key(f"run {number} {index}", bytes([number, index]))

    assert together(*(lambda number=number: work(number) for number in range(4))) == [None] * 4
    book = SecureBook(path, "me")
    assert book.rows == 20
    assert json.loads(head_of(path).read_text())["rows"] == 20
    for number in range(4):
        assert book.run_key(f"run {number} 4") == bytes([number, 4])
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, head_of(path).name]


def test_a_kill_between_the_commit_and_the_head(book, path, monkeypatch):
    begin(book)
    head = head_of(path).read_text()

    def be_killed(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(SecureBook, "_write_head", be_killed)
        process = FORK.Process(target=book.settle, args=(attempt(1), ALL))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert head_of(path).read_text() == head
    assert "settled over" in refused(book.settle, attempt(1), NO_WEST)
    book.settle(attempt(1), ALL)
    assert book.rows == 2
    assert json.loads(head_of(path).read_text())["rows"] == 2


def test_a_kill_in_a_regroup_leaves_a_book_that_answers_nothing(book, path, monkeypatch):
    for number in range(3):
        begin(book, number)
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(SecureBook, "_write_head", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        process = FORK.Process(target=SecureBook(path, "me").regroup)
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert "is older than its head" in refused(lambda: book.rows)
    book.regroup()
    assert book.rows == 2


def test_a_full_disk_writes_nothing_and_leaves_the_book_whole(book, path):
    begin(book)
    size = path.stat().st_size

    def work():
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8192, hard))
        begin(SecureBook(path, "me"), 2, kept=bytes(100_000))

    (text,) = together(work)
    assert text.startswith(f"the book of secure sums {path} cannot be used (")
    assert book.rows == 1
    begin(book, 2)


def write_and_tell(path, writer, seed):
    """Make entries for ever, and tell each when it is made."""
    rng = random.Random(seed)
    while True:
        book = SecureBook(path, "me")
        run = str(rng.randrange(5))
        key = rng.randbytes(32)
        book.new_run_key(run, key)
        tell(writer, ["key", run, key.hex()])
        digest, question = rng.randbytes(32), rng.randbytes(32)
        kept = rng.randbytes(rng.choice([10, 9000]))
        names = rng.choice([ALL, NO_SOUTH])
        book.begin(run, "train", question, digest, names, kept)
        tell(writer, ["begun", digest.hex(), kept[:10].hex()])
        book.settle(digest, names)
        tell(writer, ["settled", digest.hex(), names])


def tell(writer, entry):
    # Fewer bytes than PIPE_BUF are written as a whole.
    os.write(writer, json.dumps(entry).encode() + b"\n")


def killed_writer(path, rng, wait_for):
    """Kill a writer some moment after so many entries; return all that it told."""
    reader, writer = os.pipe()
    process = FORK.Process(target=write_and_tell, args=(path, writer, rng.random()))
    process.start()
    os.close(writer)
    with os.fdopen(reader) as file:
        told = [json.loads(file.readline()) for _ in range(wait_for)]
        time.sleep(rng.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        return told + [json.loads(line) for line in file]


def kill_writers(folder, kills, seed):
    rng = random.Random(seed)
    keys = {}
    for trial in range(kills):
        # Each fifth begins without a book.
        path = folder / f"{trial // 5}.secure"
        if trial % 5 == 0:
            keys = {}
        before = SecureBook(path, "me").rows if trial % 5 else 0
        told = killed_writer(path, rng, wait_for=trial % 5)
        book = SecureBook(path, "me")
        assert before + len(told) <= book.rows <= before + len(told) + 1
        keys |= {run: bytes.fromhex(key) for kind, run, key in told if kind == "key"}
        differ = [run for run, key in keys.items() if book.run_key(run) != key]
        # The last key may have been written and not told.
        assert len(differ) <= (book.rows > before + len(told))
        for run in differ:
            keys[run] = book.run_key(run)
        for kind, text, content in told:
            if kind == "begun":
                assert book.kept(bytes.fromhex(text)).startswith(bytes.fromhex(content))
            if kind == "settled":
                book.settle(bytes.fromhex(text), content)
                assert "settled over" in refused(book.settle, bytes.fromhex(text), NO_WEST)
        digest = rng.randbytes(32)
        book.begin("parent", "train", digest, digest, ALL, b"")
        book.settle(digest, ALL)


@pytest.mark.slow
def test_fifty_kills_at_random_moments_lose_nothing_that_was_told(tmp_path):
    kill_writers(tmp_path, 50, seed=2)
