"""Which of several label multisets explains a defended update best: each is tried coarsely, by the misfit it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import one_hot

from fedleak.attacks.base import Knowledge, LabelGuess, Run
from fedleak.attacks.image_prior import ImagePrior
from fedleak.attacks.inversion.map.solver import GaussNewton, Settings
from fedleak.attacks.jacobian.general import GeneralModel
from fedleak.attacks.jacobian.models import update_model
from fedleak.attacks.noise import noise_of
from fedleak.attacks.problem import Problem
from fedleak.seeding import generator

_COORDINATES = 16
"""Of each image: what is coarse tells labels apart, since the last layer's gradient hardly depends on details."""
_STEPS = 4
_SURE = 0.9
"""Confidence of the first multiset from which the others are not tried."""
_TEMPER = 1.5
_BYTES = 2**30
"""Of derivatives in float32; where the multisets would need more, the first is taken."""


def _best(problem: Problem, guess: LabelGuess, knowledge: Knowledge, prior: ImagePrior, run: Run) -> LabelGuess:
    """The guess with that multiset alone that explains the update best.

    All of them are tried together, each by a few Gauss-Newton steps on the leading coordinates of its images, from the
    same start. On pruned batches of four the right one is left with a tenth of the others' misfit.

    Args:
        problem: of one update.
        guess: its labels ``[K, B]``, the most likely first.
        knowledge: what else the attacker holds.
        prior: of one image.
        run: where to compute, and the seed.
    """
    count = len(guess.labels)
    target, device = problem.targets[0], torch.device(run.device)
    noise = noise_of(target, problem.samples).precision()
    observed = {n: v.double().flatten().expand(count, -1).to(device) for n, v in target.update.items()}
    precision = {n: v.expand(count, *v.shape).to(device) for n, v in noise.items()}
    exact, rough = (
        update_model(knowledge.model, [target] * count, knowledge.image_shape, device=device, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    if isinstance(getattr(exact, "inner", exact), GeneralModel):  # derivatives one by one would take minutes
        return _only(guess, 0)
    labels = one_hot(guess.labels.to(device), knowledge.classes).double()
    width = min(_COORDINATES, len(prior.root))
    settings = Settings(stages=(width,), coarse_steps=_STEPS, max_steps=_STEPS)
    solver = GaussNewton(exact, rough, observed, precision, labels, prior.tempered(_TEMPER), settings)
    random = generator(run.seed, "labels", *problem.key)
    start = 0.1 * torch.randn(problem.samples, width, generator=random, dtype=torch.float64)
    state = solver.run(solver.start(start.to(device).expand(count, -1, -1)), last=width)
    return _only(guess, int(state.misfit.nan_to_num(torch.inf).argmin()))


def _only(guess: LabelGuess, place: int) -> LabelGuess:
    """One multiset of a guess; the features go with the first."""
    some = slice(place, place + 1)
    return LabelGuess(guess.labels[some], guess.confidence[some], guess.features if place == 0 else None)


def screened(
    problems: Mapping[int, Sequence[Problem]],
    guesses: Sequence[LabelGuess | None],
    knowledge: Knowledge,
    prior: ImagePrior,
    run: Run,
) -> list[LabelGuess | None]:
    """Guesses of one multiset each: of batches of one local step the best, see `_best`, of others the first.

    Args:
        problems: index -> what an observation poses.
        guesses: one an observation.
        knowledge, prior, run: as of an inversion.
    """
    found: list[LabelGuess | None] = []
    for index, guess in enumerate(guesses):
        own = problems.get(index, [])
        if guess is None or len(guess.labels) == 1:
            found.append(guess)
        elif len(own) != 1 or own[0].samples == 1 or not own[0].targets[0].training.single:
            found.append(_only(guess, 0))
        else:
            numbers = sum(value.numel() for value in own[0].targets[0].update.values())
            large = 4 * len(guess.labels) * own[0].samples * _COORDINATES * numbers > _BYTES
            sure = large or float(guess.confidence[0]) > _SURE
            found.append(_only(guess, 0) if sure else _best(own[0], guess, knowledge, prior, run))
    return found
