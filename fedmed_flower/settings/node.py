"""Settings that only a hospital can make, in its node config."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

from fedmed_flower.settings.allowed import SomeOf, Within, parts_of
from fedmed_flower.settings.disclosure import FEWEST
from fedmed_flower.settings.section import Section, key_of, setting
from fedmed_flower.settings.text import setting_error, unknown_key
from fedmed_flower.wire import IN_SUMS, NOT_IN_SUMS, OTHERWISE_IN_SUMS

if TYPE_CHECKING:
    from flwr.app import UserConfig

# Stands for all kinds of messages.
ALL_KINDS = "all"


# Messages whose answer depends on a model of the server's choice.
_WITH_MODEL = ("train", "evaluate")


@dataclass(frozen=True)
class NodeSettings(Section):
    """Settings of a hospital in its SuperNode's ``--node-config``; no server can set them."""

    site_name: str = setting("", "Name of the hospital, in reports and logs. Needed at a real one.")
    data_dir: str = setting("", "Folder of the hospital's data.")
    partition_id: int = setting(0, "Number of a simulated hospital; Flower sets it.", Within(0))
    num_partitions: int = setting(1, "Number of simulated hospitals; Flower sets it.", Within(1))
    ledger: str = setting("", "Path of the hospital's privacy ledger. Empty: one in data-dir.")
    budget_epsilon: float = setting(
        0.0,
        "What all runs together may release about a patient; with budget-delta.",
        Within(0.0, above=True, or_zero=True),
    )
    budget_delta: float = setting(
        0.0,
        "Delta of the budget; with budget-epsilon.",
        Within(0.0, 1.0, above=True, below=True, or_zero=True),
    )
    private_metrics: bool = setting(
        False,
        "Whether evaluation counts carry noise: of every run if true, of no run if false. If it is "
        "not given, those of private runs do.",
    )
    output_dir: str = setting(
        "", "Folder for files that stay with the hospital. Empty: none are kept."
    )
    image_cache: str = setting(
        "",
        "Folder of the hospital's own disk for images that are ready for the network, so that "
        "later messages need not read the files again; it holds patient data. Empty: one in the "
        "user's cache folder. off: none.",
    )
    image_cache_gigabytes: float = setting(
        20.0,
        "The most that image-cache may hold; what was not used for longest goes first.",
        Within(0.0),
        "gigabytes",
    )
    share_images: bool = setting(False, "Whether pictures of test cases may leave.")
    share_components: bool = setting(
        False, "Whether sums may leave from which genotypes can be computed."
    )
    bundle: str = setting("", "Folder of the hospital's own copy of a MONAI bundle.")
    personal: bool = setting(
        True, "Whether the hospital fine-tunes a model for itself if a run asks for it."
    )
    min_cell_count: int = setting(
        FEWEST,
        "The fewest patients behind a statistic that leaves.",
        Within(1),
        "patients",
    )
    min_train_patients: int = setting(
        FEWEST,
        "The fewest patients whose rows make an update that leaves. It does not apply to the "
        "random draws of private training.",
        Within(1),
        "patients",
    )
    min_evaluated_patients: int = setting(
        FEWEST,
        "The fewest patients behind the metrics of an evaluation that leave.",
        Within(1),
        "patients",
    )
    coarse_figures: bool = setting(
        False, "Whether losses and metrics leave coarse: of ten patients or more, and rounded."
    )
    hide_few_missing: bool = setting(
        False, "Whether a variable is withheld if its value is missing for only a few patients."
    )
    max_filter_values: int = setting(
        20,
        "With how many values of a column the conditions of all runs together may compare.",
        Within(0),
        "values",
    )
    secure_peers: str = setting(
        "", "File of the study's members and their keys, for secure sums: see `fedmed keys`."
    )
    secure_key: str = setting("", "File of the hospital's own key, for secure sums.")
    secure_only: str = setting(
        "",
        "Kinds of messages that the hospital answers in secure sums alone, with commas between "
        "them, such as train,evaluate; `describe` then tells no number of rows, and what cannot be "
        "summed is declined. `all`: of all kinds, also those that an app adds. Empty: only in a "
        "run with secure=sum.",
        SomeOf((ALL_KINDS, "describe", *IN_SUMS, *OTHERWISE_IN_SUMS, *NOT_IN_SUMS)),
    )
    tell_own: bool = setting(
        False,
        "Whether a hospital with secure-key may also train and evaluate outside of secure sums, so "
        "that its own figures leave. For the others it then counts like one that works with the "
        "server.",
    )
    most_runs_a_day: int = setting(
        50, "How many runs may begin within 24 hours.", Within(1), "runs"
    )

    def answers_in_sums_alone(self, kind: str) -> bool:
        """Return whether a kind of message is answered in secure sums alone.

        So are those of ``secure-only``. A hospital with a key says in its hello whether it tells
        its own figures too: unless it does, it trains and evaluates in secure sums alone.
        """
        if self.secure_key and not self.tell_own and kind in _WITH_MODEL:
            return True
        return not {ALL_KINDS, kind}.isdisjoint(parts_of(self.secure_only))

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
            If a key is unknown, since a mistyped key would have no effect; if a value has the wrong
            type or is out of range; or if the keys of a budget do not fit together.
        """
        known = [*NODE_KEYS, *more]
        for key in config:
            if key not in known:
                raise unknown_key("the node config has an unknown key", str(key), known)
        settings = cls.from_run_config(config)
        _require_whole_budget(settings, config)
        return settings


def _require_whole_budget(settings: NodeSettings, config: UserConfig) -> None:
    budget = {"budget-epsilon", "budget-delta"}
    given = budget & config.keys()
    if not given:
        return
    if missing := budget - given:
        key = min(given)
        raise setting_error(f"{key} in the node config needs {min(missing)} beside it", key)
    settings.require_positive("budget_epsilon")
    settings.require("budget_delta", settings.budget_delta > 0, "above 0 and below 1")
    if not config.get("private-metrics", True):
        raise setting_error(
            "private-metrics=false excludes budget-epsilon, since no budget bounds metrics "
            "without noise: remove one of them from the node config",
            "private-metrics",
        )


NODE_KEYS = tuple(key_of(entry.name) for entry in fields(NodeSettings))
