"""Normalisation in front of a model that keeps its own names."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from fedleak.models.layers import Normalize


def normalized(model: nn.Module, mean: Sequence[float] | float, std: Sequence[float] | float) -> nn.Module:
    """A copy of `model` that takes images in [0, 1] and normalises them first; its parameters keep their names.

    Args:
        model: takes normalised images.
        mean, std: one number a channel, or one for all, on the [0, 1] scale.

    Raises:
        UsageError: the numbers cannot be used.
    """
    means, stds = ([v] if isinstance(v, int | float) else list(v) for v in (mean, std))
    layer = Normalize(means, stds)  # checks them
    kind = type(model)
    one = len(set(means)) == len(set(stds)) == 1

    def forward(self: nn.Module, images: Tensor) -> Tensor:
        # Plain numbers, where they will do, are what the reader of layers follows.
        mean, std = (means[0], stds[0]) if one else (layer.mean.to(images), layer.std.to(images))
        found: Tensor = kind.forward(self, (images - mean) / std)
        return found

    made = copy.deepcopy(model)
    made.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return made
