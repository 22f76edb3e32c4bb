"""Many starts of many problems, optimised together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedleak.attacks.base import Run
from fedleak.attacks.inversion.cases import Attempt, Case, Results
from fedleak.attacks.inversion.coordinates import Coordinates
from fedleak.attacks.inversion.distances import Distance, Rows
from fedleak.attacks.inversion.memory import free_memory, out_of_memory
from fedleak.attacks.inversion.optimizers import Optimizer
from fedleak.attacks.inversion.priors import Prior
from fedleak.attacks.inversion.schedule import Schedule
from fedleak.attacks.inversion.starts import Start, first_point
from fedleak.attacks.inversion.stopping import REASONS, Evaluated, Stopping
from fedleak.attacks.inversion.trace import add_snapshot
from fedleak.attacks.results import StopReason

_STALLED, _BUDGET = REASONS.index(StopReason.STALLED), REASONS.index(StopReason.BUDGET)


@dataclass(frozen=True)
class Settings:
    """The parts and numbers that a solver works with; see `GradientMatching`."""

    priors: tuple[Prior, ...]
    anneal: tuple[float, ...]
    optimizer: Optimizer
    coordinates: Coordinates
    start: Start
    schedule: Schedule
    stopping: Stopping
    restarts: int
    objective_scale: float
    dtype: torch.dtype
    chunk_size: int | None
    trace_every: int
    project: bool


class Solver:
    """Runs the starts of cases that have the same shapes, as many at a time as memory holds.

    A slot holds a start that runs. Every tensor of `rows` has the slots as its first dimension: the distance's data,
    the unknowns with the best of them, the optimiser's state and that of the stopping rule.
    """

    def __init__(
        self,
        settings: Settings,
        distance: Distance,
        image_shape: tuple[int, int, int],
        classes: int,
        run: Run,
        results: Results,
    ) -> None:
        self.settings = settings
        self.distance = distance
        self.image_shape = image_shape
        self.classes = classes
        self.seed = run.seed
        self.deadline = None if run.seconds is None else time.perf_counter() + run.seconds
        self.results = results
        self.coordinates = settings.coordinates.on(image_shape, device=distance.device, dtype=settings.dtype)
        self.queue: deque[Attempt] = deque()
        self.slots: list[Attempt | None] = []
        self.rows: dict[str, Rows] = {}
        self.dropped: set[Attempt] = set()

    def solve(self, cases: Sequence[Case]) -> None:
        """Run every case to its end."""
        self.shape = (cases[0].problem.samples, *self.image_shape)
        self.pixels = int(np.prod(self.shape))
        self.joint = cases[0].problem.labels is None
        for case in cases:
            self._launch(case)
        chunk = self.settings.chunk_size or self._chunk()
        while self.queue:
            try:
                self._run(chunk)
            except RuntimeError as error:
                size = len(self.slots)
                if not out_of_memory(error) or size <= 1:
                    raise
                chunk = size // 2
                # Starts are deterministic: those that were interrupted begin again and end the same.
                self.queue.extendleft(reversed([start.rewind() for _, start in self._running()]))
            self.slots, self.rows = [], {}

    def _late(self) -> bool:
        """Whether the time is over."""
        return self.deadline is not None and time.perf_counter() > self.deadline

    def _launch(self, case: Case) -> None:
        """Queue what the schedule wants of a case now; report the case where that is nothing, and nothing runs."""
        schedule, standings = self.settings.schedule, case.standings
        if standings and self._late():
            if all(standing.reason is not None for standing in standings):
                self.results.finish(case)
            return
        for restart, candidate in schedule.launch(
            tuple(standings), restarts=self.settings.restarts, candidates=case.candidates
        ):
            start = Attempt(restart=restart, candidate=candidate, case=case)
            standings.append(start)
            self.queue.append(start)
        self._drop([case])
        if all(standing.reason is not None for standing in standings):
            self.results.finish(case)

    def _drop(self, cases: Iterable[Case]) -> None:
        """End the starts that the schedule gives up: those in slots after their next evaluation, others at once."""
        for case in cases:
            for start in self.settings.schedule.drop(tuple(case.standings)):
                assert isinstance(start, Attempt)
                if start in self.queue and start.point is None:  # it has not begun
                    self.queue.remove(start)
                    start.reason = StopReason.STALLED
                elif start.reason is None:
                    self.dropped.add(start)

    def _running(self) -> list[tuple[int, Attempt]]:
        return [(slot, start) for slot, start in enumerate(self.slots) if start is not None]

    def _chunk(self) -> int:
        """How many problems half of the free memory holds."""
        unknowns = self.pixels + (self.shape[0] * self.classes if self.joint else 0)
        state = self.settings.optimizer.init(torch.zeros(1, unknowns, dtype=self.settings.dtype))
        optimizer = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        one = self.distance.bytes_per_problem(self.shape) + 2 * optimizer  # twice: dropping rows copies
        return max(1, int(free_memory(self.distance.device) / 2 / one))

    def _fresh(self, starts: Sequence[Attempt]) -> dict[str, Rows]:
        """Rows for these starts."""
        settings, device = self.settings, self.distance.device
        points, labels = [], []
        for start in starts:
            problem = start.case.problem
            if problem.labels is not None:
                labels.append(problem.labels[start.candidate])
            if start.point is not None:
                points.append(start.point)
                continue
            images, logits = first_point(
                settings.start, problem, start.restart, self.image_shape, self.classes, self.seed
            )
            point = self.coordinates.unknowns(images.to(device, settings.dtype)).flatten()
            points.append(torch.cat([point, logits.to(point).flatten()]) if self.joint else point)
        x = torch.stack(points)
        own: Rows = {
            "x": x,
            "best_x": x.clone(),
            "best": x.new_full((len(starts),), torch.inf),
            "evaluations": torch.zeros(len(starts), dtype=torch.long, device=device),
            "prior": x.new_tensor([settings.anneal[start.stage] for start in starts]),
        }
        if labels:
            own["labels"] = nn.functional.one_hot(torch.stack(labels), self.classes).to(device, settings.dtype)
        return {
            "own": own,
            "data": self.distance.load([start.case.problem for start in starts]),
            "optimizer": settings.optimizer.init(x),
            "stopping": settings.stopping.init(x),
        }

    def _run(self, chunk: int) -> None:
        """Fill the slots, and go on until none is left."""
        first = [self.queue.popleft() for _ in range(min(chunk, len(self.queue)))]
        self.slots = [*first]
        self.rows = self._fresh(first)
        iteration, clock = 0, 0.0
        while True:
            began = time.perf_counter()
            own, running = self.rows["own"], self._running()
            images, value, gradient = self._evaluate()
            iteration += 1
            self.results.evaluations += len(running)
            codes = self._judge(images, value, gradient)
            if self.settings.trace_every:
                self._follow(value, iteration)
            self.results.progress(lambda best=own["best"]: best.tolist())  # type: ignore[misc]
            self._look(iteration)
            ended = [slot for slot, start in running if codes[slot] or start in self.dropped]
            if ended:
                self._record(ended, codes, iteration, clock)
                if not self._running() and not self.queue:
                    return
            self._step(value, gradient)
            self._fill(iteration, clock)
            self._close()
            clock += (time.perf_counter() - began) / len(running)

    def _images(self, x: Tensor) -> Tensor:
        """Images ``[P, B, C, H, W]`` of unknowns ``[P, D]``."""
        return self.coordinates.images(x[:, : self.pixels].unflatten(1, self.shape))

    def _evaluate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, objective plus priors ``[P]`` and its gradient with respect to the unknowns ``[P, D]``, unscaled."""
        own = self.rows["own"]
        images = self._images(own["x"])
        logits = own["x"][:, self.pixels :].unflatten(1, (self.shape[0], -1)) if self.joint else None
        labels = own["labels"] if logits is None else logits.softmax(2)
        value, gradient, by_labels = self.distance.evaluate(self.rows["data"], images, labels, with_labels=self.joint)
        if self.settings.priors:
            with torch.enable_grad():
                leaf = images.detach().requires_grad_()
                penalty = torch.stack([prior(leaf) for prior in self.settings.priors]).sum(0) * own["prior"]
                value = value + penalty.detach()
                gradient = gradient + torch.autograd.grad(penalty.sum(), leaf)[0]
        gradient = self.coordinates.pull(gradient).flatten(1)
        if by_labels is not None:
            by_logits = labels * (by_labels - (labels * by_labels).sum(2, keepdim=True))
            gradient = torch.cat([gradient, by_logits.flatten(1)], 1)
        return images, value, gradient

    def _judge(self, images: Tensor, value: Tensor, gradient: Tensor) -> list[int]:
        """Book the evaluation of every slot's `x`, and say which slots are to end: indices into REASONS."""
        own = self.rows["own"]
        own["evaluations"] = own["evaluations"] + 1
        better = value < own["best"]  # False for NaN
        own["best_x"] = torch.where(better[:, None], own["x"], own["best_x"])
        own["best"] = torch.where(better, value, own["best"])
        now = Evaluated(
            images, value, gradient, own["best"], better, own["evaluations"], self.settings.optimizer.guarded
        )
        codes = self.settings.stopping.judge(self.rows["stopping"], now).tolist()
        return [code or _BUDGET for code in codes] if self._late() else codes

    def _look(self, iteration: int) -> None:
        """Let the schedule look across the starts of every case that runs."""
        every = self.settings.schedule.every
        if every is None or iteration % every:
            return
        best = self.rows["own"]["best"].tolist()
        for slot, start in self._running():
            start.evaluations, start.objective = start.spent(iteration), best[slot]
        self._drop(dict.fromkeys(start.case for _, start in self._running()))

    def _follow(self, value: Tensor, iteration: int) -> None:
        """Keep the objective every `trace_every` evaluations, and some of the best images so far."""
        running = self._running()
        due = [(slot, s) for slot, s in running if (iteration - s.launched) % self.settings.trace_every == 0]
        if due:
            values = value.tolist()
            for slot, start in due:
                start.trace.objectives.append((start.spent(iteration), values[slot]))
        due = [(slot, s) for slot, s in running if s.trace.wants_images(s.spent(iteration))]
        if due:
            index = torch.tensor([slot for slot, _ in due], device=self.distance.device)
            images = self._images(self.rows["own"]["best_x"][index]).clamp(0, 1).half().cpu()
            for (_, start), image in zip(due, images, strict=True):
                start.trace.see(start.spent(iteration), image)

    def _record(self, ended: Sequence[int], codes: Sequence[int], iteration: int, clock: float) -> None:
        """Free these slots and book what they found; then their next stages, or the next starts of their cases."""
        own = self.rows["own"]
        index = torch.tensor(ended, device=self.distance.device)
        points, best = own["best_x"][index], own["best"][index].tolist()
        found, last = self._images(points).float().clamp(0, 1).cpu(), own["x"][index, self.pixels :].cpu()
        for place, slot in enumerate(ended):
            start = self.slots[slot]
            assert start is not None
            self.slots[slot] = None
            case, reason = start.case, REASONS[codes[slot] or _STALLED]
            assert reason is not None
            case.evaluations += iteration - start.launched
            case.seconds += clock - start.clock
            given_up = start in self.dropped
            self.dropped.discard(start)
            goes_on = start.stage + 1 < len(self.settings.anneal) and not given_up and not self._late()
            if reason != StopReason.DIVERGED and goes_on:
                start.before, start.stage, start.point = start.spent(iteration), start.stage + 1, points[place].clone()
                start.launched, start.clock = 0, 0.0
                self.queue.appendleft(start)
                continue
            start.evaluations, start.objective, start.reason = start.spent(iteration), best[place], reason
            if best[place] < case.best:
                self._keep(start, found[place], points[place, self.pixels :].cpu(), last[place])
            self._launch(case)

    def _keep(self, start: Attempt, images: Tensor, logits: Tensor, last_logits: Tensor) -> None:
        """What a start found is the best of its case so far."""
        case, labels = start.case, start.case.problem.labels
        assert start.reason is not None
        case.best, case.stop_reason, case.trace = start.objective, start.reason, start.trace.objectives
        case.images = images
        if self.settings.trace_every:
            case.snapshots = [row for row in start.trace.snapshots if row[0] < start.evaluations]
            add_snapshot(case.snapshots, start.evaluations, images.half())
        case.details = {"start": start.restart, "candidate": start.candidate}
        if labels is None:
            best, last = (v.unflatten(0, (self.shape[0], -1)).argmax(1) for v in (logits, last_logits))
            case.best_labels = best
            case.details["last_labels"] = " ".join(map(str, last.tolist()))
        else:
            case.best_labels = labels[start.candidate].cpu()

    def _step(self, value: Tensor, gradient: Tensor) -> None:
        """Move every slot's unknowns."""
        own, settings = self.rows["own"], self.settings
        own["x"] = settings.optimizer.step(
            self.rows["optimizer"],
            own["x"],
            value * settings.objective_scale,
            gradient * settings.objective_scale,
            own["evaluations"] / settings.stopping.max_evaluations,
        )
        if settings.project:
            images = self._images(own["x"]).clamp(0, 1)
            own["x"][:, : self.pixels] = self.coordinates.unknowns(images).flatten(1)

    def _fill(self, iteration: int, clock: float) -> None:
        """Put starts that wait into free slots."""
        free = [slot for slot, start in enumerate(self.slots) if start is None]
        fresh = list(zip(free, self.queue, strict=False))
        if not fresh:
            return
        slots = torch.tensor([slot for slot, _ in fresh], device=self.distance.device)
        for kind, new in self._fresh([start for _, start in fresh]).items():
            for name, value in new.items():
                self.rows[kind][name][slots] = value
        for slot, start in fresh:  # only now, lest they be lost where memory does not suffice
            start.launched, start.clock = iteration, clock
            self.slots[slot] = self.queue.popleft()

    def _close(self) -> None:
        """Do without the free slots where they are more than a few."""
        kept = [slot for slot, start in enumerate(self.slots) if start is not None]
        if len(self.slots) - len(kept) > len(self.slots) // 8:
            index = torch.tensor(kept, device=self.distance.device)
            self.rows = {kind: {name: v[index] for name, v in rows.items()} for kind, rows in self.rows.items()}
            self.slots = [self.slots[slot] for slot in kept]
