"""A run in TensorBoard, MLflow or Weights & Biases: every figure that the history holds.

Each is a listener of the run and writes into the run folder, without a network. MLflow and
Weights & Biases go to a server only if the user's environment variables name one.

A figure is called ``PHASE/METRIC/SITE``, such as ``val/auc/hospital-1``; ``all`` stands for all
sites together. Its step is the number of the round.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import groupby
from typing import Any, ClassVar
from urllib.parse import urlsplit

from fedmed_flower.errors import InputError, shown
from fedmed_flower.files import read_object
from fedmed_flower.server.history import Row
from fedmed_flower.server.listener import Listener
from fedmed_flower.server.run_folder import RunFolder

log = logging.getLogger("flwr.fedmed")

# What has been tracked: of each tracker its name of the run, and the last step of each phase of
# each site.
TRACKING = "tracking.json"
_REMEDY = "remove it, and the run is tracked anew"
_RUN = re.compile(r"[A-Za-z0-9_-]{0,64}")
_MOST_STEP = 2**31
_MOST_LETTERS = 60
# Letters of a setting's value, and figures of one message to MLflow.
_MOST_VALUE = 500
_MOST_TOGETHER = 100


class Tracker(Listener):
    """Tracks a run; a subclass says where.

    Parameters
    ----------
    folder : RunFolder
        The folder of the run, which may be written.
    app : str
        The app's name.
    settings : mapping
        The settings of the run.

    Raises
    ------
    InputError
        If ``tracking.json`` of a run that is resumed is damaged.
    """

    # As the setting `track` says it.
    name: ClassVar[str]
    # The module that is imported.
    module: ClassVar[str]

    def __init__(self, folder: RunFolder, app: str, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.app = app
        self.settings = settings
        self.run, self._last = _read(folder, self.name)
        self._part = ""
        self._open = False

    @classmethod
    def require(cls) -> None:
        """Raise `InputError` if the package is not installed."""
        try:
            import_module(cls.module)
        except ImportError as error:
            raise InputError(
                f"track = {cls.name!r} needs a package that cannot be imported ({error}): "
                f"pip install 'fedmed-flower[{cls.name}]'"
            ) from error

    @abstractmethod
    def open(self, next_round: int) -> str:
        """Begin to track, or go on with the run `self.run`; return the run's name there.

        Parameters
        ----------
        next_round : int
            The first round that has not been tracked; 0 if nothing has.
        """

    @abstractmethod
    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Track the figures of one step, by name."""

    @abstractmethod
    def close(self, status: str, message: str) -> None:
        """Track how the run ended."""

    def began(self, part: str, rounds: int, rows: Sequence[Row]) -> None:
        """Begin to track; of a run that is resumed, also what has not been tracked before."""
        self._part = part
        if not part:
            last = [step for key, step in self._last.items() if key.startswith("train/")]
            self.run = self.open(max(last, default=-1) + 1)
            self._open = True
            self._track(rows)

    def round_ended(self, server_round: int, rows: Sequence[Row]) -> None:
        """Track a round of the run itself."""
        if not self._part:
            self._track(rows)

    def tested(self, rows: Sequence[Row]) -> None:
        """Track what the history of the run holds of a test."""
        # A model for comparison is also tested within its own rounds.
        self._track([row for row in rows if not self._part or row[1] != "test"])

    def ended(self, status: str, message: str) -> None:
        """Track how the run ended, if it has begun."""
        if self._open:
            self._open = False
            self.close(status, message)

    def _track(self, rows: Sequence[Row]) -> None:
        new = [row for row in rows if row[0] > self._last.get(f"{row[1]}/{row[2]}", -1)]
        new.sort(key=lambda row: row[0])
        for step, group in groupby(new, lambda row: row[0]):
            self.write(step, {figure_name(*row[1:4]): row[4] for row in group})
        self._last |= {f"{phase}/{site}": step for step, phase, site, _, _ in new}
        table = _table(self.folder)
        table[self.name] = {"run": self.run, "last": self._last}
        self.folder.write_json(TRACKING, table)


class TensorBoard(Tracker):
    """Event files in ``tensorboard`` of the run folder."""

    name = "tensorboard"
    module = "torch.utils.tensorboard"

    def open(self, next_round: int) -> str:
        """Open a further event file; of a round that was cut off, the figures do not count."""
        writer = import_module(self.module).SummaryWriter
        self._writer = writer(
            str(self.folder.path / self.name), purge_step=next_round if next_round else None
        )
        lines = [f"    {key} = {shown(value, _MOST_VALUE)}" for key, value in self.settings.items()]
        self._writer.add_text("settings", "\n".join(lines), next_round)
        return ""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures to the disk."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, status: str, message: str) -> None:
        """Write the status as a text."""
        step = max(self._last.values(), default=0)
        self._writer.add_text("status", f"{status}: {message}" if message else status, step)
        self._writer.close()


