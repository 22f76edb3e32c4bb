"""What the methods that count labels share: evidence in, integer counts out, and the k most likely multisets."""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge, LabelGuess, Run
from fedleak.attacks.labels.last_layer import LastLayer, LastLayerInference, last_layer_gradients, where
from fedleak.attacks.labels.probe import dummy_images, probe
from fedleak.capture import Observation
from fedleak.errors import UsageError


@dataclass(frozen=True)
class Evidence:
    """The last layer of N usable observations, stacked.

    Attributes:
        observations: the N observations.
        layer: the last layer.
        weight: ``[N, C, d]``, ∂L/∂W: mean gradient over the client's local steps.
        bias: ``[N, C]``, ∂L/∂b, None where the layer has no bias.
        totals: ``[N]`` int64, labels behind each update: batch size × local steps.
    """

    observations: Sequence[Observation]
    layer: LastLayer
    weight: Tensor
    bias: Tensor | None
    totals: Tensor

    @cached_property
    def sums(self) -> Tensor:
        """``[N, C]`` float64, g_c = Σ_k ∂L/∂W[c, k]."""
        return self.weight.sum(dim=2, dtype=torch.float64)


@dataclass(frozen=True)
class Counts:
    """What a method made of N updates.

    Attributes:
        counts: ``[N, C]`` int64, how often each class was in the batch; rows sum to the totals.
        expected: ``[N, C]`` float64, the same before rounding, on whatever level: only differences within a row
            matter. It decides which other multisets are likely.
    """

    counts: Tensor
    expected: Tensor


class CountInference(LastLayerInference):
    """A label inference that reads label counts off the last layer's gradient; subclasses write `count`."""

    needs: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    @abstractmethod
    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""

    def read(
        self, observations: Sequence[Observation], layer: LastLayer, knowledge: Knowledge, run: Run, candidates: int
    ) -> list[LabelGuess]:
        """See `LastLayerInference.read`; a batch size is needed."""
        return guesses_from(self.count(collect(observations, layer), knowledge, run), candidates)


def collect(observations: Sequence[Observation], layer: LastLayer) -> Evidence:
    """Stack the last layer of observations; raises `UsageError` where an update or a batch size is unusable."""
    gradients = last_layer_gradients(observations, layer)
    totals = torch.tensor([label_total(observation) for observation in observations])
    return Evidence(observations, layer, gradients.weight, gradients.bias, totals)


def label_total(observation: Observation) -> int:
    """How many labels are behind an update: batch size × local steps of an epoch."""
    training = observation.training
    if training.batch_size is None:
        raise UsageError(
            f"the batch size of {where(observation)} is unknown and this label inference has to fill a batch; "
            "grant it with threat.batch_size=true"
        )
    if training.local_steps is None:
        raise UsageError(
            f"how many local steps are behind {where(observation)} is unknown and this label inference has to fill "
            "them; grant it with threat.hyperparameters=true, or attack by `fedleak.attacks.Attack`, which assumes one "
            "and says so"
        )
    total = training.batch_size * training.local_steps
    if total < 1:
        raise UsageError(
            f"{where(observation)} claims batch size {training.batch_size} × {training.local_steps} local steps; "
            "both must be at least 1"
        )
    return total


def scale_known(evidence: Evidence, who: str) -> None:
    """Refuse updates whose scale is withheld: weights without a learning rate."""
    for observation in evidence.observations:
        if observation.scale is None:
            raise UsageError(
                f"attack/labels={who} needs the gradient's scale, and {where(observation)} is new weights without a "
                "learning rate; grant it with threat.hyperparameters=true, or choose attack/labels=version1"
            )


def bias_gradient(evidence: Evidence, knowledge: Knowledge, seed: int, inputs: int = 16) -> Tensor:
    """``[N, C]`` float64, ∂L/∂b; where the layer has no bias, what it would be if every feature vector were h̄.

    Then ∂L/∂W = ∂L/∂b h̄ᵀ, and h̄ is estimated from dummy inputs in each observed model.
    """
    if evidence.bias is not None:
        return evidence.bias.double()
    found = probe(evidence.observations, evidence.layer, knowledge, dummy_images(knowledge, inputs, seed))
    mean = found.features.double().mean(dim=1)[found.which]
    return (evidence.weight.double() @ mean[..., None])[..., 0] / mean.square().sum(dim=1, keepdim=True)


