"""One experiment from a run config: roll call, rounds, test, comparison, report."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import secrets
import shlex
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import tomli_w
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, UserConfig
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from torch import nn

from fedmed_flower.arrays.compression import NONE
from fedmed_flower.data.outlying import Outlying, with_further, without_column
from fedmed_flower.data.site import GENERATED, some_of
from fedmed_flower.errors import DivergedError, InputError
from fedmed_flower.files import require_closed
from fedmed_flower.methods.base import Method
from fedmed_flower.methods.registry import method_by_settings
from fedmed_flower.metrics.counts import COUNTS_FILE, counted
from fedmed_flower.prediction.predictor import write_predictor
from fedmed_flower.privacy.patient import LEDGERS
from fedmed_flower.runs.baselines import Baselines
from fedmed_flower.runs.roll_call import (
    Sites,
    call_newcomers,
    collect_contributions,
    collect_pictures,
    roll_call,
)
from fedmed_flower.runs.start import (
    Modeller,
    StartModel,
    require_unchanged,
    start_model,
    weights_at,
)
from fedmed_flower.runs.summed import sum_contributions
from fedmed_flower.runs.tracking import TRACKERS, require_trackers
from fedmed_flower.runs.verdict import (
    RunFailedError,
    require_bounded,
    require_measured,
    require_two_classes,
)
from fedmed_flower.secure.shares import PatientNoise, has_shares
from fedmed_flower.server.run_folder import (
    CONFIG,
    DEFAULT_FOLDER,
    FORMAT,
    PREDICTOR,
    RunFolder,
    early_lines,
)
from fedmed_flower.server.sites import app_name, wait_for_sites
from fedmed_flower.server.traffic import saved
from fedmed_flower.settings.disclosure import DisclosureSettings
from fedmed_flower.settings.methods import MethodSettings
from fedmed_flower.settings.model import ModelSettings
from fedmed_flower.settings.plan import IN_ITS_ROUND, Plan
from fedmed_flower.settings.privacy import PrivacySettings
from fedmed_flower.settings.registry import (
    METHODS,
    Sections,
    complete,
    effective,
    require_known,
    sections_of,
)
from fedmed_flower.settings.secure import SUM, SecureSettings
from fedmed_flower.settings.text import expand, setting_error, text_of
from fedmed_flower.settings.training import Settings
from fedmed_flower.strategies.base import EvaluateFn, FedAvg, leave_result
from fedmed_flower.strategies.selection import SERVER
from fedmed_flower.wire import (
    AGREED,
    ALL_SITES,
    DECLINED,
    EPSILON,
    FROZEN,
    HOSPITAL_EPSILON,
    LEDGER_DIR,
    PROXIMAL_MU,
    RUN_KEY,
    Sent,
)

log = logging.getLogger("flwr.fedmed")

FREE_ON_RESUME = {
    "run-dir",
    "resume",
    "num-server-rounds",
    "round-timeout",
    "quorum",
    "grace",
    "server-memory-gigabytes",
    "baselines",
    "pictures",
    "personal-epochs",
    "track",
    "outlying",
}
# What says how and from where a model is trained. A finished model is whole: neither adapters nor
# frozen parts tell it from another.
TRAINING_ONLY = frozenset(
    {
        "baselines",
        "buffer",
        "compression",
        "init-from",
        "keep",
        "keep-metric",
        "keep-model",
        "keep-sent",
        "lora",
        "lora-alpha",
        "lora-rank",
        "lora-train",
        "method",
        "patience",
        "personal-epochs",
        "staleness-exponent",
        "top-k-share",
        "trainable",
        "validate",
        *effective({}, METHODS),
    }
)
# Besides what `fedmed evaluate` takes over.
FREE_TO_EVALUATE = FREE_ON_RESUME | TRAINING_ONLY | {"data", "evaluate", "min-sites"}
_MOST_SITES = 100_000
_NOT_COMPARED = (
    "no hospital was compared with the others: what its columns hold leaves in secure sums alone"
)
# Seconds to wait for what a site reports of itself that connects between two rounds.
_NEWCOMER_TIMEOUT = 60.0
_KEY = re.compile(r"[A-Za-z0-9_-]{0,64}")
_SHA256 = re.compile(r"([0-9a-f]{64})?")
_PACKAGES = ("fedmed-flower", "flwr", "torch", "monai", "numpy", "scikit-learn")


def federate(
    strategy: FedAvg,
    grid: Grid,
    context: Context,
    model: Modeller | Callable[[], nn.Module],
    sections: Sections = (),
    evaluate_fn: EvaluateFn | None = None,
) -> flower.Result:
    """Run an experiment by the run config, and write a complete run folder.

    The folder holds ``config.toml``, ``checkpoint.zip``, ``metrics.csv``, ``model.safetensors``,
    ``summary.json``, ``report.html``, ``live.json`` and ``log.txt``; at the end also
    ``predictor.zip``, by which `fedmed predict` uses the model without the app. It also holds
    ``counts.json`` if the model predicts classes, ``pictures/`` if sites permit pictures to leave,
    and ``splits/`` in a simulation. Nothing is written before the run config has been checked and
    at least one site has answered.

    Parameters
    ----------
    strategy : FedAvg
        Its folder, seed and `resume` are set from the run config, as are `quorum` and `keep` if
        the run config asks for them.
    grid, context
        As Flower gives them to a ServerApp.
    model : MedicalClient or callable
        An instance of the app's client, ``MyHospital(context)``. Its `build_model` is called with
        torch seeded by ``seed``, before the first round and, for ``predictor.zip``, at the end. If
        nothing has to be agreed before the first round, a
        function that returns the network is enough.
    sections : sequence of Section classes
        The app's own settings, if `model` is a function. A client names its own.
    evaluate_fn : callable, optional
        Called as ``evaluate_fn(server_round, arrays)`` with the whole model at the start (round 0)
        and after each round. The metrics that it returns are those of the phase ``server`` in log,
        ``metrics.csv`` and report; None gives none.

    Returns
    -------
    flwr.serverapp.strategy.Result

    Raises
    ------
    InputError
        If the run config has an unknown key or a wrong value, or every site's data is wrong.
    RunFailedError
        If the run has no result: no round succeeded, all sites failed alike, nobody could evaluate
        the model, or all test rows are of one class.
    DivergedError
        If the weights of the model have grown out of proportion.
    """
    with strategy.listeners.run() as ending:
        with early_lines() as lines:
            experiment = _prepared(strategy, grid, context, model, sections, evaluate_fn)
        result = experiment.run(lines)
        if strategy.history.stopped is not None:
            ending.message = strategy.history.stopped.reason
    return result


def _prepared(
    strategy: FedAvg,
    grid: Grid,
    context: Context,
    model: Modeller | Callable[[], nn.Module],
    sections: Sections,
    evaluate_fn: EvaluateFn | None,
) -> Experiment:
    """Check the run config, call the roll, make the start model and the run folder."""
    # The run config names the folder; models for comparison have none.
    os.environ.pop(DEFAULT_FOLDER, None)
    # A client, or a method of one, such as its `build_model`.
    own = [*sections_of(type(getattr(model, "__self__", model))), *sections]
    method = _method(strategy, context.run_config)
    if method is not None:
        own = [*own, method.section]
    config = _effective(context.run_config, own)
    strategy.use_method(method)
    _require_method(strategy, config, context.run_config)
    plan = Plan.from_run_config(context.run_config)
    if config.get("virtual-speeds") and not hasattr(grid, "set_clock"):
        raise setting_error(
            "virtual-speeds needs a run in one process, `fedmed run` with the engine local: sites "
            "that work at the same time have their own speeds",
            "virtual-speeds",
        )
    require_trackers(plan.trackers)
    folder = RunFolder.named(plan.run_dir)
    if not plan.resume:
        folder.require_unused()
    before = read_before(folder) if plan.resume else None
    if before is not None:
        require_same_settings(folder, before.config, config, own)
    place = plan.evaluate or plan.init_from
    weights = weights_at(place, "evaluate" if plan.evaluate else "init-from")
    behind = run_behind(place)
    if before is not None:
        require_unchanged(weights, before.weights, folder.path)
    known = behind if plan.evaluate else before
    agreed = "" if known is None else known.agreed
    asking = model if isinstance(model, Modeller) and model.must_agree and not agreed else None
    if asking is not None and plan.evaluate:
        raise setting_error(
            "evaluate must be the folder of the run, and not a file of weights alone: the model "
            "takes rows as its hospitals agreed to prepare them, which the folder records, got "
            f"{place!r}",
            "evaluate",
        )
    strategy.folder = folder
    strategy.resume = plan.resume
    strategy.seed = plan.seed
    if plan.quorum:
        strategy.quorum = plan.quorum
        strategy.grace = plan.grace
    if plan.server_memory_gigabytes:
        strategy.memory_gigabytes = plan.server_memory_gigabytes
    if plan.compression != NONE:
        strategy.compression = plan.compression
        strategy.top_k_share = plan.top_k_share
    if plan.buffer:
        strategy.buffer = plan.buffer
        strategy.staleness_exponent = plan.staleness_exponent
    if plan.validate != IN_ITS_ROUND:
        strategy.validate = plan.validate
    strategy.require_buffer()
    secure = SecureSettings.from_run_config(config)
    if secure.secure == SUM:
        strategy.secure = secure.secure
        strategy.secure_exponent = secure.secure_exponent
        plan = sums_alone(plan)
        require_named(model)
        _share_noise(strategy, config)
    strategy.require_summable()
    strategy.require_validation()
    columns = [] if asking is None or secure.secure != SUM else asking.columns_to_sum()
    if plan.compares:
        _require_noised_choice(config)
        strategy.compare_rounds(plan.keep_model, plan.keep_metric, plan.patience)
    if asking is None:
        # Before waiting for sites, so that a wrong run config or checkpoint is reported at once.
        start = start_model(model, agreed, config, plan.seed, weights)
        _take_up(strategy, start, config)
        strategy.find_checkpoint(start.initial)
    wait_for_sites(grid, max(plan.min_sites, 1 if plan.evaluate else _fewest(strategy)))
    listeners = strategy.listeners
    sites = roll_call(
        grid,
        plan.round_timeout,
        strategy.quorum,
        strategy.grace,
        listeners,
        training=not plan.evaluate,
    )
    key = (before.key if before is not None else "") or secrets.token_hex(8)
    standing_out: list[Outlying] = []
    if not plan.resume and not plan.evaluate:
        asked = [sites.names[node_id] for node_id in sites.counts]
        standing_out = without_column(sites.lacking, sites.empty, asked)
        if secure.secure == SUM:
            standing_out = [Outlying(ALL_SITES, "", _NOT_COMPARED)]
    if asking is not None:
        names = {node_id: sites.names[node_id] for node_id in sites.counts}
        if secure.secure == SUM:
            simulated = sites.simulated or hasattr(grid, "in_process")
            sums = strategy.secure_sums(grid, key, plan.round_timeout, simulated)
            contributions = sum_contributions(sums, names, columns)
            # The rounds begin with a new history.
            sites.sent.add(strategy.history.sent)
        else:
            contributions = collect_contributions(
                grid, plan.round_timeout, names, sites.sent, listeners
            )
            rows = {
                name: sites.counts[node_id]["train"]
                for node_id, name in names.items()
                if "train" in sites.counts[node_id]
            }
            standing_out = with_further(standing_out, asking.outlying(contributions, rows))
        agreed = asking.agree(contributions)
        start = start_model(model, agreed, config, plan.seed, weights)
        _take_up(strategy, start, config)
    if standing_out and plan.outlying == "stop":
        _stop(sites, standing_out)
    strategy.site_names |= sites.names
    strategy.only = sites.only()
    strategy.excluded = sites.outdated
    count = len(sites.nodes)
    if before is not None and sites.simulated and before.sites != count:
        raise InputError(
            f"{folder.path} was started with {before.sites} sites and has {count} now, which "
            f"would give each site other patients: resume with {before.sites} sites"
        )
    if behind is not None and plan.evaluate:
        require_kept_apart(behind, config, count, sites.simulated, place)
        for text in changed_texts(behind.config, config, own):
            strategy.inbox.note(0, "test", ALL_SITES, text)
    elif behind is not None and behind.agreed != agreed:
        log.warning(
            "init-from: the hospitals of this run prepare rows otherwise than those of %s, so that "
            "what enters the network means something else than to those weights",
            place,
        )
    app = app_name(grid) or "federated run"
    about: dict[str, Any] = {
        "format": FORMAT,
        "app": app,
        "strategy": type(strategy).__name__,
        "sites": count,
        "key": key,
    }
    if agreed:
        about["agreed"] = agreed
    if weights is not None:
        about["weights"] = weights.sha256
    settings = {**config, "strategy": about["strategy"]}
    trackers = [TRACKERS[name](folder, app, settings) for name in plan.trackers]
    _write_config(folder, about, config)
    listeners.open(folder, app, trackers)
    return Experiment(
        strategy=strategy,
        grid=grid,
        plan=plan,
        folder=folder,
        model=start,
        sites=sites,
        run_config=config,
        key=key,
        agreed=agreed,
        maker=model,
        evaluate_fn=evaluate_fn,
        standing_out=standing_out,
        origin={} if weights is None else {"path": weights.path, "sha256": weights.sha256},
        class_names=tuple(getattr(getattr(model, "__self__", model), "class_names", ())),
    )


def _fewest(strategy: FedAvg) -> int:
    """Return how many sites must be connected before a strategy can train."""
    minima = (strategy.min_available_nodes, strategy.min_train_nodes, strategy.min_evaluate_nodes)
    return max(strategy.needed(), *minima)


def _require_noised_choice(config: UserConfig) -> None:
    """Refuse to choose a model of a private run by figures without noise."""
    privacy = PrivacySettings.from_run_config(config)
    by_hospitals = not str(config["keep-metric"]).startswith(SERVER)
    if privacy.on and not privacy.private_metrics and by_hospitals:
        raise setting_error(
            "private-metrics must be true if figures of hospitals decide which model of a private "
            'run is kept, or when it ends: leave it on, or set keep-model="last" and patience=0',
            "private-metrics",
        )


def _share_noise(strategy: FedAvg, config: UserConfig) -> None:
    """Let hospitals add shares of patients' noise to secure sums, if a round is one step."""
    privacy = PrivacySettings.from_run_config(config)
    settings = Settings.from_run_config(config)
    strategy.patients_hidden = privacy.on
    if has_shares(settings, privacy):
        strategy.patient_noise = PatientNoise.planned(settings, privacy)
    elif privacy.on:
        log.info(
            "each hospital adds noise of its own to hide its patients: with local-steps=1 a share "
            "of it would do, and the same noise would cost less epsilon"
        )


