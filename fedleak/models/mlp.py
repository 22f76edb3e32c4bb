"""Fully connected networks, down to the single layer of 784 inputs and 10 outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from fedleak.models.parts import ACTIVATIONS, choose, widths
from fedleak.models.parts import activation as activation_of


class MLP(nn.Module):
    """Flatten, hidden layers with an activation after each, and one linear layer `fc` to the logits.

    Args:
        image_shape: (C, H, W) of the input, images in [0, 1].
        classes: number of classes.
        hidden: width of each hidden layer; ``()`` is one linear layer (784-10 for 28×28 digits).
        activation: one of `fedleak.models.parts.ACTIVATIONS`; the smooth ones can be inverted to second order.

    Raises:
        UsageError: an unknown activation, or a width below 1.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        classes: int = 10,
        hidden: Sequence[int] = (),
        activation: str = "sigmoid",
    ) -> None:
        super().__init__()
        choose("activation", activation, ACTIVATIONS)
        layers: list[nn.Module] = [nn.Flatten()]
        width = math.prod(image_shape)
        for wanted in widths(hidden, "hidden"):
            layers += [nn.Linear(width, wanted), activation_of(activation)]
            width = wanted
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        return self.fc(self.body(images))
