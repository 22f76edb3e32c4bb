"""A small vision transformer (Dosovitskiy 2021), its attention in plain products so that it differentiates twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedleak.errors import UsageError
from fedleak.models.parts import activation as activation_of
from fedleak.models.parts import choose, widths
from fedleak.models.parts import norm as norm_of


class ViT(nn.Module):
    """Patches to tokens, blocks of attention and a two-layer network, normalisation in front of each (pre-norm).

    Linear layers are initialised as PyTorch does it, places N(0, 0.02).

    Args:
        image_shape: (C, H, W) of the input, images in [0, 1].
        classes: number of classes.
        patch: side of a patch; it divides H and W.
        width: numbers a token, a multiple of `heads`.
        depth: blocks.
        heads: of the attention.
        activation: one of `fedleak.models.parts.ACTIVATIONS`.
        norm: of the tokens: layer (over each token's numbers, as published), batch, group or none.
        pool: what the last layer sees of the tokens: average, max, or stride: the first token alone.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        patch: int = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        activation: str = "gelu",
        norm: str = "layer",
        pool: str = "average",
    ) -> None:
        super().__init__()
        choose("pool", pool, ("average", "max", "stride"))
        patch, width, depth, heads = widths([patch, width, depth, heads], "patch, width, depth, heads")
        channels, height, wide = image_shape
        if height % patch or wide % patch:
            raise UsageError(f"model.patch={patch} does not divide images of {height}×{wide}; choose one that does")
        if width % heads:
            raise UsageError(f"model.width={width} is no multiple of model.heads={heads}; choose one that is")
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, height // patch * (wide // patch), width))
        self.blocks = nn.Sequential(*[_Block(width, heads, activation, norm) for _ in range(depth)])
        self.norm = _TokenNorm(norm, width)
        self.pool = pool
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        tokens = self.norm(self.blocks(self.patches(images).flatten(2).mT + self.places))
        if self.pool == "average":
            return self.fc(tokens.mean(1))
        return self.fc(tokens.amax(1) if self.pool == "max" else tokens[:, 0])


class _Block(nn.Module):
    """Attention, then a network of one hidden layer, each added to what it reads."""

    def __init__(self, width: int, heads: int, activation: str, norm: str) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = _TokenNorm(norm, width), _TokenNorm(norm, width)
        self.reads = nn.Linear(width, 3 * width)
        self.writes = nn.Linear(width, width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), activation_of(activation), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N, width]``."""
        parts = self.reads(self.norm1(tokens)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind()
        attention = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        tokens = tokens + self.writes((attention @ value).transpose(1, 2).flatten(2))
        return tokens + self.network(self.norm2(tokens))


class _TokenNorm(nn.Module):
    """A normalisation of tokens ``[B, N, width]``."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.layer = nn.LayerNorm(width) if name == "layer" else norm_of(name, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Same shape."""
        if isinstance(self.layer, nn.LayerNorm):
            return self.layer(tokens)
        return self.layer(tokens.mT[..., None])[..., 0].mT
