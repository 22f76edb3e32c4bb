"""Images whose features and gradients are those observed: many starts side by side, cooled together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.attacks.image_prior import ImagePrior
from fedleak.attacks.inversion.features.body import Body
from fedleak.attacks.inversion.optimizers import LBFGS
from fedleak.attacks.inversion.priors import TotalVariation

_SCALE = 1000.0
"""Of what the optimiser sees, which keeps float32 from stalling early."""


@dataclass(frozen=True)
class Cooling:
    """How a search goes.

    Attributes:
        stages: temperatures, from 1 down by equal factors.
        coldest: the last of them, before zero.
        evaluations: objective-and-gradient evaluations a stage.
        prior: weight of the prior's mean square at the first stage, in units of relative misfit; it falls by half.
        variation: weight of the mean difference of neighbouring pixels at the first stage; it falls alike. Of images
            that fit nearly as well, those with few edges are nearer to the truth.
        box: weight of the mean squared distance from [0, 1].
        features: weight of the features beside the last kernel's gradient.
        deeper: weight of a kernel's gradient beside that of the one above: its winners depend on more winners.
        biases: weight of a bias's gradient beside its kernel's.
    """

    stages: int = 10
    coldest: float = 0.01
    evaluations: int = 100
    prior: float = 1e-3
    variation: float = 0.2
    box: float = 10.0
    features: float = 0.3
    deeper: float = 0.1
    biases: float = 0.1

    def temperatures(self) -> list[float]:
        """Of every stage, the last zero."""
        steps = max(1, self.stages - 2)
        warm = [self.coldest ** (stage / steps) for stage in range(self.stages - 1)]
        return [*warm, 0.0]


class Search:
    """The starts of one problem.

    Args:
        body: the layers below the features.
        features: ``[B, n]``, observed.
        known: ``[B, n]``, which of them are; None for all.
        gradients: name -> tensor, observed.
        prior: of images.
        cooling: see there.
    """

    def __init__(
        self,
        body: Body,
        features: Tensor,
        gradients: Mapping[str, Tensor],
        prior: ImagePrior,
        cooling: Cooling,
        known: Tensor | None = None,
    ) -> None:
        self.body, self.cooling = body, cooling
        self.features = features
        self.known = torch.ones_like(features) if known is None else known.to(features)
        self.gradients = {name: value.flatten().to(features) for name, value in gradients.items()}
        self.sizes = {n: v.square().sum().clamp(min=torch.finfo(v.dtype).tiny) for n, v in self.gradients.items()}
        kernels = [n for layer in body.layers for n in layer.parameters[:1]]
        depth = {n: len(kernels) - 1 - kernels.index(n) for n in kernels}
        self.weights = {
            name: cooling.deeper ** depth[layer.parameters[0]] * (cooling.biases if place else 1.0)
            for layer in body.layers
            for place, name in enumerate(layer.parameters)
        }
        self.variation = TotalVariation(weight=cooling.variation)
        self.mean, self.root = prior.mean.to(features), prior.root.to(features)
        self.shape = prior.image_shape
        self.evaluations = 0

    def images(self, z: Tensor) -> Tensor:
        """``[S, B, C, H, W]`` of the prior's coordinates ``[S, B, D]``."""
        result: Tensor = (self.mean + z @ self.root).unflatten(2, self.shape)
        return result

    def misfit(self, images: Tensor, temperature: float) -> Tensor:
        """Relative squares of the features' gap and of every gradient's, added up: ``[S]``."""
        features, found = self.body.evaluate(images, temperature)
        gap = ((features - self.features) * self.known).square().sum(2)
        gap = gap / (self.features * self.known).square().sum(1).clamp(min=torch.finfo(gap.dtype).tiny)
        total = self.cooling.features * gap.mean(1)
        for name, value in found.items():
            total = total + self.weights[name] * (value - self.gradients[name]).square().sum(1) / self.sizes[name]
        return total

    def objective(self, z: Tensor, temperature: float, share: float) -> Tensor:
        """Misfit, the priors times `share`, and box, ``[S]``."""
        images = self.images(z)
        outside = (images.clamp(0, 1) - images).square().flatten(1).mean(1)
        priors = self.cooling.prior * z.square().mean((1, 2)) + self.variation(images)
        return self.misfit(images, temperature) + self.cooling.box * outside + share * priors

    def run(self, z: Tensor, late: Callable[[], bool], on_stage: Callable[[Tensor], None] | None = None) -> Tensor:
        """The coordinates ``[S, B, D]`` that starts at `z` end with; ends early, after a stage, where `late`."""
        share = 1.0
        for temperature in self.cooling.temperatures():
            z = self._stage(z, temperature, share, late)
            share /= 2
            if on_stage is not None:
                on_stage(z)
            if late():
                break
        return z

    def _stage(self, z: Tensor, temperature: float, share: float, late: Callable[[], bool]) -> Tensor:
        optimizer = LBFGS(line_search="backtracking", history_size=20)
        shape, z = z.shape, z.flatten(1)
        state = optimizer.init(z)
        best, found = z.new_full((len(z),), torch.inf), z
        for step in range(self.cooling.evaluations):
            leaf = z.detach().requires_grad_()
            value = self.objective(leaf.view(shape), temperature, share)
            gradient = torch.autograd.grad(value.sum(), leaf)[0]
            value = value.detach()
            better = value < best
            best, found = torch.where(better, value, best), torch.where(better[:, None], z, found)
            self.evaluations += len(z)
            if step % 10 == 9 and late():
                break
            z = optimizer.step(state, z, _SCALE * value, _SCALE * gradient, torch.zeros_like(value))
        return found.view(shape)
