"""Activations, and arithmetic with constants."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedleak.attacks.chain.base import Layer, Rows


class Elementwise(Layer):
    """An activation, given by its first and second derivative as functions of input and output."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        slope: Callable[[Tensor, Tensor], Tensor],
        curvature: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    ) -> None:
        self.function = function
        self.slope = slope
        self.curvature = curvature  # of (input, output, slope); None for piecewise linear functions

    def forward(self, rows: Rows, a: Tensor) -> Tensor:
        """Same shape."""
        self.z, self.h = a, self.function(a)
        self.d = self.slope(self.z, self.h)
        return self.h

    def backward(self, rows: Rows, delta: Tensor) -> Tensor | None:
        """Same shape."""
        if self.first:
            return None
        self.delta = delta
        return delta * self.d

    def forward_again(self, rows: Rows, by_delta: Tensor | None) -> Tensor | None:
        """Same shape."""
        self.by_delta = by_delta
        return None if by_delta is None else by_delta * self.d

    def backward_again(self, rows: Rows, by_output: Tensor) -> Tensor:
        """Same shape."""
        result = by_output * self.d
        if self.by_delta is None or self.curvature is None:
            return result
        return result.addcmul_(self.by_delta * self.delta, self.curvature(self.z, self.h, self.d))

    def tangent(self, rows: Rows, t: Tensor) -> Tensor:
        """``[P, K, ...]``."""
        self.z_dot = t
        return t * self.d

    def tangent_back(self, rows: Rows, t: Tensor) -> Tensor | None:
        """``[P, K, ...]``."""
        if self.first:
            return None
        back = t * self.d
        if self.curvature is None:
            return back
        return back.addcmul_(self.z_dot, self.delta * self.curvature(self.z, self.h, self.d))


def _steady(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An elementwise function whose vector kernel also does the last few elements, which a scalar one rounds apart."""

    def apply(z: Tensor) -> Tensor:
        excess = -z.numel() % (64 * torch.get_num_threads())
        if not excess or z.device.type != "cpu":
            return function(z)
        return function(F.pad(z.flatten(), (0, excess)))[: z.numel()].view(z.shape)

    return apply


def sigmoid() -> Elementwise:
    return Elementwise(_steady(torch.sigmoid), lambda z, h: h * (1 - h), lambda z, h, d: d * (1 - 2 * h))


def tanh() -> Elementwise:
    return Elementwise(_steady(torch.tanh), lambda z, h: 1 - h * h, lambda z, h, d: -2 * h * d)


def relu(inplace: bool = False) -> Elementwise:
    return Elementwise(torch.relu, lambda z, h: (z > 0).to(z.dtype), None)


def leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Elementwise:
    return Elementwise(
        lambda z: F.leaky_relu(z, negative_slope), lambda z, h: torch.where(z > 0, 1.0, negative_slope).to(z), None
    )


def elu(alpha: float = 1.0, inplace: bool = False) -> Elementwise:
    return Elementwise(
        _steady(lambda z: F.elu(z, alpha)),
        lambda z, h: torch.where(z > 0, 1.0, h + alpha),
        lambda z, h, d: torch.where(z > 0, 0.0, d),
    )


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Elementwise:
    def slope(z: Tensor, h: Tensor) -> Tensor:
        return torch.where(beta * z > threshold, 1.0, _steady(torch.sigmoid)(beta * z))

    return Elementwise(_steady(lambda z: F.softplus(z, beta, threshold)), slope, lambda z, h, d: beta * d * (1 - d))


def affine(scale: Tensor | float, shift: Tensor | float) -> Elementwise:
    """x · scale + shift, with constants that broadcast against ``[C, H, W]``."""
    return Elementwise(lambda z: z * scale + shift, lambda z, h: torch.zeros_like(z) + scale, None)
