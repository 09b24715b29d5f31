import hashlib
import json
import multiprocessing
import os
import random
import signal
import stat
import struct

import pytest
from audit_trails import finished, identity
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

import fedmed_flower.secure.audit as audit_module
from fedmed_flower.errors import InputError
from fedmed_flower.secure.audit import START, Chain, faults, read_trail, verify
from fedmed_flower.secure.encoding import SecureError
from fedmed_flower.secure.identity import key_text


def chain_of(tmp_path, entries=5):
    chain = Chain(tmp_path / "north.audit", identity("north"), "north")
    for number in range(entries - 1):
        chain.append("note", {"text": f"entry {number}", "value": number / 4})
    return chain


def lines_of(chain):
    return chain.path.read_bytes().splitlines(keepends=True)


def faults_of(path, keys=None):
    """Return what is wrong with a trail by the keys that are known, by default that of north."""
    known = [identity("north").public] if keys is None else keys
    return faults(read_trail(path).entries, "FILE", known)


def piece(letter, content):
    return letter + struct.pack(">Q", len(content)) + content


def test_an_entry_is_the_worked_example(tmp_path):
    north = identity("north")
    chain = Chain(tmp_path / "north.audit", north, "north")
    head = chain.append("note", {"b": b"\x01\xff", "a": [1, 0.5]})
    first, second = map(json.loads, chain.path.read_bytes().splitlines())
    nonce = first["about"].pop("nonce")
    assert len(bytes.fromhex(nonce)) == 16
    assert first["about"] == {"public": key_text(north.public), "role": "hospital", "who": "north"}
    assert first["previous"] == "00" * 32

    listed = piece(b"i", b"1") + piece(b"d", struct.pack(">d", 0.5))
    about = piece(b"s", b"a") + piece(b"l", listed) + piece(b"s", b"b") + piece(b"s", b"01ff")
    content = piece(b"i", b"2") + piece(b"s", b"note") + piece(b"m", about)
    content += piece(b"b", bytes.fromhex(first["head"]))
    expected = hashlib.new("sha512_256", piece(b"l", content)).digest()
    assert head == expected == chain.head
    signed = piece(b"s", b"fedmed-secure/1") + piece(b"s", b"head") + piece(b"b", head)
    signature = bytes.fromhex(second["signature"])
    Ed25519PublicKey.from_public_bytes(north.public).verify(signature, piece(b"l", signed))
    assert second == {
        "number": 2,
        "kind": "note",
        "about": {"a": [1, 0.5], "b": "01ff"},
        "previous": first["head"],
        "head": head.hex(),
        "signature": second["signature"],
    }


def test_a_trail_goes_on_in_the_next_process_and_is_its_owners_alone(tmp_path):
    path = tmp_path / "deep" / "north.audit"
    assert Chain(path, identity("north"), "north").head == START
    assert not path.exists()
    for number in range(3):
        head = Chain(path, identity("north"), "north").append("note", {"number": number})
    entries = Chain.read(path)
    assert [entry.number for entry in entries] == [1, 2, 3, 4]
    assert entries[-1].head == head
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    verify(entries, keys=[identity("north").public])


def test_a_server_has_a_key_of_each_process(tmp_path):
    path = tmp_path / "audit.jsonl"
    for _ in range(2):
        chain = Chain(path, None, "server")
        chain.append("note", {})
        chain.append("note", {})
    entries = Chain.read(path)
    assert [entry.kind for entry in entries] == ["key", "note", "note", "key", "note", "note"]
    assert entries[0].about["role"] == "server"
    assert entries[0].about["public"] != entries[3].about["public"]
    verify(entries)


