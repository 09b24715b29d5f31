"""The folder of a run: complete at every moment, so that a killed run can go on from it."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import re
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from logging.handlers import BufferingHandler
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, UserConfigValue
from safetensors.numpy import save as to_safetensors
from safetensors.numpy import save_file

from fedmed_flower.arrays.views import view
from fedmed_flower.errors import FormatError, InputError, shown
from fedmed_flower.files import LOG as LOG
from fedmed_flower.files import (
    MALFORMED,
    MOST_TABLE,
    MOST_TEXT,
    StoredMembers,
    cell_text,
    open_file,
    read_file,
    read_lines,
    read_object,
    replacing,
    require_format,
    require_posix,
    write_atomic,
)
from fedmed_flower.files import METRICS as METRICS
from fedmed_flower.files import SUMMARY as SUMMARY
from fedmed_flower.server.history import COLUMNS, Failure, History, Note, Stop, Sum
from fedmed_flower.server.traffic import traffic_of
from fedmed_flower.wire import Sent

# An environment variable: the folder for a strategy that was given none. `fedmed run` sets it.
DEFAULT_FOLDER = "FEDMED_RUN_DIR"
# Of config.toml and summary.json: to be raised whenever an earlier version of this package would
# misread one of them. Folders from before formats were named count as 0.
FORMAT = 1
# Of checkpoint.zip. From 2 on the rows of the history are a member of their own: they may be many.
CHECKPOINT_FORMAT = 2
CHECKPOINT = "checkpoint.zip"
MODEL = "model.safetensors"
PREDICTOR = "predictor.zip"
CONFIG = "config.toml"
# Bytes.
_MOST_CONFIG = 1 << 24
_MOST_CHECKPOINT = 1 << 36
# Bytes of a client's state, and of the header of a ``.npy`` file.
_MOST_STATE = 1 << 30
_MOST_HEADER = 1 << 16
_MOST_ROUND = 2**31
_MOST_NUMBER = 2**63
_MOST_SEED = 2**128
_FAILURE_TEXTS = ("phase", "site", "reason")
_NOTE_TEXTS = ("phase", "site", "text")
# A line of ``config.toml``. A parser could take hours for a key of many parts or nested values.
_LINE = re.compile(r'(\[[\w-]+\]|([\w-]+|"([^"\\]|\\.)*")\s*=\s*[^\s\[{].*|#.*)?')


@dataclass
class Checkpoint:
    """All that a run needs to go on after `server_round` as if it had never stopped.

    `strategy` is the class of the strategy and its arguments; empty if they are not known.
    """

    server_round: int
    seed: int
    arrays: ArrayRecord
    history: History
    metrics: dict[str, dict[str, Any]]
    site_names: dict[int, str] = field(default_factory=dict)
    client_states: dict[str, bytes] = field(default_factory=dict)
    strategy_state: dict[str, ArrayRecord] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)


class _OneLine(logging.Formatter):
    """Keeps each logged text on one line, so that none can forge a line; tracebacks stay whole."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return shown(super().formatMessage(record))


class _AsBefore(logging.Filter):
    """Lets those lines pass that reached a handler before the levels of the loggers were lowered.

    Parameters
    ----------
    levels : dict of str to int
        The level of each logger before, the most specific one first.
    """

    def __init__(self, levels: Mapping[str, int]) -> None:
        super().__init__()
        self._levels = levels

    def filter(self, record: logging.LogRecord) -> bool:
        for name, level in self._levels.items():
            if f"{record.name}.".startswith(f"{name}."):
                return record.levelno >= level
        return True


@contextmanager
def _listening(handler: logging.Handler) -> Iterator[None]:
    """Hand a handler each line from INFO on, also if the console is set to show fewer of them."""
    handler.setLevel(logging.INFO)
    loggers = [logging.getLogger(name) for name in ("flwr.fedmed", "flwr")]
    as_before = _AsBefore({each.name: each.getEffectiveLevel() for each in loggers})
    others = [other for each in (*loggers, logging.getLogger()) for other in each.handlers]
    silent = [each for each in loggers if each.getEffectiveLevel() > logging.INFO]
    levels = [each.level for each in silent]
    for other in others:
        other.addFilter(as_before)
    for each in silent:
        each.setLevel(logging.INFO)
    logging.getLogger("flwr").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("flwr").removeHandler(handler)
        for each, level in zip(silent, levels, strict=True):
            each.setLevel(level)
        for other in others:
            other.removeFilter(as_before)


