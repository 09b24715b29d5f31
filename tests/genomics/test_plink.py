import gzip
import math

import numpy as np
import pytest
from bed_reader import to_bed
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.genomics import plink, variants
from fedmed_flower.genomics.plink import Fileset, Listing
from fedmed_flower.genomics.scores import Weight, polygenic_scores, read_weights
from fedmed_flower.genomics.variants import (
    ABSENT,
    OTHER_ALLELES,
    REPEATED,
    SAME,
    SWAPPED,
    UNCLEAR_STRAND,
    Merger,
    align,
)

GENOTYPES = np.array([[0, 1, 2], [2, -127, 1], [1, 0, 0], [0, 0, 2], [1, 1, 1]], np.int8)


def write(prefix, genotypes=GENOTYPES, **properties):
    """Write five people with three variants on chromosome 1."""
    people, variants = genotypes.shape
    known = {
        "iid": [f"p{number}" for number in range(people)],
        "sid": [f"rs{number}" for number in range(variants)],
        "chromosome": ["1"] * variants,
        "bp_position": [10 * number + 10 for number in range(variants)],
        "allele_1": ["A"] * variants,
        "allele_2": ["G"] * variants,
    }
    to_bed(f"{prefix}.bed", genotypes, properties=known | properties, num_threads=1)
    return prefix


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "north")


def damage(prefix, end, change):
    path = prefix.with_name(prefix.name + end)
    path.write_bytes(change(path.read_bytes()))
    return path


def test_people_variants_and_genotypes_are_read(prefix):
    found = Fileset.open(prefix)
    assert found.people == ("p0", "p1", "p2", "p3", "p4")
    assert found.num_variants == 3
    np.testing.assert_array_equal(found.read(slice(None), slice(None)), GENOTYPES)
    some = found.read(np.array([4, 1]), np.array([2, 0]))
    np.testing.assert_array_equal(some, GENOTYPES[np.ix_([4, 1], [2, 0])])


def test_variants_are_listed_in_parts(prefix):
    damage(prefix, ".bim", lambda b: b"chr2 x 0 7 a g\nX y 0 8 C T\n22\trs0\t0\t-5\tG\tT")
    found = Fileset.open(prefix)
    first = found.variants(0, 2)
    assert first.chromosomes.tolist() == [2, 0]
    assert (first.names, first.first, first.second) == (["x", "y"], ["A", "C"], ["G", "T"])
    last = found.variants(first.offset, 2)
    assert (last.names, last.positions.tolist(), last.chromosomes.tolist()) == (["rs0"], [0], [0])
    assert found.variants(last.offset, 2).names == []


