"""Models for comparison: one of each site alone, one on all data pooled, and fine-tuned ones."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from fedmed_flower.files import CROSS_SITES
from fedmed_flower.runs import cross_sites
from fedmed_flower.runs.roll_call import Sites, collect_personal
from fedmed_flower.server.history import History
from fedmed_flower.server.listeners import Listeners
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.settings.plan import Plan
from fedmed_flower.strategies.base import FedAvg
from fedmed_flower.wire import ALL_SITES, POOL_SITES

log = logging.getLogger("flwr.fedmed")

Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Baselines:
    """Trains models for comparison, from the run's initial model and for as many rounds.

    Attributes
    ----------
    grid : Grid
    plan : Plan
    sites : Sites
    folder : RunFolder
        The folder of the run; each model for comparison has a folder in its ``baselines``.
    initial : ArrayRecord
    config : callable
        Returns the config of the messages of one part of the run.
    history : History
        The history of the run, to which results and failures are added.
    listeners : Listeners
        Those of the run, who also hear of the models for comparison.
    """

    grid: Grid
    plan: Plan
    sites: Sites
    folder: RunFolder
    initial: ArrayRecord
    config: Callable[..., ConfigRecord]
    history: History
    listeners: Listeners

    def fine_tune(self, arrays: ArrayRecord) -> Table:
        """Let each site fine-tune the global model; return the test metrics of each model."""
        log.info("each hospital fine-tunes the model for itself")
        self.listeners.began("fine-tuned models", 0, ())
        nodes = {node_id: self.sites.names[node_id] for node_id in self.sites.trainers()}
        table = collect_personal(
            self.grid,
            arrays,
            self.config(),
            self.plan.round_timeout,
            nodes,
            self.sites.sent,
            self.listeners,
        )
        self._record("personal-test", table)
        return table

    def compare(self, test: dict[str, Any]) -> None:
        """Train a model at each site alone, and in a simulation one on all data pooled.

        Parameters
        ----------
        test : dict
            Each result is added under ``local`` or ``pooled`` as soon as it is known. At the end
            ``cross-sites.csv`` is written, with what each model reaches at each site.
        """
        test["local"] = {}
        trainers = self.sites.trainers()
        alone: dict[str, Table] = {}
        for number, node_id in enumerate(self.sites.counts, start=1):
            if node_id not in trainers:
                continue
            name = self.sites.names[node_id]
            self.listeners.part = f"{name} alone"
            log.info("for comparison: %s", self.listeners.part)
            label = f"local-{number}-{re.sub(r'[^A-Za-z0-9_-]', '_', name)}"
            table = self._trained_at(label, node_id)
            at_site = table.get(name, {})
            at_all_sites = table.get(ALL_SITES, {})
            elsewhere = cross_sites.kept(table, len(trainers))
            test["local"][name] = at_site | {"all": at_all_sites, "sites": elsewhere}
            alone[name] = table
            self._record("local-test", {name: at_site})
            self._record("local-test-all", {name: at_all_sites})
        pooled: Table = {}
        if self.sites.simulated:
            pooled = self._trained_on_all()
            at_each = {site: metrics for site, metrics in pooled.items() if site != ALL_SITES}
            test["pooled"] = pooled.get(ALL_SITES, {}) | {"sites": at_each}
        else:
            log.warning("no model on all data pooled: the data of real sites stay apart")
        federated = {**test["sites"], ALL_SITES: test["federated"]}
        self.folder.write(CROSS_SITES, cross_sites.as_csv(alone, federated, pooled))

    def _trained_on_all(self) -> Table:
        """Train a model on the rows of all sites of a simulation; return its test results."""
        self.listeners.part = "all data pooled"
        log.info("for comparison: %s", self.listeners.part)
        trainers = self.sites.trainers()
        first = next(node_id for node_id in self.sites.counts if node_id in trainers)
        table = self._trained_at("pooled", first, **{POOL_SITES: True})
        self._record("pooled-test", table)
        return table

    def _record(self, phase: str, table: Mapping[str, Mapping[str, float]]) -> None:
        before = len(self.history.rows)
        for site, metrics in table.items():
            self.history.add(self.plan.num_server_rounds, phase, site, metrics)
        self.listeners.tested(tuple(self.history.rows[before:]))

    def _trained_at(self, label: str, node_id: int, **config: bool) -> Table:
        """Train a model at one site; return its test results, none if no round succeeded."""
        plan = self.plan
        if hasattr(self.grid, "import_states"):
            # State that the clients kept in the federated run must not help this one.
            self.grid.import_states({})
        strategy = FedAvg(
            run_dir=(self.folder / "baselines" / label).path, resume=plan.resume, seed=plan.seed
        )
        strategy.listeners = self.listeners
        strategy.only = {node_id}
        strategy.excluded = self.sites.outdated
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
            table = strategy.test(
                self.grid, result.arrays, self.config(f"/{label}"), timeout=plan.round_timeout
            )
        self.sites.sent.add(strategy.history.sent)
        self.history.failures += [
            replace(failure, phase=f"{label} {failure.phase}")
            for failure in strategy.history.failures
        ]
        return table
