"""Each sample of a batch alone: its features from the last layer's gradient, for a given label.

If B ≤ classes and the gradient G = Σ_i r_i h̃_iᵀ / B has rank B, then its singular vectors U ``[C, B]`` and R
``[d + 1, B]`` span the r_i and the h̃_i. So h̃_i = R c for some c in ℝ^B, and what is left of r_i outside the span of U
must vanish:

    (I − U Uᵀ) (softmax([W b] R c) − e_y) = 0        with        (R c)_{d+1} = 1.

Those are C − B equations in B − 1 unknowns, for each sample alone: a batch falls apart into its samples. A label that
is not in the batch has no root, as a rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedleak.attacks.row_space.space import RowSpace, row_space
from fedleak.seeding import plain_generator


@dataclass(frozen=True)
class Roots:
    """What row-space matching found for N updates, L labels and S starts each.

    Attributes:
        features: ``[N, L, S, d]``.
        residual: ``[N, L, S]``, ‖(I − U Uᵀ) r‖² / ‖r‖²; at a root it is the square of the gradient's rounding.
        separation: ``[N]``, smallest over largest singular value of the gradient: rounding is amplified by its inverse.
    """

    features: Tensor
    residual: Tensor
    separation: Tensor


@dataclass(frozen=True)
class BatchFeatures:
    """The features of every sample of N batches.

    Attributes:
        features: ``[N, B, d]`` float64, in the order of the labels.
        std: ``[N, B]``, standard deviation of a sample's features that the gradient's noise causes.
        error: ``[N]``, ‖Σ_i r_i h̃_iᵀ / B − G‖² / ‖G‖²; not small where a label is wrong.
    """

    features: Tensor
    std: Tensor
    error: Tensor


def sample_roots(
    space: RowSpace,
    labels: Tensor,
    *,
    starts: int = 16,
    steps: int = 60,
    seed: int = 0,
    initial: Tensor | None = None,
) -> Roots:
    """Solve for the features of a sample of each label, by Levenberg–Marquardt from several starts at once.

    Args:
        space: N updates of batches of B, at most half of the classes, or there is nothing to match; the last layer
            has a bias.
        labels: ``[N, L]`` int64, label hypotheses.
        starts: starts for each label; they are combinations of the gradient's rows, so nothing else need be known.
        steps: Levenberg–Marquardt steps.
        seed: decides the starts.
        initial: ``[N, L, S, d]``, features to start from instead.

    Returns:
        the end of every start; float64, computed where the inputs lie.
    """
    rows, logits = space.basis, space.head
    if initial is None:
        c = _starts(space, starts, seed)[:, None].expand(-1, labels.shape[1], -1, -1)  # [N, L, S, B]
    else:
        c = F.pad(initial.double(), (0, 1), value=1.0) @ rows[:, None]
        c = c / (c @ rows[:, None, -1, :, None])
    one_hot = F.one_hot(labels, logits.shape[1]).double()[:, :, None]
    # Steps stay where the last feature is 1: they are orthogonal to R's last row.
    tangent = torch.linalg.svd(rows[:, -1:], full_matrices=True).Vh[:, 1:].mT  # [N, B, B − 1]
    slopes = (logits @ tangent)[:, None, None]
    span = space.left[:, None, None]

    def outside(vectors: Tensor) -> Tensor:
        within: Tensor = span @ (span.mT @ vectors)
        return vectors - within

    def residual(c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = (c @ logits.mT[:, None]).softmax(-1)
        r = outside((p - one_hot)[..., None])[..., 0]
        return r, p, r.square().sum(-1)

    r, p, value = residual(c)
    damping = torch.full_like(value, 1e-2)
    for _ in range(steps):
        jacobian = outside(p[..., None] * (slopes - p[..., None, :] @ slopes))
        normal = jacobian.mT @ jacobian
        diagonal = normal.diagonal(dim1=-2, dim2=-1)
        damped = normal + torch.diag_embed(damping[..., None] * diagonal + 1e-14)
        step = torch.linalg.solve_ex(damped, -(jacobian.mT @ r[..., None]))[0][..., 0]
        moved = c + (tangent[:, None, None] @ step[..., None])[..., 0]
        new_r, new_p, new_value = residual(moved)
        better = new_value < value
        c, r, p = (torch.where(better[..., None], new, old) for new, old in ((moved, c), (new_r, r), (new_p, p)))
        value = torch.where(better, new_value, value)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-12, 1e10)
    features = (c @ rows.mT[:, None])[..., :-1]
    size = (p - one_hot).square().sum(-1)
    return Roots(features, value / size.clamp(min=1e-30), space.singular[:, -1] / space.singular[:, 0])


def _starts(space: RowSpace, starts: int, seed: int) -> Tensor:
    """Points ``[N, S, B]`` of the row space with a last feature of 1.

    A row of a class that is not in the batch, divided by its bias gradient, is a weighted mean of the batch's features;
    differences of such means, stretched, reach beyond them.
    """
    coordinates = space.target  # [N, C, B]
    bias = (coordinates @ space.one[..., None])[..., 0]
    positive = bias > 0
    mass = torch.where(positive, bias, 0.0)
    centre = (coordinates * positive[..., None]).sum(1) / mass.sum(1, keepdim=True)
    means = coordinates / torch.where(positive, bias, torch.inf)[..., None]
    spread = torch.where(positive[..., None], means - centre[:, None], 0.0)
    generator = plain_generator(seed)
    mix = torch.randn(starts, bias.shape[1], generator=generator, dtype=torch.float64).to(bias)
    mix = mix / positive.sum(1).clamp(min=1).sqrt()[:, None, None]
    mix[:, 0] = 0
    c: Tensor = centre[:, None] + mix @ spread
    return c / (c @ space.one[..., None])


def batch_features(
    weight: Tensor,
    bias: Tensor,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    labels: Tensor,
    *,
    known: Tensor | None = None,
    seed: int = 0,
) -> BatchFeatures:
    """The features of every sample of batches with known labels.

    Samples that share a label are found one after the other: what the found samples contribute to the gradient is taken
    off, and the rest is the gradient of a smaller batch.

    Args:
        weight: ``[N, C, d]``, the last layer of each update's model.
        bias: ``[N, C]``.
        weight_gradient: ``[N, C, d]``, of the mean cross-entropy.
        bias_gradient: ``[N, C]``.
        labels: ``[N, B]`` int64.
        known: ``[N, B, d]``, the features where they were found before, in the order of the labels: then they are
            only refined.
        seed: decides the starts.
    """
    weight, bias, weight_gradient, bias_gradient = (v.double() for v in (weight, bias, weight_gradient, bias_gradient))
    size = labels.shape[1]
    space = row_space(weight_gradient, bias_gradient, weight, bias, size)
    if known is not None:
        features = _best(sample_roots(space, labels, initial=known[:, :, None], steps=20))
    else:
        features = _best(sample_roots(space, labels, seed=seed))
        for index in (n for n, own in enumerate(labels) if len(own.unique()) < size):
            one = [v[index : index + 1] for v in (weight, bias, weight_gradient, bias_gradient)]
            at = torch.tensor([index], device=labels.device)
            features[index] = _one_by_one(one, space[at], labels[index], features[index], seed)
    logits = features @ weight.mT + bias[:, None]
    p = logits.softmax(-1)
    r = p - F.one_hot(labels, weight.shape[1])
    extended = F.pad(features, (0, 1), value=1.0)
    wanted = torch.cat([weight_gradient, bias_gradient[..., None]], -1)
    gap = r.mT @ extended / size - wanted
    std = _feature_std(space, p, r, extended)
    return BatchFeatures(features, std, gap.square().sum((1, 2)) / wanted.square().sum((1, 2)))


def _feature_std(space: RowSpace, p: Tensor, r: Tensor, features: Tensor) -> Tensor:
    """What noise in the gradient does to features ``[N, B, d + 1]``, ``[N, B]``, to first order.

    The noise is read off the singular values that should be zero. It tilts the k-th singular vectors by noise / S_k,
    which moves a feature within its own span and, through the equations, along it.
    """
    noise = space.noise[:, None] / space.singular  # [N, B]
    tangent = torch.linalg.svd(space.one[:, None], full_matrices=True).Vh[:, 1:].mT
    slopes = (space.head @ tangent)[:, None]
    jacobian = p[..., None] * (slopes - p[..., None, :] @ slopes)
    jacobian = jacobian - space.left[:, None] @ (space.left.mT[:, None] @ jacobian)  # [N, B, C, B − 1]
    spread = 1 / torch.linalg.svdvals(jacobian.nan_to_num(0, 0, 0)).square().clamp(min=1e-30)
    outside = (r @ space.left).square() @ noise.square()[..., None]  # noise of an equation, [N, B, 1]
    tilt = (features @ space.basis).square() @ noise.square()[..., None]
    std: Tensor = (outside[..., 0] * spread.sum(-1) / features.shape[-1] + tilt[..., 0]).sqrt()
    return std


def _best(roots: Roots) -> Tensor:
    """The features ``[N, L, d]`` of the start with the lowest residual."""
    best = roots.residual.argmin(-1)[..., None, None].expand(-1, -1, 1, roots.features.shape[-1])
    return roots.features.gather(2, best)[:, :, 0]


def _one_by_one(problem: list[Tensor], space: RowSpace, labels: Tensor, features: Tensor, seed: int) -> Tensor:
    """The features ``[B, d]`` of one batch whose labels ``[B]`` repeat, from those of the first of each label."""
    weight, bias, weight_gradient, bias_gradient = problem
    size = len(labels)
    found: list[int] = []
    while len(found) < size:
        rest = [i for i in range(size) if i not in found]
        chosen = [i for n, i in enumerate(rest) if labels[i] not in labels[rest[:n]]]  # the first of each label left
        if found:
            known = features[found]
            r = (known @ weight[0].T + bias[0]).softmax(-1) - F.one_hot(labels[found], weight.shape[1])
            less = weight_gradient - (r.T @ known)[None] / size, bias_gradient - r.sum(0)[None] / size
            wanted = labels[chosen][None]
            rough = _best(sample_roots(row_space(*less, weight, bias, len(rest)), wanted, seed=seed))
            features[chosen] = _best(sample_roots(space, wanted, initial=rough[:, :, None], steps=20))[0]
        found += chosen
    return features
