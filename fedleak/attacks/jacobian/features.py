"""The features of images, inputs of a network's last layer, as an update of their own: derivatives for a solver."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from fedleak.attacks.chain.base import Dense, Rows
from fedleak.attacks.functional import functional_copy
from fedleak.attacks.jacobian.base import Jacobian
from fedleak.attacks.problem import Target

_CHUNK = 64
"""Directions that are swept at once."""


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

    def jacobian(self, basis: Tensor) -> Jacobian:
        """Derivatives by coordinates in `basis` ``[K, C, H, W]``."""

        def column(direction: Tensor) -> Tensor:
            moved: Tensor = jvp(self.features, (self.images,), (direction.expand_as(self.images),))[1]
            return moved

        columns = vmap(column, chunk_size=_CHUNK)(basis.to(self.dtype))  # [K, P, d]
        return Jacobian({"features": Dense(columns.transpose(0, 1)[:, None].contiguous())})

    def jacobians(self, basis: Tensor) -> Iterator[Jacobian]:
        """The same, in one piece."""
        yield self.jacobian(basis)
