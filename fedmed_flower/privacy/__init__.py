"""Differential privacy for patients: accounting, ledger, noise, checks."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.privacy.accounting import epsilon_of as epsilon_of
    from fedmed_flower.privacy.accounting import noise_for as noise_for
    from fedmed_flower.privacy.ledger import Ledger as Ledger
    from fedmed_flower.privacy.validate import with_group_norm as with_group_norm
    from fedmed_flower.settings.privacy import PrivacySettings as PrivacySettings

__getattr__, __all__ = on_demand(
    __name__,
    {
        "Ledger": "ledger",
        "PrivacySettings": "patient",
        "epsilon_of": "accounting",
        "noise_for": "accounting",
        "with_group_norm": "validate",
    },
)
