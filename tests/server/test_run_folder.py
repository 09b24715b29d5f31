import csv
import io
import json
import logging
import math
import os
import re
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from builders import arrays, dump
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file

from fedmed_flower.errors import InputError
from fedmed_flower.files import write_atomic
from fedmed_flower.server.history import Failure, History, Stop
from fedmed_flower.server.run_folder import Checkpoint, RunFolder, early_lines, read_summary

DTYPES = [
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float16", "float32", "float64", "complex64",
]  # fmt: skip


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def a_checkpoint() -> Checkpoint:
    return Checkpoint(
        server_round=3,
        seed=2**63 - 1,
        arrays=arrays(w=[[0.1, -0.0], [np.nan, 3e38]], n=np.array(7, np.int64), none=np.zeros(0)),
        history=History(
            [(1, "train", "a", "loss", 0.1), (3, "val", "all", "auc", 2 / 3)],
            [Failure(2, "train", "b, c", 'it said "no"\n')],
            stopped=Stop(3, "the budget is used up"),
        ),
        metrics={
            "train_metrics_clientapp": {"3": {"loss": 0.1, "count": 2**62, "list": [1, 2]}},
            "evaluate_metrics_clientapp": {},
            "evaluate_metrics_serverapp": {"0": {"auc": 5e-324, "floats": [1.0, 0.3]}},
        },
        site_names={2**63 + 5: "Zürich", 2: "b, c"},
        client_states={str(2**63 + 5): bytes(range(16)), "2": b""},
    )


def contents(checkpoint: Checkpoint) -> tuple:
    """All of a checkpoint in a form in which NaN equals itself and 1 differs from 1.0."""
    return (
        checkpoint.server_round, checkpoint.seed, dump(checkpoint.arrays),
        [(a.dtype, a.shape, a.stype, a.data) for a in checkpoint.arrays.values()],
        repr(checkpoint.history), repr(checkpoint.metrics), checkpoint.site_names,
        checkpoint.client_states,
    )  # fmt: skip


def test_round_trip_is_exact(tmp_path):
    folder = RunFolder(tmp_path / "new" / "run")
    folder.save(a_checkpoint())
    assert contents(folder.load()) == contents(a_checkpoint())
    assert list(folder.load().arrays) == ["w", "n", "none"]


def test_nan_and_infinity_in_metrics_survive(tmp_path):
    checkpoint = a_checkpoint()
    checkpoint.history.rows = [(1, "val", "a", "x", v) for v in (math.nan, math.inf, -math.inf)]
    checkpoint.metrics = {"train_metrics_clientapp": {"1": {"x": math.nan, "y": [math.inf]}}}
    RunFolder(tmp_path).save(checkpoint)
    assert contents(RunFolder(tmp_path).load()) == contents(checkpoint)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        hnp.arrays(hnp.scalar_dtypes().filter(lambda d: d.kind in "biufc"),
                   hnp.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=3)),
        max_size=4,
    ),
    st.lists(st.floats(), max_size=5),
)  # fmt: skip
def test_any_arrays_and_numbers_come_back_to_the_bit(tmp_path_factory, values, numbers):
    checkpoint = a_checkpoint()
    checkpoint.arrays = arrays(**values)
    checkpoint.history.rows = [(1, "val", "a", "x", number) for number in numbers]
    folder = RunFolder(tmp_path_factory.getbasetemp() / "any")
    folder.save(checkpoint)
    assert contents(folder.load()) == contents(checkpoint)


def test_no_checkpoint_is_none(tmp_path):
    assert RunFolder(tmp_path).load() is None
    assert RunFolder(tmp_path / "missing").load() is None


