"""A hospital finds the variants that a server names."""

import numpy as np
import pytest
from studies import World

from fedmed_flower.errors import InputError
from fedmed_flower.genomics import lookup
from fedmed_flower.genomics.lookup import Named, locate, stretches
from fedmed_flower.genomics.plink import Fileset
from fedmed_flower.genomics.variants import (
    ABSENT,
    OTHER_ALLELES,
    REPEATED,
    SAME,
    SWAPPED,
    UNCLEAR_STRAND,
    Variant,
)


@pytest.mark.parametrize("lines", [3, 1 << 16])
def test_variants_are_found_by_place_id_and_alleles(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(lookup, "_LINES", lines)
    world = World(tmp_path)
    world.names[0][11] = world.names[0][10]
    world.places[0][11] = world.places[0][10]
    world.places[0][12] = (1, 220)
    world.client()
    fileset = Fileset.open(tmp_path / "h0")
    asked = {
        "rs00": (100, *world.pairs[0][0]),
        "rs01": (110, *world.pairs[0][1][::-1]),
        "rs02": (120, "G", "C"),
        "rs05": (999, *world.pairs[0][5]),
        "rs08": (180, "T", "T"),
        "rs10": (200, *world.pairs[0][10]),
        "rs12": (220, *world.pairs[0][12]),
    }
    named = Named.of([Variant(1, place, name, *pair) for name, (place, *pair) in asked.items()])
    found, codes = locate(fileset, stretches(fileset), named)
    assert codes.tolist() == [
        *(SAME, SWAPPED, OTHER_ALLELES, ABSENT, OTHER_ALLELES, REPEATED, SAME)
    ]
    assert found[[0, 1, 6]].tolist() == [0, 1, 12]


def test_alleles_of_which_both_strands_look_the_same_are_not_swapped(tmp_path):
    world = World(tmp_path)
    world.pairs[0][4] = ("T", "A")
    world.client()
    fileset = Fileset.open(tmp_path / "h0")
    named = Named.of([Variant(1, 140, "rs04", "A", "T")])
    assert locate(fileset, stretches(fileset), named)[1].tolist() == [UNCLEAR_STRAND]


def test_names_travel(tmp_path):
    named = Named.of([Variant(1, 5, "a", "A", "C"), Variant(22, 7, "b", "G", "T")])
    content = named.content()
    read = Named.read(content["block"], content["named"], 2)
    assert read.keys.tolist() == named.keys.tolist()
    assert (read.names, read.alleles) == (named.names, named.alleles)
    assert read.chosen(np.array([1])).names == ["b"]


def test_names_that_cannot_be_are_refused():
    def read(variants, most=9):
        content = Named.of(variants).content()
        return Named.read(content["block"], content["named"], most)

    one = Variant(1, 5, "a", "A", "C")
    for variants, text in (
        ([one, one], "a message must name each variant once"),
        ([Variant(23, 5, "a", "A", "C")], "variants must be on the chromosomes 1 to 22"),
        ([Variant(1, 5, "a\nb", "A", "C")], "must be of the same variants"),
    ):
        with pytest.raises(InputError, match=text):
            read(variants)
    with pytest.raises(InputError, match="at most 1 variants for this question, got 2"):
        read([one, Variant(1, 6, "a", "A", "C")], 1)
