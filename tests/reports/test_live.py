import json
import os
import subprocess
import sys

import pytest
from live_runs import SITES, rounds_of, write_json, write_live, write_metrics

from fedmed_flower.reports import live
from fedmed_flower.reports.live import LiveFolder

ODD = [None, True, -1, 1e400, float("nan"), 10**400, "x\x1b[31m\n" * 1000, [], [[]], {}, {"a": []}]


def state_of(folder, **options):
    run = LiveFolder(folder, **options)
    run.refresh()
    return run.state()


def curve(run, phase, metric, generation=0, since=0):
    found = run.curve(phase, metric, generation, since)
    sites = [found["names"][index] for index in found["sites"]]
    return found, [*zip(found["rounds"], sites, found["values"], strict=True)]


def test_a_folder_that_does_not_exist_yet_is_waited_for(tmp_path):
    run = LiveFolder(tmp_path / "run")
    before = run.refresh()
    state = run.state()
    assert (state["status"], state["age"], state["sites"]) == ("waiting", None, [])
    assert state["problems"] == []
    (tmp_path / "run").mkdir()
    write_live(tmp_path / "run")
    assert run.refresh() != before
    assert run.state()["status"] == "running"


def test_what_goes_on_now_is_that_of_live_json(tmp_path):
    failed = {"site": "hospital-3", "reason": "RuntimeError: out\nof memory"}
    write_live(
        tmp_path,
        replied=["hospital-1"],
        failed=[failed],
        failures=[{"round": 1, "phase": "train", "site": "a", "reason": "late"}, failed],
        seconds_left=12.5,
    )
    state = state_of(tmp_path)
    assert [state[key] for key in ("app", "round", "rounds", "phase", "left")] == [
        *("pneumonia", 2, 10, "train", 12.5)
    ]
    assert [(site["name"], site["doing"], site["reason"]) for site in state["sites"]] == [
        ("hospital-1", "replied", ""),
        ("hospital-2", "asked", ""),
        ("hospital-3", "failed", "RuntimeError: out of memory"),
    ]
    assert [failure["reason"] for failure in state["failures"]] == [
        "RuntimeError: out of memory",
        "late",
    ]


def test_a_run_without_live_json_is_shown_by_its_summary_and_metrics(tmp_path):
    write_metrics(tmp_path, rounds_of(3))
    state = state_of(tmp_path)
    assert (state["status"], state["round"], state["rounds"]) == ("running", 3, None)
    failure = {"round": 2, "phase": "val", "site": "hospital-2", "reason": "failed"}
    summary = {"status": "stopped", "message": "by the user", "rounds-planned": 9, "app": "heart"}
    write_json(tmp_path, "summary.json", **summary, seconds=7.5, failures=[failure])
    (tmp_path / "report.html").write_text("<p>report</p>")
    state = state_of(tmp_path)
    keys = ("status", "message", "round", "rounds", "app", "seconds", "report", "failures")
    assert [state[key] for key in keys] == [
        *("stopped", "by the user", 3, 9, "heart", 7.5, True, [failure])
    ]
    assert [site["name"] for site in state["sites"]] == [*SITES]


def test_the_status_that_was_written_last_counts(tmp_path):
    write_json(tmp_path, "summary.json", status="failed", message="old", failures=[])
    (tmp_path / "report.html").write_text("old")
    write_live(tmp_path)
    os.utime(tmp_path / "summary.json", (1e9, 1e9))
    # The run was resumed: its report is that of the end before.
    state = state_of(tmp_path)
    assert (state["status"], state["message"], state["report"]) == ("running", "", False)
    os.utime(tmp_path / "live.json", (9e8, 9e8))
    state = state_of(tmp_path)
    assert (state["status"], state["message"], state["report"]) == ("failed", "old", True)


