"""The commands `fedmed data ...`: look at a hospital's folder before it takes part."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from fedmed_flower.cli.tables import console, input_errors, print_table
from fedmed_flower.errors import InputError, shown

if TYPE_CHECKING:
    from fedmed_flower.data.checks import Finding

data_app = typer.Typer(help="Look at a hospital's own data.", no_args_is_help=True)

# A mask that was taken for an image, or the reverse, may hold thousands of values.
_MOST_VALUES = 12
_PAIR = re.compile(r"""\S+?=('[^']*'|"[^"]*"|\S+)""")


@data_app.command()
def check(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A folder with dataset.json, a .csv list of images, or DICOM files."),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of classes; in masks with the background.  [default: dataset.json]"
        ),
    ] = None,
    node_config: Annotated[
        str | None,
        typer.Option(help='What the SuperNode will be started with: "KEY=VALUE KEY=VALUE ...".'),
    ] = None,
) -> None:
    """Read all images and masks of a folder and name what cannot be used.

    For a hospital without images leave the folder out: the node config alone is checked.
    """
    # With MONAI, whose import the other commands need not wait for.
    from fedmed_flower.data.checks import check_folder

    with input_errors():
        if node_config is not None:
            _check_node(node_config)
            console.print("the node config is understood")
        if folder is None:
            if node_config is None:
                raise InputError("give a folder, --node-config, or both")
            return
        with console.status(Text(shown(f"reading {folder}"))):
            findings = check_folder(folder, num_classes=classes)
    images = [one for one in findings if one.image]
    _print_table(images, folder.expanduser())
    _print_summary(images)
    problems = [_problem(one) for one in findings if one.problem is not None]
    for problem in problems:
        console.print(problem, style="red")
    if problems:
        console.print(f"{len(problems)} problem{'s' * (len(problems) > 1)}", style="red")
        raise typer.Exit(1)
    console.print("no problems")


def _check_node(text: str) -> None:
    """Raise `InputError` where a hospital would refuse its node config.

    Keys of an app's own, which its client names, are not known here.
    """
    from flwr.app import Context, RecordDict
    from flwr.common.config import parse_config_args

    from fedmed_flower.clients.storage import own_folder
    from fedmed_flower.data.site import Site
    from fedmed_flower.privacy.ledger import Ledger
    from fedmed_flower.privacy.patient import ledger_path
    from fedmed_flower.settings.node import NodeSettings

    # Flower passes over what is no pair.
    if rest := _PAIR.sub("", text).strip():
        raise InputError(f"the node config must be KEY=VALUE KEY=VALUE ..., got {rest!r} in it")
    try:
        config = parse_config_args([text])
    except Exception as error:  # Of Flower's parser, in several kinds.
        raise InputError(
            'the node config cannot be read: a text needs quotes, as in site-name="north", got '
            f"{text!r}"
        ) from error
    NodeSettings.of(config)
    context = Context(0, 0, config, RecordDict(), {})
    site = Site.from_context(context)
    own_folder(context, site, {})
    path = ledger_path(context, site, {})
    if path.exists() or "ledger" in config:
        Ledger(path, read_only=True).split_key()


def _print_table(images: Sequence[Finding], folder: Path) -> None:
    columns = {
        "patient": [one.patient for one in images],
        "image": [one.image.replace(f"{folder}/", "") for one in images],
        "split": [one.split for one in images],
        "shape": [_times(one.shape) for one in images],
        "spacing (mm)": [_times(one.spacing) for one in images],
        "axes": [one.orientation for one in images],
        "values": ["" if one.low is None else f"{one.low:g} to {one.high:g}" for one in images],
        "label": [_label(one.label) for one in images],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in filled:
        table.add_column(name, overflow="fold")
    for one, *cells in zip(images, *filled.values(), strict=True):
        table.add_row(*cells, style="red" if one.problem else None)
    print_table(console, table)


def _print_summary(images: Sequence[Finding]) -> None:
    splits = Counter(one.split for one in images if one.split)
    parts = ", ".join(f"{name} {count}" for name, count in splits.items())
    console.print(
        f"{len(images)} images of {len({one.patient for one in images})} patients"
        + (f": {parts}" if parts else "")
    )
    read = [one for one in images if one.shape]
    for name, setting, found in (
        ("spacings", "spacing", [_times(one.spacing) for one in read]),
        ("orientations", "orientation", [one.orientation for one in read if one.orientation]),
    ):
        if not found:
            continue
        kinds = Counter(found).most_common()
        listed = ", ".join(f"{kind} ({count})" for kind, count in kinds[:5])
        more = f" and {len(kinds) - 5} more" if len(kinds) > 5 else ""
        hint = f"; {setting} in the run config brings them to one" if len(kinds) > 1 else ""
        console.print(f"{name}: {listed}{more}{hint}")


def _problem(one: Finding) -> str:
    return f"patient {one.patient}: {one.problem}" if one.image else f"{one.problem}"


def _label(label: int | tuple[int, ...] | None) -> str:
    if not isinstance(label, tuple):
        return "" if label is None else str(label)
    more = ", ..." if len(label) > _MOST_VALUES else ""
    return ", ".join(map(str, label[:_MOST_VALUES])) + more


def _times(values: Iterable[Any]) -> str:
    return "x".join(f"{value:g}" for value in values)
