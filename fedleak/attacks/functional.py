"""A model that can be differentiated as a function of weights and images."""

from __future__ import annotations

import copy

import torch
from torch import nn


def functional_copy(model: nn.Module, training_mode: bool) -> nn.Module:
    """A copy that may be differentiated twice under vmap: nothing in place, no running statistics in train mode."""
    model = copy.deepcopy(model).train(training_mode)
    if training_mode:
        torch.func.replace_all_batch_norm_modules_(model)  # batch statistics are used, running ones not updated
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return model.requires_grad_(False)
