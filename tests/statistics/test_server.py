import copy
import json
import re

import numpy as np
import pandas as pd
import pytest
import typer
from builders import FakeGrid
from flwr.app import ConfigRecord, Message, RecordDict
from statistics_rows import ask as ask_hospital
from statistics_rows import make_patients
from surveys import COUNTS, Ward, surveyed
from tiny import says, see
from typer.testing import CliRunner

from fedmed_flower import InputError, SiteData
from fedmed_flower.cli.statistics import statistics
from fedmed_flower.reports.frame import own_file
from fedmed_flower.reports.report import write_report
from fedmed_flower.statistics import page as report
from fedmed_flower.statistics.replies import read_reply
from fedmed_flower.statistics.request import KINDS, Request, Survival, parse_filter
from fedmed_flower.statistics.server import Answer, _content, ask
from fedmed_flower.statistics.table import _alerts, figure, table_one
from fedmed_flower.wire import MESSAGE_VERSION


class TestSurvey:
    def test_a_run(self, tmp_path):
        request = Request(
            columns=("age", "lab", "sex", "time"),
            kinds=KINDS,
            resolutions={"age": 5.0},
            pairs=(("sex", "event"),),
            categorical=("event",),
            survival=Survival("time", "event", 12.0, 1.0),
        )
        answer = surveyed(Ward, request, tmp_path / "run", drift="sites")
        frame = pd.DataFrame([r for s in (0, 2, 3) for r in make_patients(COUNTS[s], s, f"{s}-")])
        found = answer.overall()
        assert found["patients"] == 530
        assert found["numeric"]["lab"]["variance"] == pytest.approx(frame.lab.var(), rel=1e-10)
        assert answer.sites["hospital-2"]["groups"] == []
        summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
        assert summary["kind"] == "statistics"
        assert summary["status"] == "finished"
        assert summary["generated"] is True
        assert summary["sites"] == {
            f"hospital-{n + 1}": c for n, c in enumerate((150, 0, 260, 120))
        }
        titles = [table["title"] for table in summary["tables"]]
        assert titles == [
            *["Table 1", "sex by event, 3 hospitals", "Correlations"],
            "Kaplan-Meier: 410 patients of 2 of 4 hospitals; not hospital-2, hospital-4",
            *["Stands out", "Drift", "Withheld", "Ask again"],
        ]
        (standing_out,) = [t for t in summary["tables"] if t["title"] == "Stands out"]
        unknown = "6 of 24 comparisons were not possible"
        assert standing_out["rows"] == [["nobody", "", unknown, ""]]
        first = summary["tables"][0]
        assert first["head"] == ["", "hospital-1", "hospital-3", "hospital-4", "Overall"]
        rows = {row[0]: row[1:] for row in first["rows"]}
        assert rows["Patients"] == ["150", "260", "120", "530"]
        assert rows["age, mean (SD)"][3] == f"{frame.age.mean():.1f} ({frame.age.std():.1f})"
        women = int((frame.sex == "f").sum())
        assert rows["sex = f, n (%)"][3] == f"{women} ({100 * women / 530:.1f})"
        page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        for text in ("Table 1", "Distributions", "Survival", "Correlation", "generated rows"):
            assert text in page
        assert len(re.findall(r"<svg role=", page)) == 3
        assert "http" not in page.replace("http-equiv", "")
        (tmp_path / "run" / "report.html").unlink()
        write_report(tmp_path / "run")
        assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == page

    def test_by_groups_and_weeks(self, tmp_path):
        rows = [
            {"patient": n, "year": 2020 + n // 150, "day": 7 * (n % 15), "x": n % 10}
            for n in range(300)
        ]
        rows += [{"patient": 1000 + n, "year": 2021, "day": 7 * 13, "x": 1} for n in range(60)]

        class Cases(Ward):
            def load_data(self, site):
                return SiteData(train=rows, source="made up")

        request = Request(
            by="year", weekly="day", kinds=("histograms",), columns=("x",), resolutions={"x": 1.0}
        )
        answer = surveyed(Cases, request, tmp_path / "run", sites=2, drift="groups")
        assert list(answer.groups()) == ["2020", "2021"]
        found = json.loads((tmp_path / "run" / "statistics.json").read_text(encoding="utf-8"))
        numbers = {row["site"]: row for row in found["drift"] if row["what"] == "numbers"}
        assert list(numbers) == ["hospital-1", "hospital-2", "all hospitals"]
        for row in numbers.values():
            assert (row["group"], row["against"], row["column"]) == ("2021", "2020", "x")
            assert row["psi"] > 0.25
            assert row["stands_out"] == "x is distributed otherwise than in '2020'"
        alerts = {(row["group"], row["site"]): row["alert"] for row in found["alerts"]}
        assert not any(alerts["2020", "hospital-1"])
        assert [w for w, alert in enumerate(alerts["2021", "hospital-2"]) if alert] == [13]
        summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
        tables = {table["title"]: table for table in summary["tables"]}
        weekly = tables["Weekly counts (c2)"]
        assert weekly["head"] == ["hospital", "first week", "weeks", "withheld", "judged", "alerts"]
        assert weekly["rows"][-1] == ["hospital-2, 2021", "day 0", "15", "0", "6", "day 91"]
        named = [row[:2] for row in tables["Stands out"]["rows"]]
        assert named == [[f"{site}, 2021", "numbers"] for site in numbers]
        page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        assert "Week by week" in page
        assert "Drift" in page

    def test_one_hospital_fails_and_the_others_go_on(self, tmp_path):
        class Broken(Ward):
            def load_data(self, site):
                if site.index == 0:
                    raise InputError("the table is not there")
                return super().load_data(site)

        request = Request(columns=("age",), where=(parse_filter("age>=20"),))
        answer = surveyed(Broken, request, tmp_path / "run")
        assert answer.failures == [("hospital-1", "the table is not there")]
        assert answer.overall()["patients"] == 380
        summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
        assert summary["tables"][-1]["rows"] == [["hospital-1", "the table is not there"]]

    def test_nobody_answers(self, tmp_path):
        class Broken(Ward):
            def load_data(self, site):
                raise InputError("the table is not there")

        text = "no hospital has sent statistics: the table is not there"
        with pytest.raises(InputError, match=says(text)):
            surveyed(Broken, Request(), tmp_path / "run")
        summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
        assert summary["status"] == "failed"
        assert "no hospital has sent statistics" in (tmp_path / "run" / "report.html").read_text(
            encoding="utf-8"
        )

    @pytest.mark.parametrize("option", [{"drift": "x"}, {"alert": "x"}])
    def test_wrong_options(self, tmp_path, option):
        with pytest.raises(InputError, match="must be one of"):
            surveyed(Ward, Request(), tmp_path / "run", **option)
        assert not (tmp_path / "run").exists()

    def test_a_survey_has_no_model_to_test(self, tmp_path):
        text = "evaluate tests a network, and this app asks for statistics" + see("evaluate")
        with pytest.raises(InputError, match=says(text)):
            surveyed(Ward, Request(), tmp_path / "run", run_config={"evaluate": "runs/first"})
        assert not (tmp_path / "run").exists()

    def test_a_survey_is_not_by_secure_sums(self, tmp_path):
        text = 'secure="sum" trains a network, and this app asks for statistics, for which '
        text += "hospitals would have to send their own figures: leave it out" + see("secure")
        with pytest.raises(InputError, match=says(text)):
            surveyed(Ward, Request(), tmp_path / "run", run_config={"secure": "sum"})
        assert not (tmp_path / "run").exists()

    def test_names_that_are_markup(self, tmp_path):
        class Markup(Ward):
            def load_data(self, site):
                rows = [{"patient": n, "<b>x": n, "y$\n": "<script>"} for n in range(40)]
                return SiteData(train=rows, source="<i>made up")

        request = Request(kinds=KINDS, resolutions={"<b>x": 1.0})
        surveyed(Markup, request, tmp_path / "run", sites=1)
        page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        page = page.replace(f"<script>{own_file('script.js')}</script>", "", 1)
        assert "&lt;b&gt;x" in page
        for text in ("<b>x", "<script>", "<i>made"):
            assert text not in page


def test_a_hospital_of_another_version_is_refused_by_name(tmp_path):
    class Older(Ward):
        """The first hospital's package is of before messages had versions."""

        @classmethod
        def client_app(cls, mods=()):
            def forget(message, context, call):
                reply = call(message, context)
                if context.node_config["partition-id"] == 0:
                    del reply.content["site"]["version"]
                return reply

            return super().client_app([forget])

    answer = surveyed(Older, Request(columns=("age",)), tmp_path / "run")
    assert answer.failures == [
        (
            "hospital-1",
            "hospital-1: messages of the hospital have no version, as before versions were named, "
            "and those of the server version 2: install the same fedmed-flower at both",
        )
    ]
    assert list(answer.sites) == ["hospital-2", "hospital-3", "hospital-4"]


class TestRealHospitals:
    def nodes(self, tmp_path, **settings):
        (tmp_path / "data").mkdir(exist_ok=True)
        return [{"site-name": "north", "data-dir": str(tmp_path / "data")} | settings]

    def ask(self, tmp_path, rows, run_config=None, **settings):
        number = len(list(tmp_path.iterdir()))

        class Own(Ward):
            def load_data(self, site):
                return SiteData(train=rows, source="north")

        return surveyed(
            Own,
            Request(columns=("age",)),
            tmp_path / f"run-{number}",
            1,
            self.nodes(tmp_path, **settings),
            run_config,
        ).sites["north"]

    def test_what_was_told_lasts_from_run_to_run(self, tmp_path):
        rows = make_patients(40)
        first = self.ask(tmp_path, rows)
        assert first["groups"][0]["rows"] == 40
        assert (tmp_path / "data" / "privacy-ledger.answers").exists()
        assert self.ask(tmp_path, rows) == first
        assert self.ask(tmp_path, rows[1:])["groups"] == []

    def test_its_own_minimum(self, tmp_path):
        rows = make_patients(30)
        assert self.ask(tmp_path, rows, **{"min-cell-count": 31})["groups"] == []

    @pytest.mark.parametrize(("asked", "minimum"), [(1, 10), (25, 25)])
    def test_a_server_can_only_raise_it(self, tmp_path, asked, minimum):
        run_config = {"min-cell-count": asked}
        assert self.ask(tmp_path, make_patients(30), run_config)["minimum"] == minimum

    def test_of_an_error_only_the_class_leaves(self, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "privacy-ledger.answers").write_bytes(b"damaged")
        with pytest.raises(InputError, match=says("no hospital has sent statistics: InputError")):
            self.ask(tmp_path, make_patients(30))

    def test_questions_that_fail_use_up_values_too(self, tmp_path):
        """The curve's columns are not there, whatever the condition: the values are kept."""
        nodes = self.nodes(tmp_path, **{"max-filter-values": 2})
        told = []
        for bound in (50, 60, 70):
            request = Request(
                columns=("age",),
                where=(parse_filter(f"age>={bound}"),),
                survival=Survival("no", "nothing", 9.0, 1.0),
            )
            with pytest.raises(InputError) as caught:
                surveyed(Ward, request, tmp_path / f"run-{bound}", 1, nodes)
            told.append(str(caught.value).removeprefix("no hospital has sent statistics: "))
        assert told == [
            *["InputError"] * 2,
            "declined: all requests together may compare age with at most 2 values (conditions and "
            "cell widths), and these are used up: use values of earlier requests",
        ]

    def test_values_to_compare_with_run_out(self, tmp_path):
        request = Request(columns=("age",), where=(parse_filter("age>=50"),))
        nodes = self.nodes(tmp_path, **{"max-filter-values": 0})
        text = (
            "no hospital has sent statistics: declined: all requests together may compare age with "
            "at most 0 values (conditions and cell widths), and these are used up: use values of "
            "earlier requests"
        )
        with pytest.raises(InputError, match=says(text)):
            surveyed(Ward, request, tmp_path / "run", 1, nodes)


@pytest.mark.parametrize("noise", [{}, {"epsilon": 1.0}])
def test_a_horizon_past_the_follow_up_is_warned_of_at_the_hospital(noise, tmp_path, caplog):
    """Of 150 patients 41 are followed for 8 years, two of them for 25."""
    warnings = {}
    for horizon in (8.0, 25.0):
        request = Request(
            columns=("age",),
            survival=Survival("time", "event", horizon, 1.0),
            ranges={"age": (0.0, 120.0)} if noise else {},
            **noise,
        )
        caplog.clear()
        surveyed(Ward, request, tmp_path / f"{horizon}", 1)
        warnings[horizon] = [text for text in caplog.messages if "are followed" in text]
    assert warnings == {
        8.0: [],
        25.0: [
            "hospital-1: fewer than 10 patients are followed up to time=25, the horizon of the "
            "survival curve: its last part rests on hardly any patient here. Ask with a shorter "
            "horizon"
        ],
    }


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Return an answer with something of everything."""
    rows = [row | {"day": n % 100} for n, row in enumerate(make_patients(1000))]
    request = {
        "kinds": KINDS,
        "resolutions": {"age": 5.0},
        "pairs": (("sex", "centre"),),
        "survival": ("time", "event", 12.0, 1.0),
        "weekly": "day",
    }
    told = ask_hospital(rows, tmp_path_factory.mktemp("sound") / "a", **request)
    return {"minimum": 10, "noise": None} | told


def change(told, path, value):
    """Return a copy of an answer with another value at a place."""
    told = copy.deepcopy(told)
    node = told
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return told


HOSTILE = [
    (("groups", 0, "rows"), -1),
    (("groups", 0, "rows"), 1.5),
    (("groups", 0, "rows"), True),
    (("groups", 0, "rows"), "many"),
    (("groups", 0, "patients"), 1001),
    (("groups", 0, "name"), 3),
    (("groups", 0, "name"), "x" * 500),
    (("groups", 0, "start"), "then"),
    (("groups", 0, "numeric"), []),
    (("groups", 0, "numeric", "age"), None),
    (("groups", 0, "numeric", "age", "n"), -4),
    (("groups", 0, "numeric", "age", "n"), 10**30),
    (("groups", 0, "numeric", "age", "mean"), float("nan")),
    (("groups", 0, "numeric", "age", "mean"), float("inf")),
    (("groups", 0, "numeric", "age", "mean"), [1.0]),
    (("groups", 0, "numeric", "age", "mean"), 10**400),
    (("groups", 0, "numeric", "age", "m2"), -1.0),
    (("groups", 0, "numeric", "age", "m2"), 1.7e308),
    (("groups", 0, "numeric", "age", "histogram", "edges"), [1.0]),
    (("groups", 0, "numeric", "age", "histogram", "edges", 0), 1000.0),
    (("groups", 0, "numeric", "age", "histogram", "edges", 0), -1e308),
    (("groups", 0, "numeric", "age", "histogram", "counts", 0), 10_000),
    (("groups", 0, "numeric", "age", "histogram", "whole"), 1),
    (("groups", 0, "categorical", "sex", "counts"), [1]),
    (("groups", 0, "categorical", "sex", "counts", 0), -200),
    (("groups", 0, "categorical", "sex", "names"), ["f", "f"]),
    (("groups", 0, "categorical", "sex", "names", 0), {"x": 1}),
    (("groups", 0, "categorical", "sex", "few"), 1500),
    (("groups", 0, "correlations", 0, "product"), 1e30),
    (("groups", 0, "correlations", 0, "columns"), ["age"]),
    (("groups", 0, "correlations", 0, "of", 0, "n"), 3),
    (("groups", 0, "pairs", 0, "counts", 0), [1]),
    (("groups", 0, "pairs", 0, "counts"), []),
    (("groups", 0, "survival", "times", 0), 1e9),
    (("groups", 0, "survival", "times", 0), -1.0),
    (("groups", 0, "survival", "times", -1), 1e300),
    (("groups", 0, "survival", "events"), []),
    (("groups", 0, "survival", "times"), [*range(10_002)]),
    (("groups", 0, "survival", "censored", 0), 4000),
    (("groups", 0, "weeks", "counts", 0), -1),
    (("groups", 0, "weeks", "first"), 0.5),
    (("groups", 0, "weeks", "first"), 1),
    (("groups", 0, "weeks", "start"), "2020-01-01"),
    (("groups", 0, "weeks", "start"), "<b>soon"),
    (("groups", 0, "weeks", "counts"), [1] * 20_000),
    (("groups", 0, "correlations", 0, "of", 1, "m2"), 1.7e308),
    (("groups",), [None] * 10_001),
    (("groups",), 3),
    (("groups",), "text"),
    (("noise",), {"epsilon": -1}),
    (("minimum",), 0),
    (("withheld",), [["a"]]),
    (("withheld",), [[1, 2, 3]]),
]


class TestHostileReplies:
    def test_a_sound_one(self, sound):
        assert read_reply(json.dumps(sound)) == sound
        assert {"survival", "weeks"} <= sound["groups"][0].keys()
        assert sound["groups"][0]["pairs"]

    @pytest.mark.parametrize(("path", "value"), HOSTILE)
    def test_what_cannot_be(self, sound, path, value):
        with pytest.raises(ValueError) as caught:
            read_reply(json.dumps(change(sound, path, value)))
        assert str(caught.value)
        assert len(str(caught.value)) < 300

    @pytest.mark.parametrize("text", ["", "[]", "null", "3", "[" * 10**5, 3, None, b"{}"])
    def test_what_is_none(self, text):
        with pytest.raises(ValueError):
            read_reply(text)

    def test_a_part_that_is_missing(self, sound):
        for name in ("groups", "noise", "minimum", "withheld"):
            with pytest.raises(ValueError):
                read_reply(json.dumps({k: v for k, v in sound.items() if k != name}))
        for name in ("name", "rows", "numeric", "pairs"):
            group = {k: v for k, v in sound["groups"][0].items() if k != name}
            with pytest.raises(ValueError):
                read_reply(json.dumps(sound | {"groups": [group]}))

    def test_a_group_twice(self, sound):
        with pytest.raises(
            ValueError, match=says("groups must have different names, two have the same")
        ):
            read_reply(json.dumps(sound | {"groups": sound["groups"] * 2}))

    def test_they_are_left_out_by_name(self, sound):
        wrong = change(sound, ("groups", 0, "rows"), -1)

        def answer(message):
            node = message.metadata.dst_node_id
            if node == 4:
                return None
            told = ConfigRecord({"answer": json.dumps(wrong if node == 2 else sound)})
            about = {"name": f"site {node}", "data": "x", "generated": 1}
            content = {"site": ConfigRecord(about | {"version": MESSAGE_VERSION})}
            content |= {} if node == 3 else {"statistics": told}
            return Message(RecordDict(content), reply_to=message)

        found = ask(FakeGrid([1, 2, 3, 4], answer), Request(), 1.0)
        assert list(found.sites) == ["site 1"]
        assert found.failures == [
            ("node 4", "no answer within 1 s"),
            ("site 2", "malformed answer: rows must be a finite number from 0 to 1e+12, got -1"),
            ("site 3", "malformed answer: KeyError 'statistics'"),
        ]


class TestTable:
    def test_weeks_that_are_withheld_or_not_judged_are_no_quiet_ones(self):
        weeks = [f"day {7 * number}" for number in range(4)]
        about = {"group": "", "weeks": weeks, "statistic": [0.0] * 4}
        entries = [
            about | {"site": "a", "counts": [1, 2, 3, 4], "alert": [None, False, True, True]},
            about | {"site": "b", "counts": [1, None, 3, 4], "alert": [None, None, False, False]},
            about | {"site": "c", "counts": [None, None, 3, 4], "alert": [None] * 4},
            {"site": "d", "group": "x", "weeks": [], "counts": [], "note": "all are withheld"},
        ]
        assert _alerts(entries, "c2")["rows"] == [
            ["a", "day 0", "4", "0", "3", "day 14, day 21"],
            ["b", "day 0", "4", "1", "2", "none (not judged: 1 withheld)"],
            [
                *["c", "day 0", "4", "2", "0"],
                "too few weeks are known to judge any (not judged: 2 withheld)",
            ],
            ["d, x", "–", "0", "0", "0", "all are withheld"],
        ]

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            *[(None, "–"), (np.nan, "–"), (0.0, "0.000"), (0.1234, "0.123"), (-3.14159, "−3.14")],
            *[(54.321, "54.3"), (1234.5, "1,234"), (1.5e8, "1.5e+08"), (1e-9, "1e−09")],
        ],
    )
    def test_figures(self, value, text):
        assert figure(value) == text

    def test_a_category_that_one_hospital_does_not_name(self):
        part = {"n": 100, "missing": 0, "hospitals": 1}
        one = {"x": part | {"counts": {"a": 60, "b": 40}, "few": 0}}
        two = {"x": part | {"counts": {"a": 80}, "few": 20}}
        both = {"x": part | {"n": 200, "counts": {"a": 140, "b": 40}, "few": 20}}
        sites = {
            name: {"rows": 100, "patients": 100, "numeric": {}, "categorical": told}
            for name, told in (("one", one), ("two", two))
        }
        overall = {"rows": 200, "patients": 200, "numeric": {}, "categorical": both}
        rows = table_one("", {"sites": sites, "overall": overall})["rows"]
        assert rows == [
            ["Patients", "100", "100", "200"],
            ["x = a, n (%)", "60 (60.0)", "80 (80.0)", "140 (70.0)"],
            ["x = b, n (%)", "40 (40.0)", "few", "≥40 (20.0)"],
            ["x (few each), n (%)", "0 (0.0)", "20 (20.0)", "20 (10.0)"],
            ["x, missing", "0", "0", "0"],
        ]


class TestCommand:
    @pytest.fixture
    def app(self, tmp_path):
        """Return the folder of an app with the hospitals of `Ward`."""
        folder = tmp_path / "ward"
        folder.mkdir()
        (folder / "pyproject.toml").write_text(
            '[project]\nname = "ward"\nversion = "1.0.0"\nlicense = "Apache-2.0"\n'
            '[tool.flwr.app]\npublisher = "us"\n[tool.flwr.app.components]\n'
            'serverapp = "ward_app:server"\nclientapp = "ward_app:client"\n'
            '[tool.flwr.app.config]\nrun-dir = ""\nresume = false\nnum-server-rounds = 1\n',
            encoding="utf-8",
        )
        (folder / "ward_app.py").write_text(
            "from flwr.serverapp import ServerApp\nfrom surveys import Ward\n"
            "server, client = ServerApp(), Ward.client_app()\n",
            encoding="utf-8",
        )
        return folder

    def run(self, *arguments):
        commands = typer.Typer()
        commands.command()(statistics)
        return CliRunner().invoke(commands, [str(argument) for argument in arguments])

    def test_it_prints_and_writes(self, app, tmp_path):
        options = ["--sites", "4", "--out", tmp_path / "run", "--where", "age>=30", "--quantiles"]
        options += ["--resolution", "age=5", "--column", "age", "--column", "sex"]
        result = self.run(app, *options, "--drift-sites", "-c", "min-cell-count=5")
        assert result.exit_code == 0, result.output
        for text in ("Table 1", "age, median [Q1, Q3]"[:10], "hospital-4", "Drift", "Withheld"):
            assert text in result.output
        assert "finished: 4 of 4 hospitals (generated rows, not patients)" in result.output
        found = json.loads((tmp_path / "run" / "statistics.json").read_text(encoding="utf-8"))
        assert found["sites"]["hospital-1"]["minimum"] == 5
        assert found["request"]["where"] == [["age", ">=", 30.0]]

    @pytest.mark.parametrize(
        "asked",
        [
            Request(
                columns=("age", "sex"),
                where=(parse_filter("age>=30"), parse_filter('sex!="1"')),
                categorical=("event",),
                kinds=KINDS,
                whole=("age",),
                resolutions={"age": 0.1},
                pairs=(("sex", "centre"),),
                survival=Survival("time", "event", 12.5, 0.5),
            ),
            Request(by="sex", weekly="time"),
            Request(by="time", by_width=2.5, kinds=KINDS[:3]),
            Request(
                columns=("age", "sex"),
                ranges={"age": (0.0, 99.5)},
                categories={"sex": ("f", "m")},
                epsilon=0.5,
                delta=1e-6,
            ),
        ],
        ids=["all", "groups", "windows", "noise"],
    )
    def test_the_options_of_a_request_ask_the_same(self, app, tmp_path, asked):
        result = self.run(app, "--sites", "1", "--out", tmp_path / "run", *asked.to_options())
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "run" / "statistics.json").read_text(encoding="utf-8"))
        assert Request.from_text(json.dumps(found["request"])) == asked
        assert found["command"] == [str(app), "--sites", "1"]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--where", "age"], "a condition must be a column"),
            (["--survival", "time,event"], "--survival takes TIME,EVENT,HORIZON,WIDTH, got"),
            (["--survival", "time,event,x,1"], "expected a number, got 'x'"),
            (["--resolution", "age"], "--resolution takes COLUMN=VALUE, got 'age'"),
            (["--range", "age=3"], "--range takes COLUMN=LOW,HIGH, got '3'"),
            (["--table", "sex"], "--table takes two columns A,B, got 'sex'"),
            (["--drift-by", "sex", "--drift-sites"], "--drift-by excludes --by and --drift-sites"),
            (["--alert", "c9"], "alert must be one of c2, cusum, farrington, got 'c9'"),
            (["--epsilon", "-1"], "epsilon must be at least 0 and finite, got -1.0"),
            (["-c", "rounds=3"], "the app has no setting 'rounds'"),
        ],
    )
    def test_what_is_wrong(self, app, tmp_path, options, said):
        result = self.run(app, "--out", tmp_path / "run", *options)
        assert result.exit_code == 2
        assert f"not started: {said}" in result.output
        assert not (tmp_path / "run").exists()


def test_a_hospital_with_hundreds_of_groups_does_not_hold_up_the_page(sound, monkeypatch):
    """Each group would be drawn by itself, for hours."""
    drawn = []
    monkeypatch.setattr(report, "_drawings", lambda name, *_: drawn.append(name) or "")
    monkeypatch.setattr(report, "_weeks", lambda entry: drawn.append(entry["group"]) or "")
    groups = [sound["groups"][0] | {"name": f"ward {number}"} for number in range(30)]
    told = read_reply(json.dumps(sound | {"groups": groups}))
    answer = Answer(Request(weekly="day"), {"north": told})
    found = _content(answer, "", "c2")
    body = report._body({"app": "survey"}, found)
    assert len(drawn) == 2 * 24
    assert '<p class="note">6 more groups not drawn.</p>' in body


def test_a_column_that_no_hospital_has_is_an_error_and_one_that_some_have_is_not(tmp_path):
    with pytest.raises(InputError, match=r"^no hospital has a column 'agee'$"):
        surveyed(Ward, Request(columns=("age", "agee")), tmp_path / "none")
    summary = json.loads((tmp_path / "none" / "summary.json").read_text())
    assert (summary["status"], summary["message"]) == ("failed", "no hospital has a column 'agee'")

    class Uneven(Ward):
        def load_data(self, site):
            data = super().load_data(site)
            for row in (*data.train, *data.val):
                if site.index == 0:
                    row["height"] = 170.0
            return data

    surveyed(Uneven, Request(columns=("age", "height")), tmp_path / "some")
    summary = json.loads((tmp_path / "some" / "summary.json").read_text())
    assert summary["status"] == "finished"


def test_all_others_are_not_the_first_group(tmp_path):
    """Their name comes before most, and each hospital puts others into them."""
    rows = [
        {"patient": f"{sex}{n}", "age": n % 7, "sex": sex}
        for sex, count in {"f": 40, "m": 40, "x": 6, "y": 6}.items()
        for n in range(count)
    ]
    told = ask_hospital(rows, tmp_path / "north", by="sex") | {"minimum": 10}
    found = Answer(Request(by="sex"), {"north": told})
    assert [*found.groups()] == ["f", "m", "all others"]
    drift = _content(found, "groups", "c2")["drift"]
    assert {(row["group"], row["against"]) for row in drift} == {("m", "f"), ("all others", "f")}


@pytest.mark.parametrize(
    ("drift", "names", "said"),
    [
        (
            "groups",
            ["north", "south"],
            "nothing was compared by day: no hospital has sent two groups of it. Dates and numbers "
            "need windows, wide enough for the minimum of patients: --window, in days for dates",
        ),
        (
            "sites",
            ["north"],
            "nothing was compared: no two hospitals have sent the same column",
        ),
        ("sites", ["north", "south"], None),
    ],
)
def test_drift_that_compares_nothing_says_so(tmp_path, caplog, drift, names, said):
    by = "day" if drift == "groups" else ""
    asked = {"columns": ("age",), "by": by}
    rows = [{"patient": n, "age": 40 + n, "day": f"2020-01-{1 + n:02}"} for n in range(30)]
    answer = Answer(Request(**asked))
    for name in names:
        found = ask_hospital(rows, tmp_path / name, **asked)
        answer.sites[name] = read_reply(json.dumps({"minimum": 10, "noise": None} | found))
    _content(answer, drift, "c2")
    assert [text for text in caplog.messages if "compared" in text] == ([said] if said else [])
