"""Markdown (CommonMark with GitHub's tables) of texts that a stranger may have written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from fedmed_flower.errors import shown
from fedmed_flower.reports.frame import DASH

_MOST_LETTERS = 300
# All that begins or ends markup within a line, also a template's or a formula's.
_MARKUP = re.compile(r"[\\`*_\[\]{}#|~$@]")
# Bare addresses become links.
_LINKS = re.compile(r"(?i)(?<=www)\.|:(?=\S)")


def plain(value: Any) -> str:
    r"""Return a text from a file as Markdown shows it literally, within a line.

    Examples
    --------
    >>> plain("north | [click](https://example.org) <b>")
    'north \\| \\[click\\](https\\://example.org) &lt;b&gt;'
    """
    if value is None or value == "":
        return DASH
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = shown(text, _MOST_LETTERS)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _MARKUP.sub(r"\\\g<0>", text)
    return _LINKS.sub(r"\\\g<0>", text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Return a table of cells that are Markdown; the first `words` columns stand to the left."""
    lines = [head, [":--" if index < words else "--:" for index in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
