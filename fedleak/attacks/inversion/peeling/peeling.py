"""The closed form as an inversion: checked against what was observed, with another inversion for the rest."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Run
from fedleak.attacks.inversion.cases import unusable
from fedleak.attacks.inversion.gradient_matching import GradientMatching
from fedleak.attacks.inversion.peeling.chain import Chain
from fedleak.attacks.inversion.peeling.solve import Peeled, Peeler
from fedleak.attacks.problem import Problem, pose
from fedleak.attacks.results import Progress, Reconstruction, StopReason
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.training import LocalTraining


def closed_form(
    observations: Sequence[Observation],
    guesses: Sequence[LabelGuess | None],
    knowledge: Knowledge,
    device: torch.device | str = "cpu",
) -> list[Tensor | None]:
    """Images from updates without iteration, where the model and the batch allow it.

    Supported are updates of one local step through a chain of plain convolutions, fully connected layers and
    elementwise monotone functions: of one sample (or with one gradient a sample), or of a batch with known labels and
    at least twice as many classes as samples. Where a batch leaves an image open, the smoothest of the images that fit
    is searched for. Nothing is promised about an image: compare its gradient with the observed one, as `Peeling` does.

    Args:
        observations: N observations.
        guesses: N label guesses; a single sample needs none, since its gradient tells its label.
        knowledge: the model and the image shape.
        device: where to compute.

    Returns:
        N tensors ``[B, C, H, W]``, float32 in [0, 1], on the CPU; None where the model or the batch is not supported.

    Raises:
        UsageError: see `fedleak.attacks.problem.pose`.
    """
    images: list[Tensor | None] = [None] * len(observations)
    for index, peeled in _peel(_pose(observations, guesses, knowledge), Peeler(knowledge, device)):
        images[index] = peeled.images
    return images


def _pose(
    observations: Sequence[Observation], guesses: Sequence[LabelGuess | None], knowledge: Knowledge
) -> list[Problem]:
    """The problems; where every sample has a gradient of its own, that tells its label better than any guess."""
    own = [None if o.training.per_sample else guess for o, guess in zip(observations, guesses, strict=True)]
    return pose(observations, own, knowledge)


def _peel(problems: Sequence[Problem], peeler: Peeler) -> Iterator[tuple[int, Peeled]]:
    """(index, images) of every supported observation, as soon as all of its samples are there."""
    missing: dict[int, int] = {}
    for problem in problems:
        missing[problem.index] = missing.get(problem.index, 0) + 1
    parts: dict[int, list[Peeled]] = {}
    for problem, peeled in peeler.all(problems):
        found = parts.setdefault(problem.index, [])
        found.append(peeled)
        if len(found) == missing[problem.index]:
            yield problem.index, Peeled.join(found)


_CANNOT = (
    "attack.inversion=peeling cannot undo {}: it needs one local step, known labels, at most half as many samples as "
    "classes and no branches or pooling; give it a fallback or choose attack.inversion=gradient_matching"
)


class Peeling(Inversion):
    """The closed form, checked against the observed gradient; what fails the check goes to another inversion.

    Of a failed image and the other inversion's the one whose gradient is closer to the observed one is kept.

    Args:
        fallback: inverts the observations that the closed form does not support or whose image fails the check. None
            reports the failed images as ``stalled`` and refuses what is not supported.
        tolerance: an image counts as found if ‖∇W(x) − ∇W‖² ≤ tolerance · ‖∇W‖².
        batch_tolerance: the same for batches. A batch's gradient may not determine its images; of those that fit, the
            closed form seeks the most natural, which are nearer to the truth than others that fit a little better.

    References:
        Zhu, Blaschko. R-GAP: Recursive gradient attack on privacy. ICLR 2021.
    """

    def __init__(
        self, fallback: Inversion | None = None, tolerance: float = 1e-5, batch_tolerance: float = 1e-4
    ) -> None:
        self.fallback = fallback
        self.tolerance = tolerance
        self.batch_tolerance = batch_tolerance

    def adapted(self) -> Inversion:
        """The most likely images, and the fallback for the rest: a defended update cannot be peeled."""
        from fedleak.attacks.inversion.strongest import Strongest  # which has peeling among its parts

        return Strongest() if self.fallback is None else Strongest(then=self.fallback)

    def check_model(self, knowledge: Knowledge, training: LocalTraining) -> None:
        """See `Inversion.check_model`: a fallback takes what cannot be peeled."""
        if self.fallback is not None:
            self.fallback.check_model(knowledge, training)
            return
        together = 1 if training.per_sample else training.samples or 1
        many = together > 1 and 2 * together > knowledge.classes
        if many or not training.single or Chain.read(knowledge.model, knowledge.image_shape) is None:
            raise UsageError(_CANNOT.format("such updates of this model"))

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        run: Run,
    ) -> list[Reconstruction]:
        """See `Inversion.invert`; the peeled images' `objective` is the squared distance of the gradients."""
        call = _Call(observations, _pose(observations, guesses, knowledge), Peeler(knowledge, run.device), run)
        for index, peeled in _peel(call.problems, call.peeler):
            found = peeled.relative <= (self.tolerance if len(peeled.labels) == 1 else self.batch_tolerance)
            if found or self.fallback is None:
                call.keep(index, _report(observations[index], peeled, found))
                call.progress()
            else:
                call.failed[index] = peeled
        for index, observation in enumerate(observations):
            if observation.error is not None:
                call.keep(index, unusable(observation, knowledge.image_shape))
        rest = [index for index in range(len(observations)) if index not in call.results]
        if rest and self.fallback is None:
            first = observations[rest[0]]
            which = f"round {first.round}, client {first.client} (batch_size={first.training.batch_size})"
            raise UsageError(_CANNOT.format(which))
        fallback = self.fallback
        if isinstance(fallback, GradientMatching) and fallback.initial is None:
            # A peeled image that narrowly fails is near the truth, where a grey one may lead to another solution.
            fallback = copy.copy(fallback)
            fallback.initial = lambda *_: [call.failed[i].images if i in call.failed else None for i in rest]
        if rest and fallback is not None:
            fallback.invert(
                [observations[index] for index in rest],
                [guesses[index] for index in rest],
                knowledge,
                call.run_of_rest(rest),
            )
        return [call.results[index] for index in range(len(observations))]


