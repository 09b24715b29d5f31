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

from fedmed_flower.data.rows import Rows
from fedmed_flower.errors import InputError
from fedmed_flower.settings.disclosure import DisclosureSettings
from fedmed_flower.settings.node import NodeSettings
from fedmed_flower.settings.simulation import SimulationSettings
from fedmed_flower.settings.text import expand, setting_error

log = logging.getLogger("flwr.fedmed")

Row = Mapping[str, Any]
GENERATED = "generated data, not patients"
# A file of this name in a hospital's folder says that no patient stands behind the others.
MARK = "GENERATED"
SPLITS = ("train", "val", "test")

# A whole number as spreadsheets, data frames and people write it.
_WHOLE = re.compile(r"(-?)0*([0-9]+)(\.0*)?")

_simulating: ContextVar[bool] = ContextVar("simulating", default=False)


@contextmanager
def simulation() -> Iterator[None]:
    """Mark that all sites live in this process, so that nothing can leave a hospital."""
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


NO_FOLDER = (
    "{} has no folder of its own: in a simulation give `fedmed run APP --data FOLDER`, with one "
    "folder in it for each hospital; at a real hospital give data-dir in the node config"
)


def site_folders(root: str | Path) -> list[Path]:
    """Return the folders of a simulation's hospitals, in the order of their names.

    Raises
    ------
    InputError
        If `root` is not a folder or holds none.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        raise setting_error(
            f"data must be a folder that holds one for each hospital, got {path}", "data"
        )
    folders = [entry for entry in path.iterdir() if entry.is_dir()]
    folders = sorted(entry for entry in folders if not entry.name.startswith("."))
    if not folders:
        raise setting_error(
            f"data must be a folder that holds one for each hospital; {path} has none", "data"
        )
    return folders


def _folder_of(root: str, index: int, num_sites: int) -> Path:
    folders = site_folders(root)
    if len(folders) != num_sites:
        raise InputError(
            f"{root} holds {len(folders)} folders for {num_sites} hospitals: run it with "
            f"{len(folders)}"
        )
    return folders[index]


@dataclass(frozen=True)
class Site:
    """One hospital.

    Attributes
    ----------
    name : str
        Unique among the sites of a run; at most 80 printable letters without ": ".
    index : int
        From 0 to ``num_sites - 1``.
    num_sites : int
        Number of sites that share the dataset; 1 if the site has data of its own.
    data_dir : Path or None
        The hospital's own folder, or None in a simulation on a shared dataset. `folder` is the
        same, and says what to give if there is none.
    simulated : bool
        True if all sites live on one machine, so that nothing can leave a hospital.
    """

    name: str
    index: int = 0
    num_sites: int = 1
    data_dir: Path | None = None
    simulated: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise setting_error("site-name must not be empty", "site-name")
        if ": " in self.name or len(self.name) > 80 or not self.name.isprintable():
            raise setting_error(
                f"site-name must have at most 80 printable letters and no ': ', got {self.name!r}",
                "site-name",
            )
        if not 0 <= self.index < self.num_sites:
            raise InputError(
                f"partition-id must lie in 0..{self.num_sites - 1} (num-partitions - 1), "
                f"got {self.index}"
            )

    @property
    def folder(self) -> Path:
        """The hospital's own folder, `data_dir`.

        Raises
        ------
        InputError
            If it has none.
        """
        if self.data_dir is None:
            raise InputError(NO_FOLDER.format(self.name))
        return self.data_dir

    @classmethod
    def from_context(cls, context: Context) -> Site:
        """Read the site from a Flower context.

        Flower's simulation gives ``partition-id`` and ``num-partitions``. A SuperNode gives its
        ``--node-config``: ``site-name``, ``data-dir`` and, if the sites share a dataset,
        ``partition-id`` and ``num-partitions``.

        Raises
        ------
        InputError
            If the site has no name or not a valid one, ``data-dir`` is not a folder, or
            ``partition-id`` is not an integer from 0 to ``num-partitions`` - 1.
        """
        config = context.node_config
        try:
            index = int(config.get("partition-id", 0))
            num_sites = int(config.get("num-partitions", 1))
        except ValueError as error:
            raise InputError(f"partition-id and num-partitions must be integers: {error}") from None
        is_real = bool({"site-name", "data-dir"} & config.keys())
        simulated = "partition-id" in config and not is_real and in_simulation()
        if simulated:
            settings = SimulationSettings.from_run_config(context.run_config)
            if settings.data:
                folder = _folder_of(settings.data, index, num_sites)
                return cls(folder.name, index, num_sites, folder, simulated)
        name = str(config.get("site-name", f"hospital-{index + 1}" if simulated else "")).strip()
        if not name:
            raise InputError("this SuperNode has no name: give --node-config 'site-name=\"...\"'")
        data_dir = Path(str(config["data-dir"])).expanduser() if "data-dir" in config else None
        if data_dir is not None and not data_dir.is_dir():
            raise InputError(f"data-dir of site {name} is not a folder: {data_dir}")
        return cls(name, index, num_sites, data_dir, simulated)


def site_names(context: Context, site: Site) -> list[str]:
    """Return the names of all sites of a simulation, in the order of their index."""
    settings = SimulationSettings.from_run_config(context.run_config)
    if settings.data:
        return [folder.name for folder in site_folders(settings.data)]
    return [f"hospital-{index + 1}" for index in range(site.num_sites)]


@dataclass(frozen=True)
class SiteData:
    """The rows of one hospital in three splits.

    Attributes
    ----------
    train, val, test : sequence of dict
        One dict a row: ``image`` (an array, or a path that MONAI reads), ``label`` and
        ``patient``. No patient may be in two splits.
    source : str
        Where the rows come from, for log, summary and report.
    generated : bool
        True if no real patient stands behind the rows.
    class_names : tuple of str
        Names of the classes 1, 2, ... in masks, if the data name them. A client with other names
        refuses the data.
    rejected : int
        How many rows could not be used and are left out.
    lacking : tuple of str
        Columns that the schema asks for and the hospital's table lacks, as `Table.lacking` has
        them. They are reported to the server.
    notes : tuple of str
        What else is worth knowing of the folder, such as what was left out of it on purpose.
    regions : dict of str to sequence of int
        Regions that may overlap, with the values of masks that belong to each, if the data name
        them. A client with others refuses the data.
    """

    train: Sequence[Row]
    val: Sequence[Row] = field(default_factory=tuple)
    test: Sequence[Row] = field(default_factory=tuple)
    source: str = "not named"
    generated: bool = False
    class_names: tuple[str, ...] = ()
    rejected: int = 0
    lacking: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    regions: Mapping[str, Sequence[int]] = field(default_factory=dict)


def all_rows(data: SiteData) -> Sequence[Row]:
    """Return the rows of all splits; those of one table with their columns, see `Rows.joined`."""
    return Rows.joined(getattr(data, split) for split in SPLITS)


def in_columns(data: SiteData) -> SiteData:
    """Return the same rows; those of one table are whole columns again, see `Rows.of`."""
    parts: dict[str, Any] = {split: Rows.of(getattr(data, split)) for split in SPLITS}
    changed = {split: rows for split, rows in parts.items() if rows is not getattr(data, split)}
    return replace(data, **changed) if changed else data


def min_cell_count(context: Context, site: Site) -> int:
    """Return the minimum count: the fewest patients behind a number that leaves the hospital.

    It is ``min-cell-count`` of the node config, 10 if that is not given. The run config can raise
    it; in a simulation, in which nothing leaves a hospital, it can also lower it. A count of 0
    patients may leave.

    Raises
    ------
    InputError
        If it is not a whole number of 1 or more.
    """
    key = "min-cell-count"
    asked = DisclosureSettings.from_run_config(context.run_config).min_cell_count
    own = NodeSettings.from_run_config(context.node_config).min_cell_count
    if site.simulated and key not in context.node_config:
        return asked
    return max(asked, own) if key in expand(context.run_config) else own


def fewest_patients(context: Context, site: Site, purpose: str) -> int:
    """Return the fewest patients behind an update (``train``) or metrics (``evaluated``).

    It is ``min-train-patients`` or ``min-evaluated-patients`` of the node config. If that is not
    given, it is 10 at a real hospital and 1 in a simulation.
    """
    if site.simulated and f"min-{purpose}-patients" not in context.node_config:
        return 1
    settings = NodeSettings.from_run_config(context.node_config)
    return settings.min_train_patients if purpose == "train" else settings.min_evaluated_patients


def require_patients(data: SiteData) -> None:
    """Raise `InputError` if a row has no patient, or a patient is in two splits."""
    seen: dict[str, str] = {}
    for split in SPLITS:
        rows: Sequence[Row] = getattr(data, split)
        if isinstance(rows, Rows) and "patient" in rows.names:
            patients = dict.fromkeys(patients_of(rows))
            if all(seen.setdefault(patient, split) == split for patient in patients):
                continue
        for number, row in enumerate(rows):
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

    A patient in two splits stays in the first of them, so whether a patient's rows stay depends on
    that patient alone. The log gives the number of rows left out.
    """
    seen: dict[str, str] = {}
    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        rows = getattr(data, split)
        for row in rows:
            try:
                patient = patient_text(row["patient"])
            except Exception:  # A row can raise anything; only that row is left out.
                continue
            if seen.setdefault(patient, split) == split:
                parts[split].append(row)
        if left_out := len(rows) - len(parts[split]):
            log.warning(
                "%d rows of the %s split are left out: they name no patient, or one who is in "
                "another split",
                left_out,
                split,
            )
    return replace(data, train=parts["train"], val=parts["val"], test=parts["test"])


def patients_of(rows: Sequence[Row]) -> list[str]:
    """Return the `patient_text` of each row.

    Raises
    ------
    InputError
        As `patient_text`.
    KeyError
        If a row has no ``patient``.
    """
    if isinstance(rows, Rows):
        return rows.mapped("patient", patient_text)
    return [patient_text(row["patient"]) for row in rows]


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, separated by commas; if there are more, dots follow."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


class LineNumber(int):
    """The number of a line, used as patient if a table names no patients.

    It names another person once the table is sorted differently. So a ledger cannot record under
    it what a patient has cost.
    """


def patient_text(patient: Any) -> str:
    """Return one text for a patient, whichever way the number is written.

    1, 1.0, "1", " 1", "1.0" and "001" are one patient. The text is the same in every process.

    Raises
    ------
    InputError
        If the patient is not a text, bytes, a finite number or a tuple of these.
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
