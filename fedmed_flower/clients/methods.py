"""A hospital's side of a method for hospitals that differ: its round, its state, its own model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor, nn

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.private import train_protected
from fedmed_flower.clients.state import SiteState
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.methods.base import PLAIN, Ended, Method, SiteRound
from fedmed_flower.methods.kept import kept_names
from fedmed_flower.methods.registry import method_of_message
from fedmed_flower.models.device import derive_seed, make_optimizer, torch_device
from fedmed_flower.models.trainable import Travelling
from fedmed_flower.wire import COMPRESSION, KEEP, KEEP_SENT, METHOD_RECORD

log = logging.getLogger("flwr.fedmed")

# Parts of a site's state; that of a method has its name behind it.
_METHOD = "method "
_KEPT = "kept"
_RESIDUAL = "compression"


def require_method(client: MedicalClient, method: Method, keep: str) -> None:
    """Refuse a method that this hospital cannot use, or must not.

    Raises
    ------
    InputError
        If it is wrong under the run's settings.
    DeclinedError
        If it touches patients again beside the training that is accounted for.
    """
    method.require(client.settings, keep)
    if method is PLAIN:
        return
    if client.privacy.on and method.touches_again:
        raise DeclinedError(
            f"{method.name} uses patients' rows beside the training that has noise: it is for runs "
            "without privacy"
        )


@dataclass
class MethodRound:
    """One round of a method at one hospital, from the message's state to the reply's.

    Attributes
    ----------
    client : MedicalClient
    config : ConfigRecord
        The message's config.
    model : Module
    travelling : Travelling
    kept : tuple of str
        The entries of the model that stay different at each site.
    """

    client: MedicalClient
    config: ConfigRecord
    model: nn.Module
    travelling: Travelling
    kept: tuple[str, ...]

    @cached_property
    def state(self) -> SiteState:
        """What the site has kept from its last round."""
        client = self.client
        return SiteState(client.context, client.site, client.run_key(self.config), self.config)

    @classmethod
    def of(
        cls,
        client: MedicalClient,
        config: ConfigRecord,
        model: nn.Module,
        travelling: Travelling,
    ) -> MethodRound:
        """Set the client's method, and load the site's kept layers into a model.

        Raises
        ------
        InputError, DeclinedError
            As `require_method`; or if the site's state is damaged.
        """
        client.method = method_of_message(config)
        keep = str(config.get(KEEP, ""))
        require_method(client, client.method, keep)
        kept = kept_names(model, travelling.names, keep)
        made = cls(client, config, model, travelling, kept)
        if kept and (layers := made.state.part(_KEPT)):
            model.load_state_dict(model.state_dict() | layers)
        return made

    def train(self, received: RecordDict, prepared: Any, seed: int) -> tuple[dict[str, Any], Ended]:
        """Train the model by the method; return the metrics and what the method leaves.

        Parameters
        ----------
        received : RecordDict
            The message's content.
        prepared : any
            The training rows, as the client prepares them; None in private training.
        seed : int

        Raises
        ------
        InputError
            If the client has a training loop of its own that ignores the method, or if the site
            has lost its state and the method cannot do without.
        """
        client = self.client
        method = client.method
        if method.needs_kept:
            self.state.require()
        site = self._site(received, prepared, seed)
        method.begin(site)
        metrics = method.train(site)
        hooked = method.defines("train", "loss", "before_step", "after_step")
        if hooked and not client.method_called and not client.privacy.on:
            raise InputError(
                f"{type(client).__name__} has a fit of its own that ignores the method "
                f"{method.name}: call loss, before_step and after_step of self.method there, and "
                "set self.method_called = True"
            )
        return metrics, method.end(site)

    def residual(self) -> dict[str, Tensor]:
        """Return what the code of the site's replies has lost so far; empty without a code."""
        return self.state.part(_RESIDUAL) if COMPRESSION in self.config else {}

    def keep(self, ended: Ended, residual: Mapping[str, Tensor]) -> None:
        """Write what the site keeps to its folder, if there is anything.

        Parameters
        ----------
        ended : Ended
        residual : mapping of str to Tensor
            What `residual` returns in the next round.
        """
        entries = self.model.state_dict()
        parts: dict[str, Mapping[str, Tensor]] = {
            self._part: ended.kept,
            _KEPT: {name: entries[name] for name in self.kept},
            _RESIDUAL: residual,
        }
        # An empty state is written too: a missing one has been lost.
        if self.kept or self._keeps or residual:
            self.state.save(parts)

    def sent(self) -> ArrayRecord:
        """Return the part of the model that goes back."""
        state = self.travelling.state(self.model)
        if not self.config.get(KEEP_SENT, True):
            state = {name: value for name, value in state.items() if name not in self.kept}
        return ArrayRecord(state)

    def own(self) -> nn.Module:
        """Return the model that this site itself uses."""
        return self.client.method.own(self.model, self._kept_by_method())

    @property
    def _part(self) -> str:
        return f"{_METHOD}{self.client.method.name}"

    @property
    def _keeps(self) -> bool:
        return self.client.method.defines("end")

    def _kept_by_method(self) -> dict[str, Tensor]:
        return self._on_device(self.state.part(self._part)) if self._keeps else {}

    def _site(self, received: RecordDict, prepared: Any, seed: int) -> SiteRound:
        client = self.client
        settings = client.settings
        named = self.model.named_parameters()
        travelling = {*self.travelling.names}
        shared = [
            name
            for name, parameter in named
            if parameter.requires_grad and name in travelling and name not in self.kept
        ]
        beside = {
            name.removeprefix(METHOD_RECORD): self._on_device(record.to_torch_state_dict())
            for name, record in received.array_records.items()
            if name.startswith(METHOD_RECORD)
        }

        def fit(model: nn.Module, method: Method, purpose: str) -> dict[str, Any]:
            if client.privacy.on:
                return train_protected(client, model, self.config)
            before = client.method
            client.method = method
            try:
                return client.fit(model, prepared, derive_seed(seed, purpose) if purpose else seed)
            finally:
                client.method = before

        return SiteRound(
            model=self.model,
            shared=tuple(shared),
            travelling=self.travelling.names,
            received=beside,
            kept=self._kept_by_method(),
            learning_rate=settings.rate_at(client.progress),
            fit=fit,
            optimizer=lambda model: make_optimizer(settings, model, client.progress),
        )

    def _on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = torch_device(self.client.settings)
        return {name: value.to(device) for name, value in tensors.items()}


def records_of(ended: Ended) -> dict[str, ArrayRecord]:
    """Return what a method sends beside the model, by the name of its record.

    The records keep the order of their entries.
    """
    return {
        f"{METHOD_RECORD}{name}": ArrayRecord({key: v.detach().cpu() for key, v in tensors.items()})
        for name, tensors in ended.returned.items()
    }
