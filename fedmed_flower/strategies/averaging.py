"""Weighted means of the replies, and Flower's server optimisers on our rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp import strategy as flower

from fedmed_flower.arrays.updates import NotUsableError, Updates
from fedmed_flower.errors import InputError
from fedmed_flower.methods.base import Method
from fedmed_flower.server.screening import metrics_of
from fedmed_flower.strategies.base import FedAvg

EXAMPLES = "examples"
UNIFORM = "uniform"
INVERSE_LOSS = "inverse-loss"
Weights = str | Mapping[str, float] | Callable[[Message], float]


class WeightedFedAvg(FedAvg):
    """Federated averaging with weights of your choice.

    Parameters
    ----------
    weights : str, mapping or callable
        ``"examples"``: the number of examples, as in `FedAvg`. ``"uniform"``: each hospital counts
        the same. ``"inverse-loss"``: 1 / training loss. A mapping from site name to weight: a site
        without an entry is left out. A function of the reply: a reply for which it fails or
        returns no number is left out. Weights must be above 0 and at most 1e100.
    loss_key : str
        Name of the metric that is the training loss, for ``"inverse-loss"``.

    Raises
    ------
    InputError
        If `weights` is none of these, or a value of the mapping is not above 0 and finite.
    """

    def __init__(
        self, *args: Any, weights: Weights = EXAMPLES, loss_key: str = "loss", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if not _are_weights(weights):
            raise InputError(
                f"weights must be {EXAMPLES!r}, {UNIFORM!r}, {INVERSE_LOSS!r}, a mapping by site "
                f"name or a function of the reply, got {weights!r}"
            )
        if isinstance(weights, Mapping):
            for site, weight in weights.items():
                if not isinstance(weight, Real) or not 0 < float(weight) < math.inf:
                    raise InputError(f"weights must be above 0 and finite, got {weight} for {site}")
        self.weights = weights
        self.loss_key = loss_key
        self._require_steady()

    def use_method(self, method: Method | None) -> None:
        """Take a method, as `FedAvg.use_method`; with ``"inverse-loss"`` not every one."""
        super().use_method(method)
        if hasattr(self, "weights"):
            self._require_steady()

    def _require_steady(self) -> None:
        """Refuse weights that change each round if the method counts on a site's first one."""
        if self.weights == INVERSE_LOSS and self.method is not None and self.method.needs_kept:
            raise InputError(
                f"{self.method.name} needs weights that stay, and {INVERSE_LOSS!r} changes them in "
                "each round: take other weights, or another method"
            )

    @property
    def secure_weighting(self) -> str | None:
        """By examples or uniform; other weights need single replies."""
        if type(self).weigh is not WeightedFedAvg.weigh or not isinstance(self.weights, str):
            return None
        return None if self.weights == INVERSE_LOSS else self.weights

    def weigh(self, site: str, reply: Message) -> float:
        """Return the weight of a reply by the argument `weights`."""
        if self.weights == EXAMPLES:
            return super().weigh(site, reply)
        if self.weights == UNIFORM:
            # In secure sums a reply is the mean of several hospitals, as many as its examples.
            return 1.0 if self.run.secure is None else super().weigh(site, reply)
        if self.weights == INVERSE_LOSS:
            return 1 / training_loss(reply, self.loss_key)
        if isinstance(self.weights, Mapping):
            if site not in self.weights:
                raise ValueError("weights has no entry for this site")
            return float(self.weights[site])
        try:
            return float(self.weights(reply))  # type: ignore[operator]
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"weights failed: {type(error).__name__}: {error}") from error


class FedProx(FedAvg, flower.FedProx):
    """FedProx: ``proximal_mu`` holds sites near the global model (0 gives back FedAvg).

    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks,
    MLSys 2020, https://arxiv.org/abs/1812.06127

    As Flower's, it takes ``proximal_mu`` as an argument. ``FedAvg(method="fedprox")`` is the same
    with the setting ``proximal-mu``.
    """

    def use_method(self, method: Method | None) -> None:
        """Refuse a second method."""
        if method is not None:
            raise InputError(
                f"{type(self).__name__} is a method of its own, got {method.name}: take FedAvg"
            )


