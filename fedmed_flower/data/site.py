"""One hospital as a client sees it: who it is and which rows it holds."""

from __future__ import annotations

import difflib
import logging
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from flwr.app import Context, UserConfig

from fedmed_flower.config import Section, with_type_of
from fedmed_flower.errors import InputError

log = logging.getLogger("flwr.fedmed")

Row = Mapping[str, Any]
GENERATED = "generated data, not patients"
SITE_RECORD = "site"
# How the reply of a hospital begins that does not take part, for a reason that it may tell.
DECLINED = "declined: "
# What the server tells of itself with each message: one name for all rounds of a run, and, in a
# simulation, where its sites keep their ledgers.
RUN_KEY, LEDGER_DIR = "run-key", "ledger-dir"
# The digest of the model's part that does not travel, which every site must have too.
FROZEN = "frozen-digest"
# What all sites agreed upon before the first round, in each site's every message.
AGREED = "agreed"
# Of a site's own model: its main figure on validation rows, before and after, and the passes kept.
PERSONAL = ("val-global", "val-own", "personal-epochs")
SPLITS = ("train", "val", "test")

# The fewest patients behind what a real hospital tells, where its node config says nothing.
FEWEST = 10
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
        How many sites a shared dataset is split among; 1 where the site has data of its own.
    data_dir : Path or None
        The hospital's own folder, or None in a simulation on a shared dataset.
    simulated : bool
        True where all sites live on one machine, so that nothing secret can leave it.
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
            Where neither ``site-name`` nor ``partition-id`` is given, or ``data-dir`` is no folder.
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
class NodeSettings(Section):
    """What a hospital says for itself, in its SuperNode's ``--node-config``; no server can set it.

    Attributes
    ----------
    site_name, data_dir, partition_id, num_partitions
        As `Site` takes them.
    ledger : str
        Path of the hospital's privacy ledger; empty for one in `data_dir`.
    budget_epsilon, budget_delta : float
        What all runs together may release about a patient; 0 where none is set.
    private_metrics : bool
        Whether evaluation counts carry noise. A private run's do unless this says false; those of
        another run do where it says true.
    output_dir : str
        Folder for what stays with the hospital.
    share_images, share_components : bool
        Whether pictures of test cases may leave, and sums from which genotypes can be computed.
    bundle : str
        Folder of the hospital's own copy of a MONAI bundle.
    personal : bool
        Whether the hospital fine-tunes a model for itself where a run asks.
    min_cell_count : int
        The fewest patients of whom a number is told; at least 1.
    min_train_patients : int
        The fewest different patients whose rows made one update that leaves; at least 1. The random
        draws of private training are excepted.
    min_evaluated_patients : int
        The fewest patients of whom figures of an evaluation leave; at least 1.
    coarse_figures : bool
        Whether losses and scores leave more coarsely.
    hide_few_missing : bool
        Whether a variable is withheld that few patients lack.
    max_filter_values : int
        How many values of a column questions may compare with, all runs together; at least 0.
    most_runs_a_day : int
        How many runs may begin within 24 hours; at least 1.
    """

    site_name: str = ""
    data_dir: str = ""
    partition_id: int = 0
    num_partitions: int = 1
    ledger: str = ""
    budget_epsilon: float = 0.0
    budget_delta: float = 0.0
    private_metrics: bool = False
    output_dir: str = ""
    share_images: bool = False
    share_components: bool = False
    bundle: str = ""
    personal: bool = True
    min_cell_count: int = FEWEST
    min_train_patients: int = FEWEST
    min_evaluated_patients: int = FEWEST
    coarse_figures: bool = False
    hide_few_missing: bool = False
    max_filter_values: int = 20
    most_runs_a_day: int = 50

    def __post_init__(self) -> None:
        self.require_at_least(1, "min_cell_count", "min_train_patients", "min_evaluated_patients")
        self.require_at_least(1, "most_runs_a_day")
        self.require_at_least(0, "max_filter_values")

    @classmethod
    def of(cls, config: UserConfig, more: Collection[str] = ()) -> Self:
        """Read a node config.

        Parameters
        ----------
        config : dict
        more : collection of str
            Keys of the app's own, which are not read here.

        Raises
        ------
        InputError
            Where a key is unknown, which would else be ignored without a word; where a value has
            the wrong type or is out of range; and where the keys of a budget do not fit together.
        """
        for key in config:
            if key not in NODE_KEYS and key not in more:
                known = [*NODE_KEYS, *more]
                near = difflib.get_close_matches(str(key).replace("_", "-"), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
                raise InputError(f"the node config has an unknown key {key!r}: {hint}")
        found = cls.from_run_config(config)
        budget = {"budget-epsilon", "budget-delta"}
        given = budget & config.keys()
        if given:
            if missing := budget - given:
                raise InputError(f"{min(given)} in the node config needs {min(missing)} beside it")
            if not 0 < found.budget_epsilon < math.inf:
                raise InputError(
                    f"budget-epsilon must be above 0 and finite, got {found.budget_epsilon}"
                )
            if not 0 < found.budget_delta < 1:
                raise InputError(
                    f"budget-delta must be above 0 and below 1, got {found.budget_delta}"
                )
            if not config.get("private-metrics", True):
                raise InputError(
                    "private-metrics=false cannot stand beside budget-epsilon: what is measured "
                    "without noise, no budget bounds"
                )
        return found


NODE_KEYS = tuple(entry.name.replace("_", "-") for entry in fields(NodeSettings))


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
        True where no real patient stands behind the rows.
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
        Where it is no whole number, or below 1.
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


def tell_error(site: str, text: str) -> str:
    """Return the reason of an error reply that names its site."""
    return f"site {site}: {text}"


def read_error(reason: str) -> tuple[str | None, str]:
    """Return site and text of a reason that `tell_error` made; None and the reason of another."""
    found = re.fullmatch(r"site (.+?): (.*)", reason, re.DOTALL)
    return (found[1], found[2]) if found else (None, reason)


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
        Where a patient is neither a text nor a finite number nor a tuple of those.
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