def test_a_run_that_was_killed_is_known_by_its_silence(tmp_path):
    write_live(tmp_path)
    os.utime(tmp_path / "live.json", (1000, 1000))
    state = state_of(tmp_path, clock=lambda: 1100.0)
    assert (state["status"], state["beats"], state["age"]) == ("running", True, 100)
    assert state["age"] > state["patience"]
    # Another file of the run is a sign of life as well.
    (tmp_path / "log.txt").touch()
    os.utime(tmp_path / "log.txt", (1090, 1090))
    assert state_of(tmp_path, clock=lambda: 1100.0)["age"] == 10


def test_of_a_table_that_grows_only_what_is_new_is_read_and_sent(tmp_path, monkeypatch):
    run = LiveFolder(tmp_path)
    write_metrics(tmp_path, rounds_of(20))
    first = run.refresh()
    assert run.refresh() == first
    found, points = curve(run, "val", "auc")
    assert len(points) == 20 * 4
    assert points[:2] == [(1, "hospital-1", 0.5), (1, "hospital-2", 0.7)]
    write_metrics(tmp_path, rounds_of(21))
    taken = []
    take = live.MetricTable._take
    monkeypatch.setattr(
        live.MetricTable, "_take", lambda *each: (taken.append(each[1]), take(*each))
    )
    assert run.refresh() != first
    assert [line.split(",")[0] for line in taken[0].splitlines()] == ["21"] * 12
    more, points = curve(run, "val", "auc", found["generation"], found["until"])
    assert (more["generation"], more["since"], more["until"]) == (found["generation"], 80, 84)
    assert {number for number, _, _ in points} == {21}
    assert run.state()["main"] == ["val", "auc"]
    assert curve(run, "val", "loss")[0]["until"] == 84


def test_another_table_of_the_same_name_is_read_from_its_start(tmp_path):
    run = LiveFolder(tmp_path)
    write_metrics(tmp_path, rounds_of(5))
    run.refresh()
    before, _ = curve(run, "val", "auc")
    for rows in (rounds_of(7, ("north", "south")), rounds_of(2)):
        write_metrics(tmp_path, rows)
        run.refresh()
        after, points = curve(run, "val", "auc", before["generation"], before["until"])
        assert after["generation"] == before["generation"] + 1
        assert (after["since"], points[0][0]) == (0, 1)
        before = after
    (tmp_path / "metrics.csv").unlink()
    run.refresh()
    assert run.state()["metrics"] == []
    assert curve(run, "val", "auc")[1] == []


def test_a_curve_of_many_points_comes_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "_MOST_POINTS", 7)
    write_metrics(tmp_path, rounds_of(3))
    run = LiveFolder(tmp_path)
    run.refresh()
    until, more, parts = 0, True, []
    while more:
        found, points = curve(run, "val", "auc", 1, until)
        until, more = found["until"], found["more"]
        parts += points
    assert len(parts) == 12
    assert parts == [
        (number, site, value)
        for number, phase, site, metric, value in rounds_of(3)
        if (phase, metric) == ("val", "auc")
    ]


def test_a_line_that_is_no_metric_is_named_until_it_is_mended(tmp_path):
    path = tmp_path / "metrics.csv"
    write_metrics(tmp_path, rounds_of(1))
    good = path.read_text()
    bad = good.replace("1,train,all,loss,1.0", "one,train,all,loss,1.0")
    assert bad != good
    run = LiveFolder(tmp_path)
    for text in (bad, bad + "2,train,all,loss,1.0\r\n"):
        path.write_text(text)
        run.refresh()
        assert run.state()["problems"] == [
            f"{path} line 5 is not a metric (invalid literal for int() with base 10: 'one'): mend "
            "or remove it"
        ]
        assert len(curve(run, "train", "loss")[1]) == 3
    path.write_text(good)
    run.refresh()
    assert run.state()["problems"] == []
    assert len(curve(run, "train", "loss")[1]) == 4


