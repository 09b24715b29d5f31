"""What a hospital's genotype files hold, and what is wrong with them, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedmed_flower.data.cells import plain
from fedmed_flower.data.site import some_of
from fedmed_flower.errors import InputError, shown
from fedmed_flower.genomics.builds import BuildCheck
from fedmed_flower.genomics.coding import (
    MISSING_CODES,
    lone_text,
    lone_values,
    without_codes,
)
from fedmed_flower.genomics.covariates import constant, dependent
from fedmed_flower.genomics.plink import (
    AUTOSOME_CODES,
    AUTOSOMES,
    FAM_PHENOTYPE,
    Fileset,
    Listing,
)
from fedmed_flower.genomics.types import Floats
from fedmed_flower.genomics.variants import REPEATED, Merger

# Variants that are read at a time.
_PART = 1 << 14
# PLINK's codes of the chromosomes that are not analysed.
_OTHERS = ("X", "Y", "XY", "MT", "M", "23", "24", "25", "26", "0")
_OTHER_CODES = {f"{prefix}{code}" for prefix in ("", "chr") for code in _OTHERS}
_SEXES = {"1": "men", "2": "women", "0": "unknown"}
_ENDS = (".bed", ".bim", ".fam")


@dataclass(frozen=True)
class Findings:
    """What was found: lines that describe it, and problems."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def filesets(folder: Path) -> list[Path]:
    """Return the paths, without the endings, of the bed, bim and fam files in a folder."""
    beds = sorted(folder.glob("*.bed"))
    prefixes = [path.with_suffix("") for path in beds]
    return [
        prefix
        for prefix in prefixes
        if all(prefix.with_name(prefix.name + end).is_file() for end in _ENDS)
    ]


def check_files(prefix: Path) -> Findings:
    """Describe the people and the variants of a fileset; genotypes are not read.

    Raises
    ------
    InputError
        As `Fileset.open`, and as `Fileset.variants` for a malformed bim file.
    """
    fileset = Fileset.open(prefix)
    found = Findings()
    count = len(fileset.people)
    found.lines.append(f"{prefix.name}: {count} people, {fileset.num_variants} variants")
    _look_at_sexes(fileset, found)
    _look_at_phenotypes(fileset, found)
    _look_at_variants(fileset, found)
    return found


def check_covariates(values: Floats, names: Sequence[str]) -> list[str]:
    """Return in words which covariates of a hospital are constant or follow from others.

    Parameters
    ----------
    values : (n, c) float array
        Centred on their means.
    names : sequence of str
    """
    sums = values.T @ values
    same = constant(sums, names)
    problems = [
        f"the covariate {name} is the same for everybody here: a study fails if it is so at each "
        "hospital"
        for name in same
    ]
    varying = [index for index, name in enumerate(names) if name not in same]
    part = sums[np.ix_(varying, varying)]
    for name, others in dependent(part, [names[index] for index in varying]):
        problems.append(
            f"the covariate {name} follows from {' and '.join(others)} here: a study fails if it "
            "is so at each hospital"
        )
    return [shown(problem) for problem in problems]


def compare_files(prefixes: Mapping[str, Path]) -> list[str]:
    """Return in words at which hospitals variants lie elsewhere, or have other ids.

    Parameters
    ----------
    prefixes : dict of str to Path
        Of the files of each hospital, which `check_files` accepts; all are compared with the first.
    """
    problems = []
    (first, prefix), *others = prefixes.items()
    places = dict(_places(prefix))
    for name, other in others:
        shared = 0
        moved = 0
        example = ""
        for variant, place in _places(other):
            if variant not in places:
                continue
            shared += 1
            if places[variant] != place:
                moved += 1
                example = example or (f"{variant} at {_place(places[variant])} and {_place(place)}")
        if not shared:
            problems.append(
                f"{name} and {first} have no variant id in common: variants are matched by "
                "chromosome, position and id"
            )
        if moved:
            problems.append(
                f"of {shared} variants that {name} and {first} have, {moved} lie at different "
                f"positions, such as {example}: write all files from one reference genome"
            )
    return [shown(problem) for problem in problems]


