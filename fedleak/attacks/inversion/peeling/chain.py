"""A feed-forward model as a chain of linear layers and elementwise functions, so that it can be undone layer by layer.

Fully connected layers are 1×1 convolutions of 1×1 images here: one kind of linear layer is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from fedleak.attacks.chain import Linear, Pointwise, read_layers


@dataclass(frozen=True)
class Chain:
    """A model as a list of layers.

    Attributes:
        layers: first to last; neighbours agree up to a reshape that keeps the order of the elements.
        image_shape: (C, H, W) of the input.
    """

    layers: Sequence[Linear | Pointwise]
    image_shape: tuple[int, int, int]

    @property
    def last(self) -> Linear:
        """The layer that gives the logits."""
        assert isinstance(self.layers[-1], Linear)  # `read` sees to it
        return self.layers[-1]

    @property
    def parameter_names(self) -> list[str]:
        """Of all weights and biases."""
        linear = [layer for layer in self.layers if isinstance(layer, Linear)]
        return [name for layer in linear for name in (layer.weight, layer.bias) if name is not None]

    @staticmethod
    def read(model: nn.Module, image_shape: tuple[int, int, int]) -> Chain | None:
        """The chain of a model, or None if it branches or has a layer that cannot be undone (pooling, BatchNorm …)."""
        layers = read_layers(model, image_shape)
        if layers is None:
            return None
        try:
            undone = [seen for seen in (layer.undone() for layer in layers) if seen is not None]
        except ValueError:
            return None
        return Chain(undone, image_shape) if undone and isinstance(undone[-1], Linear) else None

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
