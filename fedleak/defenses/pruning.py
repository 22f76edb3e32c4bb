"""Gradient pruning: only the largest elements of an update leave the client (Zhu et al. 2019; Lin et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedleak.defenses.base import Defense, Imitation
from fedleak.errors import UsageError
from fedleak.training import LocalTraining, Tensors


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

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        return {name: torch.where(self._kept(value), value, torch.zeros_like(value)) for name, value in update.items()}

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """The mask that the zeros of the observed update show; with noise on top, its smallest elements.

        A zeroed element was no larger than the smallest kept one, t. Its noise is that of a uniform draw from [−t, t],
        t / √3, for an attacker who would weigh it; the mask makes it nothing in either update.
        """
        masks = {name: self._kept(value) for name, value in observed.items()}

        def function(update: Tensors) -> Tensors:
            return {name: torch.where(masks[name], value, torch.zeros_like(value)) for name, value in update.items()}

        noise: dict[str, Tensor | float] = {}
        for name, value in observed.items():
            threshold = value[masks[name]].abs().amin() if value.numel() else 0.0
            noise[name] = torch.where(masks[name], 0.0, threshold / 3**0.5)
        return Imitation(function, noise)

    def _kept(self, value: Tensor) -> Tensor:
        """Which elements are not zeroed."""
        kept = torch.ones(value.numel(), dtype=torch.bool, device=value.device)
        if value.is_floating_point():
            count = int(self.ratio * value.numel() + 1e-9)  # 0.29 * 100 is 28.999… in binary
            kept[value.abs().flatten().argsort(stable=True)[:count]] = False
        return kept.view(value.shape)