def _places(prefix: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    for listing, _ in _listings(Fileset.open(prefix)):
        chromosomes = listing.chromosomes.tolist()
        positions = listing.positions.tolist()
        for name, *place in zip(listing.names, chromosomes, positions, strict=True):
            if place[0]:
                yield name, (place[0], place[1])


def _place(place: tuple[int, int]) -> str:
    return f"{place[0]}:{place[1]}"


def _look_at_sexes(fileset: Fileset, found: Findings) -> None:
    counts = Counter(fileset.sexes)
    parts = [f"{counts[code]} {name}" for code, name in _SEXES.items()]
    found.lines.append(f"sex in the fam file: {', '.join(parts)}")
    if odd := sorted(counts.keys() - _SEXES.keys()):
        listed = some_of([f"{code!r} ({counts[code]} people)" for code in odd])
        found.problems.append(
            shown(
                f"the fam file has the sex {listed}, which counts as missing: 1 is men, 2 women, 0 "
                "unknown"
            )
        )


def _look_at_phenotypes(fileset: Fileset, found: Findings) -> None:
    try:
        given = fileset.column(FAM_PHENOTYPE)
    except InputError as error:
        found.problems.append(str(error))
        return
    values = without_codes(given, MISSING_CODES)
    known = values[np.isfinite(values)]
    missing = len(values) - len(known)
    what = "phenotype in the fam file"
    if {*known.tolist()} <= {0.0, 1.0, 2.0}:
        cases = int((known == 2).sum())
        controls = int((known == 1).sum())
        unknown = len(values) - cases - controls
        text = f"{cases} cases (2), {controls} controls (1), {unknown} missing (0 or -9)"
        found.lines.append(f"{what}: {text}" if cases or controls else f"{what}: none")
        return
    limits = f"{plain(known.min())} to {plain(known.max())}"
    found.lines.append(f"{what}: numbers, {limits}; {missing} missing (-9 or NA)")
    found.problems.extend(lone_text(FAM_PHENOTYPE, lone) for lone in lone_values(values))


def _look_at_variants(fileset: Fileset, found: Findings) -> None:
    build = BuildCheck()
    merger = Merger(1, _PART)
    repeated = 0
    unplaced = 0
    ordered = True
    for listing, ended in _listings(fileset):
        build.add(listing)
        unplaced += int(((listing.chromosomes == 0) & (listing.positions <= 0)).sum())
        if ordered:
            try:
                merger.add(0, listing, ended)
            except ValueError as error:
                found.problems.append(f"{fileset.prefix}.bim cannot be analysed: {error}")
                ordered = False
        if ordered and (block := merger.take()):
            repeated += int((block.codes == REPEATED).sum())
    if repeated:
        found.problems.append(
            f"variants with the id of another one at their position: {repeated}; they are left out"
        )
    if unplaced:
        found.problems.append(f"variants without a position: {unplaced}; they are left out")
    _look_at_chromosomes(fileset, found)
    if problem := build.problem():
        found.problems.append(problem)
    else:
        found.lines.append(build.text())


def _look_at_chromosomes(fileset: Fileset, found: Findings) -> None:
    codes = fileset.chromosome_codes()
    other = {code: count for code, count in codes.items() if code in _OTHER_CODES}
    odd = {
        code: count
        for code, count in codes.items()
        if code not in AUTOSOME_CODES.keys() | _OTHER_CODES
    }
    analysed = sum(count for code, count in codes.items() if code in AUTOSOME_CODES)
    text = f"{analysed} variants on the chromosomes 1 to {AUTOSOMES}"
    if other:
        text += f"; not analysed: {_counted(other)}"
    found.lines.append(text)
    if odd:
        found.problems.append(
            shown(
                f"the bim file has the chromosomes {_counted(odd)}, which are not analysed: write "
                f"1 to {AUTOSOMES}, as plink --make-bed does"
            )
        )


def _counted(codes: dict[str, int]) -> str:
    most = sorted(codes.items(), key=lambda item: (-item[1], item[0]))
    return some_of([f"{code} ({count})" for code, count in most], 10)


def _listings(fileset: Fileset) -> Iterator[tuple[Listing, bool]]:
    """Yield the variants in parts, and whether a part is the last."""
    offset = 0
    left = fileset.num_variants
    while left > 0:
        listing = fileset.variants(offset, _PART)
        offset = listing.offset
        left -= len(listing.names)
        yield listing, left <= 0
