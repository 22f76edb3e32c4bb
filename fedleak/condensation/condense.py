"""Images that give a network the gradients that a whole data set gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedleak.condensation.evaluate import Trainer
from fedleak.seeding import derive_seed, generator
from fedleak.training import Tensors

PUBLISHED = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Images a class -> (matches a network, epochs of training between two of them), as published."""


@dataclass(frozen=True)
class Recipe:
    """How images are condensed; the defaults are the paper's.

    Attributes:
        images_per_class: how many are made.
        networks: freshly initialised ones that are matched on, one after another.
        matches: steps of the images on each; the network is trained on the images between them. None: as published,
            one for a single image a class, else as many as there are.
        train_epochs: how long it is trained between two matches. None: as published.
        batch_size: real images of a class behind each gradient.
        lr: step of the images on the scale on which the network sees them as mean 0 and standard deviation 1.
        momentum: of those steps.
        start: ``noise`` (standard normal, on that scale) or ``real`` (images of the data set).
        network_lr: with which the network is trained.
    """

    images_per_class: int = 1
    networks: int = 1000
    matches: int | None = None
    train_epochs: int | None = None
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.5
    start: Literal["noise", "real"] = "noise"
    network_lr: float = 0.01

    @property
    def loops(self) -> tuple[int, int]:
        """Matches a network, and epochs of training between two of them."""
        count = self.images_per_class
        matches, epochs = PUBLISHED.get(count, (count, max(1, 500 // count)))
        return self.matches or matches, self.train_epochs or epochs


@dataclass(frozen=True)
class Progress:
    """How far images are, from which they can be gone on with.

    Attributes:
        networks: that were matched on.
        images, speed: ``[N, C, H, W]``, and their momentum.
    """

    networks: int
    images: Tensor
    speed: Tensor


def condense(
    images: Tensor,
    labels: Tensor,
    classes: int,
    recipe: Recipe,
    network: Callable[[int], nn.Module],
    *,
    seed: int = 0,
    bounded: bool = True,
    since: Progress | None = None,
    on_network: Callable[[Progress, float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Condense a data set (Zhao, Mopuri and Bilen, Dataset Condensation with Gradient Matching, 2021).

    Args:
        images: ``[N, C, H, W]`` in [0, 1].
        labels: ``[N]`` int64 in [0, classes).
        recipe: how.
        network: number -> a fresh network that takes images in [0, 1].
        seed: decides every draw.
        bounded: keep the made images in [0, 1], as a picture and a federation's clients need them.
        since: to go on from; None begins.
        on_network: told after each network how far it is, and the mean distance there.

    Returns:
        Images ``[classes · images_per_class, C, H, W]`` and their labels, class by class.
    """
    members = [(labels == label).nonzero().squeeze(1) for label in range(classes)]
    scale = images.std()
    if since is None:
        made = _start(images, members, recipe, seed)
        since = Progress(0, made, torch.zeros_like(made))
    made, speed = since.images.to(images.device), since.speed.to(images.device)
    made_labels = torch.arange(classes).repeat_interleave(recipe.images_per_class)
    matches, epochs = recipe.loops
    for number in range(since.networks, recipe.networks):
        model, random = network(number), generator(seed, "condense", recipe.images_per_class, number)
        weights: Tensors = {name: value.detach() for name, value in model.named_parameters()}
        distance = 0.0
        for match in range(matches):
            made.requires_grad_()
            total = made.new_zeros(())
            for label, own in enumerate(members):
                drawn = own[torch.randperm(len(own), generator=random)[: recipe.batch_size]]
                real = _gradient(model, weights, images[drawn], labels[drawn])
                mine = made_labels == label
                total = total + distance_of(real, _gradient(model, weights, made[mine], made_labels[mine], graph=True))
            (slope,) = torch.autograd.grad(total, made)
            with torch.no_grad():
                # On the scale of the pixels the paper's step is lr · scale², for the derivative is by scaled pixels.
                speed = recipe.momentum * speed + slope
                made = made.detach() - recipe.lr * scale.square() * speed
                if bounded:
                    made = made.clamp(0, 1)
            distance = float(total.detach()) / classes
            if match < matches - 1:
                trainer = Trainer(epochs=epochs, lr=recipe.network_lr, drop=False)
                weights = trainer.train(
                    model, weights, made, made_labels, seed=derive_seed(seed, "inner", number, match)
                )
        if on_network is not None:
            on_network(Progress(number + 1, made.detach(), speed), distance)
    return made.detach(), made_labels


def distance_of(real: list[Tensor], made: list[Tensor]) -> Tensor:
    """One minus the cosine between the gradients, summed over the outputs of every weight; biases are left out.

    Args:
        real, made: a tensor each parameter; those with one dimension (biases, norms) do not count, as published.
    """
    total = made[0].new_zeros(())
    for a, b in zip(real, made, strict=True):
        if a.dim() > 1:
            a, b = a.flatten(1), b.flatten(1)
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return total


def _gradient(
    model: nn.Module, weights: Tensors, images: Tensor, labels: Tensor, *, graph: bool = False
) -> list[Tensor]:
    """The gradient of the mean loss, with its graph where the images are to be moved."""
    leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
    loss = nn.functional.cross_entropy(functional_call(model, leaves, (images,)), labels)
    return list(torch.autograd.grad(loss, list(leaves.values()), create_graph=graph))


def _start(images: Tensor, members: list[Tensor], recipe: Recipe, seed: int) -> Tensor:
    """The images to begin with, class by class."""
    random, count = generator(seed, "condense start", recipe.images_per_class), recipe.images_per_class
    if recipe.start == "real":
        return torch.cat([images[own[torch.randperm(len(own), generator=random)[:count]]] for own in members])
    noise = torch.randn(len(members) * count, *images.shape[1:], generator=random)
    return images.mean() + images.std() * noise
