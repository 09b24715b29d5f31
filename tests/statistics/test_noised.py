import json
import math
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity
from lifelines import KaplanMeierFitter
from statistics_rows import make_patients, where
from tiny import context_of, says

from fedmed_flower import InputError, MedicalClient, SiteData
from fedmed_flower.data.site import simulation
from fedmed_flower.errors import FAILED
from fedmed_flower.privacy.accounting import epsilon_of
from fedmed_flower.privacy.grid import divergence_once
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.statistics import client as surveying
from fedmed_flower.statistics import noised
from fedmed_flower.statistics.declared import Declared
from fedmed_flower.statistics.noised import Cells, plan
from fedmed_flower.statistics.replies import read_reply
from fedmed_flower.statistics.request import KINDS, Request, Survival
from fedmed_flower.statistics.summary import summarise
from fedmed_flower.wire import MESSAGE_VERSION

DECLARED = {
    "ranges": {"age": (0.0, 100.0), "lab": (999_980.0, 1_000_020.0)},
    "categories": {"sex": ("f", "m"), "centre": ("a", "b", "d")},
}
EVERYTHING = DECLARED | {
    "kinds": KINDS,
    "pairs": (("sex", "centre"),),
    "survival": Survival("time", "event", 12.0, 1.0),
    "resolutions": {"age": 5.0},
    "epsilon": 1.0,
}


def planned(rows, **request):
    request = Request(**request)
    declared = Declared(request)
    return plan(request, declared), Cells(rows, declared)


class Noised(MedicalClient):
    patients = 400

    def load_data(self, site):
        rows = make_patients(self.patients, site.index, f"{site.index}-")
        return SiteData(train=rows[:-20], test=rows[-20:], source="made up", generated=True)


def reply_of(client, request, folder, **node_config):
    """Ask one client, of a simulation where no `node_config` is given."""
    context = context_of(node_config=node_config or None, run_dir=str(folder))
    TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1
    content = RecordDict(
        {"config": ConfigRecord({"version": MESSAGE_VERSION, "request": request.to_text()})}
    )
    with simulation():
        return client.client_app()(Message(content, context.node_id, "query.statistics"), context)


def told(reply):
    assert not reply.has_error(), reply.error.reason
    return read_reply(reply.content.config_records["statistics"]["answer"])


