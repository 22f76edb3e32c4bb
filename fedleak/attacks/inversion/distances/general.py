"""The distance between updates of any `nn.Module`, by vectorised automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedleak.attacks.functional import mean_gradient
from fedleak.attacks.inversion.distances.base import Comparison, Distance, Rows
from fedleak.attacks.inversion.objectives import Elementwise
from fedleak.attacks.problem import Problem


class GeneralDistance(Distance):
    """Any model, objective and local training, any number of targets, whose objectives add up.

    Rows are named ``target:kind:name``, the target by its number.
    """

    def __init__(self, comparison: Comparison, problems: Sequence[Problem]) -> None:
        super().__init__(comparison, problems)
        self.common: Rows = {}
        if self.shared:
            for number, target in enumerate(problems[0].targets):
                self.common |= _named(f"{number}:parameters", self._move(target.parameters))
                self.common |= _named(f"{number}:buffers", self._move(self._used(target.buffers)))
        self.imitations: list[Callable[[Rows], Rows] | None] = []

    def load(self, problems: Sequence[Problem]) -> Rows:
        """Updates and the places of their imitations, and parameters and buffers unless they are shared."""
        rows: Rows = {}
        for number, targets in enumerate(zip(*(problem.targets for problem in problems), strict=True)):
            stacks = {"update": [t.update for t in targets]}
            if not self.shared:
                stacks |= {"parameters": [t.parameters for t in targets]}
                stacks |= {"buffers": [self._used(t.buffers) for t in targets]}
            for kind, each in stacks.items():
                stacked = {name: self._stack([tensors[name] for tensors in each]) for name in each[0]}
                rows |= _named(f"{number}:{kind}", stacked)
            if any(t.imitate is not None for t in targets):
                first = len(self.imitations)
                self.imitations += [t.imitate for t in targets]
                places = torch.arange(first, len(self.imitations), device=self.device)
                rows[f"{number}:imitation"] = places
        return rows

    def evaluate(
        self, rows: Rows, images: Tensor, labels: Tensor, *, with_labels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value and gradients by automatic differentiation."""
        images = images.detach().requires_grad_()
        labels = labels.detach().requires_grad_(with_labels)
        rows = rows | self.common
        with torch.enable_grad():
            values = [self._value(rows, number, images, labels) for number in range(len(self.trainings))]
            value = values[0] if len(values) == 1 else torch.stack(values).sum(0)
            derivatives = torch.autograd.grad(value.sum(), [images, labels] if with_labels else [images])
        return value.detach(), derivatives[0], derivatives[1] if with_labels else None

    def _value(self, rows: Rows, number: int, images: Tensor, labels: Tensor) -> Tensor:
        """The objective ``[P]`` of one target of every problem."""
        own = None if self.shared else 0
        parameters, buffers = _kind(rows, f"{number}:parameters"), _kind(rows, f"{number}:buffers")
        training = self.trainings[number] if self.comparison.unrolled else None

        def of_one(parameters: Rows, buffers: Rows, images: Tensor, labels: Tensor) -> Rows:
            return mean_gradient(self.model, parameters, buffers, images, labels, training)

        update = torch.vmap(of_one, (own, own, 0, 0), randomness="different")(parameters, buffers, images, labels)
        if f"{number}:imitation" in rows:
            update = self._imitated(update, rows[f"{number}:imitation"].tolist())
        targets = _kind(rows, f"{number}:update")
        gaps = {name: update[name] - target for name, target in targets.items()}
        if isinstance(self.objective, Elementwise):
            return self.objective.elementwise(gaps, targets)
        pairs = [(gap.flatten(1), targets[name].flatten(1)) for name, gap in gaps.items()]
        return self.objective(
            torch.stack([gap.square().sum(1) for gap, _ in pairs], 1),
            torch.stack([(gap * target).sum(1) for gap, target in pairs], 1),
            torch.stack([target.square().sum(1) for _, target in pairs], 1),
        )

    def _imitated(self, update: Rows, places: Sequence[int]) -> Rows:
        """What the defense of each problem's client makes of its update: a function of its own for each."""
        each = []
        for row, place in enumerate(places):
            imitate, one = self.imitations[place], {name: value[row] for name, value in update.items()}
            each.append(one if imitate is None else imitate(one))
        return {name: torch.stack([one[name] for one in each]) for name in update}


def _named(kind: str, tensors: Rows) -> Rows:
    return {f"{kind}:{name}": value for name, value in tensors.items()}


def _kind(rows: Rows, kind: str) -> Rows:
    """The tensors of a kind, by name."""
    return {key.removeprefix(f"{kind}:"): value for key, value in rows.items() if key.startswith(f"{kind}:")}
