"""Statistics of which the server learns sums over hospitals alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.secure.encoding import SecureError
from fedmed_flower.secure.magnitudes import part_of, total, units
from fedmed_flower.secure.ring import COUNT, REAL, Part
from fedmed_flower.server.secure import SecureSums
from fedmed_flower.statistics.declared import Declared
from fedmed_flower.statistics.replies import read_reply
from fedmed_flower.statistics.request import Request
from fedmed_flower.statistics.tallies import (
    CATEGORICAL,
    CATEGORY,
    CORRELATED,
    EDGE,
    NUMERIC,
    PAIR,
    REST,
    ROWS,
    Key,
    keys_of,
    number_of_counts,
    number_of_samples,
)
from fedmed_flower.statistics.types import Floats, Reported
from fedmed_flower.statistics.withheld import HISTOGRAM
from fedmed_flower.wire import DECLINED, MESSAGE_VERSION, MODELS, REQUEST, VERSION

_QUERY = "tallies"
# Distances in units add up to at most the root of the number of rows, and their squares to 1.
_MOST_SUM = 2.0**24
_MOST_SQUARES = 4.0


@dataclass(frozen=True)
class _Numbers:
    """What belongs to one key, summed over the hospitals that tell it.

    Attributes
    ----------
    told : int
        Over how many hospitals it is.
    counts : list of int
    samples : list of dict
        The moments of each sample.
    product : float
        Of two samples.
    """

    told: int
    counts: list[int]
    samples: list[Reported]
    product: float


def ask_for_sums(
    sums: SecureSums, request: Request, config: Mapping[str, Any]
) -> tuple[str, Reported, list[str]]:
    """Ask all hospitals that have said hello, and return their sums as one answer.

    Parameters
    ----------
    sums : SecureSums
    request : Request
        As `require_tallied` has let it pass.
    config : mapping
        What travels beside the request.

    Returns
    -------
    name : str
        What stands for the hospitals.
    reported : dict
        As `replies.read_reply` returns the answer of one hospital. Its parts say over how many
        hospitals they are, and what is withheld says which are over fewer than all.
    members : list of str

    Raises
    ------
    InputError
        If a hospital fails to answer, or the sums are none that hospitals can have.
    """
    try:
        return _Survey(sums, request, config).answer()
    except SecureError as error:
        raise InputError(str(error)) from error
    except ValueError as error:
        raise InputError(f"the sums are none that hospitals can have: {error}") from error


class _Survey:
    def __init__(self, sums: SecureSums, request: Request, config: Mapping[str, Any]) -> None:
        self._sums = sums
        self._request = request
        self._config = ConfigRecord(
            {VERSION: MESSAGE_VERSION, REQUEST: request.to_text(), **config}
        )
        self._keys = keys_of(request)
        self._nodes = sums.greeted
        self._members: list[str] = []

    def answer(self) -> tuple[str, Reported, list[str]]:
        told = self._told()
        fewest = self._fewest
        asked = self._chosen(told, fewest)
        found = self._numbers(asked, told)
        hospitals = len(self._members)
        group, withheld = self._group(found, told, fewest)
        reported: Reported = {"minimum": 1, "noise": None, "groups": [], "withheld": withheld}
        if group is not None:
            reported["groups"] = [group]
        # A sum may be wrong if a hospital sends rubbish: then it is often impossible.
        reported = read_reply(json.dumps(reported))
        for key, numbers in found.items():
            if reported["groups"] and key.kind in (NUMERIC, CATEGORICAL):
                part = reported["groups"][0][key.kind].get(key.columns[0])
                if part is not None:
                    part["hospitals"] = numbers.told
        return f"sum of {hospitals} hospitals", reported, self._members

    def _told(self) -> NDArray[np.int64]:
        """Return how many hospitals tell each key; a hospital that declines takes no part."""
        everything = np.ones(len(self._keys), bool)
        failures = self._sums.inbox.history.failures
        known = len(failures)
        try:
            return self._asked(everything, {}, [])["told"]
        except SecureError:
            declined = {one.site for one in failures[known:] if one.reason.startswith(DECLINED)}
            if not declined:
                raise
            # No sum was opened, so no hospital has bound itself to the others yet.
            self._nodes = {n: node for n, node in self._nodes.items() if n not in declined}
        return self._asked(everything, {}, [])["told"]

    @property
    def _fewest(self) -> int:
        """The fewest hospitals over which a figure may be."""
        hellos = self._sums.hellos.values()
        least = max(hello.least for hello in hellos)
        colluders = max(hello.colluders for hello in hellos)
        return least + colluders + sum(hello.tells for hello in hellos)

    def _chosen(self, told: NDArray[np.int64], fewest: int) -> NDArray[np.bool_]:
        """Return which keys are asked for: those that enough hospitals tell.

        What no category has is known from the others. If that is the rest of too few hospitals, one
        category that all tell is left to the rest too. Values below an edge are asked for if all
        that tell the column know them, so that edges can be compared.
        """
        asked = told >= fewest
        told_of = dict(zip(self._keys, told.tolist(), strict=True))
        for place, key in enumerate(self._keys):
            if key.kind == EDGE:
                asked[place] &= told_of[key] == told_of[Key(NUMERIC, key.columns)]
            if key.kind == REST and 0 < told[place] < fewest:
                of_column = [
                    other
                    for other, one in enumerate(self._keys)
                    if one.kind == CATEGORY and one.columns == key.columns and asked[other]
                ]
                if of_column:
                    asked[max(of_column, key=lambda other: (told[other], other))] = False
        return np.asarray(asked, bool)

    def _numbers(self, asked: NDArray[np.bool_], told: NDArray[np.int64]) -> dict[Key, _Numbers]:
        """Return what the hospitals tell together of the keys that are asked for."""
        request = self._request
        counted = sum(number_of_counts(key, request) for key in self._keys)
        samples = sum(number_of_samples(key) for key in self._keys)
        pairs = sum(number_of_samples(key) == 2 for key in self._keys)
        parts = [Part("counts", counted, COUNT), part_of("squares", samples)]
        found = self._asked(asked, {}, parts, told)
        counts = found["counts"].tolist()
        unit = units(total(found["squares"]))
        means = np.zeros(samples)
        squares = np.zeros(samples)
        products = np.zeros(pairs)
        if (samples and "moments" in request.kinds) or pairs:
            sizes = self._sizes(counts)
            parts = [Part("sums", samples, REAL, _MOST_SUM)]
            given = {"centres": means, "units": unit}
            means = self._asked(asked, given, parts, told)["sums"] * unit / np.maximum(sizes, 1)
            parts = [Part("deviations", samples, REAL, _MOST_SQUARES)]
            parts.append(Part("products", pairs, REAL, _MOST_SQUARES))
            given = {"centres": means, "units": unit}
            found = self._asked(asked, given, parts, told)
            squares = found["deviations"] * unit**2
            products = found["products"]
        return self._sorted(asked, told, counts, means, squares, products, unit)

    def _sizes(self, counts: list[int]) -> Floats:
        """Return the number of values in each sample."""
        sizes: list[int] = []
        place = 0
        for key in self._keys:
            sizes += [counts[place]] * number_of_samples(key) if number_of_samples(key) else []
            place += number_of_counts(key, self._request)
        return np.array(sizes, np.float64)

    def _sorted(
        self,
        asked: NDArray[np.bool_],
        told: NDArray[np.int64],
        counts: list[int],
        means: Floats,
        squares: Floats,
        products: Floats,
        unit: Floats,
    ) -> dict[Key, _Numbers]:
        """Return the numbers by key."""
        found = {}
        place = 0
        sample = 0
        pair = 0
        for index, key in enumerate(self._keys):
            size = number_of_counts(key, self._request)
            width = number_of_samples(key)
            numbers = counts[place : place + size]
            moments = [
                {
                    "n": numbers[0],
                    "mean": float(means[one]),
                    "rest": 0.0,
                    "m2": float(max(squares[one], 0.0)),
                }
                for one in range(sample, sample + width)
            ]
            product = 0.0
            if width == 2:
                product = float(products[pair] * unit[sample] * unit[sample + 1])
                pair += 1
            if asked[index]:
                found[key] = _Numbers(int(told[index]), numbers, moments, product)
            place += size
            sample += width
        return found

    def _group(
        self, found: Mapping[Key, _Numbers], told: NDArray[np.int64], fewest: int
    ) -> tuple[Reported | None, list[list[str]]]:
        """Return the only group of an answer, and what is withheld or of fewer hospitals."""
        hospitals = len(self._members)
        withheld = []
        for index, key in enumerate(self._keys):
            number = int(told[index])
            if key.kind in (REST, EDGE) or number == hospitals:
                continue
            few = f"{number} of {hospitals} hospitals tell it"
            why = f"{few}: the figure is of these"
            if key not in found:
                why = f"{few}, and a sum needs {fewest}"
            withheld.append(["", key.what[:400], why])
        sizes = found.get(Key(ROWS))
        if sizes is None:
            return None, withheld
        rows, patients = sizes.counts
        group: Reported = {"name": "", "start": None, "rows": rows, "patients": patients}
        group |= {"numeric": {}, "categorical": {}, "correlations": [], "pairs": []}
        for key, numbers in found.items():
            if key.kind == NUMERIC:
                part = self._numeric(numbers)
                group["numeric"][key.columns[0]] = part
                if "histograms" in self._request.kinds and part["n"]:
                    if histogram := self._histogram(key, part["n"], found):
                        part["histogram"] = histogram
                    else:
                        why = "not all hospitals that tell the column count the same cells"
                        withheld.append(["", f"{HISTOGRAM}{key.columns[0]}"[:400], why])
            elif key.kind == CATEGORICAL:
                group["categorical"][key.columns[0]] = self._categorical(key, found)
            elif key.kind == CORRELATED:
                part = {"columns": list(key.columns), "of": numbers.samples}
                group["correlations"].append(part | {"product": numbers.product})
            elif key.kind == PAIR:
                group["pairs"].append(self._crossed(key, numbers))
        return group, withheld

    def _numeric(self, numbers: _Numbers) -> Reported:
        count, missing = numbers.counts
        part: Reported = {"n": count, "missing": missing}
        if "moments" in self._request.kinds and count:
            part |= numbers.samples[0]
        return part

    def _histogram(self, key: Key, count: int, found: Mapping[Key, _Numbers]) -> Reported | None:
        """Return the cells of a column between the edges at which all hospitals count."""
        below = {
            float(one.category): numbers.counts[0]
            for one, numbers in found.items()
            if one.kind == EDGE and one.columns == key.columns
        }
        if not below:
            return None
        counts = np.diff([0, *below.values(), count]).tolist()
        whole = Declared(self._request).is_whole(key.columns[0])
        return {"edges": list(below), "counts": counts, "whole": whole}

    def _categorical(self, key: Key, found: Mapping[Key, _Numbers]) -> Reported:
        count, missing = found[key].counts
        part: Reported = {"n": count, "missing": missing}
        if "tables" not in self._request.kinds:
            return part
        named = {
            one.category: numbers.counts[0]
            for one, numbers in found.items()
            if one.kind == CATEGORY and one.columns == key.columns
        }
        shown = {name: number for name, number in named.items() if number}
        part |= {"names": list(shown), "counts": list(shown.values())}
        return part | {"few": count - sum(shown.values())}

    def _crossed(self, key: Key, numbers: _Numbers) -> Reported:
        rows, across = (list(self._request.categories[name]) for name in key.columns)
        table = np.array(numbers.counts).reshape(len(rows), len(across))
        # Hospitals do not name categories that nobody has.
        kept, kept_across = (np.flatnonzero(table.any(axis)) for axis in (1, 0))
        return {
            "columns": list(key.columns),
            "rows": [rows[place] for place in kept],
            "across": [across[place] for place in kept_across],
            "counts": table[np.ix_(kept, kept_across)].tolist(),
        }

    def _asked(
        self,
        asked: NDArray[np.bool_],
        given: Mapping[str, Floats],
        parts: list[Part],
        told: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Put one question to all; the hospitals must tell the same as before."""
        arrays = {"asked": asked, **given}
        content = RecordDict({"config": ConfigRecord({**self._config})})
        content[MODELS] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        both = [Part("told", len(self._keys), COUNT), *parts]
        opened = self._sums.question([*self._nodes.values()], _QUERY, content, both)
        self._members = opened.members
        if told is not None and (opened.values["told"] != np.where(asked, told, 0)).any():
            raise SecureError(
                "hospitals tell other figures than they have said: patients may have come or "
                "gone. Ask again"
            )
        return opened.values
