"""What a run asks of a hospital's patients, and what the hospital lets it have.

The unit is the patient: with all records, in or out. A run names a target, from which each hospital
works out its own noise; the hospital names a budget for all runs together, and keeps the ledger.
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
from fedmed_flower.privacy.accounting import Release, epsilon_of, noise_for
from fedmed_flower.privacy.ledger import Ledger, Limit
from fedmed_flower.settings.node import NodeSettings
from fedmed_flower.settings.privacy import PrivacySettings
from fedmed_flower.wire import EPSILON, LEDGER_DIR, POOL_SITES

log = logging.getLogger("flwr.fedmed")

LEDGER_FILE = "privacy-ledger.sqlite"
# The test split is asked for once a run, and once more where the run is resumed at its end.
_TESTS = 2
_MOST_STEPS = 100_000
# Of a run: what they cost together takes seconds to compute.
_MOST_RELEASES = 1_000_000
_BUDGET = {"budget-epsilon", "budget-delta"}


class Mechanism(NamedTuple):
    """One round of private training at one site.

    Attributes
    ----------
    release : Release
        Of each step.
    steps : int
    num_patients : int
    settings : PrivacySettings
    """

    release: Release
    steps: int
    num_patients: int
    settings: PrivacySettings


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
        For the reader of the ledger.
    """

    def __init__(
        self,
        settings: PrivacySettings,
        ledger: Ledger,
        run: str,
        budget: Limit | None = None,
        app: str = "",
    ) -> None:
        self.settings, self.ledger, self.run = settings, ledger, run
        self.budget, self.app = budget, app

    def plan_training(
        self, patients: Sequence[Hashable], epochs: int, batch_size: int, steps: int = 0
    ) -> Mechanism:
        """Return what a round of training is: its noise keeps all planned rounds to the target.

        Parameters
        ----------
        patients : sequence of hashable
            One a record.
        epochs : int
            Passes over the patients on average, where `steps` is 0.
        batch_size : int
            Patients in a step on average, where the settings name no sampling rate.
        steps : int
            Steps in the round; 0 goes by `epochs`.

        Raises
        ------
        InputError
            If a round would have more than 100,000 steps, or the run more than a million.
        """
        settings, count = self.settings, len(set(patients))
        rate = settings.sampling_rate or min(1.0, batch_size / count)
        if steps > _MOST_STEPS:
            raise InputError(f"local-steps must be at most {_MOST_STEPS} with privacy, got {steps}")
        steps = steps or max(1, round(epochs / rate))
        if steps > _MOST_STEPS:
            raise InputError(
                f"local-epochs = {epochs} at a sampling rate of {rate:g} make {steps} steps a "
                f"round, above {_MOST_STEPS}: raise sampling-rate or batch-size"
            )
        target, planned = settings.target_epsilon, settings.num_server_rounds
        if steps * planned > _MOST_RELEASES:
            raise InputError(
                f"{steps} steps a round in num-server-rounds = {planned} rounds are more than "
                f"{_MOST_RELEASES:,} steps, which privacy accounting can be asked for: lower one"
            )
        noise = noise_for(target, settings.delta, rate, steps * planned)
        return Mechanism(Release(rate, noise), steps, count, settings)

    def plan_evaluation(self, split: str) -> Release:
        """Return the release of one evaluation, on the patients of one split."""
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
    ) -> Iterator[None]:
        """Charge the ledger, do what follows, and settle; what fails on the way stays charged.

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
        )
        yield
        self.ledger.settle(charge)

    def spent(self, patients: Sequence[Hashable]) -> dict[str, float]:
        """Return what this run of this app has released about these patients.

        What others have released stays in the ledger: it would tell whether these patients were
        among theirs. A server may call the runs of several apps alike.
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
    given = {key: context.node_config[key] for key in _BUDGET & context.node_config.keys()}
    own = NodeSettings.of(given)
    if not own.budget_epsilon:
        return None
    return Limit(own.budget_epsilon, own.budget_delta, "the hospital's privacy budget")


def ledger_path(context: Context, site: Site, message: Any) -> Path:
    """Return where a site keeps its ledger.

    Parameters
    ----------
    context : Context
        ``ledger`` in its node config is the file, on the hospital's own disk.
    site : Site
        With a ``data-dir``, the file may lie there. Sites of a simulation have theirs in the
        run folder.
    message : mapping
        The config that came with the message: ``ledger-dir``, heeded in a simulation only.

    Raises
    ------
    InputError
        If none of them says, or the path in the node config is not absolute.
    """
    if "ledger" in context.node_config:
        path = Path(str(context.node_config["ledger"])).expanduser()
        if not path.is_absolute():
            raise InputError(
                f"ledger in the node config must be an absolute path, got {str(path)!r}: elsewhere "
                "it would be another file"
            )
        return path
    if not site.simulated:
        if site.data_dir is not None:
            return site.data_dir / LEDGER_FILE
        raise InputError(
            "a hospital keeps a privacy ledger: give --node-config "
            "'ledger=\"/path/privacy-ledger.sqlite\"', or a data-dir in which it can lie"
        )
    run_dir = str(context.run_config.get("run-dir", ""))
    folder = str(message.get(LEDGER_DIR, "")) or (run_dir and str(Path(run_dir) / "ledgers"))
    if not folder:
        raise InputError("privacy needs a place for the sites' ledgers: give run-dir")
    pooled = bool(message.get(POOL_SITES, False))
    return Path(folder).expanduser() / f"{'all-sites' if pooled else site.name}.sqlite"
