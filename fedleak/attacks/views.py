"""What of the captures an attacker sees: between the observations and the attack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedleak.capture import Observation, same_tensors
from fedleak.errors import UsageError
from fedleak.training import LocalTraining, Tensors


class View(ABC):
    """Captures to what the attacker works on. Subclass it in a file of your own and name it by ``_target_``."""

    @abstractmethod
    def __call__(self, observations: Sequence[Observation]) -> list[Observation]:
        """What is seen of N observations, in any number.

        Raises:
            UsageError: there is nothing to be seen.
        """

    def training(self, training: LocalTraining) -> LocalTraining:
        """How the client of a seen observation trains, where each captured one trains as `training` says."""
        return training


class Updates(View):
    """Every client's update, as the server received it."""

    def __call__(self, observations: Sequence[Observation]) -> list[Observation]:
        return list(observations)


class SecureSum(View):
    """Secure aggregation: of every `clients` updates of a round the server learns their weighted sum alone.

    Clients are grouped in the order of their numbers; unusable updates, and those left over, are in no sum. Each sum is
    one observation, as of one client that trained on all their samples at once: numbered as the first of them (all are
    in `Observation.clients`), its update their mean weighted by batch size, as FedAvg sends it, or the plain mean where
    batch sizes are withheld. For one local step that is exact. After several, its gradient is still their mean
    gradient, but no single client walked that path.

    Args:
        clients: how many updates are summed.

    Raises:
        UsageError: `clients` is below 1; or, on observations, no round has as many usable ones, or those of a sum did
            not start from the same model in the same way of training.

    References:
        Bonawitz et al. Practical secure aggregation for privacy-preserving machine learning. CCS 2017.
    """

    def __init__(self, clients: int) -> None:
        if isinstance(clients, bool) or not isinstance(clients, int) or clients < 1:
            raise UsageError(f"attack.view.clients={clients} cannot be summed; give a whole number from 1")
        self.clients = clients

    def __call__(self, observations: Sequence[Observation]) -> list[Observation]:
        rounds: dict[int, list[Observation]] = {}
        for observation in sorted(observations, key=lambda o: (o.round, o.client)):
            if observation.error is None:
                rounds.setdefault(observation.round, []).append(observation)
        groups = [
            members[first : first + self.clients]
            for members in rounds.values()
            for first in range(0, len(members) - self.clients + 1, self.clients)
        ]
        if not groups:
            most = max((len(members) for members in rounds.values()), default=0)
            raise UsageError(
                f"attack.view.clients={self.clients}: no round has so many usable updates to sum, but {most} at most; "
                "lower it, or attack more clients with attack.clients=all"
            )
        return [_sum(group) for group in groups]

    def training(self, training: LocalTraining) -> LocalTraining:
        """All samples of a sum in one batch."""
        size = training.batch_size
        return training if size is None else replace(training, batch_size=size * self.clients)


def _sum(group: Sequence[Observation]) -> Observation:
    first = group[0]
    for other in group[1:]:
        same = replace(other.training, batch_size=None) == replace(first.training, batch_size=None)
        if not same or first.training.per_sample or not same_tensors(first.parameters, other.parameters):
            raise UsageError(
                f"attack.view: clients {first.client} and {other.client} of round {first.round} did not train alike "
                "from the same model, so that their sum is no update; attack.view=null takes them one by one"
            )
    sizes = [o.training.batch_size for o in group]
    known = [size for size in sizes if size is not None]
    total = sum(known) if len(known) == len(group) else None
    weights = [1 / len(group) if total is None or size is None else size / total for size in sizes]
    labels = [o.labels for o in group if o.labels is not None]
    return replace(
        first,
        update=_mean([o.update for o in group], weights),
        training=replace(first.training, batch_size=total),
        buffers=_mean([o.buffers for o in group], weights),
        labels=torch.cat(labels).sort().values if len(labels) == len(group) else None,
        clients=tuple(o.client for o in group),
    )


def _mean(tensors: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensors:
    return {n: sum(w * t[n] for w, t in zip(weights, tensors, strict=True)) for n in tensors[0]}  # type: ignore[misc]
