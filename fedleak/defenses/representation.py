"""Soteria: the gradient of the layer above a client's representation, without what tells most of the images."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from fedleak.defenses.base import ClientView, Defense, Imitation
from fedleak.defenses.masking import masked
from fedleak.errors import UsageError
from fedleak.training import LocalTraining, Tensors


class Soteria(Defense):
    """Columns of the last fully connected layer's gradient are set to zero, those of the features that tell most.

    With r the input of that layer, a feature tells much of the images X where ‖∂r_i/∂X‖ / |r_i| is small. It hides
    these features from whoever solves for the representation first. All other layers' gradients leave as they are, and
    from them alone the images can be found, so that an attacker who leaves the masked columns out loses little.

    Args:
        ratio: the fraction of features to zero, in [0, 1).

    Raises:
        UsageError: `ratio` is outside [0, 1), or it is used without a client's model and images (see `Defense.seeing`).

    References:
        Sun, Li, Wang, Yang, Li, Chen. Soteria: Provable defense against privacy leakage in federated learning from
        representation perspective. CVPR 2021.
        Balunović, Dimitrov, Staab, Vechev. Bayesian framework for gradient leakage. ICLR 2022, who break it.
    """

    knob: ClassVar[str | None] = "ratio"

    def __init__(self, ratio: float = 0.6) -> None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise UsageError(f"defense.ratio={ratio} is no fraction of features; give a number in [0, 1), say 0.6")
        self.ratio = float(ratio)
        self.hidden: tuple[str, Tensor] | None = None

    def seeing(self, client: ClientView) -> Defense:
        """The features to hide of this client's batch; of an attacker's view, which has none, nothing."""
        if client.model is None or client.images is None:
            return self
        name, features = _features(client)
        score = torch.zeros(features.shape[1], dtype=torch.float64)
        for sample, image in enumerate(client.images):
            rows = jacrev(lambda x: _representation(client, name, x[None])[0], chunk_size=256)(image)
            size = rows.flatten(1).double().norm(dim=1)
            score += (size / features[sample].double().abs().clamp_min(1e-12)).cpu()
        count = int(self.ratio * len(score) + 1e-9)
        hidden = torch.zeros(len(score), dtype=torch.bool)
        hidden[score.argsort(stable=True)[:count]] = True
        found = copy.copy(self)
        found.hidden = (f"{name}.weight", hidden)
        return found

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        """Zeros in the hidden features' columns."""
        if self.hidden is None:
            raise UsageError("defense=soteria looks at the client's model and images; apply what `seeing` returns")
        name, hidden = self.hidden
        value = update[name]
        return dict(update) | {name: torch.where(hidden.to(value.device), torch.zeros_like(value), value)}

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """The mask that the zeros of the observed update show."""
        return masked(observed)


def _features(client: ClientView) -> tuple[str, Tensor]:
    """The name of the model's last fully connected layer, and its inputs ``[B, d]``."""
    assert client.model is not None
    assert client.images is not None
    layers = [name for name, module in client.model.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UsageError("defense=soteria: the model has no fully connected layer; choose another defense or model")
    return layers[-1], _representation(client, layers[-1], client.images).detach()


def _representation(client: ClientView, name: str, images: Tensor) -> Tensor:
    """Inputs ``[B, d]`` of a layer."""
    assert client.model is not None
    seen: list[Tensor] = []
    handle = client.model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    was_training = client.model.training
    try:
        client.model.eval()  # BatchNorm's statistics are not to move
        functional_call(client.model, {**client.parameters, **client.buffers}, (images,))
    finally:
        handle.remove()
        client.model.train(was_training)
    return seen[0]
