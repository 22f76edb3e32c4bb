"""The distance between updates of any `nn.Module`, one problem after another: for networks that fill a processor alone.

Vectorised differentiation makes grouped convolutions of problems with weights of their own, which processors are slow
at. Here every problem is differentiated twice by itself, with two savings:

- BatchNorm in evaluation mode is a scale and a shift;
- a layer's gradient G = Σ_n δ_n a_nᵀ, over the few places n that a small map has, is never formed where its products
  ⟨G, T⟩ = Σ_n δ_nᵀ T a_n and ‖G‖² = Σ_nm (δ_nᵀ δ_m)(a_nᵀ a_m) cost less. ‖G − T‖² is then their difference, good to the
  rounding of ‖T‖²: enough for the angle in float32, for all else in float64 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedleak.attacks.inversion.distances.base import Comparison, Distance, Rows
from fedleak.attacks.inversion.objectives import Cosine, Elementwise
from fedleak.attacks.problem import Problem

_FILLING = 2**20
"""Parameters of convolutions from which a network counts as one that fills a processor alone."""


@dataclass
class _Seen:
    """What a layer saw: its inputs ``[K, N]`` at all places, and its outputs, by which the loss is differentiated."""

    inputs: Tensor
    outputs: Tensor


class LoopDistance(Distance):
    """Any model with many weights in convolutions, on the CPU: see the module's docstring."""

    @classmethod
    def fit(cls, comparison: Comparison, problems: Sequence[Problem]) -> LoopDistance | None:
        """None where more is compared than the gradient of one batch, or vectorised differentiation is as fast."""
        alike = all(len(problem.targets) == 1 and problem.targets[0].imitate is None for problem in problems)
        if not alike or isinstance(comparison.objective, Elementwise) or comparison.unrolled:
            return None
        kernels = sum(m.weight.numel() for m in comparison.model.modules() if isinstance(m, nn.Conv2d))
        if torch.device(comparison.device).type != "cpu" or kernels < _FILLING:
            return None
        return cls(comparison, problems)

    def __init__(self, comparison: Comparison, problems: Sequence[Problem]) -> None:
        super().__init__(comparison, problems)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.seen: dict[str, list[_Seen]] = {}
        products = isinstance(self.objective, Cosine) or self.dtype == torch.float64
        _prepare(self.model, self.seen if products else None)
        self.common: Rows = {}
        if self.shared:
            target = problems[0].targets[0]
            self.common = self._move({**target.parameters, **self._used(target.buffers)})

    def load(self, problems: Sequence[Problem]) -> Rows:
        """Updates, and parameters and buffers unless they are shared."""
        targets = [problem.targets[0] for problem in problems]
        rows = {f"update:{name}": self._stack([t.update[name] for t in targets]) for name in self.names}
        squares = [update.flatten(1).square().sum(1) for update in rows.values()]
        rows["squares"] = torch.stack(squares, 1)
        if not self.shared:
            states = [{**t.parameters, **self._used(t.buffers)} for t in targets]
            rows |= {f"state:{name}": self._stack([state[name] for state in states]) for name in states[0]}
        return rows

    def evaluate(
        self, rows: Rows, images: Tensor, labels: Tensor, *, with_labels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value and gradients by automatic differentiation, problem by problem."""
        values, by_images, by_labels = [], [], []
        for place in range(len(images)):
            one = {name: value[place] for name, value in rows.items()}
            state = self.common or _kind(one, "state:")
            x, y = images[place].detach().requires_grad_(), labels[place].detach().requires_grad_(with_labels)
            with torch.enable_grad():
                value = self._value(state, _kind(one, "update:"), one["squares"], x, y)
                found = torch.autograd.grad(value, [x, y] if with_labels else [x])
            values.append(value.detach())
            by_images.append(found[0])
            by_labels.append(found[-1])
        return torch.stack(values), torch.stack(by_images), torch.stack(by_labels) if with_labels else None

    def _value(self, state: Rows, update: Rows, squares: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """The objective of one problem; ``squares[k]`` is ‖T‖² of the k-th tensor."""
        parameters = {name: state[name].detach().requires_grad_() for name in self.names}
        self.seen.clear()
        logits = functional_call(self.model, {**state, **parameters}, (images,))
        loss = -(labels * logits.log_softmax(1)).sum(1).mean()
        formed = [name for name in self.names if name not in self.seen]
        outputs = [one.outputs for of_layer in self.seen.values() for one in of_layer]
        by = torch.autograd.grad(
            loss,
            [parameters[name] for name in formed] + outputs,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        tts = dict(zip(self.names, squares, strict=True))
        found = {}
        for name, gradient in zip(formed, by, strict=False):
            gap = gradient - update[name]
            found[name] = gap.square().sum(), (gap * update[name]).sum()
        rest = iter(by[len(formed) :])
        for name, of_layer in self.seen.items():
            inputs = torch.cat([one.inputs for one in of_layer], 1)
            deltas = torch.cat([_places(next(rest)) for _ in of_layer], 1)
            found[name] = _products(inputs, deltas, update[name].flatten(1), tts[name])
        self.seen.clear()
        dd, dt = (torch.stack(column)[None] for column in zip(*(found[name] for name in self.names), strict=True))
        return self.objective(dd, dt, squares[None])[0]


def _products(inputs: Tensor, deltas: Tensor, target: Tensor, tt: Tensor) -> tuple[Tensor, Tensor]:
    """‖G − T‖² and ⟨G − T, T⟩ of G = δ aᵀ, from inputs a ``[K, N]``, δ ``[C, N]`` and ‖T‖²."""
    along = (deltas * (target @ inputs)).sum()
    square = ((deltas.T @ deltas) * (inputs.T @ inputs)).sum()
    return square - 2 * along + tt, along - tt


def _places(maps: Tensor) -> Tensor:
    """``[B, C, ...]`` as ``[C, N]``."""
    return maps.flatten(2).transpose(0, 1).flatten(1) if maps.dim() > 2 else maps.T


def _kind(rows: Rows, kind: str) -> Rows:
    return {name.removeprefix(kind): value for name, value in rows.items() if name.startswith(kind)}


class _Convolution(nn.Module):
    """A convolution that notes what it saw, where its gradient costs more than the products do."""

    def __init__(self, of: nn.Conv2d, name: str, seen: dict[str, list[_Seen]]) -> None:
        super().__init__()
        self.weight, self.bias = of.weight, of.bias
        self.size, self.stride, self.padding, self.dilation = of.kernel_size, of.stride, of.padding, of.dilation
        self.name, self.seen = name, seen

    def forward(self, maps: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', H', W']``."""
        weight, padding = self.weight, self.padding
        assert not isinstance(padding, str)
        rows, columns = (
            (maps.shape[2 + i] + 2 * padding[i] - self.dilation[i] * (self.size[i] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )
        outputs, inputs = len(weight), weight[0].numel()
        if 2 * len(maps) * rows * columns * (outputs + inputs) >= outputs * inputs:
            return F.conv2d(maps, weight, self.bias, self.stride, padding, self.dilation)
        patches = F.unfold(maps, self.size, self.dilation, padding, self.stride)  # [B, K, N]
        patches = patches.transpose(0, 1).flatten(1)
        product: Tensor = weight.detach().flatten(1) @ patches
        made = product.unflatten(1, (len(maps), rows, columns)).transpose(0, 1)
        self.seen.setdefault(self.name, []).append(_Seen(patches, made))
        return made if self.bias is None else torch.add(made, self.bias[:, None, None])


class _FullyConnected(nn.Module):
    """A fully connected layer that notes what it saw; nearly always there are fewer samples than units."""

    def __init__(self, of: nn.Linear, name: str, seen: dict[str, list[_Seen]]) -> None:
        super().__init__()
        self.weight, self.bias, self.name, self.seen = of.weight, of.bias, name, seen

    def forward(self, a: Tensor) -> Tensor:
        """``[B, K]`` to ``[B, C]``; whatever else as it was."""
        if a.dim() != 2 or 2 * len(a) * sum(self.weight.shape) >= self.weight.numel():
            return F.linear(a, self.weight, self.bias)
        made = a @ self.weight.detach().T
        self.seen.setdefault(self.name, []).append(_Seen(a.T, made))
        return made if self.bias is None else made + self.bias


class _Scale(nn.Module):
    """A BatchNorm in evaluation mode."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, of: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = of.weight, of.bias, of.eps
        for name, value in of.named_buffers():
            self.register_buffer(name, value)

    def forward(self, maps: Tensor) -> Tensor:
        """``[B, C, H, W]`` to as many."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift[:, None, None], maps, scale[:, None, None])


def _prepare(model: nn.Module, seen: dict[str, list[_Seen]] | None, prefix: str = "") -> None:
    """Put the modules above in the places of those they stand for; `seen` is None where no products are wanted."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        other: nn.Module | None = None
        if isinstance(child, nn.BatchNorm2d) and not child.training and child.affine and child.track_running_stats:
            other = _Scale(child)
        elif seen is not None and type(child) is nn.Linear:
            other = _FullyConnected(child, f"{path}.weight", seen)
        elif seen is not None and type(child) is nn.Conv2d and child.groups == 1 and not isinstance(child.padding, str):
            other = _Convolution(child, f"{path}.weight", seen) if child.padding_mode == "zeros" else None
        if other is not None:
            setattr(model, name, other)
        else:
            _prepare(child, seen, f"{path}.")
