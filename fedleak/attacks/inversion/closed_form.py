"""Images from a gradient in closed form: the model undone layer by layer, last layer first.

Every layer of a feed-forward chain says two linear things about its own input a, once its pre-activation z and the
loss's derivative δ = ∂L/∂z are known:

    W ⋆ a + b = z         (forward)        and        δ ⋆ a = ∂L/∂W        (weight gradient, summed over the batch).

At the last layer both are known: for one sample δ = ∂L/∂b, for a batch by row-space matching (`features`). Solving for
a gives z and δ of the layer before it. For one sample this is R-GAP (Zhu & Blaschko, ICLR 2021), with four changes: the
equations are weighed by their noise, which rounding, saturated activations and the layers above set; a prior keeps
directions without information at bay; the weight-gradient equations decouple over input channels and share one matrix,
so that the system shrinks by the number of channels; and all observations are solved in one batch. For a batch, where a
layer has more unknowns than equations, the images themselves are searched for from there on (`search`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Run
from fedleak.attacks.inversion.chain import Chain, Layer, Linear, Pointwise
from fedleak.attacks.inversion.estimate import Estimate, apply_transposed, estimate_input
from fedleak.attacks.inversion.features import batch_features
from fedleak.attacks.inversion.gradient_matching import GradientMatching
from fedleak.attacks.inversion.memory import free_memory
from fedleak.attacks.inversion.search import search
from fedleak.attacks.results import Progress, Reconstruction, StopReason
from fedleak.capture import Observation
from fedleak.errors import UsageError

ROUNDING = 2.0**-23
"""Relative rounding of float32, doubled: clients and servers both round."""
_UNBOUNDED = 10.0
"""Standard deviation, beforehand, of values without a known range."""


def peel(
    chain: Chain,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    noise: Mapping[str, Tensor],
    labels: Tensor | None = None,
) -> Tensor:
    """The images behind each gradient.

    Args:
        chain: the model.
        parameters, gradients: name -> float64 ``[N, ...]``.
        noise: name -> ``[N]``, standard deviation of the gradient's entries; where the last layer's gradient shows
            more (a defense), that is taken for all.
        labels: ``[N, B]`` int64; None for batches of one.

    Returns:
        ``[N, B, C, H, W]`` float64, in the order of the labels, not clamped; NaN where a problem's numbers allow no
        answer.
    """
    batch = 1 if labels is None else labels.shape[1]
    rest = len(chain.layers)
    if labels is None:
        outputs: Estimate | None = None
        delta = last_delta(chain.last, parameters, gradients)[..., None]
        seen = _last_layer_noise(chain.last.kernel(gradients).flatten(2), delta)
        noise = {n: torch.where(seen > 4 * noise[chain.last.weight], seen.maximum(v), v) for n, v in noise.items()}
        delta_error = noise[chain.last.bias or chain.last.weight] / delta.square().mean((1, 2)).sqrt()
    else:
        outputs, delta, delta_error = _last_inputs(chain.last, parameters, gradients, labels)
        rest -= 1
    for position in reversed(range(rest)):
        layer = chain.layers[position]
        if isinstance(layer, Pointwise):
            assert outputs is not None  # the last layer is linear
            outputs, delta, delta_error = _undo(layer, outputs, delta, delta_error)
            continue
        tall, channels = layer.tall(batch), layer.out_shape[0]
        kernel, gradient = layer.kernel(parameters), layer.kernel(gradients)
        size = gradient.square().mean((1, 2, 3)).sqrt()
        std = (noise[layer.weight] ** 2 + (delta_error * size) ** 2).sqrt()
        delta = _regroup(delta, batch, channels)
        if outputs is not None:
            mean, spread = (_regroup(v, batch, channels) for v in (outputs.mean, outputs.std))
            spread = (spread**2 + (ROUNDING * mean.square().mean((1, 2), keepdim=True).sqrt()) ** 2).sqrt()
            if layer.bias is not None:
                mean = mean - parameters[layer.bias][..., None]
            outputs = Estimate(mean, spread)
            if not _determined(tall):
                mean, spread, delta = (v.unflatten(2, (batch, -1)).transpose(1, 2) for v in (mean, spread, delta))
                noise = {**noise, layer.weight: std}
                return search(chain, position, parameters, gradients, noise, Estimate(mean, spread), delta)
        prior = _prior(chain.layers[:position], kernel)
        outputs = estimate_input(tall, kernel, gradient, std, delta, outputs, prior, with_std=position > 0)
        if position:
            delta = apply_transposed(tall, kernel, delta)
    assert outputs is not None
    return outputs.mean.unflatten(2, (batch, -1)).transpose(1, 2).reshape(-1, batch, *chain.image_shape)


def _regroup(values: Tensor, batch: int, channels: int) -> Tensor:
    """Values ``[N, X, B·Y]`` as ``[N, channels, B·Z]``, each sample's own in the same order."""
    each = values.unflatten(2, (batch, -1)).transpose(1, 2)
    return each.reshape(len(values), batch, channels, -1).transpose(1, 2).flatten(2)


