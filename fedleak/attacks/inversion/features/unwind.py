"""What fully connected layers tell of every sample of a batch, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedleak.attacks.chain import Layer
from fedleak.attacks.chain.base import Observed
from fedleak.attacks.chain.elementwise import Affine, Elementwise
from fedleak.attacks.chain.fully_connected import FullyConnected
from fedleak.attacks.chain.rearrangement import Reshape
from fedleak.attacks.chain.undo import Pointwise
from fedleak.attacks.inversion.features.head import separate
from fedleak.attacks.inversion.features.sparse import split

_SHUT = 1e-4
"""Of a layer's largest output: what is below it came out of a ReLU that was shut."""


@dataclass(frozen=True)
class Unwound:
    """Every sample's features at the first fully connected layer, and the loss's derivative by them.

    Attributes:
        body: the layers below; none if that layer sees the images themselves.
        features: ``[B, n]`` float64.
        by_features: ``[B, n]`` float64, of the batch's mean loss.
        error: the largest relative gap between an observed gradient and that of what was found; rounding where all is
            right.
        labels: ``[B]``, where they were found on the way: then they are those of these features.
    """

    body: tuple[Layer, ...]
    features: Tensor
    by_features: Tensor
    error: float
    labels: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the body's parameters."""
        return tuple(name for layer in self.body for name in layer.parameters)

    @property
    def bare(self) -> bool:
        """Whether the features are the images, but for their shape and a scale."""
        return all(isinstance(layer, Reshape | Affine) for layer in self.body)

    def images(self, image_shape: tuple[int, int, int]) -> Tensor:
        """``[B, C, H, W]``, of a `bare` one."""
        value = self.features
        for layer in reversed(self.body):
            value = value.reshape(len(value), *layer.in_shape)
            if isinstance(layer, Affine):
                scale, shift = layer.constants
                value = (value - shift) / scale
        return value.reshape(len(value), *image_shape)


def unwind(
    layers: Sequence[Layer], target: Observed, labels: Tensor | None = None, last: Tensor | None = None
) -> Unwound | None:
    """The features of the samples behind an update.

    A fully connected layer's gradient is Δᵀ A, of its inputs A ``[B, n]`` and the loss's derivatives Δ by its outputs.
    Where Δ is known and has rank B, A = (Δᵀ)⁺ (Δᵀ A), the loss's derivative by A is Δ W, and the slopes of the
    activation below follow from A, its output: the next layer is unwound in the same way. One sample's Δ is the bias's
    gradient, so that the layers above need not be looked at; a batch's starts from the inputs of the last layer.

    Args:
        layers: of the model, see `fedleak.attacks.chain.read_layers`.
        target: the update of a batch.
        labels: ``[B]`` int64, for a batch.
        last: ``[B, d]``, the last layer's inputs in the order of the labels, for a batch.

    Returns:
        None where the layers cannot be unwound: no fully connected one with a bias, something other than elementwise
        functions between them, or a gradient that is zero.
    """
    places = [i for i, layer in enumerate(layers) if isinstance(layer, FullyConnected)]
    if not places:
        return None
    if last is None or labels is None:
        return _single(layers, places[0], target)
    if places[-1] != len(layers) - 1:
        return None
    inputs, delta, error = last.double(), torch.empty(0), 0.0
    for place in reversed(range(places[0], len(layers))):
        layer = layers[place]
        if isinstance(layer, FullyConnected):
            weight, by_weight = target.parameters[layer.weight].double(), target.update[layer.weight].double()
            if place == len(layers) - 1:
                bias = 0.0 if layer.bias is None else target.parameters[layer.bias].double()
                logits = inputs @ weight.mT + bias
                delta = (logits.softmax(1) - F.one_hot(labels, len(weight))) / len(labels)
            else:
                inputs = torch.linalg.lstsq(delta.mT, by_weight, driver="gelsd").solution
            error = max(error, float((delta.mT @ inputs - by_weight).norm() / by_weight.norm()))
            delta = delta @ weight
        elif isinstance(layer, Elementwise) and isinstance(layer.undone(), Pointwise):
            outputs = torch.where(inputs.abs() < _SHUT * inputs.abs().amax(), 0.0, inputs)
            delta = delta * layer.pointwise.slope(outputs)
        else:
            return None
    sound = bool(inputs.isfinite().all()) and bool(delta.isfinite().all())
    return Unwound(tuple(layers[: places[0]]), inputs, delta, error) if sound else None


