"""Settings of patients' differential privacy."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.section import MOST_ROUNDS, Section

ONE, MEAN = "one", "mean"
RECORDS = (ONE, MEAN)


@dataclass(frozen=True)
class PrivacySettings(Section):
    """How patients are protected, from the run config (``max-grad-norm`` is `max_grad_norm` here).

    Attributes
    ----------
    privacy : {"none", "patient"}
        ``patient``: each site trains with differential privacy for each of its patients.
    target_epsilon : float
        Largest epsilon that all rounds of training together may cost a patient; above 0.
    delta : float
        Above 0, below 1; it should be well below 1 / the number of patients.
    max_grad_norm : float
        Norm to which the gradient of each patient is clipped; from 1e-6 to 1e6.
    sampling_rate : float
        Probability with which a patient takes part in a step; from 1e-6 to 1, or 0 for
        ``batch-size`` / the site's number of patients.
    patient_records : {"one", "mean"}
        What a patient with several records contributes to a step: one of them, or their mean.
    private_metrics : bool
        If privacy is on, evaluate by counts with noise, which are charged to the patients who are
        counted. A simulation may switch this off here; a real hospital uses its node config.
    micro_batch_size : int
        Number of records whose gradients are in memory at a time; from 0 to a million. 0 chooses
        it by the free memory.
    num_server_rounds : int
        Number of rounds for which the target is planned; from 1 to 100,000.
    """

    privacy: str = "none"
    target_epsilon: float = 8.0
    delta: float = 1e-5
    max_grad_norm: float = 1.0
    sampling_rate: float = 0.0
    patient_records: str = "one"
    private_metrics: bool = True
    micro_batch_size: int = 0
    num_server_rounds: int = 3

    def __post_init__(self) -> None:
        self.require("privacy", self.privacy in ("none", "patient"), "none or patient")
        self.require_positive("target_epsilon")
        self.require("delta", 0 < self.delta < 1, "above 0 and below 1")
        self.require_within(1e-6, 1e6, "max_grad_norm")
        rate = self.sampling_rate == 0 or 1e-6 <= self.sampling_rate <= 1
        self.require("sampling_rate", rate, "from 1e-6 to 1, or 0")
        self.require(
            "patient_records", self.patient_records in RECORDS, f"one of {', '.join(RECORDS)}"
        )
        self.require_within(0, 10**6, "micro_batch_size")
        self.require_within(1, MOST_ROUNDS, "num_server_rounds")

    @property
    def on(self) -> bool:
        """Whether patients are protected."""
        return self.privacy == "patient"
