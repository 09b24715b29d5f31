"""The variants of several hospitals in one order, with the same allele counted at each."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.genomics.plink import AUTOSOMES, MOST_POSITION, Listing

ABSENT, SAME, SWAPPED, OTHER_ALLELES, UNCLEAR_STRAND, REPEATED = range(-1, 5)
REASONS = {
    ABSENT: "absent",
    OTHER_ALLELES: "other alleles",
    UNCLEAR_STRAND: "swapped or from the other strand",
    REPEATED: "id repeated",
}
_UNKNOWN = ("0", ".")
# Variants of one hospital at one position: they are held until its next position has come.
_MOST_AT_ONE_PLACE = 1 << 16
_OTHER_STRAND = str.maketrans("ACGT", "TGCA")


def complement(allele: str) -> str:
    """Return an allele as it reads on the other strand."""
    return allele.translate(_OTHER_STRAND)[::-1]


@lru_cache(maxsize=1 << 16)
def align(pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], tuple[int, ...]]:
    """Return A1 and A2 as most hospitals have them, and how each hospital's alleles relate to them.

    Parameters
    ----------
    pairs : tuple of (str, str)
        A1 and A2 of each hospital. The first of tied pairs is taken. ``0`` or ``.`` stands for an
        allele that nobody at the hospital has.

    Returns
    -------
    pair : (str, str)
    codes : tuple of int
        `SAME`, `SWAPPED` or `OTHER_ALLELES`; `UNCLEAR_STRAND` if the alleles are swapped and both
        strands read the same (A/T, C/G), so that they may as well be from the other strand.
    """
    if len(set(pairs)) == 1:
        return pairs[0], (SAME,) * len(pairs)
    whole = [pair for pair in pairs if not set(pair) & set(_UNKNOWN)]
    if whole:
        together = Counter(frozenset(pair) for pair in whole).most_common(1)[0][0]
        ordered = Counter(pair for pair in whole if frozenset(pair) == together)
        reference = ordered.most_common(1)[0][0]
    else:
        # Every hospital has one allele alone; two different ones make the variant.
        known = list(dict.fromkeys(a for pair in pairs for a in pair if a not in _UNKNOWN))
        reference = (known[1], known[0]) if len(known) == 2 else pairs[0]
    return reference, tuple(code_of(pair, reference) for pair in pairs)


def code_of(pair: tuple[str, str], reference: tuple[str, str]) -> int:
    """Return how a hospital's alleles of a variant relate to A1 and A2, as `align`."""
    if pair == reference:
        return SAME

    def fits(alleles: tuple[str, str]) -> bool:
        return all(a in (b, *_UNKNOWN) for a, b in zip(alleles, reference, strict=True))

    if fits(pair):
        return SAME
    if fits((pair[1], pair[0])):
        return UNCLEAR_STRAND if complement(reference[0]) == reference[1] else SWAPPED
    return OTHER_ALLELES


def _within(values: NDArray[Any], least: int, most: int) -> bool:
    return bool(((values >= least) & (values <= most)).all())