def test_a_later_checkpoint_replaces_the_earlier(tmp_path):
    folder, checkpoint = RunFolder(tmp_path), a_checkpoint()
    folder.save(checkpoint)
    checkpoint.server_round, checkpoint.client_states = 4, {}
    folder.save(checkpoint)
    assert contents(folder.load()) == contents(checkpoint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.zip", "metrics.csv"]


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/run").path == tmp_path / "run"
    assert (RunFolder("~/run") / "baselines").path == tmp_path / "run" / "baselines"


def failing(*args, **kwargs):
    raise OSError("the disk is full")


@pytest.mark.parametrize("name", ["fsync", "replace", "write"])
def test_a_failed_write_leaves_the_old_file_and_no_other(monkeypatch, tmp_path, name):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        if name == "fsync":
            patch.setattr(os, "fsync", failing)
        elif name == "replace":
            patch.setattr(os, "replace", failing)
            patch.setattr(Path, "replace", failing)
        data = "no bytes" if name == "write" else b"new and longer"
        with pytest.raises(TypeError if name == "write" else OSError):
            write_atomic(path, data)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_the_data_are_on_the_disk_before_the_name_changes(monkeypatch, tmp_path):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), fsync(fd)))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (events.append("rename"), replace(self, to))[1]
    )
    write_atomic(tmp_path / "file", b"x")
    assert events == ["sync", "rename", "sync"]


def test_a_crash_in_the_middle_of_a_save_keeps_the_last_checkpoint(monkeypatch, tmp_path):
    folder, later = RunFolder(tmp_path), a_checkpoint()
    folder.save(a_checkpoint())
    later.server_round = 4
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="the disk is full"):
            folder.save(later)
    assert contents(folder.load()) == contents(a_checkpoint())


def outcome(folder: RunFolder, data: bytes) -> str:
    """Return what loading these bytes does: the content, refused, or what should not happen."""
    folder.checkpoint_file.write_bytes(data)
    try:
        loaded = folder.load()
    except InputError as error:
        wanted = f"the checkpoint {folder.checkpoint_file} cannot be read"
        return "refused" if str(error).startswith(wanted) else str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    same = loaded is not None and contents(loaded) == contents(a_checkpoint())
    return "the content" if same else "another content"


def test_a_truncated_checkpoint_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save(a_checkpoint())
    data = folder.checkpoint_file.read_bytes()
    got = {length: outcome(folder, data[:length]) for length in range(0, len(data), 7)}
    assert {k: v for k, v in got.items() if v != "refused"} == {}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mask", [0x01, 0x08, 0x0E, 0xFF])
def test_a_damaged_byte_is_refused_or_harmless(tmp_path, mask):
    folder = RunFolder(tmp_path)
    folder.save(a_checkpoint())
    data = folder.checkpoint_file.read_bytes()
    got = set()
    for place in range(len(data)):
        got.add(outcome(folder, data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]))
    assert got == {"refused", "the content"}


@pytest.mark.parametrize("data", [b"", b"PK\x05\x06" + bytes(18), b"x" * 3000])
def test_something_else_in_place_of_a_checkpoint_is_refused(tmp_path, data):
    assert outcome(RunFolder(tmp_path), data) == "refused"


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [],
        lambda state: None,
        lambda state: {},
        lambda state: state | {"rows": [[1, "val", "a", "x"]]},
        lambda state: state | {"rows": [[math.inf, "val", "a", "x", 1.0]]},
        lambda state: state | {"rows": [[1, "val", "a", "x", 10**400]]},
        lambda state: state | {"failures": [{"round": 1}]},
        lambda state: state | {"stopped": {"round": -1, "reason": "done"}},
        lambda state: state | {"stopped": "done"},
        lambda state: state | {"records": {}},
        lambda state: state | {"records": {"arrays": [{"key": "w"}]}},
        lambda state: state | {"records": {"arrays": [state["records"]["arrays"][0] | {"key": 3}]}},
        lambda state: (
            state | {"records": {"arrays": [state["records"]["arrays"][0] | {"shape": ["x"]}]}}
        ),
        lambda state: state | {"records": state["records"] | {"state/m_t": [{"key": "w"}]}},
        lambda state: state | {"sites": {"1": "a"}},
        lambda state: state | {"sites": [[math.inf, "a"]]},
    ],
)
def test_a_checkpoint_that_another_program_wrote_is_refused(tmp_path, change):
    assert outcome(RunFolder(tmp_path), rewritten(RunFolder(tmp_path), change)) == "refused"


def test_a_checkpoint_of_an_earlier_version_says_nothing_of_an_early_stop(tmp_path):
    def without(state):
        return {key: value for key, value in state.items() if key != "stopped"}

    data = rewritten(RunFolder(tmp_path), without)
    RunFolder(tmp_path).checkpoint_file.write_bytes(data)
    loaded = RunFolder(tmp_path).load().history
    assert loaded.stopped is None
    assert loaded.failures == a_checkpoint().history.failures


