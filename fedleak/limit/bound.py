"""The least error of each image that a linear-Gaussian attacker could reach, and the bits that an update tells.

With J the derivative of the update by the images' coordinates in the prior (mean and standard deviations out of them)
and R the covariance of what separates the update from that of the true images (a defense's noise, rounding), the
linearised posterior is C = (1 + Jᵀ R⁻¹ J)⁻¹. An image's limit is the trace of its block, in pixels; the update
tells ½ log₂ det(1 + Jᵀ R⁻¹ J) bits about the batch. It knows the truth, and so belongs to the evaluation alone.

It is linearised at the true images, for a Gaussian prior: through noise so large that C is as wide as the prior it is
an estimate, and a better prior could get below it.

References:
    van Trees 1968 (Bayesian Cramér-Rao); Hannun 2021 (Fisher information loss); Guo 2022 (bounding reconstruction).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fedleak.attacks.chain.base import Factored, Rows
from fedleak.attacks.image_prior import ImagePrior
from fedleak.attacks.jacobian.base import Jacobian, add_gram, dense
from fedleak.attacks.jacobian.models import update_model
from fedleak.attacks.noise import Noise
from fedleak.attacks.problem import Target

EXACT = 3200
"""Unknowns up to which nothing is left out: memory and time grow with their square and cube."""


@dataclass(frozen=True)
class Limit:
    """What one update can leak.

    Attributes:
        mse: ``[B]`` float64, the least mean squared error of each image's pixels.
        bits: that the update tells about the batch.
        coordinates: of each image that were taken into account; the others count as unknown.
    """

    mse: Tensor
    bits: float
    coordinates: int


@torch.no_grad()
def limit(
    model: nn.Module,
    target: Target,
    images: Tensor,
    labels: Tensor,
    prior: ImagePrior,
    noise: Noise,
    *,
    unknowns: int = EXACT,
) -> Limit:
    """The limit of one update at its true images.

    Args:
        model: the architecture.
        target: where the client started, and how it trained.
        images: ``[B, C, H, W]`` in [0, 1], the true ones, local step by local step.
        labels: ``[B]`` int64.
        prior: of an image.
        noise: of the update.
        unknowns: at most so many, all images together: the leading coordinates of each image. Those left out stay as
            uncertain as the prior has them, so that the limit is a little high there.
    """
    batch, size = len(images), len(prior.root)
    width = max(1, min(size, unknowns // batch))
    logits = int(model(images[:1].to(next(model.parameters()))).shape[1])
    exact = update_model(model, [target], prior.image_shape, dtype=torch.float64)
    exact.at(images[None].double(), one_hot(labels, logits).double()[None])
    precision = {name: value[None] for name, value in noise.precision().items()}
    total = _information(exact.jacobians(prior.basis(0, width)), precision, batch * width)
    total.diagonal().add_(1)
    factor = _factor(total)
    covariance = _inverse_diagonal(factor, width).view(batch, width)
    rest = prior.variance[width:].sum()
    # The coordinates are eigenvectors, so that pixels' squared errors add up along them.
    mse = ((covariance * prior.variance[:width]).sum(1) + rest) / size
    return Limit(mse, float(factor.diagonal().log2().sum()), width)


def _information(samples: Iterator[Jacobian], precision: Rows, unknowns: int) -> Tensor:
    """Jᵀ R⁻¹ J, ``[D, D]``, of derivatives by some samples each: what is dense is held once, weighed as it comes."""
    factors: list[Jacobian] = []
    rows: Tensor | None = None
    done = 0
    for jacobian in samples:
        inner = {n: b for n, b in jacobian.blocks.items() if isinstance(b, Factored) and precision[n].dim() == 1}
        factors.append(Jacobian(inner))
        parts = {n: dense(b)[0].flatten(0, 1) for n, b in jacobian.blocks.items() if n not in inner}
        numbers = sum(part.shape[1] for part in parts.values())
        if rows is None:
            rows = next(iter(precision.values())).new_empty(1, unknowns, numbers)
        first = 0
        for name, part in parts.items():
            root = precision[name][0].sqrt().to(part)
            torch.mul(part, root, out=rows[0, done : done + len(part), first : first + part.shape[1]])
            first += part.shape[1]
        done += len(part)
    assert rows is not None
    total = Jacobian.join(factors).gram(precision) if factors[0].blocks else None
    return add_gram(rows, total, tile=256)[0]


def _factor(total: Tensor) -> Tensor:
    """Cholesky's factor; where rounding made `total` indefinite, with the least ridge that helps, in powers of ten.

    Directions that the ridge touches are told less of than float64 can say beside the best known one, so that the limit
    is a little low there.
    """
    ridge = torch.finfo(total.dtype).eps * total.diagonal().max()
    for _ in range(6):
        factor, failed = torch.linalg.cholesky_ex(total)
        if not failed:
            return factor
        total.diagonal().add_(ridge)
        ridge = 10 * ridge
    return torch.linalg.cholesky(total)


def _inverse_diagonal(factor: Tensor, width: int) -> Tensor:
    """The diagonal of (L Lᵀ)⁻¹, `width` columns of L⁻¹ at a time: they are zero above their own rows."""
    found = []
    for first in range(0, len(factor), width):
        rest = factor[first:, first:]
        columns = torch.eye(len(rest), min(width, len(rest)), dtype=factor.dtype, device=factor.device)
        found.append(torch.linalg.solve_triangular(rest, columns, upper=False).square().sum(0))
    return torch.cat(found)
