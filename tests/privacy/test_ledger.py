import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import sqlite3
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import dp_event, pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TinyClient, ask, bits, context_of, says

from fedmed_flower.data.site import simulation
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.privacy.accounting import Release, epsilon_of
from fedmed_flower.privacy.ledger import TRAIN, Ledger, Limit, purpose_in_sums

STEP, COUNT = Release(0.1, 2.0), Release(1.0, 10.0)
NOBODY = 65534


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def charge(ledger, patients, release=COUNT, count=1, run="a", purpose="train", **more):
    return ledger.charge(patients, release, count, run=run, purpose=purpose, **more)


def limit(epsilon, delta=1e-5, name="the limit"):
    return Limit(epsilon, delta, name)


def composed(accountant, *releases):
    """What dp-accounting makes of some events (rate, noise, count), at delta 1e-5."""
    for rate, noise, count in releases:
        event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise))
        accountant.compose(event, count)
    return accountant.get_epsilon(1e-5)


def cost(ledger, patients, run=None):
    return epsilon_of(ledger.released(patients, run), 1e-5)


def fork(work):
    """Do something in a child process; its number."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def told_by_child(work):
    """Return the text that a function returns, or that of the error which it raises."""
    reader, writer = os.pipe()

    def tell():
        try:
            text = work()
        except InputError as error:
            text = str(error)
        os.write(writer, str(text).encode())

    assert os.waitstatus_to_exitcode(os.waitpid(fork(tell), 0)[1]) == 0
    os.close(writer)
    with os.fdopen(reader) as file:
        return file.read()


def unusable(path, detail):
    return (
        f"the privacy ledger {path} cannot be used ({detail}): repair its folder or disk, or "
        "restore it from a copy; without it nobody knows what was released"
    )


def test_rounds_a_restart_and_two_runs_cost_what_dp_accounting_composes(path):
    patients = range(100)
    for number in range(3):
        charge(Ledger(path), patients, STEP, 20, server_round=number)
    ledger = Ledger(path)
    charge(ledger, patients, STEP, 20, server_round=3)
    charge(ledger, patients, Release(0.3, 3.0), 7, run="b")
    charge(ledger, patients, COUNT, 2, run="b", purpose="val")
    first, second = [(0.1, 2.0, 80)], [(0.3, 3.0, 7), (1.0, 10.0, 2)]
    for run, releases in ((None, first + second), ("a", first), ("b", second)):
        got = cost(Ledger(path), patients, run)
        assert got == pytest.approx(composed(pld.PLDAccountant(), *releases), rel=0.01)
        assert got < composed(rdp.RdpAccountant(), *releases)


@pytest.mark.parametrize(
    ("others", "shared"),
    [
        (range(10, 20), False),
        (range(9, 20), True),
        (range(3, 5), True),
        (range(-5, 30), True),
        ([9] * 3, True),
        (reversed(range(10)), True),
        (map(str, range(10)), True),
        ([f" {number}.0" for number in range(10)], True),
        (["5a"], False),
        (np.arange(10), True),
        (np.arange(10, dtype=np.float32), True),
        ([(5,)], False),
        ([5.5], False),
    ],
)
def test_sets_of_patients_add_up_where_they_share_one(path, others, shared):
    ledger, others = Ledger(path), list(others)
    charge(ledger, range(10))
    charge(ledger, others, STEP, 3, run="b")
    both = Counter({COUNT: 1, STEP: 3})
    assert ledger.released(range(10)) == (both if shared else {COUNT: 1})
    assert ledger.released(others) == (both if shared else {STEP: 3})
    assert ledger.released(others, "b") == {STEP: 3}
    assert ledger.released(others, "a") == ({COUNT: 1} if shared else {})


def test_a_set_that_was_never_charged_costs_what_its_patients_have_cost(path):
    ledger = Ledger(path)
    charge(ledger, [1, 2])
    charge(ledger, [3], STEP)
    assert ledger.released([2, 3, 4]) == {COUNT: 1, STEP: 1}
    assert ledger.released([4]) == {}
    assert [entry.patients for entry in ledger.entries()] == [2, 1]


def test_order_and_repetition_make_no_other_set(path):
    ledger = Ledger(path)
    for patients in (["x", "y", "z"], ["z", "y", "x", "x"], ("y", np.str_("x"), "z")):
        charge(ledger, patients)
    (entry,) = ledger.entries()
    assert (entry.rounds, entry.patients) == (3, 3)
    assert entry.releases == {COUNT: 3}


names = st.one_of(st.text(max_size=3), st.integers(-3, 3), st.booleans(), st.binary(max_size=2),
                  st.sampled_from([-1.0, 0.0, 0.5, 2.0, 1e300, int(1e300), 10**400]))  # fmt: skip
names |= st.sampled_from(["1", " 1", "1.0", "001", "-2", "1.5", "0", "1a", "١"])
names |= st.tuples(names) | st.tuples(names, names)


def as_people_read_it(name):
    """Return a patient's name, a whole number as one however it is written."""
    if isinstance(name, tuple):
        return tuple(map(as_people_read_it, name))
    if not isinstance(name, str):
        return name
    try:
        whole = name.strip().removesuffix(".0")
        return int(whole) if whole.isascii() and "_" not in whole and "+" not in whole else name
    except ValueError:
        return name.strip()


