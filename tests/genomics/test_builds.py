import numpy as np
import pytest

from fedmed_flower.genomics.builds import LANDMARKS, BuildCheck
from fedmed_flower.genomics.plink import Listing


def listing(*variants):
    """Return variants given as (chromosome, position, id)."""
    chromosomes, positions, names = zip(*variants, strict=True)
    letters = ["A"] * len(variants)
    places = np.array(chromosomes, np.int8), np.array(positions, np.int64)
    return Listing(*places, list(names), letters, letters, 0)


def checked(*variants):
    check = BuildCheck()
    check.add(listing(*variants))
    return check


def test_a_known_variant_tells_the_build():
    # dbSNP: rs4988235 lies at 2:136608646 in GRCh37, and at 2:135851076 in GRCh38.
    check = checked((2, 136608646, "rs4988235"), (2, 136608700, "x"))
    assert check.text() == "positions of GRCh37, as rs4988235 lies"
    assert check.problem() == ""
    later = checked((2, 135851076, "rs4988235"), (19, 44908684, "rs429358"))
    assert later.text() == "positions of GRCh38, as rs4988235 lies, as rs429358 lies"


def test_the_end_of_a_chromosome_tells_the_build():
    # Chromosome 1 has 249,250,621 bases in GRCh37 and 248,956,422 in GRCh38.
    check = checked((1, 249250621, "x"))
    assert check.text() == ("positions of GRCh37, with 1 beyond the ends of chromosomes of GRCh38")
    assert checked((1, 248956422, "x")).text() == (
        "positions of either build: none of them tells which"
    )
    assert checked((17, 83257441, "x")).possible == ["GRCh38"]


@pytest.mark.parametrize(
    ("variants", "text"),
    [
        (
            [(2, 136608646, "rs4988235"), (19, 44908684, "rs429358")],
            "rs4988235 lies as in GRCh37; rs429358 lies as in GRCh38",
        ),
        ([(2, 136608645, "rs4988235")], "rs4988235 lies as in neither GRCh37 nor GRCh38"),
        ([(3, 136608646, "rs4988235")], "rs4988235 lies as in neither GRCh37 nor GRCh38"),
        (
            [(2, 136608646, "rs4988235"), (17, 83257441, "x")],
            "rs4988235 lies as in GRCh37; beyond the ends of chromosomes of GRCh37 lie 1",
        ),
    ],
)
def test_positions_of_two_builds_or_of_none_are_a_problem(variants, text):
    check = checked(*variants)
    assert check.text() == ""
    assert check.problem() == (
        f"the positions are of no one build: {text}: write all files from one reference genome"
    )


def test_variants_on_no_autosome_say_nothing():
    check = checked((0, 999999999, "rs4988235"), (0, 0, "x"))
    assert check.possible == ["GRCh37", "GRCh38"]


def test_each_known_variant_lies_elsewhere_in_the_other_build():
    for chromosome, *positions in LANDMARKS.values():
        assert 1 <= chromosome <= 22
        assert len({*positions}) == 2
        assert checked(*[(chromosome, max(positions), "x")]).possible == ["GRCh37", "GRCh38"]
