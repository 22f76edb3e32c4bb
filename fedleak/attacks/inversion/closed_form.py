"""Images from a gradient without iteration: the model undone layer by layer, last layer first.

At batch size 1 every layer of a feed-forward chain says two linear things about its own input a, once its
pre-activation z and the loss's derivative δ = ∂L/∂z are known:

    W ⋆ a + b = z         (forward)        and        δ ⋆ a = ∂L/∂W        (weight gradient).

Both are known at the last layer (δ = ∂L/∂b), and solving for a gives z and δ of the layer before it. This is R-GAP
(Zhu & Blaschko, ICLR 2021), with four changes: the equations are weighed by their noise, which rounding, saturated
activations and the layers above set; a prior keeps directions without information at bay; the weight-gradient
equations decouple over input channels and share one matrix, so that the system shrinks by the number of channels; and
all observations are solved in one batch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Progress, Reconstruction
from fedleak.attacks.inversion.chain import Chain, Layer, Linear, Pointwise
from fedleak.capture import Observation
from fedleak.errors import UsageError

ROUNDING = 2.0**-23
"""Relative rounding of float32, doubled: clients and servers both round."""
_CERTAIN = 1e40
"""The precision of something known exactly."""
_UNBOUNDED = 10.0
"""Standard deviation, beforehand, of values without a known range."""
_REFINEMENTS = 2
_PROBES = 4
"""Random errors put through a solve to find the size of its own, pooled over channels."""


@dataclass
class Estimate:
    """A layer's input, ``[N, C, H·W]``: mean and standard deviation."""

    mean: Tensor
    std: Tensor


def estimate_input(
    layer: Linear,
    kernel: Tensor,
    gradient: Tensor,
    gradient_std: Tensor,
    delta: Tensor,
    outputs: Estimate | None,
    prior: Estimate,
) -> Estimate:
    """The linear minimum-variance estimate of a layer's input from its weight gradient and its output.

    Args:
        layer: the layer.
        kernel: its weights ``[N, O, C, K]``.
        gradient: ∂L/∂weights ``[N, O, C, K]``.
        gradient_std: noise of `gradient`, ``[N]``.
        delta: ∂L/∂outputs ``[N, O, P]``.
        outputs: outputs less bias ``[N, O, P]``, None if unknown.
        prior: of the input, broadcastable to ``[N, C, H·W]``, the std to ``[N, 1, 1]``.

    Returns:
        the estimate, ``[N, C, H·W]``.
    """
    taps = layer.taps.to(kernel.device)
    count, channels, pixels = len(kernel), layer.shape[0], layer.pixels
    mean = prior.mean.expand(count, channels, pixels)
    precision = prior.std.expand(count, 1, 1) ** -2
    # ∂L/∂W[o, c, k] = Σ_p δ[o, p] a[c, taps[k, p]]: one matrix for all channels.
    system = delta.new_zeros(count, delta.shape[1], taps.shape[0], pixels + 1)
    system.scatter_(-1, taps.expand_as(system[..., : taps.shape[1]]), delta[:, :, None].expand(-1, -1, len(taps), -1))
    system = system[..., :-1].flatten(1, 2) / gradient_std[:, None, None]
    wanted = gradient.transpose(1, 2).flatten(2) / gradient_std[:, None, None] - mean @ system.mT
    gram = system.mT @ system + precision * torch.eye(pixels).to(system)
    if outputs is None:
        factor = _cholesky(gram)
        covariance = torch.cholesky_inverse(factor)
        std = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()[:, None].expand(-1, channels, -1)
        return Estimate(mean + (wanted @ system) @ covariance, std)
    gap = outputs.mean - _apply(layer, kernel, mean)
    factorise = _primal if channels * pixels <= outputs.mean[0].numel() else _dual
    solve, std = factorise(layer, kernel, gram, outputs.std)
    change = solve(wanted @ system, gap)
    for _ in range(_REFINEMENTS):  # the normal equations square the condition number, their residuals do not
        right = (wanted - change @ system.mT) @ system - precision * change
        change = change + solve(right, gap - _apply(layer, kernel, change))
    return Estimate(mean + change, std)


def _apply(layer: Linear, kernel: Tensor, inputs: Tensor) -> Tensor:
    return kernel.flatten(2) @ layer.patches(inputs).flatten(1, 2)


def _apply_transposed(layer: Linear, kernel: Tensor, outputs: Tensor) -> Tensor:
    patches = (kernel.flatten(2).mT @ outputs).unflatten(1, (layer.shape[0], -1)).flatten(2)
    inputs = outputs.new_zeros(len(outputs), layer.shape[0], layer.pixels + 1)
    return inputs.index_add_(-1, layer.taps.to(outputs.device).flatten(), patches)[..., :-1]