@settings(max_examples=40, deadline=None)
@given(names, names)
def test_two_patients_are_one_exactly_where_a_person_holds_them_for_equal(a, b):
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        charge(ledger, [a])
        assert bool(ledger.released([b])) == (as_people_read_it(a) == as_people_read_it(b))
        assert ledger.released([a]) == {COUNT: 1}


def test_large_numbers_that_a_float_cannot_tell_apart_are_two_patients(path):
    ledger = Ledger(path)
    charge(ledger, [2**53])
    assert ledger.released([2**53 + 1]) == {}
    assert ledger.released([np.uint64(2**53)]) == ledger.released([2.0**53]) == {COUNT: 1}


@pytest.mark.parametrize(
    "patient", [None, float("nan"), np.inf, frozenset("ab"), object(), ("a", None)]
)
def test_a_patient_whose_name_could_change_is_refused(path, patient):
    ledger, part = Ledger(path), patient[1] if isinstance(patient, tuple) else patient
    text = (
        "a patient must be a text, a finite number or a tuple of those, got one of type "
        f"{type(part).__name__}"
    )
    with pytest.raises(InputError, match=says(text)):
        charge(ledger, ["a", patient])
    assert ledger.entries() == []


def test_a_charge_of_nothing_is_refused(path):
    ledger = Ledger(path)
    with pytest.raises(InputError, match=says("a ledger needs at least one patient")):
        charge(ledger, [])
    text = "the number of releases must be at least 1, got 0"
    with pytest.raises(InputError, match=says(text)):
        charge(ledger, [1], count=0)
    with pytest.raises(InputError, match="sampling_rate must be above 0"):
        charge(ledger, [1], Release(0.0, 1.0))
    assert ledger.entries() == []


@pytest.mark.parametrize("kind", ["run_limit", "budget"])
def test_a_limit_is_reached_but_never_passed_and_what_is_declined_costs_nothing(path, kind):
    ledger = Ledger(path)
    costs = [epsilon_of({COUNT: count}, 1e-5) for count in range(1, 6)]
    allowed = {kind: limit(costs[3])}
    for _ in range(4):
        charge(Ledger(path), range(5), **allowed)
    text = "the limit would be passed"
    for patients in (range(5), range(4, 9)):
        with pytest.raises(DeclinedError, match=says(text)):
            charge(ledger, patients, **allowed)
    assert cost(ledger, range(5)) == costs[3]
    assert [entry.patients for entry in ledger.entries()] == [5]
    charge(ledger, range(5, 9), **allowed)
    charge(ledger, range(5), Release(1.0, 1e6), **{kind: limit(costs[3] + 1e-3)})