def _single(layers: Sequence[Layer], place: int, target: Observed) -> Unwound | None:
    """One sample's."""
    layer = layers[place]
    assert isinstance(layer, FullyConnected)
    if layer.bias is None:
        return None
    by_weight, delta = target.update[layer.weight].double(), target.update[layer.bias].double()[None]
    size = delta.square().sum()
    if not bool(size > 0) or not bool(by_weight.isfinite().all()):
        return None
    inputs = delta @ by_weight / size
    error = float((delta.mT @ inputs - by_weight).norm() / by_weight.norm())
    return Unwound(tuple(layers[:place]), inputs, delta @ target.parameters[layer.weight].double(), error)


def separate_batch(
    layers: Sequence[Layer], target: Observed, batch: int, labels: Tensor | None = None
) -> Unwound | None:
    """The features and labels of a batch by the row and column spaces of all fully connected layers' gradients.

    Labels may repeat, and need not be known; see `fedleak.attacks.inversion.features.head`.

    Args:
        layers: of the model.
        target: the update of one step on a batch.
        batch: samples.
        labels: ``[B]``, where they are known.

    Returns:
        None where the layers from the first fully connected one on are others, or not every sample was found.
    """
    place = next((i for i, layer in enumerate(layers) if isinstance(layer, FullyConnected)), len(layers))
    first = layers[place] if place < len(layers) else None
    whole = separate(layers[place:], target, batch, labels)
    if whole is None and labels is not None:
        whole = separate(layers[place:], target, batch)  # they may be wrong
    if whole is None:
        return None
    assert isinstance(first, FullyConnected)
    by_features = whole.delta @ target.parameters[first.weight].double().cpu()
    return Unwound(tuple(layers[:place]), whole.inputs, by_features, whole.error, whole.labels)


def split_batch(layers: Sequence[Layer], target: Observed, batch: int, *, draws: int = 2**18) -> Unwound | None:
    """The features and labels of a batch by the zeros that ReLUs leave in the first fully connected layer's gradient.

    Nothing of the last layer is needed, and labels may repeat; see `fedleak.attacks.inversion.features.sparse`.

    Args:
        layers: of the model.
        target: the update of one step on a batch.
        batch: samples.
        draws: how long to search.

    Returns:
        None where no ReLU follows the first fully connected layer, or not every sample was found.
    """
    place = next((i for i, layer in enumerate(layers) if isinstance(layer, FullyConnected)), len(layers))
    head = layers[place:]
    known = all(isinstance(layer, FullyConnected | Elementwise) for layer in head)
    if not known or len(head) < 3 or not isinstance(head[1], Elementwise) or not shuts(head[1]):
        return None
    first = head[0]
    assert isinstance(first, FullyConnected)
    if first.bias is None:
        return None
    found: list[Tensor] = []

    def check(delta: Tensor, inputs: Tensor) -> Tensor:
        labels, error = _explained(head, target, inputs, delta)
        found[:] = [labels]
        return error

    whole = split(target.update[first.weight].cpu(), target.update[first.bias].cpu(), batch, check, draws=draws)
    if whole is None:
        return None
    by_features = whole.delta @ target.parameters[first.weight].double().cpu()
    order = found[0].argsort(stable=True)
    return Unwound(tuple(layers[:place]), whole.inputs[order], by_features[order], whole.error, found[0][order])


def _explained(head: Sequence[Layer], target: Observed, inputs: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Labels ``[B]`` with which the head, at its inputs, best gives these derivatives, and the relative gap ``[B]``."""
    weights = {n: v.double().cpu() for n, v in target.parameters.items()}
    values = [inputs]
    for layer in head:
        if isinstance(layer, FullyConnected):
            bias = 0.0 if layer.bias is None else weights[layer.bias]
            values.append(values[-1] @ weights[layer.weight].mT + bias)
        else:
            assert isinstance(layer, Elementwise)
            values.append(layer.function(values[-1]))
    p = values[-1].softmax(1)
    classes = p.shape[1]
    back = (p[:, None] - torch.eye(classes, dtype=p.dtype)) / len(p)  # [B, label, C]
    for place in reversed(range(1, len(head))):
        layer = head[place]
        if isinstance(layer, FullyConnected):
            back = back @ weights[layer.weight]
        else:
            assert isinstance(layer, Elementwise)
            back = back * layer.slope(values[place], values[place + 1])[:, None]
    gap = (back - delta[:, None]).norm(dim=2) / delta.norm(dim=1, keepdim=True).clamp(min=1e-300)
    best = gap.nan_to_num(torch.inf).min(1)
    return best.indices, best.values


def shuts(layer: Elementwise) -> bool:
    """Whether it is zero, and flat, below zero."""
    below = torch.tensor(-1.0)
    return layer.curvature is None and float(layer.function(below)) == 0 and float(layer.function(-below)) != 0
