"""How close a rebuilt image is to the true one, and inferred labels to the true ones.

Images are float tensors in [0, 1], ``[B, C, H, W]``; every image metric returns one float64 value per image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RECOVERED_MSE = 1e-3
"""An image counts as recovered if its mean squared error is below this."""


def mse(truth: Tensor, rebuilt: Tensor) -> Tensor:
    """Mean squared error of each image, ``[B]``; inf for an image that holds NaN or inf.

    Args:
        truth: ``[B, C, H, W]`` in [0, 1].
        rebuilt: the same shape.

    Raises:
        ValueError: if the shapes differ.
    """
    _check(truth, rebuilt)
    errors = (truth.double() - rebuilt.double()).square().flatten(1).mean(dim=1)
    return torch.nan_to_num(errors, nan=torch.inf, posinf=torch.inf)


def psnr(truth: Tensor, rebuilt: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB at a peak of 1, ``[B]``: inf if exact, -inf if not finite."""
    return -10 * torch.log10(mse(truth, rebuilt))


def ssim(truth: Tensor, rebuilt: Tensor) -> Tensor:
    """Structural similarity of each image, ``[B]`` in [-1, 1]; NaN for an image that holds NaN or inf.

    The published form: an 11×11 Gaussian window with sigma 1.5, no sample covariance, channels averaged. As usual the
    border, where the window leaves the image, is left out of the mean; an image smaller than the window keeps at least
    its centre, mirrored outwards.

    References:
        Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, 2004.
    """
    from skimage.metrics import structural_similarity  # late: a run that rebuilds no image need not wait for it

    _check(truth, rebuilt)
    shortest = min(truth.shape[-2:])
    window = min(11, shortest - 1 + shortest % 2)
    return torch.tensor(
        [
            structural_similarity(
                a, b, data_range=1, channel_axis=0, gaussian_weights=True, use_sample_covariance=False, win_size=window
            )
            if np.isfinite(b).all()
            else np.nan
            for a, b in zip(truth.double().cpu().numpy(), rebuilt.double().cpu().numpy(), strict=True)
        ],
        dtype=torch.float64,
    )


def label_accuracy(true: Tensor, inferred: Tensor) -> float:
    """Share of the true labels that were inferred: the overlap of the two multisets over the size of `true`.

    Args:
        true: ``[B]`` int64, at least one label.
        inferred: ``[B']`` int64; labels beyond the true multiset earn nothing.

    Raises:
        ValueError: if `true` is empty.
    """
    if len(true) == 0:
        raise ValueError("label accuracy needs at least one true label")
    values, counts = torch.unique(true, return_counts=True)
    found = (inferred[:, None] == values[None, :]).sum(dim=0)
    return float(torch.minimum(counts, found).sum()) / len(true)


def labels_exact(true: Tensor, inferred: Tensor) -> bool:
    """Whether the two multisets are the same: the whole batch's labels are right, none missing and none too many."""
    return len(true) == len(inferred) and bool((true.sort().values == inferred.sort().values).all())


def _check(truth: Tensor, rebuilt: Tensor) -> None:
    if truth.shape != rebuilt.shape or truth.ndim != 4:
        raise ValueError(f"needs two [B, C, H, W] of one shape, got {tuple(truth.shape)} and {tuple(rebuilt.shape)}")
