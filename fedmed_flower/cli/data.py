"""The commands `fedmed data ...`: what a hospital's folder must look like, and whether it does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from fedmed_flower.cli.findings import (
    problem_of,
    require_writable,
    summary_of,
    table_of,
    write_findings,
)
from fedmed_flower.cli.options import WHAT_THEY_HOLD, Kind
from fedmed_flower.cli.tables import console, input_errors, print_table
from fedmed_flower.errors import InputError, shown

if TYPE_CHECKING:
    from fedmed_flower.data.checks import Finding

data_app = typer.Typer(
    help="Check a hospital's own data; write generated data in the same layout.",
    no_args_is_help=True,
)

_WHOLE = re.compile(r" *-?[0-9]{1,9} *")
_PAIR = re.compile(r"""\S+?=('[^']*'|"[^"]*"|\S+)""")


@data_app.command()
def check(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            help="A folder with dataset.json, a .csv list of images, DICOM files or PLINK files; "
            "with --app, whatever the app reads. Several folders are compared too.",
        ),
    ] = None,
    app: Annotated[
        Path | None,
        typer.Option(help="A Flower app: read the folder as its client does, tables too."),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of classes; masks count the background too.  [default: dataset.json]",
        ),
    ] = None,
    label_values: Annotated[
        str,
        typer.Option(
            metavar="NUMBERS",
            help="The values of masks for class 0, 1, ..., such as 0,255.  [default: the numbers "
            "of the classes]",
        ),
    ] = "",
    empty_masks: Annotated[
        bool, typer.Option("--empty-masks", help="A mask may hold the background alone.")
    ] = False,
    series: Annotated[
        str,
        typer.Option(
            metavar="RULES",
            help="Which DICOM series are images or channels, as the run config has it: "
            '"modality=CT slices>=40".',
        ),
    ] = "",
    findings: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Columns of findings in place of the column label, such as edema,effusion.",
        ),
    ] = "",
    bags: Annotated[
        bool, typer.Option("--bags", help="An image is a bag: a folder, or a list, of patches.")
    ] = False,
    names: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="The classes 1, 2, ... of masks, by which DICOM SEG and RTSTRUCT are read, such "
            "as liver,spleen.",
        ),
    ] = "",
    regions: Annotated[
        str,
        typer.Option(
            metavar="REGIONS",
            help="Regions that may overlap, with the values of masks in each: "
            '"WT=1,2,4; TC=1,4; ET=4".',
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Write what was found in each image: FILE.csv or FILE.json."),
    ] = None,
    node_config: Annotated[
        str | None,
        typer.Option(help='The node config of the SuperNode: "KEY=VALUE KEY=VALUE ...".'),
    ] = None,
) -> None:
    """Read all that a hospital's folder holds and list what cannot be used.

    With --app several folders are compared as well: who differs from all others as another unit or
    a typing error would make it. Nothing leaves this machine, and nothing is written but --out.
    Without a folder only the node config is checked.
    """
    with input_errors():
        if node_config is not None:
            _check_node(node_config)
            console.print("the node config is valid")
        if not folders:
            if node_config is None or app is not None or out is not None:
                raise InputError("give a folder, --node-config, or both")
            return
        if out is not None:
            require_writable(out)
        said = {
            f"--classes {classes}": classes is not None,
            f"--label-values {label_values}": label_values,
            "--empty-masks": empty_masks,
            f"--series {series}": series,
            f"--findings {findings}": findings,
            "--bags": bags,
            f"--names {names}": names,
            f"--regions {regions}": regions,
        }
        options = [option for option, given in said.items() if given]
        if app is not None:
            if options:
                raise InputError(f"{options[0]} does not go with --app: the app says it")
            _check_by_app(app, [folder.expanduser() for folder in folders], out)
            return
        if len(folders) > 1:
            raise InputError(
                f"{len(folders)} folders are compared as an app reads them: give --app, or one "
                "folder"
            )
        folder = folders[0].expanduser()
        if _is_genotypes(folder):
            if out is not None:
                raise InputError(f"--out lists images, and {folder} holds genotypes")
            if options:
                raise InputError(f"{options[0]} is for images, and {folder} holds genotypes")
            _check_genotypes(folder)
            return
        _require_together(options)
        found = _look_at_images(
            folder,
            classes,
            _numbers(label_values),
            empty_masks=empty_masks,
            series=series,
            findings=_names("--findings", findings),
            bags=bags,
            names=_names("--names", names),
            regions=_regions(regions),
        )
        if out is not None:
            write_findings(out, [("", finding) for finding in found])
    _print_problems([problem_of(finding) for finding in found if finding.problem is not None])


