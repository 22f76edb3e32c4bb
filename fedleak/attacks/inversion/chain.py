"""A feed-forward model as a chain of linear layers and elementwise functions, so that it can be undone layer by layer.

`Chain.trace` reads any ``nn.Module`` that `torch.fx` can trace and whose layers follow each other without branches.
Fully connected layers are 1×1 convolutions of 1×1 images here: one kind of linear layer is enough.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
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


Layer = Linear | Pointwise


@dataclass(frozen=True)
class Chain:
    """A model as a list of layers.

    Attributes:
        layers: first to last; neighbours agree up to a reshape that keeps the order of the elements.
        image_shape: (C, H, W) of the input.
    """

    layers: list[Layer]
    image_shape: tuple[int, int, int]

    @property
    def last(self) -> Linear:
        """The layer that gives the logits."""
        assert isinstance(self.layers[-1], Linear)  # `trace` sees to it
        return self.layers[-1]

    @property
    def parameter_names(self) -> list[str]:
        """Of all weights and biases."""
        linear = [layer for layer in self.layers if isinstance(layer, Linear)]
        return [name for layer in linear for name in (layer.weight, layer.bias) if name is not None]

    @staticmethod
    def trace(model: nn.Module, image_shape: tuple[int, int, int]) -> Chain | None:
        """The chain of a model, or None if it branches or has a layer that cannot be undone (pooling, BatchNorm …)."""
        try:
            graph = fx.symbolic_trace(model)
            sample = next(iter(model.parameters())).new_zeros(1, *image_shape)
            with torch.no_grad():
                ShapeProp(graph).propagate(sample)
            return _read(graph, model, image_shape)
        except Exception:  # whatever a stranger's forward does while traced: it is not a chain that we know
            return None

    def forward(self, images: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """The input of every layer, and the logits ``[N, B, classes, 1]`` last, of images ``[N, B, C, H, W]``."""
        values = [images.flatten(-2)]
        for layer in self.layers:
            value = values[-1]
            if isinstance(layer, Linear):
                values[-1] = value = value.reshape(*value.shape[:2], layer.shape[0], layer.pixels)
                values.append(layer.forward(value, parameters))
            else:
                values.append(layer.value(value))
        return values

    def gradients(self, images: Tensor, labels: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of the mean cross-entropy.

        Args:
            images: ``[N, B, C, H, W]``.
            labels: ``[N, B]`` int64.
            parameters: name -> ``[N, ...]``, each problem its own.

        Returns:
            name -> ``[N, ...]``, for the weights and biases of the chain.
        """
        values = self.forward(images, parameters)
        logits = values[-1].flatten(2)
        delta = (logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])) / images.shape[1]
        gradients = {}
        for position in reversed(range(len(self.layers))):
            layer = self.layers[position]
            if isinstance(layer, Pointwise):
                delta = delta.reshape(values[position + 1].shape) * layer.slope(values[position + 1])
                continue
            delta = delta.reshape(*delta.shape[:2], layer.out_shape[0], -1)
            weight = parameters[layer.weight]
            gradients[layer.weight] = layer.weight_gradient(values[position], delta).reshape(weight.shape)
            if layer.bias is not None:
                gradients[layer.bias] = delta.sum((1, 3))
            if position:
                delta = layer.backward(delta, parameters)
        return gradients


def _sigmoid() -> Pointwise:
    return Pointwise(torch.sigmoid, torch.logit, lambda h: h * (1 - h), 0.0, 1.0)


def _tanh() -> Pointwise:
    return Pointwise(torch.tanh, torch.atanh, lambda h: 1 - h * h, -1.0, 1.0)


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Pointwise:
    a = negative_slope
    if a <= 0:
        return _relu()
    return Pointwise(
        lambda z: F.leaky_relu(z, a), lambda h: torch.where(h < 0, h / a, h), lambda h: a + (1 - a) * (h >= 0).to(h)
    )


def _relu(inplace: bool = False) -> Pointwise:
    return Pointwise(torch.relu, lambda h: h, lambda h: (h > 0).to(h), 0.0)


def _elu(alpha: float = 1.0, inplace: bool = False) -> Pointwise:
    return Pointwise(
        lambda z: F.elu(z, alpha),
        lambda h: torch.where(h < 0, torch.log1p(h.clamp(max=0) / alpha), h),
        lambda h: torch.where(h < 0, h + alpha, 1.0),
        -alpha,
    )


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Pointwise:
    return Pointwise(
        lambda z: F.softplus(z, beta, threshold),
        lambda h: h + torch.log(-torch.expm1(-beta * h)) / beta,
        lambda h: -torch.expm1(-beta * h),
        0.0,
    )


def _affine(scale: Tensor | float, shift: Tensor | float) -> Pointwise:
    scale, shift = (torch.as_tensor(v, dtype=torch.float64).reshape(-1, 1) for v in (scale, shift))

    def value(z: Tensor) -> Tensor:
        return z * scale.to(z) + shift.to(z)

    return Pointwise(value, lambda h: (h - shift.to(h)) / scale.to(h), lambda h: scale.to(h).expand_as(h))


