"""What a run's model is compared with: own models of the sites, all data pooled, fine-tuning."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from fedmed_flower.runs.roll_call import Sites, collect_personal
from fedmed_flower.server.history import History
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.settings.plan import Plan
from fedmed_flower.strategies.base import FedAvg
from fedmed_flower.wire import ALL_SITES, POOL_SITES

log = logging.getLogger("flwr.fedmed")

Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Baselines:
    """Trains models for comparison, from the same initial model and for as many rounds.

    Attributes
    ----------
    grid : Grid
    plan : Plan
    sites : Sites
    folder : RunFolder
        Of the run; each model has a folder in its ``baselines``.
    initial : ArrayRecord
    config : callable
        Returns what each message of a part of the run tells the sites.
    history : History
        Of the run; takes up the results and the failures.
    """

    grid: Grid
    plan: Plan
    sites: Sites
    folder: RunFolder
    initial: ArrayRecord
    config: Callable[..., ConfigRecord]
    history: History

    def fine_tune(self, arrays: ArrayRecord) -> Table:
        """Let each site fine-tune the global model; return what its own model reaches there."""
        log.info("each hospital fine-tunes the model for itself")
        nodes = {node_id: self.sites.names[node_id] for node_id in self.sites.trainers()}
        found = collect_personal(
            self.grid, arrays, self.config(), self.plan.round_timeout, nodes, self.sites.sent
        )
        self._record("personal-test", found)
        return found

    def compare(self, test: dict[str, Any]) -> None:
        """Train each site's model alone, and one on all data pooled if that is possible.

        Parameters
        ----------
        test : dict
            Takes up the results under ``local`` and ``pooled``, as they come.
        """
        test["local"] = {}
        trainers = self.sites.trainers()
        for number, node_id in enumerate(self.sites.counts, start=1):
            if node_id not in trainers:
                continue
            name = self.sites.names[node_id]
            log.info("for comparison: %s alone", name)
            label = f"local-{number}-{re.sub(r'[^A-Za-z0-9_-]', '_', name)}"
            table = self._trained_at(label, node_id)
            own, of_all = table.get(name, {}), table.get(ALL_SITES, {})
            test["local"][name] = own | {"all": of_all}
            self._record("local-test", {name: own})
            self._record("local-test-all", {name: of_all})
        if not self.sites.simulated:
            log.warning("no model on all data pooled: the data of real sites stay apart")
            return
        log.info("for comparison: all data pooled")
        first = next(node_id for node_id in self.sites.counts if node_id in trainers)
        table = self._trained_at("pooled", first, **{POOL_SITES: True})
        self._record("pooled-test", table)
        test["pooled"] = table.pop(ALL_SITES, {}) | {"sites": table}

    def _record(self, phase: str, table: Mapping[str, Mapping[str, float]]) -> None:
        for site, metrics in table.items():
            self.history.add(self.plan.num_server_rounds, phase, site, metrics)

    def _trained_at(self, label: str, node_id: int, **config: bool) -> Table:
        """Train a model at one site only; return its test results, none if it never trained."""
        plan = self.plan
        if hasattr(self.grid, "import_states"):
            # What the clients kept in the federated run must not help the comparison.
            self.grid.import_states({})
        strategy = FedAvg(
            run_dir=(self.folder / "baselines" / label).path, resume=plan.resume, seed=plan.seed
        )
        strategy.only = {node_id}
        strategy.site_names |= self.sites.names
        result = strategy.start(
            self.grid,
            self.initial,
            plan.num_server_rounds,
            plan.round_timeout,
            train_config=self.config(f"/{label}", **config),
            evaluate_config=self.config(f"/{label}", **config),
        )
        table: Table = {}
        if result.train_metrics_clientapp:
            config_of_test = self.config(f"/{label}")
            table = strategy.test(
                self.grid, result.arrays, config_of_test, timeout=plan.round_timeout
            )
        self.sites.sent.add(strategy.history.sent)
        self.history.failures += [
            replace(failure, phase=f"{label} {failure.phase}")
            for failure in strategy.history.failures
        ]
        return table
