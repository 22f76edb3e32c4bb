"""The distance between updates for feed-forward chains, several times faster than vectorised differentiation.

For a chain of layers the gradient of the loss, its distance to the observed one, and the derivative of that distance
are four sweeps over the layers, written out here as batched matrix products:

1. forward: activations;
2. backward: δ = ∂loss/∂outputs of every layer, hence the dummy gradients and their distance to the observed ones;
3. forward again: ∂distance/∂δ, from the first layer to the last;
4. backward again: ∂distance/∂activations, down to the images.

The gradient of a fully connected layer, Σ_i δ_i a_iᵀ, is never formed when the observed one has the rank of a batch.

Operands are padded where the choice of a CPU kernel would depend on the alignment or the length of the whole batch, so
that an evaluation gives a problem the same bits whatever stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedleak.attacks.chain import Layer, Products, read_layers
from fedleak.attacks.chain.fully_connected import FullyConnected, has_rank
from fedleak.attacks.inversion.gradients import Distance, Rows, Victim
from fedleak.attacks.inversion.objectives import Objective


class ChainDistance(Distance):
    """Feed-forward chains: see the module's docstring. Make one with `chain_distance`."""

    layers: list[Layer]
    names: list[str]
    shared_rows: Rows

    def load(self, victims: Sequence[Victim]) -> Rows:
        """Targets, and weights unless they are shared."""
        rows: Rows = {}
        for layer in self.layers:
            rows |= layer.load(victims, self._stack)
            if self.shared_parameters is None:
                rows |= layer.weights(victims, self._stack)
        return rows

    @torch.no_grad()
    def evaluate(
        self, rows: Rows, images: Tensor, labels: Tensor, *, with_labels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value and gradients by four sweeps over the layers."""
        rows = rows | self.shared_rows
        products = Products()
        a = images
        for layer in self.layers:
            a = layer.forward(rows, a)
        p, batch = a.softmax(2), a.shape[1]
        delta: Tensor | None = (p - labels) / batch
        for layer in reversed(self.layers):
            if delta is not None:
                delta = layer.backward(rows, delta)
                layer.book(rows, products)
        value = products.judge(self.objective, self.names)
        by_delta: Tensor | None = None
        for layer in self.layers:
            layer.weigh(rows, products)
            by_delta = layer.forward_again(rows, by_delta)
        assert by_delta is not None
        by_delta = by_delta / batch
        inner = (p * by_delta).sum(2, keepdim=True)
        a = p * (by_delta - inner)
        for layer in reversed(self.layers):
            a = layer.backward_again(rows, a)
        return value, a, inner - by_delta if with_labels else None


def chain_distance(
    model: nn.Module,
    objective: Objective,
    victims: Sequence[Victim],
    image_shape: tuple[int, int, int],
    batch: int,
    *,
    shared: bool,
    training_mode: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ChainDistance | None:
    """A fast distance for these victims, or None if the model is not a chain of layers known here.

    Args:
        model, objective, training_mode, device, dtype: as for `Distance`.
        victims: all that will be matched; `shared` says that their parameters are the same.
        image_shape: (C, H, W).
        batch: images per victim.
    """
    common = victims[0] if shared else None
    distance = ChainDistance(model, objective, shared=common, training_mode=training_mode, device=device, dtype=dtype)
    layers = read_layers(distance.model, image_shape)
    if layers is None:
        return None
    for layer in layers:
        if isinstance(layer, FullyConnected) and all(has_rank(v.update[layer.weight], batch) for v in victims):
            layer.rank = batch
    distance.layers = layers
    distance.names = [name for name, _ in distance.model.named_parameters()]
    distance.shared_rows = {}
    if common is not None:
        for layer in layers:
            distance.shared_rows |= layer.weights([common], distance._stack)
    return distance
