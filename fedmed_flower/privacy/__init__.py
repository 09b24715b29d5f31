"""Differential privacy for patients: accounting, ledger, noise, checks."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.privacy.accounting import epsilon_of, noise_for
    from fedmed_flower.privacy.ledger import Ledger
    from fedmed_flower.privacy.validate import with_group_norm
    from fedmed_flower.settings.privacy import PrivacySettings

__all__ = [
    "Ledger",
    "PrivacySettings",
    "epsilon_of",
    "noise_for",
    "with_group_norm",
]

__getattr__ = on_demand(
    __name__,
    {
        "Ledger": "ledger",
        "PrivacySettings": "patient",
        "epsilon_of": "accounting",
        "noise_for": "accounting",
        "with_group_norm": "validate",
    },
)
