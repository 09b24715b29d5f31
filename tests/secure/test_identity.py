import base64
import os
import re
import stat
import subprocess
import sys
import unicodedata

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedmed_flower.errors import FormatError, InputError
from fedmed_flower.secure.encoding import SecureError, encoded
from fedmed_flower.secure.identity import (
    Identity,
    fingerprint,
    key_of,
    key_text,
    require_name,
    verify,
    write_whole,
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "north.key"
    Identity.create(path, "north")
    return path


def test_a_key_is_what_it_was_when_it_is_loaded(tmp_path):
    path = tmp_path / "new" / "north.key"
    made = Identity.create(path, "St. Märy")
    loaded = Identity.load(path)
    assert (loaded.name, loaded.public, loaded.id) == ("St. Märy", made.public, made.id)
    assert re.fullmatch("[0-9a-f]{32}", made.id)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["north.key"]


def test_a_strict_umask_or_a_lax_one_changes_nothing(tmp_path):
    before = os.umask(0)
    try:
        Identity.create(tmp_path / "key", "north")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_two_keys_differ_in_all():
    one, other = (Identity.simulated(name, "run") for name in ("a", "b"))
    assert one.public != other.public
    assert one.id != other.id


def test_the_file_holds_the_private_key_as_others_write_it(file):
    # openssl writes the same PEM; the text around it is a comment to it.
    pem = re.search(r"-----BEGIN.*END PRIVATE KEY-----", file.read_text(), re.DOTALL)[0]
    private = serialization.load_pem_private_key(pem.encode(), None)
    assert private.public_key().public_bytes_raw() == Identity.load(file).public


def test_a_key_file_is_not_overwritten(file):
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"north\.key exists already: give the new key another"):
        Identity.create(file, "north")
    assert file.read_bytes() == before


def test_nothing_is_left_of_a_key_that_could_not_be_written(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedmed_flower.files._sync", full)
    with pytest.raises(InputError, match=r"key cannot be written \(No space left on device\)"):
        Identity.create(tmp_path / "key", "north")
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "there").write_text("")
    with pytest.raises(InputError, match=r"there/key cannot be written"):
        Identity.create(tmp_path / "there" / "key", "north")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o777])
def test_a_key_that_others_can_use_is_refused(file, mode):
    file.chmod(mode)
    with pytest.raises(InputError) as caught:
        Identity.load(file)
    assert str(caught.value) == (
        f"{file} holds secrets and has the mode {mode:03o}, so others on this machine can use it: "
        f"chmod 600 {file}"
    )
    subprocess.run(str(caught.value).rpartition(": ")[2], shell=True, check=True)
    assert Identity.load(file).name == "north"


def test_the_command_that_mends_a_file_quotes_its_name(tmp_path):
    path = tmp_path / "a key; ls"
    Identity.create(path, "north")
    path.chmod(0o644)
    with pytest.raises(InputError, match=re.escape(f"chmod 600 '{path}'")):
        Identity.load(path)


def test_a_key_may_be_reached_through_a_link(file, tmp_path):
    link = tmp_path / "folder" / "link"
    link.parent.mkdir()
    link.symlink_to(file)
    assert Identity.load(link).public == Identity.load(file).public


def changed(file, old, new):
    text = file.read_text()
    assert re.search(old, text, re.DOTALL)
    file.write_text(re.sub(old, new, text, flags=re.DOTALL))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name = .north.", "name = 1", "name must be a text"),
        ("name = .north.", "", "it must hold format, name, id, private, and nothing else"),
        ("name = .north.", 'name = "a"\nb = 1', "it must hold format, name, id, private, and"),
        ("name = .north.", 'name = " a"', "a hospital's name must have no control characters"),
        ('id = "[^"]*"', 'id = "x"', "id must be 32 hexadecimal digits, got 'x'"),
        ("MC4CAQ", "MC4CAR", "private is no PEM of a private key without a password"),
        ('private = """.*"""', 'private = ""', "private is no PEM of a private key"),
    ],
)
def test_a_malformed_key_file_is_refused(file, old, new, said):
    changed(file, old, new)
    with pytest.raises(InputError) as caught:
        Identity.load(file)
    assert str(caught.value).startswith(f"{file} is no key file ({said}")
    assert str(caught.value).endswith("or give the file that fedmed keys new has made")


