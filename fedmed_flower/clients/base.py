"""One hospital's side of a round, and the ClientApp made of it."""

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
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fedmed_flower.clients.book import Book, book_path, open_book
from fedmed_flower.clients.pooled import together
from fedmed_flower.clients.run_cache import Key, RunCache
from fedmed_flower.clients.training import Steps, train_epochs
from fedmed_flower.data.pictures import Picture
from fedmed_flower.data.schema import Schema
from fedmed_flower.data.site import (
    SPLITS,
    LineNumber,
    Row,
    Site,
    SiteData,
    fewest_patients,
    min_cell_count,
    patient_text,
    require_patients,
    with_patients,
)
from fedmed_flower.data.splits import splitting_by
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.metrics.coarse import coarsened
from fedmed_flower.models.device import (
    arranged,
    half_precision,
    make_optimizer,
    torch_device,
    torch_environment,
)
from fedmed_flower.models.trainable import Travelling
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.privacy.patient import budget_of, ledger_path
from fedmed_flower.privacy.validate import (
    require_forgetful,
    require_private_loss,
    require_private_model,
)
from fedmed_flower.settings.model import ModelSettings
from fedmed_flower.settings.node import NodeSettings
from fedmed_flower.settings.privacy import PrivacySettings
from fedmed_flower.settings.training import Settings
from fedmed_flower.wire import AGREED, FROZEN, POOL_SITES, RUN_KEY

log = logging.getLogger("flwr.fedmed")

# Maps (client, message) to the content of the reply.
Query = Callable[[Any, Message], RecordDict]
# Letters of a run's name: the ledger keeps it for good.
_MOST_KEY = 200


