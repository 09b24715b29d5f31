"""How a survey runs."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.plan import Plan
from fedmed_flower.settings.section import Section, also


@dataclass(frozen=True)
class SurveySettings(Section):
    """How a survey runs."""

    run_dir: str = also(Plan, "run_dir")
    round_timeout: float = also(Plan, "round_timeout")
    min_sites: int = also(Plan, "min_sites")
