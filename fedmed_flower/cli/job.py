"""Check a run before it starts, run it with simulated hospitals, and print its results."""

from __future__ import annotations

import csv
import logging
import os
import shlex
import signal
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from flwr.app import UserConfig
from flwr.clientapp import ClientApp

from fedmed_flower.cli.options import Engine, Options
from fedmed_flower.cli.progress import Bar, Lines, show_progress
from fedmed_flower.cli.tables import console, print_results
from fedmed_flower.data.site import GENERATED, site_folders
from fedmed_flower.engines.flower import run_flower
from fedmed_flower.engines.gpu import fitting
from fedmed_flower.engines.local import run_local
from fedmed_flower.engines.project import Project, default_sites, load_project
from fedmed_flower.engines.workers import MOST_WORKERS, Workers, number_of_workers
from fedmed_flower.errors import InputError
from fedmed_flower.files import as_input_error
from fedmed_flower.reports.report import write_report
from fedmed_flower.runs.experiment import (
    FREE_TO_EVALUATE,
    TRAINING_ONLY,
    Before,
    changed_settings,
    given_by,
    read_before,
    require_same_settings,
    run_behind,
)
from fedmed_flower.server.run_folder import (
    CONFIG,
    DEFAULT_FOLDER,
    METRICS,
    SUMMARY,
    RunFolder,
    read_summary,
)
from fedmed_flower.settings.node import NodeSettings
from fedmed_flower.settings.plan import Plan
from fedmed_flower.settings.registry import (
    RUN,
    Sectioned,
    Sections,
    choices,
    complete,
    defaults,
    effective,
    require_known,
)
from fedmed_flower.settings.study import Study
from fedmed_flower.settings.survey import SurveySettings
from fedmed_flower.settings.text import assign, expand, override, setting_error, with_type_of
from fedmed_flower.wire import ALL_SITES

log = logging.getLogger("flwr.fedmed")

# Neither a study nor a survey can be resumed.
_RESUMABLE = tuple(section for section in RUN if section not in (Study, SurveySettings))


@dataclass(frozen=True)
class Job:
    """A run that has been checked and can start."""

    project: Project
    client: ClientApp
    config: UserConfig
    num_sites: int
    node_configs: list[UserConfig] | None
    options: Options
    folder: Path

    @property
    def planned_rounds(self) -> int | None:
        """Number of rounds; None if none is trained, or the app's settings are unknown."""
        if self.options.evaluate is not None or not isinstance(self.client, Sectioned):
            return None
        return int(complete(self.config)["num-server-rounds"])

    @property
    def again(self) -> str:
        """The options of the command line that are to be repeated when the run is resumed."""
        text = "".join(f" -c {shlex.quote(setting)}" for setting in self.options.settings)
        for name, path in (("data", self.options.data), ("node-config", self.options.node_config)):
            text += "" if path is None else f" --{name} {shlex.quote(str(path))}"
        if self.options.workers > 1:
            text += f" --workers {self.options.workers}"
        return text


