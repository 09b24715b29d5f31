"""Polygenic scores: weighted counts of alleles, as features of a table.

S. A. Lambert et al., "The Polygenic Score Catalog as an open database for reproducibility and
systematic evaluation", Nature Genetics 53:420-425, 2021, whose files `read_weights` reads too.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from fedmed_flower.data.bounded import quoted, unpacked
from fedmed_flower.data.cells import LARGEST
from fedmed_flower.errors import InputError, shown
from fedmed_flower.genomics.plink import Fileset
from fedmed_flower.genomics.variants import complement

_BLOCK = 4096
# Names of each column: the first that a file has is read. Second are those of the PGS Catalog.
_COLUMNS = {
    "variant": ("id", "rsID", "variant", "SNP"),
    "allele": ("allele", "effect_allele", "A1"),
    "weight": ("weight", "effect_weight", "BETA"),
    "other": ("other", "other_allele", "A2"),
    "frequency": ("frequency", "allelefrequency_effect"),
}


class Weight(NamedTuple):
    """The weight of one allele in a score.

    Attributes
    ----------
    variant : str
        The variant's id.
    allele : str
        The allele that is counted.
    weight : float
        What each copy of `allele` adds to the score.
    other : str
        The other allele; empty if it is not known.
    frequency : float
        Frequency of `allele`, for people whose genotype is missing; NaN if it is not known.
    """

    variant: str
    allele: str
    weight: float
    other: str = ""
    frequency: float = math.nan


@dataclass(frozen=True)
class Scores:
    """Scores of the people of a fileset.

    Attributes
    ----------
    values : dict of str to float
        Score by individual id.
    used : int
        How many weights the scores are made of.
    left_out : dict of str to str
        Why each other weight is left out, by the id of its variant.
    """

    values: dict[str, float]
    used: int
    left_out: dict[str, str]


def read_weights(path: str | Path) -> list[Weight]:
    """Read weights from a text file with a header, plain or gzipped.

    The columns are ``id``, ``allele`` and ``weight``, optionally ``other`` and ``frequency``, or
    have the names of the PGS Catalog. Tabs or commas separate them. Lines that begin with # are
    skipped.

    Raises
    ------
    InputError
        If the file cannot be read, a column is missing, a line has no id or allele, a value is no
        number, a weight is beyond 1e30, or the file unpacks to more than `bounded.MOST` bytes.
    """
    path = Path(path).expanduser()
    try:
        with _text(path) as file:
            return _weights(path, (line for line in file if not line.startswith("#")))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"the weights {path} cannot be read: {error}") from error


def polygenic_scores(
    prefix: str | Path,
    weights: Sequence[Weight],
    frequencies: Mapping[str, float] | None = None,
) -> Scores:
    """Return the sum over variants of weight times copies of the allele, for each person.

    The allele may be A1 or A2 of the bim file. If it is neither, it is looked up on the other
    strand, unless both strands of the variant read the same.

    Parameters
    ----------
    prefix : path
        Path of the bed, bim and fam files, without the endings.
    weights : sequence of Weight
    frequencies : dict, optional
        Frequency of the counted allele by variant id, which replaces a missing genotype. It takes
        precedence over the frequency of the weight.

    Raises
    ------
    InputError
        If a file is malformed, a variant has two weights, a frequency is not in [0, 1], or a
        genotype is missing and the frequency is not known.
    """
    fileset = Fileset.open(prefix)
    frequency_of = dict(frequencies or {})
    wanted: dict[str, Weight] = {}
    for weight in weights:
        if wanted.setdefault(weight.variant, weight) is not weight:
            raise InputError(f"variant {weight.variant} has two weights: remove one")
        frequency = frequency_of.setdefault(weight.variant, weight.frequency)
        if not (math.isnan(frequency) or 0 <= frequency <= 1):
            raise InputError(
                f"the frequency of {weight.variant} must lie in [0, 1], got {frequency}"
            )
    variants: dict[str, tuple[int, str, str]] = {}
    left_out: dict[str, str] = {}
    line = 0
    offset = 0
    while line < fileset.num_variants:
        listing = fileset.variants(offset, _BLOCK)
        for index, name in enumerate(listing.names):
            if name in wanted:
                if name in variants:
                    left_out[name] = f"its id is repeated in {fileset.prefix}.bim"
                variants[name] = (line + index, listing.first[index], listing.second[index])
        line += len(listing.names)
        offset = listing.offset
    lines: list[int] = []
    signed: list[tuple[Weight, bool]] = []
    for name, weight in wanted.items():
        if name not in variants:
            left_out[name] = f"it is not in {fileset.prefix}.bim"
        elif name not in left_out:
            line, first, second = variants[name]
            swapped = _swapped(weight, first, second)
            if swapped is None:
                left_out[name] = f"its alleles are {first}/{second}"
            else:
                lines.append(line)
                signed.append((weight, swapped))
    totals = np.zeros(len(fileset.people))
    for start in range(0, len(lines), _BLOCK):
        part = np.array(lines[start : start + _BLOCK], np.int64)
        genotypes = fileset.read(slice(None), part)
        for column, (weight, swapped) in zip(
            genotypes.T, signed[start : start + _BLOCK], strict=True
        ):
            counts = (2.0 - column) if swapped else column.astype(np.float64)
            missing = column < 0
            if missing.any():
                frequency = frequency_of[weight.variant]
                if math.isnan(frequency):
                    raise InputError(
                        f"{missing.sum()} people have no genotype of {weight.variant}: give its "
                        "frequency, in the weights or in frequencies"
                    )
                counts[missing] = 2 * frequency
            totals += weight.weight * counts
    values = dict(zip(fileset.people, totals.tolist(), strict=True))
    return Scores(values, len(lines), left_out)


def _swapped(weight: Weight, first: str, second: str) -> bool | None:
    """Return whether the counted allele is the second one; None if it is neither."""
    pair = (weight.allele.upper(), weight.other.upper())
    pairs = [pair]
    if complement(first) != second:
        pairs.append((complement(pair[0]), complement(pair[1])))
    for allele, other in pairs:
        for swapped, (counted, rest) in enumerate(((first, second), (second, first))):
            # "0" stands for an allele that nobody in the file has.
            if allele == counted and (not other or rest in (other, "0")):
                return bool(swapped)
            if counted == "0" and other and other == rest:
                return bool(swapped)
    return None


def _weights(path: Path, lines: Iterable[str]) -> list[Weight]:
    rows = csv.reader(lines, delimiter="\t")
    head = next(rows, [])
    if len(head) == 1:
        head = head[0].split(",")
        rows = csv.reader(lines)
    head = [name.strip() for name in head]
    columns = {
        key: next((head.index(name) for name in names if name in head), None)
        for key, names in _COLUMNS.items()
    }
    for key in ("variant", "allele", "weight"):
        if columns[key] is None:
            raise InputError(
                f"{path} has no column {' or '.join(_COLUMNS[key])}: it has {', '.join(head)}"
            )
    weights = []
    for row in rows:
        if not any(row):
            continue
        cell = {
            key: row[index].strip() if index is not None and index < len(row) else ""
            for key, index in columns.items()
        }
        try:
            weight = float(cell["weight"])
            frequency = float(cell["frequency"]) if cell["frequency"] else math.nan
        except ValueError as error:
            text = shown(error, 200)
            raise InputError(f"{path}, variant {quoted(cell['variant'])}: {text}") from None
        # The limit keeps sums over all variants finite.
        if not abs(weight) <= LARGEST or not cell["variant"] or not cell["allele"]:
            raise InputError(
                f"{path}, variant {quoted(cell['variant'])}: each line needs an id, an allele and "
                f"a weight from -{LARGEST:g} to {LARGEST:g}, got {quoted(cell['allele'])} and "
                f"{weight}"
            )
        weights.append(Weight(cell["variant"], cell["allele"], weight, cell["other"], frequency))
    return weights


def _text(path: Path) -> TextIO:
    if path.suffix.lower() != ".gz":
        return path.open(encoding="utf-8")
    with gzip.open(path) as packed:
        content = unpacked(packed, path, "a file of weights")
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
