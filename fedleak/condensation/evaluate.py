"""Networks trained on a few images, and how well they know the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedleak.seeding import plain_generator
from fedleak.training import SGD, LocalTraining, Tensors, unroll

SHIFT, STRETCH, TURN = 4 / 28, 0.2, torch.pi / 4
"""How far `jitter` goes: a share of the width, a factor off 1, an angle."""


@dataclass(frozen=True)
class Trainer:
    """Trains a network as the condensation paper does: SGD with momentum .9 and weight decay 5e-4.

    Attributes:
        epochs: over the images.
        batch_size: at most.
        lr: learning rate.
        augment: shift, stretch or turn every image anew each time it is seen (`jitter`), as published for digits.
        drop: a tenth of the learning rate in the second half.
    """

    epochs: int = 300
    batch_size: int = 256
    lr: float = 0.01
    augment: bool = False
    drop: bool = True

    def train(self, model: nn.Module, weights: Tensors, images: Tensor, labels: Tensor, *, seed: int) -> Tensors:
        """The weights after training from `weights` on images ``[N, C, H, W]``; `seed` decides order and jitter."""
        random = plain_generator(seed)
        size = min(self.batch_size, len(labels))
        steps = len(labels) // size  # of an epoch; what is left over comes in another epoch's order
        order = torch.empty(0, dtype=torch.int64)

        def gradient_at(step: int, now: Tensors) -> Tensors:
            nonlocal order
            if step % steps == 0:
                order = torch.randperm(len(labels), generator=random)
            chosen = order[step % steps * size :][:size]
            batch = jitter(images[chosen], random) if self.augment else images[chosen]
            leaves = {name: value.detach().requires_grad_() for name, value in now.items()}
            loss = nn.functional.cross_entropy(functional_call(model, leaves, (batch,)), labels[chosen])
            return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

        halves = (self.epochs // 2, self.epochs - self.epochs // 2) if self.drop else (0, self.epochs)
        for epochs, lr in zip(halves, (self.lr, self.lr / 10 if self.drop else self.lr), strict=True):
            if epochs:
                optimizer = SGD(lr, momentum=0.9, weight_decay=5e-4)
                weights = unroll(gradient_at, weights, LocalTraining("weights", size, steps, epochs, optimizer))
        return weights

    def accuracy(
        self, model: nn.Module, images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, *, seed: int
    ) -> float:
        """The share of test images that `model`, trained from its own weights on `images`, names rightly."""
        start = {name: value.detach() for name, value in model.named_parameters()}
        weights = self.train(model, start, images, labels, seed=seed)
        right = 0
        with torch.no_grad():
            for some, wanted in zip(test_images.split(500), test_labels.split(500), strict=True):
                right += int((functional_call(model, weights, (some,)).argmax(1) == wanted).sum())
        return right / len(test_labels)


def jitter(images: Tensor, random: torch.Generator) -> Tensor:
    """Every image ``[B, C, H, W]`` shifted, stretched or turned, one of the three each; corners take its mean."""
    count = len(images)
    what = torch.randint(3, (count,), generator=random)
    draw = 2 * torch.rand(count, 2, generator=random) - 1
    shift = torch.where((what == 0)[:, None], 2 * SHIFT * draw, 0.0)
    stretch = torch.where((what == 1)[:, None], 1 / (1 + STRETCH * draw), 1.0)
    angle = torch.where(what == 2, TURN * draw[:, 0], 0.0)
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(count, 2, 2)
    theta = torch.cat([matrix * stretch[:, None, :], shift[:, :, None]], 2)
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    mean = images.mean((2, 3), keepdim=True)
    return nn.functional.grid_sample(images - mean, grid, align_corners=False) + mean