class TestSensitivity:
    @pytest.mark.parametrize("by", ["", "sex"])
    @pytest.mark.parametrize("conditions", [{}, where("age >= 40")])
    def test_one_patient_with_all_records(self, by, conditions):
        """Sixty rows of twenty patients; each of them is taken out."""
        rows = [row | {"patient": n % 20} for n, row in enumerate(make_patients(60))]
        whole, columns = planned(rows, by=by, **conditions, **EVERYTHING)
        everybody = whole.sums(columns)
        moved = []
        for patient in range(20):
            left = [row for row in rows if row["patient"] != patient]
            part, fewer = planned(left, by=by, **conditions, **EVERYTHING)
            assert part.bound == whole.bound
            assert part.sums(fewer).shape == everybody.shape
            moved.append(np.linalg.norm(everybody - part.sums(fewer)))
        assert max(moved) <= whole.bound
        assert min(moved) >= 0
        assert max(moved) > whole.bound / 3

    def test_the_bound_is_reached(self):
        """At the end of every range, and in the cells of their own."""
        row = {
            "patient": 1,
            "age": 1e9,
            "lab": -1e9,
            "sex": "f",
            "centre": "a",
            "time": 1,
            "event": 1,
        }
        found, columns = planned([row], **EVERYTHING)
        # 1 + 2 histograms and 2 times two moments, 2 tables, six sums, a pair, a curve.
        assert found.bound == pytest.approx(math.sqrt(1 + 2 + 4 + 2 + 6 + 1 + 1))
        assert np.linalg.norm(found.sums(columns)) == pytest.approx(found.bound)

    def test_a_range_that_floats_cannot_hold(self):
        for low, high in ((-1.7e308, 1.7e308), (0, 5e-324), (2**200, 2**200 + 1), (1, math.nan)):
            with pytest.raises(InputError, match="the range of lab must be two numbers from -1e"):
                Request(ranges={"lab": (low, high)}, epsilon=1.0)

    def test_ends_that_only_whole_numbers_tell_apart_so(self):
        """They lie 1 apart, and as floats 2**148: a value in between was once told 2**148-fold."""
        low = 2**200 + 2**147
        text = json.dumps({"columns": ["lab"], "ranges": {"lab": [low, low + 1]}, "epsilon": 1.0})
        declared = Declared(Request.from_text(text))
        found = plan(Request.from_text(text), declared)
        cells = Cells([{"patient": 1, "lab": 7.0}], declared)
        assert np.linalg.norm(found.sums(cells)) <= found.bound

    @pytest.mark.parametrize(
        "limits", [(1e99, 1.0000000000000002e99), (0, 1e-299), (-1e100, 1e100), (2**80, 2**81)]
    )
    def test_odd_ranges_do_not_stretch_a_value(self, limits):
        rows = [{"patient": n, "lab": x} for n, x in enumerate([0, -1e99, 1e99, 7, None, 1e-300])]
        asked = {"ranges": {"lab": limits}, "kinds": ("moments", "histograms")}
        found, columns = planned(rows, columns=("lab",), epsilon=1.0, **asked)
        for row in rows:
            alone, one = planned([row], columns=("lab",), epsilon=1.0, **asked)
            assert np.linalg.norm(alone.sums(one)) <= found.bound
        assert np.isfinite(found.sums(columns)).all()

    def test_many_rows_count_as_one(self):
        row = make_patients(1)[0] | {"centre": "a"}
        once, columns = planned([row], **EVERYTHING)
        often, more = planned([row] * 50, **EVERYTHING)
        assert once.sums(columns) == pytest.approx(often.sums(more))

    def test_the_form_does_not_depend_on_the_rows(self):
        found, columns = planned(make_patients(50), **EVERYTHING)
        odd = [{"patient": 1, "age": [3], "centre": {"x": 1}, "sex": None, "lab": "text"}]
        odd = [one | {"time": None, "event": None} for one in odd]
        other, one = planned(odd, **EVERYTHING)
        assert found.sums(columns).shape == other.sums(one).shape

    def test_the_noise_fits_the_bound(self, monkeypatch):
        asked = []

        def noised_once(total, std):
            asked.append((total.size, std))
            return total

        monkeypatch.setattr(noised, "noised_once", noised_once)
        found, columns = planned(make_patients(50), **EVERYTHING)
        noised.noised(found, columns, 2.5, 10)
        assert asked == [(found.size, 2.5 * found.bound)]

    def test_every_number_has_noise(self):
        found, columns = planned(make_patients(50), **EVERYTHING)
        groups = [noised.noised(found, columns, 1.0, 10)[0][0] for _ in range(2)]
        assert groups[0]["rows"] != groups[1]["rows"]
        for kind in ("numeric", "categorical"):
            for name in groups[0][kind].keys() & groups[1][kind].keys():
                assert groups[0][kind][name]["n"] != groups[1][kind][name]["n"]