def _determined(layer: Linear) -> bool:
    """Whether a layer's outputs and weight gradient have equations to spare for its input."""
    channels, outputs = layer.shape[0], layer.out_shape[0] * layer.taps.shape[1]
    equations = outputs + channels * min(layer.out_shape[0] * layer.taps.shape[0], layer.pixels)
    return equations >= 1.1 * channels * layer.pixels


def _last_inputs(
    last: Linear, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], labels: Tensor
) -> tuple[Estimate, Tensor, Tensor]:
    """The last layer's inputs ``[N, d, B]``, the loss's derivative by them, and that one's relative error ``[N]``."""
    assert last.bias is not None
    weight, gradient = parameters[last.weight].flatten(2), gradients[last.weight].flatten(2)
    bias, bias_gradient = parameters[last.bias], gradients[last.bias]
    found = batch_features(weight, bias, gradient, bias_gradient, labels)
    logits = found.features @ weight.mT + bias[:, None]
    residual = (logits.softmax(-1) - F.one_hot(labels, weight.shape[1])) / labels.shape[1]
    mean = found.features.mT
    error = found.error.sqrt() + ROUNDING  # what the residuals cannot explain of the gradient
    return Estimate(mean, found.std[:, None].expand_as(mean)), (residual @ weight).mT, error