def prepare(path: Path, options: Options) -> Job:
    """Check all that can be checked before the run starts and anything is written."""
    resume = options.resume
    if options.out is not None and resume is not None:
        raise InputError("--out and --resume exclude each other: --resume DIR continues in DIR")
    for key, option in (("run-dir", "--out"), ("resume", "--resume"), ("data", "--data")):
        if _is_given(key, options.settings):
            raise InputError(f"fedmed run sets {key} itself: give {option} instead of -c {key}")
    if options.evaluate is not None and _is_given("evaluate", options.settings):
        raise InputError("fedmed evaluate sets evaluate itself: give RUN instead of -c evaluate")
    _require_workers(options)
    project = load_project(path)
    run_folder = RunFolder.named(resume or options.out, project.name)
    if resume is None:
        run_folder.require_unused()
    before = None if resume is None else read_before(run_folder)
    num_sites = number_of_sites(path, options, before)
    tested = options.evaluate
    trained = None if tested is None else run_behind(str(tested.expanduser()))
    if trained is not None and options.sites is None and options.data is None:
        num_sites = trained.sites
    client = project.client_app()
    values: UserConfig = {"run-dir": str(run_folder.path), "resume": resume is not None}
    if options.data is not None:
        values["data"] = str(options.data.expanduser().resolve())
    if options.rounds is not None:
        values["num-server-rounds"] = options.rounds
    if tested is not None:
        if not isinstance(client, Sectioned):
            raise InputError(
                f"fedmed evaluate needs a client of this package, and that of {project.name} is "
                "another"
            )
        values["evaluate"] = str(tested.expanduser().resolve())
        config = _config_of_test(project.declared, client.sections, options, values, trained)
        _require_valid(config, client.sections, num_sites)
    elif isinstance(client, Sectioned):
        config = _config(project.declared, client.sections, options, values, before)
        _require_valid(config, client.sections, num_sites)
    else:
        # The app of somebody else: it has the settings that it declares, and no others.
        if options.data is not None:
            raise InputError(
                f"--data needs a client of this package, and that of {project.name} is another"
            )
        if options.rounds is not None and "num-server-rounds" not in project.declared:
            raise InputError(
                f"--rounds sets num-server-rounds, which {project.name} does not declare: set its "
                "own key by -c"
            )
        declared = {key: value for key, value in values.items() if key in project.declared}
        config = assign(override(project.declared, options.settings, {}), declared)
    nodes = _node_configs(options, client)
    return Job(project, client, config, num_sites, nodes, options, run_folder.path)


def _require_workers(options: Options) -> None:
    if not 1 <= options.workers <= MOST_WORKERS:
        raise InputError(f"--workers must be from 1 to {MOST_WORKERS}, got {options.workers}")
    if options.workers > 1 and options.engine is Engine.FLOWER:
        raise InputError(
            "--workers belongs to the engine local: Flower's engine trains as many sites at once "
            "as there are cores, or as fit on the GPUs: leave out --workers"
        )


def number_of_sites(path: Path, options: Options, before: Before | None) -> int:
    """Return with how many sites to run: as many as were given, as before, or folders of data."""
    wanted = default_sites(path)
    source = ""
    if options.data is not None:
        wanted = len(site_folders(options.data))
        source = f"the number of folders in {options.data}"
    if before is not None:
        if source and before.sites != wanted:
            raise InputError(
                f"{options.resume} was started with {before.sites} sites, and {options.data} holds "
                f"{wanted} folders: resume with the data of the start"
            )
        wanted = before.sites
        source = f"with which {options.resume} was started"
    if options.sites is None:
        return wanted
    if source and options.sites != wanted:
        raise InputError(f"--sites must be {wanted}, {source}, got {options.sites}")
    if options.sites < 1:
        raise InputError(f"--sites must be at least 1, got {options.sites}")
    return options.sites


def _config(
    declared: UserConfig, own: Sections, options: Options, values: UserConfig, before: Before | None
) -> UserConfig:
    """Return the run config: the app's, that of the run before, ``-c``, and the command's own."""
    config = declared
    folder = RunFolder(Path(str(values["run-dir"])))
    if before is not None:
        config = with_choices_of(folder.path, before.config, config, own)
    config = assign(override(config, options.settings, defaults(own)), values)
    require_known(config, own)
    if place := str(complete(config, own)["init-from"]):
        # Flower's engine runs the server elsewhere, and a run may be resumed from elsewhere.
        config = assign(config, {"init-from": str(Path(place).expanduser().resolve())})
    if before is not None:
        require_same_settings(folder, before.config, config, own)
    return config


def _config_of_test(
    declared: UserConfig,
    own: Sections,
    options: Options,
    values: UserConfig,
    trained: Before | None,
) -> UserConfig:
    """Return the run config of a test: the app's, that of the run which trained, and ``-c``."""
    config = declared
    place = str(values["evaluate"])
    if trained is not None:
        taken = {k: v for k, v in trained.config.items() if k not in {*TRAINING_ONLY, "min-sites"}}
        config = with_choices_of(Path(place), taken, config, own)
    config = override(config, options.settings, defaults(own))
    current = complete(config, own)
    # The app, or the run, may ask for what only a training run does; the whole model travels.
    idle = {key: value for key, value in defaults(own).items() if key in TRAINING_ONLY}
    for key in idle:
        if _is_given(key, options.settings):
            raise InputError(f"fedmed evaluate trains nothing: leave out -c {key}")
    config = assign(config, {k: v for k, v in idle.items() if current[k] != v} | values)
    require_known(config, own)
    if trained is not None:
        _require_same_texts(place, trained.config, complete(config, own), options, own)
    return config


