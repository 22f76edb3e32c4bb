"""What server, clients and evaluation agree on, built from the setup alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from fedleak.condensation.store import load_condensed
from fedleak.config import Rule, is_number, whole
from fedleak.data import ImageData, to_float
from fedleak.defenses import Defense
from fedleak.errors import UsageError
from fedleak.federation.adversary import Adversary
from fedleak.federation.strategy import Repeatable, dropped, sampled
from fedleak.instantiate import Part
from fedleak.models import build_model
from fedleak.rounds import EVERYTHING, Keep
from fedleak.seeding import derive_seed, generator
from fedleak.setup import Federation, Setup
from fedleak.threat import ThreatModel
from fedleak.training import LocalTraining

AUXILIARY_IMAGES = 1024
CLIPPING = {
    "DifferentialPrivacyClientSideFixedClipping": fixedclipping_mod,
    "DifferentialPrivacyClientSideAdaptiveClipping": adaptiveclipping_mod,
}
"""Strategies that leave a part of the work to their clients, and Flower's name for that part."""


@dataclass(frozen=True)
class Scenario:
    """A federation ready to start: the same object in the server's process and in every client's.

    Attributes:
        training: how each client trains in the first round.
        data: the images.
        parts: a tensor of training-image indices a client.
        model: the shared model with its initial weights.
        adversary: what the server does to it, nothing if it is honest.
        strategy: how the server makes the next model of the clients' updates; see `build_strategy`.
        auxiliary: what an attacker may be granted: indices into the test images, kept out of the utility's.
        condensed: condensed images and their labels, granted instead of them; None for none.
        utility: indices of the test images that measure utility.
        keep: which updates, and what is behind them, are kept.
    """

    federation: Federation
    training: LocalTraining
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
    strategy: Part
    condensed: tuple[Tensor, Tensor] | None = None
    keep: Keep = EVERYTHING

    def training_in(self, server_round: int) -> LocalTraining:
        """How each client trains in a round."""
        return replace(self.training, optimizer=self.federation.optimizer_in(server_round))

    def drops_out(self, client: int, server_round: int) -> bool:
        """Whether a client, sampled for a round, does not answer."""
        f = self.federation
        if f.dropout == 0:
            return False
        chosen = sampled(self.seed, f.clients, f.fraction, server_round)
        return client in dropped(self.seed, chosen, f.dropout, server_round)

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
        batch size uses all it has. Fixed batches are the same in every round.
        """
        mine = self.parts[client]
        size = min(self.federation.batch_size, len(mine))
        fixed = self.federation.batches == "fixed"
        random = generator(self.seed, "batch", client, *([] if fixed else [server_round]))
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
        if self.condensed is not None:
            return self.condensed
        return to_float(self.data.test_images[self.auxiliary]), self.data.test_labels[self.auxiliary]


@lru_cache(maxsize=1)
def build_scenario(setup: Setup) -> Scenario:
    """Build, or take from the cache, the scenario of a setup: once in every process.

    Raises:
        UsageError: data, partition, model or defense cannot be built from it; names the key, the value and the mend.
    """
    seed, data = setup.seed, load_data(setup.data)
    partitioner = setup.partition.build(Callable)
    parts = partitioner(data.train_labels, setup.federation.clients, generator(seed, "partition"))
    _check_parts(parts, setup)
    order = torch.randperm(len(data.test_labels), generator=generator(seed, "auxiliary"))
    held_back = min(AUXILIARY_IMAGES, len(order) // 4)
    return Scenario(
        federation=setup.federation,
        training=setup.training,
        data=data,
        parts=parts,
        model=shared_model(setup, data.image_shape, data.classes, derive_seed(seed, "model")),
        defense=setup.defense.build(Defense),
        threat=setup.threat,
        seed=seed,
        device=setup.torch_device,
        auxiliary=order[:held_back],
        utility=order[held_back:].sort().values,
        adversary=setup.adversary.build(Adversary),
        condensed=None if setup.auxiliary is None else _condensed(setup.auxiliary, data),
        strategy=setup.strategy,
        keep=setup.capture,
    )


def _check_parts(parts: object, setup: Setup) -> None:
    """Raise `UsageError` for what a partitioner of one's own may give instead of a tensor of indices a client."""
    clients = setup.federation.clients
    if not isinstance(parts, list | tuple) or len(parts) != clients:
        raise UsageError(f"partition={setup.partition.name}: gives no list of {clients} tensors; give one a client")
    for client, part in enumerate(parts):
        if not isinstance(part, Tensor) or part.dim() != 1 or part.dtype != torch.int64 or len(part) == 0:
            raise UsageError(f"partition={setup.partition.name}: client {client} gets no tensor [n] of int64 indices")


