"""The bias forms of LLG (EBI, LLBG)."""

from __future__ import annotations

import torch

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.labels.counting import CountInference, Counts, Evidence, bias_gradient, scale_known
from fedleak.attacks.labels.llg import greedy_counts


class Bias(CountInference):
    """LLG on ∂L/∂b, which is in units of samples: impact −(1 − confidence)/B (EBI, LLBG 2024). Needs `batch_size`.

    Their offset, steps/C under FedAvg, is the same for every class, so that it changes no choice: the mean gradient
    over the steps is used and it is left out. Without a bias in the layer its gradient is estimated
    (`bias_gradient`).

    Args:
        confidence: the model's mean probability for the true class; None takes 1/C, an untrained model's.
    """

    def __init__(self, confidence: float | None = None) -> None:
        self.confidence = confidence

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        scale_known(evidence, "bias")
        confidence = 1 / knowledge.classes if self.confidence is None else self.confidence
        impact = torch.full((len(evidence.totals),), confidence - 1, dtype=torch.float64) / evidence.totals
        return greedy_counts(bias_gradient(evidence, knowledge, run.seed), impact, None, evidence.totals)
