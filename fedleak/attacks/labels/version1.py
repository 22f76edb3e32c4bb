"""Version 1: the founding study's predictor of a batch's labels."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.labels.counting import CountInference, Counts, Evidence, fill
from fedleak.errors import UsageError


def version1(sums: Tensor, totals: Tensor) -> Counts:
    """Version 1 on the summed gradients of N last layers.

    Every class with a negative g_c is present once; a label's impact is m = Σ_{g_c < 0} g_c / B; then, until the
    batch is full, the class with the smallest g_c is added and m is subtracted from its g_c.

    Args:
        sums: ``[N, C]``, g_c = Σ_k ∂L/∂W[c, k]; any positive factor gives the same labels.
        totals: ``[N]`` int64, batch sizes B.

    Raises:
        UsageError: if there is not one batch size for each row, or one is below 1.
    """
    if sums.dim() != 2 or totals.shape != sums.shape[:1]:
        raise UsageError(
            f"version1 got gradients of shape {tuple(sums.shape)} and batch sizes of shape {tuple(totals.shape)}; "
            "give [N, C] gradients and [N] batch sizes"
        )
    if bool((totals < 1).any()):
        raise UsageError(f"version1 got batch size {int(totals.min())}; give batch sizes of at least 1")
    sums = sums.double()
    impact = sums.clamp(max=0).sum(dim=1) / totals
    present = (sums < 0).long()
    # More negative classes than samples (noise, features of either sign): only the most negative ones fit.
    present = torch.where((present.sum(dim=1) > totals)[:, None], most_negative(sums, totals), present)
    return Counts(fill(present, sums, -impact, totals), sums / impact.clamp(max=-1e-300)[:, None])


def most_negative(values: Tensor, totals: Tensor) -> Tensor:
    """``[N, C]`` int64: 1 for the totals[n] smallest values of row n, else 0."""
    return (values.argsort(dim=1, stable=True).argsort(dim=1) < totals[:, None]).long()


class Version1(CountInference):
    """The founding study's predictor from the summed weight gradient of the last layer. Needs `batch_size`."""

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        return version1(evidence.sums, evidence.totals)
