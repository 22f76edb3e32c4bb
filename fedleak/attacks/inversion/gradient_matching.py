"""Gradient matching: images whose gradient is the observed one, thousands of problems at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Run
from fedleak.attacks.chain.fully_connected import has_rank
from fedleak.attacks.inversion.cases import Case, Results, unusable
from fedleak.attacks.inversion.coordinates import Coordinates, Cosines
from fedleak.attacks.inversion.distances import (
    ChainDistance,
    Comparison,
    Distance,
    GeneralDistance,
    LoopDistance,
)
from fedleak.attacks.inversion.objectives import L2, Objective
from fedleak.attacks.inversion.optimizers import LBFGS, Optimizer
from fedleak.attacks.inversion.priors import Prior
from fedleak.attacks.inversion.schedule import InTurn, Schedule
from fedleak.attacks.inversion.solver import Settings, Solver
from fedleak.attacks.inversion.starts import Start, start_of
from fedleak.attacks.inversion.stopping import Stopping
from fedleak.attacks.problem import Problem, pose
from fedleak.attacks.results import Reconstruction
from fedleak.capture import Observation
from fedleak.errors import UsageError

Initial = Callable[
    [Sequence[Observation], Sequence["LabelGuess | None"], Knowledge, "torch.device | str"], "list[Tensor | None]"
]
"""Images ``[B, C, H, W]`` to start from, or None, for each observation: see `GradientMatching`."""


class GradientMatching(Inversion):
    """Images whose gradient is the observed one (Zhu 2019, DLG; Zhao 2020, iDLG; Geiping 2020 by its settings).

    A problem is one start of one observation. Problems are solved together, each with its own state: a start that
    ends frees its place, a start that failed is followed by the next restart of that observation alone, and an
    observation is finished as soon as one start converges. What a start does depends on nothing else in the call,
    up to rounding (which float32 amplifies on the way, not in the images that a converged start ends with).

    The defaults are the procedure of the DLG and iDLG papers, but for an end to hopeless starts and a scaled objective;
    ``objective_scale=1, limit=inf, patience=max_evaluations`` is their procedure to the letter. Quicker and surer on
    natural images, at batch size 1 with labels known or sought::

        GradientMatching(objective=L2(relative=True), start="grey", smoothness=1.0, optimizer=LBFGS(max_step=1.0),
                         tolerance=3e-7)

    Batches can leave the images undetermined even where every label is known (a LeNet's gradient holds fewer numbers
    than four CIFAR images do); then a prior decides among images that match equally well::

        GradientMatching(objective=RelativeL2(), start="grey", smoothness=0.5, tolerance=1e-9,
                         priors=[SmoothTotalVariation(weight=1e-3)], anneal=(1, 0.1, 0.01),
                         optimizer=LBFGS(line_search="backtracking"))

    An update of several local steps is matched as if all its samples had been one batch at the starting parameters,
    which is right for small learning rates only; ``unroll=True`` goes through the steps that the client took instead.
    A client's defense is imitated where it is known (`Target.imitate`), and of several targets the objectives add up.

    A joint attack's labels are those at the lowest objective; the reconstruction's detail ``last_labels`` has those of
    the last step, which the DLG and iDLG code reports. After a blow-up they differ.

    Args:
        objective: the distance between updates; squared differences by default.
        priors: penalties added to it.
        anneal: the priors' weights are multiplied with these numbers in turn; every stage goes on from the best images
            of the one before, with a budget of its own. Where an update does not determine the images, falling
            weights lead to those that the priors like best among all that match.
        optimizer: `LBFGS()` by default, as in DLG and iDLG.
        start: ``normal`` (standard normal pixels, as in DLG and iDLG), ``uniform`` (on [0, 1]) or ``grey`` (0.5, plus
            a little noise from the second start on and where there is more than one image), or a `Start`.
        schedule: which starts run, and when a problem is finished; `InTurn()` by default.
        restarts: starts per observation (and per label candidate), at most.
        max_evaluations: objective-and-gradient evaluations per start (and stage of `anneal`), at most.
        tolerance: the unscaled objective, priors included, at which a start has converged.
        objective_scale: what the optimiser sees is the objective times this; keeps float32 from stalling early.
        dtype: ``float32`` or ``float64``.
        chunk_size: problems solved at once, at most; None takes what half of the free memory holds. Running out of
            memory halves it and goes on.
        trace_every: keep (evaluations, objective) of the returned start every so many evaluations, and at most
            eight times its images: those it began with, those after about a geometric series of evaluations
            where they had changed, and the returned ones; 0 keeps none.
        candidates: label multisets of a guess to try, most likely first; the lowest objective wins.
        smoothness: 0 seeks pixels, as the papers do; more seeks amplitudes of cosines, see `Cosines`.
        coordinates: in which images are sought, instead of those.
        project: keep the images in [0, 1] after every step (for Adam).
        patience: a start has stalled when its best objective fell by less than a thousandth over so many evaluations.
        limit: a start has diverged when the root mean square of (pixel − 0.5) exceeds this.
        stopping: when starts end, instead of `max_evaluations`, `tolerance`, `patience` and `limit`.
        initial: gives the first start of some observations, say closed-form solutions.
        unroll: match what all local steps give, the samples in the order of the client's batches.
        distances: kinds of distances of your own; the first that fits the problems compares them.
        general: use the path for any model even where a faster one is known to agree.
    """

    def __init__(
        self,
        *,
        objective: Objective | None = None,
        priors: Sequence[Prior] = (),
        anneal: Sequence[float] = (1.0,),
        optimizer: Optimizer | None = None,
        start: Literal["normal", "uniform", "grey"] | Start = "normal",
        schedule: Schedule | None = None,
        restarts: int = 4,
        max_evaluations: int = 2000,
        tolerance: float = 1e-6,
        objective_scale: float = 1000.0,
        dtype: Literal["float32", "float64"] = "float32",
        chunk_size: int | None = None,
        trace_every: int = 0,
        candidates: int = 1,
        smoothness: float = 0.0,
        coordinates: Coordinates | None = None,
        project: bool = False,
        patience: int = 200,
        limit: float = 10.0,
        stopping: Stopping | None = None,
        initial: Initial | None = None,
        unroll: bool = False,
        distances: Sequence[type[Distance]] = (),
        general: bool = False,
    ) -> None:
        if dtype not in ("float32", "float64"):
            raise UsageError(f"inversion.dtype={dtype}: choose one of float32, float64")
        for name, value in (("restarts", restarts), ("max_evaluations", max_evaluations), ("candidates", candidates)):
            if value < 1:
                raise UsageError(f"inversion.{name}={value}: must be at least 1")
        if chunk_size is not None and chunk_size < 1:
            raise UsageError(f"inversion.chunk_size={chunk_size}: must be at least 1, or null for what memory holds")
        if priors and not anneal:
            raise UsageError("inversion.anneal=[]: must have at least one factor, such as [1.0]")
        self.objective = objective if objective is not None else L2()
        self.needs_scale = self.objective.needs_scale and not unroll  # type: ignore[misc]
        self.candidates = candidates
        self.initial = initial
        self.unroll = unroll
        fast = () if general else (ChainDistance, LoopDistance)
        self.distances: tuple[type[Distance], ...] = (*distances, *fast, GeneralDistance)
        self.settings = Settings(
            priors=tuple(priors),
            anneal=tuple(float(factor) for factor in anneal) if priors else (1.0,),
            optimizer=optimizer or LBFGS(),
            coordinates=coordinates or (Cosines(smoothness) if smoothness else Coordinates()),
            start=start_of(start),
            schedule=schedule or InTurn(),
            stopping=stopping or Stopping(max_evaluations, tolerance, patience, limit),
            restarts=restarts,
            objective_scale=objective_scale,
            dtype=torch.float64 if dtype == "float64" else torch.float32,
            chunk_size=chunk_size,
            trace_every=trace_every,
            project=project,
        )

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        run: Run,
    ) -> list[Reconstruction]:
        """Rebuild the private images behind each observation; see `Inversion.invert`.

        An observation with an error gives grey images, a NaN objective and the error as its stop reason.

        Raises:
            UsageError: an observation does not fit the model, or its batch size or local steps are unknown.
        """
        problems = pose(observations, guesses, knowledge)
        if self.initial is not None:
            firsts = self.initial(observations, guesses, knowledge, run.device)
            problems = [_begun(problem, firsts[problem.index], observations[problem.index]) for problem in problems]
        posed = {problem.index for problem in problems}
        failed = {i: unusable(o, knowledge.image_shape) for i, o in enumerate(observations) if i not in posed}
        for index, result in failed.items():
            if run.on_result is not None:
                run.on_result(index, result)
        found = failed | self.solve(problems, knowledge, run)
        return [found[index] for index in range(len(observations))]

    def solve(self, problems: Sequence[Problem], knowledge: Knowledge, run: Run) -> dict[int, Reconstruction]:
        """The images of problems, however they were posed: `Problem.index` -> reconstruction.

        Problems of one index are samples of one observation, whose images are put together.

        Raises:
            UsageError: a problem's start has not the shape of its images.
        """
        cases = []
        for problem in problems:
            shape = (problem.samples, *knowledge.image_shape)
            if problem.start is not None and tuple(problem.start.shape) != shape:
                raise UsageError(
                    f"inversion.initial: images {list(problem.start.shape)} for round {problem.key[0]} client "
                    f"{problem.key[1]}, wanted {list(shape)}"
                )
            labels = None if problem.labels is None else problem.labels[: self.candidates]
            cases.append(Case.of(replace(problem, labels=labels), knowledge.image_shape))
        results = Results(cases, run)
        for group in self._groups(cases):
            distance = self._distance([case.problem for case in group], knowledge, run.device)
            Solver(self.settings, distance, knowledge.image_shape, knowledge.classes, run, results).solve(group)
        results.progress(list, last=True)
        return results.found

    def _groups(self, cases: Sequence[Case]) -> list[list[Case]]:
        """Cases that can be stacked: as many images and targets, labels known or sought, trained alike, the layers'
        gradients in factors."""
        groups: dict[tuple[Any, ...], list[Case]] = {}
        for case in cases:
            problem, targets = case.problem, case.problem.targets
            factored = tuple(has_rank(g, problem.samples) for g in targets[0].update.values() if g.dim() == 2)
            alike = tuple((t.training if self.unroll else t.training.training_mode, t.imitate is None) for t in targets)
            groups.setdefault((problem.samples, problem.labels is None, alike, factored), []).append(case)
        return list(groups.values())

    def _distance(self, problems: Sequence[Problem], knowledge: Knowledge, device: torch.device | str) -> Distance:
        """The first kind of distance that fits these problems."""
        comparison = Comparison(
            knowledge.model, self.objective, knowledge.image_shape, self.unroll, device, self.settings.dtype
        )
        fitting = (kind.fit(comparison, problems) for kind in self.distances)
        return next(distance for distance in fitting if distance is not None)


def _begun(problem: Problem, first: Tensor | None, observation: Observation) -> Problem:
    """The problem with images to start from: those of the observation, or its own sample's."""
    sample = problem.key[2]
    if first is not None and observation.training.per_sample:
        first = first[sample : sample + 1]
    return replace(problem, start=first)
