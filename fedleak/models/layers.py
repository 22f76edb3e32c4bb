"""Layers that make a model take images in [0, 1], whatever it was written for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedleak.errors import UsageError


class Normalize(nn.Module):
    """(image − mean) / std by channel, as a layer, so that client and attacker cannot disagree about it.

    The statistics are constants: neither parameters nor part of the ``state_dict``.

    Args:
        mean: one number for each channel, or one for all, on the [0, 1] scale.
        std: as many, each above 0.

    Raises:
        UsageError: the lengths differ, or a number is not finite, or a `std` is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean, std = [float(m) for m in mean], [float(s) for s in std]
        if len(mean) != len(std) or not mean or not all(math.isfinite(v) for v in mean + std) or min(std) <= 0:
            raise UsageError(
                f"model.normalize mean={mean} std={std} cannot be used; give as many finite means as standard "
                "deviations, one a channel, each standard deviation above 0"
            )
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images, ``[B, C, H, W]`` to ``[B, C, H, W]``."""
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class RepeatChannels(nn.Module):
    """One-channel images for a model that wants more: the channel, repeated.

    Args:
        channels: how many channels the model wants.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 1, H, W]`` to ``[B, channels, H, W]``."""
        return images.expand(-1, self.channels, -1, -1)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class Logits(nn.Module):
    """The logits of a network that returns a tuple or an output object, as Inception v3 does in train mode.

    Those are the tensor itself, what is called ``logits``, or what comes first. Other outputs, such as those of an
    auxiliary classifier, train nothing.
    """

    def forward(self, output: Any) -> Tensor:
        """Logits ``[B, classes]``; whatever else it is, as it is."""
        if isinstance(output, Tensor):
            return output
        if isinstance(output, Mapping):
            return output["logits"] if "logits" in output else next(iter(output.values()))
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, Sequence) and output:
            found = output[0]
        return output if found is None else found
