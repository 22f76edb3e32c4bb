"""What an inversion has to solve: unknown images, and one or more updates that they must explain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedleak.attacks.base import Knowledge, LabelGuess
from fedleak.capture import Observation
from fedleak.defenses.base import ClientView, Defense
from fedleak.defenses.masking import Mask
from fedleak.errors import UsageError
from fedleak.training import LocalTraining, Tensors


@dataclass(frozen=True, eq=False)
class Target:
    """One observed update that the images of a problem must explain.

    Attributes:
        parameters: name -> tensor, where the client started from.
        buffers: name -> tensor, the model's buffers there.
        update: name -> tensor, the mean gradient that the client sent, in the convention of `torch.autograd` and the
            order of the model's parameters; see `LocalTraining.mean_gradient`, which also makes one of what
            `fedleak.training.unroll` gives for the sought images.
        training: how the client trained, as far as it is known.
        imitate: what the client's defense makes of such a mean gradient, without its noise; differentiable. None where
            the defense is not known: then as if there were none.
        noise: name -> standard deviation, a number or one for each element, that the defense left between `imitate` of
            the true mean gradient and `update`; None where it is not known.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    update: Mapping[str, Tensor]
    training: LocalTraining
    imitate: Callable[[Tensors], Tensors] | None = None
    noise: Mapping[str, Tensor | float] | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """B unknown images and what is known of them.

    Attributes:
        index: of the observation, or the first of them, that it comes from.
        key: (round, client, sample), which with the seed decides all random draws.
        targets: the updates, all of the same images.
        samples: B.
        labels: ``[K, B]`` int64, label multisets to try, most likely first; None where labels are sought too.
        features: ``[B, d]``, inputs of the last layer in the order of the first labels, where they are known.
        start: ``[B, C, H, W]``, images to begin with; None for any.
    """

    index: int
    key: tuple[int, int, int]
    targets: tuple[Target, ...]
    samples: int
    labels: Tensor | None = None
    features: Tensor | None = None
    start: Tensor | None = None


def pose(
    observations: Sequence[Observation], guesses: Sequence[LabelGuess | None], knowledge: Knowledge
) -> list[Problem]:
    """One problem for each observation, or one for each sample where every sample's gradient is shared.

    Observations with an error pose none.

    Args:
        observations: N observations.
        guesses: N label guesses; None leaves the labels to the inversion.
        knowledge: the model, and the clients' defense where that is known.

    Raises:
        UsageError: there is not one guess an observation, an update does not fit the model, or how many samples are
            behind it is withheld.
    """
    if len(observations) != len(guesses):
        raise UsageError(f"invert: {len(observations)} observations but {len(guesses)} label guesses; give one each")
    problems = []
    for index, (observation, guess) in enumerate(zip(observations, guesses, strict=True)):
        if observation.error is not None:
            continue
        who = f"observation of round {observation.round} client {observation.client}"
        targets = list(_targets(observation, knowledge, who))
        each = [None if guess is None else guess.labels] * len(targets)
        features = None if guess is None else guess.features
        if observation.training.per_sample and guess is not None:
            each = _labels_per_sample(observation.gradient(), guess.best, knowledge.classes)
            features = None  # whose they are is not known
        for sample, (target, labels) in enumerate(zip(targets, each, strict=True)):
            key = (observation.round, observation.client, sample)
            size = _size(target.training, labels, who)
            problems.append(Problem(index, key, (target,), size, labels, features))
    return problems


def _targets(observation: Observation, knowledge: Knowledge, who: str) -> Iterator[Target]:
    """The update of an observation, or each sample's."""
    o, training = observation, observation.training
    updates: list[Mapping[str, Tensor]] = [o.update]
    if training.per_sample:
        samples = len(next(iter(o.update.values())))
        updates = [{name: value[i] for name, value in o.update.items()} for i in range(samples)]
        training = replace(training, batch_size=1, per_sample=False)
    order = [name for name, _ in knowledge.model.named_parameters()]
    for update in updates:
        gradient = training.mean_gradient(o.parameters, update)
        check_update(knowledge.model, o.parameters, gradient, who)
        target = Target(o.parameters, o.start_buffers, {name: gradient[name] for name in order}, training)
        yield target if knowledge.defense is None else imitating(target, knowledge.defense)


def imitating(target: Target, defense: Defense) -> Target:
    """The target with the defense's imitation, from the units of what is sent to those of the mean gradient."""
    training = target.training
    if training.scale is None:
        return target
    factor = training.sign * training.scale
    known = defense.seeing(ClientView(target.parameters, target.buffers))
    found = known.imitate({name: factor * value for name, value in target.update.items()}, training)
    if found is None:
        return target
    function = found.function
    noise = None if found.noise is None else {n: std / training.scale for n, std in found.noise.items()}
    if isinstance(function, Mask):  # whatever the units; fast paths know of places alone
        update = {n: value / function.factor for n, value in target.update.items()}
        noise = None if noise is None else {n: std / function.factor for n, std in noise.items()}
        return replace(target, update=update, imitate=Mask(function.kept), noise=noise)

    def imitate(gradient: Tensors) -> Tensors:
        return {n: v / factor for n, v in function({n: factor * v for n, v in gradient.items()}).items()}

    same = function is dict  # as of noise: fast paths need not know
    return replace(target, imitate=None if same else imitate, noise=noise)


def _size(training: LocalTraining, labels: Tensor | None, who: str) -> int:
    if training.steps is None:
        raise UsageError(
            f"inversion: the number of local steps behind the {who} is withheld; grant it with "
            "threat.hyperparameters=true, or attack by `fedleak.attacks.Attack`, which assumes one and says so"
        )
    if labels is not None:
        return labels.shape[1]
    if training.samples is None:
        raise UsageError(
            "inversion: the batch size is withheld and no labels were inferred; "
            "grant it with threat.batch_size=true or choose a label inference that does without"
        )
    return training.samples


def check_update(model: nn.Module, parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor], who: str) -> None:
    """Raise `UsageError` unless an observation's tensors have the model's parameters in name and shape."""
    for name, parameter in model.named_parameters():
        for kind, tensors in (("parameters", parameters), ("gradient", gradient)):
            value = tensors.get(name)
            if value is None or value.shape != parameter.shape:
                found = "nothing" if value is None else list(value.shape)
                raise UsageError(
                    f"{who}: model has {name} {list(parameter.shape)}, the observation's {kind} {found}; "
                    "attack it with the model it was trained with"
                )


def _labels_per_sample(gradient: Mapping[str, Tensor], guess: Tensor, classes: int) -> list[Tensor | None]:
    """Which label of a sorted guess belongs to which sample, ``[1, 1]`` each.

    A single sample's own class has the only negative row in the last layer's gradient (Zhao 2020).
    """
    last = [g for g in gradient.values() if g.dim() == 3 and g.shape[1] == classes]
    labels = guess
    if last:
        rule = last[-1].sum(2).argmin(1).cpu()
        if torch.equal(rule.sort().values, guess.cpu().sort().values):
            labels = rule
    return [label.reshape(1, 1) for label in labels]
