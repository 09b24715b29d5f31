"""`fedmed run` and `fedmed demo`: run an app with simulated hospitals and print the results."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from flwr.app import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.object_ref import load_app
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedmed_flower.cli.tables import console, input_errors, print_results
from fedmed_flower.data.download import SourceUnavailable
from fedmed_flower.data.site import GENERATED
from fedmed_flower.data.sources import load_dataset
from fedmed_flower.engines.flower import run_flower
from fedmed_flower.engines.local import run_local
from fedmed_flower.engines.project import default_sites, load_project
from fedmed_flower.errors import InputError
from fedmed_flower.files import as_input_error, read_object
from fedmed_flower.runs.experiment import read_before, require_same_settings
from fedmed_flower.server.run_folder import CONFIG, SUMMARY, RunFolder
from fedmed_flower.settings.plan import Plan
from fedmed_flower.settings.privacy import PrivacySettings
from fedmed_flower.settings.section import Section, override, with_type_of
from fedmed_flower.settings.tabular import TabularSettings
from fedmed_flower.settings.training import Settings

log = logging.getLogger("flwr.fedmed")


class Engine(StrEnum):
    """Where the sites run."""

    LOCAL = "local"
    FLOWER = "flower"


# A resumed run takes these texts of its folder, besides numbers and booleans. Each is one of a few
# names, which the section that it belongs to checks.
CHOICES = {
    *("optimizer", "schedule", "device", "privacy", "patient-records"),
    *("preparation", "survival-loss", "tabular-network"),
}


@dataclass(frozen=True)
class _Job:
    """A run that has been checked and can start."""

    name: str
    path: Path
    references: tuple[str, str]
    config: UserConfig
    num_sites: int
    engine: Engine
    folder: Path
    # The options "-c key=value" of the command line, to be repeated when the run is resumed.
    set_options: str


def run(
    path: Annotated[Path, typer.Argument(metavar="APP", help="Folder of the Flower app.")],
    sites: Annotated[
        int | None, typer.Option(help="Number of hospitals.  [default: the app's number, or 5]")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Overrides num-server-rounds.")] = None,
    config: Annotated[
        list[str] | None, typer.Option("--config", "-c", help="A setting of the app: key=value.")
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="local: in this process. flower: Flower's simulation engine.")
    ] = Engine.LOCAL,
    out: Annotated[
        Path | None, typer.Option(help="Run folder.  [default: runs/APP-date-time]")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
) -> None:
    """Run a Flower app with simulated hospitals."""
    with input_errors():
        job = _prepare(path, sites, rounds, config or [], engine, out, resume)
        _execute(job)


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Run folder.  [default: runs/pneumonia-date-time]")
    ] = None,
) -> None:
    """Train a chest X-ray classifier at five simulated hospitals, and write a report."""
    with input_errors():
        settings = ["baselines=true"]
        try:
            load_dataset("pneumoniamnist", timeout=10)
        except SourceUnavailable as error:
            console.print(str(error), style="yellow")
            console.print(f"The demo goes on with {GENERATED}.", style="yellow")
            settings.append("dataset=phantoms")
        job = _prepare(_examples() / "pneumonia", None, None, settings, Engine.LOCAL, out, None)
        _execute(job)


def _prepare(
    path: Path,
    sites: int | None,
    rounds: int | None,
    settings: list[str],
    engine: Engine,
    out: Path | None,
    resume: Path | None,
) -> _Job:
    """Check all that can be checked before the run starts and anything is written."""
    if out is not None and resume is not None:
        raise InputError("--out and --resume exclude each other: --resume DIR continues in DIR")
    name, defaults, references = load_project(path)
    before = None
    if resume is not None:
        before = read_before(RunFolder(resume))
        defaults = with_choices_of(resume, before.config, defaults)
        if sites not in (None, before.sites):
            raise InputError(
                f"--sites must be {before.sites}, with which {resume} was started, got {sites}"
            )
        sites = before.sites
    run_folder = RunFolder.named(resume or out, name)
    folder = run_folder.path
    if resume is None:
        run_folder.require_unused()
    for key, option in (("run-dir", "--out"), ("resume", "--resume")):
        if any(text.partition("=")[0].strip() == key for text in settings):
            raise InputError(f"fedmed run sets {key} itself: give {option} instead of -c {key}")
    set_options = "".join(f" -c {shlex.quote(text)}" for text in settings)
    config = override(defaults, settings)
    config |= {} if rounds is None else {"num-server-rounds": rounds}
    config |= {"run-dir": str(folder), "resume": resume is not None}
    if before is not None:
        require_same_settings(RunFolder(folder), before.config, config)
    num_sites = default_sites(path) if sites is None else sites
    if num_sites < 1:
        raise InputError(f"--sites must be at least 1, got {num_sites}")
    plan = Plan.from_run_config(config)
    if plan.min_sites > num_sites:
        raise InputError(f"min-sites must be at most --sites = {num_sites}, got {plan.min_sites}")
    Settings.from_run_config(config)
    PrivacySettings.from_run_config(config)
    return _Job(name, path.resolve(), references, config, num_sites, engine, folder, set_options)


def with_choices_of(folder: Path, before: UserConfig, defaults: UserConfig) -> UserConfig:
    """Return an app's default settings, replaced by the numbers and choices of a run folder.

    A stranger may have written the folder. Of its texts only those in `CHOICES` are taken: any
    other could be a path, or name what is built or run.

    Raises
    ------
    InputError
        If the app, or the section that a setting belongs to, does not accept its value.
    """
    from fedmed_flower.settings.survival import SurvivalSettings
    from fedmed_flower.settings.trees import TreeSettings

    sections: list[type[Section]]
    sections = [Plan, Settings, PrivacySettings, TabularSettings, SurvivalSettings, TreeSettings]
    if "cache-gigabytes" in defaults:
        # Imports MONAI, which takes seconds; apps without images need not wait for it.
        from fedmed_flower.settings.imaging import ImagingSettings

        sections.append(ImagingSettings)
    config = dict(defaults)
    try:
        for key in before.keys() & defaults.keys():
            if key in CHOICES or not isinstance(before[key], str):
                config[key] = with_type_of(defaults[key], before[key], key)
        for section in sections:
            section.from_run_config(config | {"run-dir": str(folder)})
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    return config


def _examples() -> Path:
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "examples", package / "examples"):
        if (folder / "pneumonia" / "pyproject.toml").is_file():
            return folder
    raise InputError("the example apps are not installed: run fedmed demo from a checkout")


def _execute(job: _Job) -> None:
    """Run a job and print its results; the last line gives the outcome and the run folder."""
    rounds = job.config["num-server-rounds"]
    console.print(f"{job.name}: {job.num_sites} sites, {rounds} rounds, engine {job.engine}")
    # SIGTERM ends a run as Ctrl-C does, with summary and report.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if job.engine is Engine.FLOWER:
            run_flower(job.path, job.config, job.num_sites, sys.stdout)
        else:
            _run_local(job)
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
    if not (job.folder / SUMMARY).exists():
        # An app that calls a strategy itself instead of `federate` writes no summary.
        outcome = job.folder if job.folder.exists() else "the app wrote no run folder"
        console.print(f"finished: {outcome}")
        return
    remedy = "run the app in another folder"
    with as_input_error(f"{job.folder / SUMMARY}", remedy):
        summary = read_object(job.folder, SUMMARY, remedy)
        print_results(console, summary)
        console.print(f"report: {job.folder / 'report.html'}")
        mark = f" ({GENERATED})" if summary["generated"] else ""
        rounds = f"{summary['rounds']} rounds in " if "test" in summary else ""
        done = f"{rounds}{summary['seconds']:.0f} s{mark}"
        console.print(f"{summary['status']}: {done}: {job.folder}")


def _run_local(job: _Job) -> None:
    server, client = (load_app(reference, InputError, job.path) for reference in job.references)
    for component, kind, reference in (
        (server, ServerApp, job.references[0]),
        (client, ClientApp, job.references[1]),
    ):
        if not isinstance(component, kind):
            raise InputError(f"{reference} is a {type(component).__name__}, not a {kind.__name__}")
    with _progress() as on_reply:
        run_local(
            server,
            client,
            job.num_sites,
            run_config=job.config,
            app_name=job.name,
            on_reply=on_reply,
        )


def _whereabouts(job: _Job) -> str:
    folder = job.folder
    if RunFolder(folder).checkpoint_file.exists():
        return f"{folder} (go on with --resume {folder}{job.set_options})"
    return f"{folder}" if folder.exists() else "nothing was written"


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show the rounds as lines and the sites of the current phase as a bar."""
    bar = Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("sites"),
        TimeElapsedColumn(),
        console=console,
        # A debugger's prompt inside a client must reach the terminal.
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
    )
    task = bar.add_task("connect", total=None)

    def on_reply(message_type: str, done: int, sent: int) -> None:
        bar.update(task, description=message_type.partition(".")[0], completed=done, total=sent)
        bar.refresh()

    with bar:
        yield on_reply
