"""The last convolution of a body, undone: its inputs, exactly, once it is known which pixels win the pooling above it.

A kernel's gradient is the correlation of the inputs with the derivatives δ by the outputs, a linear equation for each
of its numbers. Where the derivatives are known and the kernels are many, the inputs follow by least squares, one system
for all input channels. The winners of the pooling decide where δ lies; an image that is roughly right has nearly all of
them right. A wrong one spoils the equations of its own output channel alone, so that the channels which do not agree
with the others are trusted less (iteratively reweighted least squares), and the inputs so found tell their winners.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedleak.attacks.chain.convolution import Convolution
from fedleak.attacks.inversion.features.body import Body

_ROUNDS = 15
"""Of reweighting; each of them halves what counts as a disagreement."""
_TURNS = 4
"""From inputs to winners and back, at most."""
_AGREES = 1e-3
"""Relative gap of a channel that agrees with the inputs."""
_EXACT = 1e-4
"""The same, of all channels: then nothing is left to mend."""
_MOST = 1024
"""Unknowns of a channel, with all samples."""


@dataclass(frozen=True)
class Lower:
    """The layers below a convolution, with exact features of their own.

    Attributes:
        body: these layers.
        features: ``[B, n]``, the convolution's inputs.
        known: ``[B, n]``, which of them the gradient tells; the others are as they were before.
        error: the largest relative gap of an output channel's gradient; rounding where all is right.
    """

    body: Body
    features: Tensor
    known: Tensor
    error: float


def undoable(body: Body, batch: int) -> bool:
    """Whether a body's last convolution has other weights below it, and enough numbers in its gradient."""
    place = body.last_convolution()
    layer = None if place is None else body.layers[place]
    if not isinstance(layer, Convolution):
        return False
    (_, height, width), (rows, columns) = layer.in_shape, layer.kernel
    return batch * height * width <= min(_MOST, rows * columns * layer.channels)


def undo_convolution(body: Body, gradients: Mapping[str, Tensor], images: Tensor) -> Lower | None:
    """Undo a body's last convolution.

    Args:
        body: the layers up to exact features.
        gradients: name -> tensor, observed.
        images: ``[B, C, H, W]``, roughly right.

    Returns:
        None where there is no other layer with weights below, where the gradient has too few numbers, or where they do
        not agree.
    """
    place = body.last_convolution()
    if place is None or not undoable(body, len(images)):
        return None
    layer = body.layers[place]
    assert isinstance(layer, Convolution)
    batch, (channels, height, width) = len(images), layer.in_shape
    exact = body.double()
    inputs = exact.before(place, images.double())
    delta = exact.after(place, inputs)
    by_weight = gradients[layer.weight].double().view(layer.channels, channels, -1)
    for _ in range(_TURNS):
        solved = _inputs(layer, delta, by_weight, inputs)
        if solved is None:
            return None
        inputs, known, errors = solved
        following = exact.after(place, inputs)
        if float(errors.max()) < _EXACT or torch.equal(following, delta):
            break
        delta = following
    if 2 * int((errors < _AGREES).sum()) < len(errors) or 2 * int(known.sum()) < known.numel():
        return None
    back = exact.weights[layer.weight].flatten(1).mT @ delta.flatten(2)
    by_inputs = F.fold(back, (height, width), layer.kernel, layer.dilation, layer.padding, layer.stride)
    features = inputs.flatten(1).to(images)
    below = Body(body.layers[:place], body.weights, body.image_shape, features, by_inputs.flatten(1).to(images))
    return Lower(below, features, known.expand(batch, channels, height, width).flatten(1), float(errors.max()))


def _inputs(
    layer: Convolution, delta: Tensor, by_weight: Tensor, before: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The inputs ``[B, C, H, W]``, which are told ``[B, 1, H, W]``, and the gap of each output channel that has any.

    Args:
        layer: of the inputs.
        delta: ``[B, O, H', W']``.
        by_weight: ``[O, C, k]``.
        before: ``[B, C, H, W]``, taken where the gradient says nothing.
    """
    batch, _, height, width = before.shape
    size = by_weight.square().mean((1, 2)).sqrt()
    alive = size > 1e-6 * size.amax()
    if not bool(alive.any()):
        return None
    system, wanted = _system(layer, delta[:, alive], height, width), by_weight[alive].mT
    size = size[alive]
    squares, products = system.mT @ system, system.mT @ wanted
    inputs = start = before.transpose(0, 1).flatten(1).mT  # [B·H·W, C]
    for _ in range(_ROUNDS):
        errors = (system @ inputs - wanted).square().mean((1, 2)).sqrt() / size
        trust = 1 / (errors.square() + max(0.5 * float(errors.median()), 1e-7) ** 2) / size.square()
        normal, right = (torch.tensordot(trust, v, 1) for v in (squares, products))
        ridge = 1e-9 * normal.diagonal().mean()
        normal.diagonal().add_(ridge)
        inputs = torch.linalg.solve(normal, right + ridge * start)
    errors = (system @ inputs - wanted).square().mean((1, 2)).sqrt() / size
    values, vectors = torch.linalg.eigh(squares[errors < _AGREES].sum(0))
    told = vectors[:, values > 1e-8 * values[-1].clamp(min=1e-300)].square().sum(1) > 1 - 1e-6
    found = inputs.mT.unflatten(1, (batch, height * width)).transpose(0, 1).reshape(before.shape)
    return found, told.view(batch, 1, height, width), errors


def _system(layer: Convolution, delta: Tensor, height: int, width: int) -> Tensor:
    """``[O, k, B·H·W]``: what each pixel of an input channel adds to each number of a kernel's gradient."""
    pixels = torch.eye(height * width, dtype=delta.dtype, device=delta.device).view(-1, 1, height, width)
    patches = F.unfold(pixels, layer.kernel, layer.dilation, layer.padding, layer.stride)  # [H·W, k, positions]
    return torch.einsum("pkl,bol->okbp", patches, delta.flatten(2)).flatten(2)
