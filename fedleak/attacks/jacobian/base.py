"""The derivatives of P updates by coordinates of their images, and the products that a solver and the limit need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedleak.attacks.chain.base import Dense, Factored, Rows


class UpdateModel(Protocol):
    """P updates as functions of their images, and derivatives where it stands.

    Attributes:
        batch: B, where it stands.
    """

    batch: int

    def at(self, images: Tensor, labels: Tensor) -> None:
        """Stand at images ``[P, B, C, H, W]`` with label distributions ``[P, B, classes]``."""

    def gradients(self) -> Rows:
        """The updates, name -> ``[P, n]``."""

    def push(self, directions: Tensor) -> Rows:
        """Derivatives of the updates, name -> ``[P, n]``, along directions ``[P, B, C, H, W]`` of the images."""

    def pull(self, values: Rows) -> Tensor:
        """The adjoint of `push`: ``[P, B, C, H, W]`` of name -> ``[P, n]``."""

    def jacobian(self, basis: Tensor) -> Jacobian:
        """Derivatives by coordinates in `basis` ``[K, C, H, W]``, the same for every sample; then call `at` anew."""

    def jacobians(self, basis: Tensor) -> Iterator[Jacobian]:
        """The same, some samples of every problem at a time, so that memory is bounded."""


_TILE = 1024
"""Rows of a tile of the normal matrix: only tiles on and above the diagonal are computed."""


@dataclass(frozen=True)
class Jacobian:
    """∂update/∂coordinates of P problems with B samples of K coordinates each, D = B·K.

    Attributes:
        blocks: name -> derivatives of that parameter's update: dense ``[P, B, K, n]``, or in factors ``[P, B, …]``.
    """

    blocks: Mapping[str, Dense | Factored]

    def gram(self, precision: Rows) -> Tensor:
        """Jᵀ R⁻¹ J, ``[P, D, D]``.

        Args:
            precision: name -> ``[P]`` or ``[P, n]``, R⁻¹ of the tensor or of each of its elements.
        """
        blocks = _weighed(self.blocks, precision)
        problems, batch, width = _sizes(blocks[0])
        total = _like(blocks[0]).new_empty(problems, batch * width, batch * width)
        for sample in range(batch):  # on and above the diagonal, then mirrored
            first, last = sample * width, (sample + 1) * width
            strip = total[:, first:last, first:]
            for number, block in enumerate(blocks):
                own, others = _pair(block, sample)
                if number:
                    strip.baddbmm_(own, others.mT)
                else:
                    strip.copy_(own @ others.mT)
            total[:, last:, first:last] = strip[:, :, width:].mT
        return total

    def own_grams(self, precision: Rows) -> Tensor:
        """The blocks on the diagonal of `gram`: every sample's own, ``[P, B, K, K]``."""
        total: Tensor | None = None
        for name, block in self.blocks.items():
            weight = precision[name]
            if isinstance(block, Factored) and weight.dim() == 1:
                each = Factored(*(v.flatten(0, 1)[:, None] for v in vars(block).values()))
                own, others = _pair(each, 0)
                part = (own @ others.mT).unflatten(0, block.delta.shape[:2])
                part *= weight[:, None, None, None].to(part)
                total = part if total is None else total.add_(part)
                continue
            values = dense(block)
            root = weight.sqrt().to(values)
            values = values * (root[:, None, None, None] if root.dim() == 1 else root[:, None, None])
            part = values @ values.mT
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def leading(self, width: int) -> Jacobian:
        """The derivatives by the first `width` coordinates of every sample."""
        blocks: dict[str, Dense | Factored] = {}
        for name, block in self.blocks.items():
            if isinstance(block, Dense):
                blocks[name] = Dense(block.values[:, :, :width].clone())
            else:
                dots = block.delta_dot[:, :, :width].clone(), block.inputs_dot[:, :, :width].clone()
                blocks[name] = Factored(block.delta, block.inputs, *dots)
        return Jacobian(blocks)

    @staticmethod
    def join(parts: Sequence[Jacobian]) -> Jacobian:
        """Derivatives by some samples each, as those of the whole batch."""
        if len(parts) == 1:
            return parts[0]
        blocks: dict[str, Dense | Factored] = {}
        for name, first in parts[0].blocks.items():
            each = [vars(part.blocks[name]).values() for part in parts]
            blocks[name] = type(first)(*(torch.cat(values, 1) for values in zip(*each, strict=True)))
        return Jacobian(blocks)

    def pull(self, residual: Rows) -> Tensor:
        """Jᵀ y, ``[P, D]``, of y: name -> ``[P, n]``."""
        parts = []
        for name, block in self.blocks.items():
            if isinstance(block, Dense):
                y = residual[name].to(block.values)
                parts.append((block.values @ y[:, None, :, None])[..., 0].flatten(1))
                continue
            y = residual[name].to(block.delta).unflatten(1, (block.delta.shape[2], -1))
            by_delta = block.inputs @ y.mT  # [P, B, O]
            by_inputs = block.delta @ y
            part = block.delta_dot @ by_delta[..., None] + block.inputs_dot @ by_inputs[..., None]
            parts.append(part[..., 0].flatten(1))
        return torch.stack(parts).sum(0)

    def push(self, z: Tensor) -> Rows:
        """J z: name -> ``[P, n]``, of z ``[P, D]``."""
        found = {}
        for name, block in self.blocks.items():
            if isinstance(block, Dense):
                found[name] = (z.to(block.values)[:, None] @ block.values.flatten(1, 2))[:, 0]
                continue
            each = z.to(block.delta).unflatten(1, block.delta_dot.shape[1:3])[:, :, None]
            delta, inputs = (each @ block.delta_dot)[:, :, 0], (each @ block.inputs_dot)[:, :, 0]
            found[name] = (delta.mT @ block.inputs + block.delta.mT @ inputs).flatten(1)
        return found