def build_strategy(scenario: Scenario) -> Repeatable:
    """The server's strategy, made repeatable.

    Raises:
        UsageError: it cannot be built, or not for this federation.
    """
    federation = scenario.federation
    _check_strategy(scenario.strategy.node)
    if federation.payload == "gradient" and scenario.strategy.name in CLIPPING:
        raise UsageError(
            f"strategy={scenario.strategy.name}: its clients clip new weights, and here they send gradients; choose "
            "federation.payload=weights, or strategy=dp_server"
        )
    return Repeatable(
        scenario.strategy.build(Strategy),
        clients=federation.clients,
        fraction=federation.fraction,
        seed=scenario.seed,
        buffers=scenario.start()[1],
        per_sample=scenario.threat.per_sample_gradients,
        adversary=scenario.adversary,
        step=federation.lr_in if federation.payload == "gradient" else None,
        most_examples=max(federation.batch_size * federation.local_steps, max(map(len, scenario.parts))),
    )


ABOVE_ZERO = Rule(lambda v: is_number(v) and v > 0, "a number above 0")
FROM_ZERO = Rule(lambda v: is_number(v) and v >= 0, "a number from 0")
SHARE = Rule(lambda v: is_number(v) and 0 <= v < 1, "a number from 0, below 1")
STRATEGY_RULES = {
    **dict.fromkeys(("eta", "eta_l", "tau", "server_learning_rate", "clipping_norm"), ABOVE_ZERO),
    **dict.fromkeys(("initial_clipping_norm", "clip_norm_lr"), ABOVE_ZERO),
    **dict.fromkeys(("noise_multiplier", "proximal_mu"), FROM_ZERO),
    **dict.fromkeys(("beta", "beta_1", "beta_2", "server_momentum"), SHARE),
    "target_clipped_quantile": Rule(lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "num_malicious_nodes": whole(0),
    **dict.fromkeys(("num_nodes_to_select", "num_sampled_clients"), whole(1)),
}
"""Of Flower's strategies, which take anything."""


def _check_strategy(node: Any, key: str = "strategy") -> None:
    """Raise `UsageError` for a setting of Flower's strategies that would fail, or make nonsense, rounds later."""
    if not isinstance(node, Mapping) or not str(node.get("_target_")).startswith("flwr."):
        return
    for name, value in node.items():
        rule = STRATEGY_RULES.get(name)
        if rule is not None and not rule.test(value):
            raise UsageError(f"{key}.{name}={value}: must be {rule.mend}")
    _check_strategy(node.get("strategy"), f"{key}.strategy")


def _condensed(root: str, data: ImageData) -> tuple[Tensor, Tensor]:
    """Condensed images that fit the data, and their labels."""
    found = load_condensed(root, "auxiliary")
    if tuple(found.images.shape[1:]) != data.image_shape or found.class_names != data.class_names:
        raise UsageError(f"auxiliary={root}: condensed from other data than data={data.name}; condense those")
    return found.images, found.labels


def shared_model(setup: Setup, image_shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """The model as the federation starts with it: freshly initialised, then prepared by the adversary."""
    return setup.adversary.build(Adversary).prepare(build_model(setup.model, image_shape, classes, seed))


@lru_cache(maxsize=4)
def load_data(data: Part) -> ImageData:
    """Load, or take from the cache, the images of a `data` group; raises `UsageError` where they are not there."""
    return data.build(ImageData)
