"""The commands `fedmed approve ...` and `fedmed sign`: which apps and settings a hospital runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedmed_flower.cli.tables import console, input_errors, print_table
from fedmed_flower.errors import InputError, shown

if TYPE_CHECKING:
    from fedmed_flower.approval.approvals import Approvals
    from fedmed_flower.approval.bundle import Bundle
    from fedmed_flower.approval.rules import Rule

approve_app = typer.Typer(
    help="Which apps run at this hospital, and with which settings: its own list, in a folder.",
    no_args_is_help=True,
)

# Lines of differences that are shown; --all shows all of them.
_MOST_LINES = 200

_Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="The folder of this hospital's list.")
]
_App = Annotated[
    str,
    typer.Argument(
        metavar="APP",
        help="An app's folder, a .fab file, or the first digits of the SHA-256 of one that a run "
        "has asked for.",
    ),
]
_Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        help="A setting that a run may change: KEY=LOW..HIGH, KEY=VALUE|VALUE or KEY=*. "
        "Repeatable. All else stays as the app has it.",
    ),
]
_Yes = Annotated[bool, typer.Option("--yes", help="Approve without a question.")]
_All = Annotated[bool, typer.Option("--all", help="Show differences of any length.")]


@approve_app.command()
def show(
    folder: _Folder,
    app: Annotated[str | None, typer.Argument(metavar="[APP]", help="Show this one.")] = None,
    everything: _All = False,
) -> None:
    """Show what is approved and what was asked for; of one app, what is in it."""
    from fedmed_flower.approval.approvals import Approvals

    with input_errors():
        approvals = Approvals.load(folder)
        if app is None:
            _print_list(approvals)
            return
        bundle, _ = _bundle(approvals, app)
        _print_bundle(approvals, bundle, everything)


@approve_app.command("app")
def approve(
    folder: _Folder, app: _App, allow: _Allow = None, yes: _Yes = False, everything: _All = False
) -> None:
    """Show what is in an app, and approve it."""
    from fedmed_flower.approval.approvals import Approvals, require_settings

    with input_errors():
        approvals = Approvals.load(folder)
        bundle, content = _bundle(approvals, app)
        rules = _rules(allow)
        require_settings(bundle, rules)
        _print_bundle(approvals, bundle, everything)
        _print_rules(rules)
        if not yes and not typer.confirm(f"Shall {shown(bundle.app)} {shown(bundle.version)} run?"):
            console.print("nothing was changed")
            raise typer.Exit(1)
        approvals.with_bundle(bundle, content, rules).save()
        console.print(f"approved in {folder}: {bundle.digest}")


@approve_app.command()
def signer(
    folder: _Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who signs, such as consortium.")],
    key: Annotated[str, typer.Argument(metavar="KEY", help="The public key: ed25519:...")],
    allow: _Allow = None,
) -> None:
    """Approve all apps that are signed with a key, before they are seen."""
    from fedmed_flower.approval.approvals import Approvals
    from fedmed_flower.secure.identity import fingerprint, key_of

    with input_errors():
        approvals = Approvals.load(folder)
        public = key_of(key)
        rules = _rules(allow)
        approvals.with_signer(name, public, rules).save()
        console.print(f"approved in {folder}: all apps that {shown(name)} signs")
        console.print(f"  fingerprint, to compare by phone: {fingerprint(public)}")
        _print_rules(rules)


@approve_app.command()
def revoke(
    folder: _Folder,
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="First digits of an app's SHA-256, or a signer."),
    ],
) -> None:
    """Take an app or a signer off the list: the next message is refused."""
    from fedmed_flower.approval.approvals import Approvals

    with input_errors():
        approvals, entry = Approvals.load(folder).without(what)
        approvals.save()
        console.print(f"{shown(entry.name)} is not approved any more")


@approve_app.command()
def forget(folder: _Folder) -> None:
    """Delete the apps that runs have asked for and that are not approved."""
    from fedmed_flower.approval.approvals import Approvals

    with input_errors():
        console.print(f"deleted: {Approvals.load(folder).forget()}")


def sign(
    app: Annotated[Path, typer.Argument(metavar="APP", help="The app's folder.")],
    key: Annotated[Path, typer.Option(help="The key file of fedmed keys new.")],
) -> None:
    """Sign an app with a consortium's key, so that hospitals which have approved it run the app."""
    from fedmed_flower.approval.signature import SIGNATURE, sign
    from fedmed_flower.secure.identity import Identity, key_text

    with input_errors():
        identity = Identity.load(key)
        bundle = sign(app, identity)
        console.print(f"{app / SIGNATURE}: signed by {identity.name}")
        console.print(f"  SHA-256 of the bundle: {bundle.digest}")
        console.print("each hospital approves the key once, and compares its fingerprint by phone:")
        public = key_text(identity.public)
        console.print(f"  fedmed approve signer FOLDER {identity.name} {public}")


