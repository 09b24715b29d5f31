"""What a hospital has told without noise stands in one book, over all kinds of answers and runs."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from tables import SCHEMA, TinyTable, patients
from tiny import TinyClient, ask, context_of, make_rows, model_arrays, node_of

from fedmed_flower import MedicalClient, SiteData
from fedmed_flower.data.pictures import Picture
from fedmed_flower.data.site import SPLITS
from fedmed_flower.data.splits import split_patients
from fedmed_flower.errors import DeclinedError
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.statistics.request import Filter, Request
from fedmed_flower.wire import MESSAGE_VERSION, read_error

WITHHELD = {"num-examples"}


def hospital(base=TinyTable, **splits):
    """Return the client of a hospital with these rows."""

    def load_data(self, site):
        return SiteData(**splits)

    return type("Hospital", (base,), {"load_data": load_data})


def tables(train=40, val=20, test=40):
    """Return rows of other patients in each split."""
    sizes = {"train": train, "val": val, "test": test}
    return {split: patients(sizes[split], n, split) for n, split in enumerate(SPLITS)}


def asked(client, node, kind, arrays=None, **config):
    """Ask as a new run in a new process does; the message's config is `message`."""
    message = config.pop("message", {})
    MedicalClient.run_cache.of_run(-1)
    context = context_of(node_config=node, **config)
    return ask(client, kind, context, arrays, **message)


def contribution(client, node, **config):
    reply = asked(client, node, "query.contribution", **config)
    assert not reply.has_error(), reply.error.reason
    return dict(reply.content["contribution"])


class Declared(TinyTable):
    """Whose preparation learns nothing, so that it needs no first round."""

    schema = type(SCHEMA)(
        **vars(SCHEMA) | {"categories": SCHEMA.categories | {"ward": ("a", "b", "c")}}
    )


DECLARED = {"preparation": "declared"}


