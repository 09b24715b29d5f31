"""Settings that only a hospital can make, in its node config."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Self

from flwr.app import UserConfig

from fedmed_flower.errors import InputError
from fedmed_flower.settings.section import Section

# Default of a real hospital's minimum numbers of patients.
FEWEST = 10


@dataclass(frozen=True)
class NodeSettings(Section):
    """Settings of a hospital in its SuperNode's ``--node-config``; no server can set them.

    Attributes
    ----------
    site_name, data_dir, partition_id, num_partitions
        As in `Site`.
    ledger : str
        Path of the hospital's privacy ledger; empty for one in `data_dir`.
    budget_epsilon, budget_delta : float
        What all runs together may release about a patient; 0 if none is set.
    private_metrics : bool
        Whether evaluation counts carry noise: of every run if true, of no run if false. If the
        node config lacks it, those of private runs do.
    output_dir : str
        Folder for files that stay with the hospital.
    share_images : bool
        Whether pictures of test cases may leave.
    share_components : bool
        Whether sums from which genotypes can be computed may leave.
    bundle : str
        Folder of the hospital's own copy of a MONAI bundle.
    personal : bool
        Whether the hospital fine-tunes a model for itself if a run asks for it.
    min_cell_count : int
        The fewest patients behind a statistic that leaves; at least 1.
    min_train_patients : int
        The fewest patients whose rows make an update that leaves; at least 1. It does not apply to
        the random draws of private training.
    min_evaluated_patients : int
        The fewest patients behind the metrics of an evaluation that leave; at least 1.
    coarse_figures : bool
        Whether losses and metrics leave coarse: of ten patients or more, and rounded.
    hide_few_missing : bool
        Whether a variable is withheld if its value is missing for only a few patients.
    max_filter_values : int
        With how many values of a column the conditions of all runs together may compare; at
        least 0.
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
            Node keys of the app, which are allowed but not read here.

        Raises
        ------
        InputError
            If a key is unknown, since a mistyped key would have no effect; if a value has the wrong
            type or is out of range; or if the keys of a budget do not fit together.
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
                    "private-metrics=false excludes budget-epsilon, since no budget bounds metrics "
                    "without noise: remove one of them from the node config"
                )
        return found


NODE_KEYS = tuple(entry.name.replace("_", "-") for entry in fields(NodeSettings))
