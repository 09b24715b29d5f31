"""The base class of all clients: one hospital's side of a round."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedmed_flower.clients.book import Book, book_path, open_book
from fedmed_flower.clients.pooled import together
from fedmed_flower.clients.run_cache import Key, RunCache
from fedmed_flower.data.outlying import Outlying
from fedmed_flower.data.pictures import Picture
from fedmed_flower.data.schema import Schema, empty_columns
from fedmed_flower.data.site import (
    SPLITS,
    LineNumber,
    Row,
    Site,
    SiteData,
    all_rows,
    fewest_patients,
    in_columns,
    min_cell_count,
    patient_text,
    patients_of,
    require_patients,
    with_patients,
)
from fedmed_flower.data.splits import splitting_by
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.methods.base import PLAIN, Method
from fedmed_flower.metrics.coarse import coarsened
from fedmed_flower.metrics.plain import plain_metrics
from fedmed_flower.models.device import (
    arranged,
    half_precision,
    make_optimizer,
    torch_device,
    torch_environment,
)
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.privacy.patient import budget_of, ledger_path
from fedmed_flower.settings.disclosure import DisclosureSettings
from fedmed_flower.settings.methods import MethodSettings
from fedmed_flower.settings.model import ModelSettings
from fedmed_flower.settings.node import NodeSettings
from fedmed_flower.settings.privacy import PrivacySettings
from fedmed_flower.settings.registry import Sections
from fedmed_flower.settings.secure import SecureSettings
from fedmed_flower.settings.text import setting_error
from fedmed_flower.settings.training import Settings
from fedmed_flower.wire import AGREED, FROZEN, POOL_SITES, RUN_KEY

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedmed_flower.models.trainable import Travelling

log = logging.getLogger("flwr.fedmed")

# Maps (client, message) to the content of the reply.
Query = Callable[[Any, Message], RecordDict]
# Rows of no patient on which the names of figures are learnt: a few of each class.
_MADE_UP = 8
# Letters of a run's name, which the ledger keeps for good.
_MOST_KEY = 200


class MedicalClient(ABC):
    """One hospital in a run. Subclass a client for a kind of data, such as `ClassificationClient`.

    An instance lives for one message. Values that later messages need go into ``context.state``.

    Hooks
    -----
    build_model
        The network. It must be the same at every site and at the server.
    load_data
        This site's rows.
    check
        Raise `InputError` if the rows cannot be used.
    warn
        Name in the log what is odd about rows that can be used.
    screen
        Reject single rows that cannot be used, and name them in the log.
    contribute, columns_to_sum, agree, outlying
        What a site sends before the first round, of which columns, what the server makes of all
        contributions, and which of them stand out.
    prepare
        Convert rows to what the hooks below take. The result stays in memory during a run.
    batch_of, loss_of
        Some rows as a batch, and the batch's loss. Plain and private training need nothing else.
    fit
        Train on the training rows; returns metrics.
    predict
        What the model says of some rows, without knowing their truth.
    measure
        Evaluate on the rows of one split; returns metrics.
    figures, require_named
        The names of what `measure` returns, known before a patient is measured; refuse if
        they cannot be known.
    describe
        Numbers about the rows, to show how a simulation split them.
    draw
        Pictures of some rows with the model's answer.
    made_up
        Rows of no patient. Model and loss are tried on them before any patient's row is read.
    check_private
        Refuse a model or loss that cannot be trained privately.
    seed_transforms
        Seed the random transforms of a batch.
    measure_privately, require_measurable
        Evaluate by counts with noise; refuse if the client cannot.
    label_of
        A row's class. The log names classes that a split lacks.

    Parameters
    ----------
    context : flwr.app.Context
        As Flower passes it to a ClientApp.

    Attributes
    ----------
    settings : Settings
        From the run config.
    site : Site
    privacy : PrivacySettings
        From the run config.
    models : ModelSettings
        From the run config: the network, and which part of it is trained and travels.
    method : Method
        What a message asks for beside plain training. `fit` calls its `loss`, `before_step` and
        `after_step`.
    method_called : bool
        Whether `fit` has called them. A subclass with a training loop of its own sets it; else a
        message that asks for a method is refused. SCAFFOLD counts on ``learning-rate``.
    progress : float
        Share of the run's rounds that were done before this one; in [0, 1).
    agreed : str
        What the server made of all contributions; empty before the first round.
    split : str
        The split on which the message asks to evaluate; empty if it asks for something else.
    draw_key : str
        In a secure sum at a real hospital, what makes the seed of training its own secret.
    preparing : bool
        Whether the message prepares rows after it has screened them.
    pooled : bool
        Whether the message is about all sites' rows together.
    touched : bool
        Whether the site's rows were used since the message came.
    noise_share : Share of clients/shares or None
        This hospital's share of the noise of a secure sum, if the message asks for one.
    queries : dict
        The function that answers each Flower query, by the query's name. It maps (client, message)
        to the content of the reply, and may be given as ``"module:function"``. A subclass adds its
        own.
    stand_ins : dict
        By a key of a message's config: the function, as ``"module:function"``, that maps this
        client to the one that answers such a message.
    sections : tuple of Section classes
        Groups of settings that this class reads beside those of its bases. A key of the run config
        that is in no section is refused.
    fewest_steps : int
        Batches that a round has at least where the run config does not say; 0 for none.
    node_keys : tuple of str
        Keys that the app adds to the hospital's node config.
    """

    queries: ClassVar[Mapping[str, Query | str]] = {
        "describe": "fedmed_flower.clients.queries:describe",
        "pictures": "fedmed_flower.clients.queries:pictures",
        "contribution": "fedmed_flower.clients.queries:contribution",
        "personal": "fedmed_flower.clients.personal:personal",
        "statistics": "fedmed_flower.statistics.client:statistics",
        "tallies": "fedmed_flower.statistics.client:tallies",
        "hello": "fedmed_flower.clients.secure:hello",
        "alive": "fedmed_flower.clients.secure:alive",
        "unmask": "fedmed_flower.clients.secure:unmask",
        "count": "fedmed_flower.clients.secure:count",
        "figures": "fedmed_flower.clients.secure:figures",
    }
    stand_ins: ClassVar[Mapping[str, str]] = {}
    sections: ClassVar[Sections] = (
        Settings,
        PrivacySettings,
        ModelSettings,
        DisclosureSettings,
        SecureSettings,
        MethodSettings,
    )
    fewest_steps: int = 0
    node_keys: ClassVar[Collection[str]] = ()
    # Part of the cache's keys: distinguishes clients of one class name that prepare differently.
    prepared_for: ClassVar[str] = ""
    run_cache: ClassVar[RunCache] = RunCache()

    def __init__(self, context: Context) -> None:
        self.context = context
        self.settings = Settings.from_run_config(context.run_config)
        self.privacy = PrivacySettings.from_run_config(context.run_config)
        self.models = ModelSettings.of_site(context)
        self.method: Method = PLAIN
        self.method_called = False
        self.progress = 0.0
        self.agreed = ""
        self.split = ""
        self.draw_key = ""
        self.preparing = False
        self.pooled = False
        self.touched = False
        self.noise_share: object | None = None
        # Indices of the training rows that made this message's update.
        self.entered: set[int] = set()

    @cached_property
    def node(self) -> NodeSettings:
        """The settings of the hospital's node config."""
        return NodeSettings.of(self.context.node_config, self.node_keys)

    @cached_property
    def site(self) -> Site:
        """The hospital that this client stands for."""
        return Site.from_context(self.context)

    @abstractmethod
    def load_data(self, site: Site) -> SiteData:
        """Return the rows of a site; a site without training rows is only tested."""

    def build_model(self) -> nn.Module:
        """Return the network with fresh weights."""
        raise self._without("build_model")

    def check(self, data: SiteData) -> None:  # noqa: B027
        """Raise `InputError` if the rows cannot be used; it names the row and the remedy."""

    def warn(self, data: SiteData) -> None:  # noqa: B027
        """Log what is odd about the rows of a site, if anything; a hook of subclasses."""

    def screen(self, rows: Sequence[Row], split: str) -> Sequence[Row]:
        """Return the rows that can be used; a subclass logs which cannot, and why.

        If the client is `sealed`, a row must not decide whether another one can be used.
        """
        return rows

    def label_of(self, row: Row) -> Hashable | None:
        """Return the class of a row; None if rows have no class."""
        return None

    @property
    def must_agree(self) -> bool:
        """Whether the model needs all sites' contributions before the first round."""
        return False

    def contribute(self) -> dict[str, Any]:
        """Return what this site sends before the first round: numbers, texts and lists of them."""
        return {}

    def columns_to_sum(self) -> Sequence[str]:
        """Return the columns of whose moments alone a contribution consists, for secure sums.

        Raises
        ------
        InputError
            If contributions hold anything else. The default knows nothing of them.
        """
        raise setting_error(
            f'secure="sum" needs to know of which columns {type(self).__name__} contributes '
            "moments before the first round: define columns_to_sum",
            "secure",
        )

    def agree(self, contributions: Mapping[str, Mapping[str, Any]]) -> str:
        """Return the text that the server sends to all sites, with each message, as `agreed`.

        Parameters
        ----------
        contributions : dict
            What `contribute` returned, by the name of the site.
        """
        return ""

    def outlying(
        self, contributions: Mapping[str, Mapping[str, Any]], rows: Mapping[str, int]
    ) -> list[Outlying]:
        """Return the sites whose contribution stands out, which log and report then name.

        Parameters
        ----------
        contributions : dict
            As in `agree`.
        rows : dict of str to int
            Training rows by site.
        """
        return []

    def prepare(self, rows: Sequence[Row], train: bool) -> Any:
        """Return the rows as `batch_of` takes them if `train` is True, else as `measure` does."""
        raise self._without("prepare")

    def fit(self, model: nn.Module, prepared: Any, seed: int) -> dict[str, Any]:
        """Train `model` in place for a round and return metrics such as ``loss``.

        The default uses `batch_of`, and `loss_of`, which must return the mean over a batch.
        """
        from fedmed_flower.clients.training import Steps, random_batches, train_epochs

        settings = self.settings
        self.method_called = True
        self.seed_transforms(prepared, seed)

        def batch_of(indices: list[int]) -> dict[str, Tensor]:
            self.entered.update(indices)
            return self.batch_of(prepared, indices)

        batches: Any = random_batches(batch_of, len(prepared), settings.batch_size, seed)
        epochs = 1 if settings.local_steps else settings.local_epochs
        fewest = self.fewest_steps if settings.fewest_steps < 0 else settings.fewest_steps
        steps = settings.local_steps or (fewest if len(batches) * epochs < fewest else 0)
        if steps:
            batches = Steps(batches, steps)
            epochs = 1
        mean = train_epochs(
            model,
            batches,
            self.loss_of,
            make_optimizer(settings, model, self.progress),
            epochs,
            half_precision(settings),
            self.method,
        )
        return {"loss": mean}

    def predict(self, model: nn.Module, prepared: Any) -> Any:
        """Return what `model` says of rows, which need no label; `measure` judges the same."""
        raise self._without("predict")

    def measure(self, model: nn.Module, prepared: Any) -> dict[str, Any]:
        """Return the metrics of `model`, with ``num-examples``."""
        raise self._without("measure")

    def require_named(self) -> None:
        """Raise `InputError` if `figures` is not possible, whatever the rows are.

        The server asks, which knows nothing of a hospital's own settings.
        """
        self.made_up(_MADE_UP)
        if self.privacy.on and self.privacy.private_metrics:
            self.require_measurable()

    def figures(self, model: nn.Module, split: str) -> dict[str, Any]:
        """Return what evaluation returns, here of rows of no patient: only its names count.

        A secure sum must know the names and sizes of all figures before a patient is measured, and
        these must tell nothing of patients.

        Parameters
        ----------
        model : Module
        split : {"val", "test"}
            Which rows would be evaluated.

        Raises
        ------
        InputError
            If the client does not define `made_up`.
        """
        self.require_named()
        rows = self.made_up(_MADE_UP)
        prepared = self.prepare(rows, train=False)
        if not self.noises_metrics:
            return self.measure(model, prepared)
        return self.measure_privately(model, prepared, patients_of(rows), 0.0)

    def describe(self, data: SiteData) -> dict[str, Any]:
        """Return further numbers about the rows; only a simulation asks for them."""
        return {}

    def batch_of(self, prepared: Any, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return some training rows as a batch for `loss_of`, on the device.

        Apply random augmentation, if any, to each row independently.
        """
        raise self._without("batch_of and loss_of")

    def loss_of(self, model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch: the mean over its records, one number."""
        raise self._without("batch_of and loss_of")

    def draw(self, model: nn.Module, prepared: Any, count: int) -> list[Picture]:
        """Return pictures of `count` prepared rows and of the worst one; the default draws none.

        A title must not name a patient.
        """
        return []

    def made_up(self, count: int) -> list[Row]:
        """Return rows in the form of `load_data`, made only of what the client declares.

        Each must differ from the others; otherwise a loss that mixes records goes unnoticed.
        """
        raise InputError(
            f"{type(self).__name__} does not define made_up, the rows of no patient on which model "
            "and loss are tried before a patient's row is read: define it"
        )

    def probe(self, count: int) -> dict[str, Tensor]:
        """Return a batch of made-up rows."""
        rows = self.made_up(count)
        return self.batch_of(self.prepare(rows, train=True), range(len(rows)))

    def check_private(self, model: nn.Module, probe: Mapping[str, Tensor]) -> None:
        """Raise `InputError` if model or loss cannot be trained privately.

        `probe` is a batch of made-up rows. A subclass also checks what else it does with a batch.
        """
        from fedmed_flower.privacy.validate import (
            require_forgetful,
            require_private_loss,
            require_private_model,
        )

        require_private_model(model, self.loss_of, probe)
        require_private_loss(model, self.loss_of, probe)
        require_forgetful(model, self.loss_of, probe)

    def seed_transforms(self, prepared: Any, seed: int) -> None:  # noqa: B027
        """Seed random transforms that draw from a generator other than torch's."""

    def measure_privately(
        self, model: nn.Module, prepared: Any, patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        """Return metrics with noise of this multiplier, bounded in what one patient can change.

        `prepared` may be empty. A row for which the network fails adds nothing.
        """
        raise InputError(f"{type(self).__name__} does not define measure_privately")

    def require_measurable(self) -> None:
        """Raise `InputError` if `measure_privately` is not possible, whatever the rows are."""
        if type(self).measure_privately is MedicalClient.measure_privately:
            raise InputError(f"{type(self).__name__} does not define measure_privately")

    def _without(self, hook: str) -> InputError:
        return InputError(f"{type(self).__name__} cannot train: it does not define {hook}")

    @classmethod
    def client_app(cls, mods: Sequence[Mod] = ()) -> ClientApp:
        """Return the Flower ClientApp of this client: train, evaluate and its queries.

        Flower's `mods`, such as those of ``flwr.clientapp.mod``, run around each of them, the first
        one outermost.

        Of an error raised in a handler, only the class leaves a real site. Load no data while the
        module is imported, since Flower sends the whole text of an error raised there.
        """
        # Imported here, by its name, since `app` imports this module.
        app: ClientApp = import_module("fedmed_flower.clients.app").app_of(cls, mods)
        return app

    def read(self, message: Message) -> ConfigRecord:
        """Return the config of a message, and set `agreed` and `pooled` by it.

        Raises
        ------
        DeclinedError
            If the message begins a run at a real hospital where too many runs began today.
        """
        config = next(iter(message.content.config_records.values()), ConfigRecord())
        self.agreed = str(config.get(AGREED, ""))
        self.pooled = bool(config.get(POOL_SITES, False))
        if not self.site.simulated:
            # The parts of a run, such as its models for comparison, count as one run.
            run = self.run_key(config).partition("/")[0]
            self.ledger(config).begin_run(run, self.node.most_runs_a_day)
        return config

    def run_key(self, config: Mapping[str, Any]) -> str:
        """Return the name under which the ledger keeps a run, of at most 200 letters."""
        key = str(config.get(RUN_KEY, self.context.run_id))
        if len(key) > _MOST_KEY:
            raise InputError(f"{RUN_KEY} must have at most {_MOST_KEY} letters, got {len(key)}")
        return key

    def ledger(self, config: Mapping[str, Any]) -> Ledger:
        """Return the site's ledger; a ledger at the default path is created if it does not exist.

        Parameters
        ----------
        config : mapping
            The message's config; only a simulation takes the folder from it.
        """
        path = ledger_path(self.context, self.site, config)
        # If the hospital has named a ledger and the file is gone, a new one must not replace it.
        named = "ledger" in self.context.node_config
        if not (self.site.simulated or named or path.exists()):
            text = "%s: %s is a new ledger, in which nothing was ever released"
            log.warning(text, self.site.name, path)
        return Ledger(path, create=not named)

    def book_path(self, config: Mapping[str, Any]) -> Path:
        """Return the path of the site's book; the file is created when it is first needed."""
        path = book_path(ledger_path(self.context, self.site, config))
        if not (self.site.simulated or path.exists()):
            log.warning("%s: %s is new: no earlier answer is known", self.site.name, path)
        return path

    def open_book(self, config: Mapping[str, Any], minimum: int) -> AbstractContextManager[Book]:
        """Open the book of a real hospital; entries are on the disk when the context is left.

        Parameters
        ----------
        config : mapping
            The message's config.
        minimum : int
            The fewest patients who may be singled out; at least 1.
        """
        data = self.data()
        return open_book(
            self.book_path(config),
            all_rows(data),
            self.declared,
            minimum,
            self.node.hide_few_missing,
            type(self).__qualname__,
        )

    @property
    def declared(self) -> Schema | None:
        """The schema by which the hospital declares its columns; None if there is none."""
        return getattr(self, "schema", None)

    def empty_columns(self) -> tuple[str, ...]:
        """Return the features of the schema without a value in any row of this site.

        Columns that its table lacks are not among them. Nothing is returned if the rows are of
        fewer patients than ``min-cell-count``, or if there is no schema. A real hospital looks at
        the rows that its book lets count: few patients who came since do not fill a column.
        """
        if self.declared is None:
            return ()
        data = self.data()
        rows = all_rows(data)
        few = min_cell_count(self.context, self.site)
        if len({*patients_of(rows)}) < few:
            return ()
        if not self.site.simulated:
            with self.open_book({}, few) as book:
                rows = book.everybody("columns without a value")
        names = [name for name in self.declared.features if name not in data.lacking]
        return empty_columns(rows, names) if rows else ()

    def require_protection(self) -> None:
        """Decline to train without privacy if the hospital has set a budget.

        Raises
        ------
        DeclinedError
        """
        if not self.privacy.on and budget_of(self.context) is not None:
            raise DeclinedError(
                'this hospital has set a privacy budget and trains with privacy="patient" only'
            )

    def require_usable(self, rows: Sequence[Row]) -> None:
        """Decline to learn without noise from these training rows if the hospital must not.

        Raises
        ------
        DeclinedError
            At a real hospital, if the rows are of fewer patients than an update needs, or if an
            earlier run has trained with noise on one of the patients: a result without noise would
            undo that protection.
        """
        patients = {*patients_of(rows)}
        fewest = fewest_patients(self.context, self.site, "train")
        if len(patients) < fewest:
            raise DeclinedError(f"an update here needs at least {fewest} patients")
        self._require_plain(patients)

    def _require_plain(self, patients: Collection[str]) -> None:
        if not self.site.simulated and self.ledger({}).has_trained(patients):
            raise DeclinedError(
                "an earlier run trained with noise on some of these patients: they may be used "
                "with noise only"
            )

    def require_several(self, rows: Sequence[Row]) -> None:
        """Decline to send an update that was made of too few patients.

        Raises
        ------
        DeclinedError
        """
        settings = self.settings
        indices = sorted(self.entered)
        if indices and indices[-1] < len(rows):
            patients = {patient_text(rows[index]["patient"]) for index in indices}
        else:  # A subclass with its own `fit` does not record which rows it used.
            patients = {*patients_of(rows)}
        most = len(patients)
        if settings.local_steps:
            most = settings.local_steps * settings.batch_size
        fewest = fewest_patients(self.context, self.site, "train")
        if min(len(patients), most) < fewest:
            raise DeclinedError(f"an update here needs at least {fewest} patients")

    def disclosed(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return metrics as they leave: coarse ones if the hospital's node config asks for it.

        Raises
        ------
        InputError
            As `plain_metrics`.
        """
        plain = plain_metrics(metrics)
        return coarsened(plain) if self.node.coarse_figures else plain

    def disclosable(
        self, rows: Sequence[Row], purpose: str, config: ConfigRecord
    ) -> Sequence[Row] | None:
        """Return the rows whose metrics may leave; None if no metrics may leave.

        At a real hospital this is written down before anything is measured. The book makes new
        patients wait until there are enough of them. The ledger counts how often each patient was
        measured without noise.

        Parameters
        ----------
        rows : sequence of Row
            Screened rows.
        purpose : str
            What they are measured for, as the ledger notes it.
        config : ConfigRecord
            The message's config.

        Raises
        ------
        DeclinedError
            If an earlier run has trained with noise on one of the patients: a result without noise
            would undo that protection.
        """
        patients = {*patients_of(rows)}
        fewest = fewest_patients(self.context, self.site, "evaluated")
        if len(patients) < fewest:
            return None
        if self.site.simulated:
            return rows
        self._require_plain(patients)
        with self.open_book(config, fewest) as book:
            reported = book.evaluation(rows)
        if reported is not None:
            self.ledger(config).note_plain(
                (row["patient"] for row in reported),
                run=self.run_key(config),
                purpose=purpose,
                app=type(self).__name__,
            )
        return reported

    def reportable_rows(self, column: str, rows: Sequence[Row]) -> list[Row]:
        """Return the rows that may count in an answer about a column without noise.

        At a real hospital this is written down in its book before the answer is computed. Rows
        that are new since an earlier answer are left out if too few patients are behind them.

        Parameters
        ----------
        column : str
        rows : sequence of Row
            As `data` or `screened` returned them.

        Raises
        ------
        DeclinedError
            If this run or the hospital protects patients by noise, or the remaining rows are of
            fewer patients than ``min-cell-count``.
        """
        if self.secretive:
            raise DeclinedError("this run, or this hospital, protects patients by noise")
        minimum = min_cell_count(self.context, self.site)
        usable = list(rows)
        if not self.site.simulated:
            with self.open_book({}, minimum) as book:
                mask = book.column(column, book.mask_of({id(row) for row in rows}))
                usable = []
                if mask is not None:
                    usable = [row for row, fine in zip(book.rows, mask, strict=True) if fine]
        if len({*patients_of(usable)}) < minimum:
            raise DeclinedError(f"an answer here needs at least {minimum} patients")
        return usable

    @property
    def secretive(self) -> bool:
        """Whether nothing that depends on a patient's files may leave without noise."""
        return self.privacy.on or self.noises_metrics

    @property
    def noises_metrics(self) -> bool:
        """Whether evaluation counts with noise, and is charged to the ledger.

        It always does if the hospital has set a budget, since no budget bounds answers without
        noise. Else ``private-metrics`` of the hospital's node config decides. If that is not set,
        private runs do; in a simulation the run config may switch it off.
        """
        if budget_of(self.context) is not None:
            return True
        if "private-metrics" in self.context.node_config:
            return self.node.private_metrics
        return self.privacy.on and (self.privacy.private_metrics or not self.site.simulated)

    @property
    def sealed(self) -> bool:
        """Whether the client is `secretive` at a real hospital, whose server sees all replies."""
        return self.secretive and not self.site.simulated

    def count(self, split: str, pooled: bool = False) -> int:
        """Return the size of a split as the server receives it: the number of usable rows.

        If the client is `secretive`, it is the number of loaded patients. It does not show how many
        rows a patient has, nor whether they can be used.
        """
        if self.secretive:
            return len({*patients_of(getattr(self.data(pooled), split))})
        return len(self.screened(split, pooled))

    def fresh_model(self) -> tuple[nn.Module, Travelling]:
        """Return the network on the device with fresh weights, and which part of it travels."""
        from fedmed_flower.models.adapters import add_adapters
        from fedmed_flower.models.trainable import Travelling

        # The run's seed makes the frozen part the same here as at the server. `seeded` also keeps
        # the generator of `fit` where it was.
        with self.seeded(self.settings.seed):
            model = self.build_model()
            adapters = add_adapters(model, self.models)
        travelling = Travelling(model, self.models.trainable, adapters)
        device = torch_device(self.settings)
        if device.type == "cuda" and self.settings.channels_last:
            for parameter in model.parameters():
                parameter.data = arranged(parameter.data)
        return model.to(device), travelling

    def model_of(self, arrays: ArrayRecord, config: ConfigRecord) -> tuple[nn.Module, Travelling]:
        """Return the network with the weights of a message, and which part of it travels.

        Raises
        ------
        InputError
            If the frozen part is not the same here as at the server.
        """
        model, travelling = self.fresh_model()
        if FROZEN in config and config[FROZEN] != travelling.digest(model):
            raise InputError(
                "the frozen part of the model, which neither trainable nor lora names, is not the "
                "same here as at the server: build_model must load the same weights on both, such "
                "as those of one bundle"
            )
        travelling.load(model, arrays.to_torch_state_dict())
        return model, travelling

    def seeded(self, seed: int) -> Any:
        """Return a context in which torch uses this seed and the site's number of threads."""
        threads = self.settings.torch_threads or int(self.site.simulated)
        return torch_environment(seed, threads, torch_device(self.settings))

    def data(self, pooled: bool = False) -> SiteData:
        """Return the site's rows as `load_data` returns them; they are cached during the run."""
        self.touched = True
        loaded = self.cache.loaded
        key = self.key(pooled)
        if key not in loaded:
            data = self.pooled_data() if pooled else self._loaded_data()
            if not any(getattr(data, split) for split in SPLITS):
                raise InputError("there are no rows")
            if self.sealed:
                data = with_patients(data)
            require_patients(data)
            if self.secretive:
                _require_named(data)
            if not self.sealed:
                self.check(data)
            if not pooled:
                self.warn(data)
            loaded[key] = data
        return loaded[key]

    def _loaded_data(self) -> SiteData:
        """Return the rows; at a real hospital the secret key in its ledger splits them."""
        real = not self.site.simulated
        with splitting_by(lambda: self.ledger({}).split_key()) if real else nullcontext():
            data = in_columns(self.load_data(self.site))
        self._log_lacking_classes(data)
        return data

    def pooled_data(self) -> SiteData:
        """Return the rows of all sites; a site that fails is left out and named in the log.

        A row's patient is (index of the site, patient).

        Raises
        ------
        InputError
            If the site is a real one, or no site has rows.
        """
        if not self.site.simulated:
            raise InputError("pool-sites works in a simulation only: no site holds others' data")
        parts: dict[int, SiteData] = {}
        for index in range(self.site.num_sites):
            other = copy.copy(self)
            other.site = replace(self.site, index=index, name=f"hospital-{index + 1}")
            try:
                parts[index] = other.data()
            except Exception as error:  # One broken site must not keep the others from the run.
                log.warning("the pooled data lack %s: %s", other.site.name, error)
        if not parts:
            raise InputError("no site has rows to pool")
        return together(parts)

    def _log_lacking_classes(self, data: SiteData) -> None:
        """Log the classes of the training rows that another split lacks."""
        classes = {split: self._classes_of(getattr(data, split)) for split in SPLITS}
        for split in SPLITS[1:]:
            lacking = sorted(classes["train"].keys() - classes[split].keys() - {""})
            if classes[split] and lacking:
                level = logging.DEBUG if self.site.simulated else logging.WARNING
                text = "%s: no row of the %s split has class %s"
                log.log(level, text, self.site.name, split, ", ".join(lacking))

    def _classes_of(self, rows: Sequence[Row]) -> Counter[str]:
        """Return how many rows have each class, as `_class_of` names it."""
        return Counter(map(self._class_of, rows))

    def _class_of(self, row: Row) -> str:
        """Return the class of a row for the log; empty if it has no class or a broken one."""
        try:
            label = self.label_of(row)
            return "" if label is None else str(label)
        except Exception:  # One broken row must not decide about the others.
            return ""

    def screened(self, split: str, pooled: bool = False) -> Sequence[Row]:
        """Return the rows of a split that can be used; they are cached during the run."""
        rows: Sequence[Row] = getattr(self.data(pooled), split)
        screened = self.cache.screened
        key = self.key(pooled, split)
        if key not in screened:
            if self.sealed:
                rows = [row for row in rows if self._passes(row, split)]
            screened[key] = self.screen(rows, split)
        return screened[key]

    def _passes(self, row: Row, split: str) -> bool:
        """Return whether a row passes `check` by itself."""
        try:
            parts: dict[str, Any] = {"train": (), split: (row,)}
            self.check(SiteData(**parts))
        except Exception as error:  # One broken row must not decide about the others.
            log.warning("%s: rejected, %s split: %s", self.site.name, split, error)
            return False
        return True

    def loaded(self, split: str) -> Sequence[Row]:
        """Return the rows of a split as they were loaded, pooled if the message asks for that."""
        rows: Sequence[Row] = getattr(self.data(self.pooled), split)
        return rows

    def screened_data(self, pooled: bool = False, splits: Collection[str] = SPLITS) -> SiteData:
        """Return the data with the named splits screened; the other splits stay as loaded.

        Raises
        ------
        InputError
            If all training rows were rejected.
        """
        data = self.data(pooled)
        usable: dict[str, Any] = {split: self.screened(split, pooled) for split in splits}
        screened = replace(data, **usable)
        if not screened.train and data.train:
            raise InputError("there are no training rows left: all were rejected")
        return screened

    def prepared(self, split: str, pooled: bool) -> tuple[SiteData, Any]:
        """Return the data with a split screened, and the rows of that split as prepared.

        Raises
        ------
        InputError
            If the training split is asked for and has no rows.
        """
        self.preparing = True
        data = self.screened_data(pooled, (split,))
        if split == "train" and not data.train:
            raise InputError("there are no training rows")
        prepared = self.cache.prepared
        key = self.key(self.prepared_for, pooled, split, self.agreed)
        if key not in prepared:
            # Those that were prepared by another agreement are not needed any more.
            for other in [other for other in prepared if other[:-1] == key[:-1]]:
                del prepared[other]
            prepared[key] = self.prepare(getattr(data, split), train=split == "train")
        return data, prepared[key]

    @property
    def cache(self) -> RunCache:
        """The rows that this process keeps during the run."""
        return self.run_cache.of_run(self.context.run_id)

    def key(self, *parts: Hashable) -> Key:
        """Return a key for `cache`: this class, this site, and the parts."""
        return (type(self).__qualname__, self.site, *parts)


def _require_named(data: SiteData) -> None:
    """Raise `InputError` if patients are only known by their line of a table."""
    rows = all_rows(data)
    if any(isinstance(row.get("patient"), LineNumber) for row in rows):
        raise InputError(
            "the table names no patients: with privacy or a budget it needs a column of patients, "
            "since the ledger must recognise each patient however the table is sorted"
        )
