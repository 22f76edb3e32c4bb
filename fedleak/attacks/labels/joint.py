"""DLG's choice: infer no labels, optimise soft labels together with the images."""

from __future__ import annotations

from collections.abc import Sequence

from fedleak.attacks.base import Knowledge, LabelGuess, LabelInference, Run
from fedleak.capture import Observation


class Joint(LabelInference):
    """Leave the labels to the inversion (DLG, Zhu et al. 2019). Needs nothing."""

    def infer(
        self, observations: Sequence[Observation], knowledge: Knowledge, run: Run, *, candidates: int = 1
    ) -> list[LabelGuess | None]:
        """None for each observation."""
        return [None] * len(observations)
