"""Genotypes in PLINK's binary form: a bed, a bim and a fam file.

S. Purcell et al., "PLINK: a tool set for whole-genome association and population-based linkage
analyses", American Journal of Human Genetics 81:559-575, 2007. The bed file is read by bed-reader.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.bounded import quoted
from fedmed_flower.errors import InputError
from fedmed_flower.genomics.coding import number_of
from fedmed_flower.genomics.types import Floats

MISSING = -127
# Columns that a fam file has for each person, as phenotype or covariate.
FAM_SEX = "fam.sex"
FAM_PHENOTYPE = "fam.phenotype"
FAM_COLUMNS = (FAM_SEX, FAM_PHENOTYPE)
_SEXES = {"1": 1.0, "2": 2.0}
AUTOSOMES = 22
# The largest that PLINK itself takes. A position of 0 or less is unknown.
MOST_POSITION = (1 << 31) - 1
_MAGIC = b"\x6c\x1b\x01"
_SAMPLE_MAJOR = b"\x6c\x1b\x00"
_FIELDS = {".bim": 6, ".fam": 6}
AUTOSOME_CODES = {
    f"{prefix}{code}": code for prefix in ("", "chr") for code in range(1, AUTOSOMES + 1)
}
_READ_BYTES = 1 << 20
_MOST_LINES = 1 << 20


class Listing(NamedTuple):
    """Consecutive variants of a bim file.

    Attributes
    ----------
    chromosomes : (m,) int8 array
        1 to 22; 0 for any other chromosome and for a variant of unknown position.
    positions : (m,) int64 array
        1 to 2147483647; 0 for a variant of unknown position.
    names, first, second : list of str
        Ids, and the alleles A1 and A2 of the file, in capitals.
    offset : int
        The byte of the file at which the next line begins.
    """

    chromosomes: NDArray[np.int8]
    positions: NDArray[np.int64]
    names: list[str]
    first: list[str]
    second: list[str]
    offset: int


@dataclass(frozen=True)
class Fileset:
    """A bed, a bim and a fam file that belong together.

    Attributes
    ----------
    prefix : Path
        The path of the files without the endings.
    people : tuple of str
        Individual ids (IID), in the order of the fam file.
    num_variants : int
    sexes, phenotypes : tuple of str
        As the fam file has them, in the same order.
    """

    prefix: Path
    people: tuple[str, ...]
    num_variants: int
    sexes: tuple[str, ...]
    phenotypes: tuple[str, ...]

    @classmethod
    def open(cls, prefix: str | Path) -> Self:
        """Check the three files and read the fam file, but no genotypes.

        Raises
        ------
        InputError
            If a file cannot be read, the fam file is empty or repeats an individual id, or the
            bed file is no bed file, is ordered by person, or does not have the size that follows
            from the bim and the fam file.
        """
        prefix = Path(prefix).expanduser()
        bed, bim, fam = (prefix.with_name(prefix.name + end) for end in (".bed", ".bim", ".fam"))
        with _readable(fam):
            lines = fam.read_text(encoding="utf-8", errors="replace").splitlines()
        fields = [_split(fam, number, line) for number, line in enumerate(lines, start=1)]
        people = tuple(line[1] for line in fields)
        if not people:
            raise InputError(f"{fam} is empty: it needs one line a person")
        if repeated := [name for name, count in Counter(people).items() if count > 1]:
            raise InputError(
                f"{fam} has the individual id {quoted(repeated[0])} more than once: give each "
                "person an id of their own"
            )
        with _readable(bim):
            count = _count_lines(bim)
        with _readable(bed), bed.open("rb") as file:
            size = bed.stat().st_size
            head = file.read(3)
        if head == _SAMPLE_MAJOR:
            raise InputError(
                f"{bed} is ordered by person, as early versions of PLINK wrote it: write it again "
                "with plink --make-bed"
            )
        if head != _MAGIC:
            raise InputError(
                f"{bed} is no bed file: it must begin with the bytes 6c 1b 01, got {head.hex(' ')}"
            )
        expected = 3 + count * math.ceil(len(people) / 4)
        if size != expected:
            raise InputError(
                f"{bed} has {size} bytes, but {count} variants (bim) of {len(people)} people (fam) "
                f"make {expected}: it was cut off, or belongs to other bim and fam files"
            )
        sexes = tuple(line[4] for line in fields)
        phenotypes = tuple(line[5] for line in fields)
        return cls(prefix, people, count, sexes, phenotypes)

    def column(self, name: str) -> Floats:
        """Return a column of the fam file.

        Parameters
        ----------
        name : {"fam.sex", "fam.phenotype"}

        Returns
        -------
        (people,) float array
            Sex: 1 for men, 2 for women, NaN for anything else. Phenotype: the number, NaN for
            ``NA``; codes of a missing one, such as -9, are numbers here.

        Raises
        ------
        InputError
            If a phenotype is no number.
        """
        if name == FAM_SEX:
            return np.array([_SEXES.get(text, math.nan) for text in self.sexes])
        numbers = []
        for person, text in zip(self.people, self.phenotypes, strict=True):
            try:
                value: Any = float(text)
            except ValueError:
                value = text
            numbers.append(number_of(value, f"the phenotype in {self.prefix}.fam", person))
        return np.array(numbers)

    def variants(self, offset: int, count: int) -> Listing:
        """Return up to `count` variants, beginning at a byte of the bim file.

        Parameters
        ----------
        offset : int
            0, or `offset` of the previous listing.
        count : int
            1 to 1,048,576.

        Raises
        ------
        InputError
            If an argument is out of range, a line is malformed, or a position is no whole number
            or is beyond `MOST_POSITION`.
        """
        if not 0 <= offset < 1 << 63 or not 1 <= count <= _MOST_LINES:
            raise InputError(
                f"offset must be at least 0 and count in 1..{_MOST_LINES}, got {offset} and {count}"
            )
        bim = self.prefix.with_name(self.prefix.name + ".bim")
        with _readable(bim), bim.open("rb") as file:
            file.seek(offset)
            lines = list(islice(file, count))
        text = b"".join(lines)
        words = text.decode("utf-8", errors="replace").split()
        if len(words) != _FIELDS[".bim"] * len(lines):
            for index, line in enumerate(lines):
                _split(bim, _line_at(bim, offset) + index, line.decode("utf-8", errors="replace"))
        parsed = [_position(word) for word in words[3::6]]
        if None in parsed:
            index = parsed.index(None)
            raise InputError(
                f"{bim} line {_line_at(bim, offset) + index} has the position "
                f"{quoted(words[3 + 6 * index])}: a position is a whole number from "
                f"-{MOST_POSITION} to {MOST_POSITION}"
            )
        positions = np.maximum(np.array(parsed, np.int64), 0)
        chromosomes = np.array([AUTOSOME_CODES.get(word, 0) for word in words[0::6]], np.int8)
        chromosomes[positions <= 0] = 0
        first, second = ([word.upper() for word in words[column::6]] for column in (4, 5))
        return Listing(chromosomes, positions, words[1::6], first, second, offset + len(text))

    def chromosome_codes(self) -> Counter[str]:
        """Return the number of lines of the bim file by their first field."""
        bim = self.prefix.with_name(self.prefix.name + ".bim")
        with _readable(bim), bim.open("rb") as file:
            fields = (line.split(None, 1) for line in file)
            counts = Counter(line[0] if line else b"" for line in fields)
        return Counter(
            {code.decode("utf-8", errors="replace"): count for code, count in counts.items()}
        )

    def read(
        self, people: NDArray[np.intp] | slice, lines: NDArray[np.int64] | slice
    ) -> NDArray[np.int8]:
        """Return how many copies of allele A1 each person has.

        Parameters
        ----------
        people, lines : int array or slice
            Indices of lines of the fam and of the bim file, from 0.

        Returns
        -------
        (people, variants) int8 array
            0, 1 or 2; -127 if the genotype is missing. In Fortran order.

        Raises
        ------
        InputError
            If bed-reader is not installed or cannot read the bed file.
        """
        bed = self.prefix.with_name(self.prefix.name + ".bed")
        try:
            sizes = len(self.people), self.num_variants
            with bed_reader().open_bed(bed, *sizes, num_threads=1) as file:
                copies: NDArray[np.int8] = file.read((people, lines), dtype="int8", order="F")
        except InputError:
            raise
        except Exception as error:  # bed-reader fails in a dozen ways.
            raise InputError(f"{bed} cannot be read: {error}") from error
        return copies


def bed_reader() -> Any:
    """Return the module bed-reader.

    Raises
    ------
    InputError
        If it is not installed.
    """
    try:
        import bed_reader as module
    except ImportError as error:
        raise InputError(
            "PLINK files are read by bed-reader, which is not installed: "
            "pip install 'fedmed-flower[genomics]'"
        ) from error
    return module


def _split(file: Path, number: int, line: str) -> list[str]:
    fields = line.split()
    needed = _FIELDS[file.suffix]
    if len(fields) != needed:
        raise InputError(
            f"{file} line {number} must have {needed} fields, got {len(fields)}: "
            f"{quoted(line.strip())}"
        )
    return fields


def _position(text: str) -> int | None:
    try:
        position = int(text)
    except ValueError:
        return None
    return position if abs(position) <= MOST_POSITION else None


def _line_at(path: Path, offset: int) -> int:
    """Return the number, from 1, of the line that begins at a byte of the file."""
    number = 1
    with path.open("rb") as file:
        while offset > 0 and (part := file.read(min(offset, _READ_BYTES))):
            number += part.count(b"\n")
            offset -= len(part)
    return number


def _count_lines(path: Path) -> int:
    count = 0
    last = b"\n"
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            count += part.count(b"\n")
            last = part[-1:]
    return count + (last != b"\n")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): give the path of the bed, bim and "
            "fam files without the endings"
        ) from error
