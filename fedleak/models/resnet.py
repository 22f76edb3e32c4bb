"""The residual network for small images of He 2016, section 4.2."""

from __future__ import annotations

from torch import Tensor, nn

from fedleak.models.parts import EveryOther, choose, widths
from fedleak.models.parts import activation as activation_of
from fedleak.models.parts import norm as norm_of
from fedleak.models.parts import pool as pool_of


class ResNet20(nn.Module):
    """ResNet for 32×32 images: one convolution, three stages of residual blocks, global average, one linear layer.

    Initialised as PyTorch does it. Inverting Gradients' ResNet20-4 is ``width=64``.

    Args:
        image_shape: (C, H, W) of the input, images in [0, 1].
        classes: number of classes.
        width: channels of the first stage; the others have twice and four times as many.
        blocks: residual blocks a stage; 3 makes 20 layers.
        activation: one of `fedleak.models.parts.ACTIVATIONS`.
        norm: after each convolution: batch, group, layer or none.
        pool: how a stage halves the map: stride (its first convolution, as published), max or average.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        width: int = 16,
        blocks: int = 3,
        activation: str = "relu",
        norm: str = "batch",
        pool: str = "stride",
    ) -> None:
        super().__init__()
        choose("pool", pool, ("stride", "max", "average"))
        width, blocks = widths([width, blocks], "width, model.blocks")
        stem = nn.Conv2d(image_shape[0], width, 3, padding=1, bias=norm == "none")
        layers: list[nn.Module] = [stem, norm_of(norm, width), activation_of(activation)]
        before = width
        for stage in range(3):
            for block in range(blocks):
                after = width * 2**stage
                layers.append(_Block(before, after, activation, norm, pool if stage and not block else None))
                before = after
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        return self.fc(self.body(images))


class _Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut without parameters (option A): every other pixel, zeros for channels."""

    def __init__(self, before: int, after: int, activation: str, norm: str, pool: str | None) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(before, after, 3, 2 if pool == "stride" else 1, 1, bias=bias)
        self.norm1 = norm_of(norm, after)
        self.activation1 = activation_of(activation)
        self.smaller = nn.Identity() if pool in (None, "stride") else pool_of(str(pool), 2)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=bias)
        self.norm2 = norm_of(norm, after)
        self.activation2 = activation_of(activation)
        self.shortcut = nn.Identity() if pool is None else EveryOther(1 if pool == "stride" else 2, 2)
        self.more = after - before

    def forward(self, a: Tensor) -> Tensor:
        """``[B, before, H, W]`` to ``[B, after, H', W']``."""
        inner = self.smaller(self.activation1(self.norm1(self.conv1(a))))
        past = self.shortcut(a)
        if self.more:
            past = nn.functional.pad(past, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return self.activation2(self.norm2(self.conv2(inner)) + past)