class TestAnswer:
    def test_close_to_pandas_where_epsilon_is_large(self, tmp_path):
        request = Request(**EVERYTHING | {"epsilon": 1e4})
        found = told(reply_of(Noised, request, tmp_path))
        frame = pd.DataFrame(make_patients(400, 0))
        assert found["noise"]["epsilon"] == 1e4
        figures = summarise(found["groups"], request)
        assert figures["patients"] == pytest.approx(400, abs=3)
        assert figures["numeric"]["lab"]["mean"] == pytest.approx(frame.lab.mean(), abs=0.3)
        assert figures["numeric"]["age"]["sd"] == pytest.approx(frame.age.std(), rel=0.02)
        assert figures["numeric"]["age"]["quantiles"]["0.5"]["estimate"] == pytest.approx(
            frame.age.median(), abs=3
        )
        counts = figures["categorical"]["centre"]["counts"]
        assert counts["a"] == pytest.approx((frame.centre == "a").sum(), abs=3)
        # There is no d; what is not declared is among the others.
        assert counts["d"] < 3
        assert figures["categorical"]["centre"]["few"] == pytest.approx(
            (frame.centre == "c").sum(), abs=3
        )
        (pair,) = figures["correlations"]
        assert pair["r"] == pytest.approx(frame.age.corr(frame.lab), abs=0.05)
        curve = figures["survival"]
        assert curve["events_low"] == curve["events_high"]
        assert curve["events_low"][-1] > 100
        # The last patients are censored at the horizon.
        late = frame.time > 12
        fitter = KaplanMeierFitter().fit(
            np.ceil(frame.time.clip(upper=12)), frame.event.where(~late, 0)
        )
        expected = fitter.predict(curve["times"]).to_numpy()
        assert curve["survival"] == pytest.approx(expected, abs=0.03)
        assert {*curve["survival_low"], *curve["survival_high"]} == {None}

    def test_what_is_not_declared(self, tmp_path):
        request = Request(columns=("age", "sex"), ranges={"age": (0.0, 100.0)}, epsilon=1.0)
        found = told(reply_of(Noised, request, tmp_path))
        reason = "with noise a column needs a declared range, or declared categories"
        assert found["withheld"] == [["", "sex", reason]]

    def test_conditions_are_on_what_is_declared(self, tmp_path):
        """Else what a column mostly holds, or whether there is one, would be told exactly."""
        for name in ("stage", "nowhere"):
            request = Request(
                columns=("age",), ranges={"age": (0.0, 100.0)}, epsilon=1.0, **where(f"{name} >= 1")
            )
            reason = reply_of(Noised, request, tmp_path).error.reason
            text = f"with noise a condition needs a declared range or categories: ['{name}']"
            assert reason.endswith(text)
        ranges = {"age": (0.0, 100.0), "nowhere": (0.0, 1.0)}
        request = Request(columns=("age",), ranges=ranges, epsilon=50.0, **where("nowhere >= 0"))
        assert told(reply_of(Noised, request, tmp_path))["groups"][0]["patients"] < 10

    def test_what_is_too_much(self, tmp_path):
        many = {f"x{n}": (0.0, 1.0) for n in range(51)}
        request = Request(ranges=many, kinds=("correlations",), epsilon=1.0)
        text = "correlations with noise are of at most 50 columns, got 51: name fewer columns"
        assert reply_of(Noised, request, tmp_path).error.reason.endswith(text)
        lists = {name: tuple(map(str, range(200))) for name in ("a", "b", "c")}
        request = Request(categories=lists, pairs=(("a", "b"),), by="c", epsilon=1.0)
        text = (
            "with noise at most 1,000,000 numbers can be asked for, got 8,282,200: ask for fewer "
            "columns, pairs or groups"
        )
        assert reply_of(Noised, request, tmp_path).error.reason.endswith(text)

    def test_nothing_is_declared(self, tmp_path):
        reply = reply_of(Noised, Request(epsilon=1.0), tmp_path)
        assert reply.error.reason.endswith("name columns, and declare them")

    def test_a_small_hospital_is_withheld(self, tmp_path):
        few = type("Few", (Noised,), {"patients": 21})
        request = Request(columns=("age",), epsilon=1e4, minimum=40, **DECLARED)
        found = told(reply_of(few, request, tmp_path))
        assert found["withheld"] == [["", "age", "its count, with noise, is below the minimum"]]


class Watched(dict):
    """A row that notes which of its cells are looked at."""

    seen: ClassVar[set[str]] = set()

    def __getitem__(self, name):
        self.seen.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.seen.add(name)
        return super().get(name, default)

    def items(self):
        self.seen.update(self)
        return super().items()


UNFIT = [
    ({"by": "age"}, "with noise the categories of age must be declared"),
    (where("age == x"), "age holds numbers and cannot be compared with 'x'"),
    (where("sex > 1"), "sex holds categories: compare it by == or !=, not >"),
    (where("time > 1"), "with noise a condition needs a declared range or categories: ['time']"),
    (
        {"survival": Survival("sex", "event", 12.0, 1.0)},
        "sex holds no numbers, which a survival curve needs",
    ),
    (
        {"delta": 1e-320},
        "no noise multiplier up to 1e+09 keeps 1 releases within epsilon 1.0 at delta 1e-320: "
        "plan fewer releases, or raise epsilon or delta",
    ),
]


