"""An association study."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.allowed import OneOf, Within
from fedmed_flower.settings.plan import Plan
from fedmed_flower.settings.section import Section, also, setting
from fedmed_flower.settings.text import setting_error

TESTS = {
    "trend": "Mantel's trend test, stratified by hospital",
    "allelic": "Cochran-Mantel-Haenszel test of alleles, stratified by hospital",
    "logistic": "logistic regression with an intercept a hospital",
    "linear": "linear regression with an intercept a hospital",
}
# The tests that take covariates.
REGRESSIONS = ("logistic", "linear")


@dataclass(frozen=True)
class Study(Section):
    """An association study."""

    test: str = setting(
        "trend",
        "The test of each variant by itself; people are compared with others of their hospital. "
        "linear takes a continuous trait, the others a binary one; trend and allelic take no "
        "covariates.",
        OneOf(tuple(TESTS)),
    )
    components: int = setting(
        0,
        "Principal components of ancestry that go as covariates into logistic and linear.",
        Within(0, 50),
        "components",
    )
    component_variants: int = setting(
        20000,
        "Variants, at most, from which the components are made: evenly spread among those of which "
        "every hospital reports its counts and the rarer allele has a frequency of 0.05 or more.",
        Within(1, 1 << 18),
        "variants",
    )
    block_size: int = setting(16384, "Variants in a message.", Within(1, 1 << 20), "variants")
    min_sites: int = also(Plan, "min_sites")
    round_timeout: float = also(Plan, "round_timeout")
    seed: int = also(Plan, "seed")
    run_dir: str = also(Plan, "run_dir")
    resume: bool = also(Plan, "resume")

    def check(self) -> None:
        """Refuse to resume, and components for a test without covariates."""
        if self.resume:
            raise setting_error(
                "resume must be false: an association study is started again in a new folder",
                "resume",
            )
        if self.components and self.test not in REGRESSIONS:
            raise setting_error(
                f"components needs test=logistic or test=linear, got test={self.test}: components "
                "are covariates, which this test does not take",
                "components",
            )
