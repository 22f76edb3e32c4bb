"""GradInversion (Yin 2021): several seeds side by side, drawn to their registered mean, and BatchNorm's statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Run
from fedleak.attacks.batch_norm import Statistics, batch_statistics, running_statistics, sizes_of, statistics_gap
from fedleak.attacks.inversion.cases import unusable
from fedleak.attacks.inversion.distances.base import Rows
from fedleak.attacks.inversion.distances.general import GeneralDistance
from fedleak.attacks.inversion.gradient_matching import GradientMatching
from fedleak.attacks.inversion.objectives import L2
from fedleak.attacks.inversion.optimizers import Adam
from fedleak.attacks.inversion.priors import ImageNorm, TotalVariation
from fedleak.attacks.problem import Problem, pose
from fedleak.attacks.results import Reconstruction
from fedleak.capture import Observation
from fedleak.errors import UsageError


@dataclass(frozen=True, eq=False)
class Seeded(Problem):
    """A problem as one seed sees it.

    Attributes:
        statistics: of BatchNorm's inputs, for the prior.
        mean: ``[B, C, H, W]``, the seeds' registered mean, None before there is one.
        weights: of the statistics' gap and of the mean squared distance from `mean`.
    """

    statistics: Statistics | None = None
    mean: Tensor | None = None
    weights: tuple[float, float] = (0.0, 0.0)


class Guided(GeneralDistance):
    """The distance between updates, with what `Seeded` problems know besides."""

    def load(self, problems: Sequence[Problem]) -> Rows:
        """The problems' own places too."""
        rows = super().load(problems)
        kept: list[Problem] = self.__dict__.setdefault("kept", [])
        rows["seeded"] = torch.arange(len(kept), len(kept) + len(problems), device=self.device)
        kept += problems
        return rows

    def evaluate(
        self, rows: Rows, images: Tensor, labels: Tensor, *, with_labels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value and gradients, the guides' included."""
        value, gradient, by_labels = super().evaluate(rows, images, labels, with_labels=with_labels)
        value, gradient = value.clone(), gradient.clone()
        for row, place in enumerate(rows["seeded"].tolist()):
            problem = self.__dict__["kept"][place]
            assert isinstance(problem, Seeded)
            leaf = images[row].detach().requires_grad_()
            with torch.enable_grad():
                extra = self._guides(problem, leaf)
                gradient[row] += torch.autograd.grad(extra, leaf, allow_unused=True, materialize_grads=True)[0]
            value[row] += extra.detach()
        return value, gradient, by_labels

    def _guides(self, problem: Seeded, images: Tensor) -> Tensor:
        by_statistics, by_mean = problem.weights
        total = 0 * images.sum()
        if problem.statistics and by_statistics:
            target = problem.targets[0]
            own, buffers = self._move(target.parameters), self._move(self._used(target.buffers))
            total = total + by_statistics * statistics_gap(self.model, own, buffers, images, problem.statistics)
        if problem.mean is not None:
            total = total + by_mean * (images - problem.mean.to(images)).square().mean()
        return total


class GradInversion(Inversion):
    """Batches by gradient matching with priors, several seeds made consistent (Yin 2021).

    Relative squared distance of gradients, total variation, image norm, the distance of BatchNorm's statistics from the
    batch's own (recovered from the returned buffers of a train-mode step, the running ones elsewhere), and, in the
    second half, the distance of each seed's images from the seeds' mean, registered by phase correlation. The seed with
    the lowest objective is kept.

    Args:
        seeds: side by side.
        max_evaluations: of a seed, both halves together.
        lr: of Adam, in image units.
        total_variation, image_norm, statistics, consistency: weights.
        trace_every: see `GradientMatching`.
    """

    def __init__(
        self,
        *,
        seeds: int = 4,
        max_evaluations: int = 2000,
        lr: float = 0.1,
        total_variation: float = 0.05,
        image_norm: float = 1e-4,
        statistics: float = 1e-2,
        consistency: float = 0.1,
        trace_every: int = 0,
    ) -> None:
        if seeds < 1 or max_evaluations < 2:
            raise UsageError(
                f"inversion.seeds={seeds}, inversion.max_evaluations={max_evaluations}: must be at least 1 and 2"
            )
        self.seeds = seeds
        self.weights = (statistics, consistency)
        self.matching = GradientMatching(
            objective=L2(relative=True),
            priors=[TotalVariation(weight=total_variation), ImageNorm(weight=image_norm)],
            optimizer=Adam(lr=lr, schedule="drops"),
            start="normal",
            restarts=1,
            max_evaluations=max_evaluations // 2,
            patience=max_evaluations,
            limit=float("inf"),
            objective_scale=1.0,
            project=True,
            trace_every=trace_every,
            distances=[Guided],
        )

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        run: Run,
    ) -> list[Reconstruction]:
        """See `Inversion.invert`; what time is given is shared between the halves."""
        problems = pose(observations, guesses, knowledge)
        half = replace(run, on_result=None, seconds=None if run.seconds is None else run.seconds / 2)
        statistics = {p.index: _statistics(observations[p.index], p, knowledge) for p in problems}
        copies = [
            Seeded(**vars(problem) | {"index": place * self.seeds + seed, "key": _key(problem, seed)})
            for place, problem in enumerate(problems)
            for seed in range(self.seeds)
        ]
        copies = [
            replace(copy, statistics=statistics[problems[copy.index // self.seeds].index], weights=self.weights)
            for copy in copies
        ]
        first = self.matching.solve(copies, knowledge, half)
        means = {
            place: registered([first[place * self.seeds + seed].images for seed in range(self.seeds)])
            for place in range(len(problems))
        }
        copies = [replace(c, start=first[c.index].images, mean=means[c.index // self.seeds]) for c in copies]
        second = self.matching.solve(copies, knowledge, half)
        results: dict[int, list[Reconstruction]] = {}
        for place, problem in enumerate(problems):
            each = [second[place * self.seeds + seed] for seed in range(self.seeds)]
            best = min(range(self.seeds), key=lambda seed: each[seed].objective)
            both = each + [first[place * self.seeds + seed] for seed in range(self.seeds)]
            found = replace(
                each[best],
                evaluations=sum(one.evaluations for one in both),
                seconds=sum(one.seconds for one in both),
                restarts=self.seeds,
                details={"method": "gradinversion", "seed": best},
            )
            results.setdefault(problem.index, []).append(found)
        return [self._finish(i, o, results.get(i), knowledge, run) for i, o in enumerate(observations)]

    def _finish(
        self, index: int, observation: Observation, parts: list[Reconstruction] | None, knowledge: Knowledge, run: Run
    ) -> Reconstruction:
        if parts is None:
            result = unusable(observation, knowledge.image_shape)
        else:
            images, labels = (torch.cat(v) for v in zip(*((p.images, p.labels) for p in parts), strict=True))
            result = replace(max(parts, key=lambda part: part.objective), images=images, labels=labels)
        if run.on_result is not None:
            run.on_result(index, result)
        return result


def _key(problem: Problem, seed: int) -> tuple[int, int, int]:
    """Draws of a seed's own."""
    server_round, client, sample = problem.key
    return server_round, client, sample + 1_000_000 * seed


def _statistics(observation: Observation, problem: Problem, knowledge: Knowledge) -> Statistics | None:
    """What is known of BatchNorm's inputs."""
    target = problem.targets[0]
    returned: Mapping[str, Tensor] = observation.buffers or {}
    if returned and target.training.single and target.training.training_mode:
        sizes = sizes_of(knowledge.model, (problem.samples, *knowledge.image_shape))
        found = batch_statistics(knowledge.model, target.buffers, returned, sizes)
        if found is not None:
            return found
    return running_statistics(knowledge.model, target.buffers) or None


def registered(images: Sequence[Tensor]) -> Tensor:
    """The mean ``[B, C, H, W]`` of seeds' images, each moved to where it agrees best with the others' mean.

    Shifts are whole pixels, by phase correlation (Kuglin & Hines 1975).
    """
    stack = torch.stack(list(images))
    mean = stack.mean(0)
    spectrum = torch.fft.fft2(mean.mean(1))
    moved = torch.empty_like(stack)
    for seed, each in enumerate(stack):
        cross = spectrum * torch.fft.fft2(each.mean(1)).conj()
        peak = torch.fft.ifft2(cross / cross.abs().clamp(min=1e-12)).real.flatten(1).argmax(1)
        for sample, place in enumerate(peak.tolist()):
            shift = divmod(place, each.shape[-1])
            moved[seed, sample] = each[sample].roll(shift, (-2, -1))
    return moved.mean(0)
