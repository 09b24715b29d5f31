"""What hospitals answer in an association study, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedmed_flower.arrays.views import is_finite, view
from fedmed_flower.genomics.association import (
    CASE_COPIES,
    CASES,
    CONTROL_COPIES,
    CONTROLS,
    SQUARES,
    WITHHELD,
)
from fedmed_flower.genomics.plink import MOST_POSITION, Listing
from fedmed_flower.genomics.types import Counts, Floats
from fedmed_flower.wire import COHORT, PLACES, TOLD, VARIANTS

# No hospital has more people or variants, and no study more covariates.
_MOST, _MOST_COVARIATES = 10**9, 200


def read_about(content: RecordDict) -> dict[str, Any]:
    """Return what a hospital says of its people.

    Raises
    ------
    ValueError
        If it is malformed.
    """
    record = dict(content.config_records[COHORT])
    about: dict[str, Any] = {
        key: int(record[key])  # type: ignore[arg-type]
        for key in ("people", "cases", "variants", "minimum")
    }
    within = min(about.values()) >= 0 and max(about.values()) <= _MOST
    if not within or about["cases"] > about["people"] or not about["people"]:
        raise ValueError(f"{about} cannot be")
    about |= {key: str(record[key]) for key in ("trait", "phenotype")}
    about["covariates"] = [str(name) for name in record["covariates"]]  # type: ignore[union-attr]
    if (count := len(about["covariates"])) > _MOST_COVARIATES:
        raise ValueError(f"{count} covariates, where at most {_MOST_COVARIATES} can be")
    return about


def read_listing(content: RecordDict, most: int) -> Listing:
    """Return the part of a list of variants that a hospital sent.

    Raises
    ------
    ValueError
        If it is malformed, or longer than `most`.
    """
    record, indices = content.config_records[VARIANTS], content.array_records[PLACES]
    chromosomes, positions = view(indices["chromosomes"]), view(indices["positions"])
    texts = [str(record[name]).split("\n") for name in ("names", "first", "second")]
    count = len(positions)
    if chromosomes.dtype != np.int8 or positions.dtype != np.int64:
        raise ValueError("places of another type")
    if chromosomes.shape != (count,) or not 0 < count <= most:
        raise ValueError(f"{count} variants where 1 to {most} were asked for")
    if any(len(text) != count for text in texts):
        raise ValueError("ids and alleles for another number of variants")
    if chromosomes.min() < 0 or chromosomes.max() > 22 or not _within(positions, 0, MOST_POSITION):
        raise ValueError("places on no chromosome")
    return Listing(chromosomes, positions, *texts, offset=int(record["offset"]))  # type: ignore


def read_counts(content: RecordDict, variants: int, about: Mapping[str, int]) -> Counts:
    """Return the counts that a hospital sent.

    Raises
    ------
    ValueError
        If they are malformed, or no counts of as many people.
    """
    values = _values(content, (variants, 5))
    if values.dtype != np.int64:
        raise ValueError(f"counts of type {values.dtype}")
    known = values[(values != WITHHELD).any(1)]
    people = about["cases"], about["people"] - about["cases"]
    for status, copies, most in (
        (CASES, CASE_COPIES, people[0]),
        (CONTROLS, CONTROL_COPIES, people[1]),
    ):
        if not _within(known[:, status], 0, most):
            raise ValueError(f"numbers of people outside 0..{most}")
        if not _within(known[:, copies], 0, 2 * known[:, status]):
            raise ValueError("more alleles than people can have")
    both = known[:, CASE_COPIES] + known[:, CONTROL_COPIES]
    if known[:, SQUARES].any() and not _within(known[:, SQUARES], both, 2 * both):
        raise ValueError("a sum of squares that does not fit the number of alleles")
    return values


def read_sums(content: RecordDict, shape: tuple[int, ...]) -> Floats:
    """Return sums of this shape that a hospital sent.

    Raises
    ------
    ValueError
        If they are malformed or not finite.
    """
    values = _values(content, shape)
    if values.dtype != np.float64 or not is_finite(values):
        raise ValueError("sums that are no finite numbers")
    return values


def read_terms(content: RecordDict, shape: tuple[int, int]) -> tuple[Floats, NDArray[np.bool_]]:
    """Return sums of this shape that a hospital sent, and of which variants it withholds them.

    Raises
    ------
    ValueError
        If they are malformed or not finite.
    """
    sums = read_sums(content, shape)
    withheld = view(content.array_records[TOLD]["withheld"])
    if withheld.dtype != np.bool_ or withheld.shape != shape[:1]:
        raise ValueError("nothing that says which variants are withheld")
    return sums, withheld


def _values(content: RecordDict, shape: tuple[int, ...]) -> NDArray[Any]:
    values = view(content.array_records[TOLD]["values"])
    if values.shape != shape:
        raise ValueError(f"an array of shape {values.shape}, {shape} was asked for")
    return values


def _within(values: NDArray[Any], least: Any, most: Any) -> bool:
    return bool(((values >= least) & (values <= most)).all())
