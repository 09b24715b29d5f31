"""What a run may release about a hospital's patients.

The unit of privacy is the patient, with all records. A run sets a target epsilon, from which each
hospital computes its noise. The hospital sets a budget for all runs together and keeps the ledger.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Context

from fedmed_flower.data.site import Site
from fedmed_flower.errors import InputError
from fedmed_flower.files import POOLED_FILE, file_name
from fedmed_flower.privacy.accounting import Release, epsilon_of, noise_for
from fedmed_flower.privacy.grid import divergence_of, grid_for
from fedmed_flower.privacy.ledger import Ledger, Limit
from fedmed_flower.settings.node import NodeSettings
from fedmed_flower.settings.privacy import PrivacySettings
from fedmed_flower.settings.text import expand, setting_error
from fedmed_flower.wire import EPSILON, LEDGER_DIR, POOL_SITES

log = logging.getLogger("flwr.fedmed")

LEDGER_FILE = "privacy-ledger.sqlite"
# In a run folder: those of the sites of a simulation.
LEDGERS = "ledgers"
# The test split is measured once a run, and once more if the run is resumed at its end.
_TESTS = 2
_MOST_STEPS = 100_000
# The most releases of one run; computing the cost of that number takes seconds.
_MOST_RELEASES = 1_000_000
_BUDGET = {"budget-epsilon", "budget-delta"}


class Mechanism(NamedTuple):
    """One round of private training at one site.

    Attributes
    ----------
    release : Release
        What each step releases.
    steps : int
    num_patients : int
    settings : PrivacySettings
    grid : float
        Step of the grid to which noised sums are rounded; 0 for no grid.
    divergence : float, optional
        What the arithmetic of the round costs, for the ledger; None if no bound is known.
    """

    release: Release
    steps: int
    num_patients: int
    settings: PrivacySettings
    grid: float = 0.0
    divergence: float | None = None


class PatientPrivacy:
    """Plans the noise of a run at one site, and charges the site's ledger.

    Parameters
    ----------
    settings : PrivacySettings
    ledger : Ledger
    run : str
        One name for all rounds of a run, and for those after a restart.
    budget : Limit, optional
        What the hospital allows for all runs together.
    app : str
        Name of the app, shown to whoever reads the ledger.
    """

    def __init__(
        self,
        settings: PrivacySettings,
        ledger: Ledger,
        run: str,
        budget: Limit | None = None,
        app: str = "",
    ) -> None:
        self.settings = settings
        self.ledger = ledger
        self.run = run
        self.budget = budget
        self.app = app

    def plan_training(
        self,
        patients: Sequence[Hashable],
        epochs: int,
        batch_size: int,
        steps: int = 0,
        *,
        weights: int,
    ) -> Mechanism:
        """Return the steps of a training round, with noise that keeps all rounds to the target.

        Parameters
        ----------
        patients : sequence of hashable
            The patient of each record.
        epochs : int
            Mean number of passes over the patients; used if `steps` is 0.
        batch_size : int
            Mean number of patients in a step; used if the settings name no sampling rate.
        steps : int
            Number of steps in the round; 0 for the number that `epochs` makes.
        weights : int
            Number of the model's trained weights; at least 1.

        Raises
        ------
        InputError
            If a round would have more than 100,000 steps, or the run more than a million.
        """
        settings = self.settings
        count = len(set(patients))
        rate = settings.sampling_rate or min(1.0, batch_size / count)
        if steps > _MOST_STEPS:
            raise setting_error(
                f"local-steps must be at most {_MOST_STEPS} with privacy, got {steps}",
                "local-steps",
            )
        steps = steps or max(1, round(epochs / rate))
        if steps > _MOST_STEPS:
            raise InputError(
                f"local-epochs = {epochs} at a sampling rate of {rate:g} makes {steps} steps a "
                f"round, above {_MOST_STEPS}: raise sampling-rate or batch-size"
            )
        planned = settings.num_server_rounds
        if steps * planned > _MOST_RELEASES:
            raise InputError(
                f"{steps} steps a round in num-server-rounds = {planned} rounds are more than the "
                f"{_MOST_RELEASES:,} steps that privacy accounting can handle: lower one of them"
            )
        noise = noise_for(settings.target_epsilon, settings.delta, rate, steps * planned)
        release = Release(rate, noise)
        std = noise * settings.max_grad_norm
        numbers = weights * steps
        grid = grid_for(std, numbers * planned, settings.target_epsilon, settings.delta)
        if grid is None:
            return Mechanism(release, steps, count, settings)
        divergence = divergence_of(grid.deviation, numbers)
        return Mechanism(release, steps, count, settings, grid.step, divergence)

    def plan_evaluation(self, split: str) -> Release:
        """Return the release of one evaluation on the patients of a split."""
        settings = self.settings
        planned = _TESTS if split == "test" else settings.num_server_rounds
        noise = noise_for(settings.target_epsilon, settings.delta, 1.0, planned)
        return Release(1.0, noise)

    @contextmanager
    def charged(
        self,
        patients: Sequence[Hashable],
        release: Release,
        count: int,
        purpose: str,
        server_round: int,
        divergence: float | None = None,
    ) -> Iterator[None]:
        """Charge the ledger, run the block, then settle; if the block fails, the charge stays.

        Parameters and errors are those of `Ledger.charge`.

        Raises
        ------
        DeclinedError
            If the run's target or the hospital's budget would be passed.
        """
        settings = self.settings
        target = Limit(settings.target_epsilon, settings.delta, "the run's target-epsilon")
        charge = self.ledger.charge(
            patients,
            release,
            count,
            run=self.run,
            purpose=purpose,
            server_round=server_round,
            app=self.app,
            run_limit=target,
            budget=self.budget,
            divergence=divergence,
        )
        yield
        self.ledger.settle(charge)

    def spent(self, patients: Sequence[Hashable]) -> dict[str, float]:
        """Return what this run of this app has released about these patients.

        What other runs have released is left out: it would reveal whether these patients took part
        in them. `app` counts too, since a server may give runs of several apps the same name.
        """
        released = self.ledger.released(patients, self.run, self.app)
        return {EPSILON: epsilon_of(released, self.settings.delta)}


def budget_of(context: Context) -> Limit | None:
    """Return the budget that a hospital set in its node config; None if it set none.

    Raises
    ------
    InputError
        If a value is missing, of the wrong type or out of range.
    """
    config = {key: context.node_config[key] for key in _BUDGET & context.node_config.keys()}
    node = NodeSettings.of(config)
    if not node.budget_epsilon:
        return None
    return Limit(node.budget_epsilon, node.budget_delta, "the hospital's privacy budget")


def ledger_path(context: Context, site: Site, message: Any) -> Path:
    """Return the path of a site's ledger.

    Parameters
    ----------
    context : Context
        ``ledger`` in its node config is the path of the file, on the hospital's own disk.
    site : Site
        Without ``ledger``, the file of a hospital lies in its ``data-dir``, and that of a simulated
        site in the run folder, named by `files.file_name`.
    message : mapping
        The config that came with the message: ``ledger-dir``, used in a simulation only.

    Raises
    ------
    InputError
        If none of them gives a path, or if the path in the node config is not absolute.
    """
    if "ledger" in context.node_config:
        path = Path(str(context.node_config["ledger"])).expanduser()
        if not path.is_absolute():
            raise setting_error(
                f"ledger in the node config must be an absolute path, got {str(path)!r}: a "
                "relative path names another file in another working directory",
                "ledger",
            )
        return path
    if not site.simulated:
        if site.data_dir is not None:
            return site.data_dir / LEDGER_FILE
        raise setting_error(
            "a hospital needs a file for its privacy ledger: give --node-config "
            "'ledger=\"/path/privacy-ledger.sqlite\"', or a data-dir to hold it",
            "ledger",
        )
    run_dir = str(expand(context.run_config).get("run-dir", ""))
    folder = str(message.get(LEDGER_DIR, "")) or (run_dir and str(Path(run_dir) / LEDGERS))
    if not folder:
        raise setting_error(
            "privacy needs a folder for the sites' ledgers: give run-dir", "run-dir"
        )
    pooled = bool(message.get(POOL_SITES, False))
    return _ledger_in(Path(folder).expanduser(), None if pooled else site.name)


def _ledger_in(folder: Path, name: str | None) -> Path:
    """Return the path of a simulated site's ledger, or with None that of the pooled data."""
    if name is None:
        return folder / f"{POOLED_FILE}.sqlite"
    # Earlier versions took the name as it is; a run that they began goes on with its ledgers.
    earlier = f"{name}.sqlite"
    # `exists` would also find the file of a name that differs only in case.
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if earlier in present and name != POOLED_FILE and "~" not in name:
        return folder / earlier
    return folder / f"{file_name(name)}.sqlite"
