"""The layers below the features: their values and gradients as smooth functions of the image, at a temperature.

A ReLU that opens and a pooling that changes its winner make a network's gradient jump, and a search by slopes cannot
see beyond a jump. At temperature T the backward pass takes gates and winners as probabilities instead: of the sign of a
ReLU's input, and of each pixel of a pooling's window. As T falls to zero they become what they are in the network, and
an image found at one temperature is the start for the next. Values, and so the features, are exact at any temperature.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedleak.attacks.chain import Layer
from fedleak.attacks.chain.convolution import Convolution
from fedleak.attacks.chain.elementwise import Affine, Elementwise
from fedleak.attacks.chain.rearrangement import MaxPool, Rearrangement, Reshape

Tensors = dict[str, Tensor]
_SHUT = 1e-4
"""Of the largest feature: what is below it came out of a ReLU that was shut."""


class Body:
    """The layers up to the features of B samples, with one problem's weights; images are S starts of that problem.

    Args:
        layers: plain convolutions, elementwise functions, poolings, reshapes; see `supported`.
        weights: name -> tensor.
        image_shape: (C, H, W).
        features: ``[B, n]``, the exact features, which tell where a last ReLU was open.
        by_features: ``[B, n]``, the loss's derivative by them.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        weights: Mapping[str, Tensor],
        image_shape: tuple[int, int, int],
        features: Tensor,
        by_features: Tensor,
    ) -> None:
        self.layers = list(layers)
        self.weights = dict(weights)
        self.image_shape = image_shape
        self.gated = _last_gate(self.layers)
        shut = features <= _SHUT * features.abs().amax(1, keepdim=True)
        self.delta = by_features if self.gated is None else torch.where(shut, 0.0, by_features)

    @staticmethod
    def supported(layers: Sequence[Layer]) -> bool:
        """Whether all layers are of a known kind, and one has weights."""
        kinds = (Convolution, Elementwise, MaxPool, Rearrangement)
        whole = not any(isinstance(layer, MaxPool) and layer.options[4] for layer in layers)  # windows over the edge
        known = all(isinstance(layer, kinds) for layer in layers)
        return whole and known and any(layer.parameters for layer in layers)

    def double(self) -> Body:
        """The same in float64."""
        other = copy.copy(self)
        other.weights = {name: value.double() for name, value in self.weights.items()}
        other.delta = self.delta.double()
        return other

    def features(self, images: Tensor) -> Tensor:
        """``[N, n]`` of any images ``[N, C, H, W]``."""
        return self._forward(images)[-1].flatten(1)

    def _forward(self, inputs: Tensor, first: int = 0) -> list[Tensor]:
        """The inputs of layer `first`, and the output of every layer from there on."""
        values = [inputs]
        for layer in self.layers[first:]:
            a = values[-1]
            if isinstance(layer, Convolution):
                weight, bias = self._kernel(layer)
                values.append(F.conv2d(a, weight, bias, layer.stride, layer.padding, layer.dilation))
            elif isinstance(layer, MaxPool):
                values.append(F.max_pool2d(a, *layer.options))
            else:
                assert isinstance(layer, Elementwise | Rearrangement)
                values.append(layer.function(a))
        return values

    def _kernel(self, layer: Convolution) -> tuple[Tensor, Tensor | None]:
        return self.weights[layer.weight], None if layer.bias is None else self.weights[layer.bias]

    def evaluate(self, images: Tensor, temperature: float) -> tuple[Tensor, Tensors]:
        """Features ``[S, B, n]`` and gradients, name -> ``[S, m]``, of images ``[S, B, C, H, W]``; differentiable.

        Args:
            images: a batch a start.
            temperature: in units of each layer's standard deviation; 0 is the network itself.
        """
        starts, batch = images.shape[:2]
        values = self._forward(images.flatten(0, 1))
        found: Tensors = {}
        delta = self.delta.repeat(starts, 1)
        for place in reversed(range(len(self.layers))):
            layer, a = self.layers[place], values[place]
            delta = delta.reshape(values[place + 1].shape)
            if isinstance(layer, Convolution):
                patches = F.unfold(a, layer.kernel, layer.dilation, layer.padding, layer.stride)
                kernel = (delta.flatten(2) @ patches.mT).flatten(1)
                found[layer.weight] = kernel.unflatten(0, (starts, batch)).sum(1)
                if layer.bias is not None:
                    found[layer.bias] = delta.sum((2, 3)).unflatten(0, (starts, batch)).sum(1)
                if layer.first:
                    break
            delta = self._back(place, values, delta, temperature)
        return values[-1].flatten(1).unflatten(0, (starts, batch)), found

    def last_convolution(self) -> int | None:
        """Its place, if other layers with weights come before it."""
        places = [place for place, layer in enumerate(self.layers) if isinstance(layer, Convolution)]
        return places[-1] if len(places) > 1 else None

    def after(self, place: int, inputs: Tensor) -> Tensor:
        """The loss's derivatives ``[B, O, H', W']`` by the outputs of convolution `place`, at its inputs."""
        values = self._forward(inputs, place)
        delta = self.delta
        for later in reversed(range(place + 1, len(self.layers))):
            delta = delta.reshape(values[later - place + 1].shape)
            delta = self._back(later, [inputs] * place + values, delta, 0.0)
        return delta.reshape(values[1].shape)

    def before(self, place: int, images: Tensor) -> Tensor:
        """The inputs of layer `place`, of images ``[B, C, H, W]``."""
        return self._forward(images)[place]

    def _back(self, place: int, values: Sequence[Tensor], delta: Tensor, temperature: float) -> Tensor:
        """∂loss/∂inputs of layer `place`, of that by its outputs."""
        layer, a, out = self.layers[place], values[place], values[place + 1]
        if isinstance(layer, Convolution):
            back = self._kernel(layer)[0].flatten(1).mT @ delta.flatten(2)
            shape = (a.shape[2], a.shape[3])
            return F.fold(back, shape, layer.kernel, layer.dilation, layer.padding, layer.stride)
        if isinstance(layer, MaxPool):
            before = self.layers[place - 1] if place else None
            ordered = values[place - 1] if isinstance(before, Elementwise) and hinge(before) else a
            return _to_winners(layer, ordered, delta, temperature)
        if isinstance(layer, Elementwise):
            return delta * self._slope(place, a, out, temperature)
        assert isinstance(layer, Rearrangement)
        return delta.reshape(a.shape) if isinstance(layer, Reshape) else layer.transpose(a, delta)

    def _slope(self, place: int, a: Tensor, out: Tensor, temperature: float) -> Tensor | float:
        layer = self.layers[place]
        assert isinstance(layer, Elementwise)
        if place == self.gated:
            return 1.0  # `delta` is zero where it was shut
        if not hinge(layer) or temperature == 0:
            return layer.slope(a, out)
        low, high = (float(layer.slope(v, layer.function(v))) for v in (a.new_tensor(-1.0), a.new_tensor(1.0)))
        return low + (high - low) * torch.sigmoid(2 * a / _unit(a, temperature))


