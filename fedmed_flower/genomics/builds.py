"""Of which reference genome the positions of variants are: GRCh37 or GRCh38."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from fedmed_flower.genomics.plink import Listing

BUILDS = ("GRCh37", "GRCh38")
# Variants that most arrays have, by id: chromosome, and position in each build (dbSNP).
LANDMARKS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "rs1801133": (1, 11856378, 11796321),
        "rs6025": (1, 169519049, 169549811),
        "rs4988235": (2, 136608646, 135851076),
        "rs1800562": (6, 26093141, 26092913),
        "rs7903146": (10, 114758349, 112998590),
        "rs12913832": (15, 28365618, 28120472),
        "rs1426654": (15, 48426484, 48134287),
        "rs9939609": (16, 53820527, 53786615),
        "rs429358": (19, 45411941, 44908684),
        "rs7412": (19, 45412079, 44908822),
    }
)
# Lengths of the chromosomes 1 to 22 in each build (Genome Reference Consortium).
_LENGTHS = np.array(
    [
        [249250621, 243199373, 198022430, 191154276, 180915260, 171115067, 159138663, 146364022,
         141213431, 135534747, 135006516, 133851895, 115169878, 107349540, 102531392, 90354753,
         81195210, 78077248, 59128983, 63025520, 48129895, 51304566],
        [248956422, 242193529, 198295559, 190214555, 181538259, 170805979, 159345973, 145138636,
         138394717, 133797422, 135086622, 133275309, 114364328, 107043718, 101991189, 90338345,
         83257441, 80373285, 58617616, 64444167, 46709983, 50818468],
    ]
)  # fmt: skip


class BuildCheck:
    """Compares the variants of a hospital with known ones, and with the ends of chromosomes.

    Attributes
    ----------
    landmarks : dict of str to str
        Of the known variants that were found: the build that has it there; empty if none has.
    beyond : (2,) int array
        How many variants lie beyond the end of their chromosome, in each of `BUILDS`.
    """

    def __init__(self) -> None:
        self.landmarks: dict[str, str] = {}
        self.beyond = np.zeros(len(BUILDS), np.int64)

    def add(self, listing: Listing) -> None:
        """Take some variants; those on no autosome do not count."""
        placed = listing.chromosomes > 0
        chromosomes = listing.chromosomes[placed].astype(np.intp)
        self.beyond += (listing.positions[placed] > _LENGTHS[:, chromosomes - 1]).sum(1)
        for index, name in enumerate(listing.names):
            if name in LANDMARKS and placed[index]:
                chromosome, *positions = LANDMARKS[name]
                builds = dict(zip(positions, BUILDS, strict=True))
                here = int(listing.chromosomes[index]) == chromosome
                position = int(listing.positions[index])
                self.landmarks[name] = builds.get(position, "") if here else ""

    @property
    def possible(self) -> list[str]:
        """The builds that nothing speaks against."""
        found = {*self.landmarks.values()}
        return [
            build
            for build, count in zip(BUILDS, self.beyond, strict=True)
            if not count and found <= {build}
        ]

    def text(self) -> str:
        """Return the build in words; empty if no build fits, which `problem` then says."""
        possible = self.possible
        if len(possible) == 1:
            (build,) = possible
            others = [
                count for name, count in zip(BUILDS, self.beyond, strict=True) if name != build
            ]
            reasons = [f"as {name} lies" for name in self.landmarks]
            if others[0]:
                other = BUILDS[1 - BUILDS.index(build)]
                reasons.append(f"with {others[0]} beyond the ends of chromosomes of {other}")
            return f"positions of {build}, {', '.join(reasons)}"
        return "positions of either build: none of them tells which" if possible else ""

    def problem(self) -> str:
        """Return why no build fits; empty if one does."""
        if self.possible:
            return ""
        parts = [
            f"{name} lies as in {build or f'neither {BUILDS[0]} nor {BUILDS[1]}'}"
            for name, build in self.landmarks.items()
        ]
        parts += [
            f"beyond the ends of chromosomes of {build} lie {count}"
            for build, count in zip(BUILDS, self.beyond, strict=True)
            if count
        ]
        return (
            f"the positions are of no one build: {'; '.join(parts)}: write all files from one "
            "reference genome"
        )
