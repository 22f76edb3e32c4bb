"""Several updates of the same images as one problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from fedleak.attacks.base import Knowledge, LabelGuess, Run
from fedleak.attacks.inversion.cases import unusable
from fedleak.attacks.inversion.gradient_matching import GradientMatching
from fedleak.attacks.problem import Problem, pose
from fedleak.attacks.results import Reconstruction
from fedleak.capture import Observation


class Joint(GradientMatching):
    """Gradient matching for clients whose batch is the same in every round: all their updates explained at once.

    Each round's model asks the images something else, so that several rounds determine what one leaves open. The
    objectives of all updates add up. Labels are those that most rounds agree on, the earliest where they differ: the
    less a model has learnt, the more its updates tell of them. Each of a client's updates gets the same
    reconstruction; what it took is booked on the first.

    With one update of a client it is `GradientMatching`, to the bit.

    References:
        Geng et al. Towards general deep leakage in federated learning. 2021.
    """

    fixed_batches: ClassVar[bool] = True

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        run: Run,
    ) -> list[Reconstruction]:
        """Rebuild the private images behind each client's observations; see `Inversion.invert`."""
        groups: dict[tuple[object, ...], list[Problem]] = {}
        for problem in sorted(pose(observations, guesses, knowledge), key=lambda p: p.key):
            observation = observations[problem.index]
            groups.setdefault((observation.client, observation.clients, problem.key[2], problem.samples), []).append(
                problem
            )
        found = {i: unusable(o, knowledge.image_shape) for i, o in enumerate(observations) if o.error is not None}
        results = self.solve([merged(group) for group in groups.values()], knowledge, replace(run, on_result=None))
        for group in groups.values():
            first = results[group[0].index]
            if len(group) > 1:
                first.details["updates"] = len(group)
            for problem in group:
                index = problem.index
                again = replace(first, round=problem.key[0], evaluations=0, seconds=0.0)
                found[index] = first if index == group[0].index else again
        if run.on_result is not None:
            for index in range(len(observations)):
                run.on_result(index, found[index])
        return [found[index] for index in range(len(observations))]


def merged(problems: Sequence[Problem]) -> Problem:
    """Problems of the same images, in the order of their rounds, as one."""
    first = problems[0]
    if len(problems) == 1 or first.labels is None:
        labels, features = first.labels, first.features
    else:
        best = [tuple(p.labels[0].tolist()) for p in problems if p.labels is not None]
        most = max(Counter(best).items(), key=lambda item: (item[1], -best.index(item[0])))[0]
        others = [row for p in problems if p.labels is not None for row in p.labels if tuple(row.tolist()) != most]
        labels, features = torch.stack([torch.tensor(most).to(first.labels), *others]), None
    targets = tuple(target for problem in problems for target in problem.targets)
    return replace(first, targets=targets, labels=labels, features=features)