class TestBeforeTheCharge:
    @pytest.mark.parametrize(("asked", "said"), UNFIT)
    def test_what_does_not_fit_is_refused_before_there_are_rows(self, tmp_path, asked, said):
        class Absent(Noised):
            def load_data(self, site):
                raise AssertionError("rows were looked at")

        request = Request(**{"columns": ("age",), "epsilon": 1.0, **DECLARED, **asked})
        assert said in reply_of(Absent, request, tmp_path).error.reason
        assert not (tmp_path / "ledgers" / "hospital-1.sqlite").exists()

    def test_a_schema_that_says_otherwise_is_refused_before_there_are_rows(self, tmp_path):
        class Declaring(Noised):
            schema = SimpleNamespace(numeric=("sex",))

            def load_data(self, site):
                raise AssertionError("rows were looked at")

        reason = reply_of(Declaring, Request(epsilon=1.0, **DECLARED), tmp_path).error.reason
        assert reason.endswith(
            "the request declares sex categorical, which holds numbers by the hospital's schema: "
            "leave that out, or change the schema"
        )

    def test_of_rows_only_the_patients_are_looked_at(self, tmp_path, monkeypatch):
        class Watching(Noised):
            def load_data(self, site):
                rows = [Watched(row) for row in make_patients(100)]
                return SiteData(train=rows, source="made up")

        seen = []
        charge = Ledger.charge
        monkeypatch.setattr(
            Ledger, "charge", lambda *a, **k: seen.append(set(Watched.seen)) or charge(*a, **k)
        )
        Watched.seen.clear()
        told(reply_of(Watching, Request(**EVERYTHING), tmp_path))
        # A hospital's splits are looked at for classes, by the key `label` of images.
        assert seen[0] <= {"patient", "label"}
        assert {"age", "sex", "time", "event"} <= Watched.seen


class TestLedger:
    def ledger(self, folder):
        return Ledger(folder / "ledgers" / "hospital-1.sqlite", read_only=True)

    def test_every_answer_is_charged(self, tmp_path):
        request = Request(columns=("age",), epsilon=0.5, delta=1e-6, **DECLARED)
        for _ in range(2):
            told(reply_of(Noised, request, tmp_path))
        entries = self.ledger(tmp_path).entries()
        assert [(entry.purpose, entry.patients, entry.unsettled) for entry in entries] == [
            ("statistics", 400, 0)
        ] * len(entries)
        spent = sum((entry.releases for entry in entries), start=entries[0].releases.__class__())
        assert spent.total() == 2
        (release,) = spent
        assert epsilon_of([release], 1e-6) == pytest.approx(0.5, rel=2e-3)
        assert epsilon_of([release], 1e-6) <= 0.5

    def test_it_is_charged_before_it_is_computed(self, tmp_path, monkeypatch):
        def fails(*args):
            raise InputError("the power has failed")

        monkeypatch.setattr(surveying, "noised", fails)
        request = Request(columns=("age",), epsilon=0.5, **DECLARED)
        assert reply_of(Noised, request, tmp_path).has_error()
        (entry,) = self.ledger(tmp_path).entries()
        assert (entry.rounds, entry.unsettled) == (1, 1)

    def test_a_failure_after_the_charge_is_one_word_and_stays_charged(self, tmp_path, monkeypatch):
        def fails(planned, *_):
            raise ValueError(f"{len(planned.blocks)} blocks")

        (tmp_path / "data").mkdir()
        node = {"site-name": "north", "data-dir": str(tmp_path / "data")}
        node |= {"budget-epsilon": 1.0, "budget-delta": 1e-5}
        monkeypatch.setattr(surveying, "noised", fails)
        request = Request(columns=("age",), epsilon=0.5, **DECLARED)
        assert reply_of(Noised, request, tmp_path, **node).error.reason == f"site north: {FAILED}"
        (entry,) = Ledger(tmp_path / "data" / "privacy-ledger.sqlite", read_only=True).entries()
        assert (entry.purpose, entry.rounds, entry.unsettled) == ("statistics", 1, 1)
        assert entry.divergence == pytest.approx(divergence_once())

    def test_past_the_budget_it_declines(self, tmp_path):
        (tmp_path / "data").mkdir()
        request = Request(columns=("age",), epsilon=0.6, **DECLARED)
        node = {"site-name": "north", "data-dir": str(tmp_path / "data")}
        node |= {"budget-epsilon": 1.0, "budget-delta": 1e-5}
        replies = [reply_of(Noised, request, tmp_path, **node) for _ in range(4)]
        reasons = [reply.error.reason if reply.has_error() else "" for reply in replies]
        assert reasons[0] == ""
        assert reasons[-1] == "site north: declined: the hospital's privacy budget would be passed"
        assert (tmp_path / "data" / "privacy-ledger.sqlite").exists()
        assert not (tmp_path / "data" / "privacy-ledger.answers").exists()

    @pytest.mark.parametrize(
        "settings", [{"budget-epsilon": 1.0, "budget-delta": 1e-5}, {"private-metrics": True}]
    )
    def test_without_noise_it_declines(self, tmp_path, settings):
        node = {"site-name": "north", "data-dir": str(tmp_path)} | settings
        reply = reply_of(Noised, Request(columns=("age",)), tmp_path, **node)
        assert reply.error.reason == (
            "site north: declined: this hospital, or this run, protects patients by noise: ask "
            "with --epsilon"
        )


