"""What a bundle holds, and how it differs from one approved before, in lines of text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from flwr.app import UserConfig

from fedmed_flower.approval.bundle import Bundle
from fedmed_flower.approval.rules import changed
from fedmed_flower.approval.signature import SIGNATURE
from fedmed_flower.errors import shown
from fedmed_flower.settings.text import expand, text_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def files_of(bundle: Bundle) -> list[tuple[str, int]]:
    """Return name and bytes of each file, in the order of names."""
    return sorted((name, len(content)) for name, content in bundle.files.items())


def dependencies_of(bundle: Bundle) -> list[tuple[str, str]]:
    """Return each package that a bundle asks for, and its version here; empty if it is not here."""
    found = []
    for text in bundle.dependencies:
        name = _NAME.match(text)
        try:
            here = "" if name is None else version(name[0])
        except PackageNotFoundError:
            here = ""
        found.append((text, here))
    return found


def changed_settings(before: UserConfig, after: UserConfig) -> list[tuple[str, str, str]]:
    """Return key, value before and value after of each setting that differs."""
    before, after = _expanded(before), _expanded(after)
    return [(key, _text(before, key), _text(after, key)) for key in changed(before, after)]


def changed_files(before: Bundle, after: Bundle) -> Iterator[str]:
    """Yield in lines how the files differ, as ``diff -u`` shows it; signatures are left out."""
    for name in sorted({*before.files, *after.files} - {SIGNATURE}):
        old = before.files.get(name)
        new = after.files.get(name)
        if old == new:
            continue
        one, other = _lines(old), _lines(new)
        if one is None or other is None:
            yield f"{shown(name)}: differs, and is no text"
            continue
        title = shown(name)
        nothing = "/dev/null"
        difference = difflib.unified_diff(
            one,
            other,
            nothing if old is None else title,
            nothing if new is None else title,
            lineterm="",
        )
        yield from (shown(line) for line in difference)


def _lines(content: bytes | None) -> list[str] | None:
    """Return the lines of a file; None if it is no text."""
    try:
        return (content or b"").decode().splitlines()
    except UnicodeDecodeError:
        return None


def _expanded(config: UserConfig) -> UserConfig:
    try:
        return expand(config)
    except ValueError:
        return config


def _text(config: UserConfig, key: str) -> str:
    return text_of(config[key]) if key in config else ""
