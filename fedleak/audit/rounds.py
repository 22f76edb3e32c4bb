"""A client that trains on the same samples in every round tells their class counts anew each time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.attacks.labels.counting import round_counts

SURE = 4.0
"""Log-likelihood ratio from which a client's rounds count as of the same samples."""
FLOOR = 0.35
"""Of one round's error, what no number of rounds takes away: it errs in part in the same way each time."""


@dataclass(frozen=True)
class Reading:
    """Class counts ``[C]`` as one update gives them, and how far each may be off, root mean square."""

    counts: tuple[int, ...]
    error: float


def combined(readings: Sequence[Reading]) -> Reading | None:
    """The counts of a client's samples by all its rounds; None where these do not look like the same samples.

    Fresh samples would make the counts differ by as much as the drawing does, beside their errors; the same ones by
    their errors alone.

    Args:
        readings: of R rounds, as many samples in each.
    """
    if len(readings) < 2 or any(r.error <= 0 or sum(r.counts) != sum(readings[0].counts) for r in readings):
        return None
    counts = torch.tensor([r.counts for r in readings], dtype=torch.float64)
    weights = torch.tensor([r.error for r in readings], dtype=torch.float64) ** -2
    total, classes = float(counts[0].sum()), counts.shape[1]
    mean: Tensor = (weights[:, None] * counts).sum(dim=0) / weights.sum()
    share = mean / total
    same = float((1 / weights).mean())
    fresh = same + float((total * share * (1 - share)).mean())
    seen = float(counts.var(dim=0).mean())
    freedom = (len(readings) - 1) * (classes - 1)
    if freedom / 2 * (math.log(fresh / same) + seen * (1 / fresh - 1 / same)) < SURE:
        return None
    error = max(float(weights.sum()) ** -0.5, FLOOR * min(r.error for r in readings))
    whole = round_counts(mean[None], torch.tensor([int(total)]))[0]
    return Reading(tuple(int(c) for c in whole), error)
