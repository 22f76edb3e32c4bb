"""The small sigmoid LeNet of DLG (Zhu 2019) and iDLG (Zhao 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedleak.errors import UsageError
from fedleak.models.bottleneck import VariationalBottleneck


class LeNet(nn.Module):
    """Three 5×5 sigmoid convolutions of 12 channels (strides 2, 2, 1) and one linear layer.

    Args:
        image_shape: (C, H, W) of the input, images in [0, 1].
        classes: number of classes.
        dropout: share of the last layer's inputs that a training step drops at random; 0 for none.
        precode: width of a variational bottleneck before the last layer, see `VariationalBottleneck`; 0 for none.

    Raises:
        UsageError: `dropout` is outside [0, 1), or `precode` no whole number of at least 0.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        classes: int = 10,
        dropout: float = 0.0,
        precode: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(dropout, bool) or not 0 <= dropout < 1:
            raise UsageError(f"model.dropout={dropout} is no share to drop; give a number in [0, 1), say 0.3")
        channels, height, width = image_shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 12, kernel_size=5, padding=2, stride=2),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, kernel_size=5, padding=2, stride=2),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, kernel_size=5, padding=2, stride=1),
            nn.Sigmoid(),
            nn.Flatten(),
        )
        with torch.no_grad():
            features = self.body(torch.zeros(1, channels, height, width)).shape[1]
        if precode:
            self.bottleneck = VariationalBottleneck(features, precode)
        if dropout:
            self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        features = self.body(images)
        for name in ("bottleneck", "dropout"):
            if hasattr(self, name):
                features = getattr(self, name)(features)
        return self.fc(features)
