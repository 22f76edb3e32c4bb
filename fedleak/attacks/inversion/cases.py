"""Problems with the best that was found for each, and how they become reconstructions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedleak.attacks.base import Run
from fedleak.attacks.inversion.schedule import Standing
from fedleak.attacks.inversion.trace import Snapshots, Trace, side_by_side
from fedleak.attacks.problem import Problem
from fedleak.attacks.results import Progress, Reconstruction, StopReason
from fedleak.capture import Observation


@dataclass(eq=False)
class Case:
    """A problem, its starts, and the best that was found for it so far."""

    problem: Problem
    images: Tensor
    best_labels: Tensor
    standings: list[Standing] = field(default_factory=list)
    best: float = float("inf")
    stop_reason: StopReason = StopReason.DIVERGED
    evaluations: int = 0
    seconds: float = 0.0
    finished: bool = False
    trace: list[tuple[int, float]] = field(default_factory=list)
    snapshots: Snapshots = field(default_factory=list)
    details: dict[str, int | str] = field(default_factory=dict)

    @staticmethod
    def of(problem: Problem, image_shape: tuple[int, int, int]) -> Case:
        """A problem of which nothing is known but a guess of its labels: grey."""
        labels = torch.zeros(problem.samples, dtype=torch.long) if problem.labels is None else problem.labels[0].cpu()
        return Case(problem, torch.full((problem.samples, *image_shape), 0.5), labels)

    @property
    def candidates(self) -> int:
        """How many label multisets there are to try."""
        return 1 if self.problem.labels is None else len(self.problem.labels)


@dataclass(eq=False)
class Attempt(Standing):
    """A start of a case, as the solver keeps it."""

    case: Case
    stage: int = 0  # of the annealing
    point: Tensor | None = None  # where the stage before ended, [D]
    before: int = 0  # evaluations of the stages before
    launched: int = 0  # iteration of the pool
    clock: float = 0.0  # the pool's clock then
    trace: Trace = field(default_factory=Trace)

    def spent(self, iteration: int) -> int:
        """Evaluations when the pool has come to `iteration`."""
        return self.before + iteration - self.launched

    def rewind(self) -> Attempt:
        """This start as it was before its stage."""
        self.launched, self.clock, self.trace = 0, 0.0, self.trace.until(self.before)
        self.evaluations, self.objective = self.before, float("inf")
        return self


class Results:
    """Collects finished cases into reconstructions, one for each `Problem.index`, and tells the caller."""

    def __init__(self, cases: Sequence[Case], run: Run) -> None:
        self.run = run
        self.found: dict[int, Reconstruction] = {}
        self.cases = cases
        self.open: dict[int, list[Case]] = {}
        for case in cases:
            self.open.setdefault(case.problem.index, []).append(case)
        self.evaluations = 0
        self.began = self.told = time.perf_counter()
        self.done: list[Case] = []

    def finish(self, case: Case) -> None:
        """A case is done; its observation is reported when it was the last one."""
        case.finished = True
        self.done.append(case)
        index = case.problem.index
        cases = self.open[index]
        if not all(other.finished for other in cases):
            return
        worst = max(cases, key=lambda c: (c.stop_reason != StopReason.CONVERGED, c.best))
        alone = len(cases) == 1
        self.found[index] = result = Reconstruction(
            round=case.problem.key[0],
            client=case.problem.key[1],
            images=torch.cat([c.images for c in cases]),
            labels=torch.cat([c.best_labels for c in cases]),
            objective=sum(c.best for c in cases) / len(cases) if all(np.isfinite(c.best) for c in cases) else np.nan,
            evaluations=sum(c.evaluations for c in cases),
            seconds=sum(c.seconds for c in cases),
            stop_reason=worst.stop_reason,
            restarts=max(len(c.standings) for c in cases),
            trace=cases[0].trace if alone else [],
            snapshots=side_by_side([c.snapshots for c in cases]),
            details=dict(cases[0].details) if alone else {},
        )
        if self.run.on_result is not None:
            self.run.on_result(index, result)

    def progress(self, running: Callable[[], list[float]], *, last: bool = False) -> None:
        """Tell the caller, at most five times a second; `running` gives the best objectives of running problems."""
        now = time.perf_counter()
        if self.run.on_progress is None or (now - self.told < 0.2 and not last):
            return
        self.told = now
        values = [case.best for case in self.done] + running()
        self.run.on_progress(
            Progress(
                problems=len(self.cases),
                done=len(self.done),
                converged=sum(case.stop_reason == StopReason.CONVERGED for case in self.done),
                diverged=sum(case.stop_reason == StopReason.DIVERGED for case in self.done),
                median_objective=float(np.median(values)) if values else float("nan"),
                evaluations=self.evaluations,
                evaluations_per_second=self.evaluations / (now - self.began),
            )
        )


def unusable(observation: Observation, image_shape: tuple[int, int, int]) -> Reconstruction:
    """Grey images in place of what cannot be sought, with the reason why."""
    size = observation.training.samples or 1
    return Reconstruction(
        round=observation.round,
        client=observation.client,
        images=torch.full((size, *image_shape), 0.5),
        labels=torch.zeros(size, dtype=torch.long),
        objective=float("nan"),
        evaluations=0,
        seconds=0.0,
        stop_reason=observation.error or "empty",
        restarts=0,
    )
