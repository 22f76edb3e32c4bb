"""The update model that fits: a chain's sweeps where they hold, automatic differentiation elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from fedleak.attacks.chain import read_layers
from fedleak.attacks.jacobian.base import UpdateModel
from fedleak.attacks.jacobian.chain import ChainModel
from fedleak.attacks.jacobian.general import GeneralModel
from fedleak.attacks.problem import Target


def update_model(
    model: nn.Module,
    targets: Sequence[Target],
    image_shape: tuple[int, int, int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> UpdateModel:
    """How P updates depend on their images.

    Args:
        model: the architecture; its own weights are not used.
        targets: one a problem, trained alike.
        image_shape: (C, H, W).
        device, dtype: where and in which precision.
    """
    training = targets[0].training
    if training.single:
        layers = read_layers(copy.deepcopy(model).cpu().train(training.training_mode), image_shape)
        if layers is not None:
            return ChainModel(layers, targets, device=torch.device(device), dtype=dtype)
    return GeneralModel(model, targets, device=device, dtype=dtype)