def test_the_limit_of_a_run_knows_that_run_alone_and_the_budget_all(path):
    ledger, one = Ledger(path), epsilon_of([COUNT], 1e-5)
    for run in ("a", "b"):
        charge(ledger, [1], run=run, run_limit=limit(one), budget=limit(2 * one))
    with pytest.raises(DeclinedError, match=says("the limit would be passed")):
        charge(ledger, [1], run="a", run_limit=limit(one))
    with pytest.raises(DeclinedError, match=says("the budget would be passed")):
        charge(ledger, [1], run="c", run_limit=limit(one), budget=limit(one, name="the budget"))


def test_a_limit_holds_at_its_own_delta(path):
    ledger, delta = Ledger(path), 1e-9
    charge(ledger, [1], budget=limit(epsilon_of([COUNT], delta), delta))
    with pytest.raises(DeclinedError, match=says("the limit would be passed")):
        charge(ledger, [2], budget=limit(epsilon_of([COUNT], 1e-5), delta))


def test_the_ledger_knows_the_budget_that_the_hospital_set_last_also_where_it_declined(path):
    ledger = Ledger(path)
    assert ledger.budget() is None
    charge(ledger, [1], budget=limit(8.0))
    assert ledger.budget() == Limit(8.0, 1e-5, "the hospital's privacy budget")
    with pytest.raises(DeclinedError):
        charge(ledger, [1], budget=limit(0.1, 1e-6))
    assert ledger.budget()[:2] == (0.1, 1e-6)
    assert ledger.released([1]) == {COUNT: 1}
    charge(ledger, [1])
    assert ledger.budget() is None


sets = st.frozensets(st.integers(0, 4), min_size=1)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(sets, st.integers(1, 2)), min_size=1, max_size=8))
def test_no_patient_ever_costs_more_than_the_budget(charges):
    each, budget = Counter(), limit(0.6)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        for patients, count in charges:
            try:
                charge(ledger, patients, count=count, budget=budget)
            except DeclinedError:
                continue
            each.update(dict.fromkeys(patients, count))
        worst = epsilon_of({COUNT: max(each.values())}, 1e-5)
        assert ledger.most(1e-5) == worst <= budget.epsilon


def test_an_empty_ledger_has_cost_nothing(path):
    ledger = Ledger(path)
    assert (ledger.most(1e-5), ledger.entries(), ledger.released([1])) == (0.0, [], {})


def test_what_is_not_settled_counts_all_the_same(path):
    ledger = Ledger(path)
    first, second = (charge(ledger, [1], server_round=number) for number in (1, 2))
    charge(ledger, [2], STEP, 5, purpose="val", app="Tiny")
    ledger.settle(second)
    train, val = Ledger(path).entries()
    assert train[:3] == ("a", "", "train")
    assert (train.rounds, train.unsettled, train.releases) == (2, 1, {COUNT: 2})
    assert val[:3] == ("a", "Tiny", "val")
    assert (val.rounds, val.unsettled, val.releases) == (1, 1, {STEP: 5})
    ledger.settle(first)
    assert [entry.unsettled for entry in ledger.entries()] == [0, 1]
    assert ledger.released([1]) == {COUNT: 2}


def test_no_name_of_a_patient_is_in_the_file(path):
    ledger = Ledger(path)
    charge(ledger, [f"Rosamund-{number}" for number in range(50)] + [("Rosamund", 7)])
    ledger.released(["Rosamund-X"])
    assert b"osamund" not in path.read_bytes()


def test_two_ledgers_hide_one_patient_differently(tmp_path):
    rows = []
    for name in ("a", "b"):
        charge(Ledger(tmp_path / name), ["x"])
        with sqlite3.connect(tmp_path / name) as connection:
            rows += connection.execute("SELECT patient FROM members").fetchall()
    assert len(set(rows)) == 2


def test_looking_never_changes_the_file(path):
    charge(Ledger(path), range(9), budget=limit(9.0))
    before = path.read_bytes()
    for ledger in (Ledger(path), Ledger(path, read_only=True)):
        assert ledger.released([8, 9]) == {COUNT: 1}
        assert ledger.most(1e-5) > 0
        assert len(ledger.entries()) == 1
        assert ledger.budget().epsilon == 9.0
    with pytest.raises(
        InputError, match=says(unusable(path, "attempt to write a readonly database"))
    ):
        charge(ledger, range(9))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def _truncate(path, pages):
    charge(Ledger(path), range(2000))
    os.truncate(path, path.stat().st_size - int(4096 * pages))