def place_keys(chromosomes: NDArray[np.int8], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return numbers in the order of chromosome and position."""
    return np.asarray(chromosomes.astype(np.int64) << 40 | positions, np.int64)


class Variant(NamedTuple):
    """A variant and the two alleles that all hospitals distinguish; A1 is counted."""

    chromosome: int
    position: int
    name: str
    a1: str
    a2: str


class Block(NamedTuple):
    """Some variants of all hospitals, in order of chromosome and position.

    Attributes
    ----------
    variants : list of Variant
    lines : (hospitals, variants) int64 array
        The variant's line in a hospital's bim file, from 0.
    codes : (hospitals, variants) int8 array
        How a hospital's alleles relate to the variant's, as `align` returns it; `ABSENT` if the
        hospital lacks the variant, `REPEATED` if it has the variant twice.
    """

    variants: list[Variant]
    lines: NDArray[np.int64]
    codes: NDArray[np.int8]

    def usable(self) -> NDArray[np.bool_]:
        """Return which hospital can count which variant."""
        return np.isin(self.codes, (SAME, SWAPPED))


class Merger:
    """Merges lists of variants that come in parts, and holds only a few parts of each list.

    A variant is identified by chromosome, position and id together.

    Parameters
    ----------
    count : int
        Number of hospitals.
    size : int
        Number of variants that one part should have.

    Attributes
    ----------
    read : list of int
        Number of lines that have come from each hospital.
    skipped : list of int
        How many of these lines are on no autosome or have no position.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.read = [0] * count
        self.skipped = [0] * count
        self._ended = [False] * count
        self._waiting: list[list[tuple[int, str, int, tuple[str, str]]]] = [
            [] for _ in range(count)
        ]
        self._last = [0] * count

    def hungry(self) -> list[int]:
        """Return the hospitals whose next part is needed before `take`."""
        return [
            site
            for site, ended in enumerate(self._ended)
            if not ended and len(self._waiting[site]) < self.size
        ]

    def add(self, site: int, part: Listing, ended: bool) -> None:
        """Take the next part of a hospital's list.

        Raises
        ------
        ValueError
            If the part begins before the end of the previous one, is not in order, has a position
            out of range, or has too many variants at one position.
        """
        indices = np.flatnonzero(part.chromosomes)
        chromosomes = part.chromosomes[indices]
        positions = part.positions[indices]
        if not _within(chromosomes, 1, AUTOSOMES) or not _within(positions, 1, MOST_POSITION):
            raise ValueError(
                f"it has variants outside of the chromosomes 1 to {AUTOSOMES} or of the positions "
                f"1 to {MOST_POSITION}"
            )
        keys = place_keys(chromosomes, positions)
        if (np.diff(keys, prepend=self._last[site]) < 0).any():
            raise ValueError(
                "its variants are not in order of chromosome and position: sort its files with "
                "plink --make-bed"
            )
        waiting = list(self._waiting[site])
        for key, index in zip(keys.tolist(), indices.tolist(), strict=True):
            alleles = (part.first[index], part.second[index])
            waiting.append((key, part.names[index], self.read[site] + index, alleles))
        crowd = waiting[-1 - _MOST_AT_ONE_PLACE :]
        if len(crowd) > _MOST_AT_ONE_PLACE and crowd[0][0] == crowd[-1][0]:
            raise ValueError(f"it has more than {_MOST_AT_ONE_PLACE} variants at one position")
        self._waiting[site] = waiting
        self.read[site] += len(part.names)
        self.skipped[site] += len(part.names) - len(indices)
        self._last[site] = int(keys[-1]) if len(keys) else self._last[site]
        self._ended[site] = ended

    def end(self, site: int) -> None:
        """Drop a hospital's waiting variants and expect no more."""
        self._waiting[site] = []
        self._ended[site] = True

    def take(self) -> Block | None:
        """Return the next variants.

        Returns
        -------
        Block or None
            A block without a variant if more lines must come first; None at the end.
        """
        open_ends = [self._last[site] for site, ended in enumerate(self._ended) if not ended]
        # At the last position that a hospital has sent, more variants may follow.
        horizon = min(open_ends, default=1 << 62)
        entries: dict[tuple[int, str], list[tuple[int, int, tuple[str, str]]]] = {}
        for site, waiting in enumerate(self._waiting):
            cut = bisect_left(waiting, horizon, key=itemgetter(0))
            for key, name, line, pair in waiting[:cut]:
                entries.setdefault((key, name), []).append((site, line, pair))
            del waiting[:cut]
        if not entries and not open_ends:
            return None
        if not entries and not self.hungry():
            self.size *= 2
        return _block(entries, len(self._waiting))


def _block(
    entries: dict[tuple[int, str], list[tuple[int, int, tuple[str, str]]]], count: int
) -> Block:
    variants: list[Variant] = []
    lines = [[0] * len(entries) for _ in range(count)]
    codes = [[ABSENT] * len(entries) for _ in range(count)]
    for index, (key, name) in enumerate(sorted(entries)):
        hospital_entries = entries[key, name]
        (a1, a2), relations = align(tuple([pair for _, _, pair in hospital_entries]))
        variants.append(Variant(key >> 40, key & ((1 << 40) - 1), name, a1, a2))
        for (site, line, _), code in zip(hospital_entries, relations, strict=True):
            is_repeated = codes[site][index] != ABSENT
            lines[site][index] = line
            codes[site][index] = REPEATED if is_repeated else code
    return Block(variants, np.array(lines, np.int64), np.array(codes, np.int8))
