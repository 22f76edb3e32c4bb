"""Differential privacy: DP-SGD inside every local step, and local privacy of the whole update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedleak.defenses.accountant import gaussian_epsilon, reconstruction_bound
from fedleak.defenses.base import Defense, Imitation, non_negative, positive
from fedleak.defenses.clipping import norm_of
from fedleak.errors import UsageError
from fedleak.training import LocalTraining, Tensors


class DPSGD(Defense):
    """DP-SGD: every sample's gradient clipped to an ℓ2 norm, and Gaussian noise on their sum, in every local step.

    It protects every sample, against whoever sees the updates of all rounds, by (ε, δ) as `epsilon` says. It does not
    hide what many samples have in common. Each client counts for itself: nothing is gained from the others' noise.

    Args:
        noise: standard deviation of the noise over the clipping norm (noise multiplier); 0 clips only: ε is infinite.
        norm: the clipping norm of a sample's gradient, all tensors together.

    Raises:
        UsageError: `noise` is negative, `norm` is not above 0, or either is not finite.

    References:
        Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang. Deep learning with differential privacy. CCS 2016.
    """

    knob: ClassVar[str | None] = "noise"

    def __init__(self, noise: float = 1.0, norm: float = 1.0) -> None:
        self.noise, self.norm = non_negative("defense.noise", noise), positive("defense.norm", norm)

    def examples(self, gradients: Tensors, *, generator: torch.Generator) -> Tensors:
        """Clipped, and each with its share of the noise: that of the sum is `noise` times `norm`."""
        sizes = torch.stack([g.flatten(1).double().square().sum(1) for g in gradients.values()]).sum(0).sqrt()
        factor = (self.norm / sizes.clamp_min(1e-300)).clamp_max(1.0)
        result = {}
        for name, value in gradients.items():
            shape = (-1, *[1] * (value.dim() - 1))
            drawn = torch.randn(value.shape, generator=generator, device=generator.device).to(value)
            share = self.noise * self.norm / len(value) ** 0.5
            result[name] = value * factor.to(value).view(shape) + share * drawn
        return result

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """The mean clipped, which is right for one sample, and the noise of a step's mean, of all steps together.

        In a batch each sample is clipped by itself: where large gradients meet small ones, this is an approximation.
        """
        size = training.batch_size or 1
        std = self.noise * self.norm / size * (training.steps or 1) ** 0.5
        if training.payload == "weights":
            std *= training.lr or 1.0
        most = self.norm * (training.steps or 1) * ((training.lr or 1.0) if training.payload == "weights" else 1.0)
        return Imitation(Shrunk(most), dict.fromkeys(observed, std))

    def epsilon(self, *, rounds: int, local_steps: int, sample_rate: float, delta: float) -> float | None:
        """ε of every sample of a client after all rounds, by the accountant of Rényi's privacy."""
        return gaussian_epsilon(
            noise_multiplier=self.noise, sample_rate=sample_rate, steps=rounds * local_steps, delta=delta
        )

    def reconstruction(self, *, rounds: int, local_steps: int, sample_rate: float, guess: float) -> float | None:
        """Of every sample of a client after all rounds, see `reconstruction_bound`."""
        return reconstruction_bound(
            noise_multiplier=self.noise, sample_rate=sample_rate, steps=rounds * local_steps, guess=guess
        )


class LocalDP(Defense):
    """Local differential privacy: the whole update clipped to a norm, with noise for (ε, δ) of this one update.

    Any two updates are at most twice the norm apart, and the noise is that of the Gaussian mechanism for that distance.
    It protects all that is in the update, from the server too. Over many rounds ε grows, as `epsilon` says.

    Args:
        epsilon: of one update.
        delta: of one update.
        norm: the clipping norm.

    Raises:
        UsageError: `epsilon` or `norm` is not a finite number above 0, or `delta` not in (0, 1).

    References:
        Dwork, Roth. The algorithmic foundations of differential privacy. 2014, appendix A (the Gaussian mechanism).
    """

    knob: ClassVar[str | None] = "epsilon"

    def __init__(self, epsilon: float = 100.0, delta: float = 1e-5, norm: float = 1.0) -> None:
        self.each, self.norm = positive("defense.epsilon", epsilon), positive("defense.norm", norm)
        if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 < delta < 1:
            raise UsageError(f"defense.delta={delta}: must be a number between 0 and 1, such as 1e-5")
        self.delta = float(delta)

    @property
    def multiplier(self) -> float:
        """Standard deviation of the noise over the largest distance of two updates."""
        return math.sqrt(2 * math.log(1.25 / self.delta)) / self.each

    @property
    def std(self) -> float:
        """Standard deviation of the noise on every element."""
        return 2 * self.norm * self.multiplier

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        """Shrunk to the norm, with noise."""
        factor = min(1.0, self.norm / max(norm_of(update), 1e-300))
        result = dict(update)
        for name, value in update.items():
            if value.is_floating_point():
                drawn = torch.randn(value.shape, generator=generator, device=generator.device)
                result[name] = value * factor + (self.std * drawn).to(value)
        return result

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """The clipped update, with its noise."""
        return Imitation(Shrunk(self.norm), dict.fromkeys(observed, self.std))

    def epsilon(self, *, rounds: int, local_steps: int, sample_rate: float, delta: float) -> float | None:
        """ε of a client's data after all rounds, every one of which sees it."""
        return gaussian_epsilon(noise_multiplier=self.multiplier, sample_rate=1.0, steps=rounds, delta=delta)


class Shrunk:
    """Sends an update to an ℓ2 norm of at most `norm`, all tensors together; differentiable.

    Args:
        norm: above 0.
    """

    def __init__(self, norm: float) -> None:
        self.norm = norm

    def __call__(self, update: Tensors) -> Tensors:
        square = torch.stack([v.square().sum() for v in update.values() if v.is_floating_point()]).sum()
        factor = (self.norm / square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()).clamp_max(1.0)
        return {n: v * factor if v.is_floating_point() else v for n, v in update.items()}
