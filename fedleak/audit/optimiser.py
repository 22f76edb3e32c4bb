"""Which kind of optimiser leaves such a change: read off the sums over the classes of the last layer.

Softmax and cross-entropy make ∂L/∂W of the last layer sum to zero over the classes, and so does every change that is
linear in it: SGD's, with momentum or a proximal term. Weight decay adds a multiple of the weights' own sum; Adam makes
steps of one size; noise adds noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedleak.attacks.labels.last_layer import LastLayer
from fedleak.training import Tensors

Kind = Literal["linear", "decay", "change", "adaptive", "noise", "other"]


@dataclass(frozen=True)
class Trace:
    """What the last layer's change says of how it came about.

    Attributes:
        kind: ``linear`` in the gradients; with weight ``decay``; a ``change`` taken for weights; ``adaptive`` steps;
            with ``noise``; ``other``.
        sum: norm of the sums over the classes, over the norm of the change.
        decay: by what share of themselves the weights shrank, where `kind` is ``decay``.
        noise: standard deviation of an element, where `kind` is ``noise``.
        heavy: whether some elements changed far more than most, as no adaptive step lets them.
    """

    kind: Kind
    sum: float
    decay: float = 0.0
    noise: float = 0.0
    heavy: bool = True


def read_trace(
    layer: LastLayer, start: Tensors, change: Tensors, payload: str, steps: int, *, half: bool = False
) -> Trace:
    """Which kind of optimiser left `change`.

    Args:
        layer: the last layer.
        start: the parameters that training started from.
        change: what was added to them.
        payload: ``weights`` carry the rounding of the weights, the others their own only.
        steps: about how many there were.
        half: whether numbers travelled in 16 bits.
    """
    moved, held = _joined(layer, change), _joined(layer, start)
    size = float(moved.norm())
    sums, weights = moved.sum(dim=0), held.sum(dim=0)
    relative = float(sums.norm()) / size
    unit = 5e-4 if half else 5e-8
    carried = float(held.norm()) * max(1, steps) ** 0.5 if payload == "weights" else 0.0
    rounding = unit * (carried + size) / size
    every = torch.cat([value.flatten() for value in change.values()]).double()
    active = every[every != 0]
    heavy = float(active.abs().max() / active.square().mean().sqrt()) > 3.3
    if relative < max(2e-5, 8 * rounding):
        return Trace("linear", relative, heavy=heavy)
    share = float(sums @ weights / weights.square().sum()) if float(weights.norm()) > 0 else 0.0
    rest = float((sums - share * weights).norm() / sums.norm())
    if rest < 0.2 and share < -0.5:
        return Trace("change", relative, heavy=heavy)
    if not heavy and len(active) > 100:
        return Trace("adaptive", relative, heavy=heavy)
    if rest < 0.2 and share < 0:
        return Trace("decay", relative, decay=-share, heavy=heavy)
    spread = float(sums.square().mean().sqrt())
    quiet = moved.norm(dim=0) <= moved.norm(dim=0).quantile(0.25)
    # Noise does not care how much a feature was used; what else breaks the sum goes along with it.
    if float(sums[quiet].square().mean().sqrt()) > 0.35 * spread:
        return Trace("noise", relative, noise=spread / len(moved) ** 0.5, heavy=heavy)
    return Trace("other", relative, heavy=heavy)


def _joined(layer: LastLayer, tensors: Tensors) -> Tensor:
    """``[C, d + 1]`` in float64: the layer's weights, and its bias as one more column."""
    weight = tensors[layer.weight].double()
    return torch.cat([weight, tensors[layer.bias].double()[:, None]], dim=1) if layer.bias else weight
