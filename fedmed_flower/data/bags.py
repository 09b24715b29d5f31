"""What is wrong with a hospital's bags of patches: each patch is read once, completely."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from fedmed_flower.data.checks import Finding, check_row
from fedmed_flower.data.site import Row
from fedmed_flower.errors import InputError
from fedmed_flower.images.bags import patches_of
from fedmed_flower.images.reading import files_of


def check_bag(row: Row, spatial_dims: int | None, num_classes: int | None) -> Finding:
    """Read the patches of a row and describe them; a problem is part of the finding.

    Parameters
    ----------
    row : dict
        ``image``, a bag as `patches_of` takes it; ``label`` and ``patient``.
    spatial_dims : int or None
        Of a patch. None takes the dimensions of each file, and 2 for patches of an array.
    num_classes : int or None
        None accepts all whole numbers from 0 on.

    Returns
    -------
    Finding
        Shape, spacing and orientation are those of each patch, which must be the same; `low` and
        `high` are those of all patches.
    """
    image = row.get("image")
    name = "; ".join(map(str, files_of(image))) or "array"
    try:
        patches = patches_of(image, spatial_dims or 2)
    except InputError as error:
        return Finding(str(row.get("patient", "")), name, problem=str(error))
    found = (check_row({**row, "image": patch}, spatial_dims, num_classes) for patch in patches)
    return replace(_together(found), image=name)


def _together(findings: Iterator[Finding]) -> Finding:
    """Return what was found in all patches of a bag, or the first patch with a problem."""
    first = next(findings)
    lows = []
    highs = []
    for finding in chain([first], findings):
        if finding.problem is not None:
            return finding
        if finding.shape != first.shape:
            problem = (
                f"the patches of its bag differ in shape: {first.image} has {first.shape}, "
                f"{finding.image} {finding.shape}"
            )
            return replace(finding, problem=problem)
        if finding.low is not None and finding.high is not None:
            lows.append(finding.low)
            highs.append(finding.high)
    return replace(first, low=min(lows), high=max(highs))
