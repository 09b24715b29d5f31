"""Models for comparison: one of each site alone, one on all data pooled, and fine-tuned ones.

In a simulation the models that sites keep for themselves are tested at the other sites too.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from fedmed_flower.errors import InputError
from fedmed_flower.files import CROSS_SITES, file_name
from fedmed_flower.models.weights import read_weights
from fedmed_flower.runs import cross_sites
from fedmed_flower.runs.roll_call import Sites, collect_personal
from fedmed_flower.runs.start import StartModel
from fedmed_flower.server.history import History
from fedmed_flower.server.listeners import Listeners
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.settings.plan import Plan
from fedmed_flower.strategies.base import FedAvg
from fedmed_flower.wire import ALL_SITES, POOL_SITES

log = logging.getLogger("flwr.fedmed")

Table = dict[str, dict[str, float]]

# The models that sites keep for themselves: what `cross-sites.csv` calls them, by their key in the
# summary, which is also their folder in the run folder of a simulation.
_KEPT = {"own": "own", "personal": "fine-tuned"}


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
    model : StartModel
        The run's, from which models for comparison start as well.
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
    model: StartModel
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
            Each result is added under ``local`` or ``pooled`` as soon as it is known, and what a
            model under ``own`` or ``personal`` reaches at other sites as its ``sites``. At the end
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
            label = _label("local", number, name)
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
        by_kind = {"alone": alone}
        for key, kind in _KEPT.items():
            by_kind[kind] = self._tested_elsewhere(key, kind, test.get(key, {}))
        federated = {**test["sites"], ALL_SITES: test["federated"]}
        self.folder.write(CROSS_SITES, cross_sites.as_csv(by_kind, federated, pooled))

    def _tested_elsewhere(
        self, key: str, kind: str, at_home: dict[str, dict[str, Any]]
    ) -> dict[str, Table]:
        """Test the models that sites keep for themselves at all other sites.

        The files lie in the run folder of a simulation alone. A model is sent as it is used at its
        own site, and tested there with nothing of the site where it is tested.

        Parameters
        ----------
        key, kind
            As in `_KEPT`.
        at_home
            By site, the metrics of its model there. What a model reaches at each site is added as
            ``sites`` if it could be sent; if not, the log says why.

        Returns
        -------
        dict
            By the site whose model it is, its metrics by site.
        """
        tables: dict[str, Table] = {name: {name: dict(at_home[name])} for name in at_home}
        if tables and not self.sites.simulated:
            log.warning("%s models stay at their sites: each is tested at home only", kind)
            return tables
        for number, name in enumerate(tables, start=1):
            file = self.folder.path / key / f"{file_name(name)}.safetensors"
            try:
                arrays = self.model.part_of(read_weights(file))
            except InputError as error:
                log.warning("%s: its %s model is tested at home only: %s", name, kind, error)
                continue
            part = f"{name}, {kind} model"
            log.info("for comparison at other sites: %s", part)
            self.listeners.began(part, 0, ())
            label = _label(key, number, name)
            strategy = self._strategy()
            at = {node_id for node_id, known in self.sites.names.items() if known == name}
            strategy.excluded = self.sites.outdated | at
            found = strategy.test(
                self.grid, arrays, self.config(f"/{label}"), timeout=self.plan.round_timeout
            )
            self._take_over(label, strategy)
            tables[name] |= {site: found[site] for site in found if site not in (name, ALL_SITES)}
            at_home[name]["sites"] = cross_sites.kept(tables[name], len(tables))
        return tables

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
        strategy = self._strategy(
            run_dir=(self.folder / "baselines" / label).path, resume=plan.resume
        )
        strategy.only = {node_id}
        result = strategy.start(
            self.grid,
            self.model.initial,
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
        self._take_over(label, strategy)
        return table

    def _strategy(self, **arguments: Any) -> FedAvg:
        """Return a strategy without a method that knows the sites of the run."""
        strategy = FedAvg(seed=self.plan.seed, **arguments)
        strategy.listeners = self.listeners
        strategy.excluded = self.sites.outdated
        strategy.site_names |= self.sites.names
        return strategy

    def _take_over(self, label: str, strategy: FedAvg) -> None:
        """Add what sites have sent to a strategy, and how they have failed, to those of the run."""
        self.sites.sent.add(strategy.history.sent)
        self.history.failures += [
            replace(failure, phase=f"{label} {failure.phase}")
            for failure in strategy.history.failures
        ]


def _label(key: str, number: int, site: str) -> str:
    """Return the name of a site's model in the keys of messages, and its folder if it has one."""
    return f"{key}-{number}-{re.sub(r'[^A-Za-z0-9_-]', '_', site)}"
