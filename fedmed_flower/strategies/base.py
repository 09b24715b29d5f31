"""One run of rounds: sample, send, screen, aggregate, record, checkpoint, resume, stop."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedmed_flower.arrays.compression import NONE, code_of
from fedmed_flower.arrays.packing import Packing
from fedmed_flower.arrays.updates import Updates
from fedmed_flower.arrays.views import keep_dtypes, own_content, record_of, records_of
from fedmed_flower.errors import InputError
from fedmed_flower.methods.base import Method
from fedmed_flower.methods.registry import method_of
from fedmed_flower.metrics.names import VIRTUAL_SECONDS, is_pooled_only
from fedmed_flower.metrics.pooling import class_counts, pool
from fedmed_flower.secure.parts import EXAMPLES
from fedmed_flower.secure.shares import Declared, PatientNoise
from fedmed_flower.server.compression import Unpacker, require_one_each
from fedmed_flower.server.history import History, Stop
from fedmed_flower.server.inbox import SUM_NODE, AcceptedReply, Inbox
from fedmed_flower.server.listener import Listener
from fedmed_flower.server.listeners import Ending, Listeners
from fedmed_flower.server.run_folder import DEFAULT_FOLDER, Checkpoint, RunFolder
from fedmed_flower.server.screening import (
    first_arrays,
    metrics_of,
    with_arrays,
    with_shared_metrics,
)
from fedmed_flower.server.secure import SecureSums
from fedmed_flower.server.sites import app_name, draw, nobody_left, shortfall, wait_for_sites
from fedmed_flower.server.spill import Spill
from fedmed_flower.server.validation import Validation
from fedmed_flower.settings.plan import IN_ITS_ROUND, WITH_NEXT
from fedmed_flower.settings.section import MOST_EXPONENT
from fedmed_flower.settings.secure import LEAST_EXPONENT, MOST_SECURE_EXPONENT, OFF, SUM
from fedmed_flower.settings.text import setting_error
from fedmed_flower.strategies import checkpoint as checkpoints
from fedmed_flower.strategies import validation as validations
from fedmed_flower.strategies.aggregation import (
    STREAM_ABOVE,
    Combined,
    Limits,
    average_metrics,
    combine,
    drain,
    first_and_rest,
    flaw_of,
    mean_one_by_one,
    means_of_finite,
    shapes,
    weighed,
)
from fedmed_flower.strategies.asynchronous import RESUMED, Dispatch, ReplyBuffer, refusal
from fedmed_flower.strategies.methods import (
    MethodState,
    companions_of,
    config_of,
    moved,
    require_fitting,
)
from fedmed_flower.strategies.secure import (
    OF_SUMS,
    GroupRule,
    SecureRounds,
    require_summable,
)
from fedmed_flower.strategies.selection import LAST, Selection, server_figures
from fedmed_flower.strategies.server_optimizers import (
    OPTIMISERS,
    class_below,
    export_state,
    import_state,
    known_model,
    minima,
    require_real,
    step,
    stepped,
)
from fedmed_flower.wire import (
    ALL_SITES,
    BYTES_SAVED,
    COMPRESSION,
    LEDGER_DIR,
    METHOD_RECORD,
    RUN_KEY,
    SECURE,
    SPLIT,
    TOP_K_SHARE,
    UNCODED,
)

log = logging.getLogger("flwr.fedmed")

# Maps (server_round, arrays) to metrics.
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]

# If so many sites, drawn from more, fail alike, the others would too.
_MANY = 3
_TRAIN = 0
_EVALUATE = 1


@dataclass
class RunState:
    """What a run knows from one phase to the next; `FedAvg.start` makes a new one.

    Attributes
    ----------
    timeout : float
        Seconds to wait in each phase.
    begun : bool
        Whether a round has made a model.
    told : int
        Rows of the history of which the listeners have heard.
    server_round : int
        The round whose replies are being combined.
    faulty : int
        Replies of that round that are malformed, or whose values are not finite or overflow.
    sent_arrays : ArrayRecord or None
        The model that `FedAvg.configure_train` sent last.
    companions : dict of str to ArrayRecord
        The companions that came back changed, by name.
    evaluated : str
        The phase of evaluation: ``val``, or ``test`` at the end.
    halted : str
        Why the run ended although rounds were left; empty if it did not. Set if all sites failed
        alike.
    rows_of_class : list of int
        The rows of the last evaluation by class, over all sites; empty if they are not known.
    tested : dict of str to dict
        The metrics and counts of each site's reply to `FedAvg.test`.
    strategy : dict
        The strategy's class and its arguments, as the checkpoint records them.
    waiting : ReplyBuffer or None
        What is under way in asynchronous rounds; None if rounds wait for all their sites.
    secure : SecureRounds or None
        The run's secure sums; None if sites reply in plain.
    method : MethodState
        What the server knows of the method for hospitals that differ.
    spill : Spill or None
        Where the replies of the last training exchange are; None before the first.
    selection : Selection
        Which round's model is the best so far.
    """

    timeout: float = math.inf
    begun: bool = False
    told: int = 0
    server_round: int = 0
    faulty: int = 0
    sent_arrays: ArrayRecord | None = None
    companions: dict[str, ArrayRecord] = field(default_factory=dict)
    evaluated: str = "val"
    halted: str = ""
    rows_of_class: list[int] = field(default_factory=list)
    tested: dict[str, dict[str, Any]] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    waiting: ReplyBuffer | None = None
    secure: SecureRounds | None = None
    method: MethodState = field(default_factory=MethodState)
    spill: Spill | None = None
    selection: Selection = field(default_factory=Selection)


def leave_result(grid: Grid, result: flower.Result, folder: RunFolder | None) -> None:
    """Leave a result with the grid of `run_local`, which returns the last one."""
    if hasattr(grid, "take_result"):
        grid.take_result(result, None if folder is None else folder.path)


class FedAvg(flower.FedAvg):
    """Federated averaging that survives failed sites, records each site and can be resumed.

    McMahan, Moore, Ramage, Hampson, Aguera y Arcas: Communication-Efficient Learning of Deep
    Networks from Decentralized Data, AISTATS 2017, https://arxiv.org/abs/1602.05629

    Takes the arguments of Flower's `FedAvg` and those below. Two things differ: the minimum
    numbers of nodes are 1 if they are not given, so that a run with one site does not wait for
    a second one; and sites are counted and sampled after they have connected.

    Parameters
    ----------
    run_dir : str or Path, optional
        Folder for checkpoint, metrics and model. None keeps everything in memory.
    resume : bool
        Go on from the checkpoint in `run_dir` if there is one.
    seed : int, optional
        Decides which sites are sampled in a round, together with the sites' names. At least 0. None
        draws it from the operating system.
    min_replies : int
        A round with fewer usable training replies leaves the model as it is. At least 1.
    max_weight_share : float, optional
        Largest share of one reply in the sum of all weights; a larger weight is cut to it. Above 0,
        at most 1. None sets no limit, as in Flower: a site that overstates its size is believed.
    max_update_norm : float, optional
        A reply is left out if its change of the model is longer than this many times the median
        length. At least 1. (If `aggregate_train` is called without `configure_train` before it,
        lengths are distances from one of the replies, near the middle.)
    quorum : int, optional
        After this number of sites has replied without an error, wait only `grace` seconds for the
        others, which are recorded as failed. At least 1. None waits for all until the timeout.
    grace : float
        Seconds; at least 0.
    method : str or Method, optional
        What sites do beside plain training, and the server with it: see `fedmed_flower.methods`.
        `federate` sets it by the run config. None is plain training.
    keep_model, keep_metric, patience
        As `compare_rounds` takes them.
    listeners : iterable of Listener
        They hear how a run goes: see `fedmed_flower.server.Listener`.
    compression : {"none", "int8", "int4", "top-k"}
        How sites send the change of the model, and of each companion, back: in 8 or 4 bits, or its
        largest entries alone. They add what the code lost to the next change.
    top_k_share : float
        Share of the entries of each array that ``"top-k"`` keeps. Above 0, at most 1.
    buffer : int
        Asynchronous rounds (FedBuff): a round ends with so many usable replies, and the next model
        goes to the sites that are free. A reply counts as the change of the model that was sent to
        its site. `fraction_train` is then the share of sites that train at once. At most the number
        of sites. 0: a round waits for the replies of all its sites.
    staleness_exponent : float
        With `buffer`, the weight of a reply is multiplied by (1 + s) ^ -`staleness_exponent` if its
        model is s rounds old. From 0, which makes no difference, to 10.
    secure : {"none", "sum"}
        With ``"sum"`` the server learns sums over hospitals and no single reply: see
        ``docs/guides/secure.md``.
    secure_exponent : int
        With `secure`, no weight may change by more than 2 to the power of this in a round. From -40
        to 10.
    validate : {"own", "next"}
        When the model of a round is validated: in an exchange of its own; or by the sites that are
        sent it in the next round, with their training. See ``docs/guides/validate-next.md``.
    memory_gigabytes : float
        Most memory for the arrays of a round's replies, in 10^9 bytes, if the rule needs all at
        once. Those beyond it are read from a file without a name in `run_dir`; the model is the
        same to the bit. Not in asynchronous rounds. 0: half of what the machine has available.

    Attributes
    ----------
    history : History
        Every number of every site and every failure, round by round.
    result : flwr.serverapp.strategy.Result
        What `start` returns; up to date while it runs and after it was interrupted.
    only : set of int, optional
        Node ids to which training and evaluation are confined.
    excluded : collection of int
        Node ids of sites that are sent nothing.
    site_names : dict
        Site name by node id, as far as the sites have reported it.
    before_round : callable, optional
        Called with the round's number when its sites are connected and before they are drawn.
    buffers : collection of str
        Keys of the model's buffers, which a server optimiser averages and does not step. `federate`
        sets it. Batch normalisation's ``running_mean`` and ``running_var`` need not be named.
    keep : str
        The setting of this name: which layers stay different at each site. `federate` sets it, as
        the next two.
    kept : collection of str
        The keys of these layers.
    keep_sent : bool
        Whether sites send them too.
    companions : dict of str to ArrayRecord
        Records that travel beside the model: sent in each training message, and sent back, changed,
        in each reply. These are the ones at the start of a run; `FedAvg` has none.
        `combine_companion` makes the next ones, `current_companions` returns them, and the
        checkpoint holds them.
    run : RunState
        What the run knows from one phase to the next.
    patient_noise : PatientNoise or None
        Patients' noise of which each hospital adds a share to a secure sum. `federate` sets it, as
        the next one.
    patients_hidden : bool
        Whether hospitals protect patients by noise, and so tell no training loss.

    Raises
    ------
    InputError
        If an argument is out of its range, or `resume` is given without `run_dir`.

    Notes
    -----
    A round is select, exchange, screen, combine, step, record. `configure_train` selects,
    `exchange` sends and collects, and `aggregate_train` does the rest; each can be called alone.
    """

    # The strategy of Flower, or of somebody else, that this one is mixed with.
    below: ClassVar[type[Any] | None] = None
    # Whether the rule may combine further arrays as it combines models.
    combines_companions: ClassVar[bool] = True
    # Whether the sites of a round are drawn by a law of the strategy's own.
    draws_by_law: ClassVar[bool] = False
    # What the texts about too few replies add: a space, then text in brackets.
    if_too_few: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.below = class_below(cls, FedAvg)

    def __init__(
        self,
        *args: Any,
        run_dir: str | Path | None = None,
        resume: bool = False,
        seed: int | None = None,
        min_replies: int = 1,
        max_weight_share: float | None = None,
        max_update_norm: float | None = None,
        quorum: int | None = None,
        grace: float = 60.0,
        method: str | Method | None = None,
        keep_model: str = LAST,
        keep_metric: str = "",
        patience: int = 0,
        listeners: Iterable[Listener] = (),
        compression: str = NONE,
        top_k_share: float = 0.01,
        buffer: int = 0,
        staleness_exponent: float = 0.5,
        secure: str = OFF,
        secure_exponent: int = -2,
        validate: str = IN_ITS_ROUND,
        memory_gigabytes: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs | minima(super().__init__, args, kwargs))
        if min_replies < 1:
            raise InputError(f"min_replies must be at least 1, got {min_replies}")
        if max_weight_share is not None and not 0 < max_weight_share <= 1:
            raise InputError(
                f"max_weight_share must be above 0 and at most 1, got {max_weight_share}"
            )
        if max_update_norm is not None and not max_update_norm >= 1:
            raise InputError(f"max_update_norm must be at least 1, got {max_update_norm}")
        if quorum is not None and quorum < 1:
            raise InputError(f"quorum must be at least 1, got {quorum}")
        if not 0 <= grace < math.inf:
            raise InputError(f"grace must be at least 0 seconds and finite, got {grace}")
        code_of(compression, top_k_share)
        self.compression = compression
        self.top_k_share = top_k_share
        if buffer < 0:
            raise InputError(f"buffer must be at least 0, got {buffer}")
        if not 0 <= staleness_exponent <= MOST_EXPONENT:
            raise InputError(
                f"staleness_exponent must be from 0 to {MOST_EXPONENT:g}, got {staleness_exponent}"
            )
        self.buffer = buffer
        self.staleness_exponent = staleness_exponent
        if secure not in (OFF, SUM):
            raise InputError(f"secure must be {OFF!r} or {SUM!r}, got {secure!r}")
        if not LEAST_EXPONENT <= secure_exponent <= MOST_SECURE_EXPONENT:
            raise InputError(
                f"secure_exponent must be from {LEAST_EXPONENT} to {MOST_SECURE_EXPONENT}, got "
                f"{secure_exponent}"
            )
        self.secure = secure
        self.secure_exponent = secure_exponent
        if validate not in (IN_ITS_ROUND, WITH_NEXT):
            raise InputError(
                f"validate must be {IN_ITS_ROUND!r} or {WITH_NEXT!r}, got {validate!r}"
            )
        self.validate = validate
        # Of a run in which hospitals were greeted before the first round too.
        self._sums: SecureSums | None = None
        if not 0 <= memory_gigabytes < math.inf:
            raise InputError(
                f"memory_gigabytes must be at least 0 and finite, got {memory_gigabytes}"
            )
        self.memory_gigabytes = memory_gigabytes
        self.quorum = quorum
        self.grace = grace
        self.max_weight_share = max_weight_share
        self.max_update_norm = max_update_norm
        if resume and run_dir is None:
            raise InputError("resume needs run_dir, the folder of the run to go on with")
        self.folder = None if run_dir is None else RunFolder(run_dir)
        self.resume = resume
        if seed is not None and seed < 0:
            raise InputError(f"seed must be at least 0, got {seed}")
        self.seed = secrets.randbits(63) if seed is None else seed
        self.min_replies = min_replies
        self.compare_rounds(keep_model, keep_metric, patience)
        self.inbox = Inbox()
        self.listeners = Listeners(listeners)
        self.result = flower.Result()
        self.only: set[int] | None = None
        self.excluded: Collection[int] = ()
        self.before_round: Callable[[int], None] | None = None
        self.buffers: Collection[str] = ()
        self.companions: dict[str, ArrayRecord] = {}
        self.keep = ""
        self.kept: Collection[str] = ()
        self.keep_sent = True
        self.patient_noise: PatientNoise | None = None
        self.patients_hidden = False
        self.method: Method | None = None
        self.use_method(method_of(method))
        self.run = RunState()

    def use_method(self, method: Method | None) -> None:
        """Take a method for hospitals that differ.

        Raises
        ------
        InputError
            If the strategy has another one, or would make it wrong.
        """
        if method is None:
            return
        if self.method is not None and self.method.name != method.name:
            raise InputError(
                f"{type(self).__name__} was made with the method {self.method.name}, and the run "
                f"config asks for {method.name}: give one of them"
            )
        name = type(self).__name__
        foreign = self.below is not None and self._optimiser is None
        plain = self.combines_companions and not foreign
        require_fitting(method, name, plain, self._optimiser is not None, self.draws_by_law)
        self.method = method

    def compare_rounds(self, keep_model: str, keep_metric: str = "", patience: int = 0) -> None:
        """Say which model is kept, and when a run ends that no longer improves.

        Training always goes on from the last model.

        Parameters
        ----------
        keep_model : {"last", "best"}
            Whether the result of a run is the last model or that of the best round.
        keep_metric : str
            The figure that says which round is the best: one of all sites' validation rows
            together, or, after ``server:``, one of `evaluate_fn`. Empty: that by which a run is
            judged, such as the AUC.
        patience : int
            The run ends after so many rounds without a better figure. 0: it does not.

        Raises
        ------
        InputError
            If an argument is none of these, or there will be no such figure.
        """
        selection = Selection(keep_model, keep_metric, patience)
        if selection.by_hospitals and self.fraction_evaluate == 0:
            raise InputError(
                "keep_model and patience need figures of validation rows, and fraction_evaluate "
                "is 0: set it above 0, or name a figure of the server (keep_metric='server:NAME')"
            )
        self.keep_model = keep_model
        self.keep_metric = keep_metric
        self.patience = patience

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> flower.Result:
        """Run the rounds.

        Parameters
        ----------
        grid, initial_arrays, train_config, evaluate_config, evaluate_fn
            As in Flower.
        num_rounds : int
            At least 1. A resumed run does what is left of them.
        timeout : float
            Seconds to wait for the replies of a phase, and before it for the minimum of sites to
            be connected. Sites that have not replied by then are recorded as failed for that
            phase. If too few are connected by then, the phase is recorded as failed.

        Returns
        -------
        flwr.serverapp.strategy.Result
            Its `arrays` are the last model, or that of the best round if `keep` asks for it; the
            initial one if no round succeeded.

        Raises
        ------
        InputError
            If an argument is out of range, the checkpoint is damaged or belongs to another model,
            or the figure that decides which model is kept never comes.
        """
        if num_rounds < 1:
            raise InputError(f"num_rounds must be at least 1, got {num_rounds}")
        if not timeout > 0:
            raise InputError(f"timeout must be above 0 seconds, got {timeout}")
        self.require_buffer()
        self.require_choice()
        self.require_summable()
        configs = {
            _TRAIN: ConfigRecord() if train_config is None else train_config,
            _EVALUATE: ConfigRecord() if evaluate_config is None else evaluate_config,
        }
        self.require_validation()
        if self.validate == WITH_NEXT:
            validations.require_one_config(configs[_TRAIN], configs[_EVALUATE])
        if self.folder is None and (path := os.environ.pop(DEFAULT_FOLDER, "")):
            # For the first strategy of an app alone: two would overwrite each other.
            self.folder = RunFolder(Path(path))
            self.folder.require_unused()
        # From here on only the app may hold the initial model, which the rounds replace.
        self.result = flower.Result(arrays=initial_arrays)
        del initial_arrays
        with self.listeners.run() as ending:
            self._run(grid, num_rounds, timeout, configs, evaluate_fn)
            self._describe_end(ending)
        leave_result(grid, self.result, self.folder)
        return self.result

    def _run(
        self,
        grid: Grid,
        num_rounds: int,
        timeout: float,
        configs: dict[int, ConfigRecord],
        evaluate_fn: EvaluateFn | None,
    ) -> None:
        """Run the rounds, by arguments that have been checked."""
        selection = Selection(self.keep_model, self.keep_metric, self.patience)
        self.run = RunState(timeout, selection=selection)
        self.inbox.history = History()
        self.inbox.declined = set()
        # An earlier run of this object must leave no state behind.
        self.import_state({})
        self.run.strategy = checkpoints.arguments_of(self)
        first = self._restore(grid, self.result.arrays) + 1
        self._set_clock(grid)
        if self.buffer:
            self.run.waiting = ReplyBuffer(
                grid, self.inbox, self.buffer, self.staleness_exponent, timeout, self.buffers
            )
            if 1 < first <= num_rounds:
                self.inbox.note(first, "train", ALL_SITES, RESUMED)
        if self.secure == SUM:
            self.run.secure = self._secure_rounds(grid, configs[_TRAIN])
        # Whether it still holds is asked before the next round.
        self.history.stopped = None
        if first > num_rounds + 1:
            raise InputError(
                f"num_rounds must be at least {first - 1}, the rounds that are done, "
                f"got {num_rounds}"
            )
        if self.folder is not None:
            self.listeners.open(self.folder, app_name(grid))
        self.listeners.began(self.listeners.part, num_rounds, tuple(self.history.rows))
        self.run.told = len(self.history.rows)
        if first == 1 and evaluate_fn is not None:
            self._add_metrics(
                0, "evaluate_metrics_serverapp", evaluate_fn(0, self.result.arrays), "server"
            )
        for server_round in range(first, num_rounds + 1):
            reason = self._reason_to_end(grid)
            if reason is not None and self._validate_last(grid, server_round - 1, configs):
                # Its figures may be better than all before.
                reason = self._reason_to_end(grid)
            if self.run.halted:
                break
            if reason is not None:
                self._stop(grid, Stop(server_round - 1, " ".join(reason.split())))
                break
            began = time.perf_counter()
            arrays = self.result.arrays
            due = self._due(server_round)
            # No further reference to a model that nobody needs any more.
            before = arrays if due and selection.by_hospitals else None
            aggregated, metrics, asked = self._train(grid, server_round, arrays, configs[_TRAIN])
            if aggregated is not None:
                self.result.arrays = arrays = aggregated
            self._add_metrics(server_round, "train_metrics_clientapp", metrics, "train")
            if (seconds := getattr(grid, "virtual_seconds", None)) is not None:
                self.history.add(server_round, "train", ALL_SITES, {VIRTUAL_SECONDS: seconds})
            if self._halted(grid, server_round, "train", asked):
                break

            validated = server_round if self.validate == IN_ITS_ROUND else due
            if validated == server_round:
                asked = self._validate(grid, server_round, arrays, configs[_EVALUATE])
            elif validated:
                asked = self._take_figures(validated, server_round)

            if evaluate_fn is not None:
                metrics = evaluate_fn(server_round, arrays)
                self._add_metrics(server_round, "evaluate_metrics_serverapp", metrics, "server")
            if validated == server_round or not selection.by_hospitals:
                self._compare(server_round, arrays)
            elif before is not None:
                self._compare(validated, before)
            before = None
            self._save(grid, server_round)
            seconds = time.perf_counter() - began
            line = self.history.describe(server_round, validated or None)
            log.info("round %d/%d  %s  %.1f s", server_round, num_rounds, line, seconds)
            self._tell(server_round)
            if validated and self._halted(grid, validated, "val", asked):
                break
        else:
            self._validate_last(grid, num_rounds, configs)
        if self.run.waiting is not None:
            self.run.waiting.close()
            self.run.waiting = None
        self._keep_best()

    def _reason_to_end(self, grid: Grid) -> str | None:
        """Return why the run ends before a further round; None if it goes on."""
        return (
            self.stop_reason()
            or self.run.selection.stop_reason()
            or nobody_left(self._connected(grid), self.inbox.declined, self.only)
        )

    def _validate(
        self, grid: Grid, server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> int:
        """Validate the model of a round by an exchange; return how many sites were asked."""
        messages = list(self.configure_evaluate(server_round, arrays, config, grid))
        replies = self.exchange(grid, messages, server_round, "val")
        metrics = self.aggregate_evaluate(server_round, replies)
        self._add_metrics(server_round, "evaluate_metrics_clientapp", metrics, "val")
        return len(messages)

    def _due(self, server_round: int) -> int:
        """Return the round whose validation figures come with the training of a round; 0 if none.

        After a resume they may have come already, if the run had ended there.
        """
        before = server_round - 1
        with_next = self.validate == WITH_NEXT and before > 0
        return before if with_next and not self.history.has_phase(before, "val") else 0

    def _take_figures(self, validated: int, server_round: int) -> int:
        """Take up the validation figures of a round that have come with the training of the next.

        Returns how many sites were asked.
        """
        replies = self.inbox.figures(validated, server_round)
        metrics = self.aggregate_evaluate(validated, replies)
        self._add_metrics(validated, "evaluate_metrics_clientapp", metrics, "val")
        return len(self.inbox.validation.nodes)

    def _validate_last(
        self, grid: Grid, server_round: int, configs: dict[int, ConfigRecord]
    ) -> bool:
        """Validate the last model by an exchange if no training follows; return whether it was."""
        if not self._due(server_round + 1):
            return False
        began = time.perf_counter()
        arrays = self.result.arrays
        asked = self._validate(grid, server_round, arrays, configs[_EVALUATE])
        if self.run.selection.by_hospitals:
            self._compare(server_round, arrays)
        self._save(grid, server_round)
        seconds = time.perf_counter() - began
        line = self.history.describe(None, server_round)
        log.info("round %d is validated  %s  %.1f s", server_round, line, seconds)
        self._tell(server_round)
        self._halted(grid, server_round, "val", asked)
        return True

    def _tell(self, server_round: int) -> None:
        """Tell the listeners the figures of which they have not heard."""
        rows = self.history.rows
        self.listeners.round_ended(server_round, tuple(rows[self.run.told :]))
        self.run.told = len(rows)

    def _train(
        self, grid: Grid, server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> tuple[ArrayRecord | None, MetricRecord | None, int]:
        """Train a round; return the model, the metrics and how many sites were asked."""
        waiting = self.run.waiting
        # Do not bind the replies to a variable: they would stay in memory while the sites evaluate.
        if waiting is None:
            messages = list(self.configure_train(server_round, arrays, config, grid))
            model, metrics = self.aggregate_train(
                server_round, self.exchange(grid, messages, server_round, "train")
            )
            return model, metrics, len(messages)
        layout = self.reply_layout(arrays)
        self._prepare_companions(arrays)
        model, metrics = self.aggregate_train(
            server_round,
            waiting.gather(
                Dispatch(server_round, arrays, self.current_companions),
                lambda: self.configure_train(server_round, arrays, config, grid),
                lambda: self._trainers(grid),
                lambda reply: self._is_usable(reply, waiting, layout),
            ),
        )
        waiting.record()
        return model, metrics, waiting.asked

    def _is_usable(self, reply: Message, waiting: ReplyBuffer, layout: ArrayRecord) -> bool:
        """Return whether a reply counts for the buffer, as far as is known so far."""
        try:
            dense = self.inbox.unpacked(reply, self._unpacker(layout))
        except ValueError:  # Recorded with its reason when the replies are combined.
            return False
        return waiting.usable(dense, self.weighted_by_key, layout)

    def require_choice(self) -> None:
        """Raise `InputError` if the best round's model is to be kept and sites have own ones."""
        if self.keep_model != LAST and self.has_own_models:
            name = "keep" if self.method is None else self.method.name
            raise InputError(
                f"keep_model={self.keep_model!r} excludes {name}: each site's own model is that of "
                "the last round, which does not fit the global one of another round; leave "
                "keep_model out (patience goes with it)"
            )

    def require_buffer(self) -> None:
        """Raise `InputError` if this strategy cannot train in asynchronous rounds, but is to."""
        if not self.buffer:
            return
        other = self.below
        reason = refusal(
            type(self).__name__,
            self.buffer,
            quorum=self.quorum,
            min_replies=self.min_replies,
            needed=self.needed(),
            draws_by_law=self.draws_by_law,
            method=self.method,
            below=None if other is None or issubclass(other, OPTIMISERS) else other,
            own_exchange=type(self).exchange is not FedAvg.exchange,
        )
        if reason is not None:
            raise InputError(reason)

    def require_validation(self) -> None:
        """Raise `InputError` if models are to be validated with the next training, and cannot."""
        if self.validate == IN_ITS_ROUND:
            return
        reason = validations.refusal(
            type(self).__name__,
            fraction_train=self.fraction_train,
            fraction_evaluate=self.fraction_evaluate,
            buffer=self.buffer,
            secure=self.secure == SUM,
            own_draw=self.draws_by_law or type(self).choose is not FedAvg.choose,
            method=self.method,
        )
        if reason is not None:
            raise InputError(reason)

    def require_summable(self) -> None:
        """Raise `InputError` if secure sums are asked for, and single replies are needed."""
        if self.secure == OFF:
            return
        other = self.below
        by_rows = self.secure_weighting == EXAMPLES and self.patient_noise is None
        require_summable(
            type(self).__name__,
            own_rule=self.secure_weighting is None
            or not (other is None or issubclass(other, OPTIMISERS))
            or any(getattr(type(self), name) is not getattr(self._known, name) for name in OF_SUMS),
            limits={
                "fraction_train": by_rows and self.fraction_train < 1,
                "max_weight_share": self.max_weight_share is not None,
                "max_update_norm": self.max_update_norm is not None,
                "compression": self.compression != NONE,
                "buffer": bool(self.buffer),
                "keep": bool(self.keep),
                "fraction_evaluate": 0 < self.fraction_evaluate < 1,
            },
            method=self.method,
        )
        if self.patient_noise is not None and self.secure_weighting != EXAMPLES:
            raise setting_error(
                f'local-steps must not be 1 with {type(self).__name__}, secure="sum" and '
                'privacy="patient": each patient then counts the same, whatever the weights of '
                "hospitals are; take FedAvg, or more local-steps",
                "local-steps",
            )

    @property
    def _known(self) -> type[FedAvg]:
        """The class whose rounds are known to work on sums, if a subclass leaves them."""
        return FedAvg

    @property
    def secure_noise(self) -> Declared | None:
        """The noise of which each hospital adds a share to a secure sum; None if there is none."""
        return self.patient_noise

    @property
    def secure_weighting(self) -> str | None:
        """How hospitals are weighted in a secure sum; None if that needs single replies."""
        return EXAMPLES if type(self).weigh is FedAvg.weigh else None

    def secure_sums(self, grid: Grid, run: str, timeout: float, simulated: bool) -> SecureSums:
        """Return the secure sums of a run: the same object as long as it is the same run.

        Parameters
        ----------
        grid : Grid
        run : str
            Name of the run.
        timeout : float
            Seconds to wait in each exchange beside the first.
        simulated : bool
            Whether the books of the hospitals lie in the run folder.
        """
        known = self._sums
        if known is None or known.grid is not grid or known.run != run:
            folder = None if self.folder is None else self.folder.path
            books = None if folder is None or not simulated else folder / SECURE
            known = SecureSums(grid, self.inbox, run, timeout, books, folder, self.grace)
            self._sums = known
        return known

    def _secure_rounds(self, grid: Grid, config: ConfigRecord) -> SecureRounds:
        simulated = LEDGER_DIR in config or hasattr(grid, "in_process")
        run = str(config.get(RUN_KEY, "")) or secrets.token_hex(8)
        sums = self.secure_sums(grid, run, self.run.timeout, simulated)
        by = self.secure_weighting or EXAMPLES
        noise = self.secure_noise
        rule = None
        if type(self).combine is not self._known.combine:
            rule = GroupRule(type(self).__name__, self.needed())
        return SecureRounds(sums, self.secure_exponent, by, not self.patients_hidden, noise, rule)

    def _compare(self, server_round: int, arrays: ArrayRecord) -> None:
        """Compare the model of a round with the best so far, if a figure decides anything."""
        selection = self.run.selection
        # The initial model is nobody's result.
        trained = min(self.result.train_metrics_clientapp, default=server_round + 1)
        if not selection.on or trained > server_round:
            return
        figures = dict(self.result.evaluate_metrics_clientapp.get(server_round, {}))
        measured = self.result.evaluate_metrics_serverapp.get(server_round)
        figures |= server_figures(measured)
        flaw = selection.observe(server_round, arrays, figures, self.history.sent)
        if flaw is not None:
            self.inbox.note(server_round, "val", ALL_SITES, flaw)

    def _keep_best(self) -> None:
        """Make the model of the best round the result, if that is asked for."""
        self.history.kept = self.run.selection.kept()
        model = self.run.selection.model
        if model is None:
            return
        self.result.arrays = model
        if self.folder is not None:
            self.folder.write_model(model)

    def _describe_end(self, ending: Ending) -> None:
        """Say how the rounds ended: without a model, or early."""
        if self.run.halted or not self.result.train_metrics_clientapp:
            ending.status = "failed"
            ending.message = self.run.halted or "no site could train"
        elif self.history.stopped is not None:
            ending.message = self.history.stopped.reason

    def test(
        self,
        grid: Grid,
        arrays: ArrayRecord,
        config: ConfigRecord | None = None,
        timeout: float = 3600,
        own: bool = False,
    ) -> dict[str, dict[str, float]]:
        """Evaluate a model once on the test split of every connected site.

        Parameters
        ----------
        grid, arrays, config, timeout
            As in `start`.
        own : bool
            Evaluate each site's own model, for a method that has such models.

        Returns
        -------
        dict
            ``{site: {metric: value}}``, with ``"all"`` for all sites together.
        """
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: ConfigRecord()})
        record = records_of(content, ConfigRecord)[self.configrecord_key]
        record.update({**(config or {}), SPLIT: "test"})
        server_round = max((row[0] for row in self.history.rows), default=0)
        messages = [
            Message(own_content(content), node_id, MessageType.EVALUATE)
            for node_id in grid.get_node_ids()
            if node_id not in self.excluded
        ]
        if own:
            self._tell_method(messages, own=True)
        before = len(self.history.rows)
        phase = "own-test" if own else "test"
        self.run.evaluated = phase
        self.run.timeout = timeout
        if self.secure == SUM and self.run.secure is None:
            # No round has been done: a finished model is tested.
            self.require_summable()
            self.run.secure = self._secure_rounds(grid, config or ConfigRecord())
        try:
            with self.listeners.run(again=True):
                if self.folder is not None:
                    self.listeners.open(self.folder, app_name(grid))
                replies = self.exchange(grid, messages, server_round, phase)
                metrics = self.aggregate_evaluate(server_round, replies)
                self.history.add(server_round, phase, ALL_SITES, metrics or {})
                self.listeners.tested(tuple(self.history.rows[before:]))
        finally:
            self.run.evaluated = "val"
        table: dict[str, dict[str, float]] = {}
        for _, _, site, metric, value in self.history.rows[before:]:
            table.setdefault(site, {})[metric] = value
        return table

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Wait for the sites, then address this round's training messages to a sample of them."""
        self.run.sent_arrays = arrays
        self.inbox.validation = Validation()
        self._ask_for_code(arrays, config)
        if self._optimiser is not None:
            require_real(self._optimiser.__name__, arrays)
        if not self._wait(grid, server_round, "train", self.fraction_train, self.min_train_nodes):
            return []
        if self.before_round is not None:
            self.before_round(server_round)
        messages = super().configure_train(server_round, arrays, config, grid)
        addressed = self._address(messages, grid, server_round, _TRAIN)
        # In asynchronous rounds others are at work already, and `require_buffer` has compared.
        needed = self.needed() if self.run.waiting is None else 0
        reason = shortfall(type(self).__name__, needed, len(addressed), self.if_too_few)
        if reason is not None:
            if not self.run.begun:
                raise InputError(reason)
            # Sites that drop out later must not end the run.
            self.inbox.fail(server_round, "train", ALL_SITES, reason)
            return []
        self._prepare_companions(arrays)
        companions = RecordDict({**self.current_companions})
        for message in addressed:
            message.content.update(own_content(companions))
        self._tell_method(addressed, own=False)
        if self._due(server_round):
            asked = validations.ask(addressed, self.configrecord_key, self.has_own_models)
            self.inbox.validation = Validation(asked)
        return addressed

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Wait for the sites, then address this round's evaluation messages to a sample of them."""
        minimum = self.min_evaluate_nodes
        if not self._wait(grid, server_round, "val", self.fraction_evaluate, minimum):
            return []
        messages = super().configure_evaluate(server_round, arrays, config, grid)
        addressed = self._address(messages, grid, server_round, _EVALUATE)
        if self.has_own_models:
            self._tell_method(addressed, own=True)
        return addressed

    def exchange(
        self, grid: Grid, messages: list[Message], server_round: int, phase: str
    ) -> Iterable[Message]:
        """Send the messages of a phase and collect the replies; sites without one are recorded.

        Override it to send a second message that depends on who has replied to the first.

        Parameters
        ----------
        phase : str
            ``train``, ``val``, ``test`` or ``own-test``.

        Returns
        -------
        iterable of Message
            The replies as they come if more than 100 are awaited and the rule is a plain mean;
            else a list.
        """
        if phase == "train" and self.compression != NONE:
            require_one_each(messages)
        secure = self.run.secure
        sent = self.run.sent_arrays
        if secure is not None and phase != "train":
            return secure.evaluate(messages, server_round, phase, self.run.timeout)
        if secure is not None and sent is not None:
            trained = self._trained(sent)
            return secure.train(
                messages,
                self._trainers(grid),
                sent,
                trained,
                server_round,
                self.run.timeout,
                self.quorum,
                self.grace,
            )
        replies = self.inbox.collect(
            grid, messages, self.run.timeout, server_round, phase, self.quorum, self.grace
        )
        if phase != "train":
            return list(replies)
        if len(messages) > STREAM_ABOVE and self.is_plain_mean:
            return replies
        self.run.spill = Spill(
            self.memory_gigabytes, None if self.folder is None else self.folder.path
        )
        if self.compression != NONE:
            # They are small, and become large when they are unpacked.
            return list(replies)
        return [self.run.spill.message(reply) for reply in replies]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Screen the replies, then combine those that passed.

        Parameters
        ----------
        replies : iterable of Message
            Never changed. If more than 100 come from an iterator and the rule is a plain mean,
            each is added as it comes and need not stay in memory.

        Returns
        -------
        tuple of (ArrayRecord or None, MetricRecord or None)
            (None, None) if fewer than `min_replies` passed, or fewer than the rule needs.
        """
        self.run.server_round = server_round
        try:
            combined = self._combined(server_round, replies)
            # Their arrays need not stay in memory during a server optimiser's step.
            del replies
            if combined.model is None:
                return None, None
            metrics = average_metrics(
                combined.replies,
                self.weighted_by_key,
                self.max_weight_share,
                self.train_metrics_aggr_fn,
                partial(self.inbox.note, server_round, "train"),
            )
            if metrics is not None and self.compression != NONE:
                metrics[BYTES_SAVED] = self.inbox.saved
            self.run.begun = True
            moved = self._moved(server_round, combined)
            return (None, None) if moved is None else (moved, metrics)
        finally:
            self.run.faulty = 0

    def combine(self, updates: Updates, weights: Sequence[float]) -> ArrayRecord:
        """Return the new model: the rule of the strategy, and all that a new strategy must define.

        Parameters
        ----------
        updates : Updates
            What the sites sent, in the order of their names.
        weights : sequence of K floats
            Weights of the replies by `weigh`, none above `max_weight_share` of their sum.
        """
        total = sum(weights)
        return updates.weighted_sum([weight / total for weight in weights])

    def weigh(self, site: str, reply: Message) -> float:
        """Return the weight of a reply: its number of examples.

        Raises
        ------
        ValueError
            If the strategy cannot use the reply; it is left out, and the text is the reason.
        """
        return float(metrics_of(reply)[self.weighted_by_key])  # type: ignore[arg-type]

    def combine_companion(
        self, name: str, updates: Updates, weights: Sequence[float]
    ) -> ArrayRecord:
        """Return the next companion of a name: here by `combine`, if it can.

        Parameters
        ----------
        name : str
        updates : Updates
            What the sites sent back; changes count from the record that was sent to them.
        weights : sequence of K floats
            As in `combine`.
        """
        if self.combines_companions:
            return self.combine(updates, weights)
        total = sum(weights)
        return updates.weighted_sum([weight / total for weight in weights])

    def reply_layout(self, sent: ArrayRecord) -> ArrayRecord:
        """Return a record with the keys, shapes and dtypes of a reply's arrays: here the model.

        Layers that sites keep and do not send are left out. Override it with `decode` if sites
        send the model in another form, such as in 8 bits.
        """
        if not self._unsent:
            return sent
        return ArrayRecord({key: sent[key] for key in sent if key not in self.kept})

    def decode(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return the model that a reply's arrays stand for: here the arrays themselves.

        Layers that sites keep and do not send are those of the global model.

        Raises
        ------
        ValueError
            If they stand for no model; the reply is left out, and the text is the reason.
        """
        sent = self.run.sent_arrays
        if not self._unsent or sent is None:
            return arrays
        return record_of({key: arrays.get(key) or sent[key] for key in sent})

    def choose(
        self, nodes: Collection[int], count: int, server_round: int, training: bool
    ) -> list[int]:
        """Return the connected nodes that take part: here `count` of them, drawn by the seed.

        A method may choose those that train.
        """
        if training and self.method is not None and nodes:
            by_name = draw(nodes, self.site_names, len(nodes), (self.seed,))
            chosen = self.method.choose(by_name, server_round)
            if chosen is not None:
                return list(chosen)
        phase = _TRAIN if training else _EVALUATE
        return draw(nodes, self.site_names, count, (self.seed, server_round, phase))

    def stop_reason(self) -> str | None:
        """Return why the run must end before a further round; None if it goes on."""
        return None

    def needed(self) -> int:
        """Return the fewest usable replies of a round with which the rule keeps its promise."""
        return 1

    def export_state(self) -> dict[str, ArrayRecord]:
        """Return the state between rounds, apart from the model, for the checkpoint.

        Here the state of Flower's server optimisers, the companions and the method's state. A
        strategy with more state adds it.
        """
        companions = {
            f"{checkpoints.COMPANION}{name}": record
            for name, record in self.current_companions.items()
        }
        state = export_state(vars(self)) | companions | self.run.method.export()
        return state | self.run.selection.export_state()

    def import_state(self, state: dict[str, ArrayRecord]) -> None:
        """Take up what `export_state` returned when the checkpoint was written."""
        rest = self.run.selection.import_state(state)
        self.run.companions = {}
        for name, first in self.companions.items():
            record = rest.pop(f"{checkpoints.COMPANION}{name}", None)
            if record is not None:
                checkpoints.require_layout(name, record, first)
                self.run.companions[name] = record
        self._import_method(rest)
        vars(self).update(import_state(vars(self), rest, type(self).__name__))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Screen the replies, average their metrics as Flower does, and add the pooled metrics."""
        phase = self.run.evaluated
        if self.run.secure is not None and replies == []:
            # Why is recorded; whether all sites failed alike is asked of the inbox.
            return None
        admitted = self.inbox.admit(server_round, phase, replies, self.weighted_by_key, None)
        accepted = self.inbox.in_order(admitted)
        self.inbox.record(server_round, phase, accepted)
        # A hospital with too few patients reports their number and no other metric.
        with_metrics = [
            reply
            for reply in accepted
            if reply.metrics[self.weighted_by_key] and len(reply.metrics) > 1
        ]
        if not with_metrics:
            return None
        means = means_of_finite(
            with_metrics,
            self.weighted_by_key,
            self.max_weight_share,
            self.evaluate_metrics_aggr_fn,
            partial(self.inbox.note, server_round, phase),
        )
        records = [dict(reply.metrics) for reply in with_metrics]
        self.run.rows_of_class = class_counts(records)
        if phase == "test":
            # The reply that stands for a secure sum is of all sites as one.
            sites = [
                ALL_SITES if reply.node_id == SUM_NODE else reply.site for reply in with_metrics
            ]
            self.run.tested = dict(zip(sites, records, strict=True))
        pooled = pool(records)
        trimmed = with_shared_metrics(
            [reply.message for reply in with_metrics],
            self.weighted_by_key,
            self.max_weight_share,
            pooled=pooled | means,
        )
        metrics = super().aggregate_evaluate(server_round, trimmed)
        if metrics is None:
            return None
        if pooled:
            for name in filter(is_pooled_only, list(metrics)):
                metrics.pop(name)
        metrics.update(means | pooled)
        return metrics

    @property
    def is_plain_mean(self) -> bool:
        """Whether replies may be added up one by one as they come."""
        if self.below is not None and not issubclass(self.below, OPTIMISERS):
            return False
        # A subclass may look at the replies before it passes them on.
        names = ("combine", "aggregate_train", "exchange", "decode")
        unchanged = all(getattr(type(self), name) is getattr(FedAvg, name) for name in names)
        limited = self.max_weight_share is not None or self.max_update_norm is not None
        return unchanged and not limited and not self.current_companions

    @property
    def has_own_models(self) -> bool:
        """Whether each site has a model of its own, by the method or by layers that it keeps."""
        return bool(self.kept) or (self.method is not None and self.method.personal)

    @property
    def _unsent(self) -> bool:
        """Whether sites keep layers that they do not send."""
        return bool(self.kept) and not self.keep_sent

    @property
    def _optimiser(self) -> type[Any] | None:
        """Flower's server optimiser that steps the model; None if there is none."""
        below = self.below
        return below if below is not None and issubclass(below, OPTIMISERS) else None

    @property
    def current_companions(self) -> dict[str, ArrayRecord]:
        """The companions of the next round, by name."""
        return self.companions | self.run.companions

    @property
    def history(self) -> History:
        """Every number of every site and every failure, round by round."""
        return self.inbox.history

    @property
    def site_names(self) -> dict[int, str]:
        """Site name by node id, as far as the sites have reported it."""
        return self.inbox.site_names

    @site_names.setter
    def site_names(self, names: dict[int, str]) -> None:
        self.inbox.site_names = names

    @property
    def listeners(self) -> Listeners:
        """Those who hear how the run goes."""
        return self.inbox.listeners

    @listeners.setter
    def listeners(self, listeners: Listeners) -> None:
        self.inbox.listeners = listeners

    def site_name(self, node_id: int) -> str:
        """Return a node's site name, or ``node <id>`` if it has reported none."""
        return self.inbox.name(node_id)

    def find_checkpoint(self, initial_arrays: ArrayRecord) -> Checkpoint | None:
        """Return the checkpoint that a run would go on from; None if it starts afresh.

        Raises
        ------
        InputError
            If it is damaged, or a run that goes on from it would not be the run that was
            interrupted.
        """
        if self.folder is None or not self.resume:
            return None
        checkpoint = self.folder.load()
        if checkpoint is not None:
            checkpoints.require_resumable(
                self, checkpoint, initial_arrays, self.buffers, self.folder
            )
        return checkpoint

    def _combined(self, server_round: int, replies: Iterable[Message]) -> Combined:
        """Screen, combine and record replies; a model that is not finite counts as none."""
        first, rest = first_and_rest(replies)
        if not first and self.needed() > 0:
            return Combined(None, [], tried=False)
        sent = self.run.sent_arrays
        layout = self.reply_layout(sent) if sent is not None else first_arrays(first)
        waiting = drain(first, rest) if rest is not None else first
        admitted = self.inbox.admit(
            server_round,
            "train",
            waiting,
            self.weighted_by_key,
            layout,
            self.current_companions,
            self._unpacker(layout),
        )
        usable = weighed(admitted, self._weigh, self.decode, self._reject)
        if self.run.waiting is not None:
            usable = self.run.waiting.rebased(usable)
        if rest is not None and layout is not None and self.is_plain_mean:
            combined = self._combined_one_by_one(usable, layout if sent is None else sent)
        else:
            combined = self._combined_together(usable, layout)
        flaw = flaw_of(combined.model) if combined.tried else None
        if flaw is not None:
            self.inbox.fail(server_round, "train", ALL_SITES, flaw)
            return replace(combined, model=None)
        return combined

    def _moved(self, server_round: int, combined: Combined) -> ArrayRecord | None:
        """Let the method and the server optimiser move the model that the rule made."""
        model = combined.model
        sent = self.run.sent_arrays
        companions = dict(combined.companions)
        state = self.run.method
        weights = {reply.site: reply.weight for reply in combined.replies}
        records: Mapping[str, ArrayRecord] = {}
        if self.method is not None and model is not None and sent is not None:
            trained = self._trained(sent)
            before = self.current_companions
            most = self.max_weight_share
            result = moved(
                self.method, state, sent, model, trained, before, companions, weights, most
            )
            model = result.model
            companions |= result.companions
            records = result.state
            flaws = map(flaw_of, (model, *companions.values(), *records.values()))
            flaw = next(filter(None, flaws), None)
            if flaw is not None:
                self.inbox.fail(server_round, "train", ALL_SITES, flaw)
                return None
        stepped_model = None if model is None else self._step(server_round, model)
        if stepped_model is not None:
            self.run.companions |= companions
            if self._keeps_state:
                self.run.method = state.after(records, weights, combined.lengths)
        return stepped_model

    def _weigh(self, site: str, reply: Message) -> float:
        """Return a reply's weight: that of the site's first reply if a method counts on it."""
        weight = self.weigh(site, reply)
        if self.method is None or not self.method.needs_kept:
            return weight
        return self.run.method.weights.get(site, weight)

    @property
    def _keeps_state(self) -> bool:
        """Whether sites keep something from one round to the next."""
        return self.method is not None or bool(self.kept) or self.compression != NONE

    def _tell_method(self, messages: Iterable[Message], own: bool) -> None:
        """Add to each message the method, and how many of the site's replies were taken."""
        if not self._keeps_state:
            return
        for message in messages:
            site = self.site_name(message.metadata.dst_node_id)
            taken = self.run.method.taken.get(site, 0)
            config = records_of(message.content, ConfigRecord)[self.configrecord_key]
            config.update(config_of(self.method, self.keep, self.keep_sent, taken, own))

    def _trained(self, model: ArrayRecord) -> list[str]:
        """Return the keys of a model that sites train together."""
        return [key for key in stepped(model, self.buffers) if key not in self.kept]

    def _prepare_companions(self, model: ArrayRecord) -> None:
        """Add the method's first companions, unless the run has later ones."""
        if self.method is None:
            return
        first = companions_of(self.method, model, self._trained(model))
        for name, record in first.items():
            if name in self.run.companions:
                checkpoints.require_layout(name, self.run.companions[name], record)
            else:
                self.run.companions[name] = record

    def _import_method(self, state: dict[str, ArrayRecord]) -> None:
        """Take what a method has left out of a checkpoint's state."""
        self.run.method = MethodState.pop_from(state)
        beginning = f"{checkpoints.COMPANION}{METHOD_RECORD}"
        for name in [name for name in state if name.startswith(beginning)]:
            self.run.companions[name.removeprefix(checkpoints.COMPANION)] = state.pop(name)

    def _ask_for_code(self, arrays: ArrayRecord, config: ConfigRecord) -> None:
        """Name the code of the replies in the config of a round's messages, or none.

        Raises
        ------
        InputError
            If the code cannot be used with this strategy or model.
        """
        for key in (COMPRESSION, TOP_K_SHARE, UNCODED):
            config.pop(key, None)
        packing = self._packing(arrays)
        if packing is None:
            return
        kind = type(self)
        for name in ("reply_layout", "decode"):
            if getattr(kind, name) is not getattr(FedAvg, name):
                raise InputError(
                    f'compression must be "none" with {kind.__name__}, whose sites send the model '
                    f'in a form of their own ({name}), got "{self.compression}"'
                )
        for record in (arrays, *self.current_companions.values()):
            packing.forms(record)
        config.update(packing.config)

    def _packing(self, model: ArrayRecord | None) -> Packing | None:
        """Return the code of the replies to a model; None if they are not coded."""
        uncoded = set() if model is None else model.keys() - {*stepped(model, self.buffers)}
        return Packing.named(self.compression, self.top_k_share, uncoded)

    def _unpacker(self, layout: ArrayRecord | None) -> Unpacker | None:
        """Return what unpacks the replies of this round; None if they are not coded."""
        packing = self._packing(self.run.sent_arrays)
        if packing is None:
            return None
        if self.run.sent_arrays is None or layout is None:
            raise InputError(
                f'compression="{self.compression}" needs the model that was sent: call '
                "configure_train before aggregate_train"
            )
        return Unpacker(packing, self.arrayrecord_key, layout, self.current_companions)

    def _combined_one_by_one(
        self, replies: Iterable[AcceptedReply], layout: ArrayRecord
    ) -> Combined:
        mean, added = mean_one_by_one(replies, layout, self._reject)
        accepted = self.inbox.in_order(added)
        self.inbox.record(self.run.server_round, "train", accepted)
        if not self._suffice(len(accepted)):
            return Combined(None, accepted, tried=False)
        return Combined(mean.result(), accepted)

    def _combined_together(
        self, replies: Iterable[AcceptedReply], layout: ArrayRecord | None
    ) -> Combined:
        accepted = self.inbox.in_order(self._unpacked_in_memory(replies))
        self.run.faulty = self.inbox.malformed
        if self.run.secure is not None:
            self.run.faulty += self.run.secure.spoilt
        sent = self.run.sent_arrays
        if sent is not None:
            layout = sent
        elif accepted:
            layout = accepted[0].arrays
        combined = combine(
            accepted,
            layout,
            sent,
            self.current_companions,
            self._rule,
            self.combine_companion,
            Limits(self.max_weight_share, self.max_update_norm, self.run.method.lengths),
            self._suffice,
            self._reject,
        )
        for reply in combined.replies:
            reply.drop_arrays()
        self.inbox.record(self.run.server_round, "train", combined.replies)
        return combined

    def _unpacked_in_memory(self, replies: Iterable[AcceptedReply]) -> Iterator[AcceptedReply]:
        """Yield replies; of those that were unpacked, what is beyond the bound is in files."""
        for reply in replies:
            if self.compression != NONE and self.run.spill is not None:
                kept = self.run.spill.records({"": reply.arrays, **reply.companions})
                reply.arrays = kept.pop("")
                reply.message = with_arrays(reply.message, reply.arrays)
                reply.companions = kept
            yield reply

    def _rule(
        self, replies: list[AcceptedReply], updates: Updates, weights: list[float]
    ) -> ArrayRecord | None:
        """Apply our rule, or the rule of a strategy that is neither ours nor Flower's."""
        other = self.below
        if other is None or issubclass(other, OPTIMISERS):
            combined = self.combine(updates, weights)
            updates.check()
            return combined
        updates.check()
        models = [with_arrays(reply.message, reply.arrays) for reply in replies]
        messages = with_shared_metrics(models, self.weighted_by_key, weights=weights)
        model, _ = other.aggregate_train(self, self.run.server_round, messages)
        if model is None:
            return None
        if shapes(model) != shapes(updates.layout):
            raise InputError(
                f"{other.__name__}.aggregate_train must return a model with the keys and shapes "
                f"of the replies, {shapes(updates.layout)}, got {shapes(model)}"
            )
        return keep_dtypes(model, updates.layout)

    def _step(self, server_round: int, arrays: ArrayRecord) -> ArrayRecord | None:
        """Move the global model by the step of Flower's server optimiser, if there is one."""
        optimiser = self._optimiser
        if optimiser is None:
            return arrays
        sent = self.run.sent_arrays
        if sent is None:
            sent = known_model(vars(self))
        if sent is None or shapes(sent) != shapes(arrays):
            raise InputError(
                f"{type(self).__name__} moves the global model, which it does not know: "
                "call configure_train before aggregate_train, or set current_arrays to a model "
                "with the keys and shapes of the replies"
            )
        moved, changed = step(
            optimiser,
            vars(self),
            server_round,
            arrays,
            sent,
            self.arrayrecord_key,
            self.weighted_by_key,
            self.buffers,
        )
        if moved is None:
            reason = f"the step of {optimiser.__name__} leads to NaN or infinite values"
            self.inbox.fail(server_round, "train", ALL_SITES, reason)
        vars(self).update(changed)
        return moved

    def _suffice(self, count: int) -> bool:
        """Return whether `count` usable replies are enough; record it if they are not."""
        # `needed() == 0` means that the strategy makes a model even without replies (DPFedAvg
        # releases noise).
        needed = max(self.min_replies, self.needed()) if self.needed() else 0
        if count >= needed:
            return True
        aside = self.if_too_few if count else ""
        reason = f"{count} usable replies, {needed} needed{aside}: the model stays as it was"
        self.inbox.fail(self.run.server_round, "train", ALL_SITES, reason)
        return False

    def _reject(self, site: str, reason: str, broken: bool) -> None:
        """Record that a training reply of this round does not count."""
        self.inbox.fail(self.run.server_round, "train", site, reason)
        self.run.faulty += broken

    def _wait(
        self, grid: Grid, server_round: int, phase: str, fraction: float, minimum: int
    ) -> bool:
        """Wait for the sites of a phase; record it if too few connect within the timeout."""
        needed = max(minimum, self.min_available_nodes) if fraction > 0 else 0
        starting = math.isfinite(self.run.timeout) and not self.run.begun
        if phase == "train" and starting and not getattr(grid, "complete", False):
            # Hospitals connect one after the other: a rule that needs many must wait for them.
            needed = max(needed, self.needed(), self.buffer)
        count = wait_for_sites(grid, needed, self.run.timeout)
        if count >= needed:
            return True
        reason = f"{count} sites are connected, {needed} needed"
        self.inbox.fail(server_round, phase, ALL_SITES, reason)
        return False

    def _stop(self, grid: Grid, stop: Stop) -> None:
        """Record and log why no further round is done."""
        self.history.stopped = stop
        log.warning("stopped after round %d: %s", stop.round, stop.reason)
        if stop.round:
            self._save(grid, stop.round)

    def _halted(self, grid: Grid, server_round: int, phase: str, asked: int) -> bool:
        """Return whether all sites failed alike in a phase, as they would in further rounds."""
        error = self.inbox.common_error(asked)
        everybody = len(self._trainers(grid))
        if error is None or asked < min(everybody, _MANY):
            return False
        who = f"all {asked} sites failed alike" if asked > 1 else "the only site failed"
        reason = f"{who}, so the run ends: {error}"
        self.inbox.fail(server_round, phase, ALL_SITES, reason)
        self.run.halted = f"round {server_round}, {phase}: {reason}"
        if self.folder is not None:
            # No checkpoint: a run that goes on repeats the round.
            self.folder.write_metrics(self.history)
            self.folder.write_model(self.result.arrays)
        return True

    def _save(self, grid: Grid, server_round: int) -> None:
        """Write checkpoint, metrics and model after a round, if there is a run folder."""
        if self.folder is None:
            return
        self.folder.save(
            Checkpoint(
                server_round,
                self.seed,
                self.result.arrays,
                self.history,
                checkpoints.metrics_as_dicts(self.result),
                self.site_names,
                # Only a grid that runs the clients in this process can save their states.
                grid.export_states() if hasattr(grid, "export_states") else {},
                self.export_state(),
                self.run.strategy,
            )
        )
        self.folder.write_model(self.result.arrays)

    def _restore(self, grid: Grid, initial_arrays: ArrayRecord) -> int:
        """Take up the checkpoint and return its round; 0 if the run starts afresh."""
        folder = self.folder
        if folder is None:
            return 0
        checkpoint = self.find_checkpoint(initial_arrays)
        if checkpoint is None:
            folder.require_no_checkpoint()
            folder.make(initial_arrays)
            return 0
        self.seed = checkpoint.seed
        self.inbox.history = checkpoint.history
        self.site_names = checkpoint.site_names | self.site_names
        self.result.arrays = checkpoint.arrays
        with checkpoints.read_from(folder):
            self.import_state(checkpoint.strategy_state)
            vars(self.result).update(checkpoints.metrics_as_records(checkpoint, self.result))
        checkpoints.restore_clients(grid, checkpoint, folder)
        # The run may have died after it wrote the checkpoint and before it wrote the model.
        folder.write_model(checkpoint.arrays)
        log.info("going on after round %d of %s", checkpoint.server_round, folder.path)
        return checkpoint.server_round

    def _add_metrics(
        self, server_round: int, name: str, metrics: MetricRecord | None, phase: str
    ) -> None:
        """Put the metrics of a phase, if there are any, into the result and the history."""
        if metrics is not None:
            getattr(self.result, name)[server_round] = metrics
            self.history.add(server_round, phase, ALL_SITES, metrics)

    def _set_clock(self, grid: Grid) -> None:
        """Set the virtual clock to what it showed after the last round, or to 0."""
        if hasattr(grid, "set_clock"):
            rows = reversed(self.history.rows)
            grid.set_clock(next((row[4] for row in rows if row[3] == VIRTUAL_SECONDS), 0.0))

    def _trainers(self, grid: Grid) -> set[int]:
        """Return the connected nodes that may train."""
        connected = self._connected(grid)
        return connected if self.only is None else connected & self.only

    def _connected(self, grid: Grid) -> set[int]:
        """Return the nodes that are connected and may be sent something."""
        return set(grid.get_node_ids()).difference(self.excluded)

    def _address(
        self, messages: Iterable[Message], grid: Grid, server_round: int, phase: int
    ) -> list[Message]:
        """Address Flower's messages to the sites of `choose`, each with records of its own."""
        messages = list(messages)
        self.inbox.connected = set(grid.get_node_ids())
        nodes = self._trainers(grid)
        count = len(messages)
        if self.run.waiting is not None:
            nodes = self.run.waiting.free(nodes, phase == _TRAIN)
            if phase == _TRAIN:
                count = max(0, count - self.run.waiting.training)
        drawn = self.choose(nodes, count, server_round, phase == _TRAIN)
        for message, node_id in zip(messages, drawn, strict=False):
            message.metadata.dst_node_id = node_id
            # Flower gives all messages one content.
            message.content = own_content(message.content)
        return messages[: len(drawn)]
