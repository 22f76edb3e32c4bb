"""Derivatives through any model and any local training, by automatic differentiation of the client's own loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from fedleak.attacks.chain.base import Dense, Rows
from fedleak.attacks.functional import functional_copy, mean_gradient
from fedleak.attacks.jacobian.base import Jacobian
from fedleak.attacks.problem import Target

_NUMBERS = 2**26
"""Numbers in the tangents that are swept at once."""


class GeneralModel:
    """P problems of any network, one after the other: the reference, and what `ChainModel` cannot hold.

    The update is the mean gradient over a client's local steps, in the order of its batches; see `UpdateModel`.

    Args:
        model: the architecture.
        targets: one a problem: where its client started, and how it trained.
        device, dtype: where and in which precision.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        training = targets[0].training
        self.model = functional_copy(model, training.training_mode).to(device, dtype)
        held = {name for name, _ in self.model.named_buffers()}

        def move(tensors: object) -> Rows:
            assert isinstance(tensors, dict)
            return {n: (v.to(dtype) if v.is_floating_point() else v).to(device) for n, v in tensors.items()}

        self.starts = [move({n: v.detach() for n, v in target.parameters.items()}) for target in targets]
        self.buffers = [move({n: v for n, v in target.buffers.items() if n in held}) for target in targets]
        self.trainings = [target.training for target in targets]

    def at(self, images: Tensor, labels: Tensor) -> None:
        """Stand at images ``[P, B, C, H, W]`` with label distributions ``[P, B, classes]``."""
        self.batch = images.shape[1]
        self.images, self.labels = images.to(self.dtype), labels.to(self.dtype)

    def update(self, place: int, images: Tensor) -> Rows:
        """The mean gradient of problem `place` from images ``[B, C, H, W]``: name -> ``[n]``."""
        start, buffers, labels = self.starts[place], self.buffers[place], self.labels[place]
        found = mean_gradient(self.model, start, buffers, images, labels, self.trainings[place])
        return {n: v.flatten() for n, v in found.items()}

    @torch.no_grad()
    def gradients(self) -> Rows:
        """The updates, name -> ``[P, n]``."""
        return _stack([self.update(place, images) for place, images in enumerate(self.images)])

    @torch.no_grad()
    def push(self, directions: Tensor) -> Rows:
        """Derivatives of the updates, name -> ``[P, n]``, along directions ``[P, B, C, H, W]`` of the images."""
        found = []
        for place, (images, direction) in enumerate(zip(self.images, directions.to(self.dtype), strict=True)):
            found.append(jvp(lambda x, place=place: self.update(place, x), (images,), (direction,))[1])
        return _stack(found)

    @torch.no_grad()
    def pull(self, values: Rows) -> Tensor:
        """The adjoint of `push`: ``[P, B, C, H, W]`` of name -> ``[P, n]``."""
        found = []
        for place, images in enumerate(self.images):
            back = vjp(lambda x, place=place: self.update(place, x), images)[1]
            found.append(back({n: v[place].to(self.dtype) for n, v in values.items()})[0])
        return torch.stack(found)

    def jacobian(self, basis: Tensor) -> Jacobian:
        """Derivatives by coordinates in `basis` ``[K, C, H, W]``, the same for every sample; then call `at` anew."""
        return Jacobian.join(list(self.jacobians(basis)))

    @torch.no_grad()
    def jacobians(self, basis: Tensor) -> Iterator[Jacobian]:
        """The same, one sample of every problem at a time, so that memory is bounded."""
        basis = basis.to(self.dtype)
        numbers = sum(v.numel() for v in self.starts[0].values())
        chunk = max(1, _NUMBERS // numbers)
        for sample in range(self.batch):
            found = []
            for place, images in enumerate(self.images):

                def column(direction: Tensor, place: int = place, images: Tensor = images, i: int = sample) -> Rows:
                    whole = torch.nn.functional.one_hot(torch.tensor(i), len(images)).to(images)
                    t = whole.view(-1, 1, 1, 1) * direction
                    moved: Rows = jvp(lambda x: self.update(place, x), (images,), (t,))[1]
                    return moved

                found.append(vmap(column, chunk_size=chunk, randomness="same")(basis))
            yield Jacobian({n: Dense(v[:, None]) for n, v in _stack(found).items()})


def _stack(rows: Sequence[Rows]) -> Rows:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
