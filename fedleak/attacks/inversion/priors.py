"""Regularisers on images: what the attacker believes of private images before it sees an update."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Prior(ABC):
    """A penalty added to the objective. Subclass it in a file of your own and name it by ``_target_``.

    Args:
        weight: what the penalty is multiplied with.
    """

    def __init__(self, *, weight: float) -> None:
        self.weight = weight

    @abstractmethod
    def penalty(self, images: Tensor) -> Tensor:
        """The unweighted penalty ``[P]`` of ``[P, B, C, H, W]`` images, differentiable."""

    def __call__(self, images: Tensor) -> Tensor:
        """The weighted penalty, ``[P]``."""
        return self.weight * self.penalty(images)


class TotalVariation(Prior):
    """Mean absolute difference of neighbouring pixels, vertical plus horizontal (Geiping 2020)."""

    def penalty(self, images: Tensor) -> Tensor:
        """Anisotropic total variation per pixel pair, averaged over the batch, ``[P]``."""
        down = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).mean(1)
        right = (images[..., :, 1:] - images[..., :, :-1]).abs().flatten(1).mean(1)
        return down + right


class ImageNorm(Prior):
    """Mean squared distance from mid-grey (the ℓ2 prior of Yin 2021, centred on the middle of the image range)."""

    def penalty(self, images: Tensor) -> Tensor:
        """Mean of (x − 0.5)², ``[P]``."""
        return (images - 0.5).square().flatten(1).mean(1)


class SmoothTotalVariation(Prior):
    """Mean length of the colour gradient, √(Σ_channels (∂x/∂row)² + (∂x/∂column)² + ε²) − ε.

    Edges of the colours are sought in the same places, and quasi-Newton methods can follow it, which they cannot where
    the plain form has its kinks.

    Args:
        weight: what the penalty is multiplied with.
        epsilon: differences well below this cost next to nothing.
    """

    def __init__(self, *, weight: float, epsilon: float = 0.01) -> None:
        super().__init__(weight=weight)
        self.epsilon = epsilon

    def penalty(self, images: Tensor) -> Tensor:
        """Mean over pixels and batch, ``[P]``."""
        down = images[..., 1:, :-1] - images[..., :-1, :-1]
        right = images[..., :-1, 1:] - images[..., :-1, :-1]
        square = (down.square() + right.square()).sum(2)
        return ((square + self.epsilon**2).sqrt() - self.epsilon).flatten(1).mean(1)
