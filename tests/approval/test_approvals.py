import os
import stat
from datetime import UTC, datetime

import pytest
from app_bundles import bundle, write_app

from fedmed_flower.approval.approvals import LIST, Approvals
from fedmed_flower.approval.gate import write_commands
from fedmed_flower.approval.rules import parse
from fedmed_flower.approval.signature import sign
from fedmed_flower.errors import FormatError, InputError
from fedmed_flower.secure.identity import Identity

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def rules(*texts):
    return dict(map(parse, texts))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "list"


@pytest.fixture
def app(tmp_path):
    return bundle(tmp_path / "app")


def test_nothing_runs_before_it_is_approved(folder, app):
    (found, _) = app
    refusal = Approvals.load(folder).refusal(found, found.declared)
    assert refusal == (f"app lab/toy 1.0.0 (SHA-256 {found.digest[:16]}...) is not approved here")


def test_an_approved_app_runs_with_its_own_settings_and_those_allowed(folder, app):
    found, content = app
    Approvals.load(folder).with_bundle(found, content, rules("rounds=1..5", "seed=*")).save()
    approvals = Approvals.load(folder)
    assert approvals.refusal(found, {"rounds": 3}) is None
    assert approvals.refusal(found, {"rounds": 5, "seed": 9}) is None
    refusal = approvals.refusal(found, {"rounds": 6, "privacy": "patient"})
    assert refusal == (
        f"settings of app lab/toy 1.0.0 (SHA-256 {found.digest[:16]}...) are not approved here: "
        "privacy is patient, allowed is the app's none; "
        "rounds is 6, allowed is the app's 3 or 1..5"
    )


def test_settings_in_a_text_are_seen_through(folder, tmp_path):
    found, content = bundle(tmp_path / "app", config='rounds = 3\nsettings = ""')
    Approvals.load(folder).with_bundle(found, content, rules("seed=1|2")).save()
    approvals = Approvals.load(folder)
    assert approvals.refusal(found, {"rounds": 3, "settings": "{seed = 2}"}) is None
    assert approvals.refusal(found, {"rounds": 3, "settings": "seed = 2"}) is None
    told = approvals.refusal(found, {"rounds": 3, "settings": "{seed = 2, min-sites = 1000}"})
    assert told.endswith("not approved here: min-sites is 1000, allowed is the app's 1")
    # A text that cannot be read is no way round.
    broken = approvals.refusal(found, {"rounds": 3, "settings": "{seed ="})
    assert "settings is {seed =, allowed is the app's nothing" in broken


def test_a_changed_file_is_another_app(folder, app, tmp_path):
    found, content = app
    Approvals.load(folder).with_bundle(found, content, {}).save()
    changed, _ = bundle(tmp_path / "changed", client="answer = 41\n")
    assert "is not approved here" in Approvals.load(folder).refusal(changed, {})


def test_a_signers_apps_run_as_long_as_the_signer_is_approved(folder, tmp_path):
    consortium = Identity.create(tmp_path / "c.key", "consortium")
    other = Identity.create(tmp_path / "o.key", "other")
    signed = sign(write_app(tmp_path / "app"), consortium)
    Approvals.load(folder).with_signer("others", other.public, {}).save()
    approvals = Approvals.load(folder)
    assert approvals.refusal(signed, signed.declared).endswith(
        "is not approved here, and consortium who signed it is not either"
    )
    approvals.with_signer("consortium", consortium.public, rules("seed=5")).save()
    approvals = Approvals.load(folder)
    assert approvals.refusal(signed, signed.declared) is None
    assert approvals.refusal(signed, {**signed.declared, "seed": 5}) is None
    assert approvals.refusal(signed, {**signed.declared, "seed": 6}).endswith(
        "not approved here: seed is 6, allowed is the app's 0 or 5"
    )
    tampered, _ = bundle(tmp_path / "app", client="answer = 41\n")
    assert "does not hold" in approvals.refusal(tampered, tampered.declared)
    left, entry = approvals.without("consortium")
    assert entry.name == "consortium"
    assert left.refusal(signed, signed.declared) is not None


def test_a_rule_for_an_unknown_setting_is_refused(folder, app):
    found, content = app
    with pytest.raises(InputError, match="has no setting roundz: a setting that may change"):
        Approvals.load(folder).with_bundle(found, content, rules("roundz=1"))


def test_revoked_by_the_first_digits(folder, app):
    found, content = app
    Approvals.load(folder).with_bundle(found, content, {}).save()
    approvals = Approvals.load(folder)
    for text in (found.digest[:7], "0" * 64, "toy"):
        with pytest.raises(InputError, match="0 entries of"):
            approvals.without(text)
    left, _ = approvals.without(found.digest[:8].upper())
    left.save()
    assert Approvals.load(folder).refusal(found, found.declared) is not None