def hinge(layer: Elementwise) -> bool:
    """Whether it is made of two straight pieces."""
    return layer.curvature is None and not isinstance(layer, Affine)


def _last_gate(layers: Sequence[Layer]) -> int | None:
    """The place of a ReLU that only pooling and reshapes follow: the features tell where it was open."""
    for place in reversed(range(len(layers))):
        layer = layers[place]
        if isinstance(layer, Elementwise):
            shut = hinge(layer) and float(layer.function(torch.tensor(-1.0))) == 0
            return place if shut else None
        if not isinstance(layer, MaxPool | Reshape):
            return None
    return None


def _unit(a: Tensor, temperature: float) -> Tensor:
    """The temperature in a layer's own units, ``[S, 1, …]``."""
    spread = a.detach().flatten(1).std(1) * temperature + 1e-12
    return spread.view(-1, *[1] * (a.dim() - 1))


def _to_winners(layer: MaxPool, a: Tensor, delta: Tensor, temperature: float) -> Tensor:
    """∂loss/∂inputs ``[S, C, H, W]`` of a pooling, shared in each window by its pixels' chances to be the largest."""
    size, stride, padding, dilation, _ = layer.options
    (ph, pw) = _pair(padding)
    padded = F.pad(a, (pw, pw, ph, ph), value=-1e9) if ph or pw else a
    windows = F.unfold(padded, size, dilation, 0, stride).unflatten(1, (a.shape[1], -1))  # [S, C, k, positions]
    windows = windows[..., : delta.shape[2] * delta.shape[3]]
    if temperature:
        chances = (windows / _unit(a, temperature)).softmax(2)
    else:
        chances = F.one_hot(windows.argmax(2), windows.shape[2]).movedim(3, 2).to(a)
    shares = (chances * delta.flatten(2)[:, :, None]).flatten(1, 2)
    back = F.fold(shares, padded.shape[2:], size, dilation, 0, stride)
    return back[..., ph : ph + a.shape[2], pw : pw + a.shape[3]]


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
