"""Features first, gradients with them, then cooler: images behind an update of a network with pooling and ReLUs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Run
from fedleak.attacks.chain import Layer, read_layers
from fedleak.attacks.chain.convolution import Convolution
from fedleak.attacks.chain.fully_connected import FullyConnected
from fedleak.attacks.image_prior import ImagePrior
from fedleak.attacks.inversion.cases import unusable
from fedleak.attacks.inversion.features.body import Body
from fedleak.attacks.inversion.features.hunt import Hunt
from fedleak.attacks.inversion.features.search import Cooling
from fedleak.attacks.inversion.features.undo import undoable
from fedleak.attacks.inversion.features.unwind import Unwound, separate_batch, split_batch, unwind
from fedleak.attacks.inversion.map.attack import image_prior
from fedleak.attacks.problem import Problem, pose
from fedleak.attacks.results import Progress, Reconstruction, StopReason
from fedleak.attacks.row_space import batch_features
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.seeding import generator
from fedleak.training import LocalTraining

_CONVERGED = 1e-4
"""Of the relative misfit: what local minima leave is ten times as much."""
_PLANNED = 0.7
"""Of the time that is given, what is planned for; the clock ends a search only on slower machines."""
_SIDE_BY_SIDE = 2
_UNLIMITED = 2**31
"""Evaluations, where no time is planned."""
_SOUND = 0.02
"""Of the relative gap of the fully connected layers' gradients, up to which what was unwound is believed."""


_UNFIT = (
    "attack.inversion=features takes updates of one local step through a chain of convolutions and fully connected "
    "layers that unwind, and not these {} samples of this model; choose attack=fedleak, which takes what fits"
)


