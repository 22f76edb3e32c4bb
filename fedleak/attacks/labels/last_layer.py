"""The last fully connected layer: which one it is, and its gradients from many updates at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedleak.attacks.base import Knowledge, LabelGuess, LabelInference, Run
from fedleak.capture import Observation
from fedleak.errors import UsageError

_CHUNK = 2**26
"""Elements of ∂L/∂W held at once: thousands of small models, or a few with a thousand classes."""


@dataclass(frozen=True)
class LastLayer:
    """The linear layer that gives the logits.

    Attributes:
        name: the module's name in the model.
        weight, bias: names of its parameters; `bias` is None where it has none.
        classes, features: its output and input sizes, C and d.
    """

    name: str
    weight: str
    bias: str | None
    classes: int
    features: int


@dataclass(frozen=True)
class LastLayerGradients:
    """Mean gradients of the last layer over a client's local steps, N updates together.

    Attributes:
        weight: ``[N, C, d]``, ∂L/∂W.
        bias: ``[N, C]``, ∂L/∂b; None where the layer has no bias.
    """

    weight: Tensor
    bias: Tensor | None


def find_last_layer(knowledge: Knowledge) -> LastLayer:
    """The `nn.Linear` called last in a forward pass of the model, whatever its name.

    Raises:
        UsageError: if the model has no linear layer, or its last one does not give a logit a class.
    """
    model = knowledge.model
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not names:
        raise UsageError(
            f"the model {type(model).__name__} has no nn.Linear layer and label inference reads the last one; "
            "choose a model that ends in one, or attack/labels=joint"
        )
    module = _called_last(knowledge, list(names)) or list(names)[-1]
    name = names[module]
    if module.out_features != knowledge.classes:
        raise UsageError(
            f"the last linear layer '{name}' of {type(model).__name__} has {module.out_features} outputs for "
            f"{knowledge.classes} classes; choose a model that ends in a linear layer with one output a class"
        )
    prefix = f"{name}." if name else ""
    bias = f"{prefix}bias" if module.bias is not None else None
    return LastLayer(name, f"{prefix}weight", bias, module.out_features, module.in_features)


def _called_last(knowledge: Knowledge, layers: list[nn.Linear]) -> nn.Linear | None:
    """Which of the linear layers a forward pass of one grey image calls last; None if it cannot be run."""
    model = knowledge.model
    called: list[nn.Linear] = []
    hooks = [layer.register_forward_hook(lambda module, *_: called.append(module)) for layer in layers]
    modes = {module: module.training for module in model.modules()}
    first = next(model.parameters())
    try:
        model.eval()  # one image in train mode would fail, or move the statistics, in BatchNorm
        with torch.no_grad():
            model(torch.full((1, *knowledge.image_shape), 0.5, device=first.device, dtype=first.dtype))
    except RuntimeError:  # a model on the meta device, say: the order of definition has to do
        return None
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return called[-1] if called else None


def last_layer_gradients(observations: Sequence[Observation], layer: LastLayer) -> LastLayerGradients:
    """Mean gradients of the last layer, of N observations stacked; per-sample updates are averaged.

    Sign and scale are undone (`Observation.gradient`): right up to a positive factor where the learning rate is
    withheld.

    Raises:
        UsageError: if an update lacks the layer, holds NaN or infinity there, or is zero everywhere in it.
    """
    rows = [_gradient(observation, layer) for observation in observations]
    weight = torch.stack([row[layer.weight] for row in rows])
    bias = torch.stack([row[layer.bias] for row in rows]) if layer.bias else None
    largest = weight.abs().amax(dim=(1, 2))
    if bias is not None:
        largest = torch.maximum(largest, bias.abs().amax(dim=1).to(largest.dtype))
    for observation, value in zip(observations, largest.tolist(), strict=True):
        if value == 0.0:
            raise UsageError(
                f"{where(observation)} is zero in the last layer '{layer.name}' and tells nothing about labels; "
                "check federation.lr, defense and that the client trains this layer"
            )
        if not value < float("inf"):
            raise UsageError(
                f"{where(observation)} holds NaN or infinity in the last layer '{layer.name}'; leave this update out, "
                "or lower federation.lr"
            )
    return LastLayerGradients(weight, bias)


def per_sample_gradients(observation: Observation, layer: LastLayer) -> LastLayerGradients:
    """The last layer's gradient of every sample of one per-sample observation, as ``[B, C, d]`` and ``[B, C]``."""
    rows = _narrow(observation, layer).gradient()
    return LastLayerGradients(rows[layer.weight], rows[layer.bias] if layer.bias else None)


def where(observation: Observation) -> str:
    """How messages name an observation's update."""
    return f"the update of client {observation.client} in round {observation.round}"


def _narrow(observation: Observation, layer: LastLayer) -> Observation:
    """The observation with nothing but the last layer, so that only this layer is converted."""
    names = [layer.weight] + ([layer.bias] if layer.bias else [])
    try:
        return replace(
            observation,
            parameters={name: observation.parameters[name] for name in names},
            update={name: observation.update[name] for name in names},
        )
    except KeyError as error:
        raise UsageError(
            f"{where(observation)} has no tensor named {error}; attack it with the model that its client trained"
        ) from None


def _gradient(observation: Observation, layer: LastLayer) -> dict[str, Tensor]:
    gradient = _narrow(observation, layer).gradient()
    if observation.training.per_sample:
        gradient = {name: value.mean(dim=0) for name, value in gradient.items()}
    return gradient


class LastLayerInference(LabelInference):
    """A label inference that reads the last layer's gradient, many updates at once; subclasses write `read`."""

    @abstractmethod
    def read(
        self, observations: Sequence[Observation], layer: LastLayer, knowledge: Knowledge, run: Run, candidates: int
    ) -> list[LabelGuess]:
        """The guess of each of N updates without an error; raises `UsageError` where one cannot be read."""

    def check_model(self, knowledge: Knowledge) -> None:
        """See `LabelInference.check_model`: a last linear layer is needed."""
        find_last_layer(knowledge)

    def infer(
        self, observations: Sequence[Observation], knowledge: Knowledge, run: Run, *, candidates: int = 1
    ) -> list[LabelGuess | None]:
        """Infer the labels behind each observation; None for an observation that carries an error.

        Raises:
            UsageError: if the model has no final linear layer, an update is NaN there, or a method needs what it does
                not have: a batch size, an update of one sample, a gradient for each.
        """
        guesses: list[LabelGuess | None] = [None] * len(observations)
        usable = [index for index, observation in enumerate(observations) if observation.error is None]
        if not usable:
            return guesses
        layer = find_last_layer(knowledge)
        # Memory is bounded; of many classes a system of them is larger than the layer.
        size = max(1, _CHUNK // (layer.classes * max(layer.features, 4 * layer.classes)))
        for start in range(0, len(usable), size):
            chunk = usable[start : start + size]
            found = self.read([observations[index] for index in chunk], layer, knowledge, run, candidates)
            for index, guess in zip(chunk, found, strict=True):
                guesses[index] = guess
        return guesses
