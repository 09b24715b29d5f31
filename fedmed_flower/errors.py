"""Errors that are told in words, and the one function that cleans a text before it is shown."""

from __future__ import annotations

import logging
import re
import unicodedata

# What a hospital says in place of every failure that a patient's rows could have caused.
FAILED = "failed"
_MOST_LETTERS = 4000
# Control characters, and those that turn the direction of a line, are shown as Python writes them.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_SPACES = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")


def shown(value: object, most: int = _MOST_LETTERS) -> str:
    r"""Return a text as one line that a terminal and a log can show.

    Names come from messages and files: a line break in one forges a line of a log, and an escape
    code moves the cursor of a terminal.

    Parameters
    ----------
    value : object
        Its text is taken.
    most : int
        Letters; from a longer text the middle is left out.

    Returns
    -------
    str
        With a blank for each run of line breaks and tabs, and each other control character as its
        code.

    Examples
    --------
    >>> shown("north\nround 2: \x1b[31mall is well")
    'north round 2: \\x1b[31mall is well'
    """
    text = _SPACES.sub(" ", str(value))
    if not text.isprintable():
        text = "".join(
            letter.encode("unicode_escape").decode() if _is_unseen(letter) else letter
            for letter in text
        )
    if len(text) > most:
        half = (most - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return text


def _is_unseen(letter: str) -> bool:
    return unicodedata.category(letter) in _UNSEEN


class _OneLine(logging.Filter):
    """Cleans each line of this package's log, whatever names it quotes."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage()), ()
        if record.exc_info:
            # Behind a bar: no line of a traceback can be taken for one of the log.
            lines = logging.Formatter().formatException(record.exc_info).split("\n")
            record.exc_text = "\n".join(f"  | {shown(line)}" for line in lines)
        return True


logging.getLogger("flwr.fedmed").addFilter(_OneLine())


class InputError(ValueError):
    """A setting, a file or a folder that was given is wrong.

    The text is one line: what is wrong, where, which value was given and what to do.
    Commands print it without a traceback and exit with code 2.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(shown(text))


class DeclinedError(Exception):
    """A hospital does not take part, for a reason that it may tell: its privacy budget.

    The text holds nothing about patients and reaches the server as it is.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(shown(text))
