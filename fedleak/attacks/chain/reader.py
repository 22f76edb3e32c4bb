"""Reads a feed-forward `nn.Module` into layers."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedleak.attacks.chain.base import Layer
from fedleak.attacks.chain.convolution import Convolution
from fedleak.attacks.chain.elementwise import Affine, elu, leaky_relu, relu, sigmoid, softplus, tanh
from fedleak.attacks.chain.fully_connected import FullyConnected
from fedleak.attacks.chain.rearrangement import MaxPool, Reshape, average_pool
from fedleak.seeding import plain_generator


@dataclass(frozen=True)
class _Own:
    """The model's own weights, in the form of an observed problem."""

    parameters: Mapping[str, Tensor]
    update: Mapping[str, Tensor]


_MODULES: dict[type[nn.Module], Callable[[Any], Layer]] = {
    nn.Sigmoid: lambda m: sigmoid(),
    nn.Tanh: lambda m: tanh(),
    nn.ReLU: lambda m: relu(),
    nn.LeakyReLU: lambda m: leaky_relu(m.negative_slope),
    nn.ELU: lambda m: elu(m.alpha),
    nn.Softplus: lambda m: softplus(m.beta, m.threshold),
    nn.AvgPool2d: average_pool,
    nn.MaxPool2d: MaxPool,
}
_FUNCTIONS: dict[Any, Callable[..., Layer]] = {
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), sigmoid),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), tanh),
    **dict.fromkeys((torch.relu, F.relu, "relu"), relu),
    F.leaky_relu: leaky_relu,
    F.elu: elu,
    F.softplus: softplus,
}
_ARITHMETIC: dict[Any, Callable[[Any], Layer]] = {
    **dict.fromkeys((operator.add, torch.add), lambda c: Affine(1.0, c)),
    **dict.fromkeys((operator.sub, torch.sub), lambda c: Affine(1.0, -c)),
    **dict.fromkeys((operator.mul, torch.mul), lambda c: Affine(c, 0.0)),
    **dict.fromkeys((operator.truediv, torch.div), lambda c: Affine(1 / c, 0.0)),
}
_RESHAPES = (torch.flatten, torch.reshape, "flatten", "reshape", "view", "contiguous")


def read_layers(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Layer] | None:
    """The layers of a feed-forward model in order, checked against the model itself; None for everything else.

    Args:
        model: any module; it is traced, not run on private data.
        image_shape: (C, H, W) of its input.
    """
    try:
        parameter = next(model.parameters())
        graph = fx.symbolic_trace(copy.deepcopy(model))  # a copy: its BatchNorm may count what passes
        with torch.no_grad():
            _Shapes(graph).run(parameter.new_zeros(1, *image_shape))
        layers = _read(graph, model)
    except Exception:  # whatever a stranger's forward does while it is traced: the general path knows it
        return None
    if layers is None or sorted(n for layer in layers for n in layer.parameters) != sorted(
        name for name, _ in model.named_parameters()
    ):
        return None
    # What the layers make of an image must be what the model makes of it.
    image = torch.rand(2, *image_shape, generator=plain_generator(0)).to(parameter)
    own = _Own(dict(model.named_parameters()), {})
    try:
        with torch.no_grad():
            a = image[None]
            for layer in layers:
                layer.in_shape = tuple(a.shape[2:])
                if isinstance(layer, FullyConnected) and len(layer.in_shape) != 1:
                    return None  # on the last of several dimensions
                a = layer.forward(layer.weights([own], lambda tensors: torch.stack(tensors).detach()), a)
            same = torch.allclose(a[0], model(image), rtol=1e-3, atol=1e-4)
    except RuntimeError:
        return None
    if not same:
        return None
    for layer in layers:
        layer.first = True
        if layer.parameters:
            break
    return layers


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor on the way; torch's own does more, and takes a second to import."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        n.meta["shape"] = result.shape if isinstance(result, Tensor) else None
        return result


def _read(graph: fx.GraphModule, model: nn.Module) -> list[Layer] | None:
    layers: list[Layer] = []
    previous: fx.Node | None = None
    for node in graph.graph.nodes:
        if node.op == "output":
            return layers if node.args[0] is previous else None
        if node.op == "placeholder":
            previous = node
        shape = node.meta.get("shape")
        if node.op in ("placeholder", "get_attr") or shape is None:  # no tensor: a size, say
            continue
        if not node.args or node.args[0] is not previous:
            return None
        previous = node
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            if isinstance(module, nn.Flatten | nn.Unflatten):
                layers.append(Reshape(shape[1:]))
            elif not _passes(module):
                layers.append(_module(str(node.target), module))
        elif node.target in _RESHAPES:
            layers.append(Reshape(shape[1:]))
        elif node.target in _FUNCTIONS:
            layers.append(_FUNCTIONS[node.target](*node.args[1:], **node.kwargs))
        else:
            layers.append(_ARITHMETIC[node.target](_constant(node.args[1], model)))
    return None


def _passes(module: nn.Module) -> bool:
    """Whether what goes in comes out."""
    if isinstance(module, nn.Dropout | nn.Dropout2d):
        return module.p == 0 or not module.training
    return isinstance(module, nn.Identity)


def _module(name: str, module: nn.Module) -> Layer:
    """The layer of a module; raises where it is not one that is known."""
    if type(module) is nn.Conv2d:
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise ValueError("a convolution that is not plain")
        return Convolution(name, module)
    if type(module) is nn.Linear:
        return FullyConnected(name, module)
    return _MODULES[type(module)](module)


def _constant(argument: Any, model: nn.Module) -> Tensor | float:
    """A number, or in float64 a buffer of the model that broadcasts against ``[C, H, W]``."""
    if not isinstance(argument, fx.Node):
        return float(argument)
    if argument.op != "get_attr" or str(argument.target) in dict(model.named_parameters()):
        raise ValueError("not a constant")
    value: Tensor = operator.attrgetter(str(argument.target))(model).detach().double()
    if value.dim() > 4 or (value.dim() == 4 and len(value) != 1):
        raise ValueError("not the same for every image")
    return value
