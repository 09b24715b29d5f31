"""The one exception for input that a person can mend."""


class InputError(ValueError):
    """A setting, a file or a folder that was given is wrong.

    The text is one line: what is wrong, where, which value was given and what to do.
    Commands print it without a traceback and exit with code 2.
    """


class DeclinedError(Exception):
    """A hospital does not take part, for a reason that it may tell: its privacy budget.

    The text holds nothing about patients and reaches the server as it is.
    """
