"""The small sigmoid LeNet of DLG (Zhu 2019) and iDLG (Zhao 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LeNet(nn.Module):
    """Three 5×5 sigmoid convolutions of 12 channels (strides 2, 2, 1) and one linear layer.

    Args:
        image_shape: (C, H, W) of the input, images in [0, 1].
        classes: number of classes.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> None:
        super().__init__()
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
        self.fc = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        return self.fc(self.body(images))
