"""What an attacker believes of an image before it sees an update: a Gaussian, in its eigenvectors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedleak.seeding import plain_generator

_FLOOR = 1e-6
"""Least variance of a coordinate: what auxiliary images never show is unlikely, not impossible."""
_FOLDS = 4


@dataclass(frozen=True)
class ImagePrior:
    """x = mean + z root with z standard normal: a Gaussian with covariance rootᵀ root.

    Attributes:
        mean: ``[D]`` float64, D = C·H·W pixels in [0, 1].
        root: ``[D, D]`` float64, row k the k-th eigenvector of the covariance times its standard deviation, the
            widest first.
        image_shape: (C, H, W).
        source: in words, for reports.
    """

    mean: Tensor
    root: Tensor
    image_shape: tuple[int, int, int]
    source: str

    @property
    def variance(self) -> Tensor:
        """Of each coordinate, ``[D]``, falling."""
        return self.root.square().sum(1)

    def to(self, device: torch.device | str) -> ImagePrior:
        """The same on another device."""
        return ImagePrior(self.mean.to(device), self.root.to(device), self.image_shape, self.source)

    def images(self, z: Tensor) -> Tensor:
        """Images ``[..., C, H, W]`` of the leading coordinates ``[..., K]``, the others being zero."""
        images: Tensor = (self.mean + z @ self.root[: z.shape[-1]]).unflatten(-1, self.image_shape)
        return images

    def coordinates(self, images: Tensor) -> Tensor:
        """All coordinates ``[..., D]`` of images ``[..., C, H, W]``."""
        return (images.flatten(-3).to(self.mean) - self.mean) @ (self.root / self.variance[:, None]).T

    def tempered(self, power: float) -> ImagePrior:
        """The same eigenvectors with variances v₁ (v / v₁)^power: above 1, detail is held back."""
        ratio = self.variance / self.variance[0]
        return replace(self, root=self.root * (ratio ** ((power - 1) / 2))[:, None])

    def basis(self, first: int, last: int) -> Tensor:
        """Coordinates `first` to `last` as images ``[last − first, C, H, W]``."""
        basis: Tensor = self.root[first:last].unflatten(1, self.image_shape)
        return basis


def prior_of_images(images: Tensor) -> ImagePrior:
    """Mean and covariance of auxiliary images ``[M, C, H, W]`` in [0, 1].

    With fewer images than a few times the pixels, the eigenvalues of a sample covariance are far from the energy that
    other images have along its eigenvectors. That energy is measured instead, on images left out of the covariance
    (cross-validation, Bartz 2016), and where there are too few images for that, the natural spectrum is mixed in.
    """
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    x = images.double().flatten(1)
    count, size = x.shape
    mean = x.mean(0)
    order = torch.randperm(count, generator=plain_generator(0)).to(x.device)
    smooth = natural_prior(shape, device=x.device)
    energies = torch.zeros(size, dtype=x.dtype, device=x.device)
    folds = order.chunk(_FOLDS)
    for place, held_out in enumerate(folds):
        rest = x[torch.cat([fold for other, fold in enumerate(folds) if other != place])]
        vectors = torch.linalg.eigh(_covariance(rest, smooth)).eigenvectors.flip(1)
        energies += ((x[held_out] - rest.mean(0)) @ vectors).square().mean(0) / len(folds)
    vectors = torch.linalg.eigh(_covariance(x, smooth)).eigenvectors.flip(1)
    variance = _falling(energies).clamp(min=_FLOOR)
    return ImagePrior(mean, (vectors * variance.sqrt()).T.contiguous(), shape, f"{count} auxiliary images")


def natural_prior(image_shape: tuple[int, int, int], *, device: torch.device | str = "cpu") -> ImagePrior:
    """Natural images without any at hand: grey, amplitudes that fall like one over the frequency (Field 1987).

    Colours follow brightness with a tenth of its variance.
    """
    channels, height, width = image_shape
    axes = [cosines(size) for size in image_shape]
    c, h, w = (torch.arange(size, dtype=torch.float64) for size in image_shape)
    frequency = (h[:, None] ** 2 + w[None] ** 2).sqrt()
    amplitude = (1 + frequency) ** -1.0
    amplitude = amplitude[None] * torch.where(c > 0, 0.1**0.5, 1.0)[:, None, None]
    amplitude = amplitude * (0.08 * channels * height * width / amplitude.square().sum()).sqrt()  # std .28 a pixel
    vectors = torch.einsum("ac,bh,dw->abdchw", *axes).reshape(-1, channels * height * width)
    root = vectors * amplitude.flatten()[:, None]
    order = amplitude.flatten().argsort(descending=True, stable=True)
    mean = torch.full((channels * height * width,), 0.5, dtype=torch.float64)
    return ImagePrior(mean.to(device), root[order].to(device), image_shape, "a natural-image spectrum")


def _covariance(x: Tensor, smooth: ImagePrior) -> Tensor:
    """Of images ``[M, D]``, with a grain of the natural spectrum that settles what M images leave open."""
    count, size = x.shape
    share = size / (size + 50.0 * count)
    other = smooth.root.T @ smooth.root
    sample = torch.cov(x.T) if count > 1 else torch.zeros_like(other)
    level = sample.diagonal().mean().clamp(min=1e-4) / other.diagonal().mean()
    return (1 - share) * sample + share * level * other


def _falling(values: Tensor) -> Tensor:
    """The falling sequence nearest to `values` ``[D]`` in least squares (pool adjacent violators)."""
    means: list[float] = []
    counts: list[int] = []
    for value in values.tolist():
        mean, count = value, 1
        while means and means[-1] < mean:
            before, weight = means.pop(), counts.pop()
            mean, count = (mean * count + before * weight) / (count + weight), count + weight
        means.append(mean)
        counts.append(count)
    return torch.tensor(means, dtype=values.dtype, device=values.device).repeat_interleave(
        torch.tensor(counts, device=values.device)
    )


def cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II), ``[frequency, position]``."""
    k, x = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    matrix: Tensor = torch.cos(math.pi * k * (x + 0.5) / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
