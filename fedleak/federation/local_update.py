"""What an honest client does between receiving the model and answering; pure, so that the evaluation can repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fedleak.capture import Payload


@dataclass(frozen=True)
class LocalUpdate:
    """Outcome of a client's local training.

    Attributes:
        update: name -> tensor: the sum of the local steps' gradients, or the new weights.
        buffers: name -> tensor: floating-point buffers after training.
        loss: mean training loss over the local steps.
    """

    update: dict[str, Tensor]
    buffers: dict[str, Tensor]
    loss: float


def local_update(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    local_steps: int = 1,
    lr: float,
    payload: Payload,
    per_sample: bool = False,
    training_mode: bool = True,
) -> LocalUpdate:
    """Plain SGD on the mean cross-entropy of each local step's batch.

    Args:
        model: the architecture; its own weights are not used.
        parameters, buffers: name -> tensor, where training starts.
        images: ``[T * B, C, H, W]`` in [0, 1], local step by local step.
        labels: ``[T * B]``.
        local_steps: T.
        lr: learning rate.
        payload: what `update` is, see `fedleak.capture.Observation`.
        per_sample: return each sample's gradient with a leading dimension B (one local step, payload ``gradient``).
        training_mode: run the model in train mode (BatchNorm, dropout).
    """
    was_training = model.training
    model.train(training_mode)
    try:
        weights = {name: value.detach().clone() for name, value in parameters.items()}
        state = {name: value.detach().clone() for name, value in buffers.items()}
        if per_sample:
            return _per_sample(model, weights, state, images, labels)
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        loss_sum = 0.0
        for step_images, step_labels in zip(images.chunk(local_steps), labels.chunk(local_steps), strict=True):
            for value in weights.values():
                value.requires_grad_(True)
            # functional_call writes new BatchNorm statistics into `state`, as a client's own training would.
            loss = cross_entropy(functional_call(model, {**weights, **state}, (step_images,)), step_labels)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            loss_sum += float(loss.detach())
            with torch.no_grad():
                for name, gradient in zip(weights, gradients, strict=True):
                    total[name] += gradient
                    weights[name] = weights[name].detach() - lr * gradient
        update = total if payload == "gradient" else weights
        return LocalUpdate(update, state, loss_sum / local_steps)
    finally:
        model.train(was_training)


def _per_sample(
    model: nn.Module, weights: dict[str, Tensor], state: dict[str, Tensor], images: Tensor, labels: Tensor
) -> LocalUpdate:
    def loss(w: dict[str, Tensor], image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        value = cross_entropy(functional_call(model, {**w, **state}, (image[None],)), label[None])
        return value, value

    update, losses = vmap(grad(loss, has_aux=True), in_dims=(None, 0, 0), randomness="different")(
        weights, images, labels
    )
    return LocalUpdate(update, state, float(losses.mean()))
