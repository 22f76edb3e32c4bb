"""Plain two-dimensional convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedleak.attacks.chain.base import Dense, Factored, Layer, Observed, Rows, Stack
from fedleak.attacks.chain.products import Products
from fedleak.attacks.chain.undo import Linear


class Convolution(Layer):
    """A plain two-dimensional convolution, as a product with the patches of its input."""

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        self.name = name
        self.weight, self.bias = f"{name}.weight", f"{name}.bias" if module.bias is not None else None
        self.parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        self.kernel, self.stride = module.kernel_size, module.stride
        self.padding, self.dilation = (int(module.padding[0]), int(module.padding[1])), module.dilation
        self.channels = module.out_channels

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

    def _each(self, weight: Tensor) -> Tensor:
        """``[P or 1, O, K]`` as ``[P·B, O, K]``."""
        p, b = self.batch
        return weight[:, None].expand(p, b, -1, -1).reshape(p * b, *weight.shape[1:])

    def forward(self, rows: Rows, a: Tensor) -> Tensor:
        """``[P, B, O, H', W']``."""
        self.batch, self.input_size = a.shape[:2], a.shape[3:]
        self.w = self._each(rows[self.weight])
        self.patches = self._patches(a.flatten(0, 1))
        z = (self.w @ self.patches).unflatten(0, self.batch)
        if self.bias is not None:
            z = z + rows[self.bias][:, None, :, None]
        result: Tensor = z.unflatten(3, self.size)
        return result

    def backward(self, rows: Rows, delta: Tensor) -> Tensor | None:
        """``[P, B, C, H, W]``."""
        self.delta = delta = delta.flatten(0, 1).flatten(2)
        return None if self.first else self._unpatch(self.w.mT @ delta).unflatten(0, self.batch)

    def _weight_gradient(self) -> Tensor:
        gradient = self.delta @ self.patches.mT
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
        by_weights = self.pulled @ self.patches
        if by_delta is not None:
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
        result: Tensor = self._unpatch(weights.mT @ outputs).unflatten(0, self.batch)
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
        weight = outputs @ self.patches.mT
        if by_delta is not None:
            weight = weight + self.delta @ self._patches(by_delta.flatten(0, 1)).mT
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