def sums_alone(plan: Plan) -> Plan:
    """Return the plan of a run by secure sums: without pictures, which are of single patients.

    Raises
    ------
    InputError
        If it is to do what else needs single hospitals.
    """
    for key, asked, why in (
        ("baselines", plan.baselines, "a model of one hospital alone"),
        ("personal-epochs", plan.personal_epochs, "figures of each hospital's own model"),
        ("buffer", plan.buffer, "replies that come one by one"),
        ("outlying=stop", plan.outlying == "stop", "statistics of each hospital's columns"),
    ):
        if asked:
            raise setting_error(
                f'secure="sum" excludes {key}, by which the server learns {why}: leave it out',
                key.partition("=")[0],
            )
    if plan.pictures:
        log.info('no pictures are asked for: with secure="sum" none of single patients leave')
    return replace(plan, pictures=0)


def require_named(model: Modeller | Callable[[], nn.Module]) -> None:
    """Raise `InputError` if the names of a client's figures are not known beforehand.

    A function that returns the network tells nothing of that.
    """
    require = getattr(getattr(model, "__self__", model), "require_named", None)
    if require is None:
        return
    try:
        require()
    except InputError as error:
        raise setting_error(
            'secure="sum" needs the names of all figures before a patient is measured, by rows of '
            f"no patient: {error}",
            "secure",
        ) from error


