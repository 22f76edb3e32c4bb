"""Distances between updates: what gradient matching minimises.

An objective is a function of three inner products per parameter tensor, so that no path has to hold a full gradient
only to compare it, and so that small distances keep their precision (nothing is obtained by subtracting large squares).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor


class Objective(ABC):
    """Distance between the dummy update G and the observed one T, for P problems at once.

    Subclass it in a file of your own and name it by ``_target_``.
    """

    needs_scale = True
    """Whether the size of the gradients matters, and not their direction alone."""

    @abstractmethod
    def __call__(self, dd: Tensor, dt: Tensor, tt: Tensor) -> Tensor:
        """The distance of each problem, differentiable in `dd` and `dt`.

        Args:
            dd: ``[P, K]``, ‖G − T‖² of each of the K parameter tensors, in the model's order.
            dt: ``[P, K]``, ⟨G − T, T⟩.
            tt: ``[P, K]``, ‖T‖².

        Returns:
            ``[P]``, zero where the updates agree.
        """


class Elementwise(Objective):
    """A distance that inner products do not tell, such as one of absolute values; only the general path has it.

    Subclass it in a file of your own and name it by ``_target_``.
    """

    @abstractmethod
    def elementwise(self, gap: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
        """The distance ``[P]``, differentiable in `gap`, zero where that is.

        Args:
            gap: name -> ``[P, ...]``, G − T.
            target: name -> ``[P, ...]``, T.
        """

    def __call__(self, dd: Tensor, dt: Tensor, tt: Tensor) -> Tensor:
        """Refused: products are not enough."""
        raise TypeError(f"{type(self).__name__} compares element by element")


class L2(Objective):
    """Sum of squared differences (Zhu 2019, DLG; Zhao 2020, iDLG).

    Args:
        relative: divide by ‖T‖², so that a tolerance means the same whatever the size of the gradients.
    """

    def __init__(self, *, relative: bool = False) -> None:
        self.relative = relative

    def __call__(self, dd: Tensor, dt: Tensor, tt: Tensor) -> Tensor:
        """Σ‖G − T‖² (over ‖T‖² where relative), ``[P]``."""
        square = dd.sum(1)
        return square / tt.sum(1).clamp_min(torch.finfo(tt.dtype).tiny) if self.relative else square


class RelativeL2(Objective):
    """Squared differences of each tensor over the square of its own norm, averaged: every layer counts the same."""

    def __call__(self, dd: Tensor, dt: Tensor, tt: Tensor) -> Tensor:
        """Mean over tensors of ‖G − T‖² / ‖T‖², ``[P]``."""
        return (dd / tt.clamp_min(torch.finfo(tt.dtype).tiny)).mean(1)


class Cosine(Objective):
    """One minus the cosine of the angle between the whole updates (Geiping 2020); blind to their scale."""

    needs_scale = False

    def __call__(self, dd: Tensor, dt: Tensor, tt: Tensor) -> Tensor:
        """1 − ⟨G, T⟩ / (‖G‖ ‖T‖), ``[P]``, in [0, 2]; 1 where an update is zero."""
        dd, dt, tt = dd.sum(1), dt.sum(1), tt.sum(1)
        tiny = torch.finfo(tt.dtype).tiny ** 0.5
        norm_t = tt.clamp_min(tiny).sqrt()
        norm_g = (tt + 2 * dt + dd).clamp_min(tiny).sqrt()
        # 1 - cos = (‖G − T‖² − (‖G‖ − ‖T‖)²) / (2 ‖G‖ ‖T‖), and ‖G‖ − ‖T‖ = (‖G − T‖² + 2⟨G − T, T⟩) / (‖G‖ + ‖T‖):
        # exact, and free of the cancellation that stops the textbook form at 1e-7 in float32.
        gap = (dd + 2 * dt) / (norm_g + norm_t)
        return (dd - gap**2) / (2 * norm_g * norm_t)
