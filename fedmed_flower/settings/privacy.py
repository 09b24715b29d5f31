"""Settings of patients' differential privacy."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.allowed import OneOf, Within
from fedmed_flower.settings.plan import Plan
from fedmed_flower.settings.section import Section, also, setting

ONE = "one"
MEAN = "mean"
RECORDS = (ONE, MEAN)


@dataclass(frozen=True)
class PrivacySettings(Section):
    """How patients are protected."""

    privacy: str = setting(
        "none",
        "patient: each site trains with differential privacy for each of its patients.",
        OneOf(("none", "patient")),
    )
    target_epsilon: float = setting(
        8.0,
        "Largest epsilon that all rounds of training together may cost a patient.",
        Within(0.0, above=True),
    )
    delta: float = setting(
        1e-5,
        "Delta of the guarantee; it should be well below 1 / the number of patients.",
        Within(0.0, 1.0, above=True, below=True),
    )
    max_grad_norm: float = setting(
        1.0, "Norm to which the gradient of each patient is clipped.", Within(1e-6, 1e6)
    )
    sampling_rate: float = setting(
        0.0,
        "Probability with which a patient takes part in a step. 0: batch-size / the site's number "
        "of patients.",
        Within(1e-6, 1.0, or_zero=True),
    )
    patient_records: str = setting(
        ONE,
        "What a patient with several records contributes to a step: one of them, or their mean.",
        OneOf(RECORDS),
    )
    private_metrics: bool = setting(
        True,
        "If privacy is on, evaluate by counts with noise, which are charged to the patients who "
        "are counted. A simulation may switch this off here; a real hospital uses its node config.",
    )
    micro_batch_size: int = setting(
        0,
        "Records whose gradients are in memory at a time. 0: chosen by the free memory.",
        Within(0, 10**6),
        "records",
    )
    num_server_rounds: int = also(Plan, "num_server_rounds")

    @property
    def on(self) -> bool:
        """Whether patients are protected."""
        return self.privacy == "patient"