class FeaturesFirst(Inversion):
    """Images from their exact features, the loss's derivatives by these, and the convolutions' gradients.

    Fully connected layers unwind in closed form, see `unwind`: one sample's always, a batch's where the inputs of the
    last layer are known or row-space matching finds them. What is left is a search through the convolutions alone,
    without the layers above. ReLUs and poolings make it a combinatorial one: gates and winners are taken as
    probabilities that harden as the search cools, see `Body`. A convolution whose winners are all found is undone in
    closed form, and the search goes on below it, see `undo_convolution`.

    Args:
        starts: batches to begin with, at most, two at a time until one converges; every other one auxiliary images with
            the nearest features where such are granted, the rest drawn from the prior.
        stages, evaluations: temperatures, and evaluations at each, at most.
        least: evaluations at each temperature, at least, where time is short.
        prior: ``auto`` takes auxiliary images where they are granted, ``natural`` a spectrum of natural images.
    """

    def __init__(
        self, *, starts: int = 8, stages: int = 10, evaluations: int = 60, least: int = 30, prior: str = "auto"
    ) -> None:
        bounds = (("starts", starts, 1), ("stages", stages, 3), ("evaluations", evaluations, 1), ("least", least, 1))
        for name, value, smallest in bounds:
            if value < smallest:
                raise UsageError(f"inversion.{name}={value}: must be at least {smallest}")
        if prior not in ("auto", "natural"):
            raise UsageError(f"inversion.prior={prior}: choose one of auto, natural")
        self.starts, self.least, self.prior = starts, least, prior
        self.cooling = Cooling(stages=stages, evaluations=evaluations)

    def check_model(self, knowledge: Knowledge, training: LocalTraining) -> None:
        """See `Inversion.check_model`."""
        model = copy.deepcopy(knowledge.model).cpu().train(training.training_mode)
        if not training.single or read_layers(model, knowledge.image_shape) is None:
            raise UsageError(_UNFIT.format(training.samples))

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        run: Run,
    ) -> list[Reconstruction]:
        """See `Inversion.invert`; `objective` is the relative misfit of features and gradients.

        Raises:
            UsageError: an update is not of one local step, or the model is no chain of convolutions that ends in fully
                connected layers which unwind.
        """
        problems = pose(observations, guesses, knowledge)
        layers = chain_of(knowledge, observations)
        unwound = [None if layers is None else unwound_of(problem, layers) for problem in problems]
        for problem, found in zip(problems, unwound, strict=True):
            if found is None:
                raise UsageError(_UNFIT.format(problem.samples))
        sound = [found for found in unwound if found is not None]
        parts = self.solve(problems, sound, layers or [], knowledge, replace(run, on_result=None))
        results = []
        for index, observation in enumerate(observations):
            of_one = [part for problem, part in zip(problems, parts, strict=True) if problem.index == index]
            results.append(joined(of_one) if of_one else unusable(observation, knowledge.image_shape))
            if run.on_result is not None:
                run.on_result(index, results[-1])
        return results

    def solve(
        self,
        problems: Sequence[Problem],
        unwound: Sequence[Unwound],
        layers: Sequence[Layer],
        knowledge: Knowledge,
        run: Run,
        *,
        planned: float | None = None,
    ) -> list[Reconstruction]:
        """Each problem's reconstruction, in order; time is shared out among those that are left.

        Args:
            problems, unwound: as many, see `unwound_of`.
            layers: from `chain_of`.
            knowledge, run: as for `invert`; `run.on_result` is called with a problem's place.
            planned: seconds to plan for where `run` gives none.
        """
        prior = image_prior(knowledge, self.prior).to(run.device)
        planned = run.seconds if run.seconds is not None else planned
        each = None if planned is None else _PLANNED * planned / len(problems)
        began, done = time.perf_counter(), list[Reconstruction]()
        for place, (problem, found) in enumerate(zip(problems, unwound, strict=True)):
            share = None
            if run.seconds is not None:
                share = (run.seconds - (time.perf_counter() - began)) / (len(problems) - place)
            done.append(self._one(problem, found, layers, knowledge, prior, run, each, share))
            if run.on_result is not None:
                run.on_result(place, done[-1])
            if run.on_progress is not None:
                run.on_progress(_progress(done, len(problems), time.perf_counter() - began))
        return done

    def _plan(self, body: Body, batch: int, seconds: float | None) -> tuple[int, Cooling, int]:
        """Starts of an attempt, its cooling, and evaluations in all that about fit the time on an ordinary core.

        A plan depends on no clock, so that it repeats.
        """
        cooling, side = self.cooling, min(self.starts, _SIDE_BY_SIDE)
        if seconds is None:
            return side, cooling, _UNLIMITED
        most, searches = int(seconds / (_seconds_of(body.layers) * batch)), 2 if undoable(body, batch) else 1
        each = searches * cooling.stages * cooling.evaluations
        side = max(1, min(side, most // each))
        return (
            side,
            replace(
                cooling,
                evaluations=max(self.least, min(cooling.evaluations, most * cooling.evaluations // (each * side))),
            ),
            most,
        )

    def _one(
        self,
        problem: Problem,
        unwound: Unwound,
        layers: Sequence[Layer],
        knowledge: Knowledge,
        prior: ImagePrior,
        run: Run,
        planned: float | None,
        seconds: float | None,
    ) -> Reconstruction:
        began = time.perf_counter()
        if unwound.bare:
            return _at_once(problem, unwound, knowledge)
        target = problem.targets[0]
        device = torch.device(run.device)
        features, by_features = (v.to(device, torch.float32) for v in (unwound.features, unwound.by_features))
        weights = {n: target.parameters[n].detach().to(features) for n in unwound.names}
        body = Body(unwound.body, weights, knowledge.image_shape, features, by_features)
        gradients = {n: target.update[n].to(device) for n in unwound.names}
        side, cooling, most = self._plan(body, problem.samples, planned)

        def late() -> bool:
            return seconds is not None and time.perf_counter() - began > seconds

        z = self._points(problem, body, features, knowledge, prior, run.seed).to(features)
        found = Hunt(body, features, gradients, prior, cooling, late).run(z.split(side), most)
        level = found.misfit
        reason = StopReason.CONVERGED if level <= _CONVERGED else StopReason.BUDGET if late() else StopReason.STALLED
        return Reconstruction(
            round=problem.key[0],
            client=problem.key[1],
            images=found.images.clamp(0, 1).float().cpu(),
            labels=label_of(problem, layers) if unwound.labels is None else unwound.labels,
            objective=level,
            evaluations=found.evaluations,
            seconds=time.perf_counter() - began,
            stop_reason=reason,
            restarts=found.starts,
            trace=found.trace,
            snapshots=found.snapshots,
            details={"method": "features", "undone": found.below, "unwound_error": unwound.error},
        )

    def _points(
        self,
        problem: Problem,
        body: Body,
        features: Tensor,
        knowledge: Knowledge,
        prior: ImagePrior,
        seed: int,
    ) -> Tensor:
        """The prior's coordinates ``[S, B, D]`` that starts begin with."""
        random = generator(seed, "features", *problem.key)
        shape = (self.starts, problem.samples, prior.root.shape[0])
        z = 0.5 * torch.randn(shape, generator=random, dtype=torch.float64).to(prior.mean)
        if self.prior == "natural" or knowledge.auxiliary is None or not len(knowledge.auxiliary[0]):
            return z
        images = knowledge.auxiliary[0].to(features)
        with torch.no_grad():
            far = torch.cdist(features, torch.cat([body.features(some) for some in images.split(256)]))
        nearest = far.argsort(1)[:, : (self.starts + 1) // 2]  # [B, S/2]
        z[: 2 * nearest.shape[1] : 2] = prior.coordinates(images[nearest.T].double())
        return z


def _at_once(problem: Problem, unwound: Unwound, knowledge: Knowledge) -> Reconstruction:
    """Images that are the features themselves."""
    assert unwound.labels is not None
    return Reconstruction(
        round=problem.key[0],
        client=problem.key[1],
        images=unwound.images(knowledge.image_shape).clamp(0, 1).float(),
        labels=unwound.labels,
        objective=unwound.error**2,
        evaluations=0,
        seconds=0.0,
        stop_reason=StopReason.CONVERGED,
        details={"method": "features", "unwound_error": unwound.error},
    )


def chain_of(knowledge: Knowledge, observations: Sequence[Observation]) -> list[Layer] | None:
    """The model's layers in the mode that its clients trained it in, if it is a chain."""
    modes = {o.training.training_mode for o in observations if o.error is None}
    if len(modes) != 1:
        return None
    model = copy.deepcopy(knowledge.model).cpu().train(modes == {True})
    return read_layers(model, knowledge.image_shape)


def unwound_of(problem: Problem, layers: Sequence[Layer]) -> Unwound | None:
    """What of a problem's update unwinds; None where it does not, or not down to a body of convolutions.

    A batch is separated by its layers' row and column spaces, or split by its ReLUs' zeros; where that fails, its last
    inputs are those of the label inference where it found them, else row-space matching's, for as many as half the
    classes.
    """
    target, last, labels = problem.targets[0], problem.features, None
    if len(problem.targets) > 1 or not target.training.single:
        return None
    if problem.samples > 1:
        known = None if problem.labels is None else problem.labels[0]
        whole = separate_batch(layers, target, problem.samples, known)
        if whole is None:
            whole = split_batch(layers, target, problem.samples)
        if whole is not None and (whole.bare or Body.supported(whole.body)):
            return whole
        if problem.labels is None:
            return None
        labels = problem.labels[0].cpu()
        last = _last_inputs(problem, layers, labels) if last is None else last
        if last is None:
            return None
    else:
        last = None
    found = unwind(layers, target, labels, last)
    return found if found is not None and found.error < _SOUND and Body.supported(found.body) else None


def _last_inputs(problem: Problem, layers: Sequence[Layer], labels: Tensor) -> Tensor | None:
    layer, target = layers[-1], problem.targets[0]
    if not isinstance(layer, FullyConnected) or layer.bias is None or 2 * len(labels) > layer.shape[0]:
        return None
    (weight, bias), (by_weight, by_bias) = (
        [tensors[name].detach().cpu()[None] for name in (layer.weight, layer.bias)]
        for tensors in (target.parameters, target.update)
    )
    return batch_features(weight, bias, by_weight, by_bias, labels[None]).features[0]


def label_of(problem: Problem, layers: Sequence[Layer]) -> Tensor:
    """The inferred labels, or that of the sign rule: the one negative derivative by the logits."""
    if problem.labels is not None:
        return problem.labels[0].cpu()
    bias = problem.targets[0].update[layers[-1].parameters[-1]]
    return bias.argmin().reshape(1).cpu()


def joined(parts: Sequence[Reconstruction]) -> Reconstruction:
    """Samples of one observation, each with a gradient of its own, as one reconstruction."""
    first = parts[0]
    if len(parts) == 1:
        return first
    worst = max(parts, key=lambda part: part.objective)
    return Reconstruction(
        round=first.round,
        client=first.client,
        images=torch.cat([part.images for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        objective=sum(part.objective for part in parts) / len(parts),
        evaluations=sum(part.evaluations for part in parts),
        seconds=sum(part.seconds for part in parts),
        stop_reason=worst.stop_reason,
        restarts=first.restarts,
        details={"method": "features"},
    )


def _seconds_of(layers: Sequence[Layer]) -> float:
    """About how long an ordinary core takes to evaluate one image: ten times the products, and calls."""
    products = 0
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, Convolution) and after is not None:
            products += math.prod(after.in_shape) * layer.in_shape[0] * math.prod(layer.kernel)
    return 2e-4 + 10 * products / 2e9


def _progress(done: Sequence[Reconstruction], problems: int, seconds: float) -> Progress:
    evaluations = sum(result.evaluations for result in done)
    return Progress(
        problems=problems,
        done=len(done),
        converged=sum(result.converged for result in done),
        diverged=0,
        median_objective=sorted(result.objective for result in done)[len(done) // 2],
        evaluations=evaluations,
        evaluations_per_second=evaluations / max(seconds, 1e-9),
    )
