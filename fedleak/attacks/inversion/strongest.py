"""Our best on defended updates: the most likely images, and gradient matching where these do not explain the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedleak.attacks.adaptive import signs_alone
from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Run
from fedleak.attacks.inversion.gradient_matching import GradientMatching
from fedleak.attacks.inversion.learned import Learned
from fedleak.attacks.inversion.map import MAP
from fedleak.attacks.inversion.map.attack import image_prior
from fedleak.attacks.inversion.screening import screened
from fedleak.attacks.inversion.severed import alone, cut_of, severed
from fedleak.attacks.jacobian.models import update_model
from fedleak.attacks.noise import noise_of
from fedleak.attacks.problem import Problem, pose
from fedleak.attacks.results import Reconstruction
from fedleak.capture import Observation

_UNKNOWNS = 3200
"""Pixels of a batch up to which the most likely images are sought first: their time grows with the square."""


class Strongest(Inversion):
    """One inversion, then another where the first did not converge; of two failures the one that fits better.

    Of several label multisets the one is taken that explains the update best, see `screening`. Single samples behind
    layers that draw at random are sought below these, see `severed`; updates that are all signs are read by a
    regressor, see `Learned`.

    How well images fit is the mean square of what separates their update, through the defense as far as it is known,
    from the observed one, over the noise.

    Args:
        first: for batches of known labels and few pixels.
        then: for the rest.
        signs: for single samples' updates that are all signs.
    """

    label_candidates: ClassVar[int] = 6

    def __init__(
        self, first: Inversion | None = None, then: Inversion | None = None, signs: Inversion | None = None
    ) -> None:
        self.first = first if first is not None else MAP(restarts=1, max_steps=25, seconds=15)
        self.then = then if then is not None else GradientMatching(smoothness=1.0)
        self.signs = signs if signs is not None else Learned(steps=0)

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        run: Run,
    ) -> list[Reconstruction]:
        """See `Inversion.invert`."""
        problems = _by_observation(pose(observations, guesses, knowledge))
        found: dict[int, Reconstruction] = {}

        def keep(index: int, result: Reconstruction) -> None:
            found[index] = result
            if run.on_result is not None:
                run.on_result(index, result)

        for index, ps in problems.items():
            if not alone(ps):
                continue
            cut = cut_of(knowledge.model, ps[0].targets[0].training.training_mode)
            if cut is not None:
                keep(index, severed(ps[0], guesses[index], cut, knowledge, run))
            elif ps[0].labels is not None and signs_alone(ps[0].targets[0].update):
                one = [observations[index]], [guesses[index]]
                keep(index, self.signs.invert(*one, knowledge, replace(run, on_result=None))[0])
        some = {index: ps for index, ps in problems.items() if index not in found}
        guesses = screened(some, guesses, knowledge, image_prior(knowledge).to(run.device), run)
        problems = _by_observation(pose(observations, guesses, knowledge))
        pixels = torch.Size(knowledge.image_shape).numel()
        small = [i for i, ps in problems.items() if i not in found and all(_small(p, pixels) for p in ps)]

        tried: dict[int, Reconstruction] = {}

        def of_first(position: int, result: Reconstruction) -> None:
            tried[small[position]] = result
            if result.converged:
                keep(small[position], result)

        if small:
            chosen = [observations[i] for i in small], [guesses[i] for i in small]
            self.first.invert(*chosen, knowledge, replace(run, on_result=of_first))
        rest = [i for i in range(len(observations)) if i not in found]

        def of_second(position: int, result: Reconstruction) -> None:
            index = rest[position]
            before = tried.get(index)
            if before is not None:  # many images may fit what a defense left: the likely ones are nearer
                better = _misfit(problems[index], before, knowledge) <= _misfit(problems[index], result, knowledge)
                result = before if better else result
            if before is not None:
                result = replace(result, evaluations=result.evaluations + before.evaluations)
            keep(index, result)

        if rest:
            chosen = [observations[i] for i in rest], [guesses[i] for i in rest]
            self.then.invert(*chosen, knowledge, replace(run, on_result=of_second))
        return [found[index] for index in range(len(observations))]


def _by_observation(posed: Sequence[Problem]) -> dict[int, list[Problem]]:
    problems: dict[int, list[Problem]] = {}
    for problem in posed:
        problems.setdefault(problem.index, []).append(problem)
    return problems


def _small(problem: Problem, pixels: int) -> bool:
    return problem.labels is not None and problem.samples * pixels <= _UNKNOWNS


def _misfit(problems: Sequence[Problem], result: Reconstruction, knowledge: Knowledge) -> float:
    """Mean square of an update's gap over its noise; infinite where every sample has a gradient of its own."""
    if len(problems) > 1 or len(result.images) != problems[0].samples or len(result.labels) != problems[0].samples:
        return torch.inf
    problem, target = problems[0], problems[0].targets[0]
    precision = noise_of(target, problem.samples).precision()
    model = update_model(knowledge.model, [target], knowledge.image_shape)
    model.at(result.images[None].double(), one_hot(result.labels[None], knowledge.classes).double())
    made = model.gradients()

    def square(name: str, value: Tensor) -> float:
        gap = (made[name][0].cpu() - value.double().flatten().cpu()).square()
        return float((gap * precision[name]).sum())

    return sum(square(name, value) for name, value in target.update.items())
