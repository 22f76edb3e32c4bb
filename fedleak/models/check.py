"""What a model cannot do as it is to be trained, or an attacker cannot know of it; said before anything runs."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fedleak.errors import UsageError
from fedleak.models.bottleneck import VariationalBottleneck

_DROPOUT = nn.modules.dropout._DropoutNd
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def check_training(model: nn.Module, image_shape: tuple[int, int, int], batch_size: int, training_mode: bool) -> None:
    """Raise `UsageError` where clients could not train: BatchNorm in train mode needs two numbers a channel.

    Args:
        model: takes images ``[B, *image_shape]``.
        image_shape: (C, H, W).
        batch_size: of the smallest batch that a client trains on.
        training_mode: whether the model runs in train mode.
    """
    if not training_mode or batch_size > 1 or not any(isinstance(m, _BATCH_NORM) for m in model.modules()):
        return
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(torch.zeros(batch_size, *image_shape))
    except ValueError as error:
        raise UsageError(
            f"federation.batch_size={batch_size}: a BatchNorm of the model sees a single number a channel, and has no "
            "variance to divide by; choose federation.batch_size=2, federation.training_mode=false or model.norm=group"
        ) from error


def hidden_draws(model: nn.Module, training_mode: bool) -> str | None:
    """What of a training step an attacker cannot repeat, as a warning; None where there is nothing."""
    if training_mode and any(isinstance(m, VariationalBottleneck) for m in model.modules()):
        return (
            "the model's bottleneck draws at random in train mode, and nobody but the client knows what: only "
            "attack.adaptive=true reckons with that, for single samples; model.precode=0 leaves it out"
        )
    dropping = [name for name, m in model.named_modules() if isinstance(m, _DROPOUT) and m.p > 0]
    if not training_mode or not dropping:
        return None
    return (
        f"the model drops units at random in train mode ({', '.join(dropping[:3])}), and nobody but the client knows "
        "which: images will hardly be found; choose model.dropout=0 or federation.training_mode=false to study the rest"
    )
