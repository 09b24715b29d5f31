"""The replies of a round as one matrix that is never built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.views import Draft, flat, is_finite, not_finite, view

OVERFLOW = "the squares of its values overflow"


class NotUsableError(Exception):
    """Some of the updates must not be used.

    Attributes
    ----------
    reasons : dict
        Why, by the position among the updates; not empty.
    broken : bool
        Whether no honest site in order sends such an update.
    """

    def __init__(self, reasons: dict[int, str], broken: bool = True) -> None:
        super().__init__("; ".join(f"update {k}: {reason}" for k, reason in reasons.items()))
        self.reasons, self.broken = reasons, broken


class Updates:
    """What the sites sent in one round: K replies as one K x P matrix that is never built.

    Parameters
    ----------
    arrays : sequence of K ArrayRecord
        Of the keys, shapes and dtypes of `layout`. Never changed.
    layout : ArrayRecord
        Gives keys, shapes and dtypes.
    centre : ArrayRecord, optional
        The global model that the sites started from; None if it is not known.
    sites : sequence of str, optional
    metrics : sequence of MetricRecord, optional
    mix : ndarray of shape (M, K), optional
        The updates are M weighted sums of what the sites sent.

    Attributes
    ----------
    layout : ArrayRecord
    sites, metrics : tuple
        What else the K sites sent, in the same order.
    used : list of int
        Those of the K that had a part in the last sum or subset.
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
        self._arrays = tuple(arrays)
        self.layout, self._centre, self._mix = layout, centre, mix
        self._rows = [flat(record, layout) for record in self._arrays]
        self.sites, self.metrics = tuple(sites), tuple(metrics)
        self._checked = False
        self._products: NDArray[np.float64] | None = None
        # The update that stands for a global model that is not known.
        self._place = 0
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
        made = Updates(self._arrays, self.layout, self._centre, self.sites, self.metrics, total)
        made._checked, made._products, made._place = self._checked, self._products, self._place
        return made

    def chosen_by(
        self,
        select: Callable[[list[RecordDict], int, int], list[RecordDict]],
        num_malicious: int,
        count: int,
    ) -> list[int]:
        """Return which updates a selection rule of Flower's form picks.

        It is given what the sites sent, as records that it may change.

        Raises
        ------
        ValueError
            If the rule returns other records than those it was given, or these updates are
            weighted sums.
        """
        if self._mix is not None:
            raise ValueError("a selection rule cannot choose among weighted sums of updates")
        records = [RecordDict({"arrays": ArrayRecord(dict(record))}) for record in self._arrays]
        for record, metrics in zip(records, self.metrics, strict=False):
            record["metrics"] = MetricRecord(dict(metrics))
        indices = {id(record): index for index, record in enumerate(records)}
        chosen = [indices.get(id(record)) for record in select(records, num_malicious, count)]
        known = [index for index in chosen if index is not None]
        if len(known) < len(chosen):
            raise ValueError("the selection rule returned other records than those it was given")
        return known

    def subset(self, chosen: Sequence[int]) -> Updates:
        """Return some of these updates."""
        if self._mix is not None:
            return self.mixed(np.eye(self.count)[list(chosen)])
        self.used = sorted(chosen)
        made = Updates(
            [self._arrays[k] for k in chosen],
            self.layout,
            self._centre,
            [self.sites[k] for k in chosen] if self.sites else (),
            [self.metrics[k] for k in chosen] if self.metrics else (),
        )
        made._checked = self._checked
        return made

    def others(self) -> Updates | None:
        """Return the integers and bools of these updates, of which distances know nothing.

        None if there are none.
        """
        keys = [key for key, array in self.layout.items() if view(array).dtype.kind in "biu"]
        if not keys:
            return None

        def part(record: ArrayRecord) -> ArrayRecord:
            return ArrayRecord({key: record[key] for key in keys})

        centre = None if self._centre is None else part(self._centre)
        records = [part(record) for record in self._arrays]
        return Updates(records, part(self.layout), centre, self.sites, self.metrics, self._mix)

    def weighted_sum(
        self, weights: Sequence[float] | NDArray[Any], rest: float = 0.0
    ) -> ArrayRecord:
        """Return ``sum_k weights[k] update_k + rest centre``.

        The centre is that of `gram` where the global model is not known.

        Raises
        ------
        NotUsableError
            If updates hold NaN or infinite values.
        """
        given = np.asarray(weights, float)
        factors = [float(w) for w in (given if self._mix is None else given @ self._mix)]
        self.used = used = [k for k, factor in enumerate(factors) if factor]
        rows, factors = [self._rows[k] for k in used], [factors[k] for k in used]
        if rest:
            rows, factors = [*rows, self._origin()], [*factors, rest]
        draft = Draft(self.layout)
        kernels.weighted_sum(rows, factors, draft.row)
        # What is not finite in an update is not finite in the sum either, in any entry.
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
            Makes something else of them: takes ``high - low`` arrays of shape (n,), ascending at
            each place, and returns one of shape (n,).

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

        Only floating-point entries count. Where the global model is not known, the differences are
        those to one of the updates, the first unless others lie closer together: distances are the
        same.

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

        NaN or infinite if it cannot be computed. Where the global model is not known, the
        difference is that of `gram`, and raises what that raises.

        Parameters
        ----------
        double : bool
            Compute in float64 throughout, where the model is known.
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

        Flattened, by key; exact but for one rounding to float64.

        Raises
        ------
        ValueError
            If the global model is not known.
        """
        if self._centre is None or self._mix is not None:
            raise ValueError("changes are those of a global model that is known")
        origin = self._origin()
        keys = {key: k for k, key in enumerate(self.layout) if kernels.is_floating(origin[k].dtype)}
        sums = [np.zeros((2, origin[k].size)) for k in keys.values()]
        centre = [origin[k] for k in keys.values()]
        for row, weight in zip(self._rows, weights, strict=True):
            kernels.accumulate([row[k] for k in keys.values()], float(weight), sums, centre)
        return {key: total.sum(axis=0) for key, total in zip(keys, sums, strict=True)}

    def moved(self, changes: Mapping[str, NDArray[np.float64]]) -> ArrayRecord:
        """Return the global model plus changes as `sum_of_changes` gives them."""
        draft = Draft(self.layout)
        for key, out, part in zip(self.layout, draft.row, self._origin(), strict=True):
            if key in changes:
                out[...] = kernels.narrow(kernels.widen(part) + changes[key], out.dtype)
            else:
                out[...] = part
        return draft.finish()

    def require_norms(self, times: float) -> None:
        """Require that no update is longer than some times the median length.

        Raises
        ------
        NotUsableError
            With the updates that are, or that hold NaN or infinite values.
        """
        norms = self.norms()
        finite = norms[np.isfinite(norms)]
        if len(finite) < len(norms):
            self.check()
        limit = times * float(np.median(finite)) if len(finite) else 0.0
        reasons = {
            k: f"its change of the model is {norm:.3g} long, {limit:.3g} is the limit"
            for k, norm in enumerate(norms)
            if not norm <= limit
        }
        if reasons:
            raise NotUsableError(reasons, broken=False)

    def _origin(self) -> list[NDArray[Any]]:
        if self._centre is None:
            return self._rows[self._place]
        return flat(self._centre, self.layout)

    def _inner_products(self) -> NDArray[np.float64]:
        if self._products is not None:
            return self._products
        self._products = products = kernels.gram(self._rows, self._origin())
        if self._centre is None and np.isfinite(products).all():
            lengths = np.diag(products)
            spread = np.median(lengths[:, None] + lengths - 2 * products, axis=1)
            best = int(np.argmin(spread))
            # What lies far from the others drowns their differences in its rounding errors.
            if spread[0] > 100 * spread[best]:
                self._place = best
                self._products = kernels.gram(self._rows, self._origin())
        return self._products

    def _far(self, products: NDArray[np.float64]) -> list[int]:
        """Return the updates to which the distances from the centre, or others, overflow."""
        finite = np.isfinite(products)
        if finite.diagonal().all():
            return [int(k) for k in np.flatnonzero(~finite.all(axis=1))]
        far = [int(k) for k in np.flatnonzero(~finite.diagonal())]
        # An update that most are far from is the one that is far.
        return [self._place] if self._centre is None and 2 * len(far) > len(self._rows) else far

    def check(self) -> None:
        """Raise `NotUsableError` where updates hold NaN or infinite values."""
        if self._checked:
            return
        found = {k: not_finite(record) for k, record in enumerate(self._arrays)}
        if reasons := {k: reason for k, reason in found.items() if reason is not None}:
            raise NotUsableError(reasons)
        self._checked = True


class Mean:
    """A weighted mean to which replies are added one by one and need not be kept.

    Takes 16 bytes for each parameter (32 for complex ones), however many replies there are.
    Numbers nearer 0 than 1e-280 lose digits.

    Parameters
    ----------
    layout : ArrayRecord
        Gives keys, shapes and dtypes.
    """

    def __init__(self, layout: ArrayRecord) -> None:
        self._like = layout
        self._weights: list[float] = []
        self._sums = [
            np.zeros((2, values.size), np.complex128 if values.dtype.kind == "c" else np.float64)
            for values in map(view, layout.values())
        ]

    def add(self, arrays: ArrayRecord, weight: float) -> None:
        """Add a reply that is finite throughout."""
        # So small, and as exact, the largest weights and numbers do not add up to infinity.
        share = math.ldexp(weight, -64)
        kernels.accumulate(flat(arrays, self._like), share, self._sums)
        self._weights.append(share)

    def result(self) -> ArrayRecord:
        """Return the mean of what was added: one reply at least."""
        draft = Draft(self._like)
        kernels.divide(self._sums, math.fsum(self._weights), draft.row)
        return draft.finish()
