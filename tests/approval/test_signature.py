import pytest
from app_bundles import bundle, write_app

from fedmed_flower.approval.bundle import bundle_at
from fedmed_flower.approval.signature import SIGNATURE, sign, signature_of
from fedmed_flower.errors import InputError
from fedmed_flower.secure.identity import Identity, key_text


@pytest.fixture
def consortium(tmp_path):
    return Identity.create(tmp_path / "consortium.key", "consortium")


def test_a_signed_app_names_who_vouches_for_it(tmp_path, consortium):
    folder = write_app(tmp_path / "app")
    assert signature_of(bundle_at(folder)[0]) is None
    signed = sign(folder, consortium)
    assert signed == bundle_at(folder)[0]
    assert signature_of(signed) == (consortium.public, "consortium")


@pytest.mark.parametrize(
    "change",
    [
        {"client": "answer = 41\n"},
        {"config": "rounds = 4"},
        {"version": "1.0.1"},
        {"dependencies": ""},
    ],
)
def test_any_change_makes_the_signature_void(tmp_path, consortium, change):
    folder = write_app(tmp_path / "app")
    sign(folder, consortium)
    changed, _ = bundle(folder, **change)
    with pytest.raises(InputError, match=f"{SIGNATURE} of the bundle does not hold"):
        signature_of(changed)


def test_one_more_file_makes_the_signature_void(tmp_path, consortium):
    folder = write_app(tmp_path / "app")
    sign(folder, consortium)
    (folder / "toy" / "more.py").write_text("")
    with pytest.raises(InputError, match="does not hold"):
        signature_of(bundle_at(folder)[0])


def test_anothers_key_under_the_signature_is_void(tmp_path, consortium):
    folder = write_app(tmp_path / "app")
    sign(folder, consortium)
    other = Identity.create(tmp_path / "other.key", "other")
    path = folder / SIGNATURE
    path.write_text(path.read_text().replace(key_text(consortium.public), key_text(other.public)))
    with pytest.raises(InputError, match="does not hold"):
        signature_of(bundle_at(folder)[0])


@pytest.mark.parametrize("text", ["[", "format = 1", "format = 2\nsigner = 1"])
def test_a_signature_that_is_none_is_refused(tmp_path, text):
    folder = write_app(tmp_path / "app")
    (folder / SIGNATURE).write_text(text)
    with pytest.raises(InputError, match=f"{SIGNATURE} of the bundle does not hold"):
        signature_of(bundle_at(folder)[0])


def test_signing_again_after_a_change_holds(tmp_path, consortium):
    folder = write_app(tmp_path / "app")
    first = sign(folder, consortium)
    write_app(folder, client="answer = 41\n")
    second = sign(folder, consortium)
    assert first.digest != second.digest
    assert signature_of(second).name == "consortium"


def test_a_signature_that_would_not_travel_is_refused(tmp_path, consortium):
    folder = write_app(tmp_path / "app")
    (folder / ".gitignore").write_text(f"{SIGNATURE}\n")
    with pytest.raises(InputError, match=f"leaves {SIGNATURE} out"):
        sign(folder, consortium)


def test_only_a_folder_is_signed(tmp_path, consortium):
    with pytest.raises(InputError, match="is no folder"):
        sign(tmp_path / "none", consortium)
