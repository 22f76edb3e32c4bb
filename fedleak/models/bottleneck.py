"""PRECODE: a variational bottleneck whose random draws the server cannot repeat (Scheliga et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedleak.errors import UsageError

_WIDEST = 2.0
"""Largest log-variance: an untrained encoder would drown everything else."""


class VariationalBottleneck(nn.Module):
    """Features -> mean and log-variance of a small code -> in train mode a draw of it, else its mean -> features.

    What is below it is trained through a backward signal that a draw has changed, so that guesses of the images whose
    gradients are compared do not fit, whatever the images. What it cannot hide: with a single sample the encoder's own
    gradient tells that very signal, and its input. The paper adds a small Kullback-Leibler term to the loss; here
    clients train on the cross-entropy alone.

    Args:
        features: numbers that come in and go out.
        width: of the code.

    Raises:
        UsageError: `width` is below 1.

    References:
        Scheliga, Mäder, Seeland. PRECODE: A generic model extension to prevent deep gradient leakage. WACV 2022.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise UsageError(f"model.precode={width}: must be a whole number of at least 1, or 0 for no bottleneck")
        self.encoder = nn.Linear(features, 2 * width)
        self.decoder = nn.Linear(width, features)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, features]`` to ``[B, features]``."""
        mean, log_variance = self.encoder(features).chunk(2, 1)
        if self.training:
            mean = mean + (0.5 * log_variance.clamp(max=_WIDEST)).exp() * torch.randn_like(mean)
        return self.decoder(mean)
