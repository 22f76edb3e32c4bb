"""The network of the condensation papers."""

from __future__ import annotations

from torch import Tensor, nn

from fedleak.errors import UsageError


class ConvNet(nn.Module):
    """Blocks of a 3×3 convolution, instance normalisation, ReLU and 2×2 average pooling, and one linear layer `fc`.

    Args:
        image_shape: (C, H, W) of the input, images in [0, 1].
        classes: number of classes.
        width: channels of every block; 128 in the paper.
        depth: blocks; 3 in the paper.

    Raises:
        UsageError: `width` or `depth` is below 1, or the images are too small for so many blocks.
    """

    def __init__(
        self, image_shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10, width: int = 128, depth: int = 3
    ) -> None:
        super().__init__()
        channels, height, width_in = image_shape
        for name, value in (("width", width), ("depth", depth)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"model.{name}={value}: must be a whole number from 1")
        # As the paper does, images of 28 pixels are padded to 32 first, so that three halvings leave 4.
        pad = 2 if (height, width_in) == (28, 28) else 0
        height, width_in = (height + 2 * pad) >> depth, (width_in + 2 * pad) >> depth
        if min(height, width_in) < 1:
            raise UsageError(f"model.depth={depth}: halves images of {image_shape[1]}×{image_shape[2]} away; lower it")
        layers: list[nn.Module] = []
        for block in range(depth):
            padding = 1 + pad if block == 0 else 1
            layers += [nn.Conv2d(channels, width, 3, padding=padding), nn.GroupNorm(width, width)]
            layers += [nn.ReLU(), nn.AvgPool2d(2)]
            channels = width
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.fc = nn.Linear(width * height * width_in, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        return self.fc(self.body(images))