def test_a_changed_key_is_one_more_entry_and_verified_by_both_keys(tmp_path):
    chain = chain_of(tmp_path)
    other = identity("other")
    Chain(chain.path, other, "north").append("note", {})
    assert faults_of(chain.path, [identity("north").public, other.public]) == []
    assert faults_of(chain.path, []) == []
    assert faults_of(chain.path) == [
        f"line 6 of FILE goes on with the key {key_text(other.public)}, which is not one that was "
        "given for north"
    ]


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ({"a": None}, "of type NoneType"),
        ({"a": True}, "got True of type bool"),
        ({"a": float("nan")}, "got nan of type float"),
        ({"a": float("inf")}, "a finite float"),
        ({"a": 1 << 63}, "a whole number of 64 bits"),
        ({"a": {1, 2}}, "of type set"),
        ({"a": {1: 2}}, "a of an entry must have texts as keys, each once: 1"),
        ({"a": {"\u00e9": 1, "e\u0301": 2}}, "each once"),
        ({"a": "\ud800"}, "a of an entry is no text"),
        ({"heads": {"north": 1}}, "heads of an entry of kind 'note' must be a dict of texts"),
        ({"a": "x" * (1 << 18)}, "must have less than 262,144 bytes"),
        ({"heads": 1}, "heads of an entry of kind 'note' must be a dict of texts, got 1"),
        ([1], "must have a kind and a mapping"),
    ],
)
def test_append_refuses_what_it_could_not_read_back(tmp_path, about, text):
    chain = chain_of(tmp_path)
    before = chain.path.read_bytes()
    with pytest.raises(InputError, match=text):
        chain.append("note", about)
    assert chain.path.read_bytes() == before


def test_append_refuses_what_is_too_deep_and_the_kind_that_is_its_own(tmp_path):
    chain = chain_of(tmp_path)
    deep = []
    deep.append(deep)
    with pytest.raises(InputError, match="at most 16 deep"):
        chain.append("note", {"a": deep})
    with pytest.raises(InputError, match="kind of an entry must be in the Unicode normal form NFC"):
        chain.append("e\u0301", {})
    with pytest.raises(InputError, match="writes entries of kind 'key' itself"):
        chain.append("key", {"who": "north", "role": "hospital", "public": "x", "nonce": ""})


@pytest.mark.parametrize(
    ("kind", "about", "text"),
    [
        ("hello", {"run": "ab12"}, "key of an entry of kind 'hello' must be a text, got None"),
        (
            "opened",
            {"run": "ab12", "round": 1, "digest": b"d", "members": "north"},
            "members of an entry of kind 'opened' must be a list of texts, got 'north'",
        ),
        (
            "masked",
            {"run": "ab12", "round": "1", "digest": b"d", "masked": b"m"},
            "round of an entry of kind 'masked' must be a whole number, got '1'",
        ),
    ],
)
def test_append_asks_for_the_fields_that_are_compared(tmp_path, kind, about, text):
    with pytest.raises(InputError, match=text):
        chain_of(tmp_path).append(kind, about)


def test_one_way_to_write_what_is_equal(tmp_path):
    chain = chain_of(tmp_path, 1)
    chain.append("note", {"text": "e\u0301", "zero": -0.0, "pair": (1, 2)})
    assert Chain.read(chain.path)[-1].about == {"pair": [1, 2], "text": "\u00e9", "zero": 0.0}
    assert b'"zero":0.0' in chain.path.read_bytes()
    assert chain.path.read_bytes().isascii()


def changed(lines):
    lines[2] = lines[2].replace(b"entry 1", b"entry 7")


def deleted(lines):
    del lines[2]


def beginning_deleted(lines):
    del lines[:2]


def inserted(lines):
    lines.insert(3, lines[1])


def swapped(lines):
    lines[2], lines[3] = lines[3], lines[2]


def blank_line(lines):
    lines.insert(2, b"\n")


def other_spelling(lines):
    lines[2] = lines[2].replace(b"0.25", b"2.5e-1")


def torn_in_the_middle(lines):
    lines[2] = lines[2][:40] + b"\n"


def signature_of_another_line(lines):
    first = json.loads(lines[1])
    second = json.loads(lines[2])
    second["signature"] = first["signature"]
    lines[2] = json.dumps(second, separators=(",", ":")).encode() + b"\n"


def rehashed(lines):
    """Change a line and make its head anew, but without the key."""
    entry = audit_module._entry_of(lines[2].rstrip(b"\n"))
    forged = entry._replace(about={**entry.about, "text": "entry 7"})
    forged = forged._replace(head=forged.expected_head())
    assert forged.head != entry.head
    lines[2] = forged.line() + b"\n"


