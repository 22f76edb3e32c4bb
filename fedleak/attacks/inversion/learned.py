"""Images read off a defended update by a regressor, trained on auxiliary images whose updates went through the defense.

What an update under a hard defense (signs, 1% of the elements) tells is little and crooked: no solver of equations is
needed to use it. The attacker computes, in the very model that it observed and with the label that it inferred, the
updates of many images of its own, defends them as the client did, and learns the way back (Wu et al. 2023). Each image
is a guess at the private one by what such updates have in common; it is no proof that the update was explained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, mse_loss

from fedleak.attacks.adaptive import Estimated, NoiseOnly, lookalike
from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Run
from fedleak.attacks.functional import functional_copy
from fedleak.attacks.image_prior import natural_prior
from fedleak.attacks.inversion.cases import unusable
from fedleak.attacks.problem import Problem, pose
from fedleak.attacks.results import Reconstruction, StopReason
from fedleak.capture import Observation
from fedleak.defenses.base import Defense
from fedleak.errors import UsageError
from fedleak.seeding import derive_seed, generator, global_draws
from fedleak.training import LocalTraining, Tensors

_CHUNK = 64
_NUMBERS = 2**26
"""Elements of all updates that are learned from; of large models a random part of each update is enough."""
_WIDER = 2.0
"""How much wider than the error that is expected of an answer the next images lie about it."""
_PENALTIES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_WIDTHS = (1.0, 2.0, 4.0, 8.0)
"""Of Gaussian kernels, in median distances."""
_HELD_OUT = 5
"""One training image in so many chooses between the regressors."""


_SINGLE = (
    "attack/inversion=learned reads single samples of one local step with a label; choose federation.batch_size=1, or "
    "attack=fedleak"
)


class Learned(Inversion):
    """A regressor from defended updates to images, made for each observed model; best with auxiliary data.

    Kernel ridge regressions (linear and Gaussian) on the whole update and a small network on random projections of it
    are trained; the one that is best on images left out answers. For single samples of one local step.

    Args:
        examples: images to train on: auxiliary ones first, then shifted blends of them; without any, draws from a
            natural-image spectrum.
        projections: numbers that the network gets of an update.
        steps: its training steps; 0 leaves it out.
        rounds: how often to learn again from images about the last answer, where updates are more nearly linear.

    Raises:
        UsageError: `examples` is below 10, or another setting is not a whole number of at least 0.

    References:
        Wu, Chen, Guo, Weinberger. Learning to invert: Simple adaptive attacks for gradient inversion in federated
        learning. UAI 2023.
    """

    needs_labels = True

    def __init__(self, examples: int = 1200, projections: int = 512, steps: int = 300, rounds: int = 2) -> None:
        settings = (
            ("examples", examples, 10),
            ("projections", projections, 1),
            ("steps", steps, 0),
            ("rounds", rounds, 0),
        )
        for name, value, least in settings:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"attack.inversion.{name}={value}: must be a whole number of at least {least}")
        self.examples, self.projections, self.steps, self.rounds = examples, projections, steps, rounds

    def check_model(self, knowledge: Knowledge, training: LocalTraining) -> None:
        """See `Inversion.check_model`."""
        if (training.samples != 1 and not training.per_sample) or not training.single:
            raise UsageError(_SINGLE)

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        run: Run,
    ) -> list[Reconstruction]:
        """See `Inversion.invert`.

        Raises:
            UsageError: an update is of several samples or steps, or has no label.
        """
        results: list[Reconstruction | None] = [None] * len(observations)
        for problem in pose(observations, guesses, knowledge):
            if problem.samples != 1 or not problem.targets[0].training.single or problem.labels is None:
                raise UsageError(_SINGLE)
            result = self._one(problem, observations[problem.index], knowledge, run)
            results[problem.index] = result
            if run.on_result is not None:
                run.on_result(problem.index, result)
        return [
            unusable(observation, knowledge.image_shape) if result is None else result
            for result, observation in zip(results, observations, strict=True)
        ]

    def _one(self, problem: Problem, observation: Observation, knowledge: Knowledge, run: Run) -> Reconstruction:
        began = time.perf_counter()
        assert problem.labels is not None
        label = problem.labels[0, :1]
        random = generator(run.seed, "learned", *problem.key)
        images = training_images(knowledge, self.examples, random).to(run.device)
        error, answer, name = self._learn(problem, images, label, knowledge, run, random)
        for _ in range(self.rounds):
            near = around(answer.view(knowledge.image_shape).clamp(0, 1).float(), images, error, random)
            better = self._learn(problem, near, label, knowledge, run, random)
            if better[0] >= error:
                break
            error, answer, name = better
        return Reconstruction(
            round=problem.key[0],
            client=problem.key[1],
            images=answer.view(1, *knowledge.image_shape).clamp(0, 1).float().cpu(),
            labels=label.cpu(),
            objective=error,
            evaluations=len(images),
            seconds=time.perf_counter() - began,
            stop_reason=StopReason.BUDGET,
            details={"method": name, "expected_mse": [float(f"{error:.4g}")]},
        )

    def _learn(
        self, problem: Problem, images: Tensor, label: Tensor, knowledge: Knowledge, run: Run, random: torch.Generator
    ) -> tuple[float, Tensor, str]:
        """The best regressor of some images: (error on those left out, answer, name)."""
        updates, seen = _updates(problem, images, label, knowledge, run, random)
        left_out = torch.arange(len(images), device=images.device) % _HELD_OUT == 0
        targets = images.flatten(1)
        found = _kernels(updates, targets, seen, left_out)
        if self.steps:
            with global_draws(derive_seed(run.seed, "learned", *problem.key)):
                found.append(self._network(updates, targets, seen, left_out))
        return min(found, key=lambda one: one[0])

    def _network(self, updates: Tensor, targets: Tensor, seen: Tensor, left_out: Tensor) -> tuple[float, Tensor, str]:
        """A hidden layer on random projections: (error on images left out, answer, name)."""
        project = torch.randn(updates.shape[1], self.projections, device=updates.device) / updates.shape[1] ** 0.5
        inputs, asked = updates @ project, seen @ project
        centre, spread = inputs.mean(0), inputs.std(0).clamp(min=1e-12)
        inputs, asked = (inputs - centre) / spread, (asked - centre) / spread
        mean = targets[~left_out].mean(0)
        network = nn.Sequential(
            nn.Linear(self.projections, 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, targets.shape[1])
        ).to(updates.device)
        train, truth = inputs[~left_out], targets[~left_out] - mean
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
        for _ in range(self.steps):
            some = torch.randint(len(train), (128,), device=train.device)
            optimizer.zero_grad()
            mse_loss(network(train[some]), truth[some]).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            error = float((network(inputs[left_out]) + mean - targets[left_out]).square().mean())
            return error, network(asked[None])[0] + mean, "network"


def training_images(knowledge: Knowledge, count: int, random: torch.Generator) -> Tensor:
    """``[count, C, H, W]``: auxiliary images, then ones made of them: blends of two, shifted by up to a twelfth.

    Without any, draws from a natural-image spectrum.
    """
    if knowledge.auxiliary is None or not len(knowledge.auxiliary[0]):
        prior = natural_prior(knowledge.image_shape)
        drawn = torch.randn(count, len(prior.root), generator=random, dtype=prior.root.dtype)
        return prior.images(drawn).clamp(0, 1).float()
    own = knowledge.auxiliary[0].float()
    order = torch.randperm(len(own), generator=random)[:count]
    made = [own[order]]
    most = max(1, max(knowledge.image_shape[1:]) // 12)
    for _ in range(count - len(order)):
        first, second = torch.randint(len(own), (2,), generator=random).tolist()
        share = 0.5 + 0.5 * float(torch.rand((), generator=random))
        down, right = torch.randint(-most, most + 1, (2,), generator=random).tolist()
        made.append((share * own[first] + (1 - share) * own[second]).roll((down, right), (1, 2))[None])
    return torch.cat(made)


def around(image: Tensor, images: Tensor, error: float, random: torch.Generator) -> Tensor:
    """As many images about one, off by `_WIDER` times the squared error: by differences of others, ``[M, C, H, W]``."""
    order = torch.randperm(len(images), generator=random).to(images.device)
    apart = images - images[order]
    level = (_WIDER * error / float(apart.square().mean().clamp(min=1e-12))) ** 0.5
    near: Tensor = (image.to(images) + min(level, 1.0) * apart).clamp(0, 1)
    return near


def _updates(
    problem: Problem, images: Tensor, label: Tensor, knowledge: Knowledge, run: Run, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Defended updates of the images with that label ``[M, n]``, and the observed one ``[n]``, in the same units."""
    target = problem.targets[0]
    model = functional_copy(knowledge.model, False).to(run.device)
    state = {name: value.to(run.device) for name, value in {**target.parameters, **target.buffers}.items()}
    weights = {name: state[name].float() for name in target.update}
    wanted = label.to(run.device)

    def loss(weights: Tensors, image: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, {**state, **weights}, (image[None],)), wanted)

    defense = _applied(knowledge.defense, dict(target.update))
    size = {name: value.float().norm().clamp(min=1e-30).cpu() for name, value in target.update.items()}
    seen = torch.cat([target.update[name].float().flatten().cpu() / size[name] for name in size])
    some = torch.randperm(len(seen), generator=random)[: max(1, _NUMBERS // len(images))].sort().values
    rows = []
    for part in images.split(max(1, min(_CHUNK, _NUMBERS // len(seen)))):
        found = vmap(grad(loss), in_dims=(None, 0))(weights, part)
        for one in range(len(part)):
            sent = defense({name: value[one].cpu() for name, value in found.items()}, random)
            rows.append(torch.cat([(sent[name] / size[name]).flatten() for name in size])[some])
    return torch.stack(rows).to(run.device), seen[some].to(run.device)


def _applied(defense: Defense | None, observed: Tensors) -> Callable[[Tensors, torch.Generator], Tensors]:
    """What an attacker does to its own updates: nothing unless it adapts; then the defense itself where it was told of
    it, else what the observed update looks like."""
    if defense is None or isinstance(defense, NoiseOnly):
        return lambda update, random: update
    if isinstance(defense, Estimated):
        return lookalike(observed)
    return lambda update, random: defense.apply(update, generator=random)


def _kernels(updates: Tensor, targets: Tensor, seen: Tensor, left_out: Tensor) -> list[tuple[float, Tensor, str]]:
    """Kernel ridge regressions: (error on images left out, answer, name) of the best linear and Gaussian one."""
    centre = updates.mean(0)
    x, asked = (updates - centre).double(), (seen - centre).double()
    inner, own = x @ x.T, x @ asked
    squares = inner.diagonal()
    apart = (squares[:, None] + squares - 2 * inner).clamp(min=0)
    from_asked = (squares + asked.square().sum() - 2 * own).clamp(min=0)
    middle = apart[apart > 0].median() if bool((apart > 0).any()) else torch.ones((), dtype=x.dtype)
    kernels = [("linear", inner / squares.mean(), own / squares.mean())]
    for width in _WIDTHS:
        alike, to_asked = ((-v / (2 * width**2 * middle)).exp() for v in (apart, from_asked))
        kernels.append((f"gaussian {width:g}", alike, to_asked))
    train = ~left_out
    mean = targets[train].mean(0).double()
    truth = targets.double() - mean
    found = []
    for name, kernel, row in kernels:
        values, vectors = torch.linalg.eigh(kernel[train][:, train])
        pulled = vectors.T @ truth[train]
        for penalty in _PENALTIES:
            weights = vectors @ (pulled / (values.clamp(min=0) + penalty)[:, None])
            error = float((kernel[left_out][:, train] @ weights - truth[left_out]).square().mean())
            found.append((error, row[train] @ weights + mean, f"{name} kernel"))
    return [min(found, key=lambda one: one[0])]
