"""The features of images, inputs of a network's last layer, as an update of their own: derivatives for a solver."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from fedleak.attacks.chain import read_layers
from fedleak.attacks.chain.base import Dense, Layer, Rows
from fedleak.attacks.functional import functional_copy
from fedleak.attacks.jacobian.base import Jacobian
from fedleak.attacks.problem import Target

_CHUNK = 64
"""Directions that are swept at once: so few stay near the processor."""


class FeatureModel:
    """P images of one network, a problem each (B = 1), whose "update" is their features; see `UpdateModel`.

    Args:
        model: the architecture, without anything that mixes the samples of a batch.
        target: where the client started.
        layer: name of the last layer.
        logits: whether features, all within (0, 1), are taken as their logits: a sigmoid is undone.
        device, dtype: where and in which precision.
    """

    batch = 1

    def __init__(
        self,
        model: nn.Module,
        target: Target,
        layer: str,
        *,
        logits: bool,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.model = functional_copy(model, False).to(device, dtype)
        self.dtype, self.logits = dtype, logits
        tensors = {**target.parameters, **target.buffers}
        self.held = {n: (v.to(dtype) if v.is_floating_point() else v).detach().to(device) for n, v in tensors.items()}
        self.seen: list[Tensor] = []
        last = dict(self.model.named_modules())[layer]
        last.register_forward_pre_hook(lambda _, given: self.seen.append(given[0]))
        self.layer, self.target, self.device = layer, target, device
        self.chain: list[Layer] | None = None
        self.rows: Rows = {}
        self.read = False

    def at(self, images: Tensor, labels: Tensor) -> None:
        """Stand at images ``[P, 1, C, H, W]``; labels do not matter."""
        self.images = images[:, 0].to(self.dtype)

    def features(self, images: Tensor) -> Tensor:
        """``[P, d]`` of images ``[P, C, H, W]``."""
        self.seen.clear()
        functional_call(self.model, self.held, (images,))
        found = self.seen.pop()
        return torch.logit(found) if self.logits else found

    def gradients(self) -> Rows:
        """``"features"`` -> ``[P, d]``."""
        return {"features": self.features(self.images)}

    def push(self, directions: Tensor) -> Rows:
        """Derivatives of the features along directions ``[P, 1, C, H, W]``."""
        return {"features": jvp(self.features, (self.images,), (directions[:, 0].to(self.dtype),))[1]}

    def pull(self, values: Rows) -> Tensor:
        """The adjoint of `push`: ``[P, 1, C, H, W]``."""
        pulled: Tensor = vjp(self.features, self.images)[1](values["features"].to(self.dtype))[0]
        return pulled[:, None]

    def _read(self) -> None:
        """The layers before the last one, where the network is a chain."""
        self.read = True
        layers = read_layers(copy.deepcopy(self.model).cpu().float(), (*self.images.shape[1:],))
        names = [getattr(layer, "name", None) for layer in layers or []]
        if layers is None or self.layer not in names:
            return
        self.chain = layers[: names.index(self.layer)]
        for layer in self.chain:
            self.rows |= layer.weights([self.target], lambda t: torch.stack(t).detach().to(self.device, self.dtype))

    @torch.no_grad()
    def _swept(self, image: Tensor, basis: Tensor, chain: list[Layer]) -> Tensor:
        """Derivatives ``[K, d]`` of one image's features, layer by layer."""
        a = image[None, None]
        for layer in chain:
            a = layer.forward(self.rows, a)
        found = []
        for t in basis[None].split(_CHUNK, 1):
            for layer in chain:
                t = layer.tangent(self.rows, t)
            found.append(t[0])
        moved, features = torch.cat(found), a[0]
        if not self.logits:
            return moved
        slope = features * (1 - features)
        return torch.where(slope > 0, moved / slope, 0.0)

    def jacobian(self, basis: Tensor) -> Jacobian:
        """Derivatives by coordinates in `basis` ``[K, C, H, W]``."""
        if not self.read:
            self._read()
        if self.chain is not None:
            each = [self._swept(image, basis.to(self.dtype), self.chain) for image in self.images]
            return Jacobian({"features": Dense(torch.stack(each)[:, None])})

        def column(direction: Tensor) -> Tensor:
            moved: Tensor = jvp(self.features, (self.images,), (direction.expand_as(self.images),))[1]
            return moved

        columns = vmap(column, chunk_size=_CHUNK)(basis.to(self.dtype))  # [K, P, d]
        return Jacobian({"features": Dense(columns.transpose(0, 1)[:, None].contiguous())})

    def jacobians(self, basis: Tensor) -> Iterator[Jacobian]:
        """The same, in one piece."""
        yield self.jacobian(basis)
