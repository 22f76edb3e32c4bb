"""How much the updates of a run can leak at most: a few of them, evenly spread, as far as seconds allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedleak.attacks import Knowledge
from fedleak.attacks.image_prior import ImagePrior
from fedleak.attacks.inversion.map.attack import image_prior
from fedleak.attacks.jacobian.models import update_model
from fedleak.attacks.noise import Noise, noise_of
from fedleak.attacks.problem import Target, imitating
from fedleak.capture import Observation
from fedleak.defenses import Defense
from fedleak.defenses.base import ClientView
from fedleak.limit import Limit, limit
from fedleak.training import LocalTraining
from fedleak.truth import Truth

_WORK = 4e11
"""Products that all limits of a run may cost, the first apart: some ten seconds on two cores."""
_FIRST = 1e12
"""Products that the first may cost: twenty seconds."""
_UNKNOWNS = 6400
"""Unknowns of one update, at most: their matrix takes 330 MB."""


def limits_of(
    observations: Sequence[Observation],
    truths: Sequence[Truth | None],
    knowledge: Knowledge,
    training: LocalTraining,
    defense: Defense,
) -> dict[int, Limit]:
    """index -> limit, for as many of N updates as the time allows, evenly spread.

    The prior is the attacker's: of auxiliary images where it was granted some. Noise is what the defense leaves, and
    rounding as it is at the true images. Left out are updates without a truth, those with a gradient for every sample,
    and defenses whose noise is not known.

    Args:
        observations, truths: N of each.
        knowledge: what the attacker held.
        training: how the clients really trained.
        defense: what they really did to their updates.
    """
    usable = [i for i, (o, t) in enumerate(zip(observations, truths, strict=True)) if _fits(o, t, training, defense)]
    if not usable:
        return {}
    truth = truths[usable[0]]
    assert truth is not None
    size = torch.Size(knowledge.image_shape).numel()
    unknowns, numbers = len(truth.labels) * size, sum(p.numel() for p in knowledge.model.parameters())
    cost = unknowns**2 * (numbers + unknowns)
    cost *= 1 if training.single else 4  # derivatives through a client's own loop
    feasible = unknowns <= _UNKNOWNS and cost <= _FIRST
    count = min(len(usable), max(1, int(_WORK // cost))) if feasible else 0
    chosen = [usable[round(k * (len(usable) - 1) / max(1, count - 1))] for k in range(count)]
    if not chosen:
        return {}
    prior = image_prior(knowledge)
    found = {}
    for index in dict.fromkeys(chosen):
        truth = truths[index]
        assert truth is not None
        found[index] = limit_of(observations[index], truth, knowledge, training, defense, prior)
    return found


def limit_of(
    observation: Observation,
    truth: Truth,
    knowledge: Knowledge,
    training: LocalTraining,
    defense: Defense,
    prior: ImagePrior,
) -> Limit:
    """The limit of one update, under what a client's defense and rounding left between it and its true images."""
    training = replace(training, local_steps=truth.local_steps, batch_size=len(truth.labels) // truth.local_steps)
    training = replace(training, optimizer=observation.training.optimizer or training.optimizer)  # of this round
    gradient = training.mean_gradient(observation.parameters, observation.update)
    target = Target(observation.parameters, observation.start_buffers, gradient, training)
    scale = training.scale or 1.0
    known = defense.seeing(ClientView(target.parameters, target.buffers))
    imitation = known.imitate({n: training.sign * scale * v for n, v in gradient.items()}, training)
    assert imitation is not None
    spread = imitation.spread  # where guesses that agree look all alike, what is left open counts as noise
    if spread is None:
        target = imitating(target, defense)
    else:
        target = replace(target, noise={name: std / scale for name, std in spread.items()})
    noise = noise_of(target, len(truth.labels))
    rounded = _rounding(target, truth, knowledge)
    if training.payload == "gradient":
        noise = Noise({n: _at_least(noise.std[n], target, n, rounded[n]) for n in noise.std}, True)
    return limit(knowledge.model, target, truth.images, truth.labels, prior, noise, unknowns=_UNKNOWNS)


def _fits(observation: Observation, truth: Truth | None, training: LocalTraining, defense: Defense) -> bool:
    seen = defense.seeing(ClientView(observation.parameters, observation.start_buffers))
    known = seen.imitate({n: torch.zeros_like(v) for n, v in observation.update.items()}, training)
    plain = observation.error is None and not training.per_sample and len(observation.clients) <= 1
    return plain and truth is not None and known is not None and (not defense.per_example or training.samples == 1)


def _rounding(target: Target, truth: Truth, knowledge: Knowledge) -> dict[str, Tensor]:
    """name -> root mean square of what float32 makes of the true images' gradient, less the gradient."""
    labels = torch.nn.functional.one_hot(truth.labels, knowledge.classes).double()[None]
    found = []
    for dtype in (torch.float32, torch.float64):
        model = update_model(knowledge.model, [target], knowledge.image_shape, dtype=dtype)
        model.at(truth.images[None].double(), labels)
        found.append(model.gradients())
    return {n: (v.double() - found[1][n]).square().mean().sqrt().clamp(min=1e-30) for n, v in found[0].items()}


def _at_least(std: Tensor, target: Target, name: str, rounded: Tensor) -> Tensor:
    """A defense's noise, and rounding as measured instead of as supposed."""
    given = torch.as_tensor(target.noise[name] if target.noise else 0.0, dtype=torch.float64).flatten()
    whole = (given.square() + rounded.square()).sqrt()
    whole = torch.where(std.isfinite(), whole if whole.numel() > 1 or std.dim() else whole[0], torch.inf)
    return whole
