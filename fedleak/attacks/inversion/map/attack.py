"""Maximum a posteriori inversion: starts, labels, the noise's level, and what becomes of every update."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Run
from fedleak.attacks.image_prior import ImagePrior, natural_prior, prior_of_images
from fedleak.attacks.inversion.map.features import images_from_features
from fedleak.attacks.inversion.map.order import in_order
from fedleak.attacks.inversion.map.solution import Solution, reconstruction
from fedleak.attacks.inversion.map.solver import GaussNewton, Settings, State
from fedleak.attacks.inversion.map.verdict import calibrated, drowned, expected, noise_level, reason_of
from fedleak.attacks.inversion.peeling.peeling import closed_form
from fedleak.attacks.jacobian.models import update_model
from fedleak.attacks.noise import Noise, noise_of
from fedleak.attacks.problem import Problem, pose
from fedleak.attacks.results import Progress, Reconstruction, StopReason
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.seeding import generator

_NEAR = 1e-3
"""Relative square of the gap up to which peeled images are worth starting from."""
_TEMPER = 1.5
"""Of the prior on the way: detail that is free too early leads into dead ends."""
_TOGETHER = 2**28
"""Bytes of derivatives in float32 that are held at once; more problems together are no faster on a CPU."""
_PATIENCE = (100, 200)
"""Of the solver, where derivatives go through a loop: the problem is less linear, and old ones serve less long."""
_EACH_STEP = 5
"""Times as long as an update of one step that one of several may take for each of them."""
_LEAST_SECONDS = 15.0
"""Of a call, whatever an update may take."""
_QUICK = 2000
"""Unknowns from which, when time is short, every update is sought coarsely before one is sought to the end."""


class MAP(Inversion):
    """The most likely images under a Gaussian prior, by regularised Gauss-Newton; see `solver`.

    What comes out says whether it is right, without any truth: ``converged`` where the residual is down at the noise,
    and in ``details`` ``expected_mse``, the error of each image that the linearised posterior expects. The noise is
    float32 rounding, with what a defense leaves where that is granted (``threat.defense=true``), can be seen beyond the
    rank of the last layer's gradient, or is left over, white, by every start.

    Labels must be known or inferred; of several candidates the one that explains the update best is kept. An update of
    several local steps is differentiated through the client's own loop, in the order of the labels given; where they
    rise, they are in none, and which of them belong to which step is sought first, see `order`.

    Args:
        restarts: starts of each update, at most; another one follows where one ended in a dead end.
        max_steps: Gauss-Newton steps of a start.
        candidates: label multisets of a guess to try.
        prior: ``auto`` takes auxiliary images where they are granted, ``natural`` a spectrum of natural images.
        seconds: of computing that an update may take, about, on average of a call, which may take 15 in any case; five
            times that for each local step of a client that takes several. None for as long as it needs. When time is
            short every update is sought coarsely, then the most promising to the end.

    References:
        Bakushinskii 1992 (iteratively regularised Gauss-Newton); Tarantola 2005 (linearised posteriors).
    """

    simulates = True
    needs_labels = True

    def __init__(
        self,
        *,
        restarts: int = 4,
        max_steps: int = 40,
        candidates: int = 1,
        prior: str = "auto",
        seconds: float | None = None,
    ) -> None:
        for name, value in (("restarts", restarts), ("max_steps", max_steps), ("candidates", candidates)):
            if value < 1:
                raise UsageError(f"inversion.{name}={value}: must be at least 1")
        if prior not in ("auto", "natural"):
            raise UsageError(f"inversion.prior={prior}: choose one of auto, natural")
        if seconds is not None and not seconds > 0:
            raise UsageError(f"inversion.seconds={seconds}: must be above 0, or null for as long as it takes")
        self.restarts = restarts
        self.seconds = seconds
        self.candidates = candidates
        self.prior = prior
        self.settings = Settings(max_steps=max_steps)

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        run: Run,
    ) -> list[Reconstruction]:
        """Rebuild the private images behind each observation; see `Inversion.invert`.

        Raises:
            UsageError: labels are left open, or an update does not fit the model.
        """
        problems = pose(observations, guesses, knowledge)
        for problem in problems:
            if problem.labels is None:
                raise UsageError("attack.inversion=map needs labels; choose another attack/labels than joint")
        prior = image_prior(knowledge, self.prior).to(run.device)
        solutions: dict[int, dict[int, Solution]] = {index: {} for index in range(len(observations))}
        wanted = Counter(problem.index for problem in problems)
        results: dict[int, Reconstruction] = {}

        def finish(index: int) -> None:
            found = [solution for _, solution in sorted(solutions[index].items())]
            results[index] = reconstruction(observations[index], found, knowledge)
            if run.on_result is not None:
                run.on_result(index, results[index])

        for index in set(solutions) - set(wanted):
            finish(index)
        problems = [in_order(problem, self.candidates, knowledge, prior, run) for problem in problems]
        firsts = closed_form(observations, guesses, knowledge, run.device)
        problems = [replace(p, start=_usable(p, firsts[p.index], knowledge)) for p in problems]
        work = _Work(self, knowledge, prior, run, problems)
        problems = [work.begun(problem, observations[problem.index]) for problem in problems]
        groups = _groups(problems, prior, knowledge)
        if work.seconds is not None:
            groups = work.survey(groups)
        for group in groups:
            for problem, solution in zip(group, work.solve(group), strict=True):
                solutions[problem.index][problem.key[2]] = solution
                if len(solutions[problem.index]) == wanted[problem.index]:
                    finish(problem.index)
        return [results[index] for index in range(len(observations))]


def image_prior(knowledge: Knowledge, kind: str = "auto") -> ImagePrior:
    """What the attacker believes of an image: from auxiliary images where it holds at least two, else natural ones."""
    auxiliary = knowledge.auxiliary
    if kind == "auto" and auxiliary is not None and len(auxiliary[0]) > 1:
        key = (auxiliary[0].data_ptr(), tuple(auxiliary[0].shape))
        if key not in _PRIORS:
            _PRIORS.clear()
            _PRIORS[key] = (auxiliary[0], prior_of_images(auxiliary[0]))
        return _PRIORS[key][1]
    return natural_prior(knowledge.image_shape)


_PRIORS: dict[tuple[int, tuple[int, ...]], tuple[Tensor, ImagePrior]] = {}
"""The last prior that was made, and the images it was made of (kept, so that their address stays theirs)."""


@dataclass(frozen=True)
class _Answer:
    """What P problems of one start came to; see `Solution`."""

    images: Tensor
    expected: Tensor
    reasons: list[StopReason]
    misfit: Tensor
    noise: Tensor
    evaluations: Tensor


class _Work:
    """The problems of one call."""

    def __init__(
        self, attack: MAP, knowledge: Knowledge, prior: ImagePrior, run: Run, problems: Sequence[Problem]
    ) -> None:
        self.attack, self.knowledge, self.prior, self.run, self.count = attack, knowledge, prior, run, len(problems)
        steps = [problem.targets[0].training.steps or 1 for problem in problems]
        effort = sum(1 if count == 1 else _EACH_STEP * count for count in steps)
        # The attack's own limit counts this thread's work, so that what comes out does not depend on how busy the
        # machine is; a user's is of time that passes.
        self.clock = time.thread_time if run.seconds is None else time.perf_counter
        self.began = self.clock()
        self.done: list[Solution] = []
        self.coarse: dict[tuple[int, int, int], Solution] = {}
        self.evaluations = 0
        own = None if attack.seconds is None else max(_LEAST_SECONDS, effort * attack.seconds)
        self.seconds = min((v for v in (own, run.seconds) if v is not None), default=None)

    def late(self) -> bool:
        """Whether the time is over."""
        return self.seconds is not None and self.clock() - self.began > self.seconds

    def begun(self, problem: Problem, observation: Observation) -> Problem:
        """The problem with images to start from, where its samples' features tell them and nothing better is there."""
        if problem.start is not None or self.late() or not _finite(problem):
            return problem
        path = self.prior.tempered(_TEMPER)
        return replace(problem, start=images_from_features(problem, observation, self.knowledge, path, self.run))

    def survey(self, groups: list[list[Problem]]) -> list[list[Problem]]:
        """Seek the leading coordinates of large problems, to start from them; the most promising problems first."""
        promise: list[tuple[float, list[Problem]]] = []
        stages = self.attack.settings.stages
        for group in groups:
            size = self.prior.root.shape[0]
            small = group[0].samples * size < _QUICK or size <= min(stages)
            if small or group[0].start is not None or not _finite(group[0]):
                promise.append((0.0, group))
                continue
            noises = [noise_of(problem.targets[0], problem.samples) for problem in group]
            found = self._start(group, noises, 0, last=min(stages))
            self.coarse |= {problem.key: solution for problem, solution in zip(group, found, strict=True)}
            started = [replace(p, start=s.images) for p, s in zip(group, found, strict=True)]
            promise.append((min(solution.left for solution in found), started))
        return [group for _, group in sorted(promise, key=lambda pair: pair[0])]

    def solve(self, problems: list[Problem]) -> list[Solution]:
        """Solutions of problems of equal size, each after as many starts as it takes."""
        shape = (problems[0].samples, *self.knowledge.image_shape)
        nothing = [Solution(torch.full(shape, 0.5), _labels(problem, 0)) for problem in problems]
        best = [self.coarse.get(p.key, none) for p, none in zip(problems, nothing, strict=True)]
        if not _finite(problems[0]):  # and so all of them, see `_groups`
            return best
        noises = [noise_of(problem.targets[0], problem.samples) for problem in problems]
        waiting = [i for i, solution in enumerate(best) if solution.reason != StopReason.CONVERGED]
        for attempt in range(self.attack.restarts * self.attack.candidates):
            some = [i for i in waiting if attempt < self.attack.restarts * self._candidates(problems[i])]
            if not some or (self.late() and all(best[i].starts for i in some)):
                break
            for index, solution in zip(
                some, self._start([problems[i] for i in some], [noises[i] for i in some], attempt), strict=True
            ):
                before = best[index]
                spent = before.evaluations + solution.evaluations, before.seconds + solution.seconds
                if before.starts == 0 or solution.misfit < before.misfit:
                    best[index] = solution
                best[index].evaluations, best[index].seconds = spent
                best[index].starts = attempt + 1
            waiting = [i for i in some if best[i].reason != StopReason.CONVERGED]
        self.done += best
        return best

    def _candidates(self, problem: Problem) -> int:
        assert problem.labels is not None
        return min(self.attack.candidates, len(problem.labels))

    def _start(
        self, problems: list[Problem], noises: list[Noise], attempt: int, last: int | None = None
    ) -> list[Solution]:
        """One start of each problem, all together; of the first `last` coordinates only, where that is given."""
        began = time.perf_counter()
        device, prior = torch.device(self.run.device), self.prior
        chosen = [attempt % self._candidates(problem) for problem in problems]
        labels = torch.stack([_labels(p, c) for p, c in zip(problems, chosen, strict=True)])
        path = prior.tempered(_TEMPER)
        solver = self._solver(problems, noises, labels, path)
        begin = torch.stack([self._point(problem, path, attempt) for problem in problems]).to(device)
        trace: list[tuple[Tensor, Tensor, Tensor]] = []

        def on_step(state: State) -> bool:
            trace.append((state.evaluations.cpu(), state.misfit.cpu(), solver.images(state.z).half().cpu()))
            self._progress(state)
            return self.late()

        state = solver.start(begin)
        first = state.misfit
        if not (self.late() and all(problem.start is not None for problem in problems)):
            state = solver.run(state, on_step=on_step, last=last)
        answer = self._judged(solver, state, noises, last)
        seconds = (time.perf_counter() - began) / len(problems)
        spent = state.evaluations + answer.evaluations
        self.evaluations += int(spent.sum())
        return [
            Solution(
                answer.images[i].cpu(),
                labels[i],
                misfit=float(answer.misfit[i]),
                reason=answer.reasons[i],
                expected=answer.expected[i].cpu(),
                noise=float(answer.noise[i]),
                left=float(state.misfit[i] / first[i]),
                evaluations=int(spent[i]),
                seconds=seconds,
                starts=1,
                start=attempt,
                candidate=chosen[i],
                trace=[(int(e[i]), float(m[i])) for e, m, _ in trace],
                snapshots=_few([(int(e[i]), x[i].float().clamp(0, 1).half()) for e, _, x in trace]),
            )
            for i in range(len(problems))
        ]

    def _solver(self, problems: list[Problem], noises: list[Noise], labels: Tensor, prior: ImagePrior) -> GaussNewton:
        device, targets = torch.device(self.run.device), [problem.targets[0] for problem in problems]
        observed = {
            n: torch.stack([t.update[n].double().flatten() for t in targets]).to(device) for n in targets[0].update
        }
        exact, rough = (
            update_model(self.knowledge.model, targets, self.knowledge.image_shape, device=device, dtype=dtype)
            for dtype in (torch.float64, torch.float32)
        )
        hot = one_hot(labels.to(device), self.knowledge.classes).double()
        settings = self.attack.settings
        if not targets[0].training.single:
            settings = replace(settings, patience=_PATIENCE, draws=2)
        return GaussNewton(exact, rough, observed, _stack(noises, device), hot, prior, settings)

    def _judged(self, solver: GaussNewton, state: State, noises: list[Noise], last: int | None) -> _Answer:
        """The answer under the prior as it is and noise as large as it turned out, and what it is worth.

        One that does not explain its update promises nothing, and is expected to be as wrong as the prior's mean.
        """
        rounding = solver.rounding(state)
        precision, misfit = calibrated(solver, state, rounding, noises)
        ended = solver.settled(state) & (last is None)
        reasons = [
            reason_of(solver, state, i, noises[i], level, bool(ended[i])) for i, level in enumerate(misfit.tolist())
        ]
        spent = torch.zeros_like(state.evaluations)
        errors = self.prior.variance.mean().expand(state.z.shape[:2]).clone()
        explained = torch.tensor([reason == StopReason.CONVERGED for reason in reasons], device=errors.device)
        if not bool(explained.any()):
            images = solver.images(state.z).float().clamp(0, 1)
            return _Answer(images, errors, reasons, misfit, noise_level(precision), spent)
        path = solver.prior
        solver.weigh(precision)
        solver.believe(self.prior)
        moved = solver.start(state.z * (path.variance / self.prior.variance).sqrt()[: state.z.shape[2]])
        moved = solver.run(moved, last=last)
        spent = moved.evaluations
        posterior, told = expected(solver, moved, rounding, self.prior)
        errors = torch.where(explained[:, None], posterior, errors)
        images = solver.images(moved.z).float().clamp(0, 1)
        for place in drowned(solver, moved, precision, told, noises).nonzero()[:, 0].tolist():
            images[place] = self.prior.images(torch.zeros_like(moved.z[place, :, :1])).float().clamp(0, 1)
            errors[place] = self.prior.variance.mean()
            reasons[place] = StopReason.NO_SIGNAL
        return _Answer(images, errors, reasons, misfit, noise_level(precision), spent)

    def _point(self, problem: Problem, path: ImagePrior, attempt: int) -> Tensor:
        """Coordinates ``[B, K]`` that a start begins with: images from elsewhere, or noise about the prior's mean."""
        width = min([*self.attack.settings.stages, path.root.shape[0]])
        if attempt == 0 and problem.start is not None:
            whole = path.coordinates(problem.start.to(path.mean))
            return whole[:, :width] if problem.key in self.coarse else whole
        size = 0.1 if attempt < self._candidates(problem) else 0.5
        random = generator(self.run.seed, "map", *problem.key, attempt)
        return size * torch.randn(problem.samples, width, generator=random, dtype=torch.float64).to(path.mean)

    def _progress(self, state: State) -> None:
        if self.run.on_progress is None:
            return
        evaluations = self.evaluations + int(state.evaluations.sum())
        spent = max(self.clock() - self.began, 1e-9)
        converged = sum(solution.reason == StopReason.CONVERGED for solution in self.done)
        level = float(state.misfit.median())
        self.run.on_progress(
            Progress(self.count, len(self.done), converged, 0, level, evaluations, evaluations / spent)
        )


