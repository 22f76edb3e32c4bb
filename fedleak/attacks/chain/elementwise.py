"""Activations, and arithmetic with constants."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedleak.attacks.chain.base import Layer, Rows
from fedleak.attacks.chain.undo import Pointwise


class Elementwise(Layer):
    """An activation, given by its first and second derivative as functions of input and output."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        slope: Callable[[Tensor, Tensor], Tensor],
        curvature: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
        pointwise: Pointwise,
    ) -> None:
        self.function = function
        self.slope = slope
        self.curvature = curvature  # of (input, output, slope); None for piecewise linear functions
        self.pointwise = pointwise

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

    def undone(self) -> Pointwise:
        """The function with its inverse."""
        return self.pointwise


def _steady(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An elementwise function whose vector kernel also does the last few elements, which a scalar one rounds apart."""

    def apply(z: Tensor) -> Tensor:
        excess = -z.numel() % (64 * torch.get_num_threads())
        if not excess or z.device.type != "cpu":
            return function(z)
        return function(F.pad(z.flatten(), (0, excess)))[: z.numel()].view(z.shape)

    return apply


def sigmoid() -> Elementwise:
    pointwise = Pointwise(torch.sigmoid, torch.logit, lambda h: h * (1 - h), 0.0, 1.0)
    return Elementwise(_steady(torch.sigmoid), lambda z, h: h * (1 - h), lambda z, h, d: d * (1 - 2 * h), pointwise)


def tanh() -> Elementwise:
    pointwise = Pointwise(torch.tanh, torch.atanh, lambda h: 1 - h * h, -1.0, 1.0)
    return Elementwise(_steady(torch.tanh), lambda z, h: 1 - h * h, lambda z, h, d: -2 * h * d, pointwise)


def relu(inplace: bool = False) -> Elementwise:
    pointwise = Pointwise(torch.relu, lambda h: h, lambda h: (h > 0).to(h), 0.0)
    return Elementwise(torch.relu, lambda z, h: (z > 0).to(z.dtype), None, pointwise)


def leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Elementwise:
    a = negative_slope

    def function(z: Tensor) -> Tensor:
        return F.leaky_relu(z, a)

    pointwise = relu().pointwise  # without a slope below zero there is nothing to undo there
    if a > 0:
        undo, slope = lambda h: torch.where(h < 0, h / a, h), lambda h: a + (1 - a) * (h >= 0).to(h)
        pointwise = Pointwise(function, undo, slope)
    return Elementwise(function, lambda z, h: torch.where(z > 0, 1.0, a).to(z), None, pointwise)


def elu(alpha: float = 1.0, inplace: bool = False) -> Elementwise:
    def function(z: Tensor) -> Tensor:
        return F.elu(z, alpha)

    def undo(h: Tensor) -> Tensor:
        return torch.where(h < 0, torch.log1p(h.clamp(max=0) / alpha), h)

    return Elementwise(
        _steady(function),
        lambda z, h: torch.where(z > 0, 1.0, h + alpha),
        lambda z, h, d: torch.where(z > 0, 0.0, d),
        Pointwise(function, undo, lambda h: torch.where(h < 0, h + alpha, 1.0), -alpha),
    )


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Elementwise:
    def function(z: Tensor) -> Tensor:
        return F.softplus(z, beta, threshold)

    def slope(z: Tensor, h: Tensor) -> Tensor:
        return torch.where(beta * z > threshold, 1.0, _steady(torch.sigmoid)(beta * z))

    def undo(h: Tensor) -> Tensor:
        return h + torch.log(-torch.expm1(-beta * h)) / beta

    pointwise = Pointwise(function, undo, lambda h: -torch.expm1(-beta * h), 0.0)
    return Elementwise(_steady(function), slope, lambda z, h, d: beta * d * (1 - d), pointwise)


class Affine(Elementwise):
    """x · scale + shift, with constants that broadcast against ``[C, H, W]``: numbers, or tensors in float64."""

    def __init__(self, scale: Tensor | float, shift: Tensor | float) -> None:
        def as_in(z: Tensor) -> tuple[Tensor | float, Tensor | float]:
            return tuple(v.to(z) if isinstance(v, Tensor) else v for v in (scale, shift))  # type: ignore[return-value]

        def function(z: Tensor) -> Tensor:
            own_scale, own_shift = as_in(z)
            return z * own_scale + own_shift

        self.constants = scale, shift
        self.function, self.curvature = function, None
        self.slope = lambda z, h: torch.zeros_like(z) + as_in(z)[0]

    def undone(self) -> Pointwise:
        """With a constant a channel, or one for all."""
        columns = []
        for constant in self.constants:
            value = torch.as_tensor(constant, dtype=torch.float64)
            if value.numel() not in (1, self.in_shape[0]) or value.numel() != math.prod(value.shape[-3:-2]):
                raise ValueError("not one number a channel")
            columns.append(value.reshape(-1, 1))
        scale, shift = columns
        return Pointwise(
            lambda z: z * scale.to(z) + shift.to(z),
            lambda h: (h - shift.to(h)) / scale.to(h),
            lambda h: scale.to(h).expand_as(h),
        )
