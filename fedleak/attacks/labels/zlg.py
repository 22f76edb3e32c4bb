"""ZLG: the bias gradient's identity, with the mean probability taken from dummy inputs."""

from __future__ import annotations

from torch import Tensor

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.labels.counting import (
    CountInference,
    Counts,
    Evidence,
    bias_gradient,
    round_counts,
    scale_known,
)
from fedleak.attacks.labels.probe import dummy_images, probe


def identity(probabilities: Tensor, bias: Tensor, totals: Tensor) -> Counts:
    """λ_c = B (p̄_c − ∂L/∂b_c), rounded to counts that fill the batch.

    Args:
        probabilities: ``[N, C]``, an estimate of p̄, the batch's mean softmax output.
        bias: ``[N, C]``, ∂L/∂b.
        totals: ``[N]`` int64.
    """
    expected = totals[:, None] * (probabilities.double() - bias.double())
    return Counts(round_counts(expected, totals), expected)


class ZLG(CountInference):
    """λ = B (p̄ − ∂L/∂b), p̄ estimated from random inputs (Geng et al. 2021). Needs `batch_size`.

    Complete with duplicates. Under FedAvg p̄ is taken halfway along the client's local steps. Without a bias in the
    layer its gradient is estimated (`bias_gradient`), which is the paper's form with the mean feature.

    Args:
        inputs: dummy inputs, uniform noise images.
    """

    def __init__(self, inputs: int = 16) -> None:
        self.inputs = inputs

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        scale_known(evidence, "zlg")
        found = probe(evidence.observations, evidence.layer, knowledge, dummy_images(knowledge, self.inputs, run.seed))
        mean = found.probabilities.mean(dim=1)[found.which]
        return identity(mean, bias_gradient(evidence, knowledge, run.seed), evidence.totals)
