import numpy as np
import pytest
from bed_reader import to_bed

from fedmed_flower import InputError
from fedmed_flower.genomics.checks import (
    check_covariates,
    check_files,
    compare_files,
    filesets,
)
from fedmed_flower.genomics.covariates import require_distinct

PEOPLE = 40
VARIANTS = 6


def write(prefix, **properties):
    """Write forty people with six variants on chromosome 1."""
    known = {
        "iid": [f"p{number}" for number in range(PEOPLE)],
        "sex": [1 + number % 2 for number in range(PEOPLE)],
        "pheno": [str(1 + (number % 4 == 0)) for number in range(PEOPLE)],
        "sid": [f"rs{number}" for number in range(VARIANTS)],
        "chromosome": ["1"] * VARIANTS,
        "bp_position": [100 + 10 * number for number in range(VARIANTS)],
        "allele_1": ["A"] * VARIANTS,
        "allele_2": ["G"] * VARIANTS,
    }
    genotypes = np.random.default_rng(0).binomial(2, 0.4, (PEOPLE, VARIANTS)).astype(np.int8)
    prefix.parent.mkdir(exist_ok=True)
    to_bed(f"{prefix}.bed", genotypes, properties=known | properties, num_threads=1)
    return prefix


def found(prefix, **properties):
    return check_files(write(prefix, **properties))


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "cohort"


def test_people_variants_sex_and_phenotypes_are_counted(prefix):
    findings = found(prefix)
    assert findings.lines == [
        "cohort: 40 people, 6 variants",
        "sex in the fam file: 20 men, 20 women, 0 unknown",
        "phenotype in the fam file: 10 cases (2), 30 controls (1), 0 missing (0 or -9)",
        "6 variants on the chromosomes 1 to 22",
        "positions of either build: none of them tells which",
    ]
    assert findings.problems == []


@pytest.mark.parametrize(
    ("phenotypes", "line", "problem"),
    [
        (
            ["2", "1", "0", "-9"] * 10,
            "10 cases (2), 10 controls (1), 20 missing (0 or -9)",
            None,
        ),
        (["-9", "0"] * 20, "none", None),
        (
            [str(20 + number) for number in range(36)] + ["-9"] * 4,
            "numbers, 20 to 55; 4 missing (-9 or NA)",
            None,
        ),
        (
            [str(20 + number) for number in range(36)] + ["-999"] * 4,
            "numbers, -999 to 55; 0 missing (-9 or NA)",
            "fam.phenotype is -999 for 4 of 40 people, far from all other values: it counts as a "
            "number. If it stands for a missing value, declare it in missing of the client",
        ),
        (
            ["case", "control"] * 20,
            None,
            "the phenotype in {prefix}.fam of patient p0 must be a number, got 'case'",
        ),
    ],
)
def test_phenotypes_as_they_are_coded(prefix, phenotypes, line, problem):
    findings = found(prefix, pheno=phenotypes)
    told = [text for text in findings.lines if text.startswith("phenotype in the fam file: ")]
    assert told == ([] if line is None else [f"phenotype in the fam file: {line}"])
    assert findings.problems == ([] if problem is None else [problem.format(prefix=prefix)])


def test_a_sex_that_is_no_code_of_plink_is_named(prefix):
    write(prefix)
    fam = prefix.with_suffix(".fam")
    lines = [line.split() for line in fam.read_text().splitlines()]
    for line in lines[:3]:
        line[4] = "F"
    fam.write_text("\n".join(map(" ".join, lines)))
    findings = check_files(prefix)
    assert findings.lines[1] == "sex in the fam file: 18 men, 19 women, 0 unknown"
    assert findings.problems == [
        "the fam file has the sex 'F' (3 people), which counts as missing: 1 is men, 2 women, 0 "
        "unknown"
    ]


