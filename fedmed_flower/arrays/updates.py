"""The replies of a round as one matrix that is never built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.views import Draft, flat, is_finite, not_finite, record_of, view

OVERFLOW = "the squares of its values overflow"


class NotUsableError(Exception):
    """Some of the updates must not be used.

    Attributes
    ----------
    reasons : dict of int to str
        Why each of them must not be used, by its index among the updates; not empty.
    broken : bool
        Whether no honest site that works correctly sends such an update.
    """

    def __init__(self, reasons: dict[int, str], broken: bool = True) -> None:
        super().__init__("; ".join(f"update {k}: {reason}" for k, reason in reasons.items()))
        self.reasons = reasons
        self.broken = broken


class Updates:
    """The replies of K sites in one round, as one K x P matrix that is never built.

    Parameters
    ----------
    arrays : sequence of K ArrayRecord
        With the keys, shapes and dtypes of `layout`. They are never changed.
    layout : ArrayRecord
        Gives keys, shapes and dtypes.
    centre : ArrayRecord, optional
        The global model that the sites started from; left out if it is not known.
    sites : sequence of str, optional
    metrics : sequence of MetricRecord, optional
    mix : ndarray of shape (M, K), optional
        The updates are then ``mix @ arrays``: M weighted sums of the replies.

    Attributes
    ----------
    layout : ArrayRecord
    sites, metrics : tuple
        Names of the K sites and the metrics that they sent, in the same order.
    used : list of int
        Indices of the K replies that the last sum or subset used.
    """

    def __init__(
        self,
        arrays: Sequence[ArrayRecord],
        layout: ArrayRecord,
        centre: ArrayRecord | None = None,
        sites: Sequence[str] = (),
        metrics: Sequence[MetricRecord] = (),
        mix: NDArray[np.float64] | None = None,
    ) -> None:
        self.layout = layout
        self.sites = tuple(sites)
        self.metrics = tuple(metrics)
        self._arrays = tuple(arrays)
        self._rows = [flat(record, layout) for record in self._arrays]
        self._centre = centre
        self._mix = mix
        self._checked = False
        self._products: NDArray[np.float64] | None = None
        # Index of the reply that is the origin if the global model is not known.
        self._origin_index = 0
        self.used = list(range(len(self._rows)))

    @property
    def count(self) -> int:
        """Number of updates."""
        return len(self._rows) if self._mix is None else len(self._mix)

    @property
    def centred(self) -> bool:
        """Whether the global model is known."""
        return self._centre is not None

    def mixed(self, mix: NDArray[np.float64]) -> Updates:
        """Return weighted sums of these updates: row m is ``sum_k mix[m, k] update_k``."""
        total = mix if self._mix is None else mix @ self._mix
        sums = Updates(self._arrays, self.layout, self._centre, self.sites, self.metrics, total)
        sums._checked = self._checked
        sums._products = self._products
        sums._origin_index = self._origin_index
        return sums

    def chosen_by(
        self,
        select: Callable[[list[RecordDict], int, int], list[RecordDict]],
        num_malicious: int,
        count: int,
    ) -> list[int]:
        """Return the indices of the updates that a selection rule in Flower's form picks.

        The rule receives copies of the replies, so it may change them.

        Raises
        ------
        ValueError
            If the rule returns other records than those it was given, or these updates are
            weighted sums.
        """
        if self._mix is not None:
            raise ValueError("a selection rule cannot choose among weighted sums of updates")
        records = [RecordDict({"arrays": record_of(record)}) for record in self._arrays]
        for record, metrics in zip(records, self.metrics, strict=False):
            record["metrics"] = MetricRecord(dict(metrics))
        indices = {id(record): index for index, record in enumerate(records)}
        chosen = [indices.get(id(record)) for record in select(records, num_malicious, count)]
        known = [index for index in chosen if index is not None]
        if len(known) < len(chosen):
            raise ValueError("the selection rule returned other records than those it was given")
        return known

    def subset(self, chosen: Sequence[int]) -> Updates:
        """Return the updates with the indices `chosen`, in that order."""
        if self._mix is not None:
            return self.mixed(np.eye(self.count)[list(chosen)])
        self.used = sorted(chosen)
        subset = Updates(
            [self._arrays[k] for k in chosen],
            self.layout,
            self._centre,
            [self.sites[k] for k in chosen] if self.sites else (),
            [self.metrics[k] for k in chosen] if self.metrics else (),
        )
        subset._checked = self._checked
        return subset

    def others(self) -> Updates | None:
        """Return the integer and bool entries of these updates, which distances ignore.

        None if there are no such entries.
        """
        keys = [key for key, array in self.layout.items() if view(array).dtype.kind in "biu"]
        if not keys:
            return None

        def part(record: ArrayRecord) -> ArrayRecord:
            return record_of({key: record[key] for key in keys})

        centre = None if self._centre is None else part(self._centre)
        records = [part(record) for record in self._arrays]
        return Updates(records, part(self.layout), centre, self.sites, self.metrics, self._mix)

    def weighted_sum(
        self, weights: Sequence[float] | NDArray[Any], rest: float = 0.0
    ) -> ArrayRecord:
        """Return ``sum_k weights[k] update_k + rest centre``.

        If the global model is not known, the centre is the update that `gram` uses.

        Raises
        ------
        NotUsableError
            If updates hold NaN or infinite values.
        """
        given = np.asarray(weights, float)
        factors = [float(w) for w in (given if self._mix is None else given @ self._mix)]
        self.used = used = [k for k, factor in enumerate(factors) if factor]
        rows = [self._rows[k] for k in used]
        factors = [factors[k] for k in used]
        if rest:
            rows.append(self._origin())
            factors.append(rest)
        draft = Draft(self.layout)
        kernels.weighted_sum(rows, factors, draft.row)
        # A number that is not finite in an update is not finite in the sum either.
        if len(used) == len(self._rows) and all(is_finite(part) for part in draft.row):
            self._checked = True
        self.check()
        return draft.finish()

    def order_statistics(
        self, low: int, high: int, reduce: kernels.Reduce | None = None
    ) -> ArrayRecord:
        """Return the mean of the ranks ``low <= rank < high`` of each parameter.

        Parameters
        ----------
        low, high : int
            0 is the smallest of the `count` values.
        reduce : callable, optional
            Used instead of the mean: takes ``high - low`` arrays of shape (n,), ascending at each
            index, and returns one of shape (n,).

        Raises
        ------
        NotUsableError
            If updates hold NaN or infinite values.
        """
        draft = Draft(self.layout)
        finite = kernels.order_statistics(self._rows, draft.row, low, high, reduce, self._mix)
        if not finite.all():
            self.check()
        self._checked = True
        return draft.finish()

    def gram(self) -> NDArray[np.float64]:
        """Return the inner products of the updates' differences to the global model.

        Only floating-point entries count. If the global model is not known, the differences are
        those to one of the updates: distances are the same. It is the first one, unless that lies
        far from the others.

        Returns
        -------
        ndarray of shape (count, count)

        Raises
        ------
        NotUsableError
            If updates hold NaN or infinite values, or values whose squares overflow.
        """
        products = self._inner_products()
        if not np.isfinite(products).all():
            self.check()
            raise NotUsableError(dict.fromkeys(self._far(products), OVERFLOW))
        if any(array.dtype.kind == "c" for array in self._origin()):
            self.check()
        self._checked = True
        if self._mix is None:
            return products
        mixed: NDArray[np.float64] = self._mix @ products @ self._mix.T
        return mixed

    def norms(self, double: bool = False) -> NDArray[np.float64]:
        """Return the Euclidean norm of each site's difference to the global model; shape (K,).

        A norm is NaN or infinite if it cannot be computed. If the global model is not known, the
        difference is that of `gram`.

        Parameters
        ----------
        double : bool
            Compute in float64 throughout, if the model is known.

        Raises
        ------
        NotUsableError
            If the model is not known, as in `gram`.
        """
        if self._centre is None:
            self.gram()
            return np.sqrt(np.diag(self._inner_products()))
        centre = self._origin()
        return np.sqrt([kernels.gram([row], centre, double)[0, 0] for row in self._rows])

    def sum_of_changes(
        self, weights: Sequence[float] | NDArray[Any]
    ) -> dict[str, NDArray[np.float64]]:
        """Return ``sum_k weights[k] (update_k - model)`` of the floating-point entries.

        The sums are flat arrays by key, exact except for one rounding to float64.

        Raises
        ------
        ValueError
            If the global model is not known, or these updates are weighted sums.
        """
        if self._centre is None or self._mix is not None:
            raise ValueError("changes need a known global model, and updates that are not mixed")
        origin = self._origin()
        keys = {key: k for k, key in enumerate(self.layout) if kernels.is_floating(origin[k].dtype)}
        sums = [np.zeros((2, origin[k].size)) for k in keys.values()]
        centre = [origin[k] for k in keys.values()]
        for row, weight in zip(self._rows, weights, strict=True):
            kernels.accumulate([row[k] for k in keys.values()], float(weight), sums, centre)
        return {key: total.sum(axis=0) for key, total in zip(keys, sums, strict=True)}

    def moved(self, changes: Mapping[str, NDArray[np.float64]]) -> ArrayRecord:
        """Return the global model plus changes in the form of `sum_of_changes`."""
        draft = Draft(self.layout)
        for key, out, part in zip(self.layout, draft.row, self._origin(), strict=True):
            if key in changes:
                out[...] = kernels.narrow(kernels.widen(part) + changes[key], out.dtype)
            else:
                out[...] = part
        return draft.finish()

    def require_norms(self, times: float, least: float = 0.0, what: str = "the model") -> float:
        """Require that the norm of no update is above `times` the median norm; return the median.

        Parameters
        ----------
        times : float
        least : float
            Stands for the median where that is lower.
        what : str
            What the updates change, for the error.

        Raises
        ------
        NotUsableError
            If updates hold NaN or infinite values; else if the norm of an update is above the
            limit. The error names each such update.
        """
        norms = self.norms()
        finite = norms[np.isfinite(norms)]
        if len(finite) < len(norms):
            self.check()
        median = float(np.median(finite)) if len(finite) else 0.0
        limit = times * max(median, least)
        reasons = {
            k: f"its change of {what} has the norm {norm:.3g}, the limit is {limit:.3g}"
            for k, norm in enumerate(norms)
            if not norm <= limit
        }
        if reasons:
            raise NotUsableError(reasons, broken=False)
        return median

    def _origin(self) -> list[NDArray[Any]]:
        if self._centre is None:
            return self._rows[self._origin_index]
        return flat(self._centre, self.layout)

    def _inner_products(self) -> NDArray[np.float64]:
        if self._products is not None:
            return self._products
        self._products = products = kernels.gram(self._rows, self._origin())
        if self._centre is None and np.isfinite(products).all():
            lengths = np.diag(products)
            spread = np.median(lengths[:, None] + lengths - 2 * products, axis=1)
            best = int(np.argmin(spread))
            # An origin far from the others drowns their differences in rounding errors.
            if spread[0] > 100 * spread[best]:
                self._origin_index = best
                self._products = kernels.gram(self._rows, self._origin())
        return self._products

    def _far(self, products: NDArray[np.float64]) -> list[int]:
        """Return the indices of the updates whose distance to the centre or another overflows."""
        finite = np.isfinite(products)
        if finite.diagonal().all():
            return [int(k) for k in np.flatnonzero(~finite.all(axis=1))]
        far = [int(k) for k in np.flatnonzero(~finite.diagonal())]
        # If most updates are far from the origin, the origin is the outlier.
        if self._centre is None and 2 * len(far) > len(self._rows):
            return [self._origin_index]
        return far

    def check(self) -> None:
        """Raise `NotUsableError` if updates hold NaN or infinite values."""
        if self._checked:
            return
        errors = {k: not_finite(record) for k, record in enumerate(self._arrays)}
        if reasons := {k: error for k, error in errors.items() if error is not None}:
            raise NotUsableError(reasons)
        self._checked = True


class Mean:
    """A weighted mean to which replies are added one by one, without keeping them.

    It takes 16 bytes for each parameter (32 for complex ones), however many replies there are.
    Numbers nearer 0 than 1e-280 lose digits.

    Parameters
    ----------
    layout : ArrayRecord
        Gives keys, shapes and dtypes.
    """

    def __init__(self, layout: ArrayRecord) -> None:
        self._layout = layout
        self._weights: list[float] = []
        self._sums = [
            np.zeros((2, values.size), np.complex128 if values.dtype.kind == "c" else np.float64)
            for values in map(view, layout.values())
        ]

    def add(self, arrays: ArrayRecord, weight: float) -> None:
        """Add a reply that is finite throughout."""
        # Scaled by a power of two, which is exact, so that the largest numbers do not overflow.
        share = math.ldexp(weight, -64)
        kernels.accumulate(flat(arrays, self._layout), share, self._sums)
        self._weights.append(share)

    def result(self) -> ArrayRecord:
        """Return the mean of the replies that were added, at least one."""
        draft = Draft(self._layout)
        kernels.divide(self._sums, math.fsum(self._weights), draft.row)
        return draft.finish()
