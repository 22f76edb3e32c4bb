"""The distance between dummy and observed updates, and its gradient with respect to the dummies, P problems at once.

`load` turns problems into rows of tensors, one row per problem, which the caller may index, drop and replace;
`evaluate` gives value and gradient of those rows' problems.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedleak.attacks.functional import functional_copy
from fedleak.attacks.inversion.objectives import Objective
from fedleak.attacks.problem import Problem
from fedleak.observation import same_tensors

Rows = dict[str, Tensor]
"""Tensors with the problems as their first dimension."""


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how.

    Attributes:
        model: takes images ``[B, C, H, W]`` in [0, 1], returns logits ``[B, classes]``; its own weights are not used.
        objective: the distance.
        image_shape: (C, H, W).
        unrolled: compare what all of a client's local steps give, with the samples in the order of its batches, and
            not the gradient of one step on all of them.
        device, dtype: where and in which precision to compute.
    """

    model: nn.Module
    objective: Objective
    image_shape: tuple[int, int, int]
    unrolled: bool = False
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32


class Distance(ABC):
    """Distance between the updates of dummy images and the observed ones.

    Make one with `fit`. Subclass it in a file of your own where you know a faster way for your models.

    Args:
        comparison: what is compared, and how.
        problems: all that will be loaded: as many samples and targets each, trained alike.
    """

    @classmethod
    def fit(cls, comparison: Comparison, problems: Sequence[Problem]) -> Distance | None:
        """A distance for these problems, or None where this kind cannot compare them."""
        return cls(comparison, problems)

    def __init__(self, comparison: Comparison, problems: Sequence[Problem]) -> None:
        self.comparison = comparison
        self.objective = comparison.objective
        self.device = torch.device(comparison.device)
        self.dtype = comparison.dtype
        self.trainings = [target.training for target in problems[0].targets]
        self.model = functional_copy(comparison.model, self.trainings[0].training_mode).to(self.device, self.dtype)
        self._buffers = {name for name, _ in self.model.named_buffers()}
        self.shared = _same_weights(problems)

    @abstractmethod
    def load(self, problems: Sequence[Problem]) -> Rows:
        """What `evaluate` needs of these problems, one row each."""

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
        copies = 6 if self.shared else 8
        once = copies * parameters + 40 * (_activations(self.model, images_shape) + math.prod(images_shape))
        steps = [(training.steps or 1) if self.comparison.unrolled else 1 for training in self.trainings]
        return element * once * sum(steps)

    def _used(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in buffers.items() if name in self._buffers}

    def _move(self, tensors: Mapping[str, Tensor]) -> Rows:
        return {name: self._tensor(value) for name, value in tensors.items()}

    def _tensor(self, value: Tensor) -> Tensor:
        value = value.detach().to(self.device)
        return value.to(self.dtype) if value.is_floating_point() else value

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        return self._tensor(torch.stack([tensor.detach() for tensor in tensors]))


def _same_weights(problems: Sequence[Problem]) -> bool:
    """Whether all problems start from the same parameters and buffers."""
    return all(
        same_tensors(first.parameters, target.parameters) and same_tensors(first.buffers, target.buffers)
        for problem in problems[1:]
        for first, target in zip(problems[0].targets, problem.targets, strict=True)
    )


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