Solve = Callable[[Tensor, Tensor], Tensor]
"""Input ``[N, C, H·W]`` of what the weight gradient asks, ``[N, C, H·W]``, and the outputs' gap ``[N, O, P]``."""


def _primal(layer: Linear, kernel: Tensor, gram: Tensor, std: Tensor) -> tuple[Solve, Tensor]:
    """As many output equations as unknowns, or more: the normal matrix over all channels."""
    taps, channels, pixels = layer.taps.to(kernel.device), layer.shape[0], layer.pixels
    size = channels * (pixels + 1)  # one more unknown a channel, the padding
    weight = std**-2
    flat = kernel.flatten(2)
    blocks = torch.einsum("nopi,noj->npij", weight[..., None] * flat[:, :, None], flat)
    at = (torch.arange(channels, device=taps.device)[:, None, None] * (pixels + 1) + taps).flatten(0, 1).T  # [P, C·K]
    index = (at[:, :, None] * size + at[:, None, :]).flatten()
    normal = kernel.new_zeros(len(kernel), size * size).index_add_(1, index, blocks.flatten(1))
    normal = normal.view(-1, channels, pixels + 1, channels, pixels + 1)
    for channel in range(channels):
        normal[:, channel, :pixels, channel, :pixels] += gram
        normal[:, channel, pixels, channel, pixels] = _CERTAIN
    factor = _cholesky(normal.view(-1, size, size))

    def solve(right: Tensor, gap: Tensor) -> Tensor:
        right = F.pad(right + _apply_transposed(layer, kernel, gap * weight), (0, 1))
        return torch.cholesky_solve(right.flatten(1)[..., None], factor)[..., 0].view_as(right)[..., :-1]

    probes = torch.linalg.solve_triangular(factor.mT, _probes(factor.new_empty(size, _PROBES)), upper=True)
    square = probes.square().mean(-1).view(-1, channels, pixels + 1).mean(1, keepdim=True)[..., :-1]
    return solve, square.sqrt().expand(-1, channels, -1)


def _dual(layer: Linear, kernel: Tensor, gram: Tensor, std: Tensor) -> tuple[Solve, Tensor]:
    """Fewer output equations than unknowns: condition what the weight gradient says on the outputs."""
    taps, channels, pixels = layer.taps.to(kernel.device), layer.shape[0], layer.pixels
    gram_factor = _cholesky(gram)
    covariance = torch.cholesky_inverse(gram_factor)
    pairs = F.pad(covariance, (0, 1, 0, 1))[:, taps[:, None, :, None], taps[None, :, None, :]]  # [N, K, K, P, P]
    product = torch.einsum("nack,nbcl->nabkl", kernel, kernel)  # [N, O, O, K, K]
    outputs = product.flatten(1, 2).flatten(2) @ pairs.flatten(1, 2).flatten(2)
    spread = outputs.view(-1, *product.shape[1:3], *pairs.shape[3:]).transpose(2, 3).flatten(3).flatten(1, 2)
    spread.diagonal(dim1=1, dim2=2).add_(std.flatten(1) ** 2)
    factor = _cholesky(spread)

    def condition(inputs: Tensor, outputs: Tensor) -> Tensor:
        gap = outputs - _apply(layer, kernel, inputs)
        gain = torch.cholesky_solve(gap.flatten(1)[..., None], factor)[..., 0].view_as(gap)
        return inputs + _apply_transposed(layer, kernel, gain) @ covariance

    # The errors of the result are those of random errors put through the same solve.
    square = torch.zeros_like(covariance[:, :1])
    units = _probes(covariance.new_empty(_PROBES, channels, pixels))
    for unit, noise in zip(units, _probes(std.new_empty(_PROBES, *std.shape[1:])), strict=True):
        inputs = torch.linalg.solve_triangular(gram_factor.mT, unit.T.expand(len(gram), -1, -1), upper=True).mT
        square += condition(inputs, noise * std).square().mean(1, keepdim=True)
    return lambda right, gap: condition(right @ covariance, gap), (square / _PROBES).sqrt().expand(-1, channels, -1)


