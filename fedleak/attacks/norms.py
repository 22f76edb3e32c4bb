"""Normalisations written out, for second derivatives under `torch.vmap`, where torch's own are wrong.

The rule by which vmap differentiates the gradients of batch_norm (in train mode), layer_norm and instance_norm gives
wrong numbers without a word (pytorch/functorch issue 534; seen with torch 2.14). GroupNorm's is right.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_INSTANCE_NORM = nn.modules.instancenorm._InstanceNorm


def write_out(model: nn.Module) -> nn.Module:
    """`model` with normalisations that use their input's own statistics replaced by such written out, in place.

    What they took from running statistics they go on taking; in train mode nothing is updated.
    """
    for name, child in model.named_children():
        other = _written(child)
        if other is None:
            write_out(child)
        else:
            setattr(model, name, other)
    return model


def _written(module: nn.Module) -> nn.Module | None:
    if isinstance(module, _BATCH_NORM | _INSTANCE_NORM):
        if not module.training and module.running_mean is not None:
            return None
        return _Batch(module) if isinstance(module, _BATCH_NORM) else _Instance(module)
    return _Layer(module) if type(module) is nn.LayerNorm else None


class _Batch(_BATCH_NORM):
    """A BatchNorm that takes its batch's statistics and keeps none; hooks on BatchNorms go on finding it."""

    def __init__(self, of: nn.modules.batchnorm._NormBase) -> None:
        super().__init__(of.num_features, of.eps, affine=of.affine, track_running_stats=False)
        self.weight, self.bias = of.weight, of.bias

    def forward(self, maps: Tensor) -> Tensor:
        """``[B, C, ...]`` to as many."""
        return _scaled(self, _normalised(maps, [axis for axis in range(maps.dim()) if axis != 1], self.eps))


class _Instance(_INSTANCE_NORM):
    """An InstanceNorm that takes each map's statistics."""

    def __init__(self, of: nn.modules.batchnorm._NormBase) -> None:
        super().__init__(of.num_features, of.eps, affine=of.affine, track_running_stats=False)
        self.weight, self.bias = of.weight, of.bias

    def forward(self, maps: Tensor) -> Tensor:
        """``[B, C, ...]`` to as many."""
        return _scaled(self, _normalised(maps, list(range(2, maps.dim())), self.eps))


class _Layer(nn.Module):
    """A LayerNorm."""

    def __init__(self, of: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.dimensions = of.weight, of.bias, of.eps, len(of.normalized_shape)

    def forward(self, a: Tensor) -> Tensor:
        """``[..., *shape]`` to as many."""
        a = _normalised(a, list(range(-self.dimensions, 0)), self.eps)
        a = a if self.weight is None else a * self.weight
        return a if self.bias is None else a + self.bias


def _normalised(a: Tensor, axes: list[int], eps: float) -> Tensor:
    var, mean = torch.var_mean(a, axes, correction=0, keepdim=True)
    return (a - mean) * (var + eps).rsqrt()


def _scaled(norm: nn.modules.batchnorm._NormBase, maps: Tensor) -> Tensor:
    if not norm.affine:
        return maps
    weight, bias = (v.view(-1, *[1] * (maps.dim() - 2)) for v in (norm.weight, norm.bias))
    return maps * weight + bias
