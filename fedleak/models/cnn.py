"""Plain convolutional networks: the one of federated tutorials, and the one of Inverting Gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedleak.models.parts import activation as activation_of
from fedleak.models.parts import choose, flat_size, widths
from fedleak.models.parts import norm as norm_of
from fedleak.models.parts import pool as pool_of


class CNN(nn.Module):
    """The network of federated tutorials: 5×5 convolutions with 2×2 pooling, then fully connected layers.

    Flower's tutorial has 6 and 16 channels and fully connected layers of 120 and 84; McMahan 2017 has 32 and 64
    channels (padded there) and one layer of 512. Initialised as PyTorch does it: U(−1/√n, 1/√n), n a unit's inputs.

    Args:
        image_shape: (C, H, W) of the input, images in [0, 1].
        classes: number of classes.
        channels: of each convolution.
        hidden: width of each hidden fully connected layer.
        activation: one of `fedleak.models.parts.ACTIVATIONS`.
        norm: after each convolution: batch, group, layer or none.
        pool: max, average, or stride: the convolution takes every other step itself.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        classes: int = 10,
        channels: Sequence[int] = (6, 16),
        hidden: Sequence[int] = (120, 84),
        activation: str = "relu",
        norm: str = "none",
        pool: str = "max",
    ) -> None:
        super().__init__()
        choose("pool", pool, ("max", "average", "stride"))
        layers: list[nn.Module] = []
        before = image_shape[0]
        for wanted in widths(channels, "channels"):
            layers += _block(before, wanted, 5, activation, norm, stride=2 if pool == "stride" else 1)
            if pool != "stride":
                layers.append(pool_of(pool, 2))
            before = wanted
        layers.append(nn.Flatten())
        self.body = nn.Sequential(*layers)
        size = flat_size(self.body, image_shape, "model=cnn")
        head: list[nn.Module] = []
        for wanted in widths(hidden, "hidden"):
            head += [nn.Linear(size, wanted), activation_of(activation)]
            size = wanted
        self.head = nn.Sequential(*head)
        self.fc = nn.Linear(size, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        return self.fc(self.head(self.body(images)))


class ConvNet(nn.Module):
    """The eight 3×3 convolutions of Inverting Gradients (Geiping 2020), with a 3×3 pooling after the sixth and eighth.

    Initialised as PyTorch does it.

    Args:
        image_shape: (C, H, W) of the input, images in [0, 1].
        classes: number of classes.
        width: channels of the first convolution; the others have twice and four times as many.
        activation: one of `fedleak.models.parts.ACTIVATIONS`.
        norm: after each convolution: batch, group, layer or none.
        pool: max, average, or stride: one pixel of each window.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        width: int = 64,
        activation: str = "relu",
        norm: str = "batch",
        pool: str = "max",
    ) -> None:
        super().__init__()
        before, layers = image_shape[0], []
        (first,) = widths([width], "width")
        for place, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
            layers += _block(before, factor * first, 3, activation, norm, padding=1)
            before = factor * first
            if place in (5, 7):
                layers.append(pool_of(pool, 3))
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.fc = nn.Linear(flat_size(self.body, image_shape, "model=convnet"), classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        return self.fc(self.body(images))


def _block(
    before: int, wanted: int, kernel: int, activation: str, norm: str, *, stride: int = 1, padding: int = 0
) -> list[nn.Module]:
    """A convolution, what normalises it unless that is nothing, and an activation."""
    layers: list[nn.Module] = [nn.Conv2d(before, wanted, kernel, stride=stride, padding=padding)]
    layers += [] if norm == "none" else [norm_of(norm, wanted)]
    return [*layers, activation_of(activation)]