def _probes(like: Tensor) -> Tensor:
    """Standard normal numbers, the same at every call and on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower factors ``[N, n, n]``; one that fails (NaN or Inf in a problem's own numbers) is NaN and harms no other."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        factor[info != 0] = torch.nan
    return factor


def peel(
    chain: Chain, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], noise: Mapping[str, Tensor]
) -> Tensor:
    """The image behind each gradient of a batch of one.

    Args:
        chain: the model.
        parameters, gradients: name -> float64 ``[N, ...]``.
        noise: name -> ``[N]``, standard deviation of the gradient's entries; where the last layer's gradient shows
            more (a defense), that is taken for all.

    Returns:
        ``[N, C, H, W]`` float64, not clamped; NaN where a problem's numbers allow no answer.
    """
    last = chain.last
    delta = last_delta(last, parameters, gradients)[..., None]
    seen = _last_layer_noise(last.kernel(gradients).flatten(2), delta)
    noise = {
        name: torch.where(seen > 4 * noise[last.weight], seen.maximum(value), value) for name, value in noise.items()
    }
    delta_error = noise[last.bias or last.weight] / delta.square().mean((1, 2)).sqrt()
    outputs: Estimate | None = None
    for position in reversed(range(len(chain.layers))):
        layer = chain.layers[position]
        if isinstance(layer, Pointwise):
            assert outputs is not None  # the last layer is linear
            outputs, delta, delta_error = _undo(layer, outputs, delta, delta_error)
            continue
        kernel, gradient = layer.kernel(parameters), layer.kernel(gradients)
        size = gradient.square().mean((1, 2, 3)).sqrt()
        std = (noise[layer.weight] ** 2 + (delta_error * size) ** 2).sqrt()
        delta = delta.reshape(len(delta), layer.out_shape[0], -1)
        if outputs is not None:
            mean, spread = (v.reshape(delta.shape) for v in (outputs.mean, outputs.std))
            spread = (spread**2 + (ROUNDING * mean.square().mean((1, 2), keepdim=True).sqrt()) ** 2).sqrt()
            if layer.bias is not None:
                mean = mean - parameters[layer.bias][..., None]
            outputs = Estimate(mean, spread)
        prior = _prior(chain.layers[:position], kernel)
        outputs = estimate_input(layer, kernel, gradient, std, delta, outputs, prior)
        if position:
            delta = _apply_transposed(layer, kernel, delta)
    assert outputs is not None
    return outputs.mean.view(-1, *chain.image_shape)


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


def gradient_noise(observation: Observation) -> dict[str, float]:
    """The rounding noise of each entry of `Observation.gradient`, as a standard deviation a tensor."""
    gradients, scale = observation.gradient(), observation.scale or 1.0
    noise = {name: 2.0**-24 * float(value.double().square().mean().sqrt()) for name, value in gradients.items()}
    if observation.payload == "weights":
        for name, value in observation.parameters.items():
            noise[name] += 2.0**-24 * float(value.double().square().mean().sqrt()) / scale
    return noise


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

    Supported are updates of one local step on one sample (or with one gradient a sample) through a chain of plain
    convolutions, fully connected layers and elementwise monotone functions. Nothing is promised about an image:
    compare its gradient with the observed one, as `Peeling` does.

    Args:
        observations: N observations.
        guesses: N label guesses; not needed here, the gradient of a single sample tells its label.
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

    Args:
        fallback: inverts the observations that the closed form does not support or whose image fails the check. None
            reports the failed images as ``stalled`` and refuses what is not supported.
        tolerance: an image counts as found if ‖∇W(x) − ∇W‖² ≤ tolerance · ‖∇W‖².

    References:
        Zhu, Blaschko. R-GAP: Recursive gradient attack on privacy. ICLR 2021.
    """

    def __init__(self, fallback: Inversion | None = None, tolerance: float = 1e-6) -> None:
        self.fallback = fallback
        self.tolerance = tolerance

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        on_result: Callable[[int, Reconstruction], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Reconstruction]:
        """See `Inversion.invert`; the peeled images' `objective` is the squared distance of the gradients."""
        results: dict[int, Reconstruction] = {}
        start = time.perf_counter()

        def keep(index: int, result: Reconstruction) -> None:
            results[index] = result
            if on_result is not None:
                on_result(index, result)

        for index, peeled in _peel_all(observations, guesses, knowledge, device):
            found = peeled.relative <= self.tolerance
            if not found and self.fallback is not None:
                continue
            observation = observations[index]
            keep(
                index,
                Reconstruction(
                    round=observation.round,
                    client=observation.client,
                    images=peeled.images,
                    labels=peeled.labels,
                    objective=peeled.objective,
                    evaluations=1,
                    seconds=peeled.seconds,
                    stop_reason="converged" if found else "stalled",
                    details={"method": "closed_form", "relative_objective": peeled.relative},
                ),
            )
            if on_progress is not None:
                on_progress(_progress(len(observations), results, time.perf_counter() - start))
        for index, (observation, guess) in enumerate(zip(observations, guesses, strict=True)):
            if observation.error is not None:
                keep(index, _unusable(observation, guess, knowledge))
        rest = [index for index in range(len(observations)) if index not in results]
        if rest and self.fallback is None:
            first = observations[rest[0]]
            raise UsageError(
                f"attack.inversion=peeling cannot undo round {first.round}, client {first.client} (batch_size="
                f"{first.batch_size}): it needs one sample, one local step and a model without branches or pooling; "
                "give it a fallback or choose attack.inversion=gradient_matching"
            )
        if rest and self.fallback is not None:
            self.fallback.invert(
                [observations[index] for index in rest],
                [guesses[index] for index in rest],
                knowledge,
                device=device,
                seed=seed,
                on_result=lambda position, result: keep(rest[position], result),
                on_progress=on_progress,
            )
        return [results[index] for index in range(len(observations))]


