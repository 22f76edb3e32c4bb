"""GradInversion's rule for batches without duplicates."""

from __future__ import annotations

import torch

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.labels.counting import CountInference, Counts, Evidence
from fedleak.attacks.labels.version1 import most_negative


class GradInversion(CountInference):
    """The B classes with the smallest min_k ∂L/∂W[c, k] (GradInversion, Yin et al. 2021). Needs `batch_size`.

    It knows no duplicates. A batch larger than the number of classes must have some: then every class is taken
    equally often, and the remainder goes to the classes with the smallest values.
    """

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        smallest = evidence.weight.amin(dim=2).double()
        classes = smallest.shape[1]
        counts = most_negative(smallest, evidence.totals % classes) + (evidence.totals // classes)[:, None]
        scale = smallest.abs().amax(dim=1, keepdim=True)
        return Counts(counts, torch.where(scale > 0, -smallest / scale, smallest))