def test_a_line_that_is_still_written_is_waited_for(tmp_path):
    path = tmp_path / "metrics.csv"
    run = LiveFolder(tmp_path)
    path.write_text("round,phase,site,metric,value\n1,train,a,loss,0.5\n2,tr")
    run.refresh()
    assert curve(run, "train", "loss")[1] == [(1, "a", 0.5)]
    path.write_text("round,phase,site,metric,value\n1,train,a,loss,0.5\n2,train,a,loss,0.25\n")
    run.refresh()
    found, points = curve(run, "train", "loss", 1, 1)
    assert (found["generation"], points) == (1, [(2, "a", 0.25)])
    assert run.state()["problems"] == []


def test_what_cannot_be_drawn_is_left_out_and_names_are_as_they_were(tmp_path):
    rows = [
        (1, "train", "=north", "loss", float("nan")),
        (1, "train", "=north", "seconds", float("inf")),
        (2, "train", "a,\nb", "loss", 0.5),
    ]
    write_metrics(tmp_path, rows)
    run = LiveFolder(tmp_path)
    run.refresh()
    assert curve(run, "train", "loss")[1] == [(2, "a, b", 0.5)]
    assert [site["name"] for site in run.state()["sites"]] == ["a, b"]
    # Somebody trained in it, whatever came out.
    assert run.state()["round"] == 2


def test_more_sites_or_metrics_than_can_be_shown_are_counted_out_loud(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "_MOST_SITES", 2)
    monkeypatch.setattr(live, "_MOST_SERIES", 2)
    write_metrics(tmp_path, rounds_of(1))
    state = state_of(tmp_path)
    assert state["problems"] == [
        "metrics.csv has more than 2 sites, more than 2 metrics, or a name of more than 300 "
        "letters: the others are not shown"
    ]
    assert [entry["metric"] for entry in state["metrics"]] == ["loss", "auc"]
    assert len(state["sites"]) == 2


def test_names_of_metrics_are_cleaned_and_bounded(tmp_path):
    rows = [(1, "train\x1b[31m", "a", "m\u202e\nn", 0.5), (1, "train", "a", "x" * 301, 0.5)]
    write_metrics(tmp_path, rows)
    run = LiveFolder(tmp_path)
    run.refresh()
    state = run.state()
    (entry,) = state["metrics"]
    assert (entry["phase"], entry["metric"]) == ("train\\x1b[31m", "m\\u202e n")
    assert len(curve(run, entry["phase"], entry["metric"])[1]) == 1
    assert "a name of more than 300 letters" in state["problems"][0]


def test_privacy_is_shown_by_hospital_with_the_runs_target(tmp_path):
    write_metrics(tmp_path, rounds_of(3, epsilon=True))
    patient = {"target-epsilon": 8.0, "delta": 1e-5}
    write_json(tmp_path, "summary.json", status="running", privacy={"patient": patient})
    state = state_of(tmp_path)
    assert state["privacy"] == {"patient": {"target": 8.0, "delta": 1e-5}}
    spent = {site["name"]: site["epsilon"] for site in state["sites"]}
    assert spent == pytest.approx({"hospital-1": 1.5, "hospital-2": 1.6, "hospital-3": 1.7})


def test_privacy_of_hospitals_is_that_of_the_servers_noise(tmp_path):
    write_json(tmp_path, "privacy.json", releases=[[0.5, 1.0, 1]], delta=1e-6)
    assert state_of(tmp_path)["privacy"] == {"hospital": {"epsilon": None, "delta": 1e-6}}
    rows = [(n, "train", "all", "hospital-epsilon", n / 2) for n in (1, 2)]
    write_metrics(tmp_path, rows)
    state = state_of(tmp_path)
    assert state["privacy"] == {"hospital": {"epsilon": 1.0, "delta": 1e-6}}
    assert state["sites"] == []


def test_a_run_without_privacy_has_no_such_part(tmp_path):
    write_metrics(tmp_path, rounds_of(1))
    write_json(tmp_path, "summary.json", status="running", privacy={})
    assert state_of(tmp_path)["privacy"] == {}


