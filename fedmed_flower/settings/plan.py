"""Settings by which the server runs an experiment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmed_flower.arrays.compression import COMPRESSIONS, NONE
from fedmed_flower.settings.allowed import Matching, OneOf, Within
from fedmed_flower.settings.section import MOST_EXPONENT, MOST_ROUNDS, Section, setting
from fedmed_flower.settings.text import expand, setting_error

if TYPE_CHECKING:
    from flwr.app import UserConfig

# Where a run can be tracked.
TRACKERS = ("tensorboard", "mlflow", "wandb")
_NAME = "|".join(TRACKERS)
# When the model of a round is validated.
IN_ITS_ROUND = "own"
WITH_NEXT = "next"


@dataclass(frozen=True)
class Plan(Section):
    """How the server runs an experiment."""

    num_server_rounds: int = setting(3, "Rounds of training.", Within(1, MOST_ROUNDS), "rounds")
    round_timeout: float = setting(
        3600.0,
        "How long to wait in each phase, for replies and for the sites that the strategy needs.",
        Within(0.0, above=True),
        "seconds",
    )
    quorum: int = setting(
        0,
        "After so many sites have answered a phase without an error, go on `grace` seconds later "
        "without the others, which are recorded as failed. 0: wait for all until round-timeout.",
        Within(0),
        "sites",
    )
    grace: float = setting(
        60.0,
        "How long to wait for the other sites once quorum sites have answered.",
        Within(0.0),
        "seconds",
    )
    keep_model: str = setting(
        "last",
        "Which model is the run's in the end, which is tested and written: that of the last round, "
        "or the `best` by keep-metric. Training always goes on from the last.",
        OneOf(("last", "best")),
    )
    keep_metric: str = setting(
        "",
        "The figure by which rounds are compared: one of all sites' validation rows together, or "
        "server:NAME for one of evaluate_fn. Empty: that by which a run is judged, such as the AUC "
        "or the Dice.",
        Matching(
            r"((server:)?[\w-][\w@=<>+ -]{0,199})?",
            "empty or the name of a figure, without dots and slashes",
            ("auc\nloss", "a" * 201, "../auc", "auc;"),
        ),
    )
    patience: int = setting(
        0,
        "End after so many rounds without a better keep-metric. 0: after num-server-rounds.",
        Within(0),
        "rounds",
    )
    validate: str = setting(
        IN_ITS_ROUND,
        "When the model of a round is validated: in an exchange of its `own`; or by the sites that "
        "are sent it in the `next` round, with their training, which saves an exchange a round. "
        "Then keep-model and patience act a round later.",
        OneOf((IN_ITS_ROUND, WITH_NEXT)),
    )
    init_from: str = setting(
        "",
        "Weights to start from, of another run: its folder, or a .safetensors file, at the server. "
        "The models for comparison (baselines) start from them too. Empty: fresh weights, drawn by "
        "seed.",
    )
    evaluate: str = setting(
        "",
        "A finished model, as in init-from: nothing is trained, and it is tested at all sites. "
        "`fedmed evaluate` sets it, and the settings of that run. Empty: train.",
    )
    min_sites: int = setting(
        1, "Sites that must be connected before the run starts.", Within(1), "sites"
    )
    seed: int = setting(
        0,
        "Decides the initial weights, the sampling of sites, and, with site, round and purpose, "
        "everything random at a site that does not protect privacy. At a real hospital it does not "
        "decide how patients are split.",
        Within(0, 2**63 - 1),
    )
    run_dir: str = setting("", "The run folder. Empty: a new one under runs/.")
    resume: bool = setting(False, "Go on from the checkpoint in the run folder.")
    baselines: bool = setting(
        False,
        "Afterwards also train each site's model alone and, in a simulation, one model on all data "
        "pooled, each for as many rounds. A simulation also tests each site's own model, of a "
        "method or fine-tuned, at all other sites.",
    )
    outlying: str = setting(
        "note",
        "If a site's columns stand out or have no value, `note` names it in log and report, and "
        "`stop` ends the run before anything is trained.",
        OneOf(("note", "stop")),
    )
    pictures: int = setting(
        3,
        "Test cases of each site that the report shows, and the worst beside them, if the site "
        "lets them leave. 0: none.",
        Within(0),
        "pictures",
    )
    personal_epochs: int = setting(
        0,
        "The most passes in which each site may fine-tune the last model for itself. 0: none.",
        Within(0, 10_000),
        "passes",
    )
    track: str = setting(
        "",
        "Where every figure is tracked as well, in the run folder. Empty: nowhere.",
        Matching(
            rf"(({_NAME})(,({_NAME}))*)?",
            f"{', '.join(TRACKERS[:-1])} or {TRACKERS[-1]}, or several of them with commas between",
            ("tensorboard,", "MLflow", "tensorboard mlflow"),
        ),
    )
    buffer: int = setting(
        0,
        "Asynchronous rounds: a round ends with so many usable replies, and nobody waits for the "
        "slowest site. 0: a round waits for the replies of all its sites.",
        Within(0),
        "replies",
    )
    staleness_exponent: float = setting(
        0.5,
        "With buffer: a reply to the model of s rounds before weighs (1 + s) ^ -staleness-exponent "
        "of what it would weigh.",
        Within(0.0, MOST_EXPONENT),
    )

    compression: str = setting(
        NONE,
        "How sites send the change of the model to the server: in 8 or 4 bits, or its largest "
        "entries alone (`top-k`). What is lost is added to the next change.",
        OneOf(COMPRESSIONS),
    )
    top_k_share: float = setting(
        0.01,
        "Share of the entries of each array that `top-k` keeps; at least one.",
        Within(0.0, 1.0, above=True),
    )
    server_memory_gigabytes: float = setting(
        0.0,
        "Most memory for the replies of a round at the server, if the strategy needs all at once; "
        "the others are read from files. 0: half of what the machine has available.",
        Within(0.0),
        "GB",
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in `track`, each once."""
        return tuple(dict.fromkeys(filter(None, self.track.split(","))))

    @property
    def compares(self) -> bool:
        """Whether rounds are compared by a figure."""
        return self.keep_model != "last" or self.patience > 0

    def check(self) -> None:
        """Refuse what does not go together."""
        if self.evaluate:
            training = ("resume", "init_from", "baselines", "personal_epochs", "compares")
            for name in filter(lambda name: getattr(self, name), training):
                key = "keep-model or patience" if name == "compares" else name.replace("_", "-")
                raise setting_error(
                    f"evaluate excludes {key}: nothing is trained when a model is only tested",
                    "evaluate",
                )
        if self.keep_metric and not self.compares:
            raise setting_error(
                'keep-metric needs keep-model="best" or patience above 0, or it decides nothing',
                "keep-metric",
            )
        if self.resume and not self.run_dir:
            raise setting_error(
                "resume needs run-dir, the folder of the run to go on with", "resume"
            )
        if self.buffer and self.quorum:
            raise setting_error(
                "buffer excludes quorum: a round that ends with a number of replies has one; "
                "leave quorum out",
                "buffer",
            )


def refuse_evaluation(config: UserConfig, what: str) -> None:
    """Refuse to test a model in an app that has none; `what` says what the app does instead."""
    if expand(config).get("evaluate"):
        raise setting_error(f"evaluate tests a network, and this app {what}", "evaluate")