def last_delta(last: Linear, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """∂L/∂logits ``[N, classes]`` of a batch of one: the bias gradient, or without a bias by a search over one scale.

    Without a bias ∂L/∂W = δ hᵀ gives h and δ up to a factor, and softmax(W h) − e_y = δ decides the factor (with two
    classes two factors may fit; one is taken).
    """
    if last.bias is not None:
        return gradients[last.bias]
    weight, gradient = parameters[last.weight].flatten(2), gradients[last.weight].flatten(2)
    row = gradient.norm(dim=2).argmax(1)
    unit = F.normalize(gradient[torch.arange(len(row), device=row.device), row], dim=1)
    delta = (gradient @ unit[..., None])[..., 0]  # δ·‖h‖ up to sign
    sign = delta.sign().sum(1, keepdim=True)  # one entry is negative, all others are positive
    sign = torch.where(sign == 0, unit.sum(1, keepdim=True), sign).sign()
    delta, logits = delta * sign, (weight @ (unit * sign)[..., None])[..., 0]
    label = F.one_hot(delta.argmin(1), delta.shape[1])
    centre = -delta.amin(1, keepdim=True) * 1e2  # ‖h‖ ≥ −δ_y·‖h‖
    spread = 5.0
    for _ in range(12):
        exponents = torch.linspace(-spread, spread, 65, dtype=delta.dtype, device=delta.device)
        scales = centre * torch.exp(exponents)
        residuals = (logits[:, None] * scales[..., None]).softmax(-1) - label[:, None]
        gap = residuals * scales[..., None] - delta[:, None]
        centre = scales.gather(1, gap.square().sum(-1).argmin(1, keepdim=True))
        spread /= 16
    return delta / centre


def _last_layer_noise(gradient: Tensor, delta: Tensor) -> Tensor:
    """What is left of the last layer's gradient ``[N, O, C]`` where it should be δ hᵀ, root mean square, ``[N]``."""
    features = (delta.mT @ gradient) / delta.square().sum(1, keepdim=True)
    return (gradient - delta * features).square().mean((1, 2)).sqrt()


def _prior(below: Sequence[Layer], like: Tensor) -> Estimate:
    """What is known of a layer's input beforehand: the range of the function below, or of an image in [0, 1]."""
    low, high = like.new_zeros(1, like.shape[2], 1), like.new_ones(1, like.shape[2], 1)
    if all(isinstance(layer, Pointwise) for layer in below):
        for layer in below:
            assert isinstance(layer, Pointwise)
            low, high = layer.value(low), layer.value(high)
    elif isinstance(below[-1], Pointwise):
        low, high = torch.full_like(low, below[-1].low), torch.full_like(high, below[-1].high)
    else:
        low, high = torch.full_like(low, -torch.inf), torch.full_like(high, torch.inf)
    width = (high - low).abs().amax(1, keepdim=True)
    if not torch.isfinite(width).all():
        return Estimate(torch.zeros_like(width), torch.full_like(width, _UNBOUNDED))
    return Estimate((low + high) / 2, width / 12**0.5)


def _undo(layer: Pointwise, outputs: Estimate, delta: Tensor, delta_error: Tensor) -> tuple[Estimate, Tensor, Tensor]:
    """Pre-activation and ∂L/∂pre-activation below an elementwise function, with their errors."""
    std = (outputs.std**2 + ROUNDING**2).sqrt()
    value = torch.minimum(torch.maximum(outputs.mean, layer.low + std / 2), layer.high - std / 2)
    slope = layer.slope(value)
    delta = delta.reshape(value.shape)
    change = (layer.slope((value + std).clamp(max=layer.high)) - slope).abs()
    error = ((delta * change).square().sum((1, 2)) / (delta * slope).square().sum((1, 2))).sqrt()
    # where the function is flat the output says nothing
    spread = torch.where(slope > 0, std / slope, torch.inf).clamp(max=1e6)
    return Estimate(layer.inverse(value), spread), delta * slope, (delta_error**2 + error**2).sqrt()


def closed_form(
    observations: Sequence[Observation],
    guesses: Sequence[LabelGuess | None],
    knowledge: Knowledge,
    device: torch.device | str = "cpu",
) -> list[Tensor | None]:
    """Images from updates without iteration, where the model and the batch allow it.

    Supported are updates of one local step through a chain of plain convolutions, fully connected layers and
    elementwise monotone functions: of one sample (or with one gradient a sample), or of a batch with known labels and
    at least twice as many classes as samples. Where a batch leaves an image open, the smoothest of the images that fit
    is searched for. Nothing is promised about an image: compare its gradient with the observed one, as `Peeling` does.

    Args:
        observations: N observations.
        guesses: N label guesses; a single sample needs none, since its gradient tells its label.
        knowledge: the model and the image shape.
        device: where to compute.

    Returns:
        N tensors ``[B, C, H, W]``, float32 in [0, 1], on the CPU; None where the model or the batch is not supported.
    """
    images: list[Tensor | None] = [None] * len(observations)
    for index, peeled in _peel_all(observations, guesses, knowledge, device):
        images[index] = peeled.images
    return images


class Peeling(Inversion):
    """The closed form, checked against the observed gradient; what fails the check goes to another inversion.

    Of a failed image and the other inversion's the one whose gradient is closer to the observed one is kept.

    Args:
        fallback: inverts the observations that the closed form does not support or whose image fails the check. None
            reports the failed images as ``stalled`` and refuses what is not supported.
        tolerance: an image counts as found if ‖∇W(x) − ∇W‖² ≤ tolerance · ‖∇W‖².
        batch_tolerance: the same for batches. A batch's gradient may not determine its images; of those that fit, the
            closed form seeks the most natural, which are nearer to the truth than others that fit a little better.

    References:
        Zhu, Blaschko. R-GAP: Recursive gradient attack on privacy. ICLR 2021.
    """

    def __init__(
        self, fallback: Inversion | None = None, tolerance: float = 1e-5, batch_tolerance: float = 1e-4
    ) -> None:
        self.fallback = fallback
        self.tolerance = tolerance
        self.batch_tolerance = batch_tolerance

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        run: Run,
    ) -> list[Reconstruction]:
        """See `Inversion.invert`; the peeled images' `objective` is the squared distance of the gradients."""
        results: dict[int, Reconstruction] = {}
        start = time.perf_counter()

        def keep(index: int, result: Reconstruction) -> None:
            results[index] = result
            if run.on_result is not None:
                run.on_result(index, result)

        failed: dict[int, _Peeled] = {}

        def keep_better(position: int, result: Reconstruction) -> None:
            index = rest[position]
            if index in failed and not result.converged:
                peeled = failed[index]
                if peeled.relative <= _relative(observations[index], result, knowledge, run.device):
                    report = _report(observations[index], peeled, StopReason.STALLED)
                    report.evaluations, report.restarts = result.evaluations + 1, result.restarts
                    report.seconds += result.seconds
                    result = report
            keep(index, result)

        for index, peeled in _peel_all(observations, guesses, knowledge, run.device):
            found = peeled.relative <= (self.tolerance if len(peeled.labels) == 1 else self.batch_tolerance)
            if not found and self.fallback is not None:
                failed[index] = peeled
                continue
            reason = StopReason.CONVERGED if found else StopReason.STALLED
            keep(index, _report(observations[index], peeled, reason))
            if run.on_progress is not None:
                run.on_progress(_progress(len(observations), results, time.perf_counter() - start))
        for index, (observation, guess) in enumerate(zip(observations, guesses, strict=True)):
            if observation.error is not None:
                keep(index, _unusable(observation, guess, knowledge))
        rest = [index for index in range(len(observations)) if index not in results]
        if rest and self.fallback is None:
            first = observations[rest[0]]
            raise UsageError(
                f"attack.inversion=peeling cannot undo round {first.round}, client {first.client} (batch_size="
                f"{first.training.batch_size}): it needs one local step, known labels, at most half as many samples as "
                "classes and no branches or pooling; give it a fallback or choose attack.inversion=gradient_matching"
            )
        peeled_already = len(results)

        def of_all(state: Progress) -> None:
            if run.on_progress is not None:
                done, converged = state.done + peeled_already, state.converged + peeled_already
                run.on_progress(replace(state, problems=len(observations), done=done, converged=converged))

        fallback = self.fallback
        if isinstance(fallback, GradientMatching) and fallback.initial is None:
            # A peeled image that narrowly fails is near the truth, where a grey one may lead to another solution.
            fallback = copy.copy(fallback)
            fallback.initial = lambda *_: [failed[index].images if index in failed else None for index in rest]
        if rest and fallback is not None:
            fallback.invert(
                [observations[index] for index in rest],
                [guesses[index] for index in rest],
                knowledge,
                replace(run, on_result=keep_better, on_progress=of_all),
            )
        return [results[index] for index in range(len(observations))]


