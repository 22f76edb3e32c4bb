"""What each observed model does with inputs the attacker chooses: its features and probabilities, in one go."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedleak.attacks.base import Knowledge
from fedleak.attacks.labels.last_layer import LastLayer
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.seeding import plain_generator


@dataclass(frozen=True)
class Probe:
    """Features and probabilities of M inputs in each of U distinct networks.

    Attributes:
        features: ``[U, M, d]``, inputs of the last layer.
        probabilities: ``[U, M, C]``, softmax outputs.
        which: ``[N]`` int64, the network of each observation.
    """

    features: Tensor
    probabilities: Tensor
    which: Tensor

    @property
    def sums(self) -> Tensor:
        """``[U, M]`` float64, s = Σ_k h_k."""
        return self.features.sum(dim=2, dtype=torch.float64)


def dummy_images(knowledge: Knowledge, count: int, seed: int) -> Tensor:
    """``[count, C, H, W]`` uniform noise in [0, 1]: what an attacker without any data can feed a model."""
    generator = plain_generator(seed)
    return torch.rand((count, *knowledge.image_shape), generator=generator)


def auxiliary_images(knowledge: Knowledge, per_class: int, seed: int, who: str) -> tuple[Tensor, Tensor]:
    """Up to `per_class` auxiliary images of each class and their labels, ``[M, C, H, W]`` and ``[M]``.

    Raises:
        UsageError: if there is no auxiliary data.
    """
    if knowledge.auxiliary is None or len(knowledge.auxiliary[1]) == 0:
        raise UsageError(
            f"attack/labels={who} needs labelled images of its own and has none; grant threat.auxiliary_data=true, "
            "or choose attack/labels=fedleak"
        )
    images, labels = knowledge.auxiliary
    order = torch.randperm(len(labels), generator=plain_generator(seed))
    keep = [order[labels[order] == label][:per_class] for label in range(knowledge.classes)]
    index = torch.cat(keep)
    return images[index], labels[index].long()


def probe(observations: Sequence[Observation], layer: LastLayer, knowledge: Knowledge, images: Tensor) -> Probe:
    """Run `images` through the model of every observation; observations of one model share one run.

    Where a client took several local steps the model is taken halfway between the parameters it started from and
    those it ended with, if these are known. BatchNorm runs in the mode of their
    clients; dropout is off.
    """
    networks, which = _distinct([_midpoint(observation) for observation in observations])
    firsts = [observations[which.index(unit)] for unit in range(len(networks))]
    model = copy.deepcopy(knowledge.model).to("cpu")
    target = model.get_submodule(layer.name)
    images = images.to(networks[0][layer.weight].dtype)
    caught: list[Tensor] = []
    target.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))

    def features(parameters: Mapping[str, Tensor], observation: Observation) -> Tensor:
        model.train(observation.training.training_mode)
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        state = {name: value.clone() for name, value in observation.start_buffers.items()}
        functional_call(model, {**parameters, **state}, (images,))
        return caught.pop()

    with torch.no_grad():  # a plain loop: on a CPU it is faster than vmap's grouped convolutions
        rows = [features(network, first) for network, first in zip(networks, firsts, strict=True)]
        hidden = torch.stack(rows)
        logits = hidden @ torch.stack([net[layer.weight] for net in networks]).transpose(1, 2)
        if layer.bias:
            logits = logits + torch.stack([net[layer.bias] for net in networks])[:, None]
    return Probe(hidden, logits.softmax(dim=2), torch.tensor(which))


def _midpoint(observation: Observation) -> Mapping[str, Tensor]:
    """Parameters halfway through the client's local steps; its start where there is one step or the end is unknown."""
    start, training = observation.parameters, observation.training
    if training.single:
        return start
    if training.payload == "weights":
        return {name: (value + observation.update[name]) / 2 for name, value in start.items()}
    if training.lr is not None:  # the update is the sum of the steps' gradients
        return {name: value - training.lr / 2 * observation.update[name] for name, value in start.items()}
    return start


def _distinct(networks: Sequence[Mapping[str, Tensor]]) -> tuple[list[Mapping[str, Tensor]], list[int]]:
    """The distinct networks, and for each network its place among them."""
    found: list[Mapping[str, Tensor]] = []
    places: dict[tuple[float, ...], list[int]] = {}
    which = []
    for network in networks:
        values = list(network.values())
        key = tuple(float(value.flatten()[0]) for value in values)
        same = places.setdefault(key, [])
        for place in same:
            if all(a is b or torch.equal(a, b) for a, b in zip(values, found[place].values(), strict=True)):
                which.append(place)
                break
        else:
            same.append(len(found))
            which.append(len(found))
            found.append(network)
    return found, which
