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
from fedleak.attacks.jacobian.imitated import ImitatedModel
from fedleak.attacks.jacobian.loop import LoopModel
from fedleak.attacks.problem import Target
from fedleak.defenses.masking import Mask


def update_model(
    model: nn.Module,
    targets: Sequence[Target],
    image_shape: tuple[int, int, int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> UpdateModel:
    """How P updates depend on their images, as far as they are known through what each client's defense makes of them.

    A mask is left to the noise model, to which what a mask withholds has no precision.

    Args:
        model: the architecture; its own weights are not used.
        targets: one a problem, trained alike.
        image_shape: (C, H, W).
        device, dtype: where and in which precision.
    """
    plain = _undefended(model, targets, image_shape, device=device, dtype=dtype)
    if any(target.imitate is not None and not isinstance(target.imitate, Mask) for target in targets):
        return ImitatedModel(plain, targets)
    return plain


def _undefended(
    model: nn.Module,
    targets: Sequence[Target],
    image_shape: tuple[int, int, int],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> UpdateModel:
    training = targets[0].training
    once = training.single and training.shares is not None
    if once or (training.steps is not None and training.optimizer is not None):
        layers = read_layers(copy.deepcopy(model).cpu().train(training.training_mode), image_shape)
        if layers is not None:
            kind = ChainModel if once else LoopModel
            return kind(layers, targets, device=torch.device(device), dtype=dtype)
    return GeneralModel(model, targets, device=device, dtype=dtype)
