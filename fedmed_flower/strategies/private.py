"""Differential privacy for whole hospitals: the server adds the noise, or the hospitals do."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.updates import OVERFLOW, NotUsableError, Updates
from fedmed_flower.arrays.views import own_content, view
from fedmed_flower.errors import InputError
from fedmed_flower.files import MALFORMED, RELEASES, read_file
from fedmed_flower.privacy.accounting import Release, epsilon_of, require_release
from fedmed_flower.privacy.grid import divergence_once, step_once
from fedmed_flower.privacy.noise import noised, noised_once, secure_generator
from fedmed_flower.secure.shares import HospitalNoise
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.settings.secure import OFF, SUM
from fedmed_flower.strategies.base import FedAvg
from fedmed_flower.strategies.selection import Selection
from fedmed_flower.strategies.server_optimizers import OPTIMISERS
from fedmed_flower.wire import HOSPITAL_EPSILON

# Share of the budget that adaptive clipping takes if `count_stddev` is not given.
_COUNT_SHARE = 0.1
# Outside these bounds, squares of lengths and the noise leave the range of float64.
_LEAST_NORM = 1e-100
_MOST_NORM = 1e100
# The accounting holds for these methods of `DPFedAvg` only.
_RULING = {"combine", "rule", "weigh", "choose", "needed"}
_PLAIN = (FedAvg, flower.FedAvg, flower.Strategy, *OPTIMISERS)


class DPFedAvg(FedAvg):
    """Federated averaging whose models do not show whether a hospital took part.

    McMahan, Ramage, Talwar, Zhang: Learning Differentially Private Recurrent Language Models, ICLR
    2018, https://arxiv.org/abs/1710.06963, algorithm 1, with a fixed denominator. The clipping norm
    may follow a quantile: Andrew, Thakkar, McMahan, Ramaswamy: Differentially Private Learning with
    Adaptive Clipping, NeurIPS 2021, https://arxiv.org/abs/1905.03871, algorithm 1.

    In each round every hospital takes part with the same probability, by a draw of the operating
    system. Its change of the model, in the floating-point entries, is clipped; all count the same;
    noise is added to the sum. Noise is released even if nobody took part or replied, or too few
    sites are connected: whether a round has a release must not show who was there. Other entries
    stay as they are.

    The models of all rounds together hide from everybody but the server whether a hospital took
    part at all. A hospital's metrics and failures, which the server writes to the run folder, are
    not protected. Patients are protected by training at the hospital, not here. Do without
    BatchNorm: its running variances get noise as other entries do and may turn negative.

    With `secure` nobody need trust the server: each hospital clips its own change, and adds a share
    of the noise to a secure sum (see `fedmed_flower.secure.shares`). All hospitals are then asked
    in each round, and who takes part can be seen; what each of them adds is hidden, from the server
    and from as many hospitals as may work with it. The mean is over those in the sum. A round that
    is lost counts as released.

    With one of Flower's server optimisers: ``class DPFedAdam(DPFedAvg, flower.FedAdam)``.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise of a round, in units of the clipping norm, the noise of the
        adaptive clipping's count included. At least 0; 0 adds none and protects nobody.
    clipping_norm : float
        Bound of the length of a hospital's change of the model; with `target_quantile`, that of the
        first round. At least 1e-100, at most 1e100; an adaptive norm stays within these bounds.
    population_size : int
        Hospitals of the consortium, whether connected or not; at least 1. Times `sampling_rate` it
        is the denominator of the mean.
    sampling_rate : float
        Probability with which a hospital takes part in a round. Above 0, at most 1.
    delta : float
        Above 0, below 1; well below 1 / `population_size`.
    target_epsilon : float, optional
        The run ends, with its model, before a round would bring epsilon above it. Above 0. The
        rounds before a resume count; other runs with the same hospitals do not.
    target_quantile : float, optional
        Clip at this quantile of the lengths, which is estimated privately. Above 0, below 1. With
        few hospitals and much noise the estimate wanders. None keeps the clipping norm.
    clip_norm_lr : float
        Step of the clipping norm's logarithm. Above 0.
    count_stddev : float, optional
        Standard deviation of the noise added to the count of unclipped updates. Above half of
        `noise_multiplier`, finite. None spends a tenth of the budget on it, or less if the standard
        deviation would be below a twentieth of the expected hospitals of a round.
    secure : bool or {"none", "sum"}
        Whether hospitals add the noise themselves, in secure sums. It excludes a `sampling_rate`
        below 1, since the server draws the hospitals; `target_quantile`; and a `noise_multiplier`
        of 0. `noise_multiplier` is that of the shares that nobody can subtract.

    Attributes
    ----------
    clipping_norm : float
        The clipping norm of the next round.
    releases : collections.Counter
        Numbers of releases so far, by `privacy.accounting.Release`. With a run folder, a release is
        in its ``privacy.json`` before anything of it can be seen.
    divergence : float or None
        How far the releases so far are from those with exact noise: by how much that raises delta,
        `privacy.grid.excess_delta` says. None if no bound is known, as with `secure`.

    Raises
    ------
    InputError
        If an argument is out of its range, or one round costs more than `target_epsilon`.
    """

    combines_companions = False
    draws_by_law = True

    def __init__(
        self,
        *args: Any,
        noise_multiplier: float,
        clipping_norm: float,
        population_size: int,
        sampling_rate: float = 1.0,
        delta: float = 1e-5,
        target_epsilon: float | None = None,
        target_quantile: float | None = None,
        clip_norm_lr: float = 0.2,
        count_stddev: float | None = None,
        secure: bool | str = OFF,
        **kwargs: Any,
    ) -> None:
        if isinstance(secure, bool):
            secure = SUM if secure else OFF
        super().__init__(*args, secure=secure, **kwargs)
        require_release(sampling_rate, noise_multiplier)
        inside = _LEAST_NORM <= clipping_norm <= _MOST_NORM
        bound = f"at least {_LEAST_NORM:g} and at most {_MOST_NORM:g}"
        _require("clipping_norm", clipping_norm, inside, bound)
        inside = 1 <= population_size < math.inf
        _require("population_size", population_size, inside, "at least 1 and finite")
        _require("delta", delta, 0 < delta < 1, "above 0 and below 1")
        inside = 0 < clip_norm_lr < math.inf
        _require("clip_norm_lr", clip_norm_lr, inside, "above 0 and finite")
        if target_epsilon is not None:
            _require("target_epsilon", target_epsilon, target_epsilon > 0, "above 0")
        if target_quantile is not None:
            inside = 0 < target_quantile < 1
            _require("target_quantile", target_quantile, inside, "above 0 and below 1")
        limits = {"min_replies": 1, "max_weight_share": None, "max_update_norm": None}
        for name, allowed in (limits | {"fraction_train": 1.0}).items():
            # Any other value would let the release depend on who took part.
            value = getattr(self, name)
            _require(name, value, value == allowed, f"{allowed} with differential privacy")
        self.noise_multiplier = float(noise_multiplier)
        self.sampling_rate = float(sampling_rate)
        self.population_size = population_size
        self.delta = float(delta)
        self.clipping_norm = self._first_norm = float(clipping_norm)
        self.clip_norm_lr = clip_norm_lr
        self.target_epsilon = target_epsilon
        self.target_quantile = target_quantile
        self.expected = sampling_rate * population_size
        if count_stddev is None:
            least = noise_multiplier / (2 * math.sqrt(_COUNT_SHARE))
            count_stddev = max(self.expected / 20, least)
        inside = noise_multiplier / 2 < count_stddev < math.inf or noise_multiplier == 0
        bound = "above half of noise_multiplier and finite"
        _require("count_stddev", count_stddev, inside, bound)
        self.count_stddev = count_stddev
        self.releases: Counter[Release] = Counter()
        self.divergence: float | None = 0.0
        self._drawn: int | None = None
        self._sample: list[int] = []
        self.require_summable()
        reason = self.stop_reason()
        if reason is not None:
            raise InputError(reason)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        for other in cls.__mro__:
            # While a class is being made, ABCMeta's issubclass gives wrong answers about it.
            derived = DPFedAvg in other.__mro__
            ruling = (_RULING if derived else _RULING | {"aggregate_train"}) & vars(other).keys()
            if ruling and other not in (DPFedAvg, *_PLAIN):
                raise TypeError(
                    f"{cls.__name__}: the rule of {other.__name__} ({', '.join(sorted(ruling))}) "
                    "has no bounded sensitivity that is known here, so its privacy cannot be "
                    "accounted for"
                )
        super().__init_subclass__(**kwargs)

    def compare_rounds(self, keep_model: str, keep_metric: str = "", patience: int = 0) -> None:
        """Say which model is kept, as `FedAvg.keep`, by a figure that the server measures.

        Raises
        ------
        InputError
            Also if figures of hospitals would decide: they carry no noise, and which round they
            choose would show who took part.
        """
        if Selection(keep_model, keep_metric, patience).by_hospitals:
            raise InputError(
                f"{type(self).__name__} cannot keep the best model or stop by figures of "
                "hospitals, which carry no noise: name a figure that the server measures on data "
                "of its own (keep-metric server:NAME, evaluate_fn), or keep the last model"
            )
        super().compare_rounds(keep_model, keep_metric, patience)

    @property
    def epsilon(self) -> float:
        """Epsilon of all releases so far, at `delta`."""
        return epsilon_of(self.releases, self.delta)

    @property
    def sum_multiplier(self) -> float:
        """Noise multiplier of the sum: what the count's noise leaves of `noise_multiplier`."""
        if self.target_quantile is None or self.noise_multiplier == 0:
            return self.noise_multiplier
        # Andrew et al., theorem 1: the count, less half of it, has the sensitivity 1/2.
        share = self.noise_multiplier / (2 * self.count_stddev)
        return self.noise_multiplier / math.sqrt((1 - share) * (1 + share))

    def start(
        self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any
    ) -> flower.Result:
        """Run the rounds, as `FedAvg.start`, within what is left of the budget.

        Raises
        ------
        InputError
            Also if ``privacy.json`` in the run folder cannot be read or records releases of a run
            that is not resumed, or if the checkpoint is from a run without noise.
        """
        if self.folder is not None:
            self._take_up_ledger(self.folder)
        return super().start(grid, initial_arrays, *args, **kwargs)

    def stop_reason(self) -> str | None:
        """Return why no further round may be trained; None if one may."""
        if self.target_epsilon is None:
            return None
        planned = self.releases + Counter([self._release])
        epsilon = epsilon_of(planned, self.delta)
        if epsilon <= self.target_epsilon:
            return None
        return (
            f"a further round would cost epsilon {epsilon:.3f} in all, above "
            f"target_epsilon={self.target_epsilon}"
        )

    def require_summable(self) -> None:
        """Raise `InputError` if hospitals are to add the noise, and cannot by these arguments."""
        super().require_summable()
        if self.secure == OFF:
            return
        for name, wrong, bound in (
            ("sampling_rate", self.sampling_rate < 1, "1: the server would draw the hospitals"),
            ("target_quantile", self.target_quantile is not None, "None: the norm stays"),
            ("noise_multiplier", not self.noise_multiplier > 0, "above 0"),
        ):
            _require(name, getattr(self, name), not wrong, f"{bound}, with secure")

    @property
    def secure_noise(self) -> HospitalNoise:
        """The noise that hides each hospital; patients have that of each hospital beside it."""
        return HospitalNoise(self.noise_multiplier, self.clipping_norm)

    @property
    def _known(self) -> type[FedAvg]:
        return DPFedAvg

    def needed(self) -> int:
        """Return 0: noise alone is released if nobody replied. With `secure` that cannot be."""
        return 0 if self.secure == OFF else 1

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Address this round's training messages to the sites drawn, which may be none."""
        if self.companions:
            raise InputError(
                f"{type(self).__name__} takes no companions, got {', '.join(self.companions)}: "
                "they would leave without noise"
            )
        self._sample = []
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._drawn = server_round
        # Flower made too few messages if a site has connected since it counted them.
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        late = self._sample[len(messages) :]
        more = (Message(own_content(content), node, MessageType.TRAIN) for node in late)
        asked = [*messages, *more]
        if asked and self.secure == SUM:
            # The sum is seen as it is opened, whatever becomes of it.
            self._charge(None)
        return asked

    def choose(
        self, nodes: Collection[int], count: int, server_round: int, training: bool
    ) -> list[int]:
        """Draw each site independently for training; draw as `FedAvg` for evaluation."""
        if not training:
            return super().choose(nodes, count, server_round, training)
        draw = random.SystemRandom()
        self._sample = [node for node in nodes if draw.random() < self.sampling_rate]
        return self._sample

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Release the noisy mean; report ``hospital-epsilon`` so far and ``clipping-norm``.

        Raises
        ------
        InputError
            If no sites were drawn for this round, or the round was released already.
        """
        if self._drawn != server_round:
            raise InputError(
                f"{type(self).__name__} has drawn no sites for round {server_round}: call "
                "configure_train before each aggregate_train"
            )
        self._drawn = None
        clipping_norm = self.clipping_norm
        arrays, metrics = super().aggregate_train(server_round, list(replies))
        if arrays is None and self.secure == SUM:
            # The sum is lost, and no round; what it cost stands in that of the next.
            return None, None
        reported = {HOSPITAL_EPSILON: self.epsilon, "clipping-norm": clipping_norm}
        return arrays, MetricRecord(dict(metrics or {}) | reported)

    def combine(self, updates: Updates, weights: Sequence[float]) -> ArrayRecord:
        """Return the model plus the noisy mean of the clipped changes.

        Raises
        ------
        NotUsableError
            If updates hold NaN or infinite values, or values whose squares overflow. Nothing is
            released then.
        """
        if self.secure == SUM:
            # The mean of clipped changes, or that of each group, has its noise from the hospitals.
            return super().combine(updates, weights)
        updates.check()
        norms = updates.norms(double=True)
        overflowing = np.flatnonzero(~np.isfinite(norms))
        if overflowing.size:
            raise NotUsableError({int(k): OVERFLOW for k in overflowing})
        # Charged before anything is computed that could be seen: a crash must not lose the charge.
        entries = map(view, updates.layout.values())
        sizes = [entry.size for entry in entries if kernels.is_floating(entry.dtype)]
        numbers = sum(sizes)
        added = divergence_once(numbers)
        if self.target_quantile is not None:
            added += divergence_once(1)
        self._charge(added)
        changes = updates.sum_of_changes(self.clipping_norm / np.maximum(norms, self.clipping_norm))
        std = self.sum_multiplier * self.clipping_norm
        # A new generator for each release: a copy of the strategy must not repeat the noise.
        generator = secure_generator()
        step = step_once(std, numbers)
        for change in changes.values():
            change[:] = noised(change, std, step, generator)
            change /= self.expected
        if self.target_quantile is not None:
            self._follow_quantile(norms, self.target_quantile)
        return updates.moved(changes)

    def export_state(self) -> dict[str, ArrayRecord]:
        """Return the state of `FedAvg`, the releases and the clipping norm."""
        table = np.array([[*release, count] for release, count in self.releases.items()], float)
        record = ArrayRecord(
            {
                "releases": Array(table.reshape(-1, 3)),
                "clipping-norm": Array(np.asarray(self.clipping_norm)),
                "divergence": Array(np.asarray(_number(self.divergence))),
            }
        )
        return super().export_state() | {"privacy": record}

    def import_state(self, state: dict[str, ArrayRecord]) -> None:
        """Take up what `export_state` returned; releases are only ever added."""
        super().import_state({key: record for key, record in state.items() if key != "privacy"})
        self.clipping_norm = self._first_norm
        if "privacy" in state:
            norm = float(view(state["privacy"]["clipping-norm"]))
            if not 0 < norm < math.inf:
                raise ValueError(f"clipping-norm must be above 0 and finite, got {norm}")
            self.clipping_norm = norm
            record = state["privacy"]
            divergence = float(view(record["divergence"])) if "divergence" in record else math.nan
            self._take_up(_Spent.of(view(record["releases"]).tolist(), divergence))

    @property
    def _release(self) -> Release:
        return Release(self.sampling_rate, self.noise_multiplier)

    def _charge(self, divergence: float | None) -> None:
        """Count the release of a round, in the run folder too."""
        self.releases[self._release] += 1
        self.divergence = _added(self.divergence, divergence)
        if self.folder is not None:
            self.folder.write(RELEASES, self._ledger())

    def _follow_quantile(self, norms: np.ndarray[Any, Any], quantile: float) -> None:
        exact = np.asarray([(norms <= self.clipping_norm).sum() - len(norms) / 2])
        count = float(noised_once(exact, self.count_stddev if self.noise_multiplier else 0.0)[0])
        unclipped = count / self.expected + 0.5
        logarithm = math.log(self.clipping_norm) - self.clip_norm_lr * (unclipped - quantile)
        bounded = min(max(logarithm, math.log(_LEAST_NORM)), math.log(_MOST_NORM))
        self.clipping_norm = math.exp(bounded)

    def _take_up_ledger(self, folder: RunFolder) -> None:
        path = folder.path / RELEASES
        spent = _read_ledger(path)
        if self.resume:
            checkpoint = folder.load()
            if checkpoint is not None and "privacy" not in checkpoint.strategy_state:
                raise InputError(
                    f"{folder.path} holds a run without differential privacy, whose rounds cannot "
                    "be accounted for: resume it with the strategy that it was started with"
                )
            # A round that was lost in a crash may have been seen: its release counts.
            self._take_up(spent)
        elif spent.releases and not folder.checkpoint_file.exists():
            raise InputError(
                f"{path} records {spent.releases.total()} releases of an earlier run: choose "
                "another folder, or go on with that run, whose releases count (resume)"
            )

    def _take_up(self, spent: _Spent) -> None:
        """Count what was released before, as the larger of two accounts says."""
        self.releases |= spent.releases
        if self.divergence is not None:
            now = self.divergence
            self.divergence = None if spent.divergence is None else max(now, spent.divergence)

    def _ledger(self) -> bytes:
        rows = [[*release, count] for release, count in sorted(self.releases.items())]
        ledger = {"releases": rows, "delta": self.delta, "divergence": self.divergence}
        return json.dumps(ledger).encode()


class _Spent(NamedTuple):
    """Releases, and the divergence of all together; None if no bound is known."""

    releases: Counter[Release]
    divergence: float | None

    @classmethod
    def of(cls, rows: Iterable[Sequence[float]], divergence: float | None) -> _Spent:
        """Check what was read; a divergence that is no number is not known."""
        releases = _counter(rows)
        if not releases:
            return cls(releases, 0.0)
        if divergence is None or math.isnan(divergence):
            return cls(releases, None)
        if not 0 <= divergence < math.inf:
            raise ValueError(f"a divergence must be at least 0 and finite, got {divergence}")
        return cls(releases, float(divergence))


def _added(total: float | None, divergence: float | None) -> float | None:
    return None if total is None or divergence is None else total + divergence


def _number(divergence: float | None) -> float:
    return math.nan if divergence is None else divergence


def _read_ledger(path: Path) -> _Spent:
    try:
        ledger = json.loads(read_file(path.parent, path.name).decode())
        return _Spent.of(ledger["releases"], ledger.get("divergence"))
    except FileNotFoundError:
        return _Spent(Counter(), 0.0)
    except (OSError, *MALFORMED) as error:
        raise InputError(
            f"the privacy ledger {path} cannot be read ({error}), so the releases so far are not "
            "known: restore it from a copy"
        ) from error


def _counter(rows: Iterable[Sequence[float]]) -> Counter[Release]:
    releases: Counter[Release] = Counter()
    for rate, noise, count in rows:
        require_release(rate, noise)
        if count < 1 or count != int(count):
            raise ValueError(f"a number of releases must be a whole number above 0, got {count}")
        releases[Release(rate, noise)] += int(count)
    return releases


def _require(name: str, value: object, fulfilled: bool, bound: str) -> None:
    if not fulfilled:
        raise InputError(f"{name} must be {bound}, got {value}")
