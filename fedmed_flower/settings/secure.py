"""Settings of secure sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmed_flower.settings.allowed import OneOf, Within
from fedmed_flower.settings.section import Section, setting
from fedmed_flower.settings.text import expand, setting_error

if TYPE_CHECKING:
    from flwr.app import UserConfig

OFF = "none"
SUM = "sum"
LEAST_EXPONENT = -40
MOST_SECURE_EXPONENT = 10
_MOST_GROUPS = 85


@dataclass(frozen=True)
class SecureSettings(Section):
    """What the server learns of what hospitals send."""

    secure: str = setting(
        OFF,
        "Whether the server learns what each hospital sends, or only sums over hospitals: `sum`. "
        "Each hospital then needs `secure-peers` and `secure-key` in its node config.",
        OneOf((OFF, SUM)),
    )
    secure_exponent: int = setting(
        -2,
        "With secure=sum: no weight may change by more than 2 to the power of this in a round. "
        "Larger changes are cut, and counted.",
        Within(LEAST_EXPONENT, MOST_SECURE_EXPONENT),
    )
    secure_strict: bool = setting(
        False,
        "With secure=sum: whether a hospital takes no part in a round in which it would have to "
        "cut a change, or has one that is no number. The server then learns that it was so.",
    )
    secure_groups: int = setting(
        0,
        "In a simulation with secure=sum: into how many groups hospitals are parted, for rules "
        "that compare their means. 0: none. At real hospitals the peers files say so.",
        Within(0, _MOST_GROUPS),
    )


def refuse_sums(config: UserConfig, what: str) -> None:
    """Refuse secure sums in an app that trains no network; `what` says what it does instead."""
    if expand(config).get("secure") == SUM:
        raise setting_error(
            f'secure="sum" trains a network, and this app {what}, for which hospitals would have '
            "to send their own figures: leave it out",
            "secure",
        )
