"""The control: labels drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from fedleak.attacks.base import Knowledge, LabelGuess, LabelInference, Run
from fedleak.attacks.labels.counting import label_total
from fedleak.capture import Observation
from fedleak.seeding import plain_generator


class Random(LabelInference):
    """Labels drawn uniformly, the control that every figure must be read against. Needs `batch_size`."""

    needs: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    def infer(
        self, observations: Sequence[Observation], knowledge: Knowledge, run: Run, *, candidates: int = 1
    ) -> list[LabelGuess | None]:
        """Independent draws, by (seed, round, client); None for an observation that carries an error."""
        return [
            None if observation.error is not None else _draw(observation, knowledge.classes, candidates, run.seed)
            for observation in observations
        ]


def _draw(observation: Observation, classes: int, candidates: int, seed: int) -> LabelGuess:
    generator = plain_generator(hash((seed, observation.round, observation.client)) % 2**63)
    total = label_total(observation)
    labels = torch.randint(classes, (max(1, candidates), total), generator=generator)
    return LabelGuess(labels.sort(dim=1).values, torch.full((len(labels),), 1 / len(labels)))
