"""Layers without parameters that are linear, or linear once it is known which pixels win: flatten and pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedleak.attacks.chain.base import Layer, Rows


class Rearrangement(Layer):
    """A linear function without parameters (flatten, pooling) and its transpose."""

    def __init__(self, function: Callable[[Tensor], Tensor], transpose: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function
        self.transpose = transpose  # of (inputs of the function, what comes back)

    def forward(self, rows: Rows, a: Tensor) -> Tensor:
        """What the function makes of each image."""
        self.a = a
        return self._each(self.function, a)

    def backward(self, rows: Rows, delta: Tensor) -> Tensor | None:
        """Shaped like the inputs."""
        return None if self.first else self._back(delta)

    def forward_again(self, rows: Rows, by_delta: Tensor | None) -> Tensor | None:
        """Shaped like the outputs."""
        return None if by_delta is None else self._each(self.function, by_delta)

    def backward_again(self, rows: Rows, by_output: Tensor) -> Tensor:
        """Shaped like the inputs."""
        return self._back(by_output)

    def _back(self, outputs: Tensor) -> Tensor:
        like = self.a[:1, :1].expand(*outputs.shape[:2], *self.a.shape[2:])  # the transpose reads its shape alone
        result: Tensor = self.transpose(like.flatten(0, 1), outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2])
        return result

    @staticmethod
    def _each(function: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
        result: Tensor = function(a.flatten(0, 1)).unflatten(0, a.shape[:2])
        return result

    def tangent(self, rows: Rows, t: Tensor) -> Tensor:
        """What the function makes of each direction."""
        return self._each(self.function, t)

    def tangent_back(self, rows: Rows, t: Tensor) -> Tensor | None:
        """Shaped like the inputs."""
        return None if self.first else self._back(t)


class MaxPool(Layer):
    """Maximum pooling: linear once it is known which pixels win."""

    def __init__(self, module: nn.MaxPool2d) -> None:
        self.options = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)

    def forward(self, rows: Rows, a: Tensor) -> Tensor:
        """``[P, B, C, H', W']``."""
        self.shape = a.shape
        values, self.winners = F.max_pool2d(a.flatten(0, 1), *self.options, return_indices=True)
        result: Tensor = values.unflatten(0, a.shape[:2])
        return result

    def _back(self, outputs: Tensor) -> Tensor:
        """To the winners, of ``[P, B or K, C, H', W']``; with one sample a problem the K share its winners."""
        inputs = outputs.new_zeros(*outputs.shape[:2], self.shape[2], self.shape[3] * self.shape[4])
        winners = self._winners(outputs)
        return inputs.scatter_add_(3, winners, outputs.flatten(3)).view(*outputs.shape[:2], *self.shape[2:])

    def _chosen(self, inputs: Tensor) -> Tensor:
        chosen = inputs.flatten(3).gather(3, self._winners(inputs))
        return chosen.view(*inputs.shape[:3], *self.winners.shape[2:])

    def _winners(self, like: Tensor) -> Tensor:
        winners = self.winners.flatten(2).unflatten(0, self.shape[:2])
        result: Tensor = winners.expand(*like.shape[:2], -1, -1)
        return result

    def backward(self, rows: Rows, delta: Tensor) -> Tensor | None:
        """``[P, B, C, H, W]``."""
        return None if self.first else self._back(delta)

    def forward_again(self, rows: Rows, by_delta: Tensor | None) -> Tensor | None:
        """``[P, B, C, H', W']``."""
        return None if by_delta is None else self._chosen(by_delta)

    def backward_again(self, rows: Rows, by_output: Tensor) -> Tensor:
        """``[P, B, C, H, W]``."""
        return self._back(by_output)

    def tangent(self, rows: Rows, t: Tensor) -> Tensor:
        """``[P, K, C, H', W']``."""
        return self._chosen(t.expand(self.shape[0], -1, -1, -1, -1))

    def tangent_back(self, rows: Rows, t: Tensor) -> Tensor | None:
        """``[P, K, C, H, W]``."""
        return None if self.first else self._back(t)


class Reshape(Rearrangement):
    """The same elements in the same order, as ``[*shape]`` for each sample."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(lambda a: a.reshape(len(a), *shape), lambda a, out: out.reshape(a.shape))

    def undone(self) -> None:
        """Nothing to undo."""


def average_pool(module: nn.AvgPool2d) -> Rearrangement:
    options = (module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad)

    def transpose(a: Tensor, out: Tensor) -> Tensor:
        kernel, stride, padding = (list(nn.modules.utils._pair(option)) for option in options[:3])
        result: Tensor = torch.ops.aten.avg_pool2d_backward(
            out, a, kernel, stride, padding, *options[3:], module.divisor_override
        )
        return result

    return Rearrangement(lambda a: F.avg_pool2d(a, *options, module.divisor_override), transpose)
