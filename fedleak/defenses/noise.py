"""Additive noise on every element of an update (the first defenses that Zhu et al. 2019, DLG, tried)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedleak.defenses.base import Defense, Imitation, non_negative
from fedleak.training import LocalTraining


class Noise(Defense):
    """`strength` × independent unit noise on every element of every floating-point tensor.

    Integer tensors (BatchNorm's counters, say) stay as they are.
    """

    unit_std: ClassVar[float] = 1.0
    """Standard deviation of unit noise."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    @abstractmethod
    def sample(self, empty: Tensor, generator: torch.Generator) -> Tensor:
        """Unit noise of the shape, dtype and device of `empty`, which may be filled in place."""

    def apply(self, update: dict[str, Tensor], *, generator: torch.Generator) -> dict[str, Tensor]:
        result = dict(update)
        for name, value in update.items():
            if self.strength > 0 and value.is_floating_point():
                # Drawn where the generator lives and in at least float32: the same noise whatever the update's device.
                dtype = torch.promote_types(value.dtype, torch.float32)
                noise = self.sample(torch.empty(value.shape, dtype=dtype, device=generator.device), generator)
                result[name] = value + (self.strength * noise).to(value)
        return result

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """The update itself: noise has mean zero."""
        std = self.strength * self.unit_std
        return Imitation(dict, {name: std if value.is_floating_point() else 0.0 for name, value in observed.items()})


class Gaussian(Noise):
    """Independent N(0, std²) noise on every element.

    Args:
        std: standard deviation, in the units of the update; 0 adds nothing.

    Raises:
        UsageError: `std` is negative or not finite.
    """

    knob: ClassVar[str | None] = "std"

    def __init__(self, std: float = 0.01) -> None:
        super().__init__(non_negative("defense.std", std))

    def sample(self, empty: Tensor, generator: torch.Generator) -> Tensor:
        return empty.normal_(generator=generator)


class Laplacian(Noise):
    """Independent Laplace(0, scale) noise on every element; its standard deviation is √2 · scale.

    Args:
        scale: the distribution's scale (mean absolute value), in the units of the update; 0 adds nothing.

    Raises:
        UsageError: `scale` is negative or not finite.
    """

    unit_std = 2**0.5
    knob: ClassVar[str | None] = "scale"

    def __init__(self, scale: float = 0.01) -> None:
        super().__init__(non_negative("defense.scale", scale))

    def sample(self, empty: Tensor, generator: torch.Generator) -> Tensor:
        # The difference of two unit exponentials is a unit Laplace variable, and never infinite.
        other = torch.empty_like(empty).exponential_(generator=generator)
        return empty.exponential_(generator=generator) - other