class MLflow(Tracker):
    """A run of an MLflow experiment that has the app's name.

    It is in ``mlflow`` of the run folder; with MLFLOW_TRACKING_URI, on the user's own server.
    """

    name = "mlflow"
    module = "mlflow"
    _STATUS: ClassVar = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}

    @classmethod
    def require(cls) -> None:
        """Import MLflow without its telemetry."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        super().require()

    def open(self, next_round: int) -> str:
        """Make the experiment and the run, or go on with it."""
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if uri:
            _say_where("MLFLOW_TRACKING_URI", uri)
            self._client = import_module("mlflow.tracking").MlflowClient(tracking_uri=uri)
        else:
            with _file_store():
                self._client = import_module("mlflow.tracking").MlflowClient(
                    tracking_uri=(self.folder.path / self.name).as_uri()
                )
        if self.run:
            self._client.update_run(self.run, status="RUNNING")
            return self.run
        experiment = self._client.get_experiment_by_name(self.app)
        number = (
            experiment.experiment_id if experiment else self._client.create_experiment(self.app)
        )
        run = self._client.create_run(number, run_name=self.folder.path.name).info.run_id
        param = import_module("mlflow.entities").Param
        settings = [param(_safe(k), shown(v, _MOST_VALUE)) for k, v in self.settings.items()]
        for start in range(0, len(settings), _MOST_TOGETHER):
            self._client.log_batch(run, params=settings[start : start + _MOST_TOGETHER])
        return str(run)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures in batches."""
        metric = import_module("mlflow.entities").Metric
        now = time.time_ns() // 1_000_000
        metrics = [metric(name, value, now, step) for name, value in figures.items()]
        for start in range(0, len(metrics), _MOST_TOGETHER):
            self._client.log_batch(self.run, metrics[start : start + _MOST_TOGETHER])

    def close(self, status: str, message: str) -> None:
        """Set the run's status, and the message as a tag."""
        self._client.set_tag(self.run, "message", shown(message, _MOST_VALUE))
        self._client.set_terminated(self.run, status=self._STATUS[status])


class WeightsAndBiases(Tracker):
    """An offline run in ``wandb`` of the run folder; with WANDB_MODE, as that says.

    A run that is resumed has the same id, and a further offline run beside the first: Weights &
    Biases puts them together when they are synced.
    """

    name = "wandb"
    module = "wandb"

    @classmethod
    def require(cls) -> None:
        """Import the package without its reports of errors."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        super().require()

    def open(self, next_round: int) -> str:
        """Begin a run, or go on with the one of this id."""
        wandb = import_module(self.module)
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode not in ("offline", "disabled", "dryrun"):
            _say_where("WANDB_MODE", os.environ.get("WANDB_BASE_URL", "https://wandb.ai"))
        name = self.run or hashlib.sha256(os.urandom(32)).hexdigest()[:16]
        self._run = wandb.init(
            project=_safe(self.app),
            name=self.folder.path.name,
            id=name,
            dir=str(self.folder.path),
            mode=mode,
            resume="allow" if self.run and mode == "online" else None,
            config=dict(self.settings),
            # Nothing of this computer and its user belongs to the run.
            settings=wandb.Settings(
                host="",
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
            ),
        )
        self._remove_links()
        return name

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step."""
        self._run.log(dict(figures), step=step)

    def close(self, status: str, message: str) -> None:
        """Put the status into the summary."""
        self._run.summary.update({"status": status, "message": message})
        self._run.finish(exit_code=0 if status == "finished" else 1)
        self._remove_links()

    def _remove_links(self) -> None:
        """Remove the package's links to its logs: one leads out of the folder.

        A run folder with such a link could not be resumed.
        """
        for path in (self.folder.path / self.name).rglob("*"):
            if path.is_symlink():
                path.unlink()


TRACKERS: dict[str, type[Tracker]] = {
    tracker.name: tracker for tracker in (TensorBoard, MLflow, WeightsAndBiases)
}


def require_trackers(names: Collection[str]) -> None:
    """Raise `InputError` if the package of a tracker is not installed."""
    for name in names:
        TRACKERS[name].require()


def figure_name(phase: str, site: str, metric: str) -> str:
    """Return the name of a figure: letters, digits, and ``_``, ``.``, ``-``, blank, ``:``, ``/``.

    Examples
    --------
    >>> figure_name("val", "hospital-1", "auc@sex=F")
    'val/auc:sex:F/hospital-1'
    """
    # The value of a group, such as ``auc@sex=F``.
    of_group = "@" in metric and ":" not in metric
    measure = _safe(re.sub("[@=]", ":", metric), ":") if of_group else _safe(metric)
    return f"{_safe(phase)}/{measure}/{_safe(site)}"


def _safe(text: str, more: str = "") -> str:
    """Return a text of which each tracker makes a name; different texts have different ones."""
    plain = re.sub(rf"[^\w. {more}-]", "-", text).strip(" .")[:_MOST_LETTERS]
    if plain == text:
        return plain
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{plain or 'unnamed'}-{digest[:8]}"


def _table(folder: RunFolder) -> dict[str, Any]:
    """Return what ``tracking.json`` holds; nothing if it is not there."""
    if not (folder.path / TRACKING).exists():
        return {}
    return read_object(folder.path, TRACKING, _REMEDY)


def _read(folder: RunFolder, name: str) -> tuple[str, dict[str, int]]:
    """Return a tracker's name of the run, and the last step of each phase of each site."""
    entry = _table(folder).get(name, {"run": "", "last": {}})
    match entry:
        case {"run": str(run), "last": dict(last)} if _RUN.fullmatch(run):
            if all(type(step) is int and 0 <= step < _MOST_STEP for step in last.values()):
                return run, last
    raise InputError(f"{folder.path / TRACKING} holds no run of {name}: {_REMEDY}")


def _say_where(variable: str, uri: str) -> None:
    """Log to whom figures go. A URI may hold a password, so that only its host is named."""
    where = urlsplit(uri).hostname or uri
    log.warning("as %s says, figures of hospitals and the settings go to %s", variable, where)


@contextmanager
def _file_store() -> Iterator[None]:
    """Let MLflow make a store of plain files, which it no longer does unasked.

    Its other local store is a database that needs three more packages.
    """
    key = "MLFLOW_ALLOW_FILE_STORE"
    before = os.environ.get(key)
    os.environ[key] = "true"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(key)
        else:
            os.environ[key] = before
