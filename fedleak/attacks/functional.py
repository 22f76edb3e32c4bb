"""A model that can be differentiated as a function of weights and images."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedleak.attacks.norms import write_out
from fedleak.training import Given, LocalTraining, Tensors, unroll


def functional_copy(model: nn.Module, training_mode: bool) -> nn.Module:
    """A copy that may be differentiated twice under vmap: nothing in place, no running statistics in train mode."""
    model = copy.deepcopy(model).train(training_mode)
    write_out(model)
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return model.requires_grad_(False)


def mean_gradient(
    model: nn.Module,
    parameters: Given,
    buffers: Given,
    images: Tensor,
    labels: Tensor,
    training: LocalTraining | None = None,
) -> Tensors:
    """What a client sends, as a mean gradient; differentiable in images and labels, and made for `torch.vmap`.

    Args:
        model: from `functional_copy`.
        parameters, buffers: name -> tensor, where the client starts.
        images: ``[B, C, H, W]``, local step by local step.
        labels: ``[B, classes]`` label distributions.
        training: how it trains; None for one step on all samples.
    """

    def gradient_at(step: int | None, weights: Given) -> Tensors:
        x, y = (v if step is None or training is None else training.batch(v, step) for v in (images, labels))

        def loss(weights: Given) -> Tensor:
            return -(y * torch.log_softmax(functional_call(model, {**weights, **buffers}, (x,)), 1)).sum(1).mean()

        found: Tensors = grad(loss)(weights)
        return found

    if training is None:
        return gradient_at(None, parameters)
    return training.mean_gradient(parameters, unroll(gradient_at, parameters, training))
