"""A classifier that has seen other images of the same kind: whether it names what an attacker rebuilt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedleak.data import ImageData, to_float
from fedleak.seeding import derive_seed, plain_generator

Recogniser = Callable[[Tensor], Tensor]
"""Images ``[N, C, H, W]`` in [0, 1] -> the classes it names ``[N]``."""

_STEPS, _BATCH = 400, 64


def train_recogniser(data: ImageData, seed: int) -> Recogniser:
    """A small convolutional network trained on the test images, which no client holds."""
    channels, height, width = data.image_shape
    random = plain_generator(derive_seed(seed, "recogniser"))
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "recogniser", "weights"))
        body = nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        features = body(torch.zeros(1, channels, height, width)).shape[1]
        model = nn.Sequential(body, nn.Linear(features, data.classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(_STEPS):
        chosen = torch.randint(len(data.test_labels), (_BATCH,), generator=random)
        loss = nn.functional.cross_entropy(model(to_float(data.test_images[chosen])), data.test_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)

    def name(images: Tensor) -> Tensor:
        found: Tensor = model(images).argmax(1)
        return found

    return name


def accuracy(recogniser: Recogniser, data: ImageData, most: int = 1000) -> float:
    """How often it is right on the clients' own images."""
    images, labels = to_float(data.train_images[:most]), data.train_labels[:most]
    return float((recogniser(images) == labels).float().mean())
