"""Networks for tables: linear, multi-layer perceptron, and residual.

The residual network is the ResNet of Gorishniy, Rubachev, Khrulkov and Babenko (Revisiting Deep
Learning Models for Tabular Data, NeurIPS 2021, https://arxiv.org/abs/2106.11959), with layer
normalisation in place of batch normalisation, which mixes patients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmed_flower.errors import InputError
from fedmed_flower.settings.tabular import KINDS


def tabular_network(
    kind: str,
    inputs: int,
    outputs: int,
    width: int = 64,
    depth: int = 2,
    dropout: float = 0.0,
    *,
    zeros: bool = False,
) -> nn.Module:
    """Return a network that maps (batch, inputs) to (batch, outputs).

    Parameters
    ----------
    kind : {"linear", "mlp", "residual"}
    inputs, outputs : int
        At least 1.
    width, depth : int
        Width and number of the hidden layers (for ``residual``, of the blocks); at least 1. The
        width of ``residual`` must be at least 2. No effect on ``linear``.
    dropout : float
        Share of hidden values that are left out in training, in [0, 1). No effect on ``linear``.
    zeros : bool
        Whether the last layer starts with zeros, so that all outputs are 0 at first.

    Raises
    ------
    InputError
        If `kind` is unknown or a number is out of its range.
    """
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    numbers = {"inputs": inputs, "outputs": outputs, "width": width, "depth": depth}
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must be at least 0 and below 1, got {dropout}")
    if kind == "residual" and width < 2:
        # Layer normalisation of a single number is always 0.
        raise InputError(f"width must be at least 2 for a residual network, got {width}")
    hidden: list[nn.Module] = []
    if kind == "mlp":
        for size in [inputs] + (depth - 1) * [width]:
            hidden += [nn.Linear(size, width), nn.ReLU(), nn.Dropout(dropout)]
    elif kind == "residual":
        blocks = (_Block(width, dropout) for _ in range(depth))
        hidden = [nn.Linear(inputs, width), *blocks, nn.LayerNorm(width), nn.ReLU()]
    last = nn.Linear(width if hidden else inputs, outputs)
    if zeros:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(*hidden, last) if hidden else last


class _Block(nn.Module):
    """Adds to its input the output of two layers, with twice the width between them."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, values: Tensor) -> Tensor:
        """Return (batch, width)."""
        changed: Tensor = self.layers(values)
        return values + changed


class InUnit(nn.Module):
    """The last layer of a network that predicts numbers: factor * output + shift."""

    def __init__(self, shift: float, factor: float) -> None:
        super().__init__()
        self.shift = shift
        self.factor = factor

    def forward(self, outputs: Tensor) -> Tensor:
        """Return the outputs in the unit, in 32 bits at least, since 16 are too few for it."""
        precise = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return self.factor * precise + self.shift
