"""RLG: which classes are in the batch, from the geometry of the gradient's left singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.labels.counting import CountInference, Counts, Evidence, fill
from fedleak.attacks.labels.version1 import most_negative


def separable_classes(weight: Tensor, totals: Tensor, *, steps: int = 30) -> Tensor:
    """Which classes a hyperplane through the origin separates from all others, ``[N, C]`` bool.

    Every sample's r = p − e_y is a combination Q z of the left singular vectors Q [C, S] of ∂L/∂W, negative at its
    label alone. So class j can only be in the batch if some z has (Q z)_j < 0 and all other entries positive. Found by
    Newton's method on the logistic loss, which separates where anything does.

    Args:
        weight: ``[N, C, d]``, ∂L/∂W.
        totals: ``[N]``, samples, a bound on the rank.
        steps: Newton steps.
    """
    classes = weight.shape[1]
    left, singular, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    ranks = torch.minimum((singular > 1e-6 * singular[:, :1]).sum(dim=1), totals).clamp(max=classes - 1)
    found = torch.ones(len(weight), classes, dtype=torch.bool)
    signs = 1 - 2 * torch.eye(classes, dtype=torch.float64)  # row j: what the signs of Q z must be
    for rank in ranks.unique().tolist():
        if rank >= classes - 1:  # Q spans all that sums to zero: everything is separable
            continue
        rows = (ranks == rank).nonzero()[:, 0]
        points = left[rows, None, :, :rank] * signs[:, :, None]  # [n, j, C, S], to be brought above zero
        z = points.mean(dim=2)
        ridge = 1e-9 * torch.eye(rank, dtype=torch.float64)
        for _ in range(steps):
            miss = (-(points @ z[..., None])[..., 0]).sigmoid()
            slope = (points * miss[..., None]).sum(dim=2)
            curve = points.transpose(2, 3) @ (points * (miss * (1 - miss))[..., None])
            move = torch.linalg.solve(curve + ridge, slope[..., None])[..., 0]
            z = z + move / (1 + 0.1 * move.norm(dim=2, keepdim=True))
        found[rows] = ((points @ z[..., None])[..., 0] > 0).all(dim=2)
    return found


class RLG(CountInference):
    """Presence by linear separability (RLG, Dang et al. 2021), filled up by version 1's rule. Needs `batch_size`.

    Presence is all the paper infers: the separable classes are taken once, and the batch is filled with the classes of
    the smallest g_c. From B = C − 1 on every class is separable; then the classes with negative g_c are taken.
    """

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        sums, totals = evidence.sums, evidence.totals
        found = separable_classes(evidence.weight, totals)
        vague = found.all(dim=1, keepdim=True) | ~found.any(dim=1, keepdim=True)
        present = torch.where(vague, sums < 0, found).long()
        ranked = torch.where(present.bool(), sums, torch.inf)
        present = present.where((present.sum(dim=1) <= totals)[:, None], most_negative(ranked, totals))
        impact = sums.clamp(max=0).sum(dim=1).clamp(max=-1e-300) / totals
        return Counts(fill(present, sums, -impact, totals), sums / impact[:, None])