def _require_same_texts(
    place: str, before: UserConfig, now: UserConfig, options: Options, own: Sections
) -> None:
    """Refuse settings of the run that are not taken over from its folder and were not given.

    A stranger may have written the folder, and they could be paths or name what is run.
    """
    first = complete(before, own)
    free = FREE_TO_EVALUATE - {"data"}
    changed = changed_settings(first, now, free)
    missing = {
        key: first[key]
        for key in changed
        if key in first
        and not _is_given(key, options.settings)
        and not (key == "data" and options.data is not None)
    }
    if missing:
        key = min(missing)
        raise InputError(
            f"{key} was {first[key]!r} in the run in {place} and is {now.get(key)!r} now: test "
            f"with the settings of the run, or say otherwise{given_by(missing)}"
        )


def _is_given(key: str, settings: Sequence[str]) -> bool:
    return any(text.partition("=")[0].strip() == key for text in settings)


def _node_configs(options: Options, client: ClientApp) -> list[UserConfig] | None:
    """Return the node config of each hospital; None if all are simulated.

    A hospital that the file names is treated as a real one, with its folder of ``--data``.
    """
    file = options.node_config
    if file is None:
        return None
    if options.data is None or options.engine is Engine.FLOWER:
        raise InputError(
            "--node-config needs --data and the engine local: Flower's simulation engine has one "
            "node config for all"
        )
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as TOML ({error})") from None
    folders = site_folders(options.data)
    names = [folder.name for folder in folders]
    for name, table in tables.items():
        if name not in names or not isinstance(table, dict):
            raise InputError(
                f"{file}: {name!r} must be a table with the name of a hospital of {options.data}: "
                f"{', '.join(names[:20])}"
            )
        try:
            NodeSettings.of(table, client.node_keys if isinstance(client, Sectioned) else ())
        except InputError as error:
            raise InputError(f"{file}, {name}: {error}") from None
    return [
        {"site-name": f.name, "data-dir": str(f.resolve())} | tables[f.name]
        if f.name in tables
        else {}
        for f in folders
    ]


def _require_valid(config: UserConfig, own: Sections, num_sites: int) -> None:
    """Refuse settings that a server or a hospital would refuse."""
    effective(config, own)
    plan = Plan.from_run_config(config)
    if plan.min_sites > num_sites:
        raise setting_error(
            f"min-sites must be at most --sites = {num_sites}, got {plan.min_sites}", "min-sites"
        )


def with_choices_of(
    folder: Path, before: UserConfig, declared: UserConfig, own: Sections = ()
) -> UserConfig:
    """Return an app's run config with the numbers and choices of a run folder.

    A stranger may have written the folder. Of its texts only those are taken whose settings allow
    texts of a given form: any other could be a path, or name what is built or run.

    Raises
    ------
    InputError
        If the app, or the section that a setting belongs to, does not accept its value.
    """
    current = complete(declared, own)
    taken = choices(own)
    values: UserConfig = {}
    try:
        for key in sorted(before.keys() & current.keys()):
            if key in taken or not isinstance(before[key], str):
                value = with_type_of(current[key], before[key], key)
                if value != current[key]:
                    values[key] = value
        config = assign(declared, values)
        filled = expand(config) | {"run-dir": str(folder)}
        for section in (*_RESUMABLE, *own):
            section.from_run_config(filled)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    return config