def fill(counts: Tensor, values: Tensor, step: Tensor, totals: Tensor) -> Tensor:
    """Until each row is full: take the class with the smallest value, add it, and raise its value by `step`.

    That picks the smallest of all values_c + k·step, k = 0, 1, …, which a bisection over the last value taken finds
    without a loop over labels.

    Args:
        counts: ``[N, C]`` int64, labels already taken.
        values: ``[N, C]``.
        step: ``[N]`` or ``[N, C]``, not negative.
        totals: ``[N]`` int64, labels each row must reach.

    Returns:
        ``[N, C]`` int64.
    """
    values = values.double()
    step = (step[:, None] if step.dim() == 1 else step).double().expand_as(values)
    room = (totals - counts.sum(dim=1)).clamp(min=0)[:, None]
    tiny = step.clamp(min=1e-300)

    def taken(level: Tensor) -> Tensor:
        return torch.minimum(((level - values) / tiny).floor() + 1, room.double()).clamp(min=0)

    smallest, first = values.min(dim=1, keepdim=True)
    low, high = smallest - 1e-12 * (1 + smallest.abs()), smallest + room * step.gather(1, first)
    for _ in range(64):
        middle = (low + high) / 2
        fits = taken(middle).sum(dim=1, keepdim=True) <= room
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    added = taken(low)
    added = torch.where(added.sum(dim=1, keepdim=True) <= room, added, torch.zeros_like(added))
    flat = step.gather(1, first)[:, 0] == 0
    while True:  # ties at the last level, one by one as the plain loop would
        left = room[:, 0] - added.sum(dim=1)
        if not bool((left > 0).any()):
            return counts + added.long()
        pick = (values + added * step).argmin(dim=1, keepdim=True)
        added.scatter_add_(1, pick, torch.where(flat, left, left.clamp(max=1))[:, None].clamp(min=0))


def round_counts(expected: Tensor, totals: Tensor) -> Tensor:
    """The non-negative integers that sum to each total and are nearest (least squares) to `expected`, up to a shift.

    The squared distance is separable and convex, so taking the cheapest label next is optimal.
    """
    zeros = torch.zeros(expected.shape, dtype=torch.int64)
    return fill(zeros, -expected, torch.ones(len(expected), dtype=torch.float64), totals)


def guesses_from(found: Counts, candidates: int) -> list[LabelGuess]:
    """Turn counts into label multisets, with up to `candidates` of them by squared distance to what was expected."""
    guesses = []
    for counts, expected in zip(found.counts.numpy(), found.expected.double().numpy(), strict=True):
        rows = [(0.0, counts)] if candidates <= 1 else list(_nearest(counts, expected, candidates))
        labels = np.stack([np.repeat(np.arange(len(row)), row) for _, row in rows])
        weights = np.exp(-np.array([cost for cost, _ in rows]))
        guesses.append(LabelGuess(torch.from_numpy(labels), torch.from_numpy(weights / weights.sum()).float()))
    return guesses


def _nearest(counts: np.ndarray, expected: np.ndarray, limit: int) -> Iterator[tuple[float, np.ndarray]]:
    """`counts`, then other counts of the same sum by growing squared distance to `expected`, with what they cost more.

    Best first over single exchanges of a label, which reaches every multiset in order because the distance is convex
    in each count.
    """
    queue: list[tuple[float, int, np.ndarray]] = [(0.0, 0, counts)]
    seen = {counts.tobytes()}
    pushed, yielded = 1, 0
    while queue and yielded < limit:
        cost, _, row = heapq.heappop(queue)
        yield max(cost, 0.0), row
        yielded += 1
        slack = np.nan_to_num(row - expected)
        price = 1.0 + slack[None, :] - slack[:, None]  # of taking a label from class a (row) and giving it to b
        price[row == 0, :] = np.inf
        np.fill_diagonal(price, np.inf)
        order = np.argpartition(price, min(limit, price.size - 1), axis=None)[: limit + 1]
        for flat in order:
            giver, taker = divmod(int(flat), len(row))
            if not np.isfinite(price[giver, taker]):
                continue
            other = row.copy()
            other[giver] -= 1
            other[taker] += 1
            if other.tobytes() not in seen:
                seen.add(other.tobytes())
                heapq.heappush(queue, (cost + 2 * price[giver, taker], pushed, other))
                pushed += 1