@dataclass
class _Call:
    """One call of `Peeling.invert`: what is done, and what failed its check, index -> images."""

    observations: Sequence[Observation]
    problems: Sequence[Problem]
    peeler: Peeler
    run: Run
    results: dict[int, Reconstruction] = field(default_factory=dict)
    failed: dict[int, Peeled] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def keep(self, index: int, result: Reconstruction) -> None:
        """An observation is done."""
        self.results[index] = result
        if self.run.on_result is not None:
            self.run.on_result(index, result)

    def progress(self) -> None:
        """Tell the caller."""
        if self.run.on_progress is None:
            return
        done = list(self.results.values())
        self.run.on_progress(
            Progress(
                problems=len(self.observations),
                done=len(done),
                converged=sum(result.converged for result in done),
                diverged=0,
                median_objective=sorted(result.objective for result in done)[len(done) // 2],
                evaluations=len(done),
                evaluations_per_second=len(done) / max(time.perf_counter() - self.began, 1e-9),
            )
        )

    def run_of_rest(self, rest: Sequence[int]) -> Run:
        """How another inversion is to work on the observations at `rest`."""
        before = len(self.results)
        converged = sum(result.converged for result in self.results.values())

        def of_all(state: Progress) -> None:
            if self.run.on_progress is not None:
                done, good = state.done + before, state.converged + converged
                self.run.on_progress(replace(state, problems=len(self.observations), done=done, converged=good))

        def keep(position: int, result: Reconstruction) -> None:
            self.keep(rest[position], self._closer(rest[position], result))

        return replace(self.run, on_result=keep, on_progress=of_all)

    def _closer(self, index: int, result: Reconstruction) -> Reconstruction:
        """Of another inversion's images and those that failed, the ones whose gradient is closer to the observed."""
        peeled, samples = self.failed.get(index), [p for p in self.problems if p.index == index]
        if peeled is None or result.converged:
            return result
        other = torch.inf  # where every sample has a gradient of its own
        if not self.observations[index].training.per_sample:
            other = self.peeler.relative(samples[0], result.images, result.labels)
        if not peeled.relative <= other:
            return result
        report = _report(self.observations[index], peeled, found=False)
        report.evaluations, report.restarts = result.evaluations + 1, result.restarts
        report.seconds += result.seconds
        return report


def _report(observation: Observation, peeled: Peeled, found: bool) -> Reconstruction:
    return Reconstruction(
        round=observation.round,
        client=observation.client,
        images=peeled.images,
        labels=peeled.labels,
        objective=peeled.objective,
        evaluations=1,
        seconds=peeled.seconds,
        stop_reason=StopReason.CONVERGED if found else StopReason.STALLED,
        details={"method": "closed_form", "relative_objective": peeled.relative},
    )
