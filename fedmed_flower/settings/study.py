"""An association study."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.errors import InputError
from fedmed_flower.settings.section import Section

TESTS = {
    "trend": "Cochran-Armitage trend test",
    "allelic": "allelic chi-square test",
    "logistic": "logistic regression with an intercept a hospital",
    "linear": "linear regression with an intercept a hospital",
}


@dataclass(frozen=True)
class Study(Section):
    """An association study, from the run config (``block-size`` there is `block_size` here).

    Attributes
    ----------
    test : {"trend", "allelic", "logistic", "linear"}
        Of each variant by itself. ``linear`` takes a continuous trait, the others a binary one.
    components : int
        Principal components of ancestry that go as covariates into ``logistic`` and ``linear``; at
        most 50.
    component_variants : int
        Variants, at most, from which they are made: evenly spread among those of which every
        hospital tells its counts and the rarer allele has a frequency of 0.05 or more; 1 to
        262,144.
    block_size : int
        Variants in a message; 1 to 1,048,576.
    min_sites : int
        Sites that must be connected before the study starts; at least 1.
    round_timeout : float
        Seconds to wait for the answers to each question; above 0.
    seed : int
        If the search for components begins; at least 0.
    run_dir : str
        The run folder. Empty for a new one under ``runs/``.
    resume : bool
        Must be false: a study that was broken off starts again.
    """

    test: str = "trend"
    components: int = 0
    component_variants: int = 20000
    block_size: int = 16384
    min_sites: int = 1
    round_timeout: float = 3600.0
    seed: int = 0
    run_dir: str = ""
    resume: bool = False

    def __post_init__(self) -> None:
        self.require("test", self.test in TESTS, f"one of {', '.join(TESTS)}")
        self.require_at_least(0, "seed")
        self.require("components", 0 <= self.components <= 50, "in 0..50")
        self.require_at_least(1, "min_sites")
        few = 1 <= self.component_variants <= 1 << 18
        self.require("component_variants", few, "in 1..262144")
        sized = 1 <= self.block_size <= 1 << 20
        self.require("block_size", sized, "in 1..1048576")
        self.require_positive("round_timeout")
        if self.resume:
            raise InputError("an association study is not resumed: start it again in a new folder")
        if self.components and self.test not in ("logistic", "linear"):
            raise InputError(
                f"components are covariates, which test={self.test} does not take: choose "
                "test=logistic or test=linear, or components=0"
            )