class MedicalClient(ABC):
    """One hospital in a run. Subclass a client for a kind of data, such as `ClassificationClient`.

    An instance lives for one message; what must last goes into ``context.state``.

    Hooks
    -----
    build_model
        The network. Must be the same at every site and at the server.
    load_data
        This site's rows.
    check
        Raise `InputError` where the rows cannot be used.
    screen
        Turn single rows away that cannot be used, and name them in the log.
    contribute, agree
        What a site tells before the first round, and what the server makes of all sites' answers.
    prepare
        Make of rows what the hooks below take; kept in memory for the length of a run.
    batch_of, loss_of
        Some rows as a batch, and its loss: all that training needs, plain or private.
    fit
        Train on the training rows; returns metrics.
    measure
        Evaluate on the rows of one split; returns metrics.
    describe
        Numbers about the rows, to show how a simulation split them.
    draw
        Pictures of some rows with what the model makes of them.
    made_up
        Rows that no patient stands behind, on which model and loss are tried before any patient's
        row is looked at.
    check_private
        Refuse what cannot be trained privately.
    seed_transforms
        Seed what is random in making a batch.
    measure_privately, require_measurable
        Evaluate by counts with noise; refuse where that cannot be done.
    label_of
        A row's class, to say which split lacks one.

    Parameters
    ----------
    context : flwr.app.Context
        As Flower gives it to a ClientApp.

    Attributes
    ----------
    settings : Settings
        From the run config.
    site : Site
    privacy : PrivacySettings
        From the run config.
    models : ModelSettings
        From the run config: the network, and which part of it is trained and travels.
    proximal_mu : float
        How strongly `fit` holds the model near the global one; sent by `FedProx`, else 0.
    progress : float
        Which part of the run's rounds was done before this one.
    agreed : str
        What the server made of all sites' answers before the first round; empty before that.
    split : str
        Which rows a message asks to evaluate on; empty in another message.
    pooled : bool
        Whether a message is about all sites' rows together.
    touched : bool
        Whether the rows were looked at since the message came.
    queries : dict
        What answers a Flower query, by its name: maps (client, message) to the content of the
        reply, or names such a function as ``"module:function"``. A subclass adds its own.
    stand_ins : dict
        A message whose config has such a key is answered by what the function of this name makes
        of the client.
    node_keys : tuple of str
        Keys of the hospital's node config that are the app's own.
    """

    queries: ClassVar[Mapping[str, Query | str]] = {
        "describe": "fedmed_flower.clients.queries:describe",
        "pictures": "fedmed_flower.clients.queries:pictures",
        "contribution": "fedmed_flower.clients.queries:contribution",
        "personal": "fedmed_flower.clients.personal:personal",
        "statistics": "fedmed_flower.statistics.client:statistics",
    }
    stand_ins: ClassVar[Mapping[str, str]] = {}
    node_keys: ClassVar[Collection[str]] = ()
    # How `prepare` differs from that of other clients of this class's name.
    prepared_for: ClassVar[str] = ""
    run_cache: ClassVar[RunCache] = RunCache()

    def __init__(self, context: Context) -> None:
        self.context = context
        self.settings = Settings.from_run_config(context.run_config)
        self.privacy = PrivacySettings.from_run_config(context.run_config)
        self.models = ModelSettings.of_site(context)
        self.proximal_mu, self.progress, self.agreed, self.split = 0.0, 0.0, "", ""
        self.pooled = self.touched = False
        # Places of the training rows that made this message's update.
        self.entered: set[int] = set()

    @cached_property
    def node(self) -> NodeSettings:
        """What the hospital says for itself."""
        return NodeSettings.of(self.context.node_config, self.node_keys)

    @cached_property
    def site(self) -> Site:
        """The hospital that this client stands for."""
        return Site.from_context(self.context)

    @abstractmethod
    def load_data(self, site: Site) -> SiteData:
        """Return the rows of a site; one without training rows is only tested."""

    def build_model(self) -> nn.Module:
        """Return the network with fresh weights."""
        raise self._without("build_model")

    def check(self, data: SiteData) -> None:  # noqa: B027
        """Raise `InputError` where the rows cannot be used; it names the row and the remedy."""

    def screen(self, rows: Sequence[Row], split: str) -> Sequence[Row]:
        """Return the rows that can be used; a subclass says in the log which cannot, and why.

        If `sealed`, one row decides nothing about another.
        """
        return rows

    def label_of(self, row: Row) -> Hashable | None:
        """Return the class of a row; None if rows have none."""
        return None

    @property
    def must_agree(self) -> bool:
        """Whether the model needs what all sites tell before the first round."""
        return False

    def contribute(self) -> dict[str, Any]:
        """Return what this site tells before the first round: numbers, texts and lists of them."""
        return {}

    def agree(self, contributions: Mapping[str, Mapping[str, Any]]) -> str:
        """Return, at the server, what goes to all sites with each message as `agreed`.

        Parameters
        ----------
        contributions : dict
            What `contribute` returned, by the name of the site.
        """
        return ""

    def prepare(self, rows: Sequence[Row], train: bool) -> Any:
        """Return the rows as `batch_of` (where `train`) or `measure` take them."""
        raise self._without("prepare")

    def fit(self, model: nn.Module, prepared: Any, seed: int) -> dict[str, Any]:
        """Train `model` in place for a round and return metrics such as ``loss``.

        Here by `batch_of` and `loss_of`, which must give the mean over a batch.
        """
        settings, size, count = self.settings, self.settings.batch_size, len(prepared)
        self.seed_transforms(prepared, seed)

        def collate(indices: list[int]) -> dict[str, Tensor]:
            self.entered.update(indices)
            return self.batch_of(prepared, indices)

        batches: Any = DataLoader(
            range(count),  # type: ignore[arg-type]
            size,
            shuffle=True,
            # One row alone has no variance, which batch normalisation needs.
            drop_last=count > size and count % size == 1,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(seed),
        )
        if settings.local_steps:
            batches = Steps(batches, settings.local_steps)
        mean = train_epochs(
            model,
            batches,
            self.loss_of,
            make_optimizer(settings, model, self.progress),
            1 if settings.local_steps else settings.local_epochs,
            half_precision(settings),
            self.proximal_mu,
        )
        return {"loss": mean}

    def measure(self, model: nn.Module, prepared: Any) -> dict[str, Any]:
        """Return the metrics of `model`, with ``num-examples``."""
        raise self._without("measure")

    def describe(self, data: SiteData) -> dict[str, Any]:
        """Return further numbers about the rows; asked for in a simulation only."""
        return {}

    def batch_of(self, prepared: Any, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return some of the training rows, on the device, as what `loss_of` takes.

        Apply random augmentation, if any, to each row independently.
        """
        raise self._without("batch_of and loss_of")

    def loss_of(self, model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch: the mean over its records, one number."""
        raise self._without("batch_of and loss_of")

    def draw(self, model: nn.Module, prepared: Any, count: int) -> list[Picture]:
        """Return pictures of `count` prepared rows and of the worst; here none.

        A title names no patient.
        """
        return []

    def made_up(self, count: int) -> list[Row]:
        """Return rows as `load_data` gives them, made of what the client declares alone.

        Each must differ from the others, or a loss that mixes records is not found out.
        """
        raise InputError(
            f"{type(self).__name__} does not define made_up: before a patient's row is looked at, "
            "model and loss are tried on rows that are no patient's"
        )

    def probe(self, count: int) -> dict[str, Tensor]:
        """Return a batch of made-up rows."""
        rows = self.made_up(count)
        return self.batch_of(self.prepare(rows, train=True), range(len(rows)))

    def check_private(self, model: nn.Module, probe: Mapping[str, Tensor]) -> None:
        """Raise `InputError` where model or loss cannot be trained privately.

        A subclass adds what else it does with a batch. `probe` is one of made-up rows.
        """
        require_private_model(model, self.loss_of, probe)
        require_private_loss(model, self.loss_of, probe)
        require_forgetful(model, self.loss_of, probe)

    def seed_transforms(self, prepared: Any, seed: int) -> None:  # noqa: B027
        """Seed what draws from a generator other than torch's when a batch is made."""

    def measure_privately(
        self, model: nn.Module, prepared: Any, patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        """Return metrics of which one patient changes little, with noise of this multiplier.

        `prepared` may be empty. A row for which the network fails adds nothing.
        """
        raise InputError(f"{type(self).__name__} does not define measure_privately")

    def require_measurable(self) -> None:
        """Raise `InputError` where `measure_privately` is not possible, whatever the rows are."""
        if type(self).measure_privately is MedicalClient.measure_privately:
            raise InputError(f"{type(self).__name__} does not define measure_privately")

    def _without(self, hook: str) -> InputError:
        return InputError(f"{type(self).__name__} cannot train: it does not define {hook}")

    @classmethod
    def client_app(cls) -> ClientApp:
        """Return the Flower ClientApp of this client: train, evaluate and its queries.

        Errors raised in a handler leave a real site as their class alone. Load no data while the
        module is imported: of an error raised there Flower sends the text.
        """
        # By its name: that module knows the clients, which know nothing of messages' ways.
        app: ClientApp = import_module("fedmed_flower.clients.app").app_of(cls)
        return app

    def read(self, message: Message) -> ConfigRecord:
        """Return the config of a message, and take up what it says of all sites.

        Raises
        ------
        DeclinedError
            If it begins a run at a real hospital in which too many began today.
        """
        config = next(iter(message.content.config_records.values()), ConfigRecord())
        self.agreed = str(config.get(AGREED, ""))
        self.pooled = bool(config.get(POOL_SITES, False))
        if not self.site.simulated:
            # All parts of a run, such as those for comparison, are one.
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
        """Return the site's ledger, made if it is in its usual place and not there yet.

        Parameters
        ----------
        config : mapping
            Came with the message; heeded in a simulation only.
        """
        path = ledger_path(self.context, self.site, config)
        # A ledger that the hospital has named and that is gone is no reason to begin a new one.
        named = "ledger" in self.context.node_config
        if not (self.site.simulated or named or path.exists()):
            text = "%s: %s is a new ledger, in which nothing was ever released"
            log.warning(text, self.site.name, path)
        return Ledger(path, create=not named)

    def book_path(self, config: Mapping[str, Any]) -> Path:
        """Return the file of what the site has told; it is made where it is first needed."""
        path = book_path(ledger_path(self.context, self.site, config))
        if not (self.site.simulated or path.exists()):
            log.warning("%s: %s is new: no earlier answer is known", self.site.name, path)
        return path

    def open_book(self, config: Mapping[str, Any], minimum: int) -> AbstractContextManager[Book]:
        """Open the book of a real hospital; what was admitted is on the disk when this is left.

        Parameters
        ----------
        config : mapping
            Came with the message.
        minimum : int
            The fewest patients who may be told apart; at least 1.
        """
        data = self.data()
        return open_book(
            self.book_path(config),
            [row for split in SPLITS for row in getattr(data, split)],
            self.declared,
            minimum,
            self.node.hide_few_missing,
            type(self).__qualname__,
        )

    @property
    def declared(self) -> Schema | None:
        """What the hospital declares of its columns; None if it declares nothing."""
        return getattr(self, "schema", None)

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
        """Decline to learn without noise from training rows of few patients, or of a private run.

        Raises
        ------
        DeclinedError
            At a real hospital: where they are of fewer patients than an update is made of, or an
            earlier run has trained on one of them with noise, which this would undo.
        """
        patients = {patient_text(row["patient"]) for row in rows}
        fewest = fewest_patients(self.context, self.site, "train")
        if len(patients) < fewest:
            raise DeclinedError(f"an update here is made of at least {fewest} patients")
        self._require_plain(patients)

    def _require_plain(self, patients: Collection[str]) -> None:
        if not self.site.simulated and self.ledger({}).has_trained(patients):
            raise DeclinedError("patients who were trained on with noise are used with noise only")

    def require_several(self, rows: Sequence[Row]) -> None:
        """Decline to send an update that few patients have made.

        Raises
        ------
        DeclinedError
        """
        settings, indices = self.settings, sorted(self.entered)
        if indices and indices[-1] < len(rows):
            patients = {patient_text(rows[index]["patient"]) for index in indices}
        else:  # A subclass that trains in its own way tells nothing of it.
            patients = {patient_text(row["patient"]) for row in rows}
        most = settings.local_steps * settings.batch_size or len(patients)
        fewest = fewest_patients(self.context, self.site, "train")
        if min(len(patients), most) < fewest:
            raise DeclinedError(f"an update here is made of at least {fewest} patients")

    def disclosed(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return figures as they leave: coarsely where the hospital says so."""
        return coarsened(metrics) if self.node.coarse_figures else metrics

    def disclosable(
        self, rows: Sequence[Row], purpose: str, config: ConfigRecord
    ) -> Sequence[Row] | None:
        """Return the rows of which figures may leave; None if of none.

        At a real hospital that is written down before anything is measured: in its book, by which
        patients who came since, and are too few, wait; and in its ledger, which counts how often a
        patient was measured without noise.

        Raises
        ------
        DeclinedError
            If an earlier run has trained on one of the patients with noise, which the figures
            would undo.
        """
        patients = {patient_text(row["patient"]) for row in rows}
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

    def tellable(self, column: str, rows: Sequence[Row]) -> list[Row]:
        """Return of which rows an answer about a column may leave without noise.

        At a real hospital that is written down in its book before the answer is made: rows that
        came since an earlier answer, and are too few to be told apart from it, are left out.

        Parameters
        ----------
        column : str
        rows : sequence of Row
            As `data` or `screened` gave them.

        Raises
        ------
        DeclinedError
            If this run or the hospital protects patients by noise, or the rows that are left are
            of fewer patients than ``min-cell-count``.
        """
        if self.secretive:
            raise DeclinedError("this run, or this hospital, protects patients by noise")
        minimum, usable = min_cell_count(self.context, self.site), list(rows)
        if not self.site.simulated:
            with self.open_book({}, minimum) as book:
                inside = book.column(column, book.of({id(row) for row in rows}))
                told = () if inside is None else zip(book.rows, inside, strict=True)
                usable = [row for row, fine in told if fine]
        if len({patient_text(row["patient"]) for row in usable}) < minimum:
            raise DeclinedError(f"an answer here is about at least {minimum} patients")
        return usable

    @property
    def secretive(self) -> bool:
        """Whether nothing may leave that depends on what is in a patient's files, noise apart."""
        return self.privacy.on or self.noises_metrics

    @property
    def noises_metrics(self) -> bool:
        """Whether what evaluation counts carries noise, and is charged.

        Always if the hospital has set a budget: what a server may ask for exactly, no budget
        bounds. Else as ``private-metrics`` of the hospital's node config says; if it says nothing,
        in private runs, unless the run config of a simulation says otherwise.
        """
        if budget_of(self.context) is not None:
            return True
        if "private-metrics" in self.context.node_config:
            return self.node.private_metrics
        return self.privacy.on and (self.privacy.private_metrics or not self.site.simulated)

    @property
    def sealed(self) -> bool:
        """Whether that is so at a real hospital, whose server sees all that leaves."""
        return self.secretive and not self.site.simulated

    def count(self, split: str, pooled: bool = False) -> int:
        """Return the number that the server is told of a split: of rows that can be used.

        If what is in a file must not show, the number of patients who were loaded: how many
        rows one of them has, and whether these can be used, is then not told.
        """
        if self.secretive:
            return len({patient_text(row["patient"]) for row in getattr(self.data(pooled), split)})
        return len(self.screened(split, pooled))

    def fresh_model(self) -> tuple[nn.Module, Travelling]:
        """Return the network on the device with fresh weights, and which part of it travels."""
        # The server's seed: what does not travel is then the same here. What travels is thrown
        # away, and must not move the seeded generator of `fit`.
        with self.seeded(self.settings.seed):
            model = self.build_model()
        travelling = Travelling(model, self.models.trainable)
        device = torch_device(self.settings)
        if device.type == "cuda" and self.settings.channels_last:
            for parameter in model.parameters():
                parameter.data = arranged(parameter.data)
        return model.to(device), travelling

    def model_of(self, arrays: ArrayRecord, config: ConfigRecord) -> tuple[nn.Module, Travelling]:
        """Return the network with weights that came with a message."""
        model, travelling = self.fresh_model()
        if FROZEN in config and config[FROZEN] != travelling.digest(model):
            raise InputError(
                "what trainable leaves out of the model is not the same here as at the server: "
                "build_model must load the same weights on both, such as those of one bundle"
            )
        travelling.load(model, arrays.to_torch_state_dict())
        return model, travelling

    def seeded(self, seed: int) -> Any:
        """Return the context in which torch works for this site: its seed and its threads."""
        threads = self.settings.torch_threads or int(self.site.simulated)
        return torch_environment(seed, threads, torch_device(self.settings))

    def data(self, pooled: bool = False) -> SiteData:
        """Return the site's rows as `load_data` gives them; the run keeps them."""
        self.touched = True
        loaded, key = self.cache.loaded, self.key(pooled)
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
            loaded[key] = data
        return loaded[key]

    def _loaded_data(self) -> SiteData:
        """Return the rows; at a real hospital they are split by its own key."""
        real = not self.site.simulated
        with splitting_by(lambda: self.ledger({}).split_key()) if real else nullcontext():
            data = self.load_data(self.site)
        self._say_classes(data)
        return data

    def pooled_data(self) -> SiteData:
        """Return the rows of all sites whose rows can be used; the log names the others.

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
            except Exception as error:  # What keeps one site from a run must not keep the others.
                log.warning("all data pooled are without %s: %s", other.site.name, error)
        if not parts:
            raise InputError("no site has rows to pool")
        return together(parts)

    def _say_classes(self, data: SiteData) -> None:
        """Say in the log which class of the training rows another split lacks."""
        found = {s: Counter(self._class_of(row) for row in getattr(data, s)) for s in SPLITS}
        for split in SPLITS[1:]:
            lacking = sorted(found["train"].keys() - found[split].keys() - {""})
            if found[split] and lacking:
                level = logging.DEBUG if self.site.simulated else logging.WARNING
                text = "%s: no row of the %s split has class %s"
                log.log(level, text, self.site.name, split, ", ".join(lacking))

    def _class_of(self, row: Row) -> str:
        """Return the class of a row as the log shows it; empty if it has none, or none fits."""
        try:
            label = self.label_of(row)
            return "" if label is None else str(label)
        except Exception:  # Whatever a row can be: it must not decide about the others.
            return ""

    def screened(self, split: str, pooled: bool = False) -> Sequence[Row]:
        """Return the rows of a split that can be used; the run keeps them."""
        rows: Sequence[Row] = getattr(self.data(pooled), split)
        screened, key = self.cache.screened, self.key(pooled, split)
        if key not in screened:
            if self.sealed:
                rows = [row for row in rows if self._passes(row, split)]
            screened[key] = self.screen(rows, split)
        return screened[key]

    def _passes(self, row: Row, split: str) -> bool:
        """Return whether a row, all by itself, passes `check`."""
        try:
            parts: dict[str, Any] = {"train": (), split: (row,)}
            self.check(SiteData(**parts))
        except Exception as error:  # Whatever a row can be: it must not decide about the others.
            log.warning("%s: turned away, %s split: %s", self.site.name, split, error)
            return False
        return True

    def loaded(self, split: str) -> Sequence[Row]:
        """Return the rows of a split as the message at hand asks for them, usable or not."""
        rows: Sequence[Row] = getattr(self.data(self.pooled), split)
        return rows

    def screened_data(self, pooled: bool = False, splits: Collection[str] = SPLITS) -> SiteData:
        """Return the rows that passed `screen`; splits that are not named are as they were loaded.

        Raises
        ------
        InputError
            If all training rows were turned away.
        """
        data = self.data(pooled)
        usable: dict[str, Any] = {split: self.screened(split, pooled) for split in splits}
        screened = replace(data, **usable)
        if not screened.train and data.train:
            raise InputError("there are no training rows left: all were turned away")
        return screened

    def prepared(self, split: str, pooled: bool) -> tuple[SiteData, Any]:
        """Return the rows of a split that passed `screen`, and the same as `prepare` makes them.

        Raises
        ------
        InputError
            If training rows are asked for and there are none.
        """
        data = self.screened_data(pooled, (split,))
        if split == "train" and not data.train:
            raise InputError("there are no training rows")
        prepared, key = self.cache.prepared, self.key(self.prepared_for, pooled, split)
        if key not in prepared:
            prepared[key] = self.prepare(getattr(data, split), train=split == "train")
        return data, prepared[key]

    @property
    def cache(self) -> RunCache:
        """What this process keeps of the run."""
        return self.run_cache.of_run(self.context.run_id)

    def key(self, *parts: Hashable) -> Key:
        """Return the key in `cache` of something of this site, under this class's name."""
        return (type(self).__qualname__, self.site, *parts)


def _require_named(data: SiteData) -> None:
    """Refuse rows whose patients are the lines of a table: the ledger must know them again."""
    rows = (row for split in SPLITS for row in getattr(data, split))
    if any(isinstance(row.get("patient"), LineNumber) for row in rows):
        raise InputError(
            "the table names no patients: with privacy or a budget it needs a column of them, "
            "since the ledger must know each patient again however the table is sorted"
        )
