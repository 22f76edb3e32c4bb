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
        total: Tensor | None = None
        for name, block in self.blocks.items():
            weight = precision[name]
            if isinstance(block, Factored) and weight.dim() == 1:
                part = _gram_of_factors(block) * weight[:, None, None].to(block.delta)
                total = part if total is None else total.add_(part)
                continue
            values = dense(block)
            root = weight.sqrt().to(values)
            values = values * (root[:, None, None, None] if root.dim() == 1 else root[:, None, None])
            total = add_gram(values.flatten(1, 2), total)
        assert total is not None
        return total

    def own_grams(self, precision: Rows) -> Tensor:
        """The blocks on the diagonal of `gram`: every sample's own, ``[P, B, K, K]``."""
        total: Tensor | None = None
        for name, block in self.blocks.items():
            weight = precision[name]
            if isinstance(block, Factored) and weight.dim() == 1:
                each = Factored(*(v.flatten(0, 1)[:, None] for v in vars(block).values()))
                part = _gram_of_factors(each).unflatten(0, block.delta.shape[:2]) * weight[:, None, None, None].to(
                    each.delta
                )
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


def _gram_of_factors(block: Factored) -> Tensor:
    """⟨ṙ_i h_iᵀ + r_i ḣ_iᵀ, ṙ_j h_jᵀ + r_j ḣ_jᵀ⟩ for all samples and coordinates, ``[P, D, D]``."""
    k = block.delta_dot.shape[2]
    inputs, deltas = block.inputs_dot.flatten(1, 2), block.delta_dot.flatten(1, 2)
    total: Tensor = add_gram(inputs, None).unflatten(2, (-1, k)).unflatten(1, (-1, k))  # [P, B, K, B, K]
    total *= (block.delta @ block.delta.mT)[:, :, None, :, None]
    total += (deltas @ deltas.mT).view_as(total) * (block.inputs @ block.inputs.mT)[:, :, None, :, None]
    cross = (block.delta_dot @ block.delta.mT[:, None])[..., None]  # ṙ_i·r_j: [P, B, K, B, 1]
    other = torch.einsum("pin,pjkn->pijk", block.inputs, block.inputs_dot)[:, :, None]  # h_i·ḣ_j: [P, B, 1, B, K]
    mixed = (cross * other).flatten(3).flatten(1, 2)
    return total.flatten(3).flatten(1, 2) + mixed + mixed.mT


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