def test_the_version_before_is_the_one_that_was_approved_last(folder, tmp_path):
    approvals = Approvals.load(folder)
    assert approvals.before(bundle(tmp_path / "new")[0]) is None
    for day, version in ((1, "1.0.0"), (3, "1.2.0"), (2, "1.1.0")):
        found, content = bundle(tmp_path / version, version=version)
        approvals = approvals.with_bundle(found, content, {}, NOW.replace(day=day))
    new, _ = bundle(tmp_path / "new", version="2.0.0")
    assert approvals.before(new).version == "1.2.0"


def test_asked_for_are_kept_up_to_a_bound_and_forgotten(folder, tmp_path):
    approvals = Approvals.load(folder)
    for number in range(20):
        found, content = bundle(tmp_path / str(number), client=f"answer = {number}\n")
        assert approvals.remember(found, content)
    assert approvals.remember(found, content)
    more = bundle(tmp_path / "more", client="answer = 20\n")
    assert not approvals.remember(*more)
    assert len(approvals.asked()) == 20
    approvals.with_bundle(found, content, {}).save()
    assert len(Approvals.load(folder).asked()) == 19
    assert Approvals.load(folder).forget() == 19
    assert Approvals.load(folder).asked() == []


def test_a_list_that_others_can_change_is_refused(folder, app):
    found, content = app
    Approvals.load(folder).with_bundle(found, content, {}).save()
    (folder / LIST).chmod(0o664)
    with pytest.raises(
        InputError, match=rf"others on this machine can change it: chmod go-w \S+{LIST}"
    ):
        Approvals.load(folder)
    (folder / LIST).chmod(0o644)
    folder.chmod(0o777)
    with pytest.raises(InputError, match="others on this machine can change it: chmod go-w"):
        Approvals.load(folder)


def test_a_new_list_is_its_owners_whatever_the_umask(folder, app):
    found, content = app
    before = os.umask(0o002)
    try:
        Approvals.load(folder).remember(found, content)
        Approvals.load(folder).with_bundle(found, content, {}).save()
        commands = write_commands(folder)
    finally:
        os.umask(before)
    assert Approvals.load(folder).refusal(found, found.declared) is None
    for path in (folder, commands):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("name", ["", LIST])
def test_a_list_of_another_user_is_refused(folder, app, name):
    found, content = app
    Approvals.load(folder).with_bundle(found, content, {}).save()
    os.chown(folder / name, 12345, -1)
    with pytest.raises(InputError, match="belongs to user 12345: make a list of your own"):
        Approvals.load(folder)


def test_a_kept_bundle_that_was_changed_is_named(folder, app, tmp_path):
    found, content = app
    approvals = Approvals.load(folder)
    approvals.remember(found, content)
    (path,) = (folder / "asked").iterdir()
    path.write_bytes(bundle(tmp_path / "other", client="answer = 41\n")[1])
    with pytest.raises(InputError, match=f"{path} was changed since it was kept: delete it"):
        approvals.asked()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not valid TOML"),
        ("format = 1\nextra = 2", "it must hold format, bundle and signer"),
        ("format = 1\nbundle = 2", "bundle must be a list of tables"),
        ("format = 1\n[[bundle]]\nname = 'a'", "each bundle must hold name, sha256"),
        (
            "format = 1\n[[bundle]]\nname = 'a'\nsha256 = 'b'\napproved = ''\n[bundle.settings]",
            "sha256 must be 64 hexadecimal digits, got 'b'",
        ),
        (
            "format = 1\n[[signer]]\nname = 'a'\npublic-key = 'b'\napproved = ''\n"
            "[signer.settings]",
            "a public key must be ed25519",
        ),
        (
            f"format = 1\n[[bundle]]\nname = 'a'\nsha256 = '{'0' * 64}'\napproved = ''\n"
            "[bundle.settings]\nseed = 1",
            "the rule of seed must be",
        ),
        (
            f"format = 1\n[[bundle]]\nname = 1\nsha256 = '{'0' * 64}'\napproved = ''\n"
            "[bundle.settings]",
            "name, sha256 and approved of each bundle must be texts",
        ),
    ],
)
def test_a_broken_list_approves_nothing(folder, text, message):
    folder.mkdir()
    (folder / LIST).write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        Approvals.load(folder)
    assert str(folder / LIST) in str(raised.value)


def test_a_list_of_a_later_version_is_refused(folder):
    folder.mkdir()
    (folder / LIST).write_text("format = 2")
    with pytest.raises(FormatError, match="written by a later fedmed-flower"):
        Approvals.load(folder)
