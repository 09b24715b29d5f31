"""Settings of an association study."""

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
    """Settings of an association study (``block-size`` in the run config is `block_size` here).

    Attributes
    ----------
    test : {"trend", "allelic", "logistic", "linear"}
        The test of each single variant. ``linear`` takes a continuous trait, the others a binary
        one.
    components : int
        Number of principal components of ancestry that are covariates of ``logistic`` and
        ``linear``; from 0 to 50.
    component_variants : int
        Largest number of variants from which the components are computed; from 1 to 262,144. They
        are evenly spread among the variants whose counts every hospital reports and whose rarer
        allele has a frequency of 0.05 or more.
    block_size : int
        Number of variants in a message; from 1 to 1,048,576.
    min_sites : int
        Number of sites that must be connected before the study starts; at least 1.
    round_timeout : float
        Seconds to wait for the answers to each question; above 0.
    seed : int
        Seed of the random start of the search for components; at least 0.
    run_dir : str
        The run folder. If empty, a new one is made under ``runs/``.
    resume : bool
        Must be false: an interrupted study is started again.
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
