"""When the model of a round is validated, and what cannot be validated with the next training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ConfigRecord, Message

from fedmed_flower.errors import InputError
from fedmed_flower.methods.base import Method
from fedmed_flower.wire import OWN, VALIDATE

WITHOUT = 'set validate="own"'


def refusal(
    name: str,
    *,
    fraction_train: float,
    fraction_evaluate: float,
    buffer: int,
    secure: bool,
    own_draw: bool,
    method: Method | None,
) -> str | None:
    """Return why a strategy cannot validate a model with the training on it; None if it can.

    Parameters
    ----------
    name : str
        The strategy's.
    fraction_train, fraction_evaluate, buffer
        Arguments of the strategy.
    secure : bool
        Whether sites reply in secure sums.
    own_draw : bool
        Whether the strategy chooses the sites of a round in a way of its own.
    method : Method or None
        None if the strategy has none.
    """
    for key, value, why in (
        ("fraction_train", fraction_train, "only a site that trains on a model validates it"),
        ("fraction_evaluate", fraction_evaluate, "each site that trains on a model validates it"),
    ):
        if value != 1:
            return f'{key} must be 1 with validate="next", got {value:g}: {why}; or {WITHOUT}'
    if buffer:
        return (
            'validate="next" excludes buffer: in asynchronous rounds sites train on models of '
            f"several rounds at a time; {WITHOUT}, or leave buffer out"
        )
    if secure:
        return (
            'validate="next" excludes secure="sum": a secure sum is of one kind of numbers, the '
            f"change of the model or the figures; {WITHOUT}"
        )
    if own_draw:
        return (
            f'validate="next" excludes {name}, which draws the sites of a round by a law of its '
            f"own, so that figures of two rounds would be of different sites; {WITHOUT}"
        )
    if method is not None and method.defines("choose"):
        return (
            f'validate="next" excludes the method {method.name}, in which not every site trains '
            f"in each round; {WITHOUT}"
        )
    return None


def require_one_config(train_config: ConfigRecord, evaluate_config: ConfigRecord) -> None:
    """Refuse a config of evaluation that a training message does not hold.

    Raises
    ------
    InputError
        A site both trains and validates by the one config of the message.
    """
    kept: dict[str, Any] = dict(train_config)
    for key, value in evaluate_config.items():
        if key not in kept or kept[key] != value:
            raise InputError(
                'evaluate_config must hold nothing with validate="next" that train_config does not '
                f"hold too, got {key}={value!r}: a site reads one config for both; add it to "
                f"train_config, or {WITHOUT}"
            )


def ask(messages: Iterable[Message], config_key: str, own: bool) -> tuple[int, ...]:
    """Let training messages also ask for validation of the model that they hold.

    Parameters
    ----------
    messages : iterable of Message
        Each with a config of its own, which is changed.
    config_key : str
        Name of the config's record.
    own : bool
        Whether each site's own model is meant.

    Returns
    -------
    tuple of int
        The nodes that are asked.
    """
    nodes: dict[int, None] = {}
    for message in messages:
        config = message.content.config_records[config_key]
        config[VALIDATE] = True
        if own:
            config[OWN] = True
        nodes[message.metadata.dst_node_id] = None
    return tuple(nodes)