def _require_together(options: Sequence[str]) -> None:
    """Raise `InputError` if options say of labels what cannot be true of the same."""
    given = {option.partition(" ")[0]: option for option in options}
    of_masks = ("--label-values", "--empty-masks", "--names", "--regions")
    excluded = {
        "--findings": ("--classes", "--bags", *of_masks),
        "--bags": of_masks,
        "--regions": ("--classes", "--label-values", "--names"),
    }
    for first, others in excluded.items():
        if first in given and (wrong := next((one for one in others if one in given), "")):
            raise InputError(
                f"{given[wrong]} does not go with {given[first]}: they say what labels are in two "
                "ways, so leave one of them out"
            )


def _look_at_images(
    folder: Path, classes: int | None, values: Sequence[int], **options: Any
) -> list[Finding]:
    """Read the images of a folder, print what they are, and return what was found."""
    # Imports MONAI, for which the other commands need not wait.
    from fedmed_flower.data.folders import check_folder

    with console.status(Text(shown(f"reading {folder}"))):
        findings = check_folder(folder, None, classes, values, **options)
    images = [finding for finding in findings if finding.image]
    print_table(console, table_of(images, folder))
    for line in summary_of(images, classes or len(values) or None):
        console.print(line)
    for finding in findings:
        if finding.note:
            console.print(finding.note)
    return findings


def _numbers(text: str) -> list[int]:
    """Return the whole numbers of --label-values, one a class."""
    if not text:
        return []
    parts = text.split(",")
    numbers = [int(part) for part in parts if _WHOLE.fullmatch(part)]
    if not 1 < len({*numbers}) == len(parts):
        raise InputError(
            "--label-values must be different whole numbers, one a class, such as 0,255; got "
            f"{text!r}"
        )
    return numbers


def _names(option: str, text: str) -> list[str]:
    """Return the different names of an option, separated by commas."""
    names = [part.strip() for part in text.split(",")] if text else []
    if "" in names or len({name.casefold() for name in names}) < len(names):
        raise InputError(
            f"{option} must be different names with commas between them, got {shown(text, 200)!r}"
        )
    return names


def _regions(text: str) -> dict[str, tuple[int, ...]]:
    """Return the regions of --regions, with the values of masks in each."""
    regions: dict[str, tuple[int, ...]] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, _, values = part.partition("=")
        numbers = values.split(",")
        if not name.strip() or name.strip() in regions or not all(map(_WHOLE.fullmatch, numbers)):
            raise InputError(
                "--regions must be different regions, each with values of masks, such as "
                f'"WT=1,2,4; TC=1,4; ET=4"; got {shown(text, 200)!r}'
            )
        regions[name.strip()] = tuple(map(int, numbers))
    return regions


def _print_problems(problems: Sequence[str], code: int = 1) -> None:
    _print_red(problems)
    if problems:
        console.print(f"{len(problems)} problem{'s' * (len(problems) > 1)}", style="red")
        raise typer.Exit(code)
    console.print("no problems")


def _print_red(problems: Sequence[str]) -> None:
    for problem in problems:
        console.print(problem, style="red")


@data_app.command()
def phantoms(
    folder: Annotated[Path, typer.Argument(help="The hospitals' folders are written into it.")],
    names: Annotated[list[str], typer.Argument(help="The hospitals.")],
    kind: Annotated[Kind, typer.Option("--for", help=f"{WHAT_THEY_HOLD}.")],
) -> None:
    """Write generated patients of hospitals as files, as an app of `fedmed new` reads them."""
    from fedmed_flower.data.phantom_folders import write_phantoms

    with input_errors():
        folders = [folder / name for name in names]
        for path in folders:
            # A name must not lead out of the folder.
            if path.parent != folder or path.name == "..":
                raise InputError(f"a hospital's name must be that of one folder, got {path.name!r}")
            if path.exists():
                raise InputError(f"{path} exists already: give another folder or name")
        for index, path in enumerate(folders):
            write_phantoms(path, kind, index)
            files = sum(entry.is_file() for entry in path.rglob("*"))
            console.print(f"{path}: {files} files")


