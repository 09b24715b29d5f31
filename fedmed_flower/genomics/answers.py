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
from fedmed_flower.wire import COHORT, POSITIONS, SUMS, VARIANTS

# No hospital has more people or variants, and no study more covariates.
_MOST = 10**9
_MOST_COVARIATES = 200


def read_design(content: RecordDict) -> dict[str, Any]:
    """Return a hospital's description of its study, without the numbers of its people.

    Raises
    ------
    ValueError
        If the description is malformed.
    """
    record = dict(content.config_records[COHORT])
    about: dict[str, Any] = {
        key: int(record[key])  # type: ignore[arg-type]
        for key in ("variants", "minimum")
    }
    if min(about.values()) < 0 or max(about.values()) > _MOST:
        raise ValueError(f"each number must lie in 0..{_MOST}, got {about}")
    return about | _texts_of(record)


def read_about(content: RecordDict) -> dict[str, Any]:
    """Return a hospital's description of its people and of its study.

    Raises
    ------
    ValueError
        If the description is malformed.
    """
    record = dict(content.config_records[COHORT])
    about: dict[str, Any] = {
        key: int(record[key])  # type: ignore[arg-type]
        for key in ("people", "cases", "variants", "minimum")
    }
    in_range = min(about.values()) >= 0 and max(about.values()) <= _MOST
    if not in_range or about["cases"] > about["people"] or not about["people"]:
        raise ValueError(
            f"each number must lie in 0..{_MOST}, with at least one of people and no more cases "
            f"than people, got {about}"
        )
    return about | _texts_of(record)


def _texts_of(record: Mapping[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {key: str(record[key]) for key in ("trait", "phenotype")}
    about["covariates"] = [str(name) for name in record["covariates"]]
    if (count := len(about["covariates"])) > _MOST_COVARIATES:
        raise ValueError(f"covariates must be at most {_MOST_COVARIATES}, got {count}")
    return about


def read_listing(content: RecordDict, most: int) -> Listing:
    """Return the part of a list of variants that a hospital sent.

    Raises
    ------
    ValueError
        If the part is malformed, or has more than `most` variants.
    """
    record = content.config_records[VARIANTS]
    places = content.array_records[POSITIONS]
    chromosomes = view(places["chromosomes"])
    positions = view(places["positions"])
    texts = [str(record[name]).split("\n") for name in ("names", "first", "second")]
    count = len(positions)
    if chromosomes.dtype != np.int8 or positions.dtype != np.int64:
        raise ValueError(
            f"chromosomes must be int8 and positions int64, got {chromosomes.dtype} and "
            f"{positions.dtype}"
        )
    if chromosomes.shape != (count,) or not 0 < count <= most:
        raise ValueError(
            f"chromosomes and positions must have one shape, of 1 to {most} variants, got "
            f"{chromosomes.shape} and {positions.shape}"
        )
    if any(len(text) != count for text in texts):
        raise ValueError(f"names, first and second must be of {count} variants, as positions are")
    if chromosomes.min() < 0 or chromosomes.max() > 22 or not _within(positions, 0, MOST_POSITION):
        raise ValueError(
            f"chromosomes must lie in 0..22 and positions in 0..{MOST_POSITION}, 0 if not known"
        )
    return Listing(chromosomes, positions, *texts, offset=int(record["offset"]))  # type: ignore


def read_counts(content: RecordDict, variants: int, about: Mapping[str, int]) -> Counts:
    """Return the counts that a hospital sent.

    Raises
    ------
    ValueError
        If they are malformed, or do not fit the number of people in `about`.
    """
    values = _values(content, (variants, 5))
    if values.dtype != np.int64:
        raise ValueError(f"counts must be int64, got {values.dtype}")
    known = values[(values != WITHHELD).any(1)]
    cases = about["cases"]
    controls = about["people"] - cases
    for status, copies, most in (
        (CASES, CASE_COPIES, cases),
        (CONTROLS, CONTROL_COPIES, controls),
    ):
        if not _within(known[:, status], 0, most):
            raise ValueError(f"numbers of people outside 0..{most}")
        if not _within(known[:, copies], 0, 2 * known[:, status]):
            raise ValueError("copies of A1 must lie in 0..2 for each person counted")
    both = known[:, CASE_COPIES] + known[:, CONTROL_COPIES]
    if known[:, SQUARES].any() and not _within(known[:, SQUARES], both, 2 * both):
        raise ValueError("a sum of squared copies must be 1 to 2 times the copies")
    return values


def read_sums(content: RecordDict, shape: tuple[int, ...]) -> Floats:
    """Return the sums that a hospital sent, of the given shape.

    Raises
    ------
    ValueError
        If they are malformed or not finite.
    """
    values = _values(content, shape)
    if values.dtype != np.float64 or not is_finite(values):
        raise ValueError("sums must be float64 and finite")
    return values


def read_terms(content: RecordDict, shape: tuple[int, int]) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the sums that a hospital sent, and which variants it withholds.

    Raises
    ------
    ValueError
        If they are malformed or not finite.
    """
    sums = read_sums(content, shape)
    withheld = view(content.array_records[SUMS]["withheld"])
    if withheld.dtype != np.bool_ or withheld.shape != shape[:1]:
        raise ValueError(
            f"withheld must be bool of shape {shape[:1]}, got {withheld.dtype} of {withheld.shape}"
        )
    return sums, withheld


def _values(content: RecordDict, shape: tuple[int, ...]) -> NDArray[Any]:
    values = view(content.array_records[SUMS]["values"])
    if values.shape != shape:
        raise ValueError(f"values must have shape {shape}, got {values.shape}")
    return values


def _within(values: NDArray[Any], least: Any, most: Any) -> bool:
    return bool(((values >= least) & (values <= most)).all())