def execute(job: Job) -> None:
    """Run a job and print its results; the last line gives the outcome and the run folder."""
    planned = job.planned_rounds
    rounds = "" if planned is None else f"{planned} rounds, "
    workers = _workers(job)
    several = "" if workers == 1 else f", {workers} workers"
    engine = f"engine {job.options.engine}{several}"
    console.print(f"{job.project.name}: {job.num_sites} sites, {rounds}{engine}")
    # SIGTERM ends a run as Ctrl-C does, with summary and report.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ[DEFAULT_FOLDER] = str(job.folder.resolve())
    try:
        # The display has a thread on a terminal: workers must be forked before.
        started = nullcontext(1) if workers == 1 else Workers(job.client, workers)
        with started as sites, show_progress(console, planned) as display:
            if job.options.engine is Engine.FLOWER:
                _run_flower(job, display)
            else:
                _run_local(job, display, sites)
    except InputError:
        raise
    except KeyboardInterrupt:
        console.print(f"stopped by the user: {_whereabouts(job)}", style="yellow")
        raise typer.Exit(130) from None
    except Exception as error:
        log.debug("%s", error, exc_info=True)
        text = f"failed: {type(error).__name__}: {error}: {_whereabouts(job)}"
        console.print(text, style="red")
        raise typer.Exit(1) from error
    finally:
        os.environ.pop(DEFAULT_FOLDER, None)
    if not (job.folder / SUMMARY).exists():
        _print_without_summary(job)
        return
    remedy = "run the app in another folder"
    with as_input_error(f"{job.folder / SUMMARY}", remedy):
        summary = read_summary(job.folder, remedy)
        print_results(console, summary)
        mark = f" ({GENERATED})" if summary["generated"] else ""
        rounds = f"{summary['rounds']} rounds in " if "test" in summary else ""
        if job.options.evaluate is not None:
            _require_untrained(summary, job)
            rounds = "nothing was trained, in "
        done = f"{rounds}{summary['seconds']:.0f} s{mark}"
        console.print(f"{summary['status']}: {done}: {job.folder}")


def _require_untrained(summary: Mapping[str, Any], job: Job) -> None:
    """End with exit code 1 if the app has done something else than to test the model."""
    if not summary.get("evaluated"):
        text = f"failed: {job.project.name} cannot test a model: its server does not call federate"
        console.print(f"{text}: {job.folder}", style="red")
        raise typer.Exit(1)


def _print_without_summary(job: Job) -> None:
    """Print the outcome of an app that calls a strategy itself instead of `federate`."""
    if job.options.evaluate is not None:
        _require_untrained({}, job)
    if (job.folder / METRICS).exists():
        console.print(f"report: {write_report(job.folder)}")
        if not _has_trained(job.folder):
            text = f"failed: no site could train, see the lines above: {job.folder}"
            console.print(text, style="red")
            raise typer.Exit(1)
        console.print(f"finished: {job.folder}")
        return
    why = "its strategy is not one of this package, or has a folder of its own"
    console.print(f"finished: nothing was written to {job.folder}: {why}")


def _has_trained(folder: Path) -> bool:
    """Return whether a training reply of a site has counted, by the table of metrics."""
    with (folder / METRICS).open(encoding="utf-8", newline="") as file:
        return any(row[1] == "train" and row[2] != ALL_SITES for row in csv.reader(file))


def _workers(job: Job) -> int:
    """Return how many workers to start: no more than sites, nor than fit on the GPU."""
    wanted = number_of_workers(job.options.workers, job.num_sites)
    if wanted == 1 or job.config.get("device") == "cpu":
        return wanted
    return fitting(job.project.path, job.config, job.num_sites, wanted)


def _run_local(job: Job, display: Bar | Lines, workers: int | Workers) -> None:
    run_local(
        job.project.server_app(),
        job.client,
        job.num_sites,
        run_config=job.config,
        node_configs=job.node_configs,
        app_name=job.project.name,
        on_message=display.on_message,
        verbose=job.options.verbose,
        progress=False,
        workers=workers,
    )


def _run_flower(job: Job, display: Bar | Lines) -> None:
    def on_line(line: str) -> None:
        console.print(line)
        display.on_line(line)

    run_flower(job.project.path.resolve(), job.config, job.num_sites, on_line)


def _whereabouts(job: Job) -> str:
    folder = job.folder
    if RunFolder(folder).checkpoint_file.exists():
        return f"{folder} (go on with --resume {folder}{job.again})"
    return f"{folder}" if folder.exists() else "nothing was written"
