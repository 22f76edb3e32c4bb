"""Fully connected layers, whose gradient is compared in the factors of a batch's rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedleak.attacks.chain.base import Dense, Factored, Layer, Observed, Rows, Stack
from fedleak.attacks.chain.products import Products
from fedleak.attacks.chain.undo import Linear
from fedleak.seeding import plain_generator


class FullyConnected(Layer):
    """A linear layer on vectors.

    An observed gradient T of the rank of a batch is kept as M Qᵀ with Q ``[n, r]`` orthonormal. With inputs a split
    into c = a Q and the rest a⊥, the gap is G − T = (δᵀ c − M) Qᵀ + δᵀ a⊥: two orthogonal parts, each small when the
    updates agree, so that its square ‖δᵀ c − M‖² + ⟨δδᵀ, a⊥a⊥ᵀ⟩ keeps its precision (‖G‖² − 2⟨G, T⟩ + ‖T‖² does not).
    Otherwise the gradient is formed.
    """

    def __init__(self, name: str, module: nn.Linear) -> None:
        self.name = name
        self.weight, self.bias = f"{name}.weight", f"{name}.bias" if module.bias is not None else None
        self.parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        self.shape = (module.out_features, module.in_features)
        self.rank: int | None = None

    def weights(self, targets: Sequence[Observed], stack: Stack) -> Rows:
        """Weights ``[P, n_out, n_in]``, their transposes (a row vector times a matrix is what is fast), biases."""
        weight = stack([t.parameters[self.weight] for t in targets])
        rows = {self.weight: _padded(weight), f"{self.weight}:transposed": _padded(weight.mT)}
        if self.bias is not None:
            rows[self.bias] = stack([t.parameters[self.bias] for t in targets])
        return rows

    def load(self, targets: Sequence[Observed], stack: Stack) -> Rows:
        """Observed gradients, whole or in factors."""
        target = stack([t.update[self.weight] for t in targets])
        if self.rank is None:
            rows = {f"target:{self.weight}": target}
        else:
            q, m = factors(target, self.rank)
            rows = {f"q:{self.weight}": _padded(q), f"qt:{self.weight}": q.mT.contiguous(), f"m:{self.weight}": m}
        if self.bias is not None:
            rows[f"target:{self.bias}"] = stack([t.update[self.bias] for t in targets])
        return rows

    def forward(self, rows: Rows, a: Tensor) -> Tensor:
        """``[P, B, n_out]``."""
        self.a = a
        z = _times(a, rows[f"{self.weight}:transposed"], self.shape[0])
        return z if self.bias is None else z + rows[self.bias][:, None]

    def backward(self, rows: Rows, delta: Tensor) -> Tensor | None:
        """``[P, B, n_in]``."""
        self.delta = delta
        return None if self.first else _times(delta, rows[self.weight], self.shape[1])

    def book(self, rows: Rows, products: Products) -> None:
        """Gaps of weight, in factors where the observed one is, and bias."""
        delta = self.delta
        if self.rank is None:
            target = rows[f"target:{self.weight}"]
            self.gap = delta.mT @ self.a - target
            products.add(self.weight, self.gap, target)
        else:
            q, m = rows[f"q:{self.weight}"], rows[f"m:{self.weight}"]
            self.c = _times(self.a, q, self.rank)
            self.outside = self.a - self.c @ rows[f"qt:{self.weight}"]
            self.gap = delta.mT @ self.c - m
            self.gram_a = self.outside @ self.outside.mT
            self.gram_delta = delta @ delta.mT
            products.add(self.weight, self.gap, m)
            products.dd[self.weight] = products.dd[self.weight] + (self.gram_a * self.gram_delta).flatten(1).sum(1)
        if self.bias is not None:
            self.bias_gap = delta.sum(1) - rows[f"target:{self.bias}"]
            products.add(self.bias, self.bias_gap, rows[f"target:{self.bias}"])

    def gradients(self) -> Rows:
        """Weight ``[P, n_out, n_in]`` and bias ``[P, n_out]``."""
        found = {self.weight: self.delta.mT @ self.a}
        if self.bias is not None:
            found[self.bias] = self.delta.sum(1)
        return found

    def weigh(self, rows: Rows, products: Products) -> None:
        """∂objective/∂gradient of weight, in the factors where the observed one is, and bias."""
        target = rows[f"target:{self.weight}" if self.rank is None else f"m:{self.weight}"]
        self.pulled = products.pull(self.weight, self.gap, target)
        self.by_d = products.by_d[self.weight][:, None, None]
        if self.bias is not None:
            self.bias_pulled = products.pull(self.bias, self.bias_gap, rows[f"target:{self.bias}"])

    def assign(self, values: Rows) -> None:
        """Given ones, ``[P, n]`` each."""
        self.pulled = values[self.weight].unflatten(1, self.shape)
        if self.bias is not None:
            self.bias_pulled = values[self.bias]

    def forward_again(self, rows: Rows, by_delta: Tensor | None) -> Tensor | None:
        """``[P, B, n_out]``."""
        if self.rank is None:
            result = self.a @ self.pulled.mT
        else:
            result = self.c @ self.pulled.mT + self.by_d * (self.gram_a @ self.delta)
        if by_delta is not None:
            result = result + _times(by_delta, rows[f"{self.weight}:transposed"], self.shape[0])
        if self.bias is not None:
            result = result + self.bias_pulled[:, None]
        return result

    def backward_again(self, rows: Rows, by_output: Tensor) -> Tensor:
        """``[P, B, n_in]``."""
        result = _times(by_output, rows[self.weight], self.shape[1])
        if self.rank is None:
            return result + self.delta @ self.pulled
        inside = (self.delta @ self.pulled) @ rows[f"qt:{self.weight}"]
        return result + inside + self.by_d * (self.gram_delta @ self.outside)

    def tangent(self, rows: Rows, t: Tensor) -> Tensor:
        """``[P, K, n_out]``."""
        self.a_dot = t
        return _times(t.expand(len(self.a), -1, -1), rows[f"{self.weight}:transposed"], self.shape[0])

    def tangent_back(self, rows: Rows, t: Tensor) -> Tensor | None:
        """``[P, K, n_in]``."""
        self.delta_dot = t
        return None if self.first else _times(t, rows[self.weight], self.shape[1])

    def columns(self) -> dict[str, Dense | Factored]:
        """Weight in factors, and bias ``[P, K, n_out]``."""
        factored = Factored(self.delta[:, 0], self.a[:, 0], self.delta_dot, self.a_dot.expand(len(self.a), -1, -1))
        found: dict[str, Dense | Factored] = {self.weight: factored}
        if self.bias is not None:
            found[self.bias] = Dense(self.delta_dot)
        return found

    def tangent_of_weights(self, moved: Rows) -> Tensor | None:
        """``[P, K, n_out]``."""
        t = (moved[self.weight] @ self.a[..., None])[..., 0]
        return t if self.bias is None else t + moved[self.bias]

    def tangent_back_of_weights(self, moved: Rows) -> Tensor | None:
        """``[P, K, n_in]``."""
        return None if self.first else (self.delta[:, :, None] @ moved[self.weight])[:, :, 0]

    def pull_weights(self, by_delta: Tensor | None, by_output: Tensor) -> Rows:
        """Weight ``[P, n_out, n_in]`` and bias ``[P, n_out]``."""
        weight = by_output.mT @ self.a
        found = {self.weight: weight if by_delta is None else weight + self.delta.mT @ by_delta}
        if self.bias is not None:
            found[self.bias] = by_output.sum(1)
        return found

    def undone(self) -> Linear:
        """A 1×1 convolution of a 1×1 image."""
        taps = torch.zeros(1, 1, dtype=torch.int64)
        return Linear(self.weight, self.bias, (self.shape[1], 1, 1), (self.shape[0], 1, 1), taps)


def factors(target: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Q ``[P, n, r]`` with orthonormal columns and M ``[P, m, r]`` with M Qᵀ ≈ `target` ``[P, m, n]``.

    A range finder with one power iteration (Halko 2011): exact where the rank is at most `rank`.
    """
    generator = plain_generator(0)
    probes = torch.randn(target.shape[1], rank, generator=generator, dtype=torch.float64).to(target.device)
    wide = target.double()
    q = torch.linalg.qr(wide.mT @ probes).Q
    q = torch.linalg.qr(wide.mT @ (wide @ q)).Q
    return q.to(target.dtype), (wide @ q).to(target.dtype)


def has_rank(gradient: Tensor, rank: int) -> bool:
    """Whether `gradient` ``[m, n]`` is worth keeping in `rank` factors: far fewer than m or n, and enough for it."""
    if 4 * rank > min(gradient.shape):
        return False
    q, m = factors(gradient[None], rank)
    tolerance = 32 * torch.finfo(torch.float32).eps  # what a gradient computed in float32 is off by
    return bool((gradient - m @ q.mT).norm() <= tolerance * gradient.norm())


def _padded(matrices: Tensor) -> Tensor:
    """Zero columns added to ``[P, m, n]`` until rows are whole cache lines: see `_times`."""
    return F.pad(matrices, (0, -matrices.shape[2] % 16)).contiguous()


def _times(rows: Tensor, matrices: Tensor, columns: int) -> Tensor:
    """``[P, B, m] @ [P or 1, m, n]``, the first `columns` of n."""
    return (rows @ matrices.expand(len(rows), -1, -1))[..., :columns]
