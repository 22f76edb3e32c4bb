"""Gradient pruning: only the largest elements of an update leave the client (Zhu et al. 2019; Lin et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.defenses.base import Defense
from fedleak.errors import UsageError


class Pruning(Defense):
    """Set the smallest-magnitude fraction of every tensor to zero, each tensor by itself, without error feedback.

    Exactly floor(ratio × elements) of a tensor's elements are set to zero, ties by position, so that at least one
    element of every tensor is left.

    Args:
        ratio: the fraction to zero, in [0, 1).

    Raises:
        UsageError: `ratio` is outside [0, 1).
    """

    def __init__(self, ratio: float = 0.9) -> None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise UsageError(f"defense.ratio={ratio} is no fraction to prune; give a number in [0, 1), say 0.9")
        self.ratio = float(ratio)

    def apply(self, update: dict[str, Tensor], *, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: self._prune(value) for name, value in update.items()}

    def _prune(self, value: Tensor) -> Tensor:
        count = int(self.ratio * value.numel() + 1e-9)  # 0.29 * 100 is 28.999… in binary
        if count == 0 or not value.is_floating_point():
            return value
        smallest = value.abs().flatten().argsort(stable=True)[:count]
        pruned = value.flatten().clone()
        pruned[smallest] = 0
        return pruned.view(value.shape)