@contextmanager
def early_lines() -> Iterator[list[logging.LogRecord]]:
    """Remember the lines that are logged before a run has a folder, for `RunFolder.log_file`."""
    handler = BufferingHandler(capacity=2**30)
    with _listening(handler):
        yield handler.buffer


class RunFolder:
    """Reads and writes the files of one run.

    Parameters
    ----------
    path : str or Path
        The folder; it is made on the first write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    @classmethod
    def named(cls, path: str | Path | None, run: str = "") -> RunFolder:
        """Return the folder at a path, made absolute; without a path, a new one under ``runs/``.

        Parameters
        ----------
        path : str or Path, optional
            An empty text counts as no path.
        run : str
            Start of the new folder's name, before date and time.
        """
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        default = Path("runs") / (f"{run}-{stamp}" if run else stamp)
        return cls((Path(path).expanduser() if path else default).resolve())

    def __truediv__(self, name: str) -> RunFolder:
        return RunFolder(self.path / name)

    @property
    def checkpoint_file(self) -> Path:
        """The file that holds the state after the last complete round."""
        return self.path / CHECKPOINT

    def make(self, arrays: ArrayRecord) -> None:
        """Make the folder and check that it can hold the run, so that no round is trained in vain.

        Raises
        ------
        InputError
            If the folder cannot be written, an entry of `arrays` has a dtype that
            ``model.safetensors`` cannot hold, or this is Windows.
        """
        require_posix()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise InputError(
                f"the run folder {self.path} cannot be written: {error.strerror}"
            ) from error
        for key, array in arrays.items():
            try:
                to_safetensors({key: np.zeros(0, view(array).dtype)})
            except Exception as error:
                raise InputError(
                    f"{key} is {array.dtype}, which {MODEL} cannot hold: convert it"
                ) from error

    @contextmanager
    def log_file(self, earlier: Iterable[logging.LogRecord] = ()) -> Iterator[None]:
        """Also write Flower's and this package's log lines, from INFO on, to ``log.txt``.

        Lines of DEBUG are left out: some come for each batch, or hold a traceback for each site and
        round.

        Parameters
        ----------
        earlier : iterable of LogRecord
            Lines of `early_lines`, to begin with.
        """
        require_posix()
        self.path.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(self.path / LOG, encoding="utf-8")
        handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
        try:
            for record in earlier:
                handler.handle(record)
            with _listening(handler):
                yield
        finally:
            handler.close()

    def require_no_checkpoint(self) -> None:
        """Raise `InputError` if an earlier run left a checkpoint here."""
        if self.checkpoint_file.exists():
            raise InputError(
                f"{self.path} holds an earlier run: choose another folder, "
                f"or go on with that run with --resume {self.path}"
            )

    def require_unused(self) -> None:
        """Raise `InputError` if the path is in use: no earlier run must be overwritten."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(
                f"the run folder {self.path} is in use: choose another (--out, run-dir), "
                f"or go on with that run (--resume {self.path}, resume=true)"
            )

    def write(self, name: str, data: bytes) -> Path:
        """Write one file of the folder atomically and return its path."""
        write_atomic(self.path / name, data)
        return self.path / name

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file; numbers that JSON cannot write become null."""
        self.write(name, json.dumps(_without_nan(content), indent=2, allow_nan=False).encode())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``, with its format."""
        self.write_json(SUMMARY, {"format": FORMAT, **summary})

    def read_config(self) -> dict[str, dict[str, UserConfigValue]]:
        """Return the tables of ``config.toml``: ``run``, ``config`` and ``versions``.

        Raises
        ------
        InputError
            If the file is missing or damaged, holds anything but texts, booleans and numbers of 64
            bits, one a line, or is of a later format.
        """
        try:
            text = read_file(self.path, CONFIG, _MOST_CONFIG).decode().replace("\r\n", "\n")
            for number, line in enumerate(text.split("\n"), start=1):
                if not _LINE.fullmatch(line):
                    raise ValueError(f"line {number} is not of the form key = value")
            content = tomllib.loads(text)
            tables = {name: dict(content[name]) for name in ("run", "config", "versions")}
            for key, value in (pair for table in tables.values() for pair in table.items()):
                if not _is_plain(value):
                    raise ValueError(f"{key} is neither a text nor a boolean nor a number")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{self.path} is no run folder: it has no {CONFIG}") from error
        except (OSError, *MALFORMED) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{self.path / CONFIG} cannot be read: {reason}") from error
        require_format(self.path / CONFIG, tables["run"].get("format", 0), FORMAT)
        return tables

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and the table of metrics that belongs to it.

        The checkpoint is one file, so its parts cannot disagree: a zip archive with the ``.npy``
        bytes of each array, the rows of the history as in ``metrics.csv``, and the rest as JSON.
        """
        records = {"arrays": checkpoint.arrays} | {
            f"state/{name}": record for name, record in checkpoint.strategy_state.items()
        }
        state = {
            "format": CHECKPOINT_FORMAT,
            "round": checkpoint.server_round,
            "seed": checkpoint.seed,
            "metrics": checkpoint.metrics,
            "sites": list(checkpoint.site_names.items()),
            "failures": [asdict(failure) for failure in checkpoint.history.failures],
            "notes": [asdict(note) for note in checkpoint.history.notes],
            "sums": [asdict(sum) for sum in checkpoint.history.sums],
            "stopped": checkpoint.history.stopped and asdict(checkpoint.history.stopped),
            "sent": checkpoint.history.sent.table(),
            "traffic": {s: t.table() for s, t in checkpoint.history.traffic.items()},
            "records": {name: _index(record) for name, record in records.items()},
            "clients": list(checkpoint.client_states),
            "strategy": checkpoint.strategy,
        }
        # Straight to the file: an archive in memory would be one model more.
        with (
            replacing(self.checkpoint_file) as temporary,
            zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED) as archive,
        ):
            archive.writestr("state.json", json.dumps(state))
            with archive.open(METRICS, "w") as table:
                table.writelines(checkpoint.history.table())
            for name, record in records.items():
                for number, array in enumerate(record.values()):
                    archive.writestr(f"{name}/{number}.npy", array.data)
            for number, blob in enumerate(checkpoint.client_states.values()):
                archive.writestr(f"clients/{number}.bin", blob)
        self.write_metrics(checkpoint.history)

    def write_metrics(self, history: History) -> None:
        """Write ``metrics.csv``: the numbers of all sites and rounds."""
        with replacing(self.path / METRICS) as temporary, temporary.open("xb") as file:
            file.writelines(history.table())

    def load(self) -> Checkpoint | None:
        """Return the last checkpoint, or None if there is none.

        Raises
        ------
        InputError
            If the file is damaged or larger than 64 GiB, its members claim more bytes than it has,
            or it is of a later format.
        """
        try:
            with open_file(self.path, CHECKPOINT, _MOST_CHECKPOINT) as file:
                members = StoredMembers(file)
                state = json.loads(members.pop("state.json", MOST_TEXT))
                require_format(self.checkpoint_file, state.get("format", 0), CHECKPOINT_FORMAT)
                return _checkpoint(state, members)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except FormatError:
            raise
        except Exception as error:  # Readers of a damaged archive raise a dozen different ones.
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"the checkpoint {self.checkpoint_file} cannot be read ({reason}): restore it from "
                "a copy, or start a new run with --out"
            ) from error

    def write_model(self, arrays: ArrayRecord) -> Path:
        """Write the model as ``model.safetensors`` (``safetensors.torch.load_file`` reads it)."""
        # In C order, as the library takes the bytes as they lie in memory.
        tensors = {key: np.asarray(view(array), order="C") for key, array in arrays.items()}
        path = self.path / MODEL
        with replacing(path) as temporary:
            save_file(tensors, temporary)
        return path


def read_summary(folder: Path, hint: str) -> dict[str, Any]:
    """Return what ``summary.json`` of a run, a study or a survey holds.

    Raises
    ------
    InputError
        As `read_object`; or if the file is of a later format.
    """
    summary = read_object(folder, SUMMARY, hint)
    require_format(folder / SUMMARY, summary.get("format", 0), FORMAT)
    return summary


def _index(record: ArrayRecord) -> list[dict[str, Any]]:
    return [
        {"key": key, "dtype": array.dtype, "shape": array.shape, "stype": array.stype}
        for key, array in record.items()
    ]


def _checkpoint(state: dict[str, Any], members: StoredMembers) -> Checkpoint:
    """Return the checkpoint in an archive whose ``state.json`` must name each other member."""
    records = {name: _take(members, name, index) for name, index in state["records"].items()}
    states = {
        key: members.pop(f"clients/{number}.bin", _MOST_STATE)
        for number, key in enumerate(state["clients"])
    }
    # Before format 2 they were a part of state.json.
    given = state["rows"] if "rows" in state else [*_rows_of(members)]
    if members.left:
        raise ValueError(f"state.json does not name its member {min(members.left)}")
    failures = [
        Failure(_whole(entry["round"], _MOST_ROUND), *(f"{entry[key]}" for key in _FAILURE_TEXTS))
        for entry in state["failures"]
    ]
    notes = [
        Note(_whole(entry["round"], _MOST_ROUND), *(f"{entry[key]}" for key in _NOTE_TEXTS))
        for entry in state.get("notes", ())
    ]
    sums = [
        Sum(
            _whole(entry["round"], _MOST_ROUND),
            str(entry["purpose"]),
            tuple(map(str, entry["sites"])),
        )
        for entry in state.get("sums", ())
    ]
    rows = [
        (_whole(number, _MOST_ROUND), str(phase), str(site), str(metric), float(value))
        for number, phase, site, metric, value in given
    ]
    history = History(
        rows=rows,
        failures=failures,
        sent=Sent.of(state.get("sent")),
        traffic=traffic_of(state.get("traffic")),
        notes=notes,
        sums=sums,
        stopped=_stop(state.get("stopped")),
    )
    return Checkpoint(
        _whole(state["round"], _MOST_ROUND),
        _whole(state["seed"], _MOST_SEED),
        records.pop("arrays"),
        history,
        state["metrics"],
        {_whole(node_id, 2**64): str(name) for node_id, name in state["sites"]},
        states,
        {name.removeprefix("state/"): record for name, record in records.items()},
        _strategy(state.get("strategy")),
    )


def _rows_of(members: StoredMembers) -> Iterator[tuple[int, str, str, str, float]]:
    """Yield the rows of a history, read line by line."""
    with io.TextIOWrapper(members.open(METRICS, MOST_TABLE), "utf-8", newline="") as text:
        lines = csv.reader(read_lines(text))
        if next(lines, None) != [*COLUMNS]:
            raise ValueError(f"its member {METRICS} does not begin with the names of its columns")
        for number, phase, *names, value in lines:
            site, metric = map(cell_text, names)
            yield int(number), cell_text(phase), site, metric, float(value)


def _strategy(table: Any) -> dict[str, Any]:
    """Read the class of a strategy and its arguments; empty if they were not recorded."""
    if not table:
        return {}
    return {"class": str(table["class"]), "arguments": dict(table["arguments"])}


def _stop(entry: Any) -> Stop | None:
    return (
        None if entry is None else Stop(_whole(entry["round"], _MOST_ROUND), f"{entry['reason']}")
    )


def _take(members: StoredMembers, name: str, index: list[dict[str, Any]]) -> ArrayRecord:
    record = ArrayRecord()
    for number, entry in enumerate(index):
        shape = tuple(entry["shape"])
        most = np.dtype(entry["dtype"]).itemsize * math.prod(shape) + _MOST_HEADER
        data = members.pop(f"{name}/{number}.npy", most)
        array = Array(entry["dtype"], shape, entry["stype"], data)
        view(array)
        record[entry["key"]] = array
    return record


def _whole(value: Any, bound: int) -> int:
    if type(value) is not int or not 0 <= value < bound:
        raise ValueError(f"{value!r} is no whole number in 0..{bound - 1}")
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, bool | float | str):
        return True
    return isinstance(value, int) and abs(value) < _MOST_NUMBER


def _without_nan(value: Any) -> Any:
    """Return a copy in which numbers that JSON cannot write are None."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
