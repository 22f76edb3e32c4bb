"""The samples of a batch together: Levenberg–Marquardt on all their coordinates, for given labels.

The derivative factors, so that the normal equations cost products of small matrices. The row-space methods' joint
fit; `samples` solves for each sample alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.attacks.row_space.space import RowSpace


@dataclass(frozen=True)
class Mismatch:
    """How far coordinates are from solving their problems.

    Attributes:
        probabilities: ``[P, B, C]``.
        error: ``[P, B, C]``, r = probabilities − one-hot labels.
        gradient: ``[P, C, B]``, the whitened mismatch of the gradient.
        affine: ``[P, B]``, of the constant.
        total: ``[P]``, sum of squares.
    """

    probabilities: Tensor
    error: Tensor
    gradient: Tensor
    affine: Tensor
    total: Tensor


def mismatch(space: RowSpace, x: Tensor, truth: Tensor, scale: Tensor) -> Mismatch:
    """Compare P batches with their problems.

    Args:
        space: P problems.
        x: ``[P, B, B]``, row i the coordinates of sample i.
        truth: ``[P, B, C]``, one-hot labels.
        scale: ``[P, B]``, see `RowSpace.whitening`.
    """
    probabilities = (x @ space.head.transpose(1, 2)).softmax(dim=2)
    error = probabilities - truth
    gradient = (error.transpose(1, 2) @ x / x.shape[1] - space.target) * scale[:, None]
    affine = (x @ space.one[..., None])[..., 0] - space.affine[:, None]
    total = gradient.square().sum(dim=(1, 2)) + affine.square().sum(dim=1)
    return Mismatch(probabilities, error, gradient, affine, total)


def fit(space: RowSpace, x: Tensor, truth: Tensor, *, floor: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Levenberg–Marquardt on the coordinates of P batches with fixed labels.

    Args:
        space: P problems.
        x: ``[P, B, B]``, starts.
        truth: ``[P, B, C]``, one-hot labels.
        floor: ``[P]``, ε of the whitening.
        steps: iterations.

    Returns:
        ``[P, B, B]`` and the sum of squares there, ``[P]``.
    """
    scale = space.whitening(floor)
    damping = torch.full_like(scale[:, 0], 1e-2)
    at = mismatch(space, x, truth, scale)
    for _ in range(steps):
        matrix, slope = _normal_equations(space, x, at, scale)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        lift = damping[:, None] * (diagonal + 1e-10 * diagonal.amax(dim=1, keepdim=True))
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(lift))
        moved = x - torch.cholesky_solve(slope, factor).view_as(x)
        there = mismatch(space, moved, truth, scale)
        better = (there.total < at.total) & (failed == 0)  # NaN compares false
        x = torch.where(better[:, None, None], moved, x)
        at = Mismatch(
            *(
                torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old)
                for new, old in zip(vars(there).values(), vars(at).values(), strict=True)
            )
        )
        damping = torch.where(better, damping * 0.3, damping * 4).clamp(1e-12, 1e6)
    return x, at.total


def _normal_equations(space: RowSpace, x: Tensor, at: Mismatch, scale: Tensor) -> tuple[Tensor, Tensor]:
    """JᵀJ ``[P, B·B, B·B]`` and Jᵀe ``[P, B·B, 1]`` of the sum of squares, unknowns in the order of x's memory.

    J is never built: the derivative of r_i x_iᵀ is D_i[c, l] x_i[k] + r_i[c] δ_kl, with D_i the derivative of r_i,
    and its products factor.
    """
    problems, batch, rank = x.shape
    weight = scale.square()
    mean = at.probabilities @ space.head
    slopes = at.probabilities[..., None] * (space.head[:, None] - mean[:, :, None])  # D: [P, i, c, l]
    flat = slopes.permute(0, 2, 1, 3).reshape(problems, -1, batch * rank)
    weighted = x * weight[:, None]
    matrix = (flat.transpose(1, 2) @ flat).view(problems, batch, rank, batch, rank)
    matrix = matrix * (weighted @ x.transpose(1, 2))[:, :, None, :, None]
    cross = (flat.transpose(1, 2) @ at.error.transpose(1, 2)).view(problems, batch, rank, batch, 1)
    cross = cross * weighted[:, :, None, None]
    matrix = matrix + cross + cross.permute(0, 3, 4, 1, 2)
    eye = torch.diag_embed(weight)[:, None, :, None]
    matrix = (matrix + (at.error @ at.error.transpose(1, 2))[:, :, None, :, None] * eye) / batch**2
    same = torch.eye(batch, dtype=x.dtype, device=x.device)[None, :, None, :, None]
    matrix = matrix + same * (space.one[:, :, None] * space.one[:, None])[:, None, :, None]
    whitened = at.gradient * scale[:, None]
    slope = torch.einsum("picl,pic->pil", slopes, x @ whitened.transpose(1, 2)) + at.error @ whitened
    slope = slope / batch + at.affine[..., None] * space.one[:, None]
    return matrix.reshape(problems, batch * rank, batch * rank), slope.reshape(problems, -1, 1)