def _bundle(approvals: Approvals, app: str) -> tuple[Bundle, bytes]:
    from fedmed_flower.approval.bundle import bundle_at

    path = Path(app)
    if path.exists():
        return bundle_at(path)
    asked = [each for each in approvals.asked() if each.bundle.digest.startswith(app.lower())]
    if len(asked) == 1:
        return asked[0].bundle, asked[0].content
    raise InputError(
        f"{app} is no app's folder, no .fab file, and the beginning of {len(asked)} SHA-256 that "
        f"runs have asked for: `fedmed approve show {approvals.folder}` lists them"
    )


def _rules(texts: Iterable[str] | None) -> dict[str, Rule]:
    from fedmed_flower.approval.rules import parse

    rules: dict[str, Rule] = {}
    for text in texts or ():
        key, rule = parse(text)
        if key in rules:
            raise InputError(f"--allow is given twice for {key}")
        rules[key] = rule
    return rules


def _print_list(approvals: Approvals) -> None:
    from fedmed_flower.secure.identity import fingerprint

    table = Table(title=f"What may run here: {approvals.folder}")
    for column in ("approved", "SHA-256 or key", "since", "settings that a run may change"):
        table.add_column(column)
    listed = [(digest[:16], entry) for digest, entry in approvals.bundles.items()]
    listed += [(fingerprint(key), entry) for key, entry in approvals.signers.items()]
    for what, entry in listed:
        table.add_row(shown(entry.name), what, entry.time, _rules_in_words(entry.rules))
    if listed:
        print_table(console, table)
    else:
        console.print(f"{approvals.folder}: nothing is approved, so no app runs here")
    for asked in approvals.asked():
        bundle = asked.bundle
        console.print(
            f"asked for and not approved: {shown(bundle.app)} {shown(bundle.version)}, "
            f"SHA-256 {bundle.digest}"
        )


def _print_bundle(approvals: Approvals, bundle: Bundle, everything: bool) -> None:
    from fedmed_flower.approval.differences import (
        changed_files,
        changed_settings,
        dependencies_of,
        files_of,
    )

    console.print(f"app {shown(bundle.app)}, version {shown(bundle.version)}")
    console.print(f"SHA-256 {bundle.digest}")
    console.print(_signature_in_words(approvals, bundle))
    table = Table(title="Files")
    table.add_column("name")
    table.add_column("bytes", justify="right")
    for name, size in files_of(bundle):
        table.add_row(shown(name), f"{size:,}")
    print_table(console, table)
    if bundle.dependencies:
        table = Table(title="Packages that it asks for")
        table.add_column("asked")
        table.add_column("here")
        for asked, here in dependencies_of(bundle):
            table.add_row(shown(asked), here or "not installed")
        print_table(console, table)
    before = approvals.before(bundle)
    changed = changed_settings({} if before is None else before.declared, bundle.declared)
    table = Table(title="Settings" if before is None else "Settings that differ")
    columns = ("setting", "value") if before is None else ("setting", "approved", "now")
    for column in columns:
        table.add_column(column)
    for key, old, new in changed:
        cells = (key, new) if before is None else (key, old, new)
        table.add_row(*(shown(cell) for cell in cells))
    if changed:
        print_table(console, table)
    if before is None:
        console.print("no version of this app was approved before: read its files")
        return
    console.print(f"differences to {before.version}, SHA-256 {before.digest[:16]}...:")
    lines = list(changed_files(before, bundle)) or ["none: all files are the same"]
    for line in lines if everything else lines[:_MOST_LINES]:
        console.print(f"  {line}")
    if len(lines) > _MOST_LINES and not everything:
        console.print(f"  and {len(lines) - _MOST_LINES} more lines: --all shows them")


def _signature_in_words(approvals: Approvals, bundle: Bundle) -> str:
    from fedmed_flower.approval.signature import signature_of
    from fedmed_flower.secure.identity import fingerprint

    signed = signature_of(bundle)
    if signed is None:
        return "not signed"
    known = approvals.signers.get(signed.public)
    who = f"who is approved as {shown(known.name)}" if known else "who is not approved"
    return f"signed by {shown(signed.name)}, {who}; fingerprint {fingerprint(signed.public)}"


def _print_rules(rules: Mapping[str, Rule]) -> None:
    words = _rules_in_words(rules)
    console.print(f"settings that a run may change: {words or 'none'}")


def _rules_in_words(rules: Mapping[str, Rule]) -> str:
    return ", ".join(f"{shown(key)}={shown(rule.words)}" for key, rule in rules.items())
