"""What comes out of an attack: reconstructions, why each search ended, and how far a running one is."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor


class StopReason(StrEnum):
    """Why an inversion ended. What could not be attacked has its error as a stop reason instead."""

    CONVERGED = "converged"
    DIVERGED = "diverged"
    STALLED = "stalled"
    BUDGET = "budget"
    NO_SIGNAL = "no_signal"  # noise, and nothing that an image explains: what comes back is the prior's mean
    LABELS_ONLY = "labels_only"


def is_converged(stop_reason: object) -> bool:
    """Whether a stop reason says that the search reached its goal, by whichever method."""
    return str(stop_reason).split(" ")[0] == StopReason.CONVERGED


@dataclass
class Reconstruction:
    """What the attacker rebuilt from one observation.

    Attributes:
        round, client: which observation.
        images: ``[B, C, H, W]`` float32 in [0, 1].
        labels: ``[B]`` int64, ``labels[i]`` belonging to ``images[i]``.
        objective: the inversion's objective at `images` (unscaled), NaN where there was no inversion.
        evaluations: objective-and-gradient evaluations, all restarts together.
        seconds: this observation's share of the attack's wall time.
        stop_reason: a `StopReason`, with `` by `` and the method where one was chosen; or an error.
        restarts: how many starts were used.
        trace: rows (evaluations, objective) where a trace was kept.
        snapshots: rows (evaluations, images ``[B, C, H, W]`` float16 in [0, 1]) where a trace was kept: the best images
            so far along the returned start, first those it began with, last the returned ones.
        details: anything else worth storing, plain numbers and strings. ``assumed`` is what the attack took for
            granted without knowing it.
    """

    round: int
    client: int
    images: Tensor
    labels: Tensor
    objective: float
    evaluations: int
    seconds: float
    stop_reason: str
    restarts: int = 1
    trace: list[tuple[int, float]] = field(default_factory=list)
    snapshots: list[tuple[int, Tensor]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def converged(self) -> bool:
        """Whether the search reached its goal."""
        return is_converged(self.stop_reason)

    @property
    def labels_only(self) -> bool:
        """Whether no images were sought: `images` then only keep the shape."""
        return self.stop_reason == StopReason.LABELS_ONLY

    @property
    def failed(self) -> bool:
        """Whether there was nothing to attack or nothing came out of it."""
        return len(self.labels) == 0 and len(self.images) == 0


@dataclass(frozen=True)
class Progress:
    """The state of a running inversion, handed to a callback for the live line."""

    problems: int
    done: int
    converged: int
    diverged: int
    median_objective: float
    evaluations: int
    evaluations_per_second: float
