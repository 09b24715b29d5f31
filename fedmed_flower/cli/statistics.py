"""The command `fedmed statistics`: describe the patients of an app's hospitals."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedmed_flower.cli.options import Options
from fedmed_flower.cli.tables import console, input_errors, print_table
from fedmed_flower.errors import InputError
from fedmed_flower.statistics.request import KINDS, Request, Survival, parse_filter

if TYPE_CHECKING:
    from flwr.app import Context

_Names = list[str] | None
# Drift by windows has thousands of rows.
_MOST_ROWS = 60


def statistics(
    path: Annotated[Path, typer.Argument(metavar="APP", help="Folder of the Flower app.")],
    sites: Annotated[
        int | None, typer.Option(min=1, help="Number of hospitals.  [default: the app's, or 5]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A folder with one folder for each simulated hospital, named after it."),
    ] = None,
    column: Annotated[_Names, typer.Option(help="Describe this column.  [default: all]")] = None,
    where: Annotated[
        _Names, typer.Option(help='Count only rows that meet a condition such as "age>=50".')
    ] = None,
    by: Annotated[str, typer.Option(help="Make one table for each value of this column.")] = "",
    categorical: Annotated[
        _Names, typer.Option(help="Treat the numbers of this column as codes.")
    ] = None,
    whole: Annotated[
        _Names, typer.Option(help="This column holds whole numbers, such as a count of visits.")
    ] = None,
    quantiles: Annotated[bool, typer.Option("--quantiles", help="Medians and quartiles.")] = False,
    resolution: Annotated[
        _Names, typer.Option(help="Width of the cells that quantiles are read off: COLUMN=WIDTH.")
    ] = None,
    bounds: Annotated[
        _Names, typer.Option("--range", help="Declared range, for noise: COLUMN=LOW,HIGH.")
    ] = None,
    categories: Annotated[
        _Names, typer.Option(help="Declared categories, for noise: COLUMN=A,B.")
    ] = None,
    correlations: Annotated[
        bool, typer.Option("--correlations", help="Correlations of all pairs of columns.")
    ] = False,
    table: Annotated[
        _Names, typer.Option(help="Cross-tabulate two categorical columns: A,B.")
    ] = None,
    survival: Annotated[str, typer.Option(metavar="TIME,EVENT,HORIZON,WIDTH")] = "",
    drift_by: Annotated[
        str, typer.Option(help="Compare values of a column, or windows (--window), with the first.")
    ] = "",
    window: Annotated[float, typer.Option(help="Width of the windows; in days for dates.")] = 0.0,
    drift_sites: Annotated[
        bool, typer.Option("--drift-sites", help="Compare each hospital with all others.")
    ] = False,
    weekly: Annotated[str, typer.Option(help="Count rows by the week of this column.")] = "",
    alert: Annotated[
        str,
        typer.Option(
            help="Alarm for the weekly counts: c2, cusum, or farrington, which knows seasons."
        ),
    ] = "c2",
    epsilon: Annotated[float, typer.Option(help="Answer with noise; charged to ledgers.")] = 0.0,
    delta: Annotated[float, typer.Option(help="Delta of epsilon.")] = 1e-5,
    out: Annotated[
        Path | None, typer.Option(help="Run folder.  [default: runs/APP-statistics-date-time]")
    ] = None,
    config: Annotated[
        _Names, typer.Option("--config", "-c", help="A setting of the app: key=value.")
    ] = None,
) -> None:
    """Describe the patients of all hospitals; no row leaves a hospital."""
    # Loading torch and Flower takes seconds, which `fedmed --help` need not wait for.
    from fedmed_flower.cli.job import number_of_sites
    from fedmed_flower.server.run_folder import read_summary

    with input_errors():
        if drift_by and (by or drift_sites):
            raise InputError("--drift-by excludes --by and --drift-sites")
        drift = "sites" if drift_sites else ""
        if drift_by:
            drift = "groups"
        chosen = {"histograms": quantiles or bool(drift), "correlations": correlations}
        request = Request(
            columns=tuple(column or ()),
            where=tuple(map(parse_filter, where or ())),
            by=by or drift_by,
            by_width=window,
            kinds=tuple(kind for kind in KINDS if chosen.get(kind, True)),
            categorical=tuple(categorical or ()),
            whole=tuple(whole or ()),
            resolutions={name: _number(text) for name, text in _pairs(resolution, "resolution")},
            ranges={name: _range(text) for name, text in _pairs(bounds, "range")},
            categories={
                name: tuple(text.split(",")) for name, text in _pairs(categories, "categories")
            },
            pairs=tuple(_two(text) for text in table or ()),
            survival=_survival(survival) if survival else None,
            weekly=weekly,
            epsilon=epsilon,
            delta=delta,
        )
        if data is not None and any(
            text.partition("=")[0].strip() == "data" for text in config or ()
        ):
            raise InputError("data is given twice: by --data and by -c data=")
        options = Options(sites=sites, settings=config or [], out=out, data=data)
        count = number_of_sites(path, options, None)
        folder = _run(path, options, count, request, drift, alert)
        summary = read_summary(folder, "run the survey again")
    for entry in summary["tables"]:
        _print_table(entry)
    console.print(f"report: {folder / 'report.html'}")
    mark = f" ({summary['data']})" if summary["generated"] else ""
    hospitals = summary.get("members") or summary["sites"]
    answered = f"{len(hospitals)} of {count} hospitals{mark}"
    console.print(f"{summary['status']}: {answered}: {folder}")


def _run(
    path: Path, options: Options, sites: int, request: Request, drift: str, alert: str
) -> Path:
    from flwr.serverapp import Grid, ServerApp

    from fedmed_flower.engines.local import run_local
    from fedmed_flower.engines.project import load_project
    from fedmed_flower.server.run_folder import RunFolder
    from fedmed_flower.settings.registry import Sectioned, defaults
    from fedmed_flower.settings.text import SETTINGS, expand, override
    from fedmed_flower.statistics.server import survey

    project = load_project(path)
    run_folder = RunFolder.named(options.out, f"{project.name}-statistics")
    folder = run_folder.path
    run_folder.require_unused()
    client = project.client_app()
    own = client.sections if isinstance(client, Sectioned) else ()
    declared = override({SETTINGS: "", **project.declared}, options.settings, defaults(own))
    run_config = expand(declared) | {"run-dir": str(folder)}
    command = [str(path), "--sites", str(sites)]
    if options.data is not None:
        run_config["data"] = str(options.data.expanduser().resolve())
        command += ["--data", str(options.data)]
    command += [text for setting in options.settings for text in ("-c", setting)]
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        survey(grid, context, request, drift=drift, alert=alert, sections=own, command=command)

    run_local(server, client, sites, run_config=run_config, app_name=project.name)
    return folder


def _pairs(texts: Iterable[str] | None, option: str) -> list[tuple[str, str]]:
    pairs = []
    for text in texts or ():
        name, separator, value = text.partition("=")
        if not (separator and name.strip() and value.strip()):
            raise InputError(f"--{option} takes COLUMN=VALUE, got {text!r}")
        pairs.append((name.strip(), value.strip()))
    return pairs


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"expected a number, got {text!r}") from None


def _range(text: str) -> tuple[float, float]:
    low, separator, high = text.partition(",")
    if not separator:
        raise InputError(f"--range takes COLUMN=LOW,HIGH, got {text!r}")
    return _number(low), _number(high)


def _two(text: str) -> tuple[str, str]:
    one, separator, other = (part.strip() for part in text.partition(","))
    if not (separator and one and other):
        raise InputError(f"--table takes two columns A,B, got {text!r}")
    return one, other


def _survival(text: str) -> Survival:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4:
        raise InputError(f"--survival takes TIME,EVENT,HORIZON,WIDTH, got {text!r}")
    return Survival(parts[0], parts[1], _number(parts[2]), _number(parts[3]))


def _print_table(entry: dict[str, Any]) -> None:
    from fedmed_flower.statistics.table import AGAIN, APART, STANDS_OUT

    table = Table(title=entry["title"], title_justify="left")
    words = entry["title"] in ("Withheld", AGAIN, APART, "No answer", STANDS_OUT, "Drift")
    for index, name in enumerate(entry["head"]):
        justify: Any = "left" if index == 0 or words else "right"
        table.add_column(name, justify=justify, overflow="fold")
    for row in entry["rows"][:_MOST_ROWS]:
        table.add_row(*row)
    print_table(console, table)
    left = len(entry["rows"]) - _MOST_ROWS
    if left > 0:
        console.print(f"{left} more row{'s' * (left > 1)} of this table in report.html")
