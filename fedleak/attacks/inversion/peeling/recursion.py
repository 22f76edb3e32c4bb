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

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedleak.attacks.chain import Linear, Pointwise
from fedleak.attacks.inversion.peeling.chain import Chain
from fedleak.attacks.inversion.peeling.estimate import Estimate, apply_transposed, estimate_input
from fedleak.attacks.inversion.peeling.search import search
from fedleak.attacks.row_space import batch_features

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
    features: Tensor | None = None,
) -> Tensor:
    """The images behind each gradient.

    Args:
        chain: the model.
        parameters, gradients: name -> float64 ``[N, ...]``.
        noise: name -> ``[N]``, standard deviation of the gradient's entries; where the last layer's gradient shows
            more (a defense), that is taken for all.
        labels: ``[N, B]`` int64; None for batches of one.
        features: ``[N, B, d]``, inputs of the last layer in the order of the labels, where they are known already.

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
        outputs, delta, delta_error = _last_inputs(chain.last, parameters, gradients, labels, features)
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
            if not determined(tall):
                mean, spread, delta = (v.unflatten(2, (batch, -1)).transpose(1, 2) for v in (mean, spread, delta))
                noise = {**noise, layer.weight: std}
                return search(chain, position, parameters, gradients, noise, Estimate(mean, spread), delta)
        prior = _prior(chain.layers[:position], kernel)
        outputs = estimate_input(tall, kernel, gradient, std, delta, outputs, prior, with_std=position > 0)
        if position:
            delta = apply_transposed(tall, kernel, delta)
    assert outputs is not None
    result: Tensor = outputs.mean.unflatten(2, (batch, -1)).transpose(1, 2).reshape(-1, batch, *chain.image_shape)
    return result


def _regroup(values: Tensor, batch: int, channels: int) -> Tensor:
    """Values ``[N, X, B·Y]`` as ``[N, channels, B·Z]``, each sample's own in the same order."""
    each = values.unflatten(2, (batch, -1)).transpose(1, 2)
    result: Tensor = each.reshape(len(values), batch, channels, -1).transpose(1, 2).flatten(2)
    return result


def determined(layer: Linear) -> bool:
    """Whether a layer's outputs and weight gradient have equations to spare for its input."""
    channels, outputs = layer.shape[0], layer.out_shape[0] * layer.taps.shape[1]
    equations = outputs + channels * min(layer.out_shape[0] * layer.taps.shape[0], layer.pixels)
    return equations >= 1.1 * channels * layer.pixels


def _last_inputs(
    last: Linear,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    labels: Tensor,
    features: Tensor | None,
) -> tuple[Estimate, Tensor, Tensor]:
    """The last layer's inputs ``[N, d, B]``, the loss's derivative by them, and that one's relative error ``[N]``."""
    assert last.bias is not None
    weight, gradient = parameters[last.weight].flatten(2), gradients[last.weight].flatten(2)
    bias, bias_gradient = parameters[last.bias], gradients[last.bias]
    found = batch_features(weight, bias, gradient, bias_gradient, labels, known=features)
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


def _prior(below: Sequence[Linear | Pointwise], like: Tensor) -> Estimate:
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
