"""The labels the threat model grants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from fedleak.attacks.base import Knowledge, LabelGuess, LabelInference, Run
from fedleak.attacks.labels.last_layer import where
from fedleak.capture import Observation
from fedleak.errors import UsageError


class Known(LabelInference):
    """The true labels, for studies of the inversion alone. Needs `labels`."""

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def infer(
        self, observations: Sequence[Observation], knowledge: Knowledge, run: Run, *, candidates: int = 1
    ) -> list[LabelGuess | None]:
        """The granted labels of each observation; None for an observation that carries an error."""
        return [None if observation.error is not None else _granted(observation) for observation in observations]


def _granted(observation: Observation) -> LabelGuess:
    if observation.labels is None:
        raise UsageError(f"{where(observation)} comes without labels; grant them with threat.labels=true")
    return LabelGuess(observation.labels.long().sort().values[None], torch.ones(1))
