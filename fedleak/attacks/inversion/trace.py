"""What is kept of the way that a start went: objectives, and a few of its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_SNAPSHOTS = 8
_MOMENTS = frozenset(round(2 ** (k / 2)) for k in range(64))
"""Counts of evaluations after which a snapshot is taken: 1, 2, 3, 4, 6, 8, 11, 16, …"""
_VISIBLE = 0.01
"""Root mean square of the change of the pixels since the last snapshot that is worth another."""
Snapshots = list[tuple[int, Tensor]]
"""Rows (evaluations, images ``[B, C, H, W]`` float16 in [0, 1])."""


@dataclass
class Trace:
    """Rows (evaluations, objective), and at most `MOST_SNAPSHOTS` snapshots."""

    objectives: list[tuple[int, float]] = field(default_factory=list)
    snapshots: Snapshots = field(default_factory=list)

    @staticmethod
    def wants_images(evaluations: int) -> bool:
        """Whether a snapshot is due."""
        return evaluations in _MOMENTS

    def see(self, evaluations: int, images: Tensor) -> None:
        """Keep a snapshot where the images have changed."""
        if not self.snapshots or (images - self.snapshots[-1][1]).float().square().mean() > _VISIBLE**2:
            add_snapshot(self.snapshots, evaluations, images.clone())

    def until(self, evaluations: int) -> Trace:
        """What there was after so many evaluations."""
        kept = [row for row in self.objectives if row[0] <= evaluations]
        return Trace(kept, [row for row in self.snapshots if row[0] <= evaluations])


def add_snapshot(snapshots: Snapshots, evaluations: int, images: Tensor) -> None:
    """Append one; of too many, drop the one whose neighbours are closest to one another, as ratios go."""
    snapshots.append((evaluations, images))
    if len(snapshots) > MOST_SNAPSHOTS:
        gaps = [after / before for (before, _), (after, _) in zip(snapshots, snapshots[2:], strict=False)]
        del snapshots[1 + gaps.index(min(gaps))]


def side_by_side(samples: Sequence[Snapshots]) -> Snapshots:
    """Snapshots of the samples of one observation: of each sample the latest there is at every count of evaluations."""
    if not all(samples):
        return []
    together: Snapshots = []
    for count in sorted({count for rows in samples for count, _ in rows}):
        latest = [next(images for at, images in reversed(rows) if at <= count) for rows in samples]
        add_snapshot(together, count, torch.cat(latest))
    return together
