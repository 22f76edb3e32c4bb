"""What a layer is to one who undoes it: linear equations about its input, or a function with an inverse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Linear:
    """A convolution (or, with a 1×1 kernel on a 1×1 image, a fully connected layer) with its own weights a problem.

    Attributes:
        weight: name of the parameter ``[O, C, kh, kw]`` or ``[O, C]``.
        bias: name of the parameter ``[O]``, None if there is none.
        shape: (C, H, W) of the input.
        out_shape: (O, H', W') of the output.
        taps: ``[K, P]`` int64: the input pixel (0 … H·W − 1) under kernel tap k at output position p; H·W is padding.
    """

    weight: str
    bias: str | None
    shape: tuple[int, int, int]
    out_shape: tuple[int, int, int]
    taps: Tensor

    @property
    def pixels(self) -> int:
        """H·W of the input."""
        return self.shape[1] * self.shape[2]

    def tall(self, batch_size: int) -> Linear:
        """The same layer on a batch stacked into one tall image, ``[C, B·H·W]``: nothing crosses a seam."""
        if batch_size == 1:
            return self
        own = torch.arange(batch_size)[:, None] * self.pixels + self.taps[:, None]
        taps = torch.where(self.taps[:, None] == self.pixels, batch_size * self.pixels, own).flatten(1)
        (c, h, w), (o, oh, ow) = self.shape, self.out_shape
        return Linear(self.weight, self.bias, (c, batch_size * h, w), (o, batch_size * oh, ow), taps)

    def kernel(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The weights (or their gradient) of N problems as ``[N, O, C, K]``."""
        weight = parameters[self.weight]
        return weight.reshape(len(weight), self.out_shape[0], self.shape[0], self.taps.shape[0])

    def patches(self, inputs: Tensor) -> Tensor:
        """What each tap sees, ``[..., C, K, P]``, of inputs ``[..., C, H·W]``."""
        return F.pad(inputs, (0, 1))[..., self.taps.to(inputs.device)]

    def forward(self, inputs: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Outputs ``[N, B, O, P]`` of inputs ``[N, B, C, H·W]``."""
        kernel = self.kernel(parameters).flatten(2)
        outputs = kernel[:, None] @ self.patches(inputs).flatten(-3, -2)
        return outputs if self.bias is None else outputs + parameters[self.bias][:, None, :, None]

    def backward(self, deltas: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """∂L/∂inputs ``[N, B, C, H·W]`` of ∂L/∂outputs ``[N, B, O, P]``."""
        kernel = self.kernel(parameters).flatten(2)
        patches = (kernel.transpose(1, 2)[:, None] @ deltas).unflatten(2, (self.shape[0], -1))
        inputs = deltas.new_zeros(*deltas.shape[:2], self.shape[0], self.pixels + 1)
        return inputs.index_add_(-1, self.taps.to(deltas.device).flatten(), patches.flatten(-2))[..., :-1]

    def weight_gradient(self, inputs: Tensor, deltas: Tensor) -> Tensor:
        """∂L/∂weight ``[N, O, C, K]``, summed over B, of inputs ``[N, B, C, H·W]`` and deltas ``[N, B, O, P]``."""
        return torch.einsum("nbop,nbckp->nock", deltas, self.patches(inputs))


@dataclass(frozen=True)
class Pointwise:
    """A monotone elementwise function.

    Attributes:
        value: the function.
        inverse: its inverse on its range; where the function is flat, any point of the flat part.
        slope: its derivative as a function of its *output*.
        low, high: the range of the output.
    """

    value: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    low: float = -math.inf
    high: float = math.inf