@pytest.mark.parametrize("password", [None, b"word"])
def test_keys_of_another_kind_are_refused(file, password):
    kind = serialization.BestAvailableEncryption(password) if password else None
    private = Ed25519PrivateKey.generate() if password else rsa.generate_private_key(65537, 2048)
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        kind or serialization.NoEncryption(),
    )
    changed(file, 'private = """.*"""', f'private = """\n{pem.decode()}"""')
    said = "without a password" if password else "private is not an Ed25519 key"
    with pytest.raises(InputError, match=said):
        Identity.load(file)


def test_what_is_no_toml_or_later_or_not_there_is_refused(file, tmp_path):
    with pytest.raises(InputError, match=r"none cannot be read \(No such file or directory\): a "):
        Identity.load(tmp_path / "none")
    changed(file, "format = 1", "format = 2")
    with pytest.raises(FormatError, match="was written by a later fedmed-flower"):
        Identity.load(file)
    for content in (b"x", b"\xff", b"a = " + b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"north\.key cannot be read \(not valid TOML"):
            Identity.load(file)
    file.write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(InputError, match=r"it has 1,048,577 bytes, more than 1,048,576"):
        Identity.load(file)


def test_an_error_repeats_nothing_of_the_key(file):
    secret = file.read_text().split("-----")[2].strip()
    for old in ("MC4CAQ", 'id = "', "END PRIVATE"):
        content = file.read_text()
        changed(file, old, "?")
        with pytest.raises(InputError) as caught:
            Identity.load(file)
        assert secret[10:] not in str(caught.value)
        file.write_text(content)
    identity = Identity.load(file)
    assert repr(identity) == f"Identity(name='north', public='{key_text(identity.public)}')"


def test_a_new_key_takes_the_place_of_the_old_one(file):
    before = Identity.load(file)
    after, old = Identity.rotate(file)
    assert (after.name, after.id) == (before.name, before.id)
    assert after.public != before.public
    assert Identity.load(file).public == after.public
    assert Identity.load(old).public == before.public
    letters = base64.urlsafe_b64encode(before.public).decode()[:8]
    assert old == file.with_name(f"north.key.old-{letters}")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (file, old)} == {0o600}


def test_a_rotation_that_was_broken_off_goes_on(file):
    before = Identity.load(file)
    content = file.read_bytes()
    _, old = Identity.rotate(file)
    # As if the new key had not been written.
    file.write_bytes(content)
    after, again = Identity.rotate(file)
    assert again == old
    assert Identity.load(old).public == before.public
    assert Identity.load(file).public == after.public


def test_a_rotation_overwrites_no_other_old_key(file, tmp_path):
    content = file.read_bytes()
    _, old = Identity.rotate(file)
    file.write_bytes(content)
    old.unlink()
    Identity.create(old, "south")
    with pytest.raises(InputError, match=rf"{re.escape(old.name)} exists already: move that file"):
        Identity.rotate(file)
    assert Identity.load(old).name == "south"