def _other(path):
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE patients (name)")
    connection.close()


def _about(path, change):
    charge(Ledger(path), [1])
    _about_file(path, change)


def _about_file(path, change):
    with sqlite3.connect(path) as connection:
        connection.execute(change)
    connection.close()


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("make", "detail"),
    [
        (Path.touch, "the end of the file is missing"),
        (lambda path: path.write_text("epsilon: 3\n" * 1000), "file is not a database"),
        (lambda path: path.write_text("epsilon: 3"), "file is not a database"),
        (lambda path: _truncate(path, 1), "database disk image is malformed"),
        (lambda path: _truncate(path, 0.5), "the end of the file is missing"),
        (lambda path: _truncate(path, 0.001), "the end of the file is missing"),
        (lambda path: _truncate(path, 10), "database disk image is malformed"),
        (lambda path: _about(path, "DROP TABLE about"), "no such table: about"),
        (_other, "it holds 'patients', which fedmed-flower does not make"),
    ],
)
def test_a_file_that_is_no_whole_ledger_is_refused_and_left_as_it_is(path, read_only, make, detail):
    make(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=says(unusable(path, detail))):
        Ledger(path, read_only)
    assert path.read_bytes() == before


@pytest.mark.parametrize("read_only", [False, True])
def test_a_folder_is_no_ledger(tmp_path, read_only):
    with pytest.raises(InputError, match=f"^the privacy ledger {tmp_path} cannot be used "):
        Ledger(tmp_path, read_only)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE about SET value = 4 WHERE key = 'version'",
        "PRAGMA user_version = 4",
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_ledger_of_a_later_version_is_refused(path, change, read_only):
    _about(path, change)
    text = (
        f"{path} was written by a later fedmed-flower (format 4, this one reads up to 3): update "
        "fedmed-flower"
    )
    with pytest.raises(InputError, match=says(text)):
        Ledger(path, read_only)


def test_what_else_a_later_ledger_holds_is_not_looked_at(path):
    _about(path, "PRAGMA user_version = 4")
    _about_file(path, "CREATE TABLE news (x)")
    with pytest.raises(InputError, match="later fedmed-flower"):
        Ledger(path)


def _made_older(path):
    """Make of a ledger what the version before would have written."""
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE rounding")
        connection.execute("UPDATE about SET value = 2 WHERE key = 'version'")
        connection.execute("PRAGMA user_version = 2")
    connection.close()


def _format_of(path):
    with sqlite3.connect(path) as connection:
        (number,) = connection.execute("PRAGMA user_version").fetchone()
        (version,) = connection.execute("SELECT value FROM about WHERE key = 'version'").fetchone()
    connection.close()
    return number, version


def test_a_ledger_of_the_version_before_keeps_its_charges_and_takes_new_ones(path):
    ledger = Ledger(path)
    charge(ledger, range(9), STEP, 5, divergence=1e-20)
    ledger.settle(charge(ledger, range(5, 20), COUNT, run="b"))
    key, spent = ledger.split_key(), ledger.most(1e-5)
    _made_older(path)
    again = Ledger(path)
    assert _format_of(path) == (3, 3)
    assert again.split_key() == key
    assert again.most(1e-5) == spent
    assert [entry.releases for entry in again.entries()] == [{STEP: 5}, {COUNT: 1}]
    assert [entry.divergence for entry in again.entries()] == [None, None]
    assert [entry.unsettled for entry in again.entries()] == [1, 0]
    # Of one charge without a bound and one with it, no bound is known.
    charge(again, range(9), STEP, 5, divergence=2e-20)
    charge(again, range(9), STEP, 5, run="c", divergence=2e-20)
    assert [entry.divergence for entry in Ledger(path).entries()] == [None, None, 2e-20]