def _report(observation: Observation, peeled: _Peeled, stop_reason: StopReason) -> Reconstruction:
    return Reconstruction(
        round=observation.round,
        client=observation.client,
        images=peeled.images,
        labels=peeled.labels,
        objective=peeled.objective,
        evaluations=1,
        seconds=peeled.seconds,
        stop_reason=stop_reason,
        details={"method": "closed_form", "relative_objective": peeled.relative},
    )


def _relative(
    observation: Observation, result: Reconstruction, knowledge: Knowledge, device: torch.device | str
) -> float:
    """‖∇W(x) − ∇W‖² / ‖∇W‖² of another inversion's images, infinite where every sample has its own gradient."""
    chain = _chain(knowledge, observation.training.training_mode)
    if chain is None or observation.training.per_sample:
        return torch.inf
    problem = _problem(observation, None, chain.parameter_names)
    tensors = (
        {name: value.to(device=device, dtype=torch.float64) for name, value in group.items()}
        for group in ({n: v[None] for n, v in problem.parameters.items()}, problem.gradients)
    )
    parameters, gradients = tensors
    images, labels = result.images[None].to(device).double(), result.labels[None].to(device)
    mine = chain.gradients(images, labels, parameters)
    return float(_square({n: mine[n] - gradients[n] for n in mine}) / _square(gradients))