def _stack(noises: Sequence[Noise], device: torch.device) -> dict[str, Tensor]:
    """Precisions, name -> ``[P]``, or ``[P, n]`` where any problem's differ within the tensor."""
    each = [noise.precision() for noise in noises]
    stacked = {}
    for name in each[0]:
        values = [precision[name] for precision in each]
        longest = max(value.numel() for value in values)
        if longest > 1:
            values = [value.expand(longest) for value in values]
        stacked[name] = torch.stack(values).to(device)
    return stacked


def _labels(problem: Problem, candidate: int) -> Tensor:
    assert problem.labels is not None
    return problem.labels[candidate].cpu()


def _usable(problem: Problem, images: Tensor | None, knowledge: Knowledge) -> Tensor | None:
    """Peeled images ``[B, C, H, W]`` of a problem, where their update comes near the observed one."""
    if images is None or problem.labels is None or len(images) != problem.samples or not _finite(problem):
        return None
    target = problem.targets[0]
    model = update_model(knowledge.model, [target], knowledge.image_shape)
    model.at(images[None].double(), one_hot(problem.labels[:1].cpu(), knowledge.classes).double())
    found, wanted = model.gradients(), {n: v.double().flatten().cpu() for n, v in target.update.items()}
    gap = sum(float((found[n][0] - wanted[n]).square().sum()) for n in wanted)
    return images if gap < _NEAR * sum(float(v.square().sum()) for v in wanted.values()) else None


def _finite(problem: Problem) -> bool:
    return all(bool(v.isfinite().all()) for t in problem.targets for v in (*t.update.values(), *t.parameters.values()))


def _groups(problems: list[Problem], prior: ImagePrior, knowledge: Knowledge) -> list[list[Problem]]:
    """Problems that are solved together: as many samples and trained alike, and as many as memory holds."""
    numbers = sum(p.numel() for p in knowledge.model.parameters())
    groups: dict[object, list[Problem]] = {}
    for problem in problems:
        key = (problem.samples, problem.targets[0].training, problem.start is None, _finite(problem))
        groups.setdefault(key, []).append(problem)
    found = []
    for group in groups.values():
        unknowns = group[0].samples * prior.root.shape[0]
        each = max(1, _TOGETHER // (4 * unknowns * (numbers + unknowns)))
        found += [group[first : first + each] for first in range(0, len(group), each)]
    return found


def _few(rows: list[tuple[int, Tensor]], most: int = 8) -> list[tuple[int, Tensor]]:
    """At most so many, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
