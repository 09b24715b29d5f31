"""Errors that users read, and the one function that cleans a text before it is shown."""

from __future__ import annotations

import logging
import re
import sys
import unicodedata
from typing import Any

# A hospital sends this text instead of any failure that a patient's rows could have caused.
FAILED = "failed"
_MOST_LETTERS = 4000
# Unicode categories of control characters, and of those that change the direction of a line.
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_SPACES = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")


def shown(value: object, most: int = _MOST_LETTERS) -> str:
    r"""Return a text as one line that a terminal and a log can show.

    Names come from messages and files: a line break in one forges a line of a log, and an escape
    code moves the cursor of a terminal.

    Parameters
    ----------
    value : object
        An object whose ``str`` is shown.
    most : int
        Largest number of letters; of a longer text the middle is left out.

    Returns
    -------
    str
        The text with a blank for each run of line breaks and tabs, and an escape code, as Python
        writes it, for each other control character.

    Examples
    --------
    >>> shown("north\nround 2: \x1b[31mall is well")
    'north round 2: \\x1b[31mall is well'
    """
    text = _SPACES.sub(" ", str(value))
    if not text.isprintable():
        text = "".join(
            letter.encode("unicode_escape").decode() if _is_invisible(letter) else letter
            for letter in text
        )
    if len(text) > most:
        half = (most - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return text


def _is_invisible(letter: str) -> bool:
    return unicodedata.category(letter) in _INVISIBLE


class _OneLine(logging.Filter):
    """Cleans each line of this package's log, since names in it come from messages and files."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = shown(record.getMessage())
        record.args = ()
        if record.exc_info:
            # With a bar, so that no line of a traceback looks like a line of the log.
            lines = logging.Formatter().formatException(record.exc_info).split("\n")
            record.exc_text = "\n".join(f"  | {shown(line)}" for line in lines)
        return True


class _NotAgain(logging.Filter):
    """Keeps a line of Flower's loggers from a root handler that would write it a second time.

    Parameters
    ----------
    handler : logging.StreamHandler
        A handler of the root logger.
    """

    def __init__(self, handler: logging.StreamHandler[Any]) -> None:
        super().__init__()
        self._handler = handler

    def filter(self, record: logging.LogRecord) -> bool:
        if not f"{record.name}.".startswith("flwr."):
            return True
        levels = [
            other.level
            for other in logging.getLogger("flwr").handlers
            if isinstance(other, logging.StreamHandler)
            and other is not self._handler
            and _are_one(other.stream, self._handler.stream)
        ]
        # Who sets the root logger to DEBUG still sees what Flower's handler leaves out.
        return not levels or logging.getLogger().level <= record.levelno < min(levels)


def _are_one(stream: object, other: object) -> bool:
    """Return whether two streams end in one place: both are the console's, or they are the same.

    In the process of a ServerApp Flower writes to standard output, all others to standard error.
    """
    consoles = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    both = all(any(each is one for one in consoles) for each in (stream, other))
    return stream is other or both


class _Once(logging.Filter):
    """Sees to it that each line comes once, although Flower's lines also go to the root logger.

    Opacus gives the root logger a handler when it is imported, others do with their first line
    (`logging.warning`, absl): it can come at any time, so each line looks for one.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        for handler in logging.getLogger().handlers:
            known = any(isinstance(each, _NotAgain) for each in handler.filters)
            if isinstance(handler, logging.StreamHandler) and not known:
                handler.addFilter(_NotAgain(handler))
        return True


logging.getLogger("flwr.fedmed").addFilter(_OneLine())
for _name in ("flwr", "flwr.fedmed"):
    # A logger's filters see its own lines alone, not those of the loggers below it.
    logging.getLogger(_name).addFilter(_Once())


class InputError(ValueError):
    """A setting, a file or a folder is wrong.

    The text is one line: what is wrong, where, which value was given, and what to do.
    Commands print it without a traceback and exit with code 2.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(shown(text))


class FormatError(InputError):
    """A file was written by a later version of this package, in a format that this one lacks."""


class DivergedError(ArithmeticError):
    """A model's loss or weights are no numbers any more, such as by a learning rate too high."""


class DeclinedError(Exception):
    """A hospital does not take part, for a reason that may leave it, such as its privacy budget.

    The text reveals nothing about patients and is sent to the server unchanged.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(shown(text))
