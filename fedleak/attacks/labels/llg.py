"""LLG: label counts from the summed gradient and one label's impact on it."""

from __future__ import annotations

from torch import Tensor

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.labels.counting import CountInference, Counts, Evidence, fill
from fedleak.attacks.labels.version1 import most_negative


def greedy_counts(gradients: Tensor, impact: Tensor, offset: Tensor | None, totals: Tensor) -> Counts:
    """LLG's two steps: each negative class once, then the smallest gradient until the batch is full.

    Every label taken subtracts the impact of its class's gradient, so that the next choice sees what is left.

    Args:
        gradients: ``[N, C]``.
        impact: ``[N]``, what one label does to the gradient of its class, negative.
        offset: ``[N, C]``, the gradient of a class that is not in the batch, subtracted after the first step.
        totals: ``[N]`` int64.
    """
    gradients = gradients.double()
    impact = impact.clamp(max=-1e-300)[:, None]
    present = (gradients < 0).long()
    present = present.where((present.sum(dim=1) <= totals)[:, None], most_negative(gradients, totals))
    rest = gradients if offset is None else gradients - offset
    return Counts(fill(present, rest - impact * present, -impact[:, 0], totals), rest / impact)


class LLG(CountInference):
    """Impact m = (Σ_{g < 0} g / B)(1 + 1/C) from the gradients alone (LLG, Wainakh et al. 2021). Needs `batch_size`."""

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        sums = evidence.sums
        impact = sums.clamp(max=0).sum(dim=1) / evidence.totals * (1 + 1 / sums.shape[1])
        return greedy_counts(sums, impact, None, evidence.totals)
