"""The input of a linear layer, estimated from its output and its weight gradient by weighted least squares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedleak.attacks.chain import Linear
from fedleak.seeding import plain_generator

_CERTAIN = 1e40
"""The precision of something known exactly."""
_REFINEMENTS = 1
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
    *,
    with_std: bool = True,
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
        with_std: whether the standard deviation is wanted; zero if not.

    Returns:
        the estimate, ``[N, C, H·W]``.
    """
    count, channels, pixels = len(kernel), layer.shape[0], layer.pixels
    mean = prior.mean.expand(count, channels, pixels)
    precision = prior.std.expand(count, 1, 1) ** -2
    system = gradient_system(layer, delta) / gradient_std[:, None, None]
    wanted = gradient.transpose(1, 2).flatten(2) / gradient_std[:, None, None] - mean @ system.mT
    gram = system.mT @ system + precision * torch.eye(pixels).to(system)
    if outputs is None:
        factor = _cholesky(gram)
        covariance = torch.cholesky_inverse(factor)
        std = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()[:, None].expand(-1, channels, -1)
        return Estimate(mean + (wanted @ system) @ covariance, std)
    gap = outputs.mean - apply(layer, kernel, mean)
    factorise = _primal if channels * pixels <= outputs.mean[0].numel() else _dual
    solve, std = factorise(layer, kernel, gram, outputs.std, _PROBES if with_std else 0)
    change = solve(wanted @ system, gap)
    for _ in range(_REFINEMENTS):  # the normal equations square the condition number, their residuals do not
        right = (wanted - change @ system.mT) @ system - precision * change
        change = change + solve(right, gap - apply(layer, kernel, change))
    return Estimate(mean + change, std)


def gradient_system(layer: Linear, delta: Tensor) -> Tensor:
    """The matrix ``[N, O·K, H·W]`` that takes any one channel of the input to its weight gradients.

    ∂L/∂W[o, c, k] = Σ_p δ[o, p] a[c, taps[k, p]]: it is the same for all channels.
    """
    taps = layer.taps.to(delta.device)
    system = delta.new_zeros(len(delta), delta.shape[1], taps.shape[0], layer.pixels + 1)
    system.scatter_(-1, taps.expand_as(system[..., : taps.shape[1]]), delta[:, :, None].expand(-1, -1, len(taps), -1))
    return system[..., :-1].flatten(1, 2)


def apply(layer: Linear, kernel: Tensor, inputs: Tensor) -> Tensor:
    """Outputs less bias ``[N, O, P]`` of inputs ``[N, C, H·W]``."""
    return kernel.flatten(2) @ layer.patches(inputs).flatten(1, 2)


def apply_transposed(layer: Linear, kernel: Tensor, outputs: Tensor) -> Tensor:
    """The adjoint of `apply`."""
    patches = (kernel.flatten(2).mT @ outputs).unflatten(1, (layer.shape[0], -1)).flatten(2)
    inputs = outputs.new_zeros(len(outputs), layer.shape[0], layer.pixels + 1)
    return inputs.index_add_(-1, layer.taps.to(outputs.device).flatten(), patches)[..., :-1]


Solve = Callable[[Tensor, Tensor], Tensor]
"""Input ``[N, C, H·W]`` of what the weight gradient asks, ``[N, C, H·W]``, and the outputs' gap ``[N, O, P]``."""


def _primal(layer: Linear, kernel: Tensor, gram: Tensor, std: Tensor, probes: int) -> tuple[Solve, Tensor]:
    """As many output equations as unknowns, or more: the normal matrix over all channels."""
    taps, channels, pixels = layer.taps.to(kernel.device), layer.shape[0], layer.pixels
    size = channels * (pixels + 1)  # one more unknown a channel, the padding
    weight = std**-2
    taps_count, positions = taps.shape
    if 2 * weight[0].numel() * size**2 < 150 * positions * (channels * taps_count) ** 2:  # many taps: a dense product
        rows = kernel.new_zeros(len(kernel), kernel.shape[1], positions, channels, pixels + 1)
        shape = (*rows.shape[:-1], taps_count)
        rows.scatter_(-1, taps.T[:, None].expand(shape), kernel[:, :, None].expand(shape))
        flat = rows.flatten(3).flatten(1, 2)
        normal = (flat * weight.flatten(1)[..., None]).mT @ flat
    else:
        flat = kernel.flatten(2)
        blocks = torch.einsum("nopi,noj->npij", weight[..., None] * flat[:, :, None], flat)
        at = (torch.arange(channels, device=taps.device)[:, None, None] * (pixels + 1) + taps).flatten(0, 1).T
        index = (at[:, :, None] * size + at[:, None, :]).flatten()
        normal = kernel.new_zeros(len(kernel), size * size).index_add_(1, index, blocks.flatten(1))
    normal = normal.view(-1, channels, pixels + 1, channels, pixels + 1)
    for channel in range(channels):
        normal[:, channel, :pixels, channel, :pixels] += gram
        normal[:, channel, pixels, channel, pixels] = _CERTAIN
    factor = _cholesky(normal.view(-1, size, size))

    def solve(right: Tensor, gap: Tensor) -> Tensor:
        right = F.pad(right + apply_transposed(layer, kernel, gap * weight), (0, 1))
        return _solve(factor, right.flatten(1)).view_as(right)[..., :-1]

    if not probes:
        return solve, torch.zeros_like(std[:, :1, :1])
    errors = torch.linalg.solve_triangular(factor.mT, _probes(factor.new_empty(size, probes)), upper=True)
    square = errors.square().mean(-1).view(-1, channels, pixels + 1).mean(1, keepdim=True)[..., :-1]
    return solve, square.sqrt().expand(-1, channels, -1)


def _dual(layer: Linear, kernel: Tensor, gram: Tensor, std: Tensor, probes: int) -> tuple[Solve, Tensor]:
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
        gap = outputs - apply(layer, kernel, inputs)
        gain = _solve(factor, gap.flatten(1)).view_as(gap)
        return inputs + apply_transposed(layer, kernel, gain) @ covariance

    # The errors of the result are those of random errors put through the same solve.
    square = torch.zeros_like(covariance[:, :1])
    units = _probes(covariance.new_empty(probes, channels, pixels))
    for unit, noise in zip(units, _probes(std.new_empty(probes, *std.shape[1:])), strict=True):
        inputs = torch.linalg.solve_triangular(gram_factor.mT, unit.T.expand(len(gram), -1, -1), upper=True).mT
        square += condition(inputs, noise * std).square().mean(1, keepdim=True)
    return lambda right, gap: condition(right @ covariance, gap), (square / max(probes, 1)).sqrt().expand(
        -1, channels, -1
    )


def _probes(like: Tensor) -> Tensor:
    """Standard normal numbers, the same at every call and on every device."""
    generator = plain_generator(0)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ of ``[N, n]``; unlike `torch.cholesky_solve` it does not copy the factors."""
    half = torch.linalg.solve_triangular(factor, right[..., None], upper=False)
    result: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)[..., 0]
    return result


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower factors ``[N, n, n]``; one that fails (NaN or Inf in a problem's own numbers) is NaN and harms no other."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        factor[info != 0] = torch.nan
    result: Tensor = factor
    return result
