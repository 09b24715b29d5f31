"""One hospital's side of a round, and the ClientApp made of it."""

from __future__ import annotations

import copy
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from torch import Tensor, nn

from fedmed_flower.clients.protecting import (
    measure_protected,
    private_metrics,
    require_protection,
    require_unseen,
    train_protected,
)
from fedmed_flower.clients.training import (
    Settings,
    derive_seed,
    probe_places,
    torch_environment,
)
from fedmed_flower.data.site import (
    DECLINED,
    SITE_RECORD,
    SPLITS,
    Row,
    Site,
    SiteData,
    tell_error,
)
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.metrics import EPSILON
from fedmed_flower.privacy.patient import PrivacySettings
from fedmed_flower.privacy.validate import (
    require_forgetful,
    require_private_loss,
    require_private_model,
)

log = logging.getLogger("flwr.fedmed")


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
    prepare
        Make of rows what `fit` and `measure` take; kept in memory for the length of a run.
    fit
        Train on the training rows; returns metrics.
    measure
        Evaluate on the rows of one split; returns metrics.
    describe
        Numbers about the rows, to show how a simulation split them.
    batch_of, loss_of
        Records as a batch, and the loss of one: all that private training needs, in place of `fit`.
    check_private
        Refuse what cannot be trained privately.
    seed_transforms
        Seed what is random in making a batch.
    measure_privately
        Evaluate by counts with noise.

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
    proximal_mu : float
        How strongly `fit` holds the model near the global one; sent by `FedProx`, else 0.
    """

    _kept: ClassVar[dict[tuple[object, ...], Any]] = {}

    def __init__(self, context: Context) -> None:
        self.context = context
        self.settings = Settings.from_run_config(context.run_config)
        self.privacy = PrivacySettings.from_run_config(context.run_config)
        self.proximal_mu = 0.0

    @cached_property
    def site(self) -> Site:
        """The hospital that this client stands for."""
        return Site.from_context(self.context)

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return the network with fresh weights."""

    @abstractmethod
    def load_data(self, site: Site) -> SiteData:
        """Return the rows of a site."""

    @abstractmethod
    def check(self, data: SiteData) -> None:
        """Raise `InputError` where the rows cannot be used; it names the row and the remedy."""

    @abstractmethod
    def prepare(self, rows: Sequence[Row], train: bool) -> Any:
        """Return the rows as `fit` (where `train`) or `measure` take them."""

    @abstractmethod
    def fit(self, model: nn.Module, prepared: Any, seed: int) -> dict[str, Any]:
        """Train `model` in place and return metrics such as ``loss``."""

    @abstractmethod
    def measure(self, model: nn.Module, prepared: Any) -> dict[str, Any]:
        """Return the metrics of `model`, with ``num-examples``."""

    def describe(self, data: SiteData) -> dict[str, Any]:
        """Return further numbers about the rows; asked for in a simulation only."""
        return {}

    def batch_of(self, prepared: Any, places: Sequence[int]) -> dict[str, Tensor]:
        """Return some of the training rows, on the device, as what `loss_of` takes.

        Each is to be changed at random by itself, if at all. Needed for private training only.
        """
        raise InputError(f"{_name(self)} cannot train privately: it gives no batch_of and loss_of")

    def loss_of(self, model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch of one record: one number."""
        raise InputError(f"{_name(self)} cannot train privately: it gives no batch_of and loss_of")

    def check_private(self, model: nn.Module, prepared: Any) -> None:
        """Raise `InputError` where model or loss cannot be trained privately.

        A subclass adds what else it does with a batch.
        """
        rows = self.batch_of(prepared, probe_places(len(prepared)))
        require_private_model(model, self.loss_of, rows)
        require_private_loss(model, self.loss_of, rows)
        require_forgetful(model, self.loss_of, rows)

    def seed_transforms(self, prepared: Any, seed: int) -> None:  # noqa: B027
        """Seed what draws from a generator other than torch's when a batch is made."""

    def measure_privately(
        self, model: nn.Module, prepared: Any, patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        """Return metrics of which one patient changes little, with noise of this multiplier."""
        raise InputError(f"{_name(self)} gives no measure_privately: set private-metrics=false")

    @classmethod
    def client_app(cls) -> ClientApp:
        """Return the Flower ClientApp of this client: train, evaluate and ``query.describe``.

        Errors raised in a handler leave a real site as their class alone. Load no data while the
        module is imported: of an error raised there Flower sends the text.
        """
        app = ClientApp()
        app.train()(partial(_answer, cls, cls._train))
        app.evaluate()(partial(_answer, cls, cls._evaluate))
        app.query("describe")(partial(_answer, cls, cls._describe))
        return app

    def _train(self, message: Message) -> RecordDict:
        config = _config(message)
        server_round = int(config.get("server-round", 0))  # type: ignore[arg-type]
        pooled = bool(config.get("pool-sites", False))
        data, prepared = self._prepared("train", pooled)
        arrays_key, arrays = next(iter(message.content.array_records.items()))
        self.proximal_mu = float(config.get("proximal-mu", 0.0))  # type: ignore[arg-type]
        if not 0 <= self.proximal_mu < math.inf:
            raise InputError(f"proximal-mu must be at least 0 and finite, got {self.proximal_mu}")
        seed = derive_seed(self.settings.seed, self.site.name, server_round, "train")
        began = time.perf_counter()
        require_protection(self.privacy, self.context)
        model = self._model(arrays)
        if self.privacy.on:
            with self._torch(seed):
                metrics = train_protected(self, model, data, prepared, config)
        else:
            with self._torch(seed):
                metrics = self.fit(model, prepared, seed)
        if self.privacy.on or private_metrics(self):
            metrics = {name: metrics[name] for name in metrics if name == EPSILON}
        else:
            metrics["seconds"] = time.perf_counter() - began
        metrics["num-examples"] = len(data.train)
        state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
        return RecordDict({arrays_key: ArrayRecord(state), "metrics": MetricRecord(metrics)})

    def _evaluate(self, message: Message) -> RecordDict:
        config = _config(message)
        split = str(config.get("split", "val"))
        if split not in SPLITS:
            raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        require_unseen(self, split)
        data, prepared = self._prepared(split, bool(config.get("pool-sites", False)))
        metrics: dict[str, Any] = {"num-examples": 0}
        if getattr(data, split):
            model = self._model(next(iter(message.content.array_records.values())))
            with self._torch(derive_seed(self.settings.seed, self.site.name, split)):
                if private_metrics(self):
                    metrics = measure_protected(self, model, data, prepared, config)
                else:
                    metrics = self.measure(model, prepared)
        return RecordDict({"metrics": MetricRecord(metrics)})

    def _describe(self, message: Message) -> RecordDict:
        self.settings.torch_device()
        data, _ = self._prepared(None, pooled=False)
        counts: dict[str, Any] = {split: len(getattr(data, split)) for split in SPLITS}
        if self.site.simulated:
            counts |= self.describe(data)
        return RecordDict({"metrics": MetricRecord({"num-examples": len(data.train)} | counts)})

    def _model(self, arrays: ArrayRecord) -> nn.Module:
        # The fresh weights are thrown away: they must not move the seeded generator of `fit`.
        with self._torch(0):
            model = self.build_model()
        model.load_state_dict(arrays.to_torch_state_dict())
        return model.to(self.settings.torch_device())

    def _torch(self, seed: int) -> Any:
        threads = self.settings.torch_threads or int(self.site.simulated)
        return torch_environment(seed, threads, self.settings.torch_device())

    def _prepared(self, split: str | None, pooled: bool) -> tuple[SiteData, Any]:
        """Return the site's data and one split as `prepare` makes it; the run keeps both."""
        run_id = self.context.run_id
        for key in [key for key in self._kept if key[0] != run_id]:
            del self._kept[key]
        base = (run_id, type(self).__qualname__, self.site, pooled)
        if (key := (*base, None)) not in self._kept:
            data = self._load_pooled() if pooled else self.load_data(self.site)
            if not data.train:
                raise InputError("there are no training rows")
            _check_patients(data)
            self.check(data)
            self._kept[key] = data
        data = self._kept[key]
        if split is None:
            return data, None
        if (key := (*base, split)) not in self._kept:
            self._kept[key] = self.prepare(getattr(data, split), train=split == "train")
        return data, self._kept[key]

    def _load_pooled(self) -> SiteData:
        """Return all sites' rows together, for the comparison that only a simulation can make."""
        site = self.site
        if not site.simulated:
            raise InputError("pool-sites works in a simulation only: no site holds others' data")
        parts = [
            self.load_data(replace(site, index=index, name=f"hospital-{index + 1}"))
            for index in range(site.num_sites)
        ]
        # Two hospitals may give two patients one number.
        train, val, test = (
            [
                {**row, "patient": (index, row["patient"])}
                for index, part in enumerate(parts)
                for row in getattr(part, split)
            ]
            for split in SPLITS
        )
        return replace(parts[0], train=train, val=val, test=test)


def _answer(
    cls: type[MedicalClient],
    handle: Callable[[Any, Message], RecordDict],
    message: Message,
    context: Context,
) -> Message:
    """Handle a message; an error leaves the site as its class alone: its text may tell more."""
    site, state = None, copy.deepcopy(context.state)
    try:
        site = Site.from_context(context)
        client = cls(context)
        content = handle(client, message)
        data = client._prepared(None, pooled=False)[0]
        content[SITE_RECORD] = ConfigRecord(
            {
                "name": site.name,
                "data": data.source,
                "generated": data.generated,
                "simulated": site.simulated,
            }
        )
        return Message(content, reply_to=message)
    except Exception as error:
        context.state = state
        told = _input_error(error) or error
        wrong_input = isinstance(told, InputError)
        name = "without a name" if site is None else site.name
        reason, level = type(told).__name__, logging.ERROR
        if isinstance(told, DeclinedError):
            reason, level = f"{DECLINED}{told}", logging.DEBUG
        elif site is not None and site.simulated:
            # Nothing leaves: the server, which runs on the same machine, logs this text.
            reason = f"{told}" if wrong_input else f"{reason}: {told}"
            level = logging.DEBUG if wrong_input else logging.ERROR
        log.log(level, "%s: %s", name, told, exc_info=level == logging.ERROR and not wrong_input)
        failure = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=tell_error(name, reason))
        return Message(failure, reply_to=message)


def _name(client: MedicalClient) -> str:
    return type(client).__name__


def _input_error(error: BaseException | None) -> InputError | None:
    """Return the wrong input that caused an error: MONAI wraps what its transforms raise."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


def _config(message: Message) -> ConfigRecord:
    return next(iter(message.content.config_records.values()), ConfigRecord())


def _check_patients(data: SiteData) -> None:
    seen: dict[Any, str] = {}
    for split in SPLITS:
        for number, row in enumerate(getattr(data, split)):
            if "patient" not in row:
                raise InputError(f"row {number} of the {split} split has no patient")
            patient = row["patient"]
            # A number is one patient, whichever of NumPy's or torch's types it has.
            patient = patient.item() if hasattr(patient, "item") else patient
            if seen.setdefault(patient, split) != split:
                raise InputError(
                    f"patient {patient} is in the splits {seen[patient]} and {split}: each patient "
                    "must be in one"
                )
