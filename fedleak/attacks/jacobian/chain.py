"""Derivatives through a chain of layers: every sample's own tangents, swept through its layers as batched products."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedleak.attacks.chain.base import Dense, Factored, Layer, Observed, Rows
from fedleak.attacks.jacobian.base import Jacobian, dense

_BYTES = 2**23
"""Of a layer's tangents that are swept at once: so few stay near the processor, which makes them three times faster."""


class ChainModel:
    """P problems of one network in one precision; the update is the mean gradient of one batch of B samples.

    `at` says where; `gradients`, `push`, `pull` and `jacobian` then hold there. Samples are swept one by one, each with
    its own problem's weights: an update is a mean over samples, so that nothing crosses from one to another.

    Args:
        layers: from `read_layers`; they are copied, since they keep state.
        problems: where each client started.
        device, dtype: where and in which precision.
    """

    def __init__(
        self, layers: Sequence[Layer], problems: Sequence[Observed], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.layers = [copy.copy(layer) for layer in layers]
        self.dtype = dtype
        self.problems = len(problems)

        def stack(tensors: list[Tensor]) -> Tensor:
            first = tensors[0]
            same = all(tensor is first or torch.equal(tensor, first) for tensor in tensors[1:])
            return torch.stack(tensors[:1] if same else tensors).detach().to(device, dtype)

        self.rows: Rows = {}
        for layer in self.layers:
            self.rows |= layer.weights(problems, stack)

    @torch.no_grad()
    def at(self, images: Tensor, labels: Tensor) -> None:
        """Stand at images ``[P, B, C, H, W]`` with label distributions ``[P, B, classes]``."""
        self.batch = images.shape[1]
        self.images, self.labels = (v.to(self.dtype).flatten(0, 1)[:, None] for v in (images, labels))
        self.own = self._some(slice(None))
        self.probabilities = self._sweep(self.own, self.images, self.labels)

    def _some(self, sites: Tensor | slice) -> Rows:
        """The weights of some samples, in the order of problems and their batches."""
        return {n: v if len(v) == 1 else v.repeat_interleave(self.batch, 0)[sites] for n, v in self.rows.items()}

    @torch.no_grad()
    def gradients(self) -> Rows:
        """The updates, name -> ``[P, n]``."""
        found: Rows = {}
        for layer in self.layers:
            for name, value in layer.gradients().items():
                found[name] = value.flatten(1).unflatten(0, (-1, self.batch)).sum(1)
        return found

    @torch.no_grad()
    def push(self, directions: Tensor) -> Rows:
        """Derivatives of the updates, name -> ``[P, n]``, along directions ``[P, B, C, H, W]`` of the images."""
        self._tangents(self.own, directions.to(self.dtype).flatten(0, 1)[:, None], self.probabilities)
        found: Rows = {}
        for layer in self.layers:
            for name, block in layer.columns().items():
                values = dense(block)[:, 0] if isinstance(block, Factored) else block.values[:, 0]
                found[name] = values.unflatten(0, (-1, self.batch)).sum(1)
        return found

    @torch.no_grad()
    def pull(self, values: Rows) -> Tensor:
        """The adjoint of `push`: ``[P, B, C, H, W]`` of name -> ``[P, n]``."""
        each = {n: v.to(self.dtype).repeat_interleave(self.batch, 0) for n, v in values.items()}
        by_delta: Tensor | None = None
        for layer in self.layers:
            layer.assign(each)
            by_delta = layer.forward_again(self.own, by_delta)
        assert by_delta is not None
        by_delta = by_delta / self.batch
        p = self.probabilities
        a = p * (by_delta - (p * by_delta).sum(2, keepdim=True))
        for layer in reversed(self.layers):
            a = layer.backward_again(self.own, a)
        pulled: Tensor = a[:, 0].unflatten(0, (-1, self.batch))
        return pulled

    def jacobian(self, basis: Tensor) -> Jacobian:
        """Derivatives by coordinates in `basis` ``[K, C, H, W]``, the same for every sample; then call `at` anew."""
        return Jacobian.join(list(self.jacobians(basis)))

    @torch.no_grad()
    def jacobians(self, basis: Tensor) -> Iterator[Jacobian]:
        """The same, one sample of every problem at a time, so that memory is bounded."""
        few = max(16, _BYTES // (self.dtype.itemsize * self._widest()))
        directions = basis[None].to(self.dtype).split(few, 1)
        for sites in torch.arange(len(self.images)).view(self.problems, self.batch).split(1, 1):
            found: dict[str, list[Dense | Factored]] = {}
            for site in sites.flatten().split(1):
                own = self._some(site)
                probabilities = self._sweep(own, self.images[site], self.labels[site])
                parts: dict[str, list[Dense | Factored]] = {}
                for some in directions:
                    self._tangents(own, some, probabilities)
                    for layer in self.layers:
                        for name, block in layer.columns().items():
                            parts.setdefault(name, []).append(block)
                for name, blocks in parts.items():
                    found.setdefault(name, []).append(_side_by_side(blocks))
            yield Jacobian({name: _stacked(blocks) for name, blocks in found.items()})

    def _sweep(self, rows: Rows, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and back, the state left in the layers; the probabilities ``[S, 1, classes]``."""
        a = images
        for layer in self.layers:
            a = layer.forward(rows, a)
        probabilities = a.softmax(2)
        delta: Tensor | None = (probabilities - labels) / self.batch
        for layer in reversed(self.layers):
            if delta is not None:
                delta = layer.backward(rows, delta)
        return probabilities

    def _tangents(self, rows: Rows, t: Tensor, probabilities: Tensor) -> None:
        """Forward and back along directions ``[S or 1, K, C, H, W]``, the state left in the layers."""
        for layer in self.layers:
            t = layer.tangent(rows, t)
        back: Tensor | None = probabilities * (t - (t * probabilities).sum(2, keepdim=True)) / self.batch
        for layer in reversed(self.layers):
            if back is not None:
                back = layer.tangent_back(rows, back)

    def _widest(self) -> int:
        """Numbers of one tangent at its widest: patches of a convolution's input, most often."""
        a, most = self.images[:1], 1
        for layer in self.layers:
            a = layer.forward({n: v[:1] for n, v in self.rows.items()}, a)
            most = max(most, a.numel(), getattr(layer, "patches", a).numel())
        return most


def _side_by_side(blocks: list[Dense | Factored]) -> Dense | Factored:
    """Blocks of some directions each, as one of all."""
    first = blocks[0]
    if isinstance(first, Dense):
        return Dense(torch.cat([block.values for block in blocks if isinstance(block, Dense)], 1))
    dots = [(block.delta_dot, block.inputs_dot) for block in blocks if isinstance(block, Factored)]
    return Factored(first.delta, first.inputs, *(torch.cat(parts, 1) for parts in zip(*dots, strict=True)))


def _stacked(blocks: list[Dense | Factored]) -> Dense | Factored:
    """Blocks of a sample of each problem, ``[P, 1, …]``."""
    values = zip(*(vars(block).values() for block in blocks), strict=True)
    return type(blocks[0])(*(torch.cat(parts)[:, None] for parts in values))
