"""A method: what hospitals do beside plain training, and what the server makes of it.

One object serves one side: a hospital makes one for each message, the server one for each run.
Both are made of the same settings, which travel in the config of each training message.

A round at a hospital, in the order of the calls::

    begin -> train -> (loss -> before_step -> after_step) for each batch -> end

and at the server::

    choose -> the strategy's rule -> move

A new method is a subclass of `Method` in a file of its own, with the paper's name, and a line in
`fedmed_flower.methods.registry`. An app registers its own by `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from flwr.app import ArrayRecord, UserConfig

from fedmed_flower.settings.section import Section
from fedmed_flower.settings.text import setting_error

if TYPE_CHECKING:
    # A server that uses no method need not load torch.
    import torch
    from torch import Tensor, nn

    from fedmed_flower.settings.training import Settings

Tensors = dict[str, "Tensor"]


@dataclass
class SiteRound:
    """A round at a hospital, as a method sees it.

    Attributes
    ----------
    model : Module
        On its device, with the weights of the message and the site's kept layers; it is trained in
        place, and its travelling part is sent back.
    shared : tuple of str
        The names of its parameters that are trained, travel, and are not kept at the site.
    travelling : tuple of str
        The names of all its entries that are not frozen, the kept ones and buffers among them.
    received : dict of str to dict of Tensor
        What came beside the model, by the name that `Method.companions` gave it.
    kept : dict of str to Tensor
        What `Method.end` kept after the last round in which the server took this site's reply;
        empty before the first, and if the site has lost it.
    learning_rate : float
        Of this round.
    fit : callable
        ``fit(model, method, purpose)`` trains a model on the site's training rows as plain training
        does, with the hooks of a method, and returns the metrics. `purpose` is a text that decides
        the order of the rows, together with site and round; the empty one is plain training's.
    optimizer : callable
        Returns a new optimizer, by the run's settings, over a model's trainable parameters.
    """

    model: nn.Module
    shared: tuple[str, ...]
    travelling: tuple[str, ...]
    received: Mapping[str, Tensors]
    kept: Tensors
    learning_rate: float
    fit: Callable[[nn.Module, Method, str], dict[str, Any]]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]

    @property
    def parameters(self) -> Tensors:
        """The shared parameters of the model, by name."""
        named = dict(self.model.named_parameters())
        return {name: named[name] for name in self.shared}


@dataclass
class Ended:
    """What a method leaves after a round at a hospital.

    Attributes
    ----------
    kept : dict of str to Tensor
        Stays at the hospital, for its next round.
    returned : dict of str to dict of Tensor
        Goes to the server: each record of `SiteRound.received` as this site would change it, with
        the same entries.
    """

    kept: Tensors = field(default_factory=dict)
    returned: dict[str, Tensors] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerRound:
    """A round at the server, after the strategy's rule.

    Attributes
    ----------
    sent : ArrayRecord
        The global model that the sites started from.
    model : ArrayRecord
        What the rule made of their models.
    trained : tuple of str
        Keys of the model that are trained: of floating point, and no buffers.
    before, companions : dict of str to ArrayRecord
        What was sent beside the model, and what the rule made of what came back.
    state : dict of str to ArrayRecord
        What `Method.move` kept after the last round.
    retained : float
        Sum of the weights of the sites that were known before the round, as a share of that of
        those that are known now; in [0, 1].
    share : float
        Sum of the weights of this round's replies as a share of that of all sites that are known;
        in (0, 1].
    """

    sent: ArrayRecord
    model: ArrayRecord
    trained: tuple[str, ...]
    before: Mapping[str, ArrayRecord]
    companions: Mapping[str, ArrayRecord]
    state: Mapping[str, ArrayRecord]
    retained: float = 1.0
    share: float = 1.0


@dataclass(frozen=True)
class Moved:
    """What a method makes of a round: the next model, what goes beside it, and what is kept."""

    model: ArrayRecord
    companions: Mapping[str, ArrayRecord] = field(default_factory=dict)
    state: Mapping[str, ArrayRecord] = field(default_factory=dict)


class Method:
    """Plain training; a subclass changes what it names.

    Parameters
    ----------
    settings : Section, optional
        Of the class's `section`; or give its fields by keyword.

    Attributes
    ----------
    name : str
        By which run config and messages name the method.
    section : type of Section
        Its settings.
    sgd : bool
        Whether it is right with plain SGD alone, without momentum.
    private : bool
        Whether it may be used in private training: what it keeps and sends depends on patients only
        through the model that noised steps have made. Its hooks `train` and `loss` must then be
        those of `Method`.
    personal : bool
        Whether a site has a model of its own, which `own` returns.
    needs_all : bool
        Whether it is wrong if replies to different models are combined (``buffer``).
    needs_kept : bool
        Whether what the server holds is the weighted mean of what sites keep. Then a site that has
        lost its state refuses to go on, and a site's weight is that of its first reply: else the
        run would end at a wrong model.
    moves : bool
        Whether `move` sets the model, so that a server optimiser would move it a second time.
    """

    name: ClassVar[str] = ""
    section: ClassVar[type[Section]] = Section
    sgd: ClassVar[bool] = False
    private: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    needs_all: ClassVar[bool] = False
    needs_kept: ClassVar[bool] = False
    moves: ClassVar[bool] = False

    def __init__(self, settings: Section | None = None, **values: Any) -> None:
        self.settings: Any = self.section(**values) if settings is None else settings

    def require(self, training: Settings, keep: str) -> None:
        """Refuse settings under which the method is wrong.

        Parameters
        ----------
        training : Settings
        keep : str
            The setting ``keep``.

        Raises
        ------
        InputError
        """
        if self.sgd and (training.optimizer != "sgd" or training.momentum):
            given = training.optimizer
            if training.momentum:
                given += f" with momentum={training.momentum}"
            raise setting_error(
                f"{self.name} is right with plain SGD alone: set optimizer=sgd and momentum=0, "
                f"got {given}",
                "optimizer",
            )

    def config(self) -> UserConfig:
        """Return the settings as they travel, by key."""
        return self.settings.values()  # type: ignore[no-any-return]

    # --- At a hospital ----------------------------------------------------------------------------

    def begin(self, site: SiteRound) -> None:
        """Take up what was kept and received, before the first batch."""

    def train(self, site: SiteRound) -> dict[str, Any]:
        """Train ``site.model`` in place and return the metrics."""
        return site.fit(site.model, self, "")

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], loss_of: Callable[..., Tensor]
    ) -> Tensor:
        """Return the loss of a batch, whose gradient is the step's."""
        return loss_of(model, batch)

    def before_step(self, model: nn.Module) -> None:
        """Change the gradients of a step; in private training, those with noise."""

    def after_step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Act after a step; in private training `batch` is empty."""

    def end(self, site: SiteRound) -> Ended:
        """Return what is kept, and what goes back beside the model."""
        return Ended()

    def own(self, model: nn.Module, kept: Tensors) -> nn.Module:
        """Return the model that this site itself uses; it may be `model`, changed in place.

        Parameters
        ----------
        model : Module
            With the global weights, and the site's kept layers.
        kept : dict of str to Tensor
            As in `SiteRound`.
        """
        return model

    # --- At the server ----------------------------------------------------------------------------

    def choose(self, nodes: Sequence[int], server_round: int) -> Sequence[int] | None:
        """Return the nodes that train in a round; None leaves it to the strategy.

        Parameters
        ----------
        nodes : sequence of int
            All nodes that may train, in the order of their sites' names; not empty.
        server_round : int
        """
        return None

    def companions(self, model: ArrayRecord, trained: Sequence[str]) -> dict[str, ArrayRecord]:
        """Return what goes beside the model in the first round, by name.

        Parameters
        ----------
        model : ArrayRecord
        trained : sequence of str
            As in `ServerRound`.
        """
        return {}

    def move(self, server: ServerRound) -> Moved:
        """Return the next model, what goes beside it, and what the server keeps."""
        return Moved(server.model, server.companions, server.state)

    @property
    def touches_again(self) -> bool:
        """Whether it uses patients' rows beside the training that private runs account for."""
        return not self.private or self.defines("train", "loss")

    @classmethod
    def defines(cls, *hooks: str) -> bool:
        """Return whether the class has hooks of its own by one of these names."""
        return any(getattr(cls, hook) is not getattr(Method, hook) for hook in hooks)


PLAIN = Method()
