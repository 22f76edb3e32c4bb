"""DLG's choice: infer no labels, optimise soft labels together with the images."""

from __future__ import annotations

from collections.abc import Sequence

from fedleak.attacks.base import Knowledge, LabelGuess, LabelInference
from fedleak.capture import Observation


class Joint(LabelInference):
    """Leave the labels to the inversion (DLG, Zhu et al. 2019). Needs nothing."""

    def infer(
        self, observations: Sequence[Observation], knowledge: Knowledge, *, candidates: int = 1, seed: int = 0
    ) -> list[LabelGuess | None]:
        """None for each observation."""
        return [None] * len(observations)
