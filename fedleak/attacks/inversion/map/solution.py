"""The best that was found for one problem, and what becomes of an observation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge
from fedleak.attacks.results import Reconstruction, StopReason
from fedleak.capture import Observation


@dataclass
class Solution:
    """The best that was found for one problem."""

    images: Tensor
    labels: Tensor
    misfit: float = float("inf")
    reason: StopReason = StopReason.DIVERGED
    expected: Tensor | None = None
    noise: float = float("nan")
    left: float = 1.0
    evaluations: int = 0
    seconds: float = 0.0
    starts: int = 0
    start: int = 0
    candidate: int = 0
    trace: list[tuple[int, float]] | None = None
    snapshots: list[tuple[int, Tensor]] | None = None


def reconstruction(observation: Observation, found: list[Solution], knowledge: Knowledge) -> Reconstruction:
    """What became of an observation; its samples side by side where each had its own gradient."""
    if not found:
        size = observation.training.samples or 1
        images, labels = torch.full((size, *knowledge.image_shape), 0.5), torch.zeros(size, dtype=torch.int64)
        reason = observation.error or "empty"
        return Reconstruction(
            observation.round, observation.client, images, labels, float("nan"), 0, 0.0, reason, restarts=0
        )
    worst = max(found, key=lambda s: (s.reason != StopReason.CONVERGED, s.misfit))
    expected = torch.cat(
        [s.expected if s.expected is not None else torch.full((len(s.labels),), torch.nan) for s in found]
    )
    one = found[0] if len(found) == 1 else replace(found[0], trace=None, snapshots=None)
    return Reconstruction(
        observation.round,
        observation.client,
        torch.cat([s.images for s in found]),
        torch.cat([s.labels for s in found]),
        sum(s.misfit for s in found) / len(found),
        sum(s.evaluations for s in found),
        sum(s.seconds for s in found),
        worst.reason,
        restarts=max(s.starts for s in found),
        trace=one.trace or [],
        snapshots=one.snapshots or [],
        details={
            "method": "map",
            "expected_mse": [float(f"{v:.4g}") for v in expected.tolist()],
            "noise_std": float(f"{max(s.noise for s in found):.4g}"),
            "start": one.start,
            "candidate": one.candidate,
        },
    )
