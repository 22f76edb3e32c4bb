"""Gradient matching for clients that take several local steps: through their loop, or at points on their path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedleak.attacks.base import Knowledge, LabelGuess, Run
from fedleak.attacks.inversion.cases import unusable
from fedleak.attacks.inversion.gradient_matching import GradientMatching
from fedleak.attacks.problem import Problem, Target, pose
from fedleak.attacks.results import Reconstruction
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.seeding import mixed_generator
from fedleak.training import Tensors


class Unrolled(GradientMatching):
    """Images whose *local training* gives the observed update: differentiated through the client's own loop.

    Epochs are tied: the same images in each. Which labels were together in a step is not known even where the labels
    are; several arrangements are tried, beginning with the one that spreads each class evenly, and the one that
    explains the update best is kept.

    Args:
        orders: arrangements of the labels to try.
        **settings: of `GradientMatching`.

    References:
        Dimitrov et al. Data leakage in federated averaging. TMLR 2022.
    """

    needs = frozenset({"hyperparameters"})

    def __init__(self, *, orders: int = 1, **settings: Any) -> None:
        if orders < 1:
            raise UsageError(f"inversion.orders={orders}: must be at least 1")
        super().__init__(unroll=True, **settings)
        self.orders = orders

    def solve(self, problems: Sequence[Problem], knowledge: Knowledge, run: Run) -> dict[int, Reconstruction]:
        """See `GradientMatching.solve`."""
        whole = self.candidates
        try:
            self.candidates = whole * self.orders
            return super().solve([arranged(p, whole, self.orders, run.seed) for p in problems], knowledge, run)
        finally:
            self.candidates = whole


def arranged(problem: Problem, candidates: int, orders: int, seed: int) -> Problem:
    """The problem with labels in so many arrangements over the client's steps, those of the likeliest multiset first.

    Args:
        problem: its labels are multisets.
        candidates: multisets to take.
        orders: arrangements of each.
        seed: decides all but the first of them.
    """
    steps = problem.targets[0].training.local_steps or 1
    if problem.labels is None or steps == 1:
        return problem
    random = mixed_generator(seed, *problem.key, 1 << 20)
    found = []
    for labels in problem.labels[:candidates].cpu():
        found.append(labels.sort().values.view(-1, steps).T.flatten())  # every step gets every steps-th of them
        found += [labels[torch.randperm(len(labels), generator=random)] for _ in range(orders - 1)]
    return replace(problem, labels=torch.stack(found))


class Surrogate(GradientMatching):
    """Matches the mean gradient at a point between the weights before and after, as if all samples had been one batch.

    The point is learnt: after each search it moves to where the images found explain the update best, and the search
    goes on from them. As quick as matching one batch at the start, and much nearer where clients take long ways.

    Args:
        rounds: searches, each from the images of the one before.
        point: the first one's place on the way, 0 the weights sent out, 1 those that came back.
        **settings: of `GradientMatching`; its budget is that of all rounds together.

    References:
        Zhu et al. Surrogate model extension (SME): a fast and accurate weight update attack on federated learning.
        ICML 2023.
    """

    def __init__(self, *, rounds: int = 3, point: float = 0.5, **settings: Any) -> None:
        if rounds < 1:
            raise UsageError(f"inversion.rounds={rounds}: must be at least 1")
        if not 0 <= point <= 1:
            raise UsageError(f"inversion.point={point}: must be from 0 to 1")
        super().__init__(**{**settings, "max_evaluations": max(1, settings.get("max_evaluations", 600) // rounds)})
        self.rounds = rounds
        self.point = point

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        run: Run,
    ) -> list[Reconstruction]:
        """Rebuild the private images behind each observation; see `Inversion.invert`."""
        problems = pose(observations, guesses, knowledge)
        posed = {problem.index for problem in problems}
        found = {i: unusable(o, knowledge.image_shape) for i, o in enumerate(observations) if i not in posed}
        points = [0.0 if p.targets[0].training.single else self.point for p in problems]
        quiet = replace(run, on_result=None)
        spent: dict[int, int] = dict.fromkeys(posed, 0)
        for number in range(self.rounds):
            moved = [_moved(p, observations[p.index], a) for p, a in zip(problems, points, strict=True)]
            results = self.solve(moved, knowledge, quiet)
            for index, result in results.items():
                spent[index] += result.evaluations
            if number == self.rounds - 1 or not any(points):
                break
            problems = [replace(p, start=_own(p, results[p.index])) for p in problems]
            points = [
                self._best_point(p, observations[p.index], a, results[p.index], knowledge, run)
                for p, a in zip(problems, points, strict=True)
            ]
        for problem, a in zip(problems, points, strict=True):
            results[problem.index].evaluations = spent[problem.index]
            results[problem.index].details["point"] = round(a, 4)
        found |= results
        if run.on_result is not None:
            for index in range(len(observations)):
                run.on_result(index, found[index])
        return [found[index] for index in range(len(observations))]

    def _best_point(
        self,
        problem: Problem,
        observation: Observation,
        point: float,
        result: Reconstruction,
        knowledge: Knowledge,
        run: Run,
    ) -> float:
        """Where on the way the images found explain the update best."""
        if point == 0 or problem.labels is None:
            return point
        places = torch.linspace(0, 1, 21).tolist()
        moved = [_moved(problem, observation, a) for a in places]
        distance = self._distance(moved, knowledge, run.device)
        images = result.images.to(distance.device, distance.dtype).expand(len(places), *result.images.shape)
        labels = one_hot(result.labels, knowledge.classes).to(distance.device, distance.dtype)
        value, _, _ = distance.evaluate(distance.load(moved), images, labels.expand(len(places), *labels.shape))
        return float(places[int(value.nan_to_num(torch.inf).argmin())])


def _moved(problem: Problem, observation: Observation, point: float) -> Problem:
    """The problem as if its client had taken one step with all samples from a point on its way."""

    def at(target: Target) -> Target:
        training = replace(target.training, local_steps=1, epochs=1, batch_size=problem.samples)
        return replace(target, parameters=_between(observation, point), training=training)

    return problem if point == 0 else replace(problem, targets=tuple(map(at, problem.targets)))


def _between(observation: Observation, point: float) -> Tensors:
    """Weights between those sent out and those that came back, or that their gradients would have led to."""
    training, start = observation.training, observation.parameters
    if training.payload == "gradient":
        reach = -point * (training.lr or 0.0)
        return {name: value + reach * observation.update[name] for name, value in start.items()}
    return {name: value + point * (observation.update[name] - value) for name, value in start.items()}


def _own(problem: Problem, result: Reconstruction) -> Tensor:
    """A problem's images of a result that may hold other samples' too."""
    sample = problem.key[2]
    return result.images if len(result.images) == problem.samples else result.images[sample : sample + 1]
