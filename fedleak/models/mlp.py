"""Fully connected networks, down to the single layer of 784 inputs and 10 outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from fedleak.errors import UsageError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


class MLP(nn.Module):
    """Flatten, hidden layers with an activation after each, and one linear layer `fc` to the logits.

    Args:
        image_shape: (C, H, W) of the input, images in [0, 1].
        classes: number of classes.
        hidden: width of each hidden layer; ``()`` is one linear layer (784-10 for 28×28 digits).
        activation: one of `ACTIVATIONS`; the smooth ones can be inverted by second-order gradient matching.

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
        if activation not in ACTIVATIONS:
            raise UsageError(f"model.activation={activation} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        listed = isinstance(hidden, Sequence) and not isinstance(hidden, str)
        if not listed or any(type(width) is not int or width < 1 for width in hidden):
            raise UsageError(
                f"model.hidden={hidden} are no layer widths; give whole numbers above 0, say [256,128], or [] for none"
            )
        layers: list[nn.Module] = [nn.Flatten()]
        width = math.prod(image_shape)
        for wanted in hidden:
            layers += [nn.Linear(width, wanted), ACTIVATIONS[activation]()]
            width = wanted
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        return self.fc(self.body(images))
