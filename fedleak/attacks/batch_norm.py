"""What BatchNorm tells: a batch's own statistics, from the buffers that a client returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
Statistics = dict[str, tuple[Tensor, Tensor]]
"""Module name -> mean ``[C]`` and variance ``[C]`` (over B·H·W numbers, not one less) of its input."""


def batch_statistics(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> Statistics | None:
    """The statistics of the one batch between two states of the buffers: μ = (μ_after − (1 − ρ) μ_before) / ρ.

    Args:
        model: the architecture.
        before, after: name -> running means and variances, where a train-mode step began and ended.
        sizes: module name -> numbers a channel that the variance was taken over; see `sizes_of`.

    Returns:
        None where the buffers did not move, are missing, or average cumulatively.
    """
    found: Statistics = {}
    for name, module in model.named_modules():
        if not isinstance(module, _BATCH_NORM) or module.running_mean is None:
            continue
        rho, count = module.momentum, sizes.get(name, 0)
        mean, var = (f"{name}.{kind}" if name else kind for kind in ("running_mean", "running_var"))
        if rho is None or count < 2 or not all(key in side for key in (mean, var) for side in (before, after)):
            return None
        if torch.equal(before[mean], after[mean]):
            return None  # eval mode
        old, new = ({key: side[key].double() for key in (mean, var)} for side in (before, after))
        batch = {key: (new[key] - (1 - rho) * old[key]) / rho for key in (mean, var)}
        found[name] = batch[mean], batch[var].clamp(min=0) * (count - 1) / count
    return found or None


def running_statistics(model: nn.Module, buffers: Mapping[str, Tensor]) -> Statistics:
    """The running ones, as a stand-in for a batch's own."""
    found: Statistics = {}
    for name, module in model.named_modules():
        mean, var = (f"{name}.{kind}" if name else kind for kind in ("running_mean", "running_var"))
        if isinstance(module, _BATCH_NORM) and mean in buffers and var in buffers:
            found[name] = buffers[mean].double(), buffers[var].double()
    return found


def sizes_of(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Numbers a channel that each BatchNorm of `model` sees of a batch ``[B, C, H, W]``."""
    parameter = next(model.parameters())
    was = model.training
    with torch.no_grad():
        seen = seen_by_norms(model.eval(), lambda: model(torch.zeros(shape, dtype=parameter.dtype)))
    model.train(was)
    return {name: value.numel() // value.shape[1] for name, value in seen.items()}


def seen_by_norms(model: nn.Module, forward: Callable[[], object]) -> dict[str, Tensor]:
    """The inputs of every BatchNorm while `forward` runs, by module name."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORM):

            def keep(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                seen[name] = inputs[0]

            handles.append(module.register_forward_pre_hook(keep))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def statistics_gap(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    images: Tensor,
    wanted: Statistics,
) -> Tensor:
    """Mean over BatchNorms of ‖μ(x) − μ‖ + ‖σ²(x) − σ²‖, over √C: ``[]``, differentiable in images ``[B, C, H, W]``."""
    seen = seen_by_norms(model, lambda: functional_call(model, {**parameters, **buffers}, (images,)))
    total = images.new_zeros(())
    for name, value in seen.items():
        if name not in wanted:
            continue
        axes = [axis for axis in range(value.dim()) if axis != 1]
        var, mean = torch.var_mean(value, axes, correction=0)
        want_mean, want_var = (v.to(value) for v in wanted[name])
        gap = (mean - want_mean).square().sum() + 1e-12, (var - want_var).square().sum() + 1e-12
        total = total + (gap[0].sqrt() + gap[1].sqrt()) / math.sqrt(len(mean)) / len(seen)
    return total