def rewritten(folder, change, rows="metrics.csv"):
    """Save a checkpoint; return its bytes with another ``state.json``, and rows where they are."""
    folder.save(a_checkpoint())
    with zipfile.ZipFile(folder.checkpoint_file) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    state = change(json.loads(files["state.json"]))
    if rows == "state.json":
        del files["metrics.csv"]
        state["rows"] = a_checkpoint().history.rows
    files["state.json"] = json.dumps(state).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_the_text_about_a_damaged_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.zip"
    path.write_bytes(b"junk")
    text = (
        f"the checkpoint {path} cannot be read (File is not a zip file): restore it from a copy, "
        "or start a new run with --out"
    )
    with pytest.raises(InputError, match=exactly(text)):
        RunFolder(tmp_path).load()


def test_an_unused_folder(tmp_path):
    RunFolder(tmp_path / "missing").require_unused()
    RunFolder(tmp_path).require_unused()
    RunFolder(tmp_path).require_no_checkpoint()


@pytest.mark.parametrize("kind", ["file inside", "a file"])
def test_a_used_folder(tmp_path, kind):
    path = tmp_path if kind == "file inside" else tmp_path / "notes.txt"
    (tmp_path / "notes.txt").write_text("mine")
    text = (
        f"the run folder {path} is in use: choose another (--out, run-dir), "
        f"or go on with that run (--resume {path}, resume=true)"
    )
    with pytest.raises(InputError, match=exactly(text)):
        RunFolder(path).require_unused()


def test_a_folder_with_a_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path).require_no_checkpoint()
    RunFolder(tmp_path).save(a_checkpoint())
    text = (
        f"{tmp_path} holds an earlier run: choose another folder, "
        f"or go on with that run with --resume {tmp_path}"
    )
    with pytest.raises(InputError, match=exactly(text)):
        RunFolder(tmp_path).require_no_checkpoint()


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_reads_the_model_as_it_is(tmp_path, dtype):
    matrix = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
    record = ArrayRecord(
        {
            "c": Array(matrix),
            "fortran": Array(np.asfortranarray(matrix)),
            "scalar": Array(np.array(1).astype(dtype)),
            "empty": Array(np.zeros((2, 0), dtype)),
        }
    )
    read = load_file(RunFolder(tmp_path).write_model(record))
    got = {k: (str(t.numpy().dtype), tuple(t.shape), t.numpy().tobytes()) for k, t in read.items()}
    assert got == dump(record)


def test_the_model_is_bit_exact_for_special_values(tmp_path):
    record = arrays(x=np.array([np.nan, np.inf, -0.0, 1e-45], np.float32))
    path = RunFolder(tmp_path).write_model(record)
    assert path == tmp_path / "model.safetensors"
    assert load_file(path)["x"].numpy().tobytes() == record["x"].numpy().tobytes()


def test_history_keeps_single_numbers_and_drops_lists():
    history = History()
    history.add(2, "train", "a", {"loss": 0.5, "count": 3, "curve": [0.5, 0.4]})
    assert history.rows == [(2, "train", "a", "loss", 0.5), (2, "train", "a", "count", 3.0)]
    assert type(history.rows[1][4]) is float


def test_a_round_in_a_line():
    history = History()
    history.add(1, "train", "a", {"loss": 9.0})
    history.add(1, "train", "all", {"loss": 0.25})
    history.add(1, "val", "all", {"accuracy": 0.5, "auc": 0.75, "loss": 2})
    history.add(2, "train", "all", {"loss": 0.125})
    history.failures.append(Failure(2, "val", "b", "gone"))
    assert history.describe(1) == "train loss 0.2500  val auc 0.7500"
    assert history.describe(2) == "train loss 0.1250  failed: b"
    assert history.describe(3) == ""
    history.add(1, "server", "all", {"auc": 0.875, "accuracy": 0.5})
    assert history.describe(1) == "train loss 0.2500  val auc 0.7500  server auc 0.8750"