def dense(block: Dense | Factored) -> Tensor:
    """``[..., K, n]``."""
    if isinstance(block, Dense):
        return block.values
    values = block.delta_dot[..., None] * block.inputs[..., None, None, :]
    return (values + block.delta[..., None, :, None] * block.inputs_dot[..., None, :]).flatten(-2)


_SMALL = 512
"""Elements up to which parameters are taken together: each alone would cost a pass over the whole matrix."""


def _weighed(blocks: Mapping[str, Dense | Factored], precision: Rows) -> list[Dense | Factored]:
    """R^-½ J, in factors where the precision is the same for a whole parameter that has them."""
    small: list[Tensor] = []
    found: list[Dense | Factored] = []
    for name, block in blocks.items():
        root = precision[name].sqrt()
        if isinstance(block, Factored) and root.dim() == 1:
            each = root.to(block.delta)[:, None, None]
            delta, delta_dot = block.delta * each, block.delta_dot * each[..., None]
            found.append(Factored(delta, block.inputs, delta_dot, block.inputs_dot))
            continue
        values = dense(block)
        values = values * root.to(values).view(len(root), 1, 1, -1)
        if values.shape[3] <= _SMALL:
            small.append(values)
        else:
            found.append(Dense(values))
    return [*found, Dense(torch.cat(small, 3))] if small else found


def _like(block: Dense | Factored) -> Tensor:
    return block.values if isinstance(block, Dense) else block.delta_dot


def _sizes(block: Dense | Factored) -> tuple[int, int, int]:
    """P, B and K."""
    problems, batch, width = _like(block).shape[:3]
    return problems, batch, width


def _pair(block: Dense | Factored, i: int) -> tuple[Tensor, Tensor]:
    """Rows ``[P, K, m]`` of sample i and ``[P, (B − i) K, m]`` of it and those after it, whose products are the gram's.

    Of factors: ⟨ṙ_i h_iᵀ + r_i ḣ_iᵀ, J_j⟩ = ⟨ṙ_i, J_j h_i⟩ + ⟨ḣ_i, J_jᵀ r_i⟩ with J_j = ṙ_j h_jᵀ + r_j ḣ_jᵀ.
    """
    if isinstance(block, Dense):
        return block.values[:, i], block.values[:, i:].flatten(1, 2)
    delta, inputs = block.delta[:, i:], block.inputs[:, i:]
    delta_dot, inputs_dot = block.delta_dot[:, i:], block.inputs_dot[:, i:]
    r, h = delta[:, 0, :, None], inputs[:, 0, :, None]  # [P, m, 1]
    by_inputs = (inputs @ h)[..., None] * delta_dot + (inputs_dot @ h[:, None]) * delta[:, :, None]
    by_delta = (delta @ r)[..., None] * inputs_dot + (delta_dot @ r[:, None]) * inputs[:, :, None]
    own = torch.cat([delta_dot[:, 0], inputs_dot[:, 0]], 2)
    return own, torch.cat([by_inputs, by_delta], 3).flatten(1, 2)


def add_gram(rows: Tensor, total: Tensor | None, tile: int = _TILE) -> Tensor:
    """``total`` + rows rowsᵀ, ``[P, D, D]`` of rows ``[P, D, n]``; half of the products are mirrored.

    Args:
        rows: of each problem.
        total: what to add to, in place; None for nothing.
        tile: rows of a tile; the smaller, the fewer products are computed twice.
    """
    count = rows.shape[1]
    if count <= _TILE:
        return rows @ rows.mT if total is None else total.baddbmm_(rows, rows.mT)
    result = rows.new_empty(len(rows), count, count) if total is None else total
    for first in range(0, count, tile):
        last = min(first + tile, count)
        strip = rows[:, first:last] @ rows[:, first:].mT
        if total is None:
            result[:, first:last, first:] = strip
            result[:, last:, first:last] = strip[:, :, last - first :].mT
        else:
            result[:, first:last, first:] += strip
            result[:, last:, first:last] += strip[:, :, last - first :].mT
    return result