def figures(client, node, split="test", **config):
    """Return the figures of one evaluation of one model."""
    config = DECLARED | config
    own = client(context_of(node_config=node, **config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        arrays = ArrayRecord(own.build_model().state_dict())
    reply = asked(client, node, "evaluate", arrays, message={"split": split}, **config)
    assert not reply.has_error(), reply.error.reason
    return dict(reply.content["metrics"])


# Contributions ------------------------------------------------------------------------------------


def test_a_contribution_is_of_the_same_rows_whatever_the_seed(tmp_path):
    rows = patients(120, 1)

    class Splitting(TinyTable):
        def load_data(self, site):
            return SiteData(**split_patients(rows, self.settings.seed))

    told = [contribution(Splitting, node_of(tmp_path), seed=seed) for seed in range(5)]
    assert told[0]["moments age"][0] > 60
    assert all(one == told[0] for one in told)


class Shuffling(TinyTable):
    """Splits at random by the seed of the run config, which a server sets."""

    rows = patients(60, 1)
    told = None

    def load_data(self, site):
        order = np.random.default_rng(self.settings.seed).permutation(len(self.rows))
        train, test = order[:40], order[40:]
        return SiteData([self.rows[n] for n in train], test=[self.rows[n] for n in test])

    def _reportable_rows(self, book, column, inside, minimum):
        rows = super()._reportable_rows(book, column, inside, minimum)
        if column == "age":
            self.told.append(frozenset(row["patient"] for row in rows))
        return rows


def test_seventy_five_seeds_do_not_give_seventy_five_sets_of_rows(tmp_path):
    client = type("Client", (Shuffling,), {"told": []})
    for seed in range(75):
        found = contribution(client, node_of(tmp_path, most_runs_a_day=75), seed=seed)
        assert found["moments age"][0] == len(client.told[-1])
        before = frozenset().union(*client.told[:-1])
        # Where a seed would tell too much, all those are told of who were told of before.
        assert len(client.told[-1]) == 40 or client.told[-1] == before
    sets = {*client.told}
    # 60 patients have at most six classes of ten: no more sums than that are independent.
    assert 2 <= len(sets) <= 6
    sums = np.array([[row["patient"] in one for row in Shuffling.rows] for one in sets], float)
    for place in range(60):
        wanted = np.eye(60)[place]
        found = np.linalg.lstsq(sums.T, wanted, rcond=None)[0]
        assert np.linalg.norm(found @ sums - wanted) > 0.9


def test_what_statistics_have_split_finely_contributions_tell_of_all_rows(tmp_path, caplog):
    splits = tables()
    client, node = hospital(**splits), node_of(tmp_path)
    # So that of the training rows alone fewer than ten are on one side.
    ages = sorted(row["age"] for row in splits["train"])
    request = Request(columns=("pressure",), where=(Filter("age", "<", ages[4]),))
    reply = asked(client, node, "query.statistics", message={"request": request.to_text()})
    (group,) = json.loads(reply.content["statistics"]["answer"])["groups"]
    assert group["patients"] >= 10
    found = contribution(client, node)
    for column in ("age", "pressure"):
        count = sum(not np.isnan(row[column]) for rows in splits.values() for row in rows)
        assert found[f"moments {column}"][0] == count
        text = (
            f"north: statistics of {column} come from all rows: after earlier answers the training "
            "rows alone would be of too few patients"
        )
        assert caplog.messages.count(text) == 1
    assert sum(found["counts ward"]) <= 40
    # One who went is in none of the answers to come, and would show in all of them.
    splits["train"].pop()
    assert "moments age" not in contribution(client, node)


def with_wards(splits, *wards):
    """Put so many rows of the train split, one after the other, into each ward."""
    names = [name for name, count in wards for _ in range(count)]
    for row, ward in zip(splits["train"], names, strict=True):
        row["ward"] = ward
    return splits


@pytest.mark.parametrize(
    ("wards", "told"),
    [
        ((("a", 20), ("b", 20)), {"a": 20, "b": 20}),
        # Nine are too few; with the ten of b they are enough not to be told of.
        ((("a", 21), ("b", 10), ("c", 9)), {"a": 21}),
        ((("a", 20), ("b", 19), ("c", 1)), {"a": 20}),
        ((("a", 15), ("b", 14), ("c", 6), ("d", 5)), {"a": 15, "b": 14}),
        ((("a", 39), ("b", 1)), {}),
    ],
)
def test_a_rare_category_keeps_no_others_from_being_told(tmp_path, wards, told):
    client = hospital(**with_wards(tables(), *wards))
    found = contribution(client, node_of(tmp_path))
    counts = zip(found.get("categories ward", []), found.get("counts ward", []), strict=True)
    assert dict(counts) == told
    assert found["moments age"][0] == 40


def test_categories_that_are_told_of_all_rows_stand_in_the_book(tmp_path, caplog):
    splits = with_wards(tables(), ("a", 12), ("b", 14), ("c", 14))
    # Outside the training rows all but five are in ward a.
    for number, row in enumerate([*splits["val"], *splits["test"]]):
        row["ward"] = "c" if number < 5 else "a"
    client, node = hospital(**splits), node_of(tmp_path)
    request = Request(columns=("pressure",), where=(Filter("ward", "==", "a"),))
    reply = asked(client, node, "query.statistics", message={"request": request.to_text()})
    assert not reply.has_error()
    found = contribution(client, node)
    counts = zip(found["categories ward"], found["counts ward"], strict=True)
    assert dict(counts) == {"a": 67, "b": 14, "c": 19}
    assert "north: statistics of ward come from all rows: after earlier answers" in caplog.text
    with client(context_of(node_config=node)).open_book({}, 10) as book:
        labels = book._guard.labels(book._guard.members("ward"))
        classes = [{*labels[[row["ward"] == ward for row in book.rows]]} for ward in "abc"]
    # What comes later is held against classes of which each has one ward.
    assert len(set().union(*classes)) == sum(map(len, classes))


# Who came and who went ----------------------------------------------------------------------------


def told_of(answer):
    """Return of how many rows an answer is; None where it is withheld."""
    if answer.keys() == WITHHELD:
        return None
    return answer.get("num-examples", answer.get("moments age", [None])[0])


ANSWERS = [(contribution, TinyTable, "train"), (figures, Declared, "test")]


@pytest.mark.parametrize(("answer", "base", "split"), ANSWERS)
def test_a_patient_who_came_since_waits_and_ten_are_told(tmp_path, answer, base, split):
    splits = tables()
    client, node = hospital(base, **splits), node_of(tmp_path)
    before = answer(client, node)
    assert told_of(before) == 40
    for new in patients(9, 7, "new"):
        splits[split].append(new | {"age": 99.0})
        assert answer(client, node) == before
    splits[split] += patients(1, 8, "tenth")
    after = answer(client, node)
    assert told_of(after) == 50
    # From now on they are of those who were told of: none of them may go unnoticed.
    splits[split].pop()
    assert told_of(answer(client, node)) is None


@pytest.mark.parametrize(("answer", "base", "split"), ANSWERS)
def test_where_one_went_nothing_is_told_until_ten_have_gone(tmp_path, answer, base, split):
    splits = tables()
    client, node = hospital(base, **splits), node_of(tmp_path)
    assert told_of(answer(client, node)) == 40
    for _ in range(9):
        splits[split].pop()
        assert told_of(answer(client, node)) is None
    splits[split].pop()
    assert told_of(answer(client, node)) == 30


@pytest.mark.parametrize(("answer", "base", "split"), ANSWERS)
def test_one_who_came_and_one_who_went_do_not_make_up_for_each_other(tmp_path, answer, base, split):
    splits = tables()
    client, node = hospital(base, **splits), node_of(tmp_path)
    assert told_of(answer(client, node)) == 40
    splits[split][0] = patients(1, 9, "other")[0]
    assert told_of(answer(client, node)) is None


def test_a_patient_who_came_since_fills_no_column_at_the_roll_call(tmp_path):
    splits = tables()
    for row in (row for rows in splits.values() for row in rows):
        row["pressure"] = math.nan
    client, node = hospital(Declared, **splits), node_of(tmp_path)

    def empty():
        about = {"version": MESSAGE_VERSION}
        reply = asked(client, node, "query.describe", message=about, **DECLARED)
        assert not reply.has_error(), reply.error.reason
        return dict(reply.content.config_records.get("empty", {}))

    assert empty() == {"columns": ["pressure"]}
    for new in patients(9, 7, "new"):
        splits["train"].append(new | {"pressure": 140.0})
        assert empty() == {"columns": ["pressure"]}
    splits["train"] += patients(1, 8, "tenth")
    assert empty() == {}


@pytest.mark.parametrize("moved", [1, 9, 10])
def test_patients_who_change_their_split_are_ten_or_nothing_is_told(tmp_path, moved):
    splits = tables()
    client, node = hospital(Declared, **splits), node_of(tmp_path)
    assert told_of(figures(client, node)) == 40
    splits["train"] += splits["test"][:moved]
    del splits["test"][:moved]
    assert told_of(figures(client, node)) == (None if moved < 10 else 30)


def test_a_new_row_of_a_patient_who_was_told_of_waits_too(tmp_path):
    splits = tables()
    client, node = hospital(Declared, **splits), node_of(tmp_path)
    before = figures(client, node)
    visit = splits["test"][0] | {"age": 99.0, "ill": 1 - splits["test"][0]["ill"]}
    splits["test"].append(visit)
    assert figures(client, node) == before


def test_the_order_of_the_rows_is_nothing_new(tmp_path):
    splits = tables()
    client, node = hospital(Declared, **splits), node_of(tmp_path)
    before = figures(client, node)
    splits["test"].reverse()
    after = figures(client, node)
    assert after.pop("loss") == pytest.approx(before.pop("loss"), rel=1e-6)
    assert after.keys() == before.keys()
    assert after["confusion-counts"] == before["confusion-counts"]


def test_splits_are_told_beside_each_other_in_any_order(tmp_path):
    client, node = hospital(Declared, **tables()), node_of(tmp_path)
    for split, count in (("val", 20), ("test", 40), ("train", 40), ("val", 20)):
        assert told_of(figures(client, node, split)) == count


@pytest.mark.parametrize("sizes", [(9, 20, 40), (40, 9, 40), (40, 20, 9)])
def test_figures_of_fewer_than_ten_do_not_leave_and_those_of_the_others_do(tmp_path, sizes):
    client, node = hospital(Declared, **tables(*sizes)), node_of(tmp_path)
    for split, size in zip(SPLITS, sizes, strict=True):
        found = figures(client, node, split)
        assert found["num-examples"] == size
        assert (told_of(found) is None) == (size < 10)


def test_what_was_measured_stands_in_the_ledger_also_where_it_failed(tmp_path):
    client, node = hospital(Declared, **tables()), node_of(tmp_path)
    for _ in range(2):
        figures(client, node, "val")

    def fail(self, model, prepared):
        raise RuntimeError("the power is out")

    failing = type("Hospital", (client,), {"measure": fail})
    own = client(context_of(**DECLARED))
    arrays = ArrayRecord(own.build_model().state_dict())
    reply = asked(failing, node, "evaluate", arrays, message={"split": "test"}, **DECLARED)
    assert read_error(reply.error.reason) == ("north", "RuntimeError")
    plain = Ledger(tmp_path / "privacy-ledger.sqlite", read_only=True).plain()
    assert Counter((entry.purpose, entry.app, entry.patients) for entry in plain) == {
        ("val", "Hospital", 20): 2, ("test", "Hospital", 40): 1,
    }  # fmt: skip


def test_a_simulation_has_no_book(tmp_path):
    client = hospital(Declared, **tables())
    node = {"partition-id": 0, "num-partitions": 2}
    figures(client, node, run_dir=str(tmp_path))
    contribution(hospital(**tables()), node, run_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# Groups -------------------------------------------------------------------------------------------


def group_counts(told):
    return {key.partition("@")[2]: told[key] for key in told if key.startswith("num-examples@")}


def test_groups_are_told_and_withheld_beside_what_statistics_have_told(tmp_path, caplog):
    splits = tables()
    for rows in splits.values():
        for number, row in enumerate(rows):
            row |= {"sex": "fm"[number % 2], "ward": "ab"[number // 2 % 2]}
    client, node = hospital(Declared, **splits), node_of(tmp_path)
    # Of the test rows 20 are of women, and 5 of these are old.
    for number, row in enumerate(splits["test"]):
        row["age"] = 80.0 if number < 10 else 30.0
    groups = {"report_by": "sex,ward"}
    before = figures(client, node, **groups)
    assert group_counts(before) == {"sex=f": 20, "sex=m": 20, "ward=a": 20, "ward=b": 20}
    assert figures(client, node, **groups) == before
    (tmp_path / "other").mkdir()
    node = node_of(tmp_path / "other")
    request = Request(columns=("sex",), where=(Filter("age", ">=", 75.0),))
    reply = asked(client, node, "query.statistics", message={"request": request.to_text()})
    assert not reply.has_error()
    after = figures(client, node, **groups)
    assert group_counts(after) == {"ward=a": 20, "ward=b": 20}
    text = (
        "north: metrics by sex are withheld: after earlier answers they would be of too few "
        "patients"
    )
    assert caplog.messages.count(text) == 1
    # The figures of all test patients are of another kind.
    assert after["auc"] == before["auc"]


# Pictures -----------------------------------------------------------------------------------------


class Drawing(TinyClient):
    """Draws as many of the rows that it is given as it is asked for, and always the last."""

    rows = make_rows(9, 3, "test")

    def load_data(self, site):
        return SiteData(train=make_rows(10, 1, "train"), test=self.rows)

    def draw(self, model, prepared, count):
        return [
            Picture("a case", str(row["patient"]).encode(), row["patient"])
            for row in [*prepared.rows[:-1][:count], prepared.rows[-1]]
        ]


def drawn(client, node, run, count):
    """Return the patients of whom pictures leave, or why none do."""
    message = {"run_key": run, "count": count}
    reply = asked(client, node, "query.pictures", model_arrays(), message=message)
    if reply.has_error():
        return read_error(reply.error.reason)[1]
    return {png.decode() for png in reply.content["pictures"]["images"]}


def names(*numbers):
    return {f"test-{number}" for number in numbers}


def test_a_picture_of_a_seventh_patient_never_leaves(tmp_path):
    node = node_of(tmp_path, share_images=True)
    assert drawn(Drawing, node, "first", 100) == names(4, 5, 6, 7, 8, 3)
    once = "declined: pictures leave once a run"
    assert drawn(Drawing, node, "first", 1) == once
    # Other rows first, so that others would be drawn.
    turned = type("Turned", (Drawing,), {"rows": Drawing.rows[::-1]})
    for number, client in enumerate((Drawing, turned, Drawing)):
        assert drawn(client, node, f"run {number}", 100) == names(3, 4, 5, 6, 7, 8)
        assert drawn(client, node, f"run {number}", 100) == once
    assert drawn(turned, node, "fewer", 1) == names(8, 3)


def test_of_a_first_run_with_few_pictures_later_ones_have_no_others(tmp_path):
    node = node_of(tmp_path, share_images=True)
    assert drawn(Drawing, node, "first", 2) == names(0, 1, 8)
    assert drawn(Drawing, node, "second", 100) == names(0, 1, 8)
    without = type("Without", (Drawing,), {"rows": Drawing.rows[1:-1]})
    assert drawn(without, node, "third", 100) == names(1)
    gone = type("Gone", (Drawing,), {"rows": Drawing.rows[2:-1]})
    others = {"val": Drawing.rows[:2], "test": Drawing.rows[2:-1]}
    moved = type("Moved", (Drawing,), {"load_data": lambda self, site: SiteData((), **others)})
    # Who was drawn is in another split, and not drawn there.
    assert drawn(moved, node, "fourth", 100) == set()
    assert drawn(gone, node, "fourth", 100) == once_a_run()


def test_where_those_who_were_drawn_have_gone_nobody_is(tmp_path):
    node = node_of(tmp_path, share_images=True)
    assert drawn(Drawing, node, "first", 2) == names(0, 1, 8)
    others = type("Others", (Drawing,), {"rows": Drawing.rows[2:-1]})
    assert drawn(others, node, "second", 100) == set()


def test_a_draw_of_its_own_shows_no_seventh_patient_either(tmp_path):
    def draw(self, model, prepared, count):
        return [Picture("mine", str(r["patient"]).encode(), r["patient"]) for r in self.rows[:4]]

    node = node_of(tmp_path, share_images=True)
    assert drawn(Drawing, node, "first", 2) == names(0, 1, 8)
    own = type("Own", (Drawing,), {"draw": draw})
    assert drawn(own, node, "second", 2) == names(0, 1)


def once_a_run():
    return "declined: pictures leave once a run"


def test_a_run_whose_pictures_could_not_be_drawn_had_them(tmp_path):
    def draw(self, model, prepared, count):
        raise RuntimeError("with this model nothing can be drawn")

    node = node_of(tmp_path, share_images=True)
    failing = type("Failing", (Drawing,), {"draw": draw})
    assert drawn(failing, node, "first", 3) == "RuntimeError"
    assert drawn(Drawing, node, "first", 3) == once_a_run()
    assert drawn(Drawing, node, "second", 1) == names(0, 8)


# The file -----------------------------------------------------------------------------------------


def test_it_lies_beside_the_ledger_for_its_owner_alone(tmp_path):
    for name in ("data", "disk"):
        (tmp_path / name).mkdir()
    own = tmp_path / "disk" / "own.sqlite"
    Ledger(own)
    node = node_of(tmp_path / "data", ledger=str(own))
    figures(hospital(Declared, **tables()), node)
    assert list((tmp_path / "data").iterdir()) == []
    book = tmp_path / "disk" / "own.answers"
    assert {*(tmp_path / "disk").iterdir()} == {own, book}
    assert book.stat().st_mode & 0o777 == 0o600
    assert TinyTable(context_of(node_config=node)).book_path({}) == book


def test_of_a_patient_the_book_keeps_a_hash(tmp_path):
    splits = tables()
    splits["test"][0]["patient"] = "Anna Schmidt"
    figures(hospital(Declared, **splits), node_of(tmp_path))
    contribution(hospital(**splits), node_of(tmp_path))
    assert b"Schmidt" not in (tmp_path / "privacy-ledger.answers").read_bytes()


@pytest.mark.parametrize("content", [b"", b"no book"])
def test_without_a_book_that_can_be_read_nothing_is_told(tmp_path, content, caplog):
    (tmp_path / "privacy-ledger.answers").write_bytes(content)
    client, node = hospital(Declared, **tables()), node_of(tmp_path)
    arrays = ArrayRecord(client(context_of(**DECLARED)).build_model().state_dict())
    for kind, message in (("evaluate", {"split": "test"}), ("query.contribution", {})):
        config = DECLARED if kind == "evaluate" else {}
        one = client if kind == "evaluate" else hospital(**tables())
        reply = asked(one, node, kind, arrays, message=message, **config)
        assert read_error(reply.error.reason) == ("north", "InputError")
        text = caplog.messages[-1]
        assert text.startswith(
            f"north: the record of answers {tmp_path / 'privacy-ledger.answers'} cannot be used ("
        )
        assert text.endswith(
            "): repair its folder, or restore it from a copy; without it nobody knows what was "
            "disclosed before"
        )


def test_a_new_process_knows_what_was_told(tmp_path):
    code = (
        "import sys; from pathlib import Path; from test_book import *; "
        "from fedmed_flower.data.site import simulation\n"
        "with simulation():\n"
        "    splits, node = tables(), node_of(sys.argv[1], share_images=True)\n"
        "    assert told_of(figures(hospital(Declared, **splits), node)) == 40\n"
        "    assert told_of(contribution(hospital(**splits), node)) == 40\n"
        "    assert drawn(Drawing, node, 'first', 2) == names(0, 1, 8)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    folders = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    node, splits = node_of(tmp_path, share_images=True), tables()
    assert drawn(Drawing, node, "first", 2) == once_a_run()
    assert drawn(Drawing, node, "second", 100) == names(0, 1, 8)
    splits["train"].append(patients(1, 7, "new")[0])
    splits["test"].append(patients(1, 8, "newer")[0])
    assert told_of(figures(hospital(Declared, **splits), node)) == 40
    assert told_of(contribution(hospital(**splits), node)) == 40
    del splits["train"][0], splits["test"][0]
    assert told_of(figures(hospital(Declared, **splits), node)) is None
    assert told_of(contribution(hospital(**splits), node)) is None


# Questions of one's own ---------------------------------------------------------------------------


def reportable(node, **splits):
    MedicalClient.run_cache.of_run(-1)
    client = hospital(**splits)(context_of(node_config=node))
    return client.reportable_rows("age", client.screened_data().train)


def test_a_question_of_ones_own_is_about_whom_the_book_lets(tmp_path):
    node, rows = node_of(tmp_path), tables()
    assert len(reportable(node, **rows)) == 40
    # Three who came since wait; so they do for any other question about the column.
    later = rows | {"train": rows["train"] + patients(3, 9, "new")}
    assert len(reportable(node, **later)) == 40
    assert contribution(hospital(**later), node)["moments age"][0] == 40
    many = rows | {"train": rows["train"] + patients(12, 9, "new")}
    assert len(reportable(node, **many)) == 52


def test_a_question_of_ones_own_is_declined(tmp_path):
    for name in ("few", "private"):
        (tmp_path / name).mkdir()
    with pytest.raises(DeclinedError, match=r"^an answer here needs at least 10 patients$"):
        reportable(node_of(tmp_path / "few"), **tables(train=9))
    noise = r"^this run, or this hospital, protects patients by noise$"
    with pytest.raises(DeclinedError, match=noise):
        reportable(node_of(tmp_path / "private", private_metrics=True), **tables())
