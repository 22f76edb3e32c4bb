"""The coordinates in which images are sought."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.attacks.image_prior import cosines


class Coordinates:
    """The pixels themselves. A subclass in a file of your own, named by ``_target_``, may seek something else."""

    def on(self, image_shape: tuple[int, int, int], *, device: torch.device, dtype: torch.dtype) -> Coordinates:
        """These coordinates, ready for images of a shape (C, H, W) on a device."""
        return self

    def images(self, unknowns: Tensor) -> Tensor:
        """Images ``[..., C, H, W]`` of unknowns of the same shape."""
        return unknowns

    def unknowns(self, images: Tensor) -> Tensor:
        """The inverse of `images`."""
        return images

    def pull(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the unknowns, of one with respect to the images."""
        return gradient


class Cosines(Coordinates):
    """Images as weighted cosines: x = 0.5 + Σ_f u_f · (1 + |f|)^(−smoothness) · cosine_f, over channels, rows, columns.

    With smoothness 1 the weights fall like the amplitudes of natural images do, so that unknowns of size one are
    images of ordinary contrast. An optimiser that starts at grey then moves coarse structure first, and what the
    update does not determine stays as a prior of natural images would have it.

    Args:
        smoothness: see above.
    """

    def __init__(self, smoothness: float) -> None:
        self.smoothness = smoothness

    def on(self, image_shape: tuple[int, int, int], *, device: torch.device, dtype: torch.dtype) -> Cosines:
        """With the matrices of this shape."""
        ready = Cosines(self.smoothness)
        c, h, w = (torch.arange(size, dtype=torch.float64) for size in image_shape)
        frequency = (c[:, None, None] ** 2 + h[:, None] ** 2 + w**2).sqrt()
        ready.weights = ((1 + frequency) ** -self.smoothness).to(device, dtype)
        ready.cosines = [cosines(size).to(device, dtype) for size in image_shape]
        return ready

    weights: Tensor
    cosines: list[Tensor]

    def images(self, unknowns: Tensor) -> Tensor:
        """Images ``[..., C, H, W]`` of amplitudes of the same shape."""
        return 0.5 + self._turn(unknowns * self.weights, [matrix.T for matrix in self.cosines])

    def unknowns(self, images: Tensor) -> Tensor:
        """The inverse of `images`."""
        return self._turn(images - 0.5, self.cosines) / self.weights

    def pull(self, gradient: Tensor) -> Tensor:
        """The adjoint of `images`."""
        return self._turn(gradient, self.cosines) * self.weights

    @staticmethod
    def _turn(x: Tensor, matrices: list[Tensor]) -> Tensor:
        channels, rows, columns = matrices
        shape = x.shape
        x = rows @ (x @ columns.T)
        return (channels @ x.flatten(-2)).view(shape) if len(channels) > 1 else x
