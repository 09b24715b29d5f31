"""Settings of runs and of hospitals, one file per group; `Section` is the base of an app's own."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.settings.allowed import Matching as Matching
    from fedmed_flower.settings.allowed import Numbers as Numbers
    from fedmed_flower.settings.allowed import OneOf as OneOf
    from fedmed_flower.settings.allowed import Within as Within
    from fedmed_flower.settings.section import Section as Section
    from fedmed_flower.settings.section import setting as setting

__getattr__, __all__ = on_demand(
    __name__,
    {
        "Matching": "allowed",
        "Numbers": "allowed",
        "OneOf": "allowed",
        "Section": "section",
        "Within": "allowed",
        "setting": "section",
    },
)
