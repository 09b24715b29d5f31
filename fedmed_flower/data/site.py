"""One hospital as a client sees it: who it is and which rows it holds."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import Context

from fedmed_flower.errors import InputError
from fedmed_flower.settings.node import FEWEST, NodeSettings
from fedmed_flower.settings.section import with_type_of

log = logging.getLogger("flwr.fedmed")

Row = Mapping[str, Any]
GENERATED = "generated data, not patients"
SPLITS = ("train", "val", "test")

# A whole number, however a spreadsheet, a data frame or a person has written it.
_WHOLE = re.compile(r"(-?)0*([0-9]+)(\.0*)?")

_simulating: ContextVar[bool] = ContextVar("simulating", default=False)


@contextmanager
def simulation() -> Iterator[None]:
    """Mark that all sites live in this process, so that nothing secret can leave one."""
    token = _simulating.set(True)
    try:
        yield
    finally:
        _simulating.reset(token)


def in_simulation() -> bool:
    """Return whether all sites live on this machine."""
    # Flower's simulation engine runs clients in Ray workers; a SuperNode's ClientApp knows no Ray.
    ray = sys.modules.get("ray")
    return _simulating.get() or (ray is not None and bool(ray.is_initialized()))


@dataclass(frozen=True)
class Site:
    """One hospital.

    Attributes
    ----------
    name : str
        Unique among the sites of a run; used in every table and report.
    index : int
        From 0 to ``num_sites - 1``.
    num_sites : int
        How many sites a shared dataset is split among; 1 if the site has data of its own.
    data_dir : Path or None
        The hospital's own folder, or None in a simulation on a shared dataset.
    simulated : bool
        True if all sites live on one machine, so that nothing secret can leave it.
    """

    name: str
    index: int = 0
    num_sites: int = 1
    data_dir: Path | None = None
    simulated: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("site-name must not be empty")
        if ": " in self.name or len(self.name) > 80 or not self.name.isprintable():
            raise InputError(
                f"site-name must have at most 80 printable letters and no ': ', got {self.name!r}"
            )
        if not 0 <= self.index < self.num_sites:
            raise InputError(
                f"partition-id must lie in 0..{self.num_sites - 1} (num-partitions - 1), "
                f"got {self.index}"
            )

    @classmethod
    def from_context(cls, context: Context) -> Site:
        """Read the site from a Flower context.

        Flower's simulation gives ``partition-id`` and ``num-partitions``. A SuperNode gives what
        its ``--node-config`` says: ``site-name``, ``data-dir`` and, where a shared dataset is
        split, ``partition-id`` and ``num-partitions``.

        Raises
        ------
        InputError
            If neither ``site-name`` nor ``partition-id`` is given, or ``data-dir`` is no folder.
        """
        config = context.node_config
        try:
            index = int(config.get("partition-id", 0))
            num_sites = int(config.get("num-partitions", 1))
        except ValueError as error:
            raise InputError(f"partition-id and num-partitions must be integers: {error}") from None
        own = {"site-name", "data-dir"} & config.keys()
        simulated = "partition-id" in config and not own and in_simulation()
        name = str(config.get("site-name", f"hospital-{index + 1}" if simulated else "")).strip()
        if not name:
            raise InputError("this SuperNode has no name: give --node-config 'site-name=\"...\"'")
        data_dir = Path(str(config["data-dir"])).expanduser() if "data-dir" in config else None
        if data_dir is not None and not data_dir.is_dir():
            raise InputError(f"data-dir of site {name} is not a folder: {data_dir}")
        return cls(name, index, num_sites, data_dir, simulated)


@dataclass(frozen=True)
class SiteData:
    """The rows of one hospital in three splits.

    Attributes
    ----------
    train, val, test : sequence of dict
        One dict a row: ``image`` (an array, or a path that MONAI reads), ``label`` and
        ``patient``. No patient may be in two splits.
    source : str
        If the rows come from, for log, summary and report.
    generated : bool
        True if no real patient stands behind the rows.
    class_names : tuple of str
        Names of the classes 1, 2, ... in masks, where the data name them; a client that calls them
        otherwise refuses the data.
    turned_away : int
        How many rows could not be used and are not here.
    """

    train: Sequence[Row]
    val: Sequence[Row] = field(default_factory=tuple)
    test: Sequence[Row] = field(default_factory=tuple)
    source: str = "not named"
    generated: bool = False
    class_names: tuple[str, ...] = ()
    turned_away: int = 0


def min_cell_count(context: Context, site: Site) -> int:
    """Return the fewest patients of whom a hospital tells a number, unless there is none.

    That is ``min-cell-count`` of its node config, 10 where it says nothing. The run config can
    raise it; in a simulation, where nothing leaves, also lower it.

    Raises
    ------
    InputError
        If it is no whole number, or below 1.
    """
    key = "min-cell-count"
    asked = with_type_of(FEWEST, context.run_config.get(key, FEWEST), key)
    own = NodeSettings.from_run_config(context.node_config).min_cell_count
    simulated = site.simulated and key not in context.node_config
    count = asked if simulated else max(asked if key in context.run_config else own, own)
    if count < 1:
        raise InputError(f"{key} must be at least 1, got {count}")
    return int(count)


def fewest_patients(context: Context, site: Site, purpose: str) -> int:
    """Return the fewest patients behind an update (``train``) or figures (``evaluated``).

    At a real hospital that is ``min-train-patients`` or ``min-evaluated-patients`` of its node
    config, 10 where it says nothing; in a simulation 1, unless it says otherwise.
    """
    if site.simulated and f"min-{purpose}-patients" not in context.node_config:
        return 1
    own = NodeSettings.from_run_config(context.node_config)
    return own.min_train_patients if purpose == "train" else own.min_evaluated_patients


def require_patients(data: SiteData) -> None:
    """Raise `InputError` where a row has no patient, or a patient is in two splits."""
    seen: dict[str, str] = {}
    for split in SPLITS:
        for number, row in enumerate(getattr(data, split)):
            if "patient" not in row:
                raise InputError(f"row {number} of the {split} split has no patient")
            patient = patient_text(row["patient"])
            if seen.setdefault(patient, split) != split:
                raise InputError(
                    f"patient {row['patient']} is in the splits {seen[patient]} and {split}: each "
                    "patient must be in one"
                )


def with_patients(data: SiteData) -> SiteData:
    """Return the data without the rows for which `require_patients` would raise.

    Whether one patient's rows are kept depends on that patient alone: of two splits it is the
    first. The log says how many rows go.
    """
    seen: dict[str, str] = {}
    kept: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        rows = getattr(data, split)
        for row in rows:
            try:
                patient = patient_text(row["patient"])
            except Exception:  # Whatever a row can be: it goes, and the others stay.
                continue
            if seen.setdefault(patient, split) == split:
                kept[split].append(row)
        if away := len(rows) - len(kept[split]):
            log.warning(
                "%d rows of the %s split are left out: they name no patient, or one of another "
                "split",
                away,
                split,
            )
    return replace(data, train=kept["train"], val=kept["val"], test=kept["test"])


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Return the first names with commas between them, and dots where there are more."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


class LineNumber(int):
    """The line of a table that names no patients, in the place of the patient.

    Sorted otherwise, the table has other people on its lines: what a patient has cost cannot be
    kept under such a name.
    """


def patient_text(patient: Any) -> str:
    """Return one text for a patient, however tables and programs have written the number.

    1, 1.0, "1", " 1", "1.0" and "001" are one patient; in each process the same.

    Raises
    ------
    InputError
        If a patient is neither a text nor a finite number nor a tuple of those.
    """
    if isinstance(patient, tuple):
        return f"({', '.join(map(patient_text, patient))})"
    value = patient.item() if hasattr(patient, "item") else patient
    if isinstance(value, str):
        text = str.__str__(value).strip()
        if (whole := _WHOLE.fullmatch(text)) and text.isascii():
            sign = whole[1] if whole[2] != "0" else ""
            return f"{sign}{whole[2]}"
        return ascii(text)
    if isinstance(value, bytes):
        return ascii(value)
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value + 0)
    raise InputError(
        "a patient must be a text, a finite number or a tuple of those, got one of type "
        f"{type(patient).__name__}"
    )
