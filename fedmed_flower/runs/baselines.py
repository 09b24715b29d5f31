"""What a run's model is held against: each site's own model, all data pooled, fine-tuned models."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord

from fedmed_flower.runs.roll_call import collect_personal
from fedmed_flower.strategies.base import FedAvg
from fedmed_flower.wire import ALL_SITES

if TYPE_CHECKING:
    from fedmed_flower.runs.experiment import Experiment

log = logging.getLogger("flwr.fedmed")


def fine_tune(experiment: Experiment, arrays: ArrayRecord) -> None:
    """Let each site fine-tune the global model; take up what its own model reaches there."""
    log.info("each hospital fine-tunes the model for itself")
    timeout = experiment.plan.round_timeout
    nodes = {node_id: experiment.sites.names[node_id] for node_id in experiment.sites.trainers()}
    found = collect_personal(
        experiment.grid, arrays, experiment.config(), timeout, nodes, experiment.sites.sent
    )
    experiment.test["personal"] = found
    _record(experiment, "personal-test", found)


def compare(experiment: Experiment) -> None:
    """Train each site's model alone, and one on all data pooled where that is possible."""
    test, sites, strategy = experiment.test, experiment.sites, experiment.strategy
    test["local"] = {}
    if "privacy" in strategy.export_state():
        log.warning("the models for comparison are trained without noise: keep them here")
    if experiment.run_config.get("privacy") == "patient":
        log.warning("each model for comparison costs as much again, in the ledgers alone")
    trainers = sites.trainers()
    for number, node_id in enumerate(sites.counts, start=1):
        if node_id not in trainers:
            continue
        name = sites.names[node_id]
        log.info("for comparison: %s alone", name)
        label = f"local-{number}-{re.sub(r'[^A-Za-z0-9_-]', '_', name)}"
        table = _baseline(experiment, label, node_id)
        own, of_all = table.get(name, {}), table.get(ALL_SITES, {})
        test["local"][name] = own | {"all": of_all}
        _record(experiment, "local-test", {name: own})
        _record(experiment, "local-test-all", {name: of_all})
    if not sites.simulated:
        log.warning("no model on all data pooled: the data of real sites stay apart")
        return
    log.info("for comparison: all data pooled")
    first = next(node_id for node_id in sites.counts if node_id in trainers)
    table = _baseline(experiment, "pooled", first, **{"pool-sites": True})
    _record(experiment, "pooled-test", table)
    test["pooled"] = table.pop(ALL_SITES, {}) | {"sites": table}


def _record(experiment: Experiment, phase: str, table: Mapping[str, Mapping[str, float]]) -> None:
    for site, metrics in table.items():
        experiment.strategy.history.add(experiment.plan.num_server_rounds, phase, site, metrics)


def _baseline(
    experiment: Experiment, label: str, node_id: int, **config: bool
) -> dict[str, dict[str, float]]:
    """Train a model at one site only; return its test results, none where it never trained."""
    plan, grid = experiment.plan, experiment.grid
    if hasattr(grid, "import_states"):
        # What the clients kept in the federated run must not help the comparison.
        grid.import_states({})
    strategy = FedAvg(
        run_dir=(experiment.folder / "baselines" / label).path, resume=plan.resume, seed=plan.seed
    )
    strategy.only = {node_id}
    strategy.site_names |= experiment.sites.names
    result = strategy.start(
        grid,
        experiment.entries.initial,
        plan.num_server_rounds,
        plan.round_timeout,
        train_config=experiment.config(f"/{label}", **config),
        evaluate_config=experiment.config(f"/{label}", **config),
    )
    table: dict[str, dict[str, float]] = {}
    if result.train_metrics_clientapp:
        config_of_test = experiment.config(f"/{label}")
        table = strategy.test(grid, result.arrays, config_of_test, timeout=plan.round_timeout)
    experiment.sites.sent.add(strategy.history.sent)
    experiment.strategy.history.failures += [
        replace(failure, phase=f"{label} {failure.phase}") for failure in strategy.history.failures
    ]
    return table
