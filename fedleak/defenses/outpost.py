"""OUTPOST: pruning, and noise where the Fisher information is largest and the weights spread most."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedleak.defenses.base import ClientView, Defense, Imitation, non_negative
from fedleak.defenses.masking import Mask
from fedleak.errors import UsageError
from fedleak.training import LocalTraining, Tensors


class Outpost(Defense):
    """In every local step: the smallest elements of every tensor to zero, and noise on those that tell most.

    The noise is normal, with a standard deviation of `noise` times the tensor's risk, min(1, variance of its weights),
    on the elements whose Fisher information (mean square over samples) is among the largest `fisher` of all elements.
    It protects early rounds at a small cost; like any noise it can be averaged over, and what it leaves alone is exact.

    Args:
        noise: the largest standard deviation, in the units of the gradient.
        fisher: fraction of all elements that get noise, in [0, 1].
        ratio: fraction of every tensor that is zeroed, in [0, 1).

    Raises:
        UsageError: a strength outside its range, or it is used without a client's weights (see `Defense.seeing`).

    References:
        Wang, Hugh, Li. More than enough is too much: Adaptive defenses against gradient leakage in production federated
        learning. INFOCOM 2023. Its decay over iterations is not part of this.
    """

    knob: ClassVar[str | None] = "noise"

    def __init__(self, noise: float = 0.8, fisher: float = 0.4, ratio: float = 0.8) -> None:
        self.noise = non_negative("defense.noise", noise)
        for key, value, most in (("fisher", fisher, 1.0), ("ratio", ratio, 1.0 - 1e-9)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise UsageError(f"defense.{key}={value} is no fraction; give a number in [0, 1), say 0.4")
        self.fisher, self.ratio = float(fisher), float(ratio)
        self.risk: Mapping[str, float] | None = None

    def seeing(self, client: ClientView) -> Defense:
        """The risk of every tensor, from the weights it starts from."""
        found = copy.copy(self)
        found.risk = {
            n: min(1.0, float(v.double().var())) if v.numel() > 1 else 0.0 for n, v in client.parameters.items()
        }
        return found

    def examples(self, gradients: Tensors, *, generator: torch.Generator) -> Tensors:
        """Gradients whose mean is the defended one; each keeps its distance from the mean."""
        risk = self._risks()
        means = {name: value.mean(0) for name, value in gradients.items()}
        noisy = self._largest({name: value.square().mean(0) for name, value in gradients.items()})
        result = {}
        for name, value in gradients.items():
            mean = means[name]
            kept = self._kept(mean)
            drawn = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
            defended = torch.where(kept, mean, torch.zeros_like(mean)) + self.noise * risk[name] * drawn * noisy[name]
            result[name] = value + (defended - mean)
        return result

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """The mask of its zeros, and noise on as many of its largest elements as get noise."""
        risk = self._risks()
        size = (training.lr or 1.0) if training.payload == "weights" else 1.0
        noisy = self._largest({name: value.square() for name, value in observed.items()})
        std = self.noise * size * (training.steps or 1) ** 0.5
        noise: dict[str, Tensor | float] = {n: std * risk[n] * noisy[n].to(v) for n, v in observed.items()}
        return Imitation(Mask({name: value != 0 for name, value in observed.items()}), noise)

    def _risks(self) -> Mapping[str, float]:
        if self.risk is None:
            raise UsageError("defense=outpost looks at the client's weights; use what `seeing` returns")
        return self.risk

    def _largest(self, information: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> which elements have the largest Fisher information of all."""
        together = torch.cat([value.flatten() for value in information.values()])
        count = int(self.fisher * together.numel() + 1e-9)
        if not count:
            return {name: torch.zeros_like(value, dtype=torch.bool) for name, value in information.items()}
        least = together.topk(count).values[-1]
        return {name: value >= least for name, value in information.items()}

    def _kept(self, value: Tensor) -> Tensor:
        count = int(self.ratio * value.numel() + 1e-9)
        kept = torch.ones(value.numel(), dtype=torch.bool, device=value.device)
        kept[value.abs().flatten().argsort(stable=True)[:count]] = False
        return kept.view(value.shape)
