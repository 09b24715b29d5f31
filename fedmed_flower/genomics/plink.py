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

MISSING = -127
AUTOSOMES = 22
# As PLINK itself has it. 0 and less are no place.
MOST_POSITION = (1 << 31) - 1
_MAGIC, _SAMPLE_MAJOR = b"\x6c\x1b\x01", b"\x6c\x1b\x00"
_FIELDS = {".bim": 6, ".fam": 6}
_CODES = {f"{prefix}{code}": code for prefix in ("", "chr") for code in range(1, AUTOSOMES + 1)}
_READ_BYTES, _MOST_LINES = 1 << 20, 1 << 20


class Listing(NamedTuple):
    """Some variants, in the order of their file.

    Attributes
    ----------
    chromosomes : (m,) int8 array
        1 to 22; 0 for any other chromosome and for a variant without a place.
    positions : (m,) int64 array
        To 2147483647; 0 for a variant without a place.
    names, first, second : list of str
        Ids, and the alleles A1 and A2 as the file has them, in capitals.
    offset : int
        The byte at which the next line begins.
    """

    chromosomes: NDArray[np.int8]
    positions: NDArray[np.int64]
    names: list[str]
    first: list[str]
    second: list[str]
    offset: int


@dataclass(frozen=True)
class Fileset:
    """A bed, a bim and a fam file that fit each other.

    Attributes
    ----------
    prefix : Path
        Their path without the endings.
    people : tuple of str
        Individual ids (IID), in the order of the fam file.
    num_variants : int
    """

    prefix: Path
    people: tuple[str, ...]
    num_variants: int

    @classmethod
    def open(cls, prefix: str | Path) -> Self:
        """Look at three files without reading the genotypes.

        Raises
        ------
        InputError
            If a file is missing, an individual id is not unique, the bed file is none, is
            ordered by person, or does not have the size that bim and fam ask for.
        """
        prefix = Path(prefix).expanduser()
        bed, bim, fam = (prefix.with_name(prefix.name + end) for end in (".bed", ".bim", ".fam"))
        with _readable(fam):
            lines = fam.read_text(encoding="utf-8", errors="replace").splitlines()
        people = tuple(_split(fam, number, line)[1] for number, line in enumerate(lines, start=1))
        if not people:
            raise InputError(f"{fam} has no line: there is nobody in it")
        if repeated := [name for name, count in Counter(people).items() if count > 1]:
            raise InputError(
                f"{fam} has the individual id {quoted(repeated[0])} more than once: give each "
                "person an id of their own"
            )
        with _readable(bim):
            count = _count_lines(bim)
        with _readable(bed), bed.open("rb") as file:
            size, head = bed.stat().st_size, file.read(3)
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
        return cls(prefix, people, count)

    def variants(self, offset: int, count: int) -> Listing:
        """Return up to `count` variants from a byte of the bim file on.

        Parameters
        ----------
        offset : int
            0, or the `offset` of the listing before.
        count : int
            1 to 1,048,576.

        Raises
        ------
        InputError
            If a line is malformed, or a position is no number, or beyond `MOST_POSITION`.
        """
        if not 0 <= offset < 1 << 63 or not 1 <= count <= _MOST_LINES:
            raise InputError(
                f"a listing takes an offset of at least 0 and 1 to {_MOST_LINES} lines, got "
                f"{offset} and {count}"
            )
        bim = self.prefix.with_name(self.prefix.name + ".bim")
        with _readable(bim), bim.open("rb") as file:
            file.seek(offset)
            lines = list(islice(file, count))
        text = b"".join(lines)
        words = text.decode("utf-8", errors="replace").split()
        if len(words) != _FIELDS[".bim"] * len(lines):
            for at, line in enumerate(lines):
                _split(bim, _line_at(bim, offset) + at, line.decode("utf-8", errors="replace"))
        indices = [_position(word) for word in words[3::6]]
        if None in indices:
            at = indices.index(None)
            raise InputError(
                f"{bim} line {_line_at(bim, offset) + at} has the position "
                f"{quoted(words[3 + 6 * at])}: a position is a whole number from -{MOST_POSITION} "
                f"to {MOST_POSITION}"
            )
        positions = np.maximum(np.array(indices, np.int64), 0)
        chromosomes = np.array([_CODES.get(word, 0) for word in words[0::6]], np.int8)
        chromosomes[positions <= 0] = 0
        first, second = ([word.upper() for word in words[at::6]] for at in (4, 5))
        return Listing(chromosomes, positions, words[1::6], first, second, offset + len(text))

    def read(
        self, people: NDArray[np.intp] | slice, lines: NDArray[np.int64] | slice
    ) -> NDArray[np.int8]:
        """Return how often each person has allele A1.

        Parameters
        ----------
        people, lines : int array or slice
            Of the fam and of the bim file, from 0.

        Returns
        -------
        (people, variants) int8 array
            0, 1, 2, or -127 where the genotype is missing; Fortran order.
        """
        bed = self.prefix.with_name(self.prefix.name + ".bed")
        try:
            sizes = len(self.people), self.num_variants
            with bed_reader().open_bed(bed, *sizes, num_threads=1) as file:
                found: NDArray[np.int8] = file.read((people, lines), dtype="int8", order="F")
        except InputError:
            raise
        except Exception as error:  # bed-reader fails in a dozen ways.
            raise InputError(f"{bed} cannot be read: {error}") from error
        return found


def bed_reader() -> Any:
    """Return the module bed-reader.

    Raises
    ------
    InputError
        If it is not installed.
    """
    try:
        import bed_reader as found
    except ImportError as error:
        raise InputError(
            "PLINK files are read by bed-reader, which is not installed: "
            "pip install 'fedmed-flower[genomics]'"
        ) from error
    return found


def _split(file: Path, number: int, line: str) -> list[str]:
    fields = line.split()
    needed = _FIELDS[file.suffix]
    if len(fields) != needed:
        raise InputError(
            f"{file} line {number} is one of {len(fields)} fields, {needed} needed: "
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
    """Return the number, from 1, of the line that begins at a byte."""
    number = 1
    with path.open("rb") as file:
        while offset > 0 and (part := file.read(min(offset, _READ_BYTES))):
            number += part.count(b"\n")
            offset -= len(part)
    return number


def _count_lines(path: Path) -> int:
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            count, last = count + part.count(b"\n"), part[-1:]
    return count + (last != b"\n")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): genotypes are named by the path of their "
            "bed, bim and fam files without the endings"
        ) from error
