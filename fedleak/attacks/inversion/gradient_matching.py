"""Gradient matching: images whose gradient is the observed one, thousands of problems at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Run
from fedleak.attacks.chain.fully_connected import has_rank
from fedleak.attacks.inversion.basis import Basis
from fedleak.attacks.inversion.fast import chain_distance
from fedleak.attacks.inversion.gradients import Distance, Rows, Victim, VmapDistance
from fedleak.attacks.inversion.objectives import L2, Objective
from fedleak.attacks.inversion.optimizers import LBFGS, Optimizer
from fedleak.attacks.inversion.priors import Prior
from fedleak.attacks.problem import Problem, pose
from fedleak.attacks.results import Progress, Reconstruction, StopReason
from fedleak.capture import Observation, same_tensors
from fedleak.errors import UsageError
from fedleak.seeding import mixed_generator

Initial = Callable[
    [Sequence[Observation], Sequence["LabelGuess | None"], Knowledge, "torch.device | str"], "list[Tensor | None]"
]
"""Images ``[B, C, H, W]`` to start from, or None, for each observation: see `GradientMatching`."""

REASONS = (None, StopReason.CONVERGED, StopReason.DIVERGED, StopReason.STALLED, StopReason.BUDGET)
"""By the code that a slot ends with; 0 goes on."""
MOST_SNAPSHOTS = 8
_MOMENTS = frozenset(round(2 ** (k / 2)) for k in range(64))
"""Counts of evaluations after which a snapshot is taken: 1, 2, 3, 4, 6, 8, 11, 16, …"""
_VISIBLE = 0.01
"""Root mean square of the change of the pixels since the last snapshot that is worth another."""


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
    which is right for small learning rates only.

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
            a little noise from the second start on and where there is more than one image).
        restarts: starts per observation (and per label candidate), at most.
        max_evaluations: objective-and-gradient evaluations per start (and stage of `anneal`), at most.
        tolerance: the unscaled objective, priors included, at which a start has converged.
        objective_scale: what the optimiser sees is the objective times this; keeps float32 from stalling early.
        dtype: ``float32`` or ``float64``.
        chunk_size: problems solved at once, at most; None takes what half of the free memory holds. Running out of
            memory halves it and goes on.
        trace_every: keep (evaluations, objective) of the returned start every so many evaluations, and at most
            `MOST_SNAPSHOTS` of its images: those it began with, those after about a geometric series of evaluations
            where they had changed, and the returned ones; 0 keeps none.
        candidates: label multisets of a guess to try, most likely first; the lowest objective wins.
        smoothness: 0 seeks pixels, as the papers do; more seeks amplitudes of cosines, see `Basis`.
        project: keep the images in [0, 1] after every step (for Adam).
        patience: a start has stalled when its best objective fell by less than a thousandth over so many evaluations.
        limit: a start has diverged when the root mean square of (pixel − 0.5) exceeds this.
        initial: gives the first start of some observations, say closed-form solutions.
        general: use the path for any model even where a faster one is known to agree.
    """

    def __init__(
        self,
        *,
        objective: Objective | None = None,
        priors: Sequence[Prior] = (),
        anneal: Sequence[float] = (1.0,),
        optimizer: Optimizer | None = None,
        start: Literal["normal", "uniform", "grey"] = "normal",
        restarts: int = 4,
        max_evaluations: int = 2000,
        tolerance: float = 1e-6,
        objective_scale: float = 1000.0,
        dtype: Literal["float32", "float64"] = "float32",
        chunk_size: int | None = None,
        trace_every: int = 0,
        candidates: int = 1,
        smoothness: float = 0.0,
        project: bool = False,
        patience: int = 200,
        limit: float = 10.0,
        initial: Initial | None = None,
        general: bool = False,
    ) -> None:
        _one_of("start", start, ("normal", "uniform", "grey"))
        _one_of("dtype", dtype, ("float32", "float64"))
        for name, value in (("restarts", restarts), ("max_evaluations", max_evaluations), ("candidates", candidates)):
            if value < 1:
                raise UsageError(f"inversion.{name}={value}: must be at least 1")
        if chunk_size is not None and chunk_size < 1:
            raise UsageError(f"inversion.chunk_size={chunk_size}: must be at least 1, or null for what memory holds")
        self.objective = objective if objective is not None else L2()
        self.needs_scale = self.objective.needs_scale  # type: ignore[misc]
        self.priors = tuple(priors)
        self.anneal = tuple(float(factor) for factor in anneal) if self.priors else (1.0,)
        if not self.anneal:
            raise UsageError("inversion.anneal=[]: must have at least one factor, such as [1.0]")
        self.optimizer = optimizer if optimizer is not None else LBFGS()
        self.start = start
        self.restarts = restarts
        self.max_evaluations = max_evaluations
        self.tolerance = tolerance
        self.objective_scale = objective_scale
        self.dtype = torch.float64 if dtype == "float64" else torch.float32
        self.chunk_size = chunk_size
        self.trace_every = trace_every
        self.candidates = candidates
        self.smoothness = smoothness
        self.project = project
        self.patience = patience
        self.limit = limit
        self.initial = initial
        self.general = general

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
        results = _Results(observations, knowledge, run)
        firsts = self.initial(observations, guesses, knowledge, run.device) if self.initial else [None] * len(guesses)
        cases = [
            self._case(problem, observations[problem.index], knowledge.image_shape, firsts[problem.index])
            for problem in problems
        ]
        results.expect(cases)
        for group in _groups(cases):
            distance = self._distance(group, knowledge, run.device)
            _Solver(self, distance, knowledge, run.seed, results).solve(group)
        return results.finished()

    def _case(
        self, problem: Problem, observation: Observation, image_shape: tuple[int, int, int], first: Tensor | None
    ) -> _Case:
        """A problem with nothing found yet."""
        (target,), sample = problem.targets, problem.key[2]
        if first is not None and observation.training.per_sample:
            first = first[sample : sample + 1]
        shape = (problem.samples, *image_shape)
        if first is not None and tuple(first.shape) != shape:
            raise UsageError(
                f"inversion.initial: images {list(first.shape)} for round {observation.round} client "
                f"{observation.client}, wanted {list(shape)}"
            )
        labels = None if problem.labels is None else problem.labels[: self.candidates]
        victim = Victim(target.parameters, target.buffers, target.update)
        return _Case(problem.index, sample, observation, victim, problem.samples, labels, first)

    def _distance(self, cases: list[_Case], knowledge: Knowledge, device: torch.device | str) -> Distance:
        """The fastest way to compare updates of these cases."""
        victims = [case.victim for case in cases]
        shared = _same_weights(victims)
        if not self.general:
            fast = chain_distance(
                knowledge.model,
                self.objective,
                victims,
                knowledge.image_shape,
                cases[0].size,
                shared=shared,
                training_mode=cases[0].observation.training.training_mode,
                device=device,
                dtype=self.dtype,
            )
            if fast is not None:
                return fast
        return VmapDistance(
            knowledge.model,
            self.objective,
            shared=victims[0] if shared else None,
            training_mode=cases[0].observation.training.training_mode,
            device=device,
            dtype=self.dtype,
        )

    def first_point(self, case: _Case, attempt: int, knowledge: Knowledge, seed: int) -> tuple[Tensor, Tensor | None]:
        """Images ``[B, C, H, W]`` and, for a joint attack, logits ``[B, classes]`` that a start begins with.

        Drawn from (seed, round, client, sample, attempt) alone.
        """
        observation = case.observation
        key = (seed, observation.round, observation.client, case.sample, attempt)
        generator = mixed_generator(*key)
        shape = (case.size, *knowledge.image_shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        logits = torch.randn((case.size, knowledge.classes), generator=generator, dtype=torch.float64)
        if attempt == 0 and case.initial is not None:
            images = case.initial.double().cpu()
        elif self.start == "normal":
            images = noise
        elif self.start == "uniform":
            images = torch.rand(shape, generator=generator, dtype=torch.float64)
        else:
            quiet = attempt == 0 and case.size == 1
            images = torch.full(shape, 0.5, dtype=torch.float64) + (0.0 if quiet else 0.1) * noise
        return images, logits if case.labels is None else None


@dataclass(eq=False)
class _Case:
    """One observation, or one sample of it, and the best that was found for it so far."""

    index: int
    sample: int
    observation: Observation
    victim: Victim
    size: int
    labels: Tensor | None  # [K, B] candidates, None for a joint attack
    initial: Tensor | None
    best: float = float("inf")
    images: Tensor | None = None
    best_labels: Tensor | None = None
    stop_reason: StopReason = StopReason.DIVERGED
    evaluations: int = 0
    seconds: float = 0.0
    starts: int = 0
    finished: bool = False
    trace: list[tuple[int, float]] = field(default_factory=list)
    snapshots: list[tuple[int, Tensor]] = field(default_factory=list)
    details: dict[str, int | str] = field(default_factory=dict)

    def attempt(self) -> tuple[int, int]:
        """(restart, candidate) of the next start: every candidate once, then every candidate again."""
        candidates = 1 if self.labels is None else len(self.labels)
        return divmod(self.starts, candidates)


class _Results:
    """Collects finished cases into reconstructions and tells the caller."""

    def __init__(self, observations: Sequence[Observation], knowledge: Knowledge, run: Run) -> None:
        self.observations = observations
        self.knowledge = knowledge
        self.run = run
        self.reconstructions: dict[int, Reconstruction] = {}
        self.cases: list[_Case] = []
        self.open: dict[int, list[_Case]] = {}
        self.evaluations = 0
        self.began = self.told = time.perf_counter()
        self.done: list[_Case] = []

    def expect(self, cases: list[_Case]) -> None:
        """Say which cases are to come; observations without any are unusable and reported at once."""
        self.cases = cases
        for case in cases:
            self.open.setdefault(case.index, []).append(case)
        for index, observation in enumerate(self.observations):
            if index not in self.open:
                size = observation.training.samples or 1
                images = torch.full((size, *self.knowledge.image_shape), 0.5)
                labels = torch.zeros(size, dtype=torch.long)
                self._tell(index, images, labels, float("nan"), 0, 0.0, observation.error or "empty", 0)

    def finish(self, case: _Case) -> None:
        """A case is done; its observation is reported when it was the last one."""
        case.finished = True
        self.done.append(case)
        cases = self.open[case.index]
        if not all(other.finished for other in cases):
            return
        images = torch.cat([c.images if c.images is not None else self._grey(c) for c in cases])
        labels = torch.cat([c.best_labels if c.best_labels is not None else self._guess(c) for c in cases])
        worst = max(cases, key=lambda c: (c.stop_reason != StopReason.CONVERGED, c.best))
        details = dict(cases[0].details) if len(cases) == 1 else {}
        self._tell(
            case.index,
            images,
            labels,
            sum(c.best for c in cases) / len(cases) if all(np.isfinite(c.best) for c in cases) else float("nan"),
            sum(c.evaluations for c in cases),
            sum(c.seconds for c in cases),
            worst.stop_reason,
            max(c.starts for c in cases),
            cases[0].trace if len(cases) == 1 else [],
            _side_by_side([c.snapshots for c in cases]),
            details,
        )

    def _grey(self, case: _Case) -> Tensor:
        return torch.full((case.size, *self.knowledge.image_shape), 0.5)

    def _guess(self, case: _Case) -> Tensor:
        return torch.zeros(case.size, dtype=torch.long) if case.labels is None else case.labels[0].cpu()

    def _tell(
        self,
        index: int,
        images: Tensor,
        labels: Tensor,
        objective: float,
        evaluations: int,
        seconds: float,
        stop_reason: str,
        restarts: int,
        trace: list[tuple[int, float]] | None = None,
        snapshots: list[tuple[int, Tensor]] | None = None,
        details: dict[str, int | str] | None = None,
    ) -> None:
        observation = self.observations[index]
        self.reconstructions[index] = result = Reconstruction(
            round=observation.round,
            client=observation.client,
            images=images,
            labels=labels,
            objective=objective,
            evaluations=evaluations,
            seconds=seconds,
            stop_reason=stop_reason,
            restarts=restarts,
            trace=trace or [],
            snapshots=snapshots or [],
            details=dict(details or {}),
        )
        if self.run.on_result is not None:
            self.run.on_result(index, result)

    def progress(self, running: Callable[[], list[float]]) -> None:
        """Tell the caller, at most five times a second; `running` gives the best objectives of running problems."""
        now = time.perf_counter()
        if self.run.on_progress is None or now - self.told < 0.2:
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

    def finished(self) -> list[Reconstruction]:
        """All reconstructions, in the order of the observations."""
        self.told = -1.0
        self.progress(list)
        return [self.reconstructions[index] for index in range(len(self.observations))]


@dataclass
class _Start:
    """A running start of a case."""

    case: _Case
    restart: int
    candidate: int
    stage: int = 0  # of the annealing
    point: Tensor | None = None  # where the stage before ended, [D]
    before: int = 0  # evaluations of the stages before
    launched: int = 0  # iteration of the pool
    clock: float = 0.0  # the pool's clock then, see _Solver._run
    trace: list[tuple[int, float]] = field(default_factory=list)
    snapshots: list[tuple[int, Tensor]] = field(default_factory=list)

    def again(self) -> _Start:
        """This start as it was before its stage."""
        kept = [row for row in self.trace if row[0] <= self.before]
        seen = [row for row in self.snapshots if row[0] <= self.before]
        return replace(self, launched=0, clock=0.0, trace=kept, snapshots=seen)


class _Solver:
    """Runs the starts of cases that have the same shapes, as many at a time as memory holds."""

    def __init__(
        self, config: GradientMatching, distance: Distance, knowledge: Knowledge, seed: int, results: _Results
    ) -> None:
        self.config = config
        self.distance = distance
        self.knowledge = knowledge
        self.seed = seed
        self.results = results
        self.running: list[_Start | None] = []

    def solve(self, cases: list[_Case]) -> None:
        """Run every case to its end."""
        self.shape = (cases[0].size, *self.knowledge.image_shape)
        self.pixels = int(np.prod(self.shape))
        self.joint = cases[0].labels is None
        self.basis = Basis(
            self.knowledge.image_shape, self.config.smoothness, device=self.distance.device, dtype=self.config.dtype
        )
        queue = deque(self._next(case) for case in cases)
        chunk = self.config.chunk_size or self._chunk()
        while queue:
            try:
                self._run(queue, chunk)
            except RuntimeError as error:
                size = len(self.running)
                if not _out_of_memory(error) or size <= 1:
                    raise
                chunk = size // 2
                # Starts are deterministic: those that were interrupted begin again and end the same.
                queue.extendleft(reversed([start.again() for start in self.running if start is not None]))
            self.running = []

    def _next(self, case: _Case) -> _Start:
        restart, candidate = case.attempt()
        case.starts += 1
        return _Start(case, restart, candidate)

    def _chunk(self) -> int:
        """How many problems half of the free memory holds."""
        unknowns = self.pixels + (self.shape[0] * self.knowledge.classes if self.joint else 0)
        state = self.config.optimizer.init(torch.zeros(1, unknowns, dtype=self.config.dtype))
        optimizer = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        one = self.distance.bytes_per_problem(self.shape) + 2 * optimizer  # twice: dropping rows copies
        return max(1, int(free_memory(self.distance.device) / 2 / one))

    def _launch(self, starts: list[_Start]) -> dict[str, Rows]:
        """Fresh rows for these starts: the problems' data, the unknowns with their books, the optimiser's state."""
        config, device = self.config, self.distance.device
        points, labels = [], []
        for start in starts:
            if start.case.labels is not None:
                labels.append(start.case.labels[start.candidate])
            if start.point is not None:
                points.append(start.point)
                continue
            images, logits = config.first_point(start.case, start.restart, self.knowledge, self.seed)
            point = self.basis.unknowns(images.to(device, config.dtype)).flatten()
            if logits is not None:
                point = torch.cat([point, logits.to(point).flatten()])
            points.append(point)
        x = torch.stack(points)
        infinite = x.new_full((len(starts),), torch.inf)
        own: Rows = {
            "x": x,
            "best_x": x.clone(),
            "best": infinite,
            "mark": infinite.clone(),  # best value when it last fell by a thousandth, and when that was
            "marked": torch.zeros(len(starts), dtype=torch.long, device=device),
            "evaluations": torch.zeros(len(starts), dtype=torch.long, device=device),
            "prior": x.new_tensor([config.anneal[start.stage] for start in starts]),
        }
        if labels:
            one_hot = nn.functional.one_hot(torch.stack(labels), self.knowledge.classes)
            own["labels"] = one_hot.to(device, config.dtype)
        return {
            "own": own,
            "data": self.distance.load([start.case.victim for start in starts]),
            "optimizer": config.optimizer.init(x),
        }

    def _run(self, queue: deque[_Start], chunk: int) -> None:
        config, optimizer = self.config, self.config.optimizer
        self.running = [queue.popleft() for _ in range(min(chunk, len(queue)))]
        rows = self._launch([start for start in self.running if start is not None])
        iteration, clock = 0, 0.0
        while True:
            began = time.perf_counter()
            own = rows["own"]
            live = sum(start is not None for start in self.running)
            images, value, gradient = self._evaluate(rows)
            iteration += 1
            self.results.evaluations += live
            codes = self._judge(own, images, value, gradient)
            if config.trace_every:
                self._follow(own, value, iteration)
            self.results.progress(lambda best=own["best"]: best.tolist())  # type: ignore[misc]
            ended = [slot for slot, code in enumerate(codes) if code and self.running[slot] is not None]
            if ended:
                self._record(own, ended, codes, iteration, clock, queue)
                free = [slot for slot, start in enumerate(self.running) if start is None]
                if len(free) == len(self.running) and not queue:
                    return
            fresh = [(slot, queue.popleft()) for slot in free[: len(queue)]] if ended else []
            own["x"] = optimizer.step(
                rows["optimizer"],
                own["x"],
                value * config.objective_scale,
                gradient * config.objective_scale,
                own["evaluations"] / config.max_evaluations,
            )
            if config.project:
                images = self._images(own["x"]).clamp(0, 1)
                own["x"][:, : self.pixels] = self.basis.unknowns(images).flatten(1)
            if fresh:
                slots = torch.tensor([slot for slot, _ in fresh], device=self.distance.device)
                for kind, new in self._launch([start for _, start in fresh]).items():
                    for name in new:
                        rows[kind][name][slots] = new[name]
                for slot, start in fresh:
                    start.launched, start.clock = iteration, clock
                    self.running[slot] = start
            free = [slot for slot, start in enumerate(self.running) if start is None]
            if len(free) > len(self.running) // 8:
                kept = [slot for slot, start in enumerate(self.running) if start is not None]
                index = torch.tensor(kept, device=self.distance.device)
                for tensors in rows.values():
                    for name in tensors:
                        tensors[name] = tensors[name][index]
                self.running = [self.running[slot] for slot in kept]
            clock += (time.perf_counter() - began) / live

    def _images(self, x: Tensor) -> Tensor:
        """Images ``[P, B, C, H, W]`` of unknowns ``[P, D]``."""
        return self.basis.images(x[:, : self.pixels].unflatten(1, self.shape))

    def _evaluate(self, rows: dict[str, Rows]) -> tuple[Tensor, Tensor, Tensor]:
        """Images, objective plus priors ``[P]`` and its gradient with respect to the unknowns ``[P, D]``, unscaled."""
        own = rows["own"]
        images = self._images(own["x"])
        logits = own["x"][:, self.pixels :].unflatten(1, (self.shape[0], -1)) if self.joint else None
        labels = own["labels"] if logits is None else logits.softmax(2)
        value, gradient, by_labels = self.distance.evaluate(rows["data"], images, labels, with_labels=self.joint)
        if self.config.priors:
            with torch.enable_grad():
                leaf = images.detach().requires_grad_()
                penalty = torch.stack([prior(leaf) for prior in self.config.priors]).sum(0) * own["prior"]
                value = value + penalty.detach()
                gradient = gradient + torch.autograd.grad(penalty.sum(), leaf)[0]
        gradient = self.basis.pull(gradient).flatten(1)
        if by_labels is not None:
            by_logits = labels * (by_labels - (labels * by_labels).sum(2, keepdim=True))
            gradient = torch.cat([gradient, by_logits.flatten(1)], 1)
        return images, value, gradient

    def _judge(self, own: Rows, images: Tensor, value: Tensor, gradient: Tensor) -> list[int]:
        """Book the evaluation of every slot's `x`, and say which slots are to end: indices into REASONS."""
        config = self.config
        own["evaluations"] = evaluations = own["evaluations"] + 1
        better = value < own["best"]  # False for NaN
        own["best_x"] = torch.where(better[:, None], own["x"], own["best_x"])
        own["best"] = best = torch.where(better, value, own["best"])
        fell = best < 0.999 * own["mark"]
        own["mark"] = torch.where(fell, best, own["mark"])
        own["marked"] = marked = torch.where(fell, evaluations, own["marked"])
        spread = (images - 0.5).flatten(1).square().mean(1).sqrt()
        sane = value.isfinite() & gradient.isfinite().all(1) & (spread <= config.limit)
        if config.optimizer.guarded:
            sane = sane | ~better & (evaluations > 1)  # the step will be taken back
        code = torch.zeros_like(evaluations)
        code = torch.where(evaluations >= config.max_evaluations, 4, code)
        code = torch.where(evaluations - marked >= config.patience, 3, code)
        code = torch.where(sane, code, 2)
        code = torch.where(best <= config.tolerance, 1, code)
        return code.tolist()

    def _follow(self, own: Rows, value: Tensor, iteration: int) -> None:
        """Keep the objective every `trace_every` evaluations, and some of the best images so far."""
        running = [(slot, start) for slot, start in enumerate(self.running) if start is not None]
        due = [(slot, s) for slot, s in running if (iteration - s.launched) % self.config.trace_every == 0]
        if due:
            values = value.tolist()
            for slot, start in due:
                start.trace.append((start.before + iteration - start.launched, values[slot]))
        due = [(slot, s) for slot, s in running if s.before + iteration - s.launched in _MOMENTS]
        if due:
            index = torch.tensor([slot for slot, _ in due], device=self.distance.device)
            images = self._images(own["best_x"][index]).clamp(0, 1).half().cpu()
            for (_, start), image in zip(due, images, strict=True):
                seen = start.snapshots
                if not seen or (image - seen[-1][1]).float().square().mean() > _VISIBLE**2:
                    _add_snapshot(seen, start.before + iteration - start.launched, image.clone())

    def _record(
        self, own: Rows, ended: list[int], codes: list[int], iteration: int, clock: float, queue: deque[_Start]
    ) -> None:
        """Book what these slots found; report cases that are done, queue the next start of those that are not."""
        index = torch.tensor(ended, device=self.distance.device)
        points, best = own["best_x"][index], own["best"][index].tolist()
        found, logits = self._images(points).float().clamp(0, 1).cpu(), points[:, self.pixels :].cpu()
        last_logits = own["x"][index, self.pixels :].cpu()
        for place, (slot, images, logit, value) in enumerate(zip(ended, found, logits, best, strict=True)):
            start = self.running[slot]
            assert start is not None
            self.running[slot] = None
            case, reason = start.case, REASONS[codes[slot]]
            assert reason is not None
            case.evaluations += iteration - start.launched
            case.seconds += clock - start.clock
            if reason != StopReason.DIVERGED and start.stage + 1 < len(self.config.anneal):
                before = start.before + iteration - start.launched
                queue.appendleft(replace(start, stage=start.stage + 1, point=points[place].clone(), before=before))
                continue
            if value < case.best:
                case.best, case.stop_reason, case.trace = value, reason, start.trace
                case.images = images
                if self.config.trace_every:
                    spent = start.before + iteration - start.launched
                    case.snapshots = [row for row in start.snapshots if row[0] < spent]
                    _add_snapshot(case.snapshots, spent, images.half())
                case.details = {"start": start.restart, "candidate": start.candidate}
                if case.labels is None:
                    case.best_labels = logit.unflatten(0, (self.shape[0], -1)).argmax(1)
                    last = last_logits[place].unflatten(0, (self.shape[0], -1)).argmax(1)
                    case.details["last_labels"] = " ".join(map(str, last.tolist()))
                else:
                    case.best_labels = case.labels[start.candidate].cpu()
            if reason == StopReason.CONVERGED or case.attempt()[0] >= self.config.restarts:
                self.results.finish(case)
            else:
                queue.append(self._next(case))


def _add_snapshot(snapshots: list[tuple[int, Tensor]], evaluations: int, images: Tensor) -> None:
    """Append one; of too many, drop the one whose neighbours are closest to one another, as ratios go."""
    snapshots.append((evaluations, images))
    if len(snapshots) > MOST_SNAPSHOTS:
        gaps = [after / before for (before, _), (after, _) in zip(snapshots, snapshots[2:], strict=False)]
        del snapshots[1 + gaps.index(min(gaps))]


def _side_by_side(samples: Sequence[Sequence[tuple[int, Tensor]]]) -> list[tuple[int, Tensor]]:
    """Snapshots of the samples of one observation: of each sample the latest there is at every count of evaluations."""
    if not all(samples):
        return []
    counts = sorted({count for rows in samples for count, _ in rows})
    together: list[tuple[int, Tensor]] = []
    for count in counts:
        latest = [next(images for at, images in reversed(rows) if at <= count) for rows in samples]
        _add_snapshot(together, count, torch.cat(latest))
    return together


def _groups(cases: list[_Case]) -> list[list[_Case]]:
    """Cases that can be stacked: as many images, labels known or sought, one mode, the layers' gradients in factors."""
    groups: dict[tuple[Any, ...], list[_Case]] = {}
    for case in cases:
        factored = tuple(has_rank(g, case.size) for g in case.victim.update.values() if g.dim() == 2)
        mode = case.observation.training.training_mode
        groups.setdefault((case.size, case.labels is None, mode, factored), []).append(case)
    return list(groups.values())


def _same_weights(victims: Sequence[Victim]) -> bool:
    """Whether all victims start from the same parameters and buffers."""
    first = victims[0]
    return all(
        same_tensors(first.parameters, v.parameters) and same_tensors(first.buffers, v.buffers) for v in victims[1:]
    )


def free_memory(device: torch.device) -> int:
    """Bytes that may still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30


def _out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UsageError(f"inversion.{name}={value}: choose one of {', '.join(allowed)}")