@pytest.mark.parametrize(
    ("end", "change", "text"),
    [
        (".bed", lambda b: b"PK" + b[2:], "{bed} is no bed file: it must begin with the bytes "
         "6c 1b 01, got 50 4b 01"),
        (".bed", lambda b: b"\x6c\x1b\x00" + b[3:], "{bed} is ordered by person, as early versions "
         "of PLINK wrote it: write it again with plink --make-bed"),
        (".bed", lambda b: b"", "{bed} is no bed file: it must begin with the bytes 6c 1b 01, "
         "got "),
        (".bed", lambda b: b[:-1], "{bed} has 8 bytes, but 3 variants (bim) of 5 people (fam) make "
         "9: it was cut off, or belongs to other bim and fam files"),
        (".bim", lambda b: b"".join(b.splitlines(True)[:2]), "{bed} has 9 bytes, but 2 variants "
         "(bim) of 5 people (fam) make 7: it was cut off, or belongs to other bim and fam files"),
        (".fam", lambda b: b"", "{fam} is empty: it needs one line a person"),
        (".fam", lambda b: b.replace(b"p3", b"p1"), "{fam} has the individual id 'p1' more than "
         "once: give each person an id of their own"),
        (".fam", lambda b: b"f p0 0 0 1\n" + b, "{fam} line 1 must have 6 fields, got 5: "
         "'f p0 0 0 1'"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(prefix, end, change, text):
    damage(prefix, end, change)
    names = {kind: f"{prefix}.{kind}" for kind in ("bed", "bim", "fam")}
    with pytest.raises(InputError, match=says(text.format(**names))):
        Fileset.open(prefix)


def test_missing_files_malformed_lines_and_bad_listings(prefix, tmp_path):
    text = (
        f"{tmp_path}/south.fam cannot be read (No such file or directory): give the path of "
        "the bed, bim and fam files without the endings"
    )
    with pytest.raises(InputError, match=says(text)):
        Fileset.open(tmp_path / "south")
    found = Fileset.open(prefix)
    with pytest.raises(InputError, match=says("offset must be at least 0 and count in 1..1048576, "
                                              "got -1 and 3")):  # fmt: skip
        found.variants(-1, 3)
    damage(prefix, ".bim", lambda b: b.replace(b"\t20\t", b"\t"))
    text = f"{prefix}.bim line 2 must have 6 fields, got 5: '1\\trs1\\t0.0\\tA\\tG'"
    with pytest.raises(InputError, match=says(text)):
        found.variants(0, 3)
    damage(prefix, ".bed", lambda b: b[:5])
    with pytest.raises(InputError, match=r"north\.bed cannot be read: "):
        found.read(slice(None), slice(None))


@pytest.mark.parametrize(
    ("position", "shown"),
    [
        ("twenty", "twenty"),
        (2**63, "9223372036854775808"),
        (-(2**63), "-9223372036854775808"),
        (2**31, "2147483648"),
        ("9" * 5000, f"{'9' * 37}...{'9' * 37}"),
    ],
)
def test_a_position_that_cannot_be_is_named_with_its_line(prefix, position, shown):
    damage(prefix, ".bim", lambda b: b.replace(b"\t20\t", f"\t{position}\t".encode()))
    found = Fileset.open(prefix)
    first = found.variants(0, 1)
    assert first.positions.tolist() == [10]
    text = (
        f"{prefix}.bim line 2 has the position '{shown}': a position is a whole number from "
        "-2147483647 to 2147483647"
    )
    for offset, count in ((0, 3), (first.offset, 1)):
        with pytest.raises(InputError, match=says(text)):
            found.variants(offset, count)


def test_an_offset_beyond_all_files_is_refused(prefix):
    with pytest.raises(InputError, match=r"^offset must be at least 0"):
        Fileset.open(prefix).variants(1 << 63, 1)


def test_long_and_odd_names_are_shortened_and_cleaned(prefix):
    name = "\x1b[31m" + "x" * 1000
    damage(prefix, ".fam", lambda b: b.replace(b"p3", name.encode()).replace(b"p1", name.encode()))
    with pytest.raises(InputError, match="has the individual id") as error:
        Fileset.open(prefix)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_without_bed_reader_the_error_names_the_extra(prefix, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bed_reader", None)
    text = (
        "PLINK files are read by bed-reader, which is not installed: "
        "pip install 'fedmed-flower[genomics]'"
    )
    with pytest.raises(InputError, match=says(text)):
        plink.bed_reader()


@pytest.mark.parametrize(
    ("pairs", "reference", "codes"),
    [
        ([("A", "G"), ("A", "G")], ("A", "G"), [SAME, SAME]),
        ([("A", "G"), ("G", "A"), ("G", "A")], ("G", "A"), [SWAPPED, SAME, SAME]),
        ([("A", "G"), ("G", "A")], ("A", "G"), [SAME, SWAPPED]),
        ([("A", "G"), ("T", "C"), ("A", "G")], ("A", "G"), [SAME, OTHER_ALLELES, SAME]),
        ([("A", "T"), ("T", "A")], ("A", "T"), [SAME, UNCLEAR_STRAND]),
        ([("AC", "A"), ("A", "AC")], ("AC", "A"), [SAME, SWAPPED]),
        ([("AC", "GT"), ("GT", "AC")], ("AC", "GT"), [SAME, UNCLEAR_STRAND]),
        ([("0", "G"), ("A", "G"), ("0", "A")], ("A", "G"), [SAME, SAME, SWAPPED]),
        ([("0", "G"), ("0", "A")], ("A", "G"), [SAME, SWAPPED]),
        ([("0", "C"), ("C", "G")], ("C", "G"), [UNCLEAR_STRAND, SAME]),
        ([("0", "G"), ("0", "G")], ("0", "G"), [SAME, SAME]),
    ],
)
def test_alleles_are_aligned_to_those_of_most_hospitals(pairs, reference, codes):
    assert align(tuple(pairs)) == (reference, tuple(codes))


def listing(*rows):
    """Make a listing of (chromosome, position, id, A1, A2)."""
    chromosomes, positions, names, first, second = zip(*rows, strict=True)
    places = np.array(chromosomes, np.int8), np.array(positions, np.int64)
    return Listing(*places, list(names), list(first), list(second), 0)


def drain(merger, parts):
    """Give a merger each hospital's parts when it asks for them."""
    found, waiting = [], [list(own) for own in parts]
    for _ in range(100):
        if hungry := merger.hungry():
            for site in hungry:
                part = waiting[site].pop(0)
                merger.add(site, part, not waiting[site])
        elif (block := merger.take()) is None:
            return found
        else:
            found += [
                (*variant, block.lines[:, at].tolist(), block.codes[:, at].tolist())
                for at, variant in enumerate(block.variants)
            ]
    raise AssertionError("the merger does not come to an end")


def test_lists_are_merged_in_order_part_by_part():
    north = [
        listing((1, 10, "a", "A", "G"), (1, 20, "b", "A", "G")),
        listing((1, 20, "c", "A", "C"), (2, 5, "d", "A", "G")),
        listing((0, 9, "x", "A", "G"), (2, 7, "e", "A", "G")),
    ]
    south = [
        listing((1, 20, "c", "C", "A"), (1, 20, "b", "A", "G")),
        listing((2, 5, "d", "C", "G"), (2, 5, "d", "A", "G")),
    ]
    merger = Merger(2, 2)
    assert drain(merger, [north, south]) == [
        (1, 10, "a", "A", "G", [0, 0], [SAME, ABSENT]),
        (1, 20, "b", "A", "G", [1, 1], [SAME, SAME]),
        (1, 20, "c", "A", "C", [2, 0], [SAME, SWAPPED]),
        (2, 5, "d", "A", "G", [3, 3], [SAME, REPEATED]),
        (2, 7, "e", "A", "G", [5, 0], [SAME, ABSENT]),
    ]
    assert merger.read == [6, 4]
    assert merger.skipped == [1, 0]


def test_many_variants_at_one_place_and_lists_out_of_order():
    crowd = [listing(*[(1, 5, f"v{10 * part + n}", "A", "G") for n in range(4)]) for part in (1, 2)]
    merger = Merger(1, 2)
    assert len(drain(merger, [crowd])) == 8
    text = (
        "its variants are not in order of chromosome and position: sort its files with "
        "plink --make-bed"
    )
    merger = Merger(1, 2)
    merger.add(0, listing((2, 5, "a", "A", "G")), False)
    with pytest.raises(ValueError, match=says(text)):
        merger.add(0, listing((1, 6, "b", "A", "G")), True)


@pytest.mark.parametrize(
    "variant", [(1, 1 << 40), (1, 2**31), (1, 0), (1, -(2**63)), (2, 2**63 - 1), (23, 5), (-1, 5)]
)
def test_a_list_with_a_place_that_no_chromosome_has_is_refused(variant):
    merger = Merger(2, 2)
    text = "it has variants outside of the chromosomes 1 to 22 or of the positions 1 to 2147483647"
    with pytest.raises(ValueError, match=says(text)):
        merger.add(0, listing((*variant, "a", "A", "G")), False)
    # What was refused leaves nothing.
    merger.end(0)
    merger.add(1, listing((1, 2**31 - 1, "b", "A", "G")), True)
    assert [variant[:3] for variant in merger.take().variants] == [(1, 2**31 - 1, "b")]


def test_a_list_that_never_leaves_a_place_is_refused(monkeypatch):
    monkeypatch.setattr(variants, "_MOST_AT_ONE_PLACE", 3)
    merger = Merger(1, 2)
    crowd = [(1, 5, f"v{number}", "A", "G") for number in range(4)]
    merger.add(0, listing((1, 4, "a", "A", "G"), *crowd[:3]), False)
    with pytest.raises(ValueError, match=says("it has more than 3 variants at one position")):
        merger.add(0, listing(crowd[3]), False)
    # As many are fine where the list has gone on.
    merger.add(0, listing((1, 6, "b", "A", "G")), True)
    assert len(merger.take().variants) == 5


def test_polygenic_scores_by_hand(prefix):
    write(prefix, allele_1=["A", "C", "A"], allele_2=["G", "T", "T"])
    weights = [
        Weight("rs0", "a", 1.0),  # counts A1
        Weight("rs1", "A", 10.0, "G", 0.25),  # T of the other strand is A2; one genotype missing
        Weight("rs2", "T", 100.0, "A"),
        Weight("rs9", "A", 1.0),
    ]
    found = polygenic_scores(prefix, weights)
    # A1 of rs0, 2 - A1 of rs1 (twice its frequency where missing), 2 - A1 of rs2.
    expected = {"p0": 0 + 10 + 0, "p1": 2 + 5 + 100, "p2": 1 + 20 + 200, "p3": 20, "p4": 1 + 110}
    assert found.values == expected
    assert found.used == 3
    assert found.left_out == {"rs9": f"it is not in {prefix}.bim"}
    # What the caller gives goes before what the weights carry.
    assert polygenic_scores(prefix, weights, {"rs1": 0.5}).values["p1"] == 2 + 10 + 100


def test_weights_that_do_not_count_are_named(prefix):
    write(prefix, sid=["a", "b", "b"], allele_1=["A", "A", "A"], allele_2=["T", "G", "G"])
    weights = [Weight("a", "C", 1.0), Weight("b", "A", 1.0)]
    assert polygenic_scores(prefix, weights).left_out == {
        "a": "its alleles are A/T",
        "b": f"its id is repeated in {prefix}.bim",
    }


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([Weight("rs1", "A", 1.0)], "1 people have no genotype of rs1: give its frequency, in the "
         "weights or in frequencies"),
        ([Weight("rs0", "A", 1.0), Weight("rs0", "G", 1.0)], "variant rs0 has two weights: remove "
         "one"),
        ([Weight("rs0", "A", 1.0, "", 1.5)], "the frequency of rs0 must lie in [0, 1], got 1.5"),
    ],
)  # fmt: skip
def test_scores_that_cannot_be_made(prefix, weights, text):
    with pytest.raises(InputError, match=says(text)):
        polygenic_scores(prefix, weights)


def test_weights_are_read_as_the_catalog_writes_them(tmp_path):
    text = "#pgs_id=1\nrsID\tother_allele\teffect_allele\teffect_weight\nrs1\tG\tA\t-0.5\n\n"
    with gzip.open(tmp_path / "w.txt.gz", "wt") as file:
        file.write(text)
    (found,) = read_weights(tmp_path / "w.txt.gz")
    assert found[:4] == ("rs1", "A", -0.5, "G")
    assert math.isnan(found.frequency)
    path = tmp_path / "w.csv"
    path.write_text("id,allele,weight,frequency\nrs2,T,1,0.3\n")
    assert read_weights(path) == [Weight("rs2", "T", 1.0, "", 0.3)]
    path.write_text("id,allele,weight\nrs2,T,one\n")
    with pytest.raises(InputError, match=r"w\.csv, variant 'rs2': could not convert"):
        read_weights(path)
    for weight in ("1e31", "-1e400", "nan"):
        path.write_text(f"id,allele,weight\nrs2,T,{weight}\n")
        text = (
            f"{path}, variant 'rs2': each line needs an id, an allele and a weight from -1e+30 to "
            f"1e+30, got 'T' and {float(weight)}"
        )
        with pytest.raises(InputError, match=says(text)):
            read_weights(path)
    path.write_text("id,weight\n")
    with pytest.raises(InputError, match=says(f"{path} has no column allele or effect_allele or "
                                              "A1: it has id, weight")):  # fmt: skip
        read_weights(path)
    with pytest.raises(InputError, match=r"^the weights .*/no cannot be read: .*No such file"):
        read_weights(tmp_path / "no")
