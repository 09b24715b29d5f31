"""The replies of a round as one matrix that is never built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedmed_flower import kernels
from fedmed_flower.arrays import Draft, flat, is_finite, not_finite, view


class NotUsableError(Exception):
    """Some of the updates must not be used.

    Attributes
    ----------
    reasons : dict
        Why, by the position among the updates.
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__("; ".join(f"update {k}: {reason}" for k, reason in reasons.items()))
        self.reasons = reasons


class Updates:
    """What the sites sent in one round: K replies as one K x P matrix that is never built.

    Parameters
    ----------
    arrays : sequence of K ArrayRecord
        Of the keys, shapes and dtypes of `like`. Never changed.
    like : ArrayRecord
        Gives keys, shapes and dtypes.
    centre : ArrayRecord, optional
        The global model that the sites started from; None where it is not known.
    sites : sequence of str, optional
    metrics : sequence of MetricRecord, optional
    mix : ndarray of shape (M, K), optional
        The updates are M weighted sums of what the sites sent.

    Attributes
    ----------
    like : ArrayRecord
    sites, metrics : tuple
        What else the K sites sent, in the same order.
    """

    def __init__(
        self,
        arrays: Sequence[ArrayRecord],
        like: ArrayRecord,
        centre: ArrayRecord | None = None,
        sites: Sequence[str] = (),
        metrics: Sequence[MetricRecord] = (),
        mix: NDArray[np.float64] | None = None,
    ) -> None:
        self._arrays = tuple(arrays)
        self.like, self._centre, self._mix = like, centre, mix
        self._rows = [flat(record, like) for record in self._arrays]
        self.sites, self.metrics = tuple(sites), tuple(metrics)
        self._checked = False
        self._products: NDArray[np.float64] | None = None

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
        made = Updates(self._arrays, self.like, self._centre, self.sites, self.metrics, total)
        made._checked, made._products = self._checked, self._products
        return made

    def chosen_by(
        self,
        select: Callable[[list[RecordDict], int, int], list[RecordDict]],
        num_malicious: int,
        count: int,
    ) -> list[int]:
        """Return which updates a selection rule of Flower's form picks."""
        records = [RecordDict({"arrays": record}) for record in self._arrays]
        for record, metrics in zip(records, self.metrics, strict=False):
            record["metrics"] = metrics
        places = {id(record): place for place, record in enumerate(records)}
        return [places[id(record)] for record in select(records, num_malicious, count)]

    def subset(self, chosen: Sequence[int]) -> Updates:
        """Return some of these updates."""
        if self._mix is not None:
            return self.mixed(np.eye(self.count)[list(chosen)])
        made = Updates(
            [self._arrays[k] for k in chosen],
            self.like,
            self._centre,
            [self.sites[k] for k in chosen] if self.sites else (),
            [self.metrics[k] for k in chosen] if self.metrics else (),
        )
        made._checked = self._checked
        return made

    def weighted_sum(
        self, weights: Sequence[float] | NDArray[Any], rest: float = 0.0
    ) -> ArrayRecord:
        """Return ``sum_k weights[k] update_k + rest centre``.

        The centre is the first update where the global model is not known.

        Raises
        ------
        NotUsableError
            Where updates hold NaN or infinite values.
        """
        given = np.asarray(weights, float)
        factors = [float(w) for w in (given if self._mix is None else given @ self._mix)]
        used = [k for k, factor in enumerate(factors) if factor]
        rows, factors = [self._rows[k] for k in used], [factors[k] for k in used]
        if rest:
            rows, factors = [*rows, self._origin()], [*factors, rest]
        draft = Draft(self.like)
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
            Where updates hold NaN or infinite values.
        """
        draft = Draft(self.like)
        finite = kernels.order_statistics(self._rows, draft.row, low, high, reduce, self._mix)
        if not finite.all():
            self.check()
        self._checked = True
        return draft.finish()

    def gram(self) -> NDArray[np.float64]:
        """Return the inner products of the updates' differences to the global model.

        Only floating-point entries count. Where the global model is not known, the differences are
        those to the first update: distances are the same.

        Returns
        -------
        ndarray of shape (count, count)

        Raises
        ------
        NotUsableError
            Where updates hold NaN or infinite values, or values whose squares overflow.
        """
        if self._products is None:
            self._products = kernels.gram(self._rows, self._origin())
        products = self._products
        if not np.isfinite(products).all():
            self.check()
            lengths = np.diag(products)
            far = [k for k, length in enumerate(lengths) if not np.isfinite(length)]
            raise NotUsableError(dict.fromkeys(far, "the squares of its values overflow"))
        self._checked = True
        if self._mix is None:
            return products
        mixed: NDArray[np.float64] = self._mix @ products @ self._mix.T
        return mixed

    def norms(self) -> NDArray[np.float64]:
        """Return the Euclidean norm of each site's difference to the global model; shape (K,).

        NaN or infinite where it cannot be computed.
        """
        centre = self._origin()
        return np.sqrt([kernels.gram([row], centre)[0, 0] for row in self._rows])

    def require_norms(self, times: float) -> None:
        """Require that no update is longer than some times the median length.

        Raises
        ------
        NotUsableError
            With the updates that are.
        """
        norms = self.norms()
        finite = norms[np.isfinite(norms)]
        limit = times * float(np.median(finite)) if len(finite) else 0.0
        reasons = {
            k: f"its change of the model is {norm:.3g} long, {limit:.3g} is the limit"
            for k, norm in enumerate(norms)
            if not norm <= limit
        }
        if reasons:
            raise NotUsableError(reasons)

    def _origin(self) -> list[NDArray[Any]]:
        return self._rows[0] if self._centre is None else flat(self._centre, self.like)

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

    Takes the memory of two to four models however many replies there are.

    Parameters
    ----------
    like : ArrayRecord
        Gives keys, shapes and dtypes.
    """

    def __init__(self, like: ArrayRecord) -> None:
        self._like = like
        self._total = 0.0
        self._sums = [
            np.zeros((2, values.size), np.complex128 if values.dtype.kind == "c" else np.float64)
            for values in map(view, like.values())
        ]

    def add(self, arrays: ArrayRecord, weight: float) -> None:
        """Add a reply that is finite throughout."""
        kernels.accumulate(flat(arrays, self._like), weight, self._sums)
        self._total += weight

    def result(self) -> ArrayRecord:
        """Return the mean of what was added."""
        draft = Draft(self._like)
        for out, sums in zip(draft.row, self._sums, strict=True):
            out[...] = kernels.narrow(sums.sum(axis=0) / self._total, out.dtype)
        return draft.finish()