@data_app.command(name="forget-cache")
def forget_cache(
    folder: Annotated[
        Path | None,
        typer.Argument(help="What image-cache names.  [default: the one in the user's cache]"),
    ] = None,
) -> None:
    """Delete all images that a hospital keeps on its disk for later messages."""
    from fedmed_flower.clients.image_store import folder_of, forget

    with input_errors():
        place = folder_of("" if folder is None else str(folder.absolute()))
        deleted = forget(place)
    console.print(
        f"{deleted.entries} entries deleted from {place}, {deleted.bytes / 1e6:,.1f} MB",
        markup=False,
    )
    if place.exists():
        console.print(f"{place} stays, since it holds other files", markup=False)


def _check_by_app(app: Path, folders: Sequence[Path], out: Path | None) -> None:
    """Read hospitals' folders by an app's client, and print what that had to handle.

    Raises
    ------
    InputError
        If there is one folder and it cannot be used at all; if ``out`` is given, and the app's
        client reads no images.
    typer.Exit
        With code 1 if there was anything, 2 if one of several folders cannot be used.
    """
    from fedmed_flower.cli.checking import check_by_app, compare

    found = check_by_app(app, folders)
    several = len(found) > 1
    problems = []
    for name, checked in found.items():
        start = f"{name}: " if several else ""
        for line in checked.lines:
            console.print(f"{start}{line}")
        problems += [f"{start}{problem}" for problem in checked.problems]
        if several and checked.refused:
            problems.append(f"{start}cannot be used: {checked.refused}")
    refused = [checked.refused for checked in found.values() if checked.refused]
    if out is not None:
        listed = [
            (name if several else "", finding)
            for name, checked in found.items()
            for finding in checked.findings
        ]
        if listed:
            write_findings(out, listed)
        elif not refused:
            raise InputError(f"--out lists images, and by {app} none was read")
    if several:
        problems += compare(found)
    elif refused:
        _print_red(problems)
        raise InputError(refused[0])
    _print_problems(problems, code=2 if refused else 1)


def _is_genotypes(folder: Path) -> bool:
    """Return whether a folder holds genotype files, and no list of images."""
    from fedmed_flower.data.datalist import DATALIST, DATASET
    from fedmed_flower.genomics.checks import filesets

    listed = any((folder / name).is_file() for name in (DATASET, DATALIST))
    return not listed and bool(filesets(folder))


def _check_genotypes(folder: Path) -> None:
    """Print what the genotype files of a folder hold; raise `typer.Exit` if there are problems."""
    from fedmed_flower.genomics.checks import check_files, filesets

    problems = []
    for prefix in filesets(folder):
        found = check_files(prefix)
        for line in found.lines:
            console.print(line)
        problems += found.problems
    _print_problems(problems)


def _check_node(text: str) -> None:
    """Raise `InputError` if a hospital would refuse this node config.

    Node keys that an app adds are refused too: only the app's client knows them.
    """
    from flwr.app import Context, RecordDict
    from flwr.common.config import parse_config_args

    from fedmed_flower.clients.image_store import open_store
    from fedmed_flower.clients.storage import output_folder
    from fedmed_flower.data.site import Site
    from fedmed_flower.privacy.ledger import Ledger
    from fedmed_flower.privacy.patient import ledger_path
    from fedmed_flower.settings.node import NodeSettings

    # Flower ignores text that is no pair.
    if rest := _PAIR.sub("", text).strip():
        raise InputError(f"the node config must be KEY=VALUE KEY=VALUE ..., got {rest!r} in it")
    try:
        config = parse_config_args([text])
    except Exception as error:  # Flower's parser raises several kinds of errors.
        raise InputError(
            f"the node config cannot be read, got {text!r}: write a text in quotes, as in "
            'site-name="north"'
        ) from error
    settings = NodeSettings.of(config)
    context = Context(0, 0, config, RecordDict(), {})
    site = Site.from_context(context)
    output_folder(context, site, {})
    open_store(settings, site)
    path = ledger_path(context, site, {})
    if path.exists() or "ledger" in config:
        Ledger(path, read_only=True).split_key()
