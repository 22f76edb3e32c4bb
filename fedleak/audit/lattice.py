"""How many samples of each class an update of plain SGD claims: whole numbers, or something stated is wrong.

For the cross-entropy of a last linear layer with bias, ∂L/∂b = p̄ − n/N. With p̄ the mean probabilities over the client's
path, N (p̄ − ∂L/∂b) must be the counts n. The layer's own gradient tells the mean feature vector, whatever the scale
(∂L/∂W ≈ ∂L/∂b ⊗ h̄), and so p̄ at both ends of the path.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge
from fedleak.attacks.labels.last_layer import LastLayer
from fedleak.attacks.labels.posterior import domain_images
from fedleak.local_update import local_update
from fedleak.seeding import plain_generator
from fedleak.training import LocalTraining, Tensors


@dataclass(frozen=True)
class Path:
    """What the last layer's change says, in float64.

    Attributes:
        head, shift: ``[C, d]`` and ``[C]``, the layer at the start.
        change: ``[C, d]``, what was added to the weights, and `moved` ``[C]``, to the bias.
        reach: learning rate × steps (of momentum: times what each step's gradient counts in all).
        samples: N.
        steps: T.
        weights: what the gradient of each step counts in all; empty where they count alike.
    """

    head: Tensor
    shift: Tensor
    change: Tensor
    moved: Tensor
    reach: float
    samples: int
    steps: int
    weights: tuple[float, ...] = ()

    @property
    def mixing(self) -> float:
        """How far counts err because momentum weighs early batches more, if batches are drawn at random."""
        if not self.weights:
            return 0.0
        steps, share, total = len(self.weights), 1 / len(self.moved), sum(self.weights)
        uneven = sum((w / total - 1 / steps) ** 2 for w in self.weights)
        return float((steps * self.samples * uneven * share * (1 - share)) ** 0.5)

    @property
    def feature(self) -> Tensor:
        """``[d]``, the mean feature vector of the private samples."""
        return self.change.T @ self.moved / self.moved.square().sum()

    @property
    def spread(self) -> float:
        """How far a class's logits lie from the mean sample's: by it `counts` errs on trained models."""
        rest = (self.change - self.moved[:, None] * self.feature) @ self.head.T
        return float((rest - rest.mean(dim=1, keepdim=True)).norm() / self.moved.norm())

    @property
    def too_small(self) -> bool:
        """Whether the mean gradient is smaller than a random batch would leave it once in some hundred times."""
        classes = len(self.moved)
        away = float((self.samples * self.moved / self.reach).square().sum())
        return classes > 2 and self.samples >= 2 * classes and away < 0.15 * self.samples * (1 - 1 / classes)

    def counts(self, factor: Tensor) -> Tensor:
        """``[F, C]``, the counts claimed if what was sent is the client's change times 1 / `factor` ``[F]``."""
        feature = self.feature
        start = (self.head @ feature + self.shift).softmax(dim=0)
        way = self.change @ feature + self.moved
        end = (self.head @ feature + self.shift + factor[:, None] * way).softmax(dim=1)
        mean = start + (end - start) * (self.steps - 1) / (2 * self.steps)
        return self.samples * (mean + factor[:, None] * self.moved / self.reach)


def path(layer: LastLayer, start: Tensors, change: Tensors, training: LocalTraining) -> Path | None:
    """The path of a client's last layer; None where the layer has no bias, or not enough is known.

    Args:
        layer: the last layer.
        start: the parameters that training started from.
        change: what training added to them (of a gradient: minus the gradient).
        training: how; of a gradient the learning rate does not matter.
    """
    samples, steps = training.samples, training.steps
    reach = reach_of(training)
    if layer.bias is None or reach is None or samples is None or steps is None:
        return None
    moved = change[layer.bias].double()
    if not float(moved.abs().max()) > 0:
        return None
    head, shift = start[layer.weight].double(), start[layer.bias].double()
    each = tuple(step_weights(training)) if getattr(training.optimizer, "momentum", 0.0) else ()
    return Path(head, shift, change[layer.weight].double(), moved, reach, samples, steps, each)


def step_weights(training: LocalTraining) -> list[float]:
    """By how many learning rates the gradient of each step moves the weights in all the steps behind it, of SGD."""
    steps, momentum = training.steps or 1, getattr(training.optimizer, "momentum", 0.0)
    each = [(1 - momentum ** (steps - t)) / (1 - momentum) for t in range(steps)]
    if getattr(training.optimizer, "nesterov", False):
        each = [1 + momentum * weight for weight in each]
    return each


def reach_of(training: LocalTraining) -> float | None:
    """What the mean gradient was multiplied with to give the change, momentum and all; None where that is unknown."""
    steps, optimizer = training.steps, training.optimizer
    if steps is None:
        return None
    if training.payload == "gradient":
        return float(steps)
    if optimizer is None or not hasattr(optimizer, "momentum"):
        return None
    return float(optimizer.lr * sum(step_weights(training)))


def misfit(counts: Tensor) -> Tensor:
    """``[F]``: root mean square distance of counts ``[F, C]`` to whole numbers from 0; .29 on average by chance."""
    return (counts - counts.round().clamp(min=0)).square().mean(dim=1).sqrt()


def expected_error(
    layer: LastLayer,
    knowledge: Knowledge,
    start: Tensors,
    buffers: Tensors,
    training: LocalTraining,
    *,
    seed: int,
    size: float,
    clients: int = 6,
) -> float:
    """How far `Path.counts` errs, root mean square, on simulated clients that train as stated on made-up images.

    Args:
        layer, knowledge, start, buffers, training: as stated.
        seed: decides every draw.
        size: norm of the change that was seen: where the stated training would go far further, shorter steps are
            simulated, so that a wrong statement does not hide behind errors of its own making.
        clients: how many to simulate.
    """
    samples = training.samples
    assert samples is not None
    images = domain_images(knowledge, clients, min(samples, 64), seed)
    generator = plain_generator(seed)
    errors = []
    for client in range(clients):
        own = images[client * min(samples, 64) : (client + 1) * min(samples, 64)]
        own = own[torch.arange(samples) % len(own)]
        weights = torch.rand(layer.classes, generator=generator) + 0.05
        labels = torch.multinomial(weights, samples, replacement=True, generator=generator)
        change = _change(knowledge, start, buffers, own, labels, training)
        if client == 0 and training.optimizer is not None and training.payload == "weights":
            far = sum(float(v.double().square().sum()) for v in change.values()) ** 0.5
            if far > 2 * size or not far < float("inf"):
                shorter = max(size / far, 1e-3) if far < float("inf") else 1e-3
                training = replace(training, optimizer=replace(training.optimizer, lr=training.optimizer.lr * shorter))
                change = _change(knowledge, start, buffers, own, labels, training)
        found = path(layer, start, change, training)
        if found is None:
            continue
        true = torch.bincount(labels, minlength=layer.classes)
        errors.append(found.counts(torch.ones(1, dtype=torch.float64))[0] - true)
    return float(torch.stack(errors).square().mean().sqrt()) if errors else float("inf")


def _change(
    knowledge: Knowledge, start: Tensors, buffers: Tensors, images: Tensor, labels: Tensor, training: LocalTraining
) -> Tensors:
    """What such a client would add to its weights; of a gradient, minus it."""
    sent = local_update(knowledge.model, start, dict(buffers), images, labels, training).update
    return {n: -v if training.payload == "gradient" else v - start[n] for n, v in sent.items()}


def find_factor(found: Path, most: float = 1e5) -> tuple[float, float] | None:
    """By what an update was shrunk before it was sent: the factor, from 1, that makes its counts whole numbers.

    Returns:
        The factor, and how far the counts then are from whole; None if no factor stands out.
    """
    coarse = torch.logspace(0, torch.tensor(most).log10().item(), 400, dtype=torch.float64)
    fits = (found.counts(coarse) >= -0.5).all(dim=1)
    if not fits.any():
        return None
    top = float(coarse[fits.nonzero()[-1, 0]]) * 1.05
    # A factor moves the counts in proportion to itself: so many values as to pass no whole number by.
    size = found.samples * float(found.moved.abs().max()) / found.reach
    steps = int(min(max(400, 40 * size * top), 200_000))
    fine = torch.linspace(1, max(top, 1.01), steps, dtype=torch.float64)
    values = torch.cat([misfit(found.counts(part)) for part in fine.split(20_000)])
    best = int(values.argmin())
    # Nearby factors move the counts by less than would make them other counts.
    away = (fine - fine[best]).abs() * found.samples * float(found.moved.square().mean().sqrt()) / found.reach > 0.2
    if float(values[best]) > 0.08 or (away.any() and float(values[away].min()) < 2 * float(values[best])):
        return None
    return float(fine[best]), float(values[best])