class FedAvgM(FedAvg, flower.FedAvgM):
    """FedAvg with server momentum.

    Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification, 2019, https://arxiv.org/abs/1909.06335
    """


class FedAdam(FedAvg, flower.FedAdam):
    """Adam at the server.

    Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: Adaptive Federated
    Optimization, ICLR 2021, https://arxiv.org/abs/2003.00295
    """


class FedYogi(FedAvg, flower.FedYogi):
    """Yogi at the server: Reddi et al. 2021, as `FedAdam`."""


class FedAdagrad(FedAvg, flower.FedAdagrad):
    """Adagrad at the server: Reddi et al. 2021, as `FedAdam`."""


class QFedAvg(FedAvg, flower.QFedAvg):
    """q-FedAvg: sites with a higher loss move the model more (with ``q`` = 0, all count the same).

    Li, Sanjabi, Beirami, Smith: Fair Resource Allocation in Federated Learning, ICLR 2020,
    https://arxiv.org/abs/1905.10497, equation 4 and algorithm 2, with 1 / ``client_learning_rate``
    for the Lipschitz constant. A reply without the metric ``train_loss_key`` is left out.
    """

    combines_companions = False

    def weigh(self, site: str, reply: Message) -> float:
        """Return the site's training loss to the power of ``q``."""
        # Flower adds the same number against a loss of 0.
        loss = training_loss(reply, self.train_loss_key, least=0.0) + 1e-10
        with np.errstate(over="ignore"):
            return float(np.float_power(loss, self.q))

    def combine(self, updates: Updates, weights: Sequence[float]) -> ArrayRecord:
        """Return the model plus the sum of ``F_k^q L (w_k - w)`` over the sum of ``h_k``.

        Raises
        ------
        InputError
            If the global model is not known.
        NotUsableError
            If updates hold NaN or infinite values, or are so large that the result overflows.
        """
        if not updates.centred:
            raise InputError(
                "QFedAvg moves the global model, which it does not know: call configure_train "
                "before aggregate_train"
            )
        powers = np.asarray(weights)
        lipschitz = 1 / self.client_learning_rate
        losses = np.array([metrics[self.train_loss_key] for metrics in updates.metrics]) + 1e-10
        with np.errstate(over="ignore", invalid="ignore"):
            squared = (lipschitz * updates.norms()) ** 2
            h = self.q * losses ** (self.q - 1) * squared + lipschitz * powers
        if not np.isfinite(h.sum()):
            updates.check()
            # The sum may overflow although no part of it does.
            overflowing = [int(k) for k in np.flatnonzero(~np.isfinite(h))] or [int(h.argmax())]
            reason = "its loss or its change of the model is so large that the mean overflows"
            raise NotUsableError(dict.fromkeys(overflowing, reason))
        shares = lipschitz * powers / h.sum()
        return updates.weighted_sum(shares, rest=1 - shares.sum())


def _are_weights(weights: object) -> bool:
    if isinstance(weights, str):
        return weights in (EXAMPLES, UNIFORM, INVERSE_LOSS)
    return isinstance(weights, Mapping) or callable(weights)


def training_loss(reply: Message, key: str, least: float | None = None) -> float:
    """Return a reply's training loss.

    Raises
    ------
    ValueError
        If it is missing or no single number; if it is not above 0 (or is below `least`, if that
        is given).
    """
    loss = metrics_of(reply).get(key)
    if not isinstance(loss, int | float):
        raise ValueError(f"it has no training loss {key}")
    if least is None:
        allowed = loss > 0
        bound = "above 0"
    else:
        allowed = loss >= least
        bound = f"at least {least:g}"
    if not allowed:
        raise ValueError(f"its training loss {key} must be {bound}, got {loss}")
    return float(loss)
