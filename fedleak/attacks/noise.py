"""What separates an observed update from that of the true images: rounding, and what a defense left or took away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.attacks.problem import Target
from fedleak.defenses.masking import Mask

_ROUNDING = 4e-8
"""Standard deviation of a float32 gradient's rounding, in units of its tensor's largest element (measured)."""
_SEEN = 3.0
"""Noise in the last layer that is so many times rounding is a defense's."""


@dataclass(frozen=True)
class Noise:
    """The noise of one update.

    Attributes:
        std: name -> standard deviation of the tensor, ``[]``, or of each of its elements ``[n]``; infinite where an
            element was withheld.
        granted: whether a defense's noise is known; otherwise the scale is to be checked against the residual.
    """

    std: Mapping[str, Tensor]
    granted: bool

    def precision(self) -> dict[str, Tensor]:
        """name -> inverse variance, zero where an element was withheld."""
        return {name: value**-2.0 for name, value in self.std.items()}


def noise_of(target: Target, samples: int) -> Noise:
    """The noise model of an update: float32 rounding, and a defense's noise where it is granted or can be seen.

    An element that is exactly zero where a fifth of its tensor is was pruned or masked: it tells nothing. A batch
    smaller than the number of classes gives the last layer a gradient of its rank; what the gradient holds beyond that
    rank is noise.

    Args:
        target: the update.
        samples: B.
    """
    rounded = {name: rounding(target, name) for name in target.update}
    extra: dict[str, Tensor] = {name: torch.zeros((), dtype=torch.float64) for name in rounded}
    if target.noise is not None:
        extra = {n: torch.as_tensor(target.noise.get(n, 0.0), dtype=torch.float64) for n in rounded}
    elif (seen := _beyond_rank(target, samples)) is not None:
        name, std = seen
        if std > _SEEN * float(rounded[name]):
            extra = dict.fromkeys(rounded, torch.tensor(std, dtype=torch.float64))
    found: dict[str, Tensor] = {}
    for name, value in target.update.items():
        whole = (rounded[name].square() + extra[name].square()).sqrt()
        withheld = value == 0
        known = isinstance(target.imitate, Mask)
        if known:
            withheld = ~target.imitate.kept[name].cpu() & (extra[name] == 0)  # type: ignore[union-attr]
        if known or bool(withheld.double().mean() > 0.2):
            whole = torch.where(withheld.flatten(), torch.inf, whole.flatten() if whole.dim() else whole)
        found[name] = whole.flatten() if whole.dim() else whole
    return Noise(found, target.noise is not None)


def rounding(target: Target, name: str) -> Tensor:
    """Standard deviation that float32 leaves in a tensor of the mean gradient, ``[]``."""
    value, training = target.update[name].double(), target.training
    square = (_ROUNDING * value.abs().amax()).square()
    if training.payload == "weights":
        step = torch.finfo(torch.float32).eps / 4
        weights = target.parameters[name].double().square().mean().sqrt()
        unknown = training.lr if training.steps is None else None  # see `LocalTraining.mean_gradient`
        square = square + (step * weights / (training.scale or unknown or 1.0)).square()
    return square.sqrt().clamp(min=1e-30).cpu()


def _beyond_rank(target: Target, samples: int) -> tuple[str, float] | None:
    """(name, standard deviation) of what the last layer's gradient holds beyond a batch's rank."""
    names = [name for name, value in target.update.items() if value.dim() == 2]
    if not names or not target.training.single:
        return None
    gradient = target.update[names[-1]].double()
    rows, columns = gradient.shape
    if 2 * samples > min(rows, columns) or bool((gradient == 0).double().mean() > 0.2):
        return None
    values = torch.linalg.svdvals(gradient)[samples:]
    return names[-1], float((values.square().sum() / ((rows - samples) * (columns - samples))).sqrt())
