"""The parts of an attack: what the attacker knows, a label inference, an inversion, and what comes out of them.

This module and everything in `fedleak.attacks` imports only torch and numpy, so that it runs on a bare GPU machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedleak.attacks.results import Progress, Reconstruction
from fedleak.capture import Observation
from fedleak.defenses.base import Defense
from fedleak.threat import ThreatModel
from fedleak.training import LocalTraining


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
        defense: what the clients defend themselves with, only if that is known; the attacker then imitates it.
    """

    model: nn.Module
    image_shape: tuple[int, int, int]
    classes: int
    threat: ThreatModel = field(default_factory=ThreatModel)
    auxiliary: tuple[Tensor, Tensor] | None = None
    defense: Defense | None = None


@dataclass(frozen=True)
class Run:
    """How one call of an attack is to be carried out, whatever it attacks.

    Attributes:
        device: where to compute; results come back on the CPU.
        seed: decides every random choice.
        seconds: how long the call may take, about; None for as long as it needs.
        on_result: called with (index, reconstruction) as soon as one observation is finished.
        on_progress: called now and then with the state of the whole call.
    """

    device: torch.device | str = "cpu"
    seed: int = 0
    seconds: float | None = None
    on_result: Callable[[int, Reconstruction], None] | None = None
    on_progress: Callable[[Progress], None] | None = None


@dataclass(frozen=True)
class LabelGuess:
    """Labels inferred from one observation.

    Attributes:
        labels: ``[K, B]`` int64, the K most likely label multisets, most likely first, each sorted ascending.
        confidence: ``[K]`` in [0, 1], comparable within one guess only.
        features: ``[B, d]``, the samples' inputs of the last layer in the order of the best labels, where they were
            found on the way.
    """

    labels: Tensor
    confidence: Tensor
    features: Tensor | None = None

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

    def adapted(self) -> LabelInference:
        """The label inference of an adaptive attacker, who expects a defense; by default itself."""
        return self

    def check_model(self, knowledge: Knowledge) -> None:  # noqa: B027  most take any
        """Raise `UsageError` for a model whose updates cannot be read; by default every one can be tried."""

    @abstractmethod
    def infer(
        self, observations: Sequence[Observation], knowledge: Knowledge, run: Run, *, candidates: int = 1
    ) -> list[LabelGuess | None]:
        """Infer the labels behind each observation, all in one call.

        Args:
            observations: N observations, on the CPU; batch sizes may differ.
            knowledge: what else the attacker holds.
            run: its seed decides every random choice, whatever else is in the call.
            candidates: up to how many label multisets to return for each observation.

        Returns:
            N guesses, in order; None where the labels are left to the inversion (DLG's soft labels).
        """


class Inversion(ABC):
    """Images from updates. Subclass it in a file of your own and name it by ``_target_``."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of `ThreatModel` that must be granted."""
    needs_scale: ClassVar[bool] = True
    """Whether the size of the gradient matters, and so the learning rate where new weights are sent."""
    simulates: ClassVar[bool] = False
    """Whether it goes through the client's own optimiser, so that a known one needs no scale."""
    label_candidates: ClassVar[int] = 1
    """How many label multisets it decides between by itself, however many `attack.candidates` asks for."""
    fixed_batches: ClassVar[bool] = False
    """Whether it takes all updates of a client for updates of the same images."""
    needs_labels: ClassVar[bool] = False
    """Whether labels must be inferred first."""

    def adapted(self) -> Inversion:
        """The inversion of an adaptive attacker, whose guesses go through `Target.imitate`; by default itself.

        Raises:
            UsageError: there is nothing to adapt.
        """
        return self

    def check_model(self, knowledge: Knowledge, training: LocalTraining) -> None:  # noqa: B027  most take any
        """Raise `UsageError` for a model, or a training, that cannot be undone; by default everything can be tried.

        Args:
            knowledge: as `invert` gets it.
            training: how clients train, all of it.
        """

    @abstractmethod
    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        run: Run,
    ) -> list[Reconstruction]:
        """Rebuild the private images behind each observation, all in one call.

        Random starts depend on (seed, round, client, restart) only, so that a call with other observations beside it
        gives the same reconstructions. Each is also handed to `run.on_result` as soon as it is finished.

        Args:
            observations: N observations, on the CPU, of any rounds and so with any parameters.
            guesses: N label guesses; None asks for DLG's joint optimisation of image and soft label.
            knowledge: what else the attacker holds.
            run: device, seed, time and callbacks.

        Returns:
            N reconstructions, in order.
        """
