"""The parts of an attack: what the attacker knows, a label inference, an inversion, and what comes out of them.

This module and everything in `fedleak.attacks` imports only torch and numpy, so that it runs on a bare GPU machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedleak.capture import Observation
from fedleak.threat import ThreatModel


@dataclass(frozen=True)
class Knowledge:
    """What the attacker holds besides its observations.

    Attributes:
        model: the shared architecture. Its own weights mean nothing: each observation carries the parameters that
            its client started from (use `torch.func.functional_call`). It takes images in [0, 1] as
            ``[B, C, H, W]`` and returns logits ``[B, classes]``; any normalisation is a layer of it.
        image_shape: (C, H, W) of one private image.
        classes: number of classes.
        threat: what is granted.
        auxiliary: images ``[M, C, H, W]`` in [0, 1] and labels ``[M]``, only if the threat model grants them.
        training_mode: whether clients ran the model in train mode (matters for BatchNorm and dropout).
    """

    model: nn.Module
    image_shape: tuple[int, int, int]
    classes: int
    threat: ThreatModel = field(default_factory=ThreatModel)
    auxiliary: tuple[Tensor, Tensor] | None = None
    training_mode: bool = True


@dataclass(frozen=True)
class LabelGuess:
    """Labels inferred from one observation.

    Attributes:
        labels: ``[K, B]`` int64, the K most likely label multisets, most likely first, each sorted ascending.
        confidence: ``[K]`` in [0, 1], comparable within one guess only.
    """

    labels: Tensor
    confidence: Tensor

    @property
    def best(self) -> Tensor:
        """The most likely multiset, ``[B]``."""
        return self.labels[0]


class LabelInference(ABC):
    """Labels from updates. Subclass it in a file of your own and name it by ``_target_``."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of `ThreatModel` that must be granted."""
    most_samples: ClassVar[int | None] = None
    """The most samples an update may hold, None for any number."""

    @abstractmethod
    def infer(
        self, observations: Sequence[Observation], knowledge: Knowledge, *, candidates: int = 1, seed: int = 0
    ) -> list[LabelGuess | None]:
        """Infer the labels behind each observation, all in one call.

        Args:
            observations: N observations; batch sizes may differ.
            knowledge: what else the attacker holds.
            candidates: up to how many label multisets to return for each observation.
            seed: decides every random choice, whatever else is in the call.

        Returns:
            N guesses, in order; None where the labels are left to the inversion (DLG's soft labels).
        """


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
        stop_reason: ``converged``, ``stalled``, ``diverged``, ``budget``, ``labels_only``, or an error.
        restarts: how many starts were used.
        trace: rows (evaluations, objective) where a trace was kept.
        snapshots: rows (evaluations, images ``[B, C, H, W]`` float16 in [0, 1]) where a trace was kept: the best images
            so far along the returned start, first those it began with, last the returned ones.
        details: anything else worth storing, plain numbers and strings.
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


class Inversion(ABC):
    """Images from updates. Subclass it in a file of your own and name it by ``_target_``."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of `ThreatModel` that must be granted."""
    needs_scale: ClassVar[bool] = True
    """Whether the size of the gradient matters, and so the learning rate where new weights are sent."""

    @abstractmethod
    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        on_result: Callable[[int, Reconstruction], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Reconstruction]:
        """Rebuild the private images behind each observation, all in one call.

        Random starts depend on (seed, round, client, restart) only, so that a call with other observations beside it
        gives the same reconstructions.

        Args:
            observations: N observations, of any rounds and so with any parameters.
            guesses: N label guesses; None asks for DLG's joint optimisation of image and soft label.
            knowledge: what else the attacker holds.
            device: where to compute; results come back on the CPU.
            seed: decides every random choice.
            on_result: called with (index, reconstruction) as soon as one observation is finished.
            on_progress: called now and then with the state of the whole call.

        Returns:
            N reconstructions, in order.
        """