def _stop(sites: Sites, standing_out: list[Outlying]) -> NoReturn:
    """Log which sites stand out, and raise `InputError`."""
    sites.write_log()
    for one in standing_out:
        log.warning("%s: %s", one.site, one.text)
    columns: dict[str, list[str]] = {}
    for one in standing_out:
        columns.setdefault(one.site, []).append(one.column)
    listed = [f"{site} ({some_of(names)})" for site, names in sorted(columns.items())]
    raise setting_error(
        f"{some_of(listed)} stand{'s' * (len(listed) == 1)} out, as the log says: correct these "
        'columns, or set outlying="note" to train all the same',
        "outlying",
    )


def _effective(config: UserConfig, own: Sections) -> UserConfig:
    """Return the run config with the default of each key that it lacks and the run reads.

    Raises
    ------
    InputError
        If a key is unknown or a value is wrong.
    """
    require_known(config, own)
    # Whoever answers the roll call is a client of this package, which reads these.
    read = (
        Plan,
        Settings,
        PrivacySettings,
        DisclosureSettings,
        MethodSettings,
        ModelSettings,
    )
    return expand(config) | effective(config, [*read, *own])


def _method(strategy: FedAvg, config: UserConfig) -> Method | None:
    """Return the method that a run config names, or that of the strategy with its settings."""
    name = MethodSettings.from_run_config(config).method
    made = strategy.method
    if made is None or (name and name != made.name):
        return method_by_settings(name, config)
    values = made.config()
    given = {key: value for key, value in expand(config).items() if key in values}
    return type(made)(made.section.from_run_config(values | given)) if given else made