def test_what_others_log_is_one_line_in_the_log_of_a_run(tmp_path):
    logger = logging.getLogger("flwr")
    with RunFolder(tmp_path).log_file():
        logger.warning("reply of %s", "north\nERROR all is lost\x1b[2J")
        logging.getLogger("flwr.fedmed").warning("from %s", "a\nb")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.partition("WARNING ")[2] for line in lines] == [
        "reply of north ERROR all is lost\\x1b[2J",
        "from a b",
    ]


class Console(logging.Handler):
    """Keeps the lines that a console would show."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def console():
    handler = Console()
    loggers = [logging.getLogger(name) for name in ("flwr", "flwr.fedmed")]
    levels = [logger.level for logger in loggers]
    loggers[0].addHandler(handler)
    yield handler
    loggers[0].removeHandler(handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize("name", ["flwr", "flwr.fedmed"])
@pytest.mark.parametrize("level", ["DEBUG", "INFO", "ERROR", "CRITICAL"])
def test_the_log_holds_all_from_info_on_whatever_the_console_shows(tmp_path, console, name, level):
    logging.getLogger(name).setLevel(level)
    log = logging.getLogger("flwr.fedmed")

    def say(*texts):
        for number, text in zip((10, 20, 40), texts, strict=True):
            log.log(number, text)

    say("d1", "i1", "e1")
    with early_lines() as earlier:
        say("d2", "i2", "e2")
    with RunFolder(tmp_path).log_file(earlier):
        say("d3", "i3", "e3")
    say("d4", "i4", "e4")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["i2", "e2", "i3", "e3"]
    shown = [text for text, lowest in (("d", 10), ("i", 20), ("e", 40)) if log.isEnabledFor(lowest)]
    assert console.lines == [f"{text}{number}" for number in (1, 2, 3, 4) for text in shown]


def test_no_line_of_a_traceback_looks_like_one_of_the_log(tmp_path):
    with RunFolder(tmp_path).log_file():
        try:
            raise KeyError("w") from ValueError("x\n2026-01-01 INFO all is well\x1b[2J")
        except KeyError:
            logging.getLogger("flwr.fedmed").warning("failed", exc_info=True)
    first, *lines = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith("WARNING failed") or "WARNING failed" in first
    assert "\x1b" not in "".join(lines)
    assert all(line.startswith("  | ") for line in lines)


def test_csv_reads_back():
    rows = [
        (1, "train", 'St. Mary\'s, "West"', "loss", 0.1 + 0.2),
        (1, "val", "two\nlines", "auc", math.nan),
        (2, "val", "Zürich 医院", "a,b;c", 1e-300),
        (2, "val", " spaces ", "count", 3.0),
    ]
    text = History(rows).to_csv().decode()
    names, *got = csv.reader(io.StringIO(text, newline=""))
    assert names == ["round", "phase", "site", "metric", "value"]
    assert [(int(r), p, s, m) for r, p, s, m, _ in got] == [row[:4] for row in rows]
    assert [repr(float(row[4])) for row in got] == [repr(row[4]) for row in rows]


def test_the_saved_table_is_the_history(tmp_path):
    checkpoint = a_checkpoint()
    RunFolder(tmp_path).save(checkpoint)
    assert (tmp_path / "metrics.csv").read_bytes() == checkpoint.history.to_csv()


def test_saving_holds_no_further_model_in_memory(tmp_path):
    size = 8 * 2**20
    model = arrays(w=np.arange(size // 4, dtype=np.float32), v=np.ones(size // 4, np.float32))
    folder = RunFolder(tmp_path)
    checkpoint = Checkpoint(1, 0, model, History(), {}, strategy_state={"m_t": model})
    tracemalloc.start()
    folder.save(checkpoint)
    folder.write_model(model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 2
    assert dump(folder.load().arrays) == dump(model)
    assert load_file(tmp_path / "model.safetensors")["w"].tolist() == model["w"].numpy().tolist()


def test_a_model_in_another_memory_order_is_written_as_it_reads(tmp_path):
    values = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    RunFolder(tmp_path).write_model(arrays(w=values, n=np.array(3)))
    written = load_file(tmp_path / "model.safetensors")
    assert written["w"].tolist() == values.tolist()
    assert written["n"].shape == ()


# --- Formats ------------------------------------------------------------------------------------

CONFIG = '[run]\n{format}sites = 2\n\n[config]\nseed = 1\n\n[versions]\nflwr = "1.41"\n'
LATER = "was written by a later fedmed-flower (format 3, this one reads up to {}): update"


def with_format(folder, number):
    """Write config, summary and checkpoint of a format; None names none."""
    entry = {} if number is None else {"format": number}
    line = "" if number is None else f"format = {json.dumps(number)}\n"
    folder.write("config.toml", CONFIG.format(format=line).encode())
    folder.write_json("summary.json", {"app": "hearts", **entry})

    def change(state):
        assert state.pop("format") == 2
        return state | entry

    rows = "metrics.csv" if number == 2 else "state.json"
    folder.checkpoint_file.write_bytes(rewritten(folder, change, rows))


@pytest.mark.parametrize("number", [None, 0, 1])
def test_a_folder_of_an_earlier_format_or_of_none_is_read(number, tmp_path):
    folder = RunFolder(tmp_path)
    with_format(folder, number)
    assert folder.read_config()["config"] == {"seed": 1}
    assert read_summary(tmp_path, "x")["app"] == "hearts"
    assert contents(folder.load()) == contents(a_checkpoint())


def test_a_folder_of_a_later_format_is_refused_with_what_to_do(tmp_path):
    folder = RunFolder(tmp_path)
    with_format(folder, 3)
    for name, newest, read in (
        ("config.toml", 1, folder.read_config),
        ("summary.json", 1, lambda: read_summary(tmp_path, "x")),
        ("checkpoint.zip", 2, folder.load),
    ):
        text = f"{tmp_path / name} {LATER.format(newest)} fedmed-flower"
        with pytest.raises(InputError, match=exactly(text)):
            read()


def test_rows_may_be_more_than_the_rest_of_a_checkpoint(tmp_path, monkeypatch):
    """With two thousand sites they pass the bound of ``state.json`` after some forty rounds."""
    monkeypatch.setattr("fedmed_flower.server.run_folder.MOST_TEXT", 4096)
    checkpoint = a_checkpoint()
    rows = [(n, "val", f"=site {n % 9}", "auc", n / 7) for n in range(1000)]
    checkpoint.history.rows = rows
    RunFolder(tmp_path).save(checkpoint)
    assert RunFolder(tmp_path).load().history.rows == rows


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "its member metrics.csv does not begin with the names of its columns"),
        (b"round,phase,site,metric,value\r\n1,val,a,auc\r\n", "not enough values"),
        (b"round,phase,site,metric,value\r\n-1,val,a,auc,1\r\n", "-1 is no whole number in 0.."),
    ],
)
def test_damaged_rows_are_refused(tmp_path, text, reason):
    folder = RunFolder(tmp_path)
    folder.save(a_checkpoint())
    with zipfile.ZipFile(folder.checkpoint_file) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder.checkpoint_file, "w") as archive:
        for name, content in (files | {"metrics.csv": text}).items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match=re.escape(reason)):
        folder.load()


def test_a_table_that_grows_is_that_of_all_rows():
    history = History()
    for number in range(1, 5):
        history.add(number, "train", "'=a", {"loss": number / 3, "num-examples": 10 * number})
        assert history.to_csv() == History(list(history.rows)).to_csv()
        assert history.training_rows("'=a") == 10 * number
    assert history.training_rows("b") is None
    parts = history.table()
    history.rows = history.rows[:2]
    assert history.to_csv() == History(list(history.rows)).to_csv() != b"".join(parts)
    assert history.training_rows("'=a") == 10


@pytest.mark.parametrize("number", [-1, "1", True, 1.0])
def test_a_format_that_is_no_number_is_refused(number, tmp_path):
    folder = RunFolder(tmp_path)
    with_format(folder, number)
    for name, read in (
        ("config.toml", folder.read_config),
        ("summary.json", lambda: read_summary(tmp_path, "x")),
        ("checkpoint.zip", folder.load),
    ):
        text = f"format in {tmp_path / name} must be a whole number, at least 0, got {number!r}"
        with pytest.raises(InputError, match=re.escape(text)):
            read()


def test_what_is_written_names_its_format(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_summary({"app": "hearts"})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"format": 1, "app": "hearts"}