def test_chromosomes_that_are_not_analysed_are_counted_and_odd_codes_are_a_problem(prefix):
    findings = found(prefix, chromosome=["1", "chr2", "X", "23", "MT", "01"])
    assert findings.lines[3] == (
        "2 variants on the chromosomes 1 to 22; not analysed: 23 (1), MT (1), X (1)"
    )
    assert findings.problems == [
        "the bim file has the chromosomes 01 (1), which are not analysed: write 1 to 22, as plink "
        "--make-bed does"
    ]


def test_variants_out_of_order_repeated_or_without_a_position_are_named(prefix):
    findings = found(prefix, bp_position=[100, 90, 110, 120, 130, 140])
    assert findings.problems == [
        f"{prefix}.bim cannot be analysed: its variants are not in order of chromosome and "
        "position: sort its files with plink --make-bed"
    ]
    twice = found(prefix, bp_position=[100] * 6, sid=["a", "a", "b", "c", "d", "e"])
    assert twice.problems == [
        "variants with the id of another one at their position: 1; they are left out"
    ]
    unplaced = found(prefix, bp_position=[0, 0, 110, 120, 130, 140])
    assert unplaced.problems == ["variants without a position: 2; they are left out"]


def test_positions_of_two_builds_are_named(prefix):
    findings = found(
        prefix,
        chromosome=["2"] * 3 + ["19"] * 3,
        bp_position=[1, 2, 136608646, 3, 4, 44908684],
        sid=["a", "b", "rs4988235", "c", "d", "rs429358"],
    )
    assert len(findings.lines) == 4
    (problem,) = findings.problems
    assert problem.startswith("the positions are of no one build: rs4988235 lies as in GRCh37; ")


def test_an_id_twice_ends_the_check(prefix):
    with pytest.raises(InputError, match="has the individual id 'p0' more than once"):
        found(prefix, iid=["p0", *(f"p{number}" for number in range(PEOPLE - 1))])


def test_the_filesets_of_a_folder_have_all_three_files(prefix):
    write(prefix)
    write(prefix.with_name("chr2.part"))
    assert filesets(prefix.parent) == [prefix.with_name("chr2.part"), prefix]
    prefix.with_suffix(".fam").unlink()
    assert filesets(prefix.parent) == [prefix.with_name("chr2.part")]
    assert filesets(prefix.parent / "nowhere") == []


def test_hospitals_with_shifted_positions_or_other_ids_are_named(tmp_path):
    prefixes = {
        "north": write(tmp_path / "north" / "h"),
        "south": write(tmp_path / "south" / "h", bp_position=[611 + 10 * n for n in range(6)]),
        "west": write(tmp_path / "west" / "h", sid=[f"1:{100 + n}:A:G" for n in range(6)]),
        "east": write(tmp_path / "east" / "h", sid=["rs0", "rs1", "a", "b", "c", "d"]),
    }
    assert compare_files(prefixes) == [
        "of 6 variants that south and north have, 6 lie at different positions, such as rs0 at "
        "1:100 and 1:611: write all files from one reference genome",
        "west and north have no variant id in common: variants are matched by chromosome, position "
        "and id",
    ]


def test_covariates_that_are_constant_or_follow_from_others_are_named():
    rng = np.random.default_rng(0)
    age = rng.normal(50, 10, 80)
    man = rng.integers(0, 2, 80)
    columns = np.column_stack([age, 2020 - age, man, 1 - man, np.full(80, 3.0)])
    centred = columns - columns.mean(0)
    centred[:, 4] = 0.0
    names = ["age", "born", "man", "woman", "ward"]
    assert check_covariates(centred, names) == [
        "the covariate ward is the same for everybody here: a study fails if it is so at each "
        "hospital",
        "the covariate born follows from age here: a study fails if it is so at each hospital",
        "the covariate woman follows from man here: a study fails if it is so at each hospital",
    ]
    assert check_covariates(centred[:, [0, 2]], ["age", "man"]) == []
    assert check_covariates(centred[:, []], []) == []
    # What a study refuses for all hospitals together is found here too.
    with pytest.raises(InputError, match="the covariate born follows from age at each hospital"):
        require_distinct(centred[:, :4].T @ centred[:, :4], names[:4])