def _chain(knowledge: Knowledge, training_mode: bool) -> Chain | None:
    model = copy.deepcopy(knowledge.model).cpu().train(training_mode)
    return Chain.trace(model, knowledge.image_shape)


def _unusable(observation: Observation, guess: LabelGuess | None, knowledge: Knowledge) -> Reconstruction:
    size = observation.training.batch_size or 1
    return Reconstruction(
        round=observation.round,
        client=observation.client,
        images=torch.full((size, *knowledge.image_shape), 0.5),
        labels=torch.zeros(size, dtype=torch.int64) if guess is None else guess.best.cpu(),
        objective=float("nan"),
        evaluations=0,
        seconds=0.0,
        stop_reason=observation.error or "",
    )


def _progress(problems: int, results: Mapping[int, Reconstruction], seconds: float) -> Progress:
    objectives = sorted(result.objective for result in results.values())
    converged = sum(result.converged for result in results.values())
    return Progress(
        problems=problems,
        done=len(results),
        converged=converged,
        diverged=0,
        median_objective=objectives[len(objectives) // 2],
        evaluations=len(results),
        evaluations_per_second=len(results) / max(seconds, 1e-9),
    )


@dataclass
class _Peeled:
    """The images of one observation ``[B, C, H, W]``, their labels, and the distance of their gradients."""

    images: Tensor
    labels: Tensor
    objective: float
    relative: float
    seconds: float


def _peel_all(
    observations: Sequence[Observation],
    guesses: Sequence[LabelGuess | None],
    knowledge: Knowledge,
    device: torch.device | str,
) -> Iterator[tuple[int, _Peeled]]:
    """(index, images) of every supported observation, chunk by chunk."""
    for training_mode in dict.fromkeys(observation.training.training_mode for observation in observations):
        chain = _chain(knowledge, training_mode)
        if chain is None:
            continue
        names = chain.parameter_names
        by_size: dict[int, list[int]] = {}
        for index, (observation, guess) in enumerate(zip(observations, guesses, strict=True)):
            if observation.training.training_mode != training_mode:
                continue
            size = _batch_size(observation, guess, chain)
            if size is not None and set(names) <= set(observation.update):
                by_size.setdefault(size, []).append(index)
        for size, indices in by_size.items():
            chunk = max(1, int(_budget(torch.device(device)) // _bytes(chain, size)))
            for first in range(0, len(indices), chunk):
                start = time.perf_counter()
                chosen = indices[first : first + chunk]
                problems = [_problem(observations[i], guesses[i], names) for i in chosen]
                yield from zip(chosen, _peel_chunk(chain, size, problems, device, start), strict=True)


def _batch_size(observation: Observation, guess: LabelGuess | None, chain: Chain) -> int | None:
    """Images behind each gradient of an observation, None where the closed form has no answer."""
    training = observation.training
    if observation.error is not None or not training.single:
        return None
    size = guess.labels.shape[1] if guess is not None else training.batch_size or 1
    if training.per_sample or size == 1:
        return 1
    classes, features = chain.last.out_shape[0], chain.last.shape[0]
    known = guess is not None and chain.last.bias is not None and len(chain.layers) > 1
    return size if known and 2 * size <= classes and size <= features else None


@dataclass
class _Problem:
    """What `peel` needs of one observation with S gradients."""

    parameters: dict[str, Tensor]  # name -> [...]
    gradients: dict[str, Tensor]  # name -> [S, ...]
    from_weights: float  # the rounding of a parameter, in units of its gradient, where new weights were sent
    labels: Tensor | None  # [S, B]

    @property
    def count(self) -> int:
        return len(next(iter(self.gradients.values())))


def _problem(observation: Observation, guess: LabelGuess | None, names: Sequence[str]) -> _Problem:
    gradients = {name: value.detach() for name, value in observation.gradient().items() if name in names}
    if not observation.training.per_sample:
        gradients = {name: value[None] for name, value in gradients.items()}
    labels = None if guess is None or observation.training.per_sample else guess.best[None]
    parameters = {name: observation.parameters[name].detach() for name in names}
    from_weights = 1 / (observation.scale or 1.0) if observation.training.payload == "weights" else 0.0
    return _Problem(parameters, gradients, from_weights, labels)


def _peel_chunk(
    chain: Chain, size: int, problems: Sequence[_Problem], device: torch.device | str, start: float
) -> list[_Peeled]:
    counts = [problem.count for problem in problems]
    names = problems[0].gradients.keys()

    def stack(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors).to(device=device, dtype=torch.float64)

    parameters = {
        name: stack([p.parameters[name].expand(p.count, *p.parameters[name].shape) for p in problems]) for name in names
    }
    gradients = {name: stack([p.gradients[name] for p in problems]) for name in names}
    from_weights = stack([torch.full((p.count,), p.from_weights) for p in problems])
    noise = {name: ROUNDING / 2 * (_size(gradients[name]) + from_weights * _size(parameters[name])) for name in names}
    finite = torch.isfinite(_square(gradients) + _square(parameters))
    for tensors in (gradients, parameters, noise):
        for name in names:
            tensors[name] = tensors[name].nan_to_num(0, 0, 0)
    if size == 1:
        single = last_delta(chain.last, parameters, gradients).argmin(1, keepdim=True)
        own = single.split(counts)
        labels = torch.cat([o if p.labels is None else p.labels.to(o) for o, p in zip(own, problems, strict=True)])
        images = peel(chain, parameters, gradients, noise)
    else:
        labels = torch.cat([p.labels for p in problems if p.labels is not None]).to(device)
        images = peel(chain, parameters, gradients, noise, labels)
    images = images.nan_to_num(0.5).clamp(0, 1).float()
    mine = chain.gradients(images.double(), labels, parameters)
    objective = _square({name: mine[name] - gradients[name] for name in names})
    objective = torch.where(finite, objective, torch.nan)
    relative = objective / _square(gradients)
    seconds = (time.perf_counter() - start) / len(problems)
    return [
        _Peeled(i.flatten(0, 1).cpu(), y.flatten().cpu(), float(o.sum()), float(r.max()), seconds)
        for i, y, o, r in zip(*(v.split(counts) for v in (images, labels, objective, relative)), strict=True)
    ]


def _size(values: Tensor) -> Tensor:
    """Root mean square of each problem, ``[N]``."""
    return values.flatten(1).square().mean(1).sqrt()


def _square(tensors: Mapping[str, Tensor]) -> Tensor:
    """‖·‖² of each problem, ``[N]``."""
    return torch.stack([value.flatten(1).square().sum(1) for value in tensors.values()]).sum(0)


def _budget(device: torch.device) -> float:
    """Bytes to use at once: a CPU gains nothing from more, since one dense factorisation keeps it busy."""
    half = free_memory(device) / 2
    return min(half, 2e8) if device.type == "cpu" else half


def _bytes(chain: Chain, batch: int) -> int:
    """Memory that one problem needs, at the layer that needs most."""
    numbers = 0
    for layer in reversed(chain.layers):
        if not isinstance(layer, Linear) or (batch > 1 and layer is chain.last):
            continue
        tall = layer.tall(batch)
        taps, positions = tall.taps.shape
        inputs, outputs = tall.shape[0] * tall.pixels, tall.out_shape[0] * positions
        if not _determined(tall) and layer is not chain.last:
            patches = layer.shape[0] * taps
            numbers = max(numbers, 2 * outputs // batch * patches * positions // batch + 4 * outputs**2 // batch)
            break
        primal = 3 * inputs**2 + 2 * positions * (layer.shape[0] * taps) ** 2
        dual = 3 * outputs**2 + 2 * (taps * positions) ** 2
        numbers = max(numbers, (primal if inputs <= outputs else dual) + 3 * tall.pixels**2)
    return 8 * numbers
