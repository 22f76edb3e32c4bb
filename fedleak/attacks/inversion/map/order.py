"""Which labels belong to which local step, where their multiset alone is known: the arrangement that fits best.

An arrangement is judged by how well coarse images in it explain the update: a few Gauss-Newton steps on the leading
coordinates of every image, from the mean image of its class. Most arrangements are given up after the first of them,
the best go on to finer images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from math import factorial, prod

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.image_prior import ImagePrior
from fedleak.attacks.jacobian.base import UpdateModel
from fedleak.attacks.jacobian.loop import LoopModel
from fedleak.attacks.jacobian.models import update_model
from fedleak.attacks.noise import noise_of
from fedleak.attacks.problem import Problem
from fedleak.seeding import mixed_generator

_ROUNDS = ((4, 2, 120), (16, 2, 8), (32, 2, 2))
"""Coordinates of each image, Gauss-Newton steps, and the arrangements that take part at most."""
_SWEEPS = 20_000
"""Of single samples through the network that a round may take: some five seconds."""
_BYTES = 2**28
"""Of derivatives that are held at once."""
_LENGTHS = (1.0, 0.5, 0.25, 0.1)
"""Of a step, that are tried."""


def in_order(problem: Problem, candidates: int, knowledge: Knowledge, prior: ImagePrior, run: Run) -> Problem:
    """The problem with each of its likeliest multisets in the order of the client's steps that explains it best.

    Labels that do not rise are in an order already, and stay as they are; so do those of a network that is no chain of
    layers, whose derivatives would take too long. All arrangements of up to 120 take part, of more a few at random.

    Args:
        problem: with labels, of a client whose training is known.
        candidates: multisets to take.
        knowledge: the model, and auxiliary images for the mean of each class.
        prior: of an image.
        run: its seed decides which of many arrangements are tried.
    """
    training = problem.targets[0].training
    if problem.labels is None or training.local_steps in (None, 1) or training.optimizer is None:
        return problem
    search = _Search(problem, knowledge, prior, run)
    if not isinstance(search.model(1), LoopModel):
        return problem
    found = []
    for labels in problem.labels[:candidates].cpu():
        sought = bool((labels.diff() >= 0).all()) and len(labels.unique()) > 1
        found.append(search.best(labels) if sought else labels)
    return replace(problem, labels=torch.stack(found).to(problem.labels))


@dataclass
class _Search:
    """Arrangements of one problem."""

    problem: Problem
    knowledge: Knowledge
    prior: ImagePrior
    run: Run

    def __post_init__(self) -> None:
        target = self.problem.targets[0]
        self.size = self.problem.samples // (target.training.local_steps or 1)
        self.observed = {n: v.double().flatten().to(self.run.device) for n, v in target.update.items()}
        noise = noise_of(target, self.problem.samples).precision()
        self.precision = {n: v.to(self.run.device) for n, v in noise.items()}
        self.count = sum(v.numel() for v in self.observed.values())
        self.means = _class_means(self.knowledge, self.prior)

    def model(self, count: int) -> UpdateModel:
        """The problem so many times."""
        targets, shape = [self.problem.targets[0]] * count, self.prior.image_shape
        return update_model(self.knowledge.model, targets, shape, device=self.run.device, dtype=torch.float32)

    def best(self, labels: Tensor) -> Tensor:
        """The arrangement ``[B]`` of labels ``[B]`` that explains the update best."""
        steps = self.problem.targets[0].training.steps or 1
        sweeps = self.problem.samples * self.size * (steps + 1) // 2  # of one coordinate and arrangement
        found = torch.stack(list(self._arrangements(labels, self._most(0, sweeps))))
        z = torch.zeros(len(found), self.problem.samples, 0, dtype=torch.float64, device=self.run.device)
        for number, (width, count, _) in enumerate(_ROUNDS):
            most = min(len(found), self._most(number, sweeps))
            found, z = found[:most], torch.nn.functional.pad(z[:most], (0, width - z.shape[2]))
            if len(found) == 1:
                break
            each = max(1, _BYTES // (4 * self.count * self.problem.samples * width))
            parts = [self._fit(f, part, count) for f, part in zip(found.split(each), z.split(each), strict=True)]
            z, misfit = torch.cat([part for part, _ in parts]), torch.cat([level for _, level in parts])
            order = misfit.argsort().cpu()
            found, z = found[order], z[order.to(z.device)]
        return found[0]

    @staticmethod
    def _most(number: int, sweeps: int) -> int:
        """Arrangements that a round can afford."""
        width, steps, most = _ROUNDS[number]
        return max(2, min(most, _SWEEPS // (sweeps * width * steps)))

    def _arrangements(self, labels: Tensor, most: int) -> Iterator[Tensor]:
        """Different ones: all of them, or as many as that drawn at random, after the one that spreads each class."""
        steps = len(labels) // self.size
        seen = set()

        def new(order: Tensor) -> bool:
            key = tuple(tuple(sorted(step)) for step in order.view(steps, -1).tolist())
            return key not in seen and not seen.add(key)  # type: ignore[func-returns-value]

        spread = labels.view(-1, steps).T.flatten()
        new(spread)
        yield spread
        total = factorial(len(labels)) // prod(factorial(int(n)) for n in labels.bincount())
        if total <= most and self.size == 1:
            yield from (order for each in permutations(labels.tolist()) if new(order := torch.tensor(each)))
            return
        random = mixed_generator(self.run.seed, *self.problem.key, 1 << 21)
        for _ in range(10 * most):
            order = labels[torch.randperm(len(labels), generator=random)]
            if len(seen) < most and new(order):
                yield order

    def _fit(self, labels: Tensor, z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Coordinates after so many steps, and the mean squared residual left: ``[N, B, K]`` and ``[N]``."""
        model = self.model(len(labels))
        hot = one_hot(labels, self.knowledge.classes).double().to(self.run.device)
        width = z.shape[2]
        basis, base = self.prior.basis(0, width), self.means[labels.to(self.means.device)]
        weight = {n: v.float().expand(len(labels), *v.shape).squeeze(-1) for n, v in self.precision.items()}
        images = base + torch.einsum("nbk,kchw->nbchw", z, basis)
        residual, misfit = self._residual(model, images, hot)
        for _ in range(steps):
            s = (0.3 * misfit).clamp(min=1.0)
            model.at(images, hot)
            jacobian = model.jacobian(basis.float())
            matrix = jacobian.gram(weight).double() / s[:, None, None]
            matrix.diagonal(dim1=1, dim2=2).add_(1)
            scaled = {n: r * self.precision[n] for n, r in residual.items()}
            right = -(z.flatten(1) + jacobian.pull(scaled).double() / s[:, None])
            move = torch.linalg.solve_ex(matrix, right[..., None])[0][..., 0].view_as(z)
            best = misfit * self.count / s + z.square().sum((1, 2))
            start = z
            for length in _LENGTHS:
                tried = start + length * move
                at = base + torch.einsum("nbk,kchw->nbchw", tried, basis)
                left, level = self._residual(model, at, hot)
                value = level * self.count / s + tried.square().sum((1, 2))
                better = value < best
                best, misfit = torch.where(better, value, best), torch.where(better, level, misfit)
                z = torch.where(better[:, None, None], tried, z)
                residual = {n: torch.where(better[:, None], left[n], r) for n, r in residual.items()}
            images = base + torch.einsum("nbk,kchw->nbchw", z, basis)
        return z, misfit

    def _residual(self, model: UpdateModel, images: Tensor, hot: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        model.at(images, hot)
        gaps = {n: v.double() - self.observed[n] for n, v in model.gradients().items()}
        level = torch.stack([(gap.square() * self.precision[n]).sum(1) for n, gap in gaps.items()]).sum(0)
        return gaps, level.nan_to_num(torch.inf) / self.count


def _class_means(knowledge: Knowledge, prior: ImagePrior) -> Tensor:
    """``[classes, C, H, W]``, the prior's mean where there are no auxiliary images of a class."""
    found: Tensor = prior.mean.unflatten(0, prior.image_shape).repeat(knowledge.classes, 1, 1, 1)
    if knowledge.auxiliary is not None:
        images, labels = knowledge.auxiliary
        for label in labels.unique().tolist():
            found[label] = images[labels == label].to(found).mean(0)
    return found
