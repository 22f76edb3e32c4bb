"""What of the captures an attacker sees: between the observations and the attack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedleak.errors import UsageError
from fedleak.observation import Observation, same_tensors
from fedleak.training import SGD, LocalTraining, Tensors


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
        rounds = rounds_of(observations)
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
    training = as_one([o.training for o in group])
    total = training.batch_size
    weights = [1 / len(group) if total is None or size is None else size / total for size in sizes]
    return replace(
        first,
        update=_mean([o.update for o in group], weights),
        training=training,
        buffers=_mean([o.buffers for o in group], weights),
        labels=_labels(group),
        clients=tuple(o.client for o in group),
    )


def _labels(group: Sequence[Observation]) -> Tensor | None:
    labels = [o.labels for o in group if o.labels is not None]
    return torch.cat(labels).sort().values if len(labels) == len(group) else None


def as_one(trainings: Sequence[LocalTraining], *, models: bool = False) -> LocalTraining:
    """How one client would train that had all the samples of several, step by step.

    Args:
        trainings: of each, alike but for their batch sizes.
        models: what is seen are the models before and after, the clients sending what they will.
    """
    first, sizes = trainings[0], [training.batch_size for training in trainings]
    known = [size for size in sizes if size is not None]
    whole = replace(first, batch_size=sum(known) if len(known) == len(sizes) else None)
    if not models or first.payload == "weights":
        return whole
    # The server takes one step along the mean of the gradients that were sent; each is a sum over local steps.
    optimizer = None if first.lr is None else SGD(first.lr)
    return replace(whole, payload="weights", optimizer=optimizer)


def rounds_of(observations: Sequence[Observation]) -> dict[int, list[Observation]]:
    """Round -> its usable observations, by client."""
    rounds: dict[int, list[Observation]] = {}
    for observation in sorted(observations, key=lambda o: (o.round, o.client)):
        if observation.error is None:
            rounds.setdefault(observation.round, []).append(observation)
    return rounds


def shown(view: str, observations: Sequence[Observation]) -> list[Observation]:
    """What of a federation's updates the threat model shows; of what is shown already, all.

    Args:
        view: `ThreatModel.view`.
        observations: of one or several rounds.
    """
    if view == "updates" or any(o.clients for o in observations):
        return list(observations)
    show = _sum if view == "sum" else _model
    return [show(members) for members in rounds_of(observations).values()]


def _model(group: Sequence[Observation]) -> Observation:
    """What was sent out in a round, and nothing of what came back."""
    training = as_one([o.training for o in group], models=True)
    return replace(
        group[0],
        update={},
        buffers={},
        training=training,
        labels=_labels(group),
        clients=tuple(o.client for o in group),
    )


class ConsecutiveModels(View):
    """Two models that the server sent out one after the other: their difference is the mean update of a round.

    For a server that takes its clients' mean as it is (FedAvg, FedSGD). The last model has no successor, and shows
    nothing of its round.

    Raises:
        UsageError: a model has no successor although there are later ones, or there is none but one.

    References:
        Geng et al. Towards general deep leakage in federated learning. 2021.
    """

    def __call__(self, observations: Sequence[Observation]) -> list[Observation]:
        rounds = {o.round: o for o in shown("models", observations)}
        last = self.check(rounds)
        return [
            replace(seen, update=rounds[number + 1].parameters) for number, seen in rounds.items() if number != last
        ]

    @staticmethod
    def check(rounds: Iterable[int]) -> int:
        """The last of the captured rounds, each of which must be followed by the next."""
        known = sorted(set(rounds))
        if len(known) < 2:
            raise UsageError("threat.view=models: needs the models of two rounds at least; raise federation.rounds")
        for number in known[:-1]:
            if number + 1 not in known:
                raise UsageError(
                    f"threat.view=models: the model of round {number + 1} was not captured, so that nothing tells what "
                    f"happened in round {number}; repeat the run with federation.capture_every=1"
                )
        return known[-1]


def _mean(tensors: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensors:
    return {n: sum(w * t[n] for w, t in zip(weights, tensors, strict=True)) for n in tensors[0]}  # type: ignore[misc]