_MODULES: dict[type[nn.Module], Callable[[Any], Pointwise]] = {
    nn.Sigmoid: lambda m: _sigmoid(),
    nn.Tanh: lambda m: _tanh(),
    nn.ReLU: lambda m: _relu(),
    nn.LeakyReLU: lambda m: _leaky_relu(m.negative_slope),
    nn.ELU: lambda m: _elu(m.alpha),
    nn.Softplus: lambda m: _softplus(m.beta, m.threshold),
}
_FUNCTIONS: dict[Any, Callable[..., Pointwise]] = {
    torch.sigmoid: _sigmoid,
    F.sigmoid: _sigmoid,
    "sigmoid": _sigmoid,
    torch.tanh: _tanh,
    F.tanh: _tanh,
    "tanh": _tanh,
    torch.relu: _relu,
    F.relu: _relu,
    "relu": _relu,
    F.leaky_relu: _leaky_relu,
    F.elu: _elu,
    F.softplus: _softplus,
}
_RESHAPES = {torch.flatten, torch.reshape, "flatten", "view", "reshape", "contiguous"}
_ARITHMETIC: dict[Any, Callable[[Any], Pointwise]] = {
    **dict.fromkeys((operator.add, torch.add), lambda c: _affine(1.0, c)),
    **dict.fromkeys((operator.sub, torch.sub), lambda c: _affine(1.0, -c)),
    **dict.fromkeys((operator.mul, torch.mul), lambda c: _affine(c, 0.0)),
    **dict.fromkeys((operator.truediv, torch.div), lambda c: _affine(1 / torch.as_tensor(c, dtype=torch.float64), 0.0)),
}


def _read(graph: fx.GraphModule, model: nn.Module, image_shape: tuple[int, int, int]) -> Chain | None:
    layers: list[Layer] = []
    previous: fx.Node | None = None
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            previous = node
        elif node.op == "output":
            names = [layer.weight for layer in layers if isinstance(layer, Linear)]
            whole = node.args[0] is previous and len(set(names)) == len(names) and isinstance(layers[-1], Linear)
            return Chain(layers, image_shape) if whole else None
        elif node.op == "get_attr" or previous is None or not _is_tensor(node):
            continue
        else:
            if not node.args or node.args[0] is not previous:
                return None  # a branch
            layer = _layer(node, model, _shape(previous))
            if layer is not None:
                layers.append(layer)
            previous = node
    return None


def _is_tensor(node: fx.Node) -> bool:
    return "tensor_meta" in node.meta and hasattr(node.meta["tensor_meta"], "shape")


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape[1:])


def _layer(node: fx.Node, model: nn.Module, shape: tuple[int, ...]) -> Layer | None:
    """The layer of a node, None for a reshape; raises where the node cannot be undone."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if isinstance(module, nn.Conv2d | nn.Linear):
            return _linear(str(node.target), module, shape)
        if isinstance(module, nn.Flatten | nn.Identity | nn.Unflatten):
            return None
        if isinstance(module, nn.Dropout | nn.Dropout2d) and (module.p == 0 or not module.training):
            return None
        return _MODULES[type(module)](module)
    if node.target in _RESHAPES:
        return None
    if node.target in _FUNCTIONS:
        return _FUNCTIONS[node.target](*node.args[1:], **node.kwargs)
    constant = node.args[1]
    if isinstance(constant, fx.Node):
        if constant.op != "get_attr" or str(constant.target) in dict(model.named_parameters()):
            raise ValueError("not a constant")
        value = operator.attrgetter(str(constant.target))(model).detach()
        if value.numel() not in (1, shape[0]) or value.numel() != math.prod(value.shape[-3:-2]):
            raise ValueError("not one number a channel")
        constant = value.flatten()
    return _ARITHMETIC[node.target](constant)


def _linear(name: str, module: nn.Conv2d | nn.Linear, shape: tuple[int, ...]) -> Linear:
    bias = f"{name}.bias" if module.bias is not None else None
    if isinstance(module, nn.Linear):
        if len(shape) != 1:
            raise ValueError("a fully connected layer on the last of several dimensions")
        return Linear(
            f"{name}.weight", bias, (shape[0], 1, 1), (module.out_features, 1, 1), torch.zeros(1, 1, dtype=torch.int64)
        )
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError("a convolution that is not plain")
    channels, height, width = shape
    axes = []
    for size, kernel, stride, padding, dilation in zip(
        (height, width), module.kernel_size, module.stride, module.padding, module.dilation, strict=True
    ):
        out = (size + 2 * int(padding) - dilation * (kernel - 1) - 1) // stride + 1
        at = torch.arange(out)[None] * stride + torch.arange(kernel)[:, None] * dilation - int(padding)
        axes.append(torch.where((at >= 0) & (at < size), at, -1))
    rows, columns = axes
    row, column = rows[:, None, :, None], columns[None, :, None, :]
    taps = torch.where((row >= 0) & (column >= 0), row * width + column, height * width)
    out_shape = (module.out_channels, rows.shape[1], columns.shape[1])
    return Linear(f"{name}.weight", bias, (channels, height, width), out_shape, taps.flatten(2).flatten(0, 1))
