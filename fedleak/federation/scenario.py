"""What server, clients and evaluation agree on, built from the config and the seed alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fedleak.data import ImageData, to_float
from fedleak.defenses import Defense
from fedleak.errors import UsageError
from fedleak.federation.adversary import Adversary
from fedleak.federation.rounds import is_due
from fedleak.instantiate import instantiate
from fedleak.models import build_model
from fedleak.seeding import derive_seed, generator
from fedleak.threat import ThreatModel
from fedleak.training import SGD, LocalTraining, Payload

AUXILIARY_IMAGES = 1024


@dataclass(frozen=True)
class Federation:
    """The `federation` group of the config."""

    clients: int
    rounds: int
    fraction: float
    batch_size: int
    local_steps: int
    lr: float
    payload: Payload
    training_mode: bool = True
    evaluate_every: int = 1
    capture_every: int = 1

    @property
    def training(self) -> LocalTraining:
        """How each client trains."""
        return LocalTraining(
            payload=self.payload,
            batch_size=self.batch_size,
            local_steps=self.local_steps,
            optimizer=SGD(self.lr),
            training_mode=self.training_mode,
        )

    def evaluates(self, server_round: int) -> bool:
        """Whether the test accuracy is measured after this round."""
        return is_due(server_round, self.evaluate_every) or server_round == self.rounds


@dataclass(frozen=True)
class Scenario:
    """A federation ready to start: the same object in the server's process and in every client's.

    Attributes:
        data: the images.
        parts: a tensor of training-image indices a client.
        model: the shared model with its initial weights.
        adversary: what the server does to it, nothing if it is honest.
        auxiliary: what an attacker may be granted: indices into the test images, kept out of the utility's.
        utility: indices of the test images that measure utility.
    """

    federation: Federation
    data: ImageData
    parts: list[Tensor]
    model: nn.Module
    defense: Defense
    threat: ThreatModel
    seed: int
    device: torch.device
    auxiliary: Tensor
    utility: Tensor
    adversary: Adversary

    @property
    def training(self) -> LocalTraining:
        """How each client trains, under this threat model."""
        return replace(self.federation.training, per_sample=self.threat.per_sample_gradients)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.data.image_shape

    def start(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(parameters, floating-point buffers) of the initial model, which are what is federated.

        Buffers outside the state dict are constants of the architecture (a normalisation's mean, say).
        """
        parameters = {name: value.detach() for name, value in self.model.named_parameters()}
        state = self.model.state_dict()
        buffers = {n: v for n, v in state.items() if n not in parameters and v.is_floating_point()}
        return parameters, buffers

    def private_batch(self, client: int, server_round: int) -> tuple[Tensor, Tensor]:
        """What `client` trains on in `server_round`: images ``[T * B, C, H, W]`` in [0, 1] and labels ``[T * B]``.

        Batches are drawn without replacement while the client's images last; a client with fewer images than the
        batch size uses all it has.
        """
        mine = self.parts[client]
        size = min(self.federation.batch_size, len(mine))
        random = generator(self.seed, "batch", client, server_round)
        drawn: list[Tensor] = []
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(self.federation.local_steps):
            if len(order) < size:
                order = torch.randperm(len(mine), generator=random)
            drawn.append(mine[order[:size]])
            order = order[size:]
        chosen = torch.cat(drawn)
        return to_float(self.data.train_images[chosen]), self.data.train_labels[chosen]

    def auxiliary_data(self) -> tuple[Tensor, Tensor] | None:
        """The attacker's own images and labels, if the threat model grants them."""
        if not self.threat.auxiliary_data:
            return None
        return to_float(self.data.test_images[self.auxiliary]), self.data.test_labels[self.auxiliary]


def build_scenario(config: Mapping[str, Any]) -> Scenario:
    """Build, or take from the cache, the scenario of a plain-container config.

    Raises:
        UsageError: data, partition, model or defense cannot be built from it; names the key, the value and the mend.
    """
    keys = ("data", "partition", "model", "federation", "defense", "threat", "seed", "device")
    chosen = {key: config[key] for key in keys} | {"adversary": config.get("adversary")}
    return _build(json.dumps(chosen, sort_keys=True))


def build_adversary(config: Mapping[str, Any]) -> Adversary:
    """The adversary of a config; an honest server where it names none, as runs from before there were any do."""
    node = config.get("adversary")
    return Adversary() if node is None else instantiate(node, "adversary")


def shared_model(config: Mapping[str, Any], image_shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """The model of a config as the federation starts with it: freshly initialised, then prepared by the adversary."""
    return build_adversary(config).prepare(build_model(config["model"], image_shape, classes, seed))


@lru_cache(maxsize=1)
def _build(config_json: str) -> Scenario:
    config = json.loads(config_json)
    federation = Federation(**config["federation"])
    threat = ThreatModel(**config["threat"])
    seed = config["seed"]
    data = load_data(config["data"])
    partitioner = instantiate(config["partition"], "partition")
    parts = partitioner(data.train_labels, federation.clients, generator(seed, "partition"))
    order = torch.randperm(len(data.test_labels), generator=generator(seed, "auxiliary"))
    held_back = min(AUXILIARY_IMAGES, len(order) // 4)
    return Scenario(
        federation=federation,
        data=data,
        parts=parts,
        model=shared_model(config, data.image_shape, data.classes, derive_seed(seed, "model")),
        defense=instantiate(config["defense"], "defense"),
        threat=threat,
        seed=seed,
        device=resolve_device(config["device"]),
        auxiliary=order[:held_back],
        utility=order[held_back:].sort().values,
        adversary=build_adversary(config),
    )


def load_data(config: Mapping[str, Any]) -> ImageData:
    """Load, or take from the cache, the images of a `data` config; raises `UsageError` where they are not there."""
    return _load_data(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=4)
def _load_data(config_json: str) -> ImageData:
    return instantiate(json.loads(config_json), "data")


def resolve_device(name: str) -> torch.device:
    """``auto`` takes the GPU when there is one; raises `UsageError` for ``cuda`` without one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda: no CUDA device is available here; use device=cpu or device=auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
