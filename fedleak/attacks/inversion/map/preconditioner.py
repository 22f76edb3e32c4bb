"""The normal matrix of a Gauss-Newton step in float32, whole or in the parts that matter."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.attacks.chain.base import Rows
from fedleak.attacks.jacobian.base import UpdateModel

_WHOLE = 14000
"""Unknowns up to which the whole normal matrix is taken: 800 MB."""
_LEADING = 4000
"""Leading coordinates of all samples that are taken together where it is not."""


class Preconditioner:
    """Approximate inverse of JᵀJ / s + 1 + λ of P problems, from derivatives in float32.

    Small problems: the whole matrix. Large ones: the sum of two inverses, that of every sample's own block, which knows
    all its coordinates, and that of the leading coordinates of all samples, which knows how samples hang together.

    Args:
        precision: name -> ``[P]`` or ``[P, n]``, the noise's inverse variance.
        basis: ``[K, C, H, W]``, the coordinates.

    Attributes:
        ready: whether there are derivatives at all.
        blocks: every sample's own, where the matrix is taken in parts.
    """

    def __init__(self, precision: Rows, basis: Tensor) -> None:
        self.precision = {name: value.float() for name, value in precision.items()}
        self.basis = basis.float()
        self.ready = False
        self.blocks: Tensor | None = None
        self.lifts = [1e-6, 1e-6]
        self.taken: Tensor | None = None

    def rescale(self, factor: Tensor, basis: Tensor) -> None:
        """Take coordinates that are `factor` ``[K]`` times as wide, those in `basis`: the same derivatives scaled."""
        self.basis, batch = basis.float(), self.batch
        own = factor.float()
        lead = own[: self.lead].repeat(batch)
        self.coarse.mul_(lead[:, None]).mul_(lead)
        if self.blocks is not None:
            self.blocks.mul_(own[:, None]).mul_(own)
        self.taken = None

    def renew(self, model: UpdateModel) -> None:
        """Take the derivatives where `model` stands."""
        self.batch = batch = model.batch
        width = len(self.basis)
        self.lead = width if batch * width <= _WHOLE else min(width, max(32, _LEADING // batch))
        self.blocks = None
        blocks, leading = [], []
        if self.lead == width:
            self.coarse = model.jacobian(self.basis).gram(self.precision)
        else:
            for jacobian in model.jacobians(self.basis):
                blocks.append(jacobian.own_grams(self.precision))
                leading.append(jacobian.leading(self.lead))
            self.blocks = torch.cat(blocks, 1)
            self.coarse = type(leading[0]).join(leading).gram(self.precision)
        self.ready, self.taken = True, None

    def factor(self, s: Tensor, damping: Tensor) -> None:
        """Take s and λ ``[P]``."""
        taken = torch.stack([s, damping])
        if self.taken is not None and torch.equal(taken, self.taken):
            return
        self.taken = taken
        self.coarse_factor, self.lifts[0] = _cholesky(self.coarse, s, damping, self.lifts[0])
        self.block_factors = None
        if self.blocks is not None:
            each = self.blocks.flatten(0, 1)
            spread = self.blocks.shape[1]
            each_s, each_damping = s.repeat_interleave(spread), damping.repeat_interleave(spread)
            self.block_factors, self.lifts[1] = _cholesky(each, each_s, each_damping, self.lifts[1])

    def solve(self, right: Tensor) -> Tensor:
        """``[P, B, K]`` float64 of right sides of that shape."""
        size = right.flatten(1).norm(dim=1).clamp(min=1e-300)[:, None, None]
        unit = (right / size).float()
        low = unit[..., : self.lead]
        found = _solved(self.coarse_factor, low.flatten(1)).view(low.shape)
        if self.block_factors is not None:
            own = _solved(self.block_factors, unit.flatten(0, 1)).view(unit.shape)
            found = own + torch.nn.functional.pad(found, (0, unit.shape[2] - self.lead))
        result: Tensor = found.double() * size
        return result


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    """x of L Lᵀ x = right, ``[N, n]``; `torch.cholesky_solve` copies L at every call, ten times slower."""
    half = torch.linalg.solve_triangular(factor, right[..., None], upper=False)
    whole: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return whole[..., 0]


def _cholesky(gram: Tensor, s: Tensor, damping: Tensor, lift: float) -> tuple[Tensor, float]:
    """Factors of gram / s + 1 + λ ``[N, n, n]``, the diagonal lifted as far as float32 needs, and how far that was."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    scale = (1 / s).float()[:, None]
    while True:
        matrix = gram * scale[..., None]
        matrix.diagonal(dim1=1, dim2=2).add_((1 + damping).float()[:, None] + lift * diagonal * scale)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not bool((failed != 0).any()) or lift > 1:
            return factor, lift
        lift *= 10
