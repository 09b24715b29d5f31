"""Settings by which a survey runs."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.section import Section


@dataclass(frozen=True)
class SurveySettings(Section):
    """How a survey runs, from the run config (``run-dir`` there is `run_dir` here).

    Attributes
    ----------
    run_dir : str
        The run folder. If empty, a new one is made under ``runs/``.
    round_timeout : float
        Seconds to wait for answers; above 0.
    min_sites : int
        Number of sites that must be connected before the first question; at least 1.
    """

    run_dir: str = ""
    round_timeout: float = 3600.0
    min_sites: int = 1

    def __post_init__(self) -> None:
        self.require_at_least(1, "min_sites")
        self.require_positive("round_timeout")