def _unusable(observation: Observation, guess: LabelGuess | None, knowledge: Knowledge) -> Reconstruction:
    size = observation.batch_size or 1
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
    converged = sum(result.stop_reason == "converged" for result in results.values())
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
    model = copy.deepcopy(knowledge.model).cpu().train(knowledge.training_mode)
    chain = Chain.trace(model, knowledge.image_shape)
    if chain is None:
        return
    names = [name for layer in chain.layers if isinstance(layer, Linear) for name in (layer.weight, layer.bias) if name]
    supported = [
        index
        for index, (observation, guess) in enumerate(zip(observations, guesses, strict=True))
        if _one_sample(observation, guess) and set(names) <= set(observation.update)
    ]
    chunk = max(1, int(_free_bytes(device) // (4 * _bytes(chain))))
    for first in range(0, len(supported), chunk):
        start = time.perf_counter()
        problems = [_problem(observations[i], guesses[i], names) for i in supported[first : first + chunk]]
        yield from zip(supported[first : first + chunk], _peel_chunk(chain, problems, device, start), strict=True)


@dataclass
class _Problem:
    """What `peel` needs of one observation with S samples: name -> ``[S, ...]`` or, noise, a number."""

    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    noise: dict[str, float]
    labels: Tensor | None

    @property
    def samples(self) -> int:
        return len(next(iter(self.gradients.values())))


def _problem(observation: Observation, guess: LabelGuess | None, names: Sequence[str]) -> _Problem:
    gradients = {name: value.detach() for name, value in observation.gradient().items() if name in names}
    if not observation.per_sample:
        gradients = {name: value[None] for name, value in gradients.items()}
    labels = None if guess is None or observation.per_sample else guess.best
    parameters = {name: observation.parameters[name].detach() for name in names}
    return _Problem(parameters, gradients, gradient_noise(observation), labels)


def _one_sample(observation: Observation, guess: LabelGuess | None) -> bool:
    size = observation.batch_size or (1 if guess is None else guess.labels.shape[1])
    single = observation.per_sample or size == 1
    return single and observation.local_steps in (None, 1) and observation.error is None


def _peel_chunk(chain: Chain, problems: Sequence[_Problem], device: torch.device | str, start: float) -> list[_Peeled]:
    counts = [problem.samples for problem in problems]
    names = problems[0].gradients.keys()

    def stack(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors).to(device=device, dtype=torch.float64)

    parameters = {
        name: stack([p.parameters[name].expand(p.samples, *p.parameters[name].shape) for p in problems])
        for name in names
    }
    gradients = {name: stack([p.gradients[name] for p in problems]) for name in names}
    noise = {name: stack([torch.full((p.samples,), p.noise[name]) for p in problems]) for name in names}
    labels = last_delta(chain.last, parameters, gradients).argmin(1)
    offset = 0
    for problem, count in zip(problems, counts, strict=True):
        if problem.labels is not None:
            labels[offset : offset + count] = problem.labels.to(labels)
        offset += count
    images = peel(chain, parameters, gradients, noise).nan_to_num(0.5).clamp(0, 1).float()
    mine = chain.gradients(images.double()[:, None], labels[:, None], parameters)
    objective = _square({name: mine[name] - gradients[name] for name in names})
    relative = objective / _square(gradients)
    seconds = (time.perf_counter() - start) / len(problems)
    return [
        _Peeled(i.cpu(), y.cpu(), float(o.sum()), float(r.max()), seconds)
        for i, y, o, r in zip(*(v.split(counts) for v in (images, labels, objective, relative)), strict=True)
    ]


def _square(tensors: Mapping[str, Tensor]) -> Tensor:
    """‖·‖² of each problem, ``[N]``."""
    return torch.stack([value.flatten(1).square().sum(1) for value in tensors.values()]).sum(0)


def _bytes(chain: Chain) -> int:
    """Memory that one problem needs at its largest layer."""
    largest = 0
    for layer in chain.layers:
        if isinstance(layer, Linear):
            taps, positions = layer.taps.shape
            inputs, outputs = layer.shape[0] * layer.pixels, layer.out_shape[0] * positions
            primal = 2 * inputs**2 + positions * (layer.shape[0] * taps) ** 2
            dual = 2 * outputs**2 + 2 * (taps * positions) ** 2 // 1
            largest = max(largest, (primal if inputs <= outputs else dual) + 2 * layer.pixels**2)
    return 8 * largest


def _free_bytes(device: torch.device | str) -> float:
    device = torch.device(device)
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 4e9