def test_a_rotation_keeps_a_link(file, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(file)
    after, old = Identity.rotate(link)
    assert link.is_symlink()
    assert Identity.load(file).public == after.public
    assert old.name.startswith("link.old-")
    assert (file.parent / old.name).exists()


def test_a_signature_is_ed25519_over_label_and_content(file):
    identity = Identity.load(file)
    signature = identity.sign("hello", b"content")
    key = Ed25519PublicKey.from_public_bytes(identity.public)
    key.verify(signature, encoded(("fedmed-secure/1", "hello", b"content")))
    verify(identity.public, "hello", b"content", signature, "north")


def test_a_signature_of_something_else_is_refused():
    north = Identity.simulated("north", "run")
    south = Identity.simulated("south", "run")
    signature = north.sign("hello", b"content")
    wrong = [
        (south.public, "hello", b"content", signature),
        (north.public, "alive", b"content", signature),
        (north.public, "hello", b"contents", signature),
        (north.public, "hello", b"content", signature[:-1]),
        (north.public, "hello", b"content", b""),
        (north.public, "hello", b"content", bytes([signature[0] ^ 1]) + signature[1:]),
        (north.public[:-1], "hello", b"content", signature),
        (north.public, "hello", b"content", "text"),
        # From one label to the other no letter moves.
        (north.public, "hellocon", b"tent", signature),
    ]
    for arguments in wrong:
        with pytest.raises(SecureError, match=r"^the signature of north \(\w+\) does not hold"):
            verify(*arguments, "north")


def test_simulated_keys_follow_from_name_and_run():
    one = Identity.simulated("north", "run")
    assert one.public == Identity.simulated("north", "run").public
    assert one.id == Identity.simulated("north", "run").id
    others = [("north", "other"), ("south", "run"), ("northrun", ""), ("run", "north")]
    for name, run in others:
        assert Identity.simulated(name, run).public != one.public
    verify(one.public, "hello", b"", one.sign("hello", b""), "north")


def test_a_public_key_as_text_and_back():
    public = bytes(range(32))
    assert key_text(public) == "ed25519:" + base64.b64encode(public).decode()
    assert key_of(key_text(public)) == public


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ed25519:",
        base64.b64encode(bytes(32)).decode(),
        "ed25519:" + base64.b64encode(bytes(31)).decode(),
        "ed25519:" + base64.b64encode(bytes(33)).decode(),
        "x25519:" + base64.b64encode(bytes(32)).decode(),
        "ed25519:ed25519:" + base64.b64encode(bytes(32)).decode(),
        # The same bytes, in base64 that nobody writes.
        "ed25519:" + "A" * 42 + "B=",
        "ed25519: " + base64.b64encode(bytes(32)).decode(),
        "ed25519:" + base64.b64encode(bytes(32)).decode() + "\n",
        "ed25519:ä",
    ],
)
def test_a_text_that_is_no_public_key_is_refused(text):
    with pytest.raises(InputError) as caught:
        key_of(text)
    assert str(caught.value).startswith(
        "a public key must be ed25519: and 44 letters of base64, as fedmed keys show prints it, got"
    )


def test_a_fingerprint_is_eight_groups_of_four_and_changes_with_any_bit():
    said = {fingerprint(bytes(32))}
    assert re.fullmatch(r"([A-Z2-7]{4} ){7}[A-Z2-7]{4}", *said)
    for bit in range(256):
        said.add(fingerprint((1 << bit).to_bytes(32, "big")))
    assert len(said) == 257


@pytest.mark.parametrize("name", ["north", "St. Märy", "Хабаровск 2", "a" * 64, "ä" * 32, "東京"])
def test_names_of_hospitals(name):
    require_name(name, "a member's name")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, "must be a text of at least one letter, got None"),
        ("", "must be a text of at least one letter, got ''"),
        (" a", "must have no control characters and no blanks at its ends, got ' a'"),
        ("a ", "must have no control characters"),
        ("a\nb", "must have no control characters and no blanks at its ends, got 'a\\nb'"),
        ("a\u202eb", "must have no control characters"),
        ("a\u00a0b", "must have no control characters"),
        ("a\ud800", "must have no control characters"),
        ("a" * 65, f"must have at most 64 bytes, got 65: {'a' * 65}"),
        ("ä" * 33, f"must have at most 64 bytes, got 66: {'ä' * 33}"),
        (unicodedata.normalize("NFD", "Märy"), "must be in the Unicode normal form NFC, got"),
    ],
)
def test_names_that_could_be_read_in_two_ways_are_refused(name, said):
    with pytest.raises(InputError) as caught:
        require_name(name, "a member's name")
    assert str(caught.value).startswith(f"a member's name {said}")


def test_a_file_for_all_can_be_read_by_all(tmp_path):
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "a", b"x", private=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    write_whole(tmp_path / "a", b"y", private=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert (tmp_path / "a").read_bytes() == b"y"


def test_windows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(InputError, match="does not run on Windows"):
        Identity.create(tmp_path / "key", "north")
    assert not [*tmp_path.iterdir()]
