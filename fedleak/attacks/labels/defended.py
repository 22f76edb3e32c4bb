"""Labels of updates that a defense has pruned or masked: the bias gradient's identity from what is left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge, LabelGuess, LabelInference, Run
from fedleak.attacks.labels.counting import CountInference, Counts, Evidence
from fedleak.attacks.labels.last_layer import find_last_layer
from fedleak.attacks.labels.probe import dummy_images, probe
from fedleak.attacks.labels.zlg import identity
from fedleak.capture import Observation

_GAPS = 0.4
"""The share of the last layer's gradient that is zero from which the methods that want all of it fail."""
_TRUSTED = (0.3, 3.0)
"""Between these, a scale that is read off the update is not told from 1."""
_ROUNDS = 20


class Defended(LabelInference):
    """Another label inference, and for batches' updates with gaps one that does with what is left.

    Args:
        otherwise: for single samples, and for updates that look complete.
    """

    def __init__(self, otherwise: LabelInference) -> None:
        self.otherwise = otherwise
        self.needs = otherwise.needs  # type: ignore[misc]
        self.most_samples = otherwise.most_samples  # type: ignore[misc]
        self.gaps = FromWhatIsLeft()

    def infer(
        self, observations: Sequence[Observation], knowledge: Knowledge, run: Run, *, candidates: int = 1
    ) -> list[LabelGuess | None]:
        """See `LabelInference.infer`."""
        with_gaps = [_has_gaps(observation, knowledge) for observation in observations]
        found: list[LabelGuess | None] = [None] * len(observations)
        for gaps, method in ((False, self.otherwise), (True, self.gaps)):
            some = [i for i, has in enumerate(with_gaps) if has == gaps]
            if some:
                guesses = method.infer([observations[i] for i in some], knowledge, run, candidates=candidates)
                for i, guess in zip(some, guesses, strict=True):
                    found[i] = guess
        return found


class FromWhatIsLeft(CountInference):
    """λ = B (p̄ − ∂L/∂b), with ∂L/∂b from the elements of ∂L/∂W that were sent.

    The features of all images of a batch are about the mean feature h̄ of any images, so that ∂L/∂W ≈ d h̄ᵀ, and d is the
    bias gradient. Elements that are missing are filled in with d h̄ᵀ, up to the smallest size that was sent where the
    largest were, and d is fitted anew. A size that is far from what absent classes say (d_c = p̄_c) is undone.
    """

    def __init__(self, inputs: int = 32) -> None:
        self.inputs = inputs

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        images = dummy_images(knowledge, self.inputs, run.seed)
        if knowledge.auxiliary is not None:
            images = knowledge.auxiliary[0][: 4 * self.inputs]
        found = probe(evidence.observations, evidence.layer, knowledge, images)
        features = found.features.mean(1)[found.which].double()
        mean = found.probabilities.mean(1)[found.which].double()
        bias = fitted(evidence.weight.double(), features)
        return identity(mean, bias / scale_of(bias, mean)[:, None], evidence.totals)


def fitted(weight: Tensor, features: Tensor) -> Tensor:
    """d ``[N, C]`` of ∂L/∂W ≈ d h̄ᵀ with gaps.

    Args:
        weight: ``[N, C, d]``, zero where nothing was sent.
        features: ``[N, d]``, h̄.
    """
    known = weight != 0
    size = weight.abs().masked_fill(~known, torch.inf).flatten(1).amin(1)
    usual = (weight.square().sum((1, 2)) / known.sum((1, 2)).clamp(min=1)).sqrt()
    # Where small elements were sent too, what is missing was drawn at random, and may be of any size.
    most = torch.where(size > 0.02 * usual, size, torch.inf)[:, None, None]
    squares = features.square().sum(1).clamp(min=1e-300)[:, None]
    h = features[:, None]
    d = (weight * h).sum(2) / (known * h.square()).sum(2).clamp(min=1e-300)
    for _ in range(_ROUNDS):
        filled = torch.where(known, weight, (d[..., None] * h).clamp(-most, most))
        d = (filled * h).sum(2) / squares
        d = d - d.mean(1, keepdim=True)  # softmax outputs and labels sum to one alike
    return d


def scale_of(bias: Tensor, mean: Tensor) -> Tensor:
    """What the gradient was multiplied with, ``[N]``: 1 unless classes without a negative entry say otherwise."""
    positive = bias > 0
    found = (bias * positive).sum(1) / (mean * positive).sum(1).clamp(min=1e-6)
    return torch.where((found > _TRUSTED[0]) & (found < _TRUSTED[1]), 1.0, found.clamp(min=1e-12))


def _has_gaps(observation: Observation, knowledge: Knowledge) -> bool:
    """Whether there is more than one sample, and part of the last layer's gradient is missing."""
    if observation.error is not None or observation.training.per_sample or observation.training.samples == 1:
        return False
    value = observation.update.get(find_last_layer(knowledge).weight)
    return value is not None and float((value == 0).float().mean()) > _GAPS
