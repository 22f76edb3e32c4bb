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
from torch import Tensor

from fedleak.attacks.chain import Products, read_layers
from fedleak.attacks.chain.fully_connected import FullyConnected, has_rank
from fedleak.attacks.inversion.distances.base import Comparison, Distance, Rows
from fedleak.attacks.inversion.objectives import Elementwise
from fedleak.attacks.problem import Problem


class ChainDistance(Distance):
    """Feed-forward chains: see the module's docstring."""

    @classmethod
    def fit(cls, comparison: Comparison, problems: Sequence[Problem]) -> ChainDistance | None:
        """None if the model is no chain of layers known here, or if more is compared than the gradient of one batch."""
        alike = all(len(problem.targets) == 1 and problem.targets[0].imitate is None for problem in problems)
        if not alike or isinstance(comparison.objective, Elementwise):
            return None
        training = problems[0].targets[0].training
        if comparison.unrolled and not (training.single and training.scale is not None):
            return None
        distance = cls(comparison, problems)
        return distance if distance._read(problems) else None

    def _read(self, problems: Sequence[Problem]) -> bool:
        """Read the model's layers, if it has such."""
        layers = read_layers(self.model, self.comparison.image_shape)
        if layers is None:
            return False
        targets, batch = [problem.targets[0] for problem in problems], problems[0].samples
        self.layers = layers
        self.names = [name for name, _ in self.model.named_parameters()]
        self.shared_rows: Rows = {}
        for layer in layers:
            if isinstance(layer, FullyConnected) and all(has_rank(t.update[layer.weight], batch) for t in targets):
                layer.rank = batch
            if self.shared:
                self.shared_rows |= layer.weights(targets[:1], self._stack)
        return True

    def load(self, problems: Sequence[Problem]) -> Rows:
        """Targets, and weights unless they are shared."""
        rows: Rows = {}
        targets = [problem.targets[0] for problem in problems]
        for layer in self.layers:
            rows |= layer.load(targets, self._stack)
            if not self.shared:
                rows |= layer.weights(targets, self._stack)
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