def test_a_ledger_of_the_version_before_is_shown_without_being_changed(path):
    charge(Ledger(path), range(9), STEP, 5)
    _made_older(path)
    before = path.read_bytes()
    path.chmod(0o400)
    ledger = Ledger(path, read_only=True)
    for _ in range(2):
        (entry,) = ledger.entries()
        assert (entry.releases, entry.divergence) == ({STEP: 5}, None)
    assert ledger.most(1e-5) == epsilon_of({STEP: 5}, 1e-5)
    assert path.read_bytes() == before
    assert _format_of(path) == (2, 2)


def test_an_open_ledger_takes_charges_after_another_process_has_brought_it_up(path):
    charge(Ledger(path), range(9), STEP, 5)
    _made_older(path)
    reader = Ledger(path, read_only=True)
    charge(Ledger(path), range(9), STEP, 5, run="b", divergence=3e-20)
    assert [entry.divergence for entry in reader.entries()] == [None, 3e-20]


def test_the_divergence_of_charges_of_one_run_adds_up(path):
    ledger = Ledger(path)
    for divergence in (1e-20, 0.0, 3e-20):
        charge(ledger, range(9), divergence=divergence)
    (entry,) = ledger.entries()
    assert entry.divergence == pytest.approx(4e-20)


@pytest.mark.parametrize("divergence", [-1e-20, float("nan"), float("inf")])
def test_a_divergence_out_of_range_is_refused_and_nothing_is_charged(path, divergence):
    ledger = Ledger(path)
    text = f"divergence must be at least 0 and finite, got {divergence}"
    with pytest.raises(InputError, match=says(text)):
        charge(ledger, [1], divergence=divergence)
    assert ledger.entries() == []


@pytest.mark.parametrize("value", ["'much'", "-1.0", "9e999", "x'00'"])
def test_a_strangers_ledger_with_a_divergence_that_is_none_is_one_line(path, value):
    charge(Ledger(path), [1], divergence=1e-20)
    _about_file(path, f"UPDATE rounding SET divergence = {value}")
    with pytest.raises(InputError, match=r"cannot be used \(it holds the divergence "):
        Ledger(path, read_only=True).entries()


def test_a_ledger_that_names_its_version_in_its_table_alone_is_read(path):
    _about(path, "PRAGMA user_version = 0")
    assert len(Ledger(path).entries()) == 1


@pytest.mark.parametrize("version", [1, None])
def test_a_ledger_of_another_version_is_refused(path, version):
    value = "NULL" if version is None else version
    _about(path, f"UPDATE about SET value = {value} WHERE key = 'version'")
    text = (
        f"the ledger {path} has version {version}, this package reads versions 2 and 3: use the "
        "version of fedmed-flower that wrote it"
    )
    with pytest.raises(InputError, match=says(text)):
        Ledger(path)


def test_a_page_that_was_lost_is_noticed_where_it_matters(path):
    patients = range(1000)
    charge(Ledger(path), patients, STEP, 3)
    charge(Ledger(path), range(500, 1500), COUNT, run="b")
    whole = path.read_bytes()
    wanted, noticed = Ledger(path).released(patients), 0
    for start in range(0, len(whole), 4096):
        path.write_bytes(whole[:start] + bytes(4096) + whole[start + 4096 :])
        try:
            ledger = Ledger(path)
            assert ledger.released(patients) == wanted
            assert ledger.released([700]) == wanted
        except InputError:
            noticed += 1
    assert noticed > 5


