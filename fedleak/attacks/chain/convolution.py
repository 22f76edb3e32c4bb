"""Plain two-dimensional convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from fedleak.attacks.chain.base import Dense, Factored, Layer, Observed, Rows, Stack
from fedleak.attacks.chain.products import Products
from fedleak.attacks.chain.undo import Linear

_GROUPED = 8
"""Input channels from which a processor convolves in groups faster than it copies patches."""


def _paired(one: Tensor) -> Tensor:
    """A single group twice: alone it is convolved in another way, which rounds otherwise, and no result may depend on
    how many others are computed beside it."""
    return torch.cat([one, one]) if len(one) == 1 else one


class Convolution(Layer):
    """A plain two-dimensional convolution, as a product with the patches of its input.

    Every problem has a kernel of its own. Where a processor's convolution in groups, one a sample, is the faster way
    to the same products (1.5 to 8 times, from eight channels on), it is taken.
    """

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        self.name = name
        self.weight, self.bias = f"{name}.weight", f"{name}.bias" if module.bias is not None else None
        self.parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        self.kernel, self.stride = module.kernel_size, module.stride
        self.padding, self.dilation = (int(module.padding[0]), int(module.padding[1])), module.dilation
        self.channels, self.grouped = module.out_channels, module.in_channels >= _GROUPED
        self._of_input: Tensor | None = None

    def weights(self, targets: Sequence[Observed], stack: Stack) -> Rows:
        """Kernels as ``[P, O, C·kh·kw]``, biases ``[P, O]``."""
        rows = {self.weight: stack([t.parameters[self.weight] for t in targets]).flatten(2)}
        if self.bias is not None:
            rows[self.bias] = stack([t.parameters[self.bias] for t in targets])
        return rows

    def load(self, targets: Sequence[Observed], stack: Stack) -> Rows:
        """Observed gradients, shaped like the weights."""
        rows = {f"target:{self.weight}": stack([t.update[self.weight] for t in targets]).flatten(2)}
        if self.bias is not None:
            rows[f"target:{self.bias}"] = stack([t.update[self.bias] for t in targets])
        return rows

    def _patches(self, a: Tensor) -> Tensor:
        """``[P·B, C·kh·kw, H'·W']`` of ``[P·B, C, H, W]``: one strided copy."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        ph, pw = self.padding
        a = F.pad(a, (pw, pw, ph, ph))
        n, c, h, w = a.shape
        self.size = (h - dh * (kh - 1) - 1) // sh + 1, (w - dw * (kw - 1) - 1) // sw + 1
        s = a.stride()
        view = a.as_strided((n, c, kh, kw, *self.size), (s[0], s[1], s[2] * dh, s[3] * dw, s[2] * sh, s[3] * sw))
        return view.reshape(n, c * kh * kw, -1)

    def _unpatch(self, patches: Tensor) -> Tensor:
        """The adjoint of `_patches`, ``[P·B, C, H, W]``."""
        return F.fold(patches, self.input_size, self.kernel, self.dilation, self.padding, self.stride)

    def _groups(self, of: Tensor) -> bool:
        return self.grouped and of.device.type == "cpu" and of.dtype == torch.float32 and mkldnn.is_available()

    def _kernels(self, weight: Tensor) -> Tensor:
        """``[N, O, C·kh·kw]`` as the kernel of N groups, ``[N·O, C, kh, kw]``."""
        return weight.reshape(-1, weight.shape[2] // math.prod(self.kernel), *self.kernel)

    def _settings(self, groups: int) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": groups}

    def _convolve(self, weight: Tensor, a: Tensor) -> Tensor:
        """``[N, O, H'·W']`` of kernels ``[N, O, C·kh·kw]`` and inputs ``[N, C, H, W]``."""
        if not self._groups(a):
            return weight @ (self.patches if a is self.input else self._patches(a))
        n, weight, a = len(a), _paired(weight), _paired(a)
        z = F.conv2d(a.flatten(0, 1)[None], self._kernels(weight), **self._settings(len(a)))
        self.size = z.shape[2], z.shape[3]
        return z.reshape(len(a), -1, z.shape[2] * z.shape[3])[:n]

    def _back(self, weight: Tensor, delta: Tensor) -> Tensor:
        """The adjoint of `_convolve` in its input: ``[N, C, H, W]`` of ``[N, O, H'·W']``."""
        if not self._groups(delta):
            return self._unpatch(weight.mT @ delta)
        n, kernels, delta = len(delta), self._kernels(_paired(weight)), _paired(delta)
        size = (1, len(delta) * kernels.shape[1], *self.input_size)
        outputs = delta.reshape(1, -1, *self.size)
        found: Tensor = conv2d_input(size, kernels, outputs, **self._settings(len(delta)))
        return found.reshape(len(delta), -1, *self.input_size)[:n]

    def _correlate(self, delta: Tensor, a: Tensor) -> Tensor:
        """The adjoint of `_convolve` in its kernels: ``[N, O, C·kh·kw]`` of ``[N, O, H'·W']`` and inputs."""
        if not self._groups(a):
            return delta @ (self.patches if a is self.input else self._patches(a)).mT
        n, delta, a = len(a), _paired(delta), _paired(a)
        size = (delta.shape[0] * delta.shape[1], a.shape[1], *self.kernel)
        outputs = delta.reshape(1, -1, *self.size)
        found: Tensor = conv2d_weight(a.flatten(0, 1)[None], size, outputs, **self._settings(len(a)))
        return found.reshape(*delta.shape[:2], -1)[:n]

    @property
    def patches(self) -> Tensor:
        """Of the last input, ``[N, C·kh·kw, H'·W']``."""
        if self._of_input is None:
            self._of_input = self._patches(self.input)
        return self._of_input

    def _each(self, weight: Tensor) -> Tensor:
        """``[P or 1, O, K]`` as ``[P·B, O, K]``."""
        p, b = self.batch
        return weight[:, None].expand(p, b, -1, -1).reshape(p * b, *weight.shape[1:])

    def forward(self, rows: Rows, a: Tensor) -> Tensor:
        """``[P, B, O, H', W']``."""
        self.batch, self.input_size = a.shape[:2], a.shape[3:]
        self.w = self._each(rows[self.weight])
        self.input, self._of_input = a.flatten(0, 1), None
        z = self._convolve(self.w, self.input).unflatten(0, self.batch)
        if self.bias is not None:
            z = z + rows[self.bias][:, None, :, None]
        result: Tensor = z.unflatten(3, self.size)
        return result

    def backward(self, rows: Rows, delta: Tensor) -> Tensor | None:
        """``[P, B, C, H, W]``."""
        self.delta = delta = delta.flatten(0, 1).flatten(2)
        return None if self.first else self._back(self.w, delta).unflatten(0, self.batch)

    def _weight_gradient(self) -> Tensor:
        gradient = self._correlate(self.delta, self.input)
        return gradient.unflatten(0, self.batch).sum(1) if self.batch[1] > 1 else gradient

    def book(self, rows: Rows, products: Products) -> None:
        """Gaps of kernel and bias."""
        self.gap = self._weight_gradient() - rows[f"target:{self.weight}"]
        products.add(self.weight, self.gap, rows[f"target:{self.weight}"])
        if self.bias is not None:
            self.bias_gap = self.delta.sum(2).unflatten(0, self.batch).sum(1) - rows[f"target:{self.bias}"]
            products.add(self.bias, self.bias_gap, rows[f"target:{self.bias}"])

    def gradients(self) -> Rows:
        """Kernel ``[P, O, C·kh·kw]`` and bias ``[P, O]``."""
        found = {self.weight: self._weight_gradient()}
        if self.bias is not None:
            found[self.bias] = self.delta.sum(2).unflatten(0, self.batch).sum(1)
        return found

    def weigh(self, rows: Rows, products: Products) -> None:
        """∂objective/∂gradient of kernel and bias."""
        self.pulled = products.pull(self.weight, self.gap, rows[f"target:{self.weight}"])
        if self.bias is not None:
            self.bias_pulled = products.pull(self.bias, self.bias_gap, rows[f"target:{self.bias}"])

    def assign(self, values: Rows) -> None:
        """Given ones, ``[P, n]`` each."""
        self.pulled = values[self.weight].view(self.batch[0], self.channels, -1)
        if self.bias is not None:
            self.bias_pulled = values[self.bias]

    def forward_again(self, rows: Rows, by_delta: Tensor | None) -> Tensor | None:
        """``[P, B, O, H', W']``."""
        self.pulled = self._each(self.pulled)
        if by_delta is None:
            by_weights = self._convolve(self.pulled, self.input)
        elif self._groups(by_delta):
            both = torch.cat([self.input, by_delta.flatten(0, 1)], 1)
            by_weights = self._convolve(torch.cat([self.pulled, self.w], 2), both)
        else:
            by_weights = self._convolve(self.pulled, self.input)
            by_weights.baddbmm_(self.w, self._patches(by_delta.flatten(0, 1)))
        result: Tensor = by_weights.unflatten(0, self.batch)
        if self.bias is not None:
            result = result + self.bias_pulled[:, None, :, None]
        result = result.unflatten(3, self.size)
        return result

    def backward_again(self, rows: Rows, by_output: Tensor) -> Tensor:
        """``[P, B, C, H, W]``."""
        weights = torch.cat([self.pulled, self.w], 1)
        outputs = torch.cat([self.delta, by_output.flatten(0, 1).flatten(2)], 1)
        result: Tensor = self._back(weights, outputs).unflatten(0, self.batch)
        return result

    def tangent(self, rows: Rows, t: Tensor) -> Tensor:
        """``[P, K, O, H', W']``."""
        self.patches_dot = self._patches(t.flatten(0, 1)).unflatten(0, t.shape[:2])
        result: Tensor = (self.w[:, None] @ self.patches_dot).unflatten(3, self.size)
        return result

    def tangent_back(self, rows: Rows, t: Tensor) -> Tensor | None:
        """``[P, K, C, H, W]``."""
        self.delta_dot = t = t.flatten(3)
        if self.first:
            return None
        result: Tensor = self._unpatch((self.w.mT[:, None] @ t).flatten(0, 1)).unflatten(0, t.shape[:2])
        return result

    def columns(self) -> dict[str, Dense | Factored]:
        """Kernel ``[P, K, O·C·kh·kw]`` and bias ``[P, K, O]``."""
        t = self.delta_dot
        moved = (t.flatten(1, 2) @ self.patches.mT).unflatten(1, t.shape[1:3])
        moved = moved + self.delta[:, None] @ self.patches_dot.mT
        found: dict[str, Dense | Factored] = {self.weight: Dense(moved.flatten(2))}
        if self.bias is not None:
            found[self.bias] = Dense(t.sum(3))
        return found

    def tangent_of_weights(self, moved: Rows) -> Tensor | None:
        """``[P, K, O, H', W']``."""
        t = moved[self.weight].flatten(3).flatten(1, 2) @ self.patches
        t = t.unflatten(1, (-1, self.channels))
        t = t if self.bias is None else t + moved[self.bias][..., None]
        result: Tensor = t.unflatten(3, self.size)
        return result

    def tangent_back_of_weights(self, moved: Rows) -> Tensor | None:
        """``[P, K, C, H, W]``."""
        if self.first:
            return None
        weight = moved[self.weight].flatten(3)
        back: Tensor = self._unpatch((weight.mT @ self.delta[:, None]).flatten(0, 1)).unflatten(0, weight.shape[:2])
        return back

    def pull_weights(self, by_delta: Tensor | None, by_output: Tensor) -> Rows:
        """Kernel ``[P, O, C·kh·kw]`` and bias ``[P, O]``; of a single sample a problem."""
        outputs = by_output.flatten(0, 1).flatten(2)
        weight = self._correlate(outputs, self.input)
        if by_delta is not None:
            weight = weight + self._correlate(self.delta, by_delta.flatten(0, 1))
        found = {self.weight: weight}
        if self.bias is not None:
            found[self.bias] = outputs.sum(2)
        return found

    def undone(self) -> Linear:
        """The convolution by its taps."""
        channels, height, width = self.in_shape
        axes = []
        for size, kernel, stride, padding, dilation in zip(
            (height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            at = torch.arange(out)[None] * stride + torch.arange(kernel)[:, None] * dilation - padding
            axes.append(torch.where((at >= 0) & (at < size), at, -1))
        rows, columns = axes
        row, column = rows[:, None, :, None], columns[None, :, None, :]
        taps = torch.where((row >= 0) & (column >= 0), row * width + column, height * width)
        out_shape = (self.channels, rows.shape[1], columns.shape[1])
        return Linear(self.weight, self.bias, (channels, height, width), out_shape, taps.flatten(2).flatten(0, 1))
