"""The coordinates in which images are sought."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Basis:
    """Images as weighted cosines: x = 0.5 + Σ_f u_f · (1 + |f|)^(−smoothness) · cosine_f, over channels, rows, columns.

    With smoothness 1 the weights fall like the amplitudes of natural images do, so that unknowns of size one are
    images of ordinary contrast. An optimiser that starts at grey then moves coarse structure first, and what the
    update does not determine stays as a prior of natural images would have it. Smoothness 0 leaves the pixels.

    Args:
        image_shape: (C, H, W).
        smoothness: see above.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        smoothness: float,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.smoothness = smoothness
        c, h, w = (torch.arange(size, dtype=torch.float64) for size in image_shape)
        frequency = (c[:, None, None] ** 2 + h[:, None] ** 2 + w**2).sqrt()
        self.weights = ((1 + frequency) ** -smoothness).to(device, dtype)
        self.cosines = [_cosines(size).to(device, dtype) for size in image_shape]

    def images(self, unknowns: Tensor) -> Tensor:
        """Images ``[..., C, H, W]`` of unknowns of the same shape."""
        if not self.smoothness:
            return unknowns
        return 0.5 + self._turn(unknowns * self.weights, [matrix.T for matrix in self.cosines])

    def unknowns(self, images: Tensor) -> Tensor:
        """The inverse of `images`."""
        return self._turn(images - 0.5, self.cosines) / self.weights if self.smoothness else images

    def pull(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the unknowns, of one with respect to the images."""
        return self._turn(gradient, self.cosines) * self.weights if self.smoothness else gradient

    @staticmethod
    def _turn(x: Tensor, matrices: list[Tensor]) -> Tensor:
        channels, rows, columns = matrices
        shape = x.shape
        x = rows @ (x @ columns.T)
        return (channels @ x.flatten(-2)).view(shape) if len(channels) > 1 else x


def _cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II), ``[frequency, position]``."""
    k, x = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    matrix = torch.cos(math.pi * k * (x + 0.5) / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
