"""What an honest client does between receiving the model and answering; pure, so that the evaluation can repeat it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fedleak.training import LocalTraining, Tensors, unroll


@dataclass(frozen=True)
class LocalUpdate:
    """Outcome of a client's local training.

    Attributes:
        update: name -> tensor: the sum of the local steps' gradients, or the new weights.
        buffers: name -> tensor: floating-point buffers after training.
        loss: mean training loss over the local steps.
    """

    update: Tensors
    buffers: Tensors
    loss: float


def local_update(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    training: LocalTraining,
    *,
    examples: Callable[[Tensors], Tensors] | None = None,
) -> LocalUpdate:
    """Local training on the mean cross-entropy of each local step's batch.

    Args:
        model: the architecture; its own weights are not used.
        parameters, buffers: name -> tensor, where training starts.
        images: ``[T * B, C, H, W]`` in [0, 1], local step by local step of one epoch.
        labels: ``[T * B]``.
        training: how; the batch size is that of the data, whatever it says.
        examples: what becomes of each step's gradients of single samples, name -> ``[B, ...]``, before their mean is
            taken; None leaves them alone.

    Raises:
        ValueError: the data do not make T equal batches.
    """
    was_training = model.training
    model.train(training.training_mode)
    state = {name: value.detach().clone() for name, value in buffers.items()}
    losses: list[float] = []

    def of_batch(step: int, weights: Tensors) -> Tensors:
        leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
        # functional_call writes new BatchNorm statistics into `state`, as a client's own training would.
        logits = functional_call(model, {**leaves, **state}, (training.batch(images, step),))
        loss = cross_entropy(logits, training.batch(labels, step))
        losses.append(float(loss.detach()))
        # What the loss does not depend on, such as an auxiliary classifier, stays as it is.
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, gradients, strict=True))

    def of_each(step: int, weights: Tensors) -> Tensors:
        def loss(weights: Tensors, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
            value = cross_entropy(functional_call(model, {**weights, **state}, (image[None],)), label[None])
            return value, value

        gradients, each = vmap(grad(loss, has_aux=True), in_dims=(None, 0, 0), randomness="different")(
            weights, training.batch(images, step), training.batch(labels, step)
        )
        losses.append(float(each.mean()))
        gradients = gradients if examples is None else examples(gradients)
        return gradients if training.per_sample else {name: value.mean(0) for name, value in gradients.items()}

    try:
        start = {name: value.detach().clone() for name, value in parameters.items()}
        one_by_one = training.per_sample or examples is not None
        update = unroll(of_each if one_by_one else of_batch, start, training)
        return LocalUpdate(update, state, sum(losses) / len(losses))
    finally:
        model.train(was_training)
