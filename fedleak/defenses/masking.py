"""Random masking: a random part of an update stays at home (Konečný et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedleak.defenses.base import Defense, Imitation
from fedleak.errors import UsageError
from fedleak.training import LocalTraining, Tensors


class Masking(Defense):
    """A random fraction of every tensor's elements is set to zero, drawn anew for every update.

    What is sent is exact, so that an update with more elements left than the images have unknowns still tells them all.

    Args:
        ratio: the probability of each element to be zeroed, in [0, 1).
        rescale: divide what is left by 1 − `ratio`, so that the update is right on average.

    Raises:
        UsageError: `ratio` is outside [0, 1), or `rescale` neither true nor false.

    References:
        Konečný, McMahan, Yu, Richtárik, Suresh, Bacon. Federated learning: Strategies for improving communication
        efficiency. 2016.
    """

    knob: ClassVar[str | None] = "ratio"

    def __init__(self, ratio: float = 0.9, rescale: bool = False) -> None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise UsageError(f"defense.ratio={ratio} is no fraction to mask; give a number in [0, 1), say 0.9")
        if not isinstance(rescale, bool):
            raise UsageError(f"defense.rescale={rescale}: must be true or false")
        self.ratio, self.rescale = float(ratio), rescale

    @property
    def _factor(self) -> float:
        return 1 / (1 - self.ratio) if self.rescale else 1.0

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        """Kept where a uniform draw is at least `ratio`."""
        result = dict(update)
        for name, value in update.items():
            if value.is_floating_point():
                drawn = torch.rand(value.shape, generator=generator, device=generator.device)
                kept = (drawn >= self.ratio).to(value.device)
                result[name] = torch.where(kept, self._factor * value, torch.zeros_like(value))
        return result

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """The mask that the zeros of the observed update show."""
        return masked(observed, self._factor)


@dataclass(frozen=True, eq=False)
class Mask:
    """Sets elements of an update to zero; one that a fast path may look into.

    Attributes:
        kept: name -> which elements are left.
        factor: what these are multiplied with.
    """

    kept: Mapping[str, Tensor]
    factor: float = 1.0

    def __call__(self, update: Tensors) -> Tensors:
        return {
            n: torch.where(self.kept[n].to(v.device), self.factor * v, torch.zeros_like(v)) for n, v in update.items()
        }


def masked(observed: Mapping[str, Tensor], factor: float = 1.0) -> Imitation:
    """Elements that are zero in the observed update are zero in every other too; of these, nothing is known.

    Args:
        observed: name -> tensor.
        factor: what the others were multiplied with.
    """
    return Imitation(Mask({n: value != 0 for n, value in observed.items()}, factor), dict.fromkeys(observed, 0.0))
