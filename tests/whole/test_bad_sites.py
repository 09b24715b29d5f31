"""A run of ten hospitals of which one hangs, one crashes, one comes late and one has other rows."""

import json
import time

from tiny import TinyClient, connect_late, make_rows, nodes_of, run_tiny

from fedmed_flower import SiteData

NAMES = ["ash", "birch", "cedar", "elm", "fir", "holly", "larch", "maple", "oak", "pine"]
TIMEOUT = 3600.0


class Hospital(TinyClient):
    """Cedar hangs in round 2, fir cannot train, oak has three patients more after a while."""

    now = 0.0
    resumed = False

    def load_data(self, site):
        seed = NAMES.index(site.name)
        more = 3 if self.resumed and site.name == "oak" else 0
        return SiteData(
            train=make_rows(20 + more, (seed, 0), "train"),
            val=make_rows(12, (seed, 1), "val"),
            test=make_rows(14, (seed, 2), "test"),
            source="tiny images",
        )

    def fit(self, model, prepared, seed):
        if self.site.name == "fir":
            raise OSError("the scanner is down")
        if self.site.name == "cedar" and self.progress == 0.5 and not self.resumed:
            Hospital.now += 2 * TIMEOUT
        return super().fit(model, prepared, seed)


def run_with_bad_sites(tmp_path, monkeypatch):
    """Run two rounds and, after oak got three patients, two more; return the run folder."""
    monkeypatch.setattr(time, "monotonic", lambda: Hospital.now)
    folder = tmp_path / "run"
    options = {"node_configs": nodes_of(tmp_path, *NAMES), "round_timeout": TIMEOUT}
    with monkeypatch.context() as late:
        connect_late(late, 1001 + NAMES.index("larch"))
        run_tiny(folder, Hospital, 10, num_server_rounds=2, **options)
    monkeypatch.setattr(Hospital, "resumed", True)
    run_tiny(folder, Hospital, 10, num_server_rounds=4, resume=True, **options)
    return folder


def test_log_summary_and_report_say_what_happened_to_whom(tmp_path, monkeypatch):
    folder = run_with_bad_sites(tmp_path, monkeypatch)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["rounds"] == 4
    assert set(summary["sites"]) == set(NAMES)
    assert set(summary["test"]["sites"]) == set(NAMES)
    happened = [
        (event["round"], event["phase"], event["site"], event.get("reason") or event["text"])
        for event in (*summary["failures"], *summary["notes"])
    ]
    assert sorted(happened) == [
        (1, "train", "fir", "OSError"),
        (2, "train", "cedar", "no reply within 3600 s"),
        (2, "train", "fir", "OSError"),
        (2, "train", "larch", "has connected and trains from here on: 20 train, 12 val, 14 test"),
        (3, "train", "fir", "OSError"),
        (
            3,
            "train",
            "oak",
            "patients have come or gone; its number of training rows is 23 now and was 20",
        ),
        (4, "train", "fir", "OSError"),
    ]
    others = dict.fromkeys((name for name in NAMES if name != "fir"), 4)
    assert summary["trained"] == others | {"cedar": 3, "larch": 3, "fir": 0}
    log = (folder / "log.txt").read_text()
    page = (folder / "report.html").read_text()
    top = page[: page.index(">Result</h2>")]
    assert "Not trained in each of the 4 rounds: fir in none, cedar in 3, larch in 3. See " in top
    assert "See below, what else happened, for larch, oak" in top
    for _, _, site, words in happened:
        assert site in page
        assert words in page
        assert any(site in line and words in line for line in log.splitlines())
