"""The distance between dummy and observed updates, and its gradient with respect to the dummies, P problems at once.

`load` turns observations into rows of tensors, one row per problem, which the caller may index, drop and replace;
`evaluate` gives value and gradient of those rows' problems. `VmapDistance` works for any model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedleak.attacks.functional import functional_copy
from fedleak.attacks.inversion.objectives import Objective

Rows = dict[str, Tensor]
"""Tensors with the problems as their first dimension."""


@dataclass(frozen=True)
class Victim:
    """One observed update, ready to be matched.

    Attributes:
        parameters: name -> tensor, where the client started from.
        buffers: name -> tensor, the model's buffers there.
        update: name -> tensor, the mean gradient that the client sent, in the order of the model's parameters.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    update: Mapping[str, Tensor]


class Distance(ABC):
    """Distance between the gradients of dummy images and the observed ones.

    Args:
        model: takes images ``[B, C, H, W]`` in [0, 1], returns logits ``[B, classes]``; its own weights are not used.
        objective: the distance, of inner products.
        shared: the victim whose parameters and buffers hold for every problem; None if each problem has its own.
        training_mode: whether clients ran the model in train mode.
        device, dtype: where and in which precision to compute.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        shared: Victim | None = None,
        training_mode: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.objective = objective
        self.device = torch.device(device)
        self.dtype = dtype
        self.model = functional_copy(model, training_mode).to(self.device, dtype)
        self._buffers = {name for name, _ in self.model.named_buffers()}
        self.shared_parameters = None if shared is None else self._move(shared.parameters)
        self.shared_buffers = None if shared is None else self._move(self._used(shared.buffers))

    @abstractmethod
    def load(self, victims: Sequence[Victim]) -> Rows:
        """What `evaluate` needs of these victims, one row each."""

    @abstractmethod
    def evaluate(
        self, rows: Rows, images: Tensor, labels: Tensor, *, with_labels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value and gradient of every problem's objective.

        Args:
            rows: from `load`.
            images: ``[P, B, C, H, W]`` dummy images.
            labels: ``[P, B, classes]`` label distributions, each summing to one.
            with_labels: also differentiate with respect to `labels`.

        Returns:
            The objective ``[P]``, its gradient with respect to the images, and with respect to the labels or None.
        """

    def bytes_per_problem(self, images_shape: Sequence[int]) -> int:
        """A rough upper estimate of the working memory of one problem with images ``[B, C, H, W]``."""
        element = torch.empty((), dtype=self.dtype).element_size()
        parameters = sum(p.numel() for p in self.model.parameters())
        pixels = 1
        for size in images_shape:
            pixels *= size
        copies = 6 if self.shared_parameters is not None else 8
        return element * (copies * parameters + 40 * (_activations(self.model, images_shape) + pixels))

    def _used(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in buffers.items() if name in self._buffers}

    def _move(self, tensors: Mapping[str, Tensor]) -> Rows:
        return {name: self._tensor(value) for name, value in tensors.items()}

    def _tensor(self, value: Tensor) -> Tensor:
        value = value.detach().to(self.device)
        return value.to(self.dtype) if value.is_floating_point() else value

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        return self._tensor(torch.stack([tensor.detach() for tensor in tensors]))


class VmapDistance(Distance):
    """Any `nn.Module`, by vectorised automatic differentiation.

    Override `update` to match what a client sends after something else than one step on one batch, such as several
    local steps: it must be differentiable in images and labels and run under `torch.vmap`.
    """

    def update(self, parameters: Rows, buffers: Rows, images: Tensor, labels: Tensor) -> Rows:
        """The update of one client: the gradient of the mean cross-entropy of one batch.

        Args:
            parameters, buffers: the model's, name -> tensor.
            images: ``[B, C, H, W]``.
            labels: ``[B, classes]`` label distributions.

        Returns:
            name -> tensor, like `parameters`.
        """

        def loss(parameters: Rows) -> Tensor:
            logits = torch.func.functional_call(self.model, {**parameters, **buffers}, (images,))
            return -(labels * torch.log_softmax(logits, 1)).sum(1).mean()

        return torch.func.grad(loss)(parameters)

    def load(self, victims: Sequence[Victim]) -> Rows:
        """Targets, and parameters and buffers unless they are shared; keys are ``kind:name``."""
        rows = {f"target:{name}": self._stack([v.update[name] for v in victims]) for name in victims[0].update}
        rows["tt"] = torch.stack([rows[f"target:{name}"].square().flatten(1).sum(1) for name in victims[0].update], 1)
        if self.shared_parameters is None:
            for name in victims[0].parameters:
                rows[f"parameters:{name}"] = self._stack([v.parameters[name] for v in victims])
            for name in self._used(victims[0].buffers):
                rows[f"buffers:{name}"] = self._stack([v.buffers[name] for v in victims])
        return rows

    def evaluate(
        self, rows: Rows, images: Tensor, labels: Tensor, *, with_labels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value and gradients by differentiating the vectorised `update`."""
        images = images.detach().requires_grad_()
        labels = labels.detach().requires_grad_(with_labels)
        own = 0 if self.shared_parameters is None else None
        parameters = _kind(rows, "parameters") if self.shared_parameters is None else self.shared_parameters
        buffers = _kind(rows, "buffers") if self.shared_buffers is None else self.shared_buffers
        with torch.enable_grad():
            update = torch.vmap(self.update, in_dims=(own, own, 0, 0), randomness="different")
            gradients = update(parameters, buffers, images, labels)
            dd, dt = [], []
            for name, target in _kind(rows, "target").items():
                gap = (gradients[name] - target).flatten(1)
                dd.append(gap.square().sum(1))
                dt.append((gap * target.flatten(1)).sum(1))
            value = self.objective(torch.stack(dd, 1), torch.stack(dt, 1), rows["tt"])
            wanted = [images, labels] if with_labels else [images]
            derivatives = torch.autograd.grad(value.sum(), wanted)
        return value.detach(), derivatives[0], derivatives[1] if with_labels else None


def _kind(rows: Rows, kind: str) -> Rows:
    """The tensors of a kind, by name."""
    return {key.removeprefix(f"{kind}:"): value for key, value in rows.items() if key.startswith(f"{kind}:")}


def _activations(model: nn.Module, images_shape: Sequence[int]) -> int:
    """Numbers in the outputs of all leaf modules for one batch."""
    total = 0

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel()

    leaves = [module for module in model.modules() if not any(module.children())]
    handles = [module.register_forward_hook(count) for module in leaves]
    try:
        with torch.no_grad():
            parameter = next(model.parameters())
            was_training = model.training
            model.eval()(torch.zeros(tuple(images_shape), dtype=parameter.dtype, device=parameter.device))
            model.train(was_training)
    finally:
        for handle in handles:
            handle.remove()
    return total