def test_no_noise_without_a_budget(tmp_path):
    """Else a server would ask with an epsilon so large that the answer is exact."""
    node = {"site-name": "north", "data-dir": str(tmp_path)}
    reply = reply_of(Noised, Request(columns=("age",), epsilon=1e6, **DECLARED), tmp_path, **node)
    assert reply.error.reason == (
        "site north: declined: noise replaces the minimum count only if the hospital has a budget: "
        "budget-epsilon in its node config"
    )


def test_no_noise_for_what_cannot_have_it():
    with pytest.raises(
        InputError,
        match=says(
            "weekly counts and windows carry no noise: leave epsilon, weekly or by_width out"
        ),
    ):
        Request(epsilon=1.0, by="age", by_width=10.0)


def test_the_answer_is_json(tmp_path):
    reply = reply_of(Noised, Request(**EVERYTHING), tmp_path)
    text = reply.content.config_records["statistics"]["answer"]
    assert json.loads(text)["noise"]["multiplier"] > 1


@pytest.mark.parametrize(
    ("width", "times", "counts"),
    [
        # (censored, had the event) in each step, and who is in none.
        (0.5, [0.5, 1.0, 1.5, 2.0], [0, 1, 1, 1, 0, 0, 1, 0, 1]),
        (1.0, [1.0, 2.0], [1, 2, 1, 0, 1]),
    ],
)
def test_the_steps_of_a_curve_are_as_wide_as_asked(width, times, counts):
    seen = [(0.4, 1), (0.6, 0), (1.0, 1), (9.0, 1), (None, 1)]
    rows = [{"patient": n, "t": time, "e": event} for n, (time, event) in enumerate(seen)]
    asked = Survival("t", "e", 2.0, width)
    made, cells = planned(rows, categories={"e": ("1",)}, survival=asked, epsilon=1.0)
    assert made.blocks[-1].about == {"times": times}
    assert made.sums(cells)[0, -made.blocks[-1].size :].tolist() == counts


def test_a_curve_has_no_more_than_two_hundred_steps():
    asked = Survival("t", "e", 2.0, 0.001)
    made, _ = planned([], categories={"e": ("1",)}, survival=asked, epsilon=1.0)
    assert made.blocks[-1].about["times"] == pytest.approx(np.arange(1, 201) / 100)


def test_a_correlation_of_too_few_is_withheld(tmp_path):
    few = type("Few", (Noised,), {"patients": 21})
    request = Request(
        columns=("age", "lab"), kinds=("correlations",), epsilon=1e4, minimum=40, **DECLARED
    )
    reason = "its count, with noise, is below the minimum"
    found = told(reply_of(few, request, tmp_path))
    assert found["withheld"] == [
        ["", what, reason] for what in ("age", "lab", "correlation of age and lab")
    ]