def _require_method(strategy: FedAvg, config: UserConfig, given: UserConfig) -> None:
    """Refuse settings under which the method of a strategy is wrong, or that nobody reads.

    Parameters
    ----------
    strategy : FedAvg
    config : dict
        With defaults.
    given : dict
        The run config.

    Raises
    ------
    InputError
    """
    method = strategy.method
    own = bool(config["keep"]) or (method is not None and method.personal)
    if own and config["personal-epochs"]:
        raise setting_error(
            "personal-epochs excludes keep and methods with own models: it fine-tunes the global "
            "model, which no hospital of such a run uses",
            "personal-epochs",
        )
    used = () if method is None else method.config().keys()
    for key in sorted(expand(given).keys() & effective({}, METHODS).keys()):
        if key not in used and not (key == PROXIMAL_MU and isinstance(strategy, flower.FedProx)):
            name = "no method" if method is None else method.name
            raise setting_error(f"{key} has no effect in a run with {name}: leave it out", key)
    if method is None:
        return
    method.require(Settings.from_run_config(config), str(config["keep"]))
    if config["privacy"] == "patient" and method.touches_again:
        raise setting_error(
            f"{method.name} uses patients' rows beside the training that has noise: it is for runs "
            'without privacy="patient"',
            "method",
        )


