"""Clipping a whole update to a norm (McMahan et al. 2018, who clip before they add noise)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedleak.defenses.base import Defense, Imitation, positive
from fedleak.training import LocalTraining, Tensors

_AT_THE_NORM = 1e-4
"""How near its norm an update must be, relatively, to have been clipped: float32 rounds."""


class Clipping(Defense):
    """The update, all its tensors together, shrunk to an ℓ2 norm of at most `norm`.

    It bounds what one client can do to the model, and is half of differential privacy. By itself it hides one number,
    the size of the update: the direction is untouched, and images follow from the direction.

    Args:
        norm: the largest ℓ2 norm that leaves the client, in the units of the update.

    Raises:
        UsageError: `norm` is not above 0, or not finite.

    References:
        McMahan, Ramage, Talwar, Zhang. Learning differentially private recurrent language models. ICLR 2018.
    """

    knob: ClassVar[str | None] = "norm"

    def __init__(self, norm: float = 1.0) -> None:
        self.norm = positive("defense.norm", norm)

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        """Shrunk by one factor for all tensors, which is 1 below the norm."""
        factor = min(1.0, self.norm / max(norm_of(update), 1e-300))
        return {n: value * factor if value.is_floating_point() else value for n, value in update.items()}

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """Any update at the observed norm where that is the clipping norm: the size before is not known."""
        clipped = norm_of(observed) >= self.norm * (1 - _AT_THE_NORM)
        return Imitation(Sized(observed) if clipped else dict, dict.fromkeys(observed, 0.0))


class Sized:
    """Sends every update to the norm of the observed one; differentiable.

    Args:
        observed: name -> tensor.
    """

    def __init__(self, observed: Mapping[str, Tensor]) -> None:
        self.norm = norm_of(observed)

    def __call__(self, update: Tensors) -> Tensors:
        square = torch.stack([v.square().sum() for v in update.values() if v.is_floating_point()]).sum()
        factor = self.norm / square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
        return {n: v * factor if v.is_floating_point() else v for n, v in update.items()}


def norm_of(update: Mapping[str, Tensor]) -> float:
    """The ℓ2 norm of all floating-point tensors together."""
    return float(sum(float(v.double().square().sum()) for v in update.values() if v.is_floating_point())) ** 0.5
