"""Where the variants that a server names stand in a hospital's own file.

In a secure sum all hospitals are told the same, so a server cannot say which line of a file is
meant: each hospital finds the variants by chromosome, position and id, and compares the alleles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedmed_flower.arrays.views import view
from fedmed_flower.errors import InputError
from fedmed_flower.genomics.plink import AUTOSOMES, MOST_POSITION, Fileset
from fedmed_flower.genomics.variants import (
    ABSENT,
    REPEATED,
    SAME,
    SWAPPED,
    Variant,
    code_of,
    place_keys,
)
from fedmed_flower.wire import BLOCK, NAMED

# Lines of a bim file that are read at a time.
_LINES = 1 << 16


class Stretch(NamedTuple):
    """Some lines of a bim file: the first line, where it begins, and the least and largest key."""

    line: int
    offset: int
    least: int
    most: int


def stretches(fileset: Fileset) -> list[Stretch]:
    """Return the lines of a bim file in stretches, by which variants are found quickly."""
    found = []
    line = 0
    offset = 0
    while line < fileset.num_variants:
        listing = fileset.variants(offset, _LINES)
        placed = listing.chromosomes > 0
        keys = place_keys(listing.chromosomes, listing.positions)[placed]
        if len(keys):
            found.append(Stretch(line, offset, int(keys.min()), int(keys.max())))
        line += len(listing.names)
        offset = listing.offset
    return found


class Named(NamedTuple):
    """Variants by chromosome, position, id and alleles, as a message names them.

    Attributes
    ----------
    keys : (m,) int64 array
        `place_keys` of chromosome and position.
    names : list of str
    alleles : list of (str, str)
        A1, which is counted, and A2.
    """

    keys: NDArray[np.int64]
    names: list[str]
    alleles: list[tuple[str, str]]

    @classmethod
    def of(cls, variants: list[Variant]) -> Self:
        """Return the names of variants."""
        chromosomes = np.array([variant.chromosome for variant in variants], np.int8)
        positions = np.array([variant.position for variant in variants], np.int64)
        alleles = [(variant.a1, variant.a2) for variant in variants]
        return cls(
            place_keys(chromosomes, positions), [variant.name for variant in variants], alleles
        )

    def chosen(self, indices: NDArray[np.intp]) -> Self:
        """Return some of them."""
        places = indices.tolist()
        names = [self.names[place] for place in places]
        return type(self)(self.keys[indices], names, [self.alleles[place] for place in places])

    def content(self) -> RecordDict:
        """Return the records of a message that name them."""
        texts: dict[str, Any] = {
            "names": "\n".join(self.names),
            "first": "\n".join(first for first, _ in self.alleles),
            "second": "\n".join(second for _, second in self.alleles),
        }
        return RecordDict(
            {BLOCK: ArrayRecord({"places": Array(self.keys)}), NAMED: ConfigRecord(texts)}
        )

    @classmethod
    def read(cls, arrays: ArrayRecord, texts: Mapping[str, object], most: int) -> Self:
        """Read what `content` wrote, which may come from a stranger.

        Raises
        ------
        InputError
            If it names no variants, one twice, or more than `most`.
        """
        if "places" not in arrays:
            raise InputError("the message has no array places")
        keys = view(arrays["places"])
        names, first, second = (
            str(texts.get(name, "")).split("\n") for name in ("names", "first", "second")
        )
        if (
            keys.dtype != np.int64
            or keys.shape != (len(names),)
            or not len(first) == len(second) == len(names)
        ):
            raise InputError("places, names and alleles must be of the same variants")
        if len(names) > most:
            raise InputError(
                f"a message must name at most {most} variants for this question, got {len(names)}"
            )
        chromosomes, positions = keys >> 40, keys & ((1 << 40) - 1)
        inside = (chromosomes >= 1) & (chromosomes <= AUTOSOMES)
        if not (inside & (positions >= 1) & (positions <= MOST_POSITION)).all():
            raise InputError(
                f"variants must be on the chromosomes 1 to {AUTOSOMES}, at 1 to {MOST_POSITION}"
            )
        if len({*zip(keys.tolist(), names, strict=True)}) < len(names):
            raise InputError("a message must name each variant once")
        return cls(keys, names, [*zip(first, second, strict=True)])


def locate(
    fileset: Fileset, known: list[Stretch], named: Named
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Return the line of each variant in a hospital's file, and how its alleles relate.

    Parameters
    ----------
    fileset : Fileset
    known : list of Stretch
        `stretches` of it.
    named : Named

    Returns
    -------
    lines : (m,) int64 array
        From 0; 0 where the hospital lacks the variant.
    codes : (m,) int8 array
        As in `variants.Block`.
    """
    lines = np.zeros(len(named.names), np.int64)
    codes = np.full(len(named.names), ABSENT, np.int8)
    index_of = {
        place: index
        for index, place in enumerate(zip(named.keys.tolist(), named.names, strict=True))
    }
    least, most = int(named.keys.min()), int(named.keys.max())
    for stretch in known:
        if stretch.most < least or stretch.least > most:
            continue
        listing = fileset.variants(stretch.offset, _LINES)
        keys = place_keys(listing.chromosomes, listing.positions)
        placed = (listing.chromosomes > 0) & (keys >= least) & (keys <= most)
        for row in np.flatnonzero(placed).tolist():
            index = index_of.get((int(keys[row]), listing.names[row]))
            if index is None:
                continue
            pair = listing.first[row], listing.second[row]
            is_repeated = codes[index] != ABSENT
            lines[index] = stretch.line + row
            codes[index] = REPEATED if is_repeated else code_of(pair, named.alleles[index])
    return lines, codes


def usable(codes: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Return which variants can be counted."""
    return np.isin(codes, (SAME, SWAPPED))
