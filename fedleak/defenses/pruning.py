"""Gradient pruning: only the largest elements of an update leave the client (Zhu et al. 2019; Lin et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedleak.defenses.base import Defense, Imitation
from fedleak.defenses.masking import Mask
from fedleak.errors import UsageError
from fedleak.training import LocalTraining, Tensors


class Pruning(Defense):
    """Set the smallest-magnitude fraction of every tensor to zero, or of all tensors together.

    Exactly floor(ratio × elements) elements are set to zero, ties by position, so that at least one element of every
    tensor (or of the whole update) is left. It saves traffic. What is sent is exact, so that an update with more
    elements left than the images have unknowns still tells them all.

    Args:
        ratio: the fraction to zero, in [0, 1).
        scope: ``tensor``: of each tensor by itself; ``update``: of all elements together, so that layers with small
            gradients may vanish.
        feedback: error feedback: what was zeroed is added to the client's next change, so that nothing is lost but
            time. What is sent is then exact no more: earlier batches are in it.

    Raises:
        UsageError: `ratio` is outside [0, 1), `scope` is another word, or `feedback` neither true nor false.

    References:
        Zhu, Liu, Han. Deep leakage from gradients. NeurIPS 2019.
        Lin, Han, Mao, Wang, Dally. Deep gradient compression. ICLR 2018.
    """

    knob: ClassVar[str | None] = "ratio"

    def __init__(
        self, ratio: float = 0.9, scope: Literal["tensor", "update"] = "tensor", feedback: bool = False
    ) -> None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise UsageError(f"defense.ratio={ratio} is no fraction to prune; give a number in [0, 1), say 0.9")
        if scope not in ("tensor", "update"):
            raise UsageError(f"defense.scope={scope}: choose one of tensor, update")
        if not isinstance(feedback, bool):
            raise UsageError(f"defense.feedback={feedback}: must be true or false")
        self.ratio, self.scope, self.feedback = float(ratio), scope, feedback

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        """The largest elements, and zeros."""
        masks = self._masks(update)
        return {name: torch.where(masks[name], value, torch.zeros_like(value)) for name, value in update.items()}

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """The mask that the zeros of the observed update show; with noise on top, its smallest elements.

        A zeroed element was no larger than the smallest kept one, t. Its noise is that of a uniform draw from [−t, t],
        t / √3, for an attacker who would weigh it; the mask makes it nothing in either update. Under error feedback as
        much may have been carried over from earlier rounds into a kept one.
        """
        masks = self._masks(observed)
        noise: dict[str, Tensor | float] = {}
        least = {n: v[masks[n]].abs().amin() if bool(masks[n].any()) else torch.inf for n, v in observed.items()}
        if self.scope == "update":
            lowest = min((float(v) for n, v in least.items() if observed[n].is_floating_point()), default=0.0)
            least = dict.fromkeys(least, torch.tensor(lowest))
        for name, mask in masks.items():
            size = least[name] / 3**0.5
            noise[name] = torch.where(mask, size if self.feedback else 0.0, size)
        return Imitation(Mask(masks), noise)

    def _masks(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> which elements are not zeroed."""
        if self.scope == "tensor":
            return {name: self._kept(value) for name, value in update.items()}
        floats = {name: value for name, value in update.items() if value.is_floating_point()}
        found = {name: torch.ones_like(value, dtype=torch.bool) for name, value in update.items()}
        if floats:
            together = self._kept(torch.cat([value.flatten() for value in floats.values()]))
            parts = together.split([value.numel() for value in floats.values()])
            found |= {n: part.view(floats[n].shape) for n, part in zip(floats, parts, strict=True)}
        return found

    def _kept(self, value: Tensor) -> Tensor:
        """Which elements are not zeroed."""
        count = int(self.ratio * value.numel() + 1e-9)  # 0.29 * 100 is 28.999… in binary
        if not value.is_floating_point() or count == 0:
            return torch.ones_like(value, dtype=torch.bool)
        sizes = value.abs().flatten()
        least = sizes.kthvalue(count).values  # much faster than sorting
        below, ties = sizes < least, sizes == least
        first = ties & (ties.cumsum(0) <= count - below.sum())
        return ~(below | first).view(value.shape)