@pytest.mark.parametrize("name", ["live.json", "summary.json", "privacy.json"])
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:20])
def test_whatever_a_stranger_writes_can_be_sent(tmp_path, name, odd):
    write_live(tmp_path)
    content = json.loads((tmp_path / "live.json").read_text())
    content |= {"privacy": 1, "sites": 1, "seconds": 1, "rounds-planned": 1, "trained": 1}
    for key in (*content, "releases", "delta", "generated", "kind"):
        deeper = [{"site": odd, "reason": odd, "round": odd}, odd]
        for value in (odd, deeper, {"patient": {"target-epsilon": odd, "delta": odd}, "x": odd}):
            text = json.dumps(content | {"status": "running"} | {key: value})
            (tmp_path / name).write_text(text)
            sent = json.dumps(state_of(tmp_path), allow_nan=False)
            assert len(sent) < 5000
            assert "\\u001b" not in sent


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "holds a list, not a JSON object"),
        ("{", "cannot be read (not valid JSON"),
        ("[" * 100_000, "cannot be read (not valid JSON"),
        ("1" * 5000, "cannot be read (not valid JSON"),
        ("\x00\xff", "cannot be read (not valid JSON"),
    ],
    ids=["list", "part", "deep", "long", "bytes"],
)
def test_a_file_that_is_damaged_is_named_and_the_rest_shown(tmp_path, text, reason):
    write_metrics(tmp_path, rounds_of(2))
    (tmp_path / "live.json").write_bytes(text.encode("latin-1"))
    state = state_of(tmp_path)
    assert state["round"] == 2
    (problem,) = state["problems"]
    assert problem.startswith(f"{tmp_path / 'live.json'} {reason}")


def test_no_link_out_of_the_folder_is_followed_and_no_file_beyond_the_bound(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    write_metrics(tmp_path, rounds_of(1))
    (tmp_path / "secret.json").write_text('{"app": "secret"}')
    for name, target in (("live.json", "secret.json"), ("metrics.csv", "metrics.csv")):
        (folder / name).symlink_to(tmp_path / target)
    (folder / "report.html").symlink_to(tmp_path / "secret.json")
    run = LiveFolder(folder)
    run.refresh()
    state = run.state()
    assert (state["app"], state["metrics"]) == ("", [])
    assert len([text for text in state["problems"] if "a link leads out" in text]) == 2
    with pytest.raises(OSError, match="a link leads out"):
        run.report()
    monkeypatch.setattr(live, "_MOST_METRICS", 100)
    (problem,) = state_of(tmp_path)["problems"]
    assert problem.startswith(f"{tmp_path / 'metrics.csv'} cannot be read (it has ")
    os.mkfifo(tmp_path / "live.json")
    assert any("it is no file" in text for text in state_of(tmp_path)["problems"])


def test_to_watch_a_run_loads_neither_flower_nor_torch():
    code = (
        "import sys; from fedmed_flower.cli import main, serving; "
        "heavy = {'torch', 'flwr', 'numpy', 'matplotlib', 'pandas', 'monai', 'grpc'}; "
        "print(heavy & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_counts_with_noise_are_marked_from_the_start(tmp_path):
    patient = {"target-epsilon": 8.0, "delta": 1e-5}
    for private, sent, marked in (
        ({"patient": patient | {"private-metrics": True}}, [], True),
        ({"patient": patient | {"private-metrics": False}}, ["metrics.auc"], False),
        ({"patient": patient | {"private-metrics": False}}, ["metrics.noised-counts"], True),
        # A hospital with a budget counts with noise in each run.
        ({}, ["metrics.noised-dice"], True),
        ({}, ["metrics.dice"], False),
        (["odd"], [], False),
    ):
        sent = {"evaluate": {"north": sent}}
        write_json(tmp_path, "summary.json", status="running", privacy=private, sent=sent)
        assert state_of(tmp_path)["noised"] is marked