@pytest.mark.parametrize(
    ("tampering", "texts"),
    [
        (changed, ["line 3 of FILE was changed: it is not what its head was made of"]),
        (
            deleted,
            ["before line 3 of FILE 1 entry is missing: it holds entry 4 where entry 3 must stand"],
        ),
        (
            beginning_deleted,
            [
                "before line 1 of FILE 2 entries are missing: it holds entry 3 where entry 1 must "
                "stand"
            ],
        ),
        (
            inserted,
            [
                "line 4 of FILE was added or moved: it holds entry 2 where entry 4 must stand",
            ],
        ),
        (
            swapped,
            [
                "before line 3 of FILE 1 entry is missing: it holds entry 4 where entry 3 must "
                "stand",
                "line 4 of FILE was added or moved: it holds entry 3 where entry 5 must stand",
            ],
        ),
        (
            blank_line,
            [
                "line 3 of FILE was changed: it is no entry of an audit trail",
                "line 4 of FILE was added or moved: it holds entry 3 where entry 4 must stand",
            ],
        ),
        (other_spelling, ["line 3 of FILE was changed: it is no entry of an audit trail"]),
        (torn_in_the_middle, ["line 3 of FILE was changed: it is no entry of an audit trail"]),
        (
            signature_of_another_line,
            ["line 3 of FILE has a wrong signature: it was not written with the key of its owner"],
        ),
        (
            rehashed,
            [
                "line 3 of FILE has a wrong signature: it was not written with the key of its "
                "owner",
                "line 4 of FILE does not follow the line before, which was changed or replaced",
            ],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("known", [True, False], ids=["key-given", "own-key"])
def test_each_kind_of_tampering_is_named(tmp_path, tampering, texts, known):
    chain = chain_of(tmp_path)
    lines = lines_of(chain)
    tampering(lines)
    chain.path.write_bytes(b"".join(lines))
    assert faults_of(chain.path, [identity("north").public] if known else []) == texts


def test_another_form_of_a_letter_in_the_kind_is_a_change(tmp_path):
    chain = chain_of(tmp_path, 2)
    chain.append("not\u00e9", {})
    assert faults_of(chain.path) == []
    lines = lines_of(chain)
    before = lines[2]
    lines[2] = before.replace(b"not\\u00e9", b"note\\u0301")
    assert lines[2] != before
    chain.path.write_bytes(b"".join(lines))
    assert faults_of(chain.path) == ["line 3 of FILE was changed: it is no entry of an audit trail"]


def test_verify_raises_for_the_first_wrong_line(tmp_path):
    chain = chain_of(tmp_path)
    lines = lines_of(chain)
    changed(lines)
    chain.path.write_bytes(b"".join(lines))
    with pytest.raises(SecureError, match=r"^line 3 of north was changed"):
        verify(Chain.read(chain.path), "north")
    lines[3] = b"{}\n"
    chain.path.write_bytes(b"".join(lines))
    with pytest.raises(SecureError, match=r"^line 4 of .*north\.audit was changed: it is no entry"):
        Chain.read(chain.path)
    with pytest.raises(SecureError, match="the audit trail has no entry: its lines were removed"):
        verify([])


def test_a_trail_by_another_key_is_whole_but_not_of_the_one_who_is_known(tmp_path):
    chain = Chain(tmp_path / "false.audit", identity("false"), "north")
    chain.append("note", {})
    assert faults_of(chain.path, []) == []
    (text,) = faults_of(chain.path)
    assert text.startswith("line 1 of FILE goes on with the key ed25519:")


def test_what_names_no_key_is_refused(tmp_path):
    entry = Chain.read(chain_of(tmp_path).path)[1]._replace(number=1, previous=START)
    entry = entry._replace(head=entry.expected_head())
    text = "line 1 of FILE names no key, as the first line must"
    assert faults([entry], "FILE") == [text]
    key = Chain.read(tmp_path / "north.audit")[0]
    key = key._replace(about={**key.about, "public": "ed25519:no"})
    (text,) = faults([key._replace(head=key.expected_head())], "FILE")
    assert text.startswith("line 1 of FILE names no key: a public key must be ed25519:")


def test_forty_random_single_changes_are_all_found(tmp_path):
    trails = finished(tmp_path)
    whole = trails.path("north").read_bytes()
    assert faults_of(trails.path("north")) == []
    file = tmp_path / "changed.audit"
    drawn = random.Random(7)
    for number in range(40):
        place = drawn.randrange(len(whole))
        kind = drawn.choice(["replace", "delete", "insert"])
        data = bytearray(whole)
        if kind == "replace":
            data[place] ^= drawn.randrange(1, 256)
        elif kind == "delete":
            # Without its last end of line nothing of a trail is lost.
            del data[min(place, len(whole) - 2)]
        else:
            data.insert(place, drawn.randrange(256))
        file.write_bytes(data)
        assert faults_of(file), (number, kind, place)


def test_every_change_of_the_last_line_is_found(tmp_path):
    chain = chain_of(tmp_path, 2)
    whole = chain.path.read_bytes()
    file = tmp_path / "changed.audit"
    begin = whole.index(b"\n") + 1
    for place in (*range(begin, len(whole) - 3, 7), *range(len(whole) - 3, len(whole))):
        for letter in b"x0}\n\0":
            if letter != whole[place]:
                file.write_bytes(whole[:place] + bytes([letter]) + whole[place + 1 :])
                assert faults_of(file), (place, letter)


def test_an_unfinished_last_line_is_noticed_and_repaired_by_the_next_append(tmp_path):
    chain = chain_of(tmp_path)
    whole = chain.path.read_bytes()
    head = chain.head
    chain.append("note", {"text": "the last"})
    longer = chain.path.read_bytes()
    for end in range(len(whole) + 1, len(longer) - 1, 7):
        chain.path.write_bytes(longer[:end])
        trail = read_trail(chain.path)
        assert trail.unfinished
        assert faults(trail.entries, "FILE") == []
        assert chain.head == head
        chain.append("note", {"text": "the last"})
        assert chain.path.read_bytes() == longer
    chain.path.write_bytes(whole + bytes(50))
    assert read_trail(chain.path).unfinished
    chain.append("note", {"text": "the last"})
    assert chain.path.read_bytes() == longer


def test_a_last_line_that_lacks_its_end_alone_is_kept(tmp_path):
    chain = chain_of(tmp_path)
    whole = chain.path.read_bytes()
    chain.path.write_bytes(whole[:-1])
    assert len(Chain.read(chain.path)) == 5
    assert not read_trail(chain.path).unfinished
    chain.append("note", {})
    assert chain.path.read_bytes().startswith(whole)
    assert faults_of(chain.path) == []


def test_an_unfinished_line_with_something_after_it_is_wrong(tmp_path):
    chain = chain_of(tmp_path)
    whole = chain.path.read_bytes()
    lines = lines_of(chain)
    chain.path.write_bytes(b"".join(lines[:4]) + lines[4][:60] + lines[4])
    assert faults_of(chain.path) == ["line 5 of FILE was changed: it is no entry of an audit trail"]
    chain.path.write_bytes(whole[:-1] + b"x")
    assert faults_of(chain.path) == ["line 5 of FILE was changed: it is no entry of an audit trail"]


def _die_in_the_middle_of_append(path):
    write = os.write

    def half(descriptor, data):
        write(descriptor, bytes(data)[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    audit_module.os.write = half
    Chain(path, identity("north"), "north").append("note", {"text": "never told"})


def test_a_kill_in_the_middle_of_append_loses_nothing_that_was_told(tmp_path):
    chain = chain_of(tmp_path)
    before = chain.path.read_bytes()
    process = multiprocessing.get_context("spawn").Process(
        target=_die_in_the_middle_of_append, args=(chain.path,)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = chain.path.read_bytes()
    assert left.startswith(before)
    assert len(left) > len(before)
    assert read_trail(chain.path).unfinished
    chain.append("note", {"text": "after the kill"})
    assert chain.path.read_bytes().startswith(before)
    assert faults_of(chain.path) == []
    assert [entry.about.get("text") for entry in Chain.read(chain.path)][-1] == "after the kill"


def _append_many(path, owner, count):
    for number in range(count):
        Chain(path, identity("north"), "north").append("note", {"owner": owner, "value": number})


def test_processes_that_write_at_once_never_write_one_number_twice(tmp_path):
    path = tmp_path / "north.audit"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append_many, args=(path, k, 25)) for k in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    entries = Chain.read(path)
    assert [entry.number for entry in entries] == list(range(1, 77))
    assert faults(entries, "FILE") == []
    for owner in range(3):
        values = [e.about["value"] for e in entries if e.about.get("owner") == owner]
        assert values == list(range(25))


def test_append_and_head_refuse_a_last_line_that_was_changed(tmp_path):
    chain = chain_of(tmp_path)
    lines = lines_of(chain)
    lines[-1] = lines[-1].replace(b"entry 3", b"entry 9")
    chain.path.write_bytes(b"".join(lines))
    for act in (lambda: chain.append("note", {}), lambda: chain.head):
        with pytest.raises(SecureError, match=r"the last line of .*north\.audit was changed"):
            act()
    assert lines_of(chain) == lines


def test_only_the_end_of_a_long_trail_is_read_by_append(tmp_path, monkeypatch):
    chain = chain_of(tmp_path, 2)
    for _ in range(5):
        chain.append("note", {"text": "x" * 200_000})
    reads = []
    pread = os.pread

    def counted(descriptor, size, start):
        reads.append(size)
        return pread(descriptor, size, start)

    monkeypatch.setattr(audit_module.os, "pread", counted)
    chain.append("note", {})
    assert reads == [2 << 18]
    assert faults_of(chain.path) == []


def test_a_long_file_whose_end_holds_no_line_is_not_taken_for_a_new_trail(tmp_path):
    chain = chain_of(tmp_path)
    with chain.path.open("ab") as file:
        file.write(bytes(3 << 18))
    before = chain.path.read_bytes()
    with pytest.raises(SecureError, match=r"the last line of .* was changed"):
        chain.append("note", {})
    assert chain.path.read_bytes() == before


def test_a_trail_that_would_get_too_large_to_be_read_is_not_written(tmp_path, monkeypatch):
    chain = chain_of(tmp_path)
    monkeypatch.setattr(audit_module, "MOST_TEXT", chain.path.stat().st_size + 10)
    with pytest.raises(InputError, match=r"can have at most 1,.* let a new one begin"):
        chain.append("note", {})
    with chain.path.open("ab") as file:
        file.write(b"x" * 20)
    with pytest.raises(InputError, match=r"it has .* bytes, more than .*: give a trail"):
        Chain.read(chain.path)


def test_a_file_that_is_no_trail_is_named_and_not_read_to_its_end(tmp_path):
    file = tmp_path / "north.audit"
    file.write_bytes(b"\n" * 100_000)
    texts = faults_of(file)
    assert len(texts) == 51
    assert texts[-1] == "more lines of FILE may be wrong: the first 50 were read"
    file.write_bytes(b"[" * (3 << 18))
    assert faults_of(file)[0] == "line 1 of FILE was changed: it is no entry of an audit trail"
    file.write_bytes(b"\xff\xfe\n")
    assert len(faults_of(file)) == 1


def test_a_link_or_a_folder_is_no_trail(tmp_path):
    chain = chain_of(tmp_path)
    link = tmp_path / "deep" / "link.audit"
    link.parent.mkdir()
    link.symlink_to(chain.path)
    with pytest.raises(InputError, match="cannot be used"):
        Chain(link, identity("north"), "north").append("note", {})
    with pytest.raises(InputError, match="a link leads out of the folder"):
        Chain.read(link)
    with pytest.raises(InputError, match="cannot be used"):
        Chain(tmp_path, identity("north"), "north").append("note", {})
    with pytest.raises(InputError, match="cannot be read"):
        Chain.read(tmp_path / "nowhere")