def _write_config(folder: RunFolder, run: dict[str, Any], config: UserConfig) -> None:
    """Write ``config.toml`` of a run folder."""
    versions = {package: version(package) for package in _PACKAGES}
    tables = {"run": run, "config": dict(config), "versions": versions}
    folder.write(CONFIG, tomli_w.dumps(tables).encode())


class Before(NamedTuple):
    """What ``config.toml`` of a run folder records of its run.

    Attributes
    ----------
    config : dict
        The run config.
    sites : int
        Number of sites at its start; from 1 to 100,000.
    key : str
        Name of the run in the ledgers: up to 64 letters, digits, ``-`` and ``_``; empty if the run
        has none.
    agreed : str
        What the sites agreed upon; empty if there was nothing to agree upon.
    weights : str
        SHA-256 of the file of weights that it began with; empty if they were fresh.
    """

    config: UserConfig
    sites: int
    key: str
    agreed: str
    weights: str


def read_before(folder: RunFolder) -> Before:
    """Read and check ``config.toml`` of a run folder, which a stranger may have written.

    Raises
    ------
    InputError
        As `require_closed` and `RunFolder.read_config`; or if a value is not one that a run writes.
    """
    require_closed(folder.path)
    tables = folder.read_config()
    run = tables["run"]
    sites = run.get("sites")
    # The key becomes the name of a folder and of an entry in a hospital's ledger.
    key = run.get("key", "")
    agreed = run.get("agreed", "")
    weights = run.get("weights", "")
    sound_count = type(sites) is int and 1 <= sites <= _MOST_SITES
    for name, valid, bound, value in (
        ("sites", sound_count, f"in 1..{_MOST_SITES}", sites),
        ("key", _KEY.fullmatch(str(key)), "up to 64 letters, digits, - and _", key),
        ("agreed", isinstance(agreed, str), "a text", agreed),
        ("weights", _SHA256.fullmatch(str(weights)), "64 hexadecimal digits", weights),
    ):
        if not valid:
            raise InputError(
                f"{name} in {folder.path / CONFIG} must be {bound}, got {value!r}: restore the "
                "file from a copy"
            )
    return Before(tables["config"], int(sites or 0), str(key), str(agreed), str(weights))


def run_behind(place: str) -> Before | None:
    """Return what is recorded of the run whose folder a place is; None if it is none."""
    folder = RunFolder(place)
    return read_before(folder) if place and (folder.path / CONFIG).is_file() else None


def require_kept_apart(
    trained: Before, config: UserConfig, count: int, simulated: bool, place: str
) -> None:
    """Refuse to test a model on patients that a simulation has trained it on.

    Parameters
    ----------
    trained : Before
        The run that trained the model.
    config : dict
        The run config of now.
    count : int
        Number of sites now.
    simulated : bool
        Whether all sites are simulated: then seed and number of sites decide who is in the test
        split. At a real hospital they do not.
    place : str
        The folder of that run, for the error.

    Raises
    ------
    InputError
        If sites that hold the same data now split it otherwise.
    """
    before = complete(trained.config)
    now = complete(config)
    if not simulated or before.get("data") != now.get("data"):
        return
    for key, first, value in (
        ("seed", before["seed"], now["seed"]),
        ("number of sites", trained.sites, count),
    ):
        if first != value:
            raise InputError(
                f"evaluate: the {key} was {first} in {place} and is {value} now, which would test "
                f"the model on patients that it was trained on: give {first}, or other data"
            )


def changed_texts(before: UserConfig, now: UserConfig, own: Sections) -> list[str]:
    """Return which settings differ from those of the run that trained a model, as sentences."""
    first = complete(before, own)
    last = complete(now, own)
    return [
        f"{key} was {first.get(key)!r} in the run that trained the model and is {last.get(key)!r}"
        for key in changed_settings(first, last, FREE_TO_EVALUATE)
    ]


def changed_settings(before: UserConfig, now: UserConfig, free: Collection[str]) -> list[str]:
    """Return the keys whose values differ in two complete run configs, without those in `free`."""
    keys = sorted((before.keys() | now.keys()).difference(free))
    return [key for key in keys if before.get(key) != now.get(key)]


def require_same_settings(
    folder: RunFolder, before: UserConfig, now: UserConfig, own: Sections = ()
) -> None:
    """Refuse to resume with settings that would make it another run.

    A key that is given on one side alone counts as its default on the other; `own` are the app's
    own sections.

    Raises
    ------
    InputError
        If a setting differs that a resumed run may not change. The error lists those settings, as
        options with the values of the start.
    """
    before = complete(before, own)
    now = complete(now, own)
    changed = changed_settings(before, now, FREE_ON_RESUME)
    if not changed:
        return
    first = changed[0]
    text = f"{first} was {before.get(first)!r} when {folder.path} was started and is "
    text += f"{now.get(first)!r} now: resume with the settings of the start"
    in_both = [key for key in changed if key in before and key in now]
    raise InputError(text + given_by({key: before[key] for key in in_both}))