def test_a_ledger_that_is_not_there_is_made_for_writing_only(tmp_path):
    path = tmp_path / "new" / "folder" / "ledger? #1%20.sqlite"
    hint = "mend the path or the disk, or make a new one (fedmed privacy --new)"
    for options in ({"read_only": True}, {"create": False}):
        with pytest.raises(InputError, match=says(f"there is no ledger {path}: {hint}")):
            Ledger(path, **options)
    assert not path.parent.exists()
    Ledger(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_ledger_that_went_away_or_whose_disk_is_not_there_is_not_begun_anew(tmp_path, path):
    ledger = Ledger(path)
    path.unlink()
    for look in (ledger.entries, lambda: charge(ledger, [1]), lambda: ledger.settle(1)):
        with pytest.raises(InputError, match=says(unusable(path, "unable to open database file"))):
            look()
    path.symlink_to(tmp_path / "disk")
    with pytest.raises(InputError, match=says(unusable(path, "unable to open database file"))):
        Ledger(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_in_which_a_file_is_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "ledger.sqlite"
    with pytest.raises(InputError, match=f"^the privacy ledger {path} cannot be used "):
        Ledger(path)


@pytest.fixture
def open_folder():
    """A folder that another user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def _without_rights(work):
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    return work()


def test_a_place_that_cannot_be_written_can_be_looked_at_only(open_folder):
    path = open_folder / "ledger.sqlite"
    charge(Ledger(path), [1])
    path.chmod(0o444)
    open_folder.chmod(0o555)
    text = told_by_child(lambda: _without_rights(lambda: charge(Ledger(path), [1])))
    assert text == unusable(path, "attempt to write a readonly database")
    text = told_by_child(lambda: _without_rights(lambda: Ledger(path, True).entries()[0].rounds))
    assert text == "1"
    other = open_folder / "other.sqlite"
    text = told_by_child(lambda: _without_rights(lambda: Ledger(other)))
    assert text == unusable(other, "unable to open database file")
    path.chmod(0o666)
    text = told_by_child(lambda: _without_rights(lambda: charge(Ledger(path), [1])))
    assert text.startswith(f"the privacy ledger {path} cannot be used (")


def test_a_place_that_cannot_be_looked_into(open_folder):
    path = open_folder / "hidden" / "ledger.sqlite"
    charge(Ledger(path), [1])
    path.parent.chmod(0)
    for read_only in (False, True):
        text = told_by_child(lambda ro=read_only: _without_rights(lambda: Ledger(path, ro)))
        assert text == unusable(path, f"[Errno 13] Permission denied: '{path}'")
    path.parent.chmod(0o755)


def _with_little_space(size, work):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return work()


def test_a_full_disk_takes_no_charge_and_leaves_the_ledger_whole(path):
    text = told_by_child(lambda: _with_little_space(2000, lambda: Ledger(path)))
    assert text.startswith(f"the privacy ledger {path} cannot be used (")
    assert list(path.parent.iterdir()) == []
    charge(Ledger(path), [1])
    size = path.stat().st_size + 8192
    text = told_by_child(
        lambda: _with_little_space(size, lambda: charge(Ledger(path), range(9999)))
    )
    assert text.startswith(f"the privacy ledger {path} cannot be used (")
    assert [entry.patients for entry in Ledger(path).entries()] == [1]
    assert Ledger(path).released(range(9999)) == {COUNT: 1}


def _killed_write(path):
    """Make a ledger of which a write was killed half-way, and return its journal."""
    charge(Ledger(path), range(5000))

    def be_killed():
        connection = sqlite3.connect(path, isolation_level=None)
        for statement in ("PRAGMA cache_size = 5", "BEGIN", "UPDATE members SET dataset = 2"):
            connection.execute(statement)
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(fork(be_killed), 0)
    return Path(f"{path}-journal")


def test_a_charge_of_what_can_only_be_looked_at_is_refused_also_after_a_killed_write(open_folder):
    path = open_folder / "ledger.sqlite"
    for file in (_killed_write(path), path):
        file.chmod(0o444)
    text = told_by_child(lambda: _without_rights(lambda: charge(Ledger(path), [1])))
    assert text == unusable(path, "attempt to write a readonly database")
    text = told_by_child(lambda: _without_rights(lambda: Ledger(path, True).entries()[0].rounds))
    assert text == "1"


def test_a_write_that_was_killed_does_not_keep_one_from_looking(path):
    journal = _killed_write(path)
    before = path.read_bytes(), journal.read_bytes()
    looked = Ledger(path, read_only=True).released([5])
    assert (path.read_bytes(), journal.read_bytes()) == before
    assert looked == Ledger(path).released([5]) == {COUNT: 1}
    assert not journal.exists()


@pytest.fixture(params=[True, False], ids=["hard links", "no hard links"])
def links(request, monkeypatch):
    if not request.param:

        def link(source, target):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("links")
def test_processes_that_make_a_ledger_and_charge_it_at_once_lose_nothing(path):
    for trial in range(5):
        place = path.with_name(f"{trial}.sqlite")
        reader, writer = os.pipe()

        def work(place=place, reader=reader, writer=writer):
            os.close(writer)
            os.read(reader, 1)
            charge(Ledger(place), [1])

        children = [fork(work) for _ in range(4)]
        os.close(writer)
        os.close(reader)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
        assert Ledger(place).released([1]) == {COUNT: 4}
        assert {file.name for file in path.parent.iterdir()} == {place.name}
        place.unlink()


@pytest.mark.usefixtures("links")
def test_a_ledger_takes_the_place_of_none(path):
    charge(Ledger(path), [1])
    ledger = Ledger(path)
    ledger._create()
    assert ledger.released([1]) == {COUNT: 1}


def test_processes_that_charge_at_once_never_pass_the_budget_together(path):
    most = 23
    budget = limit(epsilon_of({COUNT: most}, 1e-5))
    Ledger(path)

    def work():
        with contextlib.suppress(DeclinedError):
            while True:
                charge(Ledger(path), [1, os.getpid()], budget=budget)

    children = [fork(work) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    assert Ledger(path).released([1]) == {COUNT: most}
    assert sum(entry.rounds for entry in Ledger(path).entries()) == most


def release_again_and_again(path, released):
    while True:
        ledger = Ledger(path)
        number = charge(ledger, range(20))
        with released.open("ab") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        ledger.settle(number)


def kill_at_random(work, released, wait_for, moment):
    """Kill a child some moment after it has released something so many times."""
    child, before = fork(work), released()
    while released() < before + wait_for:
        time.sleep(0.001)
    time.sleep(random.uniform(0, moment))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_any_moment_leaves_no_fewer_charges_than_were_released(tmp_path):
    for trial in range(50):
        # Each fifth begins with a ledger that is not there, and is killed soon.
        path, out = tmp_path / f"{trial // 5}.sqlite", tmp_path / f"{trial // 5}.released"
        kill_at_random(
            lambda path=path, out=out: release_again_and_again(path, out),
            lambda out=out: out.stat().st_size if out.exists() else 0,
            wait_for=trial % 5,
            moment=0.02,
        )
        told = out.stat().st_size if out.exists() else 0
        if not path.exists():
            assert told == 0
            continue
        looked = Ledger(path, read_only=True).entries()
        entries = Ledger(path).entries()
        assert looked == entries
        charged = sum(entry.rounds for entry in entries)
        settled = charged - sum(entry.unsettled for entry in entries)
        assert settled <= told <= charged <= told + trial % 5 + 1
        assert told >= trial % 5


def test_a_kill_in_training_leaves_no_fewer_charges_than_models_that_left(tmp_path):
    config = {"privacy": "patient", "target_epsilon": 50.0, "num_server_rounds": 2000}
    context = context_of(run_dir=str(tmp_path), **config)
    models = tmp_path / "models"
    models.mkdir()

    def train():
        reply = ask(TinyClient, "train", context)
        name = f"{os.getpid()}-{time.monotonic_ns()}"
        (models / name).write_bytes(b"".join(bits(reply.content["arrays"]).values()))

    def train_again_and_again():
        while True:
            train()

    with simulation():
        train()
        for trial in range(10):
            kill_at_random(
                train_again_and_again, lambda: len(list(models.iterdir())), trial % 3, 0.1
            )
            (entry,) = Ledger(tmp_path / "ledgers" / "hospital-1.sqlite").entries()
            left = len(list(models.iterdir()))
            assert left <= entry.rounds
            assert entry.rounds - entry.unsettled <= left + trial + 1


def test_the_key_of_splits_is_made_with_the_file_and_stays(path):
    key = Ledger(path).split_key()
    assert len(key) == 32
    assert Ledger(path).split_key() == Ledger(path, read_only=True).split_key() == key
    assert Ledger(path.with_name("other.sqlite")).split_key() != key


def test_what_was_measured_without_noise_is_counted_for_each_patient(path):
    ledger = Ledger(path)
    assert (ledger.plain(), ledger.most_plain()) == ([], 0)
    for _ in range(3):
        ledger.note_plain([1, 2, 3], run="a", purpose="val", app="App")
    ledger.note_plain(["3", 4], run="a", purpose="test", app="App")
    ledger.note_plain([3], run="b", purpose="val")
    found = [(p.run, p.app, p.purpose, p.times, p.patients) for p in Ledger(path).plain()]
    assert found == [("a", "App", "val", 3, 3), ("a", "App", "test", 1, 2), ("b", "", "val", 1, 1)]
    assert ledger.most_plain() == 5
    # It costs no epsilon: it has none.
    assert ledger.entries() == []
    assert ledger.most(1e-5) == 0.0


def test_who_was_trained_on_with_noise_is_known_and_who_was_only_counted_is_not(path):
    ledger = Ledger(path)
    charge(ledger, [1, 2], STEP)
    charge(ledger, [3], COUNT, purpose="val counts")
    charge(ledger, [4], COUNT, purpose="train counts")
    charge(ledger, [5], STEP, purpose=purpose_in_sums(TRAIN, 4))
    found = [ledger.has_trained(names) for names in (["1"], [2, 9], [3], [9], [4], [5])]
    assert found == [True, True, False, False, False, True]


def test_so_many_runs_begin_a_day_and_no_more(path):
    ledger = Ledger(path)
    for number in range(3):
        ledger.begin_run(f"run {number}", 3)
    ledger.begin_run("run 1", 3)
    with pytest.raises(
        DeclinedError, match=says("3 runs have begun here within a day (most-runs-a-day)")
    ):
        ledger.begin_run("run 3", 3)
    with pytest.raises(DeclinedError):
        ledger.begin_run("run 3", 3)
    with ledger._open() as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (3,)
        connection.execute("UPDATE runs SET time = '2020-01-01T00:00:00+00:00' WHERE run = 'run 0'")
    ledger.begin_run("run 3", 3)


def test_a_file_whose_views_call_functions_is_not_obeyed(path):
    ledger = Ledger(path)
    with ledger._open() as connection:
        connection.execute("DROP TABLE charges")
        connection.execute("CREATE VIEW charges AS SELECT load_extension('x') AS id")
    with pytest.raises(InputError, match="cannot be used"):
        Ledger(path, read_only=True).entries()


@pytest.mark.parametrize(
    "change",
    [
        "CREATE VIEW v AS SELECT 1",
        "CREATE TRIGGER t AFTER INSERT ON plain BEGIN DELETE FROM charges; END",
        "CREATE INDEX i ON plain (hex(zeroblob(purpose)))",
        "ALTER TABLE plain ADD COLUMN made TEXT AS (hex(zeroblob(400000000)))",
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_ledger_that_holds_what_none_has_is_refused_unread(path, change, read_only):
    Ledger(path)
    with sqlite3.connect(path) as connection:
        connection.execute(change)
    connection.close()
    name = {"VIEW": "v", "TRIGGER": "t", "INDEX": "i", "TABLE": "plain"}[change.split()[1]]
    text = unusable(path, f"it holds '{name}', which fedmed-flower does not make")
    with pytest.raises(InputError, match=says(text)):
        Ledger(path, read_only)


def test_what_a_run_of_another_app_released_is_not_told(path):
    ledger = Ledger(path)
    ledger.charge(range(10), STEP, 1, run="run", purpose="train", app="A")
    ledger.charge(range(9, 20), COUNT, 1, run="run", purpose="train", app="B")
    assert ledger.released(range(9, 20), "run") == {STEP: 1, COUNT: 1}
    assert ledger.released(range(9, 20), "run", "B") == {COUNT: 1}
