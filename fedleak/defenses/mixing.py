"""MixUp: a client trains on blends of its images (Zhang et al. 2018), and so never shows one by itself."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedleak.defenses.base import Defense, positive
from fedleak.seeding import numpy_generator


class MixUp(Defense):
    """Every image of a batch blended with another one of it, and its label alike: λ x + (1 − λ) x', λ of the batch.

    It helps a model to generalise, and hides that an image is in a batch by itself: an attack rebuilds the blends. What
    it cannot: a blend near λ = 1 is the image, and one sample alone in its batch has nothing to be blended with.

    Args:
        alpha: λ is drawn from Beta(alpha, alpha) for each local step: near 0 or 1 below 1, near one half above.

    Raises:
        UsageError: `alpha` is not above 0.

    References:
        Zhang, Cisse, Dauphin, Lopez-Paz. mixup: Beyond empirical risk minimization. ICLR 2018.
    """

    knob: ClassVar[str | None] = "alpha"

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = positive("defense.alpha", alpha)

    def data(
        self, images: Tensor, labels: Tensor, *, classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Blends of one local step's batch; label shares ``[B, classes]``."""
        share = self._share(generator)
        other = torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)
        hot = labels if labels.dim() == 2 else one_hot(labels, classes).to(images)
        return share * images + (1 - share) * images[other], share * hot + (1 - share) * hot[other]

    def _share(self, generator: torch.Generator) -> float:
        """A draw from Beta(alpha, alpha)."""
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        return float(numpy_generator(seed).beta(self.alpha, self.alpha))