def given_by(values: UserConfig) -> str:
    """Return the end of an error that names the options by which settings of a folder are given."""
    options = [_option(key, text_of(value)) for key, value in values.items()]
    return f"; if you trust that folder, give them: {' '.join(options)}" if options else ""


def _option(key: str, value: str) -> str:
    """Return the option of `fedmed run` that sets a key."""
    return (
        f"--data {shlex.quote(value)}" if key == "data" else f"-c {shlex.quote(f'{key}={value}')}"
    )


def _take_up(strategy: FedAvg, start: StartModel, config: UserConfig) -> None:
    """Tell a strategy what it cannot see in the start model's arrays."""
    strategy.buffers = start.buffers
    strategy.keep = str(config["keep"])
    strategy.kept = start.kept
    strategy.keep_sent = bool(config["keep-sent"])
    strategy.require_choice()


@dataclass
class Experiment:
    """A run, from its first round to its report."""

    strategy: FedAvg
    grid: Grid
    plan: Plan
    folder: RunFolder
    model: StartModel
    sites: Sites
    run_config: UserConfig
    key: str
    agreed: str
    maker: Modeller | Callable[[], nn.Module]
    evaluate_fn: EvaluateFn | None = None
    standing_out: list[Outlying] = field(default_factory=list)
    # Path and SHA-256 of the weights it began with; empty if they were fresh.
    origin: dict[str, str] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    # Why there is no predictor; empty if there is one, or the run has not come to its end.
    unpredictable: str = ""
    test: dict[str, Any] = field(default_factory=dict)
    told: dict[str, dict[str, float]] = field(default_factory=dict)
    pictures: list[dict[str, str]] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    began: float = field(default_factory=time.monotonic)

    def run(self, lines: Iterable[logging.LogRecord]) -> flower.Result:
        """Train, test, compare, report; `lines` are those that the log begins with."""
        folder = self.folder
        with folder.log_file(lines):
            self.sites.write_log()
            self._log_part()
            try:
                # One of an earlier end of this run would be of another model than the folder's.
                (folder.path / PREDICTOR).unlink(missing_ok=True)
                self._write_summary("running")
                result = self._given() if self.plan.evaluate else self._train()
                self._test(result.arrays)
                self._write_summary("running")
                self._compare(result.arrays)
                folder.write_metrics(self.strategy.history)
            except BaseException as error:
                stopped = isinstance(error, KeyboardInterrupt)
                text = "stopped by the user" if stopped else f"{type(error).__name__}: {error}"
                # A run that goes on with the same settings would diverge again.
                if folder.checkpoint_file.exists() and not isinstance(error, DivergedError):
                    text += f"; go on with --resume {folder.path}"
                self._write_summary("stopped" if stopped else "failed", text)
                self._write_report()
                raise
            self._write_predictor(result.arrays)
            self._write_summary("finished")
            log.info("report: %s", self._write_report())
        # Models for comparison have left theirs since.
        leave_result(self.grid, result, folder)
        return result

    def _write_report(self) -> Path:
        """Write the report, whose plots no round waits for."""
        from fedmed_flower.reports.report import write_report

        return write_report(self.folder.path)

    def _log_part(self) -> None:
        """Log how much of the model is trained and travels, if not all of it."""
        if not self.model.frozen:
            return
        about = self.model.about
        part = f"{about['weights-trained']:,} of {about['weights']:,} weights"
        if layers := len(self.model.adapters.layers):
            part += f", with adapters in {layers} layer{'s' * (layers > 1)},"
        log.info(
            "%s are trained and travel: %s bytes in place of %s",
            part,
            f"{about['bytes']:,}",
            f"{about['bytes-whole']:,}",
        )

    def _before_round(self, server_round: int) -> None:
        """End a run that has diverged; ask the sites that have connected since the last round."""
        sites = self.sites
        strategy = self.strategy
        require_bounded(self.model.initial, strategy.result.arrays, self.model.buffers)
        timeout = min(self.plan.round_timeout, _NEWCOMER_TIMEOUT)
        for name, before in call_newcomers(
            self.grid, sites, timeout, strategy.listeners, server_round
        ).items():
            (node_id,) = (node for node, held in sites.names.items() if held == name)
            how = "has connected and trains from here on"
            if before is not None:
                how = "has come back"
                strategy.site_names.pop(before, None)
            strategy.site_names[node_id] = name
            text = f"{how}: {sites.rows_text(node_id)}"
            strategy.inbox.note(server_round, "train", name, text)
        strategy.only = sites.only()
        for one in self.standing_out:
            strategy.inbox.note(server_round, "before training", one.site, one.text)
        self.standing_out = []

    def _train(self) -> flower.Result:
        """Train by the strategy, and write the model whole if only a part of it travels."""
        self.strategy.before_round = self._before_round
        result = self.strategy.start(
            self.grid,
            self.model.initial,
            self.plan.num_server_rounds,
            self.plan.round_timeout,
            train_config=self.config(),
            evaluate_config=self.config(),
            evaluate_fn=self._evaluate,
        )
        if self.strategy.run.halted:
            raise RunFailedError(self.strategy.run.halted)
        if not result.train_metrics_clientapp:
            raise RunFailedError(self._why_nothing_succeeded())
        require_bounded(self.model.initial, result.arrays, self.model.buffers)
        if self.model.frozen:
            # Until now the file holds only the part that travels.
            self.folder.write_model(self._whole(result.arrays))
        return result

    def _given(self) -> flower.Result:
        """Return the model that is only tested, as the result of a run without rounds."""
        log.info("nothing is trained: the model in %s is tested", self.origin["path"])
        self.strategy.listeners.began("", 0, ())
        metrics = self._evaluate(0, self.model.initial)
        self.strategy.history.add(0, "server", ALL_SITES, metrics or {})
        return flower.Result(arrays=self.model.initial)

    def _evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluate a model by the app's own function, if it has given one."""
        if self.evaluate_fn is None:
            return None
        return self.evaluate_fn(server_round, self._whole(arrays))

    def _whole(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return a model with the part that does not travel, under the network's own keys."""
        if not self.model.frozen:
            return arrays
        whole = ArrayRecord({**self.model.whole, **arrays})
        adapters = self.model.adapters
        if not adapters.layers:
            return whole
        return ArrayRecord(adapters.merged(whole.to_torch_state_dict()))

    def _test(self, arrays: ArrayRecord) -> None:
        """Evaluate the final model on the sites' test rows, and collect pictures."""
        plan = self.plan
        history = self.strategy.history
        before = len(history.failures)
        table = self.strategy.test(self.grid, arrays, self.config(), timeout=plan.round_timeout)
        self.test["federated"] = table.pop(ALL_SITES, {})
        summed = self.strategy.secure == SUM
        self.test["sites"] = {} if summed else table
        # Of a few hospitals, of which there is no mean and no worst.
        self.told = table if summed else {}
        validated = any(row[1] == "val" and row[2] == ALL_SITES for row in history.rows)
        known = {ALL_SITES: self.test["federated"]} if self.test["federated"] and summed else table
        require_measured(known, history.failures[before:], validated, summed)
        rows_of_class = self.strategy.run.rows_of_class
        require_two_classes(rows_of_class)
        counts = counted(self.strategy.run.tested, self.class_names)
        if counts is not None:
            text = json.dumps(counts.content(), separators=(",", ":"), allow_nan=False)
            self.folder.write(COUNTS_FILE, text.encode())
        if absent := [str(label) for label, count in enumerate(rows_of_class) if not count]:
            text = f"no test row is of class {', '.join(absent)}: figures are of the other classes"
            last = max((row[0] for row in history.rows), default=0)
            self.strategy.inbox.note(last, "test", ALL_SITES, text)
        if self.strategy.has_own_models and not plan.evaluate:
            timeout = plan.round_timeout
            own = self.strategy.test(self.grid, arrays, self.config(), timeout, own=True)
            self.test["own"] = {site: own[site] for site in own if site != ALL_SITES}
        if plan.pictures:
            self.pictures = collect_pictures(
                self.grid,
                arrays,
                self.config(),
                plan.pictures,
                plan.round_timeout,
                {n: name for n, name in self.sites.names.items() if n not in self.sites.outdated},
                self.sites.sent,
                self.folder,
                self.strategy.listeners,
            )

    def _compare(self, arrays: ArrayRecord) -> None:
        """Make the models for comparison that the plan asks for."""
        if self.plan.personal_epochs:
            self.test["personal"] = self._baselines().fine_tune(arrays)
        if self.plan.baselines:
            self._warn_of_cost()
            self._baselines().compare(self.test)

    def _write_predictor(self, arrays: ArrayRecord) -> None:
        """Write what a prediction needs, or log why it cannot be written."""
        if self.plan.evaluate:
            self.unpredictable = f"nothing was trained here: predict by {self.origin['path']}"
            return
        generated = self.sites.generated
        self.unpredictable = write_predictor(
            self.folder,
            self.maker,
            self._whole(arrays),
            self.plan.seed,
            app_name(self.grid),
            generated,
        )
        if self.unpredictable:
            log.info("no %s: %s", PREDICTOR, self.unpredictable)

    def _baselines(self) -> Baselines:
        return Baselines(
            self.grid,
            self.plan,
            self.sites,
            self.folder,
            self.model,
            self.config,
            self.strategy.history,
            self.strategy.listeners,
        )

    def _warn_of_cost(self) -> None:
        """Log what models for comparison cost patients and hospitals."""
        if "privacy" in self.strategy.export_state():
            log.warning("the models for comparison are trained without noise: keep them here")
        if self.run_config.get("privacy") == "patient":
            log.warning(
                "each model for comparison costs patients as much as the run again, and a "
                "hospital's own model at another hospital a test; only the ledgers show it"
            )

    def config(self, part: str = "", **more: bool) -> ConfigRecord:
        """Return the config of each message; ledgers count all rounds of a part under one key."""
        config = ConfigRecord({RUN_KEY: f"{self.key}{part}", **more})
        if self.agreed:
            config[AGREED] = self.agreed
        if self.model.frozen:
            config[FROZEN] = self.model.frozen
        if self.sites.simulated:
            config[LEDGER_DIR] = str(self.folder.path / LEDGERS)
        return config

    def _write_summary(self, status: str, message: str = "") -> None:
        sites = self.sites
        history = self.strategy.history
        trainers = set() if self.plan.evaluate else sites.trainers()
        sent = Sent()
        for part in (sites.sent, history.sent):
            sent.add(part)
        summary = {
            "status": status,
            "message": message,
            "app": app_name(self.grid) or "federated run",
            "engine": _engine(self.grid, sites),
            "strategy": type(self.strategy).__name__,
            "method": "" if self.strategy.method is None else self.strategy.method.name,
            "kept-layers": list(self.strategy.kept),
            "data": GENERATED if sites.generated else "; ".join(sorted(sites.sources)),
            "generated": sites.generated,
            "rounds": max((row[0] for row in history.rows if row[1] == "train"), default=0),
            "rounds-planned": 0 if self.plan.evaluate else self.plan.num_server_rounds,
            "seed": self.plan.seed,
            "started": self.started,
            "seconds": round(time.monotonic() - self.began, 1),
            "sites": sites.rows(),
            "refused": sites.refused(),
            "trained": {sites.names[node]: 0 for node in trainers} | history.rounds_trained(),
            "started-from": None if self.plan.evaluate else self.origin or None,
            "evaluated": self.origin if self.plan.evaluate else None,
            "test": self.test,
            "privacy": self._privacy(),
            "pictures": self.pictures,
            "sent": sent.table(),
            "model": self.model.about,
            "predictor": self.unpredictable,
            "lacking": sites.lacking,
            "empty": sites.empty,
            "traffic": {site: traffic.table() for site, traffic in history.traffic.items()},
            "saved": saved(history.traffic),
            "secure": {
                "sums": [[s.round, s.purpose, [*s.sites]] for s in history.sums],
                "told": self.told,
            }
            if history.sums
            else None,
            "stopped": history.stopped and asdict(history.stopped),
            "kept": history.kept and asdict(history.kept),
            "failures": [asdict(failure) for failure in history.failures],
            "notes": [asdict(note) for note in history.notes],
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in _PACKAGES},
            "config": dict(self.run_config),
        }
        self.folder.write_summary(summary)

    def _privacy(self) -> dict[str, Any]:
        """Return the privacy cost of the rounds so far, by unit: of hospitals and of patients."""
        reported: dict[str, Any] = {}
        sites: dict[str, dict[str, float]] = {}
        for _, phase, site, metric, value in self.strategy.history.rows:
            if phase != "train":
                continue
            if metric == HOSPITAL_EPSILON:
                reported["hospital"] = {
                    "epsilon": value,
                    "delta": getattr(self.strategy, "delta", None),
                    "shared": self.strategy.secure == SUM,
                }
            if metric == EPSILON and site != ALL_SITES:
                part = sites.setdefault(site, {"rounds": 0, "declined": 0})
                part["epsilon"] = value
                part["rounds"] += 1
        for failure in self.strategy.history.failures:
            if failure.phase == "train" and failure.reason.startswith(DECLINED):
                sites.setdefault(failure.site, {"rounds": 0, "declined": 0})["declined"] += 1
        if self.run_config.get("privacy") == "patient":
            settings = PrivacySettings.from_run_config(self.run_config)
            reported["patient"] = {
                "target-epsilon": settings.target_epsilon,
                "delta": settings.delta,
                "private-metrics": settings.private_metrics,
                "shared": isinstance(self.strategy.secure_noise, PatientNoise),
                "sites": sites,
            }
        return reported

    def _why_nothing_succeeded(self) -> str:
        history = self.strategy.history
        first = ""
        if history.failures:
            first = f": {history.failures[0].site}: {history.failures[0].reason}"
        elif history.stopped is not None:
            first = f": {history.stopped.reason}"
        return f"no site could train in any of {self.plan.num_server_rounds} rounds{first}"


def _engine(grid: Grid, sites: Sites) -> str:
    if hasattr(grid, "export_states"):
        return "local"
    return "Flower simulation" if sites.simulated else "Flower deployment"
