"""A batch's gradient of one fully connected layer in front of a ReLU, split into its samples by their zeros.

The gradient is Δᵀ A of rank B, and a shut ReLU makes Δ zero: a sample's row of Δ has as many zeros as the sample has
shut units, where a mixture of rows has next to none. A row of Δ is L q, with L a basis of the gradient's columns; B − 1
of its zeros determine q. So B − 1 units are drawn at random, and a q that makes them zero is a sample's if it makes
many more zero (Dimitrov 2024, SPEAR).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedleak.seeding import plain_generator

_AT_ONCE = 4096
_MORE = 4
"""Zeros beyond those that were drawn, from which on a direction is a sample's."""
_ROUNDING = 1e-9
"""Of the largest singular value, at least, where no smaller one tells the gradient's rounding."""
_SOUND = 1e-3
"""What `check` may find of a split that is right."""
_ALIKE = 3e-3
"""Rounding over the smallest singular value of a batch, from which on its samples are too much alike to tell apart."""


@dataclass(frozen=True)
class Split:
    """The samples of a layer, in no order.

    Attributes:
        delta: ``[B, O]`` float64, the loss's derivatives by the layer's outputs.
        inputs: ``[B, n]`` float64.
        error: the largest relative gap: of the observed gradients to those of these, and what the check found.
        draws: sets of units that were tried.
    """

    delta: Tensor
    inputs: Tensor
    error: float
    draws: int


def split(
    by_weight: Tensor,
    by_bias: Tensor,
    batch: int,
    check: Callable[[Tensor, Tensor], Tensor],
    *,
    draws: int = 2**20,
    seed: int = 0,
) -> Split | None:
    """Every sample's inputs and derivatives.

    Args:
        by_weight: ``[O, n]``, gradient of the mean loss.
        by_bias: ``[O]``.
        batch: samples, B; the chance that a draw hits is about B · 2^(1 − B) where half of the units are shut.
        check: of delta ``[B, O]`` and inputs ``[B, n]``, how far each sample's derivatives are from what the layers
            above make of its inputs, ``[B]``, relative. Any mixture of the samples explains this layer's gradient;
            only the samples themselves pass.
        draws: sets of units to try at most.
        seed: decides the draws.

    Returns:
        None where not all samples were found.
    """
    gradient, bias = by_weight.double(), by_bias.double()
    if batch > min(gradient.shape) or not bool(gradient.isfinite().all()):
        return None
    left, values, _ = torch.linalg.svd(gradient, full_matrices=False)
    basis = left[:, :batch]
    beyond = values[batch] if len(values) > batch else 0 * values[0]
    noise = float((beyond + _ROUNDING * values[0]) / values[batch - 1])
    if not noise < _ALIKE:
        return None
    near = max(1e-6, noise)
    found: Split | None = None
    pool, counts, tried = basis.new_empty(0, batch), torch.empty(0, dtype=torch.long), 0
    generator = plain_generator(seed)
    alive = basis[basis.norm(dim=1) > 1e-3 * basis.norm(dim=1).amax()]
    while tried < draws and len(alive) >= batch + _MORE:
        fresh = _directions(alive, near, generator)
        tried += _AT_ONCE
        if len(fresh):
            pool = torch.cat([pool, fresh])
            counts = ((pool @ alive.mT).abs() < near * (pool @ alive.mT).abs().amax(1, keepdim=True)).sum(1)
            pool, changed = _best(pool, counts, batch)
            if changed is None or len(pool) < batch:
                continue
            found = _joined(basis, pool[changed], gradient, bias, near, tried)
            error = float(check(found.delta, found.inputs).max())
            if error < _SOUND:
                return replace(found, error=max(error, found.error))
    return None


def _directions(basis: Tensor, near: float, generator: torch.Generator) -> Tensor:
    """Directions q ``[·, B]`` of norm 1 that make many units zero, of one round of draws."""
    batch = basis.shape[1]
    if batch == 1:
        return basis.new_ones(1, 1)
    units = torch.rand(_AT_ONCE, len(basis), generator=generator).topk(batch - 1).indices
    system = torch.cat([basis[units], torch.randn(_AT_ONCE, 1, batch, generator=generator, dtype=basis.dtype)], 1)
    right = basis.new_zeros(_AT_ONCE, batch, 1)
    right[:, -1] = 1
    q = torch.linalg.solve_ex(system, right)[0][..., 0]
    q = q / q.norm(dim=1, keepdim=True)
    rows = q @ basis.mT
    zeros = rows.abs() < near * rows.abs().amax(1, keepdim=True)
    patterns = zeros[q.isfinite().all(1) & (zeros.sum(1) >= batch - 1 + _MORE)].unique(dim=0)
    patterns = patterns[patterns.sum(1).argsort(descending=True, stable=True)[: 16 * batch]]
    exact = [torch.linalg.svd(basis[pattern]).Vh[-1] for pattern in patterns]
    return torch.stack(exact) if exact else basis.new_empty(0, batch)


def _best(pool: Tensor, counts: Tensor, batch: int) -> tuple[Tensor, Tensor | None]:
    """The different directions with the most zeros, 32 B at most, and of them B that are independent, or None."""
    kept: list[int] = []
    for place in counts.argsort(descending=True, stable=True).tolist():
        if not kept or not bool(((pool[kept] @ pool[place]).abs() > 1 - 1e-6).any()):
            kept.append(place)
        if len(kept) == 32 * batch:
            break
    pool = pool[kept]
    chosen: list[int] = []
    rest = pool.clone()
    for place in range(len(pool)):
        size = rest[place].norm()
        if size > 1e-4:
            chosen.append(place)
            unit = rest[place] / size
            rest = rest - (rest @ unit)[:, None] * unit
        if len(chosen) == batch:
            return pool, torch.tensor(chosen)
    return pool, None


def _joined(basis: Tensor, found: Tensor, gradient: Tensor, bias: Tensor, near: float, tried: int) -> Split:
    """What B directions make of the gradient."""
    scale = torch.linalg.solve(found.mT, basis.mT @ bias)
    delta = scale[:, None] * (found @ basis.mT)
    delta = torch.where(delta.abs() < near * delta.abs().amax(1, keepdim=True), 0.0, delta)
    inputs = torch.linalg.lstsq(delta.mT, gradient).solution
    gaps = (delta.mT @ inputs - gradient).norm() / gradient.norm(), (delta.sum(0) - bias).norm() / bias.norm()
    return Split(delta, inputs, float(max(gaps)), tried)
